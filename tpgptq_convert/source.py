"""A checkpoint's files, in a directory or on the Hub: safetensors headers, tensors by name.

Headers are validated by the safetensors library and kept; tensors are read when asked for, into
memory of their own: a map of the file would grow with all that was ever read of it, and end the
process where a disk fails. Torch is imported only where a torch tensor is asked for, so that
`inspect` answers without it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from io import RawIOBase
from itertools import chain, islice
from pathlib import Path
from re import fullmatch
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from tpgptq_convert.errors import HubError, SourceError
from tpgptq_convert.threads import threads

if TYPE_CHECKING:
    import torch

    from tpgptq_convert.hub import Repository

Bytes = NDArray[np.uint8]
CHUNK = 1 << 24  # bytes that are read at a time of a tensor that is copied or compared as it is
REQUESTS = 16  # to the Hub at a time
# The dtypes of safetensors headers, little-endian; those unknown to numpy as their bits.
DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in {
        **{"BOOL": "u1", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E5M2": "u1"},
        **{"U16": "<u2", "I16": "<i2", "F16": "<f2", "BF16": "<u2"},
        **{"U32": "<u4", "I32": "<i4", "F32": "<f4"},
        **{"U64": "<u8", "I64": "<i8", "F64": "<f8"},
    }.items()
}

_TORCH_NAMES = {
    **{"BOOL": "bool", "U8": "uint8", "I8": "int8"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
    **{"U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16"},
    **{"U32": "uint32", "I32": "int32", "F32": "float32"},
    **{"U64": "uint64", "I64": "int64", "F64": "float64"},
}

# Files that hold weights, or say where they are: everything else is carried along to the output.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")
WEIGHT_SUFFIXES = (*_WEIGHTS, *(f"{suffix}.index.json" for suffix in _WEIGHTS))
# Files that speak of the source's own quantisation, or that an output has of its own.
REWRITTEN = (
    *("config.json", "README.md", "quantize_config.json", "quant_config.json"),
    "tpgptq_runtime.py",
)
# What Python imports by these names, where it looks into an output's directory, is not to come from
# there: the standard library's, what it runs when it starts, and what the runtime module imports.
MODULES = {
    "sitecustomize",
    "usercustomize",
    "tpgptq_runtime",
    "torch",
    "transformers",
    "triton",
} | {*sys.stdlib_module_names}
CODE = (".py", ".pyc", ".pyo", ".pyd", ".so")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
INDEX_SUFFIX = ".safetensors.index.json"
MOST_CARRIED = 10_000  # files beside the weights
DEEPEST = 30  # directories in directories, and values in values of JSON
LARGEST_JSON = 1 << 26  # bytes; an index of 300,000 tensors has half of that
FLOATS = ("F16", "BF16", "F32")  # what scales, biases and the tensors beside them may be


@dataclass(frozen=True)
class TensorSpec:
    """Dtype (safetensors' name) and shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


Allocate = Callable[[int], Bytes]  # host memory of so many bytes


def pageable(nbytes: int) -> Bytes:
    """Ordinary host memory."""
    return np.empty(nbytes, np.uint8)


class SafetensorsFile:
    """One safetensors file; its header is read and validated on opening.

    One of a repository on the Hub may not be at `path` yet: it is then read over the network.
    """

    def __init__(self, path: Path, repository: Repository | None = None) -> None:
        self.path, self._repository = path, repository
        try:
            with self._head() as local:
                check_ends(local)
                with safe_open(local, framework="np"), local.open("rb") as file:
                    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
                    self._data_start = file.tell()
        except (SafetensorError, OSError) as error:
            raise SourceError(
                f"{path}: not a whole safetensors file ({error})",
                hint="the file may be damaged or cut short; fetch it again",
            ) from None
        header.pop("__metadata__", None)
        self.specs = {n: TensorSpec(e["dtype"], tuple(e["shape"])) for n, e in header.items()}
        self._begin = {name: entry["data_offsets"][0] for name, entry in header.items()}
        for name, spec in self.specs.items():
            if spec.dtype not in DTYPES:
                raise SourceError(
                    f"{path}: {name} has dtype {spec.dtype}; must be one of {', '.join(DTYPES)}",
                    hint="this is not a GPTQ checkpoint",
                )

    def _head(self) -> AbstractContextManager[Path]:
        """A local file that has the header."""
        return self._repository.head(self.path.name) if self._repository else nullcontext(self.path)

    def _open(self) -> RawIOBase:
        if self._repository:
            return self._repository.open(self.path.name)
        return self.path.open("rb", buffering=0)

    def array(self, name: str, allocate: Allocate = pageable) -> NDArray[Any]:
        """One tensor as a numpy array, in memory from `allocate`; BF16 as its bits."""
        spec = self.specs[name]
        data = allocate(spec.nbytes)
        self._read(data, self._begin[name])
        return data.view(DTYPES[spec.dtype]).reshape(spec.shape)

    def chunks(self, name: str) -> Iterator[tuple[int, Callable[[], Bytes]]]:
        """One tensor's bytes in order, a few at a time: how many, and what reads them."""
        begin, nbytes = self._begin[name], self.specs[name].nbytes
        for at in range(0, max(nbytes, 1), CHUNK):
            count = min(CHUNK, nbytes - at)
            yield count, partial(self._chunk, begin + at, count)

    def _chunk(self, begin: int, nbytes: int) -> Bytes:
        data = pageable(nbytes)
        self._read(data, begin)
        return data

    def _read(self, into: Bytes, begin: int) -> None:
        """Fill `into` with the data from `begin`."""
        done = 0
        with reading(self.path), self._open() as file:
            file.seek(self._data_start + begin)
            while done < len(into):
                count = file.readinto(into.data[done:])
                if not count:
                    raise SourceError(
                        f"{self.path}: ends in the middle of its data; must be the file that it "
                        "was when it was opened",
                        hint="is something else writing it? Try again when that is done",
                    )
                done += count

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor on the CPU."""
        return as_tensor(self.array(name), self.specs[name].dtype)


def check_ends(path: Path) -> None:
    """Raise OSError where opening could wait, or reading go on, for ever: of a pipe or a device."""
    if path.exists() and not path.is_file():
        raise OSError("a directory, a pipe or a device")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Around the reading of a file: names it where that fails, as of a disk or a network."""
    try:
        yield
    except OSError as error:
        raise SourceError(
            f"{path}: can't be read ({error.strerror or error}); must be a file that can",
            hint="check the disk that it is on, or the connection to it, and run again",
        ) from error


def octets(path: Path) -> Iterator[bytes]:
    """The bytes of a file, a few at a time."""
    with reading(path), path.open("rb", buffering=0) as file:
        while data := file.read(CHUNK):
            yield data


def as_tensor(array: NDArray[Any], dtype: str) -> torch.Tensor:
    """An array of this safetensors dtype as a torch tensor that shares its memory."""
    import torch

    octets = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return octets.view(getattr(torch, _TORCH_NAMES[dtype])).reshape(array.shape)


class Source:
    """A checkpoint: every tensor of its weight files, by name.

    `model` is a directory, or else a repository on the Hub. Of the latter `directory` holds what
    a plan is made from, and everything once it is downloaded.
    """

    def __init__(self, model: Path, revision: str | None = None) -> None:
        directory, self._repository = model, None
        if not model.is_dir() and fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(model)):
            from tpgptq_convert.hub import Repository

            self._repository = Repository(str(model), revision)
            directory = self._repository.directory
        elif revision:
            raise HubError(
                f"{model}: not a repository on the Hub; must be one, to have a revision {revision}",
                hint="leave --revision out, or name a repository as org/name",
            )
        if not directory.is_dir():
            raise SourceError(
                f"{directory}: no such directory; must be a directory with a GPTQ checkpoint",
                hint="fetch one first, for example `hf download ORG/NAME --local-dir DIR`",
            )
        if (directory / "tpgptq.json").is_file():
            raise SourceError(
                f"{directory}: has a tpgptq.json, so it is converted already; must be a GPTQ "
                "checkpoint",
                hint="name the checkpoint that it was made from",
            )
        self.directory = directory
        self._ahead: dict[str, NDArray[Any]] = {}
        self.files = {
            name: SafetensorsFile(directory / name, self._repository)
            for name in self._weight_files()
        }
        self._file_of: dict[str, SafetensorsFile] = {}
        for file in self.files.values():
            for name in file.specs:
                if name in self._file_of:
                    raise SourceError(
                        f"{name}: stands in both {self._file_of[name].path.name} and "
                        f"{file.path.name}; must stand in one file",
                        hint="remove the file that doesn't belong to the checkpoint",
                    )
                self._file_of[name] = file

    def _weight_files(self) -> list[str]:
        """Names of the safetensors files that make up the checkpoint."""
        suffixes = (INDEX_SUFFIX, ".safetensors", *PICKLE_SUFFIXES)
        remote = self._repository.names if self._repository else set()
        names = sorted(
            {
                path.name
                for path in self.directory.iterdir()
                if path.name.endswith(suffixes) and path.is_file()
            }
            | {name for name in remote if name.endswith(suffixes)}
        )
        indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
        found = [name for name in names if name.endswith(".safetensors")]
        if len(indexes) == 1:
            return self._indexed_files(self.directory / indexes[0], found)
        if len(found) == 1:
            return found
        if not found:
            pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
            if pickles:
                raise SourceError(
                    f"{self.directory / pickles[0]}: a pickle, which can run code when loaded; "
                    "weights must be in safetensors files",
                    hint="load it where you trust it, and save it again as safetensors",
                )
            raise SourceError(
                f"{self.directory}: no safetensors file; must hold a GPTQ checkpoint's weights",
                hint="was the download complete?",
            )
        raise SourceError(
            f"{self.directory}: {len(found)} safetensors files ({', '.join(found[:4])}"
            f"{', ...' if len(found) > 4 else ''}) and {len(indexes) or 'no'} index files; "
            "must be one file, or several with one index",
            hint=f"keep the files of one checkpoint, and its *{INDEX_SUFFIX} if it has several",
        )

    def _indexed_files(self, index: Path, found: Collection[str]) -> list[str]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise SourceError(
                f"{index}: no weight_map; must map every tensor to its file",
                hint="fetch the index file again",
            )
        names = sorted({str(name) for name in weight_map.values()})
        problems, found = [], set(found)
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                problems.append(
                    f"{index}: names {name!r}; must be a safetensors file in the same directory"
                )
            elif name not in found:
                problems.append(f"{self.directory / name}: missing; {index.name} names it")
        if problems:
            raise SourceError(*problems, hint="was the download complete?")
        return names

    @property
    def name(self) -> str:
        """The directory's name, no path of this machine, or the repository's."""
        return self._repository.name if self._repository else self.directory.resolve().name

    @property
    def revision(self) -> str | None:
        """The repository's commit."""
        return self._repository.commit if self._repository else None

    def download(self, quiet: bool = True) -> None:
        """Have every file that an output is made from in the directory. Raises HubError."""
        if self._repository:
            self._repository.download(set(self.files), quiet)

    def check_hashes(self, infos: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise SourceError where a file's SHA-256 is not what the Hub states."""
        stated = self._repository.sha256 if self._repository else {}
        problems = [
            f"{self.directory / name}: sha256 is {info['sha256']}; must be {stated[name]}, as the "
            "Hub states"
            for name, info in infos.items()
            if stated.get(name, info["sha256"]) != info["sha256"]
        ]
        if problems:
            raise SourceError(*problems, hint="remove the file, and run again to download it anew")

    def read_ahead(self, endings: tuple[str, ...]) -> None:
        """Have the small tensors of such names at hand: on the Hub each of them is a request."""
        if self._repository:
            names = [
                name
                for name, file in self._file_of.items()
                if name.endswith(endings) and file.specs[name].nbytes <= CHUNK
            ]
            with threads(REQUESTS) as pool:
                self._ahead = dict(zip(names, pool.map(self.array, names), strict=True))

    @property
    def names(self) -> Collection[str]:
        return self._file_of.keys()

    def spec(self, name: str) -> TensorSpec | None:
        """Dtype and shape of a tensor, or None if there is none of this name."""
        file = self._file_of.get(name)
        return file.specs[name] if file else None

    def file(self, name: str) -> SafetensorsFile:
        """The file that a tensor stands in."""
        return self._file_of[name]

    def array(self, name: str, allocate: Allocate = pageable) -> NDArray[Any]:
        """A tensor as a numpy array, in memory from `allocate`; BF16 as its bits."""
        ahead = self._ahead.pop(name, None)
        return self._file_of[name].array(name, allocate) if ahead is None else ahead

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor on the CPU."""
        return self._file_of[name].tensor(name)

    def carried_files(self) -> list[Path]:
        """Every file that an output takes along as it is, relative to the directory.

        All but weights, hidden files, those that are written anew, and code that Python would take
        for something else. Raises SourceError where there are too many, or where one is a link that
        leads out of the directory: what lies there need not be meant for those who get the output.
        """
        files = sorted(islice(self._other_files(), MOST_CARRIED + 1))
        if len(files) > MOST_CARRIED:
            raise SourceError(
                f"{self.directory}: holds more than {MOST_CARRIED} files beside the weights; must "
                "hold a model's alone",
                hint="move what doesn't belong to the checkpoint elsewhere",
            )
        links = {path: target_outside(self.directory, path) for path in files}
        astray = [
            f"{path}: a link to {target}; must lie in the checkpoint's directory"
            for path, target in links.items()
            if target
        ]
        if astray:
            raise SourceError(*astray, hint="put a copy there, if it belongs to the checkpoint")
        return [path for path in files if str(path) not in REWRITTEN and not _posing(path)]

    def _other_files(self) -> Iterator[Path]:
        """The files that hold no weights and are not hidden, relative to the directory."""
        directories = [self.directory]
        while directories:
            for path in directories.pop().iterdir():
                relative = path.relative_to(self.directory)
                if path.name.startswith(".") or path.name == "__pycache__":
                    continue
                if path.is_dir() and not path.is_symlink():
                    if len(relative.parts) > DEEPEST:
                        raise SourceError(
                            f"{path}: {len(relative.parts)} directories deep; must be at most "
                            f"{DEEPEST}",
                            hint="move what doesn't belong to the checkpoint elsewhere",
                        )
                    directories.append(path)
                elif path.is_file() and not path.name.endswith(WEIGHT_SUFFIXES):
                    yield relative


def target_outside(directory: Path, path: Path) -> Path | None:
    """Where a file in a directory really lies, if it is a link out of there."""
    if not (directory / path).is_symlink():
        return None
    real, target = directory.resolve(), (directory / path).resolve()
    homes = {real}
    if real.parent.name == "snapshots":  # in the Hub's cache every file is a link
        homes.add(real.parent.parent / "blobs")
    return None if homes & {*target.parents} else target


def _posing(path: Path) -> bool:
    """Whether Python would import this file, of a checkpoint, as one of the MODULES."""
    module, *inside = path.parts
    package = len(inside) == 1 and inside[0].startswith("__init__.")
    name = module.partition(".")[0]
    return name in MODULES and path.name.endswith(CODE) and (package or not inside)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        size = path.stat().st_size  # of which holes take no room on a disk
        if size > LARGEST_JSON:
            raise SourceError(
                f"{path}: has {size} bytes; must have at most {LARGEST_JSON}",
                hint="fetch the file again",
            )
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(
            f"{path}: {error.strerror}; must be a readable JSON file",
            hint="check its permissions",
        ) from None
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{path}: not JSON ({error}); must be a JSON object", hint="fetch the file again"
        ) from None
    if _deep(value):
        raise SourceError(
            f"{path}: values in values, more than {DEEPEST} deep; must be less",
            hint="fetch the file again",
        )
    if not isinstance(value, dict):
        raise SourceError(
            f"{path}: a JSON {type(value).__name__}; must be a JSON object",
            hint="fetch the file again",
        )
    return value


def _deep(value: Any) -> bool:
    """Whether a JSON value is nested deeper than anything that writes it should have to follow."""
    level = [value]
    for _ in range(DEEPEST):
        inner = (
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)
        )
        level = list(chain.from_iterable(inner))
    return bool(level)
