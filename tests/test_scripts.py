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
