"""config.json and the quantisation config, read once into typed values; disagreements are named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpgptq_convert.errors import CheckpointError, SourceError, UnsupportedError
from tpgptq_convert.source import read_json

QUANT_FILES = ("quantize_config.json", "quant_config.json")
# The names that AutoGPTQ, GPTQModel and Transformers have given to one thing, newest last.
SYNONYMS = {
    "bits": ("w_bit", "bits"),
    "group_size": ("q_group_size", "group_size"),
    "sym": ("sym",),
    "desc_act": ("desc_act",),
    "static_groups": ("static_groups",),
    "checkpoint_format": ("format", "checkpoint_format"),
    "quant_method": ("method", "quant_method"),
}
TYPES = {"bits": int, "group_size": int, "sym": bool, "desc_act": bool, "static_groups": bool}
FORMATS = ("gptq", "gptq_v2")
BITS = (2, 4, 8)  # those that fill a word


def zero_offset(checkpoint_format: str) -> int:
    """A zero point less the field of qzeros that stores it: "gptq" stores one less."""
    return 1 if checkpoint_format == "gptq" else 0


def word_of(value: int, bits: int) -> int:
    """The word, as unsigned, whose every field holds a value."""
    return sum(value << shift for shift in range(0, 32, bits))


@dataclass(frozen=True)
class QuantConfig:
    """How the checkpoint says it was quantised; `sym` is None where it doesn't say."""

    bits: int
    group_size: int  # -1: one group per column
    sym: bool | None
    desc_act: bool
    static_groups: bool
    checkpoint_format: str
    denied_in: tuple[str, ...] = ()  # the files that say desc_act: false

    @property
    def pack_factor(self) -> int:
        """Values per int32 word."""
        return 32 // self.bits

    @property
    def neutral(self) -> int:
        """The middle of the range: the zero point of symmetric checkpoints."""
        return 1 << (self.bits - 1)

    @property
    def stored_neutral(self) -> int:
        """The same, as qzeros stores it."""
        return self.neutral - zero_offset(self.checkpoint_format)


def read_quant_config(directory: Path, config: dict[str, Any]) -> QuantConfig:
    """The quantisation config from quantize_config.json and config.json, which must agree."""
    found: dict[str, dict[str, Any]] = {}
    for name in QUANT_FILES:
        if (directory / name).is_file():
            found[name] = read_json(directory / name)
    inner = config.get("quantization_config")
    if isinstance(inner, dict):
        found["config.json"] = inner
    if not found:
        raise CheckpointError(
            f"{directory}: no quantisation config; must be in quantize_config.json or under "
            "quantization_config in config.json",
            hint="is this a GPTQ checkpoint? An unquantised one must be quantised first",
        )
    stated = {file: _normalised(file, raw) for file, raw in found.items()}
    _refuse_other_methods(directory, found, stated)

    merged: dict[str, Any] = {}
    problems = []
    for file, values in stated.items():
        for key, value in values.items():
            if key not in merged:
                merged[key] = value
            elif merged[key] != value and key != "desc_act":  # the tensors decide that one
                other = next(f for f, v in stated.items() if key in v)
                problems.append(
                    f"{directory}: {key} is {merged[key]!r} in {other} and {value!r} in {file}; "
                    "must be the same"
                )
    for key in ("bits", "group_size"):
        if key not in merged:
            problems.append(f"{directory}: {' and '.join(found)} lack {key!r}; must say it")
    if problems:
        raise CheckpointError(*problems, hint="correct the file that is wrong")
    return QuantConfig(
        bits=merged["bits"],
        group_size=merged["group_size"],
        sym=merged.get("sym"),
        desc_act=merged.get("desc_act", False),
        static_groups=merged.get("static_groups", False),
        checkpoint_format=merged.get("checkpoint_format", "gptq"),
        denied_in=tuple(file for file, values in stated.items() if values.get("desc_act") is False),
    )


def _normalised(file: str, raw: dict[str, Any]) -> dict[str, Any]:
    """The values that matter here, under one name each, their types checked."""
    values = {}
    for key, names in SYNONYMS.items():
        for name in names:
            if raw.get(name) is not None:
                values[key] = raw[name]
    for key, kind in TYPES.items():
        if key in values and type(values[key]) is not kind:
            raise CheckpointError(
                f"{file}: {key} is {values[key]!r}; must be of type {kind.__name__}",
                hint=f"correct {file}",
            )
    return values


def _refuse_other_methods(
    directory: Path, found: dict[str, dict[str, Any]], stated: dict[str, dict[str, Any]]
) -> None:
    """Refuse what is not int32-packed GPTQ of the same bits throughout, by name."""
    problems = []
    for file, values in stated.items():
        raw = found[file]
        where = directory / file
        method = values.get("quant_method", "gptq")
        layout = values.get("checkpoint_format", "gptq")
        if raw.get("is_marlin_format"):
            layout = "marlin"
        if method == "tpgptq":
            raise UnsupportedError(
                f"{where}: quant_method is 'tpgptq'; this checkpoint is already converted",
                hint="convert the GPTQ checkpoint that it was made from (tpgptq.json names it)",
            )
        if method != "gptq":
            problems.append(f"{where}: quant_method is {method!r}; must be 'gptq'")
        elif layout not in FORMATS:
            problems.append(
                f"{where}: checkpoint_format is {layout!r}; must be {' or '.join(FORMATS)}"
            )
        if values.get("bits", 4) not in BITS:
            problems.append(f"{where}: bits is {values['bits']}; must be one of {BITS}")
        size = values.get("group_size", 128)
        if size != -1 and (size <= 0 or size % 8):
            problems.append(f"{where}: group_size is {size}; must be -1 or a multiple of 8")
        if raw.get("dynamic"):
            problems.append(f"{where}: has per-module rules (dynamic); must have none")
        if raw.get("lm_head"):
            problems.append(f"{where}: lm_head is quantised; must not be")
        if raw.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
            problems.append(f"{where}: pack_dtype is {raw['pack_dtype']!r}; must be int32")
    if problems:
        raise UnsupportedError(
            *problems, hint="a GPTQ checkpoint of the same model is needed, its words int32"
        )


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model that sharding depends on."""

    hidden: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    activation: str


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as it stands."""
    path = directory / "config.json"
    if not path.is_file():
        raise SourceError(
            f"{path}: missing; must be the model's configuration",
            hint="was the download complete?",
        )
    return read_json(path)
