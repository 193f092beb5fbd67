"""Checkpoints of compressed-tensors with actorder: group, made and read by its own code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from factories import edit_tensors, make_g_idx
from ranks import run_ranks
from safetensors.torch import save_file
from torch import nn

from tpgptq_convert import convert
from tpgptq_convert.checkpoint import Checkpoint, Layer

Run = Callable[..., Result]
TOKENS = torch.tensor([[5, 60, 30, 41, 7, 93, 12, 11, 70, 22, 8, 3]])
Q0 = "model.layers.0.self_attn.q_proj"


def build(
    directory: Path,
    *,
    bits: int = 4,
    sym: bool = True,
    group_size: int = 32,
    actorder: str | None = "group",
    strategy: str = "group",
) -> nn.Module:
    """Write a checkpoint with the library, and return the float32 model that it reads from it."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    config = LlamaConfig(
        **{"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 96},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).float().eval()
    weights = QuantizationArgs(
        **{"num_bits": bits, "symmetric": sym, "strategy": strategy, "actorder": actorder},
        group_size=group_size if strategy == "group" else None,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
    quantization = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, quantization)
    count, half = 0, 1 << (bits - 1)
    for module in model.modules():
        if not hasattr(module, "weight_scale"):
            continue
        n, k = module.weight.shape
        count += 1
        if hasattr(module, "weight_g_idx"):
            module.weight_g_idx.data = torch.from_numpy(make_g_idx(rng, k, group_size))
        # In files they are float16, and computed with as float32.
        scale = rng.uniform(0.5, 1.5, module.weight_scale.shape) / np.sqrt(k) / half
        module.weight_scale.data = torch.from_numpy(scale).half().float()
        if not sym:
            zeros = rng.integers(-half, half, module.weight_zero_point.shape)
            module.weight_zero_point.data = torch.from_numpy(zeros).to(torch.int8)
        module.weight.data = torch.randn(n, k) / np.sqrt(k) / 2
    assert count == 14
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    directory.mkdir()
    state = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(state, directory / "model.safetensors")
    (directory / "config.json").write_text(config.to_json_string(use_diff=False))
    compressor.update_config(str(directory))
    model.load_state_dict(
        {name: t.float() if t.is_floating_point() else t for name, t in state.items()}
    )
    compressor.decompress_model(model)
    return model


@pytest.mark.parametrize("layout", ["ranks", "merged"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_logits_are_those_of_the_librarys_own_weights(
    tpgptq: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    sym: bool,
    tp: int,
    layout: str,
) -> None:
    model = build(tmp_path / "model", bits=bits, sym=sym)
    out = tmp_path / "out"
    done = tpgptq("convert", "--tp", tp, "--layout", layout, tmp_path / "model", out)  # and verify
    assert done.exit_code == 0, done.output
    with torch.inference_mode():
        expected = model(TOKENS).logits
    answers, _ = run_ranks(out, tp, lambda rank: rank(TOKENS).logits, monkeypatch)
    scale = float(expected.abs().max())
    assert scale > 0.1
    for answer in answers:
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5 * scale)


def test_inspect_says_what_it_is(tpgptq: Run, tmp_path: Path) -> None:
    build(tmp_path / "model")
    result = tpgptq("inspect", "--tp", 2, tmp_path / "model")
    assert "4 bits, groups of 32, symmetric, compressed-tensors, desc_act true" in result.stdout
    assert "14 of 14 layers are truly act-ordered." in result.stdout
    assert "Note:" not in result.stdout


@pytest.mark.parametrize(
    "plain", [{"actorder": "weight"}, {"actorder": None}, {"actorder": None, "strategy": "channel"}]
)
def test_plain_groups_are_said_to_be_plain(
    tpgptq: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: dict[str, Any]
) -> None:
    model = build(tmp_path / "model", **plain)
    result = tpgptq("inspect", tmp_path / "model")
    assert "0 of 14 layers are truly act-ordered." in result.stdout
    assert "Note: actorder is not group: the groups are plain already" in result.stdout
    out = tmp_path / "out"
    assert tpgptq("convert", "--tp", 2, tmp_path / "model", out).exit_code == 0
    answers, _ = run_ranks(out, 2, lambda rank: rank(TOKENS).logits, monkeypatch)
    torch.testing.assert_close(answers[0], model(TOKENS).logits, rtol=0, atol=1e-5)


def test_an_order_that_was_never_set_is_none(tpgptq: Run, tmp_path: Path) -> None:
    build(tmp_path / "model")
    edit_tensors(
        tmp_path / "model" / "model.safetensors",
        lambda tensors: tensors[f"{Q0}.weight_g_idx"].fill_(-1),
    )
    result = tpgptq("inspect", tmp_path / "model")
    assert "13 of 14 layers are truly act-ordered." in result.stdout


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_verify_reads_the_source_in_its_own_way(
    tpgptq: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, sym: bool
) -> None:
    """What convert misreads is found, though convert and verify would misread GPTQ alike."""
    build(tmp_path / "model", sym=sym)
    right = Checkpoint.part

    def wrong(self: Checkpoint, layer: Layer, name: str, *more: Any) -> Any:
        array = right(self, layer, name, *more)
        if name != part or layer.name != Q0:
            return array
        if sym and part == "qzeros":
            return array ^ 1
        return np.ascontiguousarray(array[:, ::-1])

    monkeypatch.setattr(Checkpoint, "part", wrong)
    if sym and part == "qzeros":  # convert refuses them, too
        monkeypatch.setattr(convert, "check_zero_points", lambda *_: True)
    out = tmp_path / "out"
    done = tpgptq("convert", "--tp", 2, "--no-verify", tmp_path / "model", out)
    assert done.exit_code == 0, done.output
    result = tpgptq("verify", tmp_path / "model", out)
    assert result.exit_code == 3
    what = {"qweight": "qweight holds values that differ"}.get(part, f"{part} of its rows' groups")
    assert f"{Q0}: rank 0: {what}" in result.stderr


def edit_config(model: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change quantization_config in place."""
    path = model / "config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))


def weights(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda quant: quant["config_groups"]["group_0"]["weights"].update(values)


def other_group(quant: dict[str, Any]) -> None:
    first = quant["config_groups"]["group_0"]
    quant["config_groups"]["mlp"] = first | {"weights": first["weights"] | {"num_bits": 8}}


INT8 = {"num_bits": 8, "type": "int"}


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda q: q.update(format="int-quantized"), "format is 'int-quantized'; must be 'pack-"),
        (lambda q: q.update(kv_cache_scheme=INT8), "kv_cache_scheme is {'num_bits': 8"),
        (lambda q: q.update(transform_config={"config_groups": {}}), "transform_config is {"),
        (lambda q: q.update(sparsity_config={"format": "sparse-bitmask"}), "sparsity_config is 's"),
        (lambda q: q["config_groups"]["group_0"].update(input_activations=INT8), "group_0.input_a"),
        (weights(type="float"), "config_groups.group_0.weights.type is 'float'; must be 'int'"),
        (weights(strategy="block"), "weights.strategy is 'block'; must be 'group' or 'channel'"),
        (weights(dynamic=True), "weights.dynamic is True; must be False"),
        (weights(actorder="upside-down"), "weights.actorder is 'upside-down'; must be None or "),
        (weights(actorder=[]), "weights.actorder is []; must be None or "),
        (weights(num_bits=5), "bits is 5; must be one of"),
        (weights(num_bits=3), "num_bits is 3; must be 2 or 4 or 8"),
        (weights(num_bits=None), "lack 'bits'"),
        (weights(group_size=None), "lack 'group_size'"),
        (weights(symmetric="yes"), "sym is 'yes'; must be of type bool"),
        (other_group, "config_groups are group_0, mlp, which don't say one and the same"),
        (lambda q: q.update(config_groups=[]), "config_groups are none, which"),
    ],
)
def test_other_kinds_are_refused(
    tpgptq: Run, tmp_path: Path, edit: Callable[[dict[str, Any]], Any], expected: str
) -> None:
    build(tmp_path / "model")
    edit_config(tmp_path / "model", edit)
    refused(tpgptq, tmp_path, expected)


def refused(tpgptq: Run, directory: Path, expected: str) -> None:
    result = tpgptq("convert", "--tp", 2, directory / "model", directory / "out")
    assert result.exit_code == 1
    assert expected in result.stderr
    assert "Hint: " in result.stderr
    assert not (directory / "out").exists()


def test_groups_that_say_the_same_are_one(tpgptq: Run, tmp_path: Path) -> None:
    build(tmp_path / "model")

    def twice(quant: dict[str, Any]) -> None:
        quant["config_groups"]["again"] = quant["config_groups"]["group_0"] | {"targets": ["re:.*"]}

    edit_config(tmp_path / "model", twice)
    assert tpgptq("inspect", tmp_path / "model").exit_code == 0


@pytest.mark.parametrize(
    ("part", "change", "expected"),
    [
        ("weight_shape", lambda t: t.flip(0) + 1, "weight_shape: says [129, 129]; must be [128, 1"),
        ("weight_g_idx", torch.zeros_like, "q_proj: has groups of other than 32 rows; must not"),
        ("weight_g_idx", lambda t: t.roll(1).clamp(max=2), "q_proj: has groups of other than 32"),
        ("weight_g_idx", lambda t: t + 1, "weight_g_idx: has values from 1 to 4; must be 0 to 3"),
        ("weight_g_idx", lambda t: None, "missing, though the config says actorder: group"),
        ("weight_packed", lambda t: t.T.contiguous(), "I32 [16, 128]; must be I32 [128, 16]"),
        ("weight_scale", lambda t: t[:, :2].clone(), "is F16 [128, 2]; must be"),
        ("weight_zero_point", lambda t: torch.zeros(128, 4, dtype=torch.int8), "is I8 [128, 4]; m"),
        ("weight_zero_point", lambda t: None, "weight_zero_point: missing; must be I32 [16, 4]"),
    ],
)
def test_damaged_tensors_are_named(
    tpgptq: Run, tmp_path: Path, part: str, change: Callable[..., Any], expected: str
) -> None:
    build(tmp_path / "model", sym=False)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        changed = change(tensors.pop(f"{Q0}.{part}"))
        if changed is not None:
            tensors[f"{Q0}.{part}"] = changed

    edit_tensors(tmp_path / "model" / "model.safetensors", edit)
    refused(tpgptq, tmp_path, expected)


def test_an_order_where_none_is_said_is_refused(tpgptq: Run, tmp_path: Path) -> None:
    build(tmp_path / "model")
    edit_config(tmp_path / "model", weights(actorder="static"))
    refused(tpgptq, tmp_path, f"{Q0}.weight_g_idx: unknown; every tensor must belong")


@pytest.mark.parametrize("sym", [True, False])
def test_rules_of_gptqmodel_are_not_for_it(tpgptq: Run, tmp_path: Path, sym: bool) -> None:
    """One that said another sym would make of zero points what they are not."""
    model, out = tmp_path / "model", tmp_path / "out"
    build(model, sym=sym)
    rules = {"bits": 4, "group_size": 32, "dynamic": {".*q_proj": {"sym": not sym}}}
    (model / "quantize_config.json").write_text(json.dumps(rules))
    for command in (["inspect", model], ["convert", "--tp", 2, model, out]):
        result = tpgptq(*command)
        assert result.exit_code == 1
        assert "states dynamic, and compressed-tensors for quant_method" in result.stderr
