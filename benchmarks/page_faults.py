"""CPU time, page faults and peak memory of an optimizer step, of this checkout and of another, in turn.

`python benchmarks/page_faults.py --src ../before/src` starts the processes of both; then each runs a few steps, in
turn, for `--rounds` rounds. Rows have one length, or another one in every step (`--rows`), drawn once and shuffled for
every round: so memory falls to pieces if it can. CPU time is user's and system's, of the busiest rank: the least of all
rounds for each step of a turn, and their mean. Faults are the mean of all steps; the peak is the whole process's, from
its start. Linux only.
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
OWN = BENCHMARKS.parent / "src"
VOCABULARIES = (8192, 32000)
SEQUENCE, BATCH, LAYERS = 256, 4, 4
# the model of benchmarks/workload.py, which reads its weights with transformers
SIZES = {"hidden_size": 512, "num_layers": LAYERS, "num_heads": 8, "num_kv_heads": 4, "head_dim": 64, "ffn_size": 1408}


# ------------------------------------------------------------------------------------------- inside a worker


def named(*places: str) -> Any:
    """What the first place that there is holds, each "module:name": an older checkout has it elsewhere."""
    for place in places:
        module, name = place.split(":")
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(f"tessera.{module}"), name)
    raise ImportError(f"none of {', '.join(places)}")


def build(vocabulary: int, rank: int, world: int, store: str) -> Any:
    """A step of AdamW on random weights: takes ids [B, S] and its number."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    named("core.device:prepare", "device:prepare")(torch.device("cpu"), tf32=False)
    if world > 1:
        dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    config = named("models.config:ModelConfig")(
        "llama", vocabulary, max_positions=SEQUENCE, norm_eps=1e-5, rope=named("nn.rope:RopeConfig")(), **SIZES
    )
    mesh = named("core.mesh:Mesh", "mesh:Mesh")({"col": world})
    residual = named("layout.streams:residual_layout", "layout:residual_layout")(True)
    parallel = named("layout.parallel:Parallel", "nn.parameter:Parallel")(mesh, residual)
    model = named("models.decoder:Decoder")(config, parallel)
    model.initialize(seed=1)
    build_optimizer = named("engine.optimizer:build_optimizer", "train.optimizer:build_optimizer")
    optimizer = build_optimizer(model, "adamw_torch_fused", (0.9, 0.999), 1e-8, 0.01)
    step = named("engine.step:Step", "train.step:Step")(model, optimizer, max_grad_norm=1.0)
    batch = named("data.batch:MicroBatch", "data.loader:Batch")
    return lambda ids, number: step([batch(part, part.roll(-1, 1), part.numel()) for part in ids], number, 1e-4)


def serve(vocabulary: int, rank: int, world: int, store: str) -> None:
    """Answers each line of lengths on stdin with a line: of each step CPU milliseconds, faults, loss; and the peak."""
    import torch

    step, number = build(vocabulary, rank, world, store), 0
    for line in sys.stdin:
        steps = []
        for lengths in json.loads(line):
            generator = torch.Generator().manual_seed(number)
            ids = [torch.randint(vocabulary, (BATCH, length), generator=generator) for length in lengths]
            before, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
            loss = step(ids, number).loss
            cpu = 1e3 * (time.process_time() - cpu)
            steps.append((cpu, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, loss))
            number += 1
        peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
        print(json.dumps({"steps": steps, "peak": peak}), flush=True)


# ------------------------------------------------------------------------------------------- the comparison


