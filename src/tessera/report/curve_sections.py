"""The sections of the page that are drawn from curves: training, time, memory, communication. One run or two."""

from collections.abc import Callable, Sequence

from tessera.core.errors import cut_short
from tessera.core.json_lines import number
from tessera.report import numbers
from tessera.report.charts import Line, bar, line_chart, stacked_chart, swatch
from tessera.report.folder import RunFolder
from tessera.report.html import Html, join, table, tag
from tessera.report.metrics import BETWEEN, KINDS, TERMS

OF_RUNS = ("k0", "k1")
"""Colours of the first and the second run."""
OF_TERMS = {
    "compute": "k0",
    "data": "k3",
    "optimizer": "k6",
    "idle": "grey",
    "other": "pale",
    "save": "k2",
    "evaluation": "k5",
}
OF_AXES = ("k1", "k7", "k4", "k8", "k9")
OF_KINDS = dict(zip(KINDS, ("k0", "k1", "k2", "grey"), strict=True))
NOT_MONITORED = "is not known: no line of metrics.jsonl has seconds, which a monitored run writes"


def section(title: str, *inner: object) -> Html:
    """A part of the page under a heading; empty where nothing is in it."""
    body = join(*inner)
    return tag("section", tag("h2", title), body) if body else Html()


def label(run: RunFolder, runs: Sequence[RunFolder], name: str) -> str:
    """What a curve is called: by its name, and by its run where two are compared."""
    return name if len(runs) == 1 else f"{name}, {'AB'[runs.index(run)]}"


def letter(run: RunFolder, runs: Sequence[RunFolder]) -> Html | None:
    """The sign of a run, A or B in its colour, where two are compared."""
    at = runs.index(run)
    return None if len(runs) == 1 else tag("i", "AB"[at], class_=f"letter {OF_RUNS[at]}")


def curve(
    run: RunFolder, runs: Sequence[RunFolder], name: str, said: str, *, style: str = "line", colour: str = ""
) -> Line:
    """A curve of metrics.jsonl in its run's colour, or where one run is shown in `colour`."""
    colour = colour if colour and len(runs) == 1 else OF_RUNS[runs.index(run)]
    curves = run.metrics.curves
    means = None
    if curves.width > 1 and style == "line":
        known = [
            (step, mean) for step, mean in zip(curves.steps(), curves.means(name), strict=True) if mean is not None
        ]
        means = ([step for step, _ in known], [mean for _, mean in known])
    return Line(label(run, runs, said), *curves.points(name), colour, style, means)


def training(runs: Sequence[RunFolder]) -> Html:
    """Loss, rate, norm and speed over the steps."""

    def one(title: str, name: str, kind: str, *, zero: bool = False) -> Html:
        return line_chart(title, [curve(run, runs, name, title.lower()) for run in runs], kind, zero=zero)

    losses = [curve(run, runs, "loss", "loss") for run in runs]
    losses += [curve(run, runs, "eval_loss", "eval_loss", style="dots", colour="k1") for run in runs]
    skipped = [step for run in runs for step in run.metrics.skipped]
    note = "marks at the top: steps without a finite loss" if skipped else ""
    return section(
        "Training",
        tag(
            "div",
            line_chart("Loss, nats a token", losses, numbers.PLAIN, note=note, marks=skipped),
            one("Learning rate", "learning_rate", numbers.RATE, zero=True),
            one("Gradient norm", "grad_norm", numbers.PLAIN),
            one("Tokens a second", "tokens_per_second", numbers.PLAIN, zero=True),
            one("MFU", "mfu", numbers.SHARE, zero=True),
            one("Seconds a step", "step_seconds", numbers.SECONDS, zero=True),
            class_="charts",
        )
        if any(run.metrics.steps for run in runs)
        else tag("p", "No step is known."),
    )


def colour_of(term: str, axes: Sequence[str]) -> str:
    """The colour of a term of time, or of communication over an axis."""
    axis = term.removeprefix("communication over ")
    return OF_TERMS.get(term) or OF_AXES[axes.index(axis) % len(OF_AXES) if axis in axes else 0]


def _layers(run: RunFolder) -> tuple[list[int], list[Line]]:
    """The terms of a step as layers, at the steps that have them: compute below, then communication by axis."""
    metrics = run.metrics
    names = {"compute": "seconds.compute"}
    names |= {f"communication over {axis}": f"seconds.communication.{axis}" for axis in metrics.axes}
    names |= {term: f"seconds.{term}" for term in TERMS if term not in BETWEEN}
    names = {term: name for term, name in names.items() if name in metrics.curves}
    by_term = {term: metrics.curves.means(name) for term, name in names.items()}
    there = [any(values[at] is not None for values in by_term.values()) for at in range(len(metrics.curves.steps()))]
    steps = [step for step, known in zip(metrics.curves.steps(), there, strict=True) if known]
    layers = [
        Line(
            term,
            steps,
            [float(f"{v or 0.0:.6g}") for v, known in zip(values, there, strict=True) if known],
            colour_of(term, metrics.axes),
        )
        for term, values in by_term.items()
    ]
    return steps, layers


