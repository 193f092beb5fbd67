"""The output's README.md: where it came from, what is in it, how to load it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from tpgptq_convert.manifest import weight_files
from tpgptq_convert.served import GPU_GROUP, limits, refusals
from tpgptq_convert.source import read_json

HUB = "https://huggingface.co"
METADATA = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*---(?:\r\n|\r|\n)(.*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|\Z)", re.DOTALL
)
LONGEST_METADATA = 100_000  # bytes; of a megabyte reading and writing takes a minute
# What the library raises where it is given something else than it takes for granted.
ODD_METADATA = (AttributeError, IndexError, KeyError, TypeError, ValueError)
LICENSES = ("license", "licence", "copying")  # how the names of files that hold one begin

CARD = """
# {title}, {bits}-bit GPTQ for tensor-parallel degree {tp}

Made from {source} by {tool} with

```
{command}
```

{files}

## What is changed, and what isn't

Every quantised value, scale and zero point is the source's own, bit for bit, and so are the
embeddings, the norms and whatever else wasn't quantised: nothing was quantised again. Rows and
columns of the quantised layers stand in an order in which every rank's every layer has consecutive
groups, so that no rank needs another rank's activations; rows that pad a group contribute exactly
zero. `tpgptq-index.safetensors` says where each row and column came from, and
`tpgptq verify {name} DIRECTORY` proves all of this.

It runs at tensor-parallel degree {tp}. A LoRA adapter of the MLP,
made for the source, must be permuted along with the channels: `mlp.*.rows` and `mlp.*.cols` of the
index file say how. Engines that know plain GPTQ alone must not load it: they would ignore `perm`,
and the group size of attention's output layer.

## vLLM

{vllm}

## Transformers, and the runtime module

`tpgptq_runtime.py` lies beside the weights and {needs}:

```
torchrun --nproc-per-node {tp} tpgptq_runtime.py --prompt "Once upon a time"
```

or, in a program that `torchrun --nproc-per-node {tp}` starts there:

```python
import os
import torch, torch.distributed as dist
from transformers import AutoTokenizer
import tpgptq_runtime

cuda = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
dist.init_process_group("nccl" if cuda else "gloo")
model = tpgptq_runtime.load_model(
    ".", dtype=torch.float16 if cuda else torch.float32, device=device
)
tokenizer = AutoTokenizer.from_pretrained(".", config=model.config)
prompt = tokenizer("Once upon a time", return_tensors="pt").to(device)
tokens = model.generate(
    prompt["input_ids"], attention_mask=prompt["attention_mask"], max_new_tokens=20
)
if dist.get_rank() == 0:
    print(tokenizer.decode(tokens[0]))
dist.destroy_process_group()
```
"""

SERVED = """\
In an environment that has `tpgptq-convert` as well, which brings the plugin{here}:

```
{serve} {tp}
```

Degrees that divide {tp} work too.{small}"""

SMALL = """ On GPUs
other than H100s and H200s, or with a Triton other than 3.6 to 3.9,
add `--additional-config '{{"tpgptq_kernels": "runtime"}}'`: vLLM's own kernels, which run there,
take no groups of less than 32 rows, and this output has some of {rows}."""

HERE = " (`.` is this directory; or the repository's name, if it is on the Hub, and `--revision`)"
NEEDS = "needs torch, and transformers for the model"
NOT_SERVED = "vLLM, with the plugin that `tpgptq-convert` brings, doesn't serve {what}: {problems}."
FOLDED = "They are for engines that read `g_idx`; vLLM 0.30 and later refuse them."

DEGREES = """
# {title}, {bits}-bit GPTQ for tensor parallelism

Made from {source} by {tool}. Each degree is a branch of its own, with a card that says more:

{table}

{vllm}
"""

FOLDED_CARD = """
# {title}, {bits}-bit GPTQ with its MLP folded, for tensor-parallel degree {tp}

Made from {source} by {tool} with

```
{command}
```

An ordinary GPTQ checkpoint. The quantised values are the source's own, bit for bit, but the
channels of the MLP were put in the order in which the layer that reads them has consecutive groups;
`tpgptq-index.safetensors` says where each of them came from.

{files}

