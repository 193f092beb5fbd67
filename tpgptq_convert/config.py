"""config.json and the quantisation config, read once into typed values; disagreements are named."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import re2
from numpy.typing import NDArray

from tpgptq_convert.compressed import COMPRESSED, in_gptq_terms
from tpgptq_convert.errors import CheckpointError, SourceError, UnsupportedError
from tpgptq_convert.source import TensorSpec, read_json

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
    "dynamic": ("dynamic",),
}
TYPES = {
    **{"bits": int, "group_size": int, "sym": bool, "desc_act": bool, "static_groups": bool},
    "dynamic": dict,
}
OF_A_MODULE = ("bits", "group_size", "sym", "desc_act")  # what a rule may change
FORMATS = ("gptq", "gptq_v2")
BITS = (2, 3, 4, 8)
LONGEST_RULE = 1000  # characters of a pattern
MOST_RULES = 5000
LARGEST_RULE = 1 << 17  # bytes that RE2 may need for a pattern; some would take it 0.1 s and 2 MB


def zero_offset(checkpoint_format: str) -> int:
    """A zero point less the field of qzeros that stores it: "gptq" stores one less."""
    return 1 if checkpoint_format == "gptq" else 0


def pack_factor(bits: int | None) -> int:
    """The fewest values that fill whole words: 32 of 3 bits fill three, two floats (None) one.

    A value's bits follow those of the one before it, from one word into the next.
    """
    return 32 // math.gcd(32, bits or 16)


def words_of(value: int, bits: int, count: int) -> NDArray[np.uint32]:
    """So many words whose every field holds a value."""
    octets = np.full((count * 32 // bits, 1), value, np.uint8)
    fields = np.unpackbits(octets, axis=1, count=bits, bitorder="little")
    return np.packbits(fields, bitorder="little").view(np.uint32)


def fields_of(words: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """(G, N*bits/32) int32 -> (G, N): the values that are packed along the columns."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    shape = len(words), words.shape[1] * 32 // bits, bits
    fields = np.unpackbits(octets, axis=1, bitorder="little").reshape(shape)
    values = fields[:, :, 0].copy()
    for bit in range(1, bits):
        values |= fields[:, :, bit] << np.uint8(bit)
    return values


