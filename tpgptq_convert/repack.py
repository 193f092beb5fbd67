"""Index vectors + packed layer -> packed shard. Knows no model, and no device.

All of it is one operation on packed words, `Device.gather`: values picked along the axis that is
packed, whole words along the other. qweight is packed along its rows, qzeros along its columns.
Integers are moved, never computed anew; the same input gives the same bytes on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tpgptq_convert.checkpoint import Checkpoint, IntArray, Layer
from tpgptq_convert.config import QuantConfig, fields_of, zero_offset
from tpgptq_convert.errors import CheckpointError
from tpgptq_convert.plan import Shard, stacked
from tpgptq_convert.source import Allocate, Bytes, pageable

Array = NDArray[Any]
# The bits of a float's exponent, all of them set in NaN and infinity alone.
EXPONENTS = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}


@dataclass(frozen=True, eq=False)
class Packed:
    """A layer's tensors as GPTQ stores them; floats that numpy doesn't know as their bits."""

    qweight: Array  # (K*bits/32, N) int32
    qzeros: Array  # (G, N*bits/32) int32
    scales: Array  # (G, N)
    bias: Array | None = None  # (N,), of a column-parallel layer

    @classmethod
    def read(cls, checkpoint: Checkpoint, layer: Layer, allocate: Allocate = pageable) -> Packed:
        """A layer of the source; raises CheckpointError if scales or bias are not finite."""
        qweight, qzeros, scales = (
            checkpoint.part(layer, part, allocate) for part in ("qweight", "qzeros", "scales")
        )
        _check_finite(f"{layer.name}.{checkpoint.form.names['scales']}", layer.dtype, scales)
        return cls(qweight, qzeros, scales, _bias(checkpoint, layer, allocate))


@dataclass(frozen=True, eq=False)
class Dense:
    """The same of a layer that isn't quantised."""

    weight: Array  # (N, K)
    bias: Array | None = None

    @classmethod
    def read(cls, checkpoint: Checkpoint, layer: Layer, allocate: Allocate = pageable) -> Dense:
        """A layer of the source; raises CheckpointError if weight or bias are not finite."""
        weight = checkpoint.source.array(f"{layer.name}.weight", allocate)
        _check_finite(f"{layer.name}.weight", layer.dtype, weight)
        return cls(weight, _bias(checkpoint, layer, allocate))


def _bias(checkpoint: Checkpoint, layer: Layer, allocate: Allocate) -> Array | None:
    if layer.column_bias is None:
        return None
    bias = checkpoint.source.array(f"{layer.name}.bias", allocate)
    _check_finite(f"{layer.name}.bias", layer.column_bias.dtype, bias)
    return bias


def _check_finite(name: str, dtype: str, floats: Array) -> None:
    bits, exponent = floats.view(f"u{floats.itemsize}"), EXPONENTS[dtype]
    if ((bits & exponent) == exponent).any():
        raise CheckpointError(
            f"{name}: holds NaN or infinity; must be finite",
            hint="the file may be damaged; fetch it again",
        )


def read_layer(
    checkpoint: Checkpoint, layer: Layer, allocate: Allocate = pageable
) -> Packed | Dense:
    """A layer of the source as the executor takes it."""
    return (Packed if layer.quant else Dense).read(checkpoint, layer, allocate)


class Device(Protocol):
    """Where words are moved. `D` below is its own kind of array."""

    name: str  # cpu, cuda or cuda:N
    threads: int  # that may work on it at a time

    def allocate(self, nbytes: int) -> Bytes:
        """Host memory that `load` reads fast."""

    def work(self) -> AbstractContextManager[None]:
        """Around the work of one thread; what `store` returned is whole at its end."""

    def release(self) -> None:
        """Give memory back that is kept for the next who asks."""

    def load(self, array: Array) -> Any:
        """Host array -> D."""

    def store(self, array: Any) -> Array:
        """D -> host array, contiguous."""

    def gather(
        self,
        words: Any,
        inner: Any,
        outer: Any,
        bits: int,
        absent: int,
        fill: NDArray[np.uint8] | None = None,
    ) -> Any:
        """Words picked apart and put together anew, P times: M values of each of C columns, m of c.

        (M*bits/32, C) -> (P, m*bits/32, c) int32. A value's bits follow those of the one before it
        along the first axis, from one word into the next if `bits` doesn't divide 32. inner is
        (P, m) and outer (P, c), or (1, ...) where all P are the same. Value j of column i comes
        from row inner[p, j] of column outer[p, i]. Where outer is -1 it is `absent`; so it is
        where inner is -1, or with `fill` (P, n, c) there fill[p, j // (m // n), i].
        """

    def transpose(self, array: Any) -> Any:
        """With the last two axes exchanged."""


