"""Measure decoding and prefill of a whole tensor-parallel model, in this format and in others.

One harness runs every row: the same plain torch around the linear layers, a static KV cache, and on
a GPU a CUDA graph of each step. The rows differ in how the linear layers of a block are computed,
all from the same integers of one synthetic GPTQ act-order checkpoint:

    ours            the converted shards by the runtime module: q, k and v in one product, gate and
                    up in one, o_proj, down; two all-reduces a block
    GPTQ, original  column-parallel layers by exllama with its act-order gather; row-parallel
                    layers, whose groups are cut, by Triton's matmul_248; two all-reduces
    naive           exllama on sorted rows everywhere; what feeds a row-parallel layer is first
                    all-gathered and put in order: two all-gathers more
    masked o_proj   ours, but every rank multiplies the whole of o_proj by a vector that is zero
                    outside its own channels, as TGIS did
    fp16            torch's linear, not quantised (float32 on a CPU)

A step of decoding is the last one: it reads --prompt cached positions, and writes and reads one
more. As many blocks run as fit into memory, each with memory of its own (but the same integers); a
step without any block is measured too, and the times are scaled to the model's number of blocks.
Median of the steps, after warm-up. Memory is what weights and cache take up on one GPU at the
model's number of blocks. The error is that of the logits of a step, as the largest difference from
float32 weights by the largest logit, over two blocks; it stands where all ranks are at hand.

In one process one rank of each --tp runs alone and its collectives are left out; a further column
adds what those of its blocks took on two H100s (whichever --tp, so too little beyond 2). Started by
torchrun every process is a rank and the collectives are real.

Exllama comes with vLLM 0.26 (--vllm-library .../_C_stable_libtorch.abi3.so); --matmul248 names a
Python file with matmul248(a, qweight, scales, qzeros, g_idx). Rows that lack theirs don't run.

Usage:

    python scripts/bench_decode.py --tp 2 --tp 4 --json decode.json
    torchrun --nproc-per-node 2 scripts/bench_decode.py --check
    torchrun --nproc-per-node 2 scripts/bench_decode.py --device cpu --check --prompt 32 \\
        --hidden 256 --intermediate 512 --heads 8 --kv-heads 4 --blocks 2
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from make_synthetic import PRESETS, Shape, shape_of
from torch import Tensor
from torch.nn import functional

from tpgptq_convert import tpgptq_runtime as runtime
from tpgptq_convert.checkpoint import Checkpoint as Source
from tpgptq_convert.checkpoint import read_checkpoint
from tpgptq_convert.families import DOWN, GATE, UP, K, O, Q, V
from tpgptq_convert.packing import dequantise, pack_rows, unpack_rows

PRESET = "llama-2-70b"
BITS = 4
EPSILON, ROPE_THETA = 1e-5, 10000.0  # as make_synthetic.py writes them to config.json
CHECKED = 2  # blocks that logits are compared over
MARGIN = 4 << 30  # bytes of GPU memory left to activations, graphs and libraries
# Microseconds of a collective of so many channels, by tokens, on two H100s; the all-gather with the
# global gather and the chunk that follow it.
COLLECTIVES: dict[str, tuple[int, dict[int, float]]] = {
    "all-reduce": (8192, {1: 12, 16: 14, 256: 37, 1024: 84}),
    "all-gather": (28672, {1: 10, 16: 21, 256: 135, 1024: 483}),
}

Product = Callable[[Tensor], Tensor]  # x (M, K) -> (M, N)
Cache = Sequence[tuple[Tensor, Tensor]]  # k and v (batch, kv heads, length, head_dim), by block


# The ranks, and what they say to each other.


@dataclass(frozen=True)
class Call:
    """A collective: its kind, the channels of what it makes, and tokens."""

    kind: str
    width: int
    tokens: int

    @property
    def seconds(self) -> float:
        """On two H100s: as measured, in proportion to the width, but never below one token's."""
        width, times = COLLECTIVES[self.kind]
        time_of_tokens = np.interp(self.tokens, list(times), list(times.values()))
        beyond = max(1, self.tokens / max(times))
        return max(times[1], float(time_of_tokens) * beyond * self.width / width) * 1e-6


