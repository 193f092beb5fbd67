"""The one loop over the plan: load a layer, repack it for every rank of every degree, write it."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from tpgptq_convert.card import model_card
from tpgptq_convert.checkpoint import Checkpoint, IntArray, Layer
from tpgptq_convert.errors import CheckpointError, VerificationError
from tpgptq_convert.manifest import (
    FORMAT_VERSION,
    INDEX,
    LAYOUTS,
    MANIFEST,
    WEIGHTS_INDEX,
    weights_digest,
)
from tpgptq_convert.plan import ROW_GROUPS, Plan, Shard, check_zero_points
from tpgptq_convert.repack import Packed, in_order, repack, workers
from tpgptq_convert.source import DTYPES, TensorSpec
from tpgptq_convert.verify import verify
from tpgptq_convert.writer import (
    Parts,
    check_free,
    checksum,
    failed_path,
    staging,
    write_json,
)

TOOL = f"tpgptq-convert {importlib.metadata.version('tpgptq-convert')}"
RUNTIME = Path(__file__).with_name("tpgptq_runtime.py")

LAYERS_AHEAD = 4  # of the one that is being written

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Options:
    """What `tpgptq convert` was asked for, beside the degrees."""

    layout: str = "ranks"
    max_shard_size: int = 5_000_000_000
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    overwrite: bool = False
    verify: bool = True

    def command(self, plan: Plan) -> str:
        """The command line that writes one plan's output, for people to run again."""
        words = ["tpgptq convert", f"--tp {plan.tp}"]
        if self.layout != LAYOUTS[0]:
            words.append(f"--layout {self.layout}")
        if plan.row_group != ROW_GROUPS[0]:
            words.append(f"--row-group {plan.row_group}")
        if self.max_shard_size != Options.max_shard_size:
            words.append(f"--max-shard-size {self.max_shard_size}B")
        return " ".join([*words, plan.checkpoint.name, "OUT"])


def work_bytes(checkpoint: Checkpoint, plans: Sequence[Plan], check: bool) -> int:
    """What the progress counts: the layers' source bytes, once for writing and for each check."""
    source = sum(checkpoint.source_bytes(layer) for layer in checkpoint.layers)
    return source * (1 + check * len(plans))


def convert(
    checkpoint: Checkpoint,
    plans: Sequence[Plan],
    out: Path,
    options: Options,
    progress: Progress = lambda _: None,
) -> list[dict[str, Any]]:
    """Write OUT, or OUT/tp-N for several degrees, and return the manifests.

    OUT appears whole, and verified unless that was declined, or not at all. Raises a TpgptqError.
    """
    sym = check_zero_points(checkpoint, plans)
    needed = sum(output_bytes(plan) for plan in plans)
    check_free(out, options.overwrite, needed, checkpoint.source.directory)
    with staging(out, options.overwrite) as stage, ExitStack() as stack:
        background = ThreadPoolExecutor(1)
        stack.callback(background.shutdown, cancel_futures=True)
        hashes = {
            name: background.submit(checksum, file.path)
            for name, file in checkpoint.source.files.items()
        }
        outputs = [
            _Output(plan, stage if len(plans) == 1 else stage / f"tp-{plan.tp}", options)
            for plan in plans
        ]
        for output in outputs:
            stack.callback(output.close)
        pool = stack.enter_context(workers(options.device))
        pieces = (
            (layer, [cut[layer.name] for cut in cuts])
            for index, block in enumerate(checkpoint.blocks)
            for cuts in [[output.cut(index) for output in outputs]]
            for layer in block
        )
        job = partial(_repack, checkpoint, options.device)
        for (layer, _), repacked in in_order(pool, job, pieces, LAYERS_AHEAD):
            for output, tensors in zip(outputs, repacked, strict=True):
                output.write(layer, tensors)
            progress(checkpoint.source_bytes(layer))
        source_files = {name: future.result() for name, future in hashes.items()}
        manifests = [output.finish(source_files, sym) for output in outputs]
        if options.verify:
            mismatches = [
                mismatch
                for output in outputs
                for mismatch in verify(checkpoint, output.directory, options.device, progress)
            ]
            if mismatches:
                raise VerificationError(
                    *mismatches,
                    hint=f"a bug, or a bad disk; the output is kept in {failed_path(out)}",
                )
    return manifests


