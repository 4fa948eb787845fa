"""`tessera train CONFIG`."""

from collections.abc import Sequence
from pathlib import Path

from tessera.launch.launch import launch
from tessera.launch.options import LaunchOptions


def train(
    config: Path,
    num_processes: int | None,
    max_steps: int | None,
    overrides: Sequence[str],
    options: LaunchOptions,
) -> None:
    """Train the run described by the YAML file `config`; see `launch`."""
    steps = [] if max_steps is None else [f"max_steps={max_steps}"]
    launch(config, [*overrides, *steps], num_processes, options)
