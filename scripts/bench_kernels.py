"""Time one linear layer's product on a GPU: the runtime's kernels beside other kernels for int4.

The four linears of a block of Llama-2-70B, as one rank of each `--tp` has them. Ours are shards as
tpgptq-convert writes them, their gathers included; o_proj has its buckets of 32 rows, filled up as
a random order of rows needs. The others are given plain groups of 128 in consecutive rows and no
gather, which is what they are fast at; Triton's matmul_248 takes the act-ordered rank's slice as it
is. Each figure is the median of replays of a CUDA graph of one call after the other, over as many
copies of the weights as don't fit the L2 cache.

    python scripts/bench_kernels.py --tp 2 --tokens 1 --tokens 16
    python scripts/bench_kernels.py --vllm-library _C_stable_libtorch.abi3.so --matmul248 FILE

The first takes ours, float16 by cuBLAS and the bandwidth; the second adds Marlin, Machete and
exllama as vLLM 0.26 builds them (its package must be importable), and matmul_248 from a file that
has `matmul248(a, qweight, scales, qzeros, g_idx)`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpgptq_convert import tpgptq_runtime as runtime
from tpgptq_convert.packing import pack_rows, unpack_rows

HIDDEN, INTERMEDIATE, QKV, GROUP = 8192, 28672, 8192 + 2 * 1024, 128
ROTATED = 220e6  # bytes of weights, so that none is found in the cache
CALLS = 24
Call = Callable[[Tensor], Tensor]


def layers(tp: int) -> dict[str, tuple[int, int]]:
    """(K, N) of a rank's layers."""
    return {
        "qkv": (HIDDEN, QKV // tp),
        "o": (HIDDEN // tp, HIDDEN),
        "gate_up": (HIDDEN, 2 * INTERMEDIATE // tp),
        "down": (INTERMEDIATE // tp, HIDDEN),
    }


def median_us(calls: list[Callable[[], Any]], replays: int) -> float:
    """Microseconds of one call, from graphs of at least `CALLS`, one after the other."""
    calls = calls * -(-CALLS // len(calls))
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[3:])


@triton.jit
def _read(source, out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0), tl.max(tl.load(source + i), 0))


def read_bandwidth() -> float:
    """Bytes per second that a kernel which does nothing else reads."""
    source = torch.randint(0, 99, (2**28,), dtype=torch.int32, device="cuda")
    out = torch.empty(2**16, dtype=torch.int32, device="cuda")
    us = median_us([lambda: _read[2**16,](source, out, BLOCK=4096, num_warps=8)], 10)
    return 2**30 / us * 1e6


def integers(k: int, n: int, groups: int) -> dict[str, Tensor]:
    """Random int4 values as GPTQ packs them, symmetric."""
    words = torch.randint(-(2**31), 2**31, (k // 8, n), dtype=torch.int64, device="cuda")
    return {
        "qweight": words.int(),
        "qzeros": torch.full((groups, n // 8), 0x77777777, dtype=torch.int32, device="cuda"),
        "scales": (torch.rand(groups, n, device="cuda") * 0.004 + 0.002).half(),
    }


def plain_shard(k: int, n: int, perm: bool) -> dict[str, Tensor]:
    tensors = integers(k, n, k // GROUP)
    if perm:
        tensors["perm"] = torch.randperm(k, device="cuda").int()
    return tensors


def bucketed_shard(k: int, n: int, tp: int, row_group: int = 32) -> dict[str, Tensor]:
    """A rank's rows of o_proj in a random order: each group's filled up to whole `row_group`s."""
    group = torch.arange(k * tp, device="cuda") // GROUP
    mine = torch.bincount(
        group[torch.randperm(k * tp, device="cuda")[:k]], minlength=k * tp // GROUP
    )
    buckets = (mine + row_group - 1) // row_group
    buckets[-1] += -buckets.sum() % (128 // row_group)
    rows = int(buckets.sum()) * row_group
    start = (buckets.cumsum(0) - buckets) * row_group
    at = torch.arange(rows, device="cuda")
    of = torch.repeat_interleave(torch.arange(len(mine), device="cuda"), buckets * row_group)
    dead = at - start[of] >= mine[of]
    tensors = integers(rows, n, rows // row_group)
    values = unpack_rows(tensors["qweight"], 4)
    values[dead] = 8
    tensors["qweight"] = pack_rows(values, 4)
    tensors["perm"] = torch.randint(0, k, (rows,), device="cuda", dtype=torch.int32)
    return tensors


def ours_of(layer: str, k: int, n: int, tp: int) -> runtime.Arranged:
    if layer == "o":
        return runtime.arrange([bucketed_shard(k, n, tp)])
    return runtime.arrange([plain_shard(k, n, perm=layer != "down")])


class Ways:
    """Ways to multiply, each a function of (layer, K, N, tp) that makes weights and a call."""

    def __init__(self, library: Path | None, matmul248: Path | None) -> None:
        self.matmul248: Any = None
        if library:
            torch.ops.load_library(str(library))
        self.c = torch.ops._C if library else None
        if matmul248:
            spec = importlib.util.spec_from_file_location("matmul248", matmul248)
            assert spec
            assert spec.loader
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            self.matmul248 = module.matmul248
        self.empty = torch.empty(0, dtype=torch.int32, device="cuda")
        self.locks = torch.zeros(4096, dtype=torch.int32, device="cuda")

    def names(self) -> list[str]:
        peers = ["marlin", "machete", "exllama"] if self.c is not None else []
        return ["ours", *peers, *(["matmul_248"] if self.matmul248 else []), "fp16"]

    def ours(self, layer: str, k: int, n: int, tp: int) -> Call:
        arranged = ours_of(layer, k, n, tp)
        return lambda x: runtime.multiply(x, arranged)

    def ours_plain(self, layer: str, k: int, n: int, tp: int) -> Call:
        """Plain groups of 128 and no gather, as the others have it."""
        arranged = runtime.arrange([plain_shard(k, n, perm=False)])
        return lambda x: runtime.multiply(x, arranged)

    def fp16(self, layer: str, k: int, n: int, tp: int) -> Call:
        weight = torch.randn(k, n, device="cuda").half()
        return lambda x: x @ weight

    def marlin(self, layer: str, k: int, n: int, tp: int) -> Call:
        from vllm.scalar_type import scalar_types

        tensors = integers(k, n, k // GROUP)
        order = [i + 8 * j for i in range(8) for j in range(8)]
        scales = tensors["scales"].view(-1, 64)[:, order].reshape(-1, n).contiguous()
        words = self.c.gptq_marlin_repack(tensors["qweight"], self.empty, k, n, 4, False)
        # a, out, words, bias, scales, scales of a and out, zeros, g_idx, perm, locks, type, sizes,
        # whole K, no atomics, sums in float32, zeros are integers
        return lambda x: self.c.marlin_gemm(
            *(x, None, words, None, scales, None, None, None, self.empty, self.empty, self.locks),
            *(scalar_types.uint4b8.id, x.shape[0], n, k, True, False, True, False),
        )

    def machete(self, layer: str, k: int, n: int, tp: int) -> Call:
        from vllm.scalar_type import scalar_types

        tensors, kind = integers(k, n, k // GROUP), scalar_types.uint4b8.id
        words = self.c.machete_prepack_B(
            tensors["qweight"].t().contiguous().t(), torch.float16, kind, torch.float16
        )
        return lambda x: self.c.machete_mm(
            x, words, kind, torch.float16, tensors["scales"], None, GROUP, None, None, None
        )

    def exllama(self, layer: str, k: int, n: int, tp: int) -> Call:
        tensors = integers(k, n, k // GROUP)
        words, zeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
        self.c.gptq_shuffle(words, self.empty, 4)
        return lambda x: self.c.gptq_gemm(x, words, zeros, scales, self.empty, True, False, 4)

    def matmul_248(self, layer: str, k: int, n: int, tp: int) -> Call:
        whole = k if layer in ("qkv", "gate_up") else k * tp
        tensors = integers(k, n, whole // GROUP)
        group = torch.arange(whole, device="cuda", dtype=torch.int32) // GROUP
        g_idx = group[torch.randperm(whole, device="cuda")[:k]].contiguous()
        words, zeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
        return lambda x: self.matmul248(x, words, scales, zeros, g_idx)


def measure(
    way: Callable[..., Call], case: tuple[str, int, int, int], tokens: list[int], replays: int
) -> list[float | str]:
    layer, k, n, tp = case
    size = k * n * (2 if way.__name__ == "fp16" else 0.5)
    try:
        calls = [way(layer, k, n, tp) for _ in range(max(2, int(ROTATED / size) + 1))]
        results: list[float | str] = []
        for m in tokens:
            x = torch.randn(m, k, device="cuda").half() * 0.1
            # the lambda keeps this pass's x
            results.append(median_us([lambda c=c, x=x: c(x) for c in calls], replays))  # type: ignore[misc]
        return results
    except (RuntimeError, ImportError, AttributeError) as problem:
        return [str(problem).partition("\n")[0][:40]] * len(tokens)


def table(
    tp: int, tokens: list[int], found: dict[str, dict[str, list[Any]]], bandwidth: float
) -> Iterator[str]:
    """Markdown: a line for each number of tokens and layer, and their sum."""
    names = list(found)
    for i, m in enumerate(tokens):
        yield f"\ntp {tp}, {m} token{'s' * (m > 1)}: microseconds\n"
        yield "| layer | K x N | floor | " + " | ".join(names) + " |"
        yield "| --- | --- |" + " --: |" * (1 + len(names))
        floors = []
        for layer, (k, n) in layers(tp).items():
            floors.append(k * n * (0.5 + 2 / GROUP) / bandwidth * 1e6)
            cells = [shown(found[name][layer][i]) if layer in found[name] else "" for name in names]
            yield f"| {layer} | {k} x {n} | {floors[-1]:.1f} | " + " | ".join(cells) + " |"
        sums = []
        for name in names:
            figures = [found[name][layer][i] for layer in layers(tp) if layer in found[name]]
            whole = len(figures) == len(floors) and all(isinstance(f, float) for f in figures)
            sums.append(shown(sum(figures)) if whole else "")
        yield f"| **layer** | | {sum(floors):.1f} | " + " | ".join(sums) + " |"


def shown(figure: float | str) -> str:
    return figure if isinstance(figure, str) else f"{figure:.1f}"


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results["tp"]), figsize=(4.5 * len(results["tp"]), 3.6))
    for axis, (tp, found) in zip(
        axes if len(results["tp"]) > 1 else [axes], results["tp"].items(), strict=True
    ):
        for name, by_layer in found.items():
            lines = [by_layer.get(layer) for layer in layers(int(tp))]
            if all(lines) and all(isinstance(f, float) for line in lines for f in line):
                totals = [sum(figures) for figures in zip(*lines, strict=True)]
                axis.plot(results["tokens"], totals, marker="o", label=name)
        axis.set(title=f"tp {tp}", xlabel="tokens", xscale="log", yscale="log")
        axis.set_xticks(results["tokens"], [str(m) for m in results["tokens"]])
        axis.grid(alpha=0.3)
    (axes[0] if len(results["tp"]) > 1 else axes).set_ylabel("µs, four linears of a block")
    (axes[0] if len(results["tp"]) > 1 else axes).legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tp", type=int, action="append", help="default: 2, 4 and 8")
    parser.add_argument("--tokens", type=int, action="append", help="default: 1 4 16 64 256 1024")
    parser.add_argument("--ways", default="", help="only those that this regular expression finds")
    parser.add_argument("--vllm-library", type=Path, help="vLLM 0.26's compiled kernels")
    parser.add_argument("--matmul248", type=Path, help="a file with auto-gptq's Triton kernel")
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--tune", type=Path, help="time launches of ours first; keep them here")
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--plot", type=Path, help="draw the sums; needs matplotlib")
    args = parser.parse_args()
    tps, tokens = args.tp or [2, 4, 8], args.tokens or [1, 4, 16, 64, 256, 1024]
    ways = Ways(args.vllm_library, args.matmul248)
    torch.manual_seed(0)
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(
        f"a kernel that only reads: {bandwidth / 1e12:.2f} TB/s; the floor is the bytes over that"
    )
    results: dict[str, Any] = {"bandwidth": bandwidth, "tokens": tokens, "tp": {}}
    for tp in tps:
        if args.tune:
            own = [ours_of(layer, k, n, tp) for layer, (k, n) in layers(tp).items()]
            runtime.tune(own, tokens, path=args.tune)
        found: dict[str, dict[str, list[Any]]] = {}
        for name in [name for name in ways.names() if re.search(args.ways, name)]:
            found[name] = {
                layer: measure(getattr(ways, name), (layer, k, n, tp), tokens, args.replays)
                for layer, (k, n) in layers(tp).items()
            }
        if "ours" in found:
            k, n = layers(tp)["o"]
            found["ours, plain groups"] = {
                "o": measure(ways.ours_plain, ("o", k, n, tp), tokens, args.replays)
            }
        results["tp"][tp] = found
        print("\n".join(table(tp, tokens, found, bandwidth)), flush=True)
        torch.cuda.empty_cache()
    tensors = plain_shard(HIDDEN, INTERMEDIATE, perm=True)
    torch.cuda.synchronize()
    start = time.perf_counter()
    runtime.arrange([tensors])
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    size = HIDDEN * INTERMEDIATE / 2e6
    print(f"\nrearranging gate_up at load: {seconds * 1e3:.0f} ms for {size:.0f} MB")
    if args.json:
        args.json.write_text(json.dumps(results))
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
