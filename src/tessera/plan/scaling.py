"""How the rate of training grows with the number of devices: every geometry, and the best layout, against one device.

    strong scaling   the same rows a step on any number of devices
    weak scaling     rows a step grow with the devices: each has as many as at the largest number of strong scaling
    speed-up         tokens per second over those of the baseline
    baseline         what one such device with unlimited memory is predicted to reach with the rows of strong scaling

A geometry takes all devices as its tensor axes where the model divides; else the largest number of them that it
divides over, with FSDP around it. Of its meshes it takes those nearest to the shape that it is named for: a square grid
(2D), such a grid at most as often as it is wide (2.5D), a cube (3D). A point whose mesh is not of that shape over all
devices is marked. Where no micro-batch fits the devices' memory, a point is predicted with unlimited memory, and
marked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tessera.core.axes import MODEL_AXES
from tessera.core.errors import UserError
from tessera.models.config import ModelConfig
from tessera.plan.candidates import Found
from tessera.plan.choice import Training
from tessera.plan.machine import Cluster
from tessera.plan.on_mesh import TOO_LARGE, fastest_found, fastest_on, plainest, without_limit
from tessera.plan.recommend import Judged, judge
from tessera.plan.scale import every_mesh
from tessera.plan.search import search
from tessera.sizes.numbers import divisors_of

GEOMETRIES = ("1D", "2D", "2.5D", "3D")
BEST = "best layout"
CURVES = (*GEOMETRIES, BEST)

QUOTED: Mapping[str, Mapping[int, float]] = {
    "1D": {8: 7.2, 16: 13.8, 32: 24.1, 64: 35.2, 128: 42.1, 256: 45.8},
    "2D": {8: 7.5, 16: 14.9, 32: 28.3, 64: 52.1, 128: 89.4, 256: 142.7},
    "2.5D": {8: 7.8, 16: 15.2, 32: 29.1, 64: 56.8, 128: 102.3, 256: 178.9},
    "3D": {8: 7.6, 16: 15.0, 32: 29.7, 64: 58.4, 128: 108.2, 256: 201.3},
}
"""Speed-ups by number of devices that are often quoted for a model of 175B parameters; no source says how they were
measured, at what batch, or against what."""


@dataclass(frozen=True)
class Point:
    """A curve at a number of devices. `exact`: all of them are tensor axes in the shape that names the geometry."""

    curve: str
    judged: Judged
    exact: bool
    baseline: Judged

    @property
    def devices(self) -> int:
        return self.judged.devices

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return self.judged.training.global_batch

    @property
    def fits(self) -> bool:
        """Whether the devices' memory holds it; if not, it was predicted with unlimited memory."""
        return self.judged.verdict != TOO_LARGE

    @property
    def speed_up(self) -> float:
        """Rows a second over those of the baseline."""
        return self.judged.tokens_per_second / self.baseline.tokens_per_second

    @property
    def efficiency(self) -> float:
        """The speed-up as a share of the ideal one."""
        return self.speed_up / self.devices

    @property
    def mesh(self) -> str:
        """Sizes above 1 of the mesh, e.g. "shard 2 × row 4 × col 4"."""
        assert self.judged.layout is not None
        sizes = self.judged.layout.sizes
        return " × ".join(f"{axis} {n}" for axis, n in sizes.items() if n > 1) or "one device"

    @property
    def quoted(self) -> float | None:
        """What is often quoted for this geometry at this number of devices."""
        return QUOTED.get(self.curve, {}).get(self.devices)

    @property
    def quoted_mfu(self) -> float | None:
        """The MFU that the quoted speed-up would need, were the baseline ours."""
        return None if self.quoted is None else self.quoted / self.devices * self.baseline.mfu

    @property
    def losses(self) -> dict[str, float]:
        """Of each term of the step: what it takes beyond its ideal part of the baseline, as a share of the step."""
        share = self.rows / self.baseline.training.global_batch / self.devices
        ideal = self.baseline.time.terms
        terms = self.judged.time.terms
        return {name: (terms[name] - share * ideal.get(name, 0.0)) / self.judged.seconds for name in terms}

    @property
    def largest_loss(self) -> str:
        """The term that costs most against the ideal line, e.g. "exposed along col 31%"."""
        name, share = max(self.losses.items(), key=lambda item: item[1])
        again = self.judged.layout is not None and self.judged.layout.recompute != "false"
        words = f"{name} (recompute)" if name == "products" and again else name
        return f"{words} {share:.0%}" if share >= 0.005 else "nothing"


@dataclass(frozen=True)
class Study:
    """Points of strong and weak scaling, by number of devices and curve, and the baseline that they are over.

    `missing` says of each number of devices and curve without a point why there is none.
    """

    name: str
    cluster: Cluster
    training: Training
    baseline: Judged
    strong: Sequence[Point]
    weak: Sequence[Point]
    missing: Sequence[str]

    @property
    def devices(self) -> list[int]:
        """The numbers of devices that are compared."""
        return sorted({point.devices for point in (*self.strong, *self.weak)})


