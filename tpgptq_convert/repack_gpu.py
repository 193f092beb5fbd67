"""Words moved by a GPU: one Triton kernel from packed words to packed words."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from tpgptq_convert.errors import DeviceError
from tpgptq_convert.source import Bytes

Array = NDArray[Any]

WORDS, COLUMNS = 4, 128  # of one program's tile
_LAUNCH = threading.Lock()  # so that one thread compiles a kernel, and not each for itself


class Gpu:
    """`repack.Device` on a GPU; D is a torch tensor.

    Each thread has a stream of its own, so that one layer is copied in while another is worked on
    and a third is copied out.
    """

    threads = 4

    def __init__(self, device: torch.device) -> None:
        self.name, self.device = str(device), device
        self._own = threading.local()

    def allocate(self, nbytes: int) -> Bytes:
        """Page-locked memory, which torch keeps for the next who asks."""
        data: Bytes = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
        return data

    @contextmanager
    def work(self) -> Iterator[None]:
        try:
            if not hasattr(self._own, "stream"):
                self._own.stream = torch.cuda.Stream(self.device)
            with torch.cuda.stream(self._own.stream):
                try:
                    yield
                finally:
                    self._own.stream.synchronize()
        except RuntimeError as error:
            if "CUDA" not in str(error):  # of torch's, the driver's and Triton's errors, all do
                raise
            raise DeviceError(
                f"{self.name}: {str(error).splitlines()[0]}; must work until the end",
                hint="see what else is using it, or use another --device, such as cpu",
            ) from error

    def release(self) -> None:
        torch.cuda.empty_cache()
        if hasattr(torch._C, "_host_emptyCache"):  # has no public name
            torch._C._host_emptyCache()

    def load(self, array: Array) -> Tensor:
        bits = array.view(f"i{array.itemsize}")  # torch can't index every kind of number
        return torch.from_numpy(bits).to(self.device, non_blocking=True)

    def store(self, array: Tensor) -> Array:
        array = array.contiguous()
        host = torch.empty(array.shape, dtype=array.dtype, pin_memory=True)
        stored: Array = host.copy_(array, non_blocking=True).numpy()
        return stored

    def gather(
        self,
        words: Tensor,
        inner: Tensor,
        outer: Tensor,
        bits: int,
        absent: int,
        fill: NDArray[np.uint8] | None = None,
    ) -> Tensor:
        filler = None if fill is None else self.load(fill).view(torch.uint8)
        return gather(words, inner, outer, bits, absent, filler)

    def transpose(self, array: Tensor) -> Tensor:
        return array.transpose(-1, -2)


def gather(
    words: Tensor, inner: Tensor, outer: Tensor, bits: int, absent: int, fill: Tensor | None
) -> Tensor:
    """`repack.Device.gather` of tensors; inner and outer are int32, fill is uint8."""
    stack = max(len(inner), len(outer))
    out = words.new_empty((stack, inner.shape[1] * bits // 32, outer.shape[1]))
    grid = (triton.cdiv(out.shape[2], COLUMNS), triton.cdiv(out.shape[1], WORDS), stack)
    with _LAUNCH:
        _gather_kernel[grid](
            words, inner, outer, fill, out,
            *words.stride(), *out.shape[1:],
            inner.shape[1] if len(inner) > 1 else 0, outer.shape[1] if len(outer) > 1 else 0,
            fill.shape[1] if fill is not None else 1, absent,
            FILLED=fill is not None, BITS=bits, WORDS=WORDS, COLUMNS=COLUMNS,
        )  # fmt: skip
    return out


# Not compiled anew for every size: a conversion takes seconds, as a compilation does.
@triton.jit(
    do_not_specialize=[
        *("row_stride", "col_stride", "n_words", "n_cols"),
        *("inner_stride", "outer_stride", "n_fill", "absent"),
    ]
)
def _gather_kernel(
    words, inner, outer, fill, out,
    row_stride, col_stride, n_words, n_cols, inner_stride, outer_stride, n_fill, absent,
    FILLED: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of WORDS x COLUMNS words of out[p]; see `gather` for what is what."""
    SPLIT: tl.constexpr = 32 % BITS != 0  # some values begin in one word and end in the next
    TOUCHED: tl.constexpr = 32 // BITS + 2 * SPLIT  # values that have bits in a word, at the most
    MASK: tl.constexpr = (1 << BITS) - 1
    p = tl.program_id(2)
    i = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    col = tl.load(outer + p * outer_stride + c, mask=c < n_cols, other=-1)
    real = (col >= 0)[None, :]
    column = words + col.to(tl.int64)[None, :] * col_stride
    packed = tl.zeros((WORDS, COLUMNS), tl.int32)
    for field in tl.static_range(TOUCHED):
        j = i * 32 // BITS + field
        left = j * BITS - i * 32
        row = tl.load(inner + p * inner_stride + j, mask=(i < n_words) & (left < 32), other=0)
        at = (row * BITS // 32).to(tl.int64)[:, None] * row_stride
        right = (row * BITS % 32)[:, None]
        there = real & (row >= 0)[:, None]
        word = tl.load(column + at, mask=there, other=0)
        value = (word >> right) & MASK
        if SPLIT:
            beyond = right + BITS - 32  # bits of it that are in the next word
            more = there & (beyond > 0)
            low = (word >> right) & (MASK >> tl.maximum(beyond, 0))  # the shift drags the sign in
            high = tl.load(column + at + row_stride, mask=more, other=0)
            value = tl.where(more, (low | high << (BITS - beyond)) & MASK, value)
        value = tl.where(there, value, absent)
        if FILLED:
            pad = (row < 0)[:, None] & real
            part = p * n_fill + j // (n_words * 32 // BITS // n_fill)
            filler = tl.load(fill + part[:, None] * n_cols + c[None, :], mask=pad, other=0)
            value = tl.where(pad, filler.to(tl.int32), value)
        if SPLIT:
            begun = value << tl.minimum(tl.maximum(left, 0), 31)[:, None]
            value = tl.where((left < 0)[:, None], value >> tl.maximum(-left, 0)[:, None], begun)
            packed |= tl.where((left < 32)[:, None], value, 0)
        else:
            packed |= value << (BITS * field)
    inside = (i < n_words)[:, None] & (c < n_cols)[None, :]
    line = (p * n_words + i).to(tl.int64)[:, None] * n_cols
    tl.store(out + line + c[None, :], packed, mask=inside)
