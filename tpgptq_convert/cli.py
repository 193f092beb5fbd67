"""The commands. The only file that knows click; turns errors into lines and exit codes."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from tpgptq_convert.errors import OutputError, TpgptqError, VerificationError

if TYPE_CHECKING:
    import torch

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
            click.echo(f"Error: {_printable(f'{name}: {what}' if name else str(what))}", err=True)
            click.echo("Hint: check that the files can be read, and their names", err=True)
            ctx.exit(1)
        except TpgptqError as error:
            for problem in error.problems[:PROBLEMS_SHOWN]:
                click.echo(f"Error: {_printable(problem)}", err=True)
            if len(error.problems) > PROBLEMS_SHOWN:
                click.echo(f"... and {len(error.problems) - PROBLEMS_SHOWN} more", err=True)
            click.echo(f"Hint: {error.hint}", err=True)
            ctx.exit(error.exit_code)


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


def _device(name: str) -> torch.device:
    """auto: the GPU where there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise click.BadParameter(f"{name!r} is not auto, cpu or cuda[:N]", param_hint="--device")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise click.BadParameter(
            f"{name}: this machine has {count or 'no'} CUDA devices", param_hint="--device"
        )
    return device


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
def convert(
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
    from tpgptq_convert.plan import make_plans
    from tpgptq_convert.report import describe, remarks, render

    checkpoint = read_checkpoint(model)
    plans = make_plans(checkpoint, dict.fromkeys(degrees), int(row_group))
    if dry_run:
        report = describe(checkpoint, plans)
        click.echo(json.dumps(report, indent=2) if as_json else render(report))
        return
    quiet = quiet or as_json
    if not quiet:
        notes = (*checkpoint.notes, *(note for plan in plans for note in plan.notes))
        for remark in remarks(checkpoint.damage, notes):
            click.echo(remark, err=True)

    from tpgptq_convert import convert as conversion

    options = conversion.Options(layout, max_shard_size, _device(device), overwrite, check)
    started = time.monotonic()
    work = conversion.work_bytes(checkpoint, plans, check)
    with _progress("Converting", work, quiet) as progress:
        manifests = conversion.convert(checkpoint, plans, out, options, progress)
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
def verify(model: Path, out: Path, device: str, quiet: bool, as_json: bool) -> None:
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
    checkpoint = read_checkpoint(model)
    total = sum(map(checkpoint.source_bytes, checkpoint.layers))
    with _progress("Verifying", total, quiet or as_json) as progress:
        mismatches = prove(checkpoint, out, _device(device), progress)
    if as_json:
        click.echo(json.dumps({"out": str(out), "ok": not mismatches, "mismatches": mismatches}))
    if mismatches:
        raise VerificationError(
            *mismatches,
            hint=f"if {model} is what it was made from, convert again: {out}/README.md says how",
        )
    if not (quiet or as_json):
        click.echo(
            f"{out} is {model} at tp {manifest['tp']}: {len(checkpoint.layers)} layers bit for bit "
            f"the same, {checkpoint.geometry.blocks} blocks computed alike",
            err=True,
        )


@contextmanager
def _progress(label: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr; silent off a terminal or when asked."""
    hidden = quiet or not sys.stderr.isatty()
    with click.progressbar(length=total, label=label, file=sys.stderr, hidden=hidden) as bar:
        yield bar.update


def main() -> None:
    """The entry point: SIGTERM ends a run as Ctrl-C does, leaving nothing behind."""

    def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    cli()
