"""THE table: what each supported model is made of.

A linear layer reads one axis of activations and writes another. What that says about sharding:

- HIDDEN is whole on every rank. A layer that reads it is column-parallel, one that writes it is
  row-parallel and its outputs are summed over the ranks.
- VOCAB, which a quantised head writes, is whole on every rank as well.
- QUERY and KV are cut by heads; inside a rank the order of their channels is fixed by the model.
  Latent attention (deepseek) has KEY and VALUE, of sizes of their own, in the place of KV, and
  latents between HIDDEN and all of these, which are whole on every rank.
- MLP lies between layers that act on each channel alone, so its channels may take any order, as
  long as the layers that write it and the one that reads it agree. So does each expert's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from tpgptq_convert.config import Geometry
from tpgptq_convert.errors import CheckpointError, UnsupportedError


class Cut(Enum):
    """What a rank has of an axis."""

    FREE = "any channels, in any order"
    HEADS = "whole heads"
    WHOLE = "all of it"


@dataclass(frozen=True)
class Axis:
    """A space of activations between layers."""

    name: str
    cut: Cut = Cut.FREE
    index: int = 0  # of an expert

    HIDDEN: ClassVar[Axis]
    QUERY: ClassVar[Axis]
    KV: ClassVar[Axis]
    KEY: ClassVar[Axis]
    VALUE: ClassVar[Axis]
    ROPE: ClassVar[Axis]  # of the one key of all heads that has positions
    MLP: ClassVar[Axis]
    VOCAB: ClassVar[Axis]

    @property
    def free(self) -> bool:
        """Whether its channels may take any order."""
        return self.cut is Cut.FREE

    @property
    def whole(self) -> bool:
        """Whether every rank has all of it."""
        return self.cut is Cut.WHOLE


Axis.HIDDEN, Axis.ROPE, Axis.VOCAB = (Axis(name, Cut.WHOLE) for name in ("hidden", "rope", "vocab"))
Axis.QUERY, Axis.KV, Axis.KEY, Axis.VALUE = (
    Axis(name, Cut.HEADS) for name in ("query", "kv", "key", "value")
)
Axis.MLP = Axis("mlp")


class Order(Enum):
    """How the columns of a layer lie that is several layers in one."""

    PARTS = "one part after another"
    HEADS = "for each kv head its query heads, its key, its value"
    EACH_HEAD = "for each head a part of every axis"
    QUARTERS = "for each quarter of the heads their queries, their values, their keys"


@dataclass(frozen=True)
class Linear:
    """A quantised layer of a block: its name inside the block, what it reads, what it writes."""

    name: str
    reads: Axis
    writes: tuple[Axis, ...]  # more than one where layers are fused
    order: Order = Order.PARTS
    of_experts: str = ""  # the name of all experts' such layers, * for their index

    @property
    def kind(self) -> str:
        """What the layers have in common that are shared out alike."""
        return self.of_experts or self.name

    def of_expert(self, index: int) -> Linear:
        """An expert's own, where this one stands for those of all experts."""

        reads, *writes = (
            replace(axis, index=index) if axis.free else axis for axis in (self.reads, *self.writes)
        )
        name = self.name.replace("*", str(index))
        return Linear(name, reads, tuple(writes), self.order, of_experts=self.name)

    @property
    def parallel(self) -> str:
        return "column" if self.reads.whole else "row"

    @property
    def fused(self) -> bool:
        return len(self.writes) > 1

    def width(self, widths: Mapping[str, int]) -> int:
        """N, where the axes have so many channels, by their names."""
        return sum(widths[axis.name] for axis in self.writes)

    def places(
        self, widths: Mapping[str, int], sizes: Mapping[str, int]
    ) -> list[NDArray[np.int64]]:
        """For each part, the column of each of its channels, where the axes have so many.

        sizes: channels of a head of each axis.
        """
        columns = np.arange(self.width(widths))
        if self.order is Order.PARTS:
            ends = np.cumsum([widths[axis.name] for axis in self.writes])
            return np.split(columns, ends[:-1])
        if self.order is Order.QUARTERS:
            quarters = columns.reshape(4, 3, -1)
            return [quarters[:, part].reshape(-1) for part in (0, 2, 1)]
        if self.order is Order.EACH_HEAD:
            ends = np.cumsum([sizes[axis.name] for axis in self.writes])
            parts = np.split(columns.reshape(-1, ends[-1]), ends[:-1], axis=1)
            return [part.reshape(-1) for part in parts]
        size = sizes[Axis.KV.name]
        heads = columns.reshape(widths[Axis.KV.name] // size, -1, size)
        return [part.reshape(-1) for part in (heads[:, :-2], heads[:, -2], heads[:, -1])]


NO_KEY = ""

# What an activation may be called: functions of each channel alone that map 0 to 0.
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "relu2")
LARGEST = 1 << 22  # of a size in config.json
ALWAYS = ""  # in Family.biases, in the place of a config key
DENIED = (False, None)  # in Family.forms

