"""The vLLM plugin: serves an output of `tpgptq convert`.

vLLM finds `register` through the entry point group vllm.general_plugins and calls it in each of its
processes. It adds the quantisation method "tpgptq" that the output's config.json names. Layers get
parameters of the shard's own sizes; once loaded, each becomes one part (or several, where fused
layers gather their input differently) on the runtime module's kernels where those are fast, and
elsewhere on the kernel that vLLM chooses for it, if vLLM isn't told otherwise.

A merged output is read by vLLM's default loader, which slices it. Of an output in ranks that loader
is shown the shared files alone, by model.safetensors.index.json; each worker reads its own rank's
shards itself.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence, Set
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import (
    MPLinearKernel,
    MPLinearLayerConfig,
    choose_mp_linear_kernel,
)
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

from tpgptq_convert.errors import DegreeError, OutputError, UnsupportedError
from tpgptq_convert.manifest import (
    FORMAT_VERSIONS,
    MANIFEST,
    WEIGHTS_INDEX,
    read_manifest,
    weight_files,
    weights_digest,
    wrong_tensors,
)
from tpgptq_convert.packing import pack_cols, unpack_cols, zero_points
from tpgptq_convert.served import BITS, refusals
from tpgptq_convert.source import SafetensorsFile, read_json
from tpgptq_convert.tpgptq_runtime import (
    Arranged,
    Checkpoint,
    arrange,
    fast_on,
    gathered,
    kernels_run_on,
    multiply,
)
from tpgptq_convert.writer import checksum

logger = init_logger("vllm.tpgptq")

METHOD = "tpgptq"
CHECKSUMS = "TPGPTQ_CHECKSUMS"  # set to 1: files are compared with the manifest's checksums
KERNELS = "tpgptq_kernels"  # in vLLM's --additional-config, and so in the hash of what it compiles
RUNTIME, VLLM = "runtime", "vllm"  # what it may say: whose kernels are to run
CHOOSE = f'--additional-config \'{{"{KERNELS}": "{RUNTIME}"}}\''
KERNEL_GROUPS = (128, 64, 32)  # what vLLM's kernels take, but for one group per column
PACK = 32 // BITS  # values in an int32


def register() -> None:
    """Called by vLLM in every process; importing this module has registered the method."""
    if current_platform.is_cpu() and torch.cpu._is_amx_tile_supported():
        # vLLM's bfloat16 kernel uses AMX tiles, for which nothing in vLLM asks the system.
        torch.cpu._init_amx()


_OPERATORS = torch.library.Library(METHOD, "DEF")


def _operator(
    schema: str, columns: Callable[..., int]
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Makes a function torch.ops.tpgptq.NAME: x (..., K) and more -> (..., columns of the rest).

    What is an operator nothing is compiled into: inductor would compute a norm anew for every
    element that is gathered from it, all of a token's in one block.
    """

    def fake(x: Tensor, *rest: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], columns(*rest))

    def make(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = function.__name__
        _OPERATORS.define(f"{name}{schema}")
        _OPERATORS.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{METHOD}::{name}", fake, lib=_OPERATORS)
        return function

    return make


@_operator("(Tensor x, Tensor perm) -> Tensor", len)
def gather(x: Tensor, perm: Tensor) -> Tensor:
    """x (..., K) -> (..., K'): x[..., perm]; by a kernel, which takes a third of torch's time."""
    if not kernels_run_on(x.device):
        return x.index_select(-1, perm)
    return gathered(x.reshape(-1, x.shape[-1]), perm).view(*x.shape[:-1], len(perm))


@_operator(
    "(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? perm, Tensor counters, "
    "int bits, int group_size, int out_features) -> Tensor",
    lambda *layer: layer[-1],
)
def product(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    counters: Tensor,
    bits: int,
    group_size: int,
    out_features: int,
) -> Tensor:
    """x (..., K) -> (..., out_features) by an Arranged of these fields, without a bias."""
    tables = (packed, scales, zeros, perm, None, counters)
    return multiply(x, Arranged(*tables, bits, group_size, out_features))


def layer_config(**stated: Any) -> MPLinearLayerConfig:
    """What vLLM chooses a kernel by: the one place that knows how vLLM's versions differ.

    Up to 0.29 it must be told that the layer is not act-ordered; later ones don't ask.
    """
    known = {field.name for field in dataclasses.fields(MPLinearLayerConfig)}
    return MPLinearLayerConfig(**stated, **({"has_g_idx": False} if "has_g_idx" in known else {}))


class Output:
    """An output as one process of vLLM sees it."""

    def __init__(self, model: str, revision: str | None) -> None:
        self.model, self.revision = model, revision
        self.local = Path(model).is_dir()
        directory = self.find(MANIFEST).parent
        self.manifest = read_manifest(directory)
        self.checkpoint = Checkpoint(directory)
        self.tp: int = self.manifest["tp"]
        self.modules: Mapping[str, Any] = self.manifest["modules"]
        self.in_ranks = self.manifest["layout"] == "ranks"
        self.tensors = cache(self.checkpoint.rank)  # of one rank: module -> part -> tensor
        self.check_files = cache(self._check_files)
        self.names: set[str] = set()  # of the tensors in the files checked
        heads, keys = self.manifest["heads"], ("sym", "checkpoint_format", "tp", "layout")
        self.config = {  # what config.json must say
            "num_attention_heads": heads.get("padded_query"),
            "num_key_value_heads": heads.get("padded_kv"),
            "intermediate_size": self.manifest["intermediate"].get("padded"),
            "weights_sha256": weights_digest(self.manifest),
            **{key: self.manifest[key] for key in keys},
        }
        if problems := refusals(self.manifest):
            raise UnsupportedError(
                *(f"{model}: {problem}" for problem in problems),
                hint="run it with tpgptq_runtime.py, which lies in the output",
            )

    def find(self, name: str) -> Path:
        """A file of the output, in its directory or in the Hub's cache."""
        if self.local:
            return Path(self.model, name)
        where = get_current_vllm_config().load_config.download_dir
        return Path(hf_hub_download(self.model, name, revision=self.revision, cache_dir=where))

    def shards(self, rank: int, degree: int) -> range:
        """The consecutive shards that one of `degree` ranks takes; raises DegreeError."""
        if self.tp % degree:
            fitting = [str(tp) for tp in range(1, self.tp + 1) if self.tp % tp == 0]
            raise DegreeError(
                f"{self.model}: was written for tp {self.tp}, and --tensor-parallel-size is "
                f"{degree}; must be {' or '.join(fitting)}",
                hint=f"serve at such a degree, or convert the source again with --tp {degree}",
            )
        return range(rank * self.tp // degree, (rank + 1) * self.tp // degree)

    def _check_files(self, rank: int | None) -> None:
        """Raise OutputError unless a rank's files, or (None) those that every rank reads, are what
        the manifest prescribes.
        """
        files = dict(weight_files(self.manifest)).get(rank, {})
        paths = {name: self.find(name) for name in files}
        problems = [
            damage for name, path in paths.items() if (damage := _damage(path, files[name]))
        ]
        if paths and not problems:
            opened = [SafetensorsFile(path) for path in paths.values()]
            names = {name for file in opened for name in file.specs}
            problems += wrong_tensors(self.manifest, rank, opened)
            problems += self._check_index(names) if rank is None else []
            self.names |= names
        if problems:
            raise OutputError(*problems, hint="fetch the files again, or convert again")

    def _check_index(self, names: Set[str]) -> list[str]:
        """vLLM's loader reads what the index lists: the tensors that no rank owns alone."""
        path = self.find(WEIGHTS_INDEX)
        if not path.is_file():
            return [f"{path}: missing; must list the files that every rank reads"]
        listed = read_json(path).get("weight_map")
        if not isinstance(listed, dict) or listed.keys() != names:
            return [f"{path}: must list the {len(names)} tensors that every rank reads"]
        return []

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Raise OutputError unless config.json has the manifest's heads, channels and weights."""
        problems = [
            f"{self.model}: {key} is {config[key]} in config.json and {value} in {MANIFEST}; must "
            "be the same"
            for key, value in self.config.items()
            if config.get(key, value) != value
        ]
        if problems:
            raise OutputError(*problems, hint="fetch both files again, or convert again")


def _damage(path: Path, stated: Mapping[str, Any]) -> str | None:
    """What is wrong with a file as a whole."""
    if not path.is_file():
        return f"{path}: missing; {MANIFEST} lists it"
    if (size := path.stat().st_size) != stated.get("bytes"):
        return f"{path}: has {size} bytes; must have {stated.get('bytes')}"
    if os.environ.get(CHECKSUMS) == "1" and checksum(path) != stated:
        return f"{path}: its sha256 is not the one that {MANIFEST} states"
    return None


open_output = cache(Output)


@register_quantization_config(METHOD)
class TpgptqConfig(QuantizationConfig):  # type: ignore[misc]
    """The quantisation config of an output."""

    def __init__(self, stated: Mapping[str, Any]) -> None:
        super().__init__()
        self.stated = dict(stated)
        self.model = ""
        self.revision: str | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.stated})"

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TpgptqConfig:
        version = config.get("format_version")
        if version not in FORMAT_VERSIONS:
            raise OutputError(
                f"config.json: format_version of quant_method tpgptq is {version!r}; "
                f"must be {' or '.join(map(str, FORMAT_VERSIONS))}",
                hint="use the version of tpgptq-convert that wrote it, or convert again",
            )
        return cls(config)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """vLLM says which model this is; up to 0.26 not which revision, which its config knows."""
        self.model = model_name
        self.revision = revision or getattr(hf_config, "_commit_hash", None)
        sizes = vars(hf_config) if hf_config else {}
        self.stated |= {key: value for key, value in sizes.items() if type(value) is int}

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        if not isinstance(layer, LinearBase):
            return None
        output = open_output(self.model, self.revision)
        if get_current_vllm_config().lora_config is not None:
            raise UnsupportedError(
                f"{self.model}: LoRA is enabled; must not be, since the channels of the MLP are "
                "not in the order that adapters were made for",
                hint="merge the adapter before quantising",
            )
        output.check_config(self.stated)
        output.check_files(None)
        # vLLM fuses layers: qkv_proj is q_proj, k_proj and v_proj of the output.
        parent, _, leaf = prefix.rpartition(".")
        names = [f"{parent}.{name}" for name in self.packed_modules_mapping.get(leaf, [leaf])]
        lacking = [name for name in names if name not in output.modules]
        if lacking == names and all(f"{name}.weight" in output.names for name in names):
            return UnquantizedLinearMethod()
        if lacking:
            raise OutputError(
                f"{output.model}: {', '.join(lacking)} is not in {MANIFEST}; must be, since "
                "config.json describes a model that has it",
                hint="fetch both files again, or convert again",
            )
        return TpgptqLinearMethod(output, names)


