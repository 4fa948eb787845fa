"""Schedules and geometries side by side: `python benchmarks/geometries.py`, some minutes.

A stack of feed-forward layers, x + W₂ gelu(W₁ x), forward and backward, in float32, one thread a rank. All contenders
of a world live in the same processes and take turns, so that whatever else the machine does falls on all alike; each is
first held against one process. Reported: the best wall time of a step (the slowest rank's), the CPU time of all ranks
in the step with the least of it, and the bytes and calls handed to torch.distributed, as c10d sees them.

The part `auto` does the same with the trainer's own step of a decoder whose layers have these sizes, under each
schedule that `auto` chooses from; then `auto` measures two layers of it, in the same processes, and chooses.
"""

import argparse
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.update(OMP_NUM_THREADS="1", TORCH_CPP_LOG_LEVEL="ERROR", TORCH_LOGS="-all")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contenders.dtensor_mlp import Stack as DTensorStack
from benchmarks.measure import LiveTensors
from benchmarks.report import describe_machine
from tessera.config.schema import TrainConfig
from tessera.core import device as devices
from tessera.core.mesh import Mesh
from tessera.engine.gradients import sum_replicated_gradients
from tessera.engine.optimizer import build_optimizer
from tessera.engine.step import Step
from tessera.layout.parallel import Parallel
from tessera.layout.streams import residual_layout
from tessera.models.config import ModelConfig
from tessera.models.decoder import Decoder
from tessera.nn.linear import ColumnParallelLinear, RowParallelLinear
from tessera.nn.parameter import gather_whole, named_specs, to_local
from tessera.plan.tune import Candidate, beside_fastest, candidates, tune
from tessera.product.overlap import FORWARD
from tessera.sizes.schedule import Schedule

LAYERS = 3
BATCH = 4  # sequences of a decoder's micro-batch
Sizes = dict[str, int]
Timed = tuple[list[float], list[float], int, int]  # on one rank: walls, CPU seconds, calls, bytes


class Shape(NamedTuple):
    """Tokens, residual features, hidden features."""

    tokens: int
    features: int
    hidden: int

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.features} → {self.hidden}"


class Contender(NamedTuple):
    """A row of the table: Tessera with this schedule, or torch's DTensor (None)."""

    name: str
    sizes: Sizes
    schedule: Schedule | None


class Words(NamedTuple):
    """A decoder's micro-batch."""

    input_ids: Tensor
    targets: Tensor
    first_row: int = 0

    @property
    def valid(self) -> int:
        return self.targets.numel()


class Result(NamedTuple):
    """Best wall seconds, least CPU seconds of all ranks, and one rank's calls and bytes in a step."""

    wall: float
    cpu: float
    calls: int
    payload: int


SHAPES = [Shape(512, 512, 2048), Shape(2048, 512, 2048), Shape(512, 1024, 4096)]
AHEAD = {"prefetch": True, "defer": True}
GRID = {"row": 2, "col": 2}
SCHEDULES = [
    Contender("gather", GRID, Schedule(**AHEAD)),
    Contender("gather, kept", GRID, Schedule(keep=True, **AHEAD)),
    Contender("gather, nothing early or late", GRID, Schedule(overlap=False)),
    Contender("slices 2", GRID, Schedule(slices=2)),
    Contender("slices 4", GRID, Schedule(slices=4)),
    Contender("summa", GRID, Schedule("summa")),
    Contender("cannon", GRID, Schedule("cannon")),
]
MESHES: dict[str, Sizes] = {
    "2d 2×2": GRID,
    "2.5d 2×1×2": {"depth": 2, "col": 2},
    "3d 2×1×2": {"inner": 2, "col": 2},
    "2.5d 2×2×2": {"depth": 2, "row": 2, "col": 2},
    "3d 2×2×2": {"inner": 2, "row": 2, "col": 2},
}
AGAINST_DTENSOR = [
    contender
    for name, sizes in MESHES.items()
    for contender in (
        Contender(f"{name}, Tessera", sizes, Schedule(keep=True, **AHEAD)),
        Contender(f"{name}, Tessera, gathered again", sizes, Schedule(**AHEAD)),
        Contender(f"{name}, DTensor", sizes, None),
    )
]


