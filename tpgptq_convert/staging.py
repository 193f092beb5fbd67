"""Where an output comes into being: beside its place, renamed when it is whole, resumed if asked.

    .OUT.tpgptq/journal   what of the output is written; locked by those who write it
    .OUT.tpgptq/output    what becomes OUT
    .OUT.tpgptq/old       what stood there, while the two change places

A run that is killed leaves this directory behind. The lock ends with the processes that hold it, so
the next run knows that nobody writes there, and takes the directory over.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tpgptq_convert.errors import OutputError, TpgptqError, VerificationError
from tpgptq_convert.manifest import MANIFEST, listed_files, read_manifest

JOURNAL, OUTPUT, OLD = "journal", "output", "old"

Prefixes = Mapping[int, str]  # SHA-256 of a file's first bytes, by how many they are


class Journal:
    """A line of JSON for each stretch of a file that is written, and the lock of all of it.

    A line says which SHA-256 so many first bytes of a file have. They are hashed again before they
    are reused, so a line need not be on the disk, nor be true.
    """

    def __init__(self, work: Path) -> None:
        """Open the journal in `work`, or begin it."""
        self.work = work
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        self._file = os.open(work / JOURNAL, flags, 0o666)

    def lock(self, kind: int) -> None:
        """Take the lock, or exchange it; raises OutputError where another run has it."""
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{self.work}: another conversion is writing there; must be one at a time",
                hint="wait for it, or name another output directory",
            ) from None

    def is_current(self) -> bool:
        """Whether this is still the file of its name: its run may have ended, and removed it."""
        try:
            return os.path.samestat(os.fstat(self._file), (self.work / JOURNAL).stat())
        except FileNotFoundError:
            return False

    def begin(self, conversion: str) -> None:
        """Forget what was written, for another conversion, of this fingerprint."""
        os.ftruncate(self._file, 0)
        self._append({"tpgptq": conversion})

    def read(self) -> tuple[str | None, dict[str, dict[int, str]]]:
        """The fingerprint of the conversion, and what is written of each file."""
        lines = (self.work / JOURNAL).read_bytes().splitlines()
        conversion, written = None, dict[str, dict[int, str]]()
        for line in lines:
            try:
                match json.loads(line):
                    case {"tpgptq": str(text)}:
                        conversion = text
                    case {"file": str(name), "bytes": int(nbytes), "sha256": str(sha256)}:
                        written.setdefault(name, {})[nbytes] = sha256
            except (ValueError, RecursionError):  # a line that was cut when the run was killed
                continue
        return conversion, written

    def note(self, path: Path, nbytes: int, sha256: str) -> None:
        """So many first bytes of a file of the output are written."""
        name = str(path.relative_to(self.work / OUTPUT))
        self._append({"file": name, "bytes": nbytes, "sha256": sha256})

    def _append(self, line: Mapping[str, object]) -> None:
        os.write(self._file, b"\n" + json.dumps(line).encode())  # the line before may be cut

    def close(self) -> None:
        os.close(self._file)


@dataclass(frozen=True)
class Stage:
    """The directory that becomes the output, and what an earlier run has written there."""

    directory: Path
    written: Mapping[str, Prefixes]  # by the file's name in the directory


@contextmanager
def staging(
    out: Path, conversion: str, *, overwrite: bool = False, resume: bool = False
) -> Iterator[Stage]:
    """A directory beside `out` that becomes it, or leaves nothing.

    With `resume` it is left, and taken up again by a conversion of the same fingerprint. After a
    VerificationError it is kept as OUT.failed, for study. One run at a time has it.
    """
    work, made = work_path(out), [parent for parent in out.parents if not parent.exists()]
    kept = False
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _claimed(work) as journal:
            try:
                if _put_back(work, out):
                    check_replaceable(out, overwrite)
                stage = _prepared(journal, conversion, resume)
                kept = resume
                yield stage
                _flush(stage.directory)
                _move(work, out, overwrite)
                kept = False
            except VerificationError as error:
                kept = False
                told = _set_aside(stage.directory, failed_path(out))
                raise VerificationError(*error.problems, hint=f"{error.hint}; {told}") from None
            finally:
                _put_back(work, out)
                if not kept:
                    shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise _cannot_write(out, error, kept) from error
    finally:
        for parent in made:
            with suppress(OSError):  # it holds the output
                parent.rmdir()


@contextmanager
def journal_of(stage: Stage) -> Iterator[Journal]:
    """For one of the processes that write the output: it is nobody else's until all have ended."""
    journal = Journal(stage.directory.parent)
    try:
        journal.lock(fcntl.LOCK_SH)
        yield journal
    finally:
        journal.close()


@contextmanager
def _claimed(work: Path) -> Iterator[Journal]:
    """The directory of this run alone, new or left by one that was killed."""
    while True:
        try:
            if not _made(work):
                _check_left_behind(work)
            journal = Journal(work)
        except FileNotFoundError:  # its run ended, and removed it
            continue
        try:
            journal.lock(fcntl.LOCK_EX)  # nobody else is writing, and
            journal.lock(fcntl.LOCK_SH)  # the other processes of this run may
            if journal.is_current():
                yield journal
                return
        finally:
            journal.close()


def _made(work: Path) -> bool:
    try:
        work.mkdir()
    except FileExistsError:
        return False
    return True


