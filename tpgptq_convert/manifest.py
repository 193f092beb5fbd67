"""The manifest of an output, tpgptq.json: its name, its version, and what it must look like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tpgptq_convert.errors import OutputError
from tpgptq_convert.source import read_json

FORMAT_VERSION = 1
MANIFEST = "tpgptq.json"
INDEX = "tpgptq-index.safetensors"
# The weights that loaders of plain checkpoints read: all, or in layout ranks the shared ones.
WEIGHTS_INDEX = "model.safetensors.index.json"
LAYOUTS = ("ranks", "merged")


def read_manifest(out: Path) -> dict[str, Any]:
    """OUT's manifest; raises OutputError if there is none, or of an unknown version."""
    if not (out / MANIFEST).is_file():
        raise OutputError(
            f"{out}: has no {MANIFEST}; must be an output of `tpgptq convert`",
            hint="for an output of several degrees name one of its tp-N directories",
        )
    manifest = read_json(out / MANIFEST)
    version = manifest.get("format_version")
    if manifest.get("format") != "tpgptq" or version != FORMAT_VERSION:
        raise OutputError(
            f"{out / MANIFEST}: format {manifest.get('format')!r} version {version!r}; "
            f"must be 'tpgptq' version {FORMAT_VERSION}",
            hint="use the version of tpgptq-convert that wrote it, or convert again",
        )
    problems = [f"{out / MANIFEST}: {problem}" for problem in _malformed(manifest)]
    if problems:
        raise OutputError(*problems, hint="the manifest is damaged; convert again")
    return manifest


def _malformed(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What in a manifest isn't of the shape that the format prescribes."""
    tp, layout = manifest.get("tp"), manifest.get("layout")
    if type(tp) is not int or tp < 1:
        yield f"tp is {tp!r}; must be a positive integer"
        return
    if layout not in LAYOUTS:
        yield f"layout is {layout!r}; must be 'ranks' or 'merged'"
        return
    files = manifest.get("files")
    names = ("merged", "other") if layout == "merged" else ("shared", "other")
    groups = [files.get(name) if isinstance(files, dict) else None for name in names]
    if layout == "ranks":
        ranks = files.get("ranks") if isinstance(files, dict) else None
        if not isinstance(ranks, list) or len(ranks) != tp:
            yield f"files.ranks must be a list of {tp}, one for each rank"
        else:
            groups += ranks
    for group in groups:
        if not isinstance(group, dict) or not all(isinstance(e, dict) for e in group.values()):
            yield "files must map every file's name to its bytes and sha256"
        elif bad := [name for name in group if not _inside(name)]:
            yield f"files names {bad[0][:80]!r}; must be a file inside the output"
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
        elif stated["in_features"] % stated["group_size"]:
            yield f"{name}: in_features must be a multiple of group_size"
    for key in ("source", "heads", "intermediate"):
        if not isinstance(manifest.get(key), dict):
            yield f"{key} is {manifest.get(key)!r}; must be an object"


def listed_files(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Every file that the manifest states, with its bytes and sha256."""
    listed: dict[str, Any] = dict(manifest["files"]["other"])
    for _, files in weight_files(manifest):
        listed |= files
    return listed


def _inside(name: str) -> bool:
    """Whether a file's name can only mean a file inside the output."""
    parts = Path(name).parts
    long = any(len(part.encode("utf-8", "replace")) > 255 for part in parts)
    return bool(parts) and "\0" not in name and ".." not in parts and parts[0] != "/" and not long


def weight_files(manifest: Mapping[str, Any]) -> Iterator[tuple[int | None, Mapping[str, Any]]]:
    """(rank, files): None for the files that every rank reads."""
    files = manifest["files"]
    if manifest["layout"] == "merged":
        yield None, files["merged"]
    else:
        yield None, files["shared"]
        yield from enumerate(files["ranks"])
