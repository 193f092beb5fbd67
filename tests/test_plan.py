"""The laws of the index vectors, and the float64 sum over the ranks, for random models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import NAMES, block_outputs, dequantise, make_g_idx, make_layer, make_uneven_g_idx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain import packed

from tpgptq_convert.checkpoint import Checkpoint, Layer, widths_of
from tpgptq_convert.config import Geometry, QuantConfig
from tpgptq_convert.errors import DegreeError
from tpgptq_convert.families import FAMILIES, LLAMA, Axis
from tpgptq_convert.plan import Heads, Plan, Shard, deal_heads, make_plans
from tpgptq_convert.repack import open_device, repack

BY_NAME = {name: short for short, name in NAMES.items()}


@dataclass(frozen=True)
class Model:
    """A model in memory: the planner's checkpoint and the tensors that it never sees."""

    checkpoint: Checkpoint
    tensors: list[dict[str, dict[str, torch.Tensor]]]  # per block, by layer name


def make_model(
    heads: int,
    kv: int,
    head_dim: int,
    hidden: int,
    intermediate: int,
    group_size: int,
    order: str,
    seed: int,
    sym: bool = True,
    blocks: int = 1,
) -> Model:
    rng = np.random.default_rng(seed)
    config: dict[str, Any] = {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "intermediate_size": intermediate,
        "num_hidden_layers": blocks,
        "model_type": "llama",
    }
    geometry, quant = LLAMA.geometry(config), QuantConfig(4, group_size, sym, True, False, "gptq")
    widths = widths_of(geometry)
    all_layers, all_tensors = [], []
    for block in range(blocks):
        layers, tensors = [], {}
        shared: dict[Axis, np.ndarray] = {}
        for linear in LLAMA.linears:
            k, n = widths[linear.reads.name], linear.width(widths)
            size = k if group_size == -1 else min(group_size, k)
            g_idx = make_g_idx(rng, k, size)
            if order == "equal":
                g_idx = shared.setdefault(linear.reads, g_idx)
            elif order == "trivial":
                g_idx = (np.arange(k) // size).astype(np.int32)
            elif order == "uneven":
                g_idx = make_uneven_g_idx(rng, k, size)
            name = f"model.layers.{block}.{linear.name}"
            tensors[name] = make_layer(rng, k, n, g_idx, sym=sym)
            groups = len(tensors[name]["scales"])
            sizes = (k, n, quant, size, groups)
            layers.append(Layer(name, linear.name, linear, *sizes, g_idx, "F16", None))
        all_layers.append(tuple(layers))
        all_tensors.append(tensors)
    checkpoint = Checkpoint(
        source=None,  # type: ignore[arg-type]  # the planner reads no tensor
        config=config,
        quant=quant,
        family=LLAMA,
        geometry=geometry,
        blocks=tuple(all_layers),
        shared=(),
        damage=(),
        notes=(),
    )
    return Model(checkpoint, all_tensors)


@st.composite
def models(draw: st.DrawFn) -> Model:
    kv = draw(st.sampled_from([1, 2, 3, 4, 5]))
    return make_model(
        heads=kv * draw(st.sampled_from([1, 2, 3, 4])),
        kv=kv,
        head_dim=draw(st.sampled_from([8, 16])),
        hidden=8 * draw(st.integers(2, 12)),  # ragged last groups included
        intermediate=8 * draw(st.integers(2, 24)),
        group_size=draw(st.sampled_from([8, 16, 32, 64, -1])),
        order=draw(st.sampled_from(["equal", "different", "trivial", "uneven"])),
        seed=draw(st.integers(0, 10_000)),
        sym=draw(st.booleans()),
        blocks=draw(st.integers(1, 2)),
    )


def any_plan(data: st.DataObject, model: Model) -> Plan:
    tp = data.draw(st.integers(1, min(model.checkpoint.most_ranks, 16)), "tp")
    row_group = data.draw(st.sampled_from([32, 16, 8]), "row_group")
    return make_plans(model.checkpoint, [tp], row_group)[0]


slow = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)