It is for engines that read `g_idx`: the other layers keep theirs. Where `config.json` has a rule
under `dynamic`, it tells vLLM up to 0.29 and SGLang that the layer that reads the MLP has plain
groups. vLLM 0.30 and later refuse `desc_act: true`; edited to false, they would drop every `g_idx`
and answer nonsense. A LoRA adapter of the MLP, made for the source, must be permuted along with the
channels.
"""


def model_card(
    manifest: Mapping[str, Any],
    config: Mapping[str, Any],
    source: Path,
    command: str,
    repository: str | None = None,
    branch: str | None = None,
) -> str:
    """The card's text, for a directory or for a branch of a repository on the Hub.

    `config` is the output's config.json. The metadata of the source's card (licence, languages,
    ...) is kept.
    """
    table = _table(
        ("rank", "file", "bytes"),
        (
            ("all" if rank is None else rank, name, f"{info['bytes']:,}")
            for rank, files in weight_files(manifest)
            for name, info in files.items()
        ),
    )
    where = f"{repository} --revision {branch}" if repository and branch else repository
    text = (FOLDED_CARD if manifest["layout"] == "gptq" else CARD).format(
        title=_title(manifest),
        name=manifest["source"]["name"],
        source=_source(manifest),
        bits=manifest["bits"],
        tp=manifest["tp"],
        tool=manifest["tool"],
        command=command,
        files=table,
        vllm=_vllm([("it", where, manifest, config)]),
        needs=_needs(where) if where else NEEDS,
    )
    return _with_data(card_data(source), manifest, text)


def degrees_card(
    manifests: Mapping[str, Mapping[str, Any]], directories: Mapping[str, Path], repository: str
) -> str:
    """The card of a repository's main branch, whose other branches each hold one degree.

    `manifests` and `directories` are by branch; it takes the metadata of the first one's card.
    """
    branch, *_ = manifests
    first = manifests[branch]
    vllm = _vllm(
        (
            f"`{name}`",
            f"{repository} --revision {name}",
            manifest,
            read_json(directories[name] / "config.json"),
        )
        for name, manifest in manifests.items()
    )
    text = DEGREES.format(
        title=_title(first),
        source=_source(first),
        bits=first["bits"],
        tool=first["tool"],
        table=_table(
            ("branch", "tensor-parallel degree", "bytes"),
            (
                (
                    f"[{name}]({HUB}/{repository}/tree/{name})",
                    manifest["tp"],
                    f"{_size(manifest):,}",
                )
                for name, manifest in manifests.items()
            ),
        ),
        vllm=FOLDED if first["layout"] == "gptq" else vllm,
    )
    return _with_data(card_data(directories[branch]), first, text)


def placed(card: bytes, where: str) -> bytes:
    """A directory's card for a place on the Hub, which the commands in it then name.

    What people made of it stays.
    """
    needs, there = f"{NEEDS}:", f"{_needs(where)}:"
    for words, others in ((HERE, ""), (_serve("."), _serve(where)), (needs, there)):
        card = card.replace(words.encode(), others.encode())
    return card


def _serve(where: str) -> str:
    return f"vllm serve {where} --tensor-parallel-size"


def _needs(where: str) -> str:
    return f"{NEEDS} (first `hf download {where} --local-dir .`)"


def card_data(directory: Path) -> dict[str, Any]:
    """The metadata of the model card in a directory; empty if it has none that can be read."""
    card = directory / "README.md"
    try:
        if not card.is_file():
            return {}
        with card.open("rb") as file:
            block = METADATA.match(file.read(LONGEST_METADATA))
        stated = yaml.safe_load(block[1].decode("utf-8")) if block else None
        read = ModelCardData(**stated or {}, ignore_metadata_errors=True)
        data: dict[str, Any] = read.to_dict()  # type: ignore[no-untyped-call]
        ModelCardData(**data, ignore_metadata_errors=True).to_yaml()  # not all that can be read can
        return data
    except (*ODD_METADATA, OSError, RecursionError, yaml.YAMLError):
        return {}


def has_license(source: Path) -> bool:
    """Whether a checkpoint's card or one of its files states a licence."""
    names = (path.name.lower() for path in source.iterdir())
    return bool(card_data(source).get("license")) or any(n.startswith(LICENSES) for n in names)


def _with_data(data: dict[str, Any], manifest: Mapping[str, Any], text: str) -> str:
    """A card with the source's metadata, and what must be said of the output."""
    source, tags = manifest["source"], data.get("tags")
    kept = [tag for tag in (tags if isinstance(tags, list) else [tags]) if isinstance(tag, str)]
    added = ("gptq", f"{manifest['bits']}-bit", "tensor-parallel", "tpgptq-convert")
    data["tags"] = list(dict.fromkeys([*kept, *added]))
    if manifest["layout"] != "gptq":
        data["library_name"] = "tpgptq-convert"  # Transformers alone can't load it
    data.setdefault("pipeline_tag", "text-generation")
    if source["revision"]:
        data.setdefault("base_model", source["name"])
    if "base_model" in data:
        data["base_model_relation"] = "quantized"
    head = ModelCardData(**data, ignore_metadata_errors=True).to_yaml()
    return f"---\n{head}\n---\n{text}"


def _vllm(outputs: Iterable[tuple[str, str | None, Mapping[str, Any], Mapping[str, Any]]]) -> str:
    """How vLLM serves the first output that it can serve, and why it can't serve which.

    An output: what to call it, its place on the Hub if it has one, its manifest, its config.json.
    """
    served, refused = list[str](), dict[str, list[str]]()
    for name, where, manifest, config in outputs:
        tp = manifest["tp"]
        if problems := "; ".join([*refusals(manifest), *limits(config, tp)]):
            refused.setdefault(problems, []).append(name)
        elif not served:
            here = "" if where else HERE
            rows = min(module["group_size"] for module in manifest["modules"].values())
            small = SMALL.format(rows=rows) if rows < GPU_GROUP else ""
            served = [SERVED.format(serve=_serve(where or "."), tp=tp, here=here, small=small)]
    told = (
        NOT_SERVED.format(what=", ".join(names), problems=problems)
        for problems, names in refused.items()
    )
    return "\n\n".join([*served, *told])


def _title(manifest: Mapping[str, Any]) -> str:
    return str(manifest["source"]["name"]).rpartition("/")[2]


def _source(manifest: Mapping[str, Any]) -> str:
    source = manifest["source"]
    name, commit = source["name"], source["revision"]
    return f"[`{name}` at `{commit}`]({HUB}/{name}/tree/{commit})" if commit else f"`{name}`"


def _size(manifest: Mapping[str, Any]) -> int:
    return sum(info["bytes"] for _, files in weight_files(manifest) for info in files.values())


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table whose last column is of figures."""
    lines = [head, ["---"] * (len(head) - 1) + ["--:"], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
