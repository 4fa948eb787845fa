"""`tessera count`: elements received and memory of one device against the number of devices, for every geometry.

The command fails where a count differs from the closed form (plan/report.py).
"""

from dataclasses import replace
from pathlib import Path

from rich.progress import track

from tessera.core import terminal
from tessera.core.errors import UserError
from tessera.core.files import check_target_folder, writing_target
from tessera.layout.shape import StepShape
from tessera.models.config import ModelConfig
from tessera.nn.rope import RopeConfig
from tessera.plan.report import describe, draw, left_out, line_of, markdown, terminal_table
from tessera.plan.scale import contenders, sharing_rows
from tessera.sizes.bounds import GB, RANK_COUNTS, RANKS

LAYERS = 16


def default_model(layers: int = LAYERS) -> ModelConfig:
    """Layers of the sizes of Llama 3 70B."""
    return ModelConfig(
        family="llama",
        vocab_size=128256,
        hidden_size=8192,
        num_layers=layers,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        ffn_size=28672,
        max_positions=8192,
        rope=RopeConfig(theta=500000.0),
    )


def count(
    ranks: str,
    model: str | None,
    layers: int | None,
    batch: int,
    sequence: int,
    keep: bool,
    memory: float,
    context: bool,
    output: Path | None,
) -> None:
    """Count every layout at each of `ranks`; print the table, and write it and its figure into `output`.

    `memory`: the GB of a device, which the best mesh may hold. `context`: also layouts whose devices share rows.
    """
    worlds = _numbers(ranks)
    if not 0 < memory <= GB:  # nor is nan
        raise UserError("--memory", memory, "is not the memory of a device, in GB", "for example 80")
    if output is not None:
        check_target_folder(output, "--output")
        with writing_target(output, "--output"):
            output.mkdir(parents=True, exist_ok=True)
    config = _model(model, layers)
    shape = StepShape(batch, sequence)
    console = terminal.console(markup=False)
    todo = []
    for world in worlds:
        todo += contenders(config, shape, world, keep, memory * 1e9)
        todo += sharing_rows(config, shape, world) if context else []
    lines = [
        line_of(config, shape, contender)
        for contender in track(todo, "counting", console=console, transient=True, disable=not console.is_terminal)
    ]
    title = describe(config, shape, keep, memory)
    console.print(terminal_table(title, lines))
    for line in left_out(lines):
        console.print(line)
    if output is not None:
        with writing_target(output, "--output"):
            (output / "scale.md").write_text(markdown(title, lines))
            draw(title, lines, output)
        console.print(f"written: {output}/scale.md, scale.svg, scale.png")


def _numbers(ranks: str) -> list[int]:
    try:
        numbers = sorted({int(word) for word in ranks.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1 or numbers[-1] > RANKS or len(numbers) > RANK_COUNTS:
        reason = f"are the numbers of devices to compare, at most {RANK_COUNTS} of them, each from 1 to {RANKS}"
        raise UserError("--ranks", ranks, reason, "for example 8,16,64,512")
    return numbers


def _model(folder: str | None, layers: int | None) -> ModelConfig:
    """The sizes of `folder`'s config.json, or the default's, with so many layers."""
    if folder is None:
        return default_model(layers or LAYERS)
    from tessera.models.hub import read_model_config, resolve_model_folder  # only where a folder is given

    config = read_model_config(resolve_model_folder(folder, weights=False))
    config = replace(config, embedding_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0)
    return replace(config, num_layers=layers or config.num_layers)
