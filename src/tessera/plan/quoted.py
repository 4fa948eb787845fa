"""Tables that people quote on parallel training, beside what our model of memory and time says of the same layouts.

What is quoted has no source, no batch and no sequence length in most cases: each table says what we assume. Layouts
with stages of a pipeline are by formula (plan/on_mesh.py). `quoted_tables` makes all of them; the page that holds them
is docs/quoted-tables.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from tessera.models.config import ModelConfig
from tessera.models.shapes import shape_of
from tessera.plan.choice import Layout, Training
from tessera.plan.cluster import cluster_of
from tessera.plan.flops import step_flops
from tessera.plan.machine import Cluster
from tessera.plan.on_mesh import TOO_LARGE, fastest_found, fastest_on, without_limit
from tessera.plan.recommend import Judged, judge
from tessera.plan.scaling import GEOMETRIES, nearest_meshes
from tessera.plan.search import Found, search

CLUSTER = "Nx8xA100-80"
GPT_ROW = Training(2048, 512)
LLAMA_ROW = Training(4096, 256)
MISSING = "—"
HALF = 0.5
"""A geometry is said to scale so far as each device does half of what one alone would."""


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
            self._found[key] = search(shape_of(name), self.cluster.of(devices), training)
        return self._found[key]

    def best(self, name: str, devices: int, training: Training) -> Judged | None:
        """The fastest layout that fits; None where nothing does."""
        found = self.found(name, devices, training)
        if not len(found) or not np.isfinite(found.seconds.min()):
            return None
        return judge(shape_of(name), found.layout(int(np.argmin(found.seconds))), self.cluster.of(devices), training)

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


def _gib(judged: Judged) -> str:
    return f"{judged.peak.total / 2**30:.0f}"


def sharded(searches: Searches) -> QuotedTable:
    """TP × FSDP × HSDP for five sizes of models on 8 and 16 devices."""
    rows = []
    for name in ("7B", "13B", "30B", "70B", "175B"):
        training = GPT_ROW if name == "175B" else LLAMA_ROW
        for devices in (8, 16):
            best = searches.best(name, devices, training)
            asked = [{"shard": devices}, {"replicate": 2, "shard": devices // 2}]
            asked += [{"shard": devices // col, "col": col} for col in (2, 4, 8)]
            ours = [searches.on(name, {axis: n for axis, n in sizes.items() if n > 1}, training) for sizes in asked]
            seconds = [MISSING if each is None or best is None else f"{each.seconds / best.seconds:.2f}" for each in ours]
            told = ("nothing fits", MISSING, MISSING) if best is None else (best.name, percent(best.mfu), _gib(best))
            rows.append([name, str(devices), *told, *seconds])
    return QuotedTable(
        "TP × FSDP × HSDP on 8 and 16 devices",
        "A layout for each of 7B–13B, 30B, 70B and 175B+; for 30B on 8 devices TP 2 × FSDP 4.",
        f"{_words(LLAMA_ROW)}; 175B: {_words(GPT_ROW)}. The last columns: seconds of a step over those of the best "
        f"layout; {MISSING}: does not fit, or does not divide.",
        ("model", "devices", "best layout", "MFU", "GiB", "FSDP", "HSDP 2", "TP 2", "TP 4", "TP 8"),
        rows,
        "Size alone decides nothing: what decides is whether the states fit, and how many tokens a device has to hide the "
        "weights behind. Where FSDP alone fits it is as fast as TP 2 or faster, since at this batch its gathers hide "
        "behind products, and a rank of TP 2 has none of its own to spare. TP enters where a device's rows run out, or "
        "where layers' activations do not fit.",
    )


def pipelined(searches: Searches) -> QuotedTable:
    """GPT of three sizes on 8 to 512 devices: geometry × pipeline."""
    rows = []
    meshes = {"TP 8": {"col": 8}, "2D 4 × 4": {"row": 4, "col": 4}}
    for name in ("1.3B", "6.7B", "175B"):
        for devices in (8, 64, 512):
            best = searches.best(name, devices, GPT_ROW)
            formula = [
                (f"{tensor} × PP {stages} × DP {devices // (stages * prod(mesh.values()))}", made)
                for tensor, mesh in meshes.items()
                for stages in (2, 4, 8)
                if (made := in_stages(searches, name, mesh, stages, devices, GPT_ROW)) and made.verdict != TOO_LARGE
            ]
            fastest = min(formula, key=lambda each: each[1].seconds, default=None)
            row = [name, str(devices)]
            row += ["nothing fits", MISSING] if best is None else [best.name, percent(best.mfu)]
            row += [MISSING, MISSING] if fastest is None else [fastest[0], percent(fastest[1].mfu)]
            rows.append(row)
    return QuotedTable(
        "GPT: geometry × pipeline on 8 to 512 devices",
        "A geometry and a number of pipeline stages for each of GPT 1.3B, 7B and 175B at 8 to 512 devices.",
        f"{_words(GPT_ROW)}. Of pipelines the fastest by formula among TP 8 and 2D 4 × 4, with 2, 4 or 8 stages and FSDP "
        "around; 6.7B is GPT-3's own size.",
        ("model", "devices", "best layout without a pipeline", "MFU", "best with a pipeline, by formula", "MFU"),
        rows,
        "The number of devices alone names no geometry. A pipeline is worth its bubble where weights do not fit, or "
        "where so many devices share so few rows that gathers can no longer hide.",
    )


def in_stages(
    searches: Searches, name: str, mesh: Mapping[str, int], stages: int, devices: int, training: Training
) -> Judged | None:
    """The fastest with `stages` by formula and FSDP over the rest of the devices; None where it does not divide."""
    data, rest = divmod(devices, stages * prod(mesh.values()))
    if rest or not data:
        return None
    sizes = ({"shard": data} if data > 1 else {}) | dict(mesh)
    return fastest_on(shape_of(name), sizes, searches.cluster.of(devices), training, stages)


@dataclass(frozen=True)
class Claim:
    """A layout that is quoted for sizes of models on so many devices, with the share of the ideal rate."""

    sizes: str
    layout: str
    devices: int
    share: str
    model: str
    mesh: Mapping[str, int]
    stages: int
    data: tuple[int, ...]
    training: Training

    @property
    def makes(self) -> list[int]:
        """The devices that its sizes multiply to."""
        return [prod(self.mesh.values()) * self.stages * data for data in self.data]


CLAIMS = (
    Claim("< 10B", "1D TP 4 × DP 2", 8, "85–90%", "7B", {"col": 4}, 1, (2,), LLAMA_ROW),
    Claim("10–100B", "2D 4 × 4 × PP 2–4 × DP 2", 64, "80–85%", "39B", {"row": 4, "col": 4}, 2, (2,), GPT_ROW),
    Claim("10–100B", "2D 4 × 4 × PP 2–4 × DP 2", 64, "80–85%", "39B", {"row": 4, "col": 4}, 4, (2,), GPT_ROW),
    Claim(
        "> 100B", "2.5D / 3D TP 64+ × PP 8+ × DP 2–4", 256, "75–80%", "175B",
        {"depth": 4, "row": 4, "col": 4}, 8, (2, 4), GPT_ROW,
    ),
    Claim(
        "> 100B", "2.5D / 3D TP 64+ × PP 8+ × DP 2–4", 256, "75–80%", "175B",
        {"inner": 4, "row": 4, "col": 4}, 8, (2, 4), GPT_ROW,
    ),
)  # fmt: skip


def by_size(searches: Searches) -> QuotedTable:
    """The layouts that are quoted for less than 10B, to 100B and above."""
    rows = []
    for claim in CLAIMS:
        stages, most = claim.stages, min(claim.makes)
        devices = min(most, claim.devices)
        while most > devices and stages * prod(claim.mesh.values()) > devices:
            stages //= 2
        made = in_stages(searches, claim.model, claim.mesh, stages, devices, claim.training)
        best = searches.best(claim.model, claim.devices, claim.training)
        ours = [MISSING, MISSING, MISSING]
        if made is not None:
            tensor = " × ".join(f"{axis} {n}" for axis, n in claim.mesh.items())
            verdict = " (does not fit)" if made.verdict == TOO_LARGE else ""
            ours = [f"{tensor} × PP {stages}", percent(searches.share(claim.model, made)) + verdict, percent(made.mfu)]
        told = [MISSING, MISSING] if best is None else [best.name, percent(searches.share(claim.model, best))]
        makes = "–".join(map(str, claim.makes))
        rows.append([claim.sizes, claim.layout, str(claim.devices), makes, claim.share, claim.model, *ours, *told])
    return QuotedTable(
        "Layouts by the size of the model",
        "Below 10B 1D TP 4 × DP 2 on 8 devices (85–90%), to 100B 2D 4 × 4 × PP 2–4 × DP 2 on 64 (80–85%), above 2.5D or 3D "
        "TP 64+ × PP 8+ × DP 2–4 on 256 (75–80%).",
        f"7B: {_words(LLAMA_ROW)}; others: {_words(GPT_ROW)}. The percentages name nothing that they are of; we read a "
        "share of the rate of as many lone devices with unlimited memory. Where sizes multiply to more devices than "
        "quoted, we take as many stages as the quoted devices allow.",
        (
            "size", "quoted layout", "quoted devices", "multiplies to", "quoted share", "our model", "ours, of that kind",
            "share", "MFU", "best of the search", "share",
        ),
        rows,
        "TP 64 × PP 8 × DP 2 takes 1,024 devices, not 256, and PP 4 on a 4 × 4 grid with DP 2 takes 128, not 64: the "
        "quoted sizes contradict the quoted numbers of devices.",
    )  # fmt: skip


def limits(searches: Searches) -> QuotedTable:
    """How far each geometry goes with all devices as its tensor axes."""
    name, training = "175B", GPT_ROW
    model = shape_of(name)
    shares: dict[str, dict[int, float]] = {geometry: {} for geometry in GEOMETRIES}
    numbers = (8, 16, 32, 64, 128, 256, 512, 1024)
    for devices in numbers:
        for geometry in GEOMETRIES:
            made = _unlimited(searches, model, geometry, devices, training)
            if made is not None:
                shares[geometry][devices] = searches.share(name, made)
    rows = []
    for geometry, quoted in QUOTED_RANGES.items():
        of = shares[geometry]
        far = [n for n, share in of.items() if share >= HALF]
        fastest = [n for n in numbers if max(GEOMETRIES, key=lambda each: shares[each].get(n, 0.0)) == geometry]
        known = [percent(of[n]) if n in of else MISSING for n in numbers]
        rows.append([geometry, *quoted, *known, str(max(far, default=MISSING)), ", ".join(map(str, fastest)) or "nowhere"])
    return QuotedTable(
        "Geometries by the number of devices",
        "1D for 8–16 devices, 2D for 16–64, 2.5D for 64–256, 3D for 256 and more; they scale to 16, 64, 256 and 1,024.",
        f"{name}; {_words(training)}; unlimited memory, all devices as tensor axes in the shape nearest to the geometry's. "
        f"Cells: share of the rate of as many lone devices. Scales to: the most with at least {percent(HALF)}; "
        f"{MISSING}: the model's heads or widths do not divide.",
        (
            "geometry", "quoted for", "quoted to", *(str(n) for n in numbers), "scales to", "the fastest of four on",
        ),
        rows,
        "A geometry has no limit of its own in devices. 1D ends where heads do not divide, and slows where its group leaves a "
        "machine: that is a matter of links. The others cut tokens over `row`, and weights that move over `row` hide "
        "behind products as long as a rank has tokens enough.",
    )  # fmt: skip


QUOTED_RANGES = {"1D": ("8–16", "16"), "2D": ("16–64", "64"), "2.5D": ("64–256", "256"), "3D": ("256+", "1,024")}


def _unlimited(
    searches: Searches, model: ModelConfig, geometry: str, devices: int, training: Training
) -> Judged | None:
    """The fastest of the meshes nearest to a geometry's shape that the model divides over; None where none does."""
    cluster = without_limit(searches.cluster.of(devices))
    for _, meshes in nearest_meshes(geometry, devices):
        made = [fastest_on(model, mesh, cluster, training) for mesh in meshes]
        if any(made):
            return min(filter(None, made), key=lambda judged: judged.seconds)
    return None