@dataclass
class Ranks:
    """The ranks of a model as one of them sees them; where not `real`, it is alone."""

    tp: int
    rank: int = 0
    real: bool = False
    calls: list[Call] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether what they compute is the model's own output."""
        return self.real or self.tp == 1

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks of x (M, N), in place."""
        if self.tp > 1:
            self.calls.append(Call("all-reduce", x.shape[1], len(x)))
        if self.real:
            dist.all_reduce(x)
        return x

    def side_by_side(self, x: Tensor) -> Tensor:
        """All ranks' x (M, N) -> (M, tp * N)."""
        if not self.real:
            return x
        parts = x.new_empty(self.tp, *x.shape)
        dist.all_gather_into_tensor(parts.flatten(0, 1), x.contiguous())
        return parts.transpose(0, 1).flatten(1)

    def take(self, x: Tensor, index: Tensor) -> Tensor:
        """Some channels, by their index among those of all ranks."""
        if self.tp > 1:
            self.calls.append(Call("all-gather", x.shape[1] * self.tp, len(x)))
        if not self.complete:
            return x  # the times of COLLECTIVES hold the gather
        return self.side_by_side(x).index_select(1, index)


# One block's layers, as the source has them.


@dataclass(frozen=True)
class Packed:
    """Layers of one input side by side: qweight (K/8, N), qzeros (G, N/8), scales (G, N), g_idx."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor

    def columns(self, rank: int, tp: int) -> Packed:
        """A rank's outputs."""
        qweight, qzeros, scales = (
            tensor.chunk(tp, 1)[rank] for tensor in (self.qweight, self.qzeros, self.scales)
        )
        return Packed(qweight, qzeros, scales, self.g_idx)

    def rows(self, rank: int, tp: int) -> Packed:
        """A rank's inputs; with all groups, for it may have rows of each."""
        qweight, g_idx = (tensor.chunk(tp)[rank].clone() for tensor in (self.qweight, self.g_idx))
        return replace(self, qweight=qweight, g_idx=g_idx)

    def groups(self, rank: int, tp: int) -> Packed:
        """A rank's groups of a layer that is in order."""
        qweight, qzeros, scales, g_idx = (
            tensor.chunk(tp)[rank].clone() for tensor in vars(self).values()
        )
        return Packed(qweight, qzeros, scales, g_idx - g_idx[0])

    @property
    def order(self) -> Tensor:
        return self.g_idx.argsort(stable=True)

    def in_order(self) -> Packed:
        """With its rows sorted by group."""
        order = self.order
        qweight = pack_rows(unpack_rows(self.qweight, BITS)[order], BITS)
        return replace(self, qweight=qweight, g_idx=self.g_idx[order])


@dataclass
class Setting:
    """What a row's layers are made from, on the device where they run."""

    shape: Shape
    source: Source
    shards: Mapping[str, Mapping[str, Tensor]]
    ranks: Ranks
    device: torch.device
    dtype: torch.dtype
    vllm: bool
    matmul248: Callable[..., Tensor] | None

    def tensor(self, name: str) -> Tensor:
        return self.source.source.tensor(name).to(self.device, copy=True)

    def _block(self, name: str) -> str:
        return f"{self.source.family.block(0)}.{name}"

    def dense(self, name: str) -> Tensor:
        """A tensor of the block that is not quantised."""
        return self.tensor(self._block(name)).to(self.dtype)

    def whole(self, name: str) -> Packed:
        parts = ("qweight", "qzeros", "scales", "g_idx")
        return Packed(*(self.tensor(f"{self._block(name)}.{part}") for part in parts))

    def columns(self, *names: str) -> Packed:
        """This rank's columns of layers that share g_idx, as make_synthetic.py makes them."""
        layers = [self.whole(name).columns(self.ranks.rank, self.ranks.tp) for name in names]
        if not all(torch.equal(layer.g_idx, layers[0].g_idx) for layer in layers):
            raise RuntimeError(f"{', '.join(names)} differ in g_idx")
        qweight, qzeros, scales = (
            torch.cat([getattr(layer, part) for layer in layers], 1)
            for part in ("qweight", "qzeros", "scales")
        )
        return Packed(qweight, qzeros, scales, layers[0].g_idx)

    def rows(self, name: str) -> Packed:
        return self.whole(name).rows(self.ranks.rank, self.ranks.tp)

    def shard(self, name: str) -> dict[str, Tensor]:
        """This rank's converted tensors."""
        parts = self.shards[self._block(name)]
        return {part: tensor.to(self.device, copy=True) for part, tensor in parts.items()}


