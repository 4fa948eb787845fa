"""One layout against one process, on every rank: numbers in float64 and in the training dtype, and traffic."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch

from tessera.config.schema import TrainConfig
from tessera.core import collectives
from tessera.core.collectives import Recorder, gathered
from tessera.core.mesh import Mesh
from tessera.layout.parallel import Parallel
from tessera.layout.streams import residual_layout
from tessera.plan.traffic import Transfer, step_transfers, totals
from tessera.train.settings import compute_dtype, parallel_for
from tessera.verify.cases import Case, in_miniature
from tessera.verify.compare import Comparison, Traffic, compare
from tessera.verify.diagnose import diagnose
from tessera.verify.inject import APART, Omission, Program, omissions
from tessera.verify.problem import Problem
from tessera.verify.steps import StepsTaken, shape_of, take

EXACT = torch.float64


@dataclass(frozen=True)
class TrafficCheck:
    """Collectives of one kind on one axis in a step: calls of rank 0, bytes that the ranks receive, and the formula's.

    `received` are the least and most of any rank; `ranks` are those whose calls or bytes are not the formula's.
    """

    axis: str
    kind: str
    calls: int
    received: tuple[int, int]
    formula_calls: int
    formula_received: tuple[int, int]
    ranks: tuple[int, ...] = ()


@dataclass
class Result:
    """What was found of one layout, the same on every rank; `diagnosis` says what is wrong, if anything is."""

    name: str
    comparisons: list[Comparison]
    traffic: list[TrafficCheck]
    diagnosis: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not any(c.findings for c in self.comparisons) and not any(check.ranks for check in self.traffic)


class Checker:
    """Checks layouts one after another on this rank, all of which make the same calls.

    Keeps meshes, whose groups cost, and on rank 0 the references, which layouts share.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._meshes: dict[tuple[int, ...], Mesh] = {}
        self._references: dict[tuple[Problem, torch.dtype, torch.dtype], StepsTaken] = {}
        self._last: tuple[Case, Program] | None = None

    def mesh(self, config: TrainConfig) -> Mesh:
        """The mesh of a config's layout."""
        key = tuple(config.mesh_sizes.values())
        if key not in self._meshes:
            self._meshes[key] = Mesh(config.mesh_sizes, self.device)
        return self._meshes[key]

    def check(self, case: Case, omission: Omission | None = None) -> Result:
        """Run the layout of `case` beside one process, without one collective of the first step if one is given."""
        mesh, compute = self.mesh(case.config), compute_dtype(case.config, self.device)
        leave_out = omission and self._program(case).place(omission)
        comparisons: list[Comparison] = []
        for dtype, computed in ((EXACT, EXACT), (torch.float32, compute)):
            parallel = self._layout(case, dtype, computed)
            recorder, noise = Recorder(leave_out), comparisons[0].noise if comparisons else None
            comparisons.append(self._compare(case, parallel, recorder, noise))
            traffic = _checks(collectives.totals(recorder.records), formula(case, parallel), mesh)
        result = Result(case.name, comparisons, traffic)
        if comparisons[0].findings and case.full:
            small = self.check(in_miniature(case))
            result.diagnosis = small.diagnosis or [
                "in miniature the layout is right: the fault shows at full size alone"
            ]
        elif comparisons[0].findings:
            exact, alone = self._layout(case, EXACT, EXACT), self._alone(EXACT, EXACT)
            result.diagnosis = diagnose(case, exact, alone, leave_out)
        return result

    def omissions(self, case: Case) -> list[Omission]:
        """Every collective of a step of `case`."""
        return omissions(gathered(self._program(case), case.config.world_size))

    def catches(self, case: Case, omission: Omission) -> bool:
        """Whether one step in float64 without this collective is seen to be wrong."""
        short = replace(case, problem=replace(case.problem, steps=1))
        recorder = Recorder(self._program(case).place(omission))
        return bool(self._compare(short, self._layout(case, EXACT, EXACT), recorder).findings)

    def _compare(
        self, case: Case, parallel: Parallel, recorder: Recorder, noise: frozenset[str] | None = None
    ) -> Comparison:
        taken = take(case.problem, parallel, case.config, recorder)
        reference = self._reference(case, parallel.dtype, parallel.compute) if parallel.mesh.rank == 0 else None
        return compare(taken, reference, parallel.mesh, parallel.compute, noise)

    def _program(self, case: Case) -> Program:
        """What this rank's first step hands to torch.distributed."""
        if self._last is None or self._last[0] is not case:
            recorder = Recorder()
            take(replace(case.problem, steps=1), self._layout(case, EXACT, EXACT), case.config, recorder)
            self._last = case, Program.of(recorder)
        return self._last[1]

    def _layout(self, case: Case, dtype: torch.dtype, compute: torch.dtype) -> Parallel:
        return parallel_for(case.config, case.problem.model, self.mesh(case.config), dtype=dtype, compute=compute)

    def _alone(self, dtype: torch.dtype, compute: torch.dtype) -> Parallel:
        return Parallel(Mesh(device=self.device, rank=0), residual_layout(True), dtype, compute)

    def _reference(self, case: Case, dtype: torch.dtype, compute: torch.dtype) -> StepsTaken:
        key = (case.problem, dtype, compute)
        if key in self._references:
            return self._references[key]
        reference = take(case.problem, self._alone(dtype, compute), case.config)
        if not case.full:  # those are large
            self._references[key] = reference
        return reference


def formula(case: Case, parallel: Parallel) -> Traffic:
    """What the closed form says that this rank calls and receives in a step."""
    return totals(_transfers(case, parallel))


def _transfers(case: Case, parallel: Parallel) -> list[Transfer]:
    return step_transfers(case.problem.model, shape_of(case.problem, parallel, case.config), parallel)


def count_collectives(case: Case) -> int:
    """How many collectives of a step can be left out: by formula, for which no rank has to run."""
    meshes = [Mesh(case.config.mesh_sizes, rank=rank) for rank in range(case.config.world_size)]
    model = case.problem.model
    everyone = [_transfers(case, parallel_for(case.config, model, mesh, dtype=torch.float32)) for mesh in meshes]
    together = ([each for each in own if each.kind not in APART] for own in everyone)
    apart: Counter[tuple[str, str]] = Counter()
    for own in everyone:
        apart |= Counter({which: n for which, (n, _) in totals(own).items() if which[1] in APART})
    same = sum(max(each.times * each.calls for each in of_ranks) for of_ranks in zip(*together, strict=True))
    return same + apart.total()


def _checks(own: Traffic, expected: Traffic, mesh: Mesh) -> list[TrafficCheck]:
    everyone: list[tuple[Traffic, Traffic]] = gathered((own, expected), mesh.world)
    keys = {key for pair in everyone for traffic in pair for key in traffic}
    return [_check(*key, [(c.get(key, (0, 0)), e.get(key, (0, 0))) for c, e in everyone]) for key in sorted(keys)]


def _check(axis: str, kind: str, by_rank: list[tuple[tuple[int, int], tuple[int, int]]]) -> TrafficCheck:
    def extent(values: Iterable[int]) -> tuple[int, int]:
        values = list(values)
        return min(values), max(values)

    calls, expected = by_rank[0][0][0], by_rank[0][1][0]
    received, due = extent(c[1] for c, _ in by_rank), extent(e[1] for _, e in by_rank)
    ranks = tuple(rank for rank, (c, e) in enumerate(by_rank) if c != e)
    return TrafficCheck(axis, kind, calls, received, expected, due, ranks)
