"""Index vectors + packed layer -> packed shard, on whatever device the tensors are. Knows no model.

Here stand the packing, its inverse, and the one place where a stored zero point becomes a zero
point. Integers are moved, never computed anew; the same input gives the same bytes on any device.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpgptq_convert.checkpoint import IntArray
from tpgptq_convert.config import QuantConfig
from tpgptq_convert.plan import Shard

Item = TypeVar("Item")
Result = TypeVar("Result")


def unpack_rows(words: Tensor, bits: int) -> Tensor:
    """(K/pf, N) int32 -> (K, N) uint8: row pf*i + j lies in the bits from bits*j of word i."""
    octets = _empty(words, 4)
    for j in range(4):
        octets[j::4] = words >> (8 * j)  # the lowest eight bits are kept
    fields = 8 // bits
    values = _empty(octets, fields)
    for j in range(fields):
        values[j::fields] = (octets >> (bits * j)) & ((1 << bits) - 1)
    return values


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """(K, N) uint8 -> (K/pf, N) int32, the inverse of `unpack_rows`."""
    fields = 8 // bits
    octets = values[::fields].clone()
    for j in range(1, fields):
        octets |= values[j::fields] << (bits * j)
    words = octets[::4].to(torch.int32)
    for j in range(1, 4):
        words |= octets[j::4].to(torch.int32) << (8 * j)
    return words


def _empty(rows: Tensor, times: int) -> Tensor:
    """Room for `times` as many rows of uint8."""
    return rows.new_empty((rows.shape[0] * times, rows.shape[1]), dtype=torch.uint8)


def unpack_cols(words: Tensor, bits: int) -> Tensor:
    """(G, N/pf) int32 -> (G, N) uint8."""
    return unpack_rows(words.T, bits).T


def pack_cols(values: Tensor, bits: int) -> Tensor:
    """(G, N) uint8 -> (G, N/pf) int32, the inverse of `unpack_cols`."""
    return pack_rows(values.T, bits).T.contiguous()


def zero_points(stored: Tensor, checkpoint_format: str) -> Tensor:
    """Stored fields (uint8) -> zero points (int16): "gptq" stores one less, "gptq_v2" the value.

    A stored 15 of the "gptq" format means 16, as in AutoGPTQ's own torch and Triton kernels.
    """
    return stored.to(torch.int16) + (1 if checkpoint_format == "gptq" else 0)


@contextmanager
def workers(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """Threads to work in: on a CPU one for each core, whose operations are not split further.

    Splitting small operations over cores costs more than it saves (five times more, where another
    process wants a core too).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(cores if device.type == "cpu" else 1)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def in_order(
    pool: ThreadPoolExecutor, job: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[tuple[Item, Result]]:
    """Each item with the job's result, in order; at most `ahead` jobs are begun or waiting."""
    pending: deque[tuple[Item, Future[Result]]] = deque()
    for item in items:
        pending.append((item, pool.submit(job, item)))
        if len(pending) == ahead:
            first, future = pending.popleft()
            yield first, future.result()
    for item, future in pending:
        yield item, future.result()


@dataclass(frozen=True, eq=False)
class Unpacked:
    """A layer with its integers unpacked."""

    values: Tensor  # (K, N) uint8
    zeros: Tensor  # (G, N) uint8, as stored
    scales: Tensor  # (G, N)
    bias: Tensor | None  # (N,)

    def dequantise(self, g_idx: Tensor, quant: QuantConfig, dtype: torch.dtype) -> Tensor:
        """The weight (K, N) that the layer stands for, computed in `dtype`; g_idx is (K,)."""
        zeros = zero_points(self.zeros, quant.checkpoint_format)
        steps = self.values.to(torch.int16) - zeros[g_idx]
        return steps.to(dtype).mul_(self.scales[g_idx])


@dataclass(frozen=True, eq=False)
class Packed:
    """A layer's tensors as they are stored."""

    qweight: Tensor  # (K/pf, N) int32
    qzeros: Tensor  # (G, N/pf) int32
    scales: Tensor  # (G, N)
    bias: Tensor | None = None  # (N,)

    def unpack(self, quant: QuantConfig, cols: IntArray | None = None) -> Unpacked:
        """The layer, or some of its columns in another order (-1: any), with integers unpacked."""
        zeros = unpack_cols(self.qzeros, quant.bits)
        if cols is None:
            values = unpack_rows(self.qweight, quant.bits)
            return Unpacked(values, zeros, self.scales, self.bias)
        return Unpacked(
            unpack_rows(_take(self.qweight, 1, cols), quant.bits),  # whole words move
            _take(zeros, 1, cols),
            _take(self.scales, 1, cols),
            None if self.bias is None else _take(self.bias, 0, cols),
        )


def repack(
    layer: Packed, shards: Sequence[Shard], quant: QuantConfig
) -> Iterator[dict[str, Tensor]]:
    """Each shard's tensors, by the last part of their names."""
    columns: Unpacked | None = None
    for i, shard in enumerate(shards):
        if columns is None or not np.array_equal(shard.cols, shards[i - 1].cols):
            columns = layer.unpack(quant, shard.cols)
        yield _repack_rows(columns, shard, quant)


def _repack_rows(columns: Unpacked, shard: Shard, quant: QuantConfig) -> dict[str, Tensor]:
    """One shard from its columns.

    Padding rows hold the zero point of their group and column, so they contribute exactly 0;
    padding columns, and groups of padding alone, have scale 0.
    """

    def where(condition: NDArray[np.bool_]) -> Tensor:
        return torch.from_numpy(np.flatnonzero(condition)).to(columns.values.device)

    zeros = _take(columns.zeros, 0, shard.groups).clone()
    scales = _take(columns.scales, 0, shard.groups).clone()
    values = _take(columns.values, 0, shard.rows)
    absent, padding = where(shard.cols < 0), where(shard.rows < 0)
    for axis, missing in enumerate((where(shard.groups < 0), absent)):
        zeros.index_fill_(axis, missing, quant.stored_neutral)
        scales.index_fill_(axis, missing, 0)
    if len(absent) or len(padding):
        values = values.clone().index_fill_(1, absent, quant.neutral)
        zero = zero_points(zeros, quant.checkpoint_format).to(torch.uint8)
        values[padding] = zero[padding // shard.group_size]

    tensors = {
        "qweight": pack_rows(values, quant.bits),
        "qzeros": pack_cols(zeros, quant.bits),
        "scales": scales,
    }
    if shard.perm is not None:
        tensors["perm"] = torch.from_numpy(shard.perm)
    if columns.bias is not None:
        tensors["bias"] = columns.bias.clone().index_fill_(0, absent, 0)
    return tensors


def gather(tensor: Tensor, rows: IntArray, cols: IntArray) -> Tensor:
    """tensor[rows][:, cols], a new tensor or a view; an index of -1 picks anything."""
    # The smaller of the two intermediate results first.
    if len(rows) * tensor.shape[1] < len(cols) * tensor.shape[0]:
        return _take(_take(tensor, 0, rows), 1, cols)
    return _take(_take(tensor, 1, cols), 0, rows)


def _take(tensor: Tensor, dim: int, index: IntArray) -> Tensor:
    """tensor's slices at an index; a view where they are consecutive."""
    if len(index) and np.array_equal(index, np.arange(index[0], index[0] + len(index))):
        return tensor.narrow(dim, int(index[0]), len(index))
    return tensor.index_select(dim, torch.from_numpy(np.maximum(index, 0)).to(tensor.device))
