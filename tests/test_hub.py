"""Hub in and Hub out, by huggingface_hub's own client, against a Hub on this machine."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from factories import make_checkpoint
from hub_server import READER, WRITER, Hub
from huggingface_hub import ModelCard
from test_json import printed

from tpgptq_convert.hub import HEAD
from tpgptq_convert.source import Source

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]
WEIGHTS = "gptq_model-4bit-64g.safetensors"


@pytest.fixture
def hub(tiny: Path) -> Iterator[Hub]:
    """A Hub that has the real checkpoint."""
    with Hub() as hub:
        hub.add_directory("org/tiny", tiny)
        yield hub


@pytest.fixture
def at(hub: Hub, tmp_path: Path) -> Run:
    """Run a command line in a process whose Hub this is, with a cache and a token of its own."""

    def run(*arguments: object, token: str | None = WRITER, **environment: str) -> Done:
        cleared = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        return subprocess.run(
            [sys.executable, "-m", "tpgptq_convert", *map(str, arguments)],
            env=cleared | hub.environment(tmp_path / "home", token) | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def same_files(one: Path, other: Path) -> bool:
    names = {p.relative_to(one) for p in one.rglob("*") if p.is_file()}
    assert names == {p.relative_to(other) for p in other.rglob("*") if p.is_file()}
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)


def test_there_and_back(at: Run, hub: Hub, tiny: Path, tmp_path: Path) -> None:
    """Inspect, convert, push, pull back, verify; then all of it once more, without a network."""
    assert at("inspect", "org/tiny").returncode == 0
    commit = hub.repositories["org/tiny"].branches["main"]
    done = at("convert", "--tp", 2, "--push-to-hub", "org/out", "org/tiny", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    pushed = hub.repositories["org/out"]
    assert f"Pushed {hub.endpoint}/org/out/tree/main (commit {pushed.branches['main'][:8]})" in (
        done.stderr
    )
    assert len(pushed.messages["main"]) == 2  # with the one that made the repository
    manifest = json.loads((tmp_path / "out" / "tpgptq.json").read_text())
    assert manifest["source"]["name"] == "org/tiny"
    assert manifest["source"]["revision"] == commit
    assert manifest["verified"] is True

    pulled = tmp_path / "pulled"
    pull = "from huggingface_hub import *; snapshot_download('org/out', local_dir='pulled')"
    subprocess.run(
        [sys.executable, "-c", pull],
        cwd=tmp_path,
        env=os.environ | hub.environment(tmp_path / "other home"),
        check=True,
        capture_output=True,
    )
    shutil.rmtree(pulled / ".cache")
    (pulled / ".gitattributes").unlink()
    assert same_files(tmp_path / "out", pulled)
    hub.add("org/tiny", {"README.md": b"a later commit"})  # is not what the output was made from
    assert at("verify", "org/tiny", pulled).returncode == 0

    served = sum(hub.served.values())
    offline = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    again = ("convert", "--tp", 2, "--revision", commit, "org/tiny", tmp_path / "again")
    done = at(*again, **offline)
    assert done.returncode == 0, done.stderr
    (tmp_path / "out" / "README.md").unlink()  # it names the repository
    (tmp_path / "again" / "README.md").unlink()
    assert same_files(tmp_path / "out", tmp_path / "again")
    assert sum(hub.served.values()) == served
    Source(tiny).check_hashes({"any": {"sha256": "of a directory, nobody states one"}})


@pytest.mark.parametrize("command", [["inspect"], ["convert", "--tp", "2", "--dry-run"]])
def test_a_plan_is_made_of_headers_and_g_idx(
    at: Run, hub: Hub, tiny: Path, tmp_path: Path, command: list[str]
) -> None:
    out = [tmp_path / "out"] if "convert" in command else []
    done = at(*command, "org/tiny", *out, token=None)
    assert done.returncode == 0, done.stderr
    local = at(*command, tiny, *out)
    assert done.stdout == local.stdout.replace(tiny.name, "org/tiny", 1)
    specs = Source(tiny).files[WEIGHTS].specs
    small = [spec.nbytes for name, spec in specs.items() if name.endswith((".g_idx", ".bias"))]
    assert hub.served[f"org/tiny/{WEIGHTS}"] == HEAD + sum(small)
    configs = {f"org/tiny/{name}" for name in ("config.json", "quantize_config.json")}
    assert hub.served.keys() == {*configs, f"org/tiny/{WEIGHTS}"}
    assert not list(tmp_path.rglob("*.safetensors"))


def test_several_files_and_none_that_are_not_wanted(at: Run, hub: Hub, tmp_path: Path) -> None:
    """The cache gets the index's files, and neither pickles nor other weights."""
    model = make_checkpoint(tmp_path / "model", files=3)
    (model / "original").mkdir()
    for name in ("pytorch_model.bin", "consolidated.safetensors", "original/a.safetensors"):
        (model / name).write_bytes(b"nobody needs it")
    (model / "notes.txt").write_text("carried along")
    hub.add_directory("org/several", model)
    done = at("convert", "--tp", 2, "org/several", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "notes.txt").read_text() == "carried along"
    fetched = {path.name for path in (tmp_path / "home").rglob("snapshots/*/**/*.*")}
    assert len([name for name in fetched if name.endswith(".safetensors")]) == 3
    assert not fetched & {"pytorch_model.bin", "consolidated.safetensors", "a.safetensors"}


