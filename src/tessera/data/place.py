"""Place: where in a stream a row begins."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field

Count = Annotated[int, Field(ge=0, lt=2**53)]


@dataclass(frozen=True)
class Place:
    """A token of a stream: the shard, counted on from pass to pass; the document in it; and the token in that."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    shard: Count = 0
    document: Count = 0
    token: Count = 0
