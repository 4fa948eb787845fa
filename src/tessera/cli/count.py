"""`tessera count [CONFIG|MODEL]`: elements received and memory of one device against the number of devices.

Every geometry is counted. The command fails where a count differs from the closed form (plan/report.py).
"""

from dataclasses import dataclass, replace
from pathlib import Path

from rich.progress import track

from tessera.cli.subject import is_model
from tessera.config.load import load_config
from tessera.config.schema import TrainConfig
from tessera.core import terminal
from tessera.core.errors import UserError
from tessera.core.files import check_target_folder, writing_target
from tessera.layout.shape import StepShape
from tessera.models.config import ModelConfig
from tessera.models.shapes import shape_of
from tessera.plan.report import describe, draw, left_out, line_of, markdown, terminal_table
from tessera.plan.scale import contenders, sharing_rows
from tessera.sizes.bounds import GIB, RANK_COUNTS, RANKS
from tessera.train.run import model_of

LAYERS = 16
DEVICES = "8,16,64,512"
BATCH, SEQUENCE = 512, 64


@dataclass(frozen=True)
class Asked:
    """The argument and the options; None: not given. `memory`: the GiB of a device, which the best mesh may hold.

    `context`: also layouts whose devices share rows.
    """

    subject: str | None = None
    model: str | None = None
    ranks: str | None = None
    layers: int | None = None
    batch: int | None = None
    sequence: int | None = None
    keep: bool = False
    memory: float = 80.0
    context: bool = False


def default_model(layers: int = LAYERS) -> ModelConfig:
    """Layers of the sizes of Llama 3 70B."""
    return replace(shape_of("llama-3-70b"), num_layers=layers)


def count(asked: Asked, output: Path | None) -> None:
    """Count every layout at each number of devices; print the table, and write it and its figure into `output`."""
    if not 0 < asked.memory <= GIB:  # nor is nan
        raise UserError("--memory", asked.memory, "is not the memory of a device, in GiB", "for example 80")
    worlds, config, shape = question(asked)
    if output is not None:
        given = [Path(named) for named in (asked.subject, asked.model) if named is not None]
        if output.exists() and output.resolve() in [named.resolve() for named in given]:
            reason = "is the folder of the model, which stays as it is"
            raise UserError("--output", output, reason, "another folder")
        check_target_folder(output, "--output")
        with writing_target(output, "--output"):
            output.mkdir(parents=True, exist_ok=True)
    console = terminal.console(markup=False)
    todo = []
    for world in worlds:
        todo += contenders(config, shape, world, asked.keep, asked.memory * 2**30)
        todo += sharing_rows(config, shape, world) if asked.context else []
    lines = [
        line_of(config, shape, contender)
        for contender in track(todo, "counting", console=console, transient=True, disable=not console.is_terminal)
    ]
    title = describe(config, shape, asked.keep, asked.memory)
    console.print(terminal_table(title, lines))
    for line in left_out(lines):
        console.print(line)
    if output is not None:
        with writing_target(output, "--output"):
            (output / "scale.md").write_text(markdown(title, lines))
            draw(title, lines, output)
        console.print(f"written: {output}/scale.md, scale.svg, scale.png")


def question(asked: Asked) -> tuple[list[int], ModelConfig, StepShape]:
    """The numbers of devices, the model and the step that are asked about; what is not given is the file's, if any."""
    if asked.subject is not None and asked.model is not None:
        raise UserError("--model", asked.model, f"the model is given already: {asked.subject}", "give one of the two")
    numbers = None if asked.ranks is None else _numbers(asked.ranks)
    subject = asked.subject if asked.model is None else asked.model
    batch, sequence, devices = BATCH, SEQUENCE, _numbers(DEVICES)
    if subject is None:
        model = default_model()
    elif asked.model is None and not is_model(subject):
        config, _ = load_config(subject)
        model, batch, sequence = model_of(config), _rows(config), config.sequence_len
        devices = [config.world_size] if config.world_size > 1 else devices
    else:
        model = shape_of(subject, "model")
    model = replace(model, embedding_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0)
    model = replace(model, num_layers=asked.layers or model.num_layers)
    return numbers or devices, model, StepShape(asked.batch or batch, asked.sequence or sequence)


def _rows(config: TrainConfig) -> int:
    """The rows of a micro-batch on all data ranks together: of so many each layout finds its own share."""
    data = config.data_sizes
    return config.micro_batch_size * data["replicate"] * data["shard"]


def _numbers(ranks: str) -> list[int]:
    try:
        numbers = sorted({int(word) for word in ranks.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1 or numbers[-1] > RANKS or len(numbers) > RANK_COUNTS:
        reason = f"are the numbers of devices to compare, at most {RANK_COUNTS} of them, each from 1 to {RANKS}"
        raise UserError("--ranks", ranks, reason, f"for example {DEVICES}")
    return numbers