@slow
@given(models(), st.data())
def test_every_shard_obeys_the_laws(model: Model, data: st.DataObject) -> None:
    plan = any_plan(data, model)
    for index, block in enumerate(model.checkpoint.blocks):
        shards = plan.block(index)
        for layer in block:
            size = plan.sizes[layer.kind]
            for shard in shards[layer.name]:
                assert shard.rows.shape == (size.in_features,)
                assert shard.cols.shape == (size.out_features,)
                assert shard.groups.shape == (size.groups,)
                assert shard.group_size == size.group_size
                for j, row in enumerate(shard.rows):
                    assert row == -1 or layer.g_idx[row] == shard.groups[j // shard.group_size]
                assert (shard.perm is not None) == plan.has_perm(layer)
            check_kept_once(plan, layer, shards[layer.name])


def check_kept_once(plan: Plan, layer: Layer, shards: tuple[Shard, ...]) -> None:
    """Row-parallel: the ranks share out the rows. Column-parallel: they share out the columns."""
    every_row, every_col = list(range(layer.in_features)), list(range(layer.out_features))
    rows = [sorted(r for r in shard.rows.tolist() if r >= 0) for shard in shards]
    cols = [sorted(c for c in shard.cols.tolist() if c >= 0) for shard in shards]
    if layer.linear.parallel == "row":
        assert sorted(chain(*rows)) == every_row
        assert all(c == every_col for c in cols)
    else:
        assert all(r == every_row for r in rows)
        if layer.linear.writes == (Axis.KV,):  # as often as its query heads need it
            assert sorted(set(chain(*cols))) == every_col
            assert len(list(chain(*cols))) == plan.heads.copies * len(every_col)
        else:
            assert sorted(chain(*cols)) == every_col


@slow
@given(models(), st.data())
def test_the_sum_over_the_ranks_equals_the_source(model: Model, data: st.DataObject) -> None:
    plan = any_plan(data, model)
    quant, geometry = model.checkpoint.quant, model.checkpoint.geometry
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(3, geometry.hidden)))
    for index, tensors in enumerate(model.tensors):
        shards = plan.block(index)
        source = {
            BY_NAME[layer.linear.name]: dequantise(tensors[layer.name], layer.g_idx)
            for layer in model.checkpoint.blocks[index]
        }
        attention, mlp = block_outputs(x, source, {}, geometry.head_dim)
        summed_attention, summed_mlp = torch.zeros_like(attention), torch.zeros_like(mlp)
        for rank in range(plan.tp):
            weights, perms = {}, {}
            for layer in model.checkpoint.blocks[index]:
                t, shard = tensors[layer.name], shards[layer.name][rank]
                (arrays,) = repack(packed(t), [[shard]], quant, open_device("cpu"))
                stored = {part: torch.from_numpy(array) for part, array in arrays.items()}
                short = BY_NAME[layer.linear.name]
                group_of_row = np.arange(len(shard.rows)) // shard.group_size
                weights[short] = dequantise(stored, group_of_row)
                if shard.perm is not None:
                    perms[short] = torch.from_numpy(shard.perm)
            own_attention, own_mlp = block_outputs(x, weights, perms, geometry.head_dim)
            summed_attention += own_attention
            summed_mlp += own_mlp
        for summed, expected in ((summed_attention, attention), (summed_mlp, mlp)):
            torch.testing.assert_close(summed, expected, rtol=0, atol=1e-12 * expected.abs().max())


