"""Have auto-gptq 0.7.1 quantise a tiny act-order model of each family that it knows, and answer.

Random models of the real transformers classes (float16, two blocks) are quantised by auto-gptq on
random tokens (4 bits, groups of 32, desc_act) and saved by it, each into a directory of its own:
a checkpoint as auto-gptq publishes it, with the config.json of its time. auto-gptq then loads the
directory, and computes, in float32 and with its own dequantisation, the logits. Written are

    OUT/CASE/                 the checkpoint; CASE is a model_type, or one and a form of it
    OUT/answers.safetensors   "tokens" (1, T), and for every CASE the float32 logits (1, T, vocab)

tests/test_oracle.py compares the ranks of a conversion with these answers. auto-gptq knows of
each family what its blocks' linear layers are called; for others there is tests/test_families.py.

Environment (Python 3.11):

    pip install torch==2.13.0 transformers==4.53.3 peft==0.16.0 accelerate numpy rouge gekko \
        datasets==3.6.0 sentencepiece
    pip install --no-deps auto-gptq==0.7.1

Usage:

    python scripts/make_oracle.py tests/oracle
"""

from __future__ import annotations

import argparse
import inspect
import logging
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB, BLOCKS, HIDDEN, HEADS, KV_HEADS, MLP, POSITIONS = 96, 2, 64, 8, 4, 96, 32
SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS}
SIZES |= {"max_position_embeddings": POSITIONS}
LLAMA = SIZES | {"intermediate_size": MLP, "num_key_value_heads": KV_HEADS}
GPT2 = {"n_embd": HIDDEN, "n_layer": BLOCKS, "n_head": HEADS, "n_positions": POSITIONS}
GPT2 |= {"n_inner": MLP}
FALCON = SIZES | {"ffn_hidden_size": MLP}
RW = {"multi_query": False, "bias": True, "alibi": True, "parallel_attn": False}
# auto-gptq takes multiples of 32 columns alone: one kv head in a layer with q must have 32.
CASES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA | {"num_local_experts": 4},
    "qwen2": LLAMA,
    "gemma": LLAMA | {"head_dim": 8},
    "opt": SIZES | {"ffn_dim": MLP, "word_embed_proj_dim": HIDDEN},
    "gptj": GPT2 | {"rotary_dim": 4},
    "codegen": GPT2 | {"rotary_dim": 4},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2 | {"n_embd": 128, "n_head": 4},
    "gpt_bigcode-kv_heads": GPT2 | {"multi_query": False},
    "gpt_neox": SIZES | {"intermediate_size": MLP},
    "bloom": {"hidden_size": HIDDEN, "n_layer": BLOCKS, "n_head": HEADS},
    "falcon": FALCON | {"new_decoder_architecture": True, "num_kv_heads": KV_HEADS},
    "falcon-7b": FALCON | {"hidden_size": 128, "num_attention_heads": 4},
    "falcon-rw": FALCON | RW,
}
TOKENS = [[5, 60, 30, 41, 7, 93, 12, 11, 70, 22, 8, 3]]


def random_model(model_type: str, sizes: dict[str, Any], directory: Path) -> None:
    """Write an unquantised checkpoint."""
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(model_type, vocab_size=VOCAB, **special, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) * 0.1
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    model.half().save_pretrained(directory)


def call_by_name(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module; auto-gptq's stand-in for the first block takes all but one input by name."""
    if type(module).__name__ == "LayerHijacker":
        args, more = args[:1], args[1:]
        names = list(inspect.signature(module.module.forward).parameters)[1:]
        kwargs |= dict(zip(names, more, strict=False))
    return module._call_impl(*args, **kwargs)


def quantise(source: Path, out: Path) -> None:
    """What auto-gptq makes of a checkpoint, on a CPU that it takes for a GPU."""
    cpu = torch.device("cpu")
    examples = [
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        for tokens in torch.randint(3, VOCAB, (16, 1, POSITIONS))
    ]
    config = BaseQuantizeConfig(bits=4, group_size=32, desc_act=True)
    with ExitStack() as stack:
        stack.enter_context(patch("torch.cuda.is_available", lambda: True))
        stack.enter_context(patch("torch.cuda.synchronize", lambda: None))
        # what transformers asks each block for, and auto-gptq's stand-in for the first one lacks
        asked = patch.object(torch.nn.Module, "attention_type", "full_attention", create=True)
        stack.enter_context(asked)
        stack.enter_context(patch.object(torch.nn.Module, "__call__", call_by_name))
        for module in ("_base", "_utils"):
            stack.enter_context(patch(f"auto_gptq.modeling.{module}.CUDA_0", cpu))
        model = AutoGPTQForCausalLM.from_pretrained(str(source), config, torch_dtype=torch.float16)
        model.quantize(examples)
        model.save_quantized(str(out), use_safetensors=True)


@torch.inference_mode()
def answer(directory: Path) -> torch.Tensor:
    """The logits of auto-gptq's own loading of a checkpoint that it wrote."""
    model = AutoGPTQForCausalLM.from_quantized(
        str(directory), device="cpu", torch_dtype=torch.float32
    ).model.float()  # the scales as well
    layers = [module for module in model.modules() if hasattr(module, "g_idx")]
    for layer in layers:
        assert type(layer) is QuantLinear, "not the class that uses g_idx on a CPU"
        assert (layer.g_idx.diff() < 0).any(), "not act-ordered"
    logits = model(torch.tensor(TOKENS)).logits
    assert logits.dtype == torch.float32
    print(f"{directory.name}: {len(layers)} layers, logits up to {float(logits.abs().max()):.2f}")
    return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="output directory")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)  # other numbers give other last digits
    args.out.mkdir(parents=True, exist_ok=True)
    answers = {"tokens": torch.tensor(TOKENS)}
    for case, sizes in CASES.items():
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as directory:
            random_model(case.partition("-")[0], sizes, Path(directory))
            quantise(Path(directory), args.out / case)
        answers[case] = answer(args.out / case)
    save_file(answers, args.out / "answers.safetensors")


if __name__ == "__main__":
    main()
