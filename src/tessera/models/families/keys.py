"""Reading a config.json: its keys, checked, and what several families write alike.

Keys that config.json lacks take the defaults of transformers' own config classes.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tessera.core.errors import UserError
from tessera.nn.rope import RopeConfig
from tessera.sizes.bounds import MODEL_NUMBERS, MODEL_SIZES, WIDTH
from tessera.sizes.numbers import nearest

ROPE_TYPES = {"default": "default", "llama3": "llama3"}


class Keys:
    """The keys of a config.json, or of a section of it, checked when read.

    A null counts as absent; `nulls` has those keys, for the few that mean something else by it.
    """

    def __init__(self, content: Mapping[str, Any], file: Path, section: str = "") -> None:
        self.content = {key: value for key, value in content.items() if value is not None}
        self.nulls = content.keys() - self.content.keys()
        self.file, self.section_name = file, section

    def error(self, key: str, reason: str, hint: str = "") -> UserError:
        """The error that says why the value of `key` does not fit; the file is named."""
        return UserError(self.section_name + key, self.content.get(key), f"{self.file}: {reason}", hint)

    def defaults(self, **values: int) -> None:
        """Give absent keys these values, where a family's own are not Llama's."""
        if "num_key_value_heads" in self.nulls:  # as many as query heads
            values.pop("num_key_value_heads", None)
        self.content = values | self.content

    def _read(self, key: str, default: Any, wanted: str, fits: Callable[[Any], bool]) -> Any:
        if key not in self.content:
            if default is None:
                raise self.error(key, "the key is missing", f"it is {wanted}")
            return default
        if not fits(self.content[key]):
            raise self.error(key, f"is not {wanted}")
        return self.content[key]

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 to its bound. Without a default the key must be given, here and below."""
        most = MODEL_SIZES[key]
        wanted = f"a whole number of at least 1 and at most {most}"
        return self._read(key, default, wanted, lambda v: type(v) is int and 1 <= v <= most)

    def number(self, key: str, default: float | None = None, *, below: float = math.inf) -> float:
        """A number within its bounds, and under `below`."""
        least, most = MODEL_NUMBERS[key]
        wanted = f"a number of at least {least:g} and " + (f"below {below:g}" if below <= most else f"at most {most:g}")
        fits = lambda v: type(v) in (int, float) and least <= v <= most and v < below  # noqa: E731
        return float(self._read(key, default, wanted, fits))

    def flag(self, key: str, default: bool) -> bool:
        return self._read(key, default, "true or false", lambda v: type(v) is bool)

    def choice(self, key: str, default: str | None, known: Mapping[str, str]) -> str:
        """What `known` gives for the text of `key`."""
        named = self._read(key, default, f"one of {', '.join(sorted(known))}", lambda v: isinstance(v, str))
        if named not in known:
            raise self.error(key, "is not supported", f"supported: {', '.join(sorted(known))}")
        return known[named]

    def texts(self, key: str) -> list[str]:
        """The texts listed at `key`; none when it is absent."""
        fits = lambda v: isinstance(v, list) and all(isinstance(text, str) for text in v)  # noqa: E731
        return self._read(key, [], "a list of texts", fits)

    def section(self, key: str) -> "Keys":
        """The keys below `key`; none when it is absent."""
        content = self._read(key, {}, "a section with keys", lambda v: isinstance(v, dict))
        return Keys(content, self.file, f"{self.section_name}{key}.")


def check_width(keys: Keys, heads_key: str, heads: int, head_dim: int) -> None:
    """Raise UserError where so many heads of `head_dim` are wider than a layer may be."""
    if heads * head_dim > WIDTH:
        reason = f"{keys.file}: heads of {head_dim} features make {heads * head_dim}, at most {WIDTH} are possible"
        raise UserError(heads_key, heads, reason, f"{heads_key}: at most {max(1, WIDTH // head_dim)}")


def check_divides(keys: Keys, key: str, value: int, divisor_key: str, divisor: int) -> None:
    """Raise UserError, with the nearest values that do, unless the value of `key` divides by that of `divisor_key`."""
    if value % divisor:
        hint = f"{key}: {nearest(value, divisor)}"
        raise UserError(key, value, f"{keys.file}: does not divide by {divisor_key} = {divisor}", hint)


def check_no_window(keys: Keys) -> None:
    """Raise UserError where Qwen's keys ask for attention within a window in any layer."""
    if keys.flag("use_sliding_window", False):
        raise keys.error("use_sliding_window", "attention within a window is not built", "use_sliding_window: false")
    if others := sorted(set(keys.texts("layer_types")) - {"full_attention"}):
        raise keys.error("layer_types", f"layers of kind {others[0]} are not built", "all must be full_attention")


def rope_config(keys: Keys, max_positions: int) -> RopeConfig:
    """Rotary settings in either form: `rope_scaling` beside `rope_theta`, or all in `rope_parameters`."""
    rope = keys.section("rope_scaling" if keys.content.get("rope_scaling") else "rope_parameters")
    nested = [key for key, value in rope.content.items() if isinstance(value, dict)]
    if nested:
        raise rope.error(nested[0], "settings of their own for some layers are not built")
    for place in (rope, keys):
        if place.number("partial_rotary_factor", 1.0) != 1.0:
            raise place.error("partial_rotary_factor", "rotating a part of each head is not built", "1.0")
    theta = rope.number("rope_theta", keys.number("rope_theta", 10000.0))
    kind = rope.choice("rope_type" if "rope_type" in rope.content else "type", "default", ROPE_TYPES)
    if kind == "default":
        return RopeConfig(theta)
    original = rope.size("original_max_position_embeddings", max_positions)
    config = RopeConfig(
        theta,
        rope.number("factor"),
        rope.number("low_freq_factor"),
        rope.number("high_freq_factor"),
        keys.size("original_max_position_embeddings", original),
    )
    if config.high_freq_factor <= config.low_freq_factor:
        raise rope.error("high_freq_factor", f"is not above low_freq_factor = {config.low_freq_factor:g}")
    return config
