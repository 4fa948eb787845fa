"""What runs that were killed have left in their output_dir; removed by the next run, once it has locked that folder."""

import os
import re
from contextlib import suppress
from pathlib import Path

from tessera.checkpoint.lock_file import lives
from tessera.core.files import remove

_LEFT = re.compile(
    r"\.prepared\.(?P<pid>\d+)(\.old)?|\.prepared\.lock"  # data on its way to prepared/
    r"|\.export"  # the model on its way to output_dir
    r"|\.(?P<replaced>checkpoint-\d+)\.replaced(\.\d+)?\.part"  # what made room for another of its name
    r"|\.(checkpoint-\d+|LATEST|metrics\.jsonl)(\.\w+)*\.part"  # what was being written or removed
    r"|\.lock\.[0-9a-f]+"  # a lock on its way
    r"|\.token\.(?P<launcher>\d+)\.[0-9a-f]+"  # the secret of launchers
)


def sweep(output: Path) -> list[str]:
    """Remove what no run needs any more, links as links; what could not be removed, a line each.

    The caller holds the folder's lock, so that no run is at work there. Data may be prepared without a run, too: where
    a name has the number of a process that lives, it stays.
    """
    told = []
    for path in sorted(output.iterdir()):
        found = _LEFT.fullmatch(path.name)
        if found is None or ((pid := found["pid"] or found["launcher"]) and lives(int(pid))):
            continue
        final = output / (found["replaced"] or "")
        if found["replaced"] and not os.path.lexists(final):  # killed before the new one had its name
            with suppress(OSError):  # then the next save says it
                path.rename(final)
        elif reason := remove(path):
            told.append(f"{path} is left of a run that was killed, and cannot be removed: {reason}")
    return told
