"""The file systems that a run reads and writes: their kind, their room, and how fast they take a file."""

import errno
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tessera.core.files import in_words
from tessera.core.text import human
from tessera.doctor.finding import Finding, read

NETWORK = (
    *("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "cifs", "smb3", "afs", "9p", "virtiofs"),
    *("orangefs", "wekafs"),
)
"""Kinds that other machines serve, beside those of FUSE."""
IN_MEMORY = ("tmpfs", "ramfs")
_OCTAL = {"\\040": " ", "\\011": "\t", "\\012": "\n", "\\134": "\\"}
PROBE = 16 * 2**20
"""Bytes of the file, without a name, that is written to see whether and how fast that goes."""
PROBE_SECONDS = 2.0
PATIENCE = 20.0
"""Seconds in which a file system has to answer."""
SLOW_WRITES = 50e6
"""Bytes a second below which a checkpoint of 8B parameters, 90 GiB, takes half an hour."""
LEAST = 2**30
"""Bytes that must be free where no need is known."""
LEAST_FILES = 1000


@dataclass(frozen=True)
class Place:
    """A folder, by what the run calls it; `needed`: bytes that the run writes there, where that is known."""

    name: str
    path: Path
    needed: int | None = None
    written: bool = True


@dataclass(frozen=True)
class Disk:
    """The file system of a folder. Bytes and files that are free, None where the system does not count them."""

    kind: str
    mount: str
    free: int
    size: int
    files: int | None = None
    rate: float | None = None
    refused: str = ""

    @property
    def network(self) -> bool:
        """Whether other machines serve it."""
        return self.kind in NETWORK or self.kind.startswith("fuse.")


def mount_of(path: Path, mounts: str) -> tuple[str, str]:
    """The kind of the file system of `path` and where it is mounted, from the text of /proc/self/mountinfo."""
    best = ("unknown", "/")
    for line in mounts.splitlines():
        before, dash, after = line.partition(" - ")
        words = before.split()
        if not dash or len(words) < 5 or not after.split():
            continue
        mount = words[4]
        for code, character in _OCTAL.items():
            mount = mount.replace(code, character)
        # of two at one place the later one hides the other
        if path.is_relative_to(mount) and (best[0] == "unknown" or len(mount) >= len(best[1])):
            best = (after.split()[0], mount)
    return best


def existing(path: Path) -> Path:
    """The folder itself, or what is there of the path to it."""
    path = Path(os.path.realpath(path))
    return next(above for above in (path, *path.parents) if above.is_dir())


def disk_of(path: Path, *, write: bool = True, clock: Callable[[], float] = time.monotonic) -> Disk:
    """What the system says of the file system of `path`; with `write` a file without a name is written there.

    Raises OSError where even that cannot be asked.
    """
    there = existing(path)
    kind, mount = mount_of(there, read("/proc/self/mountinfo") or "")
    status = os.statvfs(there)
    free, size = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    files = status.f_favail if status.f_files else None  # file systems that make them as needed say 0
    rate, refused = _written(there, clock) if write else (None, "")
    return Disk(kind, mount, free, size, files, rate, refused)


def _written(folder: Path, clock: Callable[[], float]) -> tuple[float | None, str]:
    """Bytes a second that `folder` takes, to the disk itself; or why it takes none. Leaves nothing."""
    block, done, begun = os.urandom(2**20), 0, clock()
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".tessera-doctor-", buffering=0) as file:
            while done < PROBE and clock() - begun < PROBE_SECONDS:
                done += file.write(block)
            os.fsync(file.fileno())
    except OSError as error:
        return None, "" if error.errno == errno.EFBIG else in_words(error)  # a limit of the shell's, told there
    return done / max(clock() - begun, 1e-9), ""


def disk_finding(place: Place, disk: Disk) -> Finding:
    """Judge one place: full, refused, slow, or fine."""
    kind = f"{disk.kind}, {'over the network' if disk.network else 'in memory'}" if _special(disk) else disk.kind
    text = f"{place.path} on {disk.mount} ({kind}), {human(disk.free)} of {human(disk.size)} free"
    if disk.files is not None and disk.files < LEAST_FILES and place.written:
        text = f"{place.path}: only {disk.files:,} more files fit on {disk.mount} ({kind})"
        return Finding(place.name, "wrong", text, f"remove files there, or {_other(place)} on another disk")
    needed = LEAST if place.needed is None else place.needed
    if place.written and (disk.free < needed or disk.refused == in_words(OSError(errno.ENOSPC, ""))):
        why = f"{human(needed)} are needed" + (" at least" if place.needed is None else "")
        return Finding(
            place.name, "wrong", f"{text}: {why}", f"make room on {disk.mount}, or {_other(place)} on another disk"
        )
    if disk.refused:
        return Finding(
            place.name, "wrong", f"{text}: {disk.refused}", f"make it writable, or {_other(place)} on another disk"
        )
    if disk.kind.startswith("fuse.") and place.name == "output_dir":
        mend = "write to a disk of this machine and copy what is to be kept"
        return Finding(place.name, "slow", f"{text}: its renames may not be whole", mend)
    if disk.network and place.name == "temporary files":
        return Finding(place.name, "slow", f"{text}: small files travel", "set TMPDIR to a folder of this machine")
    if disk.rate is not None:
        text += f", takes {human(disk.rate)}/s"
        if disk.rate < SLOW_WRITES:
            seldom = "save more seldom, keep save_async, or " if place.name == "output_dir" else ""
            return Finding(place.name, "slow", text, f"{seldom}{_other(place)} on a faster disk")
    return Finding(place.name, "ok", text)


def _special(disk: Disk) -> bool:
    return disk.network or disk.kind in IN_MEMORY


def _other(place: Place) -> str:
    others = {"temporary files": "a TMPDIR", "Hugging Face cache": "an HF_HOME", "this folder": "an output_dir"}
    return others.get(place.name, place.name)


def usual_places(environment: Mapping[str, str] = os.environ) -> list[Place]:
    """Where every run writes, whatever its config: temporary files, and the cache of the hub."""
    home = environment.get("HF_HOME") or "~/.cache/huggingface"
    return [
        Place("temporary files", Path(environment.get("TMPDIR") or "/tmp"), needed=100 * 2**20),
        Place("Hugging Face cache", Path(os.path.expanduser(home)), needed=100 * 2**20, written=False),
    ]


def storage_findings(
    places: list[Place], look: Callable[..., Disk] = disk_of, patience: float = PATIENCE
) -> list[Finding]:
    """A finding for each place; `look` has `patience` seconds for each."""
    return [_looked_at(place, look, patience) for place in places]


def _looked_at(place: Place, look: Callable[..., Disk], patience: float) -> Finding:
    seen: list[Disk | OSError] = []

    def ask() -> None:
        try:
            seen.append(look(place.path, write=place.written))
        except OSError as error:
            seen.append(error)

    # in a thread, for a server of files that is gone lets whoever asks wait for ever
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience)
    if not seen:
        text = f"{place.path} did not answer for {patience:.0f} s: the server of its files may be gone"
        return Finding(
            place.name, "wrong", text, "mount shows which; ask its server, or umount -f -l and mount it again"
        )
    if isinstance(seen[0], OSError):
        mend = f"let this user go there, or {_other(place)} in another folder"
        return Finding(place.name, "wrong", f"{place.path}: {in_words(seen[0])}", mend)
    return disk_finding(place, seen[0])