@slow
@given(models(), st.data())
def test_merged_shards_are_the_shards_in_rank_order(model: Model, data: st.DataObject) -> None:
    plan = any_plan(data, model)
    for layer in model.checkpoint.blocks[0]:
        shards = plan.block(0)[layer.name]
        merged = plan.merged(layer, shards)
        pieces = plan.tp
        if layer.linear.writes == (Axis.KV,):
            pieces //= plan.heads.replicas
        for rank, shard in enumerate(shards):
            piece = rank * pieces // plan.tp
            if layer.linear.parallel == "row":
                assert np.array_equal(np.split(merged.rows, pieces)[piece], shard.rows)
                assert np.array_equal(np.split(merged.groups, pieces)[piece], shard.groups)
            else:
                assert np.array_equal(np.split(merged.cols, pieces)[piece], shard.cols)
                assert np.array_equal(merged.rows, shard.rows)
        specs = plan.merged_tensors(layer)
        assert specs["qweight"].shape == (len(merged.rows) // 8, len(merged.cols))
        assert specs["scales"].shape == (len(merged.groups), len(merged.cols))
        assert ("perm" in specs) == (merged.perm is not None)
        if merged.perm is not None:
            assert specs["perm"].shape == merged.perm.shape


def plan_of(tp: int, row_group: int = 32, **shape: Any) -> Plan:
    model = make_model(**{"order": "different", "seed": 0, **shape})
    return make_plans(model.checkpoint, [tp], row_group)[0]


LLAMA_7B = {
    "heads": 8,
    "kv": 8,
    "head_dim": 128,
    "hidden": 1024,
    "intermediate": 11008,
    "group_size": 128,
}


def test_86_groups_are_dealt_to_4_ranks_22_each() -> None:
    plan = plan_of(4, **LLAMA_7B)
    down = plan.sizes["mlp.down_proj"]
    assert (down.in_features, down.group_size) == (22 * 128, 128)
    assert plan.sizes["mlp.gate_proj"].out_features == 22 * 128
    assert plan.intermediate == 88 * 128
    groups = [s.groups.tolist() for s in plan.block(0)["model.layers.0.mlp.down_proj"]]
    assert sorted(chain(*groups)) == [-1, -1, *range(86)]


def test_groups_that_divide_are_not_padded() -> None:
    plan = plan_of(2, **LLAMA_7B)
    assert plan.sizes["mlp.down_proj"].in_features == 43 * 128
    assert plan.intermediate == 11008


def test_smaller_row_groups_pad_attention_output_less() -> None:
    shape = {**LLAMA_7B, "heads": 32, "kv": 32, "intermediate": 256}
    sizes = [plan_of(4, unit, **shape).sizes["self_attn.o_proj"] for unit in (32, 16, 8)]
    assert [size.group_size for size in sizes[:2]] == [32, 16]
    rows = [size.in_features for size in sizes]
    assert 1024 < rows[2] <= rows[1] < rows[0] < 2 * 1024
    assert all(count % 128 == 0 for count in rows)


def test_a_smaller_row_group_that_saves_nothing_is_not_taken() -> None:
    sizes = [plan_of(4, unit, **LLAMA_7B).sizes["self_attn.o_proj"] for unit in (32, 16)]
    assert sizes[0] == sizes[1]
    assert sizes[0].group_size == 32


def test_tp_1_pads_nothing_and_keeps_the_group_size() -> None:
    plan = plan_of(1, **LLAMA_7B)
    assert plan.growth == 1
    assert {size.group_size for size in plan.sizes.values()} == {128}


def test_a_trivial_order_needs_no_perm_where_heads_hold_whole_groups() -> None:
    plan = plan_of(4, **LLAMA_7B, order="trivial")
    assert not any(plan.has_perm(layer) for layer in plan.checkpoint.layers)
    assert plan.sizes["self_attn.o_proj"].group_size == 128


def test_a_trivial_order_is_cut_into_halves_of_groups_without_padding() -> None:
    plan = plan_of(
        2,
        heads=14,
        kv=2,
        head_dim=64,
        hidden=896,
        intermediate=896,
        group_size=128,
        order="trivial",
    )
    size = plan.sizes["self_attn.o_proj"]
    assert (size.in_features, size.group_size) == (448, 64)


def test_one_group_per_column_is_cut_anywhere() -> None:
    plan = plan_of(4, **{**LLAMA_7B, "group_size": -1})
    assert plan.growth == 1
    for size in plan.sizes.values():
        assert size.group_size == size.in_features


def geometry_of(heads: int, kv: int, head_dim: int = 128, hidden: int = 0) -> Geometry:
    sizes = {"query": head_dim, "kv": head_dim}
    hidden = hidden or heads * head_dim
    return Geometry(hidden, 1, heads, kv, head_dim, sizes, {"mlp": 64}, 0, "silu")


@pytest.mark.parametrize(
    ("heads", "kv", "even"),
    [
        (9, 3, (1, 3, 9)),
        (4, 2, (1, 2, 4)),
        (32, 8, (1, 2, 4, 8, 16, 32)),
        (48, 1, (1, 2, 3, 4, 6, 8, 12, 16, 24, 48)),
        (40, 40, (1, 2, 4, 5, 8, 10, 20, 40)),
        (28, 4, (1, 2, 4, 28)),
    ],
)
def test_heads_that_divide_are_dealt_evenly(heads: int, kv: int, even: tuple[int, ...]) -> None:
    for tp in range(1, heads + 9):
        dealt = deal_heads(geometry_of(heads, kv), tp, 4)
        assert dealt.padded == (tp not in even)
        if not dealt.padded:
            assert (dealt.query, dealt.kv) == (heads // tp, max(1, kv // tp))
            assert dealt.idle_ranks == 0


@pytest.mark.parametrize(
    ("heads", "kv", "tp", "query", "kv_of_rank", "padded"),
    [
        (9, 3, 2, [0, 1, 2, 3, 4, 5], [0, 1], (12, 4)),  # the other rank: 6, 7, 8 and an empty one
        (9, 3, 5, [0, 1, 2], [0], (15, 5)),
        (9, 3, 6, [0, 1], [0], (12, 3)),  # two ranks share a kv head, as servers share them
        (9, 3, 7, [0, 1], [0], (14, 7)),  # here they can't, so it stands there twice
        (48, 1, 7, [*range(7)], [0], (49, 1)),
        (64, 8, 6, [*range(12)], [0, 0, 1], (72, 18)),  # a copy costs less than four query heads
        (64, 8, 12, [*range(8)], [0], (96, 12)),
        (71, 1, 2, [*range(36)], [0], (72, 1)),
        (32, 32, 3, [*range(11)], [*range(11)], (33, 33)),
    ],
)
def test_heads_that_do_not_divide(
    heads: int,
    kv: int,
    tp: int,
    query: list[int],
    kv_of_rank: list[int],
    padded: tuple[int, int],
) -> None:
    dealt = deal_heads(geometry_of(heads, kv), tp, 4)
    assert [vector.tolist() for vector in dealt.of_rank(0)] == [query, kv_of_rank]
    assert (dealt.padded_query, dealt.padded_kv) == padded


@given(st.integers(1, 12), st.integers(1, 16), st.integers(1, 40), st.sampled_from([64, 8192]))
def test_no_dealing_costs_the_fullest_rank_less(kv: int, group: int, tp: int, hidden: int) -> None:
    """Against every number of query heads and kv heads that ranks could have."""
    geometry = geometry_of(kv * group, kv, hidden=hidden)
    best = deal_heads(geometry, tp, 4)
    places = kv * best.copies
    real = [[head for head in best.of_rank(rank)[0].tolist() if head >= 0] for rank in range(tp)]
    assert sorted(chain(*real)) == list(range(kv * group))
    for each in range(1, group + 1):
        for kv_of_rank in range(1, kv * group + 1):
            if kv_of_rank * tp >= kv * -(-group // each):
                assert Heads(geometry, tp, kv_of_rank, each).cost(4) >= best.cost(4)
    assert best.idle_ranks == tp - -(-places // best.kv) >= 0
    assert best.padded_kv % tp == 0 or tp % best.padded_kv == 0


def test_degrees_that_leave_ranks_with_nothing_are_named_together() -> None:
    model = make_model(9, 3, 8, 64, 64, 32, "equal", 0)
    with pytest.raises(DegreeError) as error:
        make_plans(model.checkpoint, [-1, 0, 9, 10])
    problems = [problem.partition(":")[0] for problem in error.value.problems]
    assert problems == ["tp -1", "tp 0", "tp 10"]
    # Of large heads o_proj has more groups, which can't be shared out.
    assert make_model(2, 2, 64, 64, 96, 32, "equal", 0).checkpoint.most_ranks == 3


def test_every_family_is_wired_completely() -> None:
    """Each axis that a rank cuts has its writers, and one layer that reads it."""
    for family in FAMILIES.values():
        of_experts = (*family.experts.linears, *family.experts.shared) if family.experts else ()
        linears = (*family.linears, *of_experts)
        for axis in {linear.reads for linear in linears} - {Axis.HIDDEN}:
            assert any(axis in linear.writes for linear in linears)
            assert [linear.reads for linear in linears].count(axis) == 1
        assert {linear.parallel for linear in linears} == {"column", "row"}
        assert sum(linear.reads.free for linear in linears) in (1, 2, 3)


def test_planning_imports_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    from factories import make_checkpoint

    directory = make_checkpoint(tmp_path / "m")
    code = (
        "import sys, pathlib, json\n"
        "from tpgptq_convert.checkpoint import read_checkpoint\n"
        "from tpgptq_convert.plan import make_plans\n"
        f"plan = make_plans(read_checkpoint(pathlib.Path({str(directory)!r})), [2])[0]\n"
        "plan.block(0); print(json.dumps('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is False


def test_heads_too_narrow_to_pack_alone_are_dealt_together() -> None:
    model = make_model(4, 2, 4, 64, 64, 32, "equal", 0)  # eight channels fill a word
    plans = make_plans(model.checkpoint, [1, 2, 4])
    assert [(plan.heads.query, plan.heads.kv) for plan in plans] == [(4, 2), (2, 2), (2, 2)]
    assert [plan.heads.padded for plan in plans] == [False, True, True]
