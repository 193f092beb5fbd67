"""Headers, g_idx and the table -> the index vectors of every shard. No weight is touched here.

A shard of a linear layer is three index vectors and an optional fourth:

    rows   (K_r,)              source row of each shard row, -1 for a padding row
    cols   (N_r,)              source column of each shard column, -1 for a padding column
    groups (K_r/group_size,)   source group of each shard group, -1 for one of padding alone
    perm   (K_r,)              which element of the rank's input feeds each row; None: the identity

with the law  rows[j] == -1 or g_idx[rows[j]] == groups[j // group_size].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tpgptq_convert.checkpoint import Checkpoint, IntArray, Layer
from tpgptq_convert.config import Geometry, word_of
from tpgptq_convert.errors import CheckpointError, DegreeError, UnsupportedError
from tpgptq_convert.families import Axis, Linear
from tpgptq_convert.source import TensorSpec

ROW_GROUPS = (32, 16, 8)
# Kernels want a shard's rows to be a multiple of this; rounded up to wherever rows are added.
ROW_MULTIPLE = 128


@dataclass(frozen=True, eq=False)
class Shard:
    """One rank's slice of a layer; the vectors are described at the top of this file."""

    rows: IntArray
    cols: IntArray
    groups: IntArray
    group_size: int
    perm: IntArray | None


def stacked(vectors: Sequence[IntArray]) -> IntArray:
    """(ranks, n), or (1, n) where all ranks have the same."""
    if all(np.array_equal(vector, vectors[0]) for vector in vectors):
        return vectors[0][None]
    return np.stack(vectors)


@dataclass(frozen=True)
class Size:
    """What the shards of one kind of layer have in common, on all ranks and in all blocks."""

    in_features: int  # K_r
    out_features: int  # N_r
    group_size: int

    @property
    def groups(self) -> int:
        return self.in_features // self.group_size


def legal_degrees(geometry: Geometry) -> tuple[int, ...]:
    """The degrees that cut the heads evenly: divisors of the kv heads, or multiples of them."""
    heads, kv = geometry.heads, geometry.kv_heads
    return tuple(
        tp for tp in range(1, heads + 1) if heads % tp == 0 and (kv % tp == 0 or tp % kv == 0)
    )


def make_plans(
    checkpoint: Checkpoint, degrees: Iterable[int], row_group: int = ROW_GROUPS[0]
) -> list[Plan]:
    """A plan for each degree; raises DegreeError, naming the legal ones, if one is not legal."""
    degrees = list(degrees)
    geometry = checkpoint.geometry
    legal = legal_degrees(geometry)
    wrong = [tp for tp in degrees if tp not in legal]
    if wrong:
        raise DegreeError(
            *(
                f"tp {tp}: can't share out {geometry.heads} query and {geometry.kv_heads} kv heads "
                f"evenly; must be one of {', '.join(map(str, legal))}"
                for tp in wrong
            ),
            hint="`tpgptq inspect` says what each of these degrees costs",
        )
    plans = [Plan(checkpoint, tp, row_group) for tp in degrees]
    pack = checkpoint.quant.pack_factor
    problems = [
        f"tp {plan.tp}: {name} would have {count} {what} per rank; must be a multiple of {pack}"
        for plan in plans
        for name, size in plan.sizes.items()
        for what, count in (("rows", size.in_features), ("columns", size.out_features))
        if count % pack
    ]
    if problems:
        raise DegreeError(*problems, hint="use a smaller --tp")
    return plans


