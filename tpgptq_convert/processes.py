"""The processes of one run: this one alone, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from tpgptq_convert.errors import OutputError, TpgptqError

Result = TypeVar("Result")

STARTED_BY_TORCHRUN = "TORCHELASTIC_RUN_ID"
PATIENCE = timedelta(days=1)  # torchrun ends the others where one dies; a slow one is waited for


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks, and that writes what is written once."""
        return self.rank == 0

    def agree(self, step: Callable[[], Result]) -> Result:
        """The result of a step that every process takes.

        Where it fails in one with an anticipated error, that is raised in all.
        """
        if self.size == 1:
            return step()
        error = None
        try:
            result = step()
        except (TpgptqError, OSError) as raised:
            error = raised
        for failure in self.gather(error):
            if failure is not None:
                raise failure
        return result

    def of_first(self, step: Callable[[], Result]) -> Result:
        """The result of a step that the first process takes for all."""
        return self.gather(self.agree(lambda: step() if self.first else None))[0]  # type: ignore[return-value]

    def gather(self, value: Result) -> list[Result]:
        """Every process's value, by rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:
            raise OutputError(
                f"process {self.rank} lost the others ({str(error).splitlines()[0]}); all must "
                "stay until the end",
                hint="an error above may be the cause",
            ) from None
        return values


def is_first() -> bool:
    """Whether this process is the one that speaks, known before the others are joined."""
    return STARTED_BY_TORCHRUN not in os.environ or os.environ.get("RANK", "0") == "0"


@contextmanager
def joined() -> Iterator[Processes]:
    """Those that torchrun started, joined while they are in use; else this one alone."""
    if STARTED_BY_TORCHRUN not in os.environ:
        yield Processes()
        return
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise OutputError(
            f"this process could not join the others ({str(error).splitlines()[0]}); all must "
            "reach each other",
            hint="start it with torchrun, on machines that see each other's addresses",
        ) from None
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))
    finally:
        dist.destroy_process_group()