def _check_left_behind(work: Path) -> None:
    """Refuse to take over anything but what a run of this tool left."""
    mine = not work.is_symlink() and work.is_dir() and work.stat().st_uid == os.geteuid()
    if not mine or not all(_is_ours(child) for child in work.iterdir()):
        raise OutputError(
            f"{work}: exists, and is not what an interrupted conversion of yours left; must not "
            "exist, or be that",
            hint="move it away, or name another output directory",
        )


def _is_ours(path: Path) -> bool:
    """Whether a run of this tool may have left this in its directory.

    Nothing there leads elsewhere, by a link of either kind: it is written to, and cut.
    """
    if path.name == JOURNAL:
        return _is_file_of_its_own(path)
    if path.name not in (OUTPUT, OLD) or path.is_symlink() or not path.is_dir():
        return False
    return path.name == OLD or all(
        (child.is_dir() and not child.is_symlink()) or _is_file_of_its_own(child)
        for child in path.rglob("*")
    )


def _is_file_of_its_own(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISREG(status.st_mode) and status.st_nlink <= 1


def _prepared(journal: Journal, conversion: str, resume: bool) -> Stage:
    """The output as it was left, without what can't be reused; or an empty one."""
    directory = journal.work / OUTPUT
    shutil.rmtree(journal.work / OLD, ignore_errors=True)
    found, written = journal.read()
    if not resume or found != conversion:
        written = {}
        if directory.exists():
            shutil.rmtree(directory)
        journal.begin(conversion)
    directory.mkdir(exist_ok=True)
    for path in list(directory.rglob("*")):
        if not path.is_dir() and str(path.relative_to(directory)) not in written:
            path.unlink()
    return Stage(directory, written)


def work_path(out: Path) -> Path:
    """Where an output comes into being."""
    return out.with_name(_work_name(out))


def _work_name(out: Path) -> str:
    return f".{out.name}.tpgptq"


def failed_path(out: Path) -> Path:
    """Where an output that failed its verification is kept."""
    return out.with_name(out.name + ".failed")


def check_free(out: Path, overwrite: bool, needed: int, source: Path) -> None:
    """Refuse an output that exists, that would touch the source, or that can't fit."""
    real, model, work = out.resolve(), source.resolve(), out.parent.resolve() / _work_name(out)
    if model in real.parents or {real, work} & {model, *model.parents}:
        raise OutputError(
            f"{out}: lies over the source {source}; must be a directory of its own",
            hint="name another output directory",
        )
    if out.exists() or out.is_symlink():
        check_replaceable(out, overwrite)
    parent = next(p for p in real.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"{parent}: not a directory that can be written; must be one, to hold {out.name}",
            hint="name another output directory, or change its permissions",
        )
    left = (path.lstat().st_size for path in (work_path(out) / OUTPUT).rglob("*"))
    free = shutil.disk_usage(parent).free + sum(left)  # which is replaced, or reused
    if needed > free:
        raise OutputError(
            f"{out}: needs {needed / 1e9:.1f} GB; its disk has {free / 1e9:.1f} GB free",
            hint="free some space, or name an output directory on another disk",
        )


def standing(out: Path, overwrite: bool) -> str | None:
    """What a conversion would make of what stands in its place, in words; None if nothing does."""
    if not (out.exists() or out.is_symlink()):
        return None
    try:
        check_replaceable(out, overwrite)
    except OutputError as error:
        return f"{error.problems[0]}; it would be refused ({error.hint})"
    return f"{out}: exists; it would be replaced"


def check_replaceable(out: Path, overwrite: bool) -> None:
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


def _cannot_write(out: Path, error: OSError, kept: bool) -> OutputError:
    return OutputError(
        f"{out}: can't be written ({error.strerror or error}"
        f"{f': {error.filename}' if error.filename else ''}); "
        f"{'what is written is kept for --resume' if kept else 'nothing was left behind'}",
        hint="name an output directory that can be written and has room",
    )


def _flush(directory: Path) -> None:
    """Have all of it on the disk, before a rename that says so: the power may fail after that."""
    for path in (*directory.rglob("*"), directory):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _move(work: Path, out: Path, overwrite: bool) -> None:
    """Rename what is whole to `out`; what stood there goes only once it is in place."""
    if out.exists() or out.is_symlink():  # also where it came into being meanwhile
        check_replaceable(out, overwrite)
        out.rename(work / OLD)
    (work / OUTPUT).rename(out)
    if (work / OLD).exists():
        (work / OLD).rename(work / OUTPUT)  # a part of it must not be put back, if this is killed


def _put_back(work: Path, out: Path) -> bool:
    """Undo the first half of an exchange that was cut short; whether there was one."""
    if out.exists() or not (work / OLD).exists():
        return False
    (work / OLD).rename(out)
    return True


def _set_aside(directory: Path, failed: Path) -> str:
    """Rename an output that failed its verification, if it can be; says what became of it."""
    try:
        if failed.exists() or failed.is_symlink():
            check_replaceable(failed, overwrite=True)
            shutil.rmtree(failed)
        directory.rename(failed)
    except (OutputError, OSError):  # something of somebody else's stands there
        return f"the output could not be kept in {failed}"
    return f"the output is kept in {failed}"