# Ways to multiply. Objects, not closures: what they hold is copied with them.


def multiplied(setting: Setting, layers: Sequence[Mapping[str, Tensor]]) -> Product:
    """Plain groups, by the runtime module: its kernels where they run, else its reference."""
    quant = setting.source.quant
    if runtime.kernels_run_on(setting.device):
        return partial(
            runtime.multiply, layer=runtime.arrange(layers, quant.bits, quant.checkpoint_format)
        )
    linears = [runtime.QuantLinear(t, quant.bits, quant.checkpoint_format) for t in layers]
    return Beside(linears)


@dataclass
class Beside:
    """Layers of one input, one after another."""

    layers: Sequence[Product]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], 1)


class Exllama:
    """vLLM's exllama kernel; `act_order`: the kernel gathers, else groups must be consecutive."""

    def __init__(self, packed: Packed, act_order: bool) -> None:
        none = torch.empty(0, dtype=torch.int32, device=packed.qweight.device)
        self.perm = packed.order.int() if act_order else none
        self.qweight = packed.qweight.clone(memory_format=torch.contiguous_format)
        self.qzeros, self.scales = packed.qzeros.contiguous(), packed.scales.contiguous()
        torch.ops._C.gptq_shuffle(self.qweight, self.perm, BITS)

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops._C.gptq_gemm(
            x, self.qweight, self.qzeros, self.scales, self.perm, True, False, BITS
        )
        return out


@dataclass
class Matmul248:
    """Any order of rows, by a kernel that looks up every row's group."""

    kernel: Callable[..., Tensor]
    packed: Packed

    def __call__(self, x: Tensor) -> Tensor:
        packed = self.packed
        return self.kernel(x, packed.qweight, packed.scales, packed.qzeros, packed.g_idx)


@dataclass
class Gathered:
    """The input put in order before a product."""

    perm: Tensor
    product: Product

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x.index_select(1, self.perm))


@dataclass
class AllGathered:
    """The input of all ranks put in order, and this rank's chunk of that, before a product."""

    ranks: Ranks
    perm: Tensor
    product: Product

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(self.ranks.take(x, self.perm))


@dataclass
class Masked:
    """A whole layer's product, the input zero outside this rank's channels."""

    places: Tensor
    width: int
    product: Product

    def __call__(self, x: Tensor) -> Tensor:
        whole = x.new_zeros(len(x), self.width)
        return self.product(whole.index_copy_(1, self.places, x))


# The rows.


@dataclass
class Products:
    """A block's linear layers; o and down give this rank's part of a sum."""

    qkv: Product
    o: Product
    gate_up: Product
    down: Product


def ours(setting: Setting) -> Products:
    def product(*names: str) -> Product:
        return multiplied(setting, [setting.shard(name) for name in names])

    return Products(product(Q, K, V), product(O), product(GATE, UP), product(DOWN))


def masked(setting: Setting) -> Products:
    ranks, whole = setting.ranks, setting.whole(O)
    order, packed = whole.order, whole.in_order()
    places = order.argsort().chunk(ranks.tp)[ranks.rank].clone()
    tensors = {part: getattr(packed, part) for part in ("qweight", "qzeros", "scales")}
    product = Masked(places, len(order), multiplied(setting, [tensors]))
    return replace(ours(setting), o=product)


def original(setting: Setting) -> Products:
    assert setting.matmul248 is not None
    return Products(
        qkv=Exllama(setting.columns(Q, K, V), act_order=True),
        o=Matmul248(setting.matmul248, setting.rows(O)),
        gate_up=Exllama(setting.columns(GATE, UP), act_order=True),
        down=Matmul248(setting.matmul248, setting.rows(DOWN)),
    )


def naive(setting: Setting) -> Products:
    ranks = setting.ranks

    def column(*names: str) -> Product:
        packed = setting.columns(*names)
        return Gathered(packed.order, Exllama(packed.in_order(), act_order=False))

    def row(name: str) -> Product:
        whole = setting.whole(name)
        perm = whole.order.chunk(ranks.tp)[ranks.rank].clone()
        chunk = whole.in_order().groups(ranks.rank, ranks.tp)
        return AllGathered(ranks, perm, Exllama(chunk, act_order=False))

    return Products(column(Q, K, V), row(O), column(GATE, UP), row(DOWN))