@pytest.mark.parametrize(
    ("model", "options", "environment", "words"),
    [
        ("org/none", [], {}, "org/none: no such directory, and no repository of that name"),
        ("org/private", [], {"token": ""}, "no repository of that name on the Hub that you may"),
        ("org/gated", [], {"token": ""}, "org/gated: is gated; must be"),
        ("org/tiny", ["--revision", "v2"], {}, "org/tiny: has no revision v2; must be"),
        ("org/tiny", [], {"HF_HUB_OFFLINE": "1"}, "is not in the cache as a whole, and HF_HUB_OF"),
        ("org/tiny", [], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 can't be reac"),
        ("or--g/tiny", [], {}, "or--g/tiny"),
        ("tests", ["--revision", "v2"], {}, "tests: not a repository on the Hub"),
        ("org/upwards", [], {}, "org/upwards: is refused (Invalid filename '../x."),
        ("org/bomb", [], {}, "model.safetensors: not a whole safetensors file"),
        ("org/pickle", [], {}, "a pickle, which can run code when loaded"),
        ("org/out", [], {}, "has a tpgptq.json, so it is converted already"),
    ],
)
def test_what_cannot_be_had(
    at: Run,
    hub: Hub,
    model: str,
    options: list[str],
    environment: dict[str, str],
    words: str,
) -> None:
    hub.add("org/private", {"config.json": b"{}"}, private=True)
    hub.add("org/gated", {"config.json": b"{}"}, gated=True)
    hub.add("org/upwards", {"config.json": b"{}", "../x.safetensors.index.json": b"{}"})
    bomb = (1 << 40).to_bytes(8, "little") + b"{" * 1000
    hub.add("org/bomb", {"config.json": b"{}", "model.safetensors": bomb})
    hub.add("org/pickle", {"config.json": b"{}", "pytorch_model.bin": b"?"})
    hub.add("org/out", {"config.json": b"{}", "tpgptq.json": b"{}"})
    done = at("inspect", *options, model, **environment)
    assert done.returncode == 1
    error, hint = done.stderr.splitlines()
    assert error.startswith("Error: ")
    assert words in error
    assert hint.startswith("Hint: ")
    assert done.stdout == ""


def test_a_file_that_is_not_the_hubs(at: Run, hub: Hub, tmp_path: Path) -> None:
    """A byte that changed in the cache is found by the checksum, and nothing is written."""
    assert at("convert", "--tp", 2, "org/tiny", tmp_path / "out").returncode == 0
    shutil.rmtree(tmp_path / "out")
    (blob,) = {path.resolve() for path in (tmp_path / "home").rglob(WEIGHTS)}
    with blob.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    done = at("convert", "--tp", 2, "org/tiny", tmp_path / "out")
    assert done.returncode == 1
    assert f"{WEIGHTS}: sha256 is " in done.stderr
    assert "as the Hub states" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"home"}