def open_device(name: str) -> Device:
    """cpu, cuda or cuda:N."""
    if name == "cpu":
        from tpgptq_convert.repack_cpu import Cpu

        return Cpu()
    import torch

    from tpgptq_convert.repack_gpu import Gpu

    return Gpu(torch.device(name))


def repack(
    layer: Packed | Dense,
    stacks: Iterable[Sequence[Shard]],
    quant: QuantConfig | None,
    device: Device,
) -> Iterator[dict[str, Array]]:
    """The tensors of each shard of each stack, by the last part of their names.

    The shards of a stack have the same sizes, and are worked on at once. Padding rows hold the zero
    point of their group and column, so they contribute exactly 0; padding columns, and groups of
    padding alone, have scale 0. A layer that isn't quantised (quant None) is padded with 0.
    """
    if isinstance(layer, Packed):
        assert quant is not None
        move = _packed(layer, quant, device)
    else:
        move = _dense(layer, device)
    for shards in stacks:
        rows, cols, groups = (
            stacked([getattr(shard, name) for shard in shards])
            for name in ("rows", "cols", "groups")
        )
        arrays = move(rows, cols, groups)
        for p, shard in enumerate(shards):
            tensors = {part: array[p % len(array)] for part, array in arrays.items()}
            if shard.perm is not None:
                tensors["perm"] = shard.perm
            if shard.g_idx is not None:
                tensors["g_idx"] = shard.g_idx
            if layer.bias is not None:
                tensors["bias"] = np.where(shard.cols < 0, 0, layer.bias[shard.cols])
            yield tensors


Move = Callable[[IntArray, IntArray, IntArray], dict[str, Array]]  # by rows, cols and groups


def _packed(layer: Packed, quant: QuantConfig, device: Device) -> Move:
    qweight = device.load(layer.qweight)
    # Packed along their columns: zero points, and scales as halves of words.
    zero_words = device.transpose(device.load(layer.qzeros))
    scale_words = device.transpose(device.load(layer.scales.view(np.int32)))

    def move(rows: IntArray, cols: IntArray, groups: IntArray) -> dict[str, Array]:
        fill = _padding(layer, rows, cols, groups, quant)
        halves = _halves(cols, layer.scales.itemsize)
        inner, outer, group, half = map(device.load, (rows, cols, groups, halves))
        words = device.gather(qweight, inner, outer, quant.bits, quant.neutral, fill)
        zeros = device.gather(zero_words, outer, group, quant.bits, quant.stored_neutral)
        scales = device.gather(scale_words, half, group, 16, 0)
        return {
            "qweight": device.store(words),
            "qzeros": device.store(device.transpose(zeros)),
            "scales": device.store(device.transpose(scales)).view(layer.scales.dtype),
        }

    return move


def _dense(layer: Dense, device: Device) -> Move:
    words = device.transpose(device.load(layer.weight.view(np.int32)))  # of halves, along its rows

    def move(rows: IntArray, cols: IntArray, groups: IntArray) -> dict[str, Array]:
        half, outer = map(device.load, (_halves(rows, layer.weight.itemsize), cols))
        moved = device.transpose(device.gather(words, half, outer, 16, 0))
        return {"weight": device.store(moved).view(layer.weight.dtype)}

    return move


def _halves(cols: IntArray, itemsize: int) -> IntArray:
    """Where the 16-bit halves of columns, or rows, stand that are `itemsize` bytes wide."""
    count = itemsize // 2
    halves = np.repeat(cols * count, count, axis=1)
    halves += np.arange(halves.shape[1], dtype=np.int32) % count
    return np.where(np.repeat(cols < 0, count, axis=1), np.int32(-1), halves)


def _padding(
    layer: Packed, rows: IntArray, cols: IntArray, groups: IntArray, quant: QuantConfig
) -> NDArray[np.uint8] | None:
    """What padding rows hold, if there are any: zero points, (P, groups, columns)."""
    if (rows >= 0).all():
        return None
    zeros = fields_of(layer.qzeros, quant.bits)
    zeros += np.uint8(zero_offset(quant.checkpoint_format))
    stack = np.broadcast(rows[:, 0], cols[:, 0]).size
    fill = np.empty((stack, groups.shape[1], cols.shape[1]), np.uint8)
    for p in range(stack):
        own, picked = groups[p % len(groups)], cols[p % len(cols)]
        whole = np.array_equal(picked, np.arange(zeros.shape[1]))
        fill[p] = zeros[own] if whole else zeros[own][:, picked]
        fill[p, own < 0] = quant.neutral
    return fill
