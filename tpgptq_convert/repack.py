"""Index vectors + packed layer -> packed shard. Knows no model, and no device.

All of it is one operation on packed words, `Device.gather`: values picked along the axis that is
packed, whole words along the other. qweight is packed along its rows, qzeros along its columns.
Integers are moved, never computed anew; the same input gives the same bytes on any device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tpgptq_convert.checkpoint import Checkpoint, IntArray, Layer
from tpgptq_convert.config import QuantConfig, zero_offset
from tpgptq_convert.errors import CheckpointError
from tpgptq_convert.plan import Shard, stacked
from tpgptq_convert.source import Allocate, Bytes, pageable

Array = NDArray[Any]
# The bits of a float's exponent, all of them set in NaN and infinity alone.
EXPONENTS = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}


@dataclass(frozen=True, eq=False)
class Packed:
    """A layer's tensors as they are stored; floats that numpy doesn't know as their bits."""

    qweight: Array  # (K/pf, N) int32
    qzeros: Array  # (G, N/pf) int32
    scales: Array  # (G, N)
    bias: Array | None = None  # (N,), of a column-parallel layer

    @classmethod
    def read(cls, checkpoint: Checkpoint, layer: Layer, allocate: Allocate = pageable) -> Packed:
        """A layer of the source; raises CheckpointError if its scales are not finite."""

        def array(part: str) -> Array:
            return checkpoint.source.array(f"{layer.name}.{part}", allocate)

        scales = array("scales")
        bits = scales.view(f"u{scales.itemsize}")
        exponent = EXPONENTS[layer.scales.dtype]
        if ((bits & exponent) == exponent).any():
            raise CheckpointError(
                f"{layer.name}.scales: holds NaN or infinity; must be finite",
                hint="the file may be damaged; fetch it again",
            )
        biased = layer.bias and layer.linear.parallel == "column"
        return cls(array("qweight"), array("qzeros"), scales, array("bias") if biased else None)


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
        """Words picked apart and put together anew, P times: (M/pf, C) -> (P, m/pf, c) int32.

        A word holds pf values of `bits` bits, along the first axis. inner is (P, m) and outer
        (P, c), or (1, ...) where all P are the same. Value j of column i comes from row
        inner[p, j] of column outer[p, i]. Where outer is -1 it is `absent`; so it is where inner is
        -1, or with `fill` (P, n, c) there fill[p, j // (m // n), i].
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
    layer: Packed, stacks: Iterable[Sequence[Shard]], quant: QuantConfig, device: Device
) -> Iterator[dict[str, Array]]:
    """The tensors of each shard of each stack, by the last part of their names.

    The shards of a stack have the same sizes, and are worked on at once. Padding rows hold the zero
    point of their group and column, so they contribute exactly 0; padding columns, and groups of
    padding alone, have scale 0.
    """
    qweight = device.load(layer.qweight)
    # Packed along their columns: zero points, and scales as halves of words.
    zero_words = device.transpose(device.load(layer.qzeros))
    scale_words = device.transpose(device.load(layer.scales.view(np.int32)))
    for shards in stacks:
        rows, cols, groups = (
            stacked([getattr(shard, name) for shard in shards])
            for name in ("rows", "cols", "groups")
        )
        fill = _padding(layer, rows, cols, groups, quant)
        halves = _halves(cols, layer.scales.itemsize)
        inner, outer, group, half = map(device.load, (rows, cols, groups, halves))
        words = device.gather(qweight, inner, outer, quant.bits, quant.neutral, fill)
        zeros = device.gather(zero_words, outer, group, quant.bits, quant.stored_neutral)
        scales = device.gather(scale_words, half, group, 16, 0)
        arrays = {
            "qweight": device.store(words),
            "qzeros": device.store(device.transpose(zeros)),
            "scales": device.store(device.transpose(scales)).view(layer.scales.dtype),
        }
        for p, shard in enumerate(shards):
            tensors = {part: array[p % len(array)] for part, array in arrays.items()}
            if shard.perm is not None:
                tensors["perm"] = shard.perm
            if layer.bias is not None:
                tensors["bias"] = np.where(shard.cols < 0, 0, layer.bias[shard.cols])
            yield tensors


def _halves(cols: IntArray, itemsize: int) -> IntArray:
    """Where the 16-bit halves of columns stand that are `itemsize` bytes wide."""
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
    octets, per_octet = layer.qzeros.view(np.uint8), 8 // quant.bits
    zeros = np.empty((len(octets), octets.shape[1] * per_octet), np.uint8)
    for j in range(per_octet):
        zeros[:, j::per_octet] = octets >> (quant.bits * j) & ((1 << quant.bits) - 1)
    zeros += np.uint8(zero_offset(quant.checkpoint_format))
    stack = np.broadcast(rows[:, 0], cols[:, 0]).size
    fill = np.empty((stack, groups.shape[1], cols.shape[1]), np.uint8)
    for p in range(stack):
        own, picked = groups[p % len(groups)], cols[p % len(cols)]
        whole = np.array_equal(picked, np.arange(zeros.shape[1]))
        fill[p] = zeros[own] if whole else zeros[own][:, picked]
        fill[p, own < 0] = quant.neutral
    return fill