def time(runs: Sequence[RunFolder]) -> Html:
    """The seconds of a step by term: over the steps, and on average."""
    if not any(run.metrics.monitored for run in runs):
        return section("Time by term", tag("p", f"Where the time went {NOT_MONITORED}."))
    drawn = [(run, *_layers(run)) for run in runs]
    high = max(
        (sum(values) for _, _, layers in drawn for values in zip(*(layer.values for layer in layers), strict=True)),
        default=0.0,
    )
    charts = [
        stacked_chart(
            label(run, runs, "Seconds a step by term"),
            steps,
            layers,
            numbers.SECONDS,
            high=high,
            note="mean of ranks" + (f", and of {run.metrics.curves.width} steps" * (run.metrics.curves.width > 1)),
        )
        for run, steps, layers in drawn
    ]
    return section(
        "Time by term",
        tag("div", *charts, class_="charts wide-first" if len(runs) == 1 else "charts"),
        tag(
            "div",
            tag("div", time_table(runs), *(_origin(run, runs) for run in runs)),
            tag("div", slowest(runs)),
            class_="columns" if len(runs) == 1 else None,
        ),
    )


def time_table(runs: Sequence[RunFolder]) -> Html:
    """The mean seconds of a step by term, with what was predicted where it was; of two runs the difference."""
    means = [run.metrics.seconds() for run in runs]
    expected = [run.predicted.seconds for run in runs]
    heads: list[object] = ["term"]
    for run, predicted in zip(runs, expected, strict=True):
        heads += [label(run, runs, "a step"), label(run, runs, "share")]
        heads += [label(run, runs, "predicted")] if predicted else []
    heads += ["B against A"] if len(runs) == 2 else []
    axes = list(dict.fromkeys(axis for run in runs for axis in run.metrics.axes))
    steps = [sum(seconds for term, seconds in found.items() if term not in BETWEEN) for found in means]
    terms = dict.fromkeys(term for found in (*means, *expected) for term in found)
    rows: list[list[object]] = []
    for term in sorted(terms, key=lambda term: term in BETWEEN):
        name = f"{term}, between steps" if term in BETWEEN else term
        cells: list[object] = [join(swatch(colour_of(term, axes)), name)]
        for found, step, predicted in zip(means, steps, expected, strict=True):
            share = found[term] / step if term in found and step > 0 and term not in BETWEEN else None
            cells += [numbers.shown(found.get(term), numbers.SECONDS), numbers.shown(share, numbers.SHARE)]
            cells += [numbers.shown(predicted.get(term), numbers.SECONDS)] if predicted else []
        cells += [numbers.difference(means[0].get(term), means[1].get(term))] if len(runs) == 2 else []
        rows.append(cells)
    rows.insert(sum(term not in BETWEEN for term in terms), [tag("b", "a step"), *_totals(runs, steps)])
    return table(heads, rows)


def _totals(runs: Sequence[RunFolder], steps: Sequence[float]) -> list[object]:
    """The row of the table of time that sums the terms of a step, with the band of what was predicted."""
    cells: list[object] = []
    for run, seconds in zip(runs, steps, strict=True):
        predicted, band = run.predicted.seconds, run.predicted.band
        cells += [numbers.shown(seconds, numbers.SECONDS), ""]
        whole = sum(value for term, value in predicted.items() if term not in BETWEEN)
        about = "" if band is None else f" ± {numbers.shown(band, numbers.SHARE)}"
        cells += [numbers.shown(whole, numbers.SECONDS) + about] if predicted else []
    return cells + ([numbers.difference(*steps)] if len(steps) == 2 else [])


def _origin(run: RunFolder, runs: Sequence[RunFolder]) -> Html:
    """Whose rates a prediction is made of."""
    found = run.predicted
    if not found.seconds:
        return Html()
    profile = f"by the profile {found.profile}, " if found.profile else ""
    where = "measured on the run's machine" if found.measured_here else "not measured there (tessera measure)"
    return tag("p", letter(run, runs), f"Predicted {profile}{where}.", class_="quiet")


def slowest(runs: Sequence[RunFolder]) -> Html:
    """Which rank others waited for, by how much and how often."""
    told = []
    for run in runs:
        named = sorted(run.metrics.slowest.items(), key=lambda item: -item[1][1])
        times = sum(count for _, (count, _, _) in named)
        for (rank, machine), (count, seconds, together) in named[:3]:
            where = f" on {machine}" if machine else ""
            excess = numbers.shown(seconds / count, numbers.SECONDS)
            often = f"was the slowest at {count:,} of {times:,} logging steps, by {excess} a step"
            whole = f"; at {together:,} of them every rank of that machine was slower than all others" * (together > 0)
            told.append(tag("li", letter(run, runs), f"rank {rank}{where} {often}{whole}"))
    return join(tag("h3", "The slowest rank"), tag("ul", *told)) if told else Html()


