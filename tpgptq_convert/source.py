"""A checkpoint's directory: its configuration files and safetensors headers, tensors by name.

Headers are validated by the safetensors library and kept; tensors are read when asked for, into
memory of their own: a map of the file would grow with all that was ever read of it, and end the
process where a disk fails. Torch is imported only where a torch tensor is asked for, so that
`inspect` answers without it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from tpgptq_convert.errors import SourceError

if TYPE_CHECKING:
    import torch

Bytes = NDArray[np.uint8]
CHUNK = 1 << 24  # bytes that are read at a time of a tensor that is copied or compared as it is
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
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
INDEX_SUFFIX = ".safetensors.index.json"
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
    """One safetensors file; its header is read and validated on opening."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise SourceError(
                f"{path}: not a whole safetensors file ({error})",
                hint="the file may be damaged or cut short; fetch it again",
            ) from None
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            self._data_start = file.tell()
        header.pop("__metadata__", None)
        self.specs = {n: TensorSpec(e["dtype"], tuple(e["shape"])) for n, e in header.items()}
        self._begin = {name: entry["data_offsets"][0] for name, entry in header.items()}
        for name, spec in self.specs.items():
            if spec.dtype not in DTYPES:
                raise SourceError(
                    f"{path}: {name} has dtype {spec.dtype}; must be one of {', '.join(DTYPES)}",
                    hint="this is not a GPTQ checkpoint",
                )

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
        with self.path.open("rb", buffering=0) as file:
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


def as_tensor(array: NDArray[Any], dtype: str) -> torch.Tensor:
    """An array of this safetensors dtype as a torch tensor that shares its memory."""
    import torch

    octets = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return octets.view(getattr(torch, _TORCH_NAMES[dtype])).reshape(array.shape)


class Source:
    """The checkpoint in `directory`: every tensor of its weight files, by name."""

    def __init__(self, directory: Path) -> None:
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
        self.files = {name: SafetensorsFile(directory / name) for name in self._weight_files()}
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
        names = sorted(p.name for p in self.directory.iterdir() if p.is_file())
        indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
        found = [name for name in names if name.endswith(".safetensors")]
        if len(indexes) == 1:
            return self._indexed_files(self.directory / indexes[0])
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

    def _indexed_files(self, index: Path) -> list[str]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise SourceError(
                f"{index}: no weight_map; must map every tensor to its file",
                hint="fetch the index file again",
            )
        names = sorted({str(name) for name in weight_map.values()})
        problems = []
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                problems.append(
                    f"{index}: names {name!r}; must be a safetensors file in the same directory"
                )
            elif not (self.directory / name).is_file():
                problems.append(f"{self.directory / name}: missing; {index.name} names it")
        if problems:
            raise SourceError(*problems, hint="was the download complete?")
        return names

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
        return self._file_of[name].array(name, allocate)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor on the CPU."""
        return self._file_of[name].tensor(name)

    def carried_files(self) -> list[Path]:
        """Every file that an output takes along as it is, relative to the directory.

        All but weights, hidden files, and those that are written anew.
        """
        relative = (p.relative_to(self.directory) for p in sorted(self.directory.rglob("*")))
        return [
            p
            for p in relative
            if (self.directory / p).is_file()
            and not p.name.endswith(WEIGHT_SUFFIXES)
            and str(p) not in REWRITTEN
            and not any(part.startswith(".") for part in p.parts)
        ]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
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
    if not isinstance(value, dict):
        raise SourceError(
            f"{path}: a JSON {type(value).__name__}; must be a JSON object",
            hint="fetch the file again",
        )
    return value
