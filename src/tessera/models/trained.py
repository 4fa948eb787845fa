"""Which parameters of a model are trained, chosen by the names that Hugging Face gives them, as axolotl does."""

import difflib
import re
from collections.abc import Sequence

from tessera.core.errors import UserError
from tessera.models.config import ModelConfig
from tessera.models.families.family import HEAD
from tessera.models.families.stored import StoredTensor, stored_tensors
from tessera.models.hub import parameter_shapes

KEY = "unfrozen_parameters"
_RANGE = re.compile(r".+\[[0-9]*:?[0-9]*\]$")
_LITERAL_DOT = re.compile(r"(?<!\\)\.(?![+*])")


def trained_parameters(model: ModelConfig, patterns: Sequence[str]) -> frozenset[str]:
    """Our names of the parameters whose Hugging Face name begins with one of `patterns`.

    These are regular expressions in which a dot is a dot, but for `.+` and `.*`. A tensor of Hugging Face that joins
    several of ours (GPT-2's c_attn) stands for all of them; a tied weight has the names of embedding and head. Raises
    UserError for a pattern that is none, names a range of rows, or matches nothing.
    """
    tensors = stored_tensors(model, parameter_shapes(model))
    found: set[str] = set()
    for pattern in patterns:
        if _RANGE.match(pattern):
            reason, hint = "names a range of a parameter's rows", "leave the range out: a parameter is trained whole"
            raise UserError(KEY, pattern, reason, hint)
        try:
            expression = re.compile(_LITERAL_DOT.sub(r"\\.", pattern))
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(KEY, pattern, f"is no regular expression: {error}") from error
        matched = [tensor for tensor in tensors if any(map(expression.match, _names(tensor)))]
        if not matched:
            known = [name for tensor in tensors for name in _names(tensor)]
            near = difflib.get_close_matches(pattern.replace("\\", "")[:100], known, n=3, cutoff=0)
            raise UserError(KEY, pattern, "matches no parameter of the model", f"nearest: {', '.join(near)}")
        found |= {part for tensor in matched for part in tensor.parts}
    return frozenset(found)


def _names(tensor: StoredTensor) -> list[str]:
    """What named_parameters() of transformers' model calls it."""
    return [tensor.names[0], *([HEAD] if HEAD in tensor.names[1:] else [])]
