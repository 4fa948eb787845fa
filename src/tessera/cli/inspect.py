"""`tessera inspect CONFIG`: what each rank of a layout holds, a picture of it, and what travels on which axis.

Needs config.json of the base model alone: no ranks, data or weights; writes nothing but the picture it is asked for.
"""

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tessera.config.load import load_config
from tessera.config.schema import TrainConfig
from tessera.core import device as devices
from tessera.core import terminal
from tessera.core.axes import AXES, DATA_AXES, MODEL_AXES, SEQUENCE_AXES
from tessera.core.errors import UserError
from tessera.core.files import writing_target
from tessera.core.mesh import Mesh
from tessera.inspect.held import (
    Held,
    Inspection,
    activations,
    cut_in_words,
    inspect_model,
    placements_in_words,
    streams,
    traffic,
)
from tessera.inspect.picture import Grid, check_picture, draw
from tessera.inspect.sequences import Sequences, documents_of, shared_sequences
from tessera.inspect.tables import WIDTH, Report, print_report
from tessera.layout.parallel import Parallel
from tessera.plan.peak import peak_bytes
from tessera.sizes.bounds import RANKS_SHOWN, at_most
from tessera.train.run import model_of
from tessera.train.settings import compute_dtype, context_line, fitting_layout, parallel_for, step_shape


def inspect(
    config_path: Path,
    overrides: Sequence[str],
    weight: str | None,
    activation: str | None,
    picture: Path | None,
    as_json: bool,
    documents: str | None = None,
) -> None:
    """Print the report on the config, as tables or JSON, and draw it into `picture`. Raises UserError first."""
    if picture is not None:
        check_picture(picture)
    config, notes = load_config(config_path, overrides)
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


def report_on(
    config: TrainConfig, weight: str | None = None, activation: str | None = None, documents: str | None = None
) -> Report:
    """What there is to say of `config`. UserError: sizes that do not fit, no such model, weight or activation.

    `documents`: the tokens of the documents of a row, with commas between; None: it is one.
    """
    at_most("processes", config.world_size, RANKS_SHOWN, "is the number of ranks, each of which is listed")
    model = model_of(config)
    config = fitting_layout(config, model)
    mesh = Mesh(config.mesh_sizes, device="meta", rank=0)
    parallel = parallel_for(config, mesh, compute=compute_dtype(config, devices.local_device()))
    inspection, shape = inspect_model(model, parallel), step_shape(config, parallel)
    if documents is not None:
        shape = documents_of(_lengths(documents, config, parallel), shape)
    ranks = f"{mesh} = {mesh.world} ranks" if mesh.world > 1 else str(mesh)
    shown = pictured = streams(model, inspection, shape)
    if activation is not None:
        pictured = [_activation(activations(model, inspection, shape), activation)]
        shown = [*shown, *(held for held in pictured if held not in shown)]
    auto = " (auto, before it has measured)" if config.tensor_parallel_schedule == "auto" else ""
    return Report(
        f"{config.tensor_parallel_mode}: {ranks}, schedule {parallel.schedule}{auto}",
        inspection,
        shape,
        shown,
        traffic(model, inspection, shape),
        _chosen(inspection.parameters, weight),
        pictured,
        peak=peak_bytes(model, shape, parallel, offload=config.fsdp_config.offload_params),
        device_bytes=devices.memory_bytes(devices.local_device()),
        context=context_line(config, model),
        sequences=shared_sequences(model, inspection, shape),
    )


def _lengths(documents: str, config: TrainConfig, parallel: Parallel) -> tuple[int, ...]:
    """The tokens of the documents of a row."""
    if not parallel.cuts_sequences:
        reason = "says what ranks have that share sequences, and in this layout none do"
        raise UserError("--documents", documents, reason, "context_parallel_size: 2 or more, or leave it out")
    words = documents.split(",")
    lengths = tuple(int(word) for word in words if word.strip().isdecimal())
    if len(lengths) < len(words) or 0 in lengths or sum(lengths) > config.sequence_len:
        reason = f"are the tokens of each document of a row, at most sequence_len {config.sequence_len} together"
        raise UserError("--documents", documents, reason, "for example 3000,1000,4096")
    return lengths


def _chosen(parameters: Sequence[Held], name: str | None) -> Held:
    """The parameter of this name; unless given the first layer's up projection."""
    by_name = {held.name: held for held in parameters}
    wanted = "layers.0.mlp.up.weight" if name is None else name
    if wanted not in by_name:
        near = sorted(by_name, key=lambda name: -difflib.SequenceMatcher(None, wanted, name).ratio())[:3]
        raise UserError("--weight", wanted, "is no parameter of this model", f"nearest: {', '.join(near)}")
    return by_name[wanted]


def _activation(by_name: dict[str, Held], wanted: str) -> Held:
    """The activation of this name."""
    if wanted not in by_name:
        reason = "is no activation of a layer of this model"
        raise UserError("--activation", wanted, reason, f"there are: {', '.join(by_name)}")
    return by_name[wanted]


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
