"""The manifest of an output, tpgptq.json: its version, what it must be, what it prescribes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tpgptq_convert.config import BITS, FORMATS, layer_tensors, pack_factor
from tpgptq_convert.errors import OutputError
from tpgptq_convert.source import FLOATS, SafetensorsFile, TensorSpec, read_json

# In version 2 a module may say "bits" of its own, null if it isn't quantised but has a weight.
FORMAT_VERSIONS = (1, 2)
MANIFEST = "tpgptq.json"
INDEX = "tpgptq-index.safetensors"
RUNTIME = "tpgptq_runtime.py"
TOOL = f"tpgptq-convert {importlib.metadata.version('tpgptq-convert')}"
# The weights that loaders of plain checkpoints read: all, or in layout ranks the shared ones.
WEIGHTS_INDEX = "model.safetensors.index.json"
LAYOUTS = ("ranks", "merged", "gptq")


def read_manifest(out: Path) -> dict[str, Any]:
    """OUT's manifest; raises OutputError if there is none, or of an unknown version."""
    if not (out / MANIFEST).is_file():
        several = sorted(str(path.parent) for path in out.glob(f"tp-*/{MANIFEST}"))
        raise OutputError(
            f"{out}: has no {MANIFEST}; must be an output of `tpgptq convert`",
            hint=f"name one of its degrees: {', '.join(several)}"
            if several
            else "name a directory that it wrote; `tpgptq verify` takes MODEL first, then OUT",
        )
    manifest = read_json(out / MANIFEST)
    version = manifest.get("format_version")
    if manifest.get("format") != "tpgptq" or version not in FORMAT_VERSIONS:
        raise OutputError(
            f"{out / MANIFEST}: format {manifest.get('format')!r} version {version!r}; "
            f"must be 'tpgptq' version {' or '.join(map(str, FORMAT_VERSIONS))}",
            hint="use the version of tpgptq-convert that wrote it, or convert again",
        )
    problems = [f"{out / MANIFEST}: {problem}" for problem in _malformed(manifest)]
    if problems:
        raise OutputError(*problems, hint="the manifest is damaged; convert again")
    return manifest


def format_version(modules: Mapping[str, Any]) -> int:
    """The first version that can say what these modules are, for readers of that version."""
    return 2 if any("bits" in module for module in modules.values()) else 1


def bits_of(manifest: Mapping[str, Any], name: str) -> int | None:
    """The bits of a module's weights; None if it isn't quantised."""
    bits: int | None = manifest["modules"][name].get("bits", manifest["bits"])
    return bits


