"""Measure how long vLLM's workers load outputs, and how much of the weight files each one reads.

The files are evicted from the page cache before each load. Loading includes what vLLM's kernels do
to the weights, which on CPUs takes longer than reading them. What a worker reads is the size of the
pages of weight files that it has mapped, sampled while it loads (Linux; a fault maps a few pages
around the one touched, so contiguous reading is counted exactly and scattered reading generously).

    tpgptq convert --tp 2 model ranks
    tpgptq convert --tp 2 --layout merged model merged
    python scripts/bench_load.py --tp 2 ranks merged
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from compare_vllm import engine, settings


def load(job: dict[str, Any]) -> None:
    from vllm import LLM

    LLM(**job).llm_engine.engine_core.shutdown()


def evict(directory: Path) -> None:
    os.sync()
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def mapped(directory: Path) -> dict[tuple[int, str], int]:
    """Bytes of each weight file in each process's page tables."""
    found: dict[tuple[int, str], int] = {}
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if f"{directory}/model" not in maps.read_text():
                continue
            name = ""
            for line in maps.with_name("smaps").read_text().splitlines():
                if re.match(r"[0-9a-f]+-", line):
                    name = (
                        line.rpartition(f"{directory}/model")[2] if str(directory) in line else ""
                    )
                elif name and line.startswith("Rss:"):
                    key = int(maps.parent.name), name
                    found[key] = found.get(key, 0) + int(line.split()[1]) * 1024
    return found


def measure(out: Path, tp: int, extra: dict[str, Any]) -> tuple[float, list[int]]:
    """(seconds to load, bytes read by each worker)."""
    evict(out)
    process = subprocess.Popen(
        [sys.executable, __file__, "--worker", json.dumps(engine(out, tp, extra))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | settings(tp) | {"VLLM_LOGGING_LEVEL": "INFO"},
    )
    lines: list[tuple[float, str]] = []

    def listen() -> None:
        for line in process.stdout or ():
            lines.append((time.monotonic(), line))

    listener = threading.Thread(target=listen)
    listener.start()
    most: dict[tuple[int, str], int] = {}
    while process.poll() is None:
        for key, size in mapped(out).items():
            most[key] = max(size, most.get(key, 0))
        time.sleep(0.02)
    listener.join()
    if process.returncode:
        raise SystemExit("".join(line for _, line in lines[-40:]))
    begin = min(at for at, line in lines if "Starting to load model" in line)
    end = min(at for at, line in lines if at > begin and re.search("KV cache|loading took", line))
    workers = {pid for pid, _ in most}
    read = [sum(size for (p, _), size in most.items() if p == pid) for pid in workers]
    return end - begin, sorted(read)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("outs", nargs="+", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", type=json.loads, default={}, help="more vLLM arguments, JSON")
    arguments = parser.parse_args()
    outs = [out.resolve() for out in arguments.outs]
    found: dict[Path, list[tuple[float, list[int]]]] = {out: [] for out in outs}
    for _ in range(arguments.rounds):
        for out in outs:
            found[out].append(measure(out, arguments.tp, arguments.engine))
    print("| output | weight files, MB | seconds to load (min-max) | MB read by each worker |")
    print("| --- | --: | --: | --: |")
    for out, rounds in found.items():
        size = sum(path.stat().st_size for path in out.glob("model*.safetensors"))
        seconds = [s for s, _ in rounds]
        read = ", ".join(f"{worker / 1e6:.0f}" for worker in rounds[-1][1])
        print(
            f"| {out.name} | {size / 1e6:.0f} | {statistics.median(seconds):.1f} "
            f"({min(seconds):.1f}-{max(seconds):.1f}) | {read} |"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        load(json.loads(sys.argv[2]))
    else:
        main()
