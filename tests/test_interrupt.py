"""Runs that are killed, stopped, out of disk or of luck: OUT is whole, or absent and resumable."""

from __future__ import annotations

import argparse
import hashlib
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
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import interrupt
import numpy as np
import pytest
import torch
from click.testing import Result
from factories import edit_text, make_checkpoint
from test_processes import TPGPTQ, torchrun, tree

from tpgptq_convert import convert, writer
from tpgptq_convert.errors import DeviceError
from tpgptq_convert.source import TensorSpec
from tpgptq_convert.threads import threads

Run = Callable[..., Result]
OPTIONS = ["--tp", "2", "--max-shard-size", "40KB"]
# Dies, or does what `trouble` says, when the journal is to note the Nth stretch of a file: those
# before are noted.
PROGRAM = """
import os, signal, sys
from tpgptq_convert import cli, staging

def note(*arguments):
    calls.append(1)
    if len(calls) == {call}:
        {trouble}
    return real(*arguments)

real, calls = staging.Journal.note, []
staging.Journal.note = note
cli.main()
"""
DIE = "os.kill(os.getpid(), signal.SIGKILL)"


def run(program: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, **options
    )


def die(call: int, model: Path, out: Path, *options: str) -> None:
    """A conversion that is killed at its Nth note."""
    program = PROGRAM.format(call=call, trouble=DIE)
    assert run(program, "convert", *OPTIONS, *options, model, out).returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("interrupt") / "m", blocks=4)


@pytest.fixture(scope="module")
def whole(model: Path, tpgptq: Run) -> dict[str, bytes]:
    """What a run writes that nothing disturbs."""
    assert tpgptq("convert", *OPTIONS, model, model.parent / "whole").exit_code == 0
    return tree(model.parent / "whole")


def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors that are written from now on."""
    names: list[str] = []
    real = writer.Part.write

    def write(part: writer.Part, tensors: dict[str, Any]) -> Any:
        names.extend(f"{part.path.name}: {name}" for name in tensors)
        return real(part, tensors)

    monkeypatch.setattr(writer.Part, "write", write)
    return names


def weights_of(path: Path) -> int:
    """Bytes of a file's tensors."""
    header = int.from_bytes(path.read_bytes()[:8], "little")
    return path.stat().st_size - 8 - header


