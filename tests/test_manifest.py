"""What the manifest says of the tensors, and what is said where files and manifest disagree."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from factories import edit_tensors, make_checkpoint

from tpgptq_convert.errors import OutputError
from tpgptq_convert.manifest import read_manifest, weight_files, weights_digest, wrong_tensors
from tpgptq_convert.source import SafetensorsFile
from tpgptq_convert.writer import write_json

Run = Callable[..., Result]
Q = "model.layers.0.self_attn.q_proj"
OUT = "model.layers.0.self_attn.o_proj"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory, tpgptq: Run) -> dict[str, Path]:
    """An output of each layout, with biases and kv heads that ranks share."""
    directory = tmp_path_factory.mktemp("manifest")
    biases = {"attention_bias": True, "mlp_bias": True}
    model = make_checkpoint(directory / "model", kv_heads=2, config=biases)
    for layout in ("ranks", "merged"):
        result = tpgptq("convert", "--tp", 4, "--layout", layout, model, directory / layout)
        assert result.exit_code == 0, result.output
    return {layout: directory / layout for layout in ("ranks", "merged")}


def problems(out: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    for rank, files in weight_files(manifest):
        yield from wrong_tensors(manifest, rank, [SafetensorsFile(out / name) for name in files])


@pytest.mark.parametrize("layout", ["ranks", "merged"])
def test_an_output_has_the_tensors_that_its_manifest_prescribes(
    outs: dict[str, Path], layout: str
) -> None:
    assert list(problems(outs[layout], read_manifest(outs[layout]))) == []


@pytest.mark.parametrize("layout", ["ranks", "merged"])
@pytest.mark.parametrize(
    ("module", "changes", "words"),
    [
        (Q, {"in_features": 128}, rf"{Q}.qweight: is I32 \[8, \d+\]; must be I32 \[16, \d+\]"),
        (Q, {"out_features": 24}, rf"{Q}.scales: is F16 \[2, \d+\]; must be F16 \[2, \d+\]"),
        (Q, {"group_size": 16}, rf"{Q}.qzeros: is I32 \[2, \d+\]; must be I32 \[4, \d+\]"),
        (Q, {"perm": False}, rf"{Q}.perm: doesn't belong into "),
        (Q, {"parallel": "row"}, rf"{Q}.(bias: doesn't belong|qweight: is)"),
        (DOWN, {"perm": True}, rf"{DOWN}.perm: missing from the "),
        (OUT, {"parallel": "column"}, rf"{OUT}.(bias: doesn't belong|perm: is)"),
    ],
)
def test_a_manifest_that_says_something_else(
    outs: dict[str, Path], layout: str, module: str, changes: dict[str, Any], words: str
) -> None:
    manifest = copy.deepcopy(read_manifest(outs[layout]))
    manifest["modules"][module] |= changes
    found = list(problems(outs[layout], manifest))
    assert any(re.search(words, problem) for problem in found), found


@pytest.mark.parametrize(
    ("part", "tensor", "words"),
    [
        ("qweight", torch.zeros(8, 16), "is F32 .*; must be I32"),
        ("scales", torch.ones(1, 16, dtype=torch.float16), r"is F16 \[1, 16\]; must be F16"),
        ("perm", torch.zeros(1, dtype=torch.int32), r"is I32 \[1\]; must be I32 \[64\]"),
        ("qzeros", None, "missing from the files of rank 0"),
        ("g_idx", torch.zeros(64, dtype=torch.int32), "doesn't belong into the files of rank 0"),
    ],
)
def test_a_file_that_holds_something_else(
    outs: dict[str, Path], tmp_path: Path, part: str, tensor: torch.Tensor | None, words: str
) -> None:
    path = tmp_path / "model-rank-0-part-0.safetensors"
    path.write_bytes((outs["ranks"] / path.name).read_bytes())

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(f"{Q}.{part}", None)
        if tensor is not None:
            tensors[f"{Q}.{part}"] = tensor

    edit_tensors(path, edit)
    manifest = read_manifest(outs["ranks"])
    (problem,) = wrong_tensors(manifest, 0, [SafetensorsFile(path)])
    assert re.search(f"^{Q}.{part}: .*{words}", problem)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sym": "yes"}, "sym is 'yes'; must be true or false"),
        ({"model_type": None}, "model_type is None; must be text"),
        ({"heads": {"padded_query": 4, "padded_kv": 4}}, "heads must state query, kv, padded_"),
        ({"bits": 5}, "bits is 5; must be one of (2, 3, 4, 8)"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; must be gptq or gptq_v2"),
    ],
)
def test_a_manifest_that_cannot_be(
    outs: dict[str, Path], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    write_json(tmp_path / "tpgptq.json", read_manifest(outs["ranks"]) | changes)
    with pytest.raises(OutputError, match=re.escape(words)):
        read_manifest(tmp_path)


def test_one_file_cannot_be_two_ranks(outs: dict[str, Path], tmp_path: Path) -> None:
    manifest = read_manifest(outs["ranks"])
    manifest["files"]["ranks"][1] = manifest["files"]["ranks"][0]
    write_json(tmp_path / "tpgptq.json", manifest)
    with pytest.raises(OutputError, match="files names a file twice"):
        read_manifest(tmp_path)


def test_the_digest_names_the_weights(outs: dict[str, Path]) -> None:
    one, other = (read_manifest(outs[layout]) for layout in ("ranks", "merged"))
    assert weights_digest(one) == weights_digest(read_manifest(outs["ranks"]))
    assert weights_digest(one) != weights_digest(other)
