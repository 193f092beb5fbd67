"""Every combination of bits, group size, zero points and checkpoint format, as whole models."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from compare_tokens import source_model
from factories import (
    NAMES,
    block_outputs,
    dequantise,
    edit_tensors,
    make_checkpoint,
    refresh_checksums,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from safetensors.numpy import load_file

from tpgptq_convert.checkpoint import read_checkpoint
from tpgptq_convert.config import QuantConfig, fields_of, pack_factor
from tpgptq_convert.convert import Options, convert
from tpgptq_convert.plan import make_plans
from tpgptq_convert.tpgptq_runtime import Checkpoint

Run = Callable[..., Result]
TOKENS = torch.tensor([[5, 30, 17, 7, 31, 12, 11, 22, 8, 3]])


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_model_is_converted_verified_and_gives_the_same_logits(
    tpgptq: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    group_size: int,
    sym: bool,
    checkpoint_format: str,
) -> None:
    model = make_checkpoint(
        tmp_path / "model",
        **{"hidden": 128, "heads": 4, "head_dim": 32, "intermediate": 384, "blocks": 1},
        **{"bits": bits, "group_size": group_size, "sym": sym},
        checkpoint_format=checkpoint_format,
    )
    done = tpgptq("convert", "--tp", 2, model, tmp_path / "out")
    assert done.exit_code == 0, done.output
    with torch.inference_mode():
        expected = source_model(model)(TOKENS).logits
    answers, _ = run_ranks(tmp_path / "out", 2, lambda rank: rank(TOKENS).logits, monkeypatch)
    scale = float(expected.abs().max())
    for answer in answers:
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5 * scale)


FORM = st.fixed_dictionaries(
    {},
    optional={
        "bits": st.sampled_from([2, 3, 4, 8]),
        "group_size": st.sampled_from([16, 32, 48, 64, 128, -1]),
        "sym": st.booleans(),
    },
)
MODULES = [f"model.layers.{block}.{name}" for block in (0, 1) for name in NAMES.values()]


@st.composite
def formats(draw: st.DrawFn) -> dict[str, Any]:
    """Whatever a checkpoint's format may be, with sizes small enough for the slow oracle."""
    bits = draw(st.sampled_from([2, 3, 4, 8]))
    # Modules that are quantised otherwise, or not at all.
    modules = draw(
        st.none()
        | st.dictionaries(st.sampled_from([*MODULES, "lm_head"]), st.none() | FORM, min_size=1)
    )
    unit = 32 if modules else max(16, pack_factor(bits))
    narrow = draw(st.sampled_from([1, 2]))  # of 2, one head's channels may fill no whole word
    kv_heads = narrow * draw(st.sampled_from([1, 2, 3]))
    return {
        "bits": bits,
        "sym": draw(st.booleans()),
        "checkpoint_format": draw(st.sampled_from([None, "gptq", "gptq_v2"])),
        "group_size": draw(st.sampled_from([16, 32, 48, 64, 128, -1])),
        "g_idx": draw(st.sampled_from(["shared", "different", "uneven", "trivial", "zero"])),
        "hidden": unit * draw(st.integers(1, 5)),
        "intermediate": unit * draw(st.integers(1, 9)),
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.sampled_from([1, 2, 4])),
        "head_dim": unit // narrow,
        "blocks": 2 if modules else 1,
        "modules": modules,
        "seed": draw(st.integers(0, 10_000)),
    }


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=80)
@given(formats(), st.sampled_from([32, 16, 8]), st.data())
def test_any_format_is_proven_and_its_product_is_the_sources(
    form: dict[str, Any], row_group: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as name:
        source = make_checkpoint(Path(name, "model"), **form)
        checkpoint = read_checkpoint(source)
        tp = data.draw(st.integers(1, min(checkpoint.most_ranks, 8)), "tp")
        out = Path(name, "out")
        convert(checkpoint, make_plans(checkpoint, [tp], row_group), out, Options())  # verifies
        check_products(source, out)


def check_products(source: Path, out: Path) -> None:
    """The stored numbers, by the formula of the format alone, in float64: sum and source agree."""
    checkpoint, output = read_checkpoint(source), Checkpoint(out)
    v2, hidden = checkpoint.quant.checkpoint_format == "gptq_v2", checkpoint.geometry.hidden
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(3, hidden)))
    ranks = [output.rank(rank) for rank in range(output.tp)]

    def source_weight(name: str) -> torch.Tensor:
        layer = layers[name]
        tensors = {
            part: checkpoint.source.tensor(f"{name}.{part}") for part in layer.tensors(0, 0, 0)
        }
        return matrix(tensors, layer.g_idx, layer.bits)

    def matrix(
        tensors: Mapping[str, torch.Tensor], g_idx: np.ndarray, bits: int | None
    ) -> torch.Tensor:
        if bits is None:
            return tensors["weight"].T.double()
        return dequantise(tensors, g_idx, v2, bits)

    def rank_weight(rank: int, name: str) -> torch.Tensor:
        module = output.modules[name]
        groups = np.arange(module["in_features"]) // module["group_size"]
        return matrix(ranks[rank][name], groups, output.bits(name))

    layers = {layer.name: layer for layer in checkpoint.layers}
    for block in range(checkpoint.geometry.blocks):
        names = {short: f"model.layers.{block}.{name}" for short, name in NAMES.items()}
        weights = {short: source_weight(name) for short, name in names.items()}
        expected = block_outputs(x, weights, {}, checkpoint.geometry.head_dim)
        sums = [torch.zeros_like(half) for half in expected]
        for rank, tensors in enumerate(ranks):
            own = {short: rank_weight(rank, name) for short, name in names.items()}
            perms = {s: tensors[n]["perm"].long() for s, n in names.items() if "perm" in tensors[n]}
            halves = block_outputs(x, own, perms, checkpoint.geometry.head_dim)
            for total, half in zip(sums, halves, strict=True):
                total += half
        for total, half in zip(sums, expected, strict=True):
            torch.testing.assert_close(total, half, rtol=0, atol=1e-12 * half.abs().max())
    if "lm_head" in layers:  # whole on every rank
        expected_logits = x @ source_weight("lm_head")
        for rank, tensors in enumerate(ranks):
            perm = tensors["lm_head"].get("perm", torch.arange(hidden)).long()
            logits = x[:, perm] @ rank_weight(rank, "lm_head")
            torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-12)


