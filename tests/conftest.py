from __future__ import annotations

import os
import subprocess
import sys
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


@pytest.fixture(scope="session")
def run_program() -> Callable[..., str]:
    """Run a Python file in its directory, by torchrun as so many ranks; returns what they print."""

    def run(program: Path, ranks: int, **env: str) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        done = subprocess.run(
            [*command, f"--nproc-per-node={ranks}", program.name],
            cwd=program.parent,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
