"""Layout gptq: an ordinary GPTQ checkpoint with the MLP folded, read by what reads any other.

TPGPTQ_AUTO_GPTQ names a Python that has auto-gptq 0.7.1 and what it needs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_compressed
import test_families
import torch
from click.testing import Result
from compare_tokens import source_model
from factories import edit_tensors, edit_text, make_checkpoint

from tpgptq_convert import tpgptq_runtime
from tpgptq_convert.checkpoint import read_checkpoint
from tpgptq_convert.families import Axis

Run = Callable[..., Result]
TOKENS = torch.tensor([[5, 30, 17, 7, 31, 12, 11, 22, 8, 3]])
DOWN = "model.layers.0.mlp.down_proj"
WEIGHTS = "model-00001-of-00001.safetensors"


def fold(tpgptq: Run, model: Path, out: Path, tp: int = 2) -> Path:
    """Convert, and verify."""
    done = tpgptq("convert", "--tp", tp, "--layout", "gptq", model, out)
    assert done.exit_code == 0, done.output
    return out


def ordinary(out: Path) -> Path:
    """The output as one has it who has heard neither of this tool nor of `dynamic`."""
    plain = out.with_name(f"{out.name}-plain")
    shutil.copytree(out, plain, ignore=shutil.ignore_patterns("tpgptq*", "quantize_config.json"))
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"].pop("dynamic", None)
    (plain / "config.json").write_text(json.dumps(config))
    return plain


def said(out: Path) -> dict[str, Any]:
    """The quantisation config, which is the same in both files."""
    config: dict[str, Any] = json.loads((out / "config.json").read_text())["quantization_config"]
    assert json.loads((out / "quantize_config.json").read_text()) == config
    return config


def same_logits(one: torch.nn.Module, other: torch.nn.Module) -> None:
    with torch.inference_mode():
        expected, logits = one(TOKENS).logits, other(TOKENS).logits
    scale = float(expected.abs().max())
    assert scale > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"model_type": "qwen2", "sym": False, "checkpoint_format": "gptq_v2"},
        {"config": {"mlp_bias": True}, "bits": 8, "g_idx": "different"},
        {"group_size": 64, "hidden": 96, "intermediate": 352, "files": 2, "tied": True},
    ],
    ids=["llama", "qwen2-asym-v2", "8-bit-biases", "ragged"],
)
def test_it_is_read_as_any_gptq_checkpoint(
    tpgptq: Run, tmp_path: Path, shape: dict[str, Any], tp: int
) -> None:
    model = make_checkpoint(tmp_path / "model", kv_heads=4, **shape)
    source = read_checkpoint(model)
    plain = ordinary(fold(tpgptq, model, tmp_path / "out", tp))
    folded = read_checkpoint(plain)
    ((rule, values),) = said(tmp_path / "out")["dynamic"].items()
    assert values == {"desc_act": False}
    for before, after in zip(source.layers, folded.layers, strict=True):
        reader = before.linear.reads is Axis.MLP
        if reader:
            assert before.act_order
            assert not after.act_order
            assert after.in_features % (tp * after.group_size) == 0
        else:
            np.testing.assert_array_equal(before.g_idx, after.g_idx)
        # The rule, as GPTQModel and servers read it, speaks of this layer alone.
        assert bool(re.match(rule.removeprefix("+:"), before.name)) is reader
    assert folded.mlps == {"mlp": folded.config["intermediate_size"]}
    same_logits(source_model(model), source_model(plain))


@pytest.mark.parametrize("model_type", ["phi3", "opt", "gpt_bigcode", "gemma2"])
def test_other_families(tpgptq: Run, tmp_path: Path, model_type: str) -> None:
    model = test_families.build(tmp_path / "model", model_type, {})
    same_logits(model, source_model(ordinary(fold(tpgptq, tmp_path / "model", tmp_path / "out"))))


def test_a_compressed_tensors_checkpoint_becomes_one_of_gptq(tpgptq: Run, tmp_path: Path) -> None:
    model = test_compressed.build(tmp_path / "model", sym=False)
    plain = ordinary(fold(tpgptq, tmp_path / "model", tmp_path / "out"))
    assert read_checkpoint(plain).quant.checkpoint_format == "gptq_v2"
    same_logits(model, source_model(plain))


def test_no_rule_where_nothing_else_is_act_ordered(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model")

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(".g_idx") and "down_proj" not in name:
                tensors[name] = tensor.sort().values

    edit_tensors(model / "model.safetensors", edit)
    plain = ordinary(fold(tpgptq, model, tmp_path / "out"))
    assert said(tmp_path / "out")["desc_act"] is False
    assert "dynamic" not in said(tmp_path / "out")
    assert not any(layer.act_order for layer in read_checkpoint(plain).layers)
    same_logits(source_model(model), source_model(plain))


def swap(part: str, module: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """Exchange two rows of different groups, or two columns."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors[f"{module}.{part}"]
        one, other = 0, tensor.shape[-1] - 1
        if part == "g_idx":
            one, other = int(tensor.argmin()), int(tensor.argmax())
        order = torch.arange(tensor.shape[-1])
        order[[one, other]] = order[[other, one]]
        tensors[f"{module}.{part}"] = tensor[..., order].contiguous()

    return edit


Q, GATE = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.gate_proj"


