"""OUT against MODEL, without the planner.

Two proofs, each from the stored shards, their perms and the manifest alone:

- exact: with the index file, every stored value is compared with the source's, bit for bit; every
  source row and column is counted; every rank's input is traced to the shards that produce it;
- functional: without the index file, each block is computed in float64 on random input, from the
  source and as the sum over the ranks, with a real softmax and the model's own activation.
"""

from __future__ import annotations

import filecmp
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tpgptq_convert.checkpoint import Checkpoint, IntArray, Layer
from tpgptq_convert.errors import SourceError
from tpgptq_convert.families import Axis
from tpgptq_convert.manifest import (
    INDEX,
    MANIFEST,
    WEIGHTS_INDEX,
    listed_files,
    read_manifest,
    weight_files,
    weights_digest,
)
from tpgptq_convert.repack import Packed, Unpacked, gather, workers, zero_points
from tpgptq_convert.source import SafetensorsFile, read_json
from tpgptq_convert.writer import checksum

TOKENS = 5
TOLERANCE = 1e-9  # of the largest output; float64 rounding stays far under it
FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def verify(
    checkpoint: Checkpoint,
    out: Path,
    device: torch.device,
    progress: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """Every difference between OUT and MODEL, one line each; none if OUT is proven.

    Raises OutputError if OUT is no output of this tool, or of a version that it doesn't know.
    """
    manifest = read_manifest(out)
    mismatches = list(_check_files(out, manifest))
    try:
        stored = _Stored(out, manifest)
        mismatches += _check_manifest(checkpoint, out, manifest)
        mismatches += _check_shared(checkpoint, stored)
        mismatches += _check_names(checkpoint, stored)
        mismatches += _check_index(out, stored)
        mismatches += _check_carried(checkpoint, out)
        if set(manifest["modules"]) == {layer.name for layer in checkpoint.layers}:
            with workers(device) as pool:
                check = partial(_check_block, checkpoint, stored, device)
                for block, found in zip(
                    checkpoint.blocks, pool.map(check, checkpoint.blocks), strict=True
                ):
                    mismatches += found
                    progress(sum(map(checkpoint.source_bytes, block)))
    except SourceError as error:  # a file of OUT that can't be read at all
        mismatches += error.problems
    return mismatches


def _check_block(
    checkpoint: Checkpoint, stored: _Stored, device: torch.device, layers: Sequence[Layer]
) -> list[str]:
    return _Block(checkpoint, stored, layers, device).mismatches()


def _check_files(out: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    listed = listed_files(manifest)
    for name, stated in listed.items():
        if not (out / name).is_file():
            yield f"{name}: missing; the manifest lists it"
        elif (actual := checksum(out / name)) != stated:
            what = "bytes" if actual["bytes"] != stated.get("bytes") else "sha256"
            yield f"{name}: {what} is {actual[what]}; the manifest says {stated.get(what)}"
    if not (out / INDEX).is_file() and INDEX not in listed:
        yield f"{INDEX}: missing; only the functional proof was made"
    for path in sorted(out.glob("*.safetensors")):
        if path.name not in listed:
            yield f"{path.name}: not in the manifest"


def _check_manifest(
    checkpoint: Checkpoint, out: Path, manifest: Mapping[str, Any]
) -> Iterator[str]:
    """What servers read before any weight: the manifest and config.json."""
    quant, geometry, tp = checkpoint.quant, checkpoint.geometry, manifest["tp"]
    modules = manifest["modules"]
    names = {layer.name for layer in checkpoint.layers}
    if set(modules) != names:
        yield (
            f"{MANIFEST}: has {len(modules)} layers, {len(names & set(modules))} of them among the "
            f"{len(names)} of {checkpoint.name}; the output says that it was made from "
            f"{manifest['source'].get('name')!r}"
        )
        return
    width = geometry.intermediate
    for layer in checkpoint.layers:
        module, parallel = modules[layer.name], layer.linear.parallel
        if module["parallel"] != parallel:
            yield f"{layer.name}: parallel is {module['parallel']!r}; must be {parallel!r}"
        if layer.linear.reads is Axis.MLP:
            width = tp * module["in_features"]
    same = {
        "bits": quant.bits,
        "checkpoint_format": quant.checkpoint_format,
        "tp": tp,
        "layout": manifest["layout"],
        "sym": manifest.get("sym") if quant.sym is None else quant.sym,
    }
    config = read_json(out / "config.json") if (out / "config.json").is_file() else {}
    heads = {"query": geometry.heads, "kv": geometry.kv_heads}
    heads |= {f"padded_{key}": count for key, count in heads.items()}
    for file, actual, expected in (
        (MANIFEST, manifest, same | {"model_type": checkpoint.config["model_type"]}),
        (f"{MANIFEST} heads", manifest["heads"], heads),
        (f"{MANIFEST} intermediate", manifest["intermediate"],
         {"size": geometry.intermediate, "padded": width}),
        ("config.json quantization_config", config.get("quantization_config", {}),
         same | {"quant_method": "tpgptq", "desc_act": False, "group_size": quant.group_size,
                 "weights_sha256": weights_digest(manifest)}),
        ("config.json", {k: v for k, v in config.items() if k != "quantization_config"},
         {k: v for k, v in checkpoint.family.resized(checkpoint.config, width).items()
          if k != "quantization_config"}),
    ):  # fmt: skip
        stated = actual if isinstance(actual, Mapping) else {}
        for key, value in expected.items():
            if json.dumps(stated.get(key)) != json.dumps(value):
                yield f"{file}: {key} is {stated.get(key)!r}; must be {value!r}"
    for key in sorted(set(config) - set(checkpoint.config) - {"quantization_config"}):
        yield f"config.json: {key} is {config[key]!r}; the source doesn't have it"


def _check_shared(checkpoint: Checkpoint, stored: _Stored) -> Iterator[str]:
    for name in checkpoint.shared:
        tensor = stored.shared(name)
        if tensor is None:
            yield f"{name}: missing from the shared files"
        elif not _same_bits(tensor, checkpoint.source.tensor(name)):
            yield f"{name}: differs from the source's"


def _check_names(checkpoint: Checkpoint, stored: _Stored) -> Iterator[str]:
    """No file holds a tensor that the format doesn't put there, or one that another file has."""
    own = {f"{layer.name}.{part}" for layer in checkpoint.layers for part in stored.parts(layer)}
    for rank, files in stored.files.items():
        allowed = own if rank is not None else set(checkpoint.shared)
        if len(stored.files) == 1:  # merged
            allowed = allowed | own
        seen: set[str] = set()
        for file in files:
            for name in file.specs:
                if name not in allowed:
                    yield f"{name}: doesn't belong into {file.path.name}"
                if name in seen:
                    yield f"{name}: stands in {file.path.name} and in a file before it"
                seen.add(name)


def _check_index(out: Path, stored: _Stored) -> Iterator[str]:
    """The index through which loaders of plain checkpoints find the tensors that all ranks read."""
    path = out / WEIGHTS_INDEX
    if path.is_file():
        found = {name: file.path.name for file in stored.files[None] for name in file.specs}
        if read_json(path).get("weight_map") != found:
            yield f"{path.name}: weight_map doesn't say where the tensors are"


def _check_carried(checkpoint: Checkpoint, out: Path) -> Iterator[str]:
    """Tokenizer, chat template, licence: the source's own."""
    for path in checkpoint.source.carried_files():
        if not (out / path).is_file():
            yield f"{path}: missing; the source has it"
        elif not filecmp.cmp(out / path, checkpoint.source.directory / path, shallow=False):
            yield f"{path}: differs from the source's"


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    """The same bits as integers, so that NaN equals NaN and 0 differs from -0."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])


@dataclass(frozen=True, eq=False)
class _Shard:
    """One rank's stored slice of a layer, unpacked."""

    weights: Unpacked
    group_size: int
    perm: Tensor  # (K_r,), the identity where none is stored
    rows: IntArray  # source row of each stored row, -1 for padding; empty without an index file
    cols: IntArray


class _Stored:
    """The tensors of an output, by layer and rank, whichever its layout."""

    def __init__(self, out: Path, manifest: Mapping[str, Any]) -> None:
        self.manifest = manifest
        self.tp: int = manifest["tp"]
        self.files: dict[int | None, list[SafetensorsFile]] = {
            rank: [SafetensorsFile(out / name) for name in files]
            for rank, files in weight_files(manifest)
        }
        self.has_index = (out / INDEX).is_file()
        self._index = SafetensorsFile(out / INDEX) if self.has_index else None

    def _find(self, name: str, rank: int | None) -> Tensor | None:
        for file in self.files[rank if rank in self.files else None]:
            if name in file.specs:
                return file.tensor(name)
        return None

    def parts(self, layer: Layer) -> list[str]:
        """The tensors that a rank must store of a layer."""
        parts = ["qweight", "qzeros", "scales"]
        module = self.manifest["modules"].get(layer.name, {})
        parts += ["perm"] if module.get("perm") else []
        return parts + (["bias"] if layer.bias and layer.linear.parallel == "column" else [])

    def shared(self, name: str) -> Tensor | None:
        return self._find(name, None)

    def tensor(self, layer: str, part: str, rank: int) -> Tensor | None:
        """One rank's slice of a stored tensor, cut out where all ranks' are merged."""
        tensor = self._find(f"{layer}.{part}", rank)
        module = self.manifest["modules"][layer]
        if tensor is None or rank in self.files:
            return tensor
        if module["parallel"] == "row":
            dim, pieces = 0, self.tp
        else:
            if part == "perm":
                return tensor
            dim, scales = tensor.dim() - 1, self._find(f"{layer}.scales", None)
            columns = scales.shape[-1] if scales is not None and scales.dim() else 0
            pieces = columns // module["out_features"]
        if tensor.dim() == 0 or pieces == 0 or tensor.shape[dim] % pieces:
            raise _DamagedError(f"{part} {list(tensor.shape)} can't be cut for {self.tp} ranks")
        size = tensor.shape[dim] // pieces
        return tensor.narrow(dim, rank * pieces // self.tp * size, size)

    def origin(self, name: str, rank: int) -> IntArray | None:
        """One rank's source rows or columns from the index file."""
        if self._index is None or name not in self._index.specs:
            return None
        spec, vectors = self._index.specs[name], self._index.array(name)
        if spec.dtype != "I32" or len(spec.shape) != 2 or spec.shape[0] not in (1, self.tp):
            raise _DamagedError(f"{INDEX} is {spec.dtype} {list(spec.shape)}; must be I32, by rank")
        vector: IntArray = vectors[min(rank, len(vectors) - 1)]
        return vector


class _Block:
    """One block of the source and its shards on every rank."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        stored: _Stored,
        layers: Sequence[Layer],
        device: torch.device,
    ) -> None:
        self.checkpoint, self.stored, self.layers, self.device = checkpoint, stored, layers, device
        self.quant, self.geometry = checkpoint.quant, checkpoint.geometry
        self.source = {layer.name: self._load_source(layer) for layer in layers}
        self.shards: dict[str, list[_Shard]] = {}
        self.damaged: list[str] = []
        for layer in layers:
            self.shards[layer.name] = []
            for rank in range(stored.tp):
                try:
                    self.shards[layer.name].append(self._load_shard(layer, rank))
                except _DamagedError as error:
                    self.damaged.append(f"{layer.name}: rank {rank}: {error}")

    def mismatches(self) -> list[str]:
        """Every difference in this block, one line each."""
        if self.damaged:
            return self.damaged
        found = []
        for layer in self.layers if self.stored.has_index else ():
            for rank, shard in enumerate(self.shards[layer.name]):
                found += [
                    f"{layer.name}: rank {rank}: {what}" for what in self._exact(layer, rank, shard)
                ]
            found += [f"{layer.name}: {what}" for what in self._counts(layer)]
        return found + list(self._functional())

    def _load_source(self, layer: Layer) -> Unpacked:
        def tensor(part: str) -> Tensor:
            return self.checkpoint.source.tensor(f"{layer.name}.{part}").to(self.device)

        bias = tensor("bias") if layer.bias else None
        packed = Packed(tensor("qweight"), tensor("qzeros"), tensor("scales"), bias)
        return packed.unpack(self.quant)

    def _load_shard(self, layer: Layer, rank: int) -> _Shard:
        stored, module = self.stored, self.stored.manifest["modules"][layer.name]
        k, n, size = module["in_features"], module["out_features"], module["group_size"]
        pack = self.quant.pack_factor
        shapes: dict[str, tuple[int, ...]] = {
            "qweight": (k // pack, n),
            "qzeros": (k // size, n // pack),
            "scales": (k // size, n),
            "perm": (k,),
            "bias": (n,),
        }
        dtypes: dict[str, torch.dtype] = {
            part: self.checkpoint.source.tensor(f"{layer.name}.{part}").dtype
            for part in ("scales", "bias")
            if part in stored.parts(layer)
        }
        tensors = {}
        for part in stored.parts(layer):
            shape = shapes[part]
            tensor = stored.tensor(layer.name, part, rank)
            dtype = dtypes.get(part, torch.int32)
            if tensor is None:
                raise _DamagedError(f"{part} is missing")
            if tensor.shape != shape or tensor.dtype != dtype:
                raise _DamagedError(
                    f"{part} is {tensor.dtype} {list(tensor.shape)}; must be {dtype} {list(shape)}"
                )
            tensors[part] = tensor.to(self.device)
        bias = tensors.pop("bias", None)
        perm = tensors.pop("perm", torch.arange(k, device=self.device)).long()
        width = self._input_width(layer)
        if int(perm.min()) < 0 or int(perm.max()) >= width:
            raise _DamagedError(f"perm has entries outside 0 to {width - 1}, the rank's input")
        return _Shard(
            weights=Packed(**tensors, bias=bias).unpack(self.quant),
            group_size=size,
            perm=perm,
            rows=self._origin(layer, "rows", rank, k, layer.in_features),
            cols=self._origin(layer, "cols", rank, n, layer.out_features),
        )

    def _input_width(self, layer: Layer) -> int:
        """Channels of a rank's input to a layer, from the manifest."""
        if layer.linear.reads is Axis.HIDDEN:
            return layer.in_features
        producer = self._writers(layer.linear.reads)[0]
        width: int = self.stored.manifest["modules"][producer.name]["out_features"]
        return width

    def _writers(self, axis: Axis) -> list[Layer]:
        return [layer for layer in self.layers if layer.linear.writes is axis]

    def _origin(self, layer: Layer, what: str, rank: int, size: int, limit: int) -> IntArray:
        if not self.stored.has_index:
            return np.empty(0, np.int32)
        vector = self.stored.origin(f"{layer.name}.{what}", rank)
        if vector is None:
            raise _DamagedError(f"{what} are missing from {INDEX}")
        if vector.shape != (size,) or vector.min() < -1 or vector.max() >= limit:
            raise _DamagedError(
                f"{what} in {INDEX} have shape {list(vector.shape)} and values {vector.min()} to "
                f"{vector.max()}; must be {size} values from -1 to {limit - 1}"
            )
        return vector

    # The exact proof.

    def _exact(self, layer: Layer, rank: int, shard: _Shard) -> Iterator[str]:
        """Every stored value of one shard against the source's."""
        own, source = shard.weights, self.source[layer.name]
        real_rows, real_cols = (
            np.flatnonzero(vector >= 0).astype(np.int32) for vector in (shard.rows, shard.cols)
        )
        rows, cols = shard.rows[real_rows], shard.cols[real_cols]
        stored = gather(own.values, real_rows, real_cols)
        if not torch.equal(stored, gather(source.values, rows, cols)):
            yield "qweight holds values that differ from the source's"

        # Every group of the shard beside the source group of each of its rows.
        pairs = np.stack((real_rows // shard.group_size, layer.g_idx[rows]))
        stored_groups, groups = np.unique(pairs, axis=1)
        for part in ("zeros", "scales"):
            stored = gather(_bits(getattr(own, part)), stored_groups, real_cols)
            if not torch.equal(stored, gather(_bits(getattr(source, part)), groups, cols)):
                name = "qzeros" if part == "zeros" else part
                yield f"{name} of its rows' groups differ from the source's"

        padding, absent = (
            torch.from_numpy(np.flatnonzero(vector < 0)).to(self.device)
            for vector in (shard.rows, shard.cols)
        )
        group = padding // shard.group_size
        steps = own.values[padding] - zero_points(own.zeros, self.quant.checkpoint_format)[group]
        if ((steps != 0) & (own.scales[group] != 0)).any():
            yield "padding rows are not exactly zero"
        if (own.scales[:, absent] != 0).any():
            yield "padding columns are not exactly zero"
        if own.bias is not None and source.bias is not None:
            if not np.array_equal(_bits(own.bias).cpu()[real_cols], _bits(source.bias).cpu()[cols]):
                yield "bias differs from the source's"
            if (own.bias[absent] != 0).any():
                yield "bias of padding columns is not zero"

        for feed in self._feeds(layer, rank):
            fed = feed[shard.perm.cpu().numpy()]
            wrong = np.flatnonzero((shard.rows >= 0) & (fed != shard.rows))
            if len(wrong):
                j = wrong[0]
                yield (
                    f"perm feeds {len(wrong)} rows from the wrong input, the first row {j} from "
                    f"channel {fed[j]} instead of {shard.rows[j]}"
                )

    def _feeds(self, layer: Layer, rank: int) -> list[IntArray]:
        """The source channels of a rank's input, according to every layer that produces it."""
        if layer.linear.reads is Axis.HIDDEN:
            return [np.arange(layer.in_features, dtype=np.int32)]
        return [self.shards[writer.name][rank].cols for writer in self._writers(layer.linear.reads)]

    def _counts(self, layer: Layer) -> Iterator[str]:
        """Every source row and column is kept once."""
        shards = self.shards[layer.name]
        copies = 1
        if layer.linear.writes is Axis.KV:
            copies = max(1, self.stored.tp // self.geometry.kv_heads)
        rows = np.stack([_count(shard.rows, layer.in_features) for shard in shards])
        cols = np.stack([_count(shard.cols, layer.out_features) for shard in shards])
        if layer.linear.parallel == "column":
            good = (rows == 1).all(), (cols.sum(axis=0) == copies).all()
        else:
            good = (rows.sum(axis=0) == 1).all(), (cols == 1).all()
        for what, ok in zip(("rows", "columns"), good, strict=True):
            if not ok:
                yield f"its ranks don't keep every source {what[:-1]} exactly once"

    # The functional proof: no index file from here on.

    def _functional(self) -> Iterator[str]:
        """The sum over the ranks against the source's block, in float64, on random input."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(TOKENS, self.geometry.hidden, dtype=torch.float64, generator=generator)
        x = x.to(self.device)
        for output in (Axis.QUERY, Axis.MLP):
            layer = next(layer for layer in self.layers if layer.linear.reads is output)
            expected = self._half(output, x, None)
            ranks = [self._half(output, x, rank) for rank in range(self.stored.tp)]
            summed = torch.stack(ranks).sum(dim=0)
            error, largest = (summed - expected).abs().max(), expected.abs().max()
            if not error <= TOLERANCE * largest:
                yield (
                    f"{layer.name}: the sum over the ranks differs from the source's block by "
                    f"{error:.1e}; its largest value is {largest:.1e}"
                )

    def _half(self, axis: Axis, x: Tensor, rank: int | None) -> Tensor:
        """Attention or MLP: what one rank contributes, or the source (rank None); (T, hidden).

        The row-parallel bias is left out: it is a shared tensor, and added after the sum.
        """
        inner = [self._apply(layer, x, rank) for layer in self._writers(axis)]
        if axis is Axis.QUERY:
            inner += [self._apply(layer, x, rank) for layer in self._writers(Axis.KV)]
            mixed = self._attention(*inner)
        else:
            gate, up = inner
            mixed = FUNCTIONS[self.geometry.activation](gate) * up
        reader = next(layer for layer in self.layers if layer.linear.reads is axis)
        return self._apply(reader, mixed, rank)

    def _apply(self, layer: Layer, x: Tensor, rank: int | None) -> Tensor:
        """A layer's product, and its bias if it is column-parallel."""
        if rank is None:
            weights = self.source[layer.name]
            counts = np.bincount(layer.g_idx, minlength=layer.groups).tolist()
            order = torch.from_numpy(np.argsort(layer.g_idx, kind="stable")).to(self.device)
            values, x = weights.values.index_select(0, order), x[:, order]
        else:
            shard = self.shards[layer.name][rank]
            weights, values, x = shard.weights, shard.weights.values, x[:, shard.perm]
            counts = [shard.group_size] * len(weights.scales)
        zeros = zero_points(weights.zeros, self.quant.checkpoint_format)
        out = x.new_zeros(len(x), values.shape[1])
        # Group by group, so that only one group's weight is ever in float64.
        for inputs, of_group, zero, scale in zip(
            x.split(counts, dim=1), values.split(counts), zeros, weights.scales, strict=True
        ):
            out += inputs @ of_group.to(x.dtype).sub_(zero).mul_(scale)
        if weights.bias is not None and layer.linear.parallel == "column":
            out = out + weights.bias.double()
        return out

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal softmax attention with rotary embedding, (T, heads * head_dim)."""
        q, k, v = (t.unflatten(1, (-1, self.geometry.head_dim)).transpose(0, 1) for t in (q, k, v))
        q, k = (_rotate(self._head_norm(t, name)) for t, name in ((q, "q_norm"), (k, "k_norm")))
        k, v = (t.repeat_interleave(len(q) // len(k), dim=0) for t in (k, v))
        return (
            functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            .transpose(0, 1)
            .flatten(1)
        )

    def _head_norm(self, heads: Tensor, name: str) -> Tensor:
        """The per-head norm that some models apply to queries and keys; (heads, T, head_dim)."""
        block = self.layers[0].name.removesuffix(self.layers[0].linear.name)
        full = f"{block}self_attn.{name}.weight"
        if full not in self.checkpoint.shared:
            return heads
        weight = self.checkpoint.source.tensor(full).to(heads)
        return functional.rms_norm(heads, (heads.shape[-1],), weight)


class _DamagedError(Exception):
    """A stored tensor that can't be compared at all."""


def _count(vector: IntArray, size: int) -> IntArray:
    return np.bincount(vector[vector >= 0], minlength=size).astype(np.int32)


def _rotate(x: Tensor) -> Tensor:
    """Rotary position embedding, (heads, T, head_dim): it ties channel i to channel i + d/2."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[1], device=x.device)[:, None] * frequencies.to(x.dtype)
    first, second = x[..., :half], x[..., half : 2 * half]
    cos, sin = angles.cos(), angles.sin()
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*rotated, x[..., 2 * half :]), dim=-1)