def tensor_sizes(searches: Searches) -> QuotedTable:
    """Which TP × FSDP is the fastest."""
    rows = []
    numbers = (1, 2, 4, 8, 16, 32)
    for name, devices, training in (("70B", 64, LLAMA_ROW), ("175B", 256, GPT_ROW)):
        made = {
            col: searches.on(name, {axis: n for axis, n in (("shard", devices // col), ("col", col)) if n > 1}, training)
            for col in numbers
        }
        fitting = {col: judged.seconds for col, judged in made.items() if judged is not None}
        least = min(fitting.values(), default=1.0)
        cells = [f"{fitting[col] / least:.2f}" if col in fitting else MISSING for col in numbers]
        best = searches.best(name, devices, training)
        told = [MISSING, MISSING] if best is None else [best.name, f"{best.seconds / least:.2f}"]
        rows.append([name, str(devices), *cells, *told])
    return QuotedTable(
        "TP 8 as the best size",
        "TP 8, all devices of a machine, is the best tensor size.",
        f"70B: {_words(LLAMA_ROW)}; 175B: {_words(GPT_ROW)}; FSDP around. Cells: seconds of a step over those of the "
        f"fastest of the row; {MISSING}: does not fit.",
        ("model", "devices", *(f"TP {col}" for col in numbers), "best of the search", "of it"),
        rows,
        "TP above 8 leaves the machine, and that costs: 8 is the largest that is worth asking for on such machines, "
        "not the best. The smallest that fits is.",
    )


LLAMA_70B = {1: (65, 1800), 2: (45, 1600), 4: (30, 1400)}
"""By TP: GB a device and tokens per second and device that are quoted for Llama 70B on 8 × A100-80."""


def llama_70b(searches: Searches) -> QuotedTable:
    """Llama 70B on eight devices of 80 GB."""
    name, rows = "llama-2-70b", []
    model = shape_of(name)
    each_token = step_flops(model, [LLAMA_ROW.sequence_len]) / LLAMA_ROW.sequence_len
    peak = searches.cluster.profile.peak_flops[LLAMA_ROW.dtype]
    for col, (gigabytes, rate) in LLAMA_70B.items():
        sizes = {axis: n for axis, n in (("shard", 8 // col), ("col", col)) if n > 1}
        cells = []
        for stored in ("float32", "bfloat16"):
            least = smallest_on(model, sizes, searches.cluster.of(8), replace(LLAMA_ROW, stored=stored))
            cells.append(f"{least.peak.total / 1e9:.0f}")
        small = fastest_on(model, sizes, searches.cluster.of(8), replace(LLAMA_ROW, stored="bfloat16"))
        fits = small is not None and small.verdict != TOO_LARGE
        told = f"{small.tokens_per_second / 8:.0f}" if fits and small else MISSING
        needs = rate * each_token / 1e12
        rows.append(
            [str(col), str(gigabytes), *cells, str(rate), f"{needs:.0f}", f"{rate / 8:.0f}",
             percent(rate / 8 * each_token / peak), told]
        )  # fmt: skip
    return QuotedTable(
        "Llama 70B on 8 × A100-80 at TP 1, 2 and 4",
        "65, 45 and 30 GB; 1,800, 1,600 and 1,400 tokens a second and device.",
        f"{_words(LLAMA_ROW)}, TP × FSDP over 8 devices. Ours: the least that a device holds (micro-batch 1, everything "
        "recomputed), with AdamW's states in float32 and in bfloat16; tokens/s with bfloat16 states.",
        (
            "TP", "quoted GB", "ours, float32", "ours, bfloat16", "quoted tokens/s a device", "that takes TFLOP/s",
            "read per machine: tokens/s a device", "MFU", "ours, bfloat16",
        ),
        rows,
        f"A device has {peak / 1e12:.0f} TFLOP/s: the quoted rates are those of a machine of eight, not of a device. The "
        "states are cut eight ways in every row, so TP cannot bring 65 GB down to 30.",
    )  # fmt: skip


def smallest_on(model: ModelConfig, sizes: Mapping[str, int], cluster: Cluster, training: Training) -> Judged:
    """The step of this mesh that holds the least: one row a micro-batch, everything recomputed."""
    data = prod(n for axis, n in sizes.items() if axis in ("replicate", "shard"))
    return judge(model, Layout(sizes, 1, training.global_batch // data, "true"), cluster, training)


def shares_of_time(searches: Searches) -> QuotedTable:
    """MFU and the share of communication at 13B and 175B."""
    tp8 = {"shard": 32, "col": 8}
    cases: list[tuple[str, str, str, Callable[[], Judged | None]]] = [
        ("13B", "best layout, 16 devices", "55%", lambda: searches.best("13B", 16, LLAMA_ROW)),
        ("175B", "TP 8 × FSDP 32", "48–52%, 15–25%", lambda: searches.on("175B", tp8, GPT_ROW)),
        (
            "175B", "TP 8 × PP 8 × FSDP 4, by formula", "48–52%, 15–25%",
            lambda: in_stages(searches, "175B", {"col": 8}, 8, 256, GPT_ROW),
        ),
        ("175B", "best layout, 256 devices", "58%, < 10%", lambda: searches.best("175B", 256, GPT_ROW)),
    ]  # fmt: skip
    rows = []
    for name, layout, quoted, make in cases:
        made = make()
        if made is None:
            rows.append([name, layout, quoted, *[MISSING] * 4])
            continue
        moved: Any = sum(made.time.collectives.values())
        shares = (moved / made.seconds, made.time.communication / made.seconds)
        low = f"{made.mfu / (1 + made.band):.0%}–{made.mfu / (1 - made.band):.0%}"
        rows.append([name, f"{layout}: {made.name}", quoted, percent(made.mfu), low, *map(percent, shares)])
    return QuotedTable(
        "MFU and the share of communication",
        "13B: MFU 55%; 175B: 48–52% with 15–25% of the step in communication, or 58% with less than 10%.",
        f"13B: {_words(LLAMA_ROW)}; 175B: {_words(GPT_ROW)}. Communication: all collectives over the step, and those that "
        "nothing hides. The band is the profile's, of a device that was not measured.",
        ("model", "layout", "quoted MFU, communication", "MFU", "its band", "communication", "exposed"),
        rows,
        "MFU of 48–58% is what published A100 runs reach. Rates from published figures are those of products at their best, "
        "so that our MFU lies in the upper part of its band; calibrate with `tessera measure` for your stack.",
    )


TABLES = (sharded, pipelined, by_size, limits, tensor_sizes, llama_70b, shares_of_time)


def quoted_tables() -> list[QuotedTable]:
    """Every table, on the devices of CLUSTER."""
    searches = Searches(cluster_of(CLUSTER))
    return [make(searches) for make in TABLES]


def _words(training: Training) -> str:
    return f"{training.global_batch} rows of {training.sequence_len} tokens a step"
