"""Which outputs vLLM serves; without vLLM, so that `inspect` and the model card can say it too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpgptq_convert.manifest import bits_of

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
BITS = 4
HEADS = ("lm_head",)
SIZE_FROM_NUMBER = ("qwen2",)  # where vLLM passes over head_dim in config.json
VOCABULARY = 64  # vLLM pads the vocabulary to a multiple
GPU_GROUP = 32  # rows of a group: kernels for GPUs take no less
SHOWN = 4  # modules that are named one by one


def refusals(manifest: Mapping[str, Any]) -> list[str]:
    """What the plugin would refuse an output for: what is, and what must be; empty if it serves it.

    `manifest` is tpgptq.json of layout ranks or merged. Kernels have limits of their own, which
    only vLLM on the machine that serves knows (groups of less than 32 on GPUs).
    """
    problems = []
    if manifest["model_type"] not in MODEL_TYPES:
        problems.append(
            f"model_type is {manifest['model_type']!r}; must be one of {', '.join(MODEL_TYPES)}, "
            "which the plugin is tested with"
        )
    heads, tp = manifest["heads"], manifest["tp"]
    if manifest["model_type"] in SIZE_FROM_NUMBER and any(
        heads[kind] != heads[f"padded_{kind}"] for kind in ("query", "kv")
    ):
        problems.append(
            f"has empty heads, since tp {tp} doesn't divide the {heads['query']} query and "
            f"{heads['kv']} kv heads; must have none, since vLLM takes the size of this model's "
            "heads from their number"
        )
    modules = [
        f"{name} {_has(bits)}; must have weights of {BITS} bits"
        for name in manifest["modules"]
        if (bits := bits_of(manifest, name)) != BITS
    ]
    modules += [
        f"{name} is quantised; must not be, since the plugin serves blocks alone"
        for name in manifest["modules"]
        if name in HEADS
    ]
    more = len(modules) - SHOWN
    return [*problems, *modules[:SHOWN], *([f"and {more} more"] if more > 0 else [])]


def limits(config: Mapping[str, Any], tp: int) -> list[str]:
    """What keeps vLLM from serving a model at a degree whose output runs elsewhere.

    `config` is the output's config.json, empty heads included.
    """
    family, vocabulary = config.get("model_type"), config.get("vocab_size")
    if family not in MODEL_TYPES:
        return []
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not (type(heads) is type(hidden) is int and heads > 0):  # of an output that was damaged
        return []
    found = []
    if isinstance(vocabulary, int) and -(-vocabulary // VOCABULARY) * VOCABULARY % tp:
        found.append(f"vLLM can't share out the vocabulary ({vocabulary}, padded to whole 64s)")
    if family in SIZE_FROM_NUMBER and heads * (config.get("head_dim") or hidden // heads) != hidden:
        found.append(
            f"vLLM takes the size of {family}'s heads from their number: none may be empty"
        )
    if family == "llama" and hidden % heads:
        found.append("vLLM with transformers 5 refuses llama if its heads don't divide hidden_size")
    return found


def _has(bits: int | None) -> str:
    return "isn't quantised" if bits is None else f"has weights of {bits} bits"
