"""The commands. The only file that knows click; turns errors into lines and exit codes."""

from __future__ import annotations

import ctypes.util
import functools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import click

from tpgptq_convert.errors import OutputError, StaleError, TpgptqError, VerificationError
from tpgptq_convert.processes import Processes, is_first, joined
from tpgptq_convert.progress import Advance, Progress

JSON_VERSION = 1
PROBLEMS_SHOWN = 20
DEGREES_SHOWN = 16
NO_LICENSE = "the source states no licence, in its model card or a file; so the output has none"
LONGEST = 1000  # characters of a problem that are shown
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SETTINGS = {"help_option_names": ["-h", "--help"]}
EPILOG = (
    "Exit codes: 0 done; 1 an anticipated failure (bad checkpoint, unsupported model, output "
    "exists, disk full, interrupted); 2 wrong usage; 3 verification failed. Data goes to stdout, "
    "talk to stderr."
)


class Stopped(KeyboardInterrupt):
    """By a signal, whose number it holds.

    Not KeyboardInterrupt itself, which makes Python end as if by SIGINT where it passes a call of
    exec, however it is dealt with then.
    """


class Command(click.Command):
    """Shows every anticipated failure the same way: what is and what must be, then a hint."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TpgptqError as error:
            problems, hint, code = error.problems, error.hint, error.exit_code
        except (OSError, UnicodeError) as error:
            name = getattr(error, "filename", None)
            what = getattr(error, "strerror", None) or error
            problems, code = (f"{name}: {what}" if name else str(what),), 1
            hint = "check that the files can be read, and their names"
        except MemoryError as error:
            problems, code = (f"out of memory ({str(error) or 'no more can be had'})",), 1
            hint = "free some memory, or use a machine that has more"
        except KeyboardInterrupt as stop:
            signum = signal.Signals(stop.args[0] if stop.args else signal.SIGINT)
            problems, code = (f"stopped by {signum.name} before it was done",), 1
            hint = "run it again; a conversion with --resume keeps what it has written"
        if is_first():
            _complain(problems, hint)
            if ctx.params.get("as_json"):
                told = [_printable(problem) for problem in problems]
                with suppress(OSError):  # it may be what failed
                    _print_json(ok=False, exit_code=code, problems=told, hint=hint)
        ctx.exit(code)


class Group(click.Group):
    command_class = Command


def _complain(problems: Sequence[str], hint: str) -> None:
    for problem in problems[:PROBLEMS_SHOWN]:
        click.echo(f"Error: {_printable(problem)}", err=True)
    if len(problems) > PROBLEMS_SHOWN:
        click.echo(f"... and {len(problems) - PROBLEMS_SHOWN} more", err=True)
    click.echo(f"Hint: {hint}", err=True)


def _printable(text: str) -> str:
    """Names come from files: nothing in them may break a line or reach the terminal."""
    text = f"{text[:LONGEST]}..." if len(text) > LONGEST else text
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _print_json(**values: Any) -> None:
    """The one object of --json, as output.schema.json describes it."""
    command = click.get_current_context().command.name
    click.echo(json.dumps({"json_version": JSON_VERSION, "command": command} | values, indent=2))


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
    with _undisturbed():
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


_waiting: list[int] | None = None  # signals that came meanwhile


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals wait for the end: an exception in torch's C++, while it is imported, is an abort."""
    global _waiting
    _waiting = []
    try:
        yield
    finally:
        came, _waiting = _waiting, None
        if came:
            raise Stopped(came[0])


def _has_driver() -> bool:
    """Whether a GPU is worth looking for; torch takes two seconds to say so."""
    return any(map(ctypes.util.find_library, ("cuda", "amdhip64")))


