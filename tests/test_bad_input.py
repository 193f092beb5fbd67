"""Every anticipated failure: what is and must be, a hint, exit code 1, and nothing written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from factories import edit_tensors, make_checkpoint
from safetensors.torch import save_file

from tpgptq_convert import staging
from tpgptq_convert.families import FAMILIES

Run = Callable[..., Result]
Q0 = "model.layers.0.self_attn.q_proj"
DOWN1 = "model.layers.1.mlp.down_proj"


def refuse(run: Run, model: Path, tmp_path: Path, *expected: str, tp: int = 2) -> list[str]:
    """Convert and inspect must both refuse, alike; returns the error lines."""
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    result = run("convert", "--tp", tp, model, tmp_path / "out")
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    lines = result.stderr.splitlines()
    assert all(line.startswith(("Error: ", "Hint: ", "... and ")) for line in lines), lines
    assert sum(line.startswith("Hint: ") for line in lines) == 1, lines
    for text in expected:
        assert text in result.stderr
    inspected = run("inspect", "--tp", tp, model)
    assert (inspected.exit_code, inspected.stderr) == (1, result.stderr)
    return lines


def two_lines(lines: list[str]) -> None:
    assert [line.partition(":")[0] for line in lines] == ["Error", "Hint"]


def test_no_such_directory(tpgptq: Run, tmp_path: Path) -> None:
    two_lines(refuse(tpgptq, tmp_path / "none", tmp_path, "none: no such directory"))


def test_a_file_instead_of_a_directory(tpgptq: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    two_lines(refuse(tpgptq, tmp_path / "file", tmp_path, "no such directory"))


def test_an_empty_directory(tpgptq: Run, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    two_lines(refuse(tpgptq, tmp_path / "m", tmp_path, "no safetensors file"))


def test_no_config(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m")
    (model / "config.json").unlink()
    two_lines(refuse(tpgptq, model, tmp_path, "config.json: missing"))


@pytest.mark.parametrize("text", ["{", "[]", "\ud800", "[" * 100_000, "null"])
def test_config_that_is_no_json_object(tpgptq: Run, tmp_path: Path, text: str) -> None:
    model = make_checkpoint(tmp_path / "m")
    (model / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    two_lines(refuse(tpgptq, model, tmp_path, "config.json: ", "JSON"))


def test_no_quantisation_config(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", config_file="elsewhere.json")
    two_lines(refuse(tpgptq, model, tmp_path, "no quantisation config"))


@pytest.mark.parametrize(
    ("quant", "expected"),
    [
        ({"quant_method": "awq"}, "quant_method is 'awq'; must be 'gptq' or 'compressed-tensors'"),
        ({"is_marlin_format": True}, "checkpoint_format is 'marlin'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; must be gptq or gptq_v2"),
        ({"checkpoint_format": "gemm"}, "checkpoint_format is 'gemm'"),
        ({"bits": 5}, "bits is 5; must be one of (2, 3, 4, 8)"),
        ({"bits": "4"}, "bits is '4'; must be of type int"),
        ({"bits": None}, "lack 'bits'"),
        ({"group_size": 0}, "group_size is 0; must be -1 or a multiple of 8"),
        ({"group_size": 100}, "group_size is 100"),
        ({"sym": "yes"}, "sym is 'yes'; must be of type bool"),
        ({"dynamic": ["o_proj"]}, "dynamic is ['o_proj']; must be of type dict"),
        ({"dynamic": {"+:(": {}}}, "'+:(': not a regular expression of RE2's kind (missing )"),
        ({"dynamic": {"(?!a)b": {}}}, "RE2's kind (invalid perl operator: (?!)"),
        ({"dynamic": {"a{99999}": {}}}, "RE2's kind (invalid repetition size: {99999})"),
        ({"dynamic": {"(" * 9999: {}}}, "RE2's kind (longer than 1000 characters)"),
        ({"dynamic": {r"\pL{100}": {}}}, "RE2's kind (pattern too large - compile failed)"),
        ({"dynamic": {str(i): {} for i in range(5001)}}, "dynamic has 5001 rules; must have at"),
        ({"dynamic": {"\ud800": {}}}, "RE2's kind ('utf-8' codec can't encode character"),
        ({"dynamic": {"+:.*o_proj": 8}}, "dynamic: '+:.*o_proj': is 8; must be an object"),
        ({"dynamic": {".*": {"bits": 5}}}, "dynamic: '.*': bits is 5; must be one of (2, 3, 4, 8)"),
        ({"dynamic": {".*": {"bits": "8"}}}, "bits is '8'; must be of type int"),
        ({"dynamic": {".*": {"format": "gptq_v2"}}}, "changes checkpoint_format; must be one for"),
        ({"pack_dtype": "int64"}, "pack_dtype is 'int64'"),
        ({"quant_method": "tpgptq"}, "already converted"),
    ],
)
def test_another_quantisation(
    tpgptq: Run, tmp_path: Path, quant: dict[str, Any], expected: str
) -> None:
    model = make_checkpoint(tmp_path / "m", quant=quant)
    two_lines(refuse(tpgptq, model, tmp_path, expected))


def test_two_configs_that_disagree(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m")
    (model / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 64}))
    two_lines(
        refuse(
            tpgptq, model, tmp_path,
            "group_size is 64 in quantize_config.json and 32 in config.json; must be the same",
        )
    )  # fmt: skip


@pytest.mark.parametrize("name", ["pytorch_model.bin", "gptq_model-4bit-32g.pt"])
def test_pickles(tpgptq: Run, tmp_path: Path, name: str) -> None:
    model = make_checkpoint(tmp_path / "m")
    (model / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, model / name)
    two_lines(refuse(tpgptq, model, tmp_path, f"{name}: a pickle", "safetensors"))


@pytest.mark.parametrize("model_type", ["rwkv", "mamba", None, 7])
def test_another_family(tpgptq: Run, tmp_path: Path, model_type: Any) -> None:
    model = make_checkpoint(tmp_path / "m", config={"model_type": model_type})
    two_lines(
        refuse(
            tpgptq,
            model,
            tmp_path,
            f"model_type is {model_type!r}",
            f"must be one of {', '.join(FAMILIES)}",
        )
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"hidden_size": None}, "hidden_size is None; must be a positive integer"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_attention_heads": 4.5}, "num_attention_heads is 4.5"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads, 3"),
        ({"hidden_act": "xielu"}, "hidden_act is 'xielu'; must be one of silu, gelu"),
    ],
)
def test_absurd_sizes(tpgptq: Run, tmp_path: Path, config: dict[str, Any], expected: str) -> None:
    model = make_checkpoint(tmp_path / "m", config=config)
    two_lines(refuse(tpgptq, model, tmp_path, expected))


Tensors = dict[str, torch.Tensor]


def edited(tmp_path: Path, edit: Callable[[Tensors], object], **shape: Any) -> Path:
    model = make_checkpoint(tmp_path / "m", **shape)
    edit_tensors(model / "model.safetensors", edit)
    return model


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_missing_tensor(tpgptq: Run, tmp_path: Path, part: str) -> None:
    model = edited(tmp_path, lambda t: t.pop(f"{Q0}.{part}"))
    two_lines(refuse(tpgptq, model, tmp_path, f"{Q0}.{part}: missing"))


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.input_layernorm.weight", "lm_head.weight"]
)
def test_missing_shared_tensor(tpgptq: Run, tmp_path: Path, name: str) -> None:
    model = edited(tmp_path, lambda t: t.pop(name))
    two_lines(refuse(tpgptq, model, tmp_path, f"{name}: missing"))


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_wrong_shape(tpgptq: Run, tmp_path: Path, part: str) -> None:
    def cut(t: Tensors) -> None:
        t[f"{Q0}.{part}"] = t[f"{Q0}.{part}"][1:].clone()

    two_lines(refuse(tpgptq, edited(tmp_path, cut), tmp_path, f"{Q0}.{part}: is ", "must be "))


@pytest.mark.parametrize(
    ("part", "dtype"),
    [
        ("qweight", torch.int64),
        ("qzeros", torch.float32),
        ("scales", torch.int32),
        ("g_idx", torch.float32),
    ],
)
def test_wrong_dtype(tpgptq: Run, tmp_path: Path, part: str, dtype: torch.dtype) -> None:
    def cast(t: Tensors) -> None:
        t[f"{Q0}.{part}"] = t[f"{Q0}.{part}"].to(dtype)

    two_lines(refuse(tpgptq, edited(tmp_path, cast), tmp_path, f"{Q0}.{part}: is ", "must be "))


@pytest.mark.parametrize("value", [-1, 3, 1000])
def test_g_idx_out_of_range(tpgptq: Run, tmp_path: Path, value: int) -> None:
    def set_one(t: Tensors) -> None:
        t[f"{DOWN1}.g_idx"][4] = value

    model = edited(tmp_path, set_one)
    two_lines(refuse(tpgptq, model, tmp_path, f"{DOWN1}.g_idx: has values from", "must be 0 to 2"))


def test_int64_g_idx_is_fine(tpgptq: Run, tmp_path: Path) -> None:
    def cast(t: Tensors) -> None:
        t[f"{DOWN1}.g_idx"] = t[f"{DOWN1}.g_idx"].long()

    model = edited(tmp_path, cast)
    assert tpgptq("convert", "--tp", 2, model, tmp_path / "out").exit_code == 0


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.0.w1.qweight",
        "lora_A.weight",
        f"{Q0}.B",
    ],
)
def test_a_tensor_nobody_knows(tpgptq: Run, tmp_path: Path, name: str) -> None:
    model = edited(tmp_path, lambda t: t.update({name: torch.zeros(3)}))
    two_lines(refuse(tpgptq, model, tmp_path, f"{name}: unknown"))


def test_a_block_beyond_those_that_config_json_counts(tpgptq: Run, tmp_path: Path) -> None:
    more = {f"model.layers.2.mlp.{x}_proj.qweight": torch.zeros(3) for x in ("up", "down")}
    model = edited(tmp_path, lambda t: t.update(more))
    words = "model.layers.2: unknown (tensors: 2); must be one of the 2 blocks that config.json"
    two_lines(refuse(tpgptq, model, tmp_path, words))


def test_a_layer_that_is_not_quantised_has_the_shape_that_it_must_have(
    tpgptq: Run, tmp_path: Path
) -> None:
    model = make_checkpoint(tmp_path / "m", hidden=96, modules={Q0: None})
    edit_tensors(
        model / "model.safetensors",
        lambda t: t.update({f"{Q0}.weight": t[f"{Q0}.weight"].T.contiguous()}),
    )
    two_lines(refuse(tpgptq, model, tmp_path, f"{Q0}.weight: is F16 [96, 64]; must be"))


def test_a_rule_that_the_tensors_do_not_follow(tpgptq: Run, tmp_path: Path) -> None:
    rule = {"+:.*1.self_attn.o_proj": {"bits": 8}}
    lines = refuse(
        tpgptq,
        make_checkpoint(tmp_path / "m", quant={"dynamic": rule}),
        tmp_path,
        "model.layers.1.self_attn.o_proj.qweight: is I32 [8, 64]; must be I32 [16, 64]",
    )
    assert len(lines) == 3  # qzeros too, and the hint


def test_a_quantised_head_of_no_columns(tpgptq: Run, tmp_path: Path) -> None:
    def empty(t: Tensors) -> None:
        t.update({n: t[n][:, :0] for n in ("lm_head.qweight", "lm_head.qzeros", "lm_head.scales")})

    model = make_checkpoint(tmp_path / "m", modules={"lm_head": {}})
    edit_tensors(model / "model.safetensors", empty)
    two_lines(refuse(tpgptq, model, tmp_path, "lm_head: out_features is 0; must be a positive"))


def test_a_quantised_head_that_is_the_embeddings_as_well(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", tied=True, modules={"lm_head": {}})
    two_lines(refuse(tpgptq, model, tmp_path, "lm_head: is quantised; must not be"))


def test_the_weight_of_a_layer_that_is_not_quantised_is_finite(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", modules={Q0: None})
    edit_tensors(model / "model.safetensors", lambda t: t[f"{Q0}.weight"][3, 5].fill_(torch.nan))
    result = tpgptq("convert", "--tp", 2, model, tmp_path / "out")
    assert result.exit_code == 1
    assert f"{Q0}.weight: holds NaN or infinity" in result.stderr


def test_a_bias_that_the_model_does_not_have(tpgptq: Run, tmp_path: Path) -> None:
    model = edited(tmp_path, lambda t: t.update({f"{Q0}.bias": torch.ones(64).half()}))
    two_lines(refuse(tpgptq, model, tmp_path, f"{Q0}.bias: is not zero"))


def test_missing_g_idx_though_desc_act(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", g_idx="missing", quant={"desc_act": True})
    lines = refuse(tpgptq, model, tmp_path, f"{Q0}.g_idx: missing, though the config says desc_act")
    assert len(lines) == 14 + 1


def test_all_problems_are_listed_together(tpgptq: Run, tmp_path: Path) -> None:
    def damage(t: Tensors) -> None:
        del t["model.norm.weight"]
        t["stranger"] = torch.zeros(1)
        t[f"{DOWN1}.g_idx"][0] = 99
        t[f"{Q0}.scales"] = t[f"{Q0}.scales"].int()

    lines = refuse(tpgptq, edited(tmp_path, damage), tmp_path)
    subjects = {line.removeprefix("Error: ").partition(":")[0] for line in lines[:-1]}
    assert subjects == {"model.norm.weight", "stranger", f"{DOWN1}.g_idx", f"{Q0}.scales"}


def test_a_wrong_config_and_an_unknown_family_are_listed_together(
    tpgptq: Run, tmp_path: Path
) -> None:
    model = make_checkpoint(tmp_path / "m", config={"model_type": "rwkv"}, quant={"bits": 5})
    refuse(tpgptq, model, tmp_path, "model_type is 'rwkv'", "bits is 5")


def test_hundreds_of_problems_are_cut_short(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", blocks=2, config={"num_hidden_layers": 9})
    lines = refuse(tpgptq, model, tmp_path)
    assert len(lines) == 22
    assert lines[20].startswith("... and ")


def test_more_problems_than_anyone_reads(tpgptq: Run, tmp_path: Path) -> None:
    """Each block that isn't there lacks 28 tensors; they are not all looked for."""
    names = {f"t{i}": torch.zeros(0) for i in range(20_000)}
    model = edited(tmp_path, lambda t: t.update(names), config={"num_hidden_layers": 20_000})
    told = json.loads(tpgptq("inspect", "--json", model).stdout)
    assert 10_000 <= len(told["problems"]) < 10_010
    assert told["problems"][0].startswith("model.layers.2.self_attn.q_proj.qweight: missing")


