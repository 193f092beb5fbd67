"""--json: every object is what output.schema.json describes, and the same for the same input."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import Result
from factories import edit_tensors, edit_text, make_checkpoint

from tpgptq_convert import cli

Run = Callable[..., Result]
SCHEMA = json.loads(Path(cli.__file__).with_name("output.schema.json").read_text())


def closed(schema: Any) -> Any:
    """The schema without room for keys that it doesn't name."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    of_objects = {"additionalProperties": False} if "properties" in schema else {}
    return of_objects | {key: closed(part) for key, part in schema.items()}


VALIDATOR = jsonschema.Draft202012Validator(closed(SCHEMA))


def printed(
    result: Result | subprocess.CompletedProcess[str], kind: str, code: int = 0
) -> dict[str, Any]:
    """The one object on stdout, which must be of this kind and of no other."""
    ended = result.exit_code if isinstance(result, Result) else result.returncode
    assert ended == code, result.stderr
    value = json.loads(result.stdout)
    VALIDATOR.validate(value)
    only = {"$ref": f"#/$defs/{kind}", "$defs": closed(SCHEMA["$defs"])}
    jsonschema.Draft202012Validator(only).validate(value)
    return value


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$defs"]["failure"]["properties"]["json_version"] == {"const": cli.JSON_VERSION}


@pytest.mark.parametrize("layout", ["ranks", "merged", "gptq"])
def test_every_command(tpgptq: Run, tiny: Path, tmp_path: Path, layout: str) -> None:
    out = tmp_path / "out"
    convert = ("convert", "--json", "--tp", 2, "--layout", layout)
    assert printed(tpgptq("inspect", "--json", tiny), "report")["command"] == "inspect"
    planned = printed(tpgptq(*convert, "--dry-run", tiny, out), "report")
    assert planned["command"] == "convert"
    written = printed(tpgptq(*convert, tiny, out), "conversion")
    assert (written["skipped"], written["verified"]) == (False, True)
    printed(tpgptq("verify", "--json", tiny, out), "verification")
    again = printed(tpgptq(*convert, "--skip-if-current", tiny, out), "conversion")
    assert (again["skipped"], again["verified"]) == (True, True)
    assert again["manifests"] == written["manifests"]
    assert again["notes"] == written["notes"] != []


def test_a_plan_for_an_output_that_exists(tpgptq: Run, tiny: Path, tmp_path: Path) -> None:
    out, mine = tmp_path / "out", tmp_path / "mine"
    plan = ("convert", "--tp", 2, "--dry-run")

    def notes(*arguments: object) -> list[str]:
        found: list[str] = printed(tpgptq(*plan, "--json", *arguments), "report")["notes"]
        told = [f"Note: {note}" for note in found]
        assert tpgptq(*plan, *arguments).stdout.splitlines()[-len(told) :][: len(told)] == told
        return found

    before = notes(tiny, out)
    assert tpgptq("convert", "--tp", 2, tiny, out).exit_code == 0
    refused = f"{out}: exists; must be a new directory; it would be refused (use --overwrite to re"
    *same, told = notes(tiny, out)
    assert same == before
    assert told == f"{refused}place it)"
    assert notes("--skip-if-current", tiny, out)[-1] == f"{told}, if it isn't current"
    assert notes("--overwrite", tiny, out)[-1] == f"{out}: exists; it would be replaced"
    mine.mkdir()
    (mine / "thesis").write_text("mine")
    told = notes("--overwrite", tiny, mine)[-1]
    assert told.startswith(f"{mine}: exists, and {mine / 'thesis'} is no part of an output of this")
    assert (mine / "thesis").read_text() == "mine"


def test_failures(tpgptq: Run, tmp_path: Path) -> None:
    model, out = make_checkpoint(tmp_path / "m"), tmp_path / "out"
    for command in (("inspect", "--tp", 99, model), ("convert", "--tp", 99, model, out)):
        result = tpgptq(*command, "--json")
        failure = printed(result, "failure", code=1)
        assert failure["command"] == command[0]
        assert f"Error: {failure['problems'][0]}\nHint: {failure['hint']}\n" == result.stderr
    assert tpgptq("convert", "--tp", 2, model, out).exit_code == 0
    edit_tensors(out / "model-shared.safetensors", lambda t: t["model.norm.weight"].add_(1))
    failure = printed(tpgptq("verify", "--json", model, out), "failure", code=3)
    assert failure["exit_code"] == 3
    assert "model.norm.weight: differs from the source's" in failure["problems"]


def test_a_key_too_many_would_be_noticed(tpgptq: Run, tiny: Path) -> None:
    report = json.loads(tpgptq("inspect", "--json", tiny).stdout)
    report["layers"][0]["colour"] = "blue"
    jsonschema.validate(report, SCHEMA)  # others must bear with it
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(report)


