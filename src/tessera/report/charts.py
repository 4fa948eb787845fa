"""Charts as inline SVG: lines over steps, and areas that lie one above the other.

A drawing has no text: it stretches with the page, while numbers at its sides are HTML and keep their size. What is
drawn is embedded beside it as numbers, which the page's script shows under the pointer.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tessera.report import numbers
from tessera.report.html import Html, data, join, tag

WIDTH, HEIGHT = 1000, 300
"""Of the drawing, in its own units."""


@dataclass(frozen=True)
class Line:
    """One curve: `values` at ascending `steps`. `colour` is a class of page.css, `style` line, dash or dots.

    `means` are steps and values to draw on top, where `values` are the least and the greatest of many steps.
    """

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    colour: str
    style: str = "line"
    means: tuple[Sequence[int], Sequence[float]] | None = None


@dataclass(frozen=True)
class Scale:
    """From values to places: `low` at the bottom, `high` at the top; `log` by their logarithms."""

    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies between the bottom, 0, and the top, 1."""
        if self.log:
            value, low, high = math.log10(value), math.log10(self.low), math.log10(self.high)
        else:
            low, high = self.low, self.high
        return min(max((value - low) / (high - low), 0.0), 1.0)

    def ticks(self, about: int = 5) -> list[float]:
        """Round values to name."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            every = max(1, -(-(last - first) // about))
            return [10.0**power for power in range(first, last + 1, every)]
        size = _round_step((self.high - self.low) / about)
        first = math.ceil(self.low / size - 1e-9)
        return [n * size for n in range(first, math.floor(self.high / size + 1e-9) + 1)]


def _round_step(size: float) -> float:
    """The least of 1, 2, 2.5 and 5 times a power of ten that is not below `size`."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(power * n for n in (1, 2, 2.5, 5, 10) if power * n >= size * (1 - 1e-9))


def scale_of(values: Iterable[float], *, zero: bool) -> Scale:
    """A scale for all of `values`; `zero`: it begins at 0 unless some are below.

    By logarithms where the greatest is fifty times what is usual: one spike would hide all else.
    """
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    if not zero and low > 0 and high > 50 * ordered[len(ordered) // 2]:
        return Scale(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)), log=True)
    if zero:
        low = min(low, 0.0)
    room = (high - low or abs(high) or 1.0) * 0.05
    return Scale(low if zero else low - room, high + room)


def line_chart(
    title: str, lines: Sequence[Line], kind: str, *, zero: bool = False, note: str = "", marks: Sequence[int] = ()
) -> Html:
    """Curves over one scale; `kind` says how numbers are written (numbers.py), `marks` are steps to point out.

    Empty where no line has a point.
    """
    lines = [line for line in lines if line.steps]
    if not lines:
        return Html()
    across, scale = _across(lines), scale_of((v for line in lines for v in line.values), zero=zero)
    note = ", ".join(filter(None, [note, "logarithmic scale" if scale.log else ""]))
    drawn = [
        tag("path", class_=f"{'band' if line.means else line.style} {line.colour}", d=_path(line, across, scale))
        for line in lines
    ]
    for line in lines:
        if line.means is not None:
            mean = Line(line.name, *line.means, line.colour)
            drawn.append(tag("path", class_=f"line {line.colour}", d=_path(mean, across, scale)))
    if marks:
        ticks = "".join(f"M{_x(step, across):.1f} 0v14" for step in marks)
        drawn.append(tag("path", class_="mark", d=ticks))
    legend = [(line.name, line.colour, numbers.shown(line.values[-1], kind)) for line in lines]
    embedded = [{"steps": line.steps, "values": line.values} for line in lines]
    return _figure(title, note, drawn, legend, embedded, across, scale, kind)