class PermParameter(BasevLLMParameter):  # type: ignore[misc]
    """perm of each fused layer, (layers, K)."""

    offsets: Sequence[int]  # first column of each of them

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        self.data[0].copy_(loaded_weight)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        size = self.data.shape[1]
        self.data[0].copy_(loaded_weight.narrow(0, self.tp_rank * size, size))

    def load_merged_column_weight(self, loaded_weight: Tensor, **where: Any) -> None:
        self.data[self.offsets.index(where["shard_offset"])].copy_(loaded_weight)

    def load_qkv_weight(self, loaded_weight: Tensor, **where: Any) -> None:
        self.load_merged_column_weight(loaded_weight, **where)


@register_weight_loader_v2_supported_method
class TpgptqLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """One linear layer of vLLM: one of the output's, or several that vLLM fuses."""

    def __init__(self, output: Output, names: Sequence[str]) -> None:
        self.output, self.names = output, names
        self.modules = [output.modules[name] for name in names]

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: Sequence[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Register parameters of this rank's sizes, as the output stores them."""
        self.shards = self.output.shards(layer.tp_rank, layer.tp_size)
        for shard in self.shards:
            self.output.check_files(shard)
        first = self.modules[0]
        self.row = first["parallel"] == "row"
        self.degree, self.dtype = layer.tp_size, params_dtype
        self.inputs, self.widths = input_size_per_partition, output_partition_sizes
        self.offsets = [0, *accumulate(self.widths)][:-1]
        self.rows = first["in_features"] * (len(self.shards) if self.row else 1)
        self._check_sizes("row" if isinstance(layer, RowParallelLinear) else "column")
        k, n, groups = self.rows, sum(self.widths), self.rows // first["group_size"]
        self.own = self._own_kernels()
        if not self.own:
            self._choose_kernel(n)  # fail before anything is read

        loader = extra["weight_loader"]
        layer.qweight = _packed(torch.empty(k // PACK, n, dtype=torch.int32), 0, loader)
        layer.qzeros = _packed(torch.empty(groups, n // PACK, dtype=torch.int32), 1, loader)
        # NaN and -1: what never arrives is noticed.
        scales = torch.full((groups, n), torch.nan, dtype=params_dtype)
        layer.scales = _scales(scales, loader)
        if any(module["perm"] for module in self.modules):
            perm = torch.arange(k, dtype=torch.int32).repeat(len(self.modules), 1)
            perm[[module["perm"] for module in self.modules]] = -1
            layer.perm = PermParameter(data=perm, weight_loader=loader)
            layer.perm.offsets = self.offsets

    def _check_sizes(self, parallel: str) -> None:
        """Raise OutputError if manifest and vLLM disagree about the layer's kind and sizes."""
        first = self.modules[0]
        problems = [
            f"{name}: parallel is {module['parallel']!r} in {MANIFEST}; must be {parallel!r}"
            for name, module in zip(self.names, self.modules, strict=True)
            if module["parallel"] != parallel
        ]
        problems += [
            f"{name}: its {key} is {module[key]} and that of {self.names[0]} {first[key]}; must be "
            "the same, since vLLM fuses them"
            for name, module in zip(self.names, self.modules, strict=True)
            for key in ("in_features", "group_size")
            if module[key] != first[key]
        ]
        problems += [
            f"{name}: {MANIFEST} says {module['out_features']} columns per shard, config.json "
            f"{width} per rank; must fit"
            for name, module, width in zip(self.names, self.modules, self.widths, strict=True)
            if width % module["out_features"]
        ]
        if self.rows != self.inputs and not all(module["perm"] for module in self.modules):
            problems.append(
                f"{self.names[0]}: {MANIFEST} says {self.rows} rows per rank, config.json "
                f"{self.inputs}; must be the same"
            )
        if problems:
            raise OutputError(*problems, hint=f"is {self.output.model} damaged? Convert again")

    def _own_kernels(self) -> bool:
        """Whether the runtime module's kernels are to run; raises UnsupportedError."""
        more = get_current_vllm_config().additional_config
        chosen = more.get(KERNELS) if isinstance(more, dict) else None
        if chosen is None:
            chosen = RUNTIME if fast_on(current_platform.device_type) else VLLM
        if chosen not in (RUNTIME, VLLM):
            raise UnsupportedError(
                f"{self.output.model}: {KERNELS} is {chosen!r} in vLLM's additional config; must "
                f"be {RUNTIME!r} or {VLLM!r}",
                hint=f"leave it out, or: {CHOOSE}",
            )
        if chosen == RUNTIME:
            logger.info_once("Using RuntimeLinearKernel for tpgptq")
        return bool(chosen == RUNTIME)

    def _choose_kernel(self, n: int) -> tuple[type[MPLinearKernel], MPLinearLayerConfig]:
        """vLLM's kernel for n of the columns; raises OutputError if there is none."""
        sym: bool = self.output.manifest["sym"]
        config = layer_config(
            full_weight_shape=(
                self.rows * (self.degree if self.row else 1),
                n * (1 if self.row else self.degree),
            ),
            partition_weight_shape=(self.rows, n),
            weight_type=scalar_types.uint4b8 if sym else scalar_types.uint4,
            act_type=self.dtype,
            group_size=self._kernel_group(),
            zero_points=not sym,
        )
        try:
            kernel = choose_mp_linear_kernel(config)
        except ValueError as error:
            raise OutputError(
                f"{', '.join(self.names)}: no kernel of this vLLM takes {self.rows} x {n} weights "
                f"{'without' if sym else 'with'} zero points in groups of "
                f"{self.modules[0]['group_size']}, in {self.dtype} ({error})",
                hint=f"choose the runtime module's: {CHOOSE}; or convert with --row-group 32",
            ) from None
        logger.info_once("Using %s for tpgptq", kernel.__name__)
        return kernel, config

    def _kernel_group(self) -> int:
        """The largest group size a kernel takes that divides the stored one; -1 is one group."""
        stored: int = self.modules[0]["group_size"]
        if stored == self.rows:
            return -1
        return next((size for size in KERNEL_GROUPS if stored % size == 0), stored)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Turn what was loaded into parts, each on its kernel."""
        for name in self.names:
            if (f"{name}.bias" in self.output.names) != (layer.bias is not None):
                has, lacks = ("its file", "config.json")[:: 1 if layer.bias is None else -1]
                raise self._damaged(f"{has} has a bias for it and {lacks} none; must agree")
        if self.output.in_ranks:
            self._read(layer)
        perms = self._perms(layer)
        if not layer.scales.isfinite().all():
            raise self._damaged("scales are missing, or not finite; all must be there, and finite")
        layer.parts = nn.ModuleList()
        start = 0
        for i, (offset, width) in enumerate(zip(self.offsets, self.widths, strict=True)):
            end = offset + width
            if i + 1 == len(perms) or not _same(perms[i], perms[i + 1]):
                layer.parts.append(self._part(layer, slice(start, end), perms[i]))
                start = end
        for name in ("qweight", "qzeros", "scales", "perm"):
            if hasattr(layer, name):
                delattr(layer, name)

    def _read(self, layer: Any) -> None:
        """Fill the parameters from the files of this rank's shards."""
        columns = sum(self.widths)
        fused = zip(self.names, self.modules, self.offsets, self.widths, strict=True)
        for index, (name, module, offset, width) in enumerate(fused):
            shards = [self.output.tensors(rank)[name] for rank in self.shards]
            if not self.row:  # kv heads that several shards share stand in the layer once
                shards = shards[:: len(shards) * module["out_features"] // width]
            for part, stored in shards[0].items():
                target = getattr(layer, part).data
                if len(shards) > 1 and (self.row or part != "perm"):
                    stored = torch.cat([shard[part] for shard in shards], 0 if self.row else -1)
                if part == "perm":
                    target[index].copy_(stored)
                else:
                    first, size = (n * target.shape[-1] // columns for n in (offset, width))
                    target.narrow(-1, first, size).copy_(stored)

    def _perms(self, layer: Any) -> list[Tensor | None]:
        """Which element of the rank's input feeds each row, for each fused layer; None: its own."""
        if not hasattr(layer, "perm"):
            return [None] * len(self.names)
        perms = layer.perm.data
        inputs = self.inputs
        if self.row:  # each shard counts in its own part of the input
            inputs //= len(self.shards)
        if int(perms.min()) < 0 or int(perms.max()) >= inputs:
            raise self._damaged(f"perm is missing, or not within 0 to {inputs - 1}")
        if self.row:
            shard = torch.arange(len(self.shards), dtype=perms.dtype, device=perms.device)
            perms = perms + inputs * shard.repeat_interleave(self.rows // len(self.shards))
        read = self.inputs - (self._empty_inputs() if self.row else 0)
        if any(len(perm.unique()) < read for perm in perms):
            raise self._damaged(f"perm leaves out some of the {self.inputs} inputs; must not")
        own = torch.arange(self.rows, dtype=perms.dtype, device=perms.device)
        identity = self.rows == self.inputs
        return [None if identity and torch.equal(perm, own) else perm for perm in perms]

    def _empty_inputs(self) -> int:
        """Channels of empty heads, all of which one rank may have."""
        heads: Mapping[str, int] = self.output.manifest["heads"]
        query, padded = heads["query"], heads["padded_query"]
        channels: int = self.inputs * self.degree
        return channels * (padded - query) // padded

    def _damaged(self, problem: str) -> OutputError:
        return OutputError(
            f"{self.output.model}: {', '.join(self.names)}: {problem}",
            hint=f"check it: tpgptq verify MODEL {self.output.model}",
        )

    def _part(self, layer: Any, cols: slice, perm: Tensor | None) -> nn.Module:
        """Some columns of a layer, their parameters as the kernels want them."""
        bias = None if layer.bias is None else nn.Parameter(layer.bias.data[cols].clone(), False)
        if self.own:
            words = slice(cols.start // PACK, cols.stop // PACK)
            tensors = {
                "qweight": layer.qweight.data[:, cols],
                "qzeros": layer.qzeros.data[:, words],
                "scales": layer.scales.data[:, cols],
            } | ({} if perm is None else {"perm": perm})
            stated = self.output.manifest["checkpoint_format"]
            return RuntimePart(arrange([tensors], BITS, stated), bias)
        kernel, config = self._choose_kernel(cols.stop - cols.start)
        loader = layer.qweight.weight_loader
        group_size = self.modules[0]["group_size"]
        repeats = 1 if config.group_size == -1 else group_size // config.group_size
        qzeros = None
        if config.zero_points:
            words = layer.qzeros.data[:, cols.start // PACK : cols.stop // PACK]
            zeros = zero_points(unpack_cols(words, BITS), self.output.manifest["checkpoint_format"])
            if int(zeros.max()) >= 1 << BITS:
                raise UnsupportedError(
                    f"{', '.join(self.names)}: has zero points of {1 << BITS}; must be less for "
                    "vLLM's kernels",
                    hint="run it with tpgptq_runtime.py, which lies in the output",
                )
            packed = pack_cols(zeros.to(torch.uint8), BITS).repeat_interleave(repeats, 0)
            qzeros = _packed(packed.T.contiguous(), 0, loader, input_dim=1)
        return Part(
            kernel(config, "qweight", "scales", "qzeros"),
            perm,
            qweight=_packed(layer.qweight.data[:, cols].contiguous(), 0, loader),
            qzeros=qzeros,
            scales=_scales(layer.scales.data[:, cols].repeat_interleave(repeats, 0), loader),
            bias=bias,
        )

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., inputs) -> (..., columns) of this rank."""
        outs = [part(x, biased=bias is not None) for part in layer.parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs, -1)


class Part(nn.Module):
    """Columns of a layer that gather their input alike, on one of vLLM's kernels."""

    perm: Tensor | None

    def __init__(
        self, kernel: MPLinearKernel, perm: Tensor | None, **parameters: nn.Parameter | None
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.register_buffer("perm", None if perm is None else perm.clone(), persistent=False)
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)
        kernel.process_weights_after_loading(self)

    def forward(self, x: Tensor, biased: bool) -> Tensor:
        if self.perm is not None:
            x = torch.ops.tpgptq.gather(x, self.perm)
        # The bias is this part's own: kernels reorder it.
        out: Tensor = self.kernel.apply_weights(self, x, self.bias if biased else None)
        return out


class RuntimePart(nn.Module):
    """The same on the runtime module's kernels, which gather for themselves."""

    bias: Tensor | None

    def __init__(self, layer: Arranged, bias: nn.Parameter | None) -> None:
        super().__init__()
        for name in ("packed", "scales", "zeros", "perm", "counters"):
            self.register_buffer(name, getattr(layer, name), persistent=False)
        self.sizes = layer.bits, layer.group_size, layer.out_features
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor, biased: bool) -> Tensor:
        tensors = (self.packed, self.scales, self.zeros, self.perm, self.counters)
        out: Tensor = torch.ops.tpgptq.product(x, *tensors, *self.sizes)
        return out + self.bias if biased and self.bias is not None else out


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def _packed(words: Tensor, packed_dim: int, loader: Any, input_dim: int = 0) -> PackedvLLMParameter:
    return PackedvLLMParameter(
        data=words,
        input_dim=input_dim,
        output_dim=1 - input_dim,
        packed_dim=packed_dim,
        packed_factor=PACK,
        weight_loader=loader,
    )


def _scales(scales: Tensor, loader: Any) -> GroupQuantScaleParameter:
    return GroupQuantScaleParameter(data=scales, input_dim=0, output_dim=1, weight_loader=loader)