def dense(setting: Setting) -> Products:
    def product(packed: Packed) -> Product:
        parts = (packed.qweight, packed.qzeros, packed.scales, packed.g_idx.long())
        weight = dequantise(*parts, setting.source.quant, setting.dtype)
        return partial(functional.linear, weight=weight.t().contiguous())

    columns, rows = setting.columns, setting.rows
    return Products(
        qkv=product(columns(Q, K, V)),
        o=product(rows(O)),
        gate_up=product(columns(GATE, UP)),
        down=product(rows(DOWN)),
    )


@dataclass(frozen=True)
class Way:
    """A row: its name, what makes its layers, and what that needs."""

    name: str
    make: Callable[[Setting], Products]
    vllm: bool = False
    matmul248: bool = False
    whole_groups: bool = False  # a rank of a row-parallel layer

    def unfit(self, setting: Setting) -> str:
        """Why it can't run, or nothing."""
        shape, tp = setting.shape, setting.ranks.tp
        if (self.vllm or self.matmul248) and setting.device.type == "cpu":
            return "its kernels need a GPU"
        if self.vllm and not setting.vllm:
            return "no --vllm-library"
        if self.matmul248 and setting.matmul248 is None:
            return "no --matmul248"
        size = max(1, setting.source.quant.group_size)
        for width in (shape.heads * shape.head_dim, shape.intermediate):
            if self.whole_groups and width // tp % size:
                return f"{width} / {tp} rows are no whole groups of {size}"
        return ""


def ways(dtype: torch.dtype) -> list[Way]:
    return [
        Way("ours", ours),
        Way("GPTQ, original", original, vllm=True, matmul248=True),
        Way("naive", naive, vllm=True, whole_groups=True),
        Way("masked o_proj", masked),
        Way(f"fp{torch.finfo(dtype).bits}", dense),
    ]


# The model around them.


@dataclass
class Block:
    """One rank's part of a block."""

    input_norm: Tensor
    mlp_norm: Tensor
    products: Products


class Model:
    """One rank's part of a Llama."""

    def __init__(self, setting: Setting, length: int) -> None:
        shape, ranks, dtype = setting.shape, setting.ranks, setting.dtype
        self.shape, self.ranks = shape, ranks
        self.heads, self.kv_heads = shape.heads // ranks.tp, shape.kv_heads // ranks.tp
        self.embedding = setting.tensor("model.embed_tokens.weight").to(dtype)
        self.norm = setting.tensor("model.norm.weight").to(dtype)
        head = setting.tensor("lm_head.weight").to(dtype)
        self.head = head.chunk(ranks.tp)[ranks.rank].clone()
        powers = torch.arange(0, shape.head_dim, 2, device=setting.device) / shape.head_dim
        angles = torch.arange(length, device=setting.device)[:, None] / ROPE_THETA**powers
        angles = torch.cat((angles, angles), 1).unsqueeze(1)  # (length, 1, head_dim)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        self.blocks: list[Block] = []

    def cache(self, blocks: int, batch: int) -> Cache:
        size = (batch, self.kv_heads, len(self.cos), self.shape.head_dim)
        return [(self.norm.new_zeros(size), self.norm.new_zeros(size)) for _ in range(blocks)]

    def step(
        self, tokens: Tensor, positions: Tensor, cache: Cache, blocks: int
    ) -> tuple[Tensor, Tensor]:
        """tokens (batch, T) at positions (T,) -> the logits (batch, vocab), the next tokens."""
        batch = len(tokens)
        x = functional.embedding(tokens, self.embedding).flatten(0, 1)  # (batch * T, hidden)
        for block, kv in zip(self.blocks[:blocks], cache, strict=False):
            products = block.products
            qkv = products.qkv(self._normed(x, block.input_norm))
            mixed = self._attention(qkv.unflatten(0, (batch, -1)), positions, *kv)
            x = x + self.ranks.sum(products.o(mixed))
            gate, up = products.gate_up(self._normed(x, block.mlp_norm)).chunk(2, 1)
            x = x + self.ranks.sum(products.down(functional.silu(gate) * up))
        x = x.unflatten(0, (batch, -1))[:, -1]
        logits = self.ranks.side_by_side(functional.linear(self._normed(x, self.norm), self.head))
        return logits, logits.argmax(-1, keepdim=True)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, EPSILON)

    def _attention(self, qkv: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """qkv (batch, T, channels) -> (batch * T, query channels); k and v go into the cache."""
        batch, length, _ = qkv.shape
        qkv = qkv.unflatten(2, (-1, self.shape.head_dim))
        q_k, v = qkv.tensor_split([self.heads + self.kv_heads], 2)
        low, high = q_k.chunk(2, 3)
        turned = torch.cat((-high, low), 3)
        q, k = torch.addcmul(q_k * self.cos[positions], turned, self.sin[positions]).tensor_split(
            [self.heads], 2
        )
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        if length == 1:  # the last position: the queries of a kv head see all of its cache
            q = q.reshape(batch, self.kv_heads, -1, self.shape.head_dim)
            return functional.scaled_dot_product_attention(q, keys, values).reshape(batch, -1)
        out = functional.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, is_causal=True, enable_gqa=self.heads > self.kv_heads
        )
        return out.transpose(1, 2).reshape(batch * length, -1)


