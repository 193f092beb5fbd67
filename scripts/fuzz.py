"""Feed damaged and hostile checkpoints to inspect and convert, and count what must not happen.

Each case is a small valid checkpoint with one of the ATTACKS below, or with one to three seeded
mutations: of bytes, of the JSON files, of headers, of tensors, of the files' kinds. Commands run
inside worker processes, which may not take more than MEMORY beyond what they start with. After each
case it is checked that

- each command ended after --patience seconds of processor time at most, with exit code 0 or 1, and
  said no other lines than it should;
- nothing stands in the case's directory that was not there, but a whole OUT after exit code 0;
- no source file changed, and no planted code ran;
- an OUT holds what the source holds: compared here, without the package, value by value.

Cases are numbered: a seed and a number always give the same one. Exit code 1 if anything was found.

Usage:

    python scripts/fuzz.py                      # all attacks, 1000 mutated checkpoints
    python scripts/fuzz.py --cases 10000 --workers 8
    python scripts/fuzz.py --only 217 --keep DIR   # one again, its files left in DIR
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import socket
import stat
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
from make_synthetic import Maker, Shape, model_config, quantize_config, write_weights

MEMORY = 2 << 30  # of address space: thread stacks and arenas take most of it
GROWTH = 300 << 20  # of resident memory, in one case; the checkpoints have a fifth of a megabyte
PATIENCE = 10.0  # seconds that a command may take of a processor
WAITING = 120.0  # seconds after which a case is ended, however busy the machine
SIZES = {"F16": 2, "BF16": 2, "F32": 4, "I32": 4, "I64": 8}
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
Q0, DOWN0 = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"

Rng = np.random.Generator
Header = dict[str, Any]


@dataclass(frozen=True)
class Tensor:
    """What a safetensors file says of a tensor, and its bytes; the two need not agree."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def array(self, kind: str) -> np.ndarray:
        return np.frombuffer(self.data, kind).reshape(self.shape).copy()


Tensors = dict[str, Tensor]


# Files, written without any care.


def read_file(path: Path) -> tuple[Header, bytes]:
    """The header and the data of a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_file(path: Path, header: Header | bytes, data: bytes, size: int | None = None) -> None:
    """The same, with any header at all, which says that it has `size` bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if size is None else size
    path.write_bytes((size % (1 << 64)).to_bytes(8, "little") + text + data)


