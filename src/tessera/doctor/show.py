"""The doctor's report as lines for people, and as JSON."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from tessera.core.mesh import Mesh
from tessera.core.text import counted, table_lines
from tessera.doctor.examine import Report
from tessera.doctor.finding import Finding, State
from tessera.doctor.layout import ring
from tessera.doctor.links import way

STYLES: dict[State, str] = {"wrong": "bold red", "slow": "yellow", "off": "yellow", "ok": "green", "on": "green"}


def lines(report: Report) -> Iterator[tuple[str, str]]:
    """Each line of the report, and the style of its first word."""
    for section in report.sections:
        yield section.title, "bold"
        for finding in section.findings:
            yield f"  {finding}", STYLES.get(finding.state, "")
        for table in section.tables:
            yield f"  {table.title}:", ""
            yield from ((f"  {line}", "") for line in table_lines(table.rows))


def conclusion(findings: list[Finding]) -> str:
    """How many things are wrong, and which."""
    wrong = [finding.subject for finding in findings if finding.state == "wrong"]
    if not wrong:
        return ""
    return f"{counted(len(wrong), 'thing')} wrong: {', '.join(dict.fromkeys(wrong))}"


def as_json(report: Report) -> dict[str, Any]:
    """The report for programs: rates in bytes a second, times in seconds; every rank's neighbours."""
    found: dict[str, Any] = {
        "findings": [
            {"section": section.title, **asdict(finding)} for section in report.sections for finding in section.findings
        ]
    }
    if report.measured is not None:
        found["ranks_measured"] = [asdict(end) for end in report.measured.ends]
        found["pairs"] = [
            {
                "ranks": [pair.first, pair.second],
                "link": way(pair, report.measured, report.links).words,
                "bytes_per_second": pair.rate,
                "latency_seconds": pair.latency,
            }
            for pair in report.measured.pairs
        ]
    if report.placed is not None:
        mesh = report.placed.mesh
        axes = [axis for axis in mesh.numbering if mesh.sizes[axis] > 1]
        found["axes"] = [
            {
                "axes": one.axes,
                "ranks": one.ranks,
                "links": one.links,
                "slowest_bytes_per_second": one.slowest,
                "received_bytes_a_step": one.received,
            }
            for one in report.along
        ]
        found["ranks"] = [
            {"rank": rank, "machine": rank // report.placed.here}
            | {axis: _neighbours(mesh, rank, axis) for axis in axes}
            for rank in range(mesh.world)
        ]
    return found


def _neighbours(mesh: Mesh, rank: int, axis: str) -> dict[str, Any]:
    before, members, after = ring(mesh, rank, (axis,))
    return {"group": members, "receives_from": before, "sends_to": after}
