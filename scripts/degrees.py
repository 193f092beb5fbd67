"""What every tensor-parallel degree costs known models: a table, and a picture of bytes per rank.

The checkpoints have the models' sizes and orders of rows as `make_synthetic.py` draws them, but no
weights: headers and g_idx are all that `tpgptq inspect --json` reads, and the files are sparse.
The picture needs matplotlib.

    python scripts/degrees.py --plot degrees.svg
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tpgptq_convert.checkpoint import widths_of
from tpgptq_convert.families import Axis, family_of
from tpgptq_convert.source import TensorSpec

GROUP, PACK = 128, 8
HEAD_SPREAD = 1.5  # as in make_synthetic.py
MODELS: dict[str, dict[str, Any]] = {
    "Llama-2-7B": {
        **{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008},
        **{"num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000},
    },
    "Llama-2-70B": {
        **{"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672},
        **{"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
        **{"vocab_size": 32000},
    },
    "Qwen2.5-72B": {
        **{"model_type": "qwen2", "hidden_size": 8192, "intermediate_size": 29568},
        **{"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
        **{"vocab_size": 152064},
    },
    "Qwen3-30B-A3B": {
        **{"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144},
        **{"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4},
        **{"head_dim": 128, "num_experts": 128, "moe_intermediate_size": 768},
        **{"vocab_size": 151936},
    },
    "starcoder": {
        **{"model_type": "gpt_bigcode", "n_embd": 6144, "n_inner": 24576, "n_layer": 40},
        **{"n_head": 48, "multi_query": True, "vocab_size": 49152},
    },
}


def make(directory: Path, config: Mapping[str, Any]) -> None:
    """A checkpoint of which only what `inspect` reads is written."""
    family = family_of(config)
    geometry = family.geometry(dict(config))
    widths, rng = widths_of(geometry), np.random.default_rng(0)
    sizes = {"hidden": geometry.hidden, "head_dim": geometry.head_dim}
    sizes |= {"vocab": config["vocab_size"], "positions": 8192, "experts": geometry.experts}
    specs: dict[str, TensorSpec] = {}
    orders: dict[str, np.ndarray] = {}

    def dense(name: str, shape: Sequence[str]) -> None:
        specs[name] = TensorSpec("F16", tuple(sizes[size] for size in shape))

    for name, shape in family.tensors.items():
        dense(name, shape)
    for index in range(geometry.blocks):
        block = family.block(index)
        for name, shape in family.block_tensors_of(config, index).items():
            dense(f"{block}.{name}", shape)
        for linear in family.linears_of(config, geometry, index):
            k, n = widths[linear.reads.name], linear.width(widths)
            layer, groups = f"{block}.{linear.name}", -(-k // GROUP)
            specs[f"{layer}.qweight"] = TensorSpec("I32", (k // PACK, n))
            specs[f"{layer}.qzeros"] = TensorSpec("I32", (groups, n // PACK))
            specs[f"{layer}.scales"] = TensorSpec("F16", (groups, n))
            specs[f"{layer}.g_idx"] = TensorSpec("I32", (k,))
            if linear.name in family.biased(config):
                specs[f"{layer}.bias"] = TensorSpec("F16", (n,))
            energy = rng.normal(size=k)
            if linear.reads is Axis.QUERY:
                heads = rng.normal(size=geometry.heads)
                energy += HEAD_SPREAD * np.repeat(heads, geometry.head_dim)
            orders[f"{layer}.g_idx"] = np.empty(k, np.int32)
            orders[f"{layer}.g_idx"][np.argsort(-energy)] = np.arange(k) // GROUP
    quant = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": True}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quant}))
    write_sparse(directory / "model.safetensors", specs, orders)


def write_sparse(
    path: Path, specs: Mapping[str, TensorSpec], values: Mapping[str, np.ndarray]
) -> None:
    """A safetensors file with holes in the place of the tensors that have no values."""
    header, end = {}, 0
    for name, spec in specs.items():
        offsets = [end, end + spec.nbytes]
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": offsets}
        end += spec.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        begin = file.tell()
        for name, array in values.items():
            file.seek(begin + header[name]["data_offsets"][0])
            file.write(array.tobytes())
        file.truncate(begin + end)


def inspect(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `tpgptq inspect --json` says of each degree."""
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory, "model")
        make(model, config)
        command = [sys.executable, "-m", "tpgptq_convert", "inspect", "--json", str(model)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    degrees: list[dict[str, Any]] = json.loads(text)["degrees"]
    return degrees


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """For each degree and model: GB per rank, padding, expected speed-up."""
    lines = [f"| tp | {' | '.join(found)} |", f"|{' --: |' * (len(found) + 1)}"]
    for degrees in zip(*found.values(), strict=True):
        cells = (
            f"{degree['rank_bytes'] / 1e9:.2f} {degree['growth'] - 1:+.0%} "
            f"{degree['speed_up']:.1f}x"
            for degree in degrees
        )
        lines.append(f"| {degrees[0]['tp']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "degrees"
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, degrees in found.items():
        tps = [degree["tp"] for degree in degrees]
        gigabytes = [degree["rank_bytes"] / 1e9 for degree in degrees]
        (line,) = axis.plot(tps, gigabytes, marker="o", markersize=3, label=name)
        ideal = [gigabytes[0] / tp for tp in tps]
        axis.plot(tps, ideal, linestyle=":", linewidth=1, color=line.get_color())
    axis.set(yscale="log", xlabel="--tp", ylabel="GB per rank; dotted: an equal share")
    axis.set_xticks(tps)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
    parser.add_argument("--plot", type=Path, help="draw bytes per rank; needs matplotlib")
    parser.add_argument("--json", type=Path, help="keep what inspect says")
    args = parser.parse_args()
    found = {name: inspect(MODELS[name]) for name in args.model or MODELS}
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps(found))
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
