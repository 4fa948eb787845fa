"""How long the planner takes: a search, and a whole plan with three traced layouts. `python benchmarks/plan.py`."""

import argparse
import time
from datetime import date

from tessera.models.shapes import shape_of
from tessera.plan.choice import Training
from tessera.plan.cluster import cluster_of
from tessera.plan.recommend import plan
from tessera.plan.search import search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="70B")
    parser.add_argument("--cluster", default="32x8xH100")
    parser.add_argument("--sequence-len", type=int, default=8192)
    parser.add_argument("--global-batch", type=int, default=512)
    asked = parser.parse_args()
    model, cluster = shape_of(asked.model), cluster_of(asked.cluster)
    training = Training(asked.sequence_len, asked.global_batch)
    print(f"{asked.model} on {cluster}, {date.today()}")
    began, cpu = time.perf_counter(), time.process_time()
    found = search(model, cluster, training)
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(f"{len(found):,} layouts searched in {cpu:.1f} CPU s ({took:.1f} s)")
    began, cpu = time.perf_counter(), time.process_time()
    made = plan(model, cluster, training, trace=3)
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(f"a plan with three traced in {cpu:.1f} CPU s ({took:.1f} s): {made.best.name}")


if __name__ == "__main__":
    main()
