"""Measure vLLM on a converted checkpoint against the same model in other forms, side by side.

Every form is loaded by an engine of its own; all stay loaded on the same devices and answer in
turns, so that what the machine does to one it does to all. Tokens per second of greedy decoding for
several batch sizes, from a prompt of 16 tokens, and prompt tokens per second of a prompt of 1,024;
medians of the rounds. All engines load at the same time; the seconds are those that the slowest
worker says it took for the model, and, from the start to the first request, the whole engine's. The
forms are

    name=DIR            a checkpoint, loaded as it stands
    name=runtime:DIR    an output of this package, on the runtime module's kernels
    name=vllm:DIR       the same on the kernels that vLLM chooses
    name=fp16:DIR       the model that DIR describes, not quantised, with random weights

The first is the one the others are compared with:

    python scripts/make_synthetic.py model --preset llama-2-7b
    python scripts/make_synthetic.py plain --preset llama-2-7b --plain
    tpgptq convert --tp 1 model out
    python scripts/bench_vllm.py plain=plain ours=out vllm=vllm:out act-order=model fp16=fp16:model
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCHES = (1, 16, 64)
PROMPT, PREFILL = 16, 1024


def work(job: dict[str, Any]) -> None:
    """An engine: loads, then answers a line of stdin with a line of `replies`."""
    from vllm import LLM, SamplingParams

    replies = os.fdopen(job["fd"], "w")
    began = time.monotonic()
    llm = LLM(**job["engine"])
    print(json.dumps(round(time.monotonic() - began, 1)), file=replies, flush=True)
    draw = random.Random(0)
    for line in sys.stdin:
        ask = json.loads(line)
        prompts = [
            {"prompt_token_ids": [draw.randrange(3, job["vocab"]) for _ in range(ask["prompt"])]}
            for _ in range(ask["batch"])
        ]
        params = SamplingParams(
            temperature=0, max_tokens=ask["new"], ignore_eos=True, detokenize=False
        )
        began = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        print(json.dumps(time.perf_counter() - began), file=replies, flush=True)
    llm.llm_engine.engine_core.shutdown()


class Engine:
    """A form of the model, loaded in a process of its own."""

    def __init__(self, name: str, form: str, arguments: argparse.Namespace, scratch: Path) -> None:
        self.name = name
        self.seconds: dict[str, list[float]] = {}
        kind, _, path = form.rpartition(":")
        directory = Path(path)
        config = json.loads((directory / "config.json").read_text())
        extra: dict[str, Any] = {}
        if kind in ("runtime", "vllm"):
            extra["additional_config"] = {"tpgptq_kernels": kind}
        if kind == "fp16":
            config.pop("quantization_config", None)
            directory = scratch / name
            directory.mkdir()
            (directory / "config.json").write_text(json.dumps(config))
            extra["load_format"] = "dummy"
        engine = {
            "model": str(directory),
            "tensor_parallel_size": arguments.tp,
            "dtype": "float16",
            "skip_tokenizer_init": True,
            "max_model_len": 2048,
            "max_num_seqs": max(BATCHES),
            "kv_cache_memory_bytes": arguments.kv_cache << 20,
            "gpu_memory_utilization": 0.1,  # all engines share the devices
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            "seed": 0,
            **extra,
            **arguments.engine,
        }
        read, write = os.pipe()
        job = {"engine": engine, "vocab": config["vocab_size"], "fd": write}
        self.log = scratch / f"{name}.log"
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            pass_fds=[write],
            text=True,
        )
        os.close(write)
        self.replies = os.fdopen(read)

    def reply(self) -> float:
        line = self.replies.readline()
        if not line:
            lines = self.log.read_text(errors="replace").splitlines()
            words = [text for text in lines if "Error" in text] or lines
            raise SystemExit(f"{self.name} failed: {words[-1] if words else 'no output'}")
        return float(line)

    def ask(self, label: str, batch: int, prompt: int, new: int) -> None:
        assert self.process.stdin
        job = {"batch": batch, "prompt": prompt, "new": new}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        self.seconds.setdefault(label, []).append(self.reply())

    def logged(self, pattern: str) -> list[str]:
        """What a pattern's one group matches in vLLM's log, each once, in order."""
        return sorted(set(re.findall(pattern, self.log.read_text(errors="replace"))))

    def loading(self) -> str:
        """Seconds that the slowest worker took to read the model and prepare its kernels."""
        seconds = self.logged(r"Model loading took .*?([\d.]+) seconds")
        return str(round(max(map(float, seconds)), 1)) if seconds else "-"

    def kernels(self) -> str:
        """The kernels for the linear layers."""
        return ", ".join(self.logged(r"Using (\w+)LinearKernel for")) or "-"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("forms", nargs="+", metavar="name=[KIND:]DIR")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--kv-cache", type=int, default=6144, help="MB for each engine")
    parser.add_argument("--engine", type=json.loads, default={}, help="more vLLM arguments, JSON")
    parser.add_argument("--logs", type=Path, help="keep the engines' logs in this directory")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        scratch = arguments.logs or Path(directory)
        scratch.mkdir(parents=True, exist_ok=True)
        engines = [
            Engine(name, form, arguments, scratch)
            for name, _, form in (text.partition("=") for text in arguments.forms)
        ]
        loads = [engine.reply() for engine in engines]
        new = arguments.new_tokens
        asks = [(f"decode, batch {batch}", batch, PROMPT, new) for batch in BATCHES]
        asks.append((f"prefill of {PREFILL}", 1, PREFILL, 1))
        for turn in range(arguments.rounds + 1):
            for ask in asks:
                for engine in engines[turn % len(engines) :] + engines[: turn % len(engines)]:
                    engine.ask(*ask)
            if turn == 0:  # the first round warms up
                for engine in engines:
                    engine.seconds.clear()
        print("| tokens/s |" + "".join(f" {engine.name} |" for engine in engines))
        print("| --- |" + " --: |" * len(engines))
        first = engines[0].seconds
        for label, batch, prompt, made in asks:
            tokens = batch * (prompt if made == 1 else made)
            cells = []
            for engine in engines:
                seconds = statistics.median(engine.seconds[label])
                ratios = [a / b for a, b in zip(first[label], engine.seconds[label], strict=True)]
                cells.append(f" {tokens / seconds:,.0f} ({statistics.median(ratios):.3f}) |")
            print(f"| {label} |" + "".join(cells))
        print("| seconds, the model |" + "".join(f" {engine.loading()} |" for engine in engines))
        print("| seconds, the engine |" + "".join(f" {load} |" for load in loads))
        print("| kernels |" + "".join(f" {engine.kernels()} |" for engine in engines))
        for engine in engines:
            engine.process.stdin.close()
            engine.process.wait(60)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(json.loads(sys.argv[2]))
    else:
        main()
