from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tpgptq_convert.cli import cli

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