@pytest.mark.parametrize("size", [0, 4, 100, 5000])
def test_a_file_cut_short(tpgptq: Run, tmp_path: Path, size: int) -> None:
    model = make_checkpoint(tmp_path / "m")
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    two_lines(refuse(tpgptq, model, tmp_path, "model.safetensors: not a whole safetensors file"))


def test_several_files_without_an_index(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", files=3)
    (model / "model.safetensors.index.json").unlink()
    two_lines(refuse(tpgptq, model, tmp_path, "3 safetensors files", "no index"))


def test_a_file_that_the_index_names_is_missing(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", files=3)
    (model / "model-00002-of-00003.safetensors").unlink()
    two_lines(refuse(tpgptq, model, tmp_path, "model-00002-of-00003.safetensors: missing"))


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "model.bin", 3])
def test_an_index_that_points_elsewhere(tpgptq: Run, tmp_path: Path, name: Any) -> None:
    model = make_checkpoint(tmp_path / "m", files=2)
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    two_lines(refuse(tpgptq, model, tmp_path, "in the same directory"))


def test_the_same_tensor_in_two_files(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", files=2)
    edit_tensors(
        model / "model-00001-of-00002.safetensors",
        lambda t: t.update({f"{Q0}.qzeros": torch.zeros(1)}),
    )
    edit_tensors(
        model / "model-00002-of-00002.safetensors",
        lambda t: t.update({f"{Q0}.qzeros": torch.zeros(1)}),
    )
    two_lines(refuse(tpgptq, model, tmp_path, f"{Q0}.qzeros: stands in both"))


@pytest.mark.parametrize("tp", [0, -1, 5, 8, 1000])
def test_degrees(tpgptq: Run, tmp_path: Path, tp: int) -> None:
    model = make_checkpoint(tmp_path / "m")
    two_lines(refuse(tpgptq, model, tmp_path, f"tp {tp}: ", "must be from 1 to 4", tp=tp))


def test_sym_that_is_not(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", sym=False, quant={"sym": True})
    result = tpgptq("convert", "--tp", 2, model, tmp_path / "out")
    assert result.exit_code == 1
    assert f"{Q0}.qzeros: holds zero points other than 8" in result.stderr
    assert not (tmp_path / "out").exists()


def test_zero_points_that_padding_cannot_hold(tpgptq: Run, tmp_path: Path) -> None:
    def wrap(t: Tensors) -> None:
        t["model.layers.1.self_attn.o_proj.qzeros"][:] = -1

    model = edited(tmp_path, wrap, quant={"sym": False})
    result = tpgptq("convert", "--tp", 2, model, tmp_path / "out")
    assert result.exit_code == 1
    two_lines(result.stderr.splitlines())
    assert "o_proj.qzeros: 128 zero points are stored as 15" in result.stderr
    assert not (tmp_path / "out").exists()
    # Nothing is padded at tp 1, and the fields are moved as they are.
    assert tpgptq("convert", "--tp", 1, model, tmp_path / "out").exit_code == 0


def test_output_exists(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m")
    for out in (tmp_path / "file", tmp_path / "directory"):
        out.mkdir() if out.name == "directory" else out.write_text("mine")
        result = tpgptq("convert", "--tp", 2, model, out)
        assert result.exit_code == 1
        two_lines(result.stderr.splitlines())
        assert f"{out.name}: exists" in result.stderr
        assert "must be a new directory" in result.stderr
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("inside", ["m", "m/out", "."])
def test_output_over_the_source(tpgptq: Run, tmp_path: Path, inside: str) -> None:
    model = make_checkpoint(tmp_path / "m")
    before = sorted(tmp_path.rglob("*"))
    result = tpgptq("convert", "--tp", 2, "--overwrite", model, tmp_path / inside)
    assert result.exit_code == 1
    two_lines(result.stderr.splitlines())
    assert "lies over the source" in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_output_below_a_file(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m")
    (tmp_path / "file").write_text("")
    result = tpgptq("convert", "--tp", 2, model, tmp_path / "file" / "out")
    assert result.exit_code == 1
    two_lines(result.stderr.splitlines())
    assert "not a directory that can be written" in result.stderr


def test_output_that_cannot_be_written(
    tpgptq: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    model = make_checkpoint(tmp_path / "m")
    monkeypatch.setattr(staging, "_made", denied)
    result = tpgptq("convert", "--tp", 2, model, tmp_path / "out")
    assert result.exit_code == 1
    two_lines(result.stderr.splitlines())
    assert "Permission denied" in result.stderr


def test_a_disk_that_fills_up_leaves_nothing(
    tpgptq: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_checkpoint(tmp_path / "m")
    real, written = os.pwrite, []

    def fill(file: int, data: memoryview, offset: int) -> int:
        written.append(len(data))
        if len(written) > 20:
            raise OSError(28, "No space left on device")
        return real(file, data[: len(data) // 2 + 1], offset)  # as a system may

    monkeypatch.setattr(os, "pwrite", fill)
    result = tpgptq("convert", "--tp", 2, model, tmp_path / "out")
    assert result.exit_code == 1
    two_lines(result.stderr.splitlines())
    assert "No space left on device" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_disk_that_is_too_small_is_seen_beforehand(
    tpgptq: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from types import SimpleNamespace

    model = make_checkpoint(tmp_path / "m")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    result = tpgptq("convert", "--tp", 2, model, tmp_path / "out")
    assert result.exit_code == 1
    two_lines(result.stderr.splitlines())
    assert "GB free" in result.stderr


def test_verify_of_what_is_no_output(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m")
    for out, expected in ((tmp_path / "none", "no such directory"), (model, "has no tpgptq.json")):
        result = tpgptq("verify", model, out)
        assert result.exit_code == 1
        assert expected in result.stderr
        two_lines(result.stderr.splitlines())


def test_verify_of_an_unknown_version(tpgptq: Run, tmp_path: Path) -> None:
    model, out = make_checkpoint(tmp_path / "m"), tmp_path / "out"
    assert tpgptq("convert", "--tp", 2, model, out).exit_code == 0
    manifest = json.loads((out / "tpgptq.json").read_text())
    (out / "tpgptq.json").write_text(json.dumps(manifest | {"format_version": 3}))
    result = tpgptq("verify", model, out)
    assert result.exit_code == 1
    assert "version 3; must be 'tpgptq' version 1 or 2" in result.stderr


def test_marlin_tensors_without_a_word_in_the_config(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m")
    save_file({f"{Q0}.B": torch.zeros(1)}, model / "model.safetensors")
    refuse(tpgptq, model, tmp_path, f"{Q0}.qweight: missing")