def stacked_chart(
    title: str, steps: Sequence[int], layers: Sequence[Line], kind: str, *, note: str = "", high: float = 0.0
) -> Html:
    """Areas that lie one above the other: each layer has a value at each of `steps`. `high`: the scale's least end."""
    if not steps or not layers:
        return Html()
    tops = [0.0] * len(steps)
    across, drawn, edges = _across(layers), [], [tops]
    for layer in layers:
        tops = [top + value for top, value in zip(tops, layer.values, strict=True)]
        edges.append(tops)
    scale = Scale(0.0, max(high, *tops, 1e-12) * 1.02)
    for layer, below, above in zip(layers, edges, edges[1:], strict=False):
        there = _corners(steps, above, across, scale)
        back = _corners(list(steps)[::-1], below[::-1], across, scale)
        drawn.append(tag("path", class_=f"area {layer.colour}", d=f"M{there}L{back}z"))
    legend = [(layer.name, layer.colour, numbers.shown(layer.values[-1], kind)) for layer in layers]
    embedded = [{"steps": layer.steps, "values": layer.values} for layer in layers]
    return _figure(title, note, drawn, legend, embedded, across, scale, kind)


def bar(parts: Sequence[tuple[str, str, float]]) -> Html:
    """One bar of (name, colour, amount), each as wide as its share of all."""
    whole = sum(amount for _, _, amount in parts) or 1.0
    cells = [
        tag("span", class_=colour, style=f"width:{100 * amount / whole:.3f}%", title=name)
        for name, colour, amount in parts
    ]
    return tag("div", *cells, class_="bar")


def swatch(colour: str) -> Html:
    """The patch of colour beside a name."""
    return tag("i", class_=colour)


def _across(lines: Sequence[Line]) -> Scale:
    """The scale of steps, from the first of all lines to the last."""
    first, last = min(line.steps[0] for line in lines), max(line.steps[-1] for line in lines)
    return Scale(first, last if last > first else first + 1)


def _x(step: float, across: Scale) -> float:
    return WIDTH * across.share(step)


def _corners(steps: Sequence[int], values: Sequence[float], across: Scale, scale: Scale) -> str:
    """The points of a path."""
    return "L".join(
        f"{_x(step, across):.1f} {HEIGHT * (1 - scale.share(value)):.1f}"
        for step, value in zip(steps, values, strict=True)
    )


def _path(line: Line, across: Scale, scale: Scale) -> str:
    """The path of a line; of dots a stroke without length each, which round ends make a dot, as of a single point."""
    if line.style != "dots" and len(line.steps) > 1:
        return "M" + _corners(line.steps, line.values, across, scale)
    return "".join(f"M{point}h0" for point in _corners(line.steps, line.values, across, scale).split("L"))


def _figure(
    title: str,
    note: str,
    drawn: list[Html],
    legend: list[tuple[str, str, str]],
    embedded: list[dict],
    across: Scale,
    scale: Scale,
    kind: str,
) -> Html:
    """The drawing with its title, legend, numbers at the sides, and the numbers that it shows."""
    down, right = scale.ticks(), across.ticks(6)
    grid = "".join(f"M0 {HEIGHT * (1 - scale.share(tick)):.1f}H{WIDTH}" for tick in down)
    svg = tag(
        "svg",
        tag("path", class_="grid", d=grid),
        *drawn,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=title,
    )
    ys = [
        tag("span", name, style=f"bottom:{100 * scale.share(tick):.2f}%")
        for tick, name in zip(down, numbers.ticks_shown(down, kind), strict=True)
    ]
    xs = [
        tag("span", numbers.steps_in_short(tick), style=f"left:{100 * across.share(tick):.2f}%")
        for tick in right
        if tick == int(tick)
    ]
    names = [tag("li", swatch(colour), name, " ", tag("output", value)) for name, colour, value in legend]
    told = {"from": across.low, "to": across.high, "kind": kind, "lines": embedded}
    return tag(
        "figure",
        tag("figcaption", tag("b", title), tag("small", note) if note else None, tag("small", class_="step")),
        tag("ul", *names, class_="legend"),
        tag(
            "div",
            tag("div", *ys, class_="ys"),
            join(svg, tag("div", class_="guide")),
            tag("div", *xs, class_="xs"),
            class_="plot",
        ),
        data(told),
        class_="chart",
    )
