"""The page: one HTML text that needs nothing beside it, of one run or of two side by side."""

import time
from collections.abc import Sequence
from pathlib import Path

from tessera import __version__
from tessera.core.errors import UserError
from tessera.report import numbers
from tessera.report.curve_sections import SECTIONS, letter, section
from tessera.report.events import Event
from tessera.report.folder import RunFolder
from tessera.report.html import Html, join, table, tag
from tessera.report.picture import layout_picture
from tessera.report.rank_section import ranks

MARK = '<meta name="generator" content="tessera report">'
"""By which an earlier page is known."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""For the browser: nothing is loaded, whatever stands in the page."""
_HERE = Path(__file__).parent


def page(runs: Sequence[RunFolder], pictures: Sequence[Html], *, every: float | None = None) -> str:
    """The page of `runs`, of which `look` was called; with `every` it reloads itself after so many seconds."""
    title = " and ".join(run.name for run in runs)
    body = join(
        _header(runs),
        _figures(runs),
        _warnings(runs),
        *(make(runs) for make in SECTIONS),
        ranks(runs),
        section("Layout", tag("div", *pictures, class_="columns")),
        _checkpoints(runs),
        _events(runs),
        _config(runs),
        _footer(runs),
    )
    head = join(
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        Html(MARK),
        tag("title", f"Tessera: {title}"),
        Html(f"<style>{(_HERE / 'page.css').read_text(encoding='utf-8')}</style>"),
    )
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    attributes = {} if every is None else {"data_reload": f"{every:.0f}"}
    shown = tag("body", tag("main", body), Html(f"<script>{script}</script>"), **attributes)
    whole = tag("html", tag("head", head), shown, lang="en")
    return f"<!DOCTYPE html>\n{whole}\n"


def picture_of(run: RunFolder, runs: Sequence[RunFolder]) -> Html:
    """The layout's picture, or why there is none. It takes seconds and follows from the config alone."""
    config = run.whole.settings.config
    heading = tag("h3", letter(run, runs), "Who holds which block")
    if config is None:
        return tag("div", heading, tag("p", "No picture: the config cannot be read."))
    try:
        drawn = layout_picture(config, run.path, f"layout{runs.index(run)}")
    except UserError as error:
        return tag("div", heading, tag("p", f"No picture: {error.key} {error.reason}. {error.hint}"))
    return tag("div", heading, tag("div", drawn, class_="picture"))


def _header(runs: Sequence[RunFolder]) -> Html:
    """What is shown: names, whether the runs go on, where and on how many ranks."""
    cards = []
    for run in runs:
        total = run.whole.settings.config.max_steps if run.whole.settings.config else None
        place = f"step {run.metrics.steps:,}" + (f" of {total:,}" if total else "")
        machines = list(dict.fromkeys(run.ranks.machines))
        mesh = " × ".join(f"{axis} {size}" for axis, size in run.ranks.mesh.items())
        where = [
            f"{run.ranks.count:,} ranks" if run.ranks.count else "",
            mesh,
            run.ranks.device,
            ", ".join(machines[:4]) + (f" and {len(machines) - 4} more machines" if len(machines) > 4 else ""),
        ]
        state = "going" if run.going_on else "done" if run.whole.finished else "stopped"
        cards.append(
            tag(
                "div",
                tag("h1", letter(run, runs), run.name),
                tag("p", tag("span", run.status, class_=f"state {state}"), " ", place),
                tag("p", " · ".join(filter(None, where)), class_="quiet"),
                tag("p", run.path, class_="quiet path"),
            )
        )
    return tag("header", *cards, class_="two" if len(runs) == 2 else None)


def figures_of(run: RunFolder) -> dict[str, tuple[float | None, str]]:
    """The figures of a run by name, each with its kind (numbers.py)."""
    metrics = run.metrics
    curves = metrics.curves
    peak = curves.greatest("memory.peak_gib")
    return {
        "last loss": (curves.last("loss"), numbers.PLAIN),
        "last eval_loss": (curves.last("eval_loss"), numbers.PLAIN),
        "last eval_ppl": (curves.last("eval_ppl"), numbers.PLAIN),
        "lowest eval_loss": (metrics.best[0] if metrics.best else None, numbers.PLAIN),
        "tokens a second": (metrics.tokens_per_second, numbers.PLAIN),
        "seconds a step": (curves.mean("step_seconds"), numbers.SECONDS),
        "MFU": (curves.mean("mfu"), numbers.SHARE),
        "peak memory": (peak if peak is not None else curves.greatest("memory_gib"), numbers.GIB),
        "tokens trained on": (metrics.tokens_trained or None, numbers.COUNT),
        "time in steps": (metrics.trained_seconds or None, numbers.SECONDS),
        "skipped steps": (float(metrics.skipped_count), numbers.COUNT),
        "parameters": (None if run.whole.parameters is None else float(run.whole.parameters), numbers.COUNT),
    }


