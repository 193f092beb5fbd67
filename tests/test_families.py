"""Every family of the table: a small model of its transformers class, packed by our own packer.

Each linear layer inside a block is given random integers, and its dequantised weight to the
transformers model; the model's float32 logits are what the ranks' must be.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from factories import dequantise, edit_tensors, make_g_idx, make_layer, refresh_checksums
from ranks import run_ranks
from safetensors.torch import save_file
from torch import nn

from tpgptq_convert.families import FAMILIES
from tpgptq_convert.packing import pack_cols, unpack_cols

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
    "gptj": {"rotary_dim": 8},
    "persimmon": {"head_dim": 8},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 4},
}
# Other forms that a family has.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_bigcode, kv heads of its own": ("gpt_bigcode", {"multi_query": False}),
    "falcon, one kv head": ("falcon", {"ffn_hidden_size": 160}),
    "falcon, kv heads of its own": ("falcon", {"multi_query": False, "bias": True}),
}
CASES = {name: (name, CONFIGS.get(name, {})) for name in FAMILIES} | FORMS
# How SIZES are called where they have names of their own.
SHORT = {
    **{"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "intermediate_size": "n_inner"},
    **{"num_attention_heads": "n_head", "max_position_embeddings": "n_positions"},
}
NAMES = {"gptj": SHORT, "gpt2": SHORT, "gpt_bigcode": SHORT}
TOKENS = [[5, 60, 30, 41, 7, 93, 12, 11, 70, 22, 8, 3]]


README = Path(__file__).parent.parent / "README.md"


def table() -> str:
    """What the README says of the families: each cell is a case of the tests below."""
    head = "model_type | fused layers | convert | verify | logits, tp 2 | logits, tp 4 | packed by"
    rows = [
        f"`{name}` | {' '.join(f'`{x.name}`' for x in family.linears if x.fused)} "
        "| yes | yes | equal | equal | our packer"
        for name, family in FAMILIES.items()
    ]
    lines = [head, "|".join([" --- "] * 7), *rows]
    return "".join(f"| {line.strip()} |\n" for line in lines)


def test_the_readme_lists_every_family() -> None:
    assert table() in README.read_text()


def build(directory: Path, model_type: str, more: Mapping[str, Any]) -> nn.Module:
    """Write a checkpoint and return the float32 model that it stands for."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    names = NAMES.get(model_type, {})
    sizes = {names.get(name, name): size for name, size in SIZES.items()}
    if model_type == "falcon":
        del sizes["head_dim"]  # can't be said
    config = AutoConfig.for_model(model_type, **sizes | more)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():  # biases and norms are all alike otherwise
        parameter.data += torch.randn_like(parameter) * 0.1
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    elif FAMILIES[model_type].head not in state:  # its name before transformers 5
        state[FAMILIES[model_type].head] = state.pop("lm_head.weight")
    prefix = FAMILIES[model_type].prefix
    count = 0
    for name, module in model.named_modules():
        conv = type(module).__name__ == "Conv1D"  # gpt2's, (K, N)
        if not name.startswith(f"{prefix}.") or not (conv or isinstance(module, nn.Linear)):
            continue
        k, n = module.weight.shape if conv else module.weight.T.shape
        g_idx = make_g_idx(rng, k, 32)
        layer = make_layer(rng, k, n, g_idx)
        weight = dequantise(layer, g_idx).float()
        module.weight.data = weight if conv else weight.T
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
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_logits_of_the_ranks_are_the_models(
    tpgptq: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: tuple[str, Mapping[str, Any]],
    tp: int,
) -> None:
    model = build(tmp_path / "model", *case)
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


def swap_columns(tensors: dict[str, torch.Tensor], module: str, one: int, other: int) -> None:
    """Two columns of a layer, eight apart at least, with all that belongs to them."""
    order = torch.arange(tensors[f"{module}.scales"].shape[1])
    order[one], order[other] = other, one
    zeros = unpack_cols(tensors[f"{module}.qzeros"], 4)[:, order]
    tensors[f"{module}.qzeros"] = pack_cols(zeros, 4)
    for part in ("qweight", "scales", "bias"):
        if f"{module}.{part}" in tensors:
            tensors[f"{module}.{part}"] = tensors[f"{module}.{part}"][..., order].contiguous()


@pytest.mark.parametrize("with_index", [True, False], ids=["exact", "functional"])
@pytest.mark.parametrize(
    ("model_type", "module"),
    [
        ("phi3", "model.layers.1.self_attn.qkv_proj"),
        ("phi3", "model.layers.1.mlp.gate_up_proj"),
        ("gpt_bigcode", "transformer.h.1.attn.c_attn"),
        ("gpt_neox", "gpt_neox.layers.1.attention.query_key_value"),
    ],
)
def test_verify_finds_swapped_columns_of_fused_layers(
    tpgptq: Run, tmp_path: Path, model_type: str, module: str, with_index: bool
) -> None:
    build(tmp_path / "model", model_type, {})
    out = tmp_path / "out"
    assert tpgptq("convert", "--tp", 2, tmp_path / "model", out).exit_code == 0
    part = out / "model-rank-1-part-0.safetensors"
    columns = 0

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        nonlocal columns
        columns = tensors[f"{module}.scales"].shape[1]
        swap_columns(tensors, module, 3, columns - 5)  # of the first part and of the last

    edit_tensors(part, edit)
    if not with_index:
        (out / "tpgptq-index.safetensors").unlink()
    refresh_checksums(out)
    result = tpgptq("verify", tmp_path / "model", out)
    assert result.exit_code == 3
    if with_index:
        assert f"{module}: rank 1: qweight holds values that differ" in result.stderr


def test_fused_layers_are_not_merged(tpgptq: Run, tmp_path: Path) -> None:
    build(tmp_path / "model", "phi3", {})
    for more in ((), ("--dry-run",)):
        result = tpgptq(
            "convert", "--tp", 2, "--layout", "merged", *more, tmp_path / "model", tmp_path / "out"
        )
        assert result.exit_code == 1
        assert "--layout merged: self_attn.qkv_proj and mlp.gate_up_proj of phi3" in result.stderr
        assert not (tmp_path / "out").exists()


if __name__ == "__main__":
    sys.stdout.write(table())
