"""THE table: what each supported model is made of.

A linear layer reads one axis of activations and writes another. What that says about sharding:

- HIDDEN is whole on every rank. A layer that reads it is column-parallel, one that writes it is
  row-parallel and its outputs are summed over the ranks.
- QUERY and KV are cut by heads; inside a rank the order of their channels is fixed by the model.
- MLP lies between layers that act on each channel alone, so its channels may take any order, as
  long as the layers that write it and the one that reads it agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from tpgptq_convert.config import Geometry
from tpgptq_convert.errors import CheckpointError, UnsupportedError


class Axis(Enum):
    """A space of activations between layers."""

    HIDDEN = "hidden"
    QUERY = "query"
    KV = "kv"
    MLP = "mlp"


@dataclass(frozen=True)
class Linear:
    """A quantised layer of a block: its name inside the block, what it reads, what it writes."""

    name: str
    reads: Axis
    writes: Axis

    @property
    def parallel(self) -> str:
        return "column" if self.reads is Axis.HIDDEN else "row"


# What `hidden_act` may say: functions of each channel alone that map 0 to 0.
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
LARGEST = 1 << 22  # of a size in config.json
ALWAYS = ""  # in Family.biases, in the place of a config key


@dataclass(frozen=True)
class Family:
    """A model's blocks, as data."""

    prefix: str  # block i is prefix.i
    linears: tuple[Linear, ...]  # in the order in which a block uses them
    block_tensors: Mapping[str, tuple[str, ...]]  # every other tensor of a block: name -> shape
    tensors: Mapping[str, tuple[str, ...]]  # every tensor outside the blocks: name -> shape
    head: str  # the one of them that is absent where embeddings are tied
    optional: tuple[str, ...]  # tensors (suffixes, where a block's) that some files have
    # Key in config.json (true: has biases) -> the layers it speaks of.
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def block(self, index: int) -> str:
        return f"{self.prefix}.{index}"

    def biased(self, config: Mapping[str, Any]) -> frozenset[str]:
        """Names of the layers that have a bias under this config.json."""
        on = (
            names for key, names in self.biases.items() if key == ALWAYS or config.get(key) is True
        )
        return frozenset(name for names in on for name in names)

    def geometry(self, config: dict[str, Any]) -> Geometry:
        """The sizes in config.json; raises CheckpointError where one is missing or absurd."""
        problems = []

        def size(key: str, default: int | None = None) -> int:
            value = default if config.get(key) is None else config[key]
            if type(value) is not int or not 0 < value <= LARGEST:
                problems.append(
                    f"config.json: {key} is {value!r:.40}; must be a positive integer"
                    f"{f' up to {LARGEST}' if type(value) is int and value > 0 else ''}"
                )
                return 1
            return value

        hidden, heads = size("hidden_size"), size("num_attention_heads")
        geometry = Geometry(
            hidden=hidden,
            blocks=size("num_hidden_layers"),
            heads=heads,
            kv_heads=size("num_key_value_heads", heads),
            head_dim=size("head_dim", hidden // heads),
            intermediate=size("intermediate_size"),
            activation=str(config.get("hidden_act", "silu")),
        )
        if not problems and heads % geometry.kv_heads:
            problems.append(
                f"config.json: num_attention_heads is {heads}; must be a multiple of "
                f"num_key_value_heads, {geometry.kv_heads}"
            )
        if geometry.activation not in ACTIVATIONS:
            problems.append(
                f"config.json: hidden_act is {geometry.activation!r}; "
                f"must be one of {', '.join(ACTIVATIONS)}"
            )
        if problems:
            raise CheckpointError(*problems, hint="correct config.json")
        return geometry

    def resized(self, config: dict[str, Any], intermediate: int) -> dict[str, Any]:
        """config.json for a model whose MLP was padded to this width."""
        return config | {"intermediate_size": intermediate}


Q, K, V, O = (f"self_attn.{x}_proj" for x in "qkvo")  # noqa: E741
GATE, UP, DOWN = (f"mlp.{x}_proj" for x in ("gate", "up", "down"))

LLAMA = Family(
    prefix="model.layers",
    linears=(
        Linear(Q, Axis.HIDDEN, Axis.QUERY),
        Linear(K, Axis.HIDDEN, Axis.KV),
        Linear(V, Axis.HIDDEN, Axis.KV),
        Linear(O, Axis.QUERY, Axis.HIDDEN),
        Linear(GATE, Axis.HIDDEN, Axis.MLP),
        Linear(UP, Axis.HIDDEN, Axis.MLP),
        Linear(DOWN, Axis.MLP, Axis.HIDDEN),
    ),
    block_tensors={
        "input_layernorm.weight": ("hidden",),
        "post_attention_layernorm.weight": ("hidden",),
    },
    tensors={
        "model.embed_tokens.weight": ("vocab", "hidden"),
        "model.norm.weight": ("hidden",),
        "lm_head.weight": ("vocab", "hidden"),
    },
    head="lm_head.weight",
    optional=("self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
    biases={"attention_bias": (Q, K, V, O), "mlp_bias": (GATE, UP, DOWN)},
)

FAMILIES: Mapping[str, Family] = {
    "llama": LLAMA,
    "mistral": replace(LLAMA, biases={}),
    "qwen2": replace(LLAMA, biases={ALWAYS: (Q, K, V)}),
    "qwen3": replace(
        LLAMA,
        block_tensors={
            **LLAMA.block_tensors,
            "self_attn.q_norm.weight": ("head_dim",),  # per head: the same on every rank
            "self_attn.k_norm.weight": ("head_dim",),
        },
        biases={"attention_bias": (Q, K, V, O)},
    ),
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The table's entry for this config.json; raises UnsupportedError with the list."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedError(
            f"config.json: model_type is {model_type!r}; must be one of {', '.join(FAMILIES)}",
            hint="other families are not supported yet",
        )
    return FAMILIES[model_type]
