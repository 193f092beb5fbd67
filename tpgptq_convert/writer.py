"""Safetensors files written tensor by tensor, with checksums, in a directory renamed when whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpgptq_convert.errors import OutputError, TpgptqError, VerificationError
from tpgptq_convert.manifest import MANIFEST, listed_files, read_manifest
from tpgptq_convert.source import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT = 64  # of the data in a file, for readers that map it


class Parts:
    """A sequence of tensors, announced beforehand, in files of at most `max_bytes` each.

    A file's header can be written first because every shape is known; then the tensors follow in
    the order announced, each written once and hashed on the way.
    """

    def __init__(
        self,
        directory: Path,
        part_name: Callable[[int, int], str],
        specs: Mapping[str, TensorSpec],
        max_bytes: int,
    ) -> None:
        """part_name(part, parts) names a file; a tensor larger than max_bytes has its own."""
        self._directory = directory
        groups: list[dict[str, TensorSpec]] = []
        filled = max_bytes
        for name, spec in specs.items():
            if filled + spec.nbytes > max_bytes or not groups:
                groups.append({})
                filled = 0
            groups[-1][name] = spec
            filled += spec.nbytes
        self._pending = [(part_name(i, len(groups)), group) for i, group in enumerate(groups)]
        self.weight_map = {name: part for part, group in self._pending for name in group}
        self.total_size = sum(spec.nbytes for spec in specs.values())
        self.files: dict[str, dict[str, Any]] = {}
        self._current: _Part | None = None

    @property
    def index(self) -> dict[str, Any]:
        """The Hugging Face index of the files: which tensor stands in which."""
        weight_map = dict(sorted(self.weight_map.items()))
        return {"metadata": {"total_size": self.total_size}, "weight_map": weight_map}

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor."""
        if self._current is None:
            part, specs = self._pending.pop(0)
            self._current = _Part(self._directory / part, specs)
        self._current.write(name, tensor)
        if self._current.full:
            self.files[self._current.path.name] = self._current.close()
            self._current = None

    def close(self) -> None:
        """Close a file that was left in the middle."""
        if self._current is not None:
            self._current.close()
            self._current = None


class _Part:
    """One safetensors file being written."""

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self.path = path
        self._expected = list(specs.items())[::-1]
        self._hash = hashlib.sha256()
        self._file = path.open("xb")
        self._append(_header(specs))

    @property
    def full(self) -> bool:
        return not self._expected

    def write(self, name: str, tensor: Tensor) -> None:
        import torch

        expected, spec = self._expected.pop()
        data = tensor.detach().cpu().contiguous()
        octets = data.as_strided((data.numel(),), (1,)).view(torch.uint8)
        if (name, tuple(data.shape), data.nbytes) != (expected, spec.shape, spec.nbytes):
            raise AssertionError(f"{name} {tuple(data.shape)} written where {expected} was due")
        self._append(octets.numpy().data)

    def _append(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._file.write(data)

    def close(self) -> dict[str, Any]:
        size = self._file.tell()
        self._file.close()
        return {"bytes": size, "sha256": self._hash.hexdigest()}


def _header(specs: Mapping[str, TensorSpec]) -> bytes:
    """A safetensors header for the tensors in this order, without gaps."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        begin, end = end, end + spec.nbytes
        entries[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def checksum(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as the manifest states them."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def check_free(out: Path, overwrite: bool, needed: int, source: Path) -> None:
    """Refuse an output that exists, that would touch the source, or that can't fit."""
    real, model = out.resolve(), source.resolve()
    if real == model or real in model.parents or model in real.parents:
        raise OutputError(
            f"{out}: lies over the source {source}; must be a directory of its own",
            hint="name another output directory",
        )
    if out.exists() or out.is_symlink():
        _check_replaceable(out, overwrite)
    parent = next(p for p in real.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"{parent}: not a directory that can be written; must be one, to hold {out.name}",
            hint="name another output directory, or change its permissions",
        )
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise OutputError(
            f"{out}: needs {needed / 1e9:.1f} GB; its disk has {free / 1e9:.1f} GB free",
            hint="free some space, or name an output directory on another disk",
        )


def _check_replaceable(out: Path, overwrite: bool) -> None:
    """Refuse to replace anything but an earlier output, whole and with nothing added to it."""
    foreign = _foreign(out)
    if foreign:
        what = "is" if foreign == out else f"{foreign} is"
        raise OutputError(
            f"{out}: exists, and {what} no part of an output of this tool; must be a new directory",
            hint="name another output directory",
        )
    if not overwrite:
        raise OutputError(
            f"{out}: exists; must be a new directory", hint="use --overwrite to replace it"
        )


def _foreign(path: Path) -> Path | None:
    """Something in a directory that no run of this tool wrote there, or None."""
    if path.is_symlink() or not path.is_dir() or path.resolve() == Path.cwd():
        return path
    if not (path / MANIFEST).is_file():
        for child in path.iterdir():  # an output of several degrees holds tp-N alone
            mine = child.name.startswith("tp-") and (child / MANIFEST).is_file()
            found = _foreign(child) if mine else child
            if found:
                return found
        return None
    try:
        listed = {*listed_files(read_manifest(path)), MANIFEST, "README.md"}
    except TpgptqError:
        return path / MANIFEST
    files = (
        child
        for child in path.rglob("*")
        if (child.is_symlink() or not child.is_dir()) and child.parent.name != "__pycache__"
    )
    return next((file for file in files if str(file.relative_to(path)) not in listed), None)


@contextmanager
def staging(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary directory beside `out` that becomes it, or leaves nothing.

    After a VerificationError it is kept as OUT.failed, for study.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.tpgptq-", dir=out.parent))
        stage.chmod(0o777 & ~_umask())
    except OSError as error:
        raise _cannot_write(out, error) from None
    try:
        yield stage
        _move(stage, out, overwrite)
    except VerificationError:
        with suppress(OutputError):  # something of somebody else's stands there
            _move(stage, failed_path(out), overwrite=True)
        raise
    except OSError as error:
        raise _cannot_write(out, error) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def failed_path(out: Path) -> Path:
    """Where an output that failed its verification is kept."""
    return out.with_name(out.name + ".failed")


def _cannot_write(out: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{out}: can't be written ({error.strerror or error}"
        f"{f': {error.filename}' if error.filename else ''}); nothing was left behind",
        hint="name an output directory that can be written and has room",
    )


def _move(stage: Path, out: Path, overwrite: bool) -> None:
    """Rename `stage` to `out`; what stood there goes only once the new one is in place."""
    if out.exists() or out.is_symlink():  # also where it came into being meanwhile
        _check_replaceable(out, overwrite)
    if not out.exists():
        stage.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.tpgptq-", dir=out.parent)) / out.name
    try:
        out.rename(old)
        stage.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(old.parent, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
