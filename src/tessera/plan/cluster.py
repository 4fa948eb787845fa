"""What a person writes for a cluster, as a `Cluster`: `8xH100`, `2x8xA100-80`, a file, or `this` machine.

    8xH100         eight devices, on as many machines as they need
    2x8xH100       two machines of eight
    Nx8xA100-80    machines of eight, as many as are asked for (`Cluster.of`)
    cluster.yaml   keys machines, devices_per_machine and profile
    this           the machine that this process runs on

Names of devices are forgiving: A100, a100-80, NVIDIA A100-SXM4-80GB and A100 80GB are one. No torch, but for `this`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tessera.config.reader import nearest, parse_yaml
from tessera.core.errors import UserError
from tessera.core.files import read_text
from tessera.plan.machine import Cluster, Profile, read_profile, shipped_profiles
from tessera.plan.remembered import cache_folder
from tessera.sizes.bounds import RANKS

KEY = "--cluster"
EXAMPLES = "for example 8xH100, 2x8xA100-80, cluster.yaml, this"
CPU = "CPU"
"""The profile of a processor that was not measured."""
_NAMES: Mapping[str, Mapping[str, str]] = {
    "a100": {"": "A100-80", "80": "A100-80", "40": "A100-40"},
    "h100": {"": "H100", "80": "H100"},
    "h200": {"": "H200", "141": "H200"},
    "b200": {"": "B200", "180": "B200", "192": "B200"},
    "gb200": {"": "GB200", "186": "GB200", "192": "GB200"},
    "mi300x": {"": "MI300X", "192": "MI300X"},
    "l40s": {"": "L40S", "48": "L40S"},
    "4090": {"": "RTX4090", "24": "RTX4090"},
    "rtx4090": {"": "RTX4090", "24": "RTX4090"},
    "cpu": {"": CPU},
}
"""The name of a profile, by the device's and its gigabytes."""
_BESIDE = re.compile(r"nvidia|amd|instinct|geforce|rtx|tesla|gpu|oam|sxm\d?|hbm\d?e?|nvl72|generation")
"""Words beside a name that change nothing: vendors, and the one form in which a device of these names is sold."""


def cluster_of(text: str, profile: Profile | None = None) -> Cluster:
    """The cluster that `text` names; `profile` in place of the one that belongs to its device.

    Without `profile` it is the newest that `tessera measure` kept for the device, else the one that is shipped. Raises
    UserError for what names no cluster, with the nearest names.
    """
    if text.strip().lower() == "this":
        return _this(profile)
    if text.lower().endswith((".yaml", ".yml", ".json")):
        return _of_file(Path(text), profile)
    counts, name = _parts(text)
    found = profile or profile_named(name)
    if len(counts) == 2:
        machines, per_machine = counts
        if per_machine is None:
            raise UserError(KEY, text, "N is the number of machines", f"write Nx{found.devices_per_machine}x{name}")
    else:
        (devices,) = counts or (1,)
        if devices is None:
            machines, per_machine = None, found.devices_per_machine
        else:
            machines, per_machine = _shared_out(devices, found, text, name)
    return _checked(Cluster(machines or 0, per_machine, found), text, open_ended=machines is None)


def profile_named(name: str) -> Profile:
    """The profile of a device, as forgiving as `cluster_of`, or in a file. Raises UserError with the nearest names."""
    if name.lower().endswith(".json"):
        return read_profile(Path(name))
    shipped = shipped_profiles()
    measured = kept_profiles()
    if (known := _shipped_name(name)) is not None:
        return next((profile for profile in measured if _shipped_name(profile.device) == known), shipped[known])
    kept = {profile.name: profile for profile in measured}
    if name in kept:
        return kept[name]
    names = [*shipped, *kept]
    close = nearest(name.upper(), names)
    hint = f"{close}; " if close else ""
    raise UserError(KEY, name, "no profile of such a device", f"{hint}there are {', '.join(names)}; {EXAMPLES}")


def shipped_for(hardware: str, gpu: bool) -> Profile | None:
    """The shipped profile of a device by the name that torch or the system gives it; None where there is none."""
    return shipped_profiles().get((_shipped_name(hardware) or "") if gpu else CPU)


def kept_profiles(folder: Path | None = None) -> list[Profile]:
    """What `tessera measure` kept in the user's cache folder, the newest first; other files are left out."""
    folder = profiles_folder() if folder is None else folder
    found = []
    for path in sorted(folder.glob("*.json"), key=_age) if folder.is_dir() else []:
        try:
            found.append(read_profile(path))
        except UserError:
            continue
    return found


def profiles_folder() -> Path:
    """Where `tessera measure` keeps profiles; need not exist."""
    return cache_folder() / "profiles"


def profile_for(hardware: str, kept: Iterable[Profile], *, ranks: int = 1) -> Profile | None:
    """The first of the `kept` profiles that is of this hardware, one of `ranks` ranks or more before others."""
    fitting = [profile for profile in kept if profile.device == hardware]
    enough = [profile for profile in fitting if profile.devices_per_machine >= ranks]
    return next(iter(enough or fitting), None)


def measured_here(hardware: str, stack: str, ranks: int) -> list[Profile]:
    """The kept profiles that were measured on such a device with this very software and so many ranks or more."""
    return [
        profile
        for profile in kept_profiles()
        if profile.measured
        and (profile.device, profile.stack) == (hardware, stack)
        and profile.devices_per_machine >= ranks
    ]


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except OSError:
        return 0.0


