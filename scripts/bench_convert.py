"""Measure `tpgptq convert` against a plain copy, and against the way TGIS went about it.

Five ways to make new files out of one checkpoint, each run as a whole process, interpreter start
and imports included:

    copy            cp -r: the physical limit
    reload          every safetensors file loaded and saved by the safetensors library
    convert         tpgptq convert --no-verify
    convert+verify  tpgptq convert
    tgis            the plain CPU algorithm: unpack to int32, index, pack, slice, save

The ways take turns, the first round is dropped as a warm-up, and the medians of the others are
printed with user + system CPU time and the peak resident set (which counts pages of files that
are mapped). Nothing is dropped from the page cache: the source is read from memory where it fits.
Nor are outputs forced to disk inside the measured time: what is dirty is flushed before each run.

Usage:

    python scripts/bench_convert.py MODEL [--tp 2] [--runs 3] [--work DIR] [--device cpu]
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

# Torch is imported in the children only: a child's peak counts that of the process it forked from.
if TYPE_CHECKING:
    from torch import Tensor

PACK = 8
RSS_UNIT = 1024  # bytes; what Linux counts ru_maxrss in
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
O_PROJ = "self_attn.o_proj"
GATE_UP, DOWN = ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"
PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")


class Run(NamedTuple):
    """What one process took."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Setting:
    """What is measured, on what."""

    model: Path
    tp: int
    device: str

    def commands(self, out: Path) -> dict[str, list[str]]:
        """The command line of each way."""
        this = [sys.executable, str(Path(__file__))]
        convert = [sys.executable, "-m", "tpgptq_convert", "convert", "--quiet"]
        convert += ["--tp", str(self.tp), "--device", self.device]
        paths = [str(self.model), str(out)]
        return {
            "copy": ["cp", "-r", *paths],
            "reload": [*this, "--child", "reload", "--out", str(out), str(self.model)],
            "convert": [*convert, "--no-verify", *paths],
            "convert+verify": [*convert, *paths],
            "tgis": [
                *this,
                *("--child", "tgis", "--tp", str(self.tp), "--out", str(out), str(self.model)),
            ],
        }


def measure(command: Sequence[str]) -> Run:
    """Run a command to its end."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * RSS_UNIT)


def measure_all(setting: Setting, runs: int, work: Path | None) -> dict[str, list[Run]]:
    """Every way in turn, `runs` + 1 times; the first round is dropped."""
    results: dict[str, list[Run]] = {}
    parent = work or setting.model.resolve().parent
    with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=parent) as directory:
        out = Path(directory) / "out"
        for turn in range(runs + 1):
            for way, command in setting.commands(out).items():
                os.sync()
                run = measure(command)
                shutil.rmtree(out)
                label = f"round {turn}" if turn else "warm-up"
                print(f"{label}: {way} {run.seconds:.2f} s", file=sys.stderr, flush=True)
                if turn:
                    results.setdefault(way, []).append(run)
    return results


def table(results: Mapping[str, Sequence[Run]], source_bytes: int) -> Iterator[str]:
    """The lines of the table, GitHub's markdown."""
    yield "| way | seconds (min-max) | x copy | CPU s | peak RSS MB | GB/s of source |"
    yield "|---|--:|--:|--:|--:|--:|"
    base = statistics.median(run.seconds for run in results["copy"])
    for way, runs in results.items():
        seconds = [run.seconds for run in runs]
        median = statistics.median(seconds)
        cpu = statistics.median(run.cpu_seconds for run in runs)
        peak = statistics.median(run.peak_bytes for run in runs)
        yield (
            f"| {way} | {median:.2f} ({min(seconds):.2f}-{max(seconds):.2f}) "
            f"| {median / base:.1f} | {cpu:.1f} | {peak / 1e6:.0f} "
            f"| {source_bytes / median / 1e9:.2f} |"
        )


def facts(setting: Setting, source_bytes: int, runs: int) -> Iterator[str]:
    """What the numbers depend on."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "safetensors", "numpy"))
    yield f"{setting.model.name}: {source_bytes / 1e9:.3f} GB, tp {setting.tp}, {setting.device}"
    yield f"{platform.machine()}, {os.cpu_count()} cores ({processor()})"
    yield f"Python {platform.python_version()}, {packages}"
    yield f"median of {runs} runs after one warm-up, page cache warm; load before: {load()}"


def processor() -> str:
    """The processor's name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def load() -> str:
    return ", ".join(f"{value:.2f}" for value in os.getloadavg())


# The ways that run in a process of this script.


def reload(model: Path, out: Path) -> None:
    """Load and save every weight file."""
    from safetensors.torch import load_file, save_file

    out.mkdir()
    for path in sorted(model.glob("*.safetensors")):
        save_file(load_file(path), out / path.name, metadata={"format": "pt"})


