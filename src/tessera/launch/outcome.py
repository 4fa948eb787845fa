"""How an attempt to run the ranks ended on one machine, and which of several ends is the cause of the others."""

import json
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tessera.core.errors import RunFailed

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

USER_ERROR = 2
"""The exit code of a rank that raised `UserError`."""

_LOST_PEER = (  # in the words of gloo, the kernel and NCCL
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "remote process exited",
)
_TIMED_OUT = "Timed out waiting"

EndKind = Literal["well", "lost", "own", "hung", "follows"]
_CAUSES: tuple[EndKind, ...] = ("lost", "own", "hung", "follows")  # the likelier cause first


@dataclass(frozen=True)
class Outcome:
    """The end of an attempt on one machine, small enough to be told to the others.

    `kind` says what it is the end of: well; a machine that is lost; a failure of its own; a rank that hung; or one
    that followed from another's. `again` is whether starting anew may help, `stopped` whether a signal asked for
    the end, `timed_out` whether a rank waited in vain for another.
    """

    kind: EndKind = "well"
    text: str = ""
    exit_code: int = 0
    again: bool = True
    stopped: bool = False
    timed_out: bool = False
    when: float = field(default_factory=time.time)

    def error(self) -> RunFailed:
        """What the command line tells."""
        return RunFailed(self.text, self.exit_code)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `Outcome(**...)` reads it."""
        return asdict(self)


def cause(outcomes: Iterable[Outcome]) -> Outcome | None:
    """The end that the others followed from; None when all ended well. What cannot be repeated comes first."""
    failed = [outcome for outcome in outcomes if outcome.kind != "well"]
    return min(failed, key=lambda o: (o.again, _CAUSES.index(o.kind), o.when), default=None)


# ---- What a rank left behind


def error_text(file: str | Path) -> str:
    """The traceback that a rank has written; empty when there is none (yet)."""
    try:
        return _callstack(json.loads(Path(file).read_text()))
    except (OSError, ValueError):
        return ""


def _callstack(data: Mapping[str, Any]) -> str:
    message: Any = data.get("message", "")
    return str(message.get("extraInfo", {}).get("py_callstack", "")) if isinstance(message, dict) else ""


def follows_from_another(text: str, exit_code: int) -> bool:
    """Whether a rank with this traceback only lost another one, or was asked to end."""
    return exit_code == -signal.SIGTERM or timed_out(text) or any(sign in text for sign in _LOST_PEER)


def timed_out(text: str) -> bool:
    """Whether a rank with this traceback waited for another until the group's timeout."""
    return _TIMED_OUT in text


def describe(
    rank: int, failure: "ProcessFailure", where: str = "", was: str = "", memory: Callable[[], list[str]] = lambda: []
) -> tuple[str, int, bool]:
    """What to tell of a failed rank, the exit code for that, and whether starting anew may help.

    `was` is what the rank was doing; `memory` gives lines for one that the kernel may have killed because of it.
    """
    who = f"rank {rank} (process {failure.pid}{where})"
    text = _callstack(failure.error_file_data)
    if text:
        kind, _, message = failure.error_file_data["message"]["message"].partition(": ")
        if kind == RunFailed.__name__ or failure.exitcode == USER_ERROR:
            return message, failure.exitcode, False
        return f"{who} failed\n{text.rstrip()}", 1, True
    if failure.exitcode < 0:
        lines = memory() if failure.exitcode == -signal.SIGKILL else []
        who += f" in {was}," if was else ""
        return "\n".join([f"{who} was killed by {signal.Signals(-failure.exitcode).name}", *lines]), 1, True
    return f"{who} ended with exit code {failure.exitcode} and left no error", 1, True