@pytest.mark.parametrize(
    ("module", "part", "exact", "functional"),
    [
        (Q, "g_idx", "qzeros of its rows' groups differ", "o_proj: the sum over the ranks differs"),
        (Q, "qweight", "qweight holds values that differ", "o_proj: the sum over the ranks differ"),
        (GATE, "scales", "scales of its rows' groups differ", "down_proj: the sum over the ranks"),
        (DOWN, "qweight", "qweight holds values that differ", "down_proj: the sum over the ranks"),
        (DOWN, "g_idx", "g_idx is not sequential", "g_idx is not sequential"),
    ],
)
def test_verify_finds_a_change(
    tpgptq: Run, tmp_path: Path, module: str, part: str, exact: str, functional: str
) -> None:
    model = make_checkpoint(tmp_path / "model", sym=False)
    out = fold(tpgptq, model, tmp_path / "out")
    edit_tensors(out / WEIGHTS, swap(part, module))
    result = tpgptq("verify", model, out)
    assert result.exit_code == 3
    assert f"{module}: " in result.stderr
    assert exact in result.stderr
    (out / "tpgptq-index.safetensors").unlink()
    result = tpgptq("verify", model, out)
    assert result.exit_code == 3
    assert functional in result.stderr


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("config.json", '"desc_act": true', '"desc_act": false', "desc_act is False; must be True"),
        ("config.json", "mlp", "attn", "dynamic is {"),
        ("quantize_config.json", "mlp", "attn", "quantize_config.json: differs from quantization_"),
    ],
)
def test_verify_reads_the_configs(
    tpgptq: Run, tmp_path: Path, file: str, old: str, new: str, expected: str
) -> None:
    model = make_checkpoint(tmp_path / "model")
    out = fold(tpgptq, model, tmp_path / "out")
    edit_text(out / file, old, new)
    result = tpgptq("verify", model, out)
    assert result.exit_code == 3
    assert expected in result.stderr


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_what_would_be_useless_is_refused(
    tpgptq: Run, tmp_path: Path, more: tuple[str, ...]
) -> None:
    model = make_checkpoint(tmp_path / "model", g_idx="trivial")
    result = tpgptq("convert", "--tp", 2, "--layout", "gptq", *more, model, tmp_path / "out")
    assert result.exit_code == 1
    assert "--layout gptq: no mlp.down_proj is act-ordered; must be" in result.stderr
    assert not (tmp_path / "out").exists()


def test_experts_are_refused(tpgptq: Run, tmp_path: Path) -> None:
    test_families.build(tmp_path / "model", "mixtral", test_families.CONFIGS.get("mixtral", {}))
    result = tpgptq("convert", "--tp", 2, "--layout", "gptq", tmp_path / "model", tmp_path / "out")
    assert result.exit_code == 1
    assert "block_sparse_moe.experts.*.w2 are experts, whose layers servers give" in result.stderr
    assert not (tmp_path / "out").exists()


def test_modules_of_their_own_kind_are_refused(tpgptq: Run, tmp_path: Path) -> None:
    modules = {"model.layers.0.mlp.up_proj": None, "lm_head": {"bits": 8}}
    model = make_checkpoint(tmp_path / "model", modules=modules)
    result = tpgptq("convert", "--tp", 2, "--layout", "gptq", model, tmp_path / "out")
    assert result.exit_code == 1
    for name in ("mlp.up_proj (not quantised)", "lm_head (8 bits, groups of 32)"):
        assert name in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_plan_says_what_it_is(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model")
    result = tpgptq("convert", "--tp", 2, "--layout", "gptq", "--dry-run", model, tmp_path / "out")
    assert result.exit_code == 0
    assert "tp 2: layout gptq is one checkpoint, which servers cut by themselves" in result.stdout
    assert not (tmp_path / "out").exists()


def test_the_runtime_doesnt_read_it(tpgptq: Run, tmp_path: Path) -> None:
    out = fold(tpgptq, make_checkpoint(tmp_path / "model"), tmp_path / "out")
    assert not (out / "tpgptq_runtime.py").exists()
    with pytest.raises(tpgptq_runtime.FormatError, match="layout is 'gptq'"):
        tpgptq_runtime.Checkpoint(out)


AUTO_GPTQ = """
import json, sys, torch
from auto_gptq import AutoGPTQForCausalLM
model = AutoGPTQForCausalLM.from_quantized(
    sys.argv[1], device="cpu", torch_dtype=torch.float32, use_marlin=False,
    inject_fused_attention=False, inject_fused_mlp=False,
    disable_exllama=True, disable_exllamav2=True,
)
assert sum("qlinear_cuda" in type(module).__module__ for module in model.modules()) == 28
with torch.inference_mode():
    logits = model.float()(input_ids=torch.tensor(json.loads(sys.argv[2]))).logits
print(json.dumps(logits.tolist()))
"""


@pytest.mark.skipif("TPGPTQ_AUTO_GPTQ" not in os.environ, reason="TPGPTQ_AUTO_GPTQ is not set")
@pytest.mark.parametrize("tp", [1, 2])
def test_auto_gptq_gives_the_sources_logits(
    tpgptq: Run, tiny: Path, tmp_path: Path, tp: int
) -> None:
    out = fold(tpgptq, tiny, tmp_path / "out", tp)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [os.environ["TPGPTQ_AUTO_GPTQ"], "-c", AUTO_GPTQ, str(out), json.dumps(TOKENS.tolist())],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    logits = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    with torch.inference_mode():
        expected = source_model(tiny)(TOKENS).logits
    scale = float(expected.abs().max())
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * scale)
