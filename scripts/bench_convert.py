"""Measure `tpgptq convert` against plain copies, and against the way TGIS went about it.

Every way makes new files out of one checkpoint, as a whole process that ends with a sync:

    cp               cp -r
    copy             the same by as many threads as there are cores, each file in stretches
    copy and hash    copy, with the SHA-256 of every file that is read and of every file that is
                     written, a thread each: what the manifest asks for, and nothing else
    reload           every safetensors file loaded and saved by the safetensors library
    convert          tpgptq convert --no-verify
    copy and hash, tp N
                     copy and hash of what convert wrote, which is larger than the source: the
                     SHA-256 of the source's files, and of these
    with verify      tpgptq convert
    verify           tpgptq verify
    N processes      tpgptq convert --no-verify, by torchrun; each on a GPU of its own

The ways take turns, the first round is dropped as a warm-up, and medians are printed: of the whole
process, and of the work alone, without the start of Python, torch and the GPU (of torchrun's, from
when one of them is ready: it waits for the others). Interrupted, it prints the rounds that it has.
Memory is the peak resident set above that of `import torch`, and the peak that torch holds on the
GPU. Nothing is dropped from the page cache: the source is read from memory where it fits. On a RAM
disk (--work /dev/shm/bench) the disk's own speed hides nothing. With --full-cache every run begins
with next to no free memory, and so takes what it needs from the page cache, as on a machine that
has run for a while: where memory that was never used, or was freed some seconds ago, first has to
come from a virtual machine's host, writing a page costs up to ten times as much, and runs of
different lengths pay for different shares of it.

Below stands what one block's layers cost in memory: TGIS's way (unpack to int32 on the CPU, index,
slice, pack, with torch's own threads) and this executor's, from host memory to host memory, as many
threads as it has; and the links that it works over.

Usage:

    python scripts/bench_convert.py --preset llama-2-7b --work DIR
    python scripts/bench_convert.py --preset llama-2-70b --blocks 16 --tp 2 --tp 8 --device cuda \\
        --work /dev/shm/bench --plot convert.svg
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

# Torch is imported in the children only: a child's peak counts that of the process it forked from.
if TYPE_CHECKING:
    from torch import Tensor

PACK = 8
RSS_UNIT = 1024  # bytes; what Linux counts ru_maxrss in
STRETCH = 1 << 26  # bytes that one thread copies at a time
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
O_PROJ = "self_attn.o_proj"
GATE_UP, DOWN = ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"
PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")
BLOCKS = 4  # that this executor works on at a time, so that all threads have work
CORES = len(os.sched_getaffinity(0))


class Run(NamedTuple):
    """What one process took."""

    seconds: float  # of the whole process, and of the sync after it
    work: float  # without the start of Python and of what it imports
    cpu_seconds: float
    host_bytes: int
    device_bytes: int


def commands(
    model: Path, out: Path, copied: Path, tps: Sequence[int], device: str, processes: int
) -> dict[str, list[str]]:
    """The command line of each way, in an order in which those that read `out` find it."""
    this, paths = [sys.executable, __file__, "--child"], [str(model), str(out)]
    ways = {
        "cp": ["cp", "-r", *paths],
        "copy": [*this, "copy", *paths],
        "copy and hash": [*this, "copy", *paths, str(model), str(model)],
        "reload": [*this, "reload", *paths],
    }
    for tp in tps:
        convert = [*this, "tpgptq", "convert", "-q", "--device", device, "--tp", str(tp)]
        ways[f"tp {tp}: convert"] = [*convert, "--no-verify", *paths]
        ways[f"copy and hash, tp {tp}"] = [*this, "copy", *map(str, (out, copied, model, out))]
        ways[f"tp {tp}: verify"] = [*this, "tpgptq", "verify", "-q", "--device", device, *paths]
        ways[f"tp {tp}: with verify"] = [*convert, *paths]
        if processes > 1:
            launch = [
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={processes}",
            ]
            ways[f"tp {tp}: {processes} processes"] = [
                *(sys.executable, *launch, *convert[1:], "--no-verify"),
                *paths,
            ]
    return ways


def measure(command: Sequence[str], notes: Path) -> Run:
    """Run a command to its end, and until what it wrote is on the disk."""
    notes.write_text("{}")
    started = time.perf_counter()
    environment = os.environ | {"BENCH_NOTES": str(notes)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:
        process.terminate()
        raise
    before_sync = time.perf_counter()
    os.sync()
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    noted = json.loads(notes.read_text())
    work = noted.get("work", before_sync - started) + time.perf_counter() - before_sync
    cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * RSS_UNIT
    return Run(seconds, work, cpu, peak, noted.get("device", 0))


def measure_all(
    model: Path, args: argparse.Namespace, work: Path, results: dict[str, list[Run]]
) -> None:
    """Every way in turn, `runs` + 1 times; the first round is dropped. Fills `results`."""
    out, copied = work / "out", work / "copied"
    ways = commands(model, out, copied, args.tp, args.device, args.processes)
    for turn in range(args.runs + 1):
        for way, command in ways.items():
            if not re.search(args.ways, way):
                continue
            if not way.startswith("copy and hash, tp") and not way.endswith(": verify"):
                shutil.rmtree(out, ignore_errors=True)
                os.sync()
            if args.full_cache:
                fill_cache(work)
            run = measure(command, work / "notes.json")
            shutil.rmtree(copied, ignore_errors=True)
            label = f"round {turn}" if turn else "warm-up"
            print(f"{label}: {way} {run.seconds:.2f} s", file=sys.stderr, flush=True)
            if turn:
                results.setdefault(way, []).append(run)


def fill_cache(work: Path) -> None:
    """Read a hole as large as the memory until little of that is free."""
    page = os.sysconf("SC_PAGE_SIZE")
    with tempfile.NamedTemporaryFile(dir=work, delete=False, buffering=0) as hole:
        hole.truncate(page * os.sysconf("SC_PHYS_PAGES"))
        while page * os.sysconf("SC_AVPHYS_PAGES") > 1 << 30 and hole.read(1 << 24):
            pass


def baseline(notes: Path) -> int:
    """Peak resident bytes of a process that imports torch."""
    return measure([sys.executable, "-c", "import torch"], notes).host_bytes


def table(
    results: Mapping[str, Sequence[Run]], source_bytes: int, torch_bytes: int
) -> Iterator[str]:
    """The lines of the table, GitHub's markdown."""
    yield (
        "| way | seconds (min-max) | work alone | x faster copy | GB/s | CPU s | host MB | GPU MB |"
    )
    yield "|---|--:|--:|--:|--:|--:|--:|--:|"
    copies = [median(results[way], "work") for way in ("cp", "copy") if way in results]
    base = min(copies, default=math.nan)
    for way, runs in results.items():
        seconds, work = [run.seconds for run in runs], median(runs, "work")
        host = max(0, max(run.host_bytes for run in runs) - torch_bytes)
        device = max(run.device_bytes for run in runs)
        yield (
            f"| {way} | {median(runs, 'seconds'):.2f} ({min(seconds):.2f}-{max(seconds):.2f}) "
            f"| {work:.2f} | {work / base:.2f} | {source_bytes / work / 1e9:.2f} "
            f"| {median(runs, 'cpu_seconds'):.1f} | {host / 1e6:.0f} | {device / 1e6:.0f} |"
        )