# Our names of what a config.json says about a model, and the keys it says it under.
KEYS = {
    "hidden": "hidden_size",
    "blocks": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate": "intermediate_size",
    "activation": "hidden_act",
}
# Keys, and what other files call them; transformers takes either.
ALIASES = {
    **{"hidden_size": "n_embed", "n_embd": "hidden_size"},
    **{"n_layer": "num_hidden_layers", "num_layers": "num_hidden_layers"},
    **{"n_head": "num_attention_heads", "activation_function": "hidden_act"},
    "num_experts": "num_local_experts",
}


@dataclass(frozen=True)
class Experts:
    """The MLPs of a block of which a router picks some for every token."""

    linears: tuple[Linear, ...]  # with * in their names for an expert's index
    count: str  # the key that says how many
    size: str  # the key that says how many channels they have
    block_tensors: Mapping[str, tuple[str, ...]]
    # What every token passes beside them, and the key that says how many channels that has.
    shared: tuple[Linear, ...] = ()
    shared_size: str = NO_KEY
    shared_counts: str = NO_KEY  # or the key that says how often it has an expert's
    every: str = NO_KEY  # of so many blocks the last one has experts
    but: str = NO_KEY  # a list of blocks that have none
    after: str = NO_KEY  # how many blocks at the beginning have none
    step: str = NO_KEY  # of what follows those: so many; transformers takes it for 1

    def wrong_blocks(self, said: Callable[[str], Any]) -> Iterator[str]:
        """What is no answer to which blocks have experts."""
        for key in (self.every, self.after):
            if type(value := said(key) or 0) is not int or value < 0:
                yield f"config.json: {key} is {value!r:.40}; must be an integer from 0"
        if (value := said(self.step)) not in (None, 1):
            yield f"config.json: {self.step} is {value!r:.40}; must be 1, as transformers takes it"
        if type(value := said(self.but) or []) is not list:
            yield f"config.json: {self.but} is {value!r:.40}; must be a list of blocks"

    def inside(self, said: Callable[[str], Any], block: int) -> bool:
        """Whether this block has experts, not one MLP; `said` looks up a key of config.json."""
        return (
            block >= (said(self.after) or 0)
            and block not in (said(self.but) or ())
            and not (block + 1) % (said(self.every) or 1)
        )


