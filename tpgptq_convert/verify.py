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
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tpgptq_convert.checkpoint import Checkpoint, IntArray, Layer
from tpgptq_convert.config import QUANT_FILES, QuantConfig, words_of
from tpgptq_convert.errors import SourceError
from tpgptq_convert.families import Axis, Cut
from tpgptq_convert.folded import gptq_config
from tpgptq_convert.manifest import (
    INDEX,
    MANIFEST,
    RUNTIME,
    TOOL,
    WEIGHTS_INDEX,
    bits_of,
    format_version,
    intermediate_sizes,
    listed_files,
    read_manifest,
    weight_files,
    weights_digest,
    wrong_names,
)
from tpgptq_convert.packing import pack_rows, unpack_cols, unpack_rows, zero_points
from tpgptq_convert.processes import Processes
from tpgptq_convert.progress import Progress, silent
from tpgptq_convert.repack import Array, Device, open_device, read_layer
from tpgptq_convert.source import (
    Allocate,
    SafetensorsFile,
    TensorSpec,
    as_tensor,
    pageable,
    read_json,
)
from tpgptq_convert.threads import cores, threads
from tpgptq_convert.writer import checksum

TOKENS = 5
TOLERANCE = 1e-9  # of the largest output; rounding stays far under it
Places = NDArray[np.int64]  # columns of a layer, or groups of its rows
LIMBS, LIMB_BITS = 4, 10  # 40 bits of an input; tf32 would hold ten
MANTISSA = 24  # bits of an integer that float32 holds
THREADS = 3  # each holds a layer, several times as large when unpacked
SLICE = {"cpu": 1 << 19, "cuda": 1 << 24}  # values that are unpacked at a time
FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    **dict.fromkeys(
        ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
        lambda x: functional.gelu(x, approximate="tanh"),
    ),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}


def verify(
    checkpoint: Checkpoint,
    out: Path,
    device: str = "cpu",
    progress: Progress = silent,
    processes: Processes = Processes(),  # noqa: B008  # it can't be changed
) -> list[str]:
    """Every difference between OUT and MODEL, one line each; none if OUT is proven.

    Several processes share the files and blocks, and all return what all found. Raises OutputError
    if OUT is no output of this tool, or of a version that it doesn't know.
    """
    manifest = processes.agree(lambda: read_manifest(out))

    def check() -> list[str]:
        return _check(checkpoint, out, manifest, device, progress, processes)

    return [line for found in processes.gather(processes.agree(check)) for line in found]


