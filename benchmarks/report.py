"""The report: for each shape a table of figures, the ratios that matter, where each contender's time goes."""

import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.contenders import REFERENCE, Contender
from benchmarks.measure import MIB, Inspection, StepTime
from benchmarks.workload import Shape

# Relative differences that rounding can make: torch's fp32 norm of one 16M-element tensor is off by 7e-4.
LOSS_AGREEMENT = 1e-4
NORM_AGREEMENT = 2e-3
HEADINGS = (
    "contender",
    "ranks",
    "wall s best",
    "median",
    "CPU s/rank best",
    "median",
    "collectives",
    "payload MB",
    "in products",
    "live peak MiB",
    "max RSS MiB",
    "final loss",
    "loss diff",
    "norm diff",
)
RATIOS = (  # (numerator, denominator)
    ("tessera-1", "transformers"),
    ("tessera-2", "tessera-1"),
    ("tessera-2-sp", "tessera-1"),
    ("tessera-2", "transformers-tp"),
    ("tessera-2", "torch-tp"),
    ("tessera-2", "torch-tp-sp"),
    ("tessera-2-sp", "transformers-tp"),
    ("tessera-2-sp", "torch-tp"),
    ("tessera-2-sp", "torch-tp-sp"),
    ("transformers-tp", "transformers"),
    ("torch-tp", "transformers"),
)


@dataclass
class Outcome:
    """All that one contender's run on one shape gave; `error` says why there is no more."""

    contender: Contender
    losses: list[float] = field(default_factory=list)  # of every step, warm-up included
    norms: list[float] = field(default_factory=list)
    walls: list[float] = field(default_factory=list)  # of every timed step: the slowest rank's
    cpus: list[float] = field(default_factory=list)
    inspections: list[Inspection] = field(default_factory=list)
    error: str = ""

    def add_warm_up(self, ranks: list[list[StepTime]]) -> None:
        if ranks:
            self.losses += [step.loss for step in ranks[0]]
            self.norms += [step.norm for step in ranks[0]]

    def add_steps(self, ranks: list[list[StepTime]]) -> None:
        self.add_warm_up(ranks)
        for step in zip(*ranks, strict=True):
            self.walls.append(max(rank.wall for rank in step))
            self.cpus.append(max(rank.cpu for rank in step))


def describe_run(rounds: int, steps: int, warm_up: int) -> str:
    """Heading: date, commit, command, hardware, versions, settings. Call it before the run, for the load."""
    return "\n".join(
        (
            describe_machine("bench.py", "torch", "transformers", "accelerate"),
            f"- steps: {warm_up} to warm up, then {rounds} rounds of {steps}, interleaved; gloo, one thread a rank,"
            " fp32, AdamW fused, clipping 1.0, constant learning rate",
        )
    )


def describe_machine(script: str, *packages: str) -> str:
    """Date, command, commit, hardware, versions."""
    from importlib.metadata import version

    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return "\n".join(
        (
            f"# Benchmark of {time.strftime('%Y-%m-%d %H:%M')}",
            "",
            f"- command: `{shlex.join(['python', f'benchmarks/{script}', *sys.argv[1:]])}`",
            f"- commit: {_commit()}",
            f"- hardware: {_processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the run",
            f"- versions: Python {platform.python_version()}, {versions}, {platform.system()}",
        )
    )


def render_shape(shape: Shape, outcomes: list[Outcome]) -> str:
    """Markdown of one shape: table, failures, ratios of best figures, operators."""
    title = (
        f"## Vocabulary {shape.vocab_size}: {shape.parameters / 1e6:.2f}M parameters\n\n"
        f"Llama, {shape.layers} layers, hidden {shape.hidden}, {shape.heads} heads, {shape.kv_heads} kv heads"
        f", ffn {shape.ffn}, sequence {shape.sequence}, batch {shape.batch}, untied head."
    )
    done = [outcome for outcome in outcomes if outcome.inspections]
    reference = next((outcome for outcome in done if outcome.contender.name == REFERENCE), None)
    rows = [_row(outcome, reference) for outcome in done]
    missing = [f"- missing: **{o.contender.name}**: {o.error}" for o in outcomes if o.error]
    parts = [title, _table(HEADINGS, rows), "\n".join(missing), _ratios(done), _operators(done)]
    return "\n\n".join(part for part in parts if part)


def _row(outcome: Outcome, reference: Outcome | None) -> list[str]:
    seen = outcome.inspections
    return [
        outcome.contender.name,
        str(outcome.contender.ranks),
        f"{min(outcome.walls):.3f}",
        f"{median(outcome.walls):.3f}",
        f"{min(outcome.cpus):.3f}",
        f"{median(outcome.cpus):.3f}",
        str(max(sum(rank.calls.values()) for rank in seen)),
        f"{max(sum(rank.payload.values()) for rank in seen) / 1e6:.1f}",
        f"{seen[0].product_share:.0%}",
        f"{max(rank.peak_bytes for rank in seen) / MIB:.0f}",
        f"{max(rank.max_rss_bytes for rank in seen) / MIB:.0f}",
        f"{outcome.losses[-1]:.6f}",
        _agreement(outcome.losses, reference.losses if reference else None, LOSS_AGREEMENT),
        _agreement(outcome.norms, reference.norms if reference else None, NORM_AGREEMENT),
    ]


def _agreement(values: list[float], reference: list[float] | None, allowed: float) -> str:
    """The largest relative difference of any step, marked when it is more than rounding."""
    if reference is None:
        return "—"
    difference = max(abs(a - b) / abs(b) for a, b in zip(values, reference, strict=True))
    agrees = difference <= allowed  # false for nan too
    return f"{difference:.1e}" if agrees else f"**{difference:.1e} DIFFERS**"


def _ratios(done: list[Outcome]) -> str:
    by_name = {outcome.contender.name: outcome for outcome in done}
    rows = []
    for above, below in RATIOS:
        if above in by_name and below in by_name:
            a, b = by_name[above], by_name[below]
            wall, cpu = min(a.walls) / min(b.walls), min(a.cpus) / min(b.cpus)
            rows.append([f"{above} / {below}", f"{wall:.3f}", f"{cpu:.3f}"])
    return _table(("best step", "wall", "CPU per rank"), rows) if rows else ""


def _operators(done: list[Outcome], count: int = 9) -> str:
    lines = [
        "Where rank 0's time goes, ms of one profiled step (self time of operators; waiting included):",
        "",
    ]
    for outcome in done:
        seen = outcome.inspections[0]
        largest = sorted(seen.seconds.items(), key=lambda item: -item[1])[:count]
        named = ", ".join(f"{name.split('::')[-1]} {seconds * 1e3:.0f}" for name, seconds in largest)
        calls = ", ".join(f"{n} {kind} ({seen.payload[kind] / 1e6:.1f} MB)" for kind, n in seen.calls.items())
        lines.append(f"- **{outcome.contender.name}** ({seen.total_seconds * 1e3:.0f}): {named}")
        lines += [f"  - collectives: {calls}"] if calls else []
    return "\n".join(lines)


def _table(headings: tuple[str, ...], rows: list[list[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(headings, *rows, strict=True)]
    lines = [headings, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
