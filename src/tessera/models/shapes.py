"""The sizes of a model by any of its names, for what needs no weights: of the table of public models, or a folder."""

import os

from tessera.core.files import usable_path
from tessera.models.config import ModelConfig
from tessera.models.hub import read_model_config, resolve_model_folder
from tessera.models.public import PublicModel, public_model


def shape_of(model: str, key: str = "base_model") -> ModelConfig:
    """The sizes of `model`: a local folder with config.json, a name or a size of models/public.py, or a hub name.

    A folder goes before the table, and the table before the hub: no network is used for what is in it. UserError, about
    `key` for a size: no such folder, model or size, or as `model_config`.

    >>> shape_of("70B").num_layers
    80
    """
    public = known_shape(model, key)
    return public.config if public else read_model_config(resolve_model_folder(model, weights=False))


def known_shape(model: str, key: str = "base_model") -> PublicModel | None:
    """The model of the table that `model` means; None where it is none, or where something of that name lies here.

    UserError as `public_model`.
    """
    try:
        here = os.path.lexists(usable_path(model))
    except (OSError, ValueError):  # told of by `resolve_model_folder`
        return None
    return None if here else public_model(model, key)
