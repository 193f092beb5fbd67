"""Several processes under torchrun, and what one process holds in memory at a time."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from factories import make_checkpoint

from tpgptq_convert import convert, writer
from tpgptq_convert.checkpoint import read_checkpoint
from tpgptq_convert.errors import SourceError
from tpgptq_convert.plan import make_plans
from tpgptq_convert.source import Source

Run = Callable[..., Result]
TPGPTQ = ["-m", "tpgptq_convert"]
# In rank 1: raise or die when the third layer is repacked.
TROUBLE = """
import os, signal
from tpgptq_convert import cli, convert

def repack(*arguments):
    if os.environ["RANK"] == "1":
        calls.append(1)
        if len(calls) == 3:
            {trouble}
    return real(*arguments)

real, calls = convert.repack, []
convert.repack = repack
cli.main()
"""


def torchrun(processes: int, program: list[str], *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), *program, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_process_that_cannot_join_the_others(tpgptq: Run, tmp_path: Path, tiny: Path) -> None:
    environment = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "LOCAL_RANK": "0"}  # no WORLD_SIZE
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        result = tpgptq("convert", "--tp", 2, tiny, tmp_path / "out")
    assert result.exit_code == 1
    assert "could not join the others" in result.stderr
    assert len(result.stderr.splitlines()) == 2
    assert not list(tmp_path.iterdir())


def tree(directory: Path) -> dict[str, bytes]:
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (2, ["--tp", 2]),
        (3, ["--tp", 2, "--tp", 4, "--layout", "merged", "--max-shard-size", "500KB"]),
        (2, ["--tp", 1]),  # more processes than files
    ],
)
def test_several_processes_write_the_files_of_one(
    tiny: Path, tmp_path: Path, processes: int, options: list[object]
) -> None:
    one = subprocess.run(
        [sys.executable, *TPGPTQ, "convert", "-q", *map(str, options), tiny, tmp_path / "one"],
        check=False,
    )
    several = torchrun(processes, TPGPTQ, "convert", *options, tiny, tmp_path / "several")
    assert (one.returncode, several.returncode) == (0, 0), several.stderr
    assert tree(tmp_path / "one") == tree(tmp_path / "several")
    assert several.stderr.count("Wrote and verified") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "several"]


def test_several_processes_verify_together(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert torchrun(2, TPGPTQ, "convert", "-q", "--tp", 2, tiny, out).returncode == 0
    for rank, name in enumerate(("model-rank-0-part-0", "model-rank-1-part-0")):
        path = out / f"{name}.safetensors"
        data = bytearray(path.read_bytes())
        data[-1 - rank] ^= 1
        path.write_bytes(data)
    result = torchrun(2, TPGPTQ, "verify", tiny, out)
    assert result.returncode != 0
    for rank in range(2):
        assert result.stderr.count(f"Error: model-rank-{rank}-part-0.safetensors: sha256") == 1


def test_several_processes_refuse_with_one_voice(tiny: Path, tmp_path: Path) -> None:
    result = torchrun(2, TPGPTQ, "convert", "--tp", 12, tiny, tmp_path / "out")
    assert result.returncode != 0
    assert result.stderr.count("Error: tp 12: must be from 1 to 11") == 1
    (tmp_path / "out").mkdir()
    result = torchrun(2, TPGPTQ, "convert", "--tp", 2, tiny, tmp_path / "out")
    assert result.returncode != 0
    assert result.stderr.count("exists") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        ("raise OSError(5, 'Input/output error', 'a.safetensors')", "Input/output error"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "Signal 9 (SIGKILL)"),
    ],
    ids=["error", "killed"],
)
def test_what_ends_one_process_leaves_nothing(
    tiny: Path, tmp_path: Path, trouble: str, told: str
) -> None:
    program = tmp_path / "program.py"
    program.write_text(TROUBLE.format(trouble=trouble))
    result = torchrun(2, [str(program)], "convert", "--tp", 4, tiny, tmp_path / "out")
    assert result.returncode != 0
    assert told in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["program.py"]


def test_no_more_is_in_memory_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "IN_FLIGHT", 100)
    lock, held, most, told = Lock(), 0, 0, []

    def pieces() -> Iterator[convert._Piece]:
        for nbytes in [30, 250, 40, 60, 1] * 20:

            def work(nbytes: int = nbytes) -> list[convert.Write]:
                nonlocal held, most
                with lock:
                    held += nbytes
                    most = max(most, held)
                return []

            yield convert._Piece(0, nbytes, nbytes, work)

    def advance(nbytes: int) -> None:
        nonlocal held
        with lock:
            held -= nbytes
        told.append(nbytes)

    with ThreadPoolExecutor(4) as pool:
        convert._pump(pieces(), pool, advance)
    assert told == [30, 250, 40, 60, 1] * 20
    assert most == 250  # a piece larger than all that is allowed goes alone


def test_files_are_written_side_by_side_where_there_are_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    real = writer.Part.write

    def write(part: writer.Part, *arguments: Any) -> Any:
        written.append(part.path.name)
        return real(part, *arguments)

    monkeypatch.setattr(writer.Part, "write", write)
    checkpoint = read_checkpoint(make_checkpoint(tmp_path / "m", blocks=4))
    options = convert.Options(max_shard_size=40_000)
    convert.convert(checkpoint, make_plans(checkpoint, [2]), tmp_path / "out", options)
    names = sorted({name for name in written if name.startswith("model-rank-0")})
    assert len(names) > 2
    begins = [written.index(name) for name in names]
    ends = [len(written) - written[::-1].index(name) for name in names]
    assert max(begins) < min(ends)


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    source = Source(make_checkpoint(tmp_path / "m"))
    path = tmp_path / "m" / "model.safetensors"
    name = max(source.names, key=lambda name: source.file(name)._begin[name])
    whole = source.array(name)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(SourceError, match="ends in the middle of its data"):
        source.array(name)
    assert np.isfinite(whole).all()


def test_a_terminal_is_shown_how_far_it_is(tiny: Path, tmp_path: Path) -> None:
    reader, writer = pty.openpty()
    command = [sys.executable, *TPGPTQ, "convert", "--tp", "2", tiny, tmp_path / "out"]
    with subprocess.Popen(command, stderr=writer, stdout=writer) as process:
        os.close(writer)
        shown = b""
        try:
            while data := os.read(reader, 4096):
                shown += data
        except OSError:  # what Linux says at the end of a terminal
            pass
    os.close(reader)
    assert process.returncode == 0
    for label in (b"Converting", b"Verifying"):
        assert label in shown
    assert b"100%" in shown
    assert b"GB/s" in shown