class TesseraStack(nn.Module):
    """The same layers as Tessera's own; takes and gives this rank's residual shard."""

    def __init__(self, weights: list[tuple[Tensor, Tensor]], mesh: Mesh, schedule: Schedule) -> None:
        super().__init__()
        self.parallel = Parallel(mesh, residual_layout(True, schedule.name), schedule=schedule)
        self.layers = nn.ModuleList()
        for up, down in weights:
            pair = ColumnParallelLinear(*up.T.shape, self.parallel), RowParallelLinear(*down.T.shape, self.parallel)
            self.layers.append(nn.ModuleList(pair))
            with torch.no_grad():
                for layer, whole in zip(pair, (up, down), strict=True):
                    ((_, parameter, spec),) = named_specs(layer)
                    to_local(parameter).copy_(whole[spec.local_slices(mesh)])

    def forward(self, x: Tensor) -> Tensor:
        self.parallel.overlap.begin(FORWARD)  # and its backward with it
        for up, down in self.layers:  # type: ignore[misc]
            x = x + down(F.gelu(up(x)))
        return x


def draw(shape: Shape) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    normal = lambda *size: torch.randn(*size, generator=generator) * 0.02  # noqa: E731
    weights = [(normal(shape.hidden, shape.features), normal(shape.features, shape.hidden)) for _ in range(LAYERS)]
    return 50 * normal(shape.tokens, shape.features), weights


def alone(x: Tensor, weights: list[tuple[Tensor, Tensor]]) -> Tensor:
    for up, down in weights:
        x = x + F.gelu(x @ up.T) @ down.T
    return x


def prepare(contender: Contender, shape: Shape, meshes: dict[str, Mesh]) -> tuple[nn.Module, Callable[[], None]]:
    """The contender's stack and its step, after its output has been held against one process."""
    whole, weights = draw(shape)
    mesh = meshes.setdefault(str(contender.sizes), Mesh(contender.sizes))
    residual = residual_layout(True, contender.schedule.name if contender.schedule else "gather")
    x = whole.chunk(mesh.size(residual.tokens))[mesh.index(residual.tokens)]
    x = x.chunk(mesh.size(residual.features), 1)[mesh.index(residual.features)].contiguous().requires_grad_()
    if contender.schedule is None:
        stack: nn.Module = DTensorStack(weights, contender.sizes)
    else:
        stack = TesseraStack(weights, mesh, contender.schedule)

    def step() -> None:
        stack.zero_grad()
        stack(x).square().sum().backward()
        if contender.schedule is not None:  # DTensor has summed over depth in its own backward
            sum_replicated_gradients(stack, mesh)

    with torch.no_grad():
        y = gather_whole(stack(x).detach(), tuple(whole.shape), (residual.tokens, residual.features), mesh)
        difference = (y - alone(whole, weights)).norm() / y.norm()
    if difference > 1e-5:
        raise AssertionError(f"{contender.name} differs from one process by {difference:.1e}")
    return stack, step


def compare(contenders: list[Contender], shape: Shape, rounds: int, meshes: dict[str, Mesh]) -> list[Timed]:
    """On one rank: the figures of each contender."""
    stacks = [prepare(contender, shape, meshes) for contender in contenders]
    return take_turns([step for _, step in stacks], rounds)


def take_turns(steps: list[Callable[[], Any]], rounds: int) -> list[Timed]:
    """On one rank: the figures of each step."""
    walls: list[list[float]] = [[] for _ in steps]
    cpus: list[list[float]] = [[] for _ in steps]
    for number in range(rounds + 2):
        for place in range(len(steps)):
            index = (place + number) % len(steps)
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            steps[index]()
            walls[index].append(time.perf_counter() - wall)
            cpus[index].append(time.process_time() - cpu)
    answers = []
    for step, wall_times, cpu_times in zip(steps, walls, cpus, strict=True):
        with LiveTensors() as seen:
            step()
        calls, payload = dict(seen.calls), dict(seen.payload)
        calls.pop("recv", None), payload.pop("recv", None)  # the other half of a send
        answers.append((wall_times[2:], cpu_times[2:], sum(calls.values()), sum(payload.values())))
    return answers


