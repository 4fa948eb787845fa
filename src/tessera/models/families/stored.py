"""Where a checkpoint of Hugging Face keeps each of our parameters."""

from collections.abc import Mapping
from dataclasses import dataclass

from tessera.models.config import ModelConfig
from tessera.models.families.family import HEAD, Family
from tessera.models.families.table import FAMILIES


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint: our parameters `parts` joined along dim 0, then transposed if `transposed`.

    `shape` is as stored. `names` are those it may have in a file; the first is the one to write.
    """

    names: tuple[str, ...]
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool


def stored_tensors(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[StoredTensor]:
    """Where the checkpoint of a model keeps each of its parameters, given their global `shapes` by our names.

    Raises ValueError for a parameter for which the family has no place.
    """
    family, tensors = FAMILIES[config.family], []
    for module in family.modules:
        for i in range(config.num_layers) if "{i}" in module.name else [0]:
            for kind in module.kinds:
                parts = tuple(f"{ours.format(i=i)}.{kind}" for ours in module.ours)
                if parts[0] in shapes:
                    shape = (sum(shapes[part][0] for part in parts), *shapes[parts[0]][1:])
                    transposed = module.transposed and len(shape) == 2
                    names = _names(f"{module.name.format(i=i)}.{kind}", family, config, parts)
                    tensors.append(StoredTensor(names, parts, shape[::-1] if transposed else shape, transposed))
    homeless = set(shapes) - {part for tensor in tensors for part in tensor.parts}
    if homeless:
        raise ValueError(f"{config.family} checkpoints have no place for {', '.join(sorted(homeless))}")
    return tensors


def _names(name: str, family: Family, config: ModelConfig, parts: tuple[str, ...]) -> tuple[str, ...]:
    """What a tensor may be called: as in a base model alone too, and a tied weight by either of its two names."""
    tied = (HEAD,) if config.tied and parts == ("embedding.weight",) else ()
    return tuple(dict.fromkeys((name, name.removeprefix(family.prefix), *tied)))
