"""`tpgptq convert` from end to end: what it reads, what it writes, what verify finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from factories import dequantise, edit_tensors, edit_text, make_checkpoint, refresh_checksums
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file

from tpgptq_convert.families import ACTIVATIONS
from tpgptq_convert.verify import FUNCTIONS

Run = Callable[..., Result]


def succeed(result: Result) -> Result:
    assert result.exit_code == 0, result.output
    return result


def manifest_of(out: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((out / "tpgptq.json").read_text())
    return manifest


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in sorted(out.glob("model-*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def rank_tensors(out: Path, rank: int, layer: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for name in manifest_of(out)["files"]["ranks"][rank]:
        tensors |= load_file(out / name)
    return {k.rpartition(".")[2]: t for k, t in tensors.items() if k.startswith(f"{layer}.")}


SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"model_type": "mistral"},
    "qwen2 with q, k, v biases": {"model_type": "qwen2"},
    "qwen3 with head norms": {"model_type": "qwen3"},
    "biases everywhere": {"config": {"attention_bias": True, "mlp_bias": True}},
    "asymmetric": {"sym": False, "checkpoint_format": "gptq_v2"},
    "asymmetric v1, no padding": {"sym": False, "g_idx": "trivial", "intermediate": 128},
    "gptq_v2": {"checkpoint_format": "gptq_v2"},
    "group size 64": {"group_size": 64, "intermediate": 128},
    "group size 128, larger than hidden": {"group_size": 128, "intermediate": 512},
    "one group per column": {"group_size": -1},
    "ragged last group": {"hidden": 80, "intermediate": 112},
    "different g_idx": {"g_idx": "different"},
    "trivial": {"g_idx": "trivial"},
    "all zero": {"g_idx": "zero"},
    "missing": {"g_idx": "missing"},
    "desc_act said, trivial": {"g_idx": "trivial", "quant": {"desc_act": True}},
    "desc_act denied, real": {"quant": {"desc_act": False}},
    "zero biases": {"zero_biases": True},
    "tied": {"tied": True},
    "lm_head although tied": {"config": {"tie_word_embeddings": True}},
    "bfloat16": {"dtype": torch.bfloat16},
    "float32 scales": {"dtype": torch.float32},
    "three files": {"files": 3},
    "AutoGPTQ's name": {"basename": "gptq_model-4bit-32g", "config_file": "quantize_config.json"},
    "AutoGPTQ's shards": {"basename": "gptq_model-4bit-32g", "files": 2},
    "old keys": {
        "config_file": "quantize_config.json",
        "quant": {"quant_method": None, "model_name_or_path": None, "model_file_base_name": None},
    },
    "GPTQModel's keys": {
        "quant": {
            "checkpoint_format": "gptq",
            "format": "gptq",
            "method": "gptq",
            "pack_dtype": "int32",
            "lm_head": False,
            "meta": {"quantizer": ["gptqmodel:7.7.0"], "static_groups": False},
        }
    },
    "sym not said": {"quant": {"sym": None}},
    "gelu": {"config": {"hidden_act": "gelu_pytorch_tanh"}},
}


@pytest.mark.parametrize("layout", ["ranks", "merged"])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_converts_and_verifies(
    tpgptq: Run, tmp_path: Path, shape: dict[str, Any], tp: int, layout: str
) -> None:
    model, out = make_checkpoint(tmp_path / "model", **shape), tmp_path / "out"
    succeed(tpgptq("convert", "--tp", tp, "--layout", layout, model, out))
    succeed(tpgptq("verify", model, out))
    config = json.loads((out / "config.json").read_text())
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "tpgptq"
    assert quantization["desc_act"] is False
    assert (quantization["tp"], quantization["layout"]) == (tp, layout)
    assert quantization["sym"] is shape.get("sym", True)
    modules = manifest_of(out)["modules"]
    assert len(modules) == 14
    assert modules["model.layers.1.mlp.down_proj"]["parallel"] == "row"
    down = modules["model.layers.0.mlp.down_proj"]["in_features"]
    assert config["intermediate_size"] == tp * down


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_value_stands_where_the_index_says(tpgptq: Run, tmp_path: Path, tp: int) -> None:
    """The exact claim once more, by the slow formula and without any of the package's code."""
    model, out = make_checkpoint(tmp_path / "model", blocks=1), tmp_path / "out"
    succeed(tpgptq("convert", "--tp", tp, "--no-verify", model, out))
    source, index = (
        load_file(model / "model.safetensors"),
        load_arrays(out / "tpgptq-index.safetensors"),
    )
    for layer, module in manifest_of(out)["modules"].items():
        parts = ("qweight", "qzeros", "scales")
        whole = dequantise(
            {part: source[f"{layer}.{part}"] for part in parts}, source[f"{layer}.g_idx"].numpy()
        )
        seen = torch.zeros_like(whole)
        for rank in range(tp):
            tensors = rank_tensors(out, rank, layer)
            k, n = module["in_features"], module["out_features"]
            weight = dequantise(tensors, np.arange(k) // module["group_size"])
            assert weight.shape == (k, n)
            assert ("perm" in tensors) == module["perm"]
            rows, cols = (
                vectors[min(rank, len(vectors) - 1)]
                for vectors in (index[f"{layer}.rows"], index[f"{layer}.cols"])
            )
            assert (weight[rows < 0] == 0).all()
            assert (weight[:, cols < 0] == 0).all()
            real_rows, real_cols = np.flatnonzero(rows >= 0), np.flatnonzero(cols >= 0)
            at = np.ix_(rows[real_rows], cols[real_cols])
            assert torch.equal(weight[np.ix_(real_rows, real_cols)], whole[at])
            seen[at] += 1
        copies = max(1, tp // 2) if layer.endswith(("k_proj", "v_proj")) else 1
        assert (seen == copies).all()


def test_several_degrees_in_one_pass_equal_single_runs(tpgptq: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model")
    succeed(tpgptq("convert", "--tp", 2, "--tp", 4, "--tp", 2, model, tmp_path / "both"))
    assert sorted(p.name for p in (tmp_path / "both").iterdir()) == ["tp-2", "tp-4"]
    for tp in (2, 4):
        succeed(tpgptq("convert", "--tp", tp, model, tmp_path / f"only-{tp}"))
        assert tree(tmp_path / "both" / f"tp-{tp}") == tree(tmp_path / f"only-{tp}")


def tree(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


@pytest.mark.parametrize("layout", ["ranks", "merged"])
def test_the_same_input_gives_the_same_bytes(
    tpgptq: Run, tiny: Path, tmp_path: Path, layout: str
) -> None:
    for name in ("a", "b"):
        succeed(tpgptq("convert", "--tp", 2, "--layout", layout, tiny, tmp_path / name))
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("row_group", [32, 16, 8])
def test_the_real_checkpoint(
    tpgptq: Run, tiny: Path, tmp_path: Path, tp: int, row_group: int
) -> None:
    out = tmp_path / "out"
    succeed(tpgptq("convert", "--tp", tp, "--row-group", row_group, tiny, out))
    o_proj = manifest_of(out)["modules"]["model.layers.0.self_attn.o_proj"]
    assert o_proj["in_features"] % 128 == 0
    assert o_proj["group_size"] >= (row_group if tp > 1 else 64)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (tiny / name).read_bytes()
    assert not (out / "quantize_config.json").exists()


@pytest.mark.parametrize("layout", ["ranks", "merged"])
def test_files_are_split_at_the_size_asked_for(
    tpgptq: Run, tiny: Path, tmp_path: Path, layout: str
) -> None:
    whole, split = tmp_path / "whole", tmp_path / "split"
    common = ("convert", "--tp", 2, "--layout", layout, tiny)
    succeed(tpgptq(*common, whole))
    succeed(tpgptq(*common, split, "--max-shard-size", "600KB"))
    files = sorted(split.glob("model-*.safetensors"))
    assert len(files) > len(list(whole.glob("model-*.safetensors")))
    # A header of a few kilobytes comes on top of the tensors.
    assert all(path.stat().st_size < 620_000 for path in files)
    if layout == "merged":
        count = len(files)
        assert [p.name for p in files] == [
            f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)
        ]
        index = json.loads((split / "model.safetensors.index.json").read_text())
        weights = weights_of(split)
        assert set(index["weight_map"]) == set(weights)
        total = sum(t.numel() * t.element_size() for t in weights.values())
        assert index["metadata"]["total_size"] == total
        merged = weights_of(whole)
        assert all(torch.equal(merged[name], tensor) for name, tensor in weights.items())
    else:
        names = {path.name for path in files}
        assert {"model-rank-0-part-0.safetensors", "model-rank-1-part-1.safetensors"} <= names
        assert "model-shared-part-0.safetensors" in names


def test_merged_is_the_ranks_side_by_side(tpgptq: Run, tmp_path: Path) -> None:
    """kv heads that two ranks share stand in it once."""
    model = make_checkpoint(tmp_path / "model", model_type="qwen2", blocks=1)
    ranks, merged = tmp_path / "ranks", tmp_path / "merged"
    succeed(tpgptq("convert", "--tp", 4, model, ranks))
    succeed(tpgptq("convert", "--tp", 4, "--layout", "merged", model, merged))
    tensors = weights_of(merged)
    for layer, module in manifest_of(ranks)["modules"].items():
        of_rank = [rank_tensors(ranks, rank, layer) for rank in range(4)]
        if layer.endswith(("k_proj", "v_proj")):
            of_rank = of_rank[::2]
        for part in of_rank[0]:
            pieces = [t[part] for t in of_rank]
            if module["parallel"] == "row":
                expected = torch.cat(pieces)
            else:
                expected = pieces[0] if part == "perm" else torch.cat(pieces, dim=-1)
            assert torch.equal(tensors[f"{layer}.{part}"], expected), (layer, part)


def test_row_parallel_biases_are_shared_and_column_biases_are_cut(
    tpgptq: Run, tmp_path: Path
) -> None:
    both = {"attention_bias": True, "mlp_bias": True}
    model, out = make_checkpoint(tmp_path / "model", config=both, blocks=1), tmp_path / "out"
    succeed(tpgptq("convert", "--tp", 2, model, out))
    shared, source = (
        load_file(out / "model-shared.safetensors"),
        load_file(model / "model.safetensors"),
    )
    for name in ("self_attn.o_proj.bias", "mlp.down_proj.bias"):
        name = f"model.layers.0.{name}"
        assert torch.equal(shared[name], source[name])
        assert name not in load_file(out / "model-rank-0-part-0.safetensors")
    cols = load_arrays(out / "tpgptq-index.safetensors")["model.layers.0.mlp.up_proj.cols"]
    for rank in range(2):
        bias = rank_tensors(out, rank, "model.layers.0.mlp.up_proj")["bias"]
        whole = source["model.layers.0.mlp.up_proj.bias"]
        expected = torch.where(torch.from_numpy(cols[rank]) < 0, 0, whole[cols[rank]])
        assert torch.equal(bias, expected)


def test_the_manifest_describes_what_is_there(tpgptq: Run, tiny: Path, tmp_path: Path) -> None:
    import hashlib

    out = tmp_path / "out"
    succeed(tpgptq("convert", "--tp", 2, tiny, out))
    manifest = manifest_of(out)
    assert (manifest["format"], manifest["format_version"], manifest["tp"]) == ("tpgptq", 1, 2)
    assert manifest["heads"] == {"query": 4, "kv": 2, "padded_query": 4, "padded_kv": 2}
    assert manifest["intermediate"] == {"size": 704, "padded": 768}
    files = manifest["files"]
    listed = files["shared"] | files["other"]
    for of_rank in files["ranks"]:
        listed |= of_rank
    present = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert present == set(listed) | {"tpgptq.json", "README.md"}
    listed |= {}
    for name, entry in listed.items():
        data = (out / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    ((name, entry),) = manifest["source"]["files"].items()
    assert entry["sha256"] == hashlib.sha256((tiny / name).read_bytes()).hexdigest()


def test_config_json_counts_empty_heads(tpgptq: Run, tmp_path: Path) -> None:
    silent = {"num_key_value_heads": None, "head_dim": None}
    model = make_checkpoint(tmp_path / "model", kv_heads=4, config=silent)
    succeed(tpgptq("convert", "--tp", 2, "--tp", 3, model, tmp_path / "out"))
    names = ("num_attention_heads", "num_key_value_heads", "head_dim")
    for tp, sizes in {2: (4, None, None), 3: (6, 6, 16)}.items():
        config = json.loads((tmp_path / "out" / f"tp-{tp}" / "config.json").read_text())
        assert tuple(config.get(name) for name in names) == sizes


@pytest.mark.parametrize("layout", ["ranks", "merged"])
@pytest.mark.parametrize("tp", range(1, 10))
def test_every_degree(tpgptq: Run, tmp_path: Path, tp: int, layout: str) -> None:
    """The head counts of SmolLM2-135M, and groups that no degree divides; verified."""
    shape = {"heads": 9, "kv_heads": 3, "head_dim": 8, "intermediate": 352}
    model = make_checkpoint(tmp_path / "model", **shape, config={"attention_bias": True})
    out = tmp_path / "out"
    succeed(tpgptq("convert", "--tp", tp, "--layout", layout, model, out))
    heads = manifest_of(out)["heads"]
    assert (heads["query"], heads["kv"]) == (9, 3)
    assert heads["padded_query"] % tp == 0


def test_json_prints_one_object(tpgptq: Run, tiny: Path, tmp_path: Path) -> None:
    result = succeed(tpgptq("convert", "--tp", 2, "--json", tiny, tmp_path / "out"))
    report = json.loads(result.stdout)
    assert result.stderr == ""
    assert report["manifests"] == [manifest_of(tmp_path / "out")]
    assert report["verified"] is True
    result = succeed(tpgptq("verify", "--json", tiny, tmp_path / "out"))
    assert json.loads(result.stdout)["ok"] is True


def test_quiet_says_nothing(tpgptq: Run, tiny: Path, tmp_path: Path) -> None:
    assert succeed(tpgptq("convert", "--tp", 2, "-q", tiny, tmp_path / "out")).output == ""
    assert succeed(tpgptq("verify", "-q", tiny, tmp_path / "out")).output == ""


def test_dry_run_writes_nothing(tpgptq: Run, tiny: Path, tmp_path: Path) -> None:
    result = succeed(tpgptq("convert", "--tp", 4, "--dry-run", tiny, tmp_path / "out"))
    assert "o_proj" in result.stdout
    assert list(tmp_path.iterdir()) == []
    report = json.loads(
        succeed(tpgptq("convert", "--tp", 4, "--dry-run", "--json", tiny, tmp_path / "out")).stdout
    )
    assert [degree["tp"] for degree in report["degrees"]] == [4]


def test_planned_bytes_are_the_bytes_written(tpgptq: Run, tiny: Path, tmp_path: Path) -> None:
    succeed(tpgptq("convert", "--tp", 4, tiny, tmp_path / "out"))
    degree = json.loads(succeed(tpgptq("inspect", "--tp", 4, "--json", tiny)).stdout)["degrees"][0]
    for path in (tmp_path / "out").glob("model-rank-*.safetensors"):
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size - header == degree["rank_bytes"]


def test_overwrite_replaces_an_earlier_output_only(tpgptq: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeed(tpgptq("convert", "--tp", 2, tiny, out))
    refused = tpgptq("convert", "--tp", 4, tiny, out)
    assert refused.exit_code == 1
    assert "--overwrite" in refused.stderr
    succeed(tpgptq("convert", "--tp", 4, "--overwrite", tiny, out))
    assert manifest_of(out)["tp"] == 4
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("all my work")
    refused = tpgptq("convert", "--tp", 4, "--overwrite", tiny, precious)
    assert refused.exit_code == 1
    assert (precious / "thesis.tex").read_text() == "all my work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "precious"]


@pytest.mark.parametrize("where", ["file", "nested", "beside tp-N", "damaged manifest", "symlink"])
def test_overwrite_leaves_what_is_not_ours(
    tpgptq: Run, tiny: Path, tmp_path: Path, where: str
) -> None:
    out = tmp_path / "out"
    degrees = ("--tp", 2, "--tp", 4) if where == "beside tp-N" else ("--tp", 2)
    succeed(tpgptq("convert", *degrees, tiny, out))
    precious = {"nested": out / "sub" / "mine", "damaged manifest": out / "tpgptq.json"}.get(
        where, out / "mine"
    )
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("{}")
    target = out
    if where == "symlink":
        target = tmp_path / "link"
        target.symlink_to(out)
    refused = tpgptq("convert", "--tp", 4, "--overwrite", tiny, target)
    assert refused.exit_code == 1
    expected = target if where == "symlink" else precious.parent if where == "nested" else precious
    assert str(expected) in refused.stderr
    assert precious.read_text() == "{}"


def test_what_comes_into_being_meanwhile_is_not_replaced(
    tpgptq: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tpgptq_convert import verify as module

    out = tmp_path / "out"

    def slow(*arguments: Any) -> list[str]:
        out.mkdir()
        (out / "precious").write_text("mine")
        return []

    monkeypatch.setattr(module, "verify", slow)
    refused = tpgptq("convert", "--tp", 2, tiny, out)
    assert refused.exit_code == 1
    assert "precious is no part of an output" in refused.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "precious").read_text() == "mine"


def copy_of(converted: Path, to: Path) -> Path:
    return shutil.copytree(converted, to)


@pytest.fixture(scope="module")
def converted(tpgptq: Run, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    succeed(tpgptq("convert", "--tp", 2, tiny, out))
    return out


DOWN, O_PROJ, GATE = (
    f"model.layers.2.{name}" for name in ("mlp.down_proj", "self_attn.o_proj", "mlp.gate_proj")
)


def flip_a_nibble(t: dict[str, torch.Tensor]) -> str:
    t[f"{DOWN}.qweight"][3, 5] ^= 1 << 8
    return DOWN


def swap_two_perm_entries(t: dict[str, torch.Tensor]) -> str:
    perm = t[f"{O_PROJ}.perm"]
    perm[0], perm[1] = perm[1].clone(), perm[0].clone()
    return O_PROJ


def swap_two_column_perm_entries(t: dict[str, torch.Tensor]) -> str:
    perm = t[f"{GATE}.perm"]
    perm[7], perm[90] = perm[90].clone(), perm[7].clone()
    return GATE


def change_a_scale(t: dict[str, torch.Tensor]) -> str:
    t[f"{GATE}.scales"].view(torch.int16)[1, 17] ^= 1
    return GATE


def change_a_zero_point(t: dict[str, torch.Tensor]) -> str:
    t[f"{DOWN}.qzeros"][0, 0] ^= 1
    return DOWN


def fill_a_padding_row(t: dict[str, torch.Tensor]) -> str:
    t[f"{O_PROJ}.qweight"] ^= 0x10101010  # real rows too: any change must be found
    return O_PROJ


def cut_a_tensor(t: dict[str, torch.Tensor]) -> str:
    t[f"{GATE}.scales"] = t[f"{GATE}.scales"][:, :-1].contiguous()
    return GATE


def lose_a_tensor(t: dict[str, torch.Tensor]) -> str:
    del t[f"{GATE}.qzeros"]
    return GATE


def wild_perm(t: dict[str, torch.Tensor]) -> str:
    t[f"{GATE}.perm"][3] = 5000
    return GATE


DAMAGES = [
    flip_a_nibble,
    swap_two_perm_entries,
    swap_two_column_perm_entries,
    change_a_scale,
    change_a_zero_point,
    fill_a_padding_row,
    cut_a_tensor,
    lose_a_tensor,
    wild_perm,
]


@pytest.mark.parametrize("with_index", [True, False], ids=["exact", "functional"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_the_damaged_module(
    tpgptq: Run,
    tiny: Path,
    converted: Path,
    tmp_path: Path,
    damage: Callable[[dict[str, torch.Tensor]], str],
    with_index: bool,
) -> None:
    """Also where the checksums were brought up to date, and where there is no index file."""
    out = copy_of(converted, tmp_path / "out")
    names: list[str] = []
    edit_tensors(out / "model-rank-1-part-0.safetensors", lambda t: names.append(damage(t)))
    if not with_index:
        (out / "tpgptq-index.safetensors").unlink()
    result = tpgptq("verify", tiny, out)
    assert result.exit_code == 3
    assert "model-rank-1-part-0.safetensors: " in result.stderr  # the checksum
    refresh_checksums(out)
    result = tpgptq("verify", tiny, out)
    assert result.exit_code == 3
    block = names[0].rpartition(".")[0]
    lines = [line for line in result.stderr.splitlines() if line.startswith(f"Error: {block}")]
    assert lines, result.stderr
    if with_index:
        assert any(line.startswith(f"Error: {names[0]}: rank 1: ") for line in lines), lines


def test_verify_notices_a_changed_shared_tensor(
    tpgptq: Run, tiny: Path, converted: Path, tmp_path: Path
) -> None:
    out = copy_of(converted, tmp_path / "out")

    def edit(t: dict[str, torch.Tensor]) -> None:
        t["model.norm.weight"].view(torch.int16)[0] ^= 1

    edit_tensors(out / "model-shared.safetensors", edit)
    refresh_checksums(out)
    result = tpgptq("verify", tiny, out)
    assert result.exit_code == 3
    assert "model.norm.weight: differs" in result.stderr


@pytest.mark.parametrize("what", ["rows", "cols"])
def test_verify_notices_a_wrong_index(
    tpgptq: Run, tiny: Path, converted: Path, tmp_path: Path, what: str
) -> None:
    out = copy_of(converted, tmp_path / "out")

    def edit(t: dict[str, torch.Tensor]) -> None:
        vector = t[f"{GATE}.{what}"]
        vector[0, 0], vector[0, 1] = vector[0, 1].clone(), vector[0, 0].clone()

    edit_tensors(out / "tpgptq-index.safetensors", edit)
    refresh_checksums(out)
    result = tpgptq("verify", tiny, out)
    assert result.exit_code == 3
    assert f"Error: {GATE}: rank " in result.stderr


@pytest.mark.parametrize(
    "name", ["model-rank-0-part-0.safetensors", "tokenizer.json", "config.json"]
)
@pytest.mark.parametrize("how", ["missing", "changed", "cut"])
def test_verify_checks_every_file(
    tpgptq: Run, tiny: Path, converted: Path, tmp_path: Path, name: str, how: str
) -> None:
    out = copy_of(converted, tmp_path / "out")
    data = (out / name).read_bytes()
    if how == "missing":
        (out / name).unlink()
    else:
        (out / name).write_bytes(data[:-7] if how == "cut" else data[:-1] + b"?")
    result = tpgptq("verify", tiny, out)
    assert result.exit_code == 3
    assert f"Error: {name}: " in result.stderr


def set_at(value: Any, *keys: Any) -> Callable[[dict[str, Any]], None]:
    def edit(manifest: dict[str, Any]) -> None:
        *path, last = keys
        inner: Any = manifest
        for key in path:
            inner = inner[key]
        inner[last] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (set_at("2", "tp"), 1),
        (set_at("sideways", "layout"), 1),
        (set_at([], "files"), 1),
        (set_at([], "files", "ranks"), 1),
        (set_at({"../../x": {}}, "files", "shared"), 1),
        (set_at(None, "modules"), 1),
        (set_at(0, "modules", GATE, "group_size"), 1),
        (set_at(60, "modules", GATE, "group_size"), 1),
        (set_at(None, "heads"), 1),
        (set_at(32, "modules", GATE, "group_size"), 3),
        (set_at(128, "modules", DOWN, "in_features"), 3),
        (set_at(False, "modules", GATE, "perm"), 3),
        (set_at(1, "modules", GATE, "perm"), 1),
        (set_at({"x" * 300: {}}, "files", "other"), 1),
        (set_at("row", "modules", GATE, "parallel"), 3),
        (set_at({}, "modules"), 3),
        (set_at(8, "heads", "padded_query"), 3),
        (set_at(4, "heads", "padded_kv"), 3),
        (set_at(5, "heads", "padded_query"), 1),
        (set_at(0, "heads", "padded_kv"), 1),
        (set_at(3, "heads", "padded_kv"), 1),
        (set_at(None, "heads", "padded_kv"), 1),
        (set_at(1, "heads", "kv"), 3),
        (set_at(704, "intermediate", "padded"), 3),
        (set_at(False, "sym"), 3),
        (set_at("gptq_v2", "checkpoint_format"), 3),
        (set_at({}, "files", "shared", "model-shared.safetensors"), 1),
        (set_at(1, "files", "shared", "model-shared.safetensors", "bytes"), 3),
        (set_at("0" * 64, "files", "shared", "model-shared.safetensors", "sha256"), 3),
    ],
)
def test_verify_checks_the_manifest(
    tpgptq: Run,
    tiny: Path,
    converted: Path,
    tmp_path: Path,
    edit: Callable[[dict[str, Any]], None],
    code: int,
) -> None:
    out = copy_of(converted, tmp_path / "out")
    manifest = manifest_of(out)
    edit(manifest)
    (out / "tpgptq.json").write_text(json.dumps(manifest))
    result = tpgptq("verify", tiny, out)
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("Error: ")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("intermediate_size",), 704),
        (("num_attention_heads",), 8),
        (("quantization_config", "tp"), 4),
        (("quantization_config", "desc_act"), True),
        (("quantization_config",), None),
    ],
)
def test_verify_checks_what_servers_size_by(
    tpgptq: Run, tiny: Path, converted: Path, tmp_path: Path, keys: tuple[str, ...], value: Any
) -> None:
    out = copy_of(converted, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    set_at(value, *keys)(config)
    (out / "config.json").write_text(json.dumps(config))
    refresh_checksums(out)
    result = tpgptq("verify", tiny, out)
    assert result.exit_code == 3
    assert f"{keys[-1] if value else 'tp'} is " in result.stderr


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("model-shared.safetensors", "model.layers.0.self_attn.o_proj.bias"),
        ("model-rank-1-part-0.safetensors", "model.layers.0.mlp.down_proj.perm"),
        ("model-rank-1-part-0.safetensors", "model.norm.weight"),
    ],
)
def test_verify_notices_a_tensor_too_many(
    tpgptq: Run, tiny: Path, converted: Path, tmp_path: Path, file: str, name: str
) -> None:
    out = copy_of(converted, tmp_path / "out")
    edit_tensors(out / file, lambda t: t.update({name: torch.zeros(8)}))
    refresh_checksums(out)
    result = tpgptq("verify", tiny, out)
    assert result.exit_code == 3
    assert f"Error: {name}: doesn't belong into {file}" in result.stderr


def test_verify_notices_another_tokenizer(
    tpgptq: Run, tiny: Path, converted: Path, tmp_path: Path
) -> None:
    out = copy_of(converted, tmp_path / "out")
    (out / "tokenizer.json").write_text("{}")
    refresh_checksums(out)
    result = tpgptq("verify", tiny, out)
    assert result.exit_code == 3
    assert "tokenizer.json: differs from the source's" in result.stderr


def test_verify_notices_ranks_that_changed_places(
    tpgptq: Run, tiny: Path, converted: Path, tmp_path: Path
) -> None:
    out = copy_of(converted, tmp_path / "out")
    names = [out / f"model-rank-{rank}-part-0.safetensors" for rank in range(2)]
    data = [name.read_bytes() for name in names]
    for name, other in zip(names, reversed(data), strict=True):
        name.write_bytes(other)
    refresh_checksums(out)
    assert tpgptq("verify", tiny, out).exit_code == 3


@pytest.mark.parametrize("with_index", [True, False], ids=["exact", "functional"])
def test_verify_notices_kv_heads_that_changed_places(
    tpgptq: Run, tmp_path: Path, with_index: bool
) -> None:
    """Every value is there, and where the index says; but the query heads meet other keys."""
    model, out = make_checkpoint(tmp_path / "model"), tmp_path / "out"
    succeed(tpgptq("convert", "--tp", 3, model, out))
    paths = [out / f"model-rank-{rank}-part-0.safetensors" for rank in (0, 1)]
    index = out / "tpgptq-index.safetensors"
    parts = [load_file(path) for path in paths]
    layers = [f"model.layers.1.self_attn.{x}_proj" for x in "kv"]
    moved = [name for name in parts[0] if name.rpartition(".")[0] in layers]
    for path, other in zip(paths, reversed(parts), strict=True):
        edit_tensors(path, lambda t, other=other: t.update({n: other[n] for n in moved}))

    def swap(vectors: dict[str, torch.Tensor]) -> None:
        for layer in layers:
            vectors[f"{layer}.cols"][[0, 1]] = vectors[f"{layer}.cols"][[1, 0]]

    edit_tensors(index, swap)
    if not with_index:
        index.unlink()
    refresh_checksums(out)
    result = tpgptq("verify", model, out)
    assert result.exit_code == 3
    assert "o_proj: the sum over the ranks differs" in result.stderr
    apart = "o_proj: rank 0: its query heads don't stand with their kv heads" in result.stderr
    assert apart == with_index


def test_verify_against_another_model(tpgptq: Run, converted: Path, tmp_path: Path) -> None:
    result = tpgptq("verify", make_checkpoint(tmp_path / "other"), converted)
    assert result.exit_code == 3


def test_a_failed_verification_keeps_the_output_aside(
    tpgptq: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tpgptq_convert import convert as module

    def clumsy(*arguments: Any) -> Iterator[dict[str, Any]]:
        for tensors in real(*arguments):
            tensors["qweight"][0, 0] ^= 1
            yield tensors

    real = module.repack
    monkeypatch.setattr(module, "repack", clumsy)
    result = tpgptq("convert", "--tp", 2, tiny, tmp_path / "out")
    assert result.exit_code == 3
    assert f"; the output is kept in {tmp_path / 'out.failed'}\n" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out.failed"]


def test_ranks_share_kv_heads_as_the_manifest_counts_them(tpgptq: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeed(tpgptq("convert", "--tp", 4, make_checkpoint(tmp_path / "model"), out))  # 2 kv heads
    edit_text(out / "tpgptq.json", '"padded_kv": 2', '"padded_kv": 1')
    edit_text(out / "config.json", '"num_key_value_heads": 2', '"num_key_value_heads": 1')
    refresh_checksums(out)
    result = tpgptq("verify", tmp_path / "model", out)
    assert result.exit_code == 3
    wrong = [line for line in result.stderr.splitlines() if "o_proj: rank" in line]
    assert [line.partition(": rank ")[2][0] for line in wrong] == ["2", "3"] * 2
    assert all("its kv heads aren't its share of the 1 in tpgptq.json" in line for line in wrong)


def test_the_activations_that_the_table_allows_can_be_verified() -> None:
    from transformers.activations import ACT2FN

    assert set(FUNCTIONS) == set(ACTIVATIONS)
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)  # 0 is one of them
    for name, function in FUNCTIONS.items():
        torch.testing.assert_close(function(x), ACT2FN[name](x))
        assert function(x)[16] == 0


def test_gpu_is_refused_where_there_is_none(tpgptq: Run, tiny: Path, tmp_path: Path) -> None:
    count = torch.cuda.device_count()
    result = tpgptq("convert", "--tp", 2, "--device", f"cuda:{count}", tiny, tmp_path / "out")
    assert result.exit_code == 2
    assert "CUDA devices" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["ranks", "merged"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_gpu_and_cpu_write_the_same_bytes(
    tpgptq: Run, tiny: Path, tmp_path: Path, tp: int, layout: str
) -> None:
    for device in ("cpu", "cuda"):
        succeed(
            tpgptq(
                "convert",
                "--tp",
                tp,
                "--layout",
                layout,
                "--device",
                device,
                tiny,
                tmp_path / device,
            )
        )
    assert tree(tmp_path / "cpu") == tree(tmp_path / "cuda")
