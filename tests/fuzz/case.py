"""A case: a copy of the world, something hostile done to it, commands run in it, and what must hold of any command.

A group is a function that takes a `Case`, changes files in `case.here`, says `case.kind` (of KINDS, should anything be
wrong) and `case.what`, and runs commands with `case.tessera`; what only it can know it reports with `case.wrong`.
"""

import json
import random
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz.subject import HANG, RANKS, Fault, Seen, end, run
from fuzz.world import World, changes, command, digest, names_in, snapshot

PROBE = re.compile(r"[a-z0-9_]{8}")
"""What Python's tempfile writes to see whether a folder can be written, and at once removes."""
KINDS = {
    1: "two runs in one folder",
    2: "a full disk",
    3: "leftovers and links",
    4: "what dead runs leave",
    5: "prepared data",
    6: "permissions, folders for files",
    7: "checkpoints with new sums",
    8: "output inside the data",
    10: "the unpickler",
    12: "half-set environment",
    13: "a config from a pipe",
    14: "the terminal",
    16: "sizes",
    17: "YAML",
    18: "JSON and odd files",
    19: "paths of options, names of a hub",
    20: "the end token",
    21: "tokens",
    22: "names of data files",
    23: "rows with other meanings",
    24: "containers",
    25: "templates and prompts",
    26: "streams",
}
MESSAGE = 20_000
"""Characters of the longest message that a person may be asked to read."""
LARGEST_WORLD = 100_000
"""Processes: more are no run that anybody has machines for."""


@dataclass(frozen=True)
class Finding:
    """Something that must not be: in which case, of which kind, what was done, what was seen."""

    seed: int
    group: str
    kind: int
    what: str
    seen: str
    alone: bool = False
    """A hang or an abort, to be seen again in a process of its own before it counts."""

    def __str__(self) -> str:
        return f"seed {self.seed} [{self.group}] kind {self.kind} ({KINDS[self.kind]}): {self.what}: {self.seen}"