def test_the_same_input_gives_the_same_object(tpgptq: Run, tiny: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(tiny, tmp_path / "elsewhere" / tiny.name)
    commands = ["inspect", "--json"], ["convert", "--json", "--tp", "2", "--dry-run"]
    for command in commands:
        out = [] if command[0] == "inspect" else [tmp_path / "out"]
        assert tpgptq(*command, tiny, *out).stdout == tpgptq(*command, elsewhere, *out).stdout
    first, second = (
        json.loads(
            tpgptq(
                "convert", "--json", "--tp", 2, model, tmp_path / f"of-{model.parent.name}"
            ).stdout
        )
        for model in (tiny, elsewhere)
    )
    assert first["manifests"] == second["manifests"]


EDITS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "source weights": (
        lambda model, _: edit_tensors(
            model / "model.safetensors", lambda t: t["model.norm.weight"].add_(1)
        ),
        "tpgptq.json: source: files: model.safetensors: sha256 is '",
    ),
    "source config": (
        lambda model, _: edit_text(model / "config.json", "1e-06", "1e-05"),
        "config.json: rms_norm_eps is 1e-06, not 1e-05",
    ),
    "carried file": (
        lambda model, _: (model / "tokenizer.json").write_text("{}"),
        "tokenizer.json differs from ",
    ),
    "new carried file": (
        lambda model, _: (model / "LICENSE").write_text("mine"),
        "LICENSE is missing",
    ),
    "output weights": (
        lambda _, out: edit_tensors(
            out / "model-rank-1-part-0.safetensors",
            lambda t: t["model.layers.0.mlp.down_proj.scales"].mul_(2),
        ),
        "model-rank-1-part-0.safetensors isn't what tpgptq.json states: damaged, or edited",
    ),
    "output file gone": (
        lambda _, out: (out / "model-shared.safetensors").unlink(),
        "model-shared.safetensors is missing",
    ),
    "output runtime": (
        lambda _, out: (out / "tpgptq_runtime.py").write_text("pass"),
        "tpgptq_runtime.py isn't what tpgptq.json states: damaged, or edited",
    ),
    "output index": (
        lambda _, out: (out / "tpgptq-index.safetensors").write_bytes(b""),
        "tpgptq-index.safetensors isn't what tpgptq.json states: damaged, or edited",
    ),
    "manifest": (
        lambda _, out: edit_text(out / "tpgptq.json", "tpgptq-convert ", "tpgptq-convert 9."),
        "tpgptq.json: tool is 'tpgptq-convert 9.",
    ),
    "manifest written otherwise": (
        lambda _, out: edit_text(out / "tpgptq.json", '"tp": 2', '"tp":  2'),
        "tpgptq.json is written in another way",
    ),
    "not verified": (
        lambda _, out: edit_text(out / "tpgptq.json", '"verified": true', '"verified": false'),
        "tpgptq.json: verified is False, not True",
    ),
}


@pytest.mark.parametrize(("edit", "told"), EDITS.values(), ids=EDITS.keys())
def test_what_is_not_current_is_replaced(
    tpgptq: Run, tmp_path: Path, edit: Callable[[Path, Path], object], told: str
) -> None:
    model, out = make_checkpoint(tmp_path / "m"), tmp_path / "out"
    (model / "tokenizer.json").write_text('{"version": 1}')
    convert = ("convert", "--tp", 2, "--skip-if-current", "--overwrite", "--json")
    assert not json.loads(tpgptq(*convert, model, out).stdout)["skipped"]
    assert json.loads(tpgptq(*convert, model, out).stdout)["skipped"]
    edit(model, out)
    refused = tpgptq("convert", "--tp", 2, "--skip-if-current", "-q", model, out)
    assert refused.exit_code == 1
    error, hint = refused.stderr.splitlines()
    assert error.startswith(f"Error: {out}: isn't what this would write: {told}")
    assert hint == "Hint: use --overwrite to replace it"
    replaced = tpgptq(*convert, model, out)
    written = printed(replaced, "conversion")
    assert not written["skipped"]
    assert error.removeprefix("Error: ") in written["notes"]
    assert tpgptq("verify", model, out).exit_code == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--tp", 4), "tpgptq.json: tp is 2, not 4"),
        (("--tp", 2, "--tp", 4), "tp-2/tpgptq.json is missing"),
        (("--tp", 2, "--layout", "merged"), "tpgptq.json: layout is 'ranks', not 'merged'"),
        (
            ("--tp", 2, "--row-group", 8),
            "tpgptq.json: modules: model.layers.0.self_attn.o_proj: in_features is 512, not 384",
        ),
        (("--tp", 2, "--max-shard-size", "20KB"), "model-rank-0-part-1.safetensors is missing"),
    ],
)
def test_other_options_are_not_current(
    tpgptq: Run, tmp_path: Path, options: tuple[Any], told: str
) -> None:
    model = make_checkpoint(tmp_path / "m", heads=32, kv_heads=4)
    for first, second, differs in ((("--tp", 2), options, told), (options, ("--tp", 2), "")):
        out = tmp_path / str(len(first))
        convert = ("convert", "--skip-if-current", "--overwrite", model, out)
        assert tpgptq(*convert, "-q", *first).exit_code == 0
        assert json.loads(tpgptq(*convert, "--json", *first).stdout)["skipped"]
        lines = tpgptq(*convert, *second).stderr.splitlines()
        (line,) = (line for line in lines if line.startswith(f"Note: {out}: isn't what this would"))
        assert differs in line
        shutil.rmtree(out)


def test_what_people_edit_stays_current(tpgptq: Run, tmp_path: Path) -> None:
    model, out = make_checkpoint(tmp_path / "m"), tmp_path / "out"
    assert tpgptq("convert", "--tp", 2, model, out).exit_code == 0
    (out / "README.md").write_text("our own card")
    result = tpgptq("convert", "--tp", 2, "--skip-if-current", model, out)
    assert (result.exit_code, result.stderr) == (0, f"{out} is current: nothing to do\n")
    assert (out / "README.md").read_text() == "our own card"