def load(path: Path) -> Tensors:
    header, data = read_file(path)
    return {
        name: Tensor(entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def save(path: Path, tensors: Tensors) -> None:
    header, data = {}, b""
    for name, tensor in tensors.items():
        end = len(data) + len(tensor.data)
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [len(data), end],
        }
        data += tensor.data
    write_file(path, header, data)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change the value in a JSON file."""
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


# The valid checkpoints that everything begins with.

BASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama in three files": {"max_bytes": 20_000},
    "qwen2, asymmetric": {"model_type": "qwen2", "asym": True},
    "qwen3, one kv head": {"model_type": "qwen3", "kv_heads": 1},
}


def make_base(
    model: Path,
    model_type: str = "llama",
    kv_heads: int = 2,
    asym: bool = False,
    max_bytes: int = 1 << 40,
) -> None:
    """A checkpoint of 100 kB, with a tokenizer, a card and a licence."""
    shape = Shape(32, 64, 2, 4, kv_heads, 8, vocab=16, model_type=model_type)
    quant = quantize_config(16, asym, False)
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(model_config(shape, quant)))
    (model / "quantize_config.json").write_text(json.dumps(quant))
    (model / "tokenizer.json").write_text('{"version": "1.0"}')
    (model / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (model / "LICENSE").write_text("MIT")
    write_weights(model, Maker(shape, 16, asym, False, 0, "cpu"), max_bytes)


def weights_of(model: Path) -> list[Path]:
    return sorted(path for path in model.glob("*.safetensors") if path.is_file())


def single(model: Path) -> Path:
    """The file of a checkpoint that has one."""
    return model / WEIGHTS


# Attacks made by hand. Each is given a model directory, beside which it may put other things.

Attack = Callable[[Path], object]
ATTACKS: dict[str, Attack] = {}


def attack(name: str) -> Callable[[Attack], Attack]:
    def remember(function: Attack) -> Attack:
        ATTACKS[name] = function
        return function

    return remember


def with_header(change: Callable[[Header], Any]) -> Attack:
    def apply(model: Path) -> None:
        header, data = read_file(single(model))
        changed = change(header)
        write_file(single(model), header if changed is None else changed, data)

    return apply


def with_tensors(change: Callable[[Tensors], object]) -> Attack:
    def apply(model: Path) -> None:
        tensors = load(single(model))
        change(tensors)
        save(single(model), tensors)

    return apply


def with_array(name: str, kind: str, change: Callable[[np.ndarray], object]) -> Attack:
    def apply(tensors: Tensors) -> None:
        array = tensors[name].array(kind)
        change(array)
        tensors[name] = Tensor(tensors[name].dtype, tensors[name].shape, array.tobytes())

    return with_tensors(apply)


def with_config(**changes: Any) -> Attack:
    return lambda model: edit(model / "config.json", lambda config: config | changes)


def with_map(value: Any) -> Attack:
    return lambda model: (model / INDEX).write_text(json.dumps({"weight_map": value}))


def raw(name: str, data: bytes) -> Attack:
    return lambda model: (model / name).write_bytes(data)


def entry(**changes: Any) -> Callable[[Header], Any]:
    return lambda header: header[f"{Q0}.qweight"].update(changes)


def nested(depth: int, opening: str = '{"a":', inner: str = "1", closing: str = "}") -> str:
    return opening * depth + inner + closing * depth


for size in (0, 1, 7, 8, 2**20, 2**31, 2**32, 2**63, 2**64 - 1):
    ATTACKS[f"a header of {size} bytes, it says"] = lambda model, size=size: write_file(
        single(model), b"{}", b"\0" * 100, size
    )
for title, text in {
    "that is a list": b"[]",
    "that is null": b"null",
    "that is empty": b"{}",
    "of 99 MB of spaces": b"{" + b" " * 99_000_000 + b"}",
    "of 10 MB of brackets": b"[" * 10_000_000,
    "nested 100 deep": nested(100).encode(),
    "nested 100000 deep": nested(100_000).encode(),
    "that is not UTF-8": b'{"\xff\xfe": 1}',
    "with a BOM": b"\xef\xbb\xbf{}",
    "with an int of 10000 digits": b'{"a": ' + b"9" * 10_000 + b"}",
    "of 100000 tensors of no bytes": json.dumps(
        {f"t{i}": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
    ).encode(),
}.items():
    ATTACKS[f"a header {title}"] = lambda model, text=text: write_file(single(model), text, b"")
for title, change in {
    "a huge shape": entry(shape=[2**62, 4]),
    "a shape whose product overflows": entry(shape=[2**33, 2**33]),
    "a negative shape": entry(shape=[-4, 32]),
    "a shape of floats": entry(shape=[4.0, 32.0]),
    "a shape of 10000 ones": entry(shape=[1] * 10_000 + [4, 32]),
    "a shape that is text": entry(shape="4"),
    "no shape": lambda header: header[f"{Q0}.qweight"].pop("shape"),
    "offsets that overlap": lambda header: header[f"{Q0}.qweight"].update(
        data_offsets=header[f"{DOWN0}.qweight"]["data_offsets"]
    ),
    "offsets the wrong way round": entry(data_offsets=[512, 0]),
    "negative offsets": entry(data_offsets=[-512, 0]),
    "offsets past the end": entry(data_offsets=[2**40, 2**40 + 512]),
    "offsets that are NaN": entry(data_offsets=[float("nan"), float("inf")]),
    "one offset": entry(data_offsets=[0]),
    "an unknown dtype": entry(dtype="Q4_K"),
    "a dtype of four bits": entry(dtype="F4", shape=[4, 256]),
    "a dtype that is a list": entry(dtype=["I32"]),
    "a dtype of the same size": entry(dtype="F32"),
    "metadata that is no text": lambda header: header.update(__metadata__={"a": {"b": 1}}),
    "the format of another library": lambda header: header.update(__metadata__={"format": "tf"}),
    "a name with a NUL": lambda header: header.update({"a\0b": header.pop(f"{Q0}.qweight")}),
    "a name that is a path": lambda header: header.update({"../../x": header.pop(f"{Q0}.bias", 1)}),
    "a name of a megabyte": lambda header: header.update(
        {"x" * 2**20: header.pop(f"{Q0}.qweight")}
    ),
    "a name that moves the cursor": lambda h: h.update({"\x1b[2J\r\n": h.pop(f"{Q0}.qweight")}),
    "a lone surrogate for a name": lambda h: h.update({"\ud800": h.pop(f"{Q0}.qweight")}),
    "a name twice": lambda header: (
        json.dumps(header)[:-1] + f', "{Q0}.qweight": {json.dumps(header[f"{DOWN0}.qweight"])}}}'
    ).encode(),
}.items():
    ATTACKS[f"a header with {title}"] = with_header(change)
for title, value in {
    "a path upwards": {"a": "../secret.safetensors"},
    "an absolute path": {"a": "/etc/passwd"},
    "an absolute path to weights": {"a": "/secret.safetensors"},
    "a path downwards": {"a": "sub/model.safetensors"},
    "dots": {"a": "..", "b": "."},
    "no name": {"a": ""},
    "a NUL": {"a": "x\0.safetensors"},
    "a name too long": {"a": "x" * 300 + ".safetensors"},
    "a lone surrogate": {"a": "\ud800.safetensors"},
    "a list": ["model.safetensors"],
    "a number": 7,
    "nothing": {},
    "objects for names": {"a": {"b": "model.safetensors"}},
    "100000 files": {f"t{i}": f"model-{i}.safetensors" for i in range(100_000)},
    "other tensors": {"nobody": WEIGHTS},
}.items():
    ATTACKS[f"an index with {title}"] = with_map(value)
for title, text in {
    "nested 101 deep": '{"a": ' + nested(101) + "}",
    "nested 900 deep": '{"a": ' + nested(900) + "}",
    "nested 100000 deep": nested(100_000),
    "with lists 900 deep": '{"a": ' + nested(900, "[", "", "]") + "}",
    "with an int of 5000 digits": '{"a": ' + "9" * 5_000 + "}",
    "with an int of 4000 digits": '{"hidden_size": ' + "9" * 4_000 + "}",
    "with a float beyond all": '{"hidden_size": 1e999}',
    "with NaN": '{"hidden_size": NaN}',
    "that is a list": "[]",
    "that is a text": '"llama"',
    "that is empty": "",
    "of 10 MB of text": '{"model_type": "' + "x" * 10_000_000 + '"}',
}.items():
    ATTACKS[f"a config.json {title}"] = raw("config.json", text.encode())
    ATTACKS[f"a quantize_config.json {title}"] = raw("quantize_config.json", text.encode())
    ATTACKS[f"an index {title}"] = raw(INDEX, text.encode())
ATTACKS["a config.json that is UTF-16"] = raw("config.json", '{"a": 1}'.encode("utf-16"))
ATTACKS["a config.json that is not UTF-8"] = raw("config.json", b'{"model_type": "\xff"}')
for depth in (50, 90, 200, 500, 900, 960, 980):  # where loading and writing may disagree
    ATTACKS[f"a valid config.json with something nested {depth} deep"] = with_config(
        extra=json.loads(nested(min(depth, 900)))
    )
for title, changes in {
    "2**22 heads": {"num_attention_heads": 1 << 22},
    "2**22 of everything": dict.fromkeys(
        ("hidden_size", "num_attention_heads", "head_dim", "intermediate_size"), 1 << 22
    ),
    "no kv heads": {"num_key_value_heads": 0},
    "10**18 blocks": {"num_hidden_layers": 10**18},
    "100 blocks": {"num_hidden_layers": 100},
    "true for a size": {"hidden_size": True},
    "a list for a family": {"model_type": []},
    "a family of another shape": {"model_type": "gpt2"},
    "a fused family": {"model_type": "falcon", "new_decoder_architecture": 1},
    "a list for a quantisation": {"quantization_config": [1]},
    "a quantisation of everything odd": {
        "quantization_config": {"bits": [], "group_size": {}, "quant_method": [], "format": [1]}
    },
    "a group of 2**40": {"quantization_config": {"bits": 4, "group_size": 2**40}},
    "one group a column": {"quantization_config": {"bits": 4, "group_size": -1}},
    "code of its own": {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
    "an activation of 1 MB": {"hidden_act": "x" * 2**20},
}.items():
    ATTACKS[f"a config.json with {title}"] = with_config(**changes)
for title, pattern in {
    "tries every way": r"(([a-z0-9_]+\.?)+)+!",
    "repeats what is repeated": "(((.{1000}){1000}){1000}){1000}",
    "repeats too often": ".{99999999999}",
    "opens 9999 brackets": "(" * 9999,
    "is 1 MB long": "." * 2**20,
    "is no text": "\ud800",
}.items():

    def rule(config: dict[str, Any], pattern: str = pattern) -> dict[str, Any]:
        quant = config["quantization_config"] | {"dynamic": {pattern: {"bits": 8}}}
        return config | {"quantization_config": quant}

    ATTACKS[f"a rule that {title}"] = lambda model, rule=rule: edit(model / "config.json", rule)
for title, values in {"NaN": np.nan, "infinity": np.inf, "the largest": 65504, "0": 0}.items():

    def fill(array: np.ndarray, values: float = values) -> None:
        array.flat[3] = values

    ATTACKS[f"a scale that is {title}"] = with_array(f"{Q0}.scales", "<f2", fill)
    ATTACKS[f"a norm that is {title}"] = with_array("model.norm.weight", "<f2", fill)
    ATTACKS[f"scales that are all {title}"] = with_array(
        f"{DOWN0}.scales", "<f2", lambda array, values=values: array.fill(values)
    )
for value in (-1, 2, 7, 2**31 - 1, -(2**31)):
    ATTACKS[f"one g_idx that is {value}"] = with_array(
        f"{Q0}.g_idx", "<i4", lambda array, value=value: array.put(5, value)
    )
ATTACKS["one g_idx that is another group's"] = with_array(
    f"{DOWN0}.g_idx", "<i4", lambda array: array.put(5, (array[5] + 1) % 4)
)
ATTACKS["g_idx that is one group"] = with_array(f"{Q0}.g_idx", "<i4", lambda a: a.fill(1))
ATTACKS["zero points at random"] = with_array(
    f"{DOWN0}.qzeros", "<u4", lambda a: a.put(range(a.size), np.arange(a.size) * 0x9E3779B1 % 2**32)
)


@attack("g_idx of 64 bits, beyond all")
@with_tensors
def _(tensors: Tensors) -> None:
    values = np.full(tensors[f"{Q0}.g_idx"].shape, 2**40, "<i8")
    tensors[f"{Q0}.g_idx"] = Tensor("I64", values.shape, values.tobytes())


@attack("qweight that doesn't match scales")
@with_tensors
def _(tensors: Tensors) -> None:
    tensors[f"{Q0}.scales"] = tensors["model.layers.0.mlp.up_proj.scales"]


@attack("a tensor in two files")
def _(model: Path) -> None:
    shutil.copy(single(model), model / "other.safetensors")
    with_map({"a": WEIGHTS, "b": "other.safetensors"})(model)


@attack("a file under two names")
def _(model: Path) -> None:
    (model / "other.safetensors").symlink_to(WEIGHTS)
    with_map({"a": WEIGHTS, "b": "other.safetensors"})(model)


@attack("a vocabulary of 2**40 in a sparse file")
def _(model: Path) -> None:
    header, data = read_file(single(model))
    header["model.embed_tokens.weight"] = {
        "dtype": "F16",
        "shape": [2**34, 32],
        "data_offsets": [len(data), len(data) + 2**40],
    }
    at = header["lm_head.weight"]["data_offsets"]  # the hole that the old one would leave
    header["lm_head.weight"] |= {"shape": [(at[1] - at[0]) // 64, 32]}
    write_file(single(model), header, data)
    os.truncate(single(model), single(model).stat().st_size + 2**40)


@attack("a carried file of a terabyte, sparse")
def _(model: Path) -> None:
    (model / "notes.txt").touch()
    os.truncate(model / "notes.txt", 2**40)


@attack("pickles, modules and libraries that leave a trace")
def _(model: Path) -> None:
    trace = f"import pathlib; pathlib.Path({str(model.parent / 'ran')!r}).touch()"
    for name in ("evil.py", "modeling_llama.py", "__init__.py", "sitecustomize.py", "torch.py"):
        (model / name).write_text(trace)
    pickle = b"cos\nsystem\n(S'touch " + os.fsencode(model.parent / "ran") + b"'\ntR."
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "tokenizer.pkl"):
        (model / name).write_bytes(pickle)
    with_config(auto_map={"AutoModelForCausalLM": "evil.Model"})(model)


@attack("a pickle for the weights")
def _(model: Path) -> None:
    single(model).write_bytes(
        b"cos\nsystem\n(S'touch " + os.fsencode(model.parent / "ran") + b"'\ntR."
    )


def replace(name: str, make: Callable[[Path], object]) -> Attack:
    def apply(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        make(model / name)

    return apply


def listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        before = Path.cwd()
        os.chdir(path.parent)  # the paths of sockets are short
        server.bind(path.name)
        os.chdir(before)


def secret(path: Path, text: str = '{"password": "hunter2"}') -> None:
    """A link to something outside of the model."""
    (path.parent.parent / "secret").write_text(text)
    path.symlink_to("../secret")


KINDS: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a directory": Path.mkdir,
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to /dev/urandom": lambda path: path.symlink_to("/dev/urandom"),
    "a link outside": secret,
    "a socket": listen,
    "empty": Path.touch,
}
for kind, make in KINDS.items():
    for name in (
        *(WEIGHTS, "config.json", "quantize_config.json", INDEX),
        *("README.md", "tokenizer.json", "tpgptq.json", "sub"),
    ):
        ATTACKS[f"{name} that is {kind}"] = replace(name, make)
for name in (b"tokenizer-\xff.json", b"line\nbreak.txt", b"\xf0\x28\x8c\x28", b" ", b"-rf", b"CON"):

    def plant(model: Path, name: bytes = name) -> None:
        (model / os.fsdecode(name)).write_text("text")

    ATTACKS[f"a file called {name!r}"] = plant
ATTACKS["weights called b'\\xff.safetensors'"] = lambda model: single(model).rename(
    model / os.fsdecode(b"\xff.safetensors")
)
for name in ("config.json", "README.md", "tpgptq_runtime.py", "model-shared.safetensors"):
    # A directory in the place of what an output has there.
    ATTACKS[f"a directory {name} with something in it"] = lambda model, name=name: (
        (model / name).unlink(missing_ok=True),
        (model / name).mkdir(),
        (model / name / "x").touch(),
    )


@attack("20000 files")
def _(model: Path) -> None:
    for i in range(20_000):
        os.close(os.open(model / f"junk-{i}.txt", os.O_CREAT))


@attack("directories 400 deep")
def _(model: Path) -> None:
    before = Path.cwd()
    os.chdir(model)
    for _ in range(400):
        os.mkdir("d")  # noqa: PTH102
        os.chdir("d")
    Path("x").touch()
    os.chdir(before)


@attack("a directory that links to its parent")
def _(model: Path) -> None:
    (model / "sub").mkdir()
    (model / "sub" / "up").symlink_to("..")
    (model / "loop").symlink_to(".")


for kind, make in KINDS.items():
    if kind != "a directory":  # an empty one may be what a run left that was killed

        def occupy(model: Path, make: Callable[[Path], object] = make) -> None:
            if make is secret:  # of a file, it would be one for OUT to destroy
                (model.parent / "elsewhere").mkdir()
                (model.parent / "elsewhere" / "precious").touch()
                (model.parent / ".out.tpgptq").symlink_to("elsewhere")
            else:
                make(model.parent / ".out.tpgptq")

        ATTACKS[f"beside OUT, in the place of what is written, {kind}"] = occupy


# Mutations by chance.


NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**30),
    *(0.5, 1e308, float("nan"), float("inf"), "", "x", "../x", "/etc/passwd", "\0", "\ud800"),
    *("x" * 5000, [], [1], [[]], {}, {"a": 1}, json.loads(nested(200)), ["F16"], "F16", "I32"),
)


def mutate_bytes(rng: Rng, model: Path) -> str:
    path = pick_file(rng, model)
    data = bytearray(path.read_bytes())
    how = str(rng.choice(["flip", "flip", "cut", "grow", "zero", "copy"]))
    # Half of the time where the header is.
    reach = len(data) if rng.random() < 0.5 else min(len(data), 4096)
    begin, count = int(rng.integers(reach + 1)), int(rng.integers(1, 200))
    if how == "flip":
        for at in rng.integers(0, max(reach, 1), rng.integers(1, 9)) if data else ():
            data[at] ^= 1 << int(rng.integers(8))
    elif how == "cut":
        del data[begin:]
    elif how == "grow":
        data[begin:begin] = rng.bytes(count)
    elif how == "zero":
        data[begin : begin + count] = bytes(len(data[begin : begin + count]))
    else:
        data[begin:begin] = data[:count]
    path.write_bytes(data)
    return f"{how} bytes of {path.name}"


def mutate_json(rng: Rng, model: Path) -> str:
    files = [
        name for name in ("config.json", "quantize_config.json", INDEX) if (model / name).is_file()
    ]
    path = model / str(rng.choice(files))
    value = json.loads(path.read_text())
    told = replace_one(rng, value)
    path.write_text(json.dumps(value))
    return f"{path.name}: {told}"


def mutate_header(rng: Rng, model: Path) -> str:
    path = pick_weights(rng, model)
    header, data = read_file(path)
    told = replace_one(rng, header)
    write_file(path, header, data)
    return f"{path.name}'s header: {told}"


def replace_one(rng: Rng, value: Any) -> str:
    """Replace, remove, rename or repeat something in a JSON value."""
    while True:
        key = pick(rng, list(value) if isinstance(value, dict) else range(len(value)))
        inner = value[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.8:
            value = inner
            continue
        how = rng.integers(6)
        if how == 0:
            del value[key]
            return f"{key!r} removed"
        if how == 1 and isinstance(value, dict):
            value[f"{key}x"] = value.pop(key)
            return f"{key!r} renamed"
        if how == 2 and isinstance(inner, int):
            value[key] = inner + int(rng.integers(-9, 10)) * 8 ** int(rng.integers(4))
        elif how == 3 and isinstance(value, dict):
            value[key] = value[pick(rng, list(value))]
        else:
            value[key] = pick(rng, NASTY)
        return f"{key!r} is {value[key]!r:.60}"


def mutate_values(rng: Rng, model: Path) -> str:
    """Other values in a tensor, of the kind that it has."""
    path = pick_weights(rng, model)
    tensors = load(path)
    name = pick(rng, list(tensors))
    tensor = tensors[name]
    kind = {"F16": "<f2", "I32": "<i4", "BF16": "<u2", "F32": "<f4"}.get(tensor.dtype, "u1")
    array = np.frombuffer(tensor.data, kind).copy()
    if not array.size:
        return f"{name} is empty"
    at = rng.integers(0, array.size, rng.integers(1, 5))
    if name.endswith("g_idx"):
        how = pick(rng, ["one", "shuffle", "sorted", "reverse", "same", "any"])
        if how == "one":
            array[at] = rng.integers(-1, 5, len(at))
        elif how == "shuffle":
            rng.shuffle(array)
        elif how == "any":
            array = rng.integers(0, array.max() + 1, array.size).astype(kind)
        else:
            array = {
                "sorted": np.sort(array),
                "reverse": array[::-1],
                "same": array * 0 + array[0],
            }[how]
    elif kind == "<f2":
        how = "some"
        array[at] = pick(rng, [0, -0.0, -1, 6e-8, 65504, -65504, 1, np.nan, np.inf])
    else:
        how = "random"
        array = np.frombuffer(rng.bytes(array.nbytes), kind)
    tensors[name] = Tensor(tensor.dtype, tensor.shape, array.tobytes())
    save(path, tensors)
    return f"{name}: {how} values"


def mutate_shape(rng: Rng, model: Path) -> str:
    """Tensors of other shapes and dtypes, gone, renamed, or too many."""
    path = pick_weights(rng, model)
    tensors = load(path)
    name = pick(rng, list(tensors))
    tensor = tensors[name]
    how = pick(rng, ["drop", "rename", "reshape", "cut", "dtype", "extra", "elsewhere", "swap"])
    rows = tensor.shape[0] if tensor.shape else 1
    if how == "drop":
        del tensors[name]
    elif how == "rename":
        tensors[name.replace("0", "1") if rng.random() < 0.5 else f"{name}s"] = tensors.pop(name)
    elif how == "reshape":
        tensors[name] = Tensor(tensor.dtype, tensor.shape[::-1], tensor.data)
    elif how == "cut":
        left = int(rng.integers(rows + 1))
        size = len(tensor.data) // max(rows, 1)
        tensors[name] = Tensor(tensor.dtype, (left, *tensor.shape[1:]), tensor.data[: left * size])
    elif how == "dtype":
        other = pick(rng, [d for d in SIZES if SIZES[d] == SIZES.get(tensor.dtype)] or ["U8"])
        tensors[name] = Tensor(other, tensor.shape, tensor.data)
    elif how == "extra":
        tensors[pick(rng, [f"{name}.extra", "lora_A", f"{Q0}.perm", f"{Q0}.bias"])] = tensor
    elif how == "elsewhere":
        other_path = pick_weights(rng, model)
        if other_path != path:
            save(other_path, load(other_path) | {name: tensor})
    else:
        other_name = pick(rng, list(tensors))
        tensors[name], tensors[other_name] = tensors[other_name], tensor
    save(path, tensors)
    return f"{how} {name}"


def mutate_files(rng: Rng, model: Path) -> str:
    """A file of another kind, gone, twice, or too many."""
    path = pick_file(rng, model)
    how = pick(rng, ["kind", "kind", "gone", "twice", "swap", "junk"])
    if how == "kind":
        how = pick(rng, list(KINDS))
        path.unlink()
        KINDS[how](path)
    elif how == "gone":
        path.unlink()
    elif how == "twice":
        shutil.copy(path, model / f"other-{path.name}")
    elif how == "swap":
        other = pick_file(rng, model)
        ours, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(ours)
    else:
        junk = model / os.fsdecode(rng.bytes(12).replace(b"\0", b"_").replace(b"/", b"_"))
        junk.write_bytes(rng.bytes(20))
    return f"{path.name}: {how}"


MUTATIONS = (
    *(mutate_bytes, mutate_json, mutate_header, mutate_values, mutate_values),
    *(mutate_shape, mutate_files),
)


def pick(rng: Rng, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def pick_file(rng: Rng, model: Path) -> Path:
    files = sorted(path for path in model.iterdir() if path.is_file() and not path.is_symlink())
    return pick(rng, files)


def pick_weights(rng: Rng, model: Path) -> Path:
    return pick(rng, weights_of(model))


# One case.


@dataclass
class Outcome:
    """What came of one case."""

    number: int
    title: str
    ended: str = ""  # refused, converted, failed
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0


def run_case(number: int, seed: int, bases: Path, directory: Path) -> Outcome:
    """Make the case in an empty directory, run the commands, look at what they left."""
    model, out = directory / "model", directory / "out"
    outcome = Outcome(number, make_case(number, seed, bases, model))
    (directory / "beside").mkdir()
    (directory / "beside" / "precious").write_text("mine")
    os.chdir(directory / "beside")
    before = snapshot(directory)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tp = ("2", "1", "4")[number % 3]
    inspected = run_command(outcome, "inspect", str(model))
    code = run_command(outcome, "convert", "--tp", tp, str(model), str(out))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) << 10
    largest = max(
        (path.stat().st_blocks << 9 for path in model.rglob("*") if path.is_file()), default=0
    )
    if grown > GROWTH + 10 * largest:
        outcome.faults.append(f"memory grew by {grown >> 20} MB")
    if inspected == 1 and code == 0:
        outcome.faults.append("inspect refused what convert took")
    outcome.ended = {0: "converted", 1: "refused"}.get(code, f"exit code {code}")
    after = snapshot(directory)
    news = sorted(path for path in after if before.get(path) != after[path])
    news += sorted(path for path in before if path not in after)
    allowed = code == 0
    if foreign := [p for p in news if not allowed or not (p == "out" or p.startswith("out/"))]:
        outcome.faults.append(f"outside OUT: {foreign[:5]!r}")
    if code == 0:
        if any(b"hunter2" in path.read_bytes() for path in out.rglob("*") if path.is_file()):
            outcome.faults.append("a secret from outside of the model is in OUT")
        try:
            outcome.faults += unfaithful(model, out, int(tp))
        except Exception:  # noqa: BLE001  # what can't be read is a fault like another
            outcome.faults.append(f"not to be read: {traceback.format_exc(limit=-2)}")
    return outcome


def make_case(number: int, seed: int, bases: Path, model: Path) -> str:
    """Attacks come first, with negative numbers; returns what was done."""
    if number < 0:
        name = list(ATTACKS)[-number - 1]
        shutil.copytree(bases / "llama", model)
        ATTACKS[name](model)
        return name
    rng = np.random.default_rng([seed, number])
    base = pick(rng, list(BASES))
    shutil.copytree(bases / base, model)
    done = []
    for _ in range(rng.integers(1, 4)):
        mutation = pick(rng, MUTATIONS)
        try:
            done.append(mutation(rng, model))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
            done.append(f"{mutation.__name__} of what is damaged already")
    return f"{base}: {'; '.join(done)}"


def run_command(outcome: Outcome, *arguments: str) -> int:
    """Run a command in this process; returns its exit code."""
    from click.testing import CliRunner

    from tpgptq_convert.cli import cli

    raised: list[str] = []
    threading.excepthook = lambda what: raised.append(f"in a thread: {what.exc_value!r}")
    sys.unraisablehook = lambda what: raised.append(f"unraisable: {what.exc_value!r}")
    started = time.process_time()
    result = CliRunner().invoke(cli, list(arguments))
    outcome.seconds = max(outcome.seconds, time.process_time() - started)
    if result.exception and not isinstance(result.exception, SystemExit):
        last = "".join(traceback.format_exception(result.exception)[-4:])
        raised.append(f"{result.exception!r:.200}\n{last}")
    outcome.faults += [f"traceback from {arguments[0]}: {text}" for text in raised]
    lines = result.stderr.splitlines()
    if result.exit_code == 1 and not raised:
        kinds = [line.partition(":")[0] for line in lines if not line.startswith("... and ")]
        kinds = [kind for kind in kinds if kind not in ("Note", "Damaged")]
        if kinds != ["Error"] * (len(kinds) - 1) + ["Hint"] or len(kinds) < 2:
            outcome.faults.append(f"{arguments[0]} says {result.stderr[:300]!r}")
        if (longest := max(map(len, lines), default=0)) > 6000:
            outcome.faults.append(f"{arguments[0]} says a line of {longest} letters")
    elif result.exit_code not in (0, 1):
        outcome.faults.append(
            f"{arguments[0]} exits with {result.exit_code}: {result.stderr[:500]}"
        )
    return result.exit_code


def snapshot(directory: Path) -> dict[str, Any]:
    """What every path in a directory is, and what the small files hold."""
    found = {}
    for root, names, files in os.walk(directory):
        for name in (*names, *files):
            path = Path(root, name)
            status = path.lstat()
            state: list[Any] = [stat.S_IFMT(status.st_mode)]
            if stat.S_ISREG(status.st_mode):
                state += [status.st_size, status.st_mtime_ns]
                if status.st_size < 1 << 20:
                    state.append(hashlib.sha256(path.read_bytes()).digest())
            elif stat.S_ISLNK(status.st_mode):
                state.append(str(path.readlink()))
            found[str(path.relative_to(directory))] = state
    return found


# Whether an output holds what its source holds, told without the package.


def fields(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Values packed along an axis, lowest bits first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    spread = np.moveaxis(words.view(np.uint32), axis, -1)[..., None] >> shifts & (1 << bits) - 1
    return np.moveaxis(spread.reshape(*spread.shape[:-2], -1), -1, axis)


def stored(paths: list[Path]) -> dict[str, np.ndarray]:
    """Tensors as arrays of their bits."""
    kinds = {2: "<u2", 4: "<i4", 8: "<i8"}
    return {
        name: tensor.array(kinds[SIZES[tensor.dtype]])
        for path in paths
        for name, tensor in load(path).items()
    }


def unfaithful(model: Path, out: Path, tp: int) -> Iterator[str]:
    """Every layer whose stored values, zero points or scales are not the source's."""
    manifest = json.loads((out / "tpgptq.json").read_text())
    bits, names = manifest["bits"], manifest["source"]["files"]
    source = stored([model / name for name in names])
    origins = stored([out / "tpgptq-index.safetensors"])
    shared = stored(sorted(out.glob("model-shared*.safetensors")))
    ranks = [stored(sorted(out.glob(f"model-rank-{rank}-*.safetensors"))) for rank in range(tp)]
    for name, array in shared.items():
        if not np.array_equal(array, source[name]):
            yield f"{name} differs"
    for name, module in manifest["modules"].items():
        values, zeros = fields(source[f"{name}.qweight"], bits, 0), source[f"{name}.qzeros"]
        zeros, scales = fields(zeros, bits, 1), source[f"{name}.scales"]
        size = -(-len(values) // len(scales))
        g_idx = source.get(f"{name}.g_idx", np.zeros(len(values), np.int32))
        if not g_idx.any():  # what one group has, and what stands for none
            stated = json.loads((model / "config.json").read_text())["quantization_config"]
            size = stated["group_size"] if stated["group_size"] > 0 else len(values)
            g_idx = np.arange(len(values)) // size
        kept = np.zeros(len(values), int)
        for rank in range(tp):
            own = ranks[rank]
            rows, cols = (
                v[min(rank, len(v) - 1)] for v in (origins[f"{name}.rows"], origins[f"{name}.cols"])
            )
            j, c = np.flatnonzero(rows >= 0), np.flatnonzero(cols >= 0)
            kept += np.bincount(rows[j], minlength=len(values))
            groups = j // module["group_size"]
            for what, ours, theirs in (
                ("values", fields(own[f"{name}.qweight"], bits, 0)[j], values[rows[j]]),
                (
                    "zero points",
                    fields(own[f"{name}.qzeros"], bits, 1)[groups],
                    zeros[g_idx[rows[j]]],
                ),
                ("scales", own[f"{name}.scales"][groups], scales[g_idx[rows[j]]]),
            ):
                if not np.array_equal(ours[:, c], theirs[:, cols[c]]):
                    yield f"{name} of rank {rank}: {what} differ"
        if set(kept) != {tp if module["parallel"] == "column" else 1}:
            yield f"{name}: rows are missing, or there twice"


# Many cases.


def work(pipe: Connection, seed: int, bases: Path, directory: Path, keep: bool) -> None:
    """A worker process: a case for each number that is received."""
    from tpgptq_convert import verify  # noqa: F401  # torch and numba are not to count

    run_case(-1, seed, bases, directory / "first")
    shutil.rmtree(directory / "first")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    pipe.send(None)
    while (number := pipe.recv()) is not None:
        place = directory / f"case-{number}"
        try:
            outcome = run_case(number, seed, bases, place)
        except Exception:  # noqa: BLE001  # of this script
            outcome = Outcome(
                number, "", "", [f"traceback of the script: {traceback.format_exc()}"]
            )
        os.chdir("/")
        if not keep:
            shutil.rmtree(place)
        pipe.send(outcome)


def run_all(
    numbers: list[int], seed: int, workers: int, patience: float, keep: Path | None
) -> Iterator[Outcome]:
    """The outcomes, as they come."""
    context = multiprocessing.get_context("spawn")
    waiting = numbers[::-1]
    with tempfile.TemporaryDirectory(prefix="tpgptq-fuzz-") as temporary:
        directory = keep or Path(temporary)
        bases = Path(temporary) / "bases"
        for name, options in BASES.items():
            make_base(bases / name, **options)
        busy: dict[Connection, tuple[Any, int | None, float]] = {}

        def start() -> None:
            ours, theirs = context.Pipe()
            where = directory / f"worker-{time.monotonic_ns()}"
            where.mkdir(parents=True)
            process = context.Process(
                target=work, args=(theirs, seed, bases, where, keep is not None)
            )
            process.start()
            theirs.close()
            busy[ours] = (process, None, time.monotonic() + 120)

        for _ in range(min(workers, len(numbers))):
            start()
        while busy:
            for pipe in wait(list(busy), timeout=0.2):
                process, number, _ = busy[pipe]
                try:
                    outcome = pipe.recv()
                except EOFError:
                    process.join()
                    outcome = Outcome(
                        number or 0, "", "", [f"the process died: {process.exitcode}"]
                    )
                    del busy[pipe]
                    start()
                else:
                    following = waiting.pop() if waiting else None
                    pipe.send(following)
                    busy[pipe] = (process, following, time.monotonic() + WAITING)
                    if following is None:
                        process.join()
                        del busy[pipe]
                if outcome:
                    if outcome.seconds > patience:
                        outcome.faults.append(f"hangs: {outcome.seconds:.1f} s")
                    yield outcome
            for pipe, (process, number, deadline) in list(busy.items()):
                if time.monotonic() > deadline:
                    process.kill()
                    process.join()
                    del busy[pipe]
                    title = list(ATTACKS)[-number - 1] if number and number < 0 else ""
                    yield Outcome(number or 0, title, "", ["hangs: was ended"])
                    start()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1000, help="mutated checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds of a processor")
    parser.add_argument("--only", type=int, help="one case, by its number; attacks are negative")
    parser.add_argument("--keep", type=Path, help="leave the cases' files here")
    args = parser.parse_args()
    numbers = [-1 - i for i in range(len(ATTACKS))] + list(range(args.cases))
    if args.only is not None:
        numbers = [args.only]
    started, ends, faults, slowest = time.monotonic(), Counter[str](), Counter[str](), 0.0
    for outcome in run_all(numbers, args.seed, args.workers, args.patience, args.keep):
        ends[outcome.ended or "no end"] += 1
        slowest = max(slowest, outcome.seconds)
        if args.only is not None:
            print(f"case {outcome.number}: {outcome.title}: {outcome.ended}")
        for fault in outcome.faults:
            faults[fault.partition(":")[0].partition(" from ")[0]] += 1
            print(f"case {outcome.number} ({outcome.title}):\n  {fault}", flush=True)
    print(
        f"{len(ATTACKS)} attacks and {args.cases} mutated checkpoints, seed {args.seed}, in "
        f"{time.monotonic() - started:.0f} s, the slowest {slowest:.1f} s: "
        + ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
        + f"; faults: {sum(faults.values())} {dict(faults) or ''}"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
