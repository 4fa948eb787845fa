"""What `tessera verify` says: tables for people, lines about faults, and the same as JSON."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from tessera.core import terminal
from tessera.core.device import dtype_name
from tessera.core.text import number_range
from tessera.verify.cases import Case
from tessera.verify.check import Result, TrafficCheck
from tessera.verify.compare import QUANTITIES, Comparison
from tessera.verify.inject import Omission

WIDTH = 100


def console() -> Console:
    """Wide enough for the tables wherever the output goes."""
    made = terminal.console()
    if not made.is_terminal:
        made.width = WIDTH
    return made


def say_problem(out: Console, case: Case, *, batch: str = "") -> None:
    """The model and batches that are computed; `batch` in words where it is not that of `case` alone."""
    problem, model = case.problem, case.problem.model
    drops = {
        "embedding": model.embedding_dropout,
        "attention": model.attention_dropout,
        "residual": model.residual_dropout,
    }
    dropped = ", ".join(f"{name} {p:g}" for name, p in drops.items() if p) or "none"
    out.print(
        f"{model.family} {'at full size' if case.full else 'in miniature'}: {model.num_layers} layers, "
        f"hidden {model.hidden_size}, ffn {model.ffn_size}, {model.num_heads} heads of {model.head_dim}, "
        f"{model.num_kv_heads} for keys and values"
    )
    out.print(f"vocabulary {model.vocab_size}{', tied' if model.tied else ''}; dropout: {dropped}")
    steps = "1 step" if problem.steps == 1 else f"{problem.steps} steps"
    rows = batch or f"{problem.batch} rows"
    packed = ", each of several documents" if problem.packed else ""
    out.print(
        f"{steps} of {problem.micro_batches} micro-batches of {rows} of {problem.length} tokens{packed}, then padded"
    )


def numbers_table(result: Result) -> Table:
    """The largest difference of each quantity, and what is allowed."""
    table = Table(title=f"{result.name}: difference from one process", box=box.SIMPLE)
    table.add_column("quantity")
    for comparison in result.comparisons:
        table.add_column(dtype_name(comparison.dtype), justify="right")
        table.add_column("allowed", justify="right")
    table.add_column("largest in")
    for quantity in QUANTITIES:
        cells = [cell for c in result.comparisons for cell in (_error(c, quantity), f"{c.tolerance:.0e}")]
        table.add_row(quantity, *cells, result.comparisons[0].worst.get(quantity, ""))
    return table


def say_noise(out: Console, result: Result) -> None:
    """Which updates are not compared, and why."""
    names = sorted(result.comparisons[0].noise)
    if names:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        out.print(f"The update of {names[0]}{others} is not compared: its exact gradient is zero, and AdamW")
        out.print("divides rounding by rounding. (No softmax over keys sees a bias of all of them.)")


def traffic_table(result: Result) -> Table:
    """The collectives of one optimizer step in the training dtype, counted and by formula."""
    table = Table(title="collectives of one optimizer step, counted and by formula", box=box.SIMPLE)
    for heading in ("axis", "collective"):
        table.add_column(heading)
    for heading in ("calls", "formula", "bytes received by a rank", "formula"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for check in result.traffic:
        verdict = _red("differs" if check.ranks else "equal", bool(check.ranks))
        calls, received = (check.calls, check.formula_calls), (check.received, check.formula_received)
        table.add_row(check.axis, check.kind, *map(str, calls), *map(number_range, received), verdict)
    return table


def say_layouts_heading(out: Console, training: torch.dtype) -> None:
    """The heading over the lines of `say_layout`."""
    out.print("the largest difference of loss, gradients, norm and weights from one process; traffic from the formula")
    out.print(f"\n[bold]{'layout':<62}{dtype_name(torch.float64):>9}{dtype_name(training):>10}  {'traffic':<8}[/bold]")


def say_layout(out: Console, result: Result) -> None:
    """One layout in a line."""
    cells = []
    for comparison in result.comparisons:
        worst = max(comparison.errors.values())
        cells.append(_red(f"{worst:>9.1e}", worst > comparison.tolerance))
    differs = any(check.ranks for check in result.traffic)
    traffic = _red(f"{'differs' if differs else 'equal':<8}", differs)
    out.print(
        f"{result.name:<62}{cells[0]} {cells[1]}  {traffic} {_red('ok' if result.ok else 'wrong', not result.ok)}"
    )


def fault(result: Result) -> str:
    """What is wrong with a layout: where it comes from and what is likely missing, then what differs by how much."""
    wrong = next((c for c in result.comparisons if c.findings), None)
    heading = "not the numbers of one process" if wrong else "other traffic than the formula has"
    lines = [f"{result.name}: {heading}", *result.diagnosis]
    if wrong is not None and not result.diagnosis:
        lines.append(f"float64 is right: only rounding in {dtype_name(wrong.dtype)} is larger than allowed")
    lines += _differences(wrong) if wrong else []
    lines += [_wrong_traffic(check) for check in result.traffic if check.ranks]
    return "\n  ".join(lines)


def _differences(comparison: Comparison) -> Iterator[str]:
    """A line for each quantity that differs, with the parameter where it differs most."""
    for quantity in QUANTITIES:
        found = sorted((f for f in comparison.findings if f.quantity == quantity), key=lambda f: -f.error)
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            allowed = f"{dtype_name(comparison.dtype)}, allowed {comparison.tolerance:.0e}"
            yield f"{quantity} of {found[0].name}{more}: off by {found[0].error:.1e} ({allowed})"


def _wrong_traffic(check: TrafficCheck) -> str:
    which = f"{check.kind} over {check.axis}"
    counted = f"{check.calls} calls, {number_range(check.received)} bytes"
    formula = f"{check.formula_calls} calls, {number_range(check.formula_received)} bytes"
    missing = f"likely missing: {which}; " if check.calls < check.formula_calls else ""
    return f"{missing}{which}: {counted}; by formula {formula}"


def omissions_table(name: str, caught: Mapping[Omission, bool]) -> Table:
    """How many of the collectives left out, one at a time, were seen."""
    table = Table(title=f"{name}: collectives left out of a step, one at a time", box=box.SIMPLE)
    for heading in ("axis", "collective"):
        table.add_column(heading)
    for heading in ("left out", "caught"):
        table.add_column(heading, justify="right")
    for axis, kind in sorted({(o.axis, o.kind) for o in caught}):
        own = [seen for o, seen in caught.items() if (o.axis, o.kind) == (axis, kind)]
        table.add_row(axis, kind, str(len(own)), str(sum(own)))
    return table


def as_json(results: Sequence[Result], unfit: Mapping[str, str]) -> dict[str, Any]:
    """Everything found, for programs."""
    return {"ok": all(r.ok for r in results), "layouts": [_layout_json(r) for r in results], "do_not_fit": dict(unfit)}


def _layout_json(result: Result) -> dict[str, Any]:
    numbers = {
        dtype_name(c.dtype): {"allowed": c.tolerance, "worst": c.worst} | {q: c.errors[q] for q in QUANTITIES}
        for c in result.comparisons
    }
    traffic, told = [vars(check) for check in result.traffic], result.diagnosis
    return {"layout": result.name, "ok": result.ok, "numbers": numbers, "traffic": traffic, "diagnosis": told}


def _error(comparison: Comparison, quantity: str) -> str:
    error = comparison.errors[quantity]
    return _red(f"{error:.1e}", error > comparison.tolerance)


def _red(text: str, wrong: bool) -> str:
    return f"[red]{text}[/red]" if wrong else text
