"""The one loop over the plan: load a layer, repack it for every rank of every degree, write it."""

from __future__ import annotations

import filecmp
import hashlib
import heapq
import json
import shlex
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from threading import Event
from typing import Any

from safetensors.numpy import save

from tpgptq_convert.card import model_card
from tpgptq_convert.checkpoint import Checkpoint, IntArray, Layer
from tpgptq_convert.config import QUANT_FILES
from tpgptq_convert.errors import OutputError, SourceError, StaleError, VerificationError
from tpgptq_convert.folded import gptq_config
from tpgptq_convert.manifest import (
    INDEX,
    LAYOUTS,
    MANIFEST,
    RUNTIME,
    TOOL,
    WEIGHTS_INDEX,
    format_version,
    intermediate_sizes,
    listed_files,
    merged_part,
    rank_part,
    read_manifest,
    shared_part,
    weights_digest,
)
from tpgptq_convert.plan import ROW_GROUPS, Plan, Shard, check_layout, check_zero_points, stacked
from tpgptq_convert.processes import Processes
from tpgptq_convert.progress import Advance, Progress, silent
from tpgptq_convert.repack import Array, open_device, read_layer, repack
from tpgptq_convert.source import DTYPES, TensorSpec, octets, read_json
from tpgptq_convert.staging import Stage, check_free, check_replaceable, journal_of, staging
from tpgptq_convert.threads import cores, threads
from tpgptq_convert.writer import (
    Note,
    Part,
    Parts,
    Writing,
    checksum,
    json_text,
    record_verified,
    write_json,
)

IN_FLIGHT = 1 << 30  # bytes that are read, repacked or written at a time
MOST_LANES = 8  # of files of one rank that are written at a time

Write = tuple[Parts, Mapping[str, Array]]  # tensors by their names
Accept = Callable[[Parts, str], bool]
Wanted = Mapping[int, Sequence[str]]  # the last parts of tensors' names, by sequence of files
Resumed = Callable[[int, int], None]  # bytes of tensors that are written already, and of all


@dataclass(frozen=True)
class Options:
    """What `tpgptq convert` was asked for, beside the degrees."""

    layout: str = "ranks"
    max_shard_size: int = 5_000_000_000
    device: str = "cpu"  # or cuda, cuda:N
    overwrite: bool = False
    resume: bool = False
    verify: bool = True
    repository: str | None = None  # on the Hub, that the output is for

    def command(self, plan: Plan) -> str:
        """The command line that writes one plan's output, for people to run again."""
        words = ["tpgptq convert", f"--tp {plan.tp}"]
        if self.layout != LAYOUTS[0]:
            words.append(f"--layout {self.layout}")
        if plan.row_group != ROW_GROUPS[0]:
            words.append(f"--row-group {plan.row_group}")
        if self.max_shard_size != Options.max_shard_size:
            words.append(f"--max-shard-size {self.max_shard_size}B")
        if plan.checkpoint.source.revision:
            words.append(f"--revision {plan.checkpoint.source.revision}")
        return " ".join([*words, shlex.quote(plan.checkpoint.name), "OUT"])


@dataclass(frozen=True)
class _Piece:
    """A bounded amount of work: what it reads, and the writes that come of it."""

    position: float  # of what it writes, as a fraction of the files
    source_bytes: int
    nbytes: int  # in memory while it is under way
    work: Callable[[], list[Write]]


