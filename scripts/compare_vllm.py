"""Compare what vLLM answers on a converted checkpoint with the float32 source: log-probabilities
and greedy tokens.

The source is dequantised to float32 and run by transformers; vLLM runs the output (or, to see what
it makes of one, any other checkpoint) through its Python interface or its HTTP server. Needs the
package, transformers and vLLM.

    python scripts/compare_vllm.py MODEL OUT --tp 2

Exits with 1 if more than 5 % of the positions have a log-probability that is off by more than 0.04
(unlikely tokens of real models are, in fp16 without quantisation too), or if a greedy token differs
where the source prefers its own by more than 0.02.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
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
TOP = 20  # log-probabilities compared at each position, beside that of the token that stands there
NEW = 16  # greedy tokens
RANDOM_LENGTHS = (5, 17, 33)  # of the prompts, where the source has no tokenizer

Answers = list[dict[str, Any]]


def make_reference(model: Path, reference: Path) -> None:
    """The float32 source's greedy answers and all its log-probabilities, as a safetensors file."""
    from compare_tokens import PROMPTS, source_model

    with torch.inference_mode():
        source = source_model(model)
        if has_tokenizer(model):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(model)
            prompts = [tokenizer(text, return_tensors="pt").input_ids for text in PROMPTS]
        else:
            draw = torch.Generator().manual_seed(7)
            vocab = source.config.vocab_size
            prompts = [torch.randint(3, vocab, (1, n), generator=draw) for n in RANDOM_LENGTHS]
        found: dict[str, torch.Tensor] = {}
        for i, ids in enumerate(prompts):
            for _ in range(NEW):
                best = source(ids).logits[0, -1].argmax()
                ids = torch.cat([ids, best.view(1, 1)], 1)
            found[f"{i}.ids"] = ids[0]
            found[f"{i}.logprobs"] = source(ids).logits[0, :-1].float().log_softmax(-1)
    save_file(found, reference)


def has_tokenizer(model: Path) -> bool:
    return (model / "tokenizer_config.json").exists()


def texts_of(reference: Path) -> list[list[int]]:
    """The source's prompts with its own answers; each ends with NEW tokens of the answer."""
    found = load_file(reference)
    return [found[f"{i}.ids"].tolist() for i in range(len(found) // 2)]


def judge(reference: Path, answers: Answers) -> dict[str, Any]:
    """How far the answers are from the reference."""
    found = load_file(reference)
    offs: list[float] = []  # the largest of each position
    same, flips = 0, []
    for i, answer in enumerate(answers):
        ids, expected = found[f"{i}.ids"].tolist(), found[f"{i}.logprobs"]
        start = len(ids) - NEW
        for at, stated in enumerate(answer["logprobs"]):  # of the token at + 1
            off = [abs(logprob - float(expected[at, int(t)])) for t, logprob in stated.items()]
            offs.append(float("inf") if any(map(math.isnan, off)) else max(off))
        for at, (token, own) in enumerate(zip(answer["tokens"], ids[start:], strict=True)):
            if token != own:
                logprobs = expected[start + at - 1]
                flips.append(round(float(logprobs[own] - logprobs[token]), 4))
                break
            same += 1
    within = sum(off <= LOGPROB_BOUND for off in offs)
    return {
        "worst": round(max(offs), 4),
        "positions": len(offs),
        "within": within,
        "same": same,
        "of": NEW * len(answers),
        "flips": flips,  # by how much the source prefers its own token, at each first difference
        "ok": within >= 0.95 * len(offs) and all(flip <= MARGIN_BOUND for flip in flips),
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
        "skip_tokenizer_init": not has_tokenizer(out),
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


def ask_llm(arguments: dict[str, Any], texts: list[list[int]]) -> Answers:
    """vLLM in this process: its own greedy answers, and what it thinks of the source's."""
    if arguments["tensor_parallel_size"] == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        arguments = {"distributed_executor_backend": "uni", **arguments}
    from vllm import LLM, SamplingParams

    answer = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    score = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=TOP)
    prompts = [text[:-NEW] for text in texts] + texts
    asked = [answer] * len(texts) + [score] * len(texts)
    llm = LLM(**arguments)
    replies = llm.generate([{"prompt_token_ids": p} for p in prompts], asked, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    return [
        {
            "tokens": list(answered.outputs[0].token_ids),
            "logprobs": [
                {token: entry.logprob for token, entry in stated.items()}
                for stated in scored.prompt_logprobs[1:]
            ],
        }
        for answered, scored in zip(replies[: len(texts)], replies[len(texts) :], strict=True)
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


def ask_server(address: str, model: str, texts: list[list[int]]) -> Answers:
    """The same through vLLM's HTTP server."""

    def ask(prompt: list[int], **options: Any) -> dict[str, Any]:
        body = {"model": model, "prompt": prompt, "temperature": 0, **options}
        request = urllib.request.Request(
            f"{address}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as reply:
            (choice,) = json.load(reply)["choices"]
        found: dict[str, Any] = choice
        return found

    answers = []
    for text in texts:
        answered = ask(text[:-NEW], max_tokens=NEW, ignore_eos=True, return_token_ids=True)
        scored = ask(text, max_tokens=1, prompt_logprobs=TOP)
        logprobs = [
            {token: entry["logprob"] for token, entry in stated.items()}
            for stated in scored["prompt_logprobs"][1:]
        ]
        answers.append({"tokens": answered["token_ids"], "logprobs": logprobs})
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
        asked, texts = engine(arguments.out, arguments.tp, arguments.engine), texts_of(reference)
        began = time.monotonic()
        if arguments.serve:
            with server(asked) as address:
                answers = ask_server(address, asked["model"], texts)
        else:
            answers = ask_llm(asked, texts)
        found = judge(reference, answers) | {"seconds": round(time.monotonic() - began, 1)}
    if arguments.json:
        print(json.dumps(found))
    else:
        print(
            f"largest difference of a log-probability: {found['worst']}; {found['within']} of "
            f"{found['positions']} positions within {LOGPROB_BOUND}"
        )
        print(
            f"{found['same']} of {found['of']} greedy tokens the same; the source's preference at "
            f"first differences: {found['flips']}; {found['seconds']} s"
        )
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