class Ranks:
    """The processes of one checkout, asleep between turns; what they answered, step by step."""

    def __init__(self, src: Path, vocabulary: int, world: int, store: str) -> None:
        command = [sys.executable, __file__, "--serve", str(vocabulary), str(world), store]
        environment = {**os.environ, "PYTHONPATH": str(src), "OMP_NUM_THREADS": "1"}
        self.processes = [
            subprocess.Popen(
                [*command, str(rank)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for rank in range(world)
        ]
        self.cpu: dict[tuple[int, ...], list[float]] = {}  # by the lengths of a step
        self.faults: list[int] = []
        self.losses: list[float] = []
        self.peak = 0.0

    def run(self, steps: list[list[int]], counted: bool = True) -> None:
        """Steps of micro-batches of these lengths. Raises RuntimeError when a rank ends instead of answering."""
        for process in self.processes:
            print(json.dumps(steps), file=process.stdin, flush=True)
        lines = [process.stdout.readline() for process in self.processes if process.stdout]
        if not all(lines):
            raise RuntimeError("a rank ended")
        answers = [json.loads(line) for line in lines]
        self.peak = max(answer["peak"] for answer in answers)
        for lengths, *ranks in zip(steps, *(answer["steps"] for answer in answers), strict=True):
            cpu, faults, losses = zip(*ranks, strict=True)
            self.losses.append(losses[0])
            if counted:
                self.cpu.setdefault(tuple(lengths), []).append(max(cpu))
                self.faults.append(max(faults))

    @property
    def best_cpu(self) -> float:
        """Milliseconds of a step, the mean over a turn of the least of all rounds."""
        return statistics.mean(map(min, self.cpu.values()))

    def close(self) -> None:
        for process in self.processes:
            if process.stdin:
                process.stdin.close()
            process.wait()


def turn_of(rows: str, steps: int, micro_batches: int) -> list[list[int]]:
    """The lengths of the micro-batches of each step: the longest, or a multiple of 8 from a quarter of it."""
    draw, longest = random.Random(0), SEQUENCE // 8
    return [
        [8 * (longest if rows == "fixed" else draw.randint(longest // 4, longest)) for _ in range(micro_batches)]
        for _ in range(steps)
    ]


def compare(
    sources: dict[str, Path], vocabulary: int, world: int, rows: str, given: argparse.Namespace
) -> dict[str, Ranks]:
    """All checkouts on the same steps, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = {name: Ranks(src, vocabulary, world, f"{folder}/{name}") for name, src in sources.items()}
        try:
            turn, order = turn_of(rows, given.steps, given.micro_batches), list(ranks.values())
            for number in range(given.rounds + 1):
                random.Random(number).shuffle(turn)
                for each in order[:: 1 - 2 * (number % 2)]:
                    each.run(turn, counted=number > 0)
        finally:
            for each in ranks.values():
                each.close()
    return ranks


def table(found: dict[str, Ranks], vocabulary: int, world: int, rows: str) -> list[str]:
    losses = [each.losses for each in found.values()]
    apart = max(abs(a - b) / abs(b) for a, b in zip(losses[0], losses[-1], strict=True))
    return [
        f"| {vocabulary} | {world} | {rows} | {name} | {each.best_cpu:.0f} | {statistics.mean(each.faults):.0f} | "
        f"{each.peak:.0f} | {apart:.0e} |"
        for name, each in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src", type=Path, help="the folder src of another checkout, beside which this one runs")
    parser.add_argument("--vocabularies", nargs="+", type=int, default=VOCABULARIES)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rows", nargs="+", choices=["fixed", "varying"], default=["fixed", "varying"])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each, after one that warms up")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps in one turn")
    parser.add_argument("--micro-batches", type=int, default=1, help="gradients accumulated in one step")
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        vocabulary, world, store, rank = given.serve
        return serve(int(vocabulary), int(rank), int(world), store)
    sources = {"this": OWN} | ({"other": given.src.resolve()} if given.src else {})
    print(f"{date.today()} · {platform.platform()} · {os.cpu_count()} cores · {' '.join(sys.argv)}\n")
    print("| vocabulary | ranks | rows | checkout | CPU ms | faults | peak MiB | loss apart |")
    print("|---|---|---|---|---|---|---|---|")
    for vocabulary in given.vocabularies:
        for world in given.ranks:
            for rows in given.rows:
                found = compare(sources, vocabulary, world, rows, given)
                print("\n".join(table(found, vocabulary, world, rows)), flush=True)


if __name__ == "__main__":
    main()
