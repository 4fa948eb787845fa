"""The contenders. Each module has `build(shape, folder, rank, world, **options)`; what it returns has
`step(tokens)`: one optimizer step on int64 tokens [batch, sequence], giving loss and gradient norm."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contender:
    """One line of the tables: a module of this package, its number of ranks, the options of its `build`."""

    name: str
    module: str
    ranks: int
    options: dict[str, Any] = field(default_factory=dict)


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("transformers", "transformers_llama", 1),
        Contender("tessera-1", "tessera_llama", 1, {"sequence_parallel": False}),
        Contender("transformers-tp", "transformers_llama", 2),
        Contender("torch-tp", "torch_llama", 2, {"sequence_parallel": False}),
        Contender("torch-tp-sp", "torch_llama", 2, {"sequence_parallel": True}),
        Contender("tessera-2", "tessera_llama", 2, {"sequence_parallel": False}),
        Contender("tessera-2-sp", "tessera_llama", 2, {"sequence_parallel": True}),
    )
}
REFERENCE = "transformers"  # all others must reproduce its losses and gradient norms
