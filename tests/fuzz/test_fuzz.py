"""Seeded cases of everything that comes from outside: no traceback, hang or abort, and nothing written where refused.

Two rounds of the groups run always, 3,000 cases with `-m ""`. A seed is one case, as long as no group is added or
changed: it alone is `pytest tests/fuzz -k "test_case[17]"` or, with what was done and seen, `python -m tests.fuzz 17`.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz.case import schedule
from fuzz.reach import readers
from fuzz.server import Server, Solved

ROOT = Path(__file__).parents[2]
ALWAYS, ALL, BLOCK = 2 * len(schedule()), 3000, 50


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(quick=True) as started:
        yield started


@pytest.fixture(scope="module")
def patient_server() -> Iterator[Server]:
    """With the limits of the product."""
    with Server() as started:
        yield started


@pytest.fixture(scope="module")
def reached() -> dict[int, Solved]:
    """The cases of this module that are done, with the readers that each has come to."""
    return {}


def check(cases: list[Solved]) -> None:
    """Nothing was found, apart from what is not seen again in a process of its own: a machine may be busy."""
    found = [finding for case in cases for finding in case.findings]
    suspected = {finding.seed for finding in found if finding.alone}
    alone = {seed for seed in suspected if _again(seed)}
    told = [str(finding) for finding in found if not finding.alone or finding.seed in alone]
    assert not told, "\n".join(told)


def _again(seed: int) -> bool:
    done = subprocess.run([sys.executable, "-m", "tests.fuzz", str(seed)], cwd=ROOT, capture_output=True, text=True)
    return done.returncode != 0


@pytest.mark.parametrize("seed", range(ALWAYS))
def test_case(server: Server, reached: dict[int, Solved], seed: int):
    reached[seed] = server.solve(seed)
    check([reached[seed]])


def test_every_reader_is_reached(server: Server, reached: dict[int, Solved]):
    """Each opener, reader and validator is called by one of the cases that run always."""
    for seed in range(ALWAYS):
        if seed not in reached:  # this test was chosen alone
            reached[seed] = server.solve(seed)
    missed = readers() - {name for case in reached.values() for name in case.reached}
    assert not missed, f"no case comes to {', '.join(sorted(missed))}"


def test_every_group_runs_always():
    assert set(schedule()) == {schedule()[seed % len(schedule())] for seed in range(ALWAYS)}


@pytest.mark.slow
@pytest.mark.parametrize("first", range(ALWAYS, ALL, BLOCK))
def test_more_cases(patient_server: Server, first: int):
    check([patient_server.solve(seed) for seed in range(first, min(first + BLOCK, ALL))])
