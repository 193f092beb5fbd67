"""The runtime module, imported from an output: each rank alone, and all ranks over gloo."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from compare_tokens import compare
from factories import dequantise, edit_tensors, make_checkpoint

from tpgptq_convert import tpgptq_runtime
from tpgptq_convert.tpgptq_runtime import FormatError, load_model

Run = Callable[..., Result]


def shipped_module(out: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("shipped", out / "tpgptq_runtime.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PROMPTS = [[5, 99, 300, 41, 7], [1, 2, 3], [700, 11, 12, 400, 90, 13, 66], [8] * 4, [1000, 9]]


@pytest.mark.parametrize(
    ("tp", "layout"), [(1, "ranks"), (2, "ranks"), (4, "ranks"), (2, "merged"), (4, "merged")]
)
def test_the_ranks_answer_as_the_source_does(
    tpgptq: Run, tiny: Path, tmp_path: Path, tp: int, layout: str
) -> None:
    out = tmp_path / "out"
    assert tpgptq("convert", "--tp", tp, "--layout", layout, tiny, out).exit_code == 0
    text = list(range(20, 140))
    source, ranks = compare(tiny, out, PROMPTS, 16, text)
    assert ranks["tokens"] == source["tokens"]
    torch.testing.assert_close(
        torch.tensor(ranks["logits"]), torch.tensor(source["logits"]), rtol=0, atol=2e-5
    )
    assert ranks["perplexity"] == pytest.approx(source["perplexity"], rel=1e-5)
    assert ranks["all_reduces_per_block"] == (2 if tp > 1 else 0)


def test_no_thread_of_gloo_outlives_its_group(
    tpgptq: Run, tiny: Path, tmp_path: Path, run_program: Callable[..., str]
) -> None:
    """One that lets go of a tensor while Python is taken down aborts the process."""
    out = tmp_path / "out"
    assert tpgptq("convert", "--tp", 1, tiny, out).exit_code == 0
    program = out / "program.py"
    program.write_text("""\
