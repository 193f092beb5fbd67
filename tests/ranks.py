"""All ranks of an output in this process, each in a thread: what torchrun and gloo would give."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tpgptq_convert import tpgptq_runtime


class Threads:
    """Stands in for torch.distributed where the runtime module uses it."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.calls = ranks, 0
        self._own = threading.local()
        self._barrier = threading.Barrier(ranks, timeout=60)
        self._parts: list[Tensor | None] = [None] * ranks

    def set_rank(self, rank: int) -> None:
        self._own.rank = rank

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self, group: object = None) -> int:
        return self.ranks

    def get_rank(self, group: object = None) -> int:
        return int(self._own.rank)

    def all_reduce(self, tensor: Tensor, group: object = None) -> None:
        self._parts[self._own.rank] = tensor.clone()
        if self._barrier.wait() == 0:
            self.calls += 1
        total = torch.stack([part for part in self._parts if part is not None]).sum(0)
        self._barrier.wait()
        tensor.copy_(total)


def run_ranks(
    out: Path,
    tp: int,
    call: Callable[[nn.Module], Any],
    monkeypatch: pytest.MonkeyPatch,
    **options: Any,
) -> tuple[list[Any], int]:
    """What each rank's model answers, and how often they summed."""
    threads = Threads(tp)
    monkeypatch.setattr(tpgptq_runtime, "dist", threads)
    models = []
    for rank in range(tp):  # one after the other: transformers builds models under a global lock
        threads.set_rank(rank)
        models.append(tpgptq_runtime.load_model(out, dtype=torch.float32, **options))

    def work(rank: int) -> Any:
        threads.set_rank(rank)
        with torch.inference_mode():
            return call(models[rank])

    with ThreadPoolExecutor(tp) as pool:
        return list(pool.map(work, range(tp))), threads.calls
