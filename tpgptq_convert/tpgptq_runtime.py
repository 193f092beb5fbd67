"""Load and run one rank's shards of a checkpoint written by tpgptq-convert.

This file needs torch alone; triton for its kernels, transformers for whole models. It lies in every
output and can be imported from there:

    torchrun --nproc-per-node 2 OUT/tpgptq_runtime.py --prompt "Once upon a time"

or, in a program of yours:

    import tpgptq_runtime
    model = tpgptq_runtime.load_model("OUT", dtype=torch.float16, device="cuda")
"""

from __future__ import annotations

import argparse
import copy
import functools
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

# Of a program Python looks for modules beside it first, where code of the model's may lie.
if __name__ == "__main__" and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

if dist.is_available():
    # transformers imports this. It keeps the group that is the default at that time, and with it
    # gloo's threads, beyond destroy_process_group; one of these can then abort the end of Python.
    # Here it comes before there is a group, if this module does.
    import torch.distributed.nn.functional

try:
    import triton
    import triton.language as tl
except ImportError:  # the plain torch reference does without
    triton = None
try:  # what Hopper's own kernel is written in, an experiment of Triton's that changes by version
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    _load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
    _sync = getattr(gl, "barrier", None) or gl.thread_barrier
except (ImportError, AttributeError):
    gluon = None

__all__ = [
    "Checkpoint",
    "ColumnParallelLinear",
    "QuantLinear",
    "RowParallelLinear",
    "arrange",
    "arranged_layers",
    "load_model",
    "multiply",
    "swap_linears",
    "tune",
    "use_kernels",
]

FORMAT_VERSIONS = (1, 2)
BITS = (2, 3, 4, 8)
KERNEL_BITS = (2, 4, 8)
DTYPES = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I32": torch.int32, "F32": torch.float32, "I64": torch.int64, "F64": torch.float64},
}


class FormatError(ValueError):
    """The directory is no output of tpgptq-convert that this module can run."""


def _map_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, backed by a private memory map: read when touched."""
    length = path.stat().st_size
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, length)))
        header.pop("__metadata__", None)
        data = torch.from_file(str(path), shared=False, size=length, dtype=torch.uint8)[8 + size :]
        return {
            name: data[slice(*entry["data_offsets"])]
            .view(DTYPES[entry["dtype"]])
            .view(entry["shape"])
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise FormatError(f"{path}: not a whole safetensors file ({error})") from None


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not a JSON object ({error})") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: not a JSON object")
    return value


def _malformed(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What keeps this module from using a manifest; `rank` compares its sizes with the tensors."""

    def number(value: Any) -> bool:
        return type(value) is int and value > 0

    tp, layout, files = manifest.get("tp"), manifest.get("layout"), manifest.get("files")
    if not number(tp):
        yield f"tp is {tp!r}"
    if layout not in ("ranks", "merged"):
        yield f"layout is {layout!r}"
    lists = files if isinstance(files, dict) else {}
    ranks: Any = lists.get("ranks") if layout == "ranks" else []
    if not isinstance(ranks, list) or (layout == "ranks" and len(ranks) != tp):
        yield f"files.ranks must be a list of {tp}"
    for names in (lists.get("shared" if layout == "ranks" else "merged"), *ranks):
        if not isinstance(names, dict) or any(
            not name or Path(name).is_absolute() or ".." in Path(name).parts for name in names
        ):
            yield "files must map names of files inside the output"
    if manifest.get("checkpoint_format") not in ("gptq", "gptq_v2"):
        yield f"checkpoint_format is {manifest.get('checkpoint_format')!r}"
    if not number(manifest.get("bits")):
        yield f"bits is {manifest.get('bits')!r}"
    heads = manifest.get("heads")
    kinds = ("query", "kv", "padded_query", "padded_kv")
    if not isinstance(heads, dict) or not all(number(heads.get(kind)) for kind in kinds):
        yield f"heads must state {', '.join(kinds)}"
    modules = manifest.get("modules")
    for name, module in modules.items() if isinstance(modules, dict) else [("modules", None)]:
        stated = module if isinstance(module, dict) else {}
        sizes = [stated.get(key) for key in ("in_features", "out_features", "group_size")]
        bits = stated.get("bits", manifest["bits"])
        if not all(map(number, sizes)):
            yield f"{name} must state in_features, out_features and group_size"
        elif (
            stated.get("parallel") not in ("column", "row") or type(stated.get("perm")) is not bool
        ):
            yield f"{name} must state parallel and perm"
        elif bits is not None and not (type(bits) is int and bits in BITS):
            yield f"{name}: bits is {bits!r}"


