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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpgptq_convert.checkpoint import Checkpoint, IntArray, Layer
from tpgptq_convert.config import Geometry, fields_of, words_of
from tpgptq_convert.errors import CheckpointError, DegreeError, UnsupportedError
from tpgptq_convert.families import Axis, Cut, Linear
from tpgptq_convert.served import limits
from tpgptq_convert.source import TensorSpec

ROW_GROUPS = (32, 16, 8)
# Kernels want a shard's rows to be a multiple of this; rounded up to wherever rows are added.
ROW_MULTIPLE = 128
# Where heads don't divide: the tokens whose keys and values count beside the weights, at 16 bits.
CACHED_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class Shard:
    """One rank's slice of a layer; the vectors are described at the top of this file."""

    rows: IntArray
    cols: IntArray
    groups: IntArray
    group_size: int
    perm: IntArray | None
    g_idx: IntArray | None = None  # (K_r,) each row's group, where a layout stores that


def stacked(vectors: Sequence[IntArray]) -> IntArray:
    """(ranks, n), or (1, n) where all ranks have the same."""
    if all(np.array_equal(vector, vectors[0]) for vector in vectors):
        return vectors[0][None]
    return np.stack(vectors)


@dataclass(frozen=True)
class Size:
    """What the shards of layers of one kind have in common, on all ranks and in all blocks."""

    in_features: int  # K_r
    out_features: int  # N_r
    group_size: int

    @property
    def groups(self) -> int:
        return -(-self.in_features // self.group_size)


@dataclass(frozen=True)
class Heads:
    """How heads are dealt: every rank has `kv` kv heads, and `each` query heads to each of them.

    A kv head of the source stands in `copies` places, one after another, that share its query heads
    out. Places beyond the last hold empty heads, and so do query heads that a place has too many.
    """

    geometry: Geometry
    tp: int
    kv: int
    each: int

    @property
    def copies(self) -> int:
        return -(-self.geometry.queries_per_kv // self.each)

    @property
    def query(self) -> int:
        """Query heads of a rank."""
        return self.kv * self.each

    @property
    def padded_query(self) -> int:
        """Query heads on all ranks together, as a server counts them."""
        return self.tp * self.query

    @property
    def padded_kv(self) -> int:
        """The kv heads that a server deals to the ranks, or (fewer) gives to several of them."""
        shared = self.kv == 1 and self.tp % self.copies == 0
        return self.tp // self.copies if shared else self.tp * self.kv

    @property
    def replicas(self) -> int:
        """How many ranks a server gives each kv head to."""
        return max(1, self.tp // self.padded_kv)

    @property
    def padded(self) -> bool:
        """Whether a server must count heads that the source doesn't have."""
        whole = self.geometry.heads, self.geometry.kv_heads
        return (self.padded_query, self.padded_kv) != whole

    @property
    def idle_ranks(self) -> int:
        """Ranks whose heads are all empty."""
        return self.tp - -(-self.geometry.kv_heads * self.copies // self.kv)

    def cost(self, bits: int) -> int:
        """What a rank reads for a token, as a multiple of what each plan of a model shares: rows
        and columns of each head in `bits` bits, and the keys and values of CACHED_TOKENS tokens.
        """
        return self.kv * ((self.each + 1) * self.geometry.hidden * bits + CACHED_TOKENS * 16)

    def of_rank(self, rank: int) -> tuple[IntArray, IntArray]:
        """The source's query heads (query,) and kv heads (kv,) on a rank; -1 for an empty one."""
        group = self.geometry.queries_per_kv
        head, part = np.divmod(np.arange(rank * self.kv, (rank + 1) * self.kv), self.copies)
        real = head < self.geometry.kv_heads
        within = part[:, None] * self.each + np.arange(self.each)
        query = np.where(real[:, None] & (within < group), head[:, None] * group + within, -1)
        return query.reshape(-1).astype(np.int32), np.where(real, head, -1).astype(np.int32)


def deal_heads(
    geometry: Geometry, tp: int, bits: int, fits: Callable[[Heads], bool] = lambda _: True
) -> Heads:
    """The dealing that costs a rank the least; where heads divide, they are dealt evenly.

    Either whole kv heads with their query heads are dealt, or kv heads are copied and their query
    heads shared out; empty heads fill what is left, until a rank has so many that they fit.
    """

    def dealt(each: int) -> Heads:
        places = geometry.kv_heads * -(-geometry.queries_per_kv // each)
        together = geometry.heads_together
        heads = Heads(geometry, tp, -(-places // (tp * together)) * together, each)
        while not fits(heads):
            heads = replace(heads, kv=heads.kv + together)
        return heads

    choices = map(dealt, range(geometry.queries_per_kv, 0, -1))
    return min(choices, key=lambda heads: heads.cost(bits))


def heads_of(checkpoint: Checkpoint, tp: int) -> Heads:
    """How a checkpoint's heads are dealt: so that every layer's columns fill whole words."""
    geometry, bits = checkpoint.geometry, checkpoint.quant.bits
    writers = {
        (layers[0].linear, layers[0].pack_factor)
        for layers in checkpoint.kinds.values()
        if layers[0].quant and layers[0].linear.writes[0].cut is Cut.HEADS
    }

    def fits(heads: Heads) -> bool:
        widths = {
            name: size * (heads.kv if name == Axis.KV.name else heads.query)
            for name, size in geometry.sizes.items()
        }
        return all(linear.width(widths) % pack == 0 for linear, pack in writers)

    return deal_heads(geometry, tp, bits, fits)


def make_plans(
    checkpoint: Checkpoint,
    degrees: Iterable[int],
    row_group: int = ROW_GROUPS[0],
    kind: type[Plan] | None = None,
) -> list[Plan]:
    """A plan for each degree; raises DegreeError where one can't be."""
    degrees, most = list(degrees), checkpoint.most_ranks
    problems = [
        f"tp {tp}: must be from 1 to {most}"
        f"{'; more ranks have neither a head nor a group of the MLP' if tp > most else ''}"
        for tp in degrees
        if not 1 <= tp <= most
    ]
    if problems:
        raise DegreeError(*problems, hint="`tpgptq inspect` says what each degree costs")
    return [(kind or Plan)(checkpoint, tp, row_group) for tp in degrees]


@dataclass(frozen=True, eq=False)
class Plan:
    """How one checkpoint is cut for one degree."""

    checkpoint: Checkpoint
    tp: int
    row_group: int  # the smallest group of attention output rows

    @cached_property
    def sizes(self) -> Mapping[str, Size]:
        """The shard sizes of each kind of layer."""
        return {
            kind: Size(rows, self._linears[kind].width(self._widths), group_size)
            for kind, (rows, group_size) in self._input_sizes.items()
        }

    @cached_property
    def _linears(self) -> Mapping[str, Linear]:
        """A layer of each kind."""
        return {kind: layers[0].linear for kind, layers in self.checkpoint.kinds.items()}

    @cached_property
    def _input_sizes(self) -> Mapping[str, tuple[int, int]]:
        return {kind: self._input_size(layers) for kind, layers in self.checkpoint.kinds.items()}

    @cached_property
    def _widths(self) -> Mapping[str, int]:
        """Channels of each axis that a rank has, padding included, by the axis's name."""
        fixed = {axis.name: len(ranks[0]) for axis, ranks in self._channels.items()}
        return fixed | self._free_widths

    @property
    def shards(self) -> int:
        """How many shards of a layer there are."""
        return self.tp

    @cached_property
    def heads(self) -> Heads:
        """Which heads each rank has."""
        return heads_of(self.checkpoint, self.tp)

    def _copies(self, linear: Linear) -> int:
        """How many ranks hold the same columns of a layer."""
        axis = linear.writes[0]
        if linear.fused or linear.parallel == "row":
            return 1
        return self.tp if axis.whole else self.heads.replicas if axis is Axis.KV else 1

    def block(self, index: int) -> dict[str, tuple[Shard, ...]]:
        """The shards of every layer of a block, by the layer's name, rank after rank."""
        layers = self.checkpoint.blocks[index]
        inputs = {layer.linear: self._inputs(layer) for layer in layers}
        # Free channels take the order of the rows of the layer that reads them.
        channels = dict(self._channels) | {
            linear.reads: [rows for rows, _ in ranks]
            for linear, ranks in inputs.items()
            if linear.reads.free
        }
        shards = {}
        for layer in layers:
            group_size = self.sizes[layer.kind].group_size
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
        sizes = self.checkpoint.geometry.sizes
        source = linear.places(self.checkpoint.widths, sizes)
        own = linear.places(self._widths, sizes)
        cols = np.empty(linear.width(self._widths), np.int32)
        for axis, whole, places in zip(linear.writes, source, own, strict=True):
            of_part = channels[axis]
            cols[places] = np.where(of_part < 0, -1, whole[of_part])
        return cols

    def tensors(self, layer: Layer) -> dict[str, TensorSpec]:
        """The tensors that one rank stores of a layer, by the last part of their names."""
        size = self.sizes[layer.kind]
        k, n = size.in_features, size.out_features
        tensors = layer.tensors(k, n, size.groups)
        if self.has_perm(layer):
            tensors["perm"] = TensorSpec("I32", (k,))
        if layer.column_bias:
            tensors["bias"] = TensorSpec(layer.column_bias.dtype, (n,))
        return tensors

    def merged_tensors(self, layer: Layer) -> dict[str, TensorSpec]:
        """The tensors of all ranks' shards as one; see `merged`."""
        column = layer.linear.parallel == "column"
        times = self.tp // self._copies(layer.linear)

        def grown(part: str, spec: TensorSpec) -> TensorSpec:
            if column and part == "perm":
                return spec
            if column != (part == "weight"):  # (N, K), all others end with N
                return TensorSpec(spec.dtype, (*spec.shape[:-1], spec.shape[-1] * times))
            return TensorSpec(spec.dtype, (spec.shape[0] * times, *spec.shape[1:]))

        return {part: grown(part, spec) for part, spec in self.tensors(layer).items()}

    @cached_property
    def mlps(self) -> dict[str, int]:
        """Channels of each free axis on all ranks together, padding included, by its name."""
        return {
            linear.reads.name: self.sizes[kind].in_features * self.shards
            for kind, linear in self._linears.items()
            if linear.reads.free
        }

    @property
    def intermediate(self) -> int:
        """The first of them."""
        return next(iter(self.mlps.values()))

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
        for layer in self.checkpoint.layers:
            size = self.sizes[layer.kind]
            stored += size.in_features * size.out_features * self.shards
            source += layer.in_features * layer.out_features
        return stored / source

    @property
    def config(self) -> dict[str, Any]:
        """config.json with the padded sizes, still with the source's quantisation."""
        family, heads = self.checkpoint.family, self.heads
        config = family.resized(self.checkpoint.config, self.mlps)
        return family.with_heads(
            config, self.checkpoint.geometry, heads.padded_query, heads.padded_kv
        )

    @property
    def notes(self) -> list[str]:
        """What a person should know before choosing this plan."""
        notes, heads = [], self.heads
        if heads.padded:
            copied = "kv heads are copied, and " if heads.copies > 1 else ""
            notes.append(f"heads don't divide: {copied}some are empty")
        if heads.idle_ranks:
            notes.append("some ranks have no heads at all, and nothing but a part of the MLP to do")
        for layer in self.checkpoint.blocks[0]:
            if layer.linear.reads.cut is not Cut.HEADS:
                continue
            grown = self._growth_of(layer)
            smaller = [
                str(option)
                for option in ROW_GROUPS
                if option < self.row_group
                and Plan(self.checkpoint, self.tp, option)._growth_of(layer) < grown
            ]
            if smaller and grown > 1 + (self.tp - 1) / 2:
                notes.append(
                    f"{layer.kind} stores more than (tp + 1) / 2 times the source's rows; "
                    f"--row-group {' or '.join(smaller)} stores less, for engines that take such "
                    "groups"
                )
        return [*notes, *limits(self.config, self.tp)]

    def _growth_of(self, layer: Layer) -> float:
        rows, _ = self._input_size(self.checkpoint.kinds[layer.kind])
        return rows * self.tp / layer.in_features

    def merged(self, layer: Layer, shards: Sequence[Shard]) -> Shard:
        """All ranks' shards as one, in rank order; kv heads that ranks share stand in it once."""
        if layer.linear.parallel == "column":
            once = shards[:: self._copies(layer.linear)]
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
        if layer.linear.reads.free:
            return False
        channels = self._channels[layer.linear.reads]
        if self.sizes[layer.kind].in_features != len(channels[0]):
            return True
        if layer.linear.reads.whole:
            return layer.scattered
        return any(
            bool((rows < 0).any() or (np.diff(layer.g_idx[rows]) < 0).any()) for rows in channels
        )

    def _perms(
        self, layer: Layer, inputs: Sequence[tuple[IntArray, IntArray]]
    ) -> list[IntArray | None]:
        """Position of each shard row in the rank's input; padding rows read its first element."""
        if not self.has_perm(layer):
            return [None] * self.tp
        perms: list[IntArray | None] = []
        for (rows, _), own in zip(inputs, self._channels[layer.linear.reads], strict=True):
            position = np.zeros(layer.in_features + 1, np.int32)
            position[own] = np.arange(len(own))
            perms.append(np.where(rows < 0, 0, position[rows]).astype(np.int32))
        return perms

    @cached_property
    def _channels(self) -> Mapping[Axis, list[IntArray]]:
        """The channels of each rank, -1 for an empty head's, where the model fixes their order."""
        sizes, widths = self.checkpoint.geometry.sizes, self.checkpoint.widths
        heads = [self.heads.of_rank(rank) for rank in range(self.tp)]
        axes = {
            axis
            for linear in self._linears.values()
            for axis in (linear.reads, *linear.writes)
            if not axis.free
        }
        return {
            axis: [np.arange(widths[axis.name], dtype=np.int32)] * self.tp
            if axis.whole
            else [
                _channels_of(kv if axis is Axis.KV else query, sizes[axis.name])
                for query, kv in heads
            ]
            for axis in axes
        }

    def _input_size(self, layers: Sequence[Layer]) -> tuple[int, int]:
        """K_r and group size of a kind of layer: the most that any rank of any block needs."""
        first, axis = layers[0], layers[0].linear.reads
        if axis.free:
            rows = self._free_widths[axis.name]
            return rows, rows if first.groups == 1 else first.group_size
        natural, pack = len(self._channels[axis][0]), first.pack_factor
        if first.groups == 1:  # a column is one group, of whatever length
            rows = _round_up(natural, math.lcm(pack, ROW_MULTIPLE)) if natural % pack else natural
            return rows, rows
        if axis.whole:
            unit = first.group_size
            most = max(layer.padded_rows for layer in layers)
            return _row_count(most, natural, math.lcm(unit, pack)), unit
        counts = [self._rows_of_ranks(layer) for layer in layers]
        rows_of = {
            unit: _row_count(
                max(_most_rows(count, unit) for count in counts), natural, math.lcm(unit, pack)
            )
            for unit in self._row_units(first)
        }
        unit = max(unit for unit in rows_of if rows_of[unit] == min(rows_of.values()))
        return rows_of[unit], unit

    @cached_property
    def _free_widths(self) -> dict[str, int]:
        """Channels of each free axis that a rank has, by its name: K_r of what reads, N_r of what
        writes it.

        In all blocks the same, however each layer is quantised: config.json has one width.
        """
        most = dict.fromkeys(self.checkpoint.mlps, 0)
        multiples: dict[str, int] = {}
        for layer in self.checkpoint.layers:
            reads = layer.linear.reads
            units = {axis.name: layer.pack_factor for axis in layer.linear.writes if layer.quant}
            if reads.free:
                unit = 1 if layer.groups == 1 else layer.group_size
                needed = layer.in_features if layer.groups == 1 else layer.padded_rows
                most[reads.name] = max(most[reads.name], -(-needed // (unit * self.tp)) * unit)
                units[reads.name] = math.lcm(layer.pack_factor, unit)
            for name, unit in units.items():
                multiples[name] = math.lcm(multiples.get(name, 1), unit)
        return {
            name: _row_count(rows, self.checkpoint.mlps[name] // self.tp, multiples[name])
            for name, rows in most.items()
        }

    def _row_units(self, layer: Layer) -> list[int]:
        """Group sizes that attention output rows may have: from row_group to the source's own."""
        units = [layer.group_size]
        while units[-1] % 16 == 0 and units[-1] // 2 >= self.row_group:
            units.append(units[-1] // 2)
        return units

    def _rows_of_ranks(self, layer: Layer) -> NDArray[np.int64]:
        """Attention output rows of each group on each rank, (ranks, G)."""
        rank = np.empty(layer.in_features + 1, np.int32)  # of each row; the last is for no row
        for index, own in enumerate(self._channels[layer.linear.reads]):
            rank[own] = index
        buckets = rank[:-1] * layer.groups + layer.g_idx
        return np.bincount(buckets, minlength=self.tp * layer.groups).reshape(self.tp, -1)

    def _inputs(self, layer: Layer) -> list[tuple[IntArray, IntArray]]:
        """(rows, groups) of each rank."""
        axis, size = layer.linear.reads, self.sizes[layer.kind]
        rows_per_rank = size.in_features
        whole = layer.groups == 1  # a column is one group, however many rows a rank has of it
        unit = 1 if whole else size.group_size
        if axis.free:
            everything = np.arange(layer.in_features, dtype=np.int32)
            rows, groups = by_group(everything, layer.g_idx, unit, rows_per_rank * self.tp)
            ranks = list(zip(np.split(rows, self.tp), np.split(groups, self.tp), strict=True))
        elif axis.whole:  # the same rows on every rank
            own = self._channels[axis][0]
            ranks = [by_group(own, layer.g_idx, unit, rows_per_rank)] * self.tp
        else:
            ranks = [
                by_group(own[own >= 0], layer.g_idx, unit, rows_per_rank)
                for own in self._channels[axis]
            ]
        return [(rows, groups[:1] if whole else groups) for rows, groups in ranks]


def by_group(rows: IntArray, g_idx: IntArray, unit: int, size: int) -> tuple[IntArray, IntArray]:
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


def _channels_of(heads: IntArray, head_dim: int) -> IntArray:
    """The channels of heads, -1 for those of an empty one."""
    channels = heads[:, None] * head_dim + np.arange(head_dim, dtype=np.int32)
    return np.where(heads[:, None] < 0, np.int32(-1), channels).reshape(-1)


def _most_rows(counts: NDArray[np.int64], unit: int) -> int:
    """The most rows on a rank, of counts (ranks, G), each group's padded to whole units."""
    return int((-(-counts // unit) * unit).sum(axis=1).max())


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _row_count(needed: int, natural: int, unit: int) -> int:
    """K_r, of whole units: the natural size where it will do, else a multiple that kernels want."""
    if needed == natural and natural % unit == 0:
        return natural
    return _round_up(needed, math.lcm(unit, ROW_MULTIPLE))


def check_layout(checkpoint: Checkpoint, layout: str, degrees: Iterable[int]) -> None:
    """Raise UnsupportedError where a checkpoint can't be written in this layout."""
    fused = [linear.name for linear in checkpoint.family.linears if linear.fused]
    if layout == "merged" and fused:
        raise UnsupportedError(
            f"--layout merged: {' and '.join(fused)} of {checkpoint.config['model_type']} are "
            "several layers in one; must be one each, so that a server can slice them",
            hint="use --layout ranks",
        )
    cut_by_servers = layout == "gptq" or (
        layout == "merged" and not checkpoint.family.states_head_dim
    )
    problems = [
        f"--layout {layout}: tp {tp} needs empty heads, which this layout can't have with "
        f"{checkpoint.config['model_type']}; must divide the heads"
        for tp in degrees
        if cut_by_servers and tp > 0 and heads_of(checkpoint, tp).padded
    ]
    if problems:
        raise UnsupportedError(*problems, hint="use --layout ranks")
    if layout != "gptq":
        return
    experts = [kind for kind, layers in checkpoint.kinds.items() if layers[0].linear.of_experts]
    if experts:
        raise UnsupportedError(
            f"--layout gptq: {' and '.join(experts)} are experts, whose layers servers give one "
            "desc_act in common; must be a dense MLP, whose last layer can have one of its own",
            hint="use --layout ranks",
        )
    head = checkpoint.family.head_linear
    mixed = [
        kind
        for kind, layers in checkpoint.kinds.items()
        if kind != layers[0].linear.kind or layers[0].linear == head
    ]
    if mixed:
        raise UnsupportedError(
            f"--layout gptq: {' and '.join(mixed)} are not quantised as the rest; must be, since "
            "the rules that say so would stand beside the one for the MLP",
            hint="use --layout ranks",
        )
    readers = checkpoint.mlp_readers
    if not any(layer.act_order for layer in readers):
        raise UnsupportedError(
            f"--layout gptq: no {readers[0].linear.name} is act-ordered; must be at least one, or "
            "there is nothing to fold",
            hint="use --layout ranks, or the checkpoint as it is",
        )


def check_zero_points(checkpoint: Checkpoint, plans: Sequence[Plan]) -> bool:
    """Whether every layer is symmetric; reads qzeros, which `inspect` doesn't.

    Raises CheckpointError where they can't be converted. A layer that is said to be sym must have
    neutral zero points throughout, since kernels then don't read them. A padding row must hold its
    group's zero point, which it can't where the "gptq" format stores the largest field: that
    stands for one more than a value can be.
    """
    quantised = [layer for layer in checkpoint.layers if layer.quant]
    quants = {layer.name: layer.quant for layer in quantised if layer.quant}
    words = {x.name: checkpoint.part(x, "qzeros").view(np.uint32) for x in quantised}
    odd = {
        name
        for name, quant in quants.items()
        if (words[name] != words_of(quant.stored_neutral, quant.bits, words[name].shape[1])).any()
    }
    wrong = [name for name, quant in quants.items() if quant.sym and name in odd]
    if wrong:
        raise CheckpointError(
            *(
                f"{name}.qzeros: holds zero points other than {quants[name].neutral}; must not, "
                "since the config says sym: true"
                for name in wrong
            ),
            hint="correct sym in the quantisation config",
        )
    problems = []
    for plan in plans if odd and checkpoint.quant.checkpoint_format == "gptq" else ():
        for index, block in enumerate(checkpoint.blocks):
            shards = plan.block(index)
            for layer in block:
                if layer.name not in odd:
                    continue
                bits = quants[layer.name].bits
                fields = words[layer.name][_groups_with_padding(shards[layer.name])]
                largest = (1 << bits) - 1
                count = int((fields_of(fields, bits) == largest).sum())
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
    return all(
        name not in odd if quant.sym is None else quant.sym for name, quant in quants.items()
    )


def _groups_with_padding(shards: Sequence[Shard]) -> list[int]:
    """The source groups that share a shard group with padding rows."""
    found: set[int] = set()
    for shard in shards:
        found.update(shard.groups[np.flatnonzero(shard.rows < 0) // shard.group_size].tolist())
    return sorted(found - {-1})
