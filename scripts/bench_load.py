"""Measure how long vLLM's workers load outputs, and how much of the weight files each one reads.

The files are evicted from the page cache before each load. What a worker reads is the size of the
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
import tempfile
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


def mapped(directory: Path) -> dict[int, int]:
    """Bytes of the directory's weight files in each process's page tables."""
    found: dict[int, int] = {}
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if f"{directory}/model" not in maps.read_text():
                continue
            ours = False
            for line in maps.with_name("smaps").read_text().splitlines():
                if re.match(r"[0-9a-f]+-", line):
                    ours = f"{directory}/model" in line
                elif ours and line.startswith("Rss:"):
                    pid = int(maps.parent.name)
                    found[pid] = found.get(pid, 0) + int(line.split()[1]) * 1024
    return found


def measure(out: Path, tp: int, extra: dict[str, Any]) -> tuple[float, list[int]]:
    """(seconds to load, bytes read by each worker)."""
    evict(out)
    with tempfile.TemporaryFile("w+") as log:
        job = engine(out, tp, extra)
        process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(job)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | settings(tp) | {"VLLM_LOGGING_LEVEL": "INFO"},
        )
        most: dict[int, int] = {}
        while process.poll() is None:
            for pid, size in mapped(out).items():
                most[pid] = max(size, most.get(pid, 0))
            time.sleep(0.02)
        log.seek(0)
        text = log.read()
    if process.returncode:
        raise SystemExit(text[-3000:])
    seconds = [float(s) for s in re.findall(r"Model loading took .*? ([\d.]+) seconds", text)]
    return max(seconds), sorted(most.values())


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
