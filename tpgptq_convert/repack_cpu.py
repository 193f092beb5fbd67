"""Words moved by the CPU: numpy, and one loop that numba compiles when it is first run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from tpgptq_convert.checkpoint import IntArray
from tpgptq_convert.config import words_of
from tpgptq_convert.source import Bytes, pageable
from tpgptq_convert.threads import cores

Array = NDArray[Any]


class Cpu:
    """`repack.Device` in host memory; D is a numpy array."""

    name = "cpu"

    def __init__(self) -> None:
        self.threads = max(1, cores() - 1)  # hashing wants one
        self._own = threading.local()

    def allocate(self, nbytes: int) -> Bytes:
        return pageable(nbytes)

    @contextmanager
    def work(self) -> Iterator[None]:
        yield

    def release(self) -> None:
        pass

    def load(self, array: Array) -> Array:
        return array

    def store(self, array: Array) -> Array:
        return np.ascontiguousarray(array)

    def gather(
        self,
        words: Array,
        inner: IntArray,
        outer: IntArray,
        bits: int,
        absent: int,
        fill: NDArray[np.uint8] | None = None,
    ) -> Array:
        stack = np.broadcast(inner[:, 0], outer[:, 0]).size
        out = np.empty((stack, inner.shape[1] * bits // 32, outer.shape[1]), np.uint32)
        constant = np.full((1, outer.shape[1]), absent, np.uint32)
        for p in range(stack):
            cols = outer[p % len(outer)]
            source, begin = words.view(np.uint32), 0
            if _consecutive(cols):
                begin = int(cols[0])
            else:
                picked = np.maximum(cols, 0).astype(np.uint32)  # in the place of -1 anything
                source = self._scratch(len(source), len(cols))
                _pick_columns(words.view(np.uint32), picked, source)
            filler = constant if fill is None else fill[p].astype(np.uint32)
            gather = _gather_split_rows if 32 % bits else _gather_rows
            gather(source, begin, inner[p % len(inner)], bits, filler, out[p])
            out[p][:, cols < 0] = words_of(absent, bits, out.shape[1])[:, None]
        return out.view(np.int32)

    def _scratch(self, rows: int, columns: int) -> Array:
        """Words of this thread's own until it asks again: new memory costs as much as a copy."""
        words = getattr(self._own, "words", None)
        if words is None or len(words) < rows * columns:
            words = self._own.words = np.empty(rows * columns, np.uint32)
        return words[: rows * columns].reshape(rows, columns)

    def transpose(self, array: Array) -> Array:
        return np.ascontiguousarray(array.swapaxes(-1, -2))


def _consecutive(cols: IntArray) -> bool:
    return len(cols) > 0 and np.array_equal(cols, np.arange(cols[0], cols[0] + len(cols)))


def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    """The function as machine code, kept for the next process where there is a place for that."""
    compiled: Callable[..., None]
    try:
        compiled = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither this file's directory nor the user's cache can be written
        compiled = numba.njit(nogil=True)(function)
    return compiled


@_compiled
def _pick_columns(words: Array, cols: Array, out: Array) -> None:
    """out[:] = words[:, cols]; cols without a sign, which is faster here and than np.take."""
    last = len(words) - 1
    for row in range(0, len(words), 2):  # two at a time: each column is looked up once for both
        also = min(row + 1, last)
        one, two = words[row], words[also]
        target_one, target_two = out[row], out[also]
        for c in range(len(cols)):
            at = cols[c]
            target_one[c] = one[at]
            target_two[c] = two[at]


@_compiled
def _gather_rows(
    words: Array, begin: int, rows: IntArray, bits: int, fill: Array, out: Array
) -> None:
    """Fill the words of `out` from columns of `words` from `begin`, its values picked by `rows`.

    A row of -1 is one of `fill`, which has as many as there are equal parts of `rows`.
    """
    per_word, width, unit = 32 // bits, out.shape[1], len(rows) // len(fill)
    end, mask, up = begin + width, np.uint32((1 << bits) - 1), np.uint32(bits)
    for i in range(len(out)):
        target = out[i]
        target[:] = 0
        for field in range(0, per_word, 2):  # two at a time: less to load and store
            j = i * per_word + field
            one, two = rows[j], rows[j + 1]
            a = words[one // per_word, begin:end] if one >= 0 else fill[j // unit]
            b = words[two // per_word, begin:end] if two >= 0 else fill[j // unit]
            right_a = np.uint32(max(one, 0) % per_word * bits)
            right_b = np.uint32(max(two, 0) % per_word * bits)
            left = np.uint32(field * bits)
            for c in range(width):
                pair = (a[c] >> right_a & mask) | (b[c] >> right_b & mask) << up
                target[c] |= pair << left


@_compiled
def _gather_split_rows(
    words: Array, begin: int, rows: IntArray, bits: int, fill: Array, out: Array
) -> None:
    """The same where some values begin in one word and end in the next."""
    width, unit, last = out.shape[1], len(rows) // len(fill), len(words) - 1
    mask, word = np.uint64((1 << bits) - 1), np.uint64(32)
    out[:] = 0
    for j in range(len(rows)):
        row, i = rows[j], j * bits // 32
        at = row * bits // 32
        right, left = np.uint64(row * bits % 32), np.uint64(j * bits % 32)
        for c in range(width):
            if row >= 0:
                both = np.uint64(words[min(at + 1, last), begin + c]) << word
                value = (both | words[at, begin + c]) >> right & mask
            else:
                value = np.uint64(fill[j // unit, c])
            out[i, c] |= np.uint32(value << left)
            if left + bits > word:
                out[i + 1, c] |= np.uint32(value << left >> word)
