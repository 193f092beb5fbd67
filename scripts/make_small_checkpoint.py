"""Make a small real act-order GPTQ checkpoint: train a tiny Llama, quantise it with auto-gptq.

The text is the docstrings of Python's own standard library (PSF licence), so nothing is
downloaded. A byte-level BPE tokenizer and a four-block Llama are trained on them on the CPU, then
auto-gptq 0.7.1 quantises the model with desc_act=True (4 bits, symmetric, groups of 64,
true_sequential). Beside the weights the folder gets the configs, the tokenizer and a README.md
with the held-out perplexities.

The seed is fixed, but another CPU, thread count or Python release gives another file.

Environment (Python 3.11):

    pip install torch==2.13.0 transformers==4.53.3 peft==0.16.0 accelerate numpy rouge gekko \
        datasets==3.6.0 sentencepiece
    pip install --no-deps auto-gptq==0.7.1

Usage (takes about ten minutes on two cores):

    python scripts/make_small_checkpoint.py tests/checkpoints/tiny-llama-gptq-4bit-64g
"""

from __future__ import annotations

import argparse
import ast
import math
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import auto_gptq.modeling._base
import auto_gptq.modeling._const
import auto_gptq.modeling._utils
import torch
from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
SKIPPED_DIRS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
HELD_OUT_EVERY = 20
TRAIN_WINDOW = 128
LONG_WINDOW = 256
CALIBRATION_WINDOWS = 64
PROMPTS = ("Return the", "This module provides", "If the optional argument")


def stdlib_docstrings() -> tuple[list[str], list[str]]:
    """Distinct docstrings of the standard library; every 20th source file is held out."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [p for p in root.rglob("*.py") if not SKIPPED_DIRS & set(p.relative_to(root).parts)]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    train: list[str] = []
    held_out: list[str] = []
    seen: set[str] = set()
    for index, path in enumerate(sorted(files, key=lambda p: p.relative_to(root).as_posix())):
        target = held_out if index % HELD_OUT_EVERY == 0 else train
        for node in ast.walk(ast.parse(path.read_bytes())):
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            if text and text not in seen:
                seen.add(text)
                target.append(text)
    return train, held_out


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 1024 tokens; token 0 ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one row of token ids, each text followed by the end token."""
    encoded = tokenizer([text + END for text in texts], verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in ids])


def random_windows(
    stream: torch.Tensor, length: int, count: int, rng: torch.Generator
) -> torch.Tensor:
    """`count` windows of `length` tokens that start at random places, as (count, length)."""
    starts = torch.randint(len(stream) - length + 1, (count, 1), generator=rng)
    return stream[starts + torch.arange(length)]