def convert(
    checkpoint: Checkpoint,
    plans: Sequence[Plan],
    out: Path,
    options: Options,
    progress: Progress = silent,
    processes: Processes = Processes(),  # noqa: B008  # it can't be changed
    resumed: Resumed = lambda *_: None,
) -> list[dict[str, Any]]:
    """Write OUT, or OUT/tp-N for several degrees, and return the manifests.

    OUT appears whole, and verified unless that was declined, or not at all; with options.resume
    what was written is kept for the next run, and `resumed` is told how much an earlier one left.
    Several processes share the work out by files. Raises a TpgptqError.
    """
    check_layout(checkpoint, options.layout, [plan.tp for plan in plans])

    def start() -> tuple[bool, Stage]:
        sym, source = check_zero_points(checkpoint, plans), checkpoint.source
        carried = sum((source.directory / path).stat().st_size for path in source.carried_files())
        needed = sum(output_bytes(plan) + carried for plan in plans)
        check_free(out, options.overwrite, needed, checkpoint.source.directory)
        conversion = _fingerprint(checkpoint, plans, options)
        stage = staging(out, conversion, overwrite=options.overwrite, resume=options.resume)
        return sym, stack.enter_context(stage)

    def share() -> _Run:
        journal = stack.enter_context(journal_of(stage))
        writers = stack.enter_context(threads(2 * cores()))  # for writes and for hashes
        return _Run(checkpoint, plans, stage, options, processes, writers, journal.note)

    with ExitStack() as stack:
        sym, stage = processes.of_first(start)
        run = processes.agree(share)
        kept = processes.gather(processes.agree(run.reuse))
        if options.resume and any(kept):
            resumed(sum(kept), run.nbytes)
        found = processes.gather(processes.agree(lambda: run.write(progress)))
        files = {name: info for written, _ in found for name, info in written.items()}
        sources = {name: info for _, hashes in found for name, info in hashes.items()}
        checkpoint.source.check_hashes(sources)
        manifests = processes.of_first(
            lambda: [output.finish(files, sources, sym) for output in run.outputs]
        )
        if options.verify:
            from tpgptq_convert.verify import verify

            run.device.release()
            mismatches = [
                mismatch
                for output in run.outputs
                for mismatch in verify(
                    checkpoint, output.directory, options.device, progress, processes
                )
            ]
            if mismatches:
                raise VerificationError(*mismatches, hint="a bug, or a bad disk")
            manifests = processes.of_first(
                lambda: [record_verified(output.directory) for output in run.outputs]
            )
    return manifests


def current(
    checkpoint: Checkpoint, plans: Sequence[Plan], out: Path, options: Options
) -> list[dict[str, Any]] | None:
    """The manifests of OUT where it is whole, and what `convert` would write; None without an OUT.

    That is told by the checksums of all files of MODEL and OUT, which are read for them. The card
    is not compared: it is there for people to edit. Raises StaleError, which says what differs.
    """
    if not (out.exists() or out.is_symlink()):
        return None
    difference = next(_differences(checkpoint, plans, out, options), None)
    if difference is not None:
        check_replaceable(out, overwrite=True)
        raise StaleError(
            f"{out}: isn't what this would write: {difference}",
            hint="use --overwrite to replace it",
        )
    return [read_json(directory / MANIFEST) for _, directory in _directories(plans, out)]


def _differences(
    checkpoint: Checkpoint, plans: Sequence[Plan], out: Path, options: Options
) -> Iterator[str]:
    """What OUT differs in from what would be written."""
    directories = _directories(plans, out)
    for _, directory in directories:
        if not (directory / MANIFEST).is_file():
            yield f"{directory / MANIFEST} is missing"
            return
    if len(plans) > 1:
        others = {*out.iterdir()} - {directory for _, directory in directories}
        yield from (f"{path} is there" for path in sorted(others))
    sym = check_zero_points(checkpoint, plans)
    with threads(cores()) as pool:
        paths = [file.path for file in checkpoint.source.files.values()]
        sources = dict(zip(checkpoint.source.files, pool.map(checksum, paths), strict=True))
        for plan, directory in directories:
            yield from _Output(plan, directory, options, pool).differences(sources, sym, pool)


def _directories(plans: Sequence[Plan], out: Path) -> list[tuple[Plan, Path]]:
    """Each plan's directory in OUT, which it has alone where there is one plan."""
    return [(plan, out if len(plans) == 1 else out / f"tp-{plan.tp}") for plan in plans]


def output_bytes(plan: Plan) -> int:
    """Bytes of the weights in the output of one plan."""
    shared = plan.checkpoint.shared_specs.values()
    return plan.rank_bytes * plan.shards + sum(spec.nbytes for spec in shared)


def _fingerprint(checkpoint: Checkpoint, plans: Sequence[Plan], options: Options) -> str:
    """Of everything that the bytes of the output's weights hang on; the source's by their times."""
    files = {
        name: [status.st_size, status.st_mtime_ns]
        for name, file in checkpoint.source.files.items()
        for status in [file.path.stat()]
    }
    asked = [options.layout, options.max_shard_size, [(plan.tp, plan.row_group) for plan in plans]]
    everything = [TOOL, asked, files, checkpoint.config, asdict(checkpoint.quant)]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


