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

import numpy as np
from numpy.typing import NDArray

from tpgptq_convert.config import Geometry
from tpgptq_convert.errors import CheckpointError, UnsupportedError


class Axis(Enum):
    """A space of activations between layers."""

    HIDDEN = "hidden"
    QUERY = "query"
    KV = "kv"
    MLP = "mlp"


class Order(Enum):
    """How the columns of a layer lie that is several layers in one."""

    PARTS = "one part after another"
    HEADS = "for each kv head its query heads, its key, its value"


@dataclass(frozen=True)
class Linear:
    """A quantised layer of a block: its name inside the block, what it reads, what it writes."""

    name: str
    reads: Axis
    writes: tuple[Axis, ...]  # more than one where layers are fused
    order: Order = Order.PARTS

    @property
    def parallel(self) -> str:
        return "column" if self.reads is Axis.HIDDEN else "row"

    @property
    def fused(self) -> bool:
        return len(self.writes) > 1

    def width(self, widths: Mapping[Axis, int]) -> int:
        """N, where the axes have so many channels."""
        return sum(widths[axis] for axis in self.writes)

    def places(self, widths: Mapping[Axis, int], head_dim: int) -> list[NDArray[np.int64]]:
        """For each part, the column of each of its channels, where the axes have so many."""
        columns = np.arange(self.width(widths))
        if self.order is Order.PARTS:
            ends = np.cumsum([widths[axis] for axis in self.writes])
            return np.split(columns, ends[:-1])
        kv_heads = widths[Axis.KV] // head_dim
        heads = columns.reshape(kv_heads, -1, head_dim)
        return [part.reshape(-1) for part in (heads[:, :-2], heads[:, -2], heads[:, -1])]


# What an activation may be called: functions of each channel alone that map 0 to 0.
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2")
LARGEST = 1 << 22  # of a size in config.json
ALWAYS = ""  # in Family.biases, in the place of a config key
NO_KEY = ""

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
    one_kv_head: bool = False
    mlp_ratio: int = 0  # the MLP's channels for each of the hidden ones, where a config is silent
    # A key, and the family it is where config.json denies it.
    unless: tuple[str, Family] | None = None
    never: tuple[str, ...] = ()  # keys that must not be true

    def block(self, index: int) -> str:
        return f"{self.prefix}.{index}"

    def said(self, config: Mapping[str, Any], key: str) -> Any:
        """What a config.json says under a key of its own, or means by its silence."""
        return self.defaults.get(key) if config.get(key) is None else config[key]

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

        def size(name: str, default: int | None = None) -> int:
            value = self.said(config, keys[name])
            value = default if value is None else value
            if type(value) is not int or not 0 < value <= LARGEST:
                problems.append(
                    f"config.json: {keys[name]} is {value!r:.40}; must be a positive integer"
                    f"{f' up to {LARGEST}' if type(value) is int and value > 0 else ''}"
                )
                return 1
            return value

        hidden, heads = size("hidden"), size("heads")
        geometry = Geometry(
            hidden=hidden,
            blocks=size("blocks"),
            heads=heads,
            kv_heads=1 if self.one_kv_head else size("kv_heads", heads),
            head_dim=size("head_dim", hidden // heads),
            intermediate=size("intermediate", self.mlp_ratio * hidden or None),
            activation=str(self.said(config, keys["activation"]) or "silu"),
        )
        if not problems and heads % geometry.kv_heads:
            problems.append(
                f"config.json: {keys['heads']} is {heads}; must be a multiple of "
                f"{keys['kv_heads']}, {geometry.kv_heads}"
            )
        problems += [
            f"config.json: {key} is true; must be false, the only form that is supported yet"
            for key in self.never
            if self.said(config, key) is True
        ]
        if geometry.activation not in ACTIVATIONS:
            problems.append(
                f"config.json: {keys['activation']} is {geometry.activation!r}; "
                f"must be one of {', '.join(ACTIVATIONS)}"
            )
        if problems:
            raise CheckpointError(*problems, hint="correct config.json")
        return geometry

    def resized(self, config: dict[str, Any], intermediate: int) -> dict[str, Any]:
        """config.json for a model whose MLP was padded to this width."""
        key = self.keys.get("intermediate", KEYS["intermediate"])
        return config | {key: intermediate}


def linears(attention: str, o: str, *mlp: str) -> tuple[Linear, ...]:
    """q_proj, k_proj, v_proj and the output of `attention`; what writes the MLP, what reads it."""
    q, k, v = (f"{attention}.{x}_proj" for x in "qkv")
    return (
        Linear(q, Axis.HIDDEN, (Axis.QUERY,)),
        Linear(k, Axis.HIDDEN, (Axis.KV,)),
        Linear(v, Axis.HIDDEN, (Axis.KV,)),
        Linear(f"{attention}.{o}", Axis.QUERY, (Axis.HIDDEN,)),
        *(Linear(name, Axis.HIDDEN, (Axis.MLP,)) for name in mlp[:-1]),
        Linear(mlp[-1], Axis.MLP, (Axis.HIDDEN,)),
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
FALCON_HEADS = Family(  # falcon-rw
    prefix="transformer.h",
    linears=fused(FALCON_QKV, FALCON_O, *FALCON_MLP, order=Order.HEADS),
    block_tensors=norms(BEFORE, bias=True),
    tensors=outside("transformer.word_embeddings", "transformer.ln_f", bias=True),
    head="lm_head.weight",
    biases={"bias": (FALCON_QKV, FALCON_O, *FALCON_MLP)},
    keys={
        **EVERY_HEAD_ITS_OWN,
        **{"intermediate": "ffn_hidden_size", "activation": "activation"},
    },
    defaults={**FALCON_DEFAULTS, "activation": "gelu", **TIED},
    mlp_ratio=4,
    never=("alibi",),  # its slopes would have to be cut as well
)
FALCON_ONE_KV_HEAD = replace(  # falcon-7b
    FALCON_HEADS,
    linears=fused(FALCON_QKV, FALCON_O, *FALCON_MLP),
    one_kv_head=True,
    unless=("multi_query", FALCON_HEADS),
)

FAMILIES: Mapping[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "ministral": MISTRAL,
    "qwen2": replace(LLAMA, biases={ALWAYS: (Q, K, V)}),
    "qwen3": replace(
        LLAMA,
        block_tensors={**LLAMA.block_tensors, **QK_NORM},
        biases={"attention_bias": (Q, K, V, O)},
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
    "helium": LLAMA,
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
    "cohere": COHERE,
    "cohere2": COHERE,
    "stablelm": replace(
        LLAMA,
        block_tensors=norms(BEFORE, AFTER, bias=True),
        tensors=outside("model.embed_tokens", "model.norm", bias=True),
        biases={"use_qkv_bias": (Q, K, V)},
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
    "gptj": Family(
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
    "gpt2": GPT2,
    "gpt_bigcode": replace(
        GPT2,
        defaults={**GPT2.defaults, "activation_function": "gelu_pytorch_tanh"},
        one_kv_head=True,
        unless=("multi_query", GPT_BIGCODE_HEADS),
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
    "falcon": replace(  # falcon-40b and 180b
        FALCON_HEADS,
        block_tensors=norms("ln_attn", "ln_mlp", bias=True),
        keys={**FALCON_HEADS.keys, "kv_heads": "num_kv_heads"},
        unless=("new_decoder_architecture", FALCON_ONE_KV_HEAD),
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
    while family.unless and family.said(config, family.unless[0]) is False:
        family = family.unless[1]
    return family
