"""Packing and repacking against slow versions, and against auto-gptq's own answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import dequantise, make_g_idx, make_layer, slow_pack_rows, slow_unpack_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import bits, gpu, packed, plain_repack, same
from safetensors import safe_open
from safetensors.torch import load_file

from tpgptq_convert import packing, tpgptq_runtime
from tpgptq_convert.config import QuantConfig, fields_of, pack_factor, words_of
from tpgptq_convert.packing import pack_cols, pack_rows, unpack_cols, unpack_rows, zero_points
from tpgptq_convert.plan import Shard
from tpgptq_convert.repack import Dense, Device, open_device, repack

GOLDEN = Path(__file__).parent / "golden"
SYM = QuantConfig(4, 32, True, True, False, "gptq")


def random_words(rows: int, cols: int, seed: int) -> torch.Tensor:
    words = np.random.default_rng(seed).integers(0, 1 << 32, (rows, cols), dtype=np.uint32)
    return torch.from_numpy(words.view(np.int32))


def test_eight_rows_by_hand() -> None:
    values = torch.tensor([[1], [2], [3], [4], [5], [6], [7], [15]], dtype=torch.uint8)
    word = pack_rows(values, 4)
    assert word.tolist() == [[0xF7654321 - (1 << 32)]]
    assert unpack_rows(word, 4).tolist() == values.tolist()


BITS = st.sampled_from([2, 3, 4, 8])


@given(BITS, st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_packing_is_the_inverse_of_unpacking(bits: int, units: int, cols: int, seed: int) -> None:
    words = random_words(units * bits, cols, seed)
    assert torch.equal(pack_rows(unpack_rows(words, bits), bits), words)
    words = words.T.contiguous()
    assert torch.equal(pack_cols(unpack_cols(words, bits), bits), words)


@given(BITS, st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_unpacking_equals_the_slow_version(bits: int, units: int, cols: int, seed: int) -> None:
    words = random_words(units * bits, cols, seed)
    slow = slow_unpack_rows(words.numpy(), bits)
    assert np.array_equal(unpack_rows(words, bits).numpy(), slow)
    assert np.array_equal(unpack_cols(words.T.contiguous(), bits).numpy(), slow.T)
    assert np.array_equal(fields_of(words.numpy().T, bits), slow.T)
    assert np.array_equal(tpgptq_runtime._unpack(words, bits, 0).numpy(), slow)
    assert np.array_equal(slow_pack_rows(slow, bits), words.numpy())


@given(BITS, st.integers(1, 4), st.data())
def test_words_of_one_value(bits: int, units: int, data: st.DataObject) -> None:
    value, count = data.draw(st.integers(0, (1 << bits) - 1)), units * bits
    words = torch.from_numpy(words_of(value, bits, count).view(np.int32))[:, None]
    assert words.shape == (count, 1)
    assert (unpack_rows(words, bits) == value).all()


def test_thirty_two_values_of_three_bits_fill_three_words() -> None:
    """As auto-gptq lays them: the 11th and the 22nd lie across two words."""
    values = np.random.default_rng(0).integers(0, 8, 32)
    one = sum(int(v) << 3 * i for i, v in enumerate(values[:10])) | (int(values[10]) & 3) << 30
    two = sum(int(v) << 3 * i + 1 for i, v in enumerate(values[11:21])) | int(values[10]) >> 2
    two |= (int(values[21]) & 1) << 31
    three = sum(int(v) << 3 * i + 2 for i, v in enumerate(values[22:])) | int(values[21]) >> 1
    words = pack_rows(torch.from_numpy(values).to(torch.uint8)[:, None], 3)
    assert words.numpy().view(np.uint32)[:, 0].tolist() == [one, two, three]


def test_zero_points_of_both_formats() -> None:
    stored = torch.tensor([0, 7, 14, 15], dtype=torch.uint8)
    assert zero_points(stored, "gptq").tolist() == [1, 8, 15, 16]
    assert zero_points(stored, "gptq_v2").tolist() == [0, 7, 14, 15]


def golden_layers(kind: str) -> list[tuple[str, dict[str, torch.Tensor]]]:
    tensors = load_file(GOLDEN / f"autogptq-{kind}.safetensors")
    names = sorted({name.partition(".")[0] for name in tensors})
    return [
        (name, {k.partition(".")[2]: t for k, t in tensors.items() if k.startswith(f"{name}.")})
        for name in names
    ]


@pytest.mark.parametrize("kind", ["sym", "asym"])
def test_dequantised_source_equals_autogptq_bit_for_bit(kind: str) -> None:
    layers = golden_layers(kind)
    assert {"a", "b", "c", "d", "e"} <= {name for name, _ in layers}
    for name, t in layers:
        assert torch.equal(weight_of(t, t["g_idx"]), t["weight"]), name


def weight_of(t: Mapping[str, torch.Tensor], g_idx: torch.Tensor) -> torch.Tensor:
    parts = t["qweight"], t["qzeros"], t["scales"]
    return packing.dequantise(*parts, g_idx.long(), SYM, torch.float16)


def test_the_oracle_reads_a_stored_15_as_16() -> None:
    t = dict(golden_layers("asym"))["wrap"]
    stored = unpack_cols(t["qzeros"], 4)
    assert (stored == 15).any()
    weight = (unpack_rows(t["qweight"], 4).half() - 16) * t["scales"][t["g_idx"].long()]
    wrapped = stored[t["g_idx"].long()] == 15
    assert torch.equal(weight[wrapped], t["weight"][wrapped])


@pytest.mark.parametrize("kind", ["sym", "asym"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_reassembled_shards_equal_autogptq_bit_for_bit(kind: str, tp: int) -> None:
    for name, t in golden_layers(kind):
        if name == "wrap":
            continue  # padding can't hold a zero point of 16; refused, see test_convert
        k, n = t["weight"].shape
        g_idx = t["g_idx"].numpy()
        size = int(np.bincount(g_idx).max())
        seen = torch.full((k, n), torch.nan, dtype=torch.float16)
        for rank in range(tp):
            own = np.arange(rank * k // tp, (rank + 1) * k // tp, dtype=np.int32)
            shard = bucketed_by_hand(own, g_idx, 8 if size < k else len(own), n)
            (tensors,) = repacked(t, [shard], SYM)
            weight = weight_of(tensors, torch.arange(len(shard.rows)) // shard.group_size)
            real = shard.rows >= 0
            seen[shard.rows[real]] = weight[real]
            assert (weight[~real] == 0).all()
        assert torch.equal(seen, t["weight"]), name


def repacked(
    layer: Mapping[str, torch.Tensor], shards: list[Shard], quant: QuantConfig
) -> list[dict[str, torch.Tensor]]:
    """By the CPU's executor."""
    results = repack(packed(dict(layer)), ([s] for s in shards), quant, open_device("cpu"))
    return [{part: torch.from_numpy(a) for part, a in tensors.items()} for tensors in results]


