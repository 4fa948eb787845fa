"""What runs on the ranks of a pool: a run, what it says, and what its model is asked to save."""

from typing import Any
from unittest.mock import patch

from tessera.core.host_memory import HostMemory
from tessera.engine.fsdp import build_decoder
from tessera.models.decoder import Decoder
from tessera.nn.mlp import MLP
from tessera.nn.once import Once
from train.on_rank import said_on_rank


def saving_run(settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What a run prints; and of its first rank's steps the groups of heads, the tiles of an MLP, the most bytes that a
    forward left in host memory, how often layers were asked to keep what runs once, and whether they run again."""
    models: list[Decoder] = []
    seen: dict[str, Any] = {"tiles": 1, "host": 0, "once": 0}

    def build(*args: Any, **options: Any) -> Decoder:
        models.append(build_decoder(*args, **options))
        return models[-1]

    def sizes(self: MLP, tokens: int) -> list[int]:
        found = tile_sizes(self, tokens)
        seen["tiles"] = max(seen["tiles"], len(found))
        return found

    def begin(self: Once) -> None:
        seen["once"] += 1
        begin_once(self)

    def pack(self: HostMemory, x: Any) -> Any:
        packed = pack_host(self, x)
        seen["host"] = max(seen["host"], self.bytes)
        return packed

    tile_sizes, begin_once, pack_host = MLP.tile_sizes, Once.begin, HostMemory.pack
    with (
        patch("tessera.train.build.build_decoder", build),
        patch.object(MLP, "tile_sizes", sizes),
        patch.object(Once, "begin", begin),
        patch.object(HostMemory, "pack", pack),
    ):
        said = said_on_rank(settings)
    seen |= {"again": models[0].gradient_checkpointing, "chunks": models[0].parallel.context.chunks}
    return said, seen