def train_model(stream: torch.Tensor, steps: int, batch: int) -> LlamaForCausalLM:
    """Train the tiny Llama in fp32 with AdamW (warm-up, then cosine decay)."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=704,
        num_hidden_layers=4,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    peak, warmup = 3e-3, 50
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.1)

    def learning_rate(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        return min((step + 1) / warmup, 0.05 + 0.95 * cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)
    rng = torch.Generator().manual_seed(1)
    start = time.time()
    for step in range(steps):
        ids = random_windows(stream, TRAIN_WINDOW, batch, rng)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.3f} {time.time() - start:.0f} s", flush=True)
    return model.eval()


@torch.inference_mode()
def perplexity(model: torch.nn.Module, stream: torch.Tensor) -> float:
    """Perplexity over consecutive windows of the stream."""
    count = len(stream) // LONG_WINDOW
    losses = []
    for ids in stream[: count * LONG_WINDOW].view(count, 1, LONG_WINDOW):
        logits = model(input_ids=ids).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))
    return math.exp(torch.stack(losses).mean().item())


@torch.inference_mode()
def print_samples(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, title: str) -> None:
    """Greedy continuations of the prompts."""
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=0)
        print(f"{title}: {tokenizer.decode(output[0])!r}")


@contextmanager
def auto_gptq_on_cpu() -> Iterator[None]:
    """The patches auto-gptq 0.7.1 needs to load and quantise a model without CUDA."""
    cpu = torch.device("cpu")
    modeling = auto_gptq.modeling
    with ExitStack() as stack:
        for module in (modeling._base, modeling._const, modeling._utils):
            stack.enter_context(patch.object(module, "CUDA_0", cpu))
        stack.enter_context(patch("torch.cuda.is_available", lambda: True))
        stack.enter_context(patch("torch.cuda.synchronize", lambda: None))
        stack.enter_context(patch("torch.cuda.empty_cache", lambda: None))
        yield


def quantise(model: LlamaForCausalLM, windows: torch.Tensor, out: Path) -> None:
    """Quantise the model with auto-gptq and save it under `out`."""
    examples = [
        {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]} for ids in windows
    ]
    config = BaseQuantizeConfig(
        bits=4, group_size=64, desc_act=True, sym=True, true_sequential=True, damp_percent=0.01
    )
    with tempfile.TemporaryDirectory() as folder, auto_gptq_on_cpu():
        model.save_pretrained(folder)
        quantiser = AutoGPTQForCausalLM.from_pretrained(folder, config, torch_dtype=torch.float16)
        quantiser.quantize(examples, cache_examples_on_gpu=False)
        quantiser.save_quantized(str(out))


def load_quantised(out: Path) -> torch.nn.Module:
    """The quantised model as auto-gptq itself loads it on a CPU."""
    return AutoGPTQForCausalLM.from_quantized(
        str(out),
        device="cpu",
        inject_fused_attention=False,
        inject_fused_mlp=False,
        use_marlin=False,
    ).model


def print_group_order(out: Path) -> None:
    """How many layers have a permuted g_idx, and which of them share one."""
    tensors = load_file(out / "gptq_model-4bit-64g.safetensors")
    g_idx = {name: tensor for name, tensor in tensors.items() if name.endswith(".g_idx")}
    permuted = sum(not torch.equal(t, torch.arange(len(t)) // 64) for t in g_idx.values())
    print(f"{permuted} of {len(g_idx)} layers have a non-trivial g_idx")
    for siblings in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        first, *others = ([t for n, t in g_idx.items() if part in n] for part in siblings)
        same = all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
        print(f"{' '.join(siblings)} share g_idx: {same}")


def write_readme(out: Path, fp16: float, quantised: float) -> None:
    """The card of the checkpoint."""
    (out / "README.md").write_text(
        f"""---
license: apache-2.0
---

# tiny-llama-gptq-4bit-64g

A four-block Llama (hidden size 256, 3 million parameters) trained for a few minutes on the
docstrings of Python's standard library, then quantised by auto-gptq 0.7.1: 4 bits, symmetric,
group size 64, `desc_act=true`, `true_sequential=true`. It is a test file for tools that handle
act-order checkpoints and is good for nothing else.

| weights | perplexity on held-out docstrings |
|---|---|
| fp16 | {fp16:.3f} |
| quantised | {quantised:.3f} |

The files are as auto-gptq writes them: an all-zero `.bias` for every linear, and `lm_head.weight`
although the embeddings are tied. Made by `scripts/make_small_checkpoint.py`; another CPU, thread
count or Python release gives another file.

Licence of the weights: Apache-2.0. The text they were trained on is under the PSF licence.
"""
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="output directory")
    parser.add_argument("--steps", type=int, default=1300, help="training steps")
    parser.add_argument("--batch", type=int, default=16, help="windows per training step")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)

    train_texts, held_out_texts = stdlib_docstrings()
    tokenizer = train_tokenizer(train_texts)
    stream = token_stream(tokenizer, train_texts)
    held_out = token_stream(tokenizer, held_out_texts)
    print(f"{len(stream)} training tokens, {len(held_out)} held out")

    model = train_model(stream, args.steps, args.batch).half()
    fp16 = perplexity(model, held_out)
    print_samples(model, tokenizer, "fp16")

    rng = torch.Generator().manual_seed(2)
    quantise(model, random_windows(stream, LONG_WINDOW, CALIBRATION_WINDOWS, rng), args.out)
    tokenizer.save_pretrained(args.out)
    model.generation_config.save_pretrained(args.out)

    loaded = load_quantised(args.out)
    quantised = perplexity(loaded, held_out)
    print_samples(loaded, tokenizer, "quantised")
    write_readme(args.out, fp16, quantised)

    print(f"held-out perplexity: fp16 {fp16:.3f}, quantised {quantised:.3f}")
    print_group_order(args.out)
    print(f"{sum(p.stat().st_size for p in args.out.iterdir())} bytes in {args.out}")


if __name__ == "__main__":
    main()