@dataclass(frozen=True)
class Family:
    """A model's blocks, as data."""

    prefix: str  # block i is prefix.i
    linears: tuple[Linear, ...]  # in the order in which a block uses them
    block_tensors: Mapping[str, tuple[str, ...]]  # every other tensor of a block: name -> shape
    tensors: Mapping[str, tuple[str, ...]]  # every tensor outside the blocks: name -> shape
    head: str  # the one of them that is absent where embeddings are tied
    optional: tuple[str, ...] = ()  # tensors (suffixes, where a block's) that some files have
    # Key in config.json (true: has biases) -> the layers it speaks of.
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # Other keys than those of KEYS; NO_KEY where a config says nothing of it.
    keys: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what a config means by silence
    experts: Experts | None = None
    one_kv_head: bool = False
    # Axes with sizes of their own, and the keys whose sum they are: of a head, where cut by heads.
    sizes: Mapping[Axis, tuple[str, ...]] = field(default_factory=dict)
    heads_together: int = 1  # heads come in multiples of this, on a rank too
    mlp_times: int = 1  # what a config says of the MLP, as a multiple of its channels
    mlp_ratio: int = 0  # the MLP's channels for each of the hidden ones, where a config is silent
    # A key, some values, and the family it is where config.json says one of them.
    forms: tuple[tuple[str, tuple[Any, ...], Family], ...] = ()
    transposed: bool = False  # layers that aren't quantised are stored (K, N)

    def block(self, index: int) -> str:
        return f"{self.prefix}.{index}"

    def block_of(self, tensor: str) -> str | None:
        """The block that a tensor is of, by its name."""
        index = tensor.removeprefix(f"{self.prefix}.").partition(".")[0]
        inside = tensor.startswith(f"{self.prefix}.{index}.") and index.isdecimal()
        return f"{self.prefix}.{index}" if inside else None

    def linears_of(
        self, config: Mapping[str, Any], geometry: Geometry, block: int
    ) -> tuple[Linear, ...]:
        """The layers of one block, in the order in which it uses them."""
        experts = self._experts_in(config, block)
        if experts is None:
            return self.linears
        return (
            *(linear for linear in self.linears if Axis.MLP not in (linear.reads, *linear.writes)),
            *(x.of_expert(i) for i in range(geometry.experts) for x in experts.linears),
            *experts.shared,
        )

    def block_tensors_of(
        self, config: Mapping[str, Any], block: int
    ) -> Mapping[str, tuple[str, ...]]:
        """Every other tensor of one block."""
        experts = self._experts_in(config, block)
        return {**self.block_tensors, **(experts.block_tensors if experts else {})}

    def _experts_in(self, config: Mapping[str, Any], block: int) -> Experts | None:
        """The experts of one block, if it has any."""
        experts = self.experts
        return experts if experts and experts.inside(partial(self.said, config), block) else None

    @property
    def head_linear(self) -> Linear:
        """The head, where it is quantised."""
        return Linear(self.head.removesuffix(".weight"), Axis.HIDDEN, (Axis.VOCAB,))

    def said(self, config: Mapping[str, Any], key: str) -> Any:
        """What a config.json says under a key of its own, or means by its silence."""
        if key == NO_KEY:
            return None
        values = (config.get(name) for name in (key, ALIASES.get(key, key)))
        return next((value for value in values if value is not None), self.defaults.get(key))

    def form(self, config: Mapping[str, Any]) -> Family | None:
        """What it is instead under this config.json, if anything."""
        forms = (family for key, values, family in self.forms if self.said(config, key) in values)
        return next(forms, None)

    def tied(self, config: Mapping[str, Any]) -> bool:
        """Whether the embeddings are the head as well."""
        return self.said(config, "tie_word_embeddings") is True

    def biased(self, config: Mapping[str, Any]) -> frozenset[str]:
        """Names of the layers that have a bias under this config.json."""
        on = (
            names
            for key, names in self.biases.items()
            if key == ALWAYS or self.said(config, key) is True
        )
        return frozenset(name for names in on for name in names)

    def geometry(self, config: dict[str, Any]) -> Geometry:
        """The sizes in config.json; raises CheckpointError where one is missing or absurd."""
        problems = []
        keys = {**KEYS, **self.keys}

        def size_at(key: str, default: int | None = None) -> int:
            value = self.said(config, key)
            value = default if value is None else value
            if type(value) is not int or not 0 < value <= LARGEST:
                problems.append(
                    f"config.json: {key} is {value!r:.40}; must be a positive integer"
                    f"{f' up to {LARGEST}' if type(value) is int and value > 0 else ''}"
                )
                return 1
            return value

        def size(name: str, default: int | None = None) -> int:
            return size_at(keys[name], default)

        hidden, heads = size("hidden"), size("heads")
        sizes = {axis.name: sum(map(size_at, names)) for axis, names in self.sizes.items()}
        head_dim = sizes.get(Axis.QUERY.name) or size("head_dim", hidden // heads)
        mlps = {
            name: size_at(key, self.mlp_ratio * hidden or None)
            for name, key in self._mlp_keys.items()
        }
        if "mlp" in mlps:
            mlps["mlp"] //= self.mlp_times
        if self.experts and (key := self.experts.shared_counts):
            mlps["shared"] = mlps["experts"] * size_at(key)
        if self.experts:
            problems += self.experts.wrong_blocks(partial(self.said, config))
        geometry = Geometry(
            hidden=hidden,
            blocks=size("blocks"),
            heads=heads,
            kv_heads=1 if self.one_kv_head else size("kv_heads", heads),
            head_dim=head_dim,
            sizes={Axis.QUERY.name: head_dim, Axis.KV.name: head_dim, **sizes},
            mlps=mlps,
            experts=size_at(self.experts.count) if self.experts else 0,
            activation=str(self.said(config, keys["activation"]) or "silu"),
            heads_together=self.heads_together,
        )
        if not problems and heads % self.heads_together:
            problems.append(
                f"config.json: {keys['heads']} is {heads}; must be a multiple of "
                f"{self.heads_together}"
            )
        if not problems and heads % geometry.kv_heads:
            problems.append(
                f"config.json: {keys['heads']} is {heads}; must be a multiple of "
                f"{keys['kv_heads']}, {geometry.kv_heads}"
            )
        if geometry.activation not in ACTIVATIONS:
            problems.append(
                f"config.json: {keys['activation']} is {geometry.activation!r}; "
                f"must be one of {', '.join(ACTIVATIONS)}"
            )
        if problems:
            raise CheckpointError(*problems, hint="correct config.json")
        return geometry

    @property
    def _mlp_keys(self) -> dict[str, str]:
        """The keys that say how many channels the free axes have, by the axes' names."""
        keys = {}
        if any(Axis.MLP in linear.writes for linear in self.linears):
            keys["mlp"] = self.keys.get("intermediate", KEYS["intermediate"])
        if self.experts:
            keys["experts"] = self.experts.size
        if self.experts and self.experts.shared_size:
            keys["shared"] = self.experts.shared_size
        return keys

    def resized(self, config: dict[str, Any], mlps: Mapping[str, int]) -> dict[str, Any]:
        """config.json for a model whose free axes were padded to these widths."""
        keys = self._mlp_keys
        times = {"mlp": self.mlp_times}
        sizes = {
            keys[name]: width * times.get(name, 1) for name, width in mlps.items() if name in keys
        }
        return config | {key: width for key, width in sizes.items() if key != NO_KEY}

    @property
    def states_head_dim(self) -> bool:
        """Whether a config can say how many heads there are beside how large they are."""
        return self.keys.get("head_dim") != NO_KEY

    def with_heads(
        self, config: dict[str, Any], geometry: Geometry, query: int, kv: int
    ) -> dict[str, Any]:
        """config.json for a model with empty or copied heads beside those of `geometry`.

        It stays as it is where the size of a head follows from their number.
        """
        if (query, kv) == (geometry.heads, geometry.kv_heads) or not self.states_head_dim:
            return config
        sizes = {"heads": query, "kv_heads": kv, "head_dim": geometry.head_dim}
        return config | {self.keys.get(name, KEYS[name]): size for name, size in sizes.items()}


def linears(attention: str, o: str, *mlp: str) -> tuple[Linear, ...]:
    """q_proj, k_proj, v_proj and the output of `attention`; what writes the MLP, what reads it."""
    q, k, v = (f"{attention}.{x}_proj" for x in "qkv")
    return (
        Linear(q, Axis.HIDDEN, (Axis.QUERY,)),
        Linear(k, Axis.HIDDEN, (Axis.KV,)),
        Linear(v, Axis.HIDDEN, (Axis.KV,)),
        Linear(f"{attention}.{o}", Axis.QUERY, (Axis.HIDDEN,)),
        *through(Axis.MLP, *mlp),
    )


def through(axis: Axis, *names: str) -> tuple[Linear, ...]:
    """What writes an axis from the hidden channels, and, the last, what reads it."""
    return (
        *(Linear(name, Axis.HIDDEN, (axis,)) for name in names[:-1]),
        Linear(names[-1], axis, (Axis.HIDDEN,)),
    )


def fused(
    qkv: str, o: str, *mlp: str, order: Order = Order.PARTS, gated: bool = False
) -> tuple[Linear, ...]:
    """The same with q, k and v in one layer, and gate and up where there is a gate."""
    return (
        Linear(qkv, Axis.HIDDEN, (Axis.QUERY, Axis.KV, Axis.KV), order),
        Linear(o, Axis.QUERY, (Axis.HIDDEN,)),
        Linear(mlp[0], Axis.HIDDEN, (Axis.MLP,) * (2 if gated else 1)),
        Linear(mlp[1], Axis.MLP, (Axis.HIDDEN,)),
    )


def norms(*names: str, bias: bool = False, shape: str = "hidden") -> dict[str, tuple[str, ...]]:
    """The tensors of norms."""
    parts = ("weight", "bias") if bias else ("weight",)
    return {f"{name}.{part}": (shape,) for name in names for part in parts}


def outside(
    embeddings: str, norm: str, *, bias: bool = False, head: str = "lm_head.weight"
) -> dict[str, tuple[str, ...]]:
    """The embeddings, the last norm and the head."""
    table = ("vocab", "hidden")
    return {f"{embeddings}.weight": table, **norms(norm, bias=bias), head: table}


Q, K, V, O = (f"self_attn.{x}_proj" for x in "qkvo")  # noqa: E741
GATE, UP, DOWN = (f"mlp.{x}_proj" for x in ("gate", "up", "down"))
BEFORE, AFTER = "input_layernorm", "post_attention_layernorm"
QK_NORM = norms("self_attn.q_norm", "self_attn.k_norm", shape="head_dim")  # one for all heads
# Over all heads together: the ranks sum their squares.
WHOLE_NORM = {
    **norms("self_attn.q_norm", shape=Axis.QUERY.name),
    **norms("self_attn.k_norm", shape=Axis.KV.name),
}
TIED = {"tie_word_embeddings": True}
EVERY_HEAD_ITS_OWN = {"kv_heads": NO_KEY, "head_dim": NO_KEY}  # no grouped heads, hidden / heads

LLAMA = Family(
    prefix="model.layers",
    linears=linears("self_attn", "o_proj", GATE, UP, DOWN),
    block_tensors=norms(BEFORE, AFTER),
    tensors=outside("model.embed_tokens", "model.norm"),
    head="lm_head.weight",
    optional=("self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
    biases={"attention_bias": (Q, K, V, O), "mlp_bias": (GATE, UP, DOWN)},
)
MISTRAL = replace(LLAMA, biases={})
GEMMA = replace(
    LLAMA,
    biases={"attention_bias": (Q, K, V, O)},
    keys={"activation": "hidden_activation"},
    defaults={"hidden_activation": "gelu_pytorch_tanh", "head_dim": 256, **TIED},
)
FEEDFORWARD = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
COHERE = replace(
    LLAMA,
    block_tensors=norms(BEFORE),
    biases={"attention_bias": (Q, K, V, O)},
    defaults=TIED,
)
STARCODER2 = replace(
    LLAMA,
    linears=linears("self_attn", "o_proj", "mlp.c_fc", "mlp.c_proj"),
    block_tensors=norms(BEFORE, AFTER, bias=True),
    tensors=outside("model.embed_tokens", "model.norm", bias=True),
    biases={"use_bias": (Q, K, V, O, "mlp.c_fc", "mlp.c_proj")},
    defaults={"use_bias": True, "hidden_act": "gelu_pytorch_tanh", **TIED},
)
OLMO2 = replace(
    LLAMA,
    block_tensors={**norms(AFTER, FEEDFORWARD[1]), **WHOLE_NORM},
    biases={"attention_bias": (Q, K, V, O)},
)

GLM = replace(
    LLAMA,
    linears=(
        *LLAMA.linears[:4],
        Linear("mlp.gate_up_proj", Axis.HIDDEN, (Axis.MLP, Axis.MLP)),
        Linear(DOWN, Axis.MLP, (Axis.HIDDEN,)),
    ),
    biases={"attention_bias": (Q, K, V)},
    defaults={"attention_bias": True},
)
GPT2 = Family(
    prefix="transformer.h",
    linears=fused("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    block_tensors=norms("ln_1", "ln_2", bias=True),
    tensors={
        **outside("transformer.wte", "transformer.ln_f", bias=True),
        "transformer.wpe.weight": ("positions", "hidden"),
    },
    head="lm_head.weight",
    optional=("attn.bias", "attn.masked_bias"),
    biases={ALWAYS: ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
    keys={
        **EVERY_HEAD_ITS_OWN,
        **{"hidden": "n_embd", "blocks": "n_layer", "heads": "n_head"},
        **{"intermediate": "n_inner", "activation": "activation_function"},
    },
    defaults={"activation_function": "gelu_new", **TIED},
    mlp_ratio=4,
)
GPTJ = Family(
    prefix="transformer.h",
    linears=linears("attn", "out_proj", "mlp.fc_in", "mlp.fc_out"),
    block_tensors=norms("ln_1", bias=True),
    tensors={
        **outside("transformer.wte", "transformer.ln_f", bias=True),
        "lm_head.bias": ("vocab",),
    },
    head="lm_head.weight",
    optional=("attn.bias", "attn.masked_bias"),
    biases={ALWAYS: ("mlp.fc_in", "mlp.fc_out")},
    keys={
        **EVERY_HEAD_ITS_OWN,
        **{"hidden": "n_embd", "blocks": "n_layer", "heads": "n_head"},
        **{"intermediate": "n_inner", "activation": "activation_function"},
    },
    defaults={"activation_function": "gelu_new"},
    mlp_ratio=4,
)
GPT_BIGCODE_HEADS = replace(
    GPT2,
    linears=fused("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", order=Order.HEADS),
    defaults={**GPT2.defaults, "activation_function": "gelu_pytorch_tanh"},
)
PERSIMMON = fused(
    *("self_attn.query_key_value", "self_attn.dense"),
    *("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    order=Order.HEADS,
)

FALCON_QKV, FALCON_O = "self_attention.query_key_value", "self_attention.dense"
FALCON_MLP = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
FALCON_DEFAULTS = {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True}
FALCON_RW = Family(
    prefix="transformer.h",
    linears=fused(FALCON_QKV, FALCON_O, *FALCON_MLP, order=Order.HEADS),
    block_tensors=norms(BEFORE, AFTER, bias=True),
    tensors=outside("transformer.word_embeddings", "transformer.ln_f", bias=True),
    head="lm_head.weight",
    biases={"bias": (FALCON_QKV, FALCON_O, *FALCON_MLP)},
    keys={
        **EVERY_HEAD_ITS_OWN,
        **{"intermediate": "ffn_hidden_size", "activation": "activation"},
    },
    defaults={**FALCON_DEFAULTS, "activation": "gelu", **TIED},
    mlp_ratio=4,
)
FALCON_HEADS = replace(  # attention and the MLP read the same norm
    FALCON_RW,
    block_tensors=norms(BEFORE, bias=True),
    forms=(("parallel_attn", DENIED, FALCON_RW),),
)
FALCON_ONE_KV_HEAD = replace(  # falcon-7b
    FALCON_HEADS,
    linears=fused(FALCON_QKV, FALCON_O, *FALCON_MLP),
    one_kv_head=True,
    forms=(("multi_query", DENIED, FALCON_HEADS),),
)
FALCON_GROUPS = replace(  # falcon2-11b
    FALCON_HEADS, keys={**FALCON_HEADS.keys, "kv_heads": "num_kv_heads"}, forms=()
)

EXPERTS, SHARED = Axis("experts"), Axis("shared")
QWEN3 = replace(
    LLAMA,
    block_tensors={**LLAMA.block_tensors, **QK_NORM},
    biases={"attention_bias": (Q, K, V, O)},
)
QWEN3_EXPERTS = Experts(
    linears=through(EXPERTS, *(f"mlp.experts.*.{x}_proj" for x in ("gate", "up", "down"))),
    count="num_experts",
    size="moe_intermediate_size",
    block_tensors={"mlp.gate.weight": ("experts", "hidden")},
    every="decoder_sparse_step",
    but="mlp_only_layers",
)
QWEN2_EXPERTS = replace(
    QWEN3_EXPERTS,
    block_tensors={
        **QWEN3_EXPERTS.block_tensors,
        "mlp.shared_expert_gate.weight": ("one", "hidden"),
    },
    shared=through(SHARED, *(f"mlp.shared_expert.{x}_proj" for x in ("gate", "up", "down"))),
    shared_size="shared_expert_intermediate_size",
)
OLMOE_EXPERTS = replace(QWEN3_EXPERTS, size="intermediate_size", every=NO_KEY, but=NO_KEY)
MIXTRAL_EXPERTS = Experts(
    linears=through(EXPERTS, *(f"block_sparse_moe.experts.*.w{i}" for i in (1, 3, 2))),
    count="num_local_experts",
    size="intermediate_size",
    block_tensors={"block_sparse_moe.gate.weight": ("experts", "hidden")},
)

DEEPSEEK_EXPERTS = replace(
    QWEN3_EXPERTS,
    count="n_routed_experts",
    shared=through(SHARED, *(f"mlp.shared_experts.{x}_proj" for x in ("gate", "up", "down"))),
    shared_counts="n_shared_experts",
    every=NO_KEY,
    but=NO_KEY,
    after="first_k_dense_replace",
    step="moe_layer_freq",
)
Q_LATENT, KV_LATENT = (Axis(name, Cut.WHOLE) for name in ("query latent", "kv latent"))
Q_A, Q_B, KV_A, KV_B = (
    f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
)
LATENT = (  # latent attention, but for the queries
    Linear(KV_A, Axis.HIDDEN, (KV_LATENT, Axis.ROPE)),
    Linear(KV_B, KV_LATENT, (Axis.KEY, Axis.VALUE), Order.EACH_HEAD),
    Linear(O, Axis.VALUE, (Axis.HIDDEN,)),
    *LLAMA.linears[4:],
)
DEEPSEEK_LITE = replace(
    LLAMA,
    linears=(Linear(Q, Axis.HIDDEN, (Axis.QUERY,)), *LATENT),
    block_tensors={
        **LLAMA.block_tensors,
        **norms("self_attn.kv_a_layernorm", shape=KV_LATENT.name),
    },
    biases={"attention_bias": (KV_A, O)},
    keys=EVERY_HEAD_ITS_OWN,
    sizes={
        Axis.QUERY: ("qk_nope_head_dim", "qk_rope_head_dim"),
        Axis.KEY: ("qk_nope_head_dim",),
        Axis.VALUE: ("v_head_dim",),
        Axis.ROPE: ("qk_rope_head_dim",),
        KV_LATENT: ("kv_lora_rank",),
    },
    experts=DEEPSEEK_EXPERTS,
)
DEEPSEEK = replace(
    DEEPSEEK_LITE,
    linears=(
        Linear(Q_A, Axis.HIDDEN, (Q_LATENT,)),
        Linear(Q_B, Q_LATENT, (Axis.QUERY,)),
        *LATENT,
    ),
    block_tensors={
        **DEEPSEEK_LITE.block_tensors,
        **norms("self_attn.q_a_layernorm", shape=Q_LATENT.name),
    },
    biases={"attention_bias": (Q_A, KV_A, O)},
    sizes={**DEEPSEEK_LITE.sizes, Q_LATENT: ("q_lora_rank",)},
    forms=(("q_lora_rank", DENIED, DEEPSEEK_LITE),),
)
DEEPSEEK_V3: dict[str, Any] = {
    "experts": replace(
        DEEPSEEK_EXPERTS,
        block_tensors={
            **DEEPSEEK_EXPERTS.block_tensors,
            "mlp.gate.e_score_correction_bias": ("experts",),
        },
    ),
    "defaults": {"first_k_dense_replace": 3},
}

FAMILIES: Mapping[str, Family] = {
    "llama": LLAMA,
    "internlm": replace(LLAMA, biases={"bias": (Q, K, V, O)}, defaults={"bias": True}),
    "minicpm": replace(LLAMA, biases={"attention_bias": (Q, K, V, O)}, defaults=TIED),
    "mistral": MISTRAL,
    "ministral": MISTRAL,
    "mixtral": replace(MISTRAL, linears=MISTRAL.linears[:4], experts=MIXTRAL_EXPERTS),
    "qwen2": replace(LLAMA, biases={ALWAYS: (Q, K, V)}),
    "qwen2_moe": replace(
        LLAMA,
        biases={"qkv_bias": (Q, K, V)},
        defaults={"qkv_bias": True},
        experts=QWEN2_EXPERTS,
    ),
    "qwen3": QWEN3,
    "qwen3_moe": replace(QWEN3, experts=QWEN3_EXPERTS),
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": replace(
        DEEPSEEK,
        **DEEPSEEK_V3,
        forms=(("q_lora_rank", DENIED, replace(DEEPSEEK_LITE, **DEEPSEEK_V3)),),
    ),
    "gemma": GEMMA,
    "gemma2": replace(GEMMA, block_tensors=norms(BEFORE, AFTER, *FEEDFORWARD)),
    "gemma3_text": replace(GEMMA, block_tensors={**norms(BEFORE, AFTER, *FEEDFORWARD), **QK_NORM}),
    "granite": LLAMA,
    "smollm3": replace(LLAMA, defaults=TIED),
    "seed_oss": replace(
        LLAMA,
        biases={
            "attention_bias": (Q, K, V),
            "attention_out_bias": (O,),
            "mlp_bias": (GATE, UP, DOWN),
        },
        defaults={"attention_bias": True},
    ),
    "ernie4_5": replace(LLAMA, biases={"use_bias": (Q, K, V, O, GATE, UP, DOWN)}, defaults=TIED),
    "helium": replace(LLAMA, biases={"attention_bias": (Q, K, V), "mlp_bias": (GATE, UP, DOWN)}),
    "hunyuan_v1_dense": replace(
        LLAMA,
        block_tensors={
            **LLAMA.block_tensors,
            **norms("self_attn.query_layernorm", "self_attn.key_layernorm", shape="head_dim"),
        },
        biases={"attention_bias": (Q, K, V, O)},
    ),
    "exaone4": replace(LLAMA, block_tensors={**norms(AFTER, FEEDFORWARD[1]), **QK_NORM}, biases={}),
    "olmo": replace(  # its norms have no weights
        LLAMA,
        block_tensors={},
        tensors={name: LLAMA.tensors[name] for name in LLAMA.tensors if "norm" not in name},
        biases={"attention_bias": (Q, K, V, O)},
    ),
    "olmo2": OLMO2,
    "olmo3": OLMO2,
    "olmoe": replace(
        OLMO2,
        linears=LLAMA.linears[:4],
        block_tensors={**LLAMA.block_tensors, **WHOLE_NORM},
        experts=OLMOE_EXPERTS,
        keys={"head_dim": NO_KEY},
    ),
    "cohere": COHERE,
    "cohere2": COHERE,
    "stablelm": replace(
        LLAMA,
        block_tensors=norms(BEFORE, AFTER, bias=True),
        tensors=outside("model.embed_tokens", "model.norm", bias=True),
        biases={"use_qkv_bias": (Q, K, V)},
        keys={"head_dim": NO_KEY},
    ),
    "starcoder2": STARCODER2,
    "nemotron": replace(
        STARCODER2,
        linears=linears("self_attn", "o_proj", UP, DOWN),
        biases={"attention_bias": (Q, K, V, O), "mlp_bias": (UP, DOWN)},
        defaults={"hidden_act": "relu2"},
    ),
    "arcee": replace(
        LLAMA,
        linears=linears("self_attn", "o_proj", UP, DOWN),
        biases={"attention_bias": (Q, K, V, O), "mlp_bias": (UP, DOWN)},
        defaults={"hidden_act": "relu2"},
    ),
    "phi": replace(
        LLAMA,
        linears=linears("self_attn", "dense", "mlp.fc1", "mlp.fc2"),
        block_tensors=norms(BEFORE, bias=True),
        tensors={
            **outside("model.embed_tokens", "model.final_layernorm", bias=True),
            "lm_head.bias": ("vocab",),
        },
        biases={ALWAYS: (Q, K, V, "self_attn.dense", "mlp.fc1", "mlp.fc2")},
        defaults={"hidden_act": "gelu_new"},
    ),
    "opt": Family(
        prefix="model.decoder.layers",
        linears=linears("self_attn", "out_proj", "fc1", "fc2"),
        block_tensors=norms("self_attn_layer_norm", "final_layer_norm", bias=True),
        tensors={
            **outside("model.decoder.embed_tokens", "model.decoder.final_layer_norm", bias=True),
            "model.decoder.embed_positions.weight": ("positions", "hidden"),
        },
        head="lm_head.weight",
        biases={"enable_bias": (Q, K, V, "self_attn.out_proj", "fc1", "fc2")},
        keys={
            **EVERY_HEAD_ITS_OWN,
            **{"intermediate": "ffn_dim", "activation": "activation_function"},
        },
        defaults={"enable_bias": True, "activation_function": "relu", **TIED},
    ),
    "gptj": GPTJ,
    "codegen": replace(
        GPTJ,
        linears=fused(
            "attn.qkv_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out", order=Order.QUARTERS
        ),
        optional=("attn.causal_mask",),
        heads_together=4,
    ),
    "phi3": replace(
        MISTRAL,
        linears=fused("self_attn.qkv_proj", O, "mlp.gate_up_proj", DOWN, gated=True),
    ),
    "glm": GLM,
    "glm4": replace(
        GLM,
        block_tensors=norms(BEFORE, AFTER, "post_self_attn_layernorm", "post_mlp_layernorm"),
    ),
    "baichuan": replace(
        MISTRAL,
        linears=(
            Linear("self_attn.W_pack", Axis.HIDDEN, (Axis.QUERY, Axis.KV, Axis.KV)),
            *LLAMA.linears[3:],
        ),
        keys=EVERY_HEAD_ITS_OWN,
    ),
    "internlm2": replace(
        MISTRAL,
        linears=(
            *fused("attention.wqkv", "attention.wo", "", "", order=Order.HEADS)[:2],
            *through(Axis.MLP, *(f"feed_forward.w{i}" for i in (1, 3, 2))),
        ),
        block_tensors=norms("attention_norm", "ffn_norm"),
        tensors=outside("model.tok_embeddings", "model.norm", head="output.weight"),
        head="output.weight",
        biases={"bias": ("attention.wqkv", "attention.wo")},
    ),
    "qwen": Family(
        prefix="transformer.h",
        linears=(
            *fused("attn.c_attn", "attn.c_proj", "", "")[:2],
            *through(Axis.MLP, "mlp.w2", "mlp.w1", "mlp.c_proj"),
        ),
        block_tensors=norms("ln_1", "ln_2"),
        tensors=outside("transformer.wte", "transformer.ln_f"),
        head="lm_head.weight",
        optional=("transformer.rotary_emb.inv_freq",),
        biases={ALWAYS: ("attn.c_attn",)},
        keys=EVERY_HEAD_ITS_OWN,
        mlp_times=2,
    ),
    "exaone": Family(
        prefix="transformer.h",
        linears=(
            *linears("attn.attention", "out_proj", "", "")[:4],
            *through(Axis.MLP, "mlp.c_fc_0", "mlp.c_fc_1", "mlp.c_proj"),
        ),
        block_tensors=norms("ln_1", "ln_2"),
        tensors=outside("transformer.wte", "transformer.ln_f"),
        head="lm_head.weight",
        optional=("attn.attention.rotary.inv_freq", "transformer.rotary.inv_freq"),
        keys={"blocks": "num_layers", "activation": "activation_function"},
    ),
    "chatglm": Family(  # 2, 3 and glm-4-9b; the first has other layers
        prefix="transformer.encoder.layers",
        linears=fused(
            *("self_attention.query_key_value", "self_attention.dense"),
            *("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            gated=True,
        ),
        block_tensors=norms(BEFORE, AFTER),
        tensors=outside(
            "transformer.embedding.word_embeddings",
            "transformer.encoder.final_layernorm",
            head="transformer.output_layer.weight",
        ),
        head="transformer.output_layer.weight",
        optional=("transformer.rotary_pos_emb.inv_freq",),
        biases={"add_qkv_bias": ("self_attention.query_key_value",)},
        keys={
            **{"blocks": "num_layers", "kv_heads": "multi_query_group_num"},
            **{"head_dim": "kv_channels", "intermediate": "ffn_hidden_size", "activation": NO_KEY},
        },
    ),
    "gpt2": replace(GPT2, transposed=True),
    "gpt_bigcode": replace(
        GPT2,
        defaults={
            **GPT2.defaults,
            **{"activation_function": "gelu_pytorch_tanh", "multi_query": True},
        },
        one_kv_head=True,
        forms=(("multi_query", DENIED, GPT_BIGCODE_HEADS),),
    ),
    "gpt_neox": Family(
        prefix="gpt_neox.layers",
        linears=fused(
            *("attention.query_key_value", "attention.dense"),
            *("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            order=Order.HEADS,
        ),
        block_tensors=norms(BEFORE, AFTER, bias=True),
        tensors=outside(
            "gpt_neox.embed_in", "gpt_neox.final_layer_norm", bias=True, head="embed_out.weight"
        ),
        head="embed_out.weight",
        optional=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
        biases={
            "attention_bias": ("attention.query_key_value", "attention.dense"),
            ALWAYS: ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        },
        keys=EVERY_HEAD_ITS_OWN,
        defaults={"attention_bias": True, "hidden_act": "gelu"},
    ),
    "bloom": Family(
        prefix="transformer.h",
        linears=fused(FALCON_QKV, FALCON_O, *FALCON_MLP, order=Order.HEADS),
        block_tensors=norms(BEFORE, AFTER, bias=True),
        tensors={
            **outside("transformer.word_embeddings", "transformer.ln_f", bias=True),
            **norms("transformer.word_embeddings_layernorm", bias=True),
        },
        head="lm_head.weight",
        biases={ALWAYS: (FALCON_QKV, FALCON_O, *FALCON_MLP)},
        keys={
            **EVERY_HEAD_ITS_OWN,
            **{"blocks": "n_layer", "heads": "n_head", "intermediate": NO_KEY},
        },
        defaults={"hidden_act": "gelu", **TIED},  # which no config says
        mlp_ratio=4,
    ),
    "mpt": Family(
        prefix="transformer.blocks",
        linears=fused("attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj"),
        block_tensors=norms("norm_1", "norm_2"),
        tensors=outside("transformer.wte", "transformer.norm_f"),
        head="lm_head.weight",
        keys={
            **EVERY_HEAD_ITS_OWN,
            **{"hidden": "d_model", "blocks": "n_layers", "heads": "n_heads"},
            "intermediate": NO_KEY,
        },
        defaults={"hidden_act": "gelu", **TIED},
        mlp_ratio=4,
    ),
    "falcon": replace(  # falcon-40b and 180b
        FALCON_GROUPS,
        block_tensors=norms("ln_attn", "ln_mlp", bias=True),
        forms=(
            ("new_decoder_architecture", DENIED, FALCON_ONE_KV_HEAD),
            ("num_ln_in_parallel_attn", (1,), FALCON_GROUPS),
        ),
    ),
    "persimmon": replace(
        LLAMA,
        linears=PERSIMMON,
        block_tensors={
            **norms(BEFORE, AFTER, bias=True),
            **norms("self_attn.q_layernorm", "self_attn.k_layernorm", bias=True, shape="head_dim"),
        },
        tensors=outside("model.embed_tokens", "model.final_layernorm", bias=True),
        biases={ALWAYS: tuple(linear.name for linear in PERSIMMON)},
        keys=EVERY_HEAD_ITS_OWN,
        defaults={"hidden_act": "relu2"},
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
    family = FAMILIES[model_type]
    while form := family.form(config):
        family = form
    return family
