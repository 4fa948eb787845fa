"""RunState: what a checkpoint remembers of its run beside tensors, as state.json holds it."""

from dataclasses import dataclass, field
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

FORMAT = 2
"""Raised with every key that comes or goes, which readers of the format before refuse. 1 was without SHA256SUMS."""


@dataclass(frozen=True)
class Source:
    """What goes beside the weights: the folders of config.json and tokenizer (None: as config.json's), and changes of
    config.json's keys."""

    folder: str
    tokenizer: str | None = None
    config_changes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunState:
    """The state of a run after `step` optimizer steps.

    `tokens` are the targets trained on, `samples` those taken from the stream, `skipped` the steps that changed no
    weight. `course` is what follows from the settings, `config` the settings themselves; both are empty where no run
    has made the checkpoint, and `optimizer` is false where it has model tensors alone.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    step: int
    tokens: int
    samples: int
    skipped: int
    source: Source
    course: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    optimizer: bool = True
    seed: int | None = None
    format: int = FORMAT

    def to_json(self) -> str:
        """The text of state.json."""
        return _JSON.dump_json(self, indent=1).decode() + "\n"

    @classmethod
    def from_json(cls, text: str) -> "RunState":
        """The state that `text` says. Raises ValueError, naming the key, for anything that is none."""
        try:
            return _JSON.validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


_JSON = TypeAdapter(RunState)
