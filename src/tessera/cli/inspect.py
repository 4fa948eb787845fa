"""`tessera inspect CONFIG|MODEL`: what each rank of a layout holds, a picture of it, and what travels on which axis.

Needs the sizes of the base model alone (its config.json, or the table of public models): no ranks, data or weights;
writes nothing but the picture it is asked for.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tessera.cli.subject import config_of
from tessera.core import terminal
from tessera.core.axes import AXES, DATA_AXES, MODEL_AXES, SEQUENCE_AXES
from tessera.core.files import writing_target
from tessera.inspect.held import Held, Inspection, cut_in_words, placements_in_words
from tessera.inspect.of_config import report_on
from tessera.inspect.picture import Grid, check_picture, draw
from tessera.inspect.sequences import Sequences
from tessera.inspect.tables import WIDTH, Report, print_report


def inspect(
    subject: str | Path,
    overrides: Sequence[str],
    weight: str | None,
    activation: str | None,
    picture: Path | None,
    as_json: bool,
    documents: str | None = None,
) -> None:
    """Print the report on a YAML file or a model, as tables or JSON, and draw it into `picture`.

    Raises UserError before anything is printed.
    """
    if picture is not None:
        check_picture(picture)
    config, notes = config_of(str(subject), overrides)
    report = report_on(config, weight, activation, documents)
    if picture is not None:
        with writing_target(picture, "--picture"):
            draw(report.title, report.inspection.mesh, report.grids, picture)
    if as_json:
        terminal.say(json.dumps(json_report(report), ensure_ascii=False, indent=1))
        return
    console = terminal.console()
    if not console.is_terminal:
        console.width = WIDTH
    for note in notes:
        console.print(note, markup=False)
    print_report(console, report)
    if picture is not None:
        console.print(f"drawn into {picture}", markup=False)


def json_report(report: Report) -> dict[str, Any]:
    """The report for programs; sizes in elements or bytes, blocks as [first, last + 1]."""
    inspection, mesh, parallel = report.inspection, report.inspection.mesh, report.inspection.parallel
    return {
        "layout": report.title,
        "mesh": {axis: mesh.sizes[axis] for axis in (*DATA_AXES, *SEQUENCE_AXES, *MODEL_AXES)},
        "ranks": mesh.world,
        "schedule": str(parallel.schedule),
        "parameters": [_json_held(held, inspection, parallel.dtype) for held in inspection.parameters],
        "streams": [_json_held(held, inspection, parallel.compute) for held in report.streams],
        "totals": {
            name: {
                "elements": totals.whole,
                "elements_by_rank": totals.by_rank,
                "parameter_bytes_by_rank": totals.parameter_bytes,
                "gradient_bytes_by_rank": totals.gradient_bytes,
                "optimizer_bytes_by_rank": totals.optimizer_bytes,
            }
            for name, totals in report.totals.items()
        },
        "peak": asdict(report.peak) | {"total": report.peak.total},
        "matrices_are_one_of": inspection.share,
        "blocks": [_json_grid(grid) for grid in report.grids],
        "collectives": [
            {
                "site": move.transfer.site,
                "pass": move.transfer.phase,
                "what": move.transfer.what,
                "kind": move.transfer.kind,
                "axes": move.transfer.axes,
                "calls": {"least": min(move.calls), "most": max(move.calls)},
                "received_bytes": {"least": min(move.received), "most": max(move.received)},
                "times_a_step": move.transfer.times,
            }
            for move in report.traffic
        ],
        "sequences": None if report.sequences is None else _json_sequences(report.context, report.sequences),
    }


def _json_sequences(context: str | None, sequences: Sequences) -> dict[str, Any]:
    return {
        "how": context,
        "streams": sequences.streams,
        "document_bounds": sequences.stream.bounds,
        "shares": [
            {
                "ranks": share.ranks,
                "tokens": share.holds,
                "queries": share.computes,
                "tiles": share.tiles,
                "pairs_a_head": share.pairs,
                "share_of_the_mean": round(share.pairs / sequences.mean, 4),
                "key_value_tokens_received": share.tokens,
                "received_bytes_a_layer": share.bytes,
            }
            for share in sequences.shares
        ],
    }


def _json_held(held: Held, inspection: Inspection, dtype: torch.dtype) -> dict[str, Any]:
    least, most = held.range
    return {
        "name": held.name,
        "shape": held.spec.shape,
        "cut": cut_in_words(held.dims, held.spec.stored_cuts, inspection.mesh),
        "placements": dict(
            zip(inspection.mesh.present(AXES), placements_in_words(held.spec, inspection.mesh), strict=True)
        ),
        "least_local_shape": least,
        "most_local_shape": most,
        "local_shapes_by_rank": held.shapes,
        "bytes_by_rank": held.bytes(dtype),
        "copies": held.copies,
        "gradient_summed_over": inspection.mesh.present(held.spec.summed_axes),
    }


def _json_grid(grid: Grid) -> dict[str, Any]:
    return {
        "of": grid.title.partition("\n")[0],
        "rows": [(row.start, row.stop) for row in grid.rows],
        "columns": [(column.start, column.stop) for column in grid.columns],
        "ranks": grid.ranks,
    }
