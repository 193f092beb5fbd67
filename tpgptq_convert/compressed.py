"""compressed-tensors' way to say what GPTQ says: llm-compressor's act-ordered checkpoints.

The words of its `pack-quantized` format are GPTQ's own: values packed along the in-features, zero
points along the out-features, lowest bits first, and all stored from 0. But every matrix lies the
other way round, and symmetric checkpoints have no zero points.
"""

from __future__ import annotations

from typing import Any

from tpgptq_convert.errors import UnsupportedError

COMPRESSED = "compressed-tensors"
FORMAT = "pack-quantized"
# What actorder may be -> whether the layers have a g_idx.
ACT_ORDER = {None: False, False: False, "weight": False, "static": False} | {
    True: True, "group": True, "dynamic": True
}  # fmt: skip


def in_gptq_terms(where: str, raw: dict[str, Any]) -> dict[str, Any]:
    """A compressed-tensors config as GPTQ would say it; `where` it stands is for messages.

    Raises UnsupportedError, with every reason, where GPTQ couldn't say it.
    """
    problems = []

    def must(key: str, actual: Any, *allowed: Any) -> None:
        if not any(type(actual) is type(value) and actual == value for value in allowed):
            wanted = " or ".join(repr(value) for value in allowed)
            problems.append(f"{where}: {key} is {actual!r:.60}; must be {wanted}")

    must("format", raw.get("format"), FORMAT)
    must("kv_cache_scheme", raw.get("kv_cache_scheme"), None)
    must("transform_config", raw.get("transform_config"), None, {})
    must("sparsity_config", _inner(raw, "sparsity_config").get("format"), None, "dense")
    groups = _inner(raw, "config_groups")
    weights = {name: _inner(_inner(groups, name), "weights") for name in groups}
    for name, of_group in weights.items():
        scheme, group = _inner(groups, name), f"config_groups.{name}"
        must(f"{group}.format", scheme.get("format"), None, FORMAT)
        for key in ("input_activations", "output_activations"):
            must(f"{group}.{key}", scheme.get(key), None)
        must(f"{group}.weights.type", of_group.get("type", "int"), "int")
        if of_group.get("num_bits") == 3:  # ten in a word, where GPTQ fills words
            must(f"{group}.weights.num_bits", 3, 2, 4, 8)
        must(f"{group}.weights.dynamic", of_group.get("dynamic", False), False)
        must(f"{group}.weights.strategy", of_group.get("strategy"), "group", "channel")
        must(f"{group}.weights.actorder", of_group.get("actorder"), *ACT_ORDER)
    stated = [] if problems else [_of_weights(of_group) for of_group in weights.values()]
    if not problems and (not stated or any(other != stated[0] for other in stated)):
        problems.append(
            f"{where}: config_groups are {', '.join(weights) or 'none'}, which don't say one and "
            "the same of their weights; must quantise all layers in one way"
        )
    if problems:
        raise UnsupportedError(
            *problems, hint="a checkpoint of the same model with integer weights alone is needed"
        )
    return stated[0] | {"quant_method": COMPRESSED, "checkpoint_format": "gptq_v2"}


def _inner(outer: dict[str, Any], key: str) -> dict[str, Any]:
    value = outer.get(key)
    return value if isinstance(value, dict) else {}


def _of_weights(weights: dict[str, Any]) -> dict[str, Any]:
    return {
        "bits": weights.get("num_bits"),
        "group_size": -1 if weights["strategy"] == "channel" else weights.get("group_size"),
        "sym": weights.get("symmetric", True),
        "desc_act": ACT_ORDER[weights.get("actorder")],
    }