def old_pack_zeros(zeros: np.ndarray, bits: int) -> np.ndarray:
    """(G, N) -> (G, N*bits/32) as auto-gptq's packer did: a zero point of 0 fills the whole word.

    It took 1 from unsigned numbers, and put the whole of what came of it beside the others.
    """
    less = zeros.astype(np.uint32) - np.uint32(1)
    words = np.zeros((len(zeros), zeros.shape[1] * bits // 32), np.uint32)
    for column in range(zeros.shape[1]):
        words[:, column * bits // 32] |= less[:, column] << np.uint32(column * bits % 32)
    return words.view(np.int32)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_that_ran_over_are_moved_as_they_are(
    tmp_path: Path, bits: int, tp: int
) -> None:
    """Files of asymmetric layers whose zero points were 0, packed by old versions of auto-gptq.

    Such a field is stored as the largest, and so are those after it in its word: what they were is
    lost. They mean one more than they store, as in auto-gptq's kernels, which don't mask the sum.
    """
    source = make_checkpoint(
        tmp_path / "model",
        **{"bits": bits, "sym": False, "hidden": 64, "intermediate": 128, "head_dim": 16},
        **{"group_size": 32, "g_idx": "trivial", "blocks": 1},  # so that tp 2 pads no group
    )
    rng, largest = np.random.default_rng(0), (1 << bits) - 1

    def overrun(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".qzeros")]:
            groups, words = tensors[name].shape
            zeros = rng.integers(0, 4, (groups, words * 32 // bits))
            packed = old_pack_zeros(zeros, bits)
            stored = fields_of(packed, bits)
            assert (stored[zeros == 0] == largest).all()
            assert (stored != zeros - 1)[zeros != 0].any()  # some neighbours are lost
            tensors[name] = torch.from_numpy(packed)

    edit_tensors(source / "model.safetensors", overrun)
    checkpoint, out = read_checkpoint(source), tmp_path / "out"
    convert(checkpoint, make_plans(checkpoint, [tp]), out, Options())
    check_products(source, out)
    index = load_file(out / "tpgptq-index.safetensors")
    for layer in checkpoint.layers:
        fields = fields_of(checkpoint.source.array(f"{layer.name}.qzeros"), bits)
        for rank in range(tp):
            stored = fields_of(Checkpoint(out).rank(rank)[layer.name]["qzeros"].numpy(), bits)
            rows, cols = (index[f"{layer.name}.{what}"] for what in ("rows", "cols"))
            rows, cols = rows[rank % len(rows)], cols[rank % len(cols)]
            groups = layer.g_idx[rows[:: len(rows) // len(stored)]]
            assert np.array_equal(stored, fields[groups][:, cols])


GATE, UP, DOWN = (NAMES[x] for x in ("gate", "up", "down"))
MIXED: dict[str, dict[str, Any]] = {
    "other bits": {DOWN: {"bits": 8, "group_size": 32}, NAMES["q"]: {"bits": 3, "group_size": -1}},
    "down not quantised": {DOWN: None},
    "gate and up not quantised": {GATE: None, UP: None},
    "gate of 2 bits, up not quantised": {GATE: {"bits": 2}, UP: None},
    "attention not quantised": {NAMES[x]: None for x in "qkvo"},
    "a head": {"lm_head": {"bits": 8, "group_size": 16}},
    "a head and 3 bits": {"lm_head": {"bits": 3}, NAMES["o"]: {"bits": 3}, DOWN: {"bits": 3}},
}


@pytest.mark.parametrize(("tp", "layout"), [(2, "merged"), (4, "ranks")])
@pytest.mark.parametrize("mixed", MIXED)
def test_mixed_modules_give_the_same_logits(
    tpgptq: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixed: str, tp: int, layout: str
) -> None:
    """In the first of two blocks modules are quantised otherwise, or not; 5 groups don't divide."""
    modules = {
        name if name == "lm_head" else f"model.layers.0.{name}": own
        for name, own in MIXED[mixed].items()
    }
    model = make_checkpoint(
        tmp_path / "model",
        **{"hidden": 96, "heads": 8, "kv_heads": 2, "head_dim": 32, "intermediate": 160},
        **{"group_size": 32, "modules": modules},
    )
    done = tpgptq("convert", "--tp", tp, "--layout", layout, model, tmp_path / "out")
    assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "out" / "tpgptq.json").read_text())
    assert manifest["format_version"] == 2
    for name, own in modules.items():
        bits = own.get("bits", 4) if own is not None else None
        assert manifest["modules"][name].get("bits", 4) == bits
    with torch.inference_mode():
        expected = source_model(model)(TOKENS).logits
    answers, _ = run_ranks(tmp_path / "out", tp, lambda rank: rank(TOKENS).logits, monkeypatch)
    scale = float(expected.abs().max())
    for answer in answers:
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5 * scale)


def test_the_tensors_say_what_is_not_quantised(tpgptq: Run, tmp_path: Path) -> None:
    """As in files by optimum, whose config lists the modules that were quantised."""
    model = make_checkpoint(
        tmp_path / "model",
        modules={f"model.layers.{block}.{name}": None for block in (0, 1) for name in (GATE, DOWN)},
        quant={"dynamic": None, "modules_in_block_to_quantize": [["self_attn.q_proj"]]},
    )
    assert tpgptq("convert", "--tp", 2, model, tmp_path / "out").exit_code == 0
    check_products(model, tmp_path / "out")
    shown = tpgptq("inspect", model)
    assert re.search(
        r"^mlp.down_proj \(not quantised\) +row +96 +64 +1 +0 of 2$", shown.stdout, re.M
    )


def test_a_channel_of_a_dense_gate_follows_the_rows_of_down(tpgptq: Run, tmp_path: Path) -> None:
    """Row by row, bit by bit, and zeros where down has padding."""
    name = "model.layers.0"
    model = make_checkpoint(
        tmp_path / "model", blocks=1, intermediate=160, modules={f"{name}.{GATE}": None}
    )
    assert tpgptq("convert", "--tp", 2, model, tmp_path / "out").exit_code == 0
    source = read_checkpoint(model).source.tensor(f"{name}.{GATE}.weight")
    channels = load_file(tmp_path / "out" / "tpgptq-index.safetensors")[f"{name}.{DOWN}.rows"]
    assert (channels < 0).any()
    for rank in (0, 1):
        stored = Checkpoint(tmp_path / "out").rank(rank)[f"{name}.{GATE}"]["weight"]
        assert stored.shape == (len(channels[rank]), 64)
        for row, channel in zip(stored, channels[rank], strict=True):
            assert torch.equal(row, source[channel] if channel >= 0 else torch.zeros_like(row))


UP_1, DOWN_1 = f"model.layers.1.{UP}", f"model.layers.1.{DOWN}"


@pytest.mark.parametrize(
    ("tensor", "place", "indexed", "words"),
    [
        (f"{UP_1}.weight", (3, 5), True, f"{UP_1}: rank 1: weight holds values that differ"),
        (f"{UP_1}.weight", (3, 5), False, f"{DOWN_1}: the sum over the ranks differs"),
        (f"{UP_1}.weight", (-1, 0), True, f"{UP_1}: rank 1: weight holds values that differ"),
        ("lm_head.qweight", (1, 1), True, "lm_head: rank 1: qweight holds values that differ"),
        ("lm_head.qweight", (1, 1), False, "lm_head: what a rank makes of it differs"),
    ],
)
def test_verify_notices(
    tpgptq: Run, tmp_path: Path, tensor: str, place: tuple[int, int], indexed: bool, words: str
) -> None:
    """Of a weight that isn't quantised, its padding too, and of a head."""
    modules = {UP_1: None, "lm_head": {}}
    model = make_checkpoint(tmp_path / "model", intermediate=160, modules=modules)
    out = tmp_path / "out"
    assert tpgptq("convert", "--tp", 2, model, out).exit_code == 0

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        if tensor.endswith("weight") and tensors[tensor].is_floating_point():
            tensors[tensor][place] += 0.25
        else:
            tensors[tensor][place] ^= 1 << 9

    edit_tensors(out / "model-rank-1-part-0.safetensors", edit)
    if not indexed:
        (out / "tpgptq-index.safetensors").unlink()
    refresh_checksums(out)
    found = tpgptq("verify", model, out)
    assert found.exit_code == 3
    assert words in found.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 8}, f"{UP_1}: bits is 8; must be None"),
        ({"bits": 5}, f"{UP_1}: bits is 5; must be one of (2, 3, 4, 8), or null"),
    ],
)
def test_verify_reads_what_the_manifest_says_of_a_module(
    tpgptq: Run, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    model, out = make_checkpoint(tmp_path / "model", modules={UP_1: None}), tmp_path / "out"
    assert tpgptq("convert", "--tp", 2, model, out).exit_code == 0
    manifest = json.loads((out / "tpgptq.json").read_text())
    manifest["modules"][UP_1] |= changes
    (out / "tpgptq.json").write_text(json.dumps(manifest))
    found = tpgptq("verify", model, out)
    assert found.exit_code != 0
    assert words in found.stderr


def test_rules_are_gptqmodels() -> None:
    """The first that a name begins with; a name is whole, and a rule needs no prefix."""
    rules = (
        (r"-:model\.layers\.0\.", ()),
        (r"+:.*\.down_proj$", (("bits", 8), ("group_size", 32))),
        (r".*proj", (("sym", False),)),
        (r"+:.*\.up_proj", (("bits", 2),)),
    )
    quant = QuantConfig(4, 128, True, True, False, "gptq", rules=rules)
    said = {
        name: (own.bits, own.group_size, own.sym)
        for name in (f"model.layers.0.{DOWN}", f"model.layers.1.{DOWN}", f"model.layers.1.{UP}")
        for own in [quant.of(name)]
    }
    assert list(said.values()) == [(4, 128, True), (8, 32, True), (4, 128, False)]
    assert quant.of("lm_head") == replace(quant, rules=())
