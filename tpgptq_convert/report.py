"""What `inspect` and `--dry-run` say about a checkpoint and its plans: as data, and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tpgptq_convert.checkpoint import Checkpoint, Layer
from tpgptq_convert.families import Axis
from tpgptq_convert.plan import ROW_GROUPS, Plan


def describe(checkpoint: Checkpoint, plans: Sequence[Plan]) -> dict[str, Any]:
    """Everything that is known without reading a weight, ready for JSON."""
    geometry, quant = checkpoint.geometry, checkpoint.quant
    shared = sum(spec.nbytes for spec in checkpoint.shared_specs.values())
    whole = Plan(checkpoint, 1, ROW_GROUPS[0]).rank_bytes
    layers = []
    for kind, of_kind in checkpoint.kinds.items():
        layers.append(
            {
                "name": kind,
                "parallel": of_kind[0].linear.parallel,
                "bits": of_kind[0].bits,
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
        "intermediate": next(iter(checkpoint.mlps.values())),
        "bits": quant.bits,
        "group_size": quant.group_size,
        "sym": quant.sym,
        "desc_act": quant.desc_act,
        "quant_method": quant.method,
        "checkpoint_format": quant.checkpoint_format,
        "layers": layers,
        "same_g_idx": _same_g_idx(checkpoint),
        "largest_tp": checkpoint.most_ranks,
        "degrees": [
            {
                "tp": plan.tp,
                "row_group": plan.row_group,
                "rank_bytes": plan.rank_bytes,
                "shared_bytes": shared,
                "growth": round(plan.growth, 4),
                "speed_up": round(whole / plan.rank_bytes, 3),
                "heads": {
                    "query": plan.heads.query,
                    "kv": plan.heads.kv,
                    "padded_query": plan.heads.padded_query,
                    "padded_kv": plan.heads.padded_kv,
                },
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
    """For layers that read the same input: how often they share one g_idx, in blocks or experts."""
    found = []
    first = checkpoint.blocks[0]
    written = {axis for x in first if x.linear.reads is Axis.HIDDEN for axis in x.linear.writes}
    attention = {axis.name for axis in written if not axis.free}
    for axes in (attention, *({name} for name in checkpoint.mlps)):
        kinds: dict[str, list[Layer]] = {}
        for layer in checkpoint.layers:
            if axes & {axis.name for axis in layer.linear.writes}:
                kinds.setdefault(layer.linear.kind, []).append(layer)
        together = list(zip(*kinds.values(), strict=True))
        same = sum(
            all(np.array_equal(layer.g_idx, layers[0].g_idx) for layer in layers)
            for layers in together
        )
        if len(kinds) > 1:
            found.append({"layers": list(kinds), "blocks": same, "of": len(together)})
    return found


def render(report: dict[str, Any]) -> str:
    """The same for a person."""
    heads = report["heads"]
    sym = {True: "symmetric", False: "asymmetric", None: "sym not stated"}[report["sym"]]
    size, method = report["group_size"], report["quant_method"]
    kind = report["checkpoint_format"] if method == "gptq" else method
    ordered = sum(layer["act_ordered"] for layer in report["layers"])
    total = sum(layer["blocks"] for layer in report["layers"])
    shared = (name for same in report["same_g_idx"] for name in same["layers"])
    short = _short({layer["name"] for layer in report["layers"]}.union(shared))
    lines = [
        f"{report['name']}: {report['model_type']}, {report['blocks']} blocks, "
        f"{heads['query']} query and {heads['kv']} kv heads of {heads['head_dim']}",
        f"{report['bits']} bits, {'one group per column' if size == -1 else f'groups of {size}'}, "
        f"{sym}, {kind}, desc_act {str(report['desc_act']).lower()}",
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
        names = ", ".join(short[name] for name in same["layers"])
        where = "blocks" if same["of"] <= report["blocks"] else "experts"
        lines.append(f"{names} share one g_idx in {same['blocks']} of {same['of']} {where}.")
    most, shown = report["largest_tp"], [degree["tp"] for degree in report["degrees"]]
    every = 1 < len(shown) < most and shown == list(range(1, len(shown) + 1))
    more = f"; `--tp N` shows one beyond {len(shown)}" if every else ""
    lines.append(f"Tensor-parallel degrees: every one from 1 to {most}{more}.")
    if report["degrees"]:
        row_parallel = [layer for layer in report["layers"] if layer["parallel"] == "row"]
        lines += [
            "",
            *_table(
                (
                    *("tp", "MB per rank", "+ shared", "padding", "speed-up"),
                    *("query heads", "kv heads"),
                    *(f"{short[layer['name']]} rows" for layer in row_parallel),
                ),
                [
                    (
                        degree["tp"],
                        f"{degree['rank_bytes'] / 1e6:.1f}",
                        f"{degree['shared_bytes'] / 1e6:.1f}",
                        f"{degree['growth'] - 1:.1%}",
                        f"{degree['speed_up']:.2f}x",
                        *(_heads(degree, heads, kind) for kind in ("query", "kv")),
                        *(_rows(degree, layer) for layer in row_parallel),
                    )
                    for degree in report["degrees"]
                ],
            ),
            "",
            "MB per rank: what each rank stores of the quantised layers; + shared: what all read.",
            "padding: weights stored on all ranks together beyond the source's (copies of kv heads "
            "too).",
            "speed-up: expected against tp 1 where a token is bound by reading these weights.",
            "heads, rows: per rank (g: in groups of), times as many in all as the source has.",
        ]
    notes = notes_of({degree["tp"]: degree["notes"] for degree in report["degrees"]})
    said = remarks(report["damage"], (*report["notes"], *notes))
    lines += ["", *said] if said else []
    return "\n".join(lines)


def _short(names: Iterable[str]) -> dict[str, str]:
    """The last parts of names, or the whole of those whose last parts are alike."""
    last = {name: name.rpartition(".")[2] for name in names}
    count = Counter(last.values())
    return {name: part if count[part] == 1 else name for name, part in last.items()}


def remarks(damage: Iterable[str], notes: Iterable[str]) -> list[str]:
    """What a person should know, a line each."""
    return [*(f"Damaged: {text}" for text in damage), *(f"Note: {text}" for text in notes)]


def notes_of(degrees: Mapping[int, Iterable[str]]) -> list[str]:
    """The notes of several degrees: each once, with the degrees it is true of."""
    said: dict[str, list[int]] = {}
    for tp, notes in degrees.items():
        for note in notes:
            said.setdefault(note, []).append(tp)
    return [f"tp {_ranges(of)}: {note}" for note, of in said.items()]


def _ranges(numbers: Sequence[int]) -> str:
    """1, 3, 5 to 7"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(
        f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs
    )


def _heads(degree: dict[str, Any], heads: dict[str, Any], kind: str) -> str:
    count = degree["heads"][kind]
    return f"{count} ({count * degree['tp'] / heads[kind]:.2f}x)"


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
