"""What an attacker found once: damage and oddities that must stay found."""

from __future__ import annotations

import json
import os
import py_compile
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from factories import edit_tensors, make_checkpoint
from safetensors.torch import save_file

from tpgptq_convert.writer import checksum

Run = Callable[..., Result]
Tensors = dict[str, torch.Tensor]
Q0, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
MERGED = "model-00001-of-00001.safetensors"


def converted(run: Run, model: Path, out: Path, *options: Any) -> Path:
    result = run("convert", "--tp", 2, *options, model, out)
    assert result.exit_code == 0, result.output
    return out


def refresh(out: Path) -> None:
    manifest = json.loads((out / "tpgptq.json").read_text())
    for group in manifest["files"].values():
        for files in group if isinstance(group, list) else [group]:
            files.update({name: checksum(out / name) for name in files})
    (out / "tpgptq.json").write_text(json.dumps(manifest))


def refused(result: Result, *expected: str, code: int = 1) -> None:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert all(
        line.startswith(("Error: ", "Hint: ", "Note: ", "Damaged: "))
        for line in result.stderr.splitlines()
    )
    for text in expected:
        assert text in result.stderr


@pytest.mark.parametrize("layout", ["ranks", "merged"])
def test_a_failure_in_the_middle_is_told_in_words(
    tpgptq: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    from tpgptq_convert import writer

    real, calls = writer.Part.write, []

    def fail(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(writer.Part, "write", fail)
    model = make_checkpoint(tmp_path / "m")
    out = tmp_path / "out"
    refused(tpgptq("convert", "--tp", 2, "--layout", layout, model, out), "No space left")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_layer_that_is_all_zero_is_sound(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m")
    edit_tensors(model / "model.safetensors", lambda t: t[f"{DOWN}.scales"].zero_())
    converted(tpgptq, model, tmp_path / "out")


def test_a_bias_may_have_a_dtype_of_its_own(tpgptq: Run, tmp_path: Path) -> None:
    def widen(t: Tensors) -> None:
        t.update({name: x.float() for name, x in t.items() if name.endswith(".bias")})

    model = make_checkpoint(tmp_path / "m", model_type="qwen2")
    edit_tensors(model / "model.safetensors", widen)
    converted(tpgptq, model, tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite(tpgptq: Run, tmp_path: Path, value: float) -> None:
    def spoil(t: Tensors) -> None:
        t[f"{Q0}.scales"][0, 0] = value

    model = make_checkpoint(tmp_path / "m")
    edit_tensors(model / "model.safetensors", spoil)
    refused(tpgptq("convert", "--tp", 2, model, tmp_path / "out"), f"{Q0}.scales: holds NaN")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_foreign_directory_where_a_failed_output_would_go(tpgptq: Run, tmp_path: Path) -> None:
    from tpgptq_convert import verify as module

    model = make_checkpoint(tmp_path / "m")
    (tmp_path / "out.failed").write_text("mine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "verify", lambda *_: ["everything is wrong"])
        result = tpgptq("convert", "--tp", 2, model, tmp_path / "out")
    refused(result, "everything is wrong", code=3)
    assert f"the output could not be kept in {tmp_path / 'out.failed'}" in result.stderr
    assert (tmp_path / "out.failed").read_text() == "mine"


def test_an_output_that_was_imported_from_can_be_replaced(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m")
    out = converted(tpgptq, model, tmp_path / "out")
    (out / "__pycache__").mkdir()
    (out / "__pycache__" / "tpgptq_runtime.cpython-311.pyc").write_bytes(b"")
    converted(tpgptq, model, out, "--overwrite")


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "head_dim"])
@pytest.mark.parametrize("value", [10**9, 10**30])
def test_sizes_beyond_reason(tpgptq: Run, tmp_path: Path, key: str, value: int) -> None:
    model = make_checkpoint(tmp_path / "m", config={key: value})
    refused(
        tpgptq("inspect", model), f"config.json: {key} is 1", "must be a positive integer up to"
    )


def test_words_are_not_booleans(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", tied=True, config={"tie_word_embeddings": "false"})
    refused(tpgptq("inspect", model), "lm_head.weight: missing")


def test_more_blocks_than_tensors(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", config={"num_hidden_layers": 10**6})
    refused(tpgptq("inspect", model), "num_hidden_layers is 1000000; the files hold only")


def test_a_pipe_in_the_place_of_the_weights(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m")
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")
    refused(tpgptq("inspect", model), "no safetensors file")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.norm.weight", torch.ones(3)),
        ("model.norm.weight", torch.ones(64, dtype=torch.int32)),
        ("model.embed_tokens.weight", torch.ones(())),
        ("model.layers.0.self_attn.q_norm.weight", torch.ones(64)),
    ],
)
def test_shared_tensors_of_a_wrong_kind(
    tpgptq: Run, tmp_path: Path, name: str, tensor: torch.Tensor
) -> None:
    model = make_checkpoint(tmp_path / "m", model_type="qwen3")
    edit_tensors(model / "model.safetensors", lambda t: t.update({name: tensor}))
    refused(tpgptq("inspect", model), f"{name}: is ", "must be F16 or BF16 or F32")


def test_one_group_and_eight_columns(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", heads=2, kv_heads=1, head_dim=8, group_size=64)
    assert tpgptq("convert", "--tp", 1, model, tmp_path / "out").exit_code == 0


def test_odd_values_in_config_json(tpgptq: Run, tmp_path: Path) -> None:
    odd = {"rope_theta": float("nan"), "x": "\ud800"}
    model = make_checkpoint(tmp_path / "m", config=odd)
    (model / "tpgptq_runtime.py").write_text("not ours")
    out = converted(tpgptq, model, tmp_path / "out")
    assert "not ours" not in (out / "tpgptq_runtime.py").read_text()


def test_names_that_would_break_a_line(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m")
    edit_tensors(model / "model.safetensors", lambda t: t.update({"a\nb\x1b[31m": torch.zeros(1)}))
    refused(tpgptq("inspect", model), "Error: a\\nb\\x1b[31m: unknown")


def test_paths_that_are_too_long(tpgptq: Run, tmp_path: Path) -> None:
    refused(tpgptq("inspect", tmp_path / ("x" * 300)), "too long")
    model = make_checkpoint(tmp_path / "m")
    refused(tpgptq("convert", "--tp", 2, model, tmp_path / ("x" * 300)), "too long")


def test_groups_are_not_halved_below_a_multiple_of_8(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(
        tmp_path / "m", heads=20, kv_heads=2, head_dim=40, intermediate=160, group_size=40
    )
    out = converted(tpgptq, model, tmp_path / "out", "--row-group", 16)
    modules = json.loads((out / "tpgptq.json").read_text())["modules"]
    assert modules["model.layers.0.self_attn.o_proj"]["group_size"] == 40


def longer(t: Tensors) -> None:
    t[f"{DOWN}.qweight"] = torch.cat([t[f"{DOWN}.qweight"], t[f"{DOWN}.qweight"][:1]])


def scalar(t: Tensors) -> None:
    t[f"{Q0}.scales"] = torch.ones((), dtype=torch.float16)


@pytest.mark.parametrize("damage", [longer, scalar])
def test_merged_tensors_that_cannot_be_cut(
    tpgptq: Run, tmp_path: Path, damage: Callable[[Tensors], None]
) -> None:
    model = make_checkpoint(tmp_path / "m")
    out = converted(tpgptq, model, tmp_path / "out", "--layout", "merged")
    edit_tensors(out / MERGED, damage)
    refresh(out)
    refused(tpgptq("verify", model, out), "model.layers.0.", "rank 0: ", code=3)


def test_a_merged_index_that_points_elsewhere(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m")
    out = converted(tpgptq, model, tmp_path / "out", "--layout", "merged")
    (out / "model.safetensors.index.json").write_text('{"weight_map": {"a": "nope"}}')
    refresh(out)
    refused(tpgptq("verify", model, out), "weight_map doesn't say", code=3)


def test_a_key_added_to_config_json(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m")
    out = converted(tpgptq, model, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    refresh(out)
    refused(tpgptq("verify", model, out), "rope_theta is 5.0; the source doesn't have it", code=3)


@pytest.mark.parametrize("vector", [torch.ones(()), torch.ones(0, 4).int(), torch.ones(2, 64)])
def test_index_vectors_of_a_wrong_kind(tpgptq: Run, tmp_path: Path, vector: torch.Tensor) -> None:
    model = make_checkpoint(tmp_path / "m")
    out = converted(tpgptq, model, tmp_path / "out")
    name = f"{Q0}.rows"
    edit_tensors(out / "tpgptq-index.safetensors", lambda t: t.update({name: vector}))
    refresh(out)
    refused(tpgptq("verify", model, out), f"{Q0}: rank 0: tpgptq-index.safetensors is", code=3)


def test_the_runtime_names_what_is_damaged(tpgptq: Run, tmp_path: Path) -> None:
    from tpgptq_convert.tpgptq_runtime import Checkpoint, FormatError

    model = make_checkpoint(tmp_path / "m")
    out = converted(tpgptq, model, tmp_path / "out")
    part = out / "model-rank-0-part-0.safetensors"
    whole = part.read_bytes()
    for damaged in (b"", whole[:100], b"\xff" * 200):
        part.write_bytes(damaged)
        with pytest.raises(FormatError, match="not a whole safetensors file"):
            Checkpoint(out).rank(0)
    part.write_bytes(whole)
    edit_tensors(part, lambda t: t.pop(f"{Q0}.scales"))
    with pytest.raises(FormatError, match="q_proj: rank 0 lacks scales"):
        Checkpoint(out).rank(0)
    (out / "tpgptq.json").write_text("{")
    with pytest.raises(FormatError, match="not a JSON object"):
        Checkpoint(out)


def edit_manifest(out: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((out / "tpgptq.json").read_text())
    edit(manifest)
    (out / "tpgptq.json").write_text(json.dumps(manifest))


def unlist(name: str) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        (out / name).unlink()
        edit_manifest(out, lambda manifest: manifest["files"]["other"].pop(name))

    return damage


def stated_symmetric(out: Path) -> None:
    edit_manifest(out, lambda manifest: manifest.update(sym=True))
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["sym"] = True
    (out / "config.json").write_text(json.dumps(config))


def a_key_that_servers_obey(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {"-:.*": {}}
    (out / "config.json").write_text(json.dumps(config))


def vectors(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        index = out / "tpgptq-index.safetensors"
        edit_tensors(index, lambda t: t.update({name: change(t[name])}))

    return damage


def scaled_padding(out: Path) -> None:
    def scale(t: Tensors) -> None:
        groups = t[f"{DOWN}.scales"]
        empty = (groups == 0).all(dim=1)
        assert empty.any()
        groups[empty] = 1

    edit_tensors(out / "model-rank-1-part-0.safetensors", scale)


def sized(name: str, size: int) -> Callable[[Path], None]:
    return lambda out: edit_manifest(
        out, lambda manifest: manifest["modules"][name].update(out_features=size)
    )


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (stated_symmetric, "tpgptq.json: sym is True; must be False"),
        (a_key_that_servers_obey, "dynamic doesn't belong there"),
        (unlist("tpgptq_runtime.py"), "files don't list tpgptq_runtime.py"),
        (unlist("model.safetensors.index.json"), "files don't list model.safetensors.index"),
        (lambda out: edit_manifest(out, lambda m: m["source"].update(files={})), "source.files"),
        (lambda out: edit_manifest(out, lambda m: m["source"].update(files=[1])), "source.files"),
        (lambda out: edit_manifest(out, lambda m: m.update(tp=10**9)), "must be a list of"),
        (vectors(f"{Q0}.cols", lambda v: v - 1), f"Error: {Q0}: rank 0: "),
        (vectors(f"{Q0}.cols", lambda v: v[:, :0]), "rank 0: 0 cols in"),
        (vectors(f"{Q0}.rows", lambda v: v[:, :0]), "rank 0: 0 rows in"),
        (sized("model.layers.0.self_attn.k_proj", 8), "out_features is 8; must be"),
        (sized("model.layers.0.mlp.up_proj", 8), "out_features is 8; must be"),
        (sized("model.layers.0.self_attn.o_proj", 32), "out_features is 32; must be 64"),
        (scaled_padding, "rank 1: groups of padding alone are not exactly zero"),
    ],
)
def test_what_verify_once_accepted_or_fell_over(
    tpgptq: Run, tmp_path: Path, damage: Callable[[Path], None], told: str
) -> None:
    model = make_checkpoint(tmp_path / "m", sym=False, quant={"sym": None}, intermediate=96)
    out = converted(tpgptq, model, tmp_path / "out")
    damage(out)
    refresh(out)
    refused(tpgptq("verify", model, out), told, code=1 if told == "must be a list of" else 3)


def test_a_vector_too_many(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m")
    out = converted(tpgptq, model, tmp_path / "out")
    edit_tensors(out / "tpgptq-index.safetensors", lambda t: t.update(x=torch.zeros(1).int()))
    refresh(out)
    refused(tpgptq("verify", model, out), "x: doesn't belong into tpgptq-index", code=3)


def test_merged_columns_beyond_those_of_the_ranks(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m")
    out = converted(tpgptq, model, tmp_path / "out", "--layout", "merged")

    def widen(t: Tensors) -> None:
        for part in ("qweight", "qzeros", "scales"):
            first, last = t[f"{Q0}.{part}"].chunk(2, dim=1)
            t[f"{Q0}.{part}"] = torch.cat([first, first, last, last], dim=1)

    edit_tensors(out / MERGED, widen)
    refresh(out)
    refused(tpgptq("verify", model, out), f"{Q0}: rank 0: ", code=3)


def test_directories_made_for_an_output_that_failed_are_removed(
    tpgptq: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    model = make_checkpoint(tmp_path / "m")
    monkeypatch.setattr(os, "pwrite", fail)
    refused(tpgptq("convert", "--tp", 2, model, tmp_path / "a" / "b" / "out"), "Input/output")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_more_files_than_may_be_open(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", blocks=8)
    command = f'ulimit -n 100; exec "{sys.executable}" -m tpgptq_convert convert --tp 2'
    command += f' -q --max-shard-size 1KB "{model}" "{tmp_path / "out"}"'
    assert subprocess.run(["bash", "-c", command], check=False).returncode == 0
    assert len(list((tmp_path / "out").glob("model-rank-*"))) > 200


NOT_A_MANIFEST: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda m: m["modules"][Q0].update(bits=4.0), f"{Q0}: bits is 4.0; must be one of"),
    (lambda m: m["source"].update(revision=5), "source.revision is 5; must be a commit, or null"),
    (lambda m: m["source"].pop("revision"), "source.revision is None"),
    (lambda m: m["source"].update(name=None), "source.name is None; must be text"),
    (lambda m: m.update(tool=[]), "tool is []; must be text"),
    (lambda m: m.update(model_type=7), "model_type is 7; must be text"),
    *(
        (lambda m, entry=entry: m["files"]["other"].update(x=entry), "files must map every file's")
        for entry in (
            *({"bytes": nbytes, "sha256": ""} for nbytes in ("x", None, [], -1, 1e300, True)),
            *({"bytes": 1, "sha256": sha256} for sha256 in (None, [1])),
        )
    ),
]


@pytest.mark.parametrize(("edit", "told"), NOT_A_MANIFEST)
@pytest.mark.parametrize("command", ["verify", "push"])
def test_manifests_of_odd_types(
    tpgptq: Run, tmp_path: Path, edit: Callable[[dict[str, Any]], Any], told: str, command: str
) -> None:
    model = make_checkpoint(tmp_path / "m")
    out = converted(tpgptq, model, tmp_path / "out", "--no-verify")
    edit_manifest(out, edit)
    first, second = (model, out) if command == "verify" else (out, "org/name")
    refused(tpgptq(command, first, second), told)


def test_a_perm_in_the_layout_that_has_none(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m")
    out = converted(tpgptq, model, tmp_path / "out", "--layout", "gptq")
    edit_manifest(out, lambda manifest: manifest["modules"][Q0].update(perm=True))
    refused(tpgptq("verify", model, out), f"{Q0}: perm is True; must be false")


@pytest.mark.parametrize("config", [{}, {"model_type": "llama"}, {"num_attention_heads": 0}])
def test_limits_of_a_config_that_was_damaged(config: dict[str, Any]) -> None:
    from tpgptq_convert.served import limits

    assert limits({"model_type": "llama"} | config, 2) == []
    assert limits(config, 2) == []


def test_a_link_where_verify_writes(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m")
    out = converted(tpgptq, model, tmp_path / "out", "--no-verify")
    (tmp_path / "precious").write_text("mine")
    (out / ".tpgptq.json").symlink_to("../precious")
    assert tpgptq("verify", model, out).exit_code == 0
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (out / "tpgptq.json").is_symlink()
    assert json.loads((out / "tpgptq.json").read_text())["verified"] is True


NEVER_ENDING: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", NEVER_ENDING)
@pytest.mark.parametrize("name", ["model-rank-1-part-0.safetensors", "model-shared.safetensors"])
def test_pipes_and_devices_in_an_output(tpgptq: Run, tmp_path: Path, name: str, kind: str) -> None:
    model = make_checkpoint(tmp_path / "m")
    out = converted(tpgptq, model, tmp_path / "out")
    (out / name).unlink()
    NEVER_ENDING[kind](out / name)
    told = f"{name}: not a whole safetensors file (a directory, a pipe or a device)"
    refused(tpgptq("verify", model, out), told, code=3)
    skip = ("convert", "--tp", 2, "--skip-if-current", model, out)
    refused(tpgptq(*skip), "use --overwrite to replace it")
    assert tpgptq(*skip, "--overwrite").exit_code == 0


@pytest.mark.parametrize("file", ["m/config.json", "out/tpgptq.json"])
def test_json_that_is_a_hole(tpgptq: Run, tmp_path: Path, file: str) -> None:
    model = make_checkpoint(tmp_path / "m")
    out = converted(tpgptq, model, tmp_path / "out")
    os.truncate(tmp_path / file, 1 << 40)
    refused(tpgptq("verify", model, out), f"{file}: has {1 << 40} bytes; must have at most")


def test_index_vectors_that_are_holes(tpgptq: Run, tmp_path: Path) -> None:
    """They are told by their header, and not read."""
    model = make_checkpoint(tmp_path / "m")
    out = converted(tpgptq, model, tmp_path / "out")
    index, nbytes = out / "tpgptq-index.safetensors", 1 << 40
    entry = {"dtype": "I32", "shape": [1, nbytes // 4], "data_offsets": [0, nbytes]}
    header = json.dumps({f"{Q0}.rows": entry}).encode()
    index.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(index, 8 + len(header) + nbytes)
    edit_manifest(out, lambda manifest: manifest["files"]["other"].pop(index.name))
    refused(tpgptq("verify", model, out), f"{Q0}: rank 0: {nbytes // 4} rows in tpgptq", code=3)


def exchange_ranks(out: Path, one: int, other: int) -> None:
    """Two ranks' files change places, and what the index says of them: every value stays right."""
    paths = [out / f"model-rank-{rank}-part-0.safetensors" for rank in (one, other)]
    files = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(files), strict=True):
        path.write_bytes(content)

    def edit(vectors: Tensors) -> None:
        for name, vector in vectors.items():
            if len(vector) > 1:
                vector[[one, other]] = vector[[other, one]]
                vectors[name] = vector

    edit_tensors(out / "tpgptq-index.safetensors", edit)


def refresh_all(out: Path) -> None:
    """The checksums, and what config.json calls the weights."""
    from tpgptq_convert.manifest import weights_digest

    refresh(out)
    config = json.loads((out / "config.json").read_text())
    manifest = json.loads((out / "tpgptq.json").read_text())
    config["quantization_config"]["weights_sha256"] = weights_digest(manifest)
    (out / "config.json").write_text(json.dumps(config))
    refresh(out)


def test_ranks_that_changed_places(tpgptq: Run, tmp_path: Path) -> None:
    """Biases of positions are told by a head's number, and kv heads are shared by neighbours."""
    shape = {"heads": 8, "kv_heads": 2, "head_dim": 8}
    model = make_checkpoint(tmp_path / "m", **shape)
    out = tmp_path / "out"
    assert tpgptq("convert", "--tp", 4, model, out).exit_code == 0
    exchange_ranks(out, 1, 2)
    refresh_all(out)
    told = "model.layers.0.self_attn.o_proj: rank 1: its query heads aren't those of its place"
    refused(tpgptq("verify", model, out), told, code=3)


def test_a_degree_that_would_cut_groups(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", intermediate=320)
    out = converted(tpgptq, model, tmp_path / "out", "--layout", "gptq")
    edit_manifest(out, lambda manifest: manifest.update(tp=4))
    told = f"{DOWN}: in_features is 320; must be 4 times as many whole groups of 32"
    refused(tpgptq("verify", model, out), told, code=3)


def beside(name: str, listed: bool) -> Callable[[Path], None]:
    def add(out: Path) -> None:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("{}")
        if listed:
            edit_manifest(out, lambda manifest: manifest["files"]["other"].update({name: {}}))

    return add


def another_runtime(out: Path) -> None:
    (out / "tpgptq_runtime.py").write_text("print('evil')")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        *(
            (beside(name, listed), f"{name}: {'the manifest lists it' if listed else 'not in the'}")
            for name in ("generation_config.json", "adapter_model.safetensors", "sub/x.bin")
            for listed in (True, False)
        ),
        (another_runtime, "tpgptq_runtime.py: is not that of tpgptq-convert"),
    ],
)
def test_files_that_the_source_does_not_have(
    tpgptq: Run, tmp_path: Path, damage: Callable[[Path], None], told: str
) -> None:
    """Loaders take up adapters, generation configs and templates by their names."""
    model = make_checkpoint(tmp_path / "m")
    out = converted(tpgptq, model, tmp_path / "out")
    damage(out)
    refresh(out)
    refused(tpgptq("verify", model, out), told, code=3)


def test_a_runtime_module_that_cannot_be_compared(tpgptq: Run, tmp_path: Path) -> None:
    """Another version's may be anything, and so may what says that it is another version's."""
    model = make_checkpoint(tmp_path / "m")
    out = converted(tpgptq, model, tmp_path / "out")
    another_runtime(out)
    edit_manifest(out, lambda manifest: manifest.update(tool="tpgptq-convert 0\n"))
    refresh(out)
    result = tpgptq("verify", model, out)
    assert result.exit_code == 0
    told = "Note: tpgptq_runtime.py was not compared: it is to be that of tpgptq-convert 0\\n, and"
    assert result.stderr.startswith(told)


@pytest.mark.parametrize(
    ("layout", "group", "name"),
    [
        ("ranks", "shared", "model.safetensors"),
        ("ranks", "ranks", "adapter_model.safetensors"),
        ("ranks", "ranks", "model-rank-0-part-1.safetensors"),
        ("merged", "merged", "model.safetensors"),
        ("gptq", "merged", "model.safetensors"),
    ],
)
def test_weight_files_of_other_names(
    tpgptq: Run, tmp_path: Path, layout: str, group: str, name: str
) -> None:
    """Loaders take model.safetensors before any index: of nothing, they make random weights."""
    model = make_checkpoint(tmp_path / "m")
    out = converted(tpgptq, model, tmp_path / "out", "--layout", layout)
    save_file({}, out / name, {"format": "pt"})

    def add(manifest: dict[str, Any]) -> None:
        files = manifest["files"][group]
        (files[1] if group == "ranks" else files)[name] = {"bytes": 0, "sha256": ""}

    edit_manifest(out, add)
    refresh(out) if layout == "gptq" else refresh_all(out)
    told = f"tpgptq.json: {name}: no name for one of 2 weight files of"
    refused(tpgptq("verify", model, out), told, code=3)


def test_a_link_to_a_directory_in_an_output(tpgptq: Run, tmp_path: Path) -> None:
    """Python would import a package from it, as it would from a directory."""
    model = make_checkpoint(tmp_path / "m")
    out = converted(tpgptq, model, tmp_path / "out")
    (tmp_path / "evil").mkdir()
    (out / "torch").symlink_to("../evil")
    refused(tpgptq("verify", model, out), "torch: not in the manifest", code=3)


def test_files_that_may_lie_in_an_output(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m")
    out = converted(tpgptq, model, tmp_path / "out")
    for name in (".gitattributes", ".cache/huggingface/x", "__pycache__/y.pyc", "README.md"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("edited")
    assert tpgptq("verify", model, out).exit_code == 0


def test_code_beside_the_weights_that_poses_as_a_module(tpgptq: Run, tmp_path: Path) -> None:
    """An output's directory is where Python looks first when the runtime module is run there."""
    model, out = make_checkpoint(tmp_path / "m"), tmp_path / "out"
    evil = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    (tmp_path / "evil.py").write_text(evil)
    posing = ["json.py", "__future__.py", "sitecustomize.py", "torch.py", "copy.so", "re.pyc"]
    posing += ["transformers/__init__.py", "tpgptq_runtime/__init__.py"]
    kept = ["modeling_own.py", "numpy.py", "torch/utils.py", "json.txt", "regex/__init__.py"]
    for name in (*posing, *kept):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(evil)
    py_compile.compile(
        str(tmp_path / "evil.py"),
        str(model / "__pycache__" / f"tpgptq_runtime.{sys.implementation.cache_tag}.pyc"),
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,  # it is just believed
    )
    converted(tpgptq, model, out)
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files & {*posing, *kept} == {*kept}
    assert not any("__pycache__" in name for name in files)
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    program = [sys.executable, str(out / "tpgptq_runtime.py"), "--help"]
    subprocess.run(program, env=environment, capture_output=True, check=True)
    (out / "numpy.py").unlink()  # which torch imports; a program passes over it, a path doesn't
    program = [sys.executable, "-c", "import tpgptq_runtime"]
    subprocess.run(program, env=environment | {"PYTHONPATH": str(out)}, check=True)
    assert not (tmp_path / "ran").exists()
