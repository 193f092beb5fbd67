"""Synthetic GPTQ checkpoints of any shape, and slow, obvious versions of what the package does."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

BITS = 4
ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
NAMES = {x: f"self_attn.{x}_proj" for x in ATTENTION} | {x: f"mlp.{x}_proj" for x in MLP}


def slow_pack_rows(values: np.ndarray, bits: int = BITS) -> np.ndarray:
    """(K, N) integers -> (K*bits/32, N) int32, one value at a time."""
    k, n = values.shape
    words = np.zeros((k * bits // 32, n), np.uint32)
    for col in range(n):
        column = sum(int(value) << bits * row for row, value in enumerate(values[:, col]))
        for i in range(len(words)):
            words[i, col] = column >> 32 * i & 0xFFFFFFFF
    return words.view(np.int32)


def slow_unpack_rows(words: np.ndarray, bits: int = BITS) -> np.ndarray:
    """(K*bits/32, N) int32 -> (K, N), one value at a time."""
    columns = [
        sum((int(word) & 0xFFFFFFFF) << 32 * i for i, word in enumerate(column))
        for column in words.T
    ]
    k = len(words) * 32 // bits
    return np.array([[c >> bits * row & (1 << bits) - 1 for c in columns] for row in range(k)])


def dequantise(
    tensors: Mapping[str, torch.Tensor], g_idx: np.ndarray, v2: bool = False, bits: int = BITS
) -> torch.Tensor:
    """The float64 weight (K, N) of stored tensors, by the formula of the format alone."""
    values = slow_unpack_rows(tensors["qweight"].numpy(), bits)
    zeros = slow_unpack_rows(tensors["qzeros"].numpy().T, bits).T + (0 if v2 else 1)
    scales = tensors["scales"].double().numpy()
    return torch.from_numpy(scales[g_idx] * (values - zeros[g_idx]))


def make_g_idx(rng: np.random.Generator, k: int, group_size: int) -> np.ndarray:
    """A random order of rows: full groups, the last one shorter where group_size doesn't divide."""
    return (np.arange(k) // group_size)[np.argsort(rng.permutation(k))].astype(np.int32)


def make_uneven_g_idx(rng: np.random.Generator, k: int, group_size: int) -> np.ndarray:
    """Any group may hold any number of rows, more than group_size, or none; all but the last."""
    groups = -(-k // group_size)
    g_idx = rng.integers(0, groups, k).astype(np.int32)
    g_idx[0] = groups - 1
    return g_idx


def make_layer(
    rng: np.random.Generator,
    k: int,
    n: int,
    g_idx: np.ndarray,
    *,
    sym: bool = True,
    v2: bool = False,
    dtype: torch.dtype = torch.float16,
    bits: int = BITS,
) -> dict[str, torch.Tensor]:
    """Random tensors of one quantised layer; g_idx (K,) is stored as it is."""
    groups = int(g_idx.max()) + 1
    middle = 1 << bits - 1
    zeros = (
        np.full((groups, n), middle)
        if sym
        else rng.integers(0 if v2 else 1, 2 * middle, (groups, n))
    )
    words = rng.integers(0, 1 << 32, (k * bits // 32, n), dtype=np.uint32).view(np.int32)
    scales = rng.uniform(0.5, 1.5, (groups, n)) / np.sqrt(k) * 2 / middle
    return {
        "qweight": torch.from_numpy(words),
        "qzeros": torch.from_numpy(slow_pack_rows((zeros - (0 if v2 else 1)).T, bits).T.copy()),
        "scales": torch.from_numpy(scales).to(dtype),
        "g_idx": torch.from_numpy(g_idx.copy()),
    }


def block_outputs(
    x: torch.Tensor, w: dict[str, torch.Tensor], perms: dict[str, torch.Tensor], head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and MLP written out head by head, each from the same input; (M, hidden)."""

    def apply(name: str, inputs: torch.Tensor) -> torch.Tensor:
        return (inputs[:, perms[name]] if name in perms else inputs) @ w[name]

    q, k, v = (apply(name, x).split(head_dim, dim=1) for name in "qkv")
    heads = []
    for i, query in enumerate(q):
        j = i * len(k) // len(q)
        heads.append(torch.softmax(query @ k[j].T / head_dim**0.5, dim=-1) @ v[j])
    gate = apply("gate", x)
    return (
        apply("o", torch.cat(heads, dim=1)),
        apply("down", gate * torch.sigmoid(gate) * apply("up", x)),
    )


def make_checkpoint(
    directory: Path,
    *,
    model_type: str = "llama",
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    intermediate: int = 96,
    blocks: int = 2,
    vocab: int = 32,
    group_size: int = 32,
    bits: int = BITS,
    sym: bool = True,
    checkpoint_format: str | None = None,
    g_idx: str = "shared",  # shared, different, uneven, trivial, zero, missing
    zero_biases: bool = False,
    tied: bool = False,
    files: int = 1,
    basename: str = "model",
    config_file: str = "config.json",  # where the quantisation config stands
    dtype: torch.dtype = torch.float16,
    # What is other than above in some linear layers, by their names; None: not quantised.
    modules: Mapping[str, Mapping[str, Any] | None] | None = None,
    quant: Mapping[str, Any] | None = None,  # replaces keys of the quantisation config
    config: Mapping[str, Any] | None = None,  # replaces keys of config.json; None removes
    seed: int = 0,
) -> Path:
    """Write a checkpoint and return its directory."""
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    query, kv = heads * head_dim, kv_heads * head_dim
    shapes = {
        "q": (hidden, query),
        "k": (hidden, kv),
        "v": (hidden, kv),
        "o": (query, hidden),
        "gate": (hidden, intermediate),
        "up": (hidden, intermediate),
        "down": (intermediate, hidden),
    }
    biased = {"qwen2": ("q", "k", "v")}.get(model_type, ())
    if (config or {}).get("attention_bias"):
        biased += ATTENTION
    if (config or {}).get("mlp_bias"):
        biased += MLP
    tensors: dict[str, torch.Tensor] = {}

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=shape)).to(dtype)

    def linear(name: str, k: int, n: int, orders: dict[Any, np.ndarray], kin: str) -> None:
        form: dict[str, Any] = {"bits": bits, "group_size": group_size, "sym": sym}
        own = (modules or {}).get(name, {})
        if own is None:
            tensors[f"{name}.weight"] = normal(n, k) / np.sqrt(k)
            return
        form |= own
        size = k if form["group_size"] == -1 else form["group_size"]
        if (kin, size) not in orders:
            make = make_uneven_g_idx if g_idx == "uneven" else make_g_idx
            orders[kin, size] = make(rng, k, size)
        order = orders[kin, size]
        if g_idx in ("trivial", "zero", "missing"):
            order = (np.arange(k) // size).astype(np.int32)
        v2 = checkpoint_format == "gptq_v2"
        layer = make_layer(rng, k, n, order, sym=form["sym"], v2=v2, dtype=dtype, bits=form["bits"])
        if g_idx == "zero":
            layer["g_idx"].zero_()
        if g_idx == "missing":
            del layer["g_idx"]
        tensors.update({f"{name}.{part}": tensor for part, tensor in layer.items()})

    for block in range(blocks):
        prefix = f"model.layers.{block}"
        orders: dict[Any, np.ndarray] = {}
        for name, (k, n) in shapes.items():
            kin = (
                name if g_idx == "different" else {"k": "q", "v": "q", "up": "gate"}.get(name, name)
            )
            linear(f"{prefix}.{NAMES[name]}", k, n, orders, kin)
            if name in biased:
                tensors[f"{prefix}.{NAMES[name]}.bias"] = normal(n) * 0.1
            elif zero_biases:
                tensors[f"{prefix}.{NAMES[name]}.bias"] = torch.zeros(n, dtype=dtype)
        tensors[f"{prefix}.input_layernorm.weight"] = normal(hidden) * 0.1 + 1
        tensors[f"{prefix}.post_attention_layernorm.weight"] = normal(hidden) * 0.1 + 1
        if model_type == "qwen3":
            tensors[f"{prefix}.self_attn.q_norm.weight"] = normal(head_dim) * 0.1 + 1
            tensors[f"{prefix}.self_attn.k_norm.weight"] = normal(head_dim) * 0.1 + 1
    tensors["model.embed_tokens.weight"] = normal(vocab, hidden)
    tensors["model.norm.weight"] = normal(hidden) * 0.1 + 1
    if "lm_head" in (modules or {}):
        linear("lm_head", hidden, vocab, {}, "lm_head")
    elif not tied:
        tensors["lm_head.weight"] = normal(vocab, hidden)

    _write_files(directory, tensors, files, basename)
    quantization = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": g_idx in ("shared", "different", "uneven"),
        "sym": sym,
    }
    if checkpoint_format:
        quantization["checkpoint_format"] = checkpoint_format
    if modules:  # as GPTQModel says it
        quantization["lm_head"] = "lm_head" in modules
        quantization["dynamic"] = {
            f"{'-' if own is None else '+'}:^{re.escape(name)}$": dict(own or {})
            for name, own in modules.items()
        }
    quantization |= quant or {}
    model = {
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "model_type": model_type,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate,
        "num_hidden_layers": blocks,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
    } | dict(config or {})
    if config_file == "config.json":
        model["quantization_config"] = quantization
    else:
        (directory / config_file).write_text(json.dumps(quantization))
    (directory / "config.json").write_text(json.dumps(model))
    return directory


def _write_files(
    directory: Path, tensors: dict[str, torch.Tensor], files: int, basename: str
) -> None:
    """One file, or several with an index, the tensors of a layer spread over them."""
    if files == 1:
        save_file(tensors, directory / f"{basename}.safetensors")
        return
    names = [f"{basename}-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    weight_map = {tensor: names[i % files] for i, tensor in enumerate(tensors)}
    for name in names:
        save_file(
            {t: tensors[t] for t, file in weight_map.items() if file == name}, directory / name
        )
    (directory / f"{basename}.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def edit_text(path: Path, old: str, new: str) -> None:
    """Replace a text that must be there."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def edit_tensors(path: Path, edit: Any) -> None:
    """Rewrite a safetensors file after edit(tensors) changed the dictionary in place."""
    from safetensors.torch import load_file

    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


def refresh_checksums(out: Path) -> None:
    """Bring the checksums in an output's manifest up to date."""
    from tpgptq_convert.writer import checksum

    path = out / "tpgptq.json"
    manifest = json.loads(path.read_text())
    files = manifest["files"]
    for group in (files["shared"], files["other"], *files["ranks"]):
        for name in list(group):
            if (out / name).exists():
                group[name] = checksum(out / name)
            else:
                del group[name]
    path.write_text(json.dumps(manifest))
