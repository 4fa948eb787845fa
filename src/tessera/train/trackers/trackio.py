"""trackio: a database on this machine, or a Space of the Hugging Face hub."""

from collections.abc import Mapping
from pathlib import Path

from tessera.config.schema import TrainConfig


class Trackio:
    """A run of trackio."""

    def __init__(self, config: TrainConfig, output: Path, first_step: int) -> None:
        import trackio  # optional

        self._finish = trackio.finish  # its run's own `finish` would be called once more when the process ends
        project = config.trackio_project_name or "tessera"
        self._run = trackio.init(
            project=project,
            name=config.trackio_run_name,
            space_id=config.trackio_space_id,
            config=config.model_dump(mode="json"),
            resume="allow",  # a run of this name is gone on with
        )
        space = config.trackio_space_id
        self.where = f"https://huggingface.co/spaces/{space}" if space else f"trackio show --project {project}"

    def step(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._finish()
