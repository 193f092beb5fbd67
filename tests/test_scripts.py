"""The scripts that run without a GPU or a server, on the smallest sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from click.testing import Result

Run = Callable[..., Result]
SCRIPTS = Path(__file__).parent.parent / "scripts"
SHAPE = ["--hidden", "256", "--intermediate", "512", "--blocks", "2", "--heads", "8"]
SHAPE += ["--kv-heads", "4"]


def test_a_synthetic_checkpoint_converts(tpgptq: Run, tmp_path: Path) -> None:
    make = [sys.executable, str(SCRIPTS / "make_synthetic.py"), str(tmp_path / "model")]
    subprocess.run([*make, *SHAPE, "--vocab", "64"], check=True)
    assert tpgptq("convert", "--tp", 2, tmp_path / "model", tmp_path / "out").exit_code == 0


def test_every_degree_of_a_known_model(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    command = [sys.executable, str(SCRIPTS / "degrees.py"), "--model", "starcoder"]
    done = subprocess.run([*command, "--json", str(path)], check=True, stdout=subprocess.PIPE)
    degrees = json.loads(path.read_text())["starcoder"]
    assert [degree["tp"] for degree in degrees] == list(range(1, 17))
    assert degrees[0]["growth"] == degrees[0]["speed_up"] == 1
    # 48 query heads share one kv head; 24576 channels are 192 groups.
    assert degrees[6]["heads"] == {"query": 7, "kv": 1, "padded_query": 49, "padded_kv": 1}
    assert degrees[6]["intermediate"] == 7 * 28 * 128
    assert done.stdout.count(b"\n") == 18


def test_decoding_runs_whole_on_two_ranks(tmp_path: Path) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(SCRIPTS / "bench_decode.py"), "--device", "cpu", "--check", *SHAPE),
            *("--prompt", "8", "--batch", "1", "--steps", "2", "--json", str(tmp_path / "d.json")),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )
    results = json.loads((tmp_path / "d.json").read_text())["results"]
    (ours,) = [result for result in results if result["row"] == "ours"]
    assert not ours["reason"]
    assert ours["error"] < 1e-5
    assert ours["collectives"] == 2


def test_converting_is_measured_against_a_copy_also_by_two_processes(tmp_path: Path) -> None:
    model = tmp_path / "model"
    make = [sys.executable, str(SCRIPTS / "make_synthetic.py"), str(model)]
    subprocess.run([*make, *SHAPE, "--vocab", "64"], check=True)
    bench = [sys.executable, str(SCRIPTS / "bench_convert.py"), "--model", str(model)]
    bench += ["--runs", "1", "--processes", "2", "--work", str(tmp_path)]
    done = subprocess.run(
        [*bench, "--ways", "copy$|convert|tp 2$|processes"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if "|" in line]
    assert rows[2:] == ["copy", "tp 2: convert", "copy and hash, tp 2", "tp 2: 2 processes"]