def scaling_study(name: str, model: ModelConfig, cluster: Cluster, training: Training, devices: Sequence[int]) -> Study:
    """Strong scaling of `training` over each number of `devices`, and weak scaling up to its rows.

    Raises UserError where rows a step are fewer than the devices that would share them in weak scaling.
    """
    most = max(devices)
    if training.global_batch % most:
        near = max(most, round(training.global_batch / most) * most)
        reason = f"weak scaling gives each of {most} devices equally many rows, which does not divide"
        raise UserError("--global-batch", training.global_batch, reason, f"for example {near}")
    alone = fastest_on(model, {}, without_limit(cluster.of(1)), training)
    assert alone is not None  # one device cuts nothing
    strong, weak, missing = list[Point](), list[Point](), list[str]()
    for number in sorted(devices):
        rows = training.global_batch * number // most
        own = _points(model, cluster.of(number), training, alone, missing)
        strong += own
        same = rows == training.global_batch
        fewer = Training(training.sequence_len, rows, training.dtype, training.stored)
        weak += own if same else _points(model, cluster.of(number), fewer, alone, missing)
    return Study(name, cluster, training, alone, strong, weak, missing)


def _points(model: ModelConfig, cluster: Cluster, training: Training, alone: Judged, missing: list[str]) -> list[Point]:
    """One number of devices: every geometry, and the best layout of all."""
    where = f"{cluster.devices} devices with {training.global_batch} rows a step"
    found, points = search(model, cluster, training, savers=False), []
    for geometry in GEOMETRIES:
        judged, exact = nearest_of(geometry, model, cluster, training, found)
        if judged is None:
            missing.append(f"{where}, {geometry}: no mesh divides the model and the batch")
        else:
            points.append(Point(geometry, judged, exact, alone))
    best = plainest(found)
    if best is None:
        missing.append(f"{where}, {BEST}: nothing fits the devices' memory")
        return points
    return [*points, Point(BEST, judge(model, best, cluster, training), True, alone)]


def nearest_of(
    geometry: str, model: ModelConfig, cluster: Cluster, training: Training, found: Found
) -> tuple[Judged | None, bool]:
    """The fastest mesh of a geometry on all devices that is nearest to its shape, and whether it is of that shape.

    `found`: what the search has for these devices and rows.
    """
    for tensor in reversed(divisors_of(cluster.devices)):
        around = {"shard": cluster.devices // tensor} if tensor < cluster.devices else {}
        for distance, meshes in nearest_meshes(geometry, tensor):
            judged = _fastest_of([around | mesh for mesh in meshes], model, cluster, training, found)
            if judged is not None:
                return judged, tensor == cluster.devices and not any(distance)
    return None, False


def nearest_meshes(geometry: str, tensor: int) -> list[tuple[tuple[float, ...], list[dict[str, int]]]]:
    """The meshes of a geometry with so many tensor ranks by their distance from its shape, the nearest first."""
    by_distance: dict[tuple[float, ...], list[dict[str, int]]] = {}
    for mesh in every_mesh(tensor):
        distance = _distance(geometry, mesh.axes)
        if distance is not None:
            by_distance.setdefault(distance, []).append(mesh.axes)
    return sorted(by_distance.items())


def _fastest_of(
    meshes: Sequence[Mapping[str, int]], model: ModelConfig, cluster: Cluster, training: Training, found: Found
) -> Judged | None:
    """The fastest of them that fits; where none does the fastest with unlimited memory; None where none divides."""
    known = [(mesh, *fastest_found(found, mesh)) for mesh in meshes]
    fitting = [judge(model, layout, cluster, training) for _, _, layout in known if layout is not None]
    if fitting:
        return min(fitting, key=lambda judged: judged.seconds)
    too_large = [fastest_on(model, mesh, cluster, training) for mesh, divides, _ in known if divides]
    return min(filter(None, too_large), key=lambda judged: judged.seconds, default=None)


def _distance(geometry: str, axes: Mapping[str, int]) -> tuple[float, ...] | None:
    """How far a mesh is from the shape of a geometry, in doublings of a side: zeros for the shape itself.

    None: the mesh has an axis that the geometry lacks.
    """
    inner, depth, row, col = (axes[axis] for axis in MODEL_AXES)
    uneven = max(row, col) / min(row, col) - 1
    if geometry == "1D":
        return (0.0,) if inner == depth == row == 1 else None
    if geometry == "2D":
        return (uneven,) if inner == depth == 1 else None
    if geometry == "2.5D":
        alone = inner * depth * row * col == 1
        return (float(depth == 1 and not alone), uneven) if inner == 1 and depth <= min(row, col) else None
    return (max(inner, row, col) / min(inner, row, col) - 1,) if depth == 1 else None