class Stranger(BaseHTTPRequestHandler):
    """No Hub: answers everything alike, as a proxy does that wants one to log in."""

    answer = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.answer)))
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, *_: object) -> None:
        pass


ANSWERS = [b"", b"<html>", b"[]", b"null", b"{}", b'{"id": "o/n"}', b"[" * 100_000, b"\xff"]


@pytest.mark.parametrize("answer", [*ANSWERS, b'{"id": "o/n", "siblings": [{}]}'])
def test_answers_that_are_not_the_hubs(at: Run, out: Path, answer: bytes) -> None:
    handler = type("Handler", (Stranger,), {"answer": answer})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        for command in (("inspect", "o/n"), ("push", out / "tp-2", "o/n")):
            done = at(*command, HF_ENDPOINT=endpoint)
            assert done.returncode == 1
            error, hint = done.stderr.splitlines()
            assert error.startswith(f"Error: o/n: {endpoint} answers what can't be understood")
            assert hint.startswith("Hint: ")
        server.shutdown()


def test_a_file_on_the_hub_that_would_lie_elsewhere(
    at: Run, hub: Hub, tiny: Path, tmp_path: Path
) -> None:
    hub.add_directory("org/odd", tiny)
    hub.add("org/odd", {"sub/../../x": b""})
    done = at("convert", "--tp", 2, "org/odd", tmp_path / "out")
    assert done.returncode == 1
    assert "org/odd: is refused (Invalid filename" in done.stderr


@pytest.fixture
def out(tiny: Path, tmp_path: Path) -> Path:
    """A verified output of several degrees."""
    from click.testing import CliRunner

    from tpgptq_convert.cli import cli

    path = tmp_path / "out"
    command = ["convert", "--tp", "2", "--tp", "4", "--max-shard-size", "400KB"]
    assert CliRunner().invoke(cli, [*command, str(tiny), str(path)]).exit_code == 0
    return path


def test_several_degrees_are_branches(at: Run, hub: Hub, out: Path, tiny: Path) -> None:
    done = at("push", "--private", out, "org/out")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["org/out"]
    assert repository.private
    for branch in ("tp-2", "tp-4"):
        assert len(repository.messages[branch]) == 2
        files = repository.files(branch)
        assert files.pop(".gitattributes")
        card = files.pop("README.md")
        assert f"\nvllm serve org/out --revision {branch} --tensor-parallel".encode() in card
        assert f"(first `hf download org/out --revision {branch} --local-dir .`)".encode() in card
        assert b"`.` is this directory" not in card
        assert files == {
            path.name: path.read_bytes()
            for path in (out / branch).iterdir()
            if path.name != "README.md"
        }
    main = repository.files("main")
    assert main.keys() == {".gitattributes", "README.md"}
    card = ModelCard(main["README.md"].decode())
    assert card.data.license == "apache-2.0"
    assert "| [tp-4](https://huggingface.co/org/out/tree/tp-4) | 4 | " in card.text

    # The same again changes nothing; files of other names take the place of the old ones.
    before = dict(repository.branches)
    unchanged = [
        f"Already up to date: {hub.endpoint}/org/out/tree/{branch} (commit {before[branch][:8]})"
        for branch in ("tp-2", "tp-4", "main")
    ]
    options = ("--tp", 2, "--tp", 4, "--max-shard-size", "400KB", "--skip-if-current")
    current = at("convert", *options, "--push-to-hub", "org/out", tiny, out)
    assert current.stderr.splitlines()[-4:] == [f"{out} is current: nothing to do", *unchanged]
    again = at("push", out, "org/out")
    assert again.returncode == 0
    assert again.stderr.splitlines() == unchanged
    assert repository.branches == before
    shutil.rmtree(out)
    whole = at("convert", "--tp", 2, "--tp", 4, tiny, out, "--push-to-hub", "org/out")
    assert whole.returncode == 0, whole.stderr
    files = repository.files("tp-4")
    assert files.keys() - {".gitattributes"} == {path.name for path in (out / "tp-4").iterdir()}
    assert b"vllm serve org/out --revision tp-4 --tensor-parallel-size 4" in files["README.md"]


