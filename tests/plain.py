"""The plain executor: index vectors applied to unpacked integers in torch, the obvious way."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tpgptq_convert.config import QuantConfig
from tpgptq_convert.packing import pack_cols, pack_rows, unpack_cols, unpack_rows, zero_points
from tpgptq_convert.plan import Shard
from tpgptq_convert.repack import Device, Packed, open_device
from tpgptq_convert.source import Bytes, pageable

Tensors = dict[str, torch.Tensor]


def packed(tensors: Tensors) -> Packed:
    """A layer as the executor takes it."""
    parts = (name for name in ("qweight", "qzeros", "scales", "bias") if name in tensors)
    return Packed(**{name: bits(tensors[name]) for name in parts})


def bits(tensor: torch.Tensor) -> NDArray[Any]:
    """As numpy, bfloat16 as its bits."""
    return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


def same(repacked: dict[str, NDArray[Any]], plain: Tensors) -> bool:
    """Whether two executors gave the same tensors, bit for bit."""
    return repacked.keys() == plain.keys() and all(
        repacked[name].shape == tuple(plain[name].shape)
        and repacked[name].tobytes() == bits(plain[name].contiguous()).tobytes()
        for name in plain
    )


def plain_repack(layer: Tensors, shard: Shard, quant: QuantConfig) -> Tensors:
    """One shard's tensors, by the last part of their names."""
    rows, cols, groups = (
        torch.from_numpy(v.astype(np.int64)) for v in (shard.rows, shard.cols, shard.groups)
    )
    zeros = unpack_cols(layer["qzeros"], quant.bits)[groups][:, cols]
    zeros[groups < 0] = quant.stored_neutral
    zeros[:, cols < 0] = quant.stored_neutral
    scales = layer["scales"][groups][:, cols]
    scales[groups < 0] = 0
    scales[:, cols < 0] = 0
    values = unpack_rows(layer["qweight"], quant.bits)[rows][:, cols]
    values[:, cols < 0] = quant.neutral
    zero = zero_points(zeros, quant.checkpoint_format).to(torch.uint8)
    padding = torch.nonzero(rows < 0).flatten()
    values[padding] = zero[padding // shard.group_size]
    tensors = {
        "qweight": pack_rows(values, quant.bits),
        "qzeros": pack_cols(zeros, quant.bits),
        "scales": scales,
    }
    if shard.perm is not None:
        tensors["perm"] = torch.from_numpy(shard.perm)
    if "bias" in layer:
        tensors["bias"] = layer["bias"][cols]
        tensors["bias"][cols < 0] = 0
    return tensors


def gpu() -> Device:
    """The GPU, or where there is none its code in Triton's interpreter, on the CPU."""
    if torch.cuda.is_available():
        return open_device("cuda:0")
    pytest.importorskip("triton")
    from tpgptq_convert.repack_gpu import Gpu

    class Interpreted(Gpu):
        def allocate(self, nbytes: int) -> Bytes:
            return pageable(nbytes)

        def work(self) -> AbstractContextManager[None]:
            return nullcontext()

        def release(self) -> None:
            pass

        def store(self, array: torch.Tensor) -> NDArray[Any]:
            return array.contiguous().numpy()

    return Interpreted(torch.device("cpu"))
