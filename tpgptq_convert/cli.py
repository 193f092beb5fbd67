"""The commands. The only file that knows click; turns errors into lines and exit codes."""

from __future__ import annotations

import ctypes.util
import functools
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from tpgptq_convert.errors import OutputError, TpgptqError, VerificationError
from tpgptq_convert.processes import Processes, is_first, joined
from tpgptq_convert.progress import Advance, Progress

PROBLEMS_SHOWN = 20
SETTINGS = {"help_option_names": ["-h", "--help"]}
EPILOG = (
    "Exit codes: 0 done; 1 an anticipated failure (bad checkpoint, unsupported model, output "
    "exists, interrupted); 2 wrong usage; 3 verification failed. Data goes to stdout, talk to "
    "stderr."
)


class Group(click.Group):
    """Shows every anticipated failure the same way: what is and what must be, then a hint."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (OSError, UnicodeError) as error:
            name = getattr(error, "filename", None)
            what = getattr(error, "strerror", None) or error
            problem = _printable(f"{name}: {what}" if name else str(what))
            _complain(problem, hint="check that the files can be read, and their names")
            ctx.exit(1)
        except TpgptqError as error:
            _complain(*map(_printable, error.problems), hint=error.hint)
            ctx.exit(error.exit_code)


def _complain(*problems: str, hint: str) -> None:
    """Once, where several processes run into the same."""
    if is_first():
        for problem in problems[:PROBLEMS_SHOWN]:
            click.echo(f"Error: {problem}", err=True)
        if len(problems) > PROBLEMS_SHOWN:
            click.echo(f"... and {len(problems) - PROBLEMS_SHOWN} more", err=True)
        click.echo(f"Hint: {hint}", err=True)


def _printable(text: str) -> str:
    """Names come from files: nothing in them may break a line or reach the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class ByteSize(click.ParamType[int]):
    """5GB, 500MB, 1.5TB: decimal units, as on the Hub."""

    name = "size"
    units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # noqa: RUF012

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([KMGT]?B)", str(value).strip().upper())
        if not match or float(match[1]) == 0:
            self.fail(f"{value!r} is not a size such as 5GB or 500MB.", param, ctx)
        return int(float(match[1]) * self.units[match[2]])


def _device(name: str, local_rank: int = 0) -> str:
    """cpu, cuda or cuda:N; auto: the GPU where there is one, each process of torchrun its own."""
    if name == "cpu" or (name == "auto" and not _has_driver()):
        return "cpu"
    import torch

    count = torch.cuda.device_count()
    if name == "auto":
        return f"cuda:{local_rank % count}" if count else "cpu"
    match = re.fullmatch(r"cuda(?::(\d{1,3}))?", name)
    if not match:
        raise click.BadParameter(f"{name!r} is not auto, cpu or cuda[:N]", param_hint="--device")
    index = int(match[1]) if match[1] else local_rank % max(count, 1)
    if index >= count:
        raise click.BadParameter(
            f"{name}: this machine has {count or 'no'} CUDA devices", param_hint="--device"
        )
    return f"cuda:{index}"


def _has_driver() -> bool:
    """Whether a GPU is worth looking for; torch takes two seconds to say so."""
    return any(map(ctypes.util.find_library, ("cuda", "amdhip64")))


model_argument = click.argument("model", type=click.Path(path_type=Path))
out_argument = click.argument("out", type=click.Path(path_type=Path))
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda[:N]",
    help="Where to do the work; auto: on the GPU where there is one.",
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
row_group_option = click.option(
    "--row-group",
    type=click.Choice(["32", "16", "8"]),
    default="32",
    show_default=True,
    help="Smallest group of attention output rows: less means less padding, but fewer engines "
    "take it.",
)