def memory(runs: Sequence[RunFolder]) -> Html:
    """What the fullest rank holds, over the steps and by kind."""
    lines = []
    for run in runs:
        known = "memory.peak_gib" in run.metrics.curves
        lines.append(curve(run, runs, "memory.peak_gib" if known else "memory_gib", "peak"))
        if known:
            lines.append(curve(run, runs, "memory.now_gib", "now", style="dash"))
    charts = line_chart("Memory of the fullest rank", lines, numbers.GIB, zero=True)
    kinds = [run for run in runs if run.metrics.kinds]
    return section(
        "Memory",
        tag("div", charts, tag("div", *(_by_kind(run, runs) for run in kinds)), class_="charts")
        if charts or kinds
        else None,
    )


def _by_kind(run: RunFolder, runs: Sequence[RunFolder]) -> Html:
    kinds, expected = run.metrics.kinds, run.predicted.kinds
    whole = sum(kinds.values()) or 1.0
    rows: list[list[object]] = [
        [
            join(swatch(OF_KINDS[kind]), kind),
            numbers.shown(held, numbers.GIB),
            numbers.shown(held / whole, numbers.SHARE),
            *([numbers.shown(expected.get(kind), numbers.GIB)] if expected else []),
        ]
        for kind, held in kinds.items()
    ]
    rows.append([tag("b", "together"), numbers.shown(sum(kinds.values()), numbers.GIB), ""])
    rows[-1] += [numbers.shown(sum(expected.values()), numbers.GIB)] if expected else []
    parts = [(kind, OF_KINDS[kind], held) for kind, held in kinds.items()]
    title = label(run, runs, "At the peak of tensors that live, by kind")
    heads: list[object] = ["kind", "held", "share", *(["predicted"] if expected else [])]
    return join(tag("h3", title), bar(parts), table(heads, rows))


def communication(runs: Sequence[RunFolder]) -> Html:
    """What travels on which axis: seconds that a rank waits for it, and bytes."""
    axes = list(dict.fromkeys(axis for run in runs for axis in run.metrics.axes))
    if not axes:
        return section("Communication by axis", tag("p", "Nothing travels between ranks, as far as is known."))
    title, note = "Seconds of communication a step", "what no compute hides"
    waits = {axis: [_waits(run, runs, axis, axes) for run in runs] for axis in axes}
    if len(runs) == 1:
        charts = [
            line_chart(
                title, [line for lines in waits.values() for line in lines], numbers.SECONDS, zero=True, note=note
            )
        ]
    else:
        charts = [
            line_chart(f"{title}, {axis}", lines, numbers.SECONDS, zero=True, note=note)
            for axis, lines in waits.items()
        ]
    return section(
        "Communication by axis",
        tag("div", *charts, class_="charts") if any(charts) else None,
        _axes_table(runs, axes),
        *(_collectives(run, runs) for run in runs),
    )


def _waits(run: RunFolder, runs: Sequence[RunFolder], axis: str, axes: Sequence[str]) -> Line:
    """The seconds of communication over one axis: named by the axis, or of two runs by the run."""
    name = f"seconds.communication.{axis}"
    return curve(run, runs, name, axis, colour=colour_of(f"communication over {axis}", axes))


def _axes_table(runs: Sequence[RunFolder], axes: Sequence[str]) -> Html:
    """The mean seconds and bytes of a step by axis."""
    heads: list[object] = ["axis"]
    for run in runs:
        heads += [label(run, runs, name) for name in ("seconds a step", "bytes a step", "bytes a second")]
    heads += ["seconds, B against A"] if len(runs) == 2 else []
    rows: list[list[object]] = []
    for axis in axes:
        cells: list[object] = [join(swatch(colour_of(f"communication over {axis}", axes)), axis)]
        waited = [run.metrics.curves.mean(f"seconds.communication.{axis}") for run in runs]
        for run, seconds in zip(runs, waited, strict=True):
            moved = run.metrics.curves.mean(f"communicated_bytes.{axis}")
            cells += [
                numbers.shown(seconds, numbers.SECONDS),
                numbers.shown(moved, numbers.BYTES),
                numbers.shown(moved / seconds if moved and seconds else None, numbers.BYTES),
            ]
        rows.append(cells + ([numbers.difference(*waited)] if len(runs) == 2 else []))
    return table(heads, rows)


def _collectives(run: RunFolder, runs: Sequence[RunFolder]) -> Html:
    """The collectives of the last step, from summary.json."""
    rows: list[list[object]] = [
        [
            cut_short(row.get("axis"), 60),
            cut_short(row.get("kind"), 60),
            numbers.shown(number(row.get("calls")), numbers.COUNT),
            numbers.shown(number(row.get("bytes")), numbers.BYTES),
        ]
        for row in run.whole.collectives
    ]
    summary = tag("summary", label(run, runs, "The collectives of a step"))
    return tag("details", summary, table(["axis", "kind", "calls", "bytes"], rows, 2)) if rows else Html()


Section = Callable[[Sequence[RunFolder]], Html]
SECTIONS: tuple[Section, ...] = (training, time, memory, communication)