class Model(click.Path):
    """A directory, or a repository on the Hub, which nobody writes as ./org/name or org/name/."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path: Path = super().convert(value, param, ctx)  # type: ignore[assignment]  # path_type
        is_path = str(value).startswith(("./", "../")) or str(value).endswith("/")
        return path.absolute() if is_path and not path.is_dir() else path


model_argument = click.argument("model", type=Model(path_type=Path))
out_argument = click.argument("out", type=click.Path(path_type=Path))
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda[:N]",
    help="Where to do the work; auto: on the GPU where there is one.",
)
private_option = click.option(
    "--private", is_flag=True, help="Make the repository a private one, if it is new."
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No bars, notes or summaries.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
revision_option = click.option(
    "--revision",
    metavar="REV",
    help="Branch, tag or commit of MODEL, where that is on the Hub.",
)
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
@revision_option
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
    type=click.Choice(["ranks", "merged", "gptq"]),
    default="ranks",
    show_default=True,
    help="Files per rank; one checkpoint with the ranks' shards side by side, to slice; or an "
    "ordinary GPTQ checkpoint with the MLP folded, for servers that read g_idx.",
)
@click.option(
    "--max-shard-size", type=ByteSize(), default="5GB", show_default=True, help="Largest file."
)
@row_group_option
@device_option
@click.option("--overwrite", is_flag=True, help="Replace an earlier output.")
@click.option(
    "--skip-if-current",
    is_flag=True,
    help="Do nothing, with success, where OUT is what this would write, by the checksums of all "
    "its files and MODEL's. With --overwrite a stale one is replaced: for pipelines.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on where an earlier run was killed; if this one is, leave what it wrote for the next.",
)
@click.option("--dry-run", is_flag=True, help="Show the plan; write nothing.")
@click.option(
    "--verify/--no-verify",
    "check",
    default=True,
    show_default=True,
    help="Prove the output against MODEL before it appears.",
)
@click.option(
    "--push-to-hub",
    "repository",
    metavar="ORG/NAME",
    help="Push the output there when it is done, as `push` does.",
)
@private_option
@quiet_option
@json_option
@among_processes
def convert(
    processes: Processes,
    model: Path,
    out: Path,
    revision: str | None,
    degrees: tuple[int, ...],
    layout: str,
    max_shard_size: int,
    row_group: str,
    device: str,
    overwrite: bool,
    skip_if_current: bool,
    resume: bool,
    dry_run: bool,
    check: bool,
    repository: str | None,
    private: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write the checkpoint in MODEL as shards for --tp ranks to OUT.

    MODEL is a directory, or a repository on the Hub: org/name.

    \b
    tpgptq convert --tp 2 model/ out/
    """
    from tpgptq_convert.checkpoint import read_checkpoint
    from tpgptq_convert.folded import Folded
    from tpgptq_convert.plan import Plan, check_layout, make_plans
    from tpgptq_convert.report import describe, notes_of, remarks, render

    if repository and not check:
        raise click.UsageError("--push-to-hub pushes what was verified: leave --no-verify out")
    if private and not repository:
        raise click.UsageError("--private is of the repository that --push-to-hub names")
    checkpoint = processes.agree(lambda: read_checkpoint(model, revision))
    processes.agree(lambda: check_layout(checkpoint, layout, degrees))
    kind = Folded if layout == "gptq" else Plan
    plans = processes.agree(
        lambda: make_plans(checkpoint, dict.fromkeys(degrees), int(row_group), kind)
    )
    as_json = as_json and processes.first
    quiet = quiet or as_json or not processes.first
    if dry_run:
        from tpgptq_convert.staging import standing

        report = describe(checkpoint, plans)
        if told := standing(out, overwrite):
            report["notes"].append(f"{told}, if it isn't current" if skip_if_current else told)
        if as_json:
            _print_json(ok=True, **report)
        elif processes.first:
            click.echo(render(report))
        return
    notes = [*checkpoint.notes, *notes_of({plan.tp: plan.notes for plan in plans})]
    if not quiet:
        for remark in remarks(checkpoint.damage, notes):
            click.echo(remark, err=True)

    from tpgptq_convert import convert as conversion
    from tpgptq_convert.card import has_license

    if check:
        with _undisturbed():
            import torch  # noqa: F401

    if repository:
        from tpgptq_convert.push import MAIN, check_target, push

        branches = [f"tp-{plan.tp}" for plan in plans] if len(plans) > 1 else []
        processes.of_first(lambda: check_target(repository, [MAIN, *branches]))
    processes.agree(lambda: checkpoint.source.download(_silent(quiet)))
    place = _device(device, processes.local_rank)
    options = conversion.Options(
        layout, max_shard_size, place, overwrite, resume, check, repository
    )
    started = time.monotonic()
    manifests = None
    if skip_if_current:
        try:
            manifests = processes.of_first(
                lambda: conversion.current(checkpoint, plans, out, options)
            )
        except StaleError as stale:
            if not overwrite:
                raise
            notes += stale.problems
            if not quiet:
                click.echo(f"Note: {stale.problems[0]}", err=True)
    skipped = manifests is not None
    if manifests is None:
        manifests = conversion.convert(
            checkpoint, plans, out, options, _progress(quiet), processes, _tell_resumed(quiet)
        )
    seconds = time.monotonic() - started
    if not has_license(checkpoint.source.directory):
        notes.append(NO_LICENSE)
        if not (quiet or skipped):
            click.echo(f"Note: {NO_LICENSE}", err=True)
    pushed: list[dict[str, Any]] = []
    if repository:
        pushed = processes.of_first(
            lambda: push(out, repository, private=private, quiet=_silent(quiet))
        )
    if as_json:
        _print_json(
            ok=True,
            out=str(out),
            skipped=skipped,
            verified=all(manifest["verified"] for manifest in manifests),
            seconds=round(seconds, 3),
            pushed=pushed,
            damage=list(checkpoint.damage),
            notes=notes,
            manifests=manifests,
        )
    elif skipped and not quiet:
        click.echo(f"{out} is current: nothing to do", err=True)
    elif not quiet:
        files = [f for path in out.rglob("model-*.safetensors") if (f := path.stat().st_size)]
        nbytes, plural = sum(files), "s" if len(files) > 1 else ""
        click.echo(
            f"Wrote {'and verified ' if check else ''}tp {', '.join(str(p.tp) for p in plans)} to "
            f"{out}: {len(files)} weight file{plural}, {_size(nbytes)} in {seconds:.1f} s "
            f"({_size(nbytes / seconds)}/s)",
            err=True,
        )
    if not quiet:
        _tell_pushed(pushed)