def among_processes(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the processes that torchrun started, or this one alone."""

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        with joined() as processes:
            command(processes, **arguments)

    return run


@click.group(cls=Group, context_settings=SETTINGS, epilog=EPILOG)
@click.version_option(package_name="tpgptq-convert")
def cli() -> None:
    """Rewrite a GPTQ checkpoint with desc_act into tensor-parallel shards.

    Every rank's every layer gets consecutive groups, so that no rank needs another rank's
    activations. Not one quantised value changes.
    """


@cli.command()
@model_argument
@out_argument
@click.option(
    "--tp",
    "degrees",
    type=int,
    multiple=True,
    required=True,
    metavar="N",
    help="Tensor-parallel degree; repeat it for several in one pass (OUT/tp-N).",
)
@click.option(
    "--layout",
    type=click.Choice(["ranks", "merged"]),
    default="ranks",
    show_default=True,
    help="Files per rank, or one checkpoint with the ranks' shards side by side, to slice.",
)
@click.option(
    "--max-shard-size", type=ByteSize(), default="5GB", show_default=True, help="Largest file."
)
@row_group_option
@device_option
@click.option("--overwrite", is_flag=True, help="Replace an earlier output.")
@click.option("--dry-run", is_flag=True, help="Show the plan; write nothing.")
@click.option(
    "--verify/--no-verify",
    "check",
    default=True,
    show_default=True,
    help="Prove the output against MODEL before it appears.",
)
@quiet_option
@json_option
@among_processes
def convert(
    processes: Processes,
    model: Path,
    out: Path,
    degrees: tuple[int, ...],
    layout: str,
    max_shard_size: int,
    row_group: str,
    device: str,
    overwrite: bool,
    dry_run: bool,
    check: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write the checkpoint in MODEL as shards for --tp ranks to OUT.

    \b
    tpgptq convert --tp 2 model/ out/
    """
    from tpgptq_convert.checkpoint import read_checkpoint
    from tpgptq_convert.plan import check_layout, make_plans
    from tpgptq_convert.report import describe, remarks, render

    checkpoint = processes.agree(lambda: read_checkpoint(model))
    plans = processes.agree(lambda: make_plans(checkpoint, dict.fromkeys(degrees), int(row_group)))
    processes.agree(lambda: check_layout(checkpoint, layout))
    as_json = as_json and processes.first
    quiet = quiet or as_json or not processes.first
    if dry_run:
        report = describe(checkpoint, plans)
        if processes.first:
            click.echo(json.dumps(report, indent=2) if as_json else render(report))
        return
    if not quiet:
        notes = (*checkpoint.notes, *(note for plan in plans for note in plan.notes))
        for remark in remarks(checkpoint.damage, notes):
            click.echo(remark, err=True)

    from tpgptq_convert import convert as conversion

    place = _device(device, processes.local_rank)
    options = conversion.Options(layout, max_shard_size, place, overwrite, check)
    started = time.monotonic()
    manifests = conversion.convert(checkpoint, plans, out, options, _progress(quiet), processes)
    seconds = time.monotonic() - started
    if as_json:
        click.echo(
            json.dumps(
                {
                    "out": str(out),
                    "seconds": round(seconds, 3),
                    "verified": check,
                    "manifests": manifests,
                }
            )
        )
    elif not quiet:
        files = [f for path in out.rglob("model-*.safetensors") if (f := path.stat().st_size)]
        gigabytes = sum(files) / 1e9
        click.echo(
            f"Wrote {'and verified ' if check else ''}tp {', '.join(str(p.tp) for p in plans)} to "
            f"{out}: {len(files)} weight files, {gigabytes:.3f} GB in {seconds:.1f} s "
            f"({gigabytes / seconds:.2f} GB/s)",
            err=True,
        )


@cli.command()
@model_argument
@click.option(
    "--tp",
    "degrees",
    type=int,
    multiple=True,
    metavar="N",
    help="Show only this degree (may be repeated).",
)
@row_group_option
@json_option
def inspect(model: Path, degrees: tuple[int, ...], row_group: str, as_json: bool) -> None:
    """Say what MODEL is, and what each degree would cost. Reads headers and g_idx only."""
    from tpgptq_convert.checkpoint import read_checkpoint
    from tpgptq_convert.plan import legal_degrees, make_plans
    from tpgptq_convert.report import describe, render

    checkpoint = read_checkpoint(model)
    wanted = degrees or [tp for tp in legal_degrees(checkpoint.geometry) if tp <= 16]
    report = describe(checkpoint, make_plans(checkpoint, wanted, int(row_group)))
    click.echo(json.dumps(report, indent=2) if as_json else render(report))


@cli.command(short_help="Prove that OUT holds exactly the values of MODEL.")
@model_argument
@out_argument
@device_option
@quiet_option
@json_option
@among_processes
def verify(
    processes: Processes, model: Path, out: Path, device: str, quiet: bool, as_json: bool
) -> None:
    """Prove that OUT holds exactly the values of MODEL, and computes the same."""
    from tpgptq_convert.checkpoint import read_checkpoint
    from tpgptq_convert.manifest import read_manifest
    from tpgptq_convert.verify import verify as prove

    if not out.is_dir():
        raise OutputError(
            f"{out}: no such directory; must be an output of `tpgptq convert`",
            hint=f"make it: tpgptq convert --tp N {model} {out}",
        )
    manifest = read_manifest(out)
    checkpoint = processes.agree(lambda: read_checkpoint(model))
    as_json = as_json and processes.first
    quiet = quiet or as_json or not processes.first
    place = _device(device, processes.local_rank)
    mismatches = prove(checkpoint, out, place, _progress(quiet), processes)
    if as_json:
        click.echo(json.dumps({"out": str(out), "ok": not mismatches, "mismatches": mismatches}))
    if mismatches:
        raise VerificationError(
            *mismatches,
            hint=f"if {model} is what it was made from, convert again: {out}/README.md says how",
        )
    if not quiet:
        click.echo(
            f"{out} is {model} at tp {manifest['tp']}: {len(checkpoint.layers)} layers bit for bit "
            f"the same, {checkpoint.geometry.blocks} blocks computed alike",
            err=True,
        )


def _progress(quiet: bool) -> Progress:
    """Bars on stderr; silent off a terminal or when asked."""

    @contextmanager
    def bar(label: str, total: int) -> Iterator[Advance]:
        done = 0

        def state(_: object) -> str:
            seconds = max(time.monotonic() - started, 1e-3)
            return f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {done / seconds / 1e9:.2f} GB/s"

        hidden = quiet or not sys.stderr.isatty()
        started = time.monotonic()
        with click.progressbar(
            length=total, label=label, file=sys.stderr, hidden=hidden, item_show_func=state
        ) as shown:

            def advance(nbytes: int) -> None:
                nonlocal done
                shown.update(min(nbytes, total - done))
                done = min(done + nbytes, total)

            yield advance

    return bar


def main() -> None:
    """The entry point: SIGTERM and SIGHUP end a run as Ctrl-C does, leaving nothing behind."""

    def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, interrupt)
    cli()
