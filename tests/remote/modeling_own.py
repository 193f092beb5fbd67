"""Models of families that transformers has no class for: their layers' names, and how those lie.

Written for the tests from what is published of the layers; it is not the code that comes with such
models, whose positions and scales differ. Loaded as theirs is, through auto_map.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class Layout(NamedTuple):
    """Names, as in config.json and in the files."""

    blocks: str = "model.layers"
    embeddings: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    attention: tuple[str, ...] = ("self_attn", "q_proj", "k_proj", "v_proj", "o_proj")
    by_kv_head: bool = False  # where q, k and v are one layer; else one after another
    mlp: tuple[str, ...] = ("mlp", "gate_proj", "up_proj", "down_proj")
    qkv_bias: bool = False
    out_bias: bool = False
    keys: tuple[str, str, str] = ("num_hidden_layers", "num_key_value_heads", "intermediate_size")
    mlp_times: int = 1  # what config.json says of the MLP, as a multiple of its channels


LAYOUTS = {
    "internlm": Layout(qkv_bias=True, out_bias=True),
    "internlm2": Layout(
        embeddings="model.tok_embeddings",
        head="output",
        norms=("attention_norm", "ffn_norm"),
        attention=("attention", "wqkv", "wo"),
        by_kv_head=True,
        mlp=("feed_forward", "w1", "w3", "w2"),
    ),
    "baichuan": Layout(attention=("self_attn", "W_pack", "o_proj")),
    "qwen": Layout(
        blocks="transformer.h",
        embeddings="transformer.wte",
        norm="transformer.ln_f",
        norms=("ln_1", "ln_2"),
        attention=("attn", "c_attn", "c_proj"),
        mlp=("mlp", "w2", "w1", "c_proj"),
        qkv_bias=True,
        mlp_times=2,
    ),
    "minicpm": Layout(),
    "exaone": Layout(
        blocks="transformer.h",
        embeddings="transformer.wte",
        norm="transformer.ln_f",
        norms=("ln_1", "ln_2"),
        attention=("attn.attention", "q_proj", "k_proj", "v_proj", "out_proj"),
        mlp=("mlp", "c_fc_0", "c_fc_1", "c_proj"),
        keys=("num_layers", "num_key_value_heads", "intermediate_size"),
    ),
    "chatglm": Layout(
        blocks="transformer.encoder.layers",
        embeddings="transformer.embedding.word_embeddings",
        norm="transformer.encoder.final_layernorm",
        head="transformer.output_layer",
        attention=("self_attention", "query_key_value", "dense"),
        mlp=("mlp", "dense_h_to_4h", "dense_4h_to_h"),
        qkv_bias=True,
        keys=("num_layers", "multi_query_group_num", "ffn_hidden_size"),
    ),
}


def put(root: nn.Module, name: str, module: nn.Module) -> None:
    """A module at a dotted name."""
    *parents, last = name.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            setattr(root, parent, nn.Module())
        root = getattr(root, parent)
    setattr(root, last, module)


class OwnConfig(PretrainedConfig):
    model_type = "own"


class Attention(nn.Module):
    def __init__(self, config: Any, layout: Layout, size: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, size
        self.num_key_value_heads = getattr(config, layout.keys[1], self.num_heads)
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.hidden_size = self.num_heads * size  # of what its heads put out
        self.names, self.by_kv_head = layout.attention[1:], layout.by_kv_head
        hidden, q, kv = config.hidden_size, self.num_heads * size, self.num_key_value_heads * size
        widths = (q + 2 * kv,) if len(self.names) == 2 else (q, kv, kv)
        for name, width in zip(self.names, widths, strict=False):
            setattr(self, name, nn.Linear(hidden, width, layout.qkv_bias))
        setattr(self, self.names[-1], nn.Linear(q, hidden, layout.out_bias))

    def forward(self, x: Tensor) -> Tensor:
        size, groups = self.head_dim, self.num_key_value_groups
        made = [getattr(self, name)(x) for name in self.names[:-1]]
        if self.by_kv_head:
            heads = made[0].unflatten(-1, (-1, groups + 2, size))
            made = [heads[..., :-2, :].flatten(2), heads[..., -2, :], heads[..., -1, :]]
            made = [part.flatten(2) for part in made]
        elif len(made) == 1:
            kv = self.num_key_value_heads * size
            made = list(made[0].split((self.num_heads * size, kv, kv), dim=-1))
        q, k, v = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in made)
        q, k = rotate(q), rotate(k)
        k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out = out.transpose(1, 2).reshape(*x.shape[:2], self.hidden_size)
        return getattr(self, self.names[-1])(out)


def rotate(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[-2]), 100.0 ** (-torch.arange(half) / half))
    one, other = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((one * cos - other * sin, other * cos + one * sin), dim=-1)


class MLP(nn.Module):
    def __init__(self, hidden: int, width: int, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        times = 2 if len(names) == 2 else 1
        for name in names[:-1]:
            setattr(self, name, nn.Linear(hidden, times * width, False))
        setattr(self, names[-1], nn.Linear(width, hidden, False))

    def forward(self, x: Tensor) -> Tensor:
        made = torch.cat([getattr(self, name)(x) for name in self.names[:-1]], dim=-1)
        gate, up = made.chunk(2, dim=-1)
        return getattr(self, self.names[-1])(functional.silu(gate) * up)


class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layout = self.layout = LAYOUTS[config.family]
        hidden, heads = config.hidden_size, config.num_attention_heads
        size = next(
            (s for key in ("head_dim", "kv_channels") if (s := getattr(config, key, None))),
            hidden // heads,
        )
        put(self, layout.embeddings, nn.Embedding(config.vocab_size, hidden))
        put(self, layout.norm, nn.RMSNorm(hidden, eps=1e-6))
        put(self, layout.head, nn.Linear(hidden, config.vocab_size, False))
        width = getattr(config, layout.keys[2]) // layout.mlp_times
        for index in range(getattr(config, layout.keys[0])):
            block = f"{layout.blocks}.{index}"
            put(self, f"{block}.{layout.attention[0]}", Attention(config, layout, size))
            put(self, f"{block}.{layout.mlp[0]}", MLP(hidden, width, layout.mlp[1:]))
            for norm in layout.norms:
                put(self, f"{block}.{norm}", nn.RMSNorm(hidden, eps=1e-6))
        self.post_init()

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        layout, get = self.layout, self.get_submodule
        x = get(layout.embeddings)(input_ids)
        for index in range(getattr(self.config, layout.keys[0])):
            block = f"{layout.blocks}.{index}"
            before, after = (get(f"{block}.{norm}") for norm in layout.norms)
            x = x + get(f"{block}.{layout.attention[0]}")(before(x))
            x = x + get(f"{block}.{layout.mlp[0]}")(after(x))
        return CausalLMOutput(logits=get(layout.head)(get(layout.norm)(x)))