@dataclass
class Steps:
    """What is measured of a model: the prompt of one sequence, then a token of a batch."""

    model: Model
    cache: Cache
    prompt: Tensor  # (1, T)
    tokens: Tensor  # (largest batch, 1)

    def prefill(self, blocks: int) -> Tensor:
        positions = torch.arange(self.prompt.shape[1], device=self.prompt.device)
        cache = [(keys[:1], values[:1]) for keys, values in self.cache]
        return self.model.step(self.prompt, positions, cache, blocks)[0]

    def fill(self) -> None:
        """Every sequence's cache as the prompt's."""
        self.prefill(len(self.model.blocks))
        for tensor in (tensor for pair in self.cache for tensor in pair):
            tensor[1:] = tensor[:1].clone()

    def decode(self, blocks: int, batch: int, position: Tensor) -> Tensor:
        cache = [(keys[:batch], values[:batch]) for keys, values in self.cache]
        return self.model.step(self.tokens[:batch], position, cache, blocks)[0]

    def position(self) -> Tensor:
        return torch.tensor([self.prompt.shape[1]], device=self.prompt.device)


# Measuring.


@dataclass
class Result:
    """A row at one batch size; all but the block's own figures are for the whole model."""

    tp: int
    batch: int
    row: str
    reason: str = ""  # why it didn't run
    blocks: int = 0  # that ran
    prefill: float = 0  # seconds
    prefill_with: float = 0  # with collectives of two H100s
    decode: float = 0
    decode_with: float = 0
    decode_block: float = 0  # of one block
    decode_rest: float = 0  # of everything outside the blocks
    memory: float | None = None  # bytes
    collectives: float = 0  # in a block
    error: float | None = None


