"""Every family of the table: a small model of its transformers class, packed by our own packer.

Each linear layer inside a block is given random integers, and its dequantised weight to the
transformers model; the model's float32 logits are what the ranks' must be.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from factories import dequantise, make_g_idx, make_layer
from ranks import run_ranks
from safetensors.torch import save_file
from torch import nn

from tpgptq_convert.families import FAMILIES

Run = Callable[..., Result]
SIZES = {
    **{"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 96},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16},
    **{"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
# What differs from SIZES, or is worth having beside them.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "gemma3_text": {"sliding_window": 8},
    "seed_oss": {"attention_bias": True, "attention_out_bias": True},
    "ernie4_5": {"use_bias": True},
    "helium": {"head_dim": 8},
    "exaone4": {"sliding_window": 8, "sliding_window_pattern": 2},
    "stablelm": {"head_dim": 8, "use_qkv_bias": True},
    "opt": {"ffn_dim": 160, "word_embed_proj_dim": 64},
    "gptj": {"rotary_dim": 8, "n_inner": 160},
}
# How SIZES are called where they have names of their own.
NAMES = {
    "gptj": {
        **{"hidden_size": "n_embd", "num_hidden_layers": "n_layer"},
        **{"num_attention_heads": "n_head", "max_position_embeddings": "n_positions"},
    },
}
TOKENS = [[5, 60, 30, 41, 7, 93, 12, 11, 70, 22, 8, 3]]


def build(directory: Path, model_type: str) -> nn.Module:
    """Write a checkpoint and return the float32 model that it stands for."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    names = NAMES.get(model_type, {})
    sizes = {names.get(name, name): size for name, size in SIZES.items()}
    config = AutoConfig.for_model(model_type, **sizes | CONFIGS.get(model_type, {}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():  # biases and norms are all alike otherwise
        parameter.data += torch.randn_like(parameter) * 0.1
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    prefix = FAMILIES[model_type].prefix
    count = 0
    for name, module in model.named_modules():
        if not name.startswith(f"{prefix}.") or not isinstance(module, nn.Linear):
            continue
        k, n = module.in_features, module.out_features
        g_idx = make_g_idx(rng, k, 32)
        layer = make_layer(rng, k, n, g_idx)
        module.weight.data = dequantise(layer, g_idx).T.float()
        del state[f"{name}.weight"]
        state |= {f"{name}.{part}": tensor for part, tensor in layer.items()}
        count += 1
    assert count == 2 * len(FAMILIES[model_type].linears)
    directory.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()},
        directory / "model.safetensors",
    )
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    text = json.loads(config.to_json_string(use_diff=False))
    (directory / "config.json").write_text(json.dumps(text | {"quantization_config": quantization}))
    return model


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_logits_of_the_ranks_are_the_models(
    tpgptq: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, tp: int
) -> None:
    model = build(tmp_path / "model", model_type)
    done = tpgptq("convert", "--tp", tp, tmp_path / "model", tmp_path / "out")  # and verify
    assert done.exit_code == 0, done.output
    tokens = torch.tensor(TOKENS)
    with torch.inference_mode():
        expected = model(tokens).logits
    answers, sums = run_ranks(tmp_path / "out", tp, lambda rank: rank(tokens).logits, monkeypatch)
    scale = float(expected.abs().max())
    assert scale > 0.1
    for answer in answers:
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5 * scale)
    assert sums == 2 * model.config.num_hidden_layers