def median(runs: Sequence[Run], what: str) -> float:
    return statistics.median(getattr(run, what) for run in runs)


def plot(results: Mapping[str, Sequence[Run]], source_bytes: int, title: str, path: Path) -> None:
    """Bars: gigabytes of the source per second, without the start of the processes."""
    from matplotlib import pyplot

    ways = list(reversed(results))
    speeds = [source_bytes / median(results[way], "work") / 1e9 for way in ways]
    ours = ["tab:blue" if way.startswith("tp") else "tab:gray" for way in ways]
    figure, axes = pyplot.subplots(figsize=(7, 0.4 * len(ways) + 1), layout="constrained")
    axes.bar_label(axes.barh(ways, speeds, color=ours), fmt=" %.2f")
    axes.set(xlabel="GB of the checkpoint per second", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def facts(
    model: Path, source_bytes: int, runs: int, device: str, full_cache: bool
) -> Iterator[str]:
    """What the numbers depend on."""
    files = len(list(model.glob("*.safetensors")))
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "safetensors", "numpy"))
    yield f"{model.name}: {source_bytes / 1e9:.3f} GB in {files} files, {device}"
    yield f"{platform.machine()}, {CORES} cores ({processor()})"
    yield f"Python {platform.python_version()}, {packages}"
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    cache = "warm and full" if full_cache else "warm"
    yield f"median of {runs} runs after one warm-up, page cache {cache}; load before: {load}"