class Bench:
    """The rows of one tp."""

    def __init__(self, setting: Setting, args: argparse.Namespace, total: int, cap: int) -> None:
        self.setting, self.args, self.total, self.cap = setting, args, total, cap
        drawn = torch.Generator().manual_seed(0)
        draw = partial(torch.randint, setting.shape.vocab, generator=drawn)
        self.prompt = draw((1, args.prompt)).to(setting.device)
        self.tokens = draw((max(args.batch), 1)).to(setting.device)
        self.expected = None
        if args.check and setting.ranks.complete:
            steps, _ = self._build(replace(setting, dtype=torch.float32), dense, CHECKED)
            self.expected = self._logits(steps)

    def run(self, way: Way) -> list[Result]:
        """A row at every batch size."""
        empty = [Result(self.setting.ranks.tp, batch, way.name) for batch in self.args.batch]
        reason = way.unfit(self.setting)
        if not reason:
            try:
                return self._measure(way, empty)
            except RuntimeError as error:
                if self.setting.ranks.real:
                    raise  # the other ranks wait
                reason = str(error).splitlines()[0][:120]
        return [replace(result, reason=reason) for result in empty]

    def _measure(self, way: Way, results: Sequence[Result]) -> list[Result]:
        release()
        before = allocated()
        steps, block_bytes = self._build(self.setting, way.make, self.cap)
        model = steps.model
        blocks = len(model.blocks)
        pair = sum(tensor.nbytes for tensor in steps.cache[0])
        other_bytes = allocated() - before - blocks * (block_bytes + pair)
        error = None
        if self.expected is not None:
            difference = (self._logits(steps) - self.expected).abs().max()
            error = float(difference / self.expected.abs().max())
        prefill, _, prefill_with, _ = self._step(steps, steps.prefill)
        steps.fill()
        measured = []
        for result in results:
            decode = partial(steps.decode, batch=result.batch, position=steps.position())
            seconds, rest, with_collectives, calls = self._step(steps, decode)
            if self.args.profile and self.setting.device.type == "cuda":
                said = collectives_run(partial(decode, blocks))
                print(f"{way.name}, batch {result.batch}, {blocks} blocks: {said}", file=sys.stderr)
            cache_bytes = pair * result.batch // max(self.args.batch)
            memory = other_bytes + self.total * (block_bytes + cache_bytes)
            measured.append(
                replace(
                    result,
                    blocks=blocks,
                    prefill=prefill,
                    prefill_with=prefill_with,
                    decode=seconds,
                    decode_with=with_collectives,
                    decode_block=(seconds - rest) / self.total,
                    decode_rest=rest,
                    memory=memory if self.setting.device.type == "cuda" else None,
                    collectives=calls,
                    error=error,
                )
            )
        return measured

    def _build(
        self, setting: Setting, make: Callable[[Setting], Products], most: int
    ) -> tuple[Steps, int]:
        """A model of up to `most` blocks, as many as there is memory for, and a block's bytes."""
        model = Model(setting, self.args.prompt + 1)
        before = allocated()
        input_norm, mlp_norm = (setting.dense(f"{name}_layernorm.weight") for name in NORMS)
        block = Block(input_norm, mlp_norm, make(setting))
        size = allocated() - before
        cache = sum(t.nbytes for pair in model.cache(1, max(self.args.batch)) for t in pair)
        blocks = min(most, self._room(size + cache))
        # Copies have tensors of their own, and the ranks in common.
        others = (
            copy.deepcopy(block, {id(setting.ranks): setting.ranks}) for _ in range(1, blocks)
        )
        model.blocks = [block, *others]
        return Steps(model, model.cache(blocks, len(self.tokens)), self.prompt, self.tokens), size

    def _room(self, size: int) -> int:
        """How many blocks of this size fit, the first one being there already."""
        device = self.setting.device
        if device.type != "cuda":
            return sys.maxsize
        release()
        room = 1 + max(0, torch.cuda.mem_get_info(device)[0] - MARGIN) // size
        if self.setting.ranks.real:
            least = torch.tensor(room, device=device)
            dist.all_reduce(least, dist.ReduceOp.MIN)
            room = int(least)
        return room

    def _logits(self, steps: Steps) -> Tensor:
        """Of a token after the prompt, over a few blocks."""
        steps.fill()
        blocks = min(CHECKED, self.cap, len(steps.model.blocks))
        return steps.decode(blocks, len(self.tokens), steps.position()).float()

    def _step(
        self, steps: Steps, job: Callable[[int], object]
    ) -> tuple[float, float, float, float]:
        """Seconds of the whole model and of what is outside the blocks; seconds with the measured
        collectives; collectives in a block."""
        calls, blocks = self.setting.ranks.calls, len(steps.model.blocks)
        job(blocks)  # kernels are compiled and tuned
        calls.clear()
        job(blocks)
        said = list(calls)
        rest, some = (
            timed(partial(job, count), self.setting.device, self.args.steps)
            for count in (0, blocks)
        )
        seconds = rest + (some - rest) / blocks * self.total
        told = 0.0 if self.setting.ranks.real else sum(call.seconds for call in said)
        return seconds, rest, seconds + told / blocks * self.total, len(said) / blocks


NORMS = ("input", "post_attention")


def timed(job: Callable[[], object], device: torch.device, steps: int) -> float:
    """Median seconds, on a GPU of a graph's replay."""
    if device.type == "cpu":
        job()
        return statistics.median(clocked(job) for _ in range(steps))
    graph = captured(job)
    for _ in range(3):
        graph.replay()
    found = []
    for _ in range(steps):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(float(begin.elapsed_time(end)) * 1e-3)
    return statistics.median(found)


def collectives_run(job: Callable[[], object]) -> dict[str, int]:
    """The communication kernels that a profiler sees in a graph's replay, by kind."""
    graph = captured(job)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if "nccl" in event.name.lower()]
    kinds = [re.sub(r"^ncclDevKernel_|_.*|\(.*", "", name) for name in names]
    return dict(Counter(kinds))