class Checkpoint:
    """An output directory: its manifest, and the tensors of one rank."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        path = self.directory / "tpgptq.json"
        if not path.is_file():
            raise FormatError(f"{path}: missing; must be the manifest of a converted checkpoint")
        self.manifest: dict[str, Any] = _json_object(path)
        version = self.manifest.get("format_version")
        if self.manifest.get("format") != "tpgptq" or version not in FORMAT_VERSIONS:
            raise FormatError(
                f"{path}: format_version is {version}; this module reads "
                f"{' and '.join(map(str, FORMAT_VERSIONS))}"
            )
        if self.manifest.get("layout") == "gptq":
            raise FormatError(
                f"{path}: layout is 'gptq', an ordinary GPTQ checkpoint; this module reads "
                "'ranks' and 'merged'"
            )
        for problem in _malformed(self.manifest):
            raise FormatError(f"{path}: {problem}; the manifest is damaged, convert again")
        self.tp: int = self.manifest["tp"]
        self.modules: Mapping[str, Any] = self.manifest["modules"]

    def bits(self, name: str) -> int | None:
        """The bits of a module's weights; None if it isn't quantised."""
        bits: int | None = self.modules[name].get("bits", self.manifest["bits"])
        return bits

    def shared(self) -> dict[str, Tensor]:
        """The tensors that no rank owns alone, by their source names."""
        files = self.manifest["files"]
        merged = self.manifest["layout"] == "merged"
        tensors = self._tensors(files["merged" if merged else "shared"])
        return {name: tensor for name, tensor in tensors.items() if not self._is_shard(name)}

    def _is_shard(self, name: str) -> bool:
        module, _, part = name.rpartition(".")
        row_bias = part == "bias" and self.modules.get(module, {}).get("parallel") == "row"
        return module in self.modules and not row_bias

    def rank(self, rank: int) -> dict[str, dict[str, Tensor]]:
        """One rank's shards: module name -> {"qweight": ..., "scales": ..., ...}."""
        if not 0 <= rank < self.tp:
            raise FormatError(
                f"rank {rank}: {self.directory} was written for tp {self.tp}, ranks 0 to "
                f"{self.tp - 1}; convert again with --tp for another degree"
            )
        files = self.manifest["files"]
        merged = self.manifest["layout"] == "merged"
        tensors = self._tensors(files["merged"] if merged else files["ranks"][rank])
        shards: dict[str, dict[str, Tensor]] = {name: {} for name in self.modules}
        for name, tensor in tensors.items():
            module, _, part = name.rpartition(".")
            if self._is_shard(name):
                shards[module][part] = tensor
        for name, parts in shards.items():
            if lacking := self._shapes(name).keys() - parts.keys():
                raise FormatError(f"{name}: rank {rank} lacks {', '.join(sorted(lacking))}")
            if merged:
                shards[name] = self._slice(name, parts, rank)
            self._check(name, shards[name], rank)
        return shards

    def _shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Of the tensors that a rank must have of a module, by the last part of their names."""
        module, bits = self.modules[name], self.bits(name)
        k, n = module["in_features"], module["out_features"]
        groups = k // module["group_size"]
        shapes: dict[str, tuple[int, ...]] = {"perm": (k,)} if module["perm"] else {}
        if bits is None:
            return shapes | {"weight": (n, k)}
        return shapes | {
            "qweight": (k * bits // 32, n),
            "qzeros": (groups, n * bits // 32),
            "scales": (groups, n),
        }

    def _check(self, name: str, parts: Mapping[str, Tensor], rank: int) -> None:
        """Raise FormatError where a rank's tensors aren't those that the manifest speaks of."""
        shapes = self._shapes(name) | {"bias": (self.modules[name]["out_features"],)}
        for part, tensor in parts.items():
            floats = part in ("weight", "scales", "bias")
            right = tensor.is_floating_point() if floats else tensor.dtype == torch.int32
            if not right or tensor.shape != shapes.get(part):
                raise FormatError(
                    f"{name}: rank {rank}: {part} is {tensor.dtype} {list(tensor.shape)}; must be "
                    f"{'floats' if floats else 'torch.int32'} {list(shapes.get(part, ()))}"
                )

    def _slice(self, name: str, parts: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
        """One rank's slice of a merged module."""
        module = self.modules[name]
        column = module["parallel"] == "column"
        part, axis = ("weight", 0) if self.bits(name) is None else ("scales", -1)
        whole = all(tensor.dim() for tensor in parts.values())
        columns = parts[part].shape[axis] if whole else 0
        pieces = columns // module["out_features"] if column else self.tp
        if not whole or not pieces or self.tp % pieces:  # kv heads may be in it once for several
            raise FormatError(f"{name}: its tensors can't be cut for {self.tp} ranks")
        piece = rank * pieces // self.tp

        def cut(part: str, tensor: Tensor) -> Tensor:
            if column and part == "perm":
                return tensor
            last = column != (part == "weight")  # (N, K), all others end with N
            chunks = tensor.chunk(pieces, -1 if last else 0)
            return chunks[min(piece, len(chunks) - 1)]  # of fewer, none is of a right shape

        return {part: cut(part, tensor) for part, tensor in parts.items()}

    def _tensors(self, names: Mapping[str, Any]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name in names:
            path = self.directory / name
            if not os.path.isfile(path):  # noqa: PTH113  # a name can be too long for pathlib's
                raise FormatError(f"{path}: missing; the manifest lists it")
            tensors |= _map_file(path)
        return tensors


def _unpack(words: Tensor, bits: int, dim: int) -> Tensor:
    """Packed int32 words -> values, lowest bits first, each after the one before it along `dim`."""
    if 32 % bits:  # some values begin in one word and end in the next
        single = _unpack(words, 1, dim).unflatten(dim, (-1, bits))
        parts = [part << j for j, part in enumerate(single.unbind(dim + 1))]
        return torch.stack(parts).sum(0, dtype=torch.int8)
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    shape = [1] * (words.dim() + 1)
    shape[dim + 1] = len(shifts)
    values = (words.unsqueeze(dim + 1) >> shifts.view(shape)) & ((1 << bits) - 1)
    return values.to(torch.int16 if bits == 8 else torch.int8).flatten(dim, dim + 1)


def _zero_points(qzeros: Tensor, bits: int, checkpoint_format: str) -> Tensor:
    """Packed zero points (G, N*bits/32) -> (G, N): "gptq" stores one less, "gptq_v2" the value."""
    return _unpack(qzeros, bits, 1) + (1 if checkpoint_format == "gptq" else 0)


if triton is not None:
    # The layout the kernels read (`Arranged.packed`): int16 words of S = 16 // BITS integers, in
    # blocks of 64 columns times S * STORED rows, (N/64, K/(S*STORED), 64, STORED). Integer j of the
    # word in row r of block t is row (t * S + j) * STORED + r of the layer, so that one integer of
    # each word makes a slice of STORED consecutive rows.

    @triton.jit
    def _integers(words, dtype: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
        """int16 words -> one tensor q - 2**(BITS - 1) in dtype, exact, for each integer q in them.

        With ASM two words are unpacked at a time: a float whose last bits are set to q is a power
        of two plus q (or 16 q), and one exact subtraction takes the power away.
        """
        if ASM and BITS == 4 and dtype == tl.float16:
            return tl.inline_asm_elementwise(
                """{
                .reg .b32 high, minus, sixteenth, minus72;
                mov.b32 minus, 0x64086408;
                mov.b32 sixteenth, 0x2c002c00;
                mov.b32 minus72, 0xd480d480;
                lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
                lop3.b32 $1, $4, 0x00f000f0, 0x64006400, 0xea;
                shr.u32 high, $4, 8;
                lop3.b32 $2, high, 0x000f000f, 0x64006400, 0xea;
                lop3.b32 $3, high, 0x00f000f0, 0x64006400, 0xea;
                sub.f16x2 $0, $0, minus;
                fma.rn.f16x2 $1, $1, sixteenth, minus72;
                sub.f16x2 $2, $2, minus;
                fma.rn.f16x2 $3, $3, sixteenth, minus72;
                }""",
                "=r,=r,=r,=r,r",
                [words],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        elif ASM and BITS == 4 and dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                """{
                .reg .b32 next, one, minus136;
                mov.b32 one, 0x3f803f80;
                mov.b32 minus136, 0xc308c308;
                lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
                shr.u32 next, $4, 4;
                lop3.b32 $1, next, 0x000f000f, 0x43004300, 0xea;
                shr.u32 next, $4, 8;
                lop3.b32 $2, next, 0x000f000f, 0x43004300, 0xea;
                shr.u32 next, $4, 12;
                lop3.b32 $3, next, 0x000f000f, 0x43004300, 0xea;
                fma.rn.bf16x2 $0, $0, one, minus136;
                fma.rn.bf16x2 $1, $1, one, minus136;
                fma.rn.bf16x2 $2, $2, one, minus136;
                fma.rn.bf16x2 $3, $3, one, minus136;
                }""",
                "=r,=r,=r,=r,r",
                [words],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=2,
            )
        elif ASM and BITS == 8 and dtype == tl.float16:
            return tl.inline_asm_elementwise(
                """{
                .reg .b32 high, minus;
                mov.b32 minus, 0x64806480;
                shr.u32 high, $2, 8;
                lop3.b32 $0, $2, 0x00ff00ff, 0x64006400, 0xea;
                lop3.b32 $1, high, 0x00ff00ff, 0x64006400, 0xea;
                sub.f16x2 $0, $0, minus;
                sub.f16x2 $1, $1, minus;
                }""",
                "=r,=r,r",
                [words],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        else:
            middle: tl.constexpr = 1 << (BITS - 1)
            values = (((words & (2 * middle - 1)) - middle).to(dtype),)
            for j in tl.static_range(1, 16 // BITS):
                values = values + ((((words >> (BITS * j)) & (2 * middle - 1)) - middle).to(dtype),)
            return values

    @triton.jit
    def _start_early(table, nbytes):
        """On Hopper: let the next kernel in, fetch what no kernel wrote, wait for the last one."""
        tl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .b32 thread;
            griddepcontrol.launch_dependents;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first cp.async.bulk.prefetch.L2.global [$1], $2;
            griddepcontrol.wait;
            mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [table.to(tl.int64, bitcast=True), nbytes],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def _row(t, j, S: tl.constexpr, STORED: tl.constexpr, ROWS: tl.constexpr):
        """First row of slice j of tile t; a tile has S slices of ROWS rows."""
        return (t // (STORED // ROWS) * S + j) * STORED + t % (STORED // ROWS) * ROWS

    @triton.jit
    def _first_line(t, TILE: tl.constexpr, GS: tl.constexpr):
        """Of stored tile t, in a table of groups."""
        if GS >= TILE:
            return t // (GS // TILE)
        else:
            return t * (TILE // GS)

    @triton.jit
    def _lines(table, t, n, N, TILE: tl.constexpr, GS: tl.constexpr, WIDTH: tl.constexpr):
        """Columns n of stored tile t's lines of a table, WIDTH of them in a word (BLOCK_N,)."""
        words = table
        if WIDTH > 1:
            words = table.to(tl.pointer_type(tl.int64 if WIDTH == 4 else tl.int32))
        words += _first_line(t, TILE, GS) // WIDTH * N + n
        lines = (tl.load(words),)
        for i in tl.static_range(1, TILE // GS // WIDTH):
            lines = lines + (tl.load(words + i * N),)
        return lines

    @triton.jit
    def _line(lines, i, dtype: tl.constexpr, WIDTH: tl.constexpr):
        """The i-th of them (BLOCK_N, 1)."""
        word = lines[i // WIDTH][:, None]
        if WIDTH > 1:
            word = (word >> (i % WIDTH * 16)).to(tl.int16).to(dtype, bitcast=True)
        return word

    @triton.jit
    def _spread(
        lines, row: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr, GS: tl.constexpr,
        WIDTH: tl.constexpr,
    ):  # fmt: skip
        """What a tile's weights (BLOCK_N, ROWS) from `row` on are multiplied with, or less by."""
        FIRST: tl.constexpr = row // GS
        if GS >= ROWS:
            return _line(lines, FIRST, dtype, WIDTH)
        else:
            later = tl.arange(0, ROWS)[None, :] // GS
            if WIDTH > 1:  # ROWS // GS of them lie in one word
                word = lines[FIRST // WIDTH][:, None]
                word = word >> ((FIRST % WIDTH + later) * 16).to(word.dtype)
                return word.to(tl.int16).to(dtype, bitcast=True)
            else:
                line = lines[FIRST][:, None]
                for i in tl.static_range(1, ROWS // GS):
                    line = tl.where(later >= i, lines[FIRST + i][:, None], line)
                return line

    @triton.jit
    def _weights(
        words, scales, zeros, row: tl.constexpr, dtype: tl.constexpr, BITS: tl.constexpr,
        ROWS: tl.constexpr, STORED: tl.constexpr, GS: tl.constexpr, LINE: tl.constexpr,
        WIDTH: tl.constexpr, SYM: tl.constexpr, FOLD: tl.constexpr, ASM: tl.constexpr,
    ):  # fmt: skip
        """The weights (BLOCK_N, ROWS) from `row` of each slice on: integers less zeros, and with
        FOLD times scales."""
        values = _integers(words, dtype, BITS, ASM)
        if SYM and not FOLD:
            return values
        else:
            weights = ()
            for j in tl.static_range(16 // BITS):
                value = values[j]
                if not SYM:
                    zero = _spread(zeros, j * STORED + row, LINE, ROWS, GS, WIDTH)
                    value = value - zero.to(dtype)
                if FOLD:
                    scale = _spread(scales, j * STORED + row, LINE, ROWS, GS, WIDTH)
                    value = value * scale.to(dtype)
                weights = weights + (value,)
            return weights

    @triton.jit
    def _one_token(
        x, perm, packed, scales, zeros, N, K, tiles, n, lo, hi,
        HAS_PERM: tl.constexpr, BITS: tl.constexpr, GS: tl.constexpr, SYM: tl.constexpr,
        STORED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
        ASM: tl.constexpr,
    ):  # fmt: skip
        """Tiles lo to hi of one token's products with columns n: (BLOCK_N, 1).

        The S slices of x, or the parts of them that lie in a group each, are columns of one
        operand, gathered while the tile before is worked on. Of the products of each slice of
        weights with all columns its own are kept.
        """
        S: tl.constexpr = 16 // BITS
        TILE: tl.constexpr = S * STORED
        PARTS: tl.constexpr = 1 if GS >= STORED else STORED // GS
        r = tl.arange(0, STORED)
        c = tl.arange(0, S * PARTS)
        words = (
            packed + ((n // 64) * tiles * (64 * STORED) + (n % 64) * STORED)[:, None] + r[None, :]
        )
        rows = (c // PARTS)[None, :] * STORED + r[:, None]
        own = (c % PARTS)[None, :] == (r // (STORED // PARTS))[:, None]
        line = c if PARTS > 1 else c * STORED // GS
        at = (line // WIDTH * N)[None, :] * WIDTH + n[:, None] * WIDTH + (line % WIDTH)[None, :]
        last = hi - 1
        operand = _operand(x, _places(perm, lo * TILE + rows, own, HAS_PERM), K)
        k = _places(perm, tl.minimum(lo + 1, last) * TILE + rows, own, HAS_PERM)
        scale = tl.load(scales + _first_line(lo, TILE, GS) * N + at)
        zero = scale
        if not SYM:
            zero = tl.load(zeros + _first_line(lo, TILE, GS) * N + at)
        total = tl.zeros([BLOCK_N, S * PARTS], tl.float32)
        for t in tl.range(lo, hi, num_stages=STAGES):
            block = tl.load(words + t * (64 * STORED))
            next_operand = _operand(x, k, K)
            following = tl.minimum(t + 1, last)
            next_scale = tl.load(scales + _first_line(following, TILE, GS) * N + at)
            next_zero = next_scale
            if not SYM:
                next_zero = tl.load(zeros + _first_line(following, TILE, GS) * N + at)
            k = _places(perm, tl.minimum(t + 2, last) * TILE + rows, own, HAS_PERM)
            values = _integers(block, x.dtype.element_ty, BITS, ASM)
            product = tl.dot(values[0], operand)
            for j in tl.static_range(1, S):
                product = tl.where((c // PARTS)[None, :] == j, tl.dot(values[j], operand), product)
            if not SYM:
                product -= zero.to(tl.float32) * tl.sum(operand.to(tl.float32), 0)[None, :]
            total += product * scale.to(tl.float32)
            operand = next_operand
            scale = next_scale
            zero = next_zero
        return tl.sum(total, 1)[:, None]

    @triton.jit
    def _places(perm, k, own, HAS_PERM: tl.constexpr):
        """Which elements of the token feed rows k, -1 where a row isn't the column's own."""
        if HAS_PERM:
            return tl.load(perm + k, mask=own, other=-1)
        else:
            return tl.where(own, k, -1)

    @triton.jit
    def _operand(x, k, K):
        return tl.load(x + k, mask=(k >= 0) & (k < K), other=0.0)

    @triton.jit
    def _tokens(
        x, packed, scales, zeros, M, N, K, tiles, stride, m, n, lo, hi,
        BITS: tl.constexpr, GS: tl.constexpr, SYM: tl.constexpr, EVEN: tl.constexpr,
        STORED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr, FOLD: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
    ):  # fmt: skip
        """Tiles lo to hi of the products of tokens m with columns n: (BLOCK_N, BLOCK_M).

        PIECE rows of a slice at a time, which lie in one group, but for groups of 8.
        """
        S: tl.constexpr = 16 // BITS
        TILE: tl.constexpr = S * STORED
        LINE: tl.constexpr = scales.dtype.element_ty
        SHARES: tl.constexpr = STORED // ROWS  # of a stored tile
        PIECE: tl.constexpr = ROWS if GS >= ROWS else 16
        r = tl.arange(0, PIECE)
        words = (
            packed
            + ((n // 64) * (tiles // SHARES) * (64 * STORED) + (n % 64) * STORED)[:, None]
            + r[None, :]
        )
        tokens = x + m.to(tl.int64)[None, :] * stride + r[:, None]
        there = (m < M)[None, :]
        last = hi - 1
        scale = _lines(scales, lo // SHARES, n, N, TILE, GS, WIDTH)
        zero = scale
        if not SYM:
            zero = _lines(zeros, lo // SHARES, n, N, TILE, GS, WIDTH)
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for t in tl.range(lo, hi, num_stages=STAGES):
            stored = words + t // SHARES * (64 * STORED) + t % SHARES * ROWS
            following = tl.minimum(t + 1, last) // SHARES
            next_scale = _lines(scales, following, n, N, TILE, GS, WIDTH)
            next_zero = next_scale
            if not SYM:
                next_zero = _lines(zeros, following, n, N, TILE, GS, WIDTH)
            for at in tl.static_range(0, ROWS, PIECE):
                weights = _weights(
                    tl.load(stored + at), scale, zero, at, x.dtype.element_ty, BITS, PIECE,
                    STORED, GS, LINE, WIDTH, SYM, FOLD, ASM,
                )  # fmt: skip
                part = total
                for j in tl.static_range(S):
                    row = _row(t, j, S, STORED, ROWS) + at
                    if EVEN:
                        operand = tl.load(tokens + row, mask=there, other=0.0)
                    else:
                        inside = there & (row + r < K)[:, None]
                        operand = tl.load(tokens + row, mask=inside, other=0.0)
                    if FOLD:
                        total = tl.dot(weights[j], operand, total)
                    else:
                        if PIECE < ROWS or j == 0 or j * STORED % GS == 0:
                            part = tl.dot(weights[j], operand)
                        else:
                            part = tl.dot(weights[j], operand, part)
                        if PIECE < ROWS or j == S - 1 or (j + 1) * STORED % GS == 0:
                            line = _line(scale, (j * STORED + at) // GS, LINE, WIDTH)
                            total += part * line.to(tl.float32)
            scale = next_scale
            zero = next_zero
        return total

    @triton.jit(do_not_specialize=["M"])
    def _product(
        M, x, perm, packed, scales, zeros, bias, out, partial, counters,
        N, K, columns, tiles, stride, splits,
        HAS_PERM: tl.constexpr, HAS_BIAS: tl.constexpr, BITS: tl.constexpr, GS: tl.constexpr,
        SYM: tl.constexpr, EVEN: tl.constexpr, STORED: tl.constexpr, WIDTH: tl.constexpr,
        ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FOLD: tl.constexpr,
        STAGES: tl.constexpr, ASM: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        """out (M, columns) = x (M, K) @ W, one block of it over one of `splits` parts of K's tiles.

        The last program to finish a block adds up what all have left in `partial`, in order.
        """
        part = tl.program_id(2)
        lo = tiles * part // splits
        hi = tiles * (part + 1) // splits
        if EARLY:
            bytes_of_tile: tl.constexpr = 16 // BITS * ROWS * 4
            _start_early(perm + lo * (bytes_of_tile // 4), (hi - lo) * bytes_of_tile)
        m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        if BLOCK_M == 1:
            total = _one_token(
                x, perm, packed, scales, zeros, N, K, tiles, n, lo, hi,
                HAS_PERM, BITS, GS, SYM, STORED, WIDTH, BLOCK_N, STAGES, ASM,
            )  # fmt: skip
        else:
            total = _tokens(
                x, packed, scales, zeros, M, N, K, tiles, stride, m, n, lo, hi,
                BITS, GS, SYM, EVEN, STORED, WIDTH, ROWS, BLOCK_M, BLOCK_N, FOLD, STAGES, ASM,
            )  # fmt: skip
        done = True
        if splits > 1:
            block = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
            own = (
                partial
                + block * splits * (BLOCK_N * BLOCK_M)
                + tl.arange(0, BLOCK_N)[:, None] * BLOCK_M
                + tl.arange(0, BLOCK_M)[None, :]
            )
            tl.store(own + part * (BLOCK_N * BLOCK_M), total)
            tl.debug_barrier()
            done = tl.atomic_add(counters + block, 1, sem="acq_rel") == splits - 1
            if done:
                tl.debug_barrier()
                total = tl.load(own, cache_modifier=".cg")
                for q in range(1, splits):
                    total += tl.load(own + q * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
                tl.store(counters + block, 0)
        if done:
            if HAS_BIAS:
                total += tl.load(bias + n).to(tl.float32)[:, None]
            at = out + m.to(tl.int64)[None, :] * columns + n[:, None]
            tl.store(
                at, total.to(out.dtype.element_ty), mask=(m < M)[None, :] & (n < columns)[:, None]
            )

    @triton.jit
    def _expand(
        packed, scales, zeros, out, N, tiles, BITS: tl.constexpr, GS: tl.constexpr,
        SYM: tl.constexpr, STORED: tl.constexpr, WIDTH: tl.constexpr, ASM: tl.constexpr,
    ):  # fmt: skip
        """Tile by tile the weights of 64 columns each, into out (N, K')."""
        S: tl.constexpr = 16 // BITS
        t = tl.program_id(0)
        n = tl.arange(0, 64)
        r = tl.arange(0, STORED)
        block = (tl.program_id(1) * tiles + t).to(tl.int64) * (64 * STORED)
        words = tl.load(packed + block + n[:, None] * STORED + r[None, :])
        n += tl.program_id(1) * 64
        scale = _lines(scales, t, n, N, S * STORED, GS, WIDTH)
        zero = scale
        if not SYM:
            zero = _lines(zeros, t, n, N, S * STORED, GS, WIDTH)
        weights = _weights(
            words, scale, zero, 0, out.dtype.element_ty, BITS, STORED, STORED, GS,
            scales.dtype.element_ty, WIDTH, SYM, True, ASM,
        )  # fmt: skip
        for j in tl.static_range(S):
            k = (t * S + j) * STORED + r
            tl.store(out + n.to(tl.int64)[:, None] * (tiles * S * STORED) + k[None, :], weights[j])

    @triton.jit(do_not_specialize=["M"])
    def _gather(
        M, x, perm, out, K, columns, stride,
        BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        """out[m, j] = x[m, perm[j]], 0 where perm[j] is -1; two rows of 16 bits at a time."""
        if EARLY:
            _start_early(perm, columns // 4 * 16)
        m = tl.program_id(0) * 2
        k = tl.arange(0, BLOCK_K)
        j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        second = tl.where(m + 1 < M, 1, 0)
        source = x + m.to(tl.int64) * stride + k
        low = tl.load(source, mask=k < K, other=0).to(tl.int32)
        high = tl.load(source + stride, mask=k < K * second, other=0).to(tl.int32)
        index = tl.load(perm + j, mask=j < columns, other=-1)
        pair = tl.gather((low & 0xFFFF) | (high << 16), tl.maximum(index, 0), 0)
        pair = tl.where(index < 0, 0, pair)
        target = out + m.to(tl.int64) * columns + j
        tl.store(target, pair.to(tl.int16), mask=j < columns)
        tl.store(target + columns, (pair >> 16).to(tl.int16), mask=j < columns * second)


if gluon is not None:

    @gluon.constexpr_function
    def _slice_asm(j, bits16, sym):
        """Integers j of pairs of words ($1) of 4 bits, less zeros ($3), times scales ($2)."""
        if bits16 == "fp16":  # as in `_integers`
            shift = 8 * (j // 2)
            number, minus = (
                ("0x000f000f", "0x64086408") if j % 2 == 0 else ("0x00f000f0", "0xd480d480")
            )
            exact = "sub.f16x2 v, v, minus;" if j % 2 == 0 else "fma.rn.f16x2 v, v, part, minus;"
            part, power, kind = "0x2c002c00", "0x64006400", "f16x2"
        else:
            shift, number, minus = 4 * j, "0x000f000f", "0xc308c308"
            exact = "fma.rn.bf16x2 v, v, part, minus;"
            part, power, kind = "0x3f803f80", "0x43004300", "bf16x2"
        return f"""{{
            .reg .b32 v, minus, part;
            mov.b32 minus, {minus};
            mov.b32 part, {part};
            shr.u32 v, $1, {shift};
            lop3.b32 v, v, {number}, {power}, 0xea;
            {exact}
            {"" if sym else f"sub.{kind} v, v, $3;"}
            mul.{kind} $0, v, $2;
            }}"""

    @gluon.jit
    def _fetch_words(
        words, ws, wbars, block, tiles, t, count, wanted,
        STORED: gl.constexpr, BLOCK_N: gl.constexpr,
    ):  # fmt: skip
        """Start to load tile t of the blocks of 64 columns from `block` on, the count-th tile."""
        bar = wbars.index(count % 2)
        mbarrier.expect(bar, BLOCK_N * STORED * 2, pred=wanted)
        for i in gl.static_range(BLOCK_N // 64):
            into = ws.index(count % 2).slice(i * 64, 64)
            _load(words, [((block + i) * tiles + t) * 64, 0], bar, into, pred=wanted)

    @gluon.jit
    def _fetch_tokens(
        tokens, xs, xbars, m, t, last, count, i: gl.constexpr, RINGS: gl.constexpr,
        STORED: gl.constexpr, BLOCK_M: gl.constexpr,
    ):  # fmt: skip
        """Start to load slice i, counted from tile t, the count-th, on; none of tile `last`."""
        wanted = t + i // 4 < last
        buffer = (count + i // 4) % RINGS * 4 + i % 4
        bar = xbars.index(buffer)
        mbarrier.expect(bar, BLOCK_M * STORED * 2, pred=wanted)
        row = ((t + i // 4) * 4 + i % 4) * STORED
        _load(tokens, [m, row], bar, xs.index(buffer), pred=wanted)

    @gluon.jit
    def _group_lines(table, t, n, N, STORED: gl.constexpr, GS: gl.constexpr, WIDTH: gl.constexpr):
        """As `_lines`."""
        TILE: gl.constexpr = 4 * STORED
        words = table
        if WIDTH > 1:
            words = table.to(gl.pointer_type(gl.int64 if WIDTH == 4 else gl.int32))
        words += (t * TILE // GS if GS < TILE else t // (GS // TILE)) // WIDTH * N + n
        lines = (gl.load(words),)
        for i in gl.static_range(1, TILE // GS // WIDTH):
            lines = lines + (gl.load(words + i * N),)
        return lines

    @gluon.jit
    def _group_spread(
        lines, j: gl.constexpr, rows, dtype: gl.constexpr, STORED: gl.constexpr,
        GS: gl.constexpr, WIDTH: gl.constexpr,
    ):  # fmt: skip
        """As `_spread`, of 16 bits."""
        FIRST: gl.constexpr = j * STORED // GS
        word = lines[FIRST // WIDTH][:, None]
        if WIDTH == 1:
            return word
        else:
            place = FIRST % WIDTH
            if GS < STORED:
                place += rows[None, :] // GS
                word = word >> (place * 16).to(word.dtype)
            else:
                word = word >> (place * 16)
            return word.to(gl.int16).to(dtype, bitcast=True)

    @gluon.jit(do_not_specialize=["M"])
    def _product_on_hopper(
        M, tokens, words, scales, zeros, bias, out, partial, flags, N, columns, tiles,
        HAS_BIAS: gl.constexpr, GS: gl.constexpr, SYM: gl.constexpr, STORED: gl.constexpr,
        WIDTH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, RINGS: gl.constexpr,
        WARPS: gl.constexpr,
    ):  # fmt: skip
        """out (M, columns) = tokens (M, K) @ W of 4 bits, for many tokens.

        The blocks' tiles, one block's after another's, are shared out evenly among the programs
        (stream-K), each of which goes through its own from the last to the first: what it has of
        a block whose end is another's it leaves in `partial` first of all, for that one to add.
        The copy engine loads, RINGS * 4 slices of tokens ahead; each slice of weights is unpacked
        into registers while the tensor cores work on the one before.
        """
        AHEAD: gl.constexpr = RINGS * 4 - 1
        dtype: gl.constexpr = tokens.dtype
        line: gl.constexpr = scales.dtype.element_ty
        mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
        operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
        rows: gl.constexpr = gl.BlockedLayout([8, 1], [16, 2], [1, WARPS], [0, 1])
        staging: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2, transposed=True)
        xs = gl.allocate_shared_memory(dtype, [RINGS * 4, BLOCK_M, STORED], tokens.layout)
        ws = gl.allocate_shared_memory(gl.int16, [2, BLOCK_N, STORED], words.layout)
        staged = gl.allocate_shared_memory(out.dtype.element_ty, [BLOCK_N, BLOCK_M], staging)
        xbars = gl.allocate_shared_memory(gl.int64, [RINGS * 4, 1], mbarrier.MBarrierLayout())
        wbars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(RINGS * 4):
            mbarrier.init(xbars.index(i), count=1)
        for i in gl.static_range(2):
            mbarrier.init(wbars.index(i), count=1)
        operand_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, operand))
        operand_k = gl.arange(0, STORED, layout=gl.SliceLayout(0, operand))
        mma_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, mma))
        mma_m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, mma))
        out_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, rows))
        out_m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, rows))
        own = mma_n[:, None] * BLOCK_M + mma_m[None, :]  # places in a program's part of `partial`

        blocks_m = gl.cdiv(M, BLOCK_M)
        programs = gl.num_programs(0)
        program = gl.program_id(0)
        units = blocks_m * (N // BLOCK_N) * tiles
        low = (units.to(gl.int64) * program // programs).to(gl.int32)
        high = (units.to(gl.int64) * (program + 1) // programs).to(gl.int32)
        block = (high - 1) // tiles
        first = gl.maximum(low - block * tiles, 0)
        last = high - block * tiles
        m = block % blocks_m * BLOCK_M
        n = block // blocks_m * BLOCK_N
        count = 0  # tiles that were worked on
        _fetch_words(words, ws, wbars, n // 64, tiles, first, count, True, STORED, BLOCK_N)
        for i in gl.static_range(AHEAD):
            _fetch_tokens(tokens, xs, xbars, m, first, last, count, i, RINGS, STORED, BLOCK_M)
        while high > low:
            scale = _group_lines(scales, first, n + operand_n, N, STORED, GS, WIDTH)
            zero = scale
            if not SYM:
                zero = _group_lines(zeros, first, n + operand_n, N, STORED, GS, WIDTH)
            total = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, mma)
            weights = gl.zeros([BLOCK_N, STORED], dtype, operand)
            for t in range(first, last):
                following = gl.minimum(t + 1, last - 1)
                next_scale = _group_lines(scales, following, n + operand_n, N, STORED, GS, WIDTH)
                next_zero = next_scale
                if not SYM:
                    next_zero = _group_lines(zeros, following, n + operand_n, N, STORED, GS, WIDTH)
                mbarrier.wait(wbars.index(count % 2), count // 2 & 1)
                packed = ws.index(count % 2).load(operand)
                for j in gl.static_range(4):
                    times = _group_spread(scale, j, operand_k, line, STORED, GS, WIDTH).to(dtype)
                    less = _group_spread(zero, j, operand_k, line, STORED, GS, WIDTH).to(dtype)
                    more = gl.inline_asm_elementwise(
                        _slice_asm(j, "fp16" if dtype == gl.float16 else "bf16", SYM),
                        "=r,r,r,r",
                        [packed, times, less],
                        dtype=tokens.dtype,
                        is_pure=True,
                        pack=2,
                    )
                    mbarrier.wait(xbars.index(count % RINGS * 4 + j), count // RINGS & 1)
                    x = xs.index(count % RINGS * 4 + j).permute((1, 0))
                    total = warpgroup_mma(more, x, total, is_async=True)
                    total, weights = warpgroup_mma_wait(1, deps=(total, weights))
                    weights = more
                    _sync()  # no warp needs the slice before, nor the tile before, any more
                    _fetch_tokens(
                        tokens, xs, xbars, m, t, last, count, AHEAD + j, RINGS, STORED, BLOCK_M
                    )
                    if j == 0:
                        wanted = t + 1 < last
                        _fetch_words(
                            words, ws, wbars, n // 64, tiles, t + 1, count + 1, wanted, STORED,
                            BLOCK_N,
                        )  # fmt: skip
                scale = next_scale
                zero = next_zero
                count += 1
            total, weights = warpgroup_mma_wait(0, deps=(total, weights))
            _sync()
            done_block = block
            done_first = first
            done_last = last
            done_m = m
            done_n = n
            high = block * tiles + first
            if high > low:  # load for the next block while this one is stored
                block = (high - 1) // tiles
                first = gl.maximum(low - block * tiles, 0)
                last = high - block * tiles
                m = block % blocks_m * BLOCK_M
                n = block // blocks_m * BLOCK_N
                _fetch_words(words, ws, wbars, n // 64, tiles, first, count, True, STORED, BLOCK_N)
                for i in gl.static_range(AHEAD):
                    _fetch_tokens(
                        tokens, xs, xbars, m, first, last, count, i, RINGS, STORED, BLOCK_M
                    )
            if done_last < tiles:
                gl.store(partial + program * (BLOCK_N * BLOCK_M) + own, total)
                _sync()
                gl.atomic_xchg(flags + program, 1, sem="release")
            else:
                if done_first > 0:  # from the program that has the block's first tile on
                    end = (done_block * tiles + 1).to(gl.int64) * programs + units - 1
                    other = (end // units).to(gl.int32) - 1
                    while other < program:
                        ready = 0
                        while ready == 0:
                            ready = gl.atomic_cas(flags + other, 1, 0, sem="acquire")
                        _sync()
                        left = partial + other * (BLOCK_N * BLOCK_M) + own
                        total += gl.load(left, cache_modifier=".cg")
                        other += 1
                if HAS_BIAS:
                    total += gl.load(bias + done_n + mma_n).to(gl.float32)[:, None]
                staged.store(total.to(out.dtype.element_ty))
                _sync()
                at = (
                    out + (done_m + out_m).to(gl.int64)[None, :] * columns + done_n + out_n[:, None]
                )
                inside = (done_m + out_m < M)[None, :] & (done_n + out_n < columns)[:, None]
                gl.store(at, staged.load(rows), mask=inside)


class Launch(NamedTuple):
    """How `_product` is launched for some number of tokens; any value gives the same function."""

    BLOCK_M: int
    BLOCK_N: int
    ROWS: int
    FOLD: bool  # scales go into the weights, and not onto the sums of each group
    STAGES: int
    warps: int
    splits: int


class Arranged(NamedTuple):
    """Layers of one input side by side, as the kernels read them: `arrange` makes it.

    packed int16 (N'/64, K'/(S * STORED), 64, STORED), S = 16 // bits; scales (G'/W, N', W), those
    of W groups that follow one another, in the same S * STORED rows, side by side; zeros (G'/W, N',
    W) less 2**(bits - 1), None where all are that; perm int32 (K',), -1 for a row of zeros, None:
    the identity; bias (N',) or None. K' and N' are K and N (out_features) rounded up to whole
    blocks. group_size divides S * STORED or is a multiple of it.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    bias: Tensor | None
    counters: Tensor
    bits: int
    group_size: int
    out_features: int

    @property
    def stored(self) -> int:
        return self.packed.shape[3]

    @property
    def rows(self) -> int:
        """K'."""
        return self.packed.shape[1] * self.stored * (16 // self.bits)

    @property
    def columns(self) -> int:
        """N'."""
        return self.packed.shape[0] * 64

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight (K', N'), computed in `dtype`: the plain form of what the kernels do."""
        values = [
            (self.packed >> self.bits * j) & (2**self.bits - 1) for j in range(16 // self.bits)
        ]
        steps = torch.stack(values, 2).permute(1, 2, 4, 0, 3).reshape(self.rows, self.columns)
        steps = steps - 2 ** (self.bits - 1)
        group = torch.arange(self.rows, device=steps.device) // self.group_size

        def of_rows(table: Tensor) -> Tensor:
            return table.transpose(1, 2).flatten(0, 1)[group]

        if self.zeros is not None:
            steps = steps - of_rows(self.zeros).to(steps.dtype)
        weight: Tensor = steps.to(dtype) * of_rows(self.scales).to(dtype)
        return weight

    def gather(self, x: Tensor) -> Tensor:
        """x (M, K) -> (M, K'), each row's own element of it, 0 for a row of zeros."""
        if self.perm is None:
            return nn.functional.pad(x, (0, self.rows - x.shape[1]))
        return x[:, self.perm.clamp(min=0)].masked_fill(self.perm < 0, 0)

    def reference(self, x: Tensor) -> Tensor:
        """x (M, K) -> (M, out_features), without a kernel."""
        out = self.gather(x) @ self.weight(x.dtype)
        if self.bias is not None:
            out = out + self.bias.to(x.dtype)
        return out[:, : self.out_features]


def arrange(
    layers: Sequence[Mapping[str, Tensor]],
    bits: int = 4,
    checkpoint_format: str = "gptq",
) -> Arranged:
    """Rearrange shards that share an input and its perm, once, for the kernels.

    layers: tensors as in QuantLinear, on the device where they will be used; their columns are put
    side by side. Costs a few passes over the integers, once; the result is at most as large as the
    shards, and holds the same integers and scales, but for rows that only fill up a group.
    """
    first = layers[0]
    perm = first.get("perm")
    rows = first["qweight"].shape[0] * 32 // bits
    groups = first["scales"].shape[0]
    size = rows // groups
    widths = [layer["scales"].shape[1] for layer in layers]
    columns = sum(widths)
    middle = 2 ** (bits - 1)

    def side_by_side(tensors: Sequence[Tensor], fill: float = 0) -> Tensor:
        return nn.functional.pad(torch.cat(list(tensors), -1), (0, -columns % 64), value=fill)

    scales = side_by_side([layer["scales"] for layer in layers])
    points = [_zero_points(layer["qzeros"], bits, checkpoint_format) for layer in layers]
    zeros = side_by_side([point.to(torch.int16) for point in points], middle) - middle
    values = side_by_side([_unpack(layer["qweight"], bits, 0) for layer in layers], middle)
    bias = None
    if any("bias" in layer for layer in layers):
        none = [torch.zeros(width, dtype=scales.dtype, device=scales.device) for width in widths]
        bias = side_by_side(
            [layer.get("bias", zero) for layer, zero in zip(layers, none, strict=True)]
        )

    slices = 16 // bits
    if groups == 1:
        size = 1 << 30
    else:  # groups are cut into pieces, and those that hold padding alone left out
        live = torch.ones(len(values), dtype=torch.bool, device=values.device)
        if perm is not None:
            live = (values.view(groups, size, -1) != (zeros + middle).unsqueeze(1)).any(2).flatten()
            live[0] = True
        piece = _best_piece(live, size, bits)
        kept = live.view(-1, piece).any(1)
        if perm is not None and not kept.all():
            values = values.view(-1, piece, values.shape[1])[kept].flatten(0, 1)
            perm = perm.view(-1, piece)[kept].flatten()
        scales, zeros = (t.repeat_interleave(size // piece, 0)[kept] for t in (scales, zeros))
        groups, size = len(scales), piece
    stored = _stored(size)
    surplus = -len(values) % (slices * stored)
    values = nn.functional.pad(values, (0, 0, 0, surplus), value=middle)
    if perm is not None:
        perm = nn.functional.pad(perm, (0, surplus), value=-1).int().clone()  # aligned
    more = -(-len(values) // size) - groups
    together = max(1, slices * stored // size) if scales.element_size() == 2 else 1
    scales, zeros = (
        nn.functional.pad(table, (0, 0, 0, more))
        .view(-1, min(4, together), values.shape[1])
        .transpose(1, 2)
        for table in (scales, zeros)
    )
    parts = values.to(torch.int16).view(-1, slices, stored, values.shape[1] // 64, 64)
    parts = parts.permute(3, 0, 1, 4, 2)  # columns / 64, blocks, slices, 64, rows of a slice
    packed = parts[:, :, 0].clone(memory_format=torch.contiguous_format)
    for j in range(1, slices):
        packed |= parts[:, :, j] << bits * j
    return Arranged(
        packed=packed,
        scales=scales.contiguous(),
        zeros=zeros.to(scales.dtype).contiguous() if bool((zeros != 0).any()) else None,
        perm=perm,
        bias=bias,
        counters=torch.zeros(_COUNTERS, dtype=torch.int32, device=values.device),
        bits=bits,
        group_size=size,
        out_features=columns,
    )


def _stored(group_size: int) -> int:
    """Rows of a slice, as the kernels read it."""
    return 64 if group_size % 64 == 0 else 32


def _best_piece(live: Tensor, size: int, bits: int) -> int:
    """Into pieces of how many rows groups of `size` rows are best cut.

    live (K,): whether a row has a weight that isn't zero. Pieces without such a row needn't be
    kept. Each of the others has scales of its own to read, which count twice here: with 2 to 32
    tokens pieces of 16 rows take longer for other reasons too.
    """

    def fitting(piece: int) -> int:
        tile = 16 // bits * _stored(piece)
        return piece if piece % tile == 0 else math.gcd(piece, tile)

    def cost(piece: int) -> float:
        return int(live.view(-1, piece).any(1).sum()) * (piece * bits / 8 + 2 * 2)

    cuts = [n for n in (1, 2, 4) if n == 1 or size // n % 16 == 0]
    return min((fitting(size // n) for n in cuts), key=cost)


_COUNTERS = 1024  # blocks that may be shared out among programs
_SOME = 33  # tokens, from which on Hopper's own kernel is the faster
_MANY = 1024  # tokens, from which on it pays to expand the weights for cuBLAS
_MANY_ON_HOPPER = 2048
_SLAB = 1 << 26  # bytes of expanded weights at a time
_GATHER = 16384  # longest row that the gather's kernel holds at a time
_TUNED: dict[str, Launch] = {}
_COMPILED: dict[Any, Any] = {}  # kernels, by all that they are compiled for
_GLUON = (3, 6), (3, 9)  # versions of Triton whose Gluon the kernel was compiled by


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def kernels_run_on(device: torch.device | str) -> bool:
    """Whether the kernels can run there: on a GPU with Triton, or anywhere in its interpreter."""
    return triton is not None and (torch.device(device).type == "cuda" or _interpreting())


def fast_on(device: torch.device | str) -> bool:
    """Whether the kernels are at their best there, for one token and for many: on Hopper GPUs."""
    return kernels_run_on(device) and _abilities(torch.device(device)).hopper


class _Abilities(NamedTuple):
    """What a device, with this Triton, can do."""

    processors: int
    assembly: bool  # NVIDIA's
    early: bool  # a kernel may start before the one before it has ended
    hopper: bool  # runs the kernel for many tokens


@functools.cache
def _abilities(device: torch.device) -> _Abilities:
    if _interpreting():
        return _Abilities(132, assembly=False, early=False, hopper=False)
    properties = torch.cuda.get_device_properties(device)
    nvidia = torch.version.cuda is not None and properties.major >= 8
    known = triton.compiler.compiler.make_backend(triton.runtime.driver.active.get_current_target())
    early = nvidia and properties.major >= 9 and hasattr(known.parse_options({}), "launch_pdl")
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    known_gluon = gluon is not None and _GLUON[0] <= version <= _GLUON[1]
    hopper = nvidia and properties.major == 9 and known_gluon
    return _Abilities(properties.multi_processor_count, nvidia, early, hopper)


def _key(tokens: int, layer: Arranged) -> str:
    tokens = 1 if tokens == 1 else min(1024, max(16, _power_of_two(tokens)))
    sizes = (tokens, layer.rows, layer.columns, layer.group_size, layer.bits)
    return " ".join(map(str, (*sizes, layer.packed.device.type, layer.zeros is None)))


def default_launch(tokens: int, layer: Arranged) -> Launch:
    """A launch that was good for layers of Llama-2-70B on an H200."""
    rows, columns = layer.stored, layer.columns
    processors = _abilities(layer.packed.device).processors
    wide = 128 if columns % 128 == 0 else 64
    few, fewer = columns < 64 * processors, columns < 48 * processors
    if tokens == 1 and layer.perm is None and layer.packed.shape[1] >= 12:
        launch, each = Launch(1, 64, rows, False, 2, 2, 1), 8.0
    elif tokens == 1:
        launch, each = Launch(1, 64, rows, False, 2 if few else 3, 4, 1), 7.0
    elif tokens <= 16 and rows < 64:
        launch, each = Launch(16, wide, rows, True, 3 if layer.group_size >= rows else 2, 4, 1), 4.0
    elif tokens <= 16 and few:
        launch, each = Launch(16, 64, rows, False, 2 if fewer else 3, 4, 1), 5.0
    elif tokens <= 16:
        launch, each = Launch(16, wide, rows, True, 3, 4, 1), 2.0
    elif tokens <= 32 and rows < 64:
        launch, each = Launch(32, 64, rows, False, 3, 4, 1), 4.0
    elif tokens <= 32 and columns > 60 * processors:
        launch, each = Launch(32, wide, rows, False, 3, 4, 1), 2.0
    elif tokens <= 32:
        launch, each = Launch(32, 64, rows, False, 3 if fewer else 2, 4, 1), 2.5 if fewer else 4.0
    elif tokens <= 64:
        launch, each = Launch(64, wide, 32, True, 3, 4, 1), 2.5
    else:
        launch, each = Launch(128, wide, 32, True, 3, 4, 1), 2.0
    programs = int(each * processors)
    if tokens <= 64 and columns // wide * 16 < programs:
        launch = launch._replace(BLOCK_N=64)
    blocks = -(-tokens // launch.BLOCK_M) * (columns // launch.BLOCK_N)
    tiles = layer.rows // (launch.ROWS * 16 // layer.bits)
    splits = 1 if blocks > _COUNTERS else max(1, min(programs // blocks, tiles * 2 // 3, 16))
    return launch._replace(splits=splits)


def launches(tokens: int, layer: Arranged) -> list[Launch]:
    """Launches worth trying, the default first."""
    default = default_launch(tokens, layer)
    widths = [width for width in (64, 128, 256) if layer.columns % width == 0]
    short = min(32, layer.stored)
    found = [default]
    if tokens == 1:
        found += [
            Launch(1, width, layer.stored, False, stages, warps, 1)
            for width in widths[:2]
            for stages in (2, 3)
            for warps in (2, 4, 8)
        ]
    elif tokens <= 64:
        found += [
            Launch(default.BLOCK_M, width, rows, fold, stages, 4, 1)
            for width in widths[:2]
            for rows in sorted({short, layer.stored})
            for fold in (False, True)
            for stages in (3, 4)
        ]
    else:
        found += [
            Launch(height, width, short, fold, stages, warps, 1)
            for height, width, warps in ((64, 128, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8))
            if width in widths
            for fold in (False, True)
            for stages in (3, 4)
        ]
    tiles = layer.rows // (layer.stored * 16 // layer.bits)
    counts = {1, 2, 3, 4, default.splits, default.splits * 3 // 2, default.splits * 2}
    spread = [
        launch._replace(splits=count)
        for launch in found
        for count in sorted(counts)
        if count == 1
        or (
            2 * count <= tiles
            and 2 * -(-tokens // launch.BLOCK_M) * layer.columns // launch.BLOCK_N <= _COUNTERS
        )
    ]
    return list(dict.fromkeys([default, *spread]))


def tune(
    layers: Iterable[Arranged],
    tokens: Sequence[int] = (1, 4, 16, 64, 256),
    dtype: torch.dtype = torch.float16,
    path: str | Path | None = None,
    measure: Callable[[Callable[[], object]], float] | None = None,
) -> None:
    """Time the launches for layers of each shape and number of tokens, and use the fastest.

    Takes seconds for each shape. What is known already is not timed again. path: a file that keeps
    the result, for `tune` in another process; measure: times a call, by default triton's do_bench.
    Raises FormatError where the file holds anything else.
    """
    if path is not None and Path(path).is_file():
        types = list(get_type_hints(Launch).values())
        for key, values in _json_object(Path(path)).items():
            if not isinstance(values, list) or list(map(type, values)) != types:
                raise FormatError(f"{path}: {key}: not a launch; remove the file, and tune again")
            _TUNED[key] = Launch(*values)
    if measure is None:
        measure = functools.partial(triton.testing.do_bench, return_mode="median")
    for layer in layers:
        for count in tokens:
            many = count >= _MANY or _runs_on_hopper(count, layer)
            if many or _key(count, layer) in _TUNED:
                continue
            x = torch.randn(count, layer.rows, dtype=dtype, device=layer.packed.device)
            times = {}
            for launch in launches(count, layer):
                try:
                    times[launch] = measure(lambda: multiply_packed(x, layer, launch))  # noqa: B023
                except triton.runtime.errors.OutOfResources:  # of a smaller GPU
                    continue
            _TUNED[_key(count, layer)] = min(times, key=lambda launch: times[launch])
    if path is not None:
        text = json.dumps({key: list(launch) for key, launch in _TUNED.items()}, indent=1)
        Path(path).write_text(text, encoding="utf-8")


def multiply(x: Tensor, layer: Arranged) -> Tensor:
    """x (..., K) -> (..., out_features), by the fastest way there is for so many tokens.

    Nothing waits for the device, and memory comes from torch's allocator, so that calls can be
    captured in a CUDA graph. One layer's calls must follow each other on one stream. The kernels
    have no gradients.
    """
    if x.is_cuda and x.device.index != torch.cuda.current_device():  # where Triton launches
        with torch.cuda.device(x.device):
            return multiply(x, layer)
    flat = x.reshape(-1, x.shape[-1])
    if x.dtype not in (torch.float16, torch.bfloat16) or not kernels_run_on(x.device):
        out = layer.reference(flat)
    elif _runs_on_hopper(flat.shape[0], layer):
        out = multiply_on_hopper(flat, layer)
    elif flat.shape[0] < _MANY:
        out = multiply_packed(flat, layer)
    else:
        out = multiply_expanded(flat, layer)
    return out.view(*x.shape[:-1], layer.out_features)


def _runs_on_hopper(tokens: int, layer: Arranged) -> bool:
    some = _SOME <= tokens < _MANY_ON_HOPPER
    fits = layer.bits == 4 and layer.scales.element_size() == 2
    return fits and some and _abilities(layer.packed.device).hopper


# What a block of so many tokens costs on Hopper, for each of its tokens.
_BLOCK_COSTS = {64: 1.5, 128: 1.15, 256: 1.0}


def multiply_on_hopper(x: Tensor, layer: Arranged, block_m: int | None = None) -> Tensor:
    """x (M, K) -> (M, out_features) by the kernel for many tokens; block_m: 64, 128 or 256."""
    tokens = len(x)
    out = x.new_empty(tokens, layer.out_features)
    processors = _abilities(x.device).processors
    block_n = 128 if layer.columns % 128 == 0 else 64
    blocks_n = layer.columns // block_n
    if block_m is None:
        block_m = min(_BLOCK_COSTS, key=lambda m: -(-tokens // m) * m * _BLOCK_COSTS[m])
        if block_m == 256 and -(-tokens // 256) * blocks_n < processors // 2:
            block_m = 128
    if layer.perm is not None:
        x = gathered(x, layer.perm)
    elif x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:  # for the copy engine
        x = x.clone(memory_format=torch.contiguous_format)
    blocks, stored = -(-tokens // block_m) * blocks_n, layer.stored
    tiles = layer.rows // (4 * stored)
    each = 2 if block_m == 64 and blocks > processors else 1
    programs = min(blocks * tiles, processors * each)
    warps = 4 if min(block_m, block_n) == 64 else 8
    _launch(
        _product_on_hopper,
        (programs, 1, 1),
        (tokens,),
        _described(x, block_m, stored),
        _described(layer.packed.view(-1, stored), 64, stored),
        layer.scales,
        _or(layer.zeros, x),
        _or(layer.bias, x),
        out,
        x.new_empty(programs * block_m * block_n, dtype=torch.float32),
        layer.counters,
        layer.columns,
        layer.out_features,
        tiles,
        HAS_BIAS=layer.bias is not None,
        GS=layer.group_size,
        SYM=layer.zeros is None,
        STORED=stored,
        WIDTH=layer.scales.shape[2],
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        RINGS=(2 if block_m == 64 else 1) * 64 // stored,
        WARPS=warps,
        num_warps=warps,
    )
    return out


def _described(tensor: Tensor, rows: int, stored: int) -> TensorDescriptor:
    """What the copy engine must know of a tensor to fetch blocks (rows, stored) of it."""
    found = object.__new__(TensorDescriptor)
    sizes = {"base": tensor, "shape": list(tensor.shape), "strides": list(tensor.stride())}
    found.__dict__ |= vars(_description(tensor.dtype, rows, stored)) | sizes
    return found


@functools.cache
def _description(dtype: torch.dtype, rows: int, stored: int) -> TensorDescriptor:
    """The same of any tensor, made once: what Triton checks takes longer than a launch."""
    layout = gl.NVMMASharedLayout(2 * stored, 16, 2)
    return TensorDescriptor.from_tensor(
        torch.empty(rows, stored, dtype=dtype), [rows, stored], layout
    )


def multiply_packed(x: Tensor, layer: Arranged, launch: Launch | None = None) -> Tensor:
    """x (M, K) -> (M, out_features) by one kernel from the packed integers."""
    tokens, width = x.shape
    out = x.new_empty(tokens, layer.out_features)
    if tokens == 0:
        return out
    able = _abilities(x.device)
    launch = launch or (_TUNED and _TUNED.get(_key(tokens, layer))) or default_launch(tokens, layer)
    whole = launch.BLOCK_M == 1 or layer.group_size < layer.stored  # no parts of slices then
    rows = layer.stored if whole else min(launch.ROWS, layer.stored)
    if x.stride(1) != 1:
        x = x.contiguous()
    if launch.BLOCK_M > 1 and layer.perm is not None:
        x, width = gathered(x, layer.perm), layer.rows
    blocks = -(-tokens // launch.BLOCK_M), layer.columns // launch.BLOCK_N
    if blocks[0] * blocks[1] > layer.counters.shape[0]:  # a launch that was tuned for fewer
        launch = launch._replace(splits=1)
    partial, counters = x, x
    if launch.splits > 1:
        size = blocks[0] * blocks[1] * launch.splits * launch.BLOCK_M * launch.BLOCK_N
        partial, counters = x.new_empty(size, dtype=torch.float32), layer.counters
    _launch(
        _product,
        (*blocks, launch.splits),
        (tokens,),
        x,
        layer.packed.view(torch.int32) if layer.perm is None else layer.perm,
        layer.packed,
        layer.scales,
        _or(layer.zeros, x),
        _or(layer.bias, x),
        out,
        partial,
        counters,
        layer.columns,
        width,
        layer.out_features,
        layer.rows // (rows * 16 // layer.bits),
        x.stride(0),
        launch.splits,
        HAS_PERM=layer.perm is not None,
        HAS_BIAS=layer.bias is not None,
        BITS=layer.bits,
        GS=layer.group_size,
        SYM=layer.zeros is None,
        EVEN=width == layer.rows,
        STORED=layer.stored,
        WIDTH=layer.scales.shape[2],
        ROWS=rows,
        BLOCK_M=launch.BLOCK_M,
        BLOCK_N=launch.BLOCK_N,
        FOLD=launch.FOLD or layer.group_size % 16 > 0,
        STAGES=launch.STAGES,
        ASM=able.assembly,
        EARLY=able.early,
        num_warps=launch.warps,
        **({"launch_pdl": True} if able.early else {}),
    )
    return out


def multiply_expanded(x: Tensor, layer: Arranged) -> Tensor:
    """x (M, K) -> (M, out_features): some columns' weights at a time, and a plain product."""
    out = x.new_empty(len(x), layer.columns)
    x = (
        nn.functional.pad(x.detach(), (0, layer.rows - x.shape[1]))
        if layer.perm is None
        else gathered(x, layer.perm)
    )
    step = max(1, _SLAB // (layer.rows * 2 * 64)) * 64
    for at in range(0, layer.columns, step):
        some = slice(at, min(at + step, layer.columns))
        torch.mm(x, _expanded(layer, some, x.dtype).t(), out=out[:, some])
    if layer.bias is not None:
        out += layer.bias.to(x.dtype)
    return out[:, : layer.out_features].contiguous()  # for a sum over ranks


def _expanded(layer: Arranged, columns: slice, dtype: torch.dtype) -> Tensor:
    """Weights (columns, K') in `dtype`; the slice's ends are multiples of 64."""
    packed = layer.packed[columns.start // 64 : columns.stop // 64]
    out = torch.empty(len(packed) * 64, layer.rows, dtype=dtype, device=packed.device)
    _launch(
        _expand,
        (packed.shape[1], packed.shape[0], 1),
        (),
        packed,
        layer.scales[:, columns],
        _or(layer.zeros, layer.scales)[:, columns],
        out,
        layer.columns,
        packed.shape[1],
        BITS=layer.bits,
        GS=layer.group_size,
        SYM=layer.zeros is None,
        STORED=layer.stored,
        WIDTH=layer.scales.shape[2],
        ASM=_abilities(out.device).assembly,
    )
    return out


def _power_of_two(count: int) -> int:
    """The least that isn't smaller; Triton's own takes as long as the rest of a launch."""
    return 1 << (count - 1).bit_length()


def _launch(
    kernel: Any,
    grid: tuple[int, int, int],
    counts: tuple[int, ...],
    *arguments: Any,
    **stated: Any,
) -> None:
    """kernel[grid](*counts, *arguments, **stated), what is compiled looked up in less time than
    Triton takes.

    counts: integers that nothing is compiled for; arguments: tensors, which begin on 16 bytes but
    for the first, blocks for the copy engine, and sizes; stated: all of the kernel's constants, in
    its order, then options of the launch.
    """
    first, names = arguments[0], kernel.arg_names
    key = (
        id(kernel),  # its hash is that of its source, and slow
        torch.cuda.current_device() if torch.cuda.is_initialized() else None,
        isinstance(first, Tensor) and first.data_ptr() % 16,
        *[a if type(a) is int else getattr(a, "dtype", None) for a in arguments],
        *stated.values(),
    )
    values = (*counts, *arguments, *stated.values())
    compiled = _COMPILED.get(key)
    if compiled is not None:
        compiled[grid](*values[: len(names)])
        return
    given = len(counts) + len(arguments)
    assert [*names[:given], *stated][: len(names)] == names
    compiled = kernel[grid](*values[:given], **stated)
    if not _interpreting():
        _COMPILED[key] = compiled


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """What a kernel is handed where there is no tensor; it doesn't look."""
    return other if tensor is None else tensor


def gathered(x: Tensor, perm: Tensor) -> Tensor:
    """x (M, K) of 16 bits -> (M, K'): x[:, perm], 0 where perm is -1; by a kernel."""
    if x.stride(1) != 1:
        x = x.contiguous()
    early = _abilities(x.device).early
    tokens, width = x.shape
    columns = perm.shape[0]
    if width > _GATHER:
        return x[:, perm.clamp(min=0)].masked_fill(perm < 0, 0)
    out = x.new_empty(tokens, columns)
    block = min(_GATHER, _power_of_two(columns))
    _launch(
        _gather,
        (-(-tokens // 2), -(-columns // block), 1),
        (tokens,),
        x.view(torch.int16),
        perm,
        out.view(torch.int16),
        width,
        columns,
        x.stride(0),
        BLOCK_K=_power_of_two(width),
        BLOCK=block,
        EARLY=early,
        num_warps=16,
        **({"launch_pdl": True} if early else {}),
    )
    return out


class QuantLinear(nn.Module):
    """x (..., in) -> x[..., perm] @ W, W (K, N) from packed integers in consecutive groups.

    qweight (K*bits/32, N) int32, qzeros (G, N*bits/32) int32, scales (G, N), perm (K,) int32 or
    None (the identity), bias (N,) or None; the group of row k is k // (K/G). bits None: it isn't
    quantised, and has weight (N, K) instead. This is the plain form, for any device and dtype;
    `use_kernels` trades it for the fast one.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], bits: int | None = 4, checkpoint_format: str = "gptq"
    ) -> None:
        super().__init__()
        self.bits, self.checkpoint_format = bits, checkpoint_format
        stored = ("weight",) if bits is None else ("qweight", "qzeros", "scales")
        for name in (*stored, "perm", "bias"):
            self.register_buffer(name, tensors.get(name))
        if bits is None:
            self.out_features, self.in_features = self.weight.shape
            self.group_size = self.in_features
        else:
            self.in_features = self.qweight.shape[0] * 32 // bits
            self.out_features = self.qweight.shape[1]
            self.group_size = self.in_features // self.scales.shape[0]
        self.kernel: _Kernel | None = None
        self.index = 0  # of this layer among those that share the kernel

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    weight: Tensor
    perm: Tensor | None
    bias: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """The shard's tensors by their names in the files."""
        return dict(self.named_buffers(recurse=False))

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The weight (K, N), computed in `dtype`."""
        if self.bits is None:
            return self.weight.T.to(dtype)
        values = _unpack(self.qweight, self.bits, 0).unflatten(0, (-1, self.group_size))
        zeros = _zero_points(self.qzeros, self.bits, self.checkpoint_format)
        steps = (values - zeros.unsqueeze(1)).to(dtype)
        weight: Tensor = (steps * self.scales.to(dtype).unsqueeze(1)).flatten(0, 1)
        return weight

    def product(self, x: Tensor) -> Tensor:
        """What this rank alone makes of x."""
        if self.kernel is not None:
            return self.kernel.product(x, self.index)
        if self.perm is not None:
            x = x[..., self.perm]
        out: Tensor = x @ self.dequantise(x.dtype)
        return out if self.bias is None else out + self.bias.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, kernel={self.kernel is not None}"
        )


class ColumnParallelLinear(QuantLinear):
    """A rank's columns of a layer: the whole input in, the rank's own channels out."""


class RowParallelLinear(QuantLinear):
    """A rank's rows of a layer: its own channels in, the sum over all ranks out, plus the bias."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        bits: int | None = 4,
        checkpoint_format: str = "gptq",
        bias: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(tensors, bits, checkpoint_format)
        self.bias_once, self.group = bias, group
        self.summed_later = False  # by the block of experts that this layer belongs to

    def forward(self, x: Tensor) -> Tensor:
        out = self.product(x)
        if not self.summed_later:
            _sum_over_ranks(out, self.group)
        return out if self.bias_once is None else out + self.bias_once.to(x.dtype)


def _sum_over_ranks(out: Tensor, group: dist.ProcessGroup | None) -> None:
    """In place; what every rank has its part of."""
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(out, group=group)


class NormOverRanks(nn.Module):
    """Stands for an RMS norm over all heads together, of which this rank has some.

    x (..., the rank's channels). weight is that of all channels, `channels` which of them the rank
    has, any where a head is empty; `copies` ranks have each head. One number a token is summed.
    """

    weight: Tensor
    channels: Tensor

    def __init__(
        self, norm: nn.Module, channels: Tensor, copies: int, group: dist.ProcessGroup | None
    ) -> None:
        super().__init__()
        self.weight = norm.weight
        self.epsilon: float = norm.variance_epsilon
        self.copies, self.group = copies, group
        self.register_buffer("channels", channels, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        squares = wide.square().sum(-1, keepdim=True) / self.copies
        _sum_over_ranks(squares, self.group)
        wide = wide * torch.rsqrt(squares / len(self.weight) + self.epsilon)
        return (self.weight[self.channels] * wide).to(x.dtype)


class Experts(nn.ModuleList):
    """Experts of layers of their own, where transformers keeps the weights of all in one tensor.

    x (T, hidden), chosen (T, k) the experts of each token, weights (T, k) -> (T, hidden), this
    rank's part of the sum. Which experts are chosen is asked of the device: no CUDA graph holds it.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__(nn.Module() for _ in range(int(experts.num_experts)))  # type: ignore[arg-type]
        self.activation: Callable[[Tensor], Tensor] = experts.act_fn

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for index in chosen.unique().tolist():
            tokens, places = torch.where(chosen == index)
            own, expert = x[tokens], self[index]
            inner = self.activation(expert.gate_proj(own)) * expert.up_proj(own)
            part = expert.down_proj(inner) * weights[tokens, places, None]
            out.index_add_(0, tokens, part.to(out.dtype))
        return out


class _Kernel:
    """What stands for a QuantLinear's tensors once it uses the kernels.

    Layers that are fed the same tensor one after another share one: the first computes all of them.
    In inference mode, where tensors have no versions, nothing may change it in between.
    """

    def __init__(self, layer: Arranged, widths: Sequence[int]) -> None:
        self.layer, self.widths = layer, list(widths)
        self.x: Tensor | None = None
        self.version = 0
        self.parts: list[Tensor | None] = [None] * len(self.widths)

    def product(self, x: Tensor, index: int) -> Tensor:
        if len(self.widths) == 1:
            return multiply(x, self.layer)
        version = 0 if x.is_inference() else x._version
        part = self.parts[index]
        if part is None or x is not self.x or version != self.version:
            self.x, self.version = x, version
            self.parts = list(multiply(x, self.layer).split(self.widths, -1))
            part = self.parts[index]
            assert part is not None
        self.parts[index] = None
        if all(other is None for other in self.parts):
            self.x = None
        return part


def use_kernels(*linears: QuantLinear) -> None:
    """Let layers that share an input and its perm run as one, by the kernels.

    Their tensors are rearranged where they lie, and the originals let go. Where they are, the
    kernels must run (`kernels_run_on`).
    """
    first = linears[0]
    assert first.bits is not None
    layer = arrange([linear.tensors() for linear in linears], first.bits, first.checkpoint_format)
    kernel = _Kernel(layer, [linear.out_features for linear in linears])
    for index, linear in enumerate(linears):
        linear.kernel, linear.index = kernel, index
        for name in list(linear.tensors()):
            setattr(linear, name, None)


def arranged_layers(model: nn.Module) -> list[Arranged]:
    """What the kernels of a model work on, for `tune`."""
    products = [m.kernel for m in model.modules() if isinstance(m, QuantLinear) and m.kernel]
    return list({id(product.layer): product.layer for product in products}.values())


def _alike(one: QuantLinear, other: QuantLinear) -> bool:
    """Whether two layers of a module may share a launch: they may have the same input."""
    if not all(isinstance(linear, ColumnParallelLinear) for linear in (one, other)):
        return False
    sizes = [(linear.in_features, linear.group_size, linear.bits) for linear in (one, other)]
    if sizes[0] != sizes[1] or (one.perm is None) != (other.perm is None):
        return False
    return one.perm is None or other.perm is None or torch.equal(one.perm, other.perm)


def swap_linears(
    model: nn.Module,
    checkpoint: Checkpoint,
    rank: int,
    device: torch.device | str = "cpu",
    group: dist.ProcessGroup | None = None,
    kernels: bool | None = None,
) -> None:
    """Put one rank's shards in the place of a Hugging Face model's linear layers, in place.

    Each attention module is told how many heads this rank has. Unless `kernels` says otherwise, on
    a GPU the kernels do the work; column-parallel layers of one module that share a perm then run
    as one.
    """
    manifest = checkpoint.manifest
    shared = checkpoint.shared()
    blocks = []
    for block in list(model.modules()):
        if isinstance(experts := getattr(block, "experts", None), nn.Module):
            blocks.append(block)
            if hasattr(experts, "gate_up_proj"):
                block.experts = Experts(experts)
    together: dict[str, list[list[QuantLinear]]] = {}
    renamed = _renamed(model)
    for name, parts in checkpoint.rank(rank).items():
        tensors = {part: tensor.to(device) for part, tensor in parts.items()}
        quant = checkpoint.bits(name), manifest["checkpoint_format"]
        linear: QuantLinear
        if checkpoint.modules[name]["parallel"] == "row":
            bias = shared.get(f"{name}.bias")
            linear = RowParallelLinear(
                tensors, *quant, bias=None if bias is None else bias.to(device), group=group
            )
        else:
            linear = ColumnParallelLinear(tensors, *quant)
        parent, _, child = renamed(f"{name}.weight").removesuffix(".weight").rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
        alike = together.setdefault(parent, [])
        mine = next((others for others in alike if _alike(linear, others[0])), None)
        if mine is None:
            alike.append([linear])
        else:
            mine.append(linear)
    if kernels is None:
        kernels = torch.device(device).type == "cuda" and kernels_run_on(device)
    if kernels:
        for alike in together.values():
            for linears in alike:
                if linears[0].bits in KERNEL_BITS:
                    use_kernels(*linears)
    for parent in filter(None, together):  # a head's is the model itself
        _tell_heads(model.get_submodule(parent), manifest["heads"], checkpoint.tp, rank, group)
    for block in blocks:
        for module in block.modules():
            if isinstance(module, RowParallelLinear):
                module.summed_later = True

        def sum_output(_: nn.Module, __: Any, out: Any) -> None:
            _sum_over_ranks(out[0] if isinstance(out, tuple) else out, group)

        block.register_forward_hook(sum_output)


# Layers of experts, which transformers 5 merges, not renames: what they are called in `Experts`.
_NEW_NAMES = {
    "block_sparse_moe": "mlp",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
}


def _renamed(model: nn.Module) -> Callable[[str], str]:
    """What the name of a tensor in the files is in this model: transformers 5 renames modules."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # transformers 4, which renames none
        renamings = []
    else:
        conversions = get_model_conversion_mapping(model, add_legacy=False)  # type: ignore[arg-type]
        renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    known = set(model.state_dict())

    def rename(name: str) -> str:
        if name in known:
            return name
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return ".".join(_NEW_NAMES.get(word, word) for word in name.split("."))

    return rename


def _tell_heads(
    module: nn.Module,
    heads: Mapping[str, int],
    tp: int,
    rank: int,
    group: dist.ProcessGroup | None,
) -> None:
    """Tell an attention module how many heads a rank has, by whatever names it counts them.

    What it is handed for every head of the model (ALiBi) is cut to the rank's own, and norms over
    all heads sum over the ranks.
    """
    query = heads["query"]
    own_query, own_kv = heads["padded_query"] // tp, max(1, heads["padded_kv"] // tp)
    size = getattr(module, "head_dim", getattr(module, "hidden_size_per_attention_head", None))
    own = _head_counts(own_query, own_kv, size)
    # A config states the padded ones where it can: where it states the size of a head beside them.
    stated = [_head_counts(heads[f"{which}query"], heads[f"{which}kv"], size)
              for which in ("", "padded_")]  # fmt: skip
    if config := getattr(module, "config", None):  # of its own, from here on
        module.config = copy.copy(config)
    for target in (*module.modules(), *([module.config] if config else [])):
        for name, count in own.items():
            if name == "hidden_size" and target is not module:
                continue  # elsewhere it is the model's
            if getattr(target, name, None) in [counts[name] for counts in stated]:
                setattr(target, name, count)
    mine = torch.tensor(_query_heads(query // heads["kv"], own_query, own_kv, rank))
    mine %= query  # an empty head may be handed any other's
    if tp > 1 and isinstance(size, int):
        copies = -(-query // heads["kv"] // (own_query // own_kv))
        places = torch.arange(rank * own_kv, (rank + 1) * own_kv)
        kv_heads = places // copies % heads["kv"]
        wide = {query: (mine, 1), heads["kv"]: (kv_heads, copies)}
        for name, norm in _norms_over_heads(module, query * size).items():
            of_rank, copies = wide[len(norm.weight) // size]  # type: ignore[arg-type]
            channels = (of_rank[:, None] * size + torch.arange(size)).flatten()
            setattr(module, name, NormOverRanks(norm, channels, copies, group))

    def cut_heads(tensor: Tensor) -> Tensor:
        """(batch, heads, ...) or (batch * heads, ...) of the model -> of the rank."""
        by_head = tensor if tensor.dim() == 4 else tensor.unflatten(0, (-1, query))
        if by_head.shape[1] == query:
            by_head = by_head[:, mine.to(tensor.device)]
        return by_head if tensor.dim() == 4 else by_head.flatten(0, 1)

    def cut(_: nn.Module, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        for name in {"alibi", "position_bias", "attention_mask"} & given.keys():
            if isinstance(given[name], Tensor) and given[name].dim() > 2:
                given[name] = cut_heads(given[name])
        return args, given

    handed = {"alibi", "position_bias"} & inspect.signature(module.forward).parameters.keys()
    if handed and mine.tolist() != list(range(query)):
        module.register_forward_pre_hook(cut, with_kwargs=True)


def _norms_over_heads(module: nn.Module, width: int) -> dict[str, nn.Module]:
    """An attention module's norms, if that of the queries is over all their channels together."""
    norms = {
        name: norm for name, norm in module.named_children() if hasattr(norm, "variance_epsilon")
    }
    return norms if any(norm.weight.shape == (width,) for norm in norms.values()) else {}


def _query_heads(group: int, query: int, kv: int, rank: int) -> list[int]:
    """The model's query heads of a rank that has `query` of them and `kv` kv heads.

    `group` of the model's share a kv head, which stands in as many places as they need. Of an empty
    head the number is -1, or too large.
    """
    each = query // kv
    copies = -(-group // each)
    places = [divmod(place, copies) for place in range(rank * kv, (rank + 1) * kv)]
    return [
        head * group + part * each + i if part * each + i < group else -1
        for head, part in places
        for i in range(each)
    ]


def _head_counts(query: int, kv: int, size: Any) -> dict[str, int]:
    """What attention modules call so many heads, and their channels where a head's are known."""
    counts = {"num_key_value_groups": query // kv}
    queries = ("num_heads", "num_attention_heads", "n_heads", "n_head")
    counts |= dict.fromkeys((*queries, "num_attention_heads_per_partition"), query)
    kvs = ("num_key_value_heads", "num_kv_heads", "num_multi_query_groups_per_partition")
    counts |= dict.fromkeys(kvs, kv)
    if isinstance(size, int):
        widths = ("embed_dim", "split_size", "hidden_size", "hidden_size_per_partition")
        counts |= dict.fromkeys(widths, query * size) | {"kv_dim": kv * size}
    return counts


def load_model(
    directory: str | Path,
    rank: int | None = None,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    group: dist.ProcessGroup | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The Hugging Face model in `directory`, as one rank runs it; needs transformers.

    Only this rank's files and the shared ones are read. rank None: this process's own rank.
    trust_remote_code: run the code that lies in `directory`, where config.json's auto_map names it,
    even if transformers has a class of its own for the model. Raises FormatError.
    """
    import transformers
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationConfig

    checkpoint = Checkpoint(directory)
    world = dist.get_world_size(group) if dist.is_initialized() else 1
    if world != checkpoint.tp:
        raise FormatError(
            f"world size {world}: {checkpoint.directory} was written for tp {checkpoint.tp}; run "
            f"it with torchrun --nproc-per-node {checkpoint.tp}, or convert again with --tp {world}"
        )
    if rank is None:
        rank = dist.get_rank(group) if world > 1 else 0
    stated = _source_config(checkpoint)
    remote = trust_remote_code and "AutoModelForCausalLM" in (stated.get("auto_map") or {})
    if not remote and stated["model_type"] not in CONFIG_MAPPING:
        raise FormatError(
            f"{checkpoint.directory}: transformers {transformers.__version__} has no model_type "
            f"{stated['model_type']!r}; its code may lie here, and runs only where config.json's "
            "auto_map names it, with --trust-remote-code (trust_remote_code=True)"
        )
    if remote:
        config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=True)
        for key, value in stated.items():
            setattr(config, key, value)
        config._name_or_path = str(checkpoint.directory)  # where from_config looks for the code
        del config.quantization_config
    else:
        config = AutoConfig.for_model(**stated)
    setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", dtype)  # by version
    with _EmptyOnMeta():
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=remote)
    swap_linears(model, checkpoint, rank, device, group)
    _fill(model, checkpoint.shared(), dtype, device)
    if (checkpoint.directory / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(directory)
        model.generation_config = generation
    return model.eval().requires_grad_(requires_grad=False)


def _source_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json with as many heads as the source has: `swap_linears` tells of the empty ones.

    transformers 5 refuses numbers of heads that don't divide the hidden size, in some families.
    """
    config = _json_object(checkpoint.directory / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise FormatError(f"{checkpoint.directory / 'config.json'}: states no model_type")
    config.pop("quantization_config", None)
    heads = checkpoint.manifest["heads"]
    keys = {"num_attention_heads": "query", "num_key_value_heads": "kv"}
    for key, kind in (keys | {"multi_query_group_num": "kv"}).items():
        if config.get(key) == heads[f"padded_{kind}"]:
            config[key] = heads[kind]
    return config


class _EmptyOnMeta(TorchFunctionMode):
    """What is made with torch.empty, parameters, takes no memory; computed buffers are real."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        meta = {"device": "meta"} if func is torch.empty else {}
        return func(*args, **{**(kwargs or {}), **meta})


def _fill(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Give a model without weights its shared tensors, and bring its buffers to the device."""
    renamed = _renamed(model)
    wide = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())  # a router's bias
    state = {
        renamed(name): tensor.to(device, torch.float32 if name.endswith(wide) else dtype)
        for name, tensor in tensors.items()
    }
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in state.items():
        if name in own and own[name].shape != tensor.shape:
            raise FormatError(
                f"{name}: is {list(tensor.shape)} in the shared files; must be "
                f"{list(own[name].shape)}, as config.json has it"
            )
    missing = set(model.load_state_dict(state, strict=False, assign=True).missing_keys)
    model.tie_weights()  # type: ignore[operator]
    if lacking := [name for name, _ in model.named_parameters() if name in missing]:
        raise FormatError(f"{', '.join(lacking)}: missing from the shared files")
    model.to(device)


def main() -> None:
    """Generate text from a prompt, greedily: one process for each rank, started by torchrun."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--checkpoint", type=Path, default=here, help="default: %(default)s")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float16", "bfloat16", "float32"),
        default="auto",
        help="default: float16 on a GPU, float32 on a CPU",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's own code")
    arguments = parser.parse_args()
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError:
        raise SystemExit(
            "Error: transformers is missing; install it: pip install transformers"
        ) from None

    cuda = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    dtype = getattr(torch, arguments.dtype, torch.float16 if cuda else torch.float32)
    if "RANK" in os.environ:
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        trust = arguments.trust_remote_code
        model = load_model(
            arguments.checkpoint, dtype=dtype, device=device, trust_remote_code=trust
        )
    except FormatError as error:
        raise SystemExit(f"Error: {error}" if os.environ.get("RANK", "0") == "0" else 1) from None
    # With the model's config: transformers 5 refuses numbers of heads as config.json may state.
    tokenizer = AutoTokenizer.from_pretrained(
        arguments.checkpoint, config=model.config, trust_remote_code=trust
    )
    inputs = tokenizer(arguments.prompt, return_tensors="pt").to(device)
    with torch.inference_mode():
        tokens = model.generate(  # type: ignore[operator]
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=arguments.max_new_tokens,
            do_sample=False,
        )
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(tokenizer.decode(tokens[0], skip_special_tokens=True))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
