"""Models on the Hugging Face Hub, through huggingface_hub: found, read by ranges, downloaded.

HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean to the library. It is imported
where a Hub name was given, so that `inspect` of a directory answers without it.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfFileSystem, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from tpgptq_convert.config import QUANT_FILES
from tpgptq_convert.errors import HubError
from tpgptq_convert.source import INDEX_SUFFIX, WEIGHT_SUFFIXES

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# What a plan is made from, beside the weights' headers.
CONFIGS = ["config.json", *QUANT_FILES, "tpgptq.json", f"*{INDEX_SUFFIX}"]
HEAD = 100_000  # bytes of a file that are fetched first; most headers are in them
LONGEST_HEADER = 100_000_000  # safetensors takes no longer one
LONGEST_FILE = 1 << 50
# What the library's HTTP client raises, which hasn't always been the same one.
HTTP_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError)
# What the library raises where an answer is none of the Hub's, but of a proxy's, say.
ODD_ANSWERS = (
    *(AssertionError, AttributeError, IndexError, KeyError, OverflowError, RecursionError),
    *(TypeError, JSONDecodeError, UnicodeError),
)
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


class Repository:
    """A model on the Hub at one commit; `directory` is its place in the library's cache."""

    def __init__(self, name: str, revision: str | None = None) -> None:
        """Find it, and fetch its configuration files. Raises HubError."""
        self.name = name
        self._sizes: dict[str, int] = {}
        self.sha256: dict[str, str] = {}  # of large files, as the Hub states it
        with explained(name, revision), quietly():
            configs = snapshot_download(name, revision=revision, allow_patterns=CONFIGS)
            self.directory = Path(configs)
            self.commit = self.directory.name
            self._files = HfFileSystem()
            for entry in self._listing():
                file, size = entry["name"].rpartition("/")[2], entry["size"]
                if type(size) is not int or not 0 <= size < LONGEST_FILE:
                    raise _not_understood(name, f"{file} has {size!r} bytes")
                self._sizes[file] = size
                if entry.get("lfs"):
                    self.sha256[file] = entry["lfs"]["sha256"]

    def _listing(self) -> list[dict[str, Any]]:
        """The files at its root; none offline, where the cache must have them all."""
        try:
            entries: list[Any] = self._files.ls(f"{self.name}@{self.commit}", detail=True)
        except HTTP_ERRORS:
            if not any(self.directory.glob("*.safetensors")):
                raise
            return []
        return [entry for entry in entries if entry["type"] == "file"]

    @property
    def names(self) -> set[str]:
        """The files at its root."""
        return set(self._sizes)

    def open(self, name: str) -> io.RawIOBase:
        """A file, in the cache if it is there, else on the Hub, where each read is a request."""
        path = self.directory / name
        return path.open("rb", buffering=0) if path.is_file() else _Remote(self, name)

    @contextmanager
    def head(self, name: str) -> Iterator[Path]:
        """A local file with a safetensors file's header; of a remote one, its data is a hole."""
        path = self.directory / name
        if path.is_file():
            yield path
            return
        size = self._sizes[name]
        with self.open(name) as file, tempfile.NamedTemporaryFile() as head:
            start = file.read(HEAD) or b""
            header = 8 + int.from_bytes(start[:8], "little")
            if len(start) < header <= min(size, LONGEST_HEADER):
                start += file.read(header - len(start)) or b""
            head.write(start)
            head.truncate(size)
            head.flush()
            yield Path(head.name)

    def read(self, name: str, begin: int, end: int) -> bytes:
        """A range of a file on the Hub."""
        with explained(self.name, self.commit):
            path = f"{self.name}@{self.commit}/{name}"
            data: bytes = self._files.cat_file(path, start=begin, end=end, cache_type="none")
        if len(data) > end - begin:
            raise HubError(
                f"{self.name}: {constants.ENDPOINT} sends more of {name} than was asked for; must "
                "answer requests for ranges",
                hint="download the model, and name its directory",
            )
        return data

    def download(self, weights: set[str], quiet: bool) -> None:
        """Fetch these files, and all that aren't weights, into the cache, if they aren't there."""
        others = [escape(name) for name in self._sizes if name.endswith(WEIGHT_SUFFIXES)]
        unwanted = [*(f"*/*{suffix}" for suffix in WEIGHT_SUFFIXES), *others]
        unwanted = [pattern for pattern in unwanted if pattern not in map(escape, weights)]
        with explained(self.name, self.commit), quietly(quiet):
            snapshot_download(self.name, revision=self.commit, ignore_patterns=unwanted)


