"""The command line: what it says, how fast it answers, how it is interrupted."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from factories import edit_text

import tpgptq_convert.errors as errors
from tpgptq_convert.cli import _progress, cli

Run = Callable[..., Result]


def tpgptq_process(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "tpgptq_convert", *map(str, arguments)]


def test_inspect_says_what_a_person_wants_to_know(tpgptq: Run, tiny: Path) -> None:
    result = tpgptq("inspect", tiny)
    assert result.exit_code == 0
    assert "llama, 4 blocks, 4 query and 2 kv heads of 64" in result.stdout
    assert "28 of 28 layers are truly act-ordered." in result.stdout
    assert "q_proj, k_proj, v_proj share one g_idx in 4 of 4 blocks." in result.stdout
    assert "Tensor-parallel degrees: every one from 1 to 11." in result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if line[:1].isdigit()]
    assert [row[0] for row in rows if "(g" in " ".join(row)] == [str(tp) for tp in range(1, 12)]
    assert result.stderr == ""


@pytest.mark.parametrize("model", ["./org/name", "../org/name", "org/name/"])
def test_what_is_written_as_a_path_is_not_looked_for_on_the_hub(tpgptq: Run, model: str) -> None:
    error, _ = tpgptq("inspect", model).stderr.splitlines()
    assert error == (
        f"Error: {Path(model).absolute()}: no such directory; must be a directory with a GPTQ "
        "checkpoint"
    )


def test_where_no_manifest_is_the_degrees_are_named(
    tpgptq: Run, tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "several"
    assert tpgptq("convert", "--tp", 2, "--tp", 3, "--no-verify", tiny, out).exit_code == 0
    _, hint = tpgptq("verify", tiny, out).stderr.splitlines()
    assert hint == f"Hint: name one of its degrees: {out / 'tp-2'}, {out / 'tp-3'}"
    _, hint = tpgptq("verify", out / "tp-2", tiny).stderr.splitlines()
    assert hint.endswith("`tpgptq verify` takes MODEL first, then OUT")


def test_inspect_json_agrees_with_the_table(tpgptq: Run, tiny: Path) -> None:
    report = json.loads(tpgptq("inspect", "--json", tiny).stdout)
    assert report["largest_tp"] == 11
    assert [degree["tp"] for degree in report["degrees"]] == list(range(1, 12))
    assert sum(layer["act_ordered"] for layer in report["layers"]) == 28
    assert report["degrees"][0]["growth"] == 1
    only = json.loads(tpgptq("inspect", "--json", "--tp", 2, tiny).stdout)
    assert only["degrees"] == [report["degrees"][1]]


@pytest.mark.parametrize("files", [["config.json"], ["config.json", "quantize_config.json"]])
def test_a_config_that_denies_act_order_is_damage(
    tpgptq: Run, tiny: Path, tmp_path: Path, files: list[str]
) -> None:
    """vLLM believes config.json alone; the conversion is of the tensors, whatever is said."""
    model = shutil.copytree(tiny, tmp_path / "model")
    for name in files:
        edit_text(model / name, '"desc_act": true', '"desc_act": false')
    shown = tpgptq("inspect", model)
    assert shown.exit_code == 0
    assert "desc_act: false, but 28 of 28 layers have a g_idx that is not seq" in shown.stdout
    (line,) = [line for line in shown.stdout.splitlines() if line.startswith("Damaged: ")]
    assert all(name in line for name in files)
    assert json.loads(tpgptq("inspect", "--json", model).stdout)["damage"] == [line[9:]]
    converted = tpgptq("convert", "--tp", 2, model, tmp_path / "out")
    assert converted.exit_code == 0
    assert line in converted.stderr


@pytest.mark.parametrize("command", [["--help"], ["convert", "--help"], ["inspect"]])
def test_help_and_inspect_answer_at_once_and_without_torch(tiny: Path, command: list[str]) -> None:
    """Half a second of processor time at most, the best of five: not a matter of machine load."""
    if command == ["inspect"]:
        command = [*command, str(tiny)]
    code = (
        "import sys\n"
        "from tpgptq_convert.cli import cli\n"
        f"cli({command!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5


def test_every_command_and_option_has_help() -> None:
    for command in cli.commands.values():
        assert command.help
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert getattr(parameter, "help", None), (command.name, parameter.name)


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "m", "out"],
        ["convert", "--tp", "two", "m", "out"],
        ["convert", "--tp", "2", "--row-group", "64", "m", "out"],
        ["convert", "--tp", "2", "--max-shard-size", "huge", "m", "out"],
        ["convert", "--tp", "2", "--layout", "other", "m", "out"],
        ["convert", "--tp", "2", "--no-verify", "--push-to-hub", "org/name", "m", "out"],
        ["convert", "--tp", "2", "--private", "m", "out"],
        ["push", "out"],
        ["inspect"],
        ["explode"],
    ],
)
def test_wrong_usage_exits_with_2(tpgptq: Run, arguments: list[str]) -> None:
    assert tpgptq(*arguments).exit_code == 2


def test_every_error_of_the_family_is_shown_as_lines(
    tpgptq: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tpgptq_convert import checkpoint

    kinds = [
        k for k in vars(errors).values() if isinstance(k, type) and k is not errors.TpgptqError
    ]
    family = [kind for kind in kinds if issubclass(kind, errors.TpgptqError)]
    assert len(family) >= 6
    for kind in family:

        def fail(*_: object, kind: type[errors.TpgptqError] = kind) -> None:
            raise kind("this is; that must be", hint="do it")

        monkeypatch.setattr(checkpoint, "read_checkpoint", fail)
        result = tpgptq("inspect", tiny)
        assert result.exit_code == kind.exit_code
        assert result.stderr == "Error: this is; that must be\nHint: do it\n"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_leaves_nothing(tiny: Path, tmp_path: Path, how: signal.Signals) -> None:
    """The signal comes while files are being written: a layer is held up until it does."""
    code = (
        "import signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs\n"
        "from tpgptq_convert import cli, writer\n"
        "real, calls = writer.Parts.write, []\n"
        "def held_up(*arguments):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 9:\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "    return real(*arguments)\n"
        "writer.Parts.write = held_up\n"
        "cli.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "convert", "--tp", "2", str(tiny), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    with process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        assert len(list(tmp_path.iterdir())) == 1  # the temporary directory
        process.send_signal(how)
        _, stderr = process.communicate()  # the layer is held up for a minute at most
    assert process.returncode == 1
    assert stderr.splitlines()[-2:] == [
        f"Error: stopped by {how.name} before it was done",
        "Hint: run it again; a conversion with --resume keeps what it has written",
    ]
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_a_signal_while_something_is_executed_that_was_text(tiny: Path) -> None:
    """As namedtuple and dataclass do, of which an import is full: Python would end by SIGINT."""
    code = (
        "import os, signal\n"
        "from tpgptq_convert import checkpoint, cli\n"
        "stop = 'os.kill(os.getpid(), signal.SIGTERM)\\nwhile True: pass'\n"
        "checkpoint.read_checkpoint = lambda *_: exec(stop, globals())\n"
        "cli.main()\n"
    )
    program = [sys.executable, "-c", code, "inspect", str(tiny)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: stopped by SIGTERM before it was done\nHint: ")


@pytest.mark.parametrize("command", ["verify", "convert"])
def test_a_signal_while_torch_is_imported(tiny: Path, tmp_path: Path, command: str) -> None:
    """It waits: torch's C++ would abort. Here a module that says whether it was disturbed."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    for _ in range(1000): pass\n"
        "except BaseException:\n"
        "    os.abort()\n"
    )
    out = tmp_path / "out"
    if command == "verify":
        convert = tpgptq_process("convert", "--no-verify", "--tp", "2", tiny, out)
        subprocess.run(convert, capture_output=True, check=True)
    done = subprocess.run(
        tpgptq_process(command, *(("--tp", "2") if command == "convert" else ()), tiny, out),
        env=os.environ
        | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2] == "Error: stopped by SIGTERM before it was done"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_that_nobody_can_write(tiny: Path) -> None:
    for option in ((), ("--json",)):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                tpgptq_process("inspect", *option, tiny),
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        assert done.returncode == 1
        assert done.stderr.startswith("Error: No space left on device\nHint: ")
        assert "Traceback" not in done.stderr


