"""What all sections share: they refuse unknown keys, and a path may begin with ~."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _expand_home(value: object) -> object:
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~") else value


LocalPath = Annotated[str, Field(min_length=1), BeforeValidator(_expand_home)]


class Section(BaseModel):
    """Settings that refuse unknown keys, do not turn one type into another, and never change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