def layer_tensors(
    bits: int | None, k: int, n: int, groups: int, dtype: str
) -> dict[str, TensorSpec]:
    """The tensors of a layer (K, N), by the last part of their names; their floats are of `dtype`.

    qweight is packed along its rows, qzeros along its columns. bits is None where the layer isn't
    quantised.
    """
    if bits is None:
        return {"weight": TensorSpec(dtype, (n, k))}
    return {
        "qweight": TensorSpec("I32", (k * bits // 32, n)),
        "qzeros": TensorSpec("I32", (groups, n * bits // 32)),
        "scales": TensorSpec(dtype, (groups, n)),
    }


@dataclass(frozen=True)
class QuantConfig:
    """How the checkpoint says it was quantised; `sym` is None where it doesn't say."""

    bits: int
    group_size: int  # -1: one group per column
    sym: bool | None
    desc_act: bool
    static_groups: bool
    checkpoint_format: str
    method: str = "gptq"  # or compressed-tensors: how the source's tensors are called, and lie
    denied_in: tuple[str, ...] = ()  # the files that say desc_act: false
    # GPTQModel's `dynamic`: a pattern of modules' names, and what is other than above in those.
    rules: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()

    def of(self, module: str) -> QuantConfig:
        """With the first rule that a module's name begins with; "-:" changes nothing.

        That says that the module isn't quantised, which its tensors say as well.
        """
        for pattern, values in self.rules:
            if _regex(pattern).match(module):
                return replace(self, rules=(), **dict(values))
        return replace(self, rules=())

    @property
    def pack_factor(self) -> int:
        """What packed sizes are multiples of."""
        return pack_factor(self.bits)

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
        if inner.get("quant_method") == COMPRESSED:
            found["config.json"] = in_gptq_terms(str(directory / "config.json"), inner)
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
    if merged.get("quant_method") == COMPRESSED and "dynamic" in merged:
        problems.append(
            f"{directory}: states dynamic, and compressed-tensors for quant_method; must be one, "
            "since those rules are GPTQModel's"
        )
    if problems:
        raise CheckpointError(*problems, hint="correct the file that is wrong")
    return QuantConfig(
        bits=merged["bits"],
        group_size=merged["group_size"],
        sym=merged.get("sym"),
        desc_act=merged.get("desc_act", False),
        static_groups=merged.get("static_groups", False),
        checkpoint_format=merged.get("checkpoint_format", "gptq"),
        method=merged.get("quant_method", "gptq"),
        denied_in=tuple(file for file, values in stated.items() if values.get("desc_act") is False),
        rules=_rules(merged.get("dynamic", {})),
    )


@cache
def _regex(pattern: str) -> Any:
    """Of a rule's pattern, without what says whether such modules are quantised; ValueError.

    RE2's, since a checkpoint's own could keep Python's busy for ever.
    """
    if len(pattern) > LONGEST_RULE:
        raise ValueError(f"longer than {LONGEST_RULE} characters")
    options = re2.Options()
    options.log_errors = False
    options.max_mem = LARGEST_RULE
    try:
        return re2.compile(pattern.removeprefix("+:").removeprefix("-:"), options=options)
    except re2.error as error:
        raise ValueError(error.args[0].decode(errors="replace")) from None


def _rules(dynamic: Mapping[str, Any]) -> tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]:
    """See `QuantConfig.rules`; what is stated was checked."""
    return tuple(
        (pattern, tuple((key, value) for key, value in rule.items() if key in OF_A_MODULE))
        for pattern, rule in (
            (pattern, {} if pattern.startswith("-:") else _normalised("dynamic", stated))
            for pattern, stated in dynamic.items()
        )
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
    """Refuse what is not int32-packed GPTQ throughout, by name."""
    problems = []
    for file, values in stated.items():
        where = directory / file
        if values.get("quant_method") == "tpgptq":
            raise UnsupportedError(
                f"{where}: quant_method is 'tpgptq'; this checkpoint is already converted",
                hint="convert the GPTQ checkpoint that it was made from (tpgptq.json names it)",
            )
        problems += [f"{where}: {problem}" for problem in _other_methods(found[file], values)]
        rules = values.get("dynamic", {})
        if len(rules) > MOST_RULES:
            problems.append(
                f"{where}: dynamic has {len(rules)} rules; must have at most {MOST_RULES}"
            )
            continue
        for pattern, rule in rules.items():
            problems += [
                f"{where}: dynamic: {pattern!r:.80}: {problem}"
                for problem in _wrong_rule(file, pattern, rule)
            ]
    if problems:
        raise UnsupportedError(
            *problems, hint="a GPTQ checkpoint of the same model is needed, its words int32"
        )


def _other_methods(raw: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[str]:
    """What in a file, or in a module's rule, is not int32-packed GPTQ."""
    method = values.get("quant_method", "gptq")
    layout = values.get("checkpoint_format", "gptq")
    if raw.get("is_marlin_format"):
        layout = "marlin"
    if method not in ("gptq", COMPRESSED):
        yield f"quant_method is {method!r}; must be 'gptq' or {COMPRESSED!r}"
    elif layout not in FORMATS:
        yield f"checkpoint_format is {layout!r}; must be {' or '.join(FORMATS)}"
    if values.get("bits", 4) not in BITS:
        yield f"bits is {values['bits']}; must be one of {BITS}"
    size = values.get("group_size", 128)
    if size != -1 and (size <= 0 or size % 8):
        yield f"group_size is {size}; must be -1 or a multiple of 8"
    if raw.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        yield f"pack_dtype is {raw['pack_dtype']!r}; must be int32"


def _wrong_rule(file: str, pattern: str, rule: Any) -> Iterator[str]:
    """What makes one of the rules of `dynamic` none that can be followed."""
    try:
        _regex(pattern)
    except ValueError as error:
        yield f"not a regular expression of RE2's kind ({error!s:.80})"
    if not isinstance(rule, dict):
        yield f"is {rule!r:.40}; must be an object"
    elif not pattern.startswith("-:"):
        yield from _other_methods(rule, _normalised(file, rule))
        for key in ("checkpoint_format", "quant_method"):
            if any(name in rule for name in SYNONYMS[key]):
                yield f"changes {key}; must be one for all modules"


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model that sharding depends on."""

    hidden: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    sizes: Mapping[str, int]  # of a head of each axis cut by heads; of a latent; by their names
    mlps: Mapping[str, int]  # channels of each free axis, by its name in the table
    experts: int  # of a block; 0 where there are none
    activation: str
    heads_together: int = 1  # heads come in multiples of this, on a rank too

    def heads_of(self, axis: str) -> int:
        """How many heads an axis has; 1 where it isn't cut by heads."""
        if axis == "kv":
            return self.kv_heads
        return self.heads if axis in ("query", "key", "value") else 1

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share a kv head."""
        return self.heads // self.kv_heads


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as it stands."""
    path = directory / "config.json"
    if not path.is_file():
        raise SourceError(
            f"{path}: missing; must be the model's configuration",
            hint="was the download complete?",
        )
    return read_json(path)
