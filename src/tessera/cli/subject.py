"""What `inspect` and `count` are about: a YAML file, or a model by its folder, its name or its size."""

import os
import re
from collections.abc import Sequence

from tessera.config.load import load_config, make_config
from tessera.config.overrides import lay_over
from tessera.config.schema import TrainConfig
from tessera.core.files import usable_path
from tessera.models.public import public_model
from tessera.models.shapes import shape_of

NO_DATA = "no-data-is-read.txt"


def is_model(subject: str) -> bool:
    """Whether `subject` is a model, not a YAML file: a folder, a name or size of the table, or of the form owner/name.

    UserError: a size that no model has.
    """
    try:
        path = usable_path(subject)
        if os.path.lexists(path) or path.endswith((".yaml", ".yml")):
            return os.path.isdir(path)
    except (OSError, ValueError):  # told of by the reader of files
        return False
    return public_model(subject, "model") is not None or bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", subject, re.ASCII))


def config_of(subject: str, overrides: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """The config in the YAML file `subject`, with `overrides` on top, and its notes.

    Of a model: that of a run with the defaults of every key that is not overridden; its rows are as long as the default
    or as the model's positions, whichever is shorter. UserError as `load_config` and `shape_of`.
    """
    if not is_model(subject):
        return load_config(subject, overrides)
    model = shape_of(subject, "model")
    windows = [kind.window for kind in model.layer_kinds if kind.window is not None]
    longest = min([TrainConfig.model_fields["sequence_len"].default, model.max_positions, *windows])
    values = {"base_model": subject, "datasets": [{"path": NO_DATA}], "sequence_len": longest}
    lay_over(values, overrides)
    return make_config(values, subject)
