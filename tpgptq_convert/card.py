"""The output's README.md: where it came from, what is in it, how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CARD = """\
# {name}, {bits}-bit GPTQ for tensor-parallel degree {tp}

Made from `{name}` by {tool} with

```
{command}
```

The quantised values are the source's own, bit for bit. Rows and columns were put in an order in
which every rank's every layer has consecutive groups, so that no rank needs another rank's
activations; `tpgptq-index.safetensors` says where each of them came from.

{files}

Serve it with vLLM, in an environment that has `tpgptq-convert` too:

```
vllm serve . --tensor-parallel-size {tp}
```

or run it with the module in this directory, which needs torch (and transformers for the model):

```
torchrun --nproc-per-node {tp} tpgptq_runtime.py --prompt "Once upon a time"
```

Engines that know plain GPTQ alone must not load it: they would ignore `perm`, and the group size of
attention's output layer. It runs at tensor-parallel degree {tp} (in vLLM at its divisors too). A
LoRA adapter of the MLP, made for the source, must be permuted along with the channels: `mlp.*.rows`
and `mlp.*.cols` of the index file say how.
"""


def model_card(manifest: dict[str, Any], source: Path, command: str) -> str:
    """The card's text; the source card's metadata (licence, languages, ...) is kept on top."""
    files = manifest["files"]
    if manifest["layout"] == "merged":
        rows = [("all", files["merged"])]
    else:
        rows = [("shared", files["shared"])]
        rows += [(f"rank {rank}", of_rank) for rank, of_rank in enumerate(files["ranks"])]
    table = ["| | files | MB |", "|---|---|--:|"]
    for label, of_label in rows:
        size = sum(file["bytes"] for file in of_label.values())
        table.append(f"| {label} | {'<br>'.join(of_label)} | {size / 1e6:.1f} |")
    text = CARD.format(
        name=manifest["source"]["name"],
        bits=manifest["bits"],
        tp=manifest["tp"],
        tool=manifest["tool"],
        command=command,
        files="\n".join(table),
    )
    return _front_matter(source / "README.md") + text


def _front_matter(readme: Path) -> str:
    """The YAML block on top of a model card, with its fences, or nothing."""
    if not readme.is_file():
        return ""
    text = readme.read_text(encoding="utf-8", errors="replace")
    head, fence, _ = text.removeprefix("---\n").partition("\n---\n")
    return f"---\n{head}\n---\n\n" if text.startswith("---\n") and fence else ""