def tgis(model: Path, out: Path, tp: int) -> None:
    """Shards as TGIS made them, with a file for every rank and block.

    Column-parallel layers: rows by group, a slice of the columns; gate and up have their columns in
    the order of down's rows. down: rows by group, a slice of them. o_proj: rows by group, the whole
    of it on every rank. TGIS did this in memory on every rank; here it is done once for all.
    """
    from safetensors.torch import save_file

    out.mkdir()
    tensors = read_model(model)
    blocks = sorted({name.rpartition(DOWN)[0] for name in tensors if f"{DOWN}.qweight" in name})
    for block in blocks:
        ranks: list[dict[str, Tensor]] = [{} for _ in range(tp)]
        for layer, parts in tgis_block(tensors, block).items():
            for rank in range(tp):
                sliced = tgis_slice(layer, parts, rank, tp)
                ranks[rank] |= {f"{block}{layer}.{part}": t for part, t in sliced.items()}
        for rank, shards in enumerate(ranks):
            save_file(shards, out / f"rank-{rank}-{block}safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if not packed(name)},
        out / "shared.safetensors",
    )


def read_model(model: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint, backed by memory maps."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for path in sorted(model.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def packed(name: str) -> bool:
    """Whether a tensor belongs to a quantised layer."""
    layer, _, part = name.rpartition(".")
    return part in PARTS and layer.endswith((*QKV, O_PROJ, *GATE_UP, DOWN))


def tgis_block(tensors: Mapping[str, Tensor], block: str) -> dict[str, dict[str, Tensor]]:
    """The layers of a block with their rows and columns in order, not yet sliced."""
    down_order = tensors[f"{block}{DOWN}.g_idx"].argsort(stable=True)
    return {
        layer: tgis_reorder(
            {
                part: tensors[f"{block}{layer}.{part}"]
                for part in PARTS
                if f"{block}{layer}.{part}" in tensors
            },
            down_order if layer in GATE_UP else None,
        )
        for layer in (*QKV, O_PROJ, *GATE_UP, DOWN)
    }


def tgis_reorder(parts: dict[str, Tensor], cols: Tensor | None) -> dict[str, Tensor]:
    """One layer with its rows sorted by group and, where given, its columns in another order."""
    order = parts["g_idx"].argsort(stable=True)
    rows = unpack_rows(parts["qweight"])[order]
    out = parts | {"perm": order.int()}
    del out["g_idx"]
    if cols is not None:
        rows = rows[:, cols]
        zeros = unpack_rows(parts["qzeros"].T).T[:, cols]
        out["qzeros"] = pack_rows(zeros.T).T
        out["scales"] = parts["scales"][:, cols]
        if "bias" in parts:
            out["bias"] = parts["bias"][cols]
    return out | {"qweight": pack_rows(rows)}


def tgis_slice(layer: str, parts: dict[str, Tensor], rank: int, tp: int) -> dict[str, Tensor]:
    """A rank's part of every tensor of a layer."""
    if layer == O_PROJ:
        return parts
    if layer != DOWN:
        return {
            part: tensor if part == "perm" else tensor.chunk(tp, dim=-1)[rank].contiguous()
            for part, tensor in parts.items()
        }
    # gate and up have folded its perm; the group that two ranks share goes to both.
    size = len(parts["perm"]) / len(parts["scales"])
    step = len(parts["perm"]) // tp
    groups = slice(int(rank * step // size), math.ceil((rank + 1) * step / size))
    sliced = parts | {
        "qweight": parts["qweight"].chunk(tp)[rank],
        "qzeros": parts["qzeros"][groups],
        "scales": parts["scales"][groups],
    }
    del sliced["perm"]
    return sliced


def unpack_rows(words: Tensor) -> Tensor:
    """(K/8, N) int32 -> (K, N) int32."""
    import torch

    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((words[:, None, :] >> shifts[:, None]) & 15).reshape(-1, words.shape[1])


def pack_rows(values: Tensor) -> Tensor:
    """(K, N) int32 -> (K/8, N) int32."""
    import torch

    words = torch.zeros(values.shape[0] // PACK, values.shape[1], dtype=torch.int32)
    for j in range(PACK):
        words |= values[j::PACK] << 4 * j
    return words


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="directory with a GPTQ checkpoint")
    parser.add_argument("--tp", type=int, default=2, help="tensor-parallel degree")
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each way")
    parser.add_argument("--work", type=Path, help="where outputs go; default: beside MODEL")
    parser.add_argument("--device", default="cpu", help="for tpgptq convert")
    parser.add_argument("--child", choices=("reload", "tgis"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.child == "reload":
        reload(args.model, args.out)
    elif args.child == "tgis":
        tgis(args.model, args.out, args.tp)
    else:
        setting = Setting(args.model, args.tp, args.device)
        size = sum(path.stat().st_size for path in args.model.rglob("*") if path.is_file())
        lines = list(facts(setting, size, args.runs))
        results = measure_all(setting, args.runs, args.work)
        print("\n".join([*lines, "", *table(results, size)]))


if __name__ == "__main__":
    main()
