"""Every exception a user can meet. Each message is one sentence: the value, the limit, the way out.

They are raised before any work is done and before anything on disk changes. Each class also derives from the builtin
a caller would expect, so `except ValueError` keeps working; the command line prints the sentence and exits with 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PTV2Error(Exception):
    """Base of everything this package raises on purpose."""


class ConfigError(PTV2Error, ValueError):
    """A setting that cannot work: unsupported architecture switch, prompt layers out of range, clashing options."""


class InputError(PTV2Error, ValueError):
    """Model inputs of the wrong dtype, shape or range."""


class SequenceTooLong(InputError):
    """Prompt and sequence do not fit the position table together."""


class LabelError(InputError):
    """A label outside the head's range."""


class DataError(PTV2Error, ValueError):
    """A data set that is empty, lacks a column, or cannot be read."""


class WeightError(PTV2Error, ValueError):
    """A checkpoint whose tensors are missing, unknown or of another shape."""


class CheckpointError(PTV2Error, ValueError):
    """A file that is corrupt, truncated, or a pickle where safetensors is expected."""


class AdapterError(PTV2Error, ValueError):
    """An adapter folder that is incomplete or of a kind this version cannot read."""


class AdapterMismatch(AdapterError):
    """An adapter that was trained on another backbone."""


class OutputError(PTV2Error, OSError):
    """A folder that cannot be written."""


class BackendError(PTV2Error, RuntimeError):
    """No backend of an op takes the given tensors, or the one asked for does not; the message lists every reason."""


class OutOfMemory(PTV2Error, MemoryError):
    """A training step that does not fit into the memory there is."""


class NonFiniteLoss(PTV2Error, ArithmeticError):
    """The loss became NaN or infinite; nothing was updated with it."""


class RunFailed(PTV2Error, RuntimeError):
    """Training runs of a grid that failed; those that finished are kept."""


def did_you_mean(name: str, known: Iterable[str], prefix: str = "", others: str | None = None) -> str:
    """The end of a sentence about a name that does not exist: the nearest that does, or `others` (default: all there are)."""
    names = list(known)
    near = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {prefix}{near[0]}?" if near else f"; {others or 'there are ' + ', '.join(names)}."