def output_bytes(plan: Plan) -> int:
    """Bytes of the weights in the output of one plan."""
    shared = plan.checkpoint.shared_specs.values()
    return plan.rank_bytes * plan.tp + sum(spec.nbytes for spec in shared)


def _repack(
    checkpoint: Checkpoint,
    device: torch.device,
    pieces: tuple[Layer, Sequence[Sequence[Shard]]],
) -> list[list[dict[str, torch.Tensor]]]:
    """A layer's shards, for every output and in it for every file."""
    layer, cuts = pieces

    def tensor(part: str) -> torch.Tensor:
        return checkpoint.source.tensor(f"{layer.name}.{part}").to(device)

    bias = tensor("bias") if layer.bias and layer.linear.parallel == "column" else None
    packed = Packed(tensor("qweight"), tensor("qzeros"), tensor("scales"), bias)
    if not packed.scales.isfinite().all():
        raise CheckpointError(
            f"{layer.name}.scales: holds NaN or infinity; must be finite",
            hint="the file may be damaged; fetch it again",
        )
    return [list(repack(packed, shards, checkpoint.quant)) for shards in cuts]


class _Output:
    """One degree's output directory while it is written."""

    def __init__(self, plan: Plan, directory: Path, options: Options) -> None:
        self.plan, self.directory, self.options = plan, directory, options
        directory.mkdir(exist_ok=True)
        self._index: dict[str, IntArray] = {}
        self._modules: dict[str, Any] = {}
        shared = self._shared_specs()
        limit = options.max_shard_size
        if options.layout == "merged":
            specs = self._layer_specs(plan.merged_tensors) | shared
            merged = Parts(directory, _merged_part, specs, limit)
            self._streams, self._shared = [merged], merged
        else:
            specs = self._layer_specs(plan.tensors)
            self._streams = [
                Parts(directory, partial(_rank_part, rank), specs, limit) for rank in range(plan.tp)
            ]
            self._shared = Parts(directory, _shared_part, shared, limit)

    def _layer_specs(
        self, tensors: Callable[[Layer], dict[str, TensorSpec]]
    ) -> dict[str, TensorSpec]:
        return {
            f"{layer.name}.{part}": spec
            for layer in self.plan.checkpoint.layers
            for part, spec in tensors(layer).items()
        }

    def _shared_specs(self) -> dict[str, TensorSpec]:
        """Largest elements first, so that every tensor lies aligned."""
        specs = self.plan.checkpoint.shared_specs
        return dict(sorted(specs.items(), key=lambda kv: -DTYPES[kv[1].dtype].itemsize))

    def cut(self, index: int) -> dict[str, Sequence[Shard]]:
        """What each file gets of a block's layers, by the layer's name."""
        plan = self.plan
        shards = plan.block(index)
        for name, of_layer in shards.items():
            self._index[f"{name}.rows"] = _ranks([shard.rows for shard in of_layer])
            self._index[f"{name}.cols"] = _ranks([shard.cols for shard in of_layer])
        if self.options.layout == "ranks":
            return dict(shards)
        return {
            layer.name: [plan.merged(layer, shards[layer.name])]
            for layer in plan.checkpoint.blocks[index]
        }

    def write(self, layer: Layer, repacked: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Append a layer's tensors to every file."""
        plan, size = self.plan, self.plan.sizes[layer.linear.name]
        parts = plan.tensors(layer)
        for stream, tensors in zip(self._streams, repacked, strict=True):
            for part in parts:
                stream.write(f"{layer.name}.{part}", tensors[part])
        self._modules[layer.name] = {
            "parallel": layer.linear.parallel,
            "in_features": size.in_features,
            "out_features": size.out_features,
            "group_size": size.group_size,
            "perm": "perm" in parts,
        }

    def close(self) -> None:
        """Let go of files that are not finished."""
        for parts in (*self._streams, self._shared):
            parts.close()

    def finish(self, source_files: dict[str, Any], sym: bool) -> dict[str, Any]:
        """Write what is left and return the manifest."""
        source = self.plan.checkpoint.source
        for name in self._shared_specs():
            self._shared.write(name, source.tensor(name))
        (self.directory / INDEX).write_bytes(save(self._index, metadata={"format": "np"}))
        for path in source.carried_files():
            (self.directory / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.directory / path, self.directory / path)
        shutil.copyfile(RUNTIME, self.directory / RUNTIME.name)
        write_json(self.directory / WEIGHTS_INDEX, self._shared.index)
        if self.options.layout == "merged":
            weights: dict[str, Any] = {"merged": self._shared.files}
        else:
            ranks = [stream.files for stream in self._streams]
            weights = {"shared": self._shared.files, "ranks": ranks}
        digest = weights_digest({"layout": self.options.layout, "files": weights})
        write_json(self.directory / "config.json", self._config(sym, digest))
        manifest = self._manifest(source_files, sym, weights)
        (self.directory / "README.md").write_text(
            model_card(manifest, source.directory, self.options.command(self.plan)),
            encoding="utf-8",
        )
        write_json(self.directory / MANIFEST, manifest)
        return manifest

    def _config(self, sym: bool, digest: str) -> dict[str, Any]:
        plan, quant = self.plan, self.plan.checkpoint.quant
        config = plan.checkpoint.family.resized(plan.checkpoint.config, plan.intermediate)
        return config | {
            "quantization_config": {
                "quant_method": "tpgptq",
                "format_version": FORMAT_VERSION,
                "bits": quant.bits,
                "group_size": quant.group_size,
                "sym": sym,
                "desc_act": False,
                "checkpoint_format": quant.checkpoint_format,
                "tp": plan.tp,
                "layout": self.options.layout,
                "weights_sha256": digest,
            }
        }

    def _manifest(
        self, source_files: dict[str, Any], sym: bool, weights: dict[str, Any]
    ) -> dict[str, Any]:
        plan, checkpoint = self.plan, self.plan.checkpoint
        geometry, quant = checkpoint.geometry, checkpoint.quant
        written = {name for parts in (*self._streams, self._shared) for name in parts.files}
        others = sorted(
            path.relative_to(self.directory)
            for path in self.directory.rglob("*")
            if path.is_file() and path.name not in written
        )
        return {
            "format": "tpgptq",
            "format_version": FORMAT_VERSION,
            "tool": TOOL,
            "tp": plan.tp,
            "layout": self.options.layout,
            "source": {
                "name": checkpoint.name,
                "revision": None,
                "files": source_files,
            },
            "model_type": checkpoint.config["model_type"],
            "bits": quant.bits,
            "sym": sym,
            "checkpoint_format": quant.checkpoint_format,
            "heads": {
                "query": geometry.heads,
                "kv": geometry.kv_heads,
                "padded_query": geometry.heads,
                "padded_kv": geometry.kv_heads,
            },
            "intermediate": {"size": geometry.intermediate, "padded": plan.intermediate},
            "modules": self._modules,
            # The card is not among them: it is there for people to edit.
            "files": weights
            | {"other": {str(path): checksum(self.directory / path) for path in others}},
        }


def _merged_part(part: int, parts: int) -> str:
    return f"model-{part + 1:05}-of-{parts:05}.safetensors"


def _shared_part(part: int, parts: int) -> str:
    return "model-shared.safetensors" if parts == 1 else f"model-shared-part-{part}.safetensors"


def _rank_part(rank: int, part: int, parts: int) -> str:
    return f"model-rank-{rank}-part-{part}.safetensors"


def _ranks(vectors: Sequence[IntArray]) -> IntArray:
    """(ranks, n), or (1, n) where all ranks have the same."""
    if all(np.array_equal(vector, vectors[0]) for vector in vectors):
        return vectors[0][None]
    return np.stack(vectors)
