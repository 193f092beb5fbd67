"""A checkpoint understood: every layer's sizes and the order of its rows, or every fault in it.

Reads headers, g_idx and biases; never qweight or scales, and never torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpgptq_convert.compressed import COMPRESSED
from tpgptq_convert.config import (
    Geometry,
    QuantConfig,
    layer_tensors,
    pack_factor,
    read_config,
    read_quant_config,
    words_of,
)
from tpgptq_convert.errors import CheckpointError, TpgptqError
from tpgptq_convert.families import Axis, Family, Linear, family_of
from tpgptq_convert.source import FLOATS, Allocate, Source, TensorSpec, pageable

IntArray = NDArray[np.int32]
MOST_PROBLEMS = 10_000
STRIPE = 256  # rows that are transposed at a time


@dataclass(frozen=True)
class Form:
    """How a source has the tensors of a layer, beside how GPTQ has them."""

    names: Mapping[str, str]  # the last parts of their names, by GPTQ's
    transposed: bool = False  # all but g_idx; the words themselves are the same
    act_order: str = "desc_act: true"  # how its config says that there is a g_idx

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """The shape in which a matrix of the GPTQ shape (rows, columns) is stored."""
        return (columns, rows) if self.transposed else (rows, columns)


PARTS = ("qweight", "qzeros", "scales", "g_idx")
FORMS = {
    "gptq": Form({part: part for part in PARTS}),
    COMPRESSED: Form(
        {
            **{"qweight": "weight_packed", "qzeros": "weight_zero_point"},
            **{"scales": "weight_scale", "g_idx": "weight_g_idx"},
        },
        transposed=True,
        act_order="actorder: group",
    ),
}


@dataclass(frozen=True, eq=False)
class Layer:
    """One linear layer of the source, quantised or, in one group of all rows, not."""

    name: str  # model.layers.0.mlp.down_proj
    kind: str  # layers of one kind have shards of one size; the name in the table, or more
    linear: Linear  # its row of the table
    in_features: int  # K
    out_features: int  # N
    quant: QuantConfig | None  # None: it isn't quantised
    group_size: int  # rows per full group; K where a column is one group
    groups: int  # G
    g_idx: IntArray  # (K,) the group of each row
    dtype: str  # of its scales, or of its weight where it isn't quantised
    bias: TensorSpec | None  # (N,); None where it has none, or one that is all zero

    @property
    def bits(self) -> int | None:
        return self.quant.bits if self.quant else None

    @property
    def pack_factor(self) -> int:
        """What the number of its rows is a multiple of."""
        return pack_factor(self.bits)

    @property
    def column_bias(self) -> TensorSpec | None:
        """The bias that is cut with the columns, and not added once after the sum."""
        return self.bias if self.linear.parallel == "column" else None

    def tensors(self, k: int, n: int, groups: int) -> dict[str, TensorSpec]:
        """What is stored of such a layer of other sizes, but for perm and bias."""
        return layer_tensors(self.bits, k, n, groups, self.dtype)

    @property
    def nbytes(self) -> int:
        """Of its weights in the source, as progress counts them."""
        specs = self.tensors(self.in_features, self.out_features, self.groups)
        return sum(spec.nbytes for part, spec in specs.items() if part != "qzeros")

    @cached_property
    def act_order(self) -> bool:
        """Whether the rows' groups are anything but consecutive."""
        return not np.array_equal(self.g_idx, consecutive_groups(self.in_features, self.group_size))

    @cached_property
    def scattered(self) -> bool:
        """Whether the rows' groups don't ascend."""
        return bool((np.diff(self.g_idx) < 0).any())

    @cached_property
    def padded_rows(self) -> int:
        """Rows where every group is filled up to a whole one, or to several."""
        return int((-(-np.bincount(self.g_idx) // self.group_size) * self.group_size).sum())


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A source whose every tensor is known and has the shape that it must have."""

    source: Source
    config: dict[str, Any]
    quant: QuantConfig
    family: Family
    geometry: Geometry
    blocks: tuple[tuple[Layer, ...], ...]  # the last may be the head alone
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

    @cached_property
    def widths(self) -> Mapping[str, int]:
        """Channels of each axis, by its name in the table."""
        heads = (layer for layer in self.layers if Axis.VOCAB in layer.linear.writes)
        vocab = sum(layer.out_features for layer in heads)
        return widths_of(self.geometry) | {Axis.VOCAB.name: vocab}

    @property
    def mlps(self) -> Mapping[str, int]:
        """Channels of the free axes that there are, by name."""
        names = (layers[0].linear.reads.name for layers in self.kinds.values())
        return {name: self.geometry.mlps[name] for name in names if name in self.geometry.mlps}

    @property
    def most_ranks(self) -> int:
        """The largest degree at which a rank still has a head, or a group of the MLP's rows."""
        first = (layers[0] for layers in self.kinds.values())
        groups = (layer.groups for layer in first if layer.linear.reads.free)
        return max(self.geometry.heads, *groups)

    @property
    def name(self) -> str:
        """What an output says that it was made from."""
        return self.source.name

    @property
    def form(self) -> Form:
        return FORMS[self.quant.method]

    def part(self, layer: Layer, part: str, allocate: Allocate = pageable) -> NDArray[Any]:
        """A quantised layer's qweight, qzeros or scales as GPTQ has it, memory from `allocate`."""
        name, quant = f"{layer.name}.{self.form.names[part]}", layer.quant or self.quant
        if not self.form.transposed:
            return self.source.array(name, allocate)
        if part == "qzeros" and quant.sym:  # not stored
            words = words_of(
                quant.stored_neutral, quant.bits, layer.out_features * quant.bits // 32
            )
            return np.tile(words, (layer.groups, 1)).view(np.int32)
        stored = self.source.array(name)
        turned = allocate(stored.nbytes).view(stored.dtype).reshape(stored.T.shape)
        for begin in range(0, len(stored), STRIPE):  # five times as fast as all at once
            turned[:, begin : begin + STRIPE] = stored[begin : begin + STRIPE].T
        return turned

    @property
    def mlp_readers(self) -> list[Layer]:
        """Each block's down_proj, by whatever name."""
        return [layer for layer in self.layers if layer.linear.reads.free]

    @cached_property
    def kinds(self) -> Mapping[str, Sequence[Layer]]:
        """The layers of each kind, block after block."""
        kinds: dict[str, list[Layer]] = {}
        for layer in self.layers:
            kinds.setdefault(layer.kind, []).append(layer)
        return kinds


def consecutive_groups(rows: int, group_size: int) -> IntArray:
    """The g_idx (K,) of rows that lie in the order of their groups."""
    return (np.arange(rows) // group_size).astype(np.int32)


def widths_of(geometry: Geometry) -> dict[str, int]:
    """Channels of each axis of a model, by its name in the table."""
    return {
        Axis.HIDDEN.name: geometry.hidden,
        **{name: size * geometry.heads_of(name) for name, size in geometry.sizes.items()},
        **geometry.mlps,
    }


def read_checkpoint(model: Path, revision: str | None = None) -> Checkpoint:
    """Read the checkpoint in a directory, or on the Hub at a revision.

    Raises one error that lists every fault found.
    """
    source = Source(model, revision)
    directory = source.directory
    config = read_config(directory)
    quant, family = _all(lambda: read_quant_config(directory, config), lambda: family_of(config))
    geometry = family.geometry(config)
    parts = geometry.blocks * max(1, geometry.experts)
    if parts > max(100, len(source.names)):  # don't list what a million blocks lack
        raise CheckpointError(
            f"config.json: num_hidden_layers is {geometry.blocks}"
            f"{f', with {geometry.experts} experts each' if geometry.experts else ''}; the files "
            f"hold only {len(source.names)} tensors",
            hint="correct config.json, or fetch the files that are missing",
        )
    source.read_ahead(("g_idx", ".weight_shape", ".bias"))
    reader = _LayerReader(source, quant, family, geometry, config)
    blocks = []
    for block in range(geometry.blocks):
        linears = family.linears_of(config, geometry, block)
        layers = ((linear, f"{family.block(block)}.{linear.name}") for linear in linears)
        blocks.append([reader.layer(*layer) for layer in layers if reader.patient])
    if not reader.patient:
        raise CheckpointError(*reader.problems, hint=reader.hint)
    blocks += [[reader.head()]] if reader.has_head else []
    shared = reader.shared_tensors()
    if reader.problems:
        raise CheckpointError(*reader.problems, hint=reader.hint)
    known = tuple(tuple(layer for layer in block if layer) for block in blocks)
    ordered = [layer.act_order for block in known for layer in block]
    return Checkpoint(
        source=source,
        config=config,
        quant=quant,
        family=family,
        geometry=geometry,
        blocks=known,
        shared=shared,
        damage=_damage(quant, ordered),
        notes=_notes(quant, ordered, reader.zero_biases, reader.uneven),
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


def _notes(
    quant: QuantConfig, ordered: Sequence[bool], zero_biases: int, uneven: int
) -> tuple[str, ...]:
    notes = []
    if not any(ordered) and quant.desc_act:
        notes.append(
            f"the config says {FORMS[quant.method].act_order}, but every g_idx is sequential: the "
            "groups are plain already"
        )
    if quant.method == COMPRESSED and not quant.desc_act:
        notes.append(
            "actorder is not group: the groups are plain already, and servers that read "
            "compressed-tensors take this checkpoint as it is, where a rank has whole groups"
        )
    if zero_biases:
        notes.append(f"{zero_biases} all-zero biases, where this model has none, are left out")
    if uneven:
        notes.append(
            f"{uneven} of {len(ordered)} layers have a g_idx with more rows in one group than in "
            "another, as no quantiser writes it: if it is damaged, the model is"
        )
    return tuple(notes)


class _LayerReader:
    """Reads the layers one by one and remembers every fault, and every tensor that is known."""

    def __init__(
        self,
        source: Source,
        quant: QuantConfig,
        family: Family,
        geometry: Geometry,
        config: Mapping[str, Any],
    ) -> None:
        self.source, self.quant, self.family, self.config = source, quant, family, config
        self.geometry, self.biased = geometry, family.biased(config)
        self.form = FORMS[quant.method]
        self.widths = widths_of(geometry)
        self.known: set[str] = set()
        self.row_biases: list[str] = []
        self.zero_biases = self.uneven = 0
        self.problems: list[str] = []
        self.hint = "run `tpgptq inspect` on the checkpoint; fetch it again if files are damaged"

    @property
    def patient(self) -> bool:
        """Whether it is worth looking on: a file of no use may lack a million tensors."""
        return len(self.problems) < MOST_PROBLEMS

    def layer(self, linear: Linear, name: str) -> Layer | None:
        """One layer, or None where it has a fault."""
        faults = len(self.problems)
        k, n = self.widths[linear.reads.name], linear.width(self.widths)
        names = {part: f"{name}.{own}" for part, own in self.form.names.items()}
        dense = self._spec(names["qweight"]) is None and self._spec(f"{name}.weight") is not None
        if dense and self.family.transposed:
            self.problems.append(f"{name}.weight: is not quantised; must be, in such a model")
        quant = None if dense else self.quant.of(name)
        bits = quant.bits if quant else None
        group_size = min(quant.group_size, k) if quant and quant.group_size != -1 else k
        groups = -(-k // group_size)
        pack = pack_factor(bits)
        for axis, size in (("in_features", k), ("out_features", n if quant else pack)):
            if size % pack:
                self.problems.append(f"{name}: {axis} is {size}; must be a multiple of {pack}")
            elif not size:  # as only a head's may be, which the file states
                self.problems.append(f"{name}: {axis} is 0; must be a positive number")
        floats = None
        for part, spec in layer_tensors(bits, k, n, groups, FLOATS[0]).items():
            own, shape = f"{name}.weight", spec.shape
            if quant:
                own, shape = names[part], self.form.shape(*shape)
            if spec.dtype in FLOATS:
                floats = self._check(own, FLOATS, shape)
            elif part != "qzeros" or not (self.form.transposed and self.quant.sym):
                self._check(own, (spec.dtype,), shape)
        sound = len(self.problems) == faults  # of a size that the file has
        g_idx: IntArray | None = np.zeros(k if sound else 0, np.int32)
        if quant:
            g_idx = self._g_idx(names["g_idx"], k, groups, quant, sound)
            if quant.method == COMPRESSED:
                self._compressed(name, (n, k), g_idx, group_size)
        bias = self._bias(name, linear, n)
        if len(self.problems) > faults or floats is None or g_idx is None:
            return None
        even = np.bincount(consecutive_groups(k, group_size), minlength=groups)
        self.uneven += not np.array_equal(np.bincount(g_idx, minlength=groups), even)
        kind, sizes = f"{linear.kind}{self._otherwise(quant)}", (group_size, groups)
        return Layer(name, kind, linear, k, n, quant, *sizes, g_idx, floats.dtype, bias)

    def _otherwise(self, quant: QuantConfig | None) -> str:
        """How a layer is quantised, where that is not as the config says of all."""
        if quant is None:
            return " (not quantised)"
        if (quant.bits, quant.group_size) == (self.quant.bits, self.quant.group_size):
            return ""
        size = "one group" if quant.group_size == -1 else f"groups of {quant.group_size}"
        return f" ({quant.bits} bits, {size})"

    @property
    def has_head(self) -> bool:
        """Whether the head is quantised."""
        name = f"{self.family.head_linear.name}.{self.form.names['qweight']}"
        return self.source.spec(name) is not None

    def head(self) -> Layer | None:
        """The head, where it is quantised."""
        linear = self.family.head_linear
        scales = self.source.spec(f"{linear.name}.{self.form.names['scales']}")
        shape = self.form.shape(*scales.shape) if scales and len(scales.shape) == 2 else (0,)
        self.widths[Axis.VOCAB.name] = shape[-1]
        if self.family.tied(self.config):
            self.problems.append(
                f"{linear.name}: is quantised; must not be, since config.json says that it is the "
                "embeddings as well (tie_word_embeddings)"
            )
        return self.layer(linear, linear.name)

    def shared_tensors(self) -> tuple[str, ...]:
        """The tensors outside the linear layers; every other one is a fault."""
        shared = list(self.row_biases)
        tied = self.family.tied(self.config)
        blocks = dict.fromkeys(map(self.family.block, range(self.geometry.blocks)))
        needed = {
            f"{block}.{tensor}": shape
            for index, block in enumerate(blocks)
            for tensor, shape in self.family.block_tensors_of(self.config, index).items()
        } | dict(self.family.tensors)
        sizes = {
            **{name: self.widths[name] for name in (Axis.HIDDEN.name, *self.geometry.sizes)},
            "head_dim": self.geometry.head_dim,
            "experts": self.geometry.experts,
            "one": 1,
        }
        head = self.family.head_linear.name
        for name, shape in needed.items():
            if self.has_head and name in (f"{head}.weight", f"{head}.bias"):
                continue
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
        unknown = [name for name in self.source.names if name not in self.known]
        block_of = {name: self.family.block_of(name) for name in unknown}
        beyond = {name: block for name, block in block_of.items() if block and block not in blocks}
        self.problems += [
            f"{block}: unknown (tensors: {count}); must be one of the {len(blocks)} blocks that "
            "config.json counts, since none that predicts further tokens is supported"
            for block, count in Counter(beyond.values()).items()
        ]
        self.problems += [
            f"{name}: unknown; every tensor must belong to the model that config.json describes"
            for name in unknown
            if name not in beyond
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

    def _g_idx(
        self, name: str, k: int, groups: int, quant: QuantConfig, sound: bool
    ) -> IntArray | None:
        """The group of each row (K,); all zero or missing means consecutive groups."""
        size = k if groups == 1 else quant.group_size
        consecutive = consecutive_groups(k, size) if sound else None
        compressed = quant.method == COMPRESSED
        if compressed and not quant.desc_act:  # one that is there is an unknown tensor
            return consecutive
        if self._spec(name) is None:
            if quant.desc_act and not quant.static_groups and groups > 1:
                self.problems.append(
                    f"{name}: missing, though the config says {self.form.act_order}; must be "
                    f"{_wanted(('I32',), (k,))}, or the config say no such thing"
                )
            return consecutive
        if self._check(name, ("I32", "I64"), (k,)) is None:
            return None
        g_idx = self.source.array(name)
        low, high = int(g_idx.min()), int(g_idx.max())
        if compressed and low == -1:  # was never set
            return consecutive
        if low < 0 or high >= groups:
            self.problems.append(
                f"{name}: has values from {low} to {high}; must be 0 to {groups - 1} "
                f"(scales has {groups} groups)"
            )
            return None
        return g_idx.astype(np.int32) if high or compressed else consecutive

    def _compressed(
        self, name: str, shape: tuple[int, int], g_idx: IntArray | None, group_size: int
    ) -> None:
        """What compressed-tensors says of a layer beside GPTQ: its shape (N, K), and full groups.

        Its own code sorts the rows and cuts them into groups of one size, where all others go by
        g_idx: they agree where every group is full.
        """
        spec = self._check(f"{name}.weight_shape", ("I64", "I32"), (2,))
        if spec and (stated := tuple(self.source.array(f"{name}.weight_shape"))) != shape:
            self.problems.append(
                f"{name}.weight_shape: says {list(map(int, stated))}; must be {list(shape)}"
            )
        if g_idx is not None and (np.bincount(g_idx) != group_size).any():
            self.problems.append(
                f"{name}: has groups of other than {group_size} rows; must not, since "
                "compressed-tensors counts rows by their place, and others by weight_g_idx"
            )

    def _bias(self, name: str, linear: Linear, n: int) -> TensorSpec | None:
        """The bias's spec where the model has one; AutoGPTQ's all-zero ones are passed over."""
        bias = f"{name}.bias"
        biased = linear.kind in self.biased or bias in self.family.tensors
        if not biased and self._spec(bias) is None:
            return None
        spec = self._check(bias, FLOATS, (n,))
        if spec is None:
            return None
        if biased:
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