from pathlib import Path
import torch, torch.distributed as dist
import tpgptq_runtime
dist.init_process_group("gloo")
model = tpgptq_runtime.load_model(Path(__file__).parent)
dist.all_reduce(torch.ones(1))
def threads():
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum("gloo" in name for name in names)
before = threads()
dist.destroy_process_group()
print(before > 0, threads())
""")
    assert run_program(program, 1).split() == ["True", "0"]


@pytest.mark.gpu
@pytest.mark.parametrize("tp", [1, 3])
def test_the_kernels_answer_as_the_source_does(
    tpgptq: Run, tiny: Path, tmp_path: Path, tp: int
) -> None:
    out = tmp_path / "out"
    assert tpgptq("convert", "--tp", tp, tiny, out).exit_code == 0
    source, ranks = compare(tiny, out, PROMPTS, 1, list(range(20, 140)), "cuda")
    expected = torch.tensor(source["logits"])
    torch.testing.assert_close(torch.tensor(ranks["logits"]), expected, rtol=0, atol=0.05)
    assert ranks["perplexity"] == pytest.approx(source["perplexity"], rel=1e-2)


@pytest.mark.parametrize(
    "shape",
    [
        {"model_type": "qwen2"},
        {"model_type": "qwen3", "checkpoint_format": "gptq_v2", "sym": False},
        {"model_type": "mistral", "tied": True, "g_idx": "different"},
        {"config": {"attention_bias": True, "mlp_bias": True}, "group_size": -1},
    ],
    ids=["qwen2", "qwen3", "mistral", "biases"],
)
def test_every_architecture_runs_at_tp_2(
    tpgptq: Run, tmp_path: Path, shape: dict[str, Any]
) -> None:
    model, out = make_checkpoint(tmp_path / "model", **shape), tmp_path / "out"
    assert tpgptq("convert", "--tp", 2, model, out).exit_code == 0
    prompts = [[token % 32 for token in prompt] for prompt in PROMPTS]
    source, ranks = compare(model, out, prompts, 1, [])
    expected = torch.tensor(source["logits"])
    scale = max(1, float(expected.abs().max()))
    torch.testing.assert_close(torch.tensor(ranks["logits"]), expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("tp", [2, 3])  # 3: six heads, which don't divide the hidden size
def test_the_readme_command_of_the_shipped_module(
    tpgptq: Run, tiny: Path, tmp_path: Path, tp: int
) -> None:
    out = tmp_path / "out"
    assert tpgptq("convert", "--tp", tp, tiny, out).exit_code == 0
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            f"--nproc-per-node={tp}",
            *(str(out / "tpgptq_runtime.py"), "--prompt", "Return the", "--max-new-tokens", "8"),
            *("--device", "cpu"),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Return the list of")


def test_quant_linear_equals_the_slow_formula(tpgptq: Run, tmp_path: Path) -> None:
    model, out = make_checkpoint(tmp_path / "model", blocks=1), tmp_path / "out"
    assert tpgptq("convert", "--tp", 2, model, out).exit_code == 0
    module = shipped_module(out)
    checkpoint = module.Checkpoint(out)
    for name, parts in checkpoint.rank(1).items():
        linear = module.QuantLinear(parts)
        k = checkpoint.modules[name]["in_features"]
        weight = dequantise(parts, np.arange(k) // checkpoint.modules[name]["group_size"])
        assert torch.equal(linear.dequantise(torch.float64), weight)
        width = int(parts["perm"].max()) + 1 if "perm" in parts else k
        x = torch.randn(3, 2, max(width, 64), dtype=torch.float64)
        x = x if "perm" in parts else x[..., :k]
        fed = x[..., parts["perm"].long()] if "perm" in parts else x
        torch.testing.assert_close(linear(x), fed @ weight)


def test_a_rank_reads_only_its_own_files(tpgptq: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert tpgptq("convert", "--tp", 2, tiny, out).exit_code == 0
    (out / "model-rank-1-part-0.safetensors").unlink()
    checkpoint = shipped_module(out).Checkpoint(out)
    assert len(checkpoint.rank(0)) == 28
    assert "model.embed_tokens.weight" in checkpoint.shared()
    with pytest.raises(ValueError, match=r"model-rank-1-part-0.safetensors: missing"):
        checkpoint.rank(1)


def test_both_layouts_give_a_rank_the_same_tensors(tpgptq: Run, tiny: Path, tmp_path: Path) -> None:
    loaded = []
    for layout in ("ranks", "merged"):
        out = tmp_path / layout
        assert tpgptq("convert", "--tp", 4, "--layout", layout, tiny, out).exit_code == 0
        loaded.append(tpgptq_runtime.Checkpoint(out))
    for rank in range(4):
        ranks, merged = (checkpoint.rank(rank) for checkpoint in loaded)
        assert ranks.keys() == merged.keys()
        for name in ranks:
            assert ranks[name].keys() == merged[name].keys()
            for part, tensor in ranks[name].items():
                assert torch.equal(tensor, merged[name][part]), (name, part)
    shared = [checkpoint.shared() for checkpoint in loaded]
    assert shared[0].keys() == shared[1].keys()


def test_wrong_use_is_said_in_words(tpgptq: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert tpgptq("convert", "--tp", 2, tiny, out).exit_code == 0
    module = shipped_module(out)
    with pytest.raises(ValueError, match=r"rank 2: .* was written for tp 2"):
        module.Checkpoint(out).rank(2)
    with pytest.raises(ValueError, match=r"world size 1: .* was written for tp 2"):
        module.load_model(out)
    with pytest.raises(ValueError, match=r"tpgptq\.json: missing"):
        module.Checkpoint(tiny)
    manifest = json.loads((out / "tpgptq.json").read_text())
    (out / "tpgptq.json").write_text(json.dumps(manifest | {"format_version": 9}))
    with pytest.raises(ValueError, match="format_version is 9; this module reads 1 and 2"):
        module.Checkpoint(out)


def test_the_module_needs_torch_alone() -> None:
    source = Path(tpgptq_runtime.__file__).read_text()
    assert "tpgptq_convert" not in source
    assert "import safetensors" not in source
    assert "import numpy" not in source


def set_at(value: Any, *keys: str) -> Callable[[Path], None]:
    """Another value in the manifest."""

    def damage(out: Path) -> None:
        manifest = json.loads((out / "tpgptq.json").read_text())
        inner = manifest
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        (out / "tpgptq.json").write_text(json.dumps(manifest))

    return damage


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda out: (out / name).write_text(content)


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Others in the file of the only rank, or of all ranks."""

    def damage(out: Path) -> None:
        (path,) = (*out.glob("model-rank-*"), *out.glob("model-0*"))
        edit_tensors(path, edit)

    return damage


