"""What to turn where a step does not surely fit: as lines, and as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tessera.core.errors import as_yaml
from tessera.models.config import ModelConfig
from tessera.plan.choice import Layout, Training
from tessera.plan.fit import Remedy, fits, memory_remedies, most_that_fits, remedies_together
from tessera.plan.host import room_on_host
from tessera.plan.recommend import Judged


class Advice(NamedTuple):
    """What to turn where a step does not surely fit: `more` bytes too much on the device, `on_host` in host memory.

    `together`: the keys of several changes, and the peak with all of them, where none alone is enough.
    """

    judged: Judged
    more: int
    on_host: int
    remedies: list[Remedy]
    together: tuple[dict[str, Any], int] | None

    @property
    def json(self) -> dict[str, Any]:
        """Nothing where the step fits."""
        if self.judged.verdict == "fits":
            return {}
        keys, peak = self.together or (None, None)
        several = None if keys is None else {"keys": keys, "peak_bytes": peak}
        excess = {"device_bytes_too_many": self.more, "host_bytes_too_many": self.on_host}
        return {"advice": excess | {"remedies": [each._asdict() for each in self.remedies], "together": several}}

    @property
    def lines(self) -> list[str]:
        """A line each; none where the step fits."""
        told = []
        if self.on_host > 0:
            told.append(
                f"does not fit, {gib(self.on_host)} GiB too much for the host: states or activations on the device "
                "(fsdp_config.offload_params, activation_offloading: false), or more devices to share them"
            )
        if self.more > 0:
            told.append(
                f"{self.judged.verdict}, {gib(self.more)} GiB too much to fit surely; to lower the peak, in this order:"
            )
            told += remedy_lines(self.remedies)
        return told if self.together is None else [*told, *_together(*self.together, self.judged)]


def advice_on(model: ModelConfig, layout: Layout, training: Training, judged: Judged) -> Advice:
    """What to turn of `layout`, which was judged so."""
    profile = judged.cluster.profile
    more = judged.bytes - most_that_fits(profile.memory_bytes, judged.buffers)
    on_host = max(0, judged.host_bytes - room_on_host(profile))
    if more <= 0:
        return Advice(judged, 0, on_host, [], None)
    remedies = memory_remedies(model, layout, training, profile)
    enough = more <= max((each.saved for each in remedies), default=0)
    together = None if enough else remedies_together(model, layout, training, profile, judged.buffers)
    return Advice(judged, more, on_host, remedies, together)


def remedy_lines(remedies: Sequence[Remedy]) -> list[str]:
    """What lowers the peak, a line each."""
    return [
        f"  {_as_keys(each.keys)} saves {gib(each.saved)} GiB ({each.meaning})"
        if not each.refused
        else f"  {_as_keys(each.keys)} cannot be: {each.refused}"
        for each in remedies
    ]


_MORE = "tessera plan MODEL compares every layout; else a smaller model, shorter rows, or more devices"


def _together(keys: Mapping[str, Any], peak: int, judged: Judged) -> list[str]:
    """What several changes leave of the peak, where none alone is enough."""
    if not keys:
        return [f"no change of these keys is enough: {_MORE}"]
    enough = fits(peak, judged.cluster.profile.memory_bytes, judged.buffers) == "fits"
    end = "which fits" if enough else f"still too much: {_MORE}"
    return [f"none of these alone is enough; with {_as_keys(keys)} the peak is {gib(peak)} GiB, {end}"]


def _as_keys(keys: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {as_yaml(value)}" for key, value in keys.items())


def gib(size: float) -> str:
    return f"{size / 2**30:.1f}"