class _Remote(io.RawIOBase):
    """A file on the Hub, read by ranges."""

    def __init__(self, repository: Repository, name: str) -> None:
        self._repository, self._name, self._at = repository, name, 0

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET:
            raise io.UnsupportedOperation("only from the start")
        self._at = offset
        return offset

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        data = self._repository.read(self._name, self._at, self._at + len(view))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


@contextmanager
def quietly(quiet: bool = True) -> Iterator[None]:
    """Without the library's progress bars, if asked."""
    hide = quiet and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


@contextmanager
def explained(name: str, revision: str | None = None) -> Iterator[None]:
    """Around what the library does for a repository: its errors as ours."""
    try:
        yield
    except GatedRepoError:
        raise HubError(
            f"{name}: is gated; must be a repository that your token may read",
            hint=f"ask for access at {constants.ENDPOINT}/{name}; then {LOG_IN}",
        ) from None
    except RepositoryNotFoundError:
        raise HubError(
            f"{name}: no such directory, and no repository of that name on the Hub that you may "
            "read; must be one or the other",
            hint=f"check the name; if it is private, {LOG_IN}",
        ) from None
    except RevisionNotFoundError:
        raise HubError(
            f"{name}: has no revision {revision}; must be a branch, a tag or a commit",
            hint=f"look at {constants.ENDPOINT}/{name}/refs",
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if not constants.HF_HUB_OFFLINE:
            raise _unreachable(name, error) from None
        raise HubError(
            f"{name}: is not in the cache as a whole, and HF_HUB_OFFLINE is set; must be there",
            hint="run it once without HF_HUB_OFFLINE",
        ) from None
    except HFValidationError as error:
        raise HubError(f"{error}", hint="a repository's name is like org/name") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        answer = f"{status}: {error.server_message or line(error)}"
        if status in (401, 403):
            raise HubError(
                f"{name}: the Hub refuses ({answer}); must be open to your token",
                hint=f"{LOG_IN}, to a token that may do this",
            ) from None
        raise HubError(
            f"{name}: the Hub fails ({answer}); must answer", hint="try again later"
        ) from None
    except HTTP_ERRORS as error:
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
            raise  # it is of this machine, such as its disk
        raise _unreachable(name, error) from None
    except ODD_ANSWERS as error:
        raise _not_understood(name, f"{type(error).__name__}: {line(error):.200}") from None
    except ValueError as error:  # of the library's own checks: a path upwards, a card's metadata
        raise HubError(
            f"{name}: is refused ({line(error)})", hint="correct what it names, and run again"
        ) from None


def _unreachable(name: str, error: BaseException) -> HubError:
    return HubError(
        f"{name}: no such directory, and the Hub at {constants.ENDPOINT} can't be reached "
        f"({line(error.__cause__ or error)}); must be one or the other",
        hint="check the name and the network; HF_HUB_OFFLINE=1 uses the cache alone",
    )


def _not_understood(name: str, what: str) -> HubError:
    return HubError(
        f"{name}: {constants.ENDPOINT} answers what can't be understood ({what}); must answer as "
        "the Hub does",
        hint="is there a proxy, or a page to log in at, between? HF_ENDPOINT names the Hub",
    )


def line(error: BaseException) -> str:
    """An error's words in one line."""
    return " ".join(str(error).split()) or type(error).__name__
