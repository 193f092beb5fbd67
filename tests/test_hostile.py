"""Hostile checkpoints: the cases of scripts/fuzz.py, and that their checks would notice."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import pytest
from click.testing import Result
from factories import edit_tensors, make_checkpoint

from tpgptq_convert import checkpoint, source

Run = Callable[..., Result]


def test_attacks_and_mutations() -> None:
    """All attacks made by hand, and 300 checkpoints damaged by chance."""
    numbers = [-1 - i for i in range(len(fuzz.ATTACKS))] + list(range(300))
    outcomes = list(fuzz.run_all(numbers, 7, 2, fuzz.PATIENCE, None))
    assert sorted(outcome.number for outcome in outcomes) == sorted(numbers)
    faults = {(o.number, o.title): o.faults for o in outcomes if o.faults}
    assert faults == {}
    ends = Counter(outcome.ended for outcome in outcomes)
    assert min(ends["converted"], ends["refused"]) > 100
    assert ends.total() == ends["converted"] + ends["refused"]


@pytest.fixture
def bases(tmp_path: Path) -> Path:
    for name, options in fuzz.BASES.items():
        fuzz.make_base(tmp_path / "bases" / name, **options)
    return tmp_path / "bases"


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


def writing_elsewhere(directory: Path, *more: Any) -> Any:
    (directory.parent / "elsewhere").touch()
    return original(directory, *more)


original = checkpoint.read_checkpoint


@pytest.mark.parametrize(
    ("read", "fault"),
    [
        (raising(KeyError("bug")), "traceback from inspect: KeyError('bug')"),
        (raising(SystemExit(2)), "inspect exits with 2"),
        (raising(SystemExit(1)), "inspect says ''"),
        (writing_elsewhere, "outside OUT: ['elsewhere']"),
    ],
)
def test_what_must_not_happen_is_noticed(
    bases: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[..., Any],
    fault: str,
) -> None:
    monkeypatch.setattr(checkpoint, "read_checkpoint", read)
    monkeypatch.chdir(tmp_path)  # which a case leaves
    outcome = fuzz.run_case(1, 0, bases, tmp_path / "case")
    assert any(found.startswith(fault) for found in outcome.faults), outcome.faults


def test_what_hangs_is_noticed() -> None:
    outcomes = fuzz.run_all([3], 0, 1, 0.0, None)
    assert [fault.partition(":")[0] for o in outcomes for fault in o.faults] == ["hangs"]


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_an_output_that_is_wrong_is_noticed(
    tpgptq: Run, bases: Path, tmp_path: Path, part: str
) -> None:
    model, out = bases / "qwen2, asymmetric", tmp_path / "out"
    assert tpgptq("convert", "--tp", 2, model, out).exit_code == 0
    assert list(fuzz.unfaithful(model, out, 2)) == []
    edit_tensors(
        out / "model-rank-1-part-0.safetensors", lambda t: t[f"{fuzz.Q0}.{part}"][1].neg_()
    )
    (fault,) = fuzz.unfaithful(model, out, 2)
    assert fault.startswith(f"{fuzz.Q0} of rank 1: ")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_biases_that_are_not_finite(tpgptq: Run, tmp_path: Path, value: float) -> None:
    model = make_checkpoint(tmp_path / "m", model_type="qwen2")
    edit_tensors(model / "model.safetensors", lambda t: t[f"{fuzz.Q0}.bias"].fill_(value))
    result = tpgptq("convert", "--tp", 2, model, tmp_path / "out")
    assert result.exit_code == 1
    assert f"{fuzz.Q0}.bias: holds NaN or infinity" in result.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_norms_that_are_not_finite_are_copied(tpgptq: Run, tmp_path: Path, value: float) -> None:
    """They are nothing that a conversion touches, and the proof must not stumble over them."""

    def spoil(tensors: dict[str, Any]) -> None:
        for name in tensors:
            if name.endswith("norm.weight"):
                tensors[name][::2] = value

    model = make_checkpoint(tmp_path / "m", model_type="qwen3")
    edit_tensors(model / "model.safetensors", spoil)
    assert tpgptq("convert", "--tp", 2, model, tmp_path / "out").exit_code == 0


def test_a_g_idx_that_no_quantiser_writes_is_told(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m")
    assert "more rows in one group" not in tpgptq("inspect", model).stdout

    def spoil(tensors: dict[str, Any]) -> None:
        g_idx = tensors[f"{fuzz.DOWN0}.g_idx"]
        g_idx[5] = (g_idx[5] + 1) % 3

    edit_tensors(model / "model.safetensors", spoil)
    shown = tpgptq("inspect", model)
    assert "Note: 1 of 14 layers have a g_idx with more rows in one group than" in shown.stdout
    assert tpgptq("convert", "--tp", 2, model, tmp_path / "out").exit_code == 0


def test_the_cache_of_the_hub_is_made_of_links(tpgptq: Run, tmp_path: Path) -> None:
    cached = tmp_path / "models--org--name"
    model = make_checkpoint(cached / "snapshots" / "0123abcd")
    (model / "tokenizer.json").write_text("{}")
    (cached / "blobs").mkdir()
    for path in list(model.iterdir()):
        blob = cached / "blobs" / path.name[::-1]
        path.rename(blob)
        path.symlink_to(Path("../../blobs") / blob.name)
    assert tpgptq("convert", "--tp", 2, model, tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md", "config.json", "sub/notes.txt"])
def test_a_link_out_of_the_checkpoint(tpgptq: Run, tmp_path: Path, name: str) -> None:
    """What lies there would be published along with the output."""
    model = make_checkpoint(tmp_path / "m")
    (model / "sub").mkdir()
    secret = tmp_path / "secret"
    if name == "config.json":
        (model / name).rename(secret)
    else:
        secret.write_text("secret")
    (model / name).symlink_to(secret)
    result = tpgptq("convert", "--tp", 2, model, tmp_path / "out")
    assert result.exit_code == 1
    assert f"Error: {name}: a link to {secret}; must lie in the checkpoint's" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "secret"]


def test_weights_may_lie_on_another_disk(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m")
    (model / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (model / "model.safetensors").symlink_to("../elsewhere.safetensors")
    assert tpgptq("convert", "--tp", 2, model, tmp_path / "out").exit_code == 0


def test_too_many_files(tpgptq: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MOST_CARRIED", 3)
    model = make_checkpoint(tmp_path / "m")
    (model / ".git").mkdir()
    for i in range(3):  # beside config.json
        (model / f"notes-{i}").touch()
        (model / ".git" / f"object-{i}").touch()
    result = tpgptq("convert", "--tp", 2, model, tmp_path / "out")
    assert result.exit_code == 1
    assert f"{model}: holds more than 3 files beside the weights" in result.stderr
    (model / "notes-0").unlink()
    assert tpgptq("convert", "--tp", 2, model, tmp_path / "out").exit_code == 0


def test_the_room_for_what_is_taken_along_is_counted(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m")
    (model / "notes.txt").touch()
    os.truncate(model / "notes.txt", shutil.disk_usage(tmp_path).free + 10**12)
    result = tpgptq("convert", "--tp", 2, model, tmp_path / "out")
    assert result.exit_code == 1
    assert "GB free" in result.stderr


@pytest.mark.parametrize("file", ["config.json", "quantize_config.json"])
def test_json_that_could_be_read_but_not_written(tpgptq: Run, tmp_path: Path, file: str) -> None:
    model = make_checkpoint(tmp_path / "m")
    (model / file).write_text('{"a": ' * 900 + "1" + "}" * 900)
    for command in (["inspect", model], ["convert", "--tp", 2, model, tmp_path / "out"]):
        result = tpgptq(*command)
        assert result.exit_code == 1
        assert f"{file}: values in values, more than 30 deep" in result.stderr


def test_problems_are_shown_in_part_and_given_whole(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", config={"model_type": "x" * 100_000})
    result = tpgptq("inspect", "--json", model)
    assert result.exit_code == 1
    assert max(map(len, result.stderr.splitlines())) < 1100
    assert len(json.loads(result.stdout)["problems"]) == 1