def clocked(job: Callable[[], object]) -> float:
    started = time.perf_counter()
    job()
    return time.perf_counter() - started


def captured(job: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            job()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has threads of its own
        job()
    return graph


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0


def release() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


# The checkpoint.


def make_model(work: Path, shape: Shape, device: str) -> Path:
    """One block of this shape, made unless it is there."""
    sizes = {
        "hidden": shape.hidden,
        "intermediate": shape.intermediate,
        "heads": shape.heads,
        "kv-heads": shape.kv_heads,
        "head-dim": shape.head_dim,
        "vocab": shape.vocab,
    }
    model = work / "-".join(["block", *map(str, sizes.values())])
    if not model.exists():
        command = [sys.executable, str(Path(__file__).with_name("make_synthetic.py")), str(model)]
        command += [f"--{name}={size}" for name, size in sizes.items()]
        alone([*command, "--blocks=1", f"--device={device}"])
    return model


def convert(model: Path, tp: int) -> Path:
    """The model's converted form, made unless it is there."""
    out = model.with_name(f"{model.name}-tp-{tp}")
    if not out.exists():
        command = [sys.executable, "-m", "tpgptq_convert", "convert", "-q", "--no-verify"]
        alone([*command, "--tp", str(tp), str(model), str(out)])
    return out


def alone(command: Sequence[str]) -> None:
    """Run in a process that doesn't take itself for one of torchrun's."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment)


@contextmanager
def workplace(directory: Path | None) -> Iterator[Path]:
    """A directory for checkpoints, kept if it was named."""
    if directory:
        directory.mkdir(parents=True, exist_ok=True)
        yield directory
    else:
        with tempfile.TemporaryDirectory(prefix="bench-decode-") as scratch:
            yield Path(scratch)


# What is printed.


def tables(results: Sequence[Result], real: bool) -> Iterator[str]:
    """A table for every tp and batch."""
    for tp, batch in dict.fromkeys((result.tp, result.batch) for result in results):
        rows = [result for result in results if (result.tp, result.batch) == (tp, batch)]
        yield from table(rows, with_collectives=tp > 1 and not real)
        yield ""


def table(rows: Sequence[Result], with_collectives: bool) -> Iterator[str]:
    names = ["prefill, s", "decode, ms", "tokens/s"]
    if with_collectives:
        names += [f"{name}, with collectives of two H100s" for name in names]
    names += ["memory, GB", "collectives a block", "blocks run", "error"]
    yield f"| tp {rows[0].tp}, batch {rows[0].batch} | {' | '.join(names)} |"
    yield f"| --- |{' --: |' * len(names)}"
    for result in rows:
        if result.reason:
            yield f"| {result.row} | not run: {result.reason} |{' |' * (len(names) - 1)}"
            continue
        pairs = [(result.prefill, result.decode), (result.prefill_with, result.decode_with)]
        cells = [
            cell
            for prefill, decode in pairs[: 2 if with_collectives else 1]
            for cell in (f"{prefill:.4f}", f"{decode * 1e3:.3f}", f"{result.batch / decode:,.1f}")
        ]
        memory = "-" if result.memory is None else f"{result.memory / 1e9:.2f}"
        error = "-" if result.error is None else f"{result.error:.1e}"
        cells += [memory, f"{result.collectives:g}", str(result.blocks), error]
        yield f"| {result.row} | {' | '.join(cells)} |"


def facts(shape: Shape, device: torch.device, args: argparse.Namespace, real: bool) -> str:
    """What the numbers depend on."""
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    ranks = "every rank a process" if real else "one rank alone, without collectives"
    sizes = ", ".join(f"{name} {size}" for name, size in asdict(shape).items())
    return (
        f"{sizes}\n{where}, torch {torch.__version__}; {ranks}; prompt of {args.prompt}, "
        f"median of {args.steps}"
    )


def note(path: Path | None, about: str, results: Sequence[Result]) -> None:
    if path:
        rows = [asdict(result) for result in results]
        path.write_text(json.dumps({"facts": about, "results": rows}, indent=1))


def parse_args() -> tuple[argparse.Namespace, Shape, int, int]:
    """The options, the shape, the model's number of blocks, and how many of them may run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, help=f"sizes; default: {PRESET}")
    for size in ("hidden", "intermediate", "heads"):
        parser.add_argument(f"--{size}", type=int, help="needed without a preset")
    parser.add_argument("--kv-heads", type=int, help="default: heads")
    parser.add_argument("--head-dim", type=int, help="default: hidden / heads")
    parser.add_argument("--vocab", type=int, help="default: 32000")
    parser.add_argument("--blocks", type=int, help="run no more of them; default: all that fit")
    parser.add_argument("--tp", type=int, action="append", help="degree; repeatable; default: 2")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=1024, help="tokens")
    parser.add_argument("--steps", type=int, default=20, help="measured runs of each step")
    parser.add_argument("--rows", default="", help="only those that this regular expression finds")
    parser.add_argument("--check", action="store_true", help="compare the rows' logits")
    parser.add_argument("--profile", action="store_true", help="count NCCL's kernels in a step")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--vllm-library", type=Path, help="_C_stable_libtorch.abi3.so")
    parser.add_argument("--matmul248", type=Path, help="a Python file that has matmul248")
    parser.add_argument("--work", type=Path, help="keep the checkpoints here, and use them again")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.set_defaults(model_type="llama", group_size=128)
    args = parser.parse_args()
    if args.preset is None and args.hidden is None:
        args.preset = PRESET
    if args.preset and PRESETS[args.preset].model_type != "llama":
        parser.error(f"--preset {args.preset}: only Llama's blocks are built here")
    if args.prompt < 2 or min(args.batch) < 1:
        parser.error("--prompt must be 2 or more, --batch 1 or more")
    shape = shape_of(parser, args)
    total = PRESETS[args.preset].blocks if args.preset else shape.blocks
    args.tp = [int(os.environ["WORLD_SIZE"])] if "RANK" in os.environ else args.tp or [2]
    for tp in args.tp:
        if shape.heads % tp or shape.kv_heads % tp or shape.vocab % tp:
            parser.error(f"--tp {tp}: must divide the heads, kv heads and vocabulary")
    return args, shape, total, shape.blocks


