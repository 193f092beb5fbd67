"""Compare what vLLM answers on a converted checkpoint with the float32 source: log-probabilities
and greedy tokens.

The source is dequantised to float32 and run by transformers; vLLM runs the output (or, to see what
it makes of one, any other checkpoint) through its Python interface or its HTTP server. Needs the
package, transformers and vLLM.

    python scripts/compare_vllm.py MODEL OUT --tp 2

Exits with 1 if a log-probability is off by more than 0.04, or if a greedy token differs where the
source prefers its own by more than 0.02.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LOGPROB_BOUND = 0.04
MARGIN_BOUND = 0.02
TOP = 20  # log-probabilities compared at each position, beside that of the prompt's own token
NEW = 16  # greedy tokens
PROMPT_LENGTHS = (5, 17, 33)

Answers = list[dict[str, Any]]


def make_reference(model: Path, reference: Path) -> None:
    """What the float32 source says to random prompts, as a safetensors file."""
    from compare_tokens import source_model

    with torch.inference_mode():
        source = source_model(model)
        draw = torch.Generator().manual_seed(7)
        found: dict[str, torch.Tensor] = {}
        for i, length in enumerate(PROMPT_LENGTHS):
            ids = torch.randint(3, source.config.vocab_size, (1, length), generator=draw)
            for _ in range(NEW):
                best = source(ids).logits[0, -1].argmax()
                ids = torch.cat([ids, best.view(1, 1)], 1)
            found[f"{i}.ids"] = ids[0]
            found[f"{i}.logprobs"] = source(ids).logits[0, :-1].float().log_softmax(-1)
    save_file(found, reference)


def prompts_of(reference: Path) -> list[list[int]]:
    found = load_file(reference)
    return [found[f"{i}.ids"][:-NEW].tolist() for i in range(len(PROMPT_LENGTHS))]


def judge(reference: Path, answers: Answers) -> dict[str, Any]:
    """How far the answers are from the reference."""
    found = load_file(reference)
    worst, positions, same = 0.0, 0, 0
    flips = []
    for i, answer in enumerate(answers):
        ids, expected = found[f"{i}.ids"].tolist(), found[f"{i}.logprobs"]
        start = len(ids) - NEW
        for at, stated in enumerate(answer["prompt_logprobs"]):  # of the token at + 1
            for token, logprob in stated.items():
                off = abs(logprob - float(expected[at, int(token)]))
                worst = max(worst, off if off == off else float("inf"))
            positions += 1
        for at, (token, own) in enumerate(zip(answer["tokens"], ids[start:], strict=True)):
            if token != own:
                logprobs = expected[start + at - 1]
                flips.append(round(float(logprobs[own] - logprobs[token]), 4))
                break
            same += 1
    return {
        "worst": round(worst, 4),
        "positions": positions,
        "same": same,
        "of": NEW * len(answers),
        "flips": flips,  # by how much the source prefers its own token, at each first difference
        "ok": worst <= LOGPROB_BOUND and all(flip <= MARGIN_BOUND for flip in flips),
    }


def settings(tp: int) -> dict[str, str]:
    """The environment: nothing is fetched, and on a CPU each rank has cores of its own."""
    cores = sorted(os.sched_getaffinity(0))
    bind = "|".join(str(cores[rank % len(cores)]) for rank in range(tp)) if tp > 1 else "auto"
    return {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": bind,
        "VLLM_LOGGING_LEVEL": "WARNING",
    }


def engine(out: Path, tp: int, extra: dict[str, Any]) -> dict[str, Any]:
    """vLLM's arguments for a small model."""
    return {
        "model": str(out),
        "skip_tokenizer_init": not (out / "tokenizer_config.json").exists(),
        "tensor_parallel_size": tp,
        "dtype": "float16",
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 8,
        "max_logprobs": TOP,
        "kv_cache_memory_bytes": 64 << 20,
        "enable_prefix_caching": False,
        "seed": 0,
        **extra,
    }


def ask_llm(arguments: dict[str, Any], prompts: list[list[int]]) -> Answers:
    """vLLM in this process."""
    if arguments["tensor_parallel_size"] == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        arguments = {"distributed_executor_backend": "uni", **arguments}
    from vllm import LLM, SamplingParams

    asked = SamplingParams(temperature=0, max_tokens=NEW, prompt_logprobs=TOP, ignore_eos=True)
    llm = LLM(**arguments)
    answers = llm.generate([{"prompt_token_ids": p} for p in prompts], asked, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    return [
        {
            "prompt_logprobs": [
                {token: entry.logprob for token, entry in stated.items()}
                for stated in answer.prompt_logprobs[1:]
            ],
            "tokens": list(answer.outputs[0].token_ids),
        }
        for answer in answers
    ]


@contextlib.contextmanager
def server(arguments: dict[str, Any]) -> Iterator[str]:
    """vLLM's HTTP server; gives its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = []
    for key, value in arguments.items():
        option = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        else:
            words += [option, str(value)]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port)]
    process = subprocess.Popen([*command, "--host", "127.0.0.1", *words])
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"the server stopped with {process.returncode}")
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            time.sleep(1)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def ask_server(arguments: dict[str, Any], prompts: list[list[int]]) -> Answers:
    """vLLM through its HTTP server."""
    answers = []
    with server(arguments) as address:
        for prompt in prompts:
            body = {
                "model": arguments["model"],
                "prompt": prompt,
                "max_tokens": NEW,
                "temperature": 0,
                "ignore_eos": True,
                "prompt_logprobs": TOP,
                "return_token_ids": True,
            }
            request = urllib.request.Request(
                f"{address}/v1/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=300) as reply:
                (choice,) = json.load(reply)["choices"]
            stated = choice["prompt_logprobs"][1:]
            answers.append(
                {
                    "prompt_logprobs": [
                        {token: entry["logprob"] for token, entry in entries.items()}
                        for entries in stated
                    ],
                    "tokens": choice["token_ids"],
                }
            )
    return answers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("model", type=Path, help="the source")
    parser.add_argument("out", type=Path, help="what vLLM runs")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--serve", action="store_true", help="through the HTTP server")
    parser.add_argument("--engine", type=json.loads, default={}, help="more vLLM arguments, JSON")
    parser.add_argument("--reference", type=Path, help="keep the source's answers in this file")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    for key, value in settings(arguments.tp).items():
        os.environ.setdefault(key, value)
    with tempfile.TemporaryDirectory() as directory:
        reference = arguments.reference or Path(directory) / "reference.safetensors"
        if not reference.exists():
            make_reference(arguments.model, reference)
        ask = ask_server if arguments.serve else ask_llm
        began = time.monotonic()
        answers = ask(engine(arguments.out, arguments.tp, arguments.engine), prompts_of(reference))
        found = judge(reference, answers) | {"seconds": round(time.monotonic() - began, 1)}
    if arguments.json:
        print(json.dumps(found))
    else:
        print(
            f"largest difference of a log-probability: {found['worst']} on {found['positions']} "
            f"positions; {found['same']} of {found['of']} greedy tokens the same; source's "
            f"preference at first differences: {found['flips']}; {found['seconds']} s"
        )
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