def _figures(runs: Sequence[RunFolder]) -> Html:
    """The figures of one run as tiles, of two as a table."""
    found = [figures_of(run) for run in runs]
    names = [name for name in found[0] if any(each[name][0] is not None for each in found)]
    if len(runs) == 1:
        tiles = [
            tag("div", tag("small", name), tag("b", numbers.shown(*found[0][name])), _beside(runs[0], name))
            for name in names
        ]
        return tag("div", *tiles, class_="tiles")
    rows: list[list[object]] = [
        [
            name,
            *(numbers.shown(*each[name]) for each in found),
            numbers.difference(found[0][name][0], found[1][name][0]),
        ]
        for name in names
    ]
    heads: list[object] = ["", *(letter(run, runs) for run in runs), "B against A"]
    differing = _differing(runs)
    keys = join(tag("h3", "Keys that differ"), _keys(runs, differing) if differing else tag("p", "None."))
    return section("In figures", tag("div", table(heads, rows), tag("div", keys), class_="columns"))


def _beside(run: RunFolder, name: str) -> Html | None:
    """What stands below a figure."""
    metrics = run.metrics
    if name == "lowest eval_loss" and metrics.best:
        return tag("small", f"step {metrics.best[1]:,}")
    if name == "skipped steps" and metrics.skipped:
        some = ", ".join(f"{step:,}" for step in metrics.skipped[:4])
        return tag("small", f"{some}{' …' if metrics.skipped_count > 4 else ''}")
    return tag("small", f"epoch {metrics.epoch:.4g}") if name == "tokens trained on" and metrics.epoch else None


def _warnings(runs: Sequence[RunFolder]) -> Html:
    """What the runs warned of, and what the page lacks."""
    told: list[Html] = []
    for run in runs:
        sign = letter(run, runs)
        told += [tag("li", sign, _when(event), event.text, class_="warning") for event in run.events.warnings]
        more = run.events.warning_count - len(run.events.warnings)
        told += [tag("li", sign, f"{more:,} more warnings are in events.jsonl")] if more else []
        if run.events.end is not None and not run.whole.finished:
            told += [tag("li", sign, f"the run ended: {run.events.end.text}", class_="warning")]
        told += [tag("li", sign, line, class_="missing") for line in run.complaints]
    return section("Warnings, and what is missing", tag("ul", *told, class_="notes")) if told else Html()


def _when(event: Event) -> str:
    return "" if event.step is None else f"step {event.step:,}: "


def _checkpoints(runs: Sequence[RunFolder]) -> Html:
    """The whole checkpoints in each folder."""
    parts = []
    for run in runs:
        rows: list[list[object]] = [
            [
                c.name,
                " ".join(["latest"] * c.latest + ["best"] * c.best),
                numbers.shown(c.bytes, numbers.BYTES),
                numbers.moment(c.time),
            ]
            for c in run.whole.checkpoints
        ]
        heading = tag("h3", letter(run, runs), run.name) if len(runs) > 1 else None
        parts.append(
            join(
                heading,
                table(["folder", "", "size", "written"], rows, 2)
                if rows
                else tag("p", "There is no whole checkpoint."),
            )
        )
    return section("Checkpoints", tag("div", *(tag("div", part) for part in parts), class_="columns"))


def _events(runs: Sequence[RunFolder]) -> Html:
    """What happened, as far as it is kept."""
    parts = []
    for run in runs:
        if not run.events.count:
            continue
        gap = [None] if run.events.left_out else []
        rows: list[list[object]] = []
        for event in [*run.events.first, *gap, *run.events.later]:
            if event is None:
                rows.append(["…", "", "", f"{run.events.left_out:,} more in events.jsonl"])
            else:
                step = "" if event.step is None else f"{event.step:,}"
                rows.append(
                    [numbers.moment(event.time) if event.time is not None else "", step, event.kind, event.text]
                )
        summary = tag("summary", letter(run, runs), f"{run.events.count:,} events")
        parts.append(tag("details", summary, table(["time", "step", "kind", "what"], rows, 4)))
    return section("Events", *parts)


def _differing(runs: Sequence[RunFolder]) -> list[str]:
    """The keys whose values differ between two runs."""
    first, second = (run.whole.settings.values for run in runs)
    return [key for key in dict.fromkeys([*first, *second]) if first.get(key) != second.get(key)]


def _keys(runs: Sequence[RunFolder], keys: Sequence[str]) -> Html:
    """A table of keys and their values."""
    heads: list[object] = ["key", *(letter(run, runs) or "value" for run in runs)]
    values = [run.whole.settings.values for run in runs]
    rows: list[list[object]] = [
        [tag("code", key), *(tag("code", each.get(key, numbers.UNKNOWN)) for each in values)] for key in keys
    ]
    return table(heads, rows, 3)


def _config(runs: Sequence[RunFolder]) -> Html:
    """The keys that are not at their defaults in a run, then the others."""
    settings = [run.whole.settings for run in runs]
    keys = list(dict.fromkeys(key for each in settings for key in each.values))
    if not keys:
        return Html()
    first = [key for key in keys if any(key in each.changed for each in settings)]
    rest = [key for key in keys if key not in set(first)]
    return section(
        "Config",
        tag("h3", "Keys that are not at their defaults"),
        _keys(runs, first) if first else tag("p", "None."),
        tag("details", tag("summary", f"The other {len(rest):,} keys"), _keys(runs, rest)),
    )


def _footer(runs: Sequence[RunFolder]) -> Html:
    """What the page was made from."""
    widths = {run.metrics.curves.width for run in runs}
    some = (
        ""
        if widths == {1}
        else (
            f" Pale bands show the least and the greatest of each {max(widths):,} steps, lines and layers their mean."
        )
    )
    return tag("footer", f"Made by tessera report {__version__}, {numbers.moment(time.time())}.{some}")
