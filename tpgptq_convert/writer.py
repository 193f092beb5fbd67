"""Safetensors files written tensor by tensor, with checksums."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import RawIOBase
from itertools import accumulate
from pathlib import Path
from threading import Event, Lock
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from tpgptq_convert.manifest import MANIFEST, read_manifest
from tpgptq_convert.source import CHUNK, TensorSpec, check_ends, reading

SYNCED = 1 << 27  # bytes of a file that are forced to the disk at a time
ALIGNMENT = 64  # of the data in a file, for readers that map it

Note = Callable[[Path, int, str], None]  # so many first bytes of a file are written; their SHA-256


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
        note: Note = lambda *_: None,
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
            Part(directory / name, group, pool, note)
            for name, group in zip(names, groups, strict=True)
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

    def write(self, tensors: Mapping[str, NDArray[Any]]) -> list[Writing]:
        """Write the next tensors of their files, or the next piece of one.

        The arrays must not change until it is done. The results are waited for in their order.
        """
        of_part: dict[Part, dict[str, NDArray[Any]]] = {}
        for name, array in tensors.items():
            of_part.setdefault(self.part(name), {})[name] = array
        return [part.write(some) for part, some in of_part.items()]


@dataclass(frozen=True)
class Writing:
    """A stretch of a file on its way to the disk."""

    part: Part
    end: int  # of the stretch, in the file
    hashed: Future[str]  # SHA-256 of the file up to there
    written: Future[None]

    def done(self) -> bool:
        """Whether it is there."""
        return self.written.done() and self.hashed.done()

    def result(self) -> None:
        """Wait until it is there, all that was written before it being there already."""
        self.written.result()
        self.part.note(self.part.path, self.end, self.hashed.result())


class Part:
    """One safetensors file, its tensors written in order: the hash wants them so.

    Writes and hashing are jobs of the pool, and no file stays open, however many there are.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, TensorSpec], pool: ThreadPoolExecutor, note: Note
    ) -> None:
        self.path, self.specs, self.note = path, specs, note
        self.kept: frozenset[str] = frozenset()  # tensors that an earlier run has written
        self._header = _header(specs)
        ends = accumulate((spec.nbytes for spec in specs.values()), initial=len(self._header))
        _, *self._ends = ends  # of the tensors
        self.nbytes = max(self._ends, default=len(self._header))
        self._pool = pool
        self._due = [(name, spec.nbytes) for name, spec in specs.items()][::-1]
        self._end = 0  # of what is written, or about to be
        self._hash = hashlib.sha256()
        self._to_hash: deque[tuple[Sequence[memoryview], Future[str]]] = deque()
        self._lock = Lock()  # of the two around it
        self._hashing = False

    def reuse(self, written: Mapping[int, str]) -> None:
        """Keep the tensors that an earlier run has written, if their bytes still hash the same.

        written: SHA-256 of the file's first bytes, by how many they are.
        """
        running, size, last, kept = hashlib.sha256(), 0, max(written, default=0), 0
        try:
            with self.path.open("r+b") as file:
                for count, end in enumerate(self._ends, start=1):
                    if end > last or not _advance(file, running, end - size):
                        break
                    size = end
                    if written.get(end) == running.hexdigest():
                        kept, self._end, self._hash = count, end, running.copy()
                file.truncate(self._end)
        except FileNotFoundError:
            return
        self.kept = frozenset(list(self.specs)[:kept])
        del self._due[len(self._due) - kept :]
        if not kept:
            self.path.unlink()

    def write(self, tensors: Mapping[str, NDArray[Any]]) -> Writing:
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
        hashed = self._hash_next(data)
        return Writing(self, self._end, hashed, self._pool.submit(self._write, data, offset))

    def finish(self) -> dict[str, Any]:
        """Size and SHA-256 of the file, when all its writes are done."""
        if self._end == 0:  # it has no tensors
            self.write({}).result()
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

    def _hash_next(self, data: Sequence[memoryview]) -> Future[str]:
        """Hash the data after what came before; one job of the pool at a time does so."""
        future: Future[str] = Future()
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
            future.set_result(self._hash.hexdigest())


def _advance(file: BinaryIO, digest: Any, count: int) -> bool:
    """Hash the next bytes of a file; whether there are so many."""
    while count and (data := file.read(min(count, CHUNK))):
        digest.update(data)
        count -= len(data)
    return count == 0


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
    with reading(path), _plain(path) as file:
        while (count := file.readinto(buffer)) and not (stop and stop.is_set()):
            digest.update(buffer[:count])
            size += count
    return {"bytes": size, "sha256": digest.hexdigest()}


def _plain(path: Path) -> RawIOBase:
    check_ends(path)
    return path.open("rb", buffering=0)


def json_text(value: Any) -> str:
    """As the JSON files of an output are written."""
    return json.dumps(value, indent=2) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Make a new file; an earlier one, or a link, which must not be followed, gives way."""
    path.unlink(missing_ok=True)
    with path.open("x", encoding="utf-8") as file:
        file.write(json_text(value))


def record_verified(out: Path) -> dict[str, Any]:
    """State in OUT's manifest that OUT was proven against its source; returns the manifest."""
    manifest = read_manifest(out) | {"verified": True}
    new = out / f".{MANIFEST}"
    try:
        write_json(new, manifest)
        new.replace(out / MANIFEST)
    finally:
        new.unlink(missing_ok=True)  # it was not to be: the disk is full
    return manifest
