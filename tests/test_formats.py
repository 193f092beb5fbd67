"""Every combination of bits, group size, zero points and checkpoint format, as whole models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from compare_tokens import source_model
from factories import make_checkpoint
from ranks import run_ranks

Run = Callable[..., Result]
TOKENS = torch.tensor([[5, 30, 17, 7, 31, 12, 11, 22, 8, 3]])


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, -1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_model_is_converted_verified_and_gives_the_same_logits(
    tpgptq: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    group_size: int,
    sym: bool,
    checkpoint_format: str,
) -> None:
    model = make_checkpoint(
        tmp_path / "model",
        **{"hidden": 128, "heads": 8, "kv_heads": 2, "intermediate": 384, "blocks": 1},
        **{"bits": bits, "group_size": group_size, "sym": sym},
        checkpoint_format=checkpoint_format,
    )
    done = tpgptq("convert", "--tp", 2, model, tmp_path / "out")
    assert done.exit_code == 0, done.output
    with torch.inference_mode():
        expected = source_model(model)(TOKENS).logits
    answers, _ = run_ranks(tmp_path / "out", 2, lambda rank: rank(TOKENS).logits, monkeypatch)
    scale = float(expected.abs().max())
    for answer in answers:
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5 * scale)