class _Run:
    """One process's share of a conversion."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plans: Sequence[Plan],
        stage: Stage,
        options: Options,
        processes: Processes,
        writers: ThreadPoolExecutor,
        note: Note,
    ) -> None:
        self.checkpoint, self.device = checkpoint, open_device(options.device)
        self.stage = stage
        self.outputs = [
            _Output(plan, directory, options, writers, note)
            for plan, directory in _directories(plans, stage.directory)
        ]
        for output in self.outputs:
            output.directory.mkdir(exist_ok=True)
        files = [part for output in self.outputs for part in output.files]
        self._mine = set(_share(files, processes))
        sources = list(checkpoint.source.files.items())
        self._sources = dict(sources[processes.rank :: processes.size])

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors of all outputs."""
        streams = ({*output.streams, output.shared} for output in self.outputs)
        return sum(stream.total_size for of_output in streams for stream in of_output)

    def reuse(self) -> int:
        """Keep what an earlier run has written of this process's files; bytes of its tensors."""
        with threads(cores()) as pool:
            return sum(pool.map(self._reuse, self._mine))

    def write(self, progress: Progress) -> tuple[dict[str, Any], dict[str, Any]]:
        """Write this process's files; returns those, and its share of the source's, by name."""
        # Where every sequence has several files, some of each are written at a time, every one in a
        # lane of its own: the hash of a file is one thread's work.
        parts = (len(stream.parts) for output in self.outputs for stream in output.streams)
        lanes = min(MOST_LANES, *parts)
        pieces = heapq.merge(
            *(
                pieces
                for lane in range(lanes)
                for pieces in (self._layers(lane, lanes), self._shared(lane, lanes))
            ),
            key=lambda piece: piece.position,
        )
        stop = Event()
        with (
            threads(max(1, cores() // 2)) as background,
            threads(self.device.threads) as pool,
            progress("Converting", self._source_bytes()) as advance,
        ):
            hashes = {
                name: background.submit(checksum, file.path, stop)
                for name, file in self._sources.items()
            }
            try:
                _pump(pieces, pool, advance)
                written = {str(part.path): part.finish() for part in self._mine}
                return written, {name: future.result() for name, future in hashes.items()}
            finally:
                stop.set()

    def _reuse(self, part: Part) -> int:
        """The same of one file."""
        name = str(part.path.relative_to(self.stage.directory))
        if name in self.stage.written:
            part.reuse(self.stage.written[name])
        return sum(part.specs[name].nbytes for name in part.kept)

    def _source_bytes(self) -> int:
        """Of everything that this process reads."""
        mine = {name for part in self._mine for name in part.specs.keys() - part.kept}
        checkpoint = self.checkpoint
        layers = (layer for layer in checkpoint.layers if _first_tensor(layer) in mine)
        shared = (spec.nbytes for name, spec in checkpoint.shared_specs.items() if name in mine)
        return sum(layer.nbytes for layer in layers) + sum(shared)

    def _accepts(self, lane: int, lanes: int) -> Accept:
        """Whether a tensor of a sequence is to be written by this process, in this lane."""
        return lambda stream, name: (
            (part := stream.part(name)) in self._mine
            and name not in part.kept
            and stream.lane(name, lanes) == lane
        )

    def _layers(self, lane: int, lanes: int) -> Iterator[_Piece]:
        """The layers, block after block."""
        accept, first = self._accepts(lane, lanes), self.outputs[0].streams[0]
        for index, block in enumerate(self.checkpoint.blocks):
            cuts: list[dict[str, Sequence[Shard]]] = []
            for layer in block:
                wanted = [output.wanted(layer, accept) for output in self.outputs]
                if not any(wanted):
                    continue
                cuts = cuts or [output.cut(index) for output in self.outputs]
                jobs = [
                    (output, [cut[layer.name][at] for at in parts], parts)
                    for output, cut, parts in zip(self.outputs, cuts, wanted, strict=True)
                    if parts
                ]
                yield _Piece(
                    position=first.position(_first_tensor(layer)) * lanes - lane,
                    source_bytes=layer.nbytes,
                    nbytes=layer.nbytes
                    + sum(output.nbytes(layer, parts) for output, _, parts in jobs),
                    work=partial(self._repack, layer, jobs),
                )

    def _repack(
        self, layer: Layer, jobs: Sequence[tuple[_Output, Sequence[Shard], Wanted]]
    ) -> list[Write]:
        device, stacks = self.device, [shards for _, shards, _ in jobs]
        with device.work():
            stored = read_layer(self.checkpoint, layer, device.allocate)
            repacked = list(repack(stored, stacks, layer.quant, device))
        targets = [
            (output.streams[at], of) for output, _, parts in jobs for at, of in parts.items()
        ]
        return [
            (stream, {f"{layer.name}.{part}": tensors[part] for part in parts})
            for (stream, parts), tensors in zip(targets, repacked, strict=True)
        ]

    def _shared(self, lane: int, lanes: int) -> Iterator[_Piece]:
        """The tensors that are copied as they are."""
        accept, source = self._accepts(lane, lanes), self.checkpoint.source
        for name in self.outputs[0].shared_specs():
            streams = [output.shared for output in self.outputs if accept(output.shared, name)]
            for nbytes, read in source.file(name).chunks(name) if streams else ():
                yield _Piece(
                    position=self.outputs[0].shared.position(name) * lanes - lane,
                    source_bytes=nbytes,
                    nbytes=nbytes,
                    work=partial(_copy, name, read, streams),
                )


def _first_tensor(layer: Layer) -> str:
    return f"{layer.name}.{'qweight' if layer.quant else 'weight'}"


def _copy(name: str, read: Callable[[], Array], streams: Sequence[Parts]) -> list[Write]:
    data = read()
    return [(stream, {name: data}) for stream in streams]


def _pump(pieces: Iterable[_Piece], pool: ThreadPoolExecutor, advance: Advance) -> None:
    """Work in the pool, writes in the order of the pieces, and IN_FLIGHT bytes at a time."""
    working: deque[tuple[_Piece, Future[list[Write]]]] = deque()
    writing: deque[tuple[_Piece, list[Writing]]] = deque()
    held = 0

    def step() -> None:
        """Wait for the oldest piece's work, or else for its writes."""
        nonlocal held
        if working and (working[0][1].done() or not writing):
            piece, work = working.popleft()
            stretches = [
                stretch for parts, tensors in work.result() for stretch in parts.write(tensors)
            ]
            writing.append((piece, stretches))
        else:
            piece, stretches = writing.popleft()
            for stretch in stretches:
                stretch.result()
            held -= piece.nbytes
            advance(piece.source_bytes)

    def ready() -> bool:
        """Whether a step needn't wait."""
        if working and working[0][1].done():
            return True
        return bool(writing) and all(stretch.done() for stretch in writing[0][1])

    for piece in pieces:
        while held and held + piece.nbytes > IN_FLIGHT:
            step()
        held += piece.nbytes
        working.append((piece, pool.submit(piece.work)))
        while ready():
            step()
    while working or writing:
        step()


def _share(parts: Sequence[Part], processes: Processes) -> Iterator[Part]:
    """This process's files: a stretch of all, by their bytes."""
    total, before = sum(part.nbytes for part in parts), 0
    for part in parts:
        if (before + part.nbytes / 2) * processes.size // total == processes.rank:
            yield part
        before += part.nbytes


class _Output:
    """One degree's output directory while it is written."""

    def __init__(
        self,
        plan: Plan,
        directory: Path,
        options: Options,
        writers: ThreadPoolExecutor,
        note: Note = lambda *_: None,
    ) -> None:
        self.plan, self.directory, self.options = plan, directory, options
        self._index: dict[str, IntArray] = {}
        self._tensors = {layer.name: plan.tensors(layer) for layer in plan.checkpoint.layers}
        shared = self.shared_specs()
        make = partial(Parts, directory, max_bytes=options.max_shard_size, pool=writers, note=note)
        if options.layout != "ranks":
            merged = make(merged_part, self._layer_specs(plan.merged_tensors) | shared)
            self.streams, self.shared = [merged], merged
        else:
            specs = self._layer_specs(lambda layer: self._tensors[layer.name])
            self.streams = [make(partial(rank_part, rank), specs) for rank in range(plan.tp)]
            self.shared = make(shared_part, shared)

    @property
    def files(self) -> list[Part]:
        """All files of tensors, those of the first blocks first."""
        streams = dict.fromkeys((*self.streams, self.shared))
        return [
            part for parts in zip_longest(*(s.parts for s in streams)) for part in parts if part
        ]

    def _layer_specs(
        self, tensors: Callable[[Layer], dict[str, TensorSpec]]
    ) -> dict[str, TensorSpec]:
        return {
            f"{layer.name}.{part}": spec
            for layer in self.plan.checkpoint.layers
            for part, spec in tensors(layer).items()
        }

    def shared_specs(self) -> dict[str, TensorSpec]:
        """Largest elements first, so that every tensor lies aligned."""
        specs = self.plan.checkpoint.shared_specs
        return dict(sorted(specs.items(), key=lambda kv: -DTYPES[kv[1].dtype].itemsize))

    def wanted(self, layer: Layer, accept: Accept) -> Wanted:
        """The tensors of a layer that are accepted, by sequence."""
        names = [
            [part for part in self._tensors[layer.name] if accept(stream, f"{layer.name}.{part}")]
            for stream in self.streams
        ]
        return {at: parts for at, parts in enumerate(names) if parts}

    def nbytes(self, layer: Layer, wanted: Wanted) -> int:
        """Bytes of these tensors of a layer."""
        specs = self.streams[0].specs
        return sum(specs[f"{layer.name}.{part}"].nbytes for of in wanted.values() for part in of)

    def cut(self, index: int) -> dict[str, Sequence[Shard]]:
        """What each file gets of a block's layers, by the layer's name."""
        plan = self.plan
        shards = plan.block(index)
        for name, of_layer in shards.items():
            self._index[f"{name}.rows"] = stacked([shard.rows for shard in of_layer])
            self._index[f"{name}.cols"] = stacked([shard.cols for shard in of_layer])
        if self.options.layout == "ranks":
            return dict(shards)
        return {
            layer.name: [plan.merged(layer, shards[layer.name])]
            for layer in plan.checkpoint.blocks[index]
        }

    def _modules(self) -> dict[str, Any]:
        """Every layer's shard sizes, as the manifest states them."""
        plan = self.plan
        return {
            layer.name: {
                "parallel": layer.linear.parallel,
                "in_features": size.in_features,
                "out_features": size.out_features,
                "group_size": size.group_size,
                "perm": "perm" in self._tensors[layer.name],
            }
            | ({} if layer.bits == plan.checkpoint.quant.bits else {"bits": layer.bits})
            for layer in plan.checkpoint.layers
            for size in [plan.sizes[layer.kind]]
        }

    def finish(
        self, files: Mapping[str, Any], source_files: dict[str, Any], sym: bool
    ) -> dict[str, Any]:
        """Write what goes beside the files of tensors, and return the manifest."""
        source = self.plan.checkpoint.source
        for index, block in enumerate(self.plan.checkpoint.blocks):
            if f"{block[0].name}.rows" not in self._index:  # another process wrote it
                self.cut(index)
        (self.directory / INDEX).write_bytes(save(self._index, metadata={"format": "np"}))
        for path in source.carried_files():
            (self.directory / path).parent.mkdir(parents=True, exist_ok=True)
            with (self.directory / path).open("wb") as copy:
                copy.writelines(octets(source.directory / path))
        if self.options.layout != "gptq":
            shutil.copyfile(Path(__file__).with_name(RUNTIME), self.directory / RUNTIME)
        weights = self._weights(files)
        for name, text in self._texts(sym, weights).items():
            (self.directory / name).write_text(text, encoding="utf-8")
        manifest = self._statement(source_files, sym) | self._listed(weights)
        (self.directory / "README.md").write_text(
            self._card(manifest),
            encoding="utf-8",
            errors="backslashreplace",  # a directory may be called anything
        )
        write_json(self.directory / MANIFEST, manifest)
        return manifest

    def _card(self, manifest: dict[str, Any]) -> str:
        directory, command = self.directory.name, self.options.command(self.plan)
        branch = directory if directory == f"tp-{self.plan.tp}" else None
        source = self.plan.checkpoint.source.directory
        return model_card(
            manifest, self.plan.config, source, command, self.options.repository, branch
        )

    def differences(
        self, source_files: dict[str, Any], sym: bool, pool: ThreadPoolExecutor
    ) -> Iterator[str]:
        """What the directory differs in from what would be written, causes first."""
        source = self.plan.checkpoint.source
        originals = {path: source.directory / path for path in source.carried_files()}
        if self.options.layout != "gptq":
            originals[Path(RUNTIME)] = Path(__file__).with_name(RUNTIME)
        try:
            stated = read_manifest(self.directory)
            asked = self._statement(source_files, sym)
            asked["verified"] = self.options.verify or stated.get("verified") is True
            yield from _unlike(MANIFEST, {key: stated.get(key) for key in asked}, asked)
            paths = [part.path for part in self.files]
            for path in (*paths, *(self.directory / name for name in originals)):
                if not path.exists():
                    yield f"{path.name} is missing"
            infos = dict(zip(map(str, paths), pool.map(checksum, paths), strict=True))
            weights = self._weights(infos)
            asked |= self._listed(weights)
            found = listed_files(asked)
            for name, info in listed_files(stated).items():
                if found.get(name, info) != info:
                    yield f"{name} isn't what {MANIFEST} states: damaged, or edited"
            texts = {MANIFEST: json_text(asked)}
            for name, text in (texts | self._texts(sym, weights)).items():
                if (self.directory / name).read_text(encoding="utf-8") != text:
                    yield from _unlike(name, read_json(self.directory / name), json.loads(text))
                    yield f"{name} is written in another way"
            for path, original in originals.items():
                if not filecmp.cmp(original, self.directory / path, shallow=False):
                    yield f"{path} differs from {original}"
        except (OSError, UnicodeError) as error:
            yield str(error)
        except (OutputError, SourceError) as error:
            yield error.problems[0]

    def _weights(self, files: Mapping[str, Any]) -> dict[str, Any]:
        """The files of tensors, as the manifest lists them."""
        shared, *ranks = (
            {part.path.name: files[str(part.path)] for part in stream.parts}
            for stream in (self.shared, *self.streams)
        )
        if self.options.layout != "ranks":
            return {"merged": shared}
        return {"shared": shared, "ranks": ranks}

    def _texts(self, sym: bool, weights: Mapping[str, Any]) -> dict[str, str]:
        """The files beside those of tensors that speak of them."""
        digest = weights_digest({"layout": self.options.layout, "files": weights})
        texts = {WEIGHTS_INDEX: self.shared.index, "config.json": self._config(sym, digest)}
        if self.options.layout == "gptq":  # auto-gptq reads no other file
            texts[QUANT_FILES[0]] = gptq_config(self.plan.checkpoint, sym)
        return {name: json_text(value) for name, value in texts.items()}

    def _config(self, sym: bool, digest: str) -> dict[str, Any]:
        plan, quant, config = self.plan, self.plan.checkpoint.quant, self.plan.config
        if self.options.layout == "gptq":
            return config | {"quantization_config": gptq_config(plan.checkpoint, sym)}
        return config | {
            "quantization_config": {
                "quant_method": "tpgptq",
                "format_version": format_version(self._modules()),
                "bits": quant.bits,
                "group_size": quant.group_size,
                "sym": sym,
                "desc_act": False,
                "checkpoint_format": quant.checkpoint_format,
                "tp": plan.tp,
                "layout": self.options.layout,
                "weights_sha256": digest,
            }
        }

    def _statement(self, source_files: dict[str, Any], sym: bool) -> dict[str, Any]:
        """What the manifest says beside the output's files."""
        plan, checkpoint = self.plan, self.plan.checkpoint
        geometry, quant = checkpoint.geometry, checkpoint.quant
        return {
            "format": "tpgptq",
            "format_version": format_version(self._modules()),
            "tool": TOOL,
            "tp": plan.tp,
            "layout": self.options.layout,
            "verified": False,  # until it is
            "source": {
                "name": checkpoint.name,
                "revision": checkpoint.source.revision,
                "files": source_files,
            },
            "model_type": checkpoint.config["model_type"],
            "bits": quant.bits,
            "sym": sym,
            "checkpoint_format": quant.checkpoint_format,
            "heads": {
                "query": geometry.heads,
                "kv": geometry.kv_heads,
                "padded_query": plan.heads.padded_query,
                "padded_kv": plan.heads.padded_kv,
            },
            "intermediate": intermediate_sizes(checkpoint.mlps, plan.mlps),
            "modules": self._modules(),
        }

    def _listed(self, weights: dict[str, Any]) -> dict[str, Any]:
        """The output's files, as the manifest lists them."""
        # Neither the card, which is there for people to edit, nor what an import leaves.
        unlisted = {part.path.name for part in self.files} | {"README.md", MANIFEST}
        others = sorted(
            name
            for path in self.directory.rglob("*")
            if path.is_file()
            and path.parent.name != "__pycache__"
            and str(name := path.relative_to(self.directory)) not in unlisted
        )
        other = {str(path): checksum(self.directory / path) for path in others}
        return {"files": weights | {"other": other}}


def _unlike(name: str, stated: Any, wanted: Any) -> Iterator[str]:
    """Where JSON differs from what is wanted, by its keys."""
    if isinstance(stated, dict) and isinstance(wanted, dict):
        for key in wanted | stated:
            yield from _unlike(f"{name}: {key}", stated.get(key), wanted.get(key))
    elif isinstance(stated, list) and isinstance(wanted, list) and len(stated) == len(wanted):
        for at, pair in enumerate(zip(stated, wanted, strict=True)):
            yield from _unlike(f"{name}: {at}", *pair)
    elif stated != wanted:
        yield f"{name} is {stated!r:.80}, not {wanted!r:.80}"
