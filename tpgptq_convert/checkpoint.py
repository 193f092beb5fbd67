"""A checkpoint understood: every layer's sizes and the order of its rows, or every fault in it.

Reads headers, g_idx and biases; never qweight or scales, and never torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpgptq_convert.config import Geometry, QuantConfig, read_config, read_quant_config
from tpgptq_convert.errors import CheckpointError, TpgptqError
from tpgptq_convert.families import Axis, Family, Linear, family_of
from tpgptq_convert.source import FLOATS, Source, TensorSpec

IntArray = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Layer:
    """One quantised linear layer of the source."""

    name: str  # model.layers.0.mlp.down_proj
    linear: Linear  # its row of the table
    in_features: int  # K
    out_features: int  # N
    group_size: int  # rows per full group; K where a column is one group
    g_idx: IntArray  # (K,) the group of each row
    scales: TensorSpec  # (G, N)
    bias: TensorSpec | None  # (N,); None where it has none, or one that is all zero

    @property
    def groups(self) -> int:
        return self.scales.shape[0]

    @cached_property
    def act_order(self) -> bool:
        """Whether the rows' groups are anything but consecutive."""
        return not np.array_equal(self.g_idx, np.arange(self.in_features) // self.group_size)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A source whose every tensor is known and has the shape that it must have."""

    source: Source
    config: dict[str, Any]
    quant: QuantConfig
    family: Family
    geometry: Geometry
    blocks: tuple[tuple[Layer, ...], ...]
    shared: tuple[str, ...]  # tensors that no rank owns alone, copied as they are
    damage: tuple[str, ...]  # faults that the conversion mends, and other readers fall for
    notes: tuple[str, ...]  # what a person should know

    @property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(layer for block in self.blocks for layer in block)

    @property
    def shared_specs(self) -> dict[str, TensorSpec]:
        """Dtype and shape of each shared tensor."""
        return {name: spec for name in self.shared if (spec := self.source.spec(name))}

    @property
    def widths(self) -> Mapping[Axis, int]:
        """Channels of each axis."""
        return widths_of(self.geometry)

    @property
    def name(self) -> str:
        """The directory's name: no path of the machine stands in an output."""
        return self.source.directory.resolve().name

    def source_bytes(self, layer: Layer) -> int:
        """Bytes of a layer's weights, as progress counts them."""
        qweight = self.source.spec(f"{layer.name}.qweight")
        return layer.scales.nbytes + (qweight.nbytes if qweight else 0)

    def layers_of(self, linear: Linear) -> list[Layer]:
        """The layers of one kind, block after block."""
        at = self.family.linears.index(linear)
        return [block[at] for block in self.blocks]


def widths_of(geometry: Geometry) -> dict[Axis, int]:
    """Channels of each axis of a model."""
    return {
        Axis.HIDDEN: geometry.hidden,
        Axis.QUERY: geometry.heads * geometry.head_dim,
        Axis.KV: geometry.kv_heads * geometry.head_dim,
        Axis.MLP: geometry.intermediate,
    }


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read the checkpoint in `directory`; raises one error that lists every fault found."""
    source = Source(directory)
    config = read_config(directory)
    quant, family = _all(lambda: read_quant_config(directory, config), lambda: family_of(config))
    geometry = family.geometry(config)
    if geometry.blocks > max(100, len(source.names)):  # don't list what a million blocks lack
        raise CheckpointError(
            f"config.json: num_hidden_layers is {geometry.blocks}; the files hold only "
            f"{len(source.names)} tensors",
            hint="correct config.json, or fetch the files that are missing",
        )
    reader = _LayerReader(source, quant, family, geometry, family.biased(config))
    blocks = [
        [reader.layer(block, linear) for linear in family.linears]
        for block in range(geometry.blocks)
    ]
    shared = reader.shared_tensors(tied=family.tied(config))
    if reader.problems:
        raise CheckpointError(*reader.problems, hint=reader.hint)
    layers = tuple(tuple(layer for layer in block if layer) for block in blocks)
    ordered = [layer.act_order for block in layers for layer in block]
    return Checkpoint(
        source=source,
        config=config,
        quant=quant,
        family=family,
        geometry=geometry,
        blocks=layers,
        shared=shared,
        damage=_damage(quant, ordered),
        notes=_notes(quant, ordered, reader.zero_biases),
    )


def _all(*steps: Callable[[], Any]) -> list[Any]:
    """The steps' results; if some fail, one error with the problems of all."""
    results, errors = [], []
    for step in steps:
        try:
            results.append(step())
        except TpgptqError as error:
            errors.append(error)
    if errors:
        problems = [problem for error in errors for problem in error.problems]
        raise type(errors[0])(*problems, hint=errors[0].hint)
    return results


def _damage(quant: QuantConfig, ordered: Sequence[bool]) -> tuple[str, ...]:
    """Of a checkpoint of which each layer is, or is not, act-ordered."""
    if not any(ordered) or not quant.denied_in:
        return ()
    says = "say" if len(quant.denied_in) > 1 else "says"
    return (
        f"{' and '.join(quant.denied_in)} {says} desc_act: false, but {sum(ordered)} of "
        f"{len(ordered)} layers have a g_idx that is not sequential. Servers that believe it "
        "(vLLM 0.30 and later) drop g_idx and answer nonsense; the tensors are right, and are what "
        "convert goes by",
    )


def _notes(quant: QuantConfig, ordered: Sequence[bool], zero_biases: int) -> tuple[str, ...]:
    notes = []
    if not any(ordered) and quant.desc_act:
        notes.append(
            "the config says desc_act: true, but every g_idx is sequential: the groups are plain "
            "already"
        )
    if zero_biases:
        notes.append(f"{zero_biases} all-zero biases, where this model has none, are left out")
    return tuple(notes)


class _LayerReader:
    """Reads the layers one by one and remembers every fault, and every tensor that is known."""

    def __init__(
        self,
        source: Source,
        quant: QuantConfig,
        family: Family,
        geometry: Geometry,
        biased: frozenset[str],
    ) -> None:
        self.source, self.quant, self.family, self.biased = source, quant, family, biased
        self.geometry = geometry
        self.widths = widths_of(geometry)
        self.known: set[str] = set()
        self.row_biases: list[str] = []
        self.zero_biases = 0
        self.problems: list[str] = []
        self.hint = "run `tpgptq inspect` on the checkpoint; fetch it again if files are damaged"

    def layer(self, block: int, linear: Linear) -> Layer | None:
        """One layer, or None where it has a fault."""
        name = f"{self.family.block(block)}.{linear.name}"
        faults = len(self.problems)
        k, n = self.widths[linear.reads], linear.width(self.widths)
        if self._spec(f"{name}.qweight") is None and self._spec(f"{name}.weight"):
            self.known.add(f"{name}.weight")
            self.problems.append(
                f"{name}.weight: is not quantised; every linear layer of a block must be"
            )
            return None
        pack = self.quant.pack_factor
        group_size = k if self.quant.group_size == -1 else min(self.quant.group_size, k)
        groups = -(-k // group_size)
        for axis, size in (("in_features", k), ("out_features", n)):
            if size % pack:
                self.problems.append(f"{name}: {axis} is {size}; must be a multiple of {pack}")
        self._check(f"{name}.qweight", ("I32",), (k // pack, n))
        self._check(f"{name}.qzeros", ("I32",), (groups, n // pack))
        scales = self._check(f"{name}.scales", FLOATS, (groups, n))
        g_idx = self._g_idx(f"{name}.g_idx", k, groups, group_size)
        bias = self._bias(name, linear, n)
        if len(self.problems) > faults or scales is None or g_idx is None:
            return None
        return Layer(name, linear, k, n, group_size, g_idx, scales, bias)

    def shared_tensors(self, tied: bool) -> tuple[str, ...]:
        """The tensors outside the quantised layers; every other one is a fault."""
        shared = list(self.row_biases)
        blocks = [self.family.block(i) for i in range(self.geometry.blocks)]
        needed = {
            f"{block}.{tensor}": shape
            for block in blocks
            for tensor, shape in self.family.block_tensors.items()
        } | dict(self.family.tensors)
        sizes = {"hidden": self.geometry.hidden, "head_dim": self.geometry.head_dim}
        for name, shape in needed.items():
            if tied and name == self.family.head and self._spec(name) is None:
                continue
            # The vocabulary may be padded in the file: it is what the tensor says.
            length = (getattr(self._spec(name), "shape", ()) or (1,))[0]
            sizes |= {"vocab": length, "positions": length}
            if self._check(name, FLOATS, tuple(sizes[size] for size in shape)):
                shared.append(name)
        shared += [
            name
            for name in (
                *self.family.optional,
                *(f"{block}.{tensor}" for block in blocks for tensor in self.family.optional),
            )
            if self._spec(name) is not None
        ]
        self.problems += [
            f"{name}: unknown; every tensor must belong to the model that config.json describes"
            for name in self.source.names
            if name not in self.known
        ]
        return tuple(sorted(shared))

    def _spec(self, name: str) -> TensorSpec | None:
        spec = self.source.spec(name)
        if spec:
            self.known.add(name)
        return spec

    def _check(
        self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]
    ) -> TensorSpec | None:
        """The tensor's spec if it is there and is what it must be."""
        spec = self._spec(name)
        if spec is None:
            self.problems.append(f"{name}: missing; must be {_wanted(dtypes, shape)}")
        elif spec.dtype not in dtypes or spec.shape != shape:
            self.problems.append(
                f"{name}: is {spec.dtype} {list(spec.shape)}; must be {_wanted(dtypes, shape)}"
            )
        else:
            return spec
        return None

    def _g_idx(self, name: str, k: int, groups: int, group_size: int) -> IntArray | None:
        """The group of each row (K,); all zero or missing means consecutive groups."""
        consecutive = (np.arange(k) // group_size).astype(np.int32)
        if self._spec(name) is None:
            if self.quant.desc_act and not self.quant.static_groups and groups > 1:
                self.problems.append(
                    f"{name}: missing, though the config says desc_act: true; must be "
                    f"{_wanted(('I32',), (k,))}, or desc_act false if the rows are in order"
                )
            return consecutive
        if self._check(name, ("I32", "I64"), (k,)) is None:
            return None
        g_idx = self.source.array(name)
        low, high = int(g_idx.min()), int(g_idx.max())
        if low < 0 or high >= groups:
            self.problems.append(
                f"{name}: has values from {low} to {high}; must be 0 to {groups - 1} "
                f"(scales has {groups} groups)"
            )
            return None
        return g_idx.astype(np.int32) if high else consecutive

    def _bias(self, name: str, linear: Linear, n: int) -> TensorSpec | None:
        """The bias's spec where the model has one; AutoGPTQ's all-zero ones are passed over."""
        bias = f"{name}.bias"
        if linear.name not in self.biased and self._spec(bias) is None:
            return None
        spec = self._check(bias, FLOATS, (n,))
        if spec is None:
            return None
        if linear.name in self.biased:
            if linear.parallel == "row":
                self.row_biases.append(bias)
            return spec
        values = self.source.array(bias)
        if (values & 0x7FFF if spec.dtype == "BF16" else values).any():
            self.problems.append(
                f"{bias}: is not zero; must be absent or zero, since config.json says that this "
                "layer has no bias"
            )
        else:
            self.zero_biases += 1
        return None


def _wanted(dtypes: tuple[str, ...], shape: tuple[int, ...]) -> str:
    return f"{' or '.join(dtypes)} {list(shape)}"
