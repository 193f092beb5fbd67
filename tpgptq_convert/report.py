"""What `inspect` and `--dry-run` say about a checkpoint and its plans: as data, and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tpgptq_convert.checkpoint import Checkpoint
from tpgptq_convert.families import Axis
from tpgptq_convert.plan import Plan, legal_degrees


def describe(checkpoint: Checkpoint, plans: Sequence[Plan]) -> dict[str, Any]:
    """Everything that is known without reading a weight, ready for JSON."""
    geometry, quant = checkpoint.geometry, checkpoint.quant
    shared = sum(spec.nbytes for spec in checkpoint.shared_specs.values())
    layers = []
    for linear in checkpoint.family.linears:
        of_kind = checkpoint.layers_of(linear)
        layers.append(
            {
                "name": linear.name,
                "parallel": linear.parallel,
                "in_features": of_kind[0].in_features,
                "out_features": of_kind[0].out_features,
                "groups": of_kind[0].groups,
                "blocks": len(of_kind),
                "act_ordered": sum(layer.act_order for layer in of_kind),
            }
        )
    return {
        "name": checkpoint.name,
        "model_type": checkpoint.config["model_type"],
        "blocks": geometry.blocks,
        "hidden": geometry.hidden,
        "heads": {"query": geometry.heads, "kv": geometry.kv_heads, "head_dim": geometry.head_dim},
        "intermediate": geometry.intermediate,
        "bits": quant.bits,
        "group_size": quant.group_size,
        "sym": quant.sym,
        "desc_act": quant.desc_act,
        "checkpoint_format": quant.checkpoint_format,
        "layers": layers,
        "same_g_idx": _same_g_idx(checkpoint),
        "legal_tp": list(legal_degrees(geometry)),
        "degrees": [
            {
                "tp": plan.tp,
                "row_group": plan.row_group,
                "rank_bytes": plan.rank_bytes,
                "shared_bytes": shared,
                "growth": round(plan.growth, 4),
                "intermediate": plan.intermediate,
                "layers": {
                    name: {
                        "in_features": size.in_features,
                        "out_features": size.out_features,
                        "group_size": size.group_size,
                    }
                    for name, size in plan.sizes.items()
                },
                "notes": plan.notes,
            }
            for plan in plans
        ],
        "damage": list(checkpoint.damage),
        "notes": list(checkpoint.notes),
    }


def _same_g_idx(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """For layers that read the same input: in how many blocks they share one g_idx."""
    found = []
    for axes in ((Axis.QUERY, Axis.KV), (Axis.MLP,)):
        linears = [x for x in checkpoint.family.linears if {*x.writes} & {*axes}]
        blocks = sum(
            all(np.array_equal(layer.g_idx, layers[0].g_idx) for layer in layers)
            for layers in zip(*map(checkpoint.layers_of, linears), strict=True)
        )
        found.append({"layers": [linear.name for linear in linears], "blocks": blocks})
    return found


def render(report: dict[str, Any]) -> str:
    """The same for a person."""
    heads = report["heads"]
    sym = {True: "symmetric", False: "asymmetric", None: "sym not stated"}[report["sym"]]
    size = report["group_size"]
    ordered = sum(layer["act_ordered"] for layer in report["layers"])
    total = sum(layer["blocks"] for layer in report["layers"])
    lines = [
        f"{report['name']}: {report['model_type']}, {report['blocks']} blocks, "
        f"{heads['query']} query and {heads['kv']} kv heads of {heads['head_dim']}",
        f"{report['bits']} bits, {'one group per column' if size == -1 else f'groups of {size}'}, "
        f"{sym}, {report['checkpoint_format']}, desc_act {str(report['desc_act']).lower()}",
        "",
        *_table(
            ("layer", "parallel", "in", "out", "groups", "act-ordered"),
            [
                (
                    layer["name"],
                    layer["parallel"],
                    layer["in_features"],
                    layer["out_features"],
                    layer["groups"],
                    f"{layer['act_ordered']} of {layer['blocks']}",
                )
                for layer in report["layers"]
            ],
        ),
        "",
        f"{ordered} of {total} layers are truly act-ordered.",
    ]
    for same in report["same_g_idx"]:
        names = ", ".join(name.rpartition(".")[2] for name in same["layers"])
        lines.append(f"{names} share one g_idx in {same['blocks']} of {report['blocks']} blocks.")
    lines.append(f"Tensor-parallel degrees: {', '.join(map(str, report['legal_tp']))}.")
    if report["degrees"]:
        row_parallel = [layer for layer in report["layers"] if layer["parallel"] == "row"]
        short = [layer["name"].rpartition(".")[2] for layer in row_parallel]
        lines += [
            "",
            *_table(
                ("tp", "MB per rank", "+ shared", "padding", *(f"{name} rows" for name in short)),
                [
                    (
                        degree["tp"],
                        f"{degree['rank_bytes'] / 1e6:.1f}",
                        f"{degree['shared_bytes'] / 1e6:.1f}",
                        f"{degree['growth'] - 1:.1%}",
                        *(_rows(degree, layer) for layer in row_parallel),
                    )
                    for degree in report["degrees"]
                ],
            ),
            "",
            "MB per rank: what each rank stores of the quantised layers; + shared: what all read.",
            "padding: weights stored on all ranks together beyond the source's (copies of kv heads "
            "too).",
            "rows: per rank, in groups of g, times as many in all as the source has.",
        ]
    notes = [*report["notes"], *(note for degree in report["degrees"] for note in degree["notes"])]
    said = remarks(report["damage"], notes)
    lines += ["", *said] if said else []
    return "\n".join(lines)


def remarks(damage: Iterable[str], notes: Iterable[str]) -> list[str]:
    """What a person should know, a line each."""
    return [*(f"Damaged: {text}" for text in damage), *(f"Note: {text}" for text in notes)]


def _rows(degree: dict[str, Any], layer: dict[str, Any]) -> str:
    size = degree["layers"][layer["name"]]
    times = size["in_features"] * degree["tp"] / layer["in_features"]
    return f"{size['in_features']} (g{size['group_size']}, {times:.2f}x)"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Aligned columns: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