def processor() -> str:
    """The processor's name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


# The ways that run in a process of this script.


def child(way: str, arguments: Sequence[str]) -> None:
    """Run one way, and note how long its work took and what the GPU held.

    Of several processes only the first takes notes: it ends last, since it waits for the others.
    """
    jobs: dict[str, Callable[[], object]] = {
        "copy": lambda: copy(*map(Path, arguments)),
        "reload": lambda: reload(*map(Path, arguments)),
        "tpgptq": lambda: tpgptq(arguments),
        "layers": lambda: layers(Path(arguments[0]), arguments[1], [int(a) for a in arguments[2:]]),
    }
    if way == "reload":
        import safetensors.torch  # noqa: F401  # not part of the work
    if way == "tpgptq":
        prepare(arguments)
    started = time.perf_counter()
    jobs[way]()
    if int(os.environ.get("RANK", 0)):
        return
    notes = {"work": time.perf_counter() - started}
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_initialized():
            notes["device"] = torch.cuda.max_memory_reserved()
    Path(os.environ["BENCH_NOTES"]).write_text(json.dumps(notes))


def prepare(arguments: Sequence[str]) -> None:
    """Import and start what a conversion needs, before the clock runs."""
    import tpgptq_convert.convert
    import tpgptq_convert.repack_cpu

    if "cuda" in " ".join(arguments):
        import torch

        import tpgptq_convert.repack_gpu

        torch.zeros(1, device="cuda")
    if "verify" in arguments or "--no-verify" not in arguments:
        import tpgptq_convert.verify  # noqa: F401


def tpgptq(arguments: Sequence[str]) -> None:
    from tpgptq_convert.cli import cli

    cli(list(arguments), standalone_mode=False)


def copy(model: Path, out: Path, *hashed: Path) -> None:
    """Copy every file in stretches, with as many threads as there are cores, and beside that take
    the SHA-256 of every file of `hashed`."""
    out.mkdir()
    with ThreadPoolExecutor(CORES) as pool, ThreadPoolExecutor(CORES) as hashers:
        jobs = []
        for path in files_of(model):
            (out / path.name).touch()
            for begin in range(0, path.stat().st_size, STRETCH):
                jobs.append(pool.submit(copy_stretch, path, out / path.name, begin))
        jobs += [
            hashers.submit(digest, path) for directory in hashed for path in files_of(directory)
        ]
        for job in jobs:
            job.result()


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_file())


def copy_stretch(source: Path, target: Path, begin: int) -> None:
    """Inside the kernel, as cp does it."""
    with source.open("rb", buffering=0) as reader, target.open("r+b", buffering=0) as writer:
        end = min(begin + STRETCH, source.stat().st_size)
        while begin < end:
            begin += os.copy_file_range(reader.fileno(), writer.fileno(), end - begin, begin, begin)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reload(model: Path, out: Path) -> None:
    """Load and save every weight file."""
    from safetensors.torch import load_file, save_file

    out.mkdir()
    for path in sorted(model.glob("*.safetensors")):
        save_file(load_file(path), out / path.name, metadata={"format": "pt"})


# One block in memory: TGIS's way, and this executor.


def layers(model: Path, device: str, tps: Sequence[int]) -> None:
    """Print what a block's layers cost, as markdown."""
    import torch

    from tpgptq_convert.checkpoint import read_checkpoint
    from tpgptq_convert.plan import make_plans
    from tpgptq_convert.repack import Packed, open_device, repack

    checkpoint, place = read_checkpoint(model), open_device(device)
    block = checkpoint.blocks[0]
    packed = {layer.name: Packed.read(checkpoint, layer, place.allocate) for layer in block}
    tensors = {
        f"{layer.name}.{part}": torch.from_numpy(getattr(packed[layer.name], part))
        for layer in block
        for part in ("qweight", "qzeros", "scales")
    } | {f"{layer.name}.g_idx": torch.from_numpy(layer.g_idx) for layer in block}
    prefix = block[0].name.removesuffix(block[0].linear.name)
    nbytes = sum(layer.nbytes for layer in block)
    lines = ["| a block in memory | ms | GB/s | times TGIS's speed |", "|---|--:|--:|--:|"]
    for tp in tps:
        (plan,) = make_plans(checkpoint, [tp])
        shards = plan.block(0)

        def ours(shards: Mapping = shards) -> None:
            with ThreadPoolExecutor(CORES if device == "cpu" else place.threads) as pool:
                list(pool.map(one, block * BLOCKS, [shards] * len(block) * BLOCKS))

        def one(layer, shards: Mapping) -> None:
            with place.work():
                list(repack(packed[layer.name], [shards[layer.name]], checkpoint.quant, place))

        def theirs(tp: int = tp) -> None:
            for layer, parts in tgis_block(tensors, prefix).items():
                for rank in range(tp):
                    tgis_slice(layer, parts, rank, tp)

        slow, fast = fastest(theirs, 2), fastest(ours, 5) / BLOCKS
        rows = [(f"tp {tp}: TGIS's way", slow), (f"tp {tp}: this", fast)]
        if device != "cpu":
            rows.append((f"tp {tp}: this, on the GPU alone", on_gpu(checkpoint, packed, shards)))
        for name, seconds in rows:
            lines.append(
                f"| {name} | {seconds * 1e3:.1f} | {nbytes / seconds / 1e9:.2f} "
                f"| {slow / seconds:.1f} |"
            )
    print("\n".join([*lines, "", *links(device)]), file=sys.stderr)


