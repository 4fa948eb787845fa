"""Predicted step times beside measured ones on this machine: twelve small steps of 1, 2 and 4 ranks.

`tessera measure --ranks 4` first; then `python benchmarks/predicted.py` runs every step in turn, so that what else the
machine does meets all alike, and prints the median beside the prediction, and how many pairs of steps whose times
differ by more than 15% are ranked right. CPU over gloo.
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
from datetime import date

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

ROWS, LENGTH, VOCABULARY = 8, 256, 4096
SMALL = {"hidden_size": 256, "num_layers": 4, "num_heads": 8, "num_kv_heads": 4, "head_dim": 32, "ffn_size": 704}
WIDE = {"hidden_size": 512, "num_layers": 3, "num_heads": 8, "num_kv_heads": 8, "head_dim": 64, "ffn_size": 1408}
LAYOUTS: dict[int, list[tuple[str, dict[str, int], str]]] = {
    1: [("small", {}, "false"), ("wide", {}, "false"), ("wide", {}, "true")],
    2: [("small", {"col": 2}, "false"), ("wide", {"shard": 2}, "false"), ("wide", {"ring": 2}, "false"),
        ("wide", {"row": 2}, "false")],
    4: [("wide", {"col": 4}, "false"), ("small", {"row": 2, "col": 2}, "false"), ("wide", {"row": 2, "col": 2}, "true"),
        ("wide", {"shard": 2, "col": 2}, "false"), ("wide", {"depth": 2, "col": 2}, "false")],
}  # fmt: skip
TRAINING = Training(LENGTH, ROWS, "float32")


def model_of(name: str) -> ModelConfig:
    sizes = SMALL if name == "small" else WIDE
    return ModelConfig("llama", VOCABULARY, max_positions=LENGTH, norm_eps=1e-5, rope=RopeConfig(), **sizes)


def layout_of(sizes: dict[str, int], recompute: str) -> Layout:
    data = sizes.get("shard", 1)
    return Layout(sizes, ROWS // data, 1, recompute=recompute)


def work(rank: int, world: int, store: str, rounds: int) -> None:
    """One rank: the median seconds of each step, as JSON."""
    threads = max(1, len(os.sched_getaffinity(0)) // world)
    torch.set_num_threads(threads)
    device.prepare(torch.device("cpu"), tf32=False)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    steps = [SmallStep(model_of(name), TRAINING, layout_of(sizes, again)) for name, sizes, again in LAYOUTS[world]]
    print(json.dumps(timed_steps(steps, Mesh({"shard": world}), rounds)), flush=True)


def measured(world: int, rounds: int) -> list[float]:
    """The median seconds of each step of so many ranks, the slowest rank's."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--work", str(world), os.path.join(folder, "store"), str(rounds)]
        ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(world)]
        out: list[list[float]] = [json.loads(rank.communicate()[0]) for rank in ranks]
    return out[0]


def predicted(world: int, profile: str | None) -> list[Judged]:
    cluster = cluster_of("this", profile_named(profile) if profile else None).of(world)
    return [
        judge(model_of(name), layout_of(sizes, recompute), cluster, TRAINING)
        for name, sizes, recompute in LAYOUTS[world]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--profile", help="a profile; without it this machine's own")
    parser.add_argument("--terms", action="store_true", help="every term of each prediction")
    asked = parser.parse_args()
    rows = []
    for world, layouts in LAYOUTS.items():
        seconds, judged = measured(world, asked.rounds), predicted(world, asked.profile)
        rows += [(world, *layout, took, said) for layout, took, said in zip(layouts, seconds, judged, strict=True)]
    print(f"{platform.machine()}, {os.cpu_count()} cores, {date.today()}; medians of rounds in turn, ms")
    print(f"{'ranks':>5} {'model':6} {'mesh':18} {'recompute':9} {'measured':>9} {'predicted':>9} {'error':>7}")
    for world, name, sizes, recompute, seconds, judged in rows:
        mesh, error = " × ".join(f"{axis} {n}" for axis, n in sizes.items()) or "–", judged.seconds / seconds - 1
        print(
            f"{world:5} {name:6} {mesh:18} {recompute:9} {1e3 * seconds:9.1f} {1e3 * judged.seconds:9.1f} {error:+7.1%}"
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
        world, store, rounds, rank = int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
        work(rank, world, store, rounds)
    else:
        main()
