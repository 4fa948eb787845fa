"""What runs on the ranks of a pool: a module of its own, so that no worker imports transformers."""

import os
from typing import Any
from unittest.mock import patch

from support.mesh import shared_mesh
from tessera.config.schema import TrainConfig
from tessera.errors import RunFailed, UserError
from tessera.train.trainer import train


def train_on_rank(settings: dict[str, Any]) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the pool talks over gloo
    with patch("tessera.train.trainer.Mesh", lambda sizes, device: shared_mesh(sizes)):
        train(TrainConfig.model_validate(settings))


def refusal_on_rank(settings: dict[str, Any]) -> str:
    try:
        train_on_rank(settings)
    except (UserError, RunFailed) as error:
        return str(error)
    raise AssertionError("the run did not fail")
