"""What all sections share: they refuse unknown keys, and a path may begin with ~."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tessera.core.files import usable_path


def _usable(value: object) -> object:
    """A path with ~ filled in. Raises ValueError for one that no file can have."""
    return usable_path(value) if isinstance(value, str) else value


LocalPath = Annotated[str, Field(min_length=1), BeforeValidator(_usable)]


class Section(BaseModel):
    """Settings that refuse unknown keys, do not turn one type into another, and never change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
