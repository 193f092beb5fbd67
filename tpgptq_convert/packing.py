"""GPTQ's packing in plain torch: unpacked integers, zero points, dequantised weights.

What converts doesn't stand here (`repack.py`) but what checks it: slow, plain, and written apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpgptq_convert.config import QuantConfig, zero_offset


def unpack_rows(words: Tensor, bits: int) -> Tensor:
    """(K*bits/32, N) int32 -> (K, N) uint8: row i lies in the bits from bits*i of its column."""
    rows, columns = words.shape
    if 8 % bits:  # some values begin in one octet and end in the next
        single = unpack_rows(words, 1).view(-1, bits, columns)
        return sum((single[:, j] << j for j in range(1, bits)), single[:, 0])
    octets = words.contiguous().view(torch.uint8).view(rows, columns, 4)
    octets = octets.permute(0, 2, 1).contiguous()
    fields, mask = 8 // bits, (1 << bits) - 1
    values = octets.new_empty(rows, 4, fields, columns)
    for j in range(fields):
        values[:, :, j] = (octets >> (bits * j)).bitwise_and_(mask)
    return values.view(rows * 4 * fields, columns)


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """(K, N) uint8 -> (K*bits/32, N) int32, the inverse of `unpack_rows`."""
    if 8 % bits:
        single = torch.stack([values >> j & 1 for j in range(bits)], dim=1)
        return pack_rows(single.flatten(0, 1), 1)
    fields = 8 // bits
    octets = values[::fields].clone()
    for j in range(1, fields):
        octets |= values[j::fields] << (bits * j)
    words = octets[::4].to(torch.int32)
    for j in range(1, 4):
        words |= octets[j::4].to(torch.int32) << (8 * j)
    return words


def unpack_cols(words: Tensor, bits: int) -> Tensor:
    """(G, N*bits/32) int32 -> (G, N) uint8."""
    if 8 % bits:
        words = words.T.clone(memory_format=torch.contiguous_format)
        return unpack_rows(words, bits).T.contiguous()
    octets = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    fields, mask = 8 // bits, (1 << bits) - 1
    shifted = [(octets >> (bits * j)).bitwise_and_(mask) for j in range(fields)]
    return torch.stack(shifted, dim=2).flatten(1)


def pack_cols(values: Tensor, bits: int) -> Tensor:
    """(G, N) uint8 -> (G, N*bits/32) int32, the inverse of `unpack_cols`."""
    return pack_rows(values.T, bits).T.contiguous()


def zero_points(stored: Tensor, checkpoint_format: str) -> Tensor:
    """Stored fields (uint8) -> zero points (int16): "gptq" stores one less, "gptq_v2" the value.

    A stored 15 of the "gptq" format means 16, as in AutoGPTQ's own torch and Triton kernels.
    """
    return stored.to(torch.int16) + zero_offset(checkpoint_format)


def dequantise(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    quant: QuantConfig,
    dtype: torch.dtype,
) -> Tensor:
    """The weight (K, N) that a layer stands for, computed in `dtype`; g_idx (K,) is int64."""
    zeros = zero_points(unpack_cols(qzeros, quant.bits), quant.checkpoint_format)
    steps = unpack_rows(qweight, quant.bits).to(torch.int16) - zeros[g_idx]
    return steps.to(dtype).mul_(scales[g_idx])
