"""Safetensors files written tensor by tensor, with checksums, in a directory renamed when whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from threading import Event, Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpgptq_convert.errors import OutputError, TpgptqError, VerificationError
from tpgptq_convert.manifest import MANIFEST, listed_files, read_manifest
from tpgptq_convert.source import TensorSpec

SYNCED = 1 << 27  # bytes of a file that are forced to the disk at a time
ALIGNMENT = 64  # of the data in a file, for readers that map it


class Parts:
    """A sequence of tensors, announced beforehand, in files of at most `max_bytes` each.

    Every shape is known, so every tensor's place is. Data is written and hashed by threads; where
    several processes write one sequence, each writes some of its files.
    """

    def __init__(
        self,
        directory: Path,
        part_name: Callable[[int, int], str],
        specs: Mapping[str, TensorSpec],
        max_bytes: int,
        pool: ThreadPoolExecutor,
    ) -> None:
        """part_name(part, parts) names a file; a tensor larger than max_bytes has its own."""
        groups: list[dict[str, TensorSpec]] = []
        filled = max_bytes
        for name, spec in specs.items():
            if filled + spec.nbytes > max_bytes or not groups:
                groups.append({})
                filled = 0
            groups[-1][name] = spec
            filled += spec.nbytes
        names = [part_name(i, len(groups)) for i in range(len(groups))]
        self.parts = [
            Part(directory / name, group, pool) for name, group in zip(names, groups, strict=True)
        ]
        self.specs = specs
        self._at = {name: at for at, group in enumerate(groups) for name in group}
        ends = accumulate((spec.nbytes for spec in specs.values()), initial=0)
        *begins, self.total_size = ends
        self._begin = dict(zip(specs, begins, strict=True))

    @property
    def index(self) -> dict[str, Any]:
        """The Hugging Face index of the files: which tensor stands in which."""
        weight_map = {name: self.part(name).path.name for name in sorted(self._at)}
        return {"metadata": {"total_size": self.total_size}, "weight_map": weight_map}

    def part(self, name: str) -> Part:
        """The file of a tensor."""
        return self.parts[self._at[name]]

    def lane(self, name: str, lanes: int) -> int:
        """Which of so many equal runs of files a tensor's file belongs to."""
        return self._at[name] * lanes // len(self.parts)

    def position(self, name: str) -> float:
        """Where a tensor begins, as a fraction of all."""
        return self._begin[name] / max(1, self.total_size)

    def write(self, tensors: Mapping[str, NDArray[Any]]) -> list[Future[None]]:
        """Write the next tensors of their files, or the next piece of one.

        It is done when the futures are; the arrays must not change until then.
        """
        of_part: dict[Part, dict[str, NDArray[Any]]] = {}
        for name, array in tensors.items():
            of_part.setdefault(self.part(name), {})[name] = array
        return [future for part, some in of_part.items() for future in part.write(some)]


class Part:
    """One safetensors file, its tensors written in order: the hash wants them so.

    Writes and hashing are jobs of the pool, and no file stays open, however many there are.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, TensorSpec], pool: ThreadPoolExecutor
    ) -> None:
        self.path, self.specs = path, specs
        self._header = _header(specs)
        self.nbytes = len(self._header) + sum(spec.nbytes for spec in specs.values())
        self._pool = pool
        self._due = [(name, spec.nbytes) for name, spec in specs.items()][::-1]
        self._end = 0  # of what is written, or about to be
        self._hash = hashlib.sha256()
        self._to_hash: deque[tuple[Sequence[memoryview], Future[None]]] = deque()
        self._lock = Lock()  # of the two around it
        self._hashing = False

    def write(self, tensors: Mapping[str, NDArray[Any]]) -> list[Future[None]]:
        """See `Parts.write`."""
        data = []
        if self._end == 0:
            self.path.open("xb").close()
            data.append(memoryview(self._header))
        for name, array in tensors.items():
            octets = array.reshape(-1).view(np.uint8)
            expected, left = self._due.pop()
            if name != expected or len(octets) > left:
                raise AssertionError(f"{len(octets)} of {name} written where {expected} is due")
            if len(octets) < left:
                self._due.append((name, left - len(octets)))
            data.append(octets.data)
        offset = self._end
        self._end += sum(map(len, data))
        return [self._hash_next(data), self._pool.submit(self._write, data, offset)]

    def finish(self) -> dict[str, Any]:
        """Size and SHA-256 of the file, when all its writes are done."""
        if self._end == 0:  # it has no tensors
            for future in self.write({}):
                future.result()
        if self._due:
            raise AssertionError(f"{self.path.name}: {self._due[-1][0]} was not written")
        with self.path.open("r+b") as file:  # before a rename that says that it is there
            os.fsync(file.fileno())
        return {"bytes": self.nbytes, "sha256": self._hash.hexdigest()}

    def _write(self, data: Sequence[memoryview], offset: int) -> None:
        """To the disk time and again, so that nothing is left to wait for at the end."""
        begin = offset
        with self.path.open("r+b", buffering=0) as file:
            for octets in data:
                while octets:
                    written = os.pwrite(file.fileno(), octets, offset)
                    octets, offset = octets[written:], offset + written
            if begin // SYNCED < offset // SYNCED:
                os.fsync(file.fileno())

    def _hash_next(self, data: Sequence[memoryview]) -> Future[None]:
        """Hash the data after what came before; one job of the pool at a time does so."""
        future: Future[None] = Future()
        with self._lock:
            self._to_hash.append((data, future))
            if not self._hashing:
                self._hashing = True
                self._pool.submit(self._hash_all)
        return future

    def _hash_all(self) -> None:
        while True:
            with self._lock:
                if not self._to_hash:
                    self._hashing = False
                    return
                data, future = self._to_hash.popleft()
            for octets in data:
                self._hash.update(octets)
            future.set_result(None)


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


def checksum(path: Path, stop: Event | None = None) -> dict[str, Any]:
    """Size and SHA-256 of a file, as the manifest states them; wrong once `stop` is set."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    size = 0
    with path.open("rb", buffering=0) as file:
        while (count := file.readinto(buffer)) and not (stop and stop.is_set()):
            digest.update(buffer[:count])
            size += count
    return {"bytes": size, "sha256": digest.hexdigest()}


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
    made = [parent for parent in out.parents if not parent.exists()]
    stage = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.tpgptq-", dir=out.parent))
        stage.chmod(0o777 & ~_umask())
        yield stage
        _move(stage, out, overwrite)
    except VerificationError:
        with suppress(OutputError):  # something of somebody else's stands there
            _move(stage or out, failed_path(out), overwrite=True)
        raise
    except OSError as error:
        raise _cannot_write(out, error) from error
    finally:
        if stage:
            shutil.rmtree(stage, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # it holds the output
                parent.rmdir()


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