@pytest.mark.parametrize("call", [1, 30, 60])
def test_what_was_killed_is_resumed(
    tpgptq: Run,
    model: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: int,
) -> None:
    out = tmp_path / "out"
    die(call, model, out)
    assert [path.name for path in tmp_path.iterdir()] == [".out.tpgptq"]
    names = written(monkeypatch)
    result = tpgptq("convert", *OPTIONS, "--resume", model, out)
    assert result.exit_code == 0
    told = re.search(r"^Resumed: (.*) MB of (.*) MB are written already$", result.stderr, re.M)
    if call == 1:  # nothing was noted
        assert not told
    else:
        weights = sum(map(weights_of, out.glob("model-*.safetensors")))
        assert told
        assert (float(told[1]) > 0, float(told[2])) == (True, round(weights / 1e6, 2))
    resumed, names[:] = len(names), []
    assert tree(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert tpgptq("convert", *OPTIONS, "--overwrite", model, out).exit_code == 0
    assert resumed == len(names) if call == 1 else resumed < len(names)


@pytest.mark.parametrize("silence", ["-q", "--json"])
def test_resumed_in_silence(tpgptq: Run, model: Path, tmp_path: Path, silence: str) -> None:
    die(30, model, tmp_path / "out")
    result = tpgptq("convert", *OPTIONS, "--resume", silence, model, tmp_path / "out")
    assert (result.exit_code, result.stderr) == (0, "")


def test_what_was_killed_is_replaced(
    tpgptq: Run, model: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    die(40, model, out)
    assert tpgptq("convert", *OPTIONS, model, out).exit_code == 0
    assert tree(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_again_and_again(
    tpgptq: Run, model: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for call in (30, 12, 1):
        die(call, model, out, "--resume")
    assert tpgptq("convert", *OPTIONS, "--resume", model, out).exit_code == 0
    assert tree(out) == whole


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "journal", "foreign"])
def test_what_was_damaged_since_is_written_anew(
    tpgptq: Run, model: Path, whole: dict[str, bytes], tmp_path: Path, damage: str
) -> None:
    out, work = tmp_path / "out", tmp_path / ".out.tpgptq"
    die(40, model, out)
    path = max((work / "output").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "flipped":
        path.write_bytes(data)
    elif damage == "cut":
        os.truncate(path, len(data) // 2)
    elif damage == "gone":
        path.unlink()
    elif damage == "journal":  # as where the power failed
        lines = (work / "journal").read_bytes()
        (work / "journal").write_bytes(lines[: len(lines) * 2 // 3] + b"\0" * 99 + b'\n{"file": 1}')
    else:
        (work / "output" / "model-rank-7-part-0.safetensors").write_bytes(b"foreign")
        (work / "output" / "sub").mkdir()
    assert tpgptq("convert", *OPTIONS, "--resume", model, out).exit_code == 0
    assert {name: tree(out)[name] for name in whole} == whole
    assert set(tree(out)) == set(whole)


@pytest.mark.parametrize("change", ["options", "source", "config"])
def test_another_conversion_is_not_resumed(
    tpgptq: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    source, out, options = shutil.copytree(model, tmp_path / "m"), tmp_path / "out", OPTIONS
    die(40, source, out)
    if change == "options":
        options = ["--tp", "4"]
    elif change == "source":
        os.utime(source / "model.safetensors")
    else:
        edit_text(source / "config.json", "1e-06", "1e-05")
    names = written(monkeypatch)
    assert tpgptq("convert", *options, "--resume", source, out).exit_code == 0
    resumed = set(names)
    names.clear()
    assert tpgptq("convert", *options, source, tmp_path / "again").exit_code == 0
    assert resumed == set(names)
    assert tree(out) == tree(tmp_path / "again")


def test_several_processes_resume_what_one_began(
    model: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    die(40, model, out)
    result = torchrun(2, TPGPTQ, "convert", *OPTIONS, "--resume", model, out)
    assert result.returncode == 0, result.stderr
    assert tree(out) == whole


def test_one_resumes_what_several_began(
    tpgptq: Run, model: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Process 0 is killed, which alone could have cleared away what it began."""
    program, out = tmp_path / "program.py", tmp_path / "out"
    only = f'{DIE} if os.environ["RANK"] == "0" else None'
    program.write_text(PROGRAM.format(call=20, trouble=only))
    result = torchrun(2, [str(program)], "convert", *OPTIONS, model, out)
    assert "Signal 9 (SIGKILL)" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.tpgptq", "program.py"]
    assert tpgptq("convert", *OPTIONS, "--resume", model, out).exit_code == 0
    assert tree(out) == whole


def test_stopped_with_resume_leaves_what_is_written(
    tpgptq: Run, model: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    program = PROGRAM.format(call=40, trouble="os.kill(os.getpid(), signal.SIGTERM)")
    stopped = run(program, "convert", *OPTIONS, "--resume", "--json", model, out)
    assert stopped.returncode == 1
    failure = json.loads(stopped.stdout)
    assert (failure["ok"], failure["exit_code"]) == (False, 1)
    assert failure["problems"] == ["stopped by SIGTERM before it was done"]
    assert [path.name for path in tmp_path.iterdir()] == [".out.tpgptq"]
    assert tpgptq("convert", *OPTIONS, "--resume", model, out).exit_code == 0
    assert tree(out) == whole


def test_two_conversions_at_once(
    tpgptq: Run, model: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    program = PROGRAM.format(call=40, trouble="print('ready', flush=True); sys.stdin.read()")
    command = [sys.executable, "-c", program, "convert", *OPTIONS, str(model), str(out)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as first:
        assert first.stdout
        assert first.stdout.readline() == "ready\n"
        for option in ("--resume", "--overwrite"):
            second = tpgptq("convert", *OPTIONS, option, model, out)
            assert second.exit_code == 1
            assert ".out.tpgptq: another conversion is writing there" in second.stderr
        first.communicate()
    assert first.returncode == 0
    assert tree(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_to_be_replaced_is_put_back(
    tpgptq: Run, model: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Killed between the two renames that exchange the old output and the new one."""
    out = tmp_path / "out"
    assert tpgptq("convert", "--tp", 4, model, out).exit_code == 0
    old = tree(out)
    program = (
        "import os, pathlib, signal\n"
        "from tpgptq_convert import cli\n"
        "rename = pathlib.Path.rename\n"
        "def die(path, target):\n"
        f"    if path.name == 'output': {DIE}\n"
        "    return rename(path, target)\n"
        "pathlib.Path.rename = die\n"
        "cli.main()\n"
    )
    killed = run(program, "convert", *OPTIONS, "--overwrite", model, out)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.tpgptq"]
    refused = tpgptq("convert", *OPTIONS, model, out)
    assert refused.exit_code == 1
    assert "use --overwrite to replace it" in refused.stderr
    assert tree(out) == old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    run(program, "convert", *OPTIONS, "--overwrite", model, out)
    assert tpgptq("convert", *OPTIONS, "--overwrite", "--resume", model, out).exit_code == 0
    assert tree(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_part_of_what_was_replaced_is_not_put_back(
    tpgptq: Run, model: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Killed while it removes the old output, when the new one is in its place already."""
    out = tmp_path / "out"
    assert tpgptq("convert", "--tp", 4, model, out).exit_code == 0
    program = (
        "import os, shutil, signal\n"
        "from tpgptq_convert import cli\n"
        "rmtree = shutil.rmtree\n"
        "def die(path, **options):\n"
        f"    if path.name == '.out.tpgptq': {DIE}\n"
        "    rmtree(path, **options)\n"
        "shutil.rmtree = die\n"
        "cli.main()\n"
    )
    killed = run(program, "convert", *OPTIONS, "--overwrite", model, out)
    assert killed.returncode == -signal.SIGKILL
    assert tree(out) == whole
    out.rename(tmp_path / "published")
    assert tpgptq("convert", *OPTIONS, model, out).exit_code == 0
    assert tree(out) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "published"]


def test_all_of_it_is_on_the_disk_before_it_is_in_its_place(
    tpgptq: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the power may fail at any moment."""
    out, work, synced, real = tmp_path / "out", tmp_path / ".out.tpgptq", set[Path](), os.fsync

    def fsync(file: int) -> None:
        if not out.exists():
            synced.add(Path(f"/proc/self/fd/{file}").readlink())
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    assert tpgptq("convert", *OPTIONS, model, out).exit_code == 0
    assert synced == {work / "output", *(work / "output" / name for name in tree(out))}


def test_many_tensors_are_resumed(tmp_path: Path) -> None:
    """A rank of a model with experts has some hundred thousand."""
    specs = {f"t{i}": TensorSpec("U8", (1,)) for i in range(50_000)}
    path = tmp_path / "m.safetensors"
    with threads(2) as pool:
        first, again = (writer.Part(path, specs, pool, lambda *_: None) for _ in range(2))
        first.write({name: np.zeros(1, np.uint8) for name in specs}).result()
    data = path.read_bytes()
    begin, written = len(data) - len(specs), dict[int, str]()
    digest = hashlib.sha256(data[:begin])
    for end in range(begin + 1, len(data) + 1):
        digest.update(data[end - 1 : end])
        written[end] = digest.hexdigest()
    again.reuse(written)
    assert again.kept == specs.keys()


PLACES = ["file", "symlink", "precious", "link inside", "pipe", "link", "hard link", "link deeper"]


@pytest.mark.parametrize("kind", PLACES)
def test_a_place_of_somebody_elses(tpgptq: Run, model: Path, tmp_path: Path, kind: str) -> None:
    work, elsewhere = tmp_path / ".out.tpgptq", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    if kind == "file":
        work.write_text("mine")
    elif kind == "symlink":
        work.symlink_to("elsewhere")
    else:
        work.mkdir()
        if kind == "precious":
            (work / "precious").write_text("mine")
        elif kind == "link inside":
            (work / "output").symlink_to("../elsewhere")
        elif kind == "pipe":
            os.mkfifo(work / "journal")
        else:
            (work / "output").mkdir()
            part = work / "output" / "model-rank-0-part-0.safetensors"
            if kind == "link":
                part.symlink_to("../../elsewhere/precious")
            elif kind == "hard link":
                part.hardlink_to(elsewhere / "precious")
            else:
                (work / "output" / "tp-2").symlink_to("../../elsewhere")
    before = sorted(tmp_path.rglob("*"))
    for option in ((), ("--resume",)):
        refused = tpgptq("convert", *OPTIONS, *option, model, tmp_path / "out")
        assert refused.exit_code == 1
        assert "is not what an interrupted conversion of yours left" in refused.stderr
        assert sorted(tmp_path.rglob("*")) == before
        assert (elsewhere / "precious").read_text() == "mine"


@pytest.mark.parametrize("place", ["", "output", "old"])
def test_a_source_where_the_output_is_written(tpgptq: Run, tmp_path: Path, place: str) -> None:
    source = make_checkpoint(tmp_path / ".out.tpgptq" / place)
    before = tree(source)
    for option in ("--overwrite", "--resume"):
        refused = tpgptq("convert", *OPTIONS, option, source, tmp_path / "out")
        assert refused.exit_code == 1
        assert f"lies over the source {source}; must be a directory of its own" in refused.stderr
        assert tree(source) == before


def test_a_disk_that_fills_up(tiny: Path, tmp_path: Path) -> None:
    """A real file system without room, where one can be mounted; see the script."""
    mount = ["unshare", *(["-U", "-r"] if os.geteuid() else []), "-m"]
    probe = [*mount, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs can't be mounted here")
    ask = argparse.Namespace(times=3, max_shard_size="200KB")
    ends, faults = interrupt.disk(ask, tiny, tmp_path)
    assert faults == []
    assert ends.total() == 3


def test_files_that_may_not_grow(tiny: Path, tmp_path: Path) -> None:
    limit = (400_000, 400_000)
    arguments = ("convert", "--tp", "2", tiny, tmp_path / "out")
    done = run(
        "from tpgptq_convert import cli; cli.main()",
        *arguments,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert done.returncode == 1
    *_, error, hint = done.stderr.splitlines()
    assert error.startswith("Error: ")
    assert "can't be written (File too large); nothing was left behind" in error
    assert hint.startswith("Hint: ")
    assert list(tmp_path.iterdir()) == []


class Failing(io.RawIOBase):
    """A file on a disk that fails."""

    def readinto(self, _: Any) -> int:
        raise OSError(5, "Input/output error")

    def seek(self, *_: int) -> int:
        return 0


@pytest.mark.parametrize(("name", "read"), [("model.safetensors", 60), ("tokenizer.json", 0)])
def test_a_disk_that_cannot_be_read(
    tpgptq: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, read: int
) -> None:
    """Which fails when a file was opened so many times."""
    real, calls = Path.open, []
    model = make_checkpoint(tmp_path / "m", blocks=4)
    (model / "tokenizer.json").write_text("{}")

    def fail(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == model / name and options.get("buffering") == 0:
            calls.append(1)
            if len(calls) > read:
                return Failing()
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", fail)
    result = tpgptq("convert", *OPTIONS, model, tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"Error: {model}/{name}: can't be read (Input/output error); must be a file that can",
        "Hint: check the disk that it is on, or the connection to it, and run again",
    ]
    assert list(tmp_path.iterdir()) == [model]


def test_a_proof_that_cannot_be_recorded(
    tpgptq: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert tpgptq("convert", "--no-verify", *OPTIONS, model, out).exit_code == 0
    before = tree(out)

    def full(path: Path, _: object) -> None:
        path.write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_json", full)
    result = tpgptq("verify", model, out)
    assert result.exit_code == 0
    assert f"Note: {out} can't be changed (No space left on device), to say" in result.stderr
    assert tree(out) == before


@pytest.mark.parametrize(
    "what", [MemoryError("Unable to allocate 1 TB"), DeviceError("x", hint="y")]
)
def test_what_fails_in_the_middle(
    tpgptq: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: Exception
) -> None:
    real, calls = convert.repack, []

    def fail(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            raise what
        return real(*arguments)

    monkeypatch.setattr(convert, "repack", fail)
    result = tpgptq("convert", *OPTIONS, model, tmp_path / "out")
    assert result.exit_code == 1
    assert [line.partition(":")[0] for line in result.stderr.splitlines()] == ["Error", "Hint"]
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from tpgptq_convert.repack_gpu import Gpu

    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    gpu = Gpu(torch.device("cuda:1"))
    with pytest.raises(DeviceError, match="cuda:1: CUDA error: launch failure; must"), gpu.work():
        raise RuntimeError("CUDA error: launch failure\nCompile with ...")
    with pytest.raises(DeviceError, match="cuda:1: CUDA out of memory"), gpu.work():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TB")
    with pytest.raises(RuntimeError, match="of our own"), gpu.work():
        raise RuntimeError("of our own")


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random(tiny: Path, processes: int) -> None:
    """The script, a few times."""
    options = ["--processes", str(processes), "--times", "4" if processes == 1 else "1"]
    options += ["--model", str(tiny), "--max-shard-size", "200KB"]
    done = subprocess.run(
        [sys.executable, interrupt.__file__, "kill", *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("; 0 faults\n")
