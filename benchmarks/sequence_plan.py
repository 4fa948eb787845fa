"""Time of planning packed streams for context parallelism, and what plans cost: `python benchmarks/sequence_plan.py`.

Each line plans streams of documents of exponential lengths, of several seeds. Milliseconds are processor time of the
plan that took longest, each planned several times and the least taken, for noise only ever adds. Work is the largest
over the mean of all owners; received what all owners receive, as a share of an all-gather's, beside the same share of
the owner that receives most.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from datetime import date
from random import Random

from tessera.nn.context.assign import assign, work
from tessera.nn.context.reads import reads

Plan = tuple[float, float, float, float]  # milliseconds, work, received, received by the one that receives most


def documents(tokens: int, mean: int, seed: int) -> list[int]:
    """The bounds of documents of exponential lengths; one document where the mean is all tokens."""
    draw, bounds = Random(seed), [0]
    while bounds[-1] < tokens:
        length = tokens if mean >= tokens else max(1, int(draw.expovariate(1 / mean)))
        bounds.append(min(tokens, bounds[-1] + length))
    return bounds


def plan(bounds: list[int], owners: int, rounds: int) -> Plan:
    took = []
    for _ in range(rounds):
        begun = time.process_time()
        owned = assign(bounds, owners)
        took.append(time.process_time() - begun)
    areas = work(owned, bounds)
    received = [sum(end - first for ranges in row for first, end in ranges) for row in reads(owned, bounds)]
    gathered = bounds[-1] * (owners - 1) / owners
    return (
        min(took) * 1e3,
        max(areas) / statistics.mean(areas),
        statistics.mean(received) / gathered,
        max(received) / gathered,
    )


def lines(given: argparse.Namespace) -> Iterator[str]:
    yield "| tokens | owners | mean document | CPU ms | work: mean, most | received | by one owner |"
    yield "|---|---|---|---|---|---|---|"
    for tokens in given.tokens:
        for owners in given.owners:
            for mean in [*given.means, tokens]:
                seeds = given.seeds if mean < tokens else 1
                found = [plan(documents(tokens, mean, seed), owners, given.rounds) for seed in range(seeds)]
                took, loads, received, most = zip(*found, strict=True)
                name = "one document" if mean == tokens else f"{mean:,}"
                yield (
                    f"| {tokens:,} | {owners} | {name} | {max(took):.1f} | "
                    f"{statistics.mean(loads):.3f}, {max(loads):.3f} | {statistics.mean(received):.1%} | "
                    f"{statistics.mean(most):.1%} |"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[131_072, 2**20])
    parser.add_argument("--owners", nargs="+", type=int, default=[8, 32, 64])
    parser.add_argument("--means", nargs="+", type=int, default=[1024, 8192, 32_768], help="mean lengths of documents")
    parser.add_argument("--seeds", type=int, default=20, help="streams of each line")
    parser.add_argument("--rounds", type=int, default=3, help="how often each stream is planned")
    given = parser.parse_args()
    print(f"{date.today()} · {platform.platform()} · {platform.python_version()} · {os.cpu_count()} cores", end="")
    print(f" · {' '.join(sys.argv)}\n")
    for line in lines(given):
        print(line, flush=True)


if __name__ == "__main__":
    main()
