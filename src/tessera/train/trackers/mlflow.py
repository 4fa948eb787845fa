"""MLflow: a server, or a store of its own in the run's folder."""

import os
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from tessera.config.schema import TrainConfig

LONGEST = 500
"""Characters of a parameter's value that every version of MLflow takes; resolved_config.yaml has all of them."""
AT_ONCE = 100
"""Parameters that a request may hold."""


class Mlflow:
    """A run of MLflow, by its client: nothing that the process has of it otherwise is changed."""

    def __init__(self, config: TrainConfig, output: Path, first_step: int) -> None:
        # or it refuses folders, the one store of its skinny form
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient  # seconds, and optional
        from mlflow.entities import Param

        database = find_spec("sqlalchemy") and find_spec("alembic")  # what its skinny form lacks
        local = f"sqlite:///{output.resolve() / 'mlflow.db'}" if database else str(output / "mlruns")
        uri = config.mlflow_tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or local
        self._client = MlflowClient(tracking_uri=uri)
        experiment = config.mlflow_experiment_name or "tessera"
        known = self._client.get_experiment_by_name(experiment)
        number = known.experiment_id if known else self._client.create_experiment(experiment)
        self._run = self._client.create_run(number, run_name=config.mlflow_run_name).info.run_id
        self.where = f"experiment {experiment}, run {self._run}, in {uri}"
        keys = config.model_dump(mode="json").items()
        given = [Param(key, str(value)[:LONGEST]) for key, value in keys if value is not None and value != ""]
        for first in range(0, len(given), AT_ONCE):
            self._client.log_batch(self._run, params=given[first : first + AT_ONCE])

    def step(self, step: int, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, [Metric(name, number, now, step) for name, number in numbers.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run)
