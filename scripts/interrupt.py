"""Kill conversions at random moments, and fill the disk under them: OUT must be whole or absent.

kill: a conversion is killed (kill -9; with --processes 2 one process of torchrun's), three times of
four when it has written a random share of its bytes, else while it verifies them. Then OUT must be
absent, or whole where it was there already, and a conversion with --resume must write the same
bytes as one that was never disturbed.

disk: a conversion writes to a tmpfs of its own that is too small for it, at so many sizes. Then it
must exit with 1 and two lines that name the reason, OUT and all else must be gone, and the space be
free. It is told beforehand that there is room, as where something else fills the disk meanwhile.
The tmpfs is mounted in a namespace of the process: that needs no root where the system lets users
have such, and nothing stays mounted.

Exit code 1 if anything was otherwise.

Usage:

    python scripts/interrupt.py kill --times 100
    python scripts/interrupt.py kill --times 10 --processes 2
    python scripts/interrupt.py disk --times 20
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tpgptq_convert.cli import cli

TPGPTQ = [sys.executable, "-m", "tpgptq_convert"]
ROOMY = """
import shutil, types
from tpgptq_convert import cli
shutil.disk_usage = lambda path: types.SimpleNamespace(free=1 << 60)
cli.main()
"""
# Mounts a tmpfs of $1 bytes on $2 and runs the rest there; then says what is left.
ON_TMPFS = """
mount -t tmpfs -o size="$1" tmpfs "$2" || exit 77
before=$(df --output=avail "$2" | tail -1)
place=$2; shift 2
"$@"; code=$?
find "$place" -mindepth 1
test "$(df --output=avail "$place" | tail -1)" = "$before" || echo "space is not free"
exit $code
"""


def tree(out: Path) -> dict[str, str]:
    """Every file of an output, by its SHA-256."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.rglob("*")
        if path.is_file()
    }


def size(directory: Path) -> int:
    """Bytes of the files in a directory that may be changing."""
    total = 0
    for root, _, files in os.walk(directory):
        for name in files:
            try:
                total += os.stat(os.path.join(root, name)).st_size  # noqa: PTH116, PTH118
            except FileNotFoundError:
                continue
    return total


def start(arguments: list[str], processes: int = 1) -> int:
    """Begin a conversion; returns its process, or torchrun's."""
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), *TPGPTQ[1:], *arguments]
        silence = [(os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)]
        return os.posix_spawn(sys.executable, command, os.environ, file_actions=silence)
    process = os.fork()  # which has imported everything
    if process == 0:
        code = 70
        try:
            cli(arguments)
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            os._exit(code)
    return process


def ended(process: int, seconds: float = 0.0) -> bool:
    """Whether a process ends within so many seconds; it can be waited for after that."""
    deadline = time.monotonic() + seconds
    while os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.001)
    return True


def exit_code(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def killed(process: int, work: Path, nbytes: int, delay: float, child: bool) -> str:
    """Kill a conversion some time after it has written so much; returns what it was doing."""
    while not ended(process) and size(work / "output") < nbytes:
        time.sleep(0.001)
    victim = process
    if ended(process, delay):
        exit_code(process)
        return "ended before"
    if child:  # one of torchrun's
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        victim = int(random.choice(children))
    verifying = any((work / "output").rglob("tpgptq.json"))
    os.kill(victim, signal.SIGKILL)
    exit_code(process)
    return "verifying" if verifying else "writing"


def kill(args: argparse.Namespace, model: Path, directory: Path) -> tuple[Counter[str], list[str]]:
    options = ["-q", "--tp", "2", "--max-shard-size", args.max_shard_size, str(model)]
    reference, out = directory / "reference", directory / "out"
    work = directory / ".out.tpgptq"
    seconds = []
    for verify in ("--verify", "--no-verify", "--verify"):  # at first things are compiled
        begun = time.monotonic()
        again = ["convert", *options, "--overwrite", verify, str(reference)]
        cli(again, standalone_mode=False)
        seconds.append(time.monotonic() - begun)
    whole, written = tree(reference), size(reference)
    chance, moments, faults = random.Random(args.seed), Counter[str](), []
    for run in range(args.times):
        nbytes, delay = chance.randrange(1, written), 0.0
        if run % 4 == 3:
            nbytes, delay = written * 9 // 10, chance.uniform(0, max(0.1, seconds[2] - seconds[1]))
        process = start(["convert", *options, str(out)], args.processes)
        moment = killed(process, work, nbytes, delay, child=args.processes > 1)
        moments[moment] += 1
        left, there = size(work / "output"), out.exists()
        if there and tree(out) != whole:
            faults.append(f"run {run}: a partial OUT")
        elif not there:
            code = exit_code(start(["convert", "--resume", *options, str(out)]))
            if code or tree(out) != whole:
                faults.append(f"run {run}: not resumed, exit code {code}")
        found = sorted(path.name for path in directory.iterdir())
        if not set(found) <= {"model", "out", "reference", work.name if there else ""}:
            faults.append(f"run {run}: leaves {found}")
        print(f"run {run}: {moment}, {left / written:.0%} there, OUT {there}", flush=True)
        shutil.rmtree(out, ignore_errors=True)
    return moments, faults


def disk(args: argparse.Namespace, model: Path, directory: Path) -> tuple[Counter[str], list[str]]:
    options = ["-q", "--tp", "2", "--max-shard-size", args.max_shard_size, str(model)]
    place, ends, faults = directory / "place", Counter[str](), []
    place.mkdir()
    reference = directory / "reference"
    subprocess.run([*TPGPTQ, "convert", *options, str(reference)], check=True)
    needed = size(reference)
    command = [sys.executable, "-c", ROOMY, "convert", *options, str(place / "out")]
    space = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-U", "-r", "-m"]
    for run in range(args.times):
        room = (needed * (run + 1) // (args.times + 1)) // 4096 * 4096
        done = subprocess.run(
            [*space, "sh", "-c", ON_TMPFS, "sh", str(room), str(place), *command],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 77:
            sys.exit(f"a tmpfs can't be mounted here: {done.stderr}")
        lines = [line.partition(":")[0] for line in done.stderr.splitlines()]
        good = done.returncode == 1 and lines == ["Error", "Hint"] and not done.stdout
        good = good and "No space left on device" in done.stderr
        ends["told in two lines, all gone" if good else "otherwise"] += 1
        print(f"{room} of {needed} bytes: {done.stderr.splitlines()[:1]}", flush=True)
        if not good:
            faults.append(f"{room} bytes: {done.returncode} {done.stdout} {done.stderr}")
    return ends, faults


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["kill", "disk"])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--model", type=Path, help="default: a synthetic one")
    parser.add_argument("--hidden", type=int, default=512, help="of the synthetic model")
    parser.add_argument("--max-shard-size", default="5MB")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tpgptq-interrupt-") as temporary:
        directory = Path(temporary)
        model = directory / "model"
        if args.model:
            model.symlink_to(args.model.resolve())
        else:
            make = [sys.executable, str(Path(__file__).with_name("make_synthetic.py")), str(model)]
            make += ["--hidden", str(args.hidden), "--intermediate", str(args.hidden * 11 // 4)]
            make += ["--blocks", "8", "--heads", "8", "--kv-heads", "4", "--vocab", "4096"]
            subprocess.run(make, check=True)
        count, faults = {"kill": kill, "disk": disk}[args.what](args, model, directory)
    for fault in faults:
        print(fault)
    print(f"{args.times} times: {dict(count)}; {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
