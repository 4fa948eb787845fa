"""The secret of a run: who does not know it cannot speak for one of its launchers.

torch's store, through which launchers and ranks find one another, lets everybody in who reaches it. So what is left
there for launchers and ranks carries a code (HMAC-SHA256) under a key of this run. On one machine the key is random
and goes to the ranks in their environment. Machines that work together share a token: TESSERA_RUN_TOKEN, where that is
set on all of them, else a random one that machine 0 leaves in output_dir as long as it runs, for its own user to read.
"""

import hashlib
import hmac
import os
import re
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tessera.core.errors import UserError
from tessera.core.files import in_words

if TYPE_CHECKING:
    from torch.distributed import Store

GIVEN = "TESSERA_RUN_TOKEN"
RUN = "run"
"""The key of the launchers' store under which machine 0 says which run this is, and whether its token was given."""
SEEN = 60.0
"""Seconds in which a file on a disk that all machines see shows up."""


class Seal:
    """Puts the run's code on texts and tells whose have it."""

    def __init__(self, key: bytes) -> None:
        self.key = key

    def sealed(self, name: str, text: str) -> str:
        """`text` with the code that holds for it under this `name` only."""
        return f"{self._code(name, text.encode())} {text}"

    def opened(self, name: str, sealed: bytes) -> str | None:
        """The text; None when it was not sealed with this key, under this name."""
        code, _, text = sealed.partition(b" ")
        return text.decode() if hmac.compare_digest(code, self._code(name, text).encode()) else None

    def _code(self, name: str, text: bytes) -> str:
        return hmac.new(self.key, name.encode() + b"\0" + text, hashlib.sha256).hexdigest()


def own_seal() -> Seal:
    """That of a run on one machine."""
    return Seal(secrets.token_bytes(32))


def host_seal(store: "Store", folder: Path) -> tuple[Seal, Path | None]:
    """Machine 0's: says in the store which run this is; the second is the file that it leaves in `folder`, if any.

    Raises OSError when it cannot.
    """
    run, token, file = secrets.token_hex(16), os.environ.get(GIVEN, ""), None
    if not token:
        token, file = secrets.token_hex(32), _file(folder, os.getpid(), run)
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w") as stream:
            stream.write(token)
    store.set(RUN, f"{run} {os.getpid() if file else 'given'}")
    return _seal(token, run), file


def joined_seal(store: "Store", folder: Path) -> Seal:
    """That of another machine. Raises UserError when it cannot learn the token."""
    found = re.fullmatch(r"([0-9a-f]{32}) ([0-9]{1,9}|given)", store.get(RUN).decode(errors="replace"))
    if found is None:
        raise UserError("--main-process-ip", None, "what listens there is no launcher of this version")
    run, token = found[1], os.environ.get(GIVEN, "")
    if bool(token) != (found[2] == "given"):
        is_set, is_not = ("this machine", "machine 0") if token else ("machine 0", "this machine")
        raise UserError(GIVEN, None, f"is set on {is_set}, but not on {is_not}", "set the same on every machine")
    file, until = _file(folder, found[2], run), time.monotonic() + SEEN
    while not token:
        try:
            token = file.read_text()
        except OSError as error:
            if time.monotonic() > until:
                reason = f"{file.name}, which machine 0 has left there, cannot be read here: {in_words(error)}"
                hint = f"use a disk that every machine sees, or set {GIVEN} on each"
                raise UserError("output_dir", folder, reason, hint) from error
            time.sleep(0.2)
    return _seal(token, run)


def _file(folder: Path, process: object, run: str) -> Path:
    return folder / f".token.{process}.{run}"


def _seal(token: str, run: str) -> Seal:
    return Seal(hmac.digest(token.encode(), run.encode(), "sha256"))
