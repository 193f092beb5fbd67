"""Checkpoints that auto-gptq 0.7.1 quantised, packed and answered: scripts/make_oracle.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file

from tpgptq_convert.checkpoint import read_checkpoint

Run = Callable[..., Result]
ORACLE = Path(__file__).parent / "oracle"
WEIGHTS = "gptq_model-4bit-32g.safetensors"
CASES = sorted(path.name for path in ORACLE.iterdir() if path.is_dir())


def test_every_checkpoint_has_its_answer() -> None:
    assert load_file(ORACLE / "answers.safetensors").keys() == {"tokens", *CASES}


@pytest.mark.parametrize("case", CASES)
def test_auto_gptq_wrote_it_in_act_order(case: str) -> None:
    with safe_open(ORACLE / case / WEIGHTS, "np") as file:
        assert file.metadata()["auto_gptq_version"] == "0.7.1"
    checkpoint = read_checkpoint(ORACLE / case)
    assert checkpoint.config["model_type"] == case.partition("-")[0]
    assert all(layer.act_order for layer in checkpoint.layers)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_the_logits_of_the_ranks_are_auto_gptqs(
    tpgptq: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, tp: int
) -> None:
    done = tpgptq("convert", "--tp", tp, ORACLE / case, tmp_path / "out")  # and verify
    assert done.exit_code == 0, done.output
    answers = load_file(ORACLE / "answers.safetensors")
    tokens, expected = answers["tokens"], answers[case]
    logits, _ = run_ranks(tmp_path / "out", tp, lambda rank: rank(tokens).logits, monkeypatch)
    scale = float(expected.abs().max())
    assert scale > 0.1
    for answer in logits:
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5 * scale)