def decoder_like(shape: Shape) -> ModelConfig:
    """GPT-2 with layers of these sizes, heads of 64 and few words."""
    head_dim = min(64, shape.features // 4)
    heads = shape.features // head_dim
    return ModelConfig(
        family="gpt2",
        vocab_size=256,
        hidden_size=shape.features,
        num_layers=LAYERS,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        ffn_size=shape.hidden,
        max_positions=shape.tokens // BATCH,
        norm="layer",
        activation="gelu_tanh",
        gated=False,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
    )


def train_step(candidate: Candidate, shape: Shape) -> Callable[[], float]:
    """The trainer's step of one candidate's decoder, on the same words each time; gives its loss."""
    decoder = Decoder(candidate.model, candidate.parallel)
    decoder.initialize(seed=0)
    optimizer = build_optimizer(decoder, "adamw_torch_fused", (0.9, 0.999), 1e-8, 0.0)
    step = Step(decoder, optimizer, max_grad_norm=1.0)
    size = (2, BATCH, shape.tokens // BATCH)
    words = Words(*torch.randint(candidate.model.vocab_size, size, generator=torch.Generator().manual_seed(0)))
    return lambda: step([words], 0, 1e-4).loss


def choose(
    shape: Shape, keep: bool, rounds: int, meshes: dict[str, Mesh]
) -> tuple[list[str], list[Timed], dict[str, float], str]:
    """On one rank: the candidates' names, the figures of their steps, auto's milliseconds of each, and its choice."""
    settings: dict[str, Any] = {"base_model": "none", "datasets": [{"path": "none"}], "bf16": False}
    settings |= {"micro_batch_size": BATCH, "sequence_len": shape.tokens // BATCH}
    settings |= {"tensor_parallel_mode": "2d", "tensor_parallel_mesh": GRID, "tensor_parallel_keep_gathered": keep}
    config = TrainConfig.model_validate(settings | {"tensor_parallel_schedule": "auto"})
    asked = config, decoder_like(shape), meshes.setdefault(str(GRID), Mesh(GRID)), torch.float32
    every = candidates(*asked)
    steps = [train_step(candidate, shape) for candidate in every]
    first, *others = [step() for step in steps]
    if any(abs(loss / first - 1) > 1e-5 for loss in others):
        raise AssertionError(f"the schedules differ in their loss: {first}, {others}")
    timed = take_turns(steps, rounds)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # measured here and now, and not remembered
        tuning = tune(*asked)
    return [candidate.name for candidate in every], timed, tuning.milliseconds, str(tuning.schedule)


Job = Callable[[dict[str, Mesh]], Any]  # what every rank does, and sends


def serve(rank: int, world: int, store: str, jobs: list[Job], pipe: Any) -> None:
    torch.set_num_threads(1)
    devices.prepare(torch.device("cpu"), tf32=False)  # as a rank of a run, and all contenders alike
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    meshes: dict[str, Mesh] = {}
    for job in jobs:
        pipe.send(job(meshes))
    dist.destroy_process_group()


def run(world: int, jobs: list[Job]) -> list[list[Any]]:
    """What each rank sends of each job."""
    context = multiprocessing.get_context("forkserver")
    pipes, processes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(world):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=serve, args=(rank, world, f"{folder}/store", jobs, theirs)))
            processes[-1].daemon = True
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        found = []
        for number in range(len(jobs)):
            found.append([pipe.recv() for pipe in pipes])
            print(f"{world} ranks, {number + 1} of {len(jobs)}: done", file=sys.stderr, flush=True)
        for process in processes:
            process.join()
    return found


def results_of(ranks: list[list[Timed]]) -> list[Result]:
    """Those of each contender, from what each rank has timed of each."""
    return [_result(list(of_ranks)) for of_ranks in zip(*ranks, strict=True)]


def _result(ranks: list[Timed]) -> Result:
    cpus = [sum(times) for times in zip(*(rank[1] for rank in ranks), strict=True)]
    return Result(min(slowest(ranks)), min(cpus), ranks[0][2], ranks[0][3])


def slowest(ranks: Iterable[Timed]) -> list[float]:
    """One contender's wall of each round: the slowest rank's."""
    return [max(times) for times in zip(*(rank[0] for rank in ranks), strict=True)]


def side_by_side(part: str, shapes: list[Shape], rounds: int) -> list[str]:
    """The schedules, or at so many ranks DTensor beside Tessera."""
    world, title, rows = 4, "Schedules, 2d 2×2", SCHEDULES
    if part != "schedules":
        world, title = int(part), f"Beside DTensor with explicit redistribute, {part} ranks"
        rows = [c for c in AGAINST_DTENSOR if math.prod(c.sizes.values()) == world]
    lines = [f"## {title}", ""]
    found = run(world, [partial(compare, rows, shape, rounds) for shape in shapes])
    for shape, ranks in zip(shapes, found, strict=True):
        lines += [
            f"### {shape}",
            "",
            "| | best wall, ms | CPU of all ranks, ms | calls | MiB |",
            "|---|---|---|---|---|",
        ]
        for contender, r in zip(rows, results_of(ranks), strict=True):
            figures = f"{r.wall * 1e3:.1f} | {r.cpu * 1e3:.1f} | {r.calls} | {r.payload / 2**20:.2f}"
            lines.append(f"| {contender.name} | {figures} |")
        lines.append("")
    return lines


def what_auto_chooses(shapes: list[Shape], rounds: int) -> list[str]:
    """The step of a decoder under each schedule, what `auto` measures of it, and how far its choice is behind.

    Steps are compared within rounds, as `auto` compares what it measures; their best walls, of different rounds, stand
    beside that.
    """
    lines = ["## What `auto` chooses, 2d 2×2: the trainer's step of a decoder of such layers", ""]
    asked = [(shape, keep) for shape in shapes for keep in (False, True)]
    found = run(4, [partial(choose, shape, keep, rounds) for shape, keep in asked])
    for (shape, keep), ranks in zip(asked, found, strict=True):
        names, _, tuned, chosen = ranks[0]
        of_ranks = [rank[1] for rank in ranks]
        steps = [slowest(timed) for timed in zip(*of_ranks, strict=True)]
        beside = dict(zip(names, beside_fastest(list(zip(*steps, strict=True))), strict=True))
        fastest, least, quickest = min(beside, key=lambda name: beside[name]), min(beside.values()), min(tuned.values())
        lines += [f"### {shape}{', copies kept' if keep else ''}", ""]
        lines += ["| | step beside the fastest | its best wall, ms | CPU of all ranks, ms | two layers, by auto | |"]
        lines += ["|---|---|---|---|---|---|"]
        for name, r in zip(names, results_of(of_ranks), strict=True):
            marks = ["fastest step"] * (name == fastest) + ["auto's choice"] * (name == chosen)
            figures = f"{beside[name] / least:.3f} | {r.wall * 1e3:.1f} | {r.cpu * 1e3:.1f}"
            layers = f"{tuned[name] / quickest:.3f}" if name in tuned else "not run"
            lines.append(f"| {name} | {figures} | {layers} | {', '.join(marks)} |")
        lines += ["", f"auto chose {chosen}: {beside[chosen] / least - 1:.1%} behind the fastest step", ""]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--parts",
        default="schedules,auto,4,8",
        help="the schedules; what auto chooses; DTensor beside Tessera at 4, at 8 ranks",
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="one small shape, two rounds: does it run?")
    options = parser.parse_args()
    shapes, rounds = (SHAPES, options.rounds) if not options.quick else ([Shape(64, 64, 128)], 2)
    settings = f"{rounds} rounds, interleaved, after two to warm up; {LAYERS} layers, gloo, one thread a rank, float32"
    lines = [describe_machine("geometries.py", "torch"), f"- {settings}", ""]
    for part in options.parts.split(","):
        lines += what_auto_chooses(shapes, rounds) if part == "auto" else side_by_side(part, shapes, rounds)
        if options.output:  # what is there, should the next part not end
            options.output.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
