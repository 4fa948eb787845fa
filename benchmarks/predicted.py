"""Predicted step times beside measured ones on this machine: twelve small steps of 1, 2 and 4 ranks.

`tessera measure --ranks 4` first; then `python benchmarks/predicted.py` runs every step in turn, so that what else the
machine does meets all alike, and prints the median beside the prediction, and how many pairs of steps whose times
differ by more than 15% are ranked right. `--others`: twelve other steps. CPU over gloo.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from typing import NamedTuple

import torch
import torch.distributed as dist

from tessera.core import device
from tessera.core.mesh import Mesh
from tessera.measure.steps import SmallStep, timed_steps
from tessera.models.config import ModelConfig
from tessera.nn.rope import RopeConfig
from tessera.plan.choice import Layout, Training
from tessera.plan.cluster import cluster_of, profile_named
from tessera.plan.recommend import Judged, judge

VOCABULARY = 4096


class Kind(NamedTuple):
    """A model, and the rows of a step on all ranks together."""

    model: ModelConfig
    training: Training


def _kind(hidden: int, layers: int, kv_heads: int, ffn: int, rows: int, length: int, tied: bool = False) -> Kind:
    sizes = (VOCABULARY, hidden, layers, 8, kv_heads, hidden // 8, ffn, length)
    return Kind(ModelConfig("llama", *sizes, rope=RopeConfig(), tied=tied), Training(length, rows, "float32"))


KINDS = {
    "small": _kind(256, 4, 4, 704, 8, 256),
    "wide": _kind(512, 3, 8, 1408, 8, 256),
    "narrow": _kind(160, 6, 2, 448, 16, 128, tied=True),
    "long": _kind(320, 2, 8, 864, 4, 1024),
}
Case = tuple[str, dict[str, int], str]
"""A kind, sizes of the axes, the value of gradient_checkpointing."""
TWELVE: dict[int, list[Case]] = {
    1: [("small", {}, "false"), ("wide", {}, "false"), ("wide", {}, "true")],
    2: [("small", {"col": 2}, "false"), ("wide", {"shard": 2}, "false"), ("wide", {"ring": 2}, "false"),
        ("wide", {"row": 2}, "false")],
    4: [("wide", {"col": 4}, "false"), ("small", {"row": 2, "col": 2}, "false"), ("wide", {"row": 2, "col": 2}, "true"),
        ("wide", {"shard": 2, "col": 2}, "false"), ("wide", {"depth": 2, "col": 2}, "false")],
}  # fmt: skip
OTHERS: dict[int, list[Case]] = {
    1: [("narrow", {}, "false"), ("long", {}, "false"), ("long", {}, "selective")],
    2: [("narrow", {"row": 2}, "true"), ("narrow", {"replicate": 2}, "false"), ("long", {"ulysses": 2}, "false"),
        ("long", {"col": 2}, "false")],
    4: [("narrow", {"shard": 4}, "false"), ("narrow", {"row": 4}, "false"), ("long", {"inner": 2, "col": 2}, "false"),
        ("long", {"ring": 2, "ulysses": 2}, "false"), ("long", {"shard": 2, "row": 2}, "true")],
}  # fmt: skip
"""Other models, rows and layouts than TWELVE's, and than those that `tessera measure` times."""


def steps_of(cases: Sequence[Case]) -> list[SmallStep]:
    found = []
    for name, sizes, recompute in cases:
        model, training = KINDS[name]
        rows = training.global_batch // (sizes.get("shard", 1) * sizes.get("replicate", 1))
        found.append(SmallStep(model, training, Layout(sizes, rows, 1, recompute=recompute)))
    return found


def work(rank: int, world: int, others: bool, store: str, rounds: int) -> None:
    """One rank: the median seconds of each step, as JSON."""
    threads = max(1, len(os.sched_getaffinity(0)) // world)
    torch.set_num_threads(threads)
    device.prepare(torch.device("cpu"), tf32=False)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    steps = steps_of((OTHERS if others else TWELVE)[world])
    found = timed_steps(steps, Mesh({"shard": world}), rounds)
    print(json.dumps(list(map(statistics.median, found))), flush=True)


def measured(world: int, others: bool, rounds: int) -> list[float]:
    """The median seconds of each step of so many ranks, the slowest rank's."""
    with tempfile.TemporaryDirectory() as folder:
        asked = [str(world), str(int(others)), os.path.join(folder, "store"), str(rounds)]
        command = [sys.executable, __file__, "--work", *asked]
        ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(world)]
        out: list[list[float]] = [json.loads(rank.communicate()[0]) for rank in ranks]
    return out[0]


def predicted(world: int, others: bool, profile: str | None) -> list[Judged]:
    cluster = cluster_of("this", profile_named(profile) if profile else None).of(world)
    steps = steps_of((OTHERS if others else TWELVE)[world])
    return [judge(step.model, step.layout, cluster, step.training) for step in steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--profile", help="a profile; without it this machine's own")
    parser.add_argument("--others", action="store_true", help="twelve other steps")
    parser.add_argument("--terms", action="store_true", help="every term of each prediction")
    asked = parser.parse_args()
    rows = []
    for world, layouts in (OTHERS if asked.others else TWELVE).items():
        seconds = measured(world, asked.others, asked.rounds)
        judged = predicted(world, asked.others, asked.profile)
        rows += [(world, *layout, took, said) for layout, took, said in zip(layouts, seconds, judged, strict=True)]
    print(f"{platform.machine()}, {os.cpu_count()} cores, {date.today()}; medians of rounds in turn, ms")
    print(f"{'ranks':>5} {'model':6} {'mesh':20} {'recompute':9} {'measured':>9} {'predicted':>9} {'error':>7}")
    for world, name, sizes, recompute, seconds, judged in rows:
        mesh, error = " × ".join(f"{axis} {n}" for axis, n in sizes.items()) or "–", judged.seconds / seconds - 1
        print(
            f"{world:5} {name:6} {mesh:20} {recompute:9} {1e3 * seconds:9.1f} {1e3 * judged.seconds:9.1f} {error:+7.1%}"
        )
        if asked.terms:
            print("      ", ", ".join(f"{k} {1e3 * v:.1f}" for k, v in judged.time.terms.items() if v > 1e-4))
    apart = [(a, b) for a, b in itertools.combinations(rows, 2) if max(a[4], b[4]) / min(a[4], b[4]) > 1.15]
    right = sum((a[4] < b[4]) == (a[5].seconds < b[5].seconds) for a, b in apart)
    errors = [abs(row[5].seconds / row[4] - 1) for row in rows]
    print(f"{right} of {len(apart)} pairs that differ by more than 15% are ranked right")
    near = sum(error <= 0.15 for error in errors)
    print(f"mean error {statistics.mean(errors):.1%}, largest {max(errors):.1%}, {near} of {len(errors)} within 15%")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        world, others, store, rounds, rank = sys.argv[2:]
        work(int(rank), int(world), others == "1", store, int(rounds))
    else:
        main()