def on_gpu(checkpoint, packed: Mapping, shards: Mapping) -> float:
    """Seconds for the words of a block when they and their index vectors are on the GPU."""
    import torch

    from tpgptq_convert.plan import stacked
    from tpgptq_convert.repack_gpu import gather

    jobs = []
    for layer in checkpoint.blocks[0]:
        vectors = [
            torch.from_numpy(stacked([getattr(shard, name) for shard in shards[layer.name]])).cuda()
            for name in ("rows", "cols")
        ]
        jobs.append((torch.from_numpy(packed[layer.name].qweight).cuda(), *vectors))

    def job() -> None:
        for words, rows, cols in jobs:
            gather(words, rows, cols, checkpoint.quant.bits, checkpoint.quant.neutral, None)
        torch.cuda.synchronize()

    return fastest(job, 5)


def fastest(job: Callable[[], object], times: int) -> float:
    """Seconds, after one warm-up."""
    job()
    found = []
    for _ in range(times):
        started = time.perf_counter()
        job()
        found.append(time.perf_counter() - started)
    return min(found)


def links(device: str) -> Iterator[str]:
    """Speeds of what a conversion can't do without, GB/s."""
    import torch

    data = bytes(1 << 28)
    seconds = fastest(lambda: hashlib.sha256(data).digest(), 2)
    yield f"SHA-256 on one core: {len(data) / seconds / 1e9:.2f} GB/s"
    if device == "cpu":
        return
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(1 << 28, dtype=torch.uint8, device=device)

    def both_ways() -> None:
        there.copy_(host, non_blocking=True)
        host.copy_(there, non_blocking=True)
        torch.cuda.synchronize()

    yield f"to the GPU and back: {2 * len(host) / fastest(both_ways, 5) / 1e9:.1f} GB/s"


def tgis_block(tensors: Mapping[str, Tensor], block: str) -> dict[str, dict[str, Tensor]]:
    """The layers of a block with their rows and columns in order, not yet sliced.

    Column-parallel layers: rows by group, a slice of the columns; gate and up have their columns in
    the order of down's rows. down: rows by group, a slice of them. o_proj: rows by group, the whole
    of it on every rank. TGIS did this in memory on every rank; here it is done once for all.
    """
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
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, help="directory with a GPTQ checkpoint")
    which.add_argument("--preset", help="make one of this shape; see make_synthetic.py")
    parser.add_argument("--blocks", type=int, help="of the preset; default: all")
    parser.add_argument("--shard-size", type=int, default=5 * 10**9, help="bytes of its files")
    parser.add_argument("--tp", type=int, action="append", help="degree; may be repeated")
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each way")
    parser.add_argument("--ways", default="", help="only those that this regular expression finds")
    parser.add_argument("--work", type=Path, required=True, help="where everything is written")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--processes", type=int, default=1, help="of the way by torchrun")
    parser.add_argument("--full-cache", action="store_true", help="begin with no free memory")
    parser.add_argument("--plot", type=Path, help="draw the speeds; needs matplotlib")
    parser.add_argument("--title", default="", help="of the plot")
    args = parser.parse_args()
    args.tp = args.tp or [2]
    return args


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
        return
    args = parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=args.work) as directory:
        work = Path(directory)
        model = args.model
        if args.preset:
            model = work / args.preset
            make = [sys.executable, str(Path(__file__).with_name("make_synthetic.py")), str(model)]
            make += ["--preset", args.preset, "--device", args.device]
            make += ["--max-shard-size", str(args.shard_size)]
            make += ["--blocks", str(args.blocks)] if args.blocks else []
            subprocess.run(make, check=True)
        size = sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
        lines = list(facts(model, size, args.runs, args.device, args.full_cache))
        torch_bytes = baseline(work / "notes.json")
        results: dict[str, list[Run]] = {}
        with contextlib.suppress(KeyboardInterrupt):
            measure_all(model, args, work, results)
        print("\n".join([*lines, "", *table(results, size, torch_bytes), ""]), flush=True)
        degrees = [str(tp) for tp in args.tp]
        measure(
            [sys.executable, __file__, "--child", "layers", str(model), args.device, *degrees],
            work / "notes.json",
        )
        if args.plot:
            plot(results, size, args.title or model.name, args.plot)


if __name__ == "__main__":
    main()
