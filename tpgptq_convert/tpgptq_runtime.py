"""Load and run one rank's shards of a checkpoint written by tpgptq-convert.

This file needs torch alone (and transformers for whole models). It lies in every output and can be
imported from there:

    torchrun --nproc-per-node 2 OUT/tpgptq_runtime.py --prompt "Once upon a time"

or, in a program of yours:

    import tpgptq_runtime
    model = tpgptq_runtime.load_model("OUT", dtype=torch.float16, device="cuda")
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "Checkpoint",
    "ColumnParallelLinear",
    "QuantLinear",
    "RowParallelLinear",
    "load_model",
    "swap_linears",
]

FORMAT_VERSION = 1
DTYPES = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I32": torch.int32, "F32": torch.float32, "I64": torch.int64, "F64": torch.float64},
}


class FormatError(ValueError):
    """The directory is no output of tpgptq-convert that this module can run."""


def _map_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, backed by a private memory map: read when touched."""
    length = path.stat().st_size
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, length)))
        header.pop("__metadata__", None)
        data = torch.from_file(str(path), shared=False, size=length, dtype=torch.uint8)[8 + size :]
        return {
            name: data[slice(*entry["data_offsets"])]
            .view(DTYPES[entry["dtype"]])
            .view(entry["shape"])
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise FormatError(f"{path}: not a whole safetensors file ({error})") from None


class Checkpoint:
    """An output directory: its manifest, and the tensors of one rank."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        path = self.directory / "tpgptq.json"
        if not path.is_file():
            raise FormatError(f"{path}: missing; must be the manifest of a converted checkpoint")
        try:
            self.manifest: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise FormatError(f"{path}: not a JSON object ({error})") from None
        version = self.manifest.get("format_version")
        if self.manifest.get("format") != "tpgptq" or version != FORMAT_VERSION:
            raise FormatError(
                f"{path}: format_version is {version}; this module reads {FORMAT_VERSION}"
            )
        self.tp: int = self.manifest["tp"]
        self.modules: Mapping[str, Any] = self.manifest["modules"]

    def shared(self) -> dict[str, Tensor]:
        """The tensors that no rank owns alone, by their source names."""
        files = self.manifest["files"]
        merged = self.manifest["layout"] == "merged"
        tensors = self._tensors(files["merged" if merged else "shared"])
        return {name: tensor for name, tensor in tensors.items() if not self._is_shard(name)}

    def _is_shard(self, name: str) -> bool:
        module, _, part = name.rpartition(".")
        row_bias = part == "bias" and self.modules.get(module, {}).get("parallel") == "row"
        return module in self.modules and not row_bias

    def rank(self, rank: int) -> dict[str, dict[str, Tensor]]:
        """One rank's shards: module name -> {"qweight": ..., "scales": ..., ...}."""
        if not 0 <= rank < self.tp:
            raise FormatError(
                f"rank {rank}: {self.directory} was written for tp {self.tp}, ranks 0 to "
                f"{self.tp - 1}; convert again with --tp for another degree"
            )
        files = self.manifest["files"]
        merged = self.manifest["layout"] == "merged"
        tensors = self._tensors(files["merged"] if merged else files["ranks"][rank])
        shards: dict[str, dict[str, Tensor]] = {name: {} for name in self.modules}
        for name, tensor in tensors.items():
            module, _, part = name.rpartition(".")
            if self._is_shard(name):
                shards[module][part] = tensor
        for name, parts in shards.items():
            needed = {"qweight", "qzeros", "scales"}
            needed |= {"perm"} if self.modules[name]["perm"] else set()
            if lacking := needed - parts.keys():
                raise FormatError(f"{name}: rank {rank} lacks {', '.join(sorted(lacking))}")
        if merged:
            return {name: self._slice(name, parts, rank) for name, parts in shards.items()}
        return shards

    def _slice(self, name: str, parts: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
        """One rank's slice of a merged module."""
        module = self.modules[name]
        column = module["parallel"] == "column"
        pieces = parts["scales"].shape[1] // module["out_features"] if column else self.tp
        piece = rank * pieces // self.tp
        dim = -1 if column else 0
        return {
            part: tensor if column and part == "perm" else tensor.chunk(pieces, dim)[piece]
            for part, tensor in parts.items()
        }

    def _tensors(self, names: Mapping[str, Any]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name in names:
            path = self.directory / name
            if not path.is_file():
                raise FormatError(f"{path}: missing; the manifest lists it")
            tensors |= _map_file(path)
        return tensors


def _unpack(words: Tensor, bits: int, dim: int) -> Tensor:
    """Packed int32 words -> values, `32 // bits` times as many along `dim`, lowest bits first."""
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    shape = [1] * (words.dim() + 1)
    shape[dim + 1] = len(shifts)
    values = (words.unsqueeze(dim + 1) >> shifts.view(shape)) & ((1 << bits) - 1)
    return values.to(torch.int16 if bits == 8 else torch.int8).flatten(dim, dim + 1)


def _zero_points(qzeros: Tensor, bits: int, checkpoint_format: str) -> Tensor:
    """Packed zero points (G, N/pf) -> (G, N): "gptq" stores one less, "gptq_v2" the value."""
    return _unpack(qzeros, bits, 1) + (1 if checkpoint_format == "gptq" else 0)


class QuantLinear(nn.Module):
    """x (..., in) -> x[..., perm] @ W, W (K, N) from packed integers in consecutive groups.

    qweight (K/pf, N) int32, qzeros (G, N/pf) int32, scales (G, N), perm (K,) int32 or None (the
    identity), bias (N,) or None; the group of row k is k // (K/G).
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], bits: int = 4, checkpoint_format: str = "gptq"
    ) -> None:
        super().__init__()
        self.bits, self.checkpoint_format = bits, checkpoint_format
        for name in ("qweight", "qzeros", "scales", "perm", "bias"):
            self.register_buffer(name, tensors.get(name))
        self.in_features = self.qweight.shape[0] * 32 // bits
        self.out_features = self.qweight.shape[1]
        self.group_size = self.in_features // self.scales.shape[0]

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    perm: Tensor | None
    bias: Tensor | None

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The weight (K, N), computed in `dtype`."""
        values = _unpack(self.qweight, self.bits, 0).unflatten(0, (-1, self.group_size))
        zeros = _zero_points(self.qzeros, self.bits, self.checkpoint_format)
        steps = (values - zeros.unsqueeze(1)).to(dtype)
        weight: Tensor = (steps * self.scales.to(dtype).unsqueeze(1)).flatten(0, 1)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        if self.perm is not None:
            x = x[..., self.perm]
        out: Tensor = x @ self.dequantise(x.dtype)
        return out if self.bias is None else out + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, perm={self.perm is not None}"
        )


class ColumnParallelLinear(QuantLinear):
    """A rank's columns of a layer: the whole input in, the rank's own channels out."""


class RowParallelLinear(QuantLinear):
    """A rank's rows of a layer: its own channels in, the sum over all ranks out, plus the bias."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        bits: int = 4,
        checkpoint_format: str = "gptq",
        bias: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(tensors, bits, checkpoint_format)
        self.register_buffer("bias_once", bias)
        self.group = group

    bias_once: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if dist.is_initialized() and dist.get_world_size(self.group) > 1:
            dist.all_reduce(out, group=self.group)
        return out if self.bias_once is None else out + self.bias_once.to(x.dtype)


def swap_linears(
    model: nn.Module,
    checkpoint: Checkpoint,
    rank: int,
    device: torch.device | str = "cpu",
    group: dist.ProcessGroup | None = None,
) -> None:
    """Put one rank's shards in the place of a Hugging Face model's linear layers, in place.

    Each attention module is told how many query heads share a kv head on this rank.
    """
    manifest = checkpoint.manifest
    quant = {"bits": manifest["bits"], "checkpoint_format": manifest["checkpoint_format"]}
    shared = checkpoint.shared()
    for name, parts in checkpoint.rank(rank).items():
        tensors = {part: tensor.to(device) for part, tensor in parts.items()}
        linear: QuantLinear
        if checkpoint.modules[name]["parallel"] == "row":
            bias = shared.get(f"{name}.bias")
            linear = RowParallelLinear(
                tensors, **quant, bias=None if bias is None else bias.to(device), group=group
            )
        else:
            linear = ColumnParallelLinear(tensors, **quant)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    heads = manifest["heads"]
    query = heads["padded_query"] // checkpoint.tp
    kv = max(1, heads["padded_kv"] // checkpoint.tp)
    for module in model.modules():
        if hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups = query // kv


def load_model(
    directory: str | Path,
    rank: int | None = None,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    group: dist.ProcessGroup | None = None,
) -> nn.Module:
    """The Hugging Face model in `directory`, as one rank runs it; needs transformers.

    Only this rank's files and the shared ones are read. rank None: this process's own rank.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    checkpoint = Checkpoint(directory)
    world = dist.get_world_size(group) if dist.is_initialized() else 1
    if world != checkpoint.tp:
        raise FormatError(
            f"world size {world}: {checkpoint.directory} was written for tp {checkpoint.tp}; run "
            f"it with torchrun --nproc-per-node {checkpoint.tp}, or convert again with --tp {world}"
        )
    if rank is None:
        rank = dist.get_rank(group) if world > 1 else 0
    config = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    swap_linears(model, checkpoint, rank, device, group)
    _fill(model, checkpoint.shared(), config, dtype, device)
    if (checkpoint.directory / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(directory)
        model.generation_config = generation  # type: ignore[assignment]
    return model.eval()


def _fill(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    config: Any,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Give a model built on the meta device its shared tensors and computed buffers."""
    state = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    missing = model.load_state_dict(state, strict=False, assign=True).missing_keys
    model.tie_weights()  # type: ignore[operator]
    lacking = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if lacking:
        raise FormatError(f"{', '.join(lacking)}: missing from the shared files ({missing})")
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):  # rotary embeddings
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, type(module)(config).to(device))


def main() -> None:
    """Generate text from a prompt, greedily: one process for each rank, started by torchrun."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--checkpoint", type=Path, default=here, help="default: %(default)s")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float16", "bfloat16", "float32"),
        default="auto",
        help="default: float16 on a GPU, float32 on a CPU",
    )
    arguments = parser.parse_args()
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError:
        raise SystemExit(
            "Error: transformers is missing; install it: pip install transformers"
        ) from None

    cuda = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    dtype = getattr(torch, arguments.dtype, torch.float16 if cuda else torch.float32)
    if "RANK" in os.environ:
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        model = load_model(arguments.checkpoint, dtype=dtype, device=device)
    except FormatError as error:
        raise SystemExit(f"Error: {error}" if os.environ.get("RANK", "0") == "0" else 1) from None
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    inputs = tokenizer(arguments.prompt, return_tensors="pt").to(device)
    with torch.inference_mode():
        tokens = model.generate(  # type: ignore[operator]
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=arguments.max_new_tokens,
            do_sample=False,
        )
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(tokenizer.decode(tokens[0], skip_special_tokens=True))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