def test_one_degree_goes_where_it_is_told(at: Run, hub: Hub, out: Path) -> None:
    done = at("push", "--json", "--revision", "two", out / "tp-2", "org/out")
    assert done.returncode == 0, done.stderr
    (pushed,) = printed(done, "push")["pushed"]
    assert pushed["branch"] == "two"
    assert pushed["commit"] == hub.repositories["org/out"].branches["two"]
    assert pushed["changed"] is True
    again = at("push", "--json", "--revision", "two", out / "tp-2", "org/out")
    assert printed(again, "push")["pushed"] == [pushed | {"changed": False}]
    assert hub.repositories["org/out"].files("main").keys() == {".gitattributes"}
    assert at("push", "--revision", "two", out, "org/out").returncode == 2


def test_an_upload_that_was_cut_short_goes_on(at: Run, hub: Hub, out: Path) -> None:
    hub.uploads_left = 2
    done = at("push", out / "tp-2", "org/out")
    assert done.returncode == 1
    error, hint = done.stderr.splitlines()[-2:]
    assert error.startswith("Error: org/out: the upload was cut short (")
    assert hint.startswith(f"Hint: tpgptq push {out / 'tp-2'} org/out goes on")
    assert hub.repositories["org/out"].messages["main"] == ["initial commit"]
    assert len(hub.uploaded) == 2
    hub.uploads_left = None
    assert at("push", out / "tp-2", "org/out").returncode == 0
    weights = list((out / "tp-2").glob("*.safetensors"))
    assert len(hub.uploaded) == len(set(hub.uploaded)) == len(weights) > 4


def test_what_is_not_pushed(at: Run, hub: Hub, out: Path, tiny: Path, tmp_path: Path) -> None:
    """And nothing is changed on the Hub."""
    hub.add("org/public", {"notes.txt": b"?"})
    before = {name: dict(r.branches) for name, r in hub.repositories.items()}
    two = out / "tp-2"

    def refused(words: str, *arguments: object, code: int = 1, token: str = WRITER) -> None:
        done = at("push", *arguments, token=token)
        assert done.returncode == code, done.stderr
        assert words in done.stderr
        assert {name: dict(r.branches) for name, r in hub.repositories.items()} == before

    refused("has no tpgptq.json, nor a tp-N with one", tiny, "org/out")
    card = (two / "README.md").rename(tmp_path / "secret")
    (two / "README.md").symlink_to("../../secret")
    refused("README.md: a link to ", two, "org/out", code=3)
    card.rename(two / "README.md")
    refused("holds gptq_model-4bit-64g.safetensors, which is no part of", two, "org/tiny")
    refused("holds gptq_model-4bit-64g.safetensors, which is no part of", out, "org/tiny")
    refused("exists, and is public; must be private", "--private", two, "org/public")
    refused("name: names no owner; must be like org/name", two, "name")
    refused("can't be pushed to without a token", two, "org/out", token="")
    refused("the Hub refuses (401", two, "org/out", token=READER)
    refused("the Hub refuses (403", two, "org/public", token=READER)
    unchecked = ("convert", "--no-verify", "--tp", 2, tiny, tmp_path / "unchecked")
    assert at(*unchecked, "--push-to-hub", "org/out").returncode == 2
    assert at(*unchecked).returncode == 0
    refused("was not verified; must be, before it is pushed", tmp_path / "unchecked", "org/out")
    assert at("verify", tiny, tmp_path / "unchecked").returncode == 0
    assert at("push", tmp_path / "unchecked", "org/out").returncode == 0
    before["org/out"] = dict(hub.repositories["org/out"].branches)
    hub.complaint = '"license" must be one of these'
    refused(
        'org/out: is refused (Invalid metadata in README.md. - "license" must be', two, "org/out"
    )
    hub.complaint = ""
    with (two / "config.json").open("a") as file:
        file.write(" ")
    refused("config.json: is not what it was when it was verified", two, "org/out", code=3)
    (two / "config.json").unlink()
    refused("config.json: missing", two, "org/out", code=3)
