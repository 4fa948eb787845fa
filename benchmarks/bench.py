"""Tessera beside its peers, interleaved in one run: `python benchmarks/bench.py`, some five minutes.

Every contender's processes start first and sleep; then, round after round, each runs a few steps while the
others sleep, so that whatever else the machine does falls on all alike. README.md says what is measured.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# The same for all workers. At import: libraries read them when they are imported.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", KINETO_LOG_LEVEL="99")

from benchmarks.contenders import CONTENDERS
from benchmarks.report import Outcome, describe_run, render_shape
from benchmarks.workers import START_SECONDS, STEP_SECONDS, ContenderFailed, Group
from benchmarks.workload import SHAPES, Shape, write_weights

RESULTS = Path(__file__).resolve().parent / "results"
WARM_UP_STEPS = 1


def run_shape(shape: Shape, names: list[str], rounds: int, steps: int, folder: Path) -> list[Outcome]:
    """Start all contenders, interleave `rounds` of `steps` steps, inspect each; who fails drops out."""
    write_weights(shape, folder)
    outcomes = {name: Outcome(CONTENDERS[name]) for name in names}
    groups = {name: Group(CONTENDERS[name], shape, folder) for name in names}

    def ask(name: str, seconds: float, *message: str | int) -> list[Any]:
        """Every rank's answer (to its start, without a message); none from a contender that failed."""
        if outcomes[name].error:
            return []
        try:
            return groups[name].ask(seconds, *message)
        except ContenderFailed as failure:
            outcomes[name].error = str(failure)
            say(f"{name}: {failure}")
            return []

    try:
        for name in names:
            ask(name, START_SECONDS)
        for name in names:
            outcomes[name].add_warm_up(ask(name, STEP_SECONDS, "warm_up", WARM_UP_STEPS))
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                outcomes[name].add_steps(ask(name, steps * STEP_SECONDS, "run", steps))
            say(f"{shape.name}: round {number + 1} of {rounds}")
        for name in names:
            outcomes[name].inspections = ask(name, 3 * STEP_SECONDS, "inspect")
    finally:
        for group in groups.values():
            group.close()
    return list(outcomes.values())


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["8k", "32k"])
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every contender")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps in one turn")
    parser.add_argument("--output", type=Path, help="the report (default: results/<date>-cpu.md beside this file)")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.steps < 1:
        parser.error("--rounds and --steps must be at least 1")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    sections = [describe_run(arguments.rounds, arguments.steps, WARM_UP_STEPS)]
    for name in arguments.shapes:
        with tempfile.TemporaryDirectory() as folder:
            outcomes = run_shape(SHAPES[name], arguments.only, arguments.rounds, arguments.steps, Path(folder))
        sections.append(render_shape(SHAPES[name], outcomes))
    text = "\n\n".join(sections) + "\n"
    print(text)
    path = arguments.output or RESULTS / f"{time.strftime('%Y-%m-%d')}-cpu.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    say(f"written to {path}")


if __name__ == "__main__":
    main()
