"""What is installed: Tessera, torch and the packages it needs or may use, each beside the version that is asked for."""

import platform
import re
from collections.abc import Callable
from importlib import metadata

from tessera import __version__
from tessera.core.driver import Gpu
from tessera.doctor.devices import Torch
from tessera.doctor.finding import Finding


def installed(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def required() -> list[str] | None:
    """What Tessera's own package says it needs, e.g. "torch>=2.11"; None where it runs without being installed."""
    try:
        return metadata.requires("tessera")
    except metadata.PackageNotFoundError:
        return None


def version_findings(
    torch: Torch,
    gpus: list[Gpu],
    served: tuple[int, int] | None,
    needs: list[str] | None,
    version: Callable[[str], str | None] = installed,
) -> list[Finding]:
    """Versions, one line for those that fit and one for each that does not."""
    found = [Finding("tessera", "ok", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")]
    built = f"for CUDA {torch.cuda}" if torch.cuda else "for CPUs"
    found.append(Finding("torch", "ok", f"{torch.version}, built {built}"))
    found.append(_backend(torch))
    if gpus:
        newest = f", serves CUDA up to {served[0]}.{served[1]}" if served else ""
        found.append(Finding("driver", "ok", f"{gpus[0].driver}{newest}"))
    if needs is None:
        found.append(Finding("packages", "unknown", "Tessera runs from its sources, not installed: pip install -e ."))
        return found
    fits, optional, absent = list[str](), list[str](), list[str]()
    for need in needs:
        words = re.match(r"([\w.-]+)(?:\[[^\]]*\])?(?:>=([\d.]+))?(.*)", need)
        if words is None or words[1] == "tessera":
            continue
        name, least, extra = words[1], words[2], re.search(r"extra\s*==\s*['\"](\w+)", words[3])
        if extra and extra[1] == "dev":
            continue
        have = version(name)
        if have is None and extra:
            absent.append(f"{name} ({extra[1]})")
        elif have is None:
            found.append(
                Finding(name, "wrong", "is not installed", f"pip install '{name}{f'>={least}' * bool(least)}'")
            )
        elif least and _numbers(have) < _numbers(least):
            text = f"{have} is older than {least}, which Tessera needs"
            found.append(Finding(name, "wrong", text, f"pip install '{name}>={least}'"))
        else:
            (optional if extra else fits).append(f"{name} {have}")
    found.append(Finding("packages", "ok", ", ".join(fits)))
    told = ", ".join(optional) or "none"
    without = f"; not installed: {', '.join(absent)}" if absent else ""
    found.append(Finding("optional packages", "ok", told + without))
    return found


def _backend(torch: Torch) -> Finding:
    if "gloo" not in torch.backends:
        text = "this torch has no gloo, through which ranks exchange tensors of the CPU"
        return Finding("backend", "wrong", text, "install torch from its own wheels")
    if torch.gpus and "nccl" not in torch.backends:
        text = "this torch has no NCCL, through which GPUs exchange"
        return Finding("backend", "wrong", text, "install torch for CUDA on Linux")
    nccl = f", NCCL {torch.nccl} between GPUs" if torch.gpus else ""
    return Finding("backend", "ok", f"gloo{nccl}")


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version, to compare: (2, 11) of 2.11.0rc1+cpu, without zeros at the end."""
    numbers = [int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part]  # type: ignore[index]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