def _malformed(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What in a manifest isn't of the shape that the format prescribes."""
    tp, layout = manifest.get("tp"), manifest.get("layout")
    if type(tp) is not int or tp < 1:
        yield f"tp is {tp!r}; must be a positive integer"
        return
    if layout not in LAYOUTS:
        yield f"layout is {layout!r}; must be one of {LAYOUTS}"
        return
    files = manifest.get("files")
    names = ("shared", "other") if layout == "ranks" else ("merged", "other")
    groups = [files.get(name) if isinstance(files, dict) else None for name in names]
    if layout == "ranks":
        ranks = files.get("ranks") if isinstance(files, dict) else None
        if not isinstance(ranks, list) or len(ranks) != tp:
            yield f"files.ranks must be a list of {tp}, one for each rank"
        else:
            groups += ranks
    for group in groups:
        if not isinstance(group, dict) or not all(map(_is_stated, group.values())):
            yield "files must map every file's name to its bytes and sha256"
        elif bad := [name for name in group if not _inside(name)]:
            yield f"files names {bad[0][:80]!r}; must be a file inside the output"
    listed = [name for group in groups if isinstance(group, dict) for name in group]
    if len(listed) > len(set(listed)):
        yield "files names a file twice; each must be one rank's, or all ranks'"
    bits = manifest.get("bits")
    if type(bits) is not int or bits not in BITS:
        yield f"bits is {bits!r}; must be one of {BITS}"
        return
    if type(manifest.get("sym")) is not bool:
        yield f"sym is {manifest.get('sym')!r}; must be true or false"
    if manifest.get("checkpoint_format") not in FORMATS:
        yield (
            f"checkpoint_format is {manifest.get('checkpoint_format')!r}; must be "
            f"{' or '.join(FORMATS)}"
        )
    modules = manifest.get("modules")
    for name, module in modules.items() if isinstance(modules, dict) else [("modules", None)]:
        stated = module if isinstance(module, dict) else {}
        sizes = [stated.get(key) for key in ("in_features", "out_features", "group_size")]
        if not all(type(size) is int and size > 0 for size in sizes):
            yield f"{name} must state in_features, out_features and group_size"
        elif stated.get("parallel") not in ("column", "row"):
            yield f"{name}: parallel is {stated.get('parallel')!r}; must be 'column' or 'row'"
        elif type(stated.get("perm")) is not bool:
            yield f"{name}: perm is {stated.get('perm')!r}; must be true or false"
        elif layout == "gptq" and stated["perm"]:
            yield f"{name}: perm is True; must be false, since this layout has none"
        elif layout != "gptq" and stated["in_features"] % stated["group_size"]:
            yield f"{name}: in_features must be a multiple of group_size"
        elif (own := stated.get("bits", bits)) not in (*BITS, None) or type(own) is float:
            yield f"{name}: bits is {own!r}; must be one of {BITS}, or null"
        elif own and any(stated[x] % pack_factor(own) for x in ("in_features", "out_features")):
            yield f"{name}: in_features and out_features must be multiples of {pack_factor(own)}"
    for key in ("source", "heads", "intermediate"):
        if not isinstance(manifest.get(key), dict):
            yield f"{key} is {manifest.get(key)!r}; must be an object"
    source = manifest.get("source")
    if isinstance(source, dict):
        if not isinstance(source.get("name"), str):
            yield f"source.name is {source.get('name')!r}; must be text"
        if not isinstance(source.get("revision", 0), str | None):
            yield f"source.revision is {source.get('revision')!r}; must be a commit, or null"
    for key in ("tool", "model_type"):
        if not isinstance(manifest.get(key), str):
            yield f"{key} is {manifest.get(key)!r}; must be text"
    heads = manifest.get("heads")
    if isinstance(heads, dict):
        wanted = ("query", "kv", "padded_query", "padded_kv")
        counts: list[Any] = [heads.get(name) for name in wanted]
        query, kv = counts[2:]
        if not all(type(count) is int and count > 0 for count in counts):
            yield f"heads must state {', '.join(wanted)}"
        elif query % tp or (kv % tp and tp % kv) or query // tp % max(1, kv // tp):
            yield f"heads: {query} query and {kv} kv heads can't be shared by {tp} ranks"


def _is_stated(entry: Any) -> bool:
    """Whether a file's entry says how many bytes it has, and their SHA-256."""
    return (
        isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and entry["bytes"] >= 0
        and isinstance(entry.get("sha256"), str)
    )


def intermediate_sizes(
    whole: Mapping[str, int], padded: Mapping[str, int]
) -> dict[str, int | dict[str, int]]:
    """What the manifest says of the MLPs' channels: of the first kind, and under their names of
    the others; `whole` and `padded` have the same names."""
    sizes = {name: {"size": whole[name], "padded": width} for name, width in padded.items()}
    first = next(iter(sizes))
    return {**sizes.pop(first), **sizes}


def listed_files(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Every file that the manifest states, with its bytes and sha256."""
    listed: dict[str, Any] = dict(manifest["files"]["other"])
    for _, files in weight_files(manifest):
        listed |= files
    return listed


def weights_digest(manifest: Mapping[str, Any]) -> str:
    """A name for exactly these weights: of the sizes and checksums of their files.

    config.json states it, because servers keep what they compiled for a config, and which layers
    gather their input is in the weights alone.
    """
    files = [[rank, sorted(files.items())] for rank, files in weight_files(manifest)]
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _inside(name: str) -> bool:
    """Whether a file's name can only mean a file inside the output."""
    parts = Path(name).parts
    long = any(len(part.encode("utf-8", "replace")) > 255 for part in parts)
    return bool(parts) and "\0" not in name and ".." not in parts and parts[0] != "/" and not long


def weight_files(manifest: Mapping[str, Any]) -> Iterator[tuple[int | None, Mapping[str, Any]]]:
    """(rank, files): None for the files that every rank reads."""
    files = manifest["files"]
    if manifest["layout"] == "ranks":
        yield None, files["shared"]
        yield from enumerate(files["ranks"])
    else:
        yield None, files["merged"]


def merged_part(part: int, parts: int) -> str:
    """What a file of a merged output is called."""
    return f"model-{part + 1:05}-of-{parts:05}.safetensors"


def shared_part(part: int, parts: int) -> str:
    """What a file that all ranks read is called."""
    return "model-shared.safetensors" if parts == 1 else f"model-shared-part-{part}.safetensors"


def rank_part(rank: int, part: int, parts: int) -> str:
    """What a file of one rank is called."""
    return f"model-rank-{rank}-part-{part}.safetensors"


def wrong_names(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Files of weights that have other names than they must: loaders choose files by their names,
    model.safetensors before any index, and adapters."""
    ranks = manifest["layout"] == "ranks"
    for rank, files in weight_files(manifest):
        part_name: Callable[[int, int], str] = shared_part if ranks else merged_part
        if rank is not None:
            part_name = partial(rank_part, rank)
        wanted = {part_name(part, len(files)) for part in range(len(files))}
        for name in sorted(files.keys() - wanted):
            of = "all ranks" if rank is None else f"rank {rank}"
            yield f"{name}: no name for one of {len(files)} weight files of {of}"


def wrong_tensors(
    manifest: Mapping[str, Any], rank: int | None, files: Iterable[SafetensorsFile]
) -> Iterator[str]:
    """What the headers of one rank's files, or (None) of all ranks', have other than they must."""
    specs: dict[str, TensorSpec] = {}
    for file in files:
        for name in specs.keys() & file.specs.keys():
            yield f"{name}: stands in {file.path.name} and in a file before it"
        specs |= file.specs
    merged = manifest["layout"] == "merged"
    where = "the shared files" if rank is None else f"the files of rank {rank}"
    of_modules = set()
    for name, module in manifest["modules"].items():
        wanted: Mapping[str, TensorSpec] = {}
        if merged or rank is not None:
            wanted = _module_tensors(manifest, name, specs)
        for part, spec in wanted.items():
            found = specs.get(f"{name}.{part}")
            of_modules.add(f"{name}.{part}")
            if found is None and part != "bias":
                yield f"{name}.{part}: missing from {where}; must be there"
            elif found and (
                found.shape != spec.shape
                or found.dtype not in (FLOATS if spec.dtype in FLOATS else (spec.dtype,))
            ):
                yield (
                    f"{name}.{part}: is {found.dtype} {list(found.shape)}; must be "
                    f"{spec.dtype} {list(spec.shape)}"
                )
        if module["parallel"] == "row" and rank is None:  # a bias that is added once
            of_modules.add(f"{name}.bias")
    for name in specs.keys() - of_modules:
        if rank is not None or name.rpartition(".")[0] in manifest["modules"]:
            yield f"{name}: doesn't belong into {where}"


def _module_tensors(
    manifest: Mapping[str, Any], name: str, specs: Mapping[str, TensorSpec]
) -> dict[str, TensorSpec]:
    """A module's tensors in one rank's files, or in a merged output's; floats are given as F16."""
    module, bits = manifest["modules"][name], bits_of(manifest, name)
    k, n, tp = module["in_features"], module["out_features"], manifest["tp"]
    groups = k // module["group_size"]
    if manifest["layout"] == "merged" and module["parallel"] == "row":
        k, groups = k * tp, groups * tp
    elif manifest["layout"] == "merged":  # kv heads that ranks share stand in it once
        part, axis = ("weight", 0) if bits is None else ("scales", -1)
        found = specs.get(f"{name}.{part}")
        pieces = found.shape[axis] // n if found and found.shape else tp
        n *= pieces if pieces and tp % pieces == 0 else tp
    tensors = layer_tensors(bits, k, n, groups, "F16")
    if module["perm"]:
        tensors["perm"] = TensorSpec("I32", (k,))
    if module["parallel"] == "column":
        tensors["bias"] = TensorSpec("F16", (n,))
    return tensors