@dataclass(frozen=True, eq=False)
class Plan:
    """How one checkpoint is cut for one degree."""

    checkpoint: Checkpoint
    tp: int
    row_group: int  # the smallest group of attention output rows

    @cached_property
    def sizes(self) -> Mapping[str, Size]:
        """The shard sizes of each kind of layer, by its name in the table."""
        return {
            linear.name: Size(rows, linear.width(self._widths), group_size)
            for linear, (rows, group_size) in self._input_sizes.items()
        }

    @cached_property
    def _input_sizes(self) -> Mapping[Linear, tuple[int, int]]:
        return {linear: self._input_size(linear) for linear in self.checkpoint.family.linears}

    @cached_property
    def _widths(self) -> Mapping[Axis, int]:
        """Channels of each axis that a rank has, padding included."""
        widths = {linear.reads: rows for linear, (rows, _) in self._input_sizes.items()}
        for axis in (Axis.HIDDEN, Axis.QUERY, Axis.KV):
            widths[axis] = len(self._channels(axis, 0))
        return widths

    @property
    def replicas(self) -> int:
        """How many ranks hold each kv head."""
        return max(1, self.tp // self.checkpoint.geometry.kv_heads)

    def block(self, index: int) -> dict[str, tuple[Shard, ...]]:
        """The shards of every layer of a block, by the layer's name, rank after rank."""
        layers = self.checkpoint.blocks[index]
        inputs = {layer.linear: self._inputs(layer) for layer in layers}
        channels = {axis: self._all_channels(axis) for axis in (Axis.HIDDEN, Axis.QUERY, Axis.KV)}
        # The MLP's channels take the order of the rows of the layer that reads them.
        channels |= {
            linear.reads: [rows for rows, _ in ranks]
            for linear, ranks in inputs.items()
            if linear.reads is Axis.MLP
        }
        shards = {}
        for layer in layers:
            group_size = self.sizes[layer.linear.name].group_size
            perms = self._perms(layer, inputs[layer.linear])
            cols = [
                self._columns(layer.linear, {axis: ranks[rank] for axis, ranks in channels.items()})
                for rank in range(self.tp)
            ]
            ranks = zip(inputs[layer.linear], cols, perms, strict=True)
            shards[layer.name] = tuple(
                Shard(rows, of_rank, groups, group_size, perm)
                for (rows, groups), of_rank, perm in ranks
            )
        return shards

    def _columns(self, linear: Linear, channels: Mapping[Axis, IntArray]) -> IntArray:
        """The source columns (N_r,) of the channels that a rank has, in the order of its own."""
        head_dim = self.checkpoint.geometry.head_dim
        source = linear.places(self.checkpoint.widths, head_dim)
        own = linear.places(self._widths, head_dim)
        cols = np.empty(linear.width(self._widths), np.int32)
        for axis, whole, places in zip(linear.writes, source, own, strict=True):
            of_part = channels[axis]
            cols[places] = np.where(of_part < 0, -1, whole[of_part])
        return cols

    def tensors(self, layer: Layer) -> dict[str, TensorSpec]:
        """The tensors that one rank stores of a layer, by the last part of their names."""
        size, pack = self.sizes[layer.linear.name], self.checkpoint.quant.pack_factor
        k, n, groups = size.in_features, size.out_features, size.groups
        tensors = {
            "qweight": TensorSpec("I32", (k // pack, n)),
            "qzeros": TensorSpec("I32", (groups, n // pack)),
            "scales": TensorSpec(layer.scales.dtype, (groups, n)),
        }
        if self.has_perm(layer):
            tensors["perm"] = TensorSpec("I32", (k,))
        if layer.bias and layer.linear.parallel == "column":
            tensors["bias"] = TensorSpec(layer.bias.dtype, (n,))
        return tensors

    def merged_tensors(self, layer: Layer) -> dict[str, TensorSpec]:
        """The tensors of all ranks' shards as one; see `merged`."""
        column = layer.linear.parallel == "column"
        times = self.tp // (self.replicas if layer.linear.writes == (Axis.KV,) else 1)

        def grown(part: str, spec: TensorSpec) -> TensorSpec:
            if not column:
                return TensorSpec(spec.dtype, (spec.shape[0] * times, *spec.shape[1:]))
            if part == "perm":
                return spec
            return TensorSpec(spec.dtype, (*spec.shape[:-1], spec.shape[-1] * times))

        return {part: grown(part, spec) for part, spec in self.tensors(layer).items()}

    @property
    def intermediate(self) -> int:
        """Channels of the MLP on all ranks together, padding included."""
        linears = self.checkpoint.family.linears
        return sum(
            self.sizes[linear.name].in_features * self.tp
            for linear in linears
            if linear.reads is Axis.MLP
        )

    @cached_property
    def rank_bytes(self) -> int:
        """Bytes of the tensors that each rank stores for itself."""
        return sum(
            spec.nbytes for layer in self.checkpoint.layers for spec in self.tensors(layer).values()
        )

    @cached_property
    def growth(self) -> float:
        """Weights stored on all ranks together, as a multiple of the source's."""
        stored = source = 0
        for layer in self.checkpoint.blocks[0]:
            size = self.sizes[layer.linear.name]
            stored += size.in_features * size.out_features * self.tp
            source += layer.in_features * layer.out_features
        return stored / source

    @property
    def notes(self) -> list[str]:
        """What a person should know before choosing this plan."""
        notes = []
        for layer in self.checkpoint.blocks[0]:
            if layer.linear.reads is not Axis.QUERY:
                continue
            grown = self._growth_of(layer)
            smaller = {
                option: Plan(self.checkpoint, self.tp, option)._growth_of(layer)
                for option in ROW_GROUPS
                if option < self.row_group
            }
            if grown > 1 + (self.tp - 1) / 2 and min(smaller.values(), default=grown) < grown:
                choices = ", ".join(f"--row-group {o} {g:.2f}" for o, g in smaller.items())
                notes.append(
                    f"tp {self.tp}: {layer.linear.name} stores {grown:.2f} times the source's rows "
                    f"({choices} times, for engines that take such groups)"
                )
        return notes

    def _growth_of(self, layer: Layer) -> float:
        return self.sizes[layer.linear.name].in_features * self.tp / layer.in_features

    def merged(self, layer: Layer, shards: Sequence[Shard]) -> Shard:
        """All ranks' shards as one, in rank order; kv heads that ranks share stand in it once."""
        if layer.linear.parallel == "column":
            once = shards[:: self.replicas] if layer.linear.writes == (Axis.KV,) else shards
            cols = np.concatenate([shard.cols for shard in once])
            first = shards[0]
            return Shard(first.rows, cols, first.groups, first.group_size, first.perm)
        perms = [shard.perm for shard in shards if shard.perm is not None]
        return Shard(
            rows=np.concatenate([shard.rows for shard in shards]),
            cols=shards[0].cols,
            groups=np.concatenate([shard.groups for shard in shards]),
            group_size=shards[0].group_size,
            perm=np.concatenate(perms) if perms else None,
        )

    def has_perm(self, layer: Layer) -> bool:
        """Whether the shards of a layer gather their input."""
        if layer.linear.reads is Axis.MLP:
            return False
        channels = self._all_channels(layer.linear.reads)
        return self.sizes[layer.linear.name].in_features != len(channels[0]) or any(
            bool((np.diff(layer.g_idx[rows]) < 0).any()) for rows in channels
        )

    def _perms(
        self, layer: Layer, inputs: Sequence[tuple[IntArray, IntArray]]
    ) -> list[IntArray | None]:
        """Position of each shard row in the rank's input; padding rows read its first element."""
        if not self.has_perm(layer):
            return [None] * self.tp
        channels = self._all_channels(layer.linear.reads)
        return [
            np.maximum(rows - own[0], 0) for (rows, _), own in zip(inputs, channels, strict=True)
        ]

    def _all_channels(self, axis: Axis) -> list[IntArray]:
        return [self._channels(axis, rank) for rank in range(self.tp)]

    def _channels(self, axis: Axis, rank: int) -> IntArray:
        """The channels of an axis that the model's own order gives to a rank."""
        geometry = self.checkpoint.geometry
        if axis is Axis.HIDDEN:
            start, count = 0, geometry.hidden
        elif axis is Axis.QUERY:
            count = geometry.heads // self.tp * geometry.head_dim
            start = rank * count
        elif axis is Axis.KV:
            count = max(1, geometry.kv_heads // self.tp) * geometry.head_dim
            start = rank // self.replicas * count
        else:
            raise ValueError(f"the order of {axis} is the planner's to choose")
        return np.arange(start, start + count, dtype=np.int32)

    def _input_size(self, linear: Linear) -> tuple[int, int]:
        """K_r and group size of a kind of layer: the most that any rank of any block needs."""
        layers = self.checkpoint.layers_of(linear)
        total = layers[0].in_features
        parts = 1 if linear.parallel == "column" else self.tp
        natural = total // parts
        if layers[0].groups == 1:  # a column is one group, of whatever length
            if total % (parts * self.checkpoint.quant.pack_factor):
                natural = _round_up(-(-total // parts), ROW_MULTIPLE)
            return natural, natural
        if linear.reads is not Axis.QUERY:
            unit = layers[0].group_size
            most = max(int(_padded_counts(layer.g_idx, unit).sum()) for layer in layers)
            if linear.reads is Axis.MLP:  # whole groups are dealt to the ranks
                most = -(-most // (unit * self.tp)) * unit
            return _row_count(most, natural, unit), unit
        rows = {
            unit: _row_count(self._bucketed_rows(layers, unit), natural, unit)
            for unit in self._row_units(layers[0])
        }
        unit = max(unit for unit in rows if rows[unit] == min(rows.values()))
        return rows[unit], unit

    def _row_units(self, layer: Layer) -> list[int]:
        """Group sizes that attention output rows may have: from row_group to the source's own."""
        units = [layer.group_size]
        while units[-1] % 16 == 0 and units[-1] // 2 >= self.row_group:
            units.append(units[-1] // 2)
        return units

    def _bucketed_rows(self, layers: Sequence[Layer], unit: int) -> int:
        """Rows on the fullest rank where each (group, rank) bucket is padded to whole units."""
        return max(
            int(_padded_counts(layer.g_idx[self._channels(Axis.QUERY, rank)], unit).sum())
            for layer in layers
            for rank in range(self.tp)
        )

    def _inputs(self, layer: Layer) -> list[tuple[IntArray, IntArray]]:
        """(rows, groups) of each rank."""
        axis, size = layer.linear.reads, self.sizes[layer.linear.name]
        rows_per_rank = size.in_features
        whole = layer.groups == 1  # a column is one group, however many rows a rank has of it
        unit = self.checkpoint.quant.pack_factor if whole else size.group_size
        if axis is Axis.MLP:
            everything = np.arange(layer.in_features, dtype=np.int32)
            rows, groups = _by_group(everything, layer.g_idx, unit, rows_per_rank * self.tp)
            ranks = list(zip(np.split(rows, self.tp), np.split(groups, self.tp), strict=True))
        elif axis is Axis.HIDDEN:  # the same rows on every rank
            own = self._channels(axis, 0)
            ranks = [_by_group(own, layer.g_idx, unit, rows_per_rank)] * self.tp
        else:
            ranks = [
                _by_group(own, layer.g_idx, unit, rows_per_rank) for own in self._all_channels(axis)
            ]
        return [(rows, groups[:1] if whole else groups) for rows, groups in ranks]


def _by_group(rows: IntArray, g_idx: IntArray, unit: int, size: int) -> tuple[IntArray, IntArray]:
    """Sort rows by group, pad each group's rows to whole units, and the whole to `size`.

    Returns (size,) rows and (size/unit,) groups, -1 for padding. The sort is stable.
    """
    rows = rows[np.argsort(g_idx[rows], kind="stable")]
    present, counts = np.unique(g_idx[rows], return_counts=True)
    padded = -(-counts // unit) * unit
    shift = np.cumsum(padded - counts) - (padded - counts)  # padding before each group
    out = np.full(size, -1, np.int32)
    out[np.arange(len(rows)) + np.repeat(shift, counts)] = rows
    groups = np.full(size // unit, -1, np.int32)
    groups[: padded.sum() // unit] = np.repeat(present, padded // unit)
    return out, groups


def _padded_counts(g_idx: IntArray, unit: int) -> IntArray:
    """Rows of each group, each rounded up to whole units."""
    return (-(-np.bincount(g_idx) // unit) * unit).astype(np.int32)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _row_count(needed: int, natural: int, unit: int) -> int:
    """K_r: the natural size where nothing is added, else a multiple that kernels want."""
    return natural if needed == natural else _round_up(needed, math.lcm(unit, ROW_MULTIPLE))


def check_layout(checkpoint: Checkpoint, layout: str) -> None:
    """Raise UnsupportedError where a checkpoint can't be written in this layout."""
    fused = [linear.name for linear in checkpoint.family.linears if linear.fused]
    if layout == "merged" and fused:
        raise UnsupportedError(
            f"--layout merged: {' and '.join(fused)} of {checkpoint.config['model_type']} are "
            "several layers in one; must be one each, so that a server can slice them",
            hint="use --layout ranks",
        )


def check_zero_points(checkpoint: Checkpoint, plans: Sequence[Plan]) -> bool:
    """Whether every zero point is neutral; reads qzeros, which `inspect` doesn't.

    Raises CheckpointError where they can't be converted. A checkpoint that says sym must have
    neutral zero points throughout, since kernels then don't read them. A padding row must hold its
    group's zero point, which it can't where the "gptq" format stores the largest field: that
    stands for one more than a value can be.
    """
    quant = checkpoint.quant
    words = {
        layer.name: checkpoint.source.array(f"{layer.name}.qzeros").view(np.uint32)
        for layer in checkpoint.layers
    }
    neutral_word = word_of(quant.stored_neutral, quant.bits)
    odd = [name for name, fields in words.items() if (fields != neutral_word).any()]
    if quant.sym and odd:
        raise CheckpointError(
            *(
                f"{name}.qzeros: holds zero points other than {quant.neutral}; must not, since the "
                "config says sym: true"
                for name in odd
            ),
            hint="correct sym in the quantisation config",
        )
    problems = []
    largest = (1 << quant.bits) - 1
    for plan in plans if odd and quant.checkpoint_format == "gptq" else ():
        for index, block in enumerate(checkpoint.blocks):
            shards = plan.block(index)
            for layer in block:
                fields = words[layer.name][_groups_with_padding(shards[layer.name])]
                count = sum(
                    int((fields >> shift & largest == largest).sum())
                    for shift in range(0, 32, quant.bits)
                )
                if count:
                    problems.append(
                        f"{layer.name}.qzeros: {count} zero points are stored as {largest} in "
                        f"groups that tp {plan.tp} pads; must be less, so that a padding row can "
                        "hold the zero point"
                    )
    if problems:
        raise CheckpointError(
            *problems, hint="use --tp 1, or save the source with checkpoint_format gptq_v2 first"
        )
    return not odd if quant.sym is None else quant.sym


def _groups_with_padding(shards: Sequence[Shard]) -> list[int]:
    """The source groups that share a shard group with padding rows."""
    found: set[int] = set()
    for shard in shards:
        padded = (shard.rows.reshape(-1, shard.group_size) < 0).any(axis=1)
        found.update(shard.groups[padded & (shard.groups >= 0)].tolist())
    return sorted(found)
