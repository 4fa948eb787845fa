"""What tables that people quote are compared with: searches of the same models on the same devices.

What is quoted has no source, no batch and no sequence length in most cases: each table says what we assume. Layouts
with stages of a pipeline are by formula (plan/on_mesh.py). Which layout for which model is in quoted_layouts.py, how
far and how fast in quoted_rates.py; docs/quoted-tables.md is the page that holds them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from tessera.models.config import ModelConfig
from tessera.models.shapes import shape_of
from tessera.plan.candidates import Found
from tessera.plan.choice import Layout, Training
from tessera.plan.machine import Cluster
from tessera.plan.on_mesh import fastest_found, fastest_on, plainest, without_limit
from tessera.plan.recommend import Judged, judge
from tessera.plan.search import search

CLUSTER = "Nx8xA100-80"
GPT_STEP = Training(2048, 512)
LLAMA_STEP = Training(4096, 256)
MISSING = "—"
"""The cell of what does not fit or does not divide."""


@dataclass(frozen=True)
class QuotedTable:
    """A table: what is quoted, what is assumed, and ours. `rows` are cells in the order of `headings`."""

    title: str
    quoted: str
    assumed: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    says: str


class Searches:
    """Searches of models on numbers of devices, each made once."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._found: dict[tuple[str, int, Training], Found] = {}
        self._alone: dict[tuple[str, Training], Judged] = {}

    def found(self, name: str, devices: int, training: Training) -> Found:
        """All layouts of so many devices."""
        key = (name, devices, training)
        if key not in self._found:
            self._found[key] = search(shape_of(name), self.cluster.of(devices), training, savers=False)
        return self._found[key]

    def best(self, name: str, devices: int, training: Training) -> Judged | None:
        """The fastest layout that fits; None where nothing does."""
        layout = plainest(self.found(name, devices, training))
        return None if layout is None else judge(shape_of(name), layout, self.cluster.of(devices), training)

    def on(self, name: str, sizes: Mapping[str, int], training: Training) -> Judged | None:
        """The fastest on this mesh that fits, of a search over all its devices; None where nothing does."""
        devices = prod(sizes.values())
        _, layout = fastest_found(self.found(name, devices, training), sizes)
        return None if layout is None else judge(shape_of(name), layout, self.cluster.of(devices), training)

    def alone(self, name: str, training: Training) -> Judged:
        """One device with unlimited memory: the baseline of shares of the ideal rate."""
        if (name, training) not in self._alone:
            made = fastest_on(shape_of(name), {}, without_limit(self.cluster.of(1)), training)
            assert made is not None  # one device cuts nothing
            self._alone[name, training] = made
        return self._alone[name, training]

    def share(self, name: str, judged: Judged) -> float:
        """The rate as a share of that of as many lone devices with unlimited memory."""
        alone = self.alone(name, judged.training)
        return judged.tokens_per_second / (judged.devices * alone.tokens_per_second)


def percent(share: float) -> str:
    return f"{share:.0%}"


def gib(judged: Judged) -> str:
    doubt = "" if judged.verdict == "fits" else f" ({judged.verdict})"
    return f"{judged.peak.total / 2**30:.0f}{doubt}"


def in_stages(
    searches: Searches, name: str, mesh: Mapping[str, int], stages: int, devices: int, training: Training
) -> Judged | None:
    """The fastest with `stages` by formula and FSDP over the rest of the devices; None where it does not divide."""
    data, rest = divmod(devices, stages * prod(mesh.values()))
    if rest or not data:
        return None
    sizes = ({"shard": data} if data > 1 else {}) | dict(mesh)
    return fastest_on(shape_of(name), sizes, searches.cluster.of(devices), training, stages)


def smallest_on(model: ModelConfig, sizes: Mapping[str, int], cluster: Cluster, training: Training) -> Judged:
    """The step of this mesh that holds the least: one row a micro-batch, everything recomputed."""
    data = prod(n for axis, n in sizes.items() if axis in ("replicate", "shard"))
    return judge(model, Layout(sizes, 1, training.global_batch // data, "true"), cluster, training)


def above_one(**sizes: int) -> dict[str, int]:
    """The axes of these sizes that are above 1."""
    return {axis: n for axis, n in sizes.items() if n > 1}


def in_words(training: Training) -> str:
    """What a step is, in words."""
    return f"{training.global_batch} rows of {training.sequence_len} tokens a step"
