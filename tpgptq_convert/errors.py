"""The one family of anticipated failures; the command line shows each as two lines."""

from __future__ import annotations

from functools import partial
from typing import Any


class TpgptqError(Exception):
    """Something a user can act on: what is and what must be, one line per problem, and a hint."""

    exit_code = 1

    def __init__(self, *problems: str, hint: str) -> None:
        super().__init__("\n".join([*problems, f"Hint: {hint}"]))
        self.problems = problems
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        """For processes that tell each other."""
        return partial(type(self), hint=self.hint), self.problems


class SourceError(TpgptqError):
    """The checkpoint's directory or files can't be read."""


class HubError(TpgptqError):
    """The Hub refuses, lacks what was asked for, or can't be reached."""


class CheckpointError(TpgptqError):
    """The checkpoint's configuration or tensors are not what they must be."""


class UnsupportedError(TpgptqError):
    """The checkpoint is sound, but this version doesn't convert its kind."""


class DegreeError(TpgptqError):
    """The tensor-parallel degree doesn't fit the model."""


class OutputError(TpgptqError):
    """The output can't be written where it was asked for, or is no output of this tool."""


class StaleError(OutputError):
    """The output isn't what would be written now."""


class DeviceError(TpgptqError):
    """The device that works failed, or is out of memory."""


class VerificationError(TpgptqError):
    """The output differs from the source."""

    exit_code = 3