def test_half_of_torchruns_environment(tiny: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        tpgptq_process("convert", "--tp", "2", tiny, tmp_path / "out"),
        env=os.environ | {"TORCHELASTIC_RUN_ID": "none"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: this process could not join the others (")


def test_python_m_and_version() -> None:
    done = subprocess.run(tpgptq_process("--version"), capture_output=True, text=True, check=True)
    assert done.stdout.startswith("python -m tpgptq_convert, version ")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_remaining_time_leaves_the_start_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first seconds things are compiled, and nothing is done yet of what is in flight."""
    clock, terminal = [0.0], Terminal()
    monkeypatch.setattr("time.time", lambda: clock[0])
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr("sys.stderr", terminal)
    with _progress(quiet=False)("Converting", 10**10) as advance:
        clock[0] = 20.0
        advance(10**8)
        for _ in range(2):
            clock[0] += 1.0
            advance(10**9)
    first, second = re.findall(r"\d\d:\d\d:\d\d  .{16}", terminal.getvalue())[-2:]
    assert (first, second) == ("00:00:08  1.10 of 10.00 GB", "00:00:07  2.10 of 10.00 GB")


def test_progress_is_silent_off_a_terminal(tiny: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        tpgptq_process("convert", "--tp", "2", tiny, tmp_path / "out"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[-1].startswith(f"Wrote and verified tp 2 to {tmp_path / 'out'}: ")
    assert all(line.startswith(("Note: ", "Wrote ")) for line in lines)


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(tiny: Path, tmp_path: Path, closed: str) -> None:
    """Nobody may be listening, as of a daemon: the work is done all the same."""
    command = tpgptq_process("convert", "--tp", 2, "--device", "cpu", tiny, tmp_path / "out")
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *command]
    assert subprocess.run(shell, check=False).returncode == 0
    assert (tmp_path / "out" / "tpgptq.json").is_file()
    command = tpgptq_process("verify", tmp_path, tmp_path / "out")
    assert subprocess.run([*shell[:4], *command], check=False).returncode == 1
