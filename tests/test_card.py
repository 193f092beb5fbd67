"""The model card: what it keeps of the source's, what it says, and that its program runs."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from factories import edit_text, make_checkpoint
from huggingface_hub import ModelCard

from tpgptq_convert.card import degrees_card, model_card

Run = Callable[..., Result]
SOURCE = """\
---
license: llama2
license_link: LICENSE.txt
language: [en, de]
base_model: meta-llama/Llama-2-7b-hf
tags:
- llama
- gptq
library_name: transformers
quantized_by: somebody
model-index:
- name: x
  results: []
---
# The source's own words
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


def card_of(tpgptq: Run, model: Path, *options: object) -> tuple[ModelCard, Result]:
    out = model.with_name("out")
    result = tpgptq("convert", "--no-verify", "--overwrite", *(options or ("--tp", 2)), model, out)
    assert result.exit_code == 0, result.stderr
    return ModelCard.load(out / "README.md"), result


def test_the_sources_data_is_kept(tpgptq: Run, model: Path) -> None:
    (model / "README.md").write_text(SOURCE)
    card, result = card_of(tpgptq, model)
    data = card.data.to_dict()
    source = ModelCard(SOURCE).data.to_dict()
    changed = {"tags", "library_name", "pipeline_tag", "base_model_relation"}
    assert {k: v for k, v in data.items() if k not in changed} == {
        k: v for k, v in source.items() if k not in changed
    }
    assert data["base_model_relation"] == "quantized"
    assert data["tags"] == ["llama", "gptq", "4-bit", "tensor-parallel", "tpgptq-convert"]
    assert data["library_name"] == "tpgptq-convert"
    assert "own words" not in card.text
    assert "states no licence" not in result.stderr


@pytest.mark.parametrize(
    "readme",
    [
        None,
        b"no metadata",
        b"---\ntags: [a]\n---\n",
        b"---\n- a list\n---\n",
        b"---\nlicense: [unclosed\n---\n",
        b"---\n1: x\n? [a]\n: y\n---\n",
        b"---\nx: \xff\n---\n",
        b"---\nx: !!python/object/apply:os.system ['touch stolen']\n---\n",
        b"---\nx: " + b"[" * 5000 + b"\n---\n",
        b"---\na: &a [x, x]\n"
        + b"".join(b"%c: &%c [*%c, *%c]\n" % (c, c, c - 1, c - 1) for c in range(98, 120))
        + b"tags: *w\n---\n",
        b"---\nself: 1\n---\n",
        b"---\neval_results: x\nmodel_name: y\n---\n",
        b"---\nx: " + b"[" * 330 + b"]" * 330 + b"\n---\n",  # can be read, but not written
        b"---\nx: 0x" + b"f" * 5000 + b"\n---\n",
        b"---\nlicense: mit\nx: [" + b"1, " * 200_000 + b"]\n---\n",
        b"---" + b"\n" * 1_000_000,
    ],
)
def test_no_licence_is_said(tpgptq: Run, model: Path, readme: bytes | None) -> None:
    """Also where the card's metadata can't be read, whatever is in it."""
    if readme is not None:
        (model / "README.md").write_bytes(readme)
    card, result = card_of(tpgptq, model)
    assert "Note: the source states no licence" in result.stderr
    assert card.data.get("license") is None
    told = tpgptq("convert", "--json", "--tp", 2, model, model.with_name("told"))
    assert "the source states no licence" in json.loads(told.stdout)["notes"][-1]
    assert "tensor-parallel" in card.data.tags
    assert not Path("stolen").exists()
    (model / "LICENSE.txt").write_text("as it is")
    assert "states no licence" not in card_of(tpgptq, model)[1].stderr


@pytest.mark.parametrize(("row_group", "small"), [(8, True), (32, False)])
def test_groups_that_kernels_for_gpus_dont_take(
    tpgptq: Run, tiny: Path, tmp_path: Path, row_group: int, small: bool
) -> None:
    out, options = tmp_path / "out", ("--no-verify", "--tp", 4, "--row-group", row_group)
    assert tpgptq("convert", *options, tiny, out).exit_code == 0
    card = (out / "README.md").read_text()
    assert "vllm serve" in card
    assert ("less than 32 rows, and this output has some of 16" in card) == small
    assert ("""add `--additional-config '{"tpgptq_kernels": "runtime"}'`""" in card) == small


def test_a_directory_of_any_name(tpgptq: Run, model: Path) -> None:
    odd = model.with_name(os.fsdecode(b"\xff"))
    model.rename(odd)
    assert "Made from `\\udcff` by" in card_of(tpgptq, odd)[0].text


