"""The picture of a run's layout, drawn by `tessera inspect`, as SVG inside the page."""

import re
import tempfile
from pathlib import Path

from tessera.config.schema import TrainConfig
from tessera.core.errors import UserError
from tessera.inspect.of_config import report_on
from tessera.inspect.picture import draw
from tessera.report.html import Html

LARGEST = 300_000
"""Characters of the largest picture that a page takes in."""


def layout_picture(config: TrainConfig, folder: Path, prefix: str) -> Html:
    """Who holds which block in the layout of `config`, whose run is in `folder`; ids begin with `prefix`.

    Reads config.json of base_model, or of the run's own folder where base_model is not on this machine. UserError: it
    is in neither place, or the layout cannot be inspected.
    """
    places = [Path(config.base_model), folder]
    model = next((place for place in places if (place / "config.json").is_file()), None)
    if model is None:
        raise UserError("base_model", config.base_model, "is not on this machine, and the run has left no config.json")
    report = report_on(config.model_copy(update={"base_model": str(model)}))
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "layout.svg"
        draw(report.title, report.inspection.mesh, report.grids, file)
        text = file.read_text(encoding="utf-8")
    if len(text) > LARGEST:
        raise UserError(
            "ranks",
            report.inspection.mesh.world,
            "make too large a picture for a page",
            "tessera inspect --picture draws it into a file",
        )
    return inline(text, prefix)


def inline(svg: str, prefix: str) -> Html:
    """An SVG file as an element of a page: without what only files need, its ids unlike those of other pictures."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns(:\w+)?|width|height|version)="[^"]*"(?=[^>]*>)', "", svg, count=5)
    svg = svg.replace("xlink:href", "href")
    return Html(re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}-", svg))
