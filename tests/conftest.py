from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from tpgptq_convert.cli import cli

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

TINY = Path(__file__).parent / "checkpoints" / "tiny-llama-gptq-4bit-64g"


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The real checkpoint that ships with the repository."""
    return TINY


@pytest.fixture(scope="session")
def tpgptq() -> Callable[..., Result]:
    """Run a command line in this process."""

    def run(*arguments: str | Path) -> Result:
        return CliRunner().invoke(cli, [str(argument) for argument in arguments])

    return run
