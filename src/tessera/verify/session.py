"""What the ranks of `tessera verify` do: check layouts one after another; rank 0 says what was found."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from tessera.core.errors import RunFailed
from tessera.train.settings import compute_dtype
from tessera.verify import report
from tessera.verify.cases import Case
from tessera.verify.check import Checker, Result

TOLD = 5  # faults told in full


class Session:
    """Layouts to verify on this rank; `out` is None on all but rank 0."""

    def __init__(self, checker: Checker, out: Console | None) -> None:
        self.checker = checker
        self.out = out or Console(quiet=True)

    def one(self, case: Case, omit: int | None = None, context: str | None = None) -> list[Result]:
        """One layout in full; `omit` (from 1) is the collective left out of its first step.

        `context` says how ranks share sequences, where they do.
        """
        report.say_problem(self.out, case)
        if context is not None:
            self.out.print(context, markup=False)
        omission = None
        if omit is not None:
            omission = self.checker.omissions(case)[omit - 1]
            self.out.print(f"left out: {omission}", style="yellow")
        result = self.checker.check(case, omission)
        self.out.print(report.numbers_table(result))
        report.say_noise(self.out, result)
        self.out.print(report.traffic_table(result))
        return [result]

    def several(self, cases: Sequence[Case], unfit: Mapping[str, str]) -> list[Result]:
        """Many layouts, a line each."""
        report.say_problem(self.out, cases[0], batch="as many rows as each layout takes")
        report.say_layouts_heading(self.out, compute_dtype(cases[0].config, self.checker.device))
        results = []
        for case in cases:
            results.append(self.checker.check(case))
            report.say_layout(self.out, results[-1])
        for name, reason in unfit.items():
            self.out.print(f"{name}: the model does not fit: {reason}", style="dim")
        return results

    def leave_out_each(self, cases: Sequence[Case]) -> list[str]:
        """Every collective of a step left out in turn, in each layout; those that went unseen."""
        unseen = []
        for case in cases:
            caught = {omission: self.checker.catches(case, omission) for omission in self.checker.omissions(case)}
            self.out.print(report.omissions_table(case.name, caught))
            unseen += [f"{case.name}: {omission}" for omission, seen in caught.items() if not seen]
        return unseen


def conclude(results: Sequence[Result], unfit: Mapping[str, str], unseen: Sequence[str], path: Path | None) -> None:
    """Write the report, if one is wanted; raise RunFailed when a layout is wrong or an omission went `unseen`."""
    if path is not None:
        path.write_text(json.dumps(report.as_json(results, unfit), ensure_ascii=False, indent=1) + "\n")
    wrong = [result for result in results if not result.ok]
    if wrong:
        told = [report.fault(result) for result in wrong[:TOLD]]
        told += [f"and {len(wrong) - TOLD} other layouts"] if len(wrong) > TOLD else []
        raise RunFailed("\n".join(told))
    if unseen:
        raise RunFailed("left out without being seen:\n  " + "\n  ".join(unseen))
