"""Layout gptq: one ordinary GPTQ checkpoint, of which the MLP alone is folded.

For engines that read g_idx. Every row stays where it was, and so does its g_idx, but the MLP's
channels take the order in which the layer that reads them has consecutive groups: that layer needs
no g_idx any more, and is cut by ranks without one rank needing another's scales. It is the same at
every degree, but for the groups of padding that make the ranks' shares equal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from tpgptq_convert.checkpoint import Checkpoint, IntArray, Layer
from tpgptq_convert.plan import Plan, Shard, Size, by_group
from tpgptq_convert.source import TensorSpec


class Folded(Plan):
    """A plan whose one shard of a layer is the whole layer."""

    @property
    def shards(self) -> int:
        return 1

    @cached_property
    def _widths(self) -> Mapping[str, int]:
        reader = self.checkpoint.mlp_readers[0]
        padded = self._input_sizes[reader.kind][0] * self.tp
        return {**self.checkpoint.widths, reader.linear.reads.name: padded}

    @cached_property
    def sizes(self) -> Mapping[str, Size]:
        return {
            layer.kind: Size(
                self._widths[layer.linear.reads.name],
                layer.linear.width(self._widths),
                layer.group_size,
            )
            for layer in self.checkpoint.blocks[0]
        }

    def block(self, index: int) -> dict[str, tuple[Shard, ...]]:
        layers = self.checkpoint.blocks[index]
        channels = {
            axis: _count(self._widths[axis.name])
            for layer in layers
            for axis in layer.linear.writes
        }
        reader = self.checkpoint.mlp_readers[index]
        axis = reader.linear.reads
        channels[axis], folded = by_group(
            _count(reader.in_features), reader.g_idx, reader.group_size, self._widths[axis.name]
        )
        return {
            layer.name: (
                Shard(
                    rows=channels[layer.linear.reads],
                    cols=self._columns(layer.linear, channels),
                    groups=folded if layer is reader else _count(layer.groups),
                    group_size=layer.group_size,
                    perm=None,
                    g_idx=np.repeat(_count(len(folded)), layer.group_size)
                    if layer is reader
                    else layer.g_idx,
                ),
            )
            for layer in layers
        }

    def tensors(self, layer: Layer) -> dict[str, TensorSpec]:
        rows = self.sizes[layer.kind].in_features
        return {**super().tensors(layer), "g_idx": TensorSpec("I32", (rows,))}

    def merged_tensors(self, layer: Layer) -> dict[str, TensorSpec]:
        return self.tensors(layer)

    def merged(self, layer: Layer, shards: Sequence[Shard]) -> Shard:
        return shards[0]

    def has_perm(self, layer: Layer) -> bool:
        return False

    @property
    def notes(self) -> list[str]:
        return ["layout gptq is one checkpoint, which servers cut by themselves"]


def _count(size: int) -> IntArray:
    return np.arange(size, dtype=np.int32)


def gptq_config(checkpoint: Checkpoint, sym: bool) -> dict[str, Any]:
    """The quantisation config of an output.

    Where others are act-ordered, a rule says that the layer that reads the MLP is not: vLLM up to
    0.29 and SGLang match it with modules' names, and then cut that layer's scales by ranks.
    """
    quant, reader = checkpoint.quant, checkpoint.mlp_readers[0].linear
    ordered = any(layer.act_order for layer in checkpoint.layers if not layer.linear.reads.free)
    config = {
        "quant_method": "gptq",
        "bits": quant.bits,
        "group_size": quant.group_size,
        "sym": sym,
        "desc_act": ordered,
        "checkpoint_format": quant.checkpoint_format,
    }
    rule = {f"+:.*\\.{re.escape(reader.name)}$": {"desc_act": False}}
    return config | ({"dynamic": rule} if ordered else {})
