"""Weights & Biases, online or offline."""

import netrc
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tessera.config.schema import TrainConfig


class Wandb:
    """A run of Weights & Biases, its files in `output`/wandb."""

    def __init__(self, config: TrainConfig, output: Path, first_step: int) -> None:
        import wandb  # a second, and optional

        mode: Any = config.wandb_mode or os.environ.get("WANDB_MODE") or "online"
        keyless = mode == "online" and not _has_key()
        if keyless:  # it would ask for one on the terminal, and a run waits for nobody
            mode = "offline"
        self._run = wandb.init(
            project=config.wandb_project,
            entity=config.wandb_entity,
            name=config.wandb_name or config.wandb_run_id,
            id=config.wandb_run_id,
            resume="allow" if config.wandb_run_id else None,
            mode=mode,
            dir=str(output),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),
        )
        reason = "no API key is on this machine (wandb login): " if keyless else ""
        kept = f"{reason}kept in {output / 'wandb'}, wandb sync uploads it"
        self.where = str(self._run.url) if mode == "online" else kept

    def step(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


def _has_key() -> bool:
    """Whether an API key is in the environment or, as `wandb login` leaves it, in a netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    named = os.environ.get("NETRC")
    for file in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        with suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(str(file)).authenticators(host):
                return True
    return False