def _shipped_name(text: str) -> str | None:
    """The shipped profile that `text` names, e.g. A100-80 for NVIDIA A100-SXM4-80GB."""
    words = [word for word in re.split(r"[^a-z0-9]+", text.lower()) if word and not _BESIDE.fullmatch(word)]
    if not words or words[0] not in _NAMES:
        return None
    memories = [word.removesuffix("gb") for word in words[1:] if word != "gb"]
    return _NAMES[words[0]].get("-".join(memories))


def _parts(text: str) -> tuple[list[int | None], str]:
    """The numbers before a device's name (None: N), and the name. E.g. 2, 8 and H100 of `2x8xH100`."""
    rest, counts = text.strip(), list[int | None]()
    while len(counts) < 2 and (found := re.match(r"(\d+|[nN])\s*[xX×*]\s*(?=\S)", rest)):
        if len(found[1]) > 9:
            raise UserError(KEY, text, f"at most {RANKS:,} devices are possible", EXAMPLES)
        counts.append(None if found[1] in "nN" else int(found[1]))
        rest = rest[found.end() :]
    if not rest:
        raise UserError(KEY, text, "names no device", EXAMPLES)
    return counts, rest


def _shared_out(devices: int, profile: Profile, text: str, name: str) -> tuple[int, int]:
    """Machines and devices of each, of so many devices. Raises UserError where full machines do not make them up."""
    most = profile.devices_per_machine
    if devices <= most:
        return 1, devices
    if devices > RANKS:
        raise UserError(KEY, text, f"at most {RANKS:,} devices are possible", EXAMPLES)
    if devices % most:
        below = devices // most * most
        hint = (
            f"{below}x{name}, {below + most}x{name}, or machines that are not full, such as 2x{most // 2 or 1}x{name}"
        )
        raise UserError(KEY, text, f"machines have {most} of them, which do not make up {devices}", hint)
    return devices // most, most


def _checked(cluster: Cluster, text: str, open_ended: bool) -> Cluster:
    most = cluster.profile.devices_per_machine
    if cluster.machines < 1 and not open_ended or cluster.per_machine < 1:
        raise UserError(KEY, text, "a cluster has at least one device", EXAMPLES)
    if cluster.per_machine > most:
        known = "it was measured with" if cluster.profile.measured else "machines have"
        hint = (
            f"tessera measure --ranks {cluster.per_machine}" if cluster.profile.measured else f"write {most} for each"
        )
        raise UserError(KEY, text, f"{known} {most} of {cluster.profile.name}, not {cluster.per_machine}", hint)
    if cluster.devices > RANKS:
        raise UserError(KEY, text, f"at most {RANKS:,} devices are possible", EXAMPLES)
    return cluster


def _of_file(path: Path, profile: Profile | None) -> Cluster:
    """A file with keys machines, devices_per_machine and profile (a name, or a path beside the file); or a profile."""
    content = parse_yaml(read_text(path, KEY, limit=2**20, hint=EXAMPLES), str(path))
    if not isinstance(content, dict):
        raise UserError(KEY, path, "holds no keys with values", "keys: machines, devices_per_machine, profile")
    if "product_flops" in content:
        found = profile or read_profile(path)
        return Cluster(1, found.devices_per_machine, found)
    known = ("machines", "devices_per_machine", "profile")
    for key in map(str, content):
        if key not in known:
            raise UserError(f"{path}: {key}", content[key], "is not known", nearest(key, known) or f"keys: {known}")
    found = profile or _profile_in(path, content)
    machines = _count(path, content, "machines", 1)
    per_machine = _count(path, content, "devices_per_machine", found.devices_per_machine)
    return _checked(Cluster(machines, per_machine, found), str(path), open_ended=False)


def _profile_in(path: Path, content: Mapping[Any, Any]) -> Profile:
    name = content.get("profile")
    if not isinstance(name, str):
        raise UserError(
            f"{path}: profile", name, "names no device and no file", f"one of {', '.join(shipped_profiles())}"
        )
    return read_profile(path.parent / name) if name.endswith(".json") else profile_named(name)


def _count(path: Path, content: Mapping[Any, Any], key: str, usual: int) -> int:
    value = content.get(key, usual)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= RANKS:
        raise UserError(f"{path}: {key}", value, f"is no number of them from 1 to {RANKS:,}", f"{key}: {usual}")
    return value


def _this(profile: Profile | None) -> Cluster:
    """This machine, with all its devices. A processor that was not measured has a profile with a wide band."""
    import torch

    from tessera.core import device as devices

    gpus = torch.cuda.device_count()
    hardware = devices.hardware(torch.device("cuda" if gpus else "cpu"))
    found = profile or profile_for(hardware, kept_profiles(), ranks=gpus or 1)
    if found is None:
        shipped = shipped_for(hardware, gpu=gpus > 0)
        if shipped is None:
            raise UserError(KEY, "this", f"no profile of {hardware} is shipped", "run tessera measure once, here")
        found = replace(shipped, device=hardware)
        if not gpus:
            memory = devices.host_memory_bytes() // devices.cores_here()
            found = replace(found, memory_bytes=memory, host_memory_bytes=memory)
    ranks = gpus or (found.devices_per_machine if found.measured else devices.cores_here())
    return Cluster(1, min(ranks, found.devices_per_machine), found)