def load_matmul248(path: Path | None) -> Callable[..., Tensor] | None:
    if path is None:
        return None
    spec = importlib.util.spec_from_file_location("matmul248", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Callable[..., Tensor] = module.matmul248
    return function


def join(device: torch.device) -> tuple[int, bool]:
    """This process's rank, and whether torchrun started it."""
    if "RANK" not in os.environ:
        return 0, False
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), True


def of_first(rank: int, real: bool, value: Callable[[], Any]) -> Any:
    """What rank 0 makes, on every rank; the others wait."""
    values = [value() if rank == 0 else None]
    if real:
        dist.broadcast_object_list(values)
    return values[0]


@torch.no_grad()
def measure(args: argparse.Namespace, shape: Shape, total: int, cap: int, work: Path) -> None:
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    rank, real = join(device)
    model = of_first(rank, real, lambda: make_model(work, shape, device.type))
    outs = of_first(rank, real, lambda: [convert(model, tp) for tp in args.tp])
    if args.vllm_library and cuda:
        torch.ops.load_library(str(args.vllm_library))
    dtype = torch.float16 if cuda else torch.float32
    about = facts(replace(shape, blocks=total), device, args, real)
    results: list[Result] = []
    for tp, out in zip(args.tp, outs, strict=True):
        setting = Setting(
            shape=shape,
            source=read_checkpoint(model),
            shards=runtime.Checkpoint(out).rank(rank),
            ranks=Ranks(tp, rank, real and tp > 1),
            device=device,
            dtype=dtype,
            vllm=args.vllm_library is not None,
            matmul248=load_matmul248(args.matmul248) if cuda else None,
        )
        bench = Bench(setting, args, total, cap)
        for way in ways(dtype):
            if re.search(args.rows, way.name):
                results += bench.run(way)
                if rank == 0:
                    print(results[-1], file=sys.stderr, flush=True)
                    note(args.json, about, results)
    if rank == 0:
        print(about, end="\n\n")
        print("\n".join(tables(results, real)))
    if real:
        dist.destroy_process_group()


def main() -> None:
    args, shape, total, cap = parse_args()
    with workplace(args.work) as work:
        measure(args, shape, total, cap, work)


if __name__ == "__main__":
    main()
