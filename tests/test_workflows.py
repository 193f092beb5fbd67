"""The GitHub Actions workflows: their steps do what they say, on this machine's own Hub."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from hub_server import WRITER, Hub

ROOT = Path(__file__).parent.parent
WORKFLOWS = ROOT / ".github" / "workflows"


def read(name: str) -> Any:
    return yaml.safe_load((WORKFLOWS / name).read_text())


def test_the_one_that_tests_runs_what_ci_runs() -> None:
    runs = [step["run"] for step in read("test.yml")["jobs"]["test"]["steps"] if "run" in step]
    assert runs == ["bash .ci/run"]
    assert (ROOT / ".ci" / "run").is_file()


def run_steps(hub: Hub, home: Path, **inputs: str) -> list[subprocess.CompletedProcess[str]]:
    """What the commands of convert.yml do, one after the other until one fails."""
    workflow = read("convert.yml")
    asked = workflow[True]["workflow_dispatch"]["inputs"]  # YAML takes the key "on" for a boolean
    assert inputs.keys() <= asked.keys()
    values = {name: str(spec.get("default", "")).lower() for name, spec in asked.items()} | inputs
    known = {f"inputs.{name}": value for name, value in values.items()}
    known["secrets.HF_TOKEN"] = WRITER
    job = workflow["jobs"]["convert"]
    # Nothing is pasted into a script: a name could be a command.
    assert all("${{" not in step.get("run", "") for step in job["steps"])
    environment = {
        name: re.sub(r"\$\{\{ (\S+) \}\}", lambda match: known[match[1]], value)
        for name, value in job["env"].items()
    }
    cleared = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = []
    for step in job["steps"]:
        if "run" not in step or step["name"] == "Install":
            continue  # what is installed is what is tested
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        done.append(
            subprocess.run(
                command,
                cwd=ROOT,
                env=cleared
                | hub.environment(home)
                | environment
                | {
                    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                    "RUNNER_TEMP": str(home),
                    "GITHUB_STEP_SUMMARY": str(home / "summary.md"),
                },
                capture_output=True,
                text=True,
                check=False,
            )
        )
        if done[-1].returncode:
            break
    return done


def test_the_one_that_converts_and_pushes(tiny: Path, tmp_path: Path) -> None:
    with Hub() as hub:
        commit = hub.add_directory("org/tiny", tiny)
        hub.add("org/tiny", {"config.json": b"{}"})
        asked = {"model": "org/tiny", "revision": commit, "tp": "2 4"}
        plan, push = run_steps(hub, tmp_path, **asked, repository="org/out; touch stolen")
        assert plan.returncode == 0
        assert push.returncode == 1
        assert not (ROOT / "stolen").exists()
        plan, push = run_steps(hub, tmp_path, **asked, repository="org/out", private="true")
        assert push.returncode == 0, push.stdout
        repository = hub.repositories["org/out"]
        assert repository.private
        assert repository.branches.keys() == {"main", "tp-2", "tp-4"}
        manifest = json.loads(repository.files("tp-4")["tpgptq.json"])
        assert manifest["source"]["revision"] == commit
        summary = (tmp_path / "summary.md").read_text()
        assert "28 of 28 layers are truly act-ordered." in summary
        assert f"Pushed {hub.endpoint}/org/out/tree/tp-4 (commit " in summary
        assert run_steps(hub, tmp_path, model="a/b", repository="c/d")[-1].returncode == 1
