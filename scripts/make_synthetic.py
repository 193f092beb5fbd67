"""Make a synthetic act-order GPTQ checkpoint of any Llama shape, fast, to try sizes and speed on.

The weights are random 4-bit values with scales that keep the model finite; it writes nonsense. The
rest is as in real desc_act checkpoints: every group has group_size rows, layers that share an
input share one order of rows, and the rows of o_proj cluster by head. There is no tokenizer. With
--plain it is a desc_act: false checkpoint instead, whose groups are consecutive rows.
A few tensors at a time are in memory; the same options, device and torch release give the same
bytes.

Usage:

    python scripts/make_synthetic.py OUT --preset llama-2-7b --blocks 8
    python scripts/make_synthetic.py OUT --hidden 512 --intermediate 1408 --blocks 2 --heads 8 \\
        --kv-heads 4 --model-type qwen3 --asym --group-size 64
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpgptq_convert.families import FAMILIES, Axis, Linear
from tpgptq_convert.manifest import WEIGHTS_INDEX
from tpgptq_convert.source import TensorSpec
from tpgptq_convert.writer import Parts, Writing, write_json

BITS = 4
PACK = 32 // BITS
SYMMETRIC = 0x77777777  # eight fields of 7, which stands for a zero point of 8
# Standard deviation of a value less its zero point: the value uniform in 0..15, the zero point 8,
# or uniform in 1..15.
STEP, STEP_ASYM = 4.64, 6.33
# How far heads differ in activation energy, as a multiple of how far channels of one head do; the
# rows of a group then spread over the ranks as unevenly as those of SmolLM2-135M's o_proj.
HEAD_SPREAD = 1.5
AHEAD = 8  # tensors that are made while others are written
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

AXES = (Axis.HIDDEN, Axis.QUERY, Axis.KV, Axis.MLP)

Make = Callable[[], Tensor]


@dataclass(frozen=True)
class Shape:
    """The sizes of a model."""

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int = 32000
    model_type: str = "llama"

    def width(self, axis: Axis) -> int:
        """Channels of a space of activations."""
        return {
            Axis.HIDDEN: self.hidden,
            Axis.QUERY: self.heads * self.head_dim,
            Axis.KV: self.kv_heads * self.head_dim,
            Axis.MLP: self.intermediate,
        }[axis]


PRESETS = {
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32, 128),
    "llama-2-13b": Shape(5120, 13824, 40, 40, 40, 128),
    "llama-2-70b": Shape(8192, 28672, 80, 64, 8, 128),
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128, 128256),
    "llama-3-70b": Shape(8192, 28672, 80, 64, 8, 128, 128256),
    "mistral-7b": Shape(4096, 14336, 32, 32, 8, 128, 32000, "mistral"),
    "qwen2.5-7b": Shape(3584, 18944, 28, 28, 4, 128, 152064, "qwen2"),
    "qwen3-8b": Shape(4096, 12288, 36, 32, 8, 128, 151936, "qwen3"),
    "qwen3-32b": Shape(5120, 25600, 64, 64, 8, 128, 151936, "qwen3"),
}


class Maker:
    """Names, specs and contents of a checkpoint's tensors, in the order of its files."""

    def __init__(
        self, shape: Shape, group_size: int, asym: bool, plain: bool, seed: int, device: str
    ) -> None:
        self.shape, self.group_size, self.asym, self.plain = shape, group_size, asym, plain
        self.device = torch.device(device)
        self.family = FAMILIES[shape.model_type]
        self.biased = self.family.biased({})
        self.rng = torch.Generator(device).manual_seed(seed)

    def tensors(self) -> Iterator[tuple[str, TensorSpec, Make]]:
        """Every tensor: its name, its spec and what makes it, to be called in this order."""
        for name in self.family.tensors:
            yield name, *self._dense(name)
        for index in range(self.shape.blocks):
            prefix = self.family.block(index)
            for name in self.family.block_tensors:
                yield f"{prefix}.{name}", *self._dense(name)
            orders: dict[tuple[Axis, bool], Tensor] = {}  # q, k and v share one; gate and up too
            for linear in self.family.linears:
                for part, spec, make in self._linear(linear, orders):
                    yield f"{prefix}.{linear.name}.{part}", spec, make

    def _dense(self, name: str) -> tuple[TensorSpec, Make]:
        """A tensor that is not quantised: an embedding, the head, or a norm."""
        hidden = self.shape.hidden
        if "norm" in name:
            shape = (self.shape.head_dim if name.startswith("self_attn.") else hidden,)
            return TensorSpec("F16", shape), lambda: 1 + self._uniform(shape, 0.1)
        table = (self.shape.vocab, hidden)
        return TensorSpec("F16", table), lambda: self._uniform(table, hidden**-0.5)

    def _linear(
        self, linear: Linear, orders: dict[tuple[Axis, bool], Tensor]
    ) -> Iterator[tuple[str, TensorSpec, Make]]:
        """The tensors of a quantised layer, by the last part of their names."""
        widths = {axis.name: self.shape.width(axis) for axis in AXES}
        k, n = widths[linear.reads.name], linear.width(widths)
        size = k if self.group_size == -1 else min(self.group_size, k)
        groups = -(-k // size)
        scale = k**-0.5 / (STEP_ASYM if self.asym else STEP)

        def g_idx() -> Tensor:
            key = linear.reads, Axis.MLP in linear.writes
            if key not in orders:
                orders[key] = self._order(k, linear.reads)
            out = torch.empty(k, dtype=torch.int32, device=self.device)
            out[orders[key]] = torch.arange(k, dtype=torch.int32, device=self.device) // size
            return out

        words, zeros = (k // PACK, n), (groups, n // PACK)
        yield "qweight", TensorSpec("I32", words), lambda: self._words(words)
        yield "qzeros", TensorSpec("I32", zeros), lambda: self._zeros(zeros)
        yield (
            "scales",
            TensorSpec("F16", (groups, n)),
            lambda: scale * (1 + self._uniform((groups, n), 0.2)),
        )
        yield "g_idx", TensorSpec("I32", (k,)), g_idx
        if linear.name in self.biased:
            yield "bias", TensorSpec("F16", (n,)), lambda: self._uniform((n,), 0.1)

    def _order(self, k: int, axis: Axis) -> Tensor:
        """Rows by falling activation energy, or as they stand."""
        if self.plain:
            return torch.arange(k, device=self.device)
        energy = torch.randn(k, generator=self.rng, device=self.device)
        if axis is Axis.QUERY:
            heads = torch.randn(self.shape.heads, generator=self.rng, device=self.device)
            energy += HEAD_SPREAD * heads.repeat_interleave(self.shape.head_dim)
        return energy.argsort(descending=True, stable=True)

    def _words(self, shape: tuple[int, int]) -> Tensor:
        """Uniform int32 words, drawn 64 bits at a time."""
        count = shape[0] * shape[1]
        pairs = torch.empty(-(-count // 2), dtype=torch.int64, device=self.device)
        pairs.random_(-(2**63), None, generator=self.rng)
        return pairs.view(torch.int32)[:count].view(shape)

    def _zeros(self, shape: tuple[int, int]) -> Tensor:
        """Zero points as the "gptq" format stores them, one less than they are."""
        if not self.asym:
            return torch.full(shape, SYMMETRIC, dtype=torch.int32)
        options: Any = {"dtype": torch.int32, "device": self.device}
        fields = torch.randint(0, 15, (*shape, PACK), generator=self.rng, **options)
        return (fields << BITS * torch.arange(PACK, **options)).sum(-1, dtype=torch.int32)

    def _uniform(self, shape: tuple[int, ...], deviation: float) -> Tensor:
        """fp16 around 0 with this standard deviation."""
        bound = deviation * 3**0.5
        values = torch.empty(shape, dtype=torch.float16, device=self.device)
        return values.uniform_(-bound, bound, generator=self.rng)


def write_weights(directory: Path, maker: Maker, max_bytes: int) -> int:
    """Write the weight files, and their index if they are several; returns their bytes."""
    specs = {name: spec for name, spec, _ in maker.tensors()}
    with ThreadPoolExecutor() as pool:
        parts = Parts(directory, part_name, specs, max_bytes, pool)
        writing: deque[list[Writing]] = deque()
        for name, _, make in maker.tensors():
            writing.append(parts.write({name: make().cpu().numpy()}))
            for future in writing.popleft() if len(writing) > AHEAD else ():
                future.result()
        for part in parts.parts:
            part.finish()
    if len(parts.parts) > 1:
        write_json(directory / WEIGHTS_INDEX, parts.index)
    return parts.total_size


def part_name(part: int, parts: int) -> str:
    return "model.safetensors" if parts == 1 else f"model-{part + 1:05}-of-{parts:05}.safetensors"


def model_config(shape: Shape, quant: dict[str, Any]) -> dict[str, Any]:
    """config.json as Transformers reads it."""
    return {
        "architectures": [ARCHITECTURES[shape.model_type]],
        "model_type": shape.model_type,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vocab_size": shape.vocab,
        "quantization_config": quant | {"quant_method": "gptq"},
    }


def quantize_config(group_size: int, asym: bool, plain: bool) -> dict[str, Any]:
    """quantize_config.json as AutoGPTQ writes it."""
    return {
        "bits": BITS,
        "group_size": group_size,
        "damp_percent": 0.01,
        "desc_act": not plain,
        "static_groups": False,
        "sym": not asym,
        "true_sequential": True,
    }


def parse_args() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="directory to make")
    parser.add_argument("--preset", choices=PRESETS, help="sizes of a known model")
    for size in ("hidden", "intermediate", "blocks", "heads"):
        parser.add_argument(f"--{size}", type=int, help="needed without --preset")
    parser.add_argument("--kv-heads", type=int, help="default: heads")
    parser.add_argument("--head-dim", type=int, help="default: hidden / heads")
    parser.add_argument("--vocab", type=int, help="default: 32000")
    parser.add_argument("--model-type", choices=ARCHITECTURES, help="default: llama")
    parser.add_argument("--group-size", type=int, default=128, help="-1: one group a column")
    parser.add_argument("--asym", action="store_true", help="random zero points")
    parser.add_argument("--plain", action="store_true", help="desc_act: false")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where random numbers are drawn")
    parser.add_argument("--max-shard-size", type=int, default=5 * 10**9, help="bytes")
    return parser, parser.parse_args()


def shape_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Shape:
    """The preset's sizes, with those replaced that options name."""
    names = Shape.__dataclass_fields__
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.preset:
        shape = Shape(**vars(PRESETS[args.preset]) | given)
    else:
        missing = [n for n in ("hidden", "intermediate", "blocks", "heads") if n not in given]
        if missing:
            parser.error(f"needs --preset, or also {', '.join('--' + name for name in missing)}")
        defaults = {"kv_heads": args.heads, "head_dim": args.hidden // args.heads}
        shape = Shape(**defaults | given)
    for axis in AXES:
        if shape.width(axis) <= 0 or shape.width(axis) % PACK:
            parser.error(f"the {axis.value} width, {shape.width(axis)}, is not a multiple of 8")
    if args.group_size != -1 and (args.group_size <= 0 or args.group_size % PACK):
        parser.error("--group-size must be -1 or a multiple of 8")
    return shape


def main() -> None:
    parser, args = parse_args()
    shape = shape_of(parser, args)
    if args.out.exists():
        parser.error(f"{args.out} exists")
    args.out.mkdir(parents=True)
    started = time.monotonic()
    quant = quantize_config(args.group_size, args.asym, args.plain)
    write_json(args.out / "config.json", model_config(shape, quant))
    write_json(args.out / "quantize_config.json", quant)
    maker = Maker(shape, args.group_size, args.asym, args.plain, args.seed, args.device)
    size = write_weights(args.out, maker, args.max_shard_size)
    seconds = time.monotonic() - started
    print(f"{args.out}: {size / 1e9:.3f} GB in {seconds:.1f} s")


if __name__ == "__main__":
    main()
