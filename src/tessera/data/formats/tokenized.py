"""Rows that are tokens already: `input_ids`, and perhaps `labels`, `attention_mask` and `position_ids`."""

from typing import Any

import numpy as np

from tessera.core.errors import UserError
from tessera.data.rows import check_keys
from tessera.data.samples import IGNORED, Ids, Origin, Sample

COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids")


def token_sample(row: dict[str, Any], origin: Origin) -> Sample:
    """The row as it is; labels are unshifted, and masked positions become ignored ones.

    `position_ids` that begin at 0 again begin another document: the row then has `positions`.
    """
    tokens = _integers(row, "input_ids", origin)
    check_keys(row, origin, COLUMNS)
    if (tokens < 0).any():
        raise UserError("datasets", origin, f"`input_ids` holds the negative token {tokens.min()}")
    labels = None
    if row.get("labels") is not None:
        labels = _integers(row, "labels", origin, length=len(tokens))
        wrong = labels[(labels < 0) & (labels != IGNORED)]
        if wrong.size:
            raise UserError("datasets", origin, f"`labels` holds {wrong[0]}", f"token ids, or {IGNORED} to ignore")
    inner_masked = False
    if row.get("attention_mask") is not None:
        mask = _integers(row, "attention_mask", origin, length=len(tokens))
        if not np.isin(mask, (0, 1)).all():
            raise UserError("datasets", origin, "`attention_mask` must hold 0 and 1 alone")
        labels = np.where(mask == 1, tokens if labels is None else labels, np.int32(IGNORED))
        inner_masked = bool((np.diff(mask) > 0).any())
    positions = None
    if row.get("position_ids") is not None:
        positions = _integers(row, "position_ids", origin, length=len(tokens))
        goes_on = positions[1:] == positions[:-1] + 1
        wrong = np.flatnonzero(~(goes_on | (positions[1:] == 0)))
        if positions[0] != 0 or wrong.size:
            at = 0 if positions[0] != 0 else int(wrong[0]) + 1
            reason = f"`position_ids` holds {positions[at]} at place {at}"
            raise UserError(
                "datasets", origin, reason, "they count 0, 1, 2, …, and begin at 0 again with each document"
            )
        if len(positions) > 1 and not goes_on.any():
            labels = np.full_like(tokens, IGNORED)  # each token is a document by itself, in which nothing follows
        positions = None if goes_on.all() else positions
    return Sample(tokens, origin, labels, inner_masked, positions)


def _integers(row: dict[str, Any], key: str, origin: Origin, length: int | None = None) -> Ids:
    problem = f"`{key}` must be a list of integers"
    value = row.get(key)
    try:
        array = np.asarray(value) if isinstance(value, list) else None
    except ValueError:  # lists of unequal lengths inside
        array = None
    if array is None or array.ndim != 1 or array.size == 0 or array.dtype.kind not in "ib":
        raise UserError("datasets", origin, f"{problem}, at least one")
    if length is not None and len(array) != length:
        raise UserError("datasets", origin, f"`{key}` has {len(array)} entries, `input_ids` has {length}")
    if array.max() > np.iinfo(np.int32).max or array.min() < np.iinfo(np.int32).min:
        raise UserError("datasets", origin, f"{problem} of 32 bits")
    return array.astype(np.int32)
