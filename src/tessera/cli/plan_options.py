"""Which options of `tessera plan` go together: each way to call it takes some of them, and refuses the others."""

from collections.abc import Collection, Mapping
from typing import Any

from tessera.core.errors import UserError
from tessera.sizes.numbers import either

_SHAPE = ("cluster", "profile", "sequence_len", "global_batch", "dtype", "optimizer", "config", "output")
_PRICED = ("as_json", "tokens", "price")
_PLANNED = ("subject", *_SHAPE, *_PRICED, "top", "trace", "plot")
WAYS: Mapping[str, Collection[str]] = {
    "--tables": ("tables", "output"),
    "--matmul": ("matmul", "devices"),
    "CONFIG": ("subject", "cluster", "profile", "overrides", *_PRICED),
    "MODEL --scaling": ("subject", "scaling", *_SHAPE),
    "MODEL --target-tokens-per-second": ("target", *_PLANNED),
    "MODEL": _PLANNED,
}
"""What each takes: the names of the command's parameters."""
_WRITTEN = {"subject": "MODEL", "as_json": "--json", "target": "--target-tokens-per-second", "overrides": "--set"}


def check_together(given: Mapping[str, Any]) -> None:
    """Raise UserError for options that do not go together, of those that were `given` with their values."""
    way = _way(given)
    for name, value in given.items():
        if name not in WAYS[way]:
            others = [f"tessera plan {other}" for other, names in WAYS.items() if name in names]
            reason = f"says nothing to tessera plan {way}"
            raise UserError(_written(name), _shown(value), reason, f"leave it out; it goes with {either(others)}")
    if "price" in given and "tokens" not in given:
        raise UserError("--price", given["price"], "is that of an hour, and of how many is unknown", "add --tokens 1T")
    if "plot" in given and given.get("trace") == 0:
        reason = "draws what is alive in a traced step, and --trace 0 traces none"
        raise UserError("--plot", given["plot"], reason, "--trace 1, or leave --trace out")


def _way(given: Mapping[str, Any]) -> str:
    """How the command is called: by the first of these that is given."""
    if "tables" in given:
        return "--tables"
    if "matmul" in given:
        return "--matmul"
    if str(given.get("subject", "")).endswith((".yaml", ".yml")):
        return "CONFIG"
    if "scaling" in given:
        return "MODEL --scaling"
    return "MODEL --target-tokens-per-second" if "target" in given else "MODEL"


def _written(name: str) -> str:
    return _WRITTEN.get(name, "--" + name.replace("_", "-"))


def _shown(value: Any) -> Any:
    """A value as it was given; None for a switch, which has none."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return None if value is True else value