@cli.command()
@model_argument
@revision_option
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
def inspect(
    model: Path, revision: str | None, degrees: tuple[int, ...], row_group: str, as_json: bool
) -> None:
    """Say what MODEL is, and what each degree would cost. Reads headers and g_idx only.

    MODEL is a directory, or a repository on the Hub, org/name, of which no weights are fetched.
    """
    from tpgptq_convert.checkpoint import read_checkpoint
    from tpgptq_convert.plan import make_plans
    from tpgptq_convert.report import describe, render

    checkpoint = read_checkpoint(model, revision)
    wanted = dict.fromkeys(degrees) or range(1, min(checkpoint.most_ranks, DEGREES_SHOWN) + 1)
    report = describe(checkpoint, make_plans(checkpoint, wanted, int(row_group)))
    if as_json:
        _print_json(ok=True, **report)
    else:
        click.echo(render(report))


@cli.command(short_help="Prove that OUT holds exactly the values of MODEL.")
@model_argument
@out_argument
@revision_option
@device_option
@quiet_option
@json_option
@among_processes
def verify(
    processes: Processes,
    model: Path,
    out: Path,
    revision: str | None,
    device: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Prove that OUT holds exactly the values of MODEL, and computes the same.

    OUT's manifest then says so. Of a MODEL on the Hub it is by default the commit that OUT says
    that it was made from.
    """
    from tpgptq_convert.checkpoint import read_checkpoint
    from tpgptq_convert.manifest import RUNTIME, TOOL, listed_files, read_manifest

    with _undisturbed():
        from tpgptq_convert.verify import verify as prove
    from tpgptq_convert.writer import record_verified

    if not out.is_dir():
        raise OutputError(
            f"{out}: no such directory; must be an output of `tpgptq convert`",
            hint=f"make it: tpgptq convert --tp N {model} {out}",
        )
    manifest = read_manifest(out)
    if manifest["source"].get("name") == str(model) and not model.is_dir():
        revision = revision or manifest["source"].get("revision")
    checkpoint = processes.agree(lambda: read_checkpoint(model, revision))
    as_json = as_json and processes.first
    quiet = quiet or as_json or not processes.first
    processes.agree(lambda: checkpoint.source.download(_silent(quiet)))
    place = _device(device, processes.local_rank)
    mismatches = prove(checkpoint, out, place, _progress(quiet), processes)
    if mismatches:
        raise VerificationError(
            *mismatches,
            hint=f"if {model} is what it was made from, convert again: {out}/README.md says how",
        )
    if processes.first and not manifest.get("verified"):
        try:
            record_verified(out)
        except OSError as error:
            note = f"Note: {out} can't be changed ({error.strerror}), to say that it was verified"
            click.echo(note, err=True)
    if not quiet and manifest["tool"] != TOOL and RUNTIME in listed_files(manifest):
        what = f"{RUNTIME} was not compared: it is to be that of {_printable(manifest['tool'])}"
        click.echo(f"Note: {what}, and this is {TOOL}", err=True)
    if as_json:
        _print_json(ok=True, out=str(out))
    elif not quiet:
        click.echo(
            f"{out} is {model} at tp {manifest['tp']}: {len(checkpoint.layers)} layers bit for bit "
            f"the same, {checkpoint.geometry.blocks} blocks computed alike",
            err=True,
        )


@cli.command()
@out_argument
@click.argument("repository", metavar="ORG/NAME")
@click.option(
    "--revision",
    metavar="BRANCH",
    help="Branch to push to. [default: main; of an output of several degrees tp-N, one for each]",
)
@private_option
@quiet_option
@json_option
def push(
    out: Path, repository: str, revision: str | None, private: bool, quiet: bool, as_json: bool
) -> None:
    """Push OUT to a repository on the Hub, which is made if there is none.

    Only what was verified, by `convert` or by `verify`, and is still the same is pushed.
    """
    from tpgptq_convert.push import degrees
    from tpgptq_convert.push import push as upload

    if revision and None not in degrees(out):
        raise click.UsageError(f"--revision is of one degree: {out} has several, each its branch")
    quiet = quiet or as_json
    pushed = upload(out, repository, revision, private, _progress(quiet), _silent(quiet))
    if as_json:
        _print_json(ok=True, out=str(out), pushed=pushed)
    elif not quiet:
        _tell_pushed(pushed)


def _tell_resumed(quiet: bool) -> Callable[[int, int], None]:
    def tell(kept: int, nbytes: int) -> None:
        if not quiet:
            click.echo(f"Resumed: {_size(kept)} of {_size(nbytes)} are written already", err=True)

    return tell


def _tell_pushed(pushed: list[dict[str, Any]]) -> None:
    for branch in pushed:
        done = "Pushed" if branch["changed"] else "Already up to date:"
        click.echo(f"{done} {branch['url']} (commit {branch['commit'][:8]})", err=True)


def _silent(quiet: bool) -> bool:
    """Whether to show no bars: if asked, and off a terminal."""
    return quiet or not sys.stderr.isatty()


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"


def _progress(quiet: bool) -> Progress:
    """Bars on stderr; silent off a terminal or when asked."""

    @contextmanager
    def bar(label: str, total: int) -> Iterator[Advance]:
        def state(_: object) -> str:
            done, seconds = shown.pos, max(time.monotonic() - started, 1e-3)
            return f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {done / seconds / 1e9:.2f} GB/s"

        hidden = _silent(quiet)
        started = time.monotonic()
        shown = click.progressbar(
            length=total, label=label, file=sys.stderr, hidden=hidden, item_show_func=state
        )

        def advance(nbytes: int) -> None:
            if not shown.pos:  # all that came before is starting up: no measure of what is left
                shown.start = shown.last_eta = time.time()
            shown.update(min(nbytes, total - shown.pos))

        with shown:
            yield advance

    return bar


def _open_streams() -> None:
    """Have something behind stdin, stdout and stderr where a caller closed them: else the next file
    that is opened would take their numbers, and what libraries write to stderr."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115


def main() -> None:
    """The entry point: SIGTERM and SIGHUP end a run as Ctrl-C does, leaving nothing behind."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        for ending in ENDINGS:  # one is enough: nothing is to disturb what is cleared away now
            signal.signal(ending, signal.SIG_IGN)
        if _waiting is None:
            raise Stopped(signum)
        _waiting.append(signum)

    _open_streams()
    for ending in ENDINGS:
        if signal.getsignal(ending) is not signal.SIG_IGN:  # as by nohup
            signal.signal(ending, interrupt)
    cli()