Q0 = "model.layers.0.self_attn.q_proj"
DAMAGES = [
    *(text("tpgptq.json", content) for content in ("5", "null", "[1]", "[" * 9999, "{}")),
    *(text("config.json", content) for content in ("5", "{", "{}", '{"model_type": []}')),
    *(set_at(value, "tp") for value in (None, "1", 0, True, 1e9)),
    *(set_at(value, "layout") for value in (None, "x", [])),
    *(set_at(value, "modules") for value in (None, [1], {Q0: 5}, {Q0: {}})),
    *(set_at(value, "files") for value in (None, [1], {})),
    *(set_at(value, "bits") for value in (None, "4", [])),
    *(set_at(value, "heads") for value in (None, {}, {"query": 1})),
    *(set_at(value, "checkpoint_format") for value in (None, "x")),
    *(set_at(value, "modules", Q0, "bits") for value in ("4", 4.0, 0, 3, 8, None)),
    *(set_at(value, "modules", Q0, "perm") for value in (None, 1, False)),
    *(set_at(value, "modules", Q0, "out_features") for value in (None, 0, -1, 3, 8, 10**9)),
    *(set_at(value, "modules", Q0, "in_features") for value in (None, 32, 10**9)),
    *(set_at(value, "modules", Q0, "group_size") for value in (None, 0, 16)),
    tensors(lambda t: t.update({f"{Q0}.qweight": t[f"{Q0}.qweight"][:3].clone()})),
    tensors(lambda t: t.update({f"{Q0}.scales": t[f"{Q0}.scales"][:0].clone()})),
    tensors(lambda t: t.update({f"{Q0}.scales": torch.ones(())})),
    tensors(lambda t: t.update({f"{Q0}.scales": t[f"{Q0}.scales"].int()})),
    tensors(lambda t: t.update({f"{Q0}.perm": t[f"{Q0}.perm"][:3].clone()})),
]


FILES = {
    "ranks": [
        *(set_at(value, "files", "shared") for value in (5, ["x"], {"../x": {}}, {"": {}})),
        *(set_at(value, "files", "ranks") for value in (5, [], [5], {})),
    ],
    "merged": [set_at(value, "files", "merged") for value in (5, {"../x": {}}, {"x" * 300: {}})],
}


@pytest.fixture(scope="module")
def small(tpgptq: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An output of one rank, in each layout."""
    directory = tmp_path_factory.mktemp("runtime")
    model = make_checkpoint(directory / "model", blocks=1)
    for layout in FILES:
        out = directory / layout
        assert tpgptq("convert", "--tp", 1, "--layout", layout, model, out).exit_code == 0
        load_model(out, dtype=torch.float32)
    return {layout: directory / layout for layout in FILES}


@pytest.mark.parametrize(
    ("layout", "damage"), [(layout, x) for layout in FILES for x in (*DAMAGES, *FILES[layout])]
)
def test_damage_is_told_in_words(
    small: dict[str, Path], tmp_path: Path, layout: str, damage: Callable[[Path], object]
) -> None:
    shutil.copytree(small[layout], tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(FormatError):
        load_model(tmp_path / "out", dtype=torch.float32)


def test_shared_tensors_that_are_not_the_models(small: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(small["ranks"], out)
    edit_tensors(
        out / "model-shared.safetensors", lambda t: t.update({"model.norm.weight": torch.ones(3)})
    )
    with pytest.raises(FormatError, match=r"model.norm.weight: is \[3\] .* must be \[64\]"):
        load_model(out, dtype=torch.float32)