def _check(
    checkpoint: Checkpoint,
    out: Path,
    manifest: Mapping[str, Any],
    device: str,
    progress: Progress,
    processes: Processes,
) -> list[str]:
    """What this process finds in its share."""
    if other := _another_model(checkpoint, manifest):  # all else would follow from that
        return [other] if processes.first else []
    mine = slice(processes.rank, None, processes.size)
    blocks, place = checkpoint.blocks[mine], open_device(device)
    total = sum(layer.nbytes for block in blocks for layer in block)
    stop = Event()
    with (
        _unsplit(),
        threads(max(1, cores() // 2)) as background,
        threads(min(cores(), THREADS)) as pool,
        progress("Verifying", total) as advance,
    ):
        hashes = {
            name: background.submit(checksum, out / name, stop)
            for name in list(listed_files(manifest))[mine]
            if (out / name).is_file()
        }
        mismatches: list[str] = []
        try:
            stored = _Stored(out, manifest)
            shared = checkpoint.shared[mine]
            same = pool.map(partial(_check_shared, checkpoint, stored), shared)
            if processes.first:
                mismatches += _check_manifest(checkpoint, out, manifest)
                mismatches += _check_names(checkpoint, stored)
                mismatches += _check_index(out, stored)
                mismatches += _check_carried(checkpoint, out, manifest)
            if stored.tp <= checkpoint.most_ranks:
                check = partial(_check_block, checkpoint, stored, place)
                for block, found in zip(blocks, pool.map(check, blocks), strict=True):
                    mismatches += found
                    advance(sum(layer.nbytes for layer in block))
            mismatches += [line for found in same for line in found]
            return [*_check_files(out, manifest, hashes, processes.first), *mismatches]
        except SourceError as error:  # a file of OUT that can't be read at all
            files = _check_files(out, manifest, hashes, processes.first)
            return [*files, *mismatches, *error.problems]
        finally:
            stop.set()


@contextmanager
def _unsplit() -> Iterator[None]:
    """Without torch's own threads: there is one here for each core, which they would fight."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def _check_block(
    checkpoint: Checkpoint, stored: _Stored, place: Device, layers: Sequence[Layer]
) -> list[str]:
    with place.work(), torch.inference_mode():
        return _Block(checkpoint, stored, layers, place).mismatches()


def _check_files(
    out: Path, manifest: Mapping[str, Any], hashes: Mapping[str, Future[Any]], names: bool
) -> Iterator[str]:
    """Against the checksums that this process made, and where asked which files there are."""
    listed = listed_files(manifest)
    for name, stated in listed.items():
        if name in hashes and (actual := hashes[name].result()) != stated:
            what = "bytes" if actual["bytes"] != stated.get("bytes") else "sha256"
            yield f"{name}: {what} is {actual[what]}; the manifest says {stated.get(what)}"
        elif names and not (out / name).is_file():
            yield f"{name}: missing; the manifest lists it"
    if not names:
        return
    if not (out / INDEX).is_file() and INDEX not in listed:
        yield f"{INDEX}: missing; only the functional proof was made"
    for path in sorted(path.relative_to(out) for path in out.rglob("*")):
        inside = any(part.startswith(".") or part == "__pycache__" for part in path.parts)
        folder = (out / path).is_dir() and not (out / path).is_symlink()
        if not (inside or folder or str(path) in (*listed, MANIFEST, "README.md")):
            yield f"{path}: not in the manifest"


def _another_model(checkpoint: Checkpoint, manifest: Mapping[str, Any]) -> str | None:
    """What is said where the layers of an output aren't the source's at all."""
    names, modules = {layer.name for layer in checkpoint.layers}, set(manifest["modules"])
    if modules == names:
        return None
    return (
        f"{MANIFEST}: has {len(modules)} layers, {len(names & modules)} of them among the "
        f"{len(names)} of {checkpoint.name}; the output says that it was made from "
        f"{manifest['source'].get('name')!r}"
    )


def _check_manifest(
    checkpoint: Checkpoint, out: Path, manifest: Mapping[str, Any]
) -> Iterator[str]:
    """What servers read before any weight: the manifest and config.json."""
    quant, geometry, tp = checkpoint.quant, checkpoint.geometry, manifest["tp"]
    modules = manifest["modules"]
    mlps, folded = {}, manifest["layout"] == "gptq"
    for layer in checkpoint.layers:
        module, parallel = modules[layer.name], layer.linear.parallel
        if module["parallel"] != parallel:
            yield f"{layer.name}: parallel is {module['parallel']!r}; must be {parallel!r}"
        if layer.linear.reads.free:
            mlps[layer.linear.reads.name] = width = module["in_features"] * (1 if folded else tp)
            if folded and width % (tp * module["group_size"]):
                yield (
                    f"{layer.name}: in_features is {width}; must be {tp} times as many whole "
                    f"groups of {module['group_size']}"
                )
        if (bits := bits_of(manifest, layer.name)) != layer.bits:
            yield f"{layer.name}: bits is {bits}; must be {layer.bits}"
    same = {
        "format_version": format_version(modules),
        "bits": quant.bits,
        "checkpoint_format": quant.checkpoint_format,
        "tp": tp,
        "layout": manifest["layout"],
        "sym": all(_symmetric(checkpoint, layer) for layer in checkpoint.layers if layer.quant),
    }
    if tp > checkpoint.most_ranks:
        yield f"{MANIFEST}: tp is {tp}; must be at most {checkpoint.most_ranks} for this model"
    listed = listed_files(manifest)
    beside = QUANT_FILES[0] if folded else RUNTIME
    for name in (beside, WEIGHTS_INDEX, "config.json"):
        if name not in listed:
            yield f"{MANIFEST}: files don't list {name}"
    sources = {name: file.path.stat().st_size for name, file in checkpoint.source.files.items()}
    stated = manifest["source"].get("files")
    sizes = {n: e.get("bytes") if isinstance(e, dict) else None for n, e in stated.items()} if (
        isinstance(stated, dict)) else {}  # fmt: skip
    if sizes != sources:
        yield f"{MANIFEST}: source.files are {sizes}; must be {sources}"
    config = read_json(out / "config.json") if (out / "config.json").is_file() else {}
    inner = config.get("quantization_config")
    said: dict[str, Any] = same | {
        **{"quant_method": "tpgptq", "desc_act": False, "group_size": quant.group_size},
        "format_version": manifest["format_version"],
        "weights_sha256": weights_digest(manifest),
    }
    if folded:
        said = gptq_config(checkpoint, bool(same["sym"]))
        if (out / beside).is_file() and read_json(out / beside) != said:
            yield f"{beside}: differs from quantization_config in config.json, as it must be"
    for key in sorted(set(inner if isinstance(inner, dict) else ()) - set(said)):
        yield f"config.json quantization_config: {key} doesn't belong there"
    heads = {"query": geometry.heads, "kv": geometry.kv_heads}
    padded = (manifest["heads"]["padded_query"], manifest["heads"]["padded_kv"])
    resized = checkpoint.family.resized(checkpoint.config, mlps)
    resized = checkpoint.family.with_heads(resized, geometry, *padded)
    for file, actual, expected in (
        (MANIFEST, manifest, same | {"model_type": checkpoint.config["model_type"]}),
        (f"{MANIFEST} heads", manifest["heads"], heads),
        (f"{MANIFEST} intermediate", manifest["intermediate"],
         intermediate_sizes(checkpoint.mlps, mlps)),
        ("config.json quantization_config", config.get("quantization_config", {}), said),
        ("config.json", {k: v for k, v in config.items() if k != "quantization_config"},
         {k: v for k, v in resized.items() if k != "quantization_config"}),
    ):  # fmt: skip
        stated = actual if isinstance(actual, Mapping) else {}
        for key, value in expected.items():
            if json.dumps(stated.get(key)) != json.dumps(value):
                yield f"{file}: {key} is {stated.get(key)!r}; must be {value!r}"
    for key in sorted(set(config) - set(resized) - {"quantization_config"}):
        yield f"config.json: {key} is {config[key]!r}; the source doesn't have it"


def _symmetric(checkpoint: Checkpoint, layer: Layer) -> bool:
    """Whether every zero point of a layer is neutral: as the config says, if it does."""
    quant = layer.quant
    if quant is None or quant.sym is not None:
        return quant is None or quant.sym is True
    words = checkpoint.part(layer, "qzeros").view(np.uint32)
    return bool((words == words_of(quant.stored_neutral, quant.bits, words.shape[1])).all())


def _check_shared(checkpoint: Checkpoint, stored: _Stored, name: str) -> list[str]:
    file, source = stored.find(name, None), checkpoint.source.file(name)
    if file is None:
        return [f"{name}: missing from the shared files"]
    if file.specs[name] == source.specs[name] and all(
        np.array_equal(ours(), theirs())
        for (_, ours), (_, theirs) in zip(file.chunks(name), source.chunks(name), strict=True)
    ):
        return []
    return [f"{name}: differs from the source's"]


def _check_names(checkpoint: Checkpoint, stored: _Stored) -> Iterator[str]:
    """No file has a name, or holds a tensor, that the format doesn't put there; nor one that
    another file has."""
    yield from (f"{MANIFEST}: {problem}" for problem in wrong_names(stored.manifest))
    own = {f"{layer.name}.{part}" for layer in checkpoint.layers for part in stored.parts(layer)}
    for rank, files in stored.files.items():
        allowed = own if rank is not None else set(checkpoint.shared)
        if stored.merged:
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
    """The indexes: for loaders of plain checkpoints, and of every value's origin."""
    origins = {f"{name}.{what}" for name in stored.manifest["modules"] for what in ("rows", "cols")}
    for name in sorted(stored.index_names - origins):
        yield f"{name}: doesn't belong into {INDEX}"
    path = out / WEIGHTS_INDEX
    if path.is_file():
        found = {name: file.path.name for file in stored.files[None] for name in file.specs}
        if read_json(path).get("weight_map") != found:
            yield f"{path.name}: weight_map doesn't say where the tensors are"


def _check_carried(checkpoint: Checkpoint, out: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Tokenizer, chat template, licence: the source's own, and no others; and the runtime ours."""
    carried = checkpoint.source.carried_files()
    beside = QUANT_FILES[0] if manifest["layout"] == "gptq" else RUNTIME
    own = {beside, WEIGHTS_INDEX, INDEX, "config.json", *map(str, carried)}
    for name in sorted(manifest["files"]["other"].keys() - own):
        yield f"{name}: the manifest lists it; the source doesn't have it"
    ours, theirs = Path(__file__).with_name(RUNTIME), out / RUNTIME
    same = not theirs.is_file() or filecmp.cmp(ours, theirs, shallow=False)
    if manifest["tool"] == TOOL and beside == RUNTIME and not same:
        yield f"{RUNTIME}: is not that of {TOOL}, which the manifest says wrote it"
    for path in carried:
        if not (out / path).is_file():
            yield f"{path}: missing; the source has it"
        elif not filecmp.cmp(out / path, checkpoint.source.directory / path, shallow=False):
            yield f"{path}: differs from the source's"


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two new tensors have the same bits: NaN equals NaN, and 0 differs from -0."""
    ours, theirs = (t.contiguous().flatten().view(torch.uint8) for t in (a, b))
    whole = len(ours) // 8 * 8  # eight at a time: torch compares numbers one by one
    return torch.equal(ours[whole:], theirs[whole:]) and torch.equal(
        ours[:whole].view(torch.int64), theirs[:whole].view(torch.int64)
    )


class _Stored:
    """The tensors of an output, by layer and rank, whichever its layout."""

    def __init__(self, out: Path, manifest: Mapping[str, Any]) -> None:
        self.manifest = manifest
        self.folded = manifest["layout"] == "gptq"
        self.tp: int = 1 if self.folded else manifest["tp"]
        self.files: dict[int | None, list[SafetensorsFile]] = {
            rank: [SafetensorsFile(out / name) for name in files]
            for rank, files in weight_files(manifest)
        }
        self.has_index = (out / INDEX).is_file()
        self._index = SafetensorsFile(out / INDEX) if self.has_index else None

    @property
    def index_names(self) -> set[str]:
        """The vectors in the index of origins."""
        return set(self._index.specs) if self._index else set()

    @property
    def merged(self) -> bool:
        """Whether all ranks' shards stand side by side."""
        return len(self.files) == 1

    def find(self, name: str, rank: int | None) -> SafetensorsFile | None:
        """The file in which a rank, or (None) every rank, finds a tensor."""
        for file in self.files[None if self.merged else rank]:
            if name in file.specs:
                return file
        return None

    def parts(self, layer: Layer) -> list[str]:
        """The tensors that a rank must store of a layer."""
        parts = list(layer.tensors(0, 0, 0))
        module = self.manifest["modules"].get(layer.name, {})
        parts += ["g_idx"] if self.folded else ["perm"] if module.get("perm") else []
        return parts + (["bias"] if layer.column_bias else [])

    def check(self, layer: Layer, part: str, wanted: TensorSpec) -> None:
        """Raise _DamagedError unless every rank finds its slice of this dtype and shape."""
        for rank in range(self.tp):
            file = self.find(f"{layer.name}.{part}", rank)
            if file is None:
                raise _DamagedError(f"rank {rank}: {part} is missing")
            spec = file.specs[f"{layer.name}.{part}"]
            shape = self._cut(layer, part, spec.shape, rank)[1]
            if spec.dtype != wanted.dtype or shape != wanted.shape:
                raise _DamagedError(
                    f"rank {rank}: {part} is {spec.dtype} {list(shape)}; must be {wanted.dtype} "
                    f"{list(wanted.shape)}"
                )

    def load(self, layer: Layer, allocate: Allocate) -> Iterator[dict[str, Array]]:
        """Every rank's tensors by the last part of their names, which `check` found right."""
        whole: dict[str, Array] = {}
        for rank in range(self.tp):
            if rank == 0 or not self.merged:
                whole = {
                    part: self._read(layer, part, rank, allocate) for part in self.parts(layer)
                }
            yield {
                part: array[self._cut(layer, part, array.shape, rank)[0]]
                for part, array in whole.items()
            }

    def vector(self, layer: Layer, part: str, rank: int) -> IntArray:
        """One rank's perm or g_idx, which `check` found right."""
        vector: IntArray = self._read(layer, part, rank, pageable)
        return vector[self._cut(layer, part, vector.shape, rank)[0]]

    def _read(self, layer: Layer, part: str, rank: int, allocate: Allocate) -> Array:
        name = f"{layer.name}.{part}"
        file = self.find(name, rank)
        assert file is not None
        return file.array(name, allocate)

    def _cut(
        self, layer: Layer, part: str, shape: tuple[int, ...], rank: int
    ) -> tuple[tuple[slice, ...], tuple[int, ...]]:
        """Where a rank's slice lies in a stored tensor, and the slice's shape."""
        module = self.manifest["modules"][layer.name]
        column = module["parallel"] == "column"
        if not self.merged or (column and part == "perm"):
            return (), shape
        by_last = column != (part == "weight")  # (N, K), all others end with N
        dim, pieces = len(shape) - 1 if by_last else 0, self.tp
        if layer.linear.writes == (Axis.KV,):  # kv heads that ranks share stand in it once
            pieces = min(pieces, self.manifest["heads"]["padded_kv"])
        elif column and layer.linear.writes[0].whole:  # and so does what all have
            pieces = 1
        if not shape or shape[dim] % pieces:
            raise _DamagedError(
                f"rank {rank}: {part} {list(shape)} can't be cut for {self.tp} ranks"
            )
        size = shape[dim] // pieces
        begin = rank * pieces // self.tp * size
        slices = (*(slice(None),) * dim, slice(begin, begin + size))
        return slices, (*shape[:dim], size, *shape[dim + 1 :])

    def origin(self, name: str, rank: int, size: int) -> IntArray | None:
        """One rank's source rows or columns from the index file."""
        if self._index is None or name not in self._index.specs:
            return None
        spec, what = self._index.specs[name], name.rpartition(".")[2]
        if spec.dtype != "I32" or len(spec.shape) != 2 or spec.shape[0] not in (1, self.tp):
            raise _DamagedError(f"{INDEX} is {spec.dtype} {list(spec.shape)}; must be I32, by rank")
        if spec.shape[1] != size:
            raise _DamagedError(f"{spec.shape[1]} {what} in {INDEX}; must be {size}")
        vectors = self._index.array(name)
        vector: IntArray = vectors[min(rank, len(vectors) - 1)]
        return vector


@dataclass(frozen=True, eq=False)
class _Vectors:
    """Which values one rank's shard of a layer holds; small, and checked before any weight."""

    group_size: int
    g_idx: Places  # (K_r,) the group of each row: consecutive, where none is stored
    perm: IntArray  # (K_r,), the identity where none is stored
    rows: IntArray  # source row of each stored row, -1 for padding; empty without an index file
    cols: IntArray


@dataclass(frozen=True, eq=False)
class _Weights:
    """A layer's tensors on the device: the source's, or one rank's."""

    quant: QuantConfig | None
    weight: Tensor  # (K*bits/32, N) int32; where it isn't quantised (K, N) floats
    zeros: Tensor  # (G, N) uint8, as stored; (0, N) where it isn't quantised
    scales: Tensor  # (G, N); (0, N)
    bias: Tensor | None  # (N,)

    def values(self, begin: int, end: int, cols: Tensor | None = None) -> Tensor:
        """Rows of the matrix, and whole columns in another order: (n, N) uint8 or floats."""
        if self.quant is None:
            rows = self.weight[begin:end]
            return rows if cols is None else rows.index_select(1, cols)
        bits = self.quant.bits
        words = self.weight[begin * bits // 32 : end * bits // 32]
        return unpack_rows(words if cols is None else words.index_select(1, cols), bits)


class _Block:
    """One block of the source and its shards on every rank; one layer is in memory at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        stored: _Stored,
        layers: Sequence[Layer],
        place: Device,
    ) -> None:
        self.checkpoint, self.stored, self.layers, self.place = checkpoint, stored, layers, place
        self.geometry = checkpoint.geometry
        self.vectors: dict[str, list[_Vectors]] = {}
        # What the source (rank None) and every rank computed so far, (T, N) of each layer.
        self.outputs: dict[tuple[str, int | None], Tensor] = {}
        generator = torch.Generator().manual_seed(0)
        self.device = torch.device(place.name)
        limit, shape = 1 << LIMB_BITS, (TOKENS, self.geometry.hidden)
        integers = torch.randint(-limit, limit, shape, generator=generator)
        self.x = _Limbs((integers.double() / (limit / 2)).to(self.device))  # one limb

    def mismatches(self) -> list[str]:
        """Every difference in this block, one line each."""
        damaged = []
        for layer in self.layers:
            try:
                self._check_tensors(layer)
                self.vectors[layer.name] = [
                    self._read_vectors(layer, rank) for rank in range(self.stored.tp)
                ]
            except _DamagedError as error:
                damaged.append(f"{layer.name}: {error}")
        return damaged or [line for layer in self.layers for line in self._check_layer(layer)]

    def _check_tensors(self, layer: Layer) -> None:
        module = self.stored.manifest["modules"][layer.name]
        k, n, size = module["in_features"], module["out_features"], module["group_size"]
        if n != self._output_width(layer):
            raise _DamagedError(f"out_features is {n}; must be {self._output_width(layer)}")
        wanted = layer.tensors(k, n, -(-k // size))
        wanted |= {part: TensorSpec("I32", (k,)) for part in ("perm", "g_idx")}
        if layer.bias:
            wanted["bias"] = TensorSpec(layer.bias.dtype, (n,))
        for part in self.stored.parts(layer):
            self.stored.check(layer, part, wanted[part])

    def _read_vectors(self, layer: Layer, rank: int) -> _Vectors:
        stored, module = self.stored, self.stored.manifest["modules"][layer.name]
        k, n = module["in_features"], module["out_features"]
        perm, width = np.arange(k, dtype=np.int32), self._input_width(layer)
        if module["perm"]:
            perm = stored.vector(layer, "perm", rank)
        if perm.min() < 0 or perm.max() >= width:
            raise _DamagedError(
                f"rank {rank}: perm has entries outside 0 to {width - 1}, the rank's input"
            )
        size = module["group_size"]
        g_idx = np.arange(k) // size
        if stored.folded:
            consecutive, g_idx = g_idx, stored.vector(layer, "g_idx", rank).astype(np.int64)
            if g_idx.min() < 0 or g_idx.max() > consecutive[-1]:
                raise _DamagedError(f"g_idx has entries outside 0 to {consecutive[-1]}, its groups")
            if layer.linear.reads.free and not np.array_equal(g_idx, consecutive):
                raise _DamagedError("g_idx is not sequential; config.json says that it is")
        return _Vectors(
            group_size=size,
            g_idx=g_idx,
            perm=perm,
            rows=self._origin(layer, "rows", rank, k, layer.in_features),
            cols=self._origin(layer, "cols", rank, n, layer.out_features),
        )

    def _input_width(self, layer: Layer) -> int:
        """Channels of a rank's input to a layer."""
        return self._rank_widths[layer.linear.reads.name]

    def _output_width(self, layer: Layer) -> int:
        """Channels of a rank's output of a layer."""
        return layer.linear.width(self._rank_widths)

    @cached_property
    def _rank_widths(self) -> dict[str, int]:
        """Channels of each axis that a rank has: but for the hidden ones what the manifest says."""
        geometry, tp, heads = self.geometry, self.stored.tp, self.stored.manifest["heads"]
        modules = self.stored.manifest["modules"]
        places = {kind: max(1, heads[f"padded_{kind}"] // tp) for kind in ("query", "kv")}
        return {
            **{
                axis.name: self.checkpoint.widths[axis.name]
                if axis.whole
                else places["kv" if axis is Axis.KV else "query"] * geometry.sizes[axis.name]
                for layer in self.layers
                for axis in (layer.linear.reads, *layer.linear.writes)
                if not axis.free
            },
            **{
                layer.linear.reads.name: modules[layer.name]["in_features"]
                for layer in self.layers
                if layer.linear.reads.free
            },
        }

    def _parts(self, axis: Axis, rank: int | None) -> Iterator[tuple[Layer, Places, Places]]:
        """The layers that write an axis; the columns of its channels in the source, on a rank."""
        widths = self.checkpoint.widths if rank is None else self._rank_widths
        for layer in (layer for layer in self.layers if axis in layer.linear.writes):
            source = layer.linear.places(self.checkpoint.widths, self.geometry.sizes)
            own = layer.linear.places(widths, self.geometry.sizes)
            for written, whole, part in zip(layer.linear.writes, source, own, strict=True):
                if written == axis:
                    yield layer, whole, part

    def _origin(self, layer: Layer, what: str, rank: int, size: int, limit: int) -> IntArray:
        if not self.stored.has_index:
            return np.empty(0, np.int32)
        try:
            vector = self.stored.origin(f"{layer.name}.{what}", rank, size)
        except _DamagedError as error:
            raise _DamagedError(f"rank {rank}: {error}") from None
        if vector is None:
            raise _DamagedError(f"rank {rank}: {what} are missing from {INDEX}")
        if vector.min() < -1 or vector.max() >= limit:
            raise _DamagedError(
                f"rank {rank}: {what} in {INDEX} have values {vector.min()} to {vector.max()}; "
                f"must be from -1 to {limit - 1}"
            )
        return vector

    def _check_layer(self, layer: Layer) -> Iterator[str]:
        """Both proofs of one layer: every rank's values, and where a block's half ends its sum."""
        source = self._load_source(layer)
        values = source.values(0, layer.in_features)
        self.outputs[layer.name, None] = self._by_group(
            self._input(layer, None), layer.g_idx, layer.group_size, source, values
        )
        columns: Tensor | None = None
        for rank, tensors in enumerate(self.stored.load(layer, self.place.allocate)):
            own, vectors = self._load(layer, tensors), self.vectors[layer.name][rank]
            proof = None
            if self.stored.has_index:
                before = self.vectors[layer.name][rank - 1].cols
                if columns is None or not np.array_equal(vectors.cols, before):
                    columns = self._columns(source, values, vectors.cols)
                proof = _Exact(vectors, columns, own)
            self.outputs[layer.name, rank] = self._of_rank(layer, rank, own, proof)
            if proof:
                found = (*proof.found(), *self._exact(layer, rank, own, source))
                yield from (f"{layer.name}: rank {rank}: {what}" for what in found)
        if self.stored.has_index:
            yield from (f"{layer.name}: {what}" for what in self._counts(layer))
            if layer.linear.reads.cut is Cut.HEADS:
                yield from (f"{layer.name}: {what}" for what in self._heads_apart(layer))
        if any(axis.whole for axis in layer.linear.writes):
            yield from self._compare(layer)

    def _to(self, array: Array, dtype: str = "I32") -> Tensor:
        return as_tensor(array, dtype).to(self.device, non_blocking=True)

    def _load_source(self, layer: Layer) -> _Weights:
        if layer.quant and self.checkpoint.form.transposed:
            return self._load_transposed(layer, layer.quant)
        return self._load(layer, vars(read_layer(self.checkpoint, layer, self.place.allocate)))

    def _load_transposed(self, layer: Layer, quant: QuantConfig) -> _Weights:
        """A source whose matrices lie (N, K): unpacked as they are, and not by what converts."""
        source, bits = self.checkpoint.source, quant.bits

        def stored(part: str) -> Tensor:
            name = f"{layer.name}.{self.checkpoint.form.names[part]}"
            return source.tensor(name).to(self.device)

        scales = stored("scales").T.contiguous()
        if quant.sym:  # there are no zero points
            zeros = torch.full(scales.shape, 1 << (bits - 1), dtype=torch.uint8, device=self.device)
        else:
            zeros = unpack_rows(stored("qzeros"), bits).T.contiguous()
        return _Weights(
            quant=quant,
            weight=pack_rows(unpack_cols(stored("qweight"), bits).T.contiguous(), bits),
            zeros=zeros,
            scales=scales,
            bias=source.tensor(f"{layer.name}.bias").to(self.device) if layer.column_bias else None,
        )

    def _load(self, layer: Layer, tensors: Mapping[str, Array]) -> _Weights:
        bias = None
        if layer.column_bias:
            bias = self._to(tensors["bias"], layer.column_bias.dtype)
        if layer.quant is None:
            weight = self._to(tensors["weight"], layer.dtype).T
            return _Weights(None, weight, weight[:0], weight[:0], bias)
        return _Weights(
            quant=layer.quant,
            weight=self._to(tensors["qweight"]),
            zeros=unpack_cols(self._to(tensors["qzeros"]), layer.quant.bits),
            scales=self._to(tensors["scales"], layer.dtype),
            bias=bias,
        )

    # The exact proof.

    def _columns(self, source: _Weights, values: Tensor, cols: IntArray) -> Tensor:
        """The source's values (K, N) with its columns in a shard's order; -1 is any."""
        if cols[0] >= 0 and np.array_equal(cols, np.arange(cols[0], cols[0] + len(cols))):
            return values.narrow(1, int(cols[0]), len(cols))
        return source.values(0, len(values), self._to(np.maximum(cols, 0)))  # whole words move

    def _exact(self, layer: Layer, rank: int, own: _Weights, source: _Weights) -> Iterator[str]:
        """What stands beside the values of one shard, against the source's."""
        vectors = self.vectors[layer.name][rank]
        real_rows, real_cols = (np.flatnonzero(v >= 0) for v in (vectors.rows, vectors.cols))
        absent = self._to(np.flatnonzero(vectors.cols < 0), "I64")
        # Every group of the shard beside the source group of each of its rows.
        groups = layer.g_idx[vectors.rows[real_rows]]
        pairs = np.unique(vectors.g_idx[real_rows] * layer.groups + groups)
        mine, theirs = (self._to(index, "I64") for index in np.divmod(pairs, layer.groups))
        if layer.quant is None:
            mine = theirs = mine[:0]
        own_cols = self._to(real_cols.astype(np.int64), "I64")
        cols = self._to(vectors.cols[real_cols].astype(np.int64), "I64")
        for name, ours, sources in (
            ("qzeros", own.zeros, source.zeros),
            ("scales", own.scales, source.scales),
        ):
            stored = ours.index_select(0, mine).index_select(1, own_cols)
            if not _same(stored, sources.index_select(0, theirs).index_select(1, cols)):
                yield f"{name} of its rows' groups differ from the source's"
        if len(absent) and (own.scales[:, absent] != 0).any():
            yield "padding columns are not exactly zero"
        used = np.unique(vectors.g_idx[real_rows])
        empty = np.setdiff1d(np.arange(len(own.scales)), used)
        if len(empty) and (own.scales[self._to(empty, "I64")] != 0).any():
            yield "groups of padding alone are not exactly zero"
        if own.bias is not None and source.bias is not None:
            if not _same(own.bias[None, own_cols], source.bias[None, cols]):
                yield "bias differs from the source's"
            if (own.bias[absent] != 0).any():
                yield "bias of padding columns is not zero"

        for feed in self._feeds(layer, rank):
            fed = feed[vectors.perm]
            wrong = np.flatnonzero((vectors.rows >= 0) & (fed != vectors.rows))
            if len(wrong):
                j = wrong[0]
                yield (
                    f"perm feeds {len(wrong)} rows from the wrong input, the first row {j} from "
                    f"channel {fed[j]} instead of {vectors.rows[j]}"
                )

    def _feeds(self, layer: Layer, rank: int) -> list[IntArray]:
        """The source channels of a rank's input, according to every layer that produces it."""
        if layer.linear.reads is Axis.HIDDEN:
            return [np.arange(layer.in_features, dtype=np.int32)]
        return self._origins(layer.linear.reads, rank)

    def _origins(self, axis: Axis, rank: int) -> list[IntArray]:
        """The source channels of a rank's own, according to every layer that writes them."""
        origins = []
        for writer, source, own in self._parts(axis, rank):
            channel = np.full(writer.out_features + 1, -2, np.int32)  # of another part: none
            channel[source], channel[-1] = np.arange(len(source)), -1
            origins.append(channel[self.vectors[writer.name][rank].cols[own]])
        return origins

    def _heads_apart(self, layer: Layer) -> Iterator[str]:
        """Every rank has the heads that readers take it to have, query heads with their kv heads.

        Positions (ALiBi), and norms over all heads, are told by a head's number. Ranks to which a
        server gives the same kv head, by the manifest's number of them, have it.
        """
        tp = self.stored.tp
        padded = min(self.stored.manifest["heads"]["padded_kv"], tp)
        first: dict[int, IntArray] = {}  # rank's kv heads, of those that share them

        def channels(heads: IntArray, like: IntArray) -> IntArray:
            size = like.shape[1]
            channels = heads[:, None] * size + np.arange(size)
            return np.where(heads[:, None] < 0, -1, channels).astype(np.int32)

        for rank in range(tp):
            queries, *kvs = (
                origins.reshape(-1, self.geometry.sizes[axis.name])
                for axis in (Axis.QUERY, *_kv_axes(layer))
                for origins in self._origins(axis, rank)
            )
            heads, places = self._heads_of(rank, len(queries), len(kvs[0]))
            if not np.array_equal(queries, channels(heads, queries)):
                yield f"rank {rank}: its query heads aren't those of its place, in their order"
            elif any(not np.array_equal(kv, channels(places, kv)) for kv in kvs):
                yield f"rank {rank}: its query heads don't stand with their kv heads"
            if not np.array_equal(first.setdefault(rank * padded // tp, places), places):
                yield f"rank {rank}: its kv heads aren't its share of the {padded} in {MANIFEST}"

    def _heads_of(self, rank: int, query: int, kv: int) -> tuple[IntArray, IntArray]:
        """The source's query and kv heads of a rank that has so many; -1 for an empty one.

        Where a kv head has more query heads than a place has room for, it stands in several.
        """
        group, each = self.geometry.queries_per_kv, query // kv
        place = np.arange(rank * kv, (rank + 1) * kv)
        head, part = np.divmod(place, -(-group // each))
        head = np.where(head < self.geometry.kv_heads, head, -1)
        within = part[:, None] * each + np.arange(each)
        real = (head[:, None] >= 0) & (within < group)
        queries = np.where(real, head[:, None] * group + within, -1)
        return queries.reshape(-1).astype(np.int32), head.astype(np.int32)

    def _counts(self, layer: Layer) -> Iterator[str]:
        """Every source row and column is kept once; kv heads wherever a query head needs them."""
        shards = self.vectors[layer.name]
        rows = np.stack([_count(shard.rows, layer.in_features) for shard in shards])
        cols = np.stack([_count(shard.cols, layer.out_features) for shard in shards])
        if layer.linear.parallel == "column":
            kept = cols.sum(axis=0)
            for written, place in zip(
                layer.linear.writes,
                layer.linear.places(self.checkpoint.widths, self.geometry.sizes),
                strict=True,
            ):
                if written is Axis.KV:
                    kept[place] = np.minimum(kept[place], 1)
                elif written.whole:
                    kept[place] = (cols[:, place] == 1).all(axis=0)
            good = (rows == 1).all(), (kept == 1).all()
        else:
            good = (rows.sum(axis=0) == 1).all(), (cols == 1).all()
        for what, ok in zip(("rows", "columns"), good, strict=True):
            if not ok:
                yield f"its ranks don't keep every source {what[:-1]} exactly once"

    # The functional proof: no index file from here on.

    def _compare(self, layer: Layer) -> Iterator[str]:
        """The sum over the ranks, or what every rank has whole, against the source's.

        The row-parallel bias is left out: it is a shared tensor, and added after the sum.
        """
        ranks = torch.stack([self.outputs[layer.name, rank] for rank in range(self.stored.tp)])
        what = "what a rank makes of it"
        if layer.linear.parallel == "row":
            ranks, what = ranks.sum(dim=0), "the sum over the ranks"
        expected = self.outputs[layer.name, None]
        error, largest = (ranks - expected).abs().max(), expected.abs().max()
        if not error <= TOLERANCE * largest:
            yield (
                f"{layer.name}: {what} differs from the source's block by {error:.1e}; its largest "
                f"value is {largest:.1e}"
            )

    def _input(self, layer: Layer, rank: int | None) -> _Limbs:
        """What one rank's layer, or the source's (rank None), reads."""
        axis = layer.linear.reads
        if axis is Axis.HIDDEN:
            return self.x
        if axis.cut is Cut.HEADS:
            axes = (Axis.QUERY, *_kv_axes(layer))
            q, k, v = (self._heads(out, of) for of in axes for out in self._written(of, rank))
            if axis is Axis.VALUE:  # positions are in one key that all heads share
                (rope,) = self._written(Axis.ROPE, rank)
                k = torch.cat((k, rope.expand(len(k), *rope.shape)), dim=-1)
            return _Limbs(self._attention(q, k, v))
        inner = self._written(axis, rank)
        if axis.whole:
            return _Limbs(inner[0])
        inner[0] = FUNCTIONS[self.geometry.activation](inner[0])
        return _Limbs(inner[0] if len(inner) == 1 else inner[0] * inner[1])

    def _written(self, axis: Axis, rank: int | None) -> list[Tensor]:
        """What one rank, or the source (rank None), wrote to an axis."""
        return [
            self.outputs[layer.name, rank][:, self._to(own, "I64")]
            for layer, _, own in self._parts(axis, rank)
        ]

    def _by_group(
        self,
        x: _Limbs,
        g_idx: IntArray | Places,
        group_size: int,
        weights: _Weights,
        values: Tensor,
    ) -> Tensor:
        """The product (T, N) of rows in any order: group by group, each filled to whole units."""
        unit = self._unit(group_size, weights.quant.bits if weights.quant else None)
        counts = np.bincount(g_idx, minlength=len(weights.scales))
        units = -(-counts // unit)
        rows = np.full(units.sum() * unit, -1, np.int64)
        begins = np.repeat((units.cumsum() - units) * unit - (counts.cumsum() - counts), counts)
        rows[np.arange(len(g_idx)) + begins] = np.argsort(g_idx, kind="stable")
        index, groups = self._to(rows, "I64"), np.repeat(np.arange(len(units)), units)
        product = _product(x, index, weights, groups, unit)
        for begin, end in self._slices(len(rows), unit, values.shape[1]):
            product.add(begin, values.index_select(0, index[begin:end].clamp(min=0)))
        return product.total

    def _of_rank(self, layer: Layer, rank: int, weights: _Weights, proof: _Exact | None) -> Tensor:
        """A rank's product (T, N); its values are compared on the way."""
        vectors = self.vectors[layer.name][rank]
        if self.stored.folded:
            values, x = weights.values(0, len(vectors.perm)), self._input(layer, rank)
            if proof:
                proof.compare(0, values)
            return self._by_group(x, vectors.g_idx, vectors.group_size, weights, values)
        unit, k = self._unit(vectors.group_size, layer.bits), len(vectors.perm)
        groups = np.arange(0, k, unit) // vectors.group_size
        perm = self._to(vectors.perm.astype(np.int64), "I64")
        product = _product(self._input(layer, rank), perm, weights, groups, unit)
        whole = math.lcm(unit, layer.pack_factor)
        for begin, end in self._slices(k, whole, weights.weight.shape[1]):
            values = weights.values(begin, end)
            product.add(begin, values)
            if proof:
                proof.compare(begin, values)
        return product.total

    def _unit(self, group_size: int, bits: int | None) -> int:
        """Rows whose products are summed exactly, a divisor of the group size."""
        return math.gcd(group_size, 128, 1 << (MANTISSA - LIMB_BITS - (bits or 0)))

    def _slices(self, rows: int, whole: int, columns: int) -> Iterator[tuple[int, int]]:
        """Ranges of rows that are worked on at a time: what a core's cache, or a GPU, likes."""
        size = max(1, SLICE[self.device.type] // (columns * whole)) * whole
        return ((begin, min(begin + size, rows)) for begin in range(0, rows, size))

    def _heads(self, out: Tensor, axis: Axis) -> Tensor:
        """(T, heads * size) -> (heads, T, size)."""
        heads: Tensor = out.unflatten(1, (-1, self.geometry.sizes[axis.name]))
        return heads.transpose(0, 1)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal softmax attention, rotary embedding; (heads, T, size) -> (T, heads * size)."""
        q, k = (_rotate(self._head_norm(t, name)) for t, name in ((q, "q_norm"), (k, "k_norm")))
        k, v = (t.repeat_interleave(len(q) // len(k), dim=0) for t in (k, v))
        return (
            functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            .transpose(0, 1)
            .flatten(1)
        )

    def _head_norm(self, heads: Tensor, name: str) -> Tensor:
        """The per-head norm that some models apply to queries and keys; (heads, T, head_dim).

        One over all heads is left out: a factor that is the same on all ranks proves no more.
        """
        block = self.layers[0].name.removesuffix(self.layers[0].linear.name)
        full = f"{block}self_attn.{name}.weight"
        if full not in self.checkpoint.shared:
            return heads
        weight = self.checkpoint.source.tensor(full)
        if len(weight) != heads.shape[-1]:
            return heads
        weight = weight.to(heads).nan_to_num(posinf=1.0, neginf=-1.0)  # it is copied as it is
        return functional.rms_norm(heads, (heads.shape[-1],), weight)


class _Exact:
    """Compares a shard's values with the source's, slice by slice."""

    def __init__(self, vectors: _Vectors, columns: Tensor, own: _Weights) -> None:
        """columns (K, N_r): the source's values with the columns as the shard has them."""
        self._columns, self._own = columns, own
        self._g_idx = as_tensor(vectors.g_idx, "I64").to(columns.device)
        self._rows = as_tensor(vectors.rows, "I32").to(columns.device)
        self._padding = vectors.rows < 0
        self._absent = as_tensor(vectors.cols < 0, "BOOL").to(columns.device)
        self._some_absent = bool((vectors.cols < 0).any())
        self._differs = self._not_zero = False

    def compare(self, begin: int, values: Tensor) -> None:
        """The rows from `begin` of the shard, (n, N_r) uint8 or floats."""
        end, quant = begin + len(values), self._own.quant
        expected = self._columns.index_select(0, self._rows[begin:end].clamp(min=0))
        if self._some_absent:
            anything = values if quant else values.new_zeros(())
            expected = torch.where(self._absent, anything, expected)
        padding = as_tensor(np.flatnonzero(self._padding[begin:end]), "I64").to(values.device)
        if len(padding) and quant is None:
            expected[padding] = 0
        elif len(padding) and quant:
            expected[padding] = values[padding]
            group = self._g_idx[padding + begin]
            zeros = zero_points(self._own.zeros[group], quant.checkpoint_format)
            real = self._own.scales[group] != 0
            self._not_zero |= bool(((values[padding] != zeros) & real).any())
        self._differs |= not _same(values, expected)

    def found(self) -> Iterator[str]:
        """What differs, in words."""
        if self._differs:
            what = "qweight" if self._own.quant else "weight"
            yield f"{what} holds values that differ from the source's"
        if self._not_zero:
            yield "padding rows are not exactly zero"


class _Limbs:
    """A float64 input (T, K) as a weighted sum of integers that matrix units multiply exactly.

    Products with quantised values are sums of small integers, so that they are exact in float32,
    and as good as float64 once the limbs are weighed: the proof at the speed of float32.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        largest = float(x.abs().max())
        scale = 2.0 ** math.ceil(math.log2(largest)) if 0 < largest < math.inf else 1.0
        rest = x / scale
        planes: list[Tensor] = []
        weights: list[float] = []
        while not planes or (len(planes) < LIMBS and bool(rest.any())):
            rest = rest * 2**LIMB_BITS
            planes.append(rest.round())
            rest = rest - planes[-1]
            weights.append(scale * 2.0 ** (-LIMB_BITS * len(planes)))
        self.tokens = len(x)
        self.planes = torch.cat(planes).float()  # (limbs * T, K)
        self.weights = x.new_tensor(weights)[:, None, None]


class _Product:
    """An input's product with a layer (T, N), in float64, added up over slices of its rows."""

    def __init__(
        self,
        x: _Limbs,
        channels: Tensor,
        weights: _Weights,
        quant: QuantConfig,
        groups: NDArray[np.integer],
        unit: int,
    ) -> None:
        """channels (n,): the input of each row, -1 for none; groups: of every `unit` of rows."""
        device = channels.device
        picked = x.planes.index_select(1, channels.clamp(min=0)).mul_(channels >= 0)
        self._x = picked.unflatten(1, (-1, unit)).transpose(0, 1)  # (units, limbs * T, unit)
        self._limbs, self._unit = x, unit
        group = as_tensor(groups, "I64").to(device)
        self._zeros = zero_points(weights.zeros, quant.checkpoint_format).float()[group]
        self._scales = weights.scales.double()[group]
        columns = weights.scales.shape[1]
        self.total = torch.zeros(x.tokens, columns, dtype=torch.float64, device=device)
        if weights.bias is not None:
            self.total += weights.bias.double()

    def add(self, begin: int, values: Tensor) -> None:
        """The rows from `begin`, (n, N) uint8."""
        at = slice(begin // self._unit, (begin + len(values)) // self._unit)
        x = self._x[at]
        sums = x @ values.view(-1, self._unit, values.shape[1]).float()
        sums -= x.sum(dim=2, keepdim=True) * self._zeros[at, None]  # integers, so far
        limbs = sums.unflatten(1, (-1, self._limbs.tokens)).double()
        weighed = (limbs * self._limbs.weights).sum(dim=1)
        self.total += torch.einsum("utn,un->tn", weighed, self._scales[at])


class _DenseProduct:
    """The same with a layer that isn't quantised."""

    def __init__(self, x: _Limbs, channels: Tensor, weights: _Weights) -> None:
        self._x = x.x.index_select(1, channels.clamp(min=0)).mul_(channels >= 0)
        columns = weights.weight.shape[1]
        self.total = torch.zeros(x.tokens, columns, dtype=torch.float64, device=channels.device)
        if weights.bias is not None:
            self.total += weights.bias.double()

    def add(self, begin: int, values: Tensor) -> None:
        """The rows from `begin`, (n, N) floats."""
        self.total += self._x[:, begin : begin + len(values)] @ values.double()


def _product(
    x: _Limbs, channels: Tensor, weights: _Weights, groups: NDArray[np.integer], unit: int
) -> _Product | _DenseProduct:
    if weights.quant is None:
        return _DenseProduct(x, channels, weights)
    return _Product(x, channels, weights, weights.quant, groups, unit)


class _DamagedError(Exception):
    """A stored tensor that can't be compared at all."""


def _kv_axes(layer: Layer) -> tuple[Axis, ...]:
    """What the queries are attended with, for the layer that reads the outcome."""
    return (Axis.KEY, Axis.VALUE) if layer.linear.reads is Axis.VALUE else (Axis.KV,)


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
