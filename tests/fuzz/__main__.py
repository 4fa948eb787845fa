"""Cases of the fuzzer alone.

python -m tests.fuzz SEED...       these cases, each with what was done and seen
python -m tests.fuzz --report      the first 2,000 (--count) cases: findings by kind, with an example of each
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("seeds", nargs="*", type=int)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--group", help="of these the cases of one group alone")
    parser.add_argument("--limit", type=float, default=20, help="seconds after which a case counts as hanging")
    asked = parser.parse_args()
    seeds = range(asked.first, asked.first + asked.count) if asked.report else asked.seeds
    from fuzz.case import KINDS, Finding, schedule
    from fuzz.server import solved, world_here

    found: dict[int, list[Finding]] = {}
    spent: Counter[str] = Counter()
    began = time.monotonic()
    with world_here() as world:
        print(f"the world took {time.monotonic() - began:.1f} s", flush=True)
        for seed in seeds:
            if asked.group not in (None, schedule()[seed % len(schedule())]):
                continue
            case = solved(seed, world, limit=asked.limit)
            spent[case.group] += case.seconds  # type: ignore[assignment]
            if not asked.report or case.findings:
                print(f"seed {seed} [{case.group}] {case.seconds:.2f} s: {case.what}", flush=True)
            for finding in case.findings:
                print(f"    kind {finding.kind}: {finding.seen}", flush=True)
                found.setdefault(finding.kind, []).append(finding)
    total = sum(map(len, found.values()))
    print(f"{len(seeds)} cases, {time.monotonic() - began:.0f} s, {total} findings of {len(found)} kinds")
    for kind, findings in sorted(found.items()):
        cases = len({finding.seed for finding in findings})
        print(f"{kind:3} {KINDS[kind]:36} {len(findings):5} findings in {cases:4} cases, as: {findings[0]}")
    print("seconds by group: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in spent.most_common()))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
