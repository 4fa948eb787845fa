"""Chat templates are programs, which may come with a model: they get the time that a chat needs, and no powers."""

import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tessera.core.errors import UserError

LONGEST = 2.0
"""Seconds of computing that one chat may take; templates of models take some thousandth of one."""
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


@contextmanager
def bounded() -> Iterator[None]:
    """Have what is inside raise TimeoutError once it has computed for LONGEST seconds.

    Only a main thread gets signals; in another nothing is bounded.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    began = time.thread_time()

    def check(*_: object) -> None:
        if time.thread_time() - began > LONGEST:
            raise TimeoutError(f"it takes longer than {LONGEST:g} seconds")

    before = signal.signal(signal.SIGVTALRM, check)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.5, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def check_powers(text: str) -> None:
    """Raise UserError for a template that raises to a power: a number may be so large that no signal ends it."""
    if "**" not in text:
        return
    from jinja2 import Environment, nodes  # comes with transformers, which has been imported for the tokenizer

    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", text))
    except Exception:  # no template at all: rendering says why
        return
    if tree.find(nodes.Pow) is not None:
        reason = "the template raises to a power (**), which no chat needs and may take for ever"
        raise UserError("chat_template", None, reason, "write the number itself")