def test_what_it_says(tpgptq: Run, model: Path) -> None:
    card, _ = card_of(tpgptq, model, "--tp", 2, "--row-group", 16, "--max-shard-size", "9KB")
    out = model.with_name("out")
    manifest = json.loads((out / "tpgptq.json").read_text())
    assert f"Made from `model` by {manifest['tool']} with" in card.text
    assert "tpgptq convert --tp 2 --row-group 16 --max-shard-size 9000B model OUT" in card.text
    rows = re.findall(r"^\| (all|\d) \| (\S+) \| ([\d,]+) \|$", card.text, re.MULTILINE)
    sizes = {path.name: path.stat().st_size for path in out.glob("model-*.safetensors")}
    assert {name: int(size.replace(",", "")) for _, name, size in rows} == sizes
    ranks = {name: re.findall(r"rank-(\d)", name) or ["all"] for name in sizes}
    assert {name: [rank] for rank, name, _ in rows} == ranks


def test_a_card_of_the_hub(tpgptq: Run, model: Path) -> None:
    """Names the commit, the repository, its branch, and what it is based on."""
    card_of(tpgptq, model)
    out = model.with_name("out")
    manifest = json.loads((out / "tpgptq.json").read_text())
    manifest["source"] |= {"name": "org/name", "revision": "abc"}
    config = json.loads((out / "config.json").read_text())
    card = ModelCard(model_card(manifest, config, model, "the command", "you/out", "tp-2"))
    assert card.data.base_model == "org/name"
    assert card.data.base_model_relation == "quantized"
    assert "[`org/name` at `abc`](https://huggingface.co/org/name/tree/abc)" in card.text
    assert "\nvllm serve you/out --revision tp-2 --tensor-parallel-size 2\n" in card.text
    assert "hf download you/out --revision tp-2 --local-dir ." in card.text
    (out / "README.md").write_text(SOURCE)
    main = ModelCard(degrees_card({"tp-2": manifest}, {"tp-2": out}, "you/out"))
    assert main.data.license == "llama2"
    assert "| [tp-2](https://huggingface.co/you/out/tree/tp-2) | 2 | " in main.text
    assert "\nvllm serve you/out --revision tp-2 --tensor-parallel-size 2\n" in main.text


def test_a_card_of_several_degrees_says_which_of_them_vllm_serves(
    tpgptq: Run, tmp_path: Path
) -> None:
    model, out = make_checkpoint(tmp_path / "model", config={"vocab_size": 96}), tmp_path / "out"

    def main(*options: object) -> str:
        command = ("convert", "--no-verify", "--overwrite", *options, model, out)
        assert tpgptq(*command).exit_code == 0
        directories = {path.name: path for path in sorted(out.iterdir())}
        manifests = {
            name: json.loads((path / "tpgptq.json").read_text())
            for name, path in directories.items()
        }
        return ModelCard(degrees_card(manifests, directories, "you/out")).text

    text = main("--tp", 1, "--tp", 2, "--tp", 3)
    assert text.count("vllm serve") == text.count("doesn't serve") == 1
    assert "vllm serve you/out --revision tp-1 --tensor-parallel-size 1" in text
    assert "doesn't serve `tp-3`: vLLM can't share out the vocabulary (96, " in text
    text = main("--layout", "gptq", "--tp", 1, "--tp", 2)
    assert "vllm serve" not in text
    assert "They are for engines that read `g_idx`" in text


def test_it_recommends_vllm_only_where_the_plugin_serves(tpgptq: Run, tmp_path: Path) -> None:
    shape = {"heads": 6, "kv_heads": 3, "head_dim": 32, "hidden": 64}
    for name, tp, options, reason in (
        ("bits", 2, {"bits": 8}, "has weights of 8 bits; must have weights of 4 bits; "),
        ("heads", 2, {"model_type": "qwen2", **shape}, "tp 2 doesn't divide the 6 query and 3 kv"),
        ("type", 2, {"model_type": "granite"}, "model_type is 'granite'; must be one of llama, "),
        (
            "vocabulary",
            3,
            {"config": {"vocab_size": 96}},
            "can't share out the vocabulary (96, padded to whole 64s)",
        ),
        ("hidden", 2, {**shape, "heads": 5, "kv_heads": 5}, "its heads don't divide hidden_size"),
    ):
        model = make_checkpoint(tmp_path / name / "model", **options)
        card, _ = card_of(tpgptq, model, "--tp", tp)
        assert reason in card.text
        assert "vllm serve" not in card.text


def test_a_size_of_heads_may_be_null(tpgptq: Run, tmp_path: Path) -> None:
    shape = {"heads": 4, "head_dim": 16, "hidden": 64}
    model = make_checkpoint(tmp_path / "model", model_type="qwen2", **shape)
    edit_text(model / "config.json", '"head_dim": 16', '"head_dim": null')
    card, _ = card_of(tpgptq, model)
    assert "vllm serve" in card.text


def test_the_cards_program_runs(
    tpgptq: Run, run_program: Callable[..., str], tiny: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    card, _ = card_of(tpgptq, model)
    (program,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    (started,) = set(re.findall(r"torchrun --nproc-per-node (\d)", card.text))
    out = model.with_name("out")
    (out / "program.py").write_text(program)
    assert run_program(out / "program.py", int(started)).startswith("Once upon a time")
