"""TensorBoard: event files in a folder."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from tessera.config.schema import TrainConfig


class TensorBoard:
    """Event files in `logging_dir`, or `output`/runs. What an earlier part of a run wrote of later steps is void."""

    def __init__(self, config: TrainConfig, output: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds, and its package is optional

        folder = Path(config.logging_dir or output / "runs")
        self.where = f"tensorboard --logdir {folder}"
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)
        text = yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False)
        self._writer.add_text("config", f"```yaml\n{text}```", first_step)

    def step(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
