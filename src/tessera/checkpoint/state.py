"""RunState: what a checkpoint remembers of its run beside tensors, as state.json holds it."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from tessera.data.place import Place

FORMAT = 3
"""Raised with every key that comes or goes, which readers of the format before refuse. 1 was without SHA256SUMS, 2
without `best`, `order` and `unit`."""
READ = (2, 3)
"""The formats that are read."""
Count = Annotated[int, Field(ge=0, lt=2**53)]


def _path(text: str) -> str:
    if not 0 < len(text) < 4096 or "\0" in text:
        raise ValueError("is the name of no folder")
    return text


POSITIONS = "max_position_embeddings"


def _known_changes(changes: dict[str, Any]) -> dict[str, Any]:
    """Checkpoints change which ids of config.json mark the end and the like, and its positions, and nothing else."""
    for key, value in changes.items():
        ids = value if isinstance(value, list) else [] if value is None else [value]
        whole = all(type(one) is int and 0 <= one < 2**31 for one in ids)
        if not whole or not (key.endswith("_token_id") or key == POSITIONS and ids == [value] != [0]):
            raise ValueError(f"{ascii(key)[:80]} is none of the changes that a run makes: ids of tokens, {POSITIONS}")
    return changes


@dataclass(frozen=True)
class Source:
    """What goes beside the weights: the folders of config.json and tokenizer (None: as config.json's), and changes of
    config.json's keys."""

    folder: Annotated[str, AfterValidator(_path)]
    tokenizer: Annotated[str, AfterValidator(_path)] | None = None
    config_changes: Annotated[dict[str, Any], AfterValidator(_known_changes)] = field(default_factory=dict)


@dataclass(frozen=True)
class Best:
    """The best of a run's evaluations: its loss and step, and how many since then in a row were not better.

    `checkpoint` is the step of the best checkpoint, which may be earlier: not each evaluation is followed by a save.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    eval_loss: float
    step: Count
    checkpoint: Count | None = None
    worse: Count = 0


@dataclass(frozen=True)
class RunState:
    """The state of a run after `step` optimizer steps.

    `tokens` are the targets trained on, `samples` the rows taken, `skipped` the steps that changed no weight. `order`
    is the version of the rows' order (data/epochs.py), and `unit` what `samples` counts: samples, or rows of packed
    ones or of a stream, and `stream` is where that goes on. `best` is the best evaluation, where they are compared.
    `course` is
    what follows from the settings, `config` the settings themselves; both are empty where no run has made the
    checkpoint, and `optimizer` is false where it has model tensors alone.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    step: Count
    tokens: Count
    samples: Count
    skipped: Count
    source: Source
    course: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    optimizer: bool = True
    best: Best | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    order: Annotated[int, Field(ge=1, le=2)] = 1
    unit: Literal["sample", "row"] = "sample"
    stream: Place | None = None
    format: int = FORMAT

    def __post_init__(self) -> None:
        """Raise ValueError for counts that no run comes to."""
        if self.skipped > self.step:
            raise ValueError(f"{self.skipped} steps skipped, of {self.step}")
        best = self.best
        if best is not None and not max(best.step + best.worse, best.checkpoint or 0) <= self.step:
            raise ValueError(f"a best evaluation of step {best.step}, after {self.step} steps")
        if self.unit == "row" and self.order == 1:
            raise ValueError("rows of packed samples in order 1, which packs none")
        whole = bool(self.step) == bool(self.samples) and self.samples <= self.step * 2**31
        if not whole or self.tokens > self.samples * 2**31:
            raise ValueError(f"{self.samples} samples and {self.tokens} tokens after {self.step} steps")

    def to_json(self) -> str:
        """The text of state.json."""
        return _JSON.dump_json(self, indent=1).decode() + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "RunState":
        """The state that `text` says. Raises ValueError, naming the key, for anything that is none."""
        try:
            return _JSON.validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))  # none where it is not one key alone
            reason = str(first["msg"]).removeprefix("Value error, ")
            raise ValueError(f"{key + ': ' if key else ''}{reason}"[:300]) from error


_JSON = TypeAdapter(RunState)