def bucketed_by_hand(rows: np.ndarray, g_idx: np.ndarray, unit: int, n: int) -> Shard:
    """Rows sorted by group, each group padded to a multiple of unit: the slow way."""
    out: list[int] = []
    groups: list[int] = []
    for group in sorted(set(g_idx[rows].tolist())):
        bucket = [int(row) for row in rows if g_idx[row] == group]
        bucket += [-1] * (-len(bucket) % unit)
        out += bucket
        groups += [group] * (len(bucket) // unit)
    return Shard(
        np.array(out, np.int32),
        np.arange(n, dtype=np.int32),
        np.array(groups, np.int32),
        unit,
        None,
    )


@settings(deadline=None)
@given(st.integers(0, 999), st.booleans(), st.booleans())
def test_repack_equals_the_slow_version(seed: int, sym: bool, v2: bool) -> None:
    rng = np.random.default_rng(seed)
    k, n, size = 64, 16, 16
    g_idx = make_g_idx(rng, k, size)
    source = make_layer(rng, k, n, g_idx, sym=sym, v2=v2)
    quant = QuantConfig(4, size, sym, True, False, "gptq_v2" if v2 else "gptq")
    rows = np.sort(rng.choice(k, int(rng.integers(1, k)), replace=False)).astype(np.int32)
    shard = bucketed_by_hand(rows, g_idx, 8, n)
    cols = rng.permutation(np.append(rng.permutation(n)[:13], [-1, -1, -1])).astype(np.int32)
    shard = Shard(shard.rows, cols, shard.groups, 8, None)
    (tensors,) = repacked(source, [shard], quant)
    weight = dequantise(tensors, np.arange(len(shard.rows)) // 8, v2)
    expected = torch.zeros(len(shard.rows), len(cols), dtype=torch.float64)
    full = dequantise(source, g_idx, v2)
    for j, row in enumerate(shard.rows):
        for i, col in enumerate(cols):
            if row >= 0 and col >= 0:
                expected[j, i] = full[row, col]
    assert torch.equal(weight, expected)


def test_golden_files_say_where_they_come_from() -> None:
    for kind in ("sym", "asym"):
        with safe_open(GOLDEN / f"autogptq-{kind}.safetensors", framework="np") as file:
            assert file.metadata()["auto_gptq"] == "0.7.1"


@st.composite
def any_repacking(
    draw: st.DrawFn,
) -> tuple[dict[str, torch.Tensor], list[Shard], QuantConfig]:
    """A random layer and shards of it: padding, absent columns, empty groups."""
    bits = draw(BITS)
    pack, size = pack_factor(bits), draw(st.sampled_from([32, 96] if bits == 3 else [16, 32, 48]))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    groups, n = draw(st.integers(1, 4)), pack * draw(st.integers(1, 12))
    k = groups * size
    words = {"qweight": (k * bits // 32, n), "qzeros": (groups, n * bits // 32)}
    layer = {
        name: torch.from_numpy(rng.integers(0, 1 << 32, shape, dtype=np.uint32).view(np.int32))
        for name, shape in words.items()
    }
    # No zero point that a padding row can't hold: such checkpoints are refused before.
    below = words_of(2**bits - 2, bits, n * bits // 32).view(np.int32)
    layer["qzeros"] &= torch.from_numpy(below)
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    layer["scales"] = torch.from_numpy(rng.uniform(0.5, 1.5, (groups, n))).to(dtype)
    if draw(st.booleans()):
        layer["bias"] = torch.from_numpy(rng.uniform(-1, 1, n)).half()
    g_idx = make_g_idx(rng, k, size)
    shards = []
    for _ in range(draw(st.integers(1, 3))):
        unit = draw(st.sampled_from([pack if bits < 4 else 16, size]))
        shard = bucketed_by_hand(np.flatnonzero(rng.random(k) < 0.7), g_idx, unit, n)
        more = draw(st.integers(0, 2))
        rows = np.append(shard.rows, np.full(more * unit, -1)).astype(np.int32)
        of_group = np.append(shard.groups, np.full(more, -1)).astype(np.int32)
        cols = np.arange(n, dtype=np.int32)
        if draw(st.booleans()):
            cols = rng.permutation(np.append(cols, np.full(pack, -1, np.int32)))
        elif draw(st.booleans()):
            cols = cols[: pack * (n // pack // 2 + 1)]
        perm = rng.permutation(len(rows)).astype(np.int32) if draw(st.booleans()) else None
        if len(rows):
            shards.append(Shard(rows, cols, of_group, unit, perm))
    quant = QuantConfig(bits, size, None, True, False, draw(st.sampled_from(["gptq", "gptq_v2"])))
    return layer, shards, quant


@settings(deadline=None)
@given(any_repacking())
def test_the_cpu_gives_the_plain_executors_bytes(
    case: tuple[dict[str, torch.Tensor], list[Shard], QuantConfig],
) -> None:
    layer, shards, quant = case
    results = list(repack(packed(layer), ([s] for s in shards), quant, open_device("cpu")))
    for shard, tensors in zip(shards, results, strict=True):
        assert same(tensors, plain_repack(layer, shard, quant))


@settings(deadline=None, max_examples=20)
@given(any_repacking())
def test_the_triton_kernel_gives_the_plain_executors_bytes(
    case: tuple[dict[str, torch.Tensor], list[Shard], QuantConfig],
) -> None:
    """On a GPU, or where there is none in Triton's interpreter."""
    layer, shards, quant = case
    results = list(repack(packed(layer), ([s] for s in shards), quant, gpu()))
    for shard, tensors in zip(shards, results, strict=True):
        assert same(tensors, plain_repack(layer, shard, quant))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("device", [lambda: open_device("cpu"), gpu], ids=["cpu", "triton"])
def test_floats_are_moved_by_the_same_vectors(
    device: Callable[[], Device], dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.normal(size=(24, 32))).to(dtype)
    bias = torch.from_numpy(rng.normal(size=24)).half()
    rows = rng.permutation(np.append(rng.permutation(32)[:21], [-1] * 3)).astype(np.int32)
    cols = rng.permutation(np.append(rng.permutation(24)[:13], [-1] * 2)).astype(np.int32)
    shard = Shard(rows, cols, np.zeros(1, np.int32), len(rows), np.maximum(rows, 0))
    (tensors,) = repack(Dense(bits(weight), bits(bias)), [[shard]], None, device())
    expected = weight[cols][:, rows]
    expected[cols < 0], expected[:, rows < 0] = 0, 0
    wanted = {"weight": expected, "perm": torch.from_numpy(np.maximum(rows, 0))}
    wanted["bias"] = torch.where(torch.from_numpy(cols < 0), 0, bias[cols])
    assert same(tensors, wanted)