@dataclass
class Case:
    """One case in folder `here`; `outputs` are the entries of it that a command may write."""

    seed: int
    group: str
    world: World
    here: Path
    dice: random.Random
    limit: float = HANG
    turn: int = 0
    """How often its group has had a case before: what is cycled through comes in turn, what is picked by chance."""
    kind: int = 0
    what: str = ""
    outputs: set[str] = field(default_factory=lambda: {"new", "out"})
    findings: list[Finding] = field(default_factory=list)
    reached: set[str] = field(default_factory=set)
    seconds: float = 0.0

    def pick(self, *choices: Any) -> Any:
        return self.dice.choice(choices)

    def cycle(self, *choices: Any) -> Any:
        return choices[self.turn % len(choices)]

    def wrong(self, seen: str, kind: int | None = None, alone: bool = False) -> None:
        self.findings.append(Finding(self.seed, self.group, kind or self.kind, self.what, seen[:600], alone))

    def tessera(self, *words: str, **how: Any) -> Seen:
        """Run a command; whatever must hold of any is judged. Training that goes on and on is asked to stop."""
        if words[:1] == ("train",):
            how.setdefault("fault", Fault(step=6, signal=signal.SIGTERM))
        return self.call(command(*words), " ".join(words), **how)

    def call(
        self,
        target: Callable[[], object],
        name: str,
        *,
        codes: tuple[int, ...] = (0, 1, 2),
        free: bool = False,
        **how: Any,
    ) -> Seen:
        """The same for a Python function. `free`: it may write anywhere, and be refused after it has written."""
        before = snapshot(self.here)
        seen = run(target, self.here, limit=self.limit, **how)
        self.reached |= set(seen.reached)
        self.seconds += seen.seconds
        self._judge(seen, name[:200], before, codes, free, heard=how.get("terminal", ("file", "file"))[1] == "file")
        return seen

    def _judge(
        self, seen: Seen, name: str, before: dict[str, str], codes: tuple[int, ...], free: bool, heard: bool
    ) -> None:
        after = changes(before, snapshot(self.here))
        inputs = [c for c in after if c.split(" ", 1)[1].split("/")[0] not in self.outputs]
        if seen.pid:
            return
        if seen.code is None:
            self.wrong(f"{name}: hung, {self.limit:g} s", alone=True)
        elif seen.code < 0 and seen.code not in codes:
            self.wrong(f"{name}: ended by signal {-seen.code}: {seen.err[-200:]}", alone=True)
        elif "Traceback (most recent call last)" in seen.said:
            last = [line for line in (seen.err or seen.out).splitlines() if line and not line.startswith(" ")]
            self.wrong(f"{name}: traceback, {last[-1] if last else ''}")
        elif seen.code not in codes:
            self.wrong(f"{name}: exit code {seen.code}: {(seen.err or seen.out)[-300:]}")
        elif seen.code == 2 and after and not free:
            self.wrong(f"{name}: refused ({seen.err[:160]}), but {', '.join(after[:4])}")
        elif seen.code > 0 and heard and not seen.said.strip():  # a command without arguments prints its help
            self.wrong(f"{name}: exit code {seen.code} without a word")
        elif "frame #" in seen.said:
            self.wrong(f"{name}: frames of C++: {seen.said[-200:]}")
        elif inputs and not free:
            self.wrong(f"{name}: inputs were changed: {', '.join(inputs[:4])}")
        if len(seen.err) > MESSAGE:
            self.wrong(f"{name}: a message of {len(seen.err):,} characters: {seen.err[:80]}...")
        left = [path.name for path in (self.here / "tmp").iterdir() if not PROBE.fullmatch(path.name)]
        if seen.code in (0, 1, 2) and left:
            self.wrong(f"{name}: left in TMPDIR: {', '.join(left[:3])}", kind=4)
        if seen.code == 0 and RANKS in seen.out and int(seen.out.split(RANKS)[1].split()[0]) > LARGEST_WORLD:
            self.wrong(f"{name}: takes {seen.out.split(RANKS)[1].split()[0]} processes for a run")

    # ---- What holds of a run that is the same as that of run.yaml

    def ends_as_if_nothing_had_been(self, output: str = "new", names: bool = True, lines: bool = True) -> Seen:
        """Start run.yaml (or more.yaml for "out") again: it ends well, with the right weights, lines and names."""
        seen = self.tessera("train", "run.yaml" if output == "new" else "more.yaml")
        if seen.code != 0:
            self.wrong(f"started again: exit code {seen.code}: {seen.err[-300:]}")
            return seen
        self.is_the_run(output, lines)
        left = names_in(self.here / output) - self.world.names
        odd = sorted(name for name in left if not name.startswith("abandoned-"))
        if names and odd:
            self.wrong(f"started again: left in {output}: {', '.join(odd[:4])}", kind=4)
        return seen

    def is_the_run(self, output: str, lines: bool = True) -> None:
        """The model handed out and the `lines` of metrics.jsonl are those of the run of run.yaml."""
        if digest(self.here / output / "model.safetensors") != self.world.weights:
            self.wrong(f"{output}: the weights are not those of an uninterrupted run on the same data")
        if not lines:
            return
        try:
            told = (self.here / output / "metrics.jsonl").read_text("utf-8").splitlines()
            steps = [json.loads(line)["step"] for line in told]
        except (OSError, ValueError, KeyError) as error:
            self.wrong(f"{output}/metrics.jsonl: {error!r}")
            return
        if steps != [1, 2, 3]:
            self.wrong(f"{output}/metrics.jsonl has steps {steps}")


Group = Callable[[Case], None]
GROUPS: dict[str, tuple[int, Group]] = {}


def group(share: int) -> Callable[[Group], Group]:
    """Enter a group into the schedule, which gives it `share` places of each round."""

    def enter(function: Group) -> Group:
        GROUPS[function.__name__] = (share, function)
        return function

    return enter


def schedule() -> list[str]:
    """The groups of one round of seeds, each as often as its share says, the same in every process."""
    names = [name for name, (share, _) in sorted(GROUPS.items()) for _ in range(share)]
    random.Random(0).shuffle(names)
    return names


def solve(seed: int, world: World, limit: float = HANG) -> Case:
    """Case number `seed`, done; its folder is gone again."""
    names = schedule()
    name = names[seed % len(names)]
    here = world.place  # always the same, for what the world's files say of paths
    shutil.rmtree(here.parent, ignore_errors=True)
    shutil.copytree(world.folder, here, symlinks=True)
    case = Case(seed, name, world, here, random.Random(seed), limit)
    case.turn = names[: seed % len(names)].count(name) + seed // len(names) * names.count(name)
    try:
        GROUPS[name][1](case)
    finally:
        shutil.rmtree(here.parent, ignore_errors=True)
    return case


def stopped(case: Case, seen: Seen) -> None:
    """End a run that a fault had stopped; it must have come to that."""
    if seen.pid:
        end(seen)
