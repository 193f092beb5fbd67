"""Compare the ranks of a converted checkpoint with its source: greedy tokens, logits, perplexity.

The source runs dequantised to float32 in one process, as an ordinary transformers model; the ranks
run in as many processes as the output has, over gloo, through the runtime module that lies in the
output: in float32 on the CPU, or in float16 by its kernels on one GPU that they share. Needs the
package and transformers.

    python scripts/compare_tokens.py MODEL OUT --text FILE --prompt "The capital of France is"
    python scripts/compare_tokens.py MODEL OUT --device cuda

Exits with 1 if a token differs; how much less likely the source thinks it is shown with it.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tpgptq_convert.checkpoint import read_checkpoint
from tpgptq_convert.packing import dequantise

WINDOW = 500  # tokens that perplexity looks at together
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, in a small village,",
    "The three laws of robotics are",
    "To make bread, you first",
)


def source_model(directory: Path) -> nn.Module:
    """The source, dequantised to float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = read_checkpoint(directory)
    config = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config).float().eval()
    tensor = checkpoint.source.tensor
    state = {name: tensor(name).float() for name in checkpoint.shared}
    for layer in checkpoint.layers:
        if layer.quant is None:
            weight = tensor(f"{layer.name}.weight").float()
        else:
            parts = [tensor(f"{layer.name}.{part}") for part in ("qweight", "qzeros", "scales")]
            g_idx = torch.from_numpy(layer.g_idx).long()
            weight = dequantise(*parts, g_idx, layer.quant, torch.float32).T
        state[f"{layer.name}.weight"] = weight
        if layer.bias:
            state[f"{layer.name}.bias"] = tensor(f"{layer.name}.bias").float()
    missing = set(model.load_state_dict(state, strict=False).missing_keys)
    if not missing <= {checkpoint.family.head}:
        raise RuntimeError(f"the source lacks {missing}")
    model.tie_weights()
    return model


def answers(model: nn.Module, job: dict[str, Any]) -> dict[str, Any]:
    """Next-token logits and greedy tokens for each prompt, and the text's perplexity."""
    found: dict[str, Any] = {"logits": [], "tokens": []}
    with torch.inference_mode():
        for prompt in job["prompts"]:
            ids = torch.tensor([prompt], device=model.device)
            found["logits"].append(model(ids).logits[0, -1].tolist())
            tokens = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=job["new"],
                min_new_tokens=job["new"],
                do_sample=False,
            )
            found["tokens"].append(tokens[0].tolist())
        if job["text"]:
            text = torch.tensor(job["text"], device=model.device)
            found["perplexity"] = perplexity(model, text)
    return found


def perplexity(model: nn.Module, text: torch.Tensor) -> float:
    """Of a text's tokens, in windows of their own."""
    loss, count = 0.0, 0
    for window in text.split(WINDOW):
        if len(window) > 1:
            logits = model(window[None]).logits[0, :-1].double()
            loss += float(nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
            count += len(window) - 1
    return math.exp(loss / count)


def work(out: Path, job: dict[str, Any], answer: Path) -> None:
    """One rank's part, started by torchrun."""
    sys.path.insert(0, str(out))
    import tpgptq_runtime

    dist.init_process_group("gloo")
    device = job.get("device", "cpu")
    dtype = torch.float16 if device == "cuda" else torch.float32
    model = tpgptq_runtime.load_model(out, dtype=dtype, device=device)
    if device == "cpu":  # no kernel there: dequantise once, not for every token
        for module in model.modules():
            if isinstance(module, tpgptq_runtime.QuantLinear):
                module.dequantise = functools.cache(module.dequantise)
    calls: list[int] = []
    all_reduce = dist.all_reduce

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return all_reduce(*arguments, **options)

    dist.all_reduce = counted
    with torch.inference_mode():
        model(torch.tensor([job["prompts"][0]], device=device))
    per_block = len(calls) / model.config.num_hidden_layers
    found = answers(model, job) | {"all_reduces_per_block": per_block}
    if dist.get_rank() == 0:
        answer.write_text(json.dumps(found))
    dist.destroy_process_group()


def run_ranks(out: Path, job: dict[str, Any]) -> dict[str, Any]:
    """What the ranks of an output answer, each rank in a process of its own."""
    tp = json.loads((out / "tpgptq.json").read_text())["tp"]
    with tempfile.TemporaryDirectory() as directory:
        answer = Path(directory) / "answer.json"
        (Path(directory) / "job.json").write_text(json.dumps(job))
        subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *(f"--nproc-per-node={tp}", __file__, "--worker", directory, "-", str(out)),
            ],
            env={"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"} | os.environ,
            check=True,
        )
        found: dict[str, Any] = json.loads(answer.read_text())
    return found


def compare(
    model: Path,
    out: Path,
    prompts: list[list[int]],
    new: int,
    text: list[int],
    device: str = "cpu",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(source's, ranks') answers to the same job."""
    job = {"prompts": prompts, "new": new, "text": text, "device": device}
    return answers(source_model(model), job), run_ranks(out, job)


def gap(model: nn.Module, expected: list[int], got: list[int]) -> str:
    """Where two answers part, and by how much the source prefers its own."""
    at = next(i for i, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b)
    with torch.inference_mode():
        logits = model(torch.tensor([expected[:at]])).logits[0, -1]
    own, other = float(logits[expected[at]]), float(logits[got[at]])
    return f"token {at}: {expected[at]} at {own:.4f}, {got[at]} at {other:.4f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompt", action="append", help="may be repeated; default: five of ours")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--text", type=Path, help="a text to measure perplexity on")
    parser.add_argument("--text-tokens", type=int, default=4000)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the ranks")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        job = json.loads((arguments.worker / "job.json").read_text())
        work(arguments.out, job, arguments.worker / "answer.json")
        return 0

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    prompts = [tokenizer(prompt).input_ids for prompt in arguments.prompt or PROMPTS]
    text = tokenizer(arguments.text.read_text()).input_ids if arguments.text else []
    source, ranks = compare(
        arguments.model,
        arguments.out,
        prompts,
        arguments.new_tokens,
        text[: arguments.text_tokens],
        arguments.device,
    )
    same = 0
    for prompt, expected, got in zip(prompts, source["tokens"], ranks["tokens"], strict=True):
        equal = sum(a == b for a, b in zip(expected, got, strict=True)) - len(prompt)
        same += equal
        print(f"{equal} of {arguments.new_tokens} tokens the same: {tokenizer.decode(got)!r}")
        if expected != got:
            print(f"  {gap(source_model(arguments.model), expected, got)}")
    worst = max(
        abs(a - b)
        for expected, got in zip(source["logits"], ranks["logits"], strict=True)
        for a, b in zip(expected, got, strict=True)
    )
    print(f"largest difference of a logit: {worst:.1e}")
    print(f"all-reduces per block: {ranks['all_reduces_per_block']:g}")
    if text:
        print(f"perplexity: source {source['perplexity']:.6f}, ranks {ranks['perplexity']:.6f}")
    return 0 if same == arguments.new_tokens * len(prompts) else 1


if __name__ == "__main__":
    sys.exit(main())
