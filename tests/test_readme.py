"""The README is true: its commands run, what it shows is what they print, it names every option."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hub_server import WRITER, Hub

from tpgptq_convert.cli import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
# The commands that install are run by .ci/run, in a fresh environment; test_vllm.py serves.
COMMANDS = [
    line
    for kind, text in BLOCKS
    if kind == "bash"
    for line in text.splitlines()
    if "pip install" not in line and not line.startswith(("vllm ", "curl "))
]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> tuple[Path, dict[str, str]]:
    """The directory in which all commands were run in their order, and what each printed."""
    directory = tmp_path_factory.mktemp("readme")
    (directory / "tests").symlink_to(ROOT / "tests")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    printed = {}
    with Hub() as hub:
        hub.add_directory(f"you/{tiny.name}", tiny)
        home = hub.environment(tmp_path_factory.mktemp("home"), WRITER)
        for command in COMMANDS:
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=directory,
                env=os.environ | home | {"PATH": path, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, (command, done.stderr)
            printed[command] = done.stdout
        branches = {name: set(r.branches) for name, r in hub.repositories.items()}
    assert branches["you/tiny-llama-tp2"] == {"main"}
    assert branches["you/tiny-llama-tp"] == {"main", "tp-2", "tp-4"}
    return directory, printed


def test_every_command_runs(ran: tuple[Path, dict[str, str]]) -> None:
    assert {command.split()[0] for command in ran[1]} == {"tpgptq", "torchrun", "eval"}
    assert len(ran[1]) == 12


def test_the_table_shown_is_the_table_printed(ran: tuple[Path, dict[str, str]]) -> None:
    (shown,) = re.findall(r"^<!-- output .*?```text\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    printed, of_hub = [text for command, text in ran[1].items() if "inspect" in command]
    assert of_hub == f"you/{printed}"
    assert shown == printed


def test_the_generated_text_continues_the_prompt(ran: tuple[Path, dict[str, str]]) -> None:
    (printed,) = [text for command, text in ran[1].items() if "--prompt" in command]
    assert printed.startswith("Return the list of")


def test_the_program_of_your_own(
    ran: tuple[Path, dict[str, str]], run_program: Callable[..., str]
) -> None:
    directory, _ = ran
    (program,) = [text for kind, text in BLOCKS if kind == "python" and "load_model" in text]
    (directory / "program.py").write_text(program)
    said = run_program(directory / "program.py", 2, PYTHONPATH="shards")
    assert said.startswith("Return the list of")


def test_the_lora_recipe(ran: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut and padded by the recipe, the low-rank products of all ranks sum to the source's."""
    monkeypatch.chdir(ran[0])
    scope: dict[str, object] = {}
    (recipe,) = [text for kind, text in BLOCKS if kind == "python" and "def local" in text]
    exec(recipe, scope)
    local = scope["local"]
    assert callable(local)
    rng = np.random.default_rng(0)
    up_b, down_a = rng.normal(size=(704, 4)), rng.normal(size=(4, 704))
    x = rng.normal(size=(3, 4))
    layer = "model.layers.1"
    parts = [(local(up_b, layer, rank), local(down_a.T, layer, rank)) for rank in range(2)]
    summed = sum((x @ up.T) @ down for up, down in parts)
    np.testing.assert_allclose(summed, (x @ up_b.T) @ down_a.T, atol=1e-12)


def test_every_command_and_option_is_documented() -> None:
    for name, command in cli.commands.items():
        assert f"tpgptq {name} " in README
        for parameter in command.params:
            if parameter.param_type_name == "option":
                for option in (*parameter.opts, *parameter.secondary_opts):
                    assert option in README, (name, option)


def test_shells_complete() -> None:
    """Each line for a shell's startup file is one that click answers."""
    for line in re.findall(r"^.*_TPGPTQ_COMPLETE=.*$", README, re.MULTILINE):
        (shell,) = re.findall(r"=(\w+)_source tpgptq", line)
        # Of the word to complete fish gives the text, the others the place.
        typed = {"COMP_WORDS": "tpgptq insp", "COMP_CWORD": "insp" if shell == "fish" else "1"}
        for how, answer in (("source", "_tpgptq_completion"), ("complete", "inspect")):
            done = subprocess.run(
                [str(Path(sys.executable).parent / "tpgptq")],
                env=os.environ | typed | {"_TPGPTQ_COMPLETE": f"{shell}_{how}"},
                capture_output=True,
                text=True,
                check=False,
            )
            assert answer in done.stdout, (shell, done.stderr)


def test_every_script_is_named() -> None:
    for script in (ROOT / "scripts").glob("*.py"):
        assert f"scripts/{script.name}" in README
