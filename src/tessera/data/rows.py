"""Keys of JSONL rows that would change what a row means, and are not heeded here: refused unless they say nothing."""

from collections.abc import Collection
from typing import Any

from tessera.core.errors import UserError
from tessera.data.samples import Origin

PACKED = "`position_ids` that begin at 0 again with each document say it; or give each document a row of its own"
WEIGHED = "weights and masks of the loss are not done: write -100 into `labels` where nothing is to be learnt"
MEANING = {
    **dict.fromkeys(("position_ids", "cu_seqlens", "cu_seq_lens", "cu_seq_lens_q", "cu_seq_lens_k"), PACKED),
    **dict.fromkeys(("seq_lens", "seqlens", "seq_lengths", "sequence_lengths", "seq_idx", "sequence_id"), PACKED),
    **dict.fromkeys(("sequence_ids", "document_id", "document_ids", "doc_ids", "segment_ids"), PACKED),
    "token_type_ids": "no model here has token types: leave the key out",
    **dict.fromkeys(("loss_mask", "loss_masks", "completion_mask", "assistant_masks", "label_mask"), WEIGHED),
    **dict.fromkeys(("weight", "weights", "loss_weight", "loss_weights", "sample_weight"), WEIGHED),
    **dict.fromkeys(("labels", "attention_mask"), "rows of `input_ids` have them, rows of text do not"),
    **dict.fromkeys(("system", "history"), "only instruction, input and output become text: write it into them"),
}

SAY_NOTHING = {"special_tokens_mask", "word_ids"}
"""Keys of tokenized rows that tell of each token what does not change the row."""


def check_keys(row: dict[str, Any], origin: Origin, heeded: Collection[str], prompted: bool = False) -> None:
    """Raise UserError for a key beside `heeded` that changes the meaning of the row; others are ignored.

    `prompted`: an instruction, which a system prompt or a history would change.
    """
    for key, hint in MEANING.items():
        if key not in row or key in heeded or (key in ("system", "history") and not prompted):
            continue
        ids = row.get("input_ids")
        if not _says_nothing(key, row[key], len(ids) if isinstance(ids, list) else 0):
            raise UserError("datasets", origin, f"`{key}` would change what the row means, and is not heeded", hint)
    if "input_ids" in heeded:
        length = len(row["input_ids"])
        for key in row.keys() - MEANING.keys() - SAY_NOTHING - set(heeded):
            reason = _of_tokens(row[key], length)
            if reason and row[key] not in (row["input_ids"], row.get("labels")):
                raise UserError("datasets", origin, f"`{key}` has {reason}, and is not heeded", "leave the key out")


def _of_tokens(value: Any, length: int) -> str:
    """What a list under a name that nobody knows tells of the row's tokens: then it may mean something else than it
    seems. "" where it tells nothing."""
    if not isinstance(value, list) or len(value) < 2 or any(type(item) not in (int, float, bool) for item in value):
        return ""
    if len(value) == length and any(item != value[0] for item in value):
        return "a number for each token"
    whole = all(type(item) is int for item in value)
    if whole and min(value) > 0 and sum(value) == length:
        return "numbers that cut the tokens into documents"
    if whole and len(value) > 2 and [value[0], value[-1]] == [0, length] and value == sorted(value):
        return "places that cut the tokens into documents"
    return ""


def _says_nothing(key: str, value: Any, length: int) -> bool:
    if value is None or value == "" or value == []:
        return True
    if key in ("labels", "attention_mask"):  # beside input_ids they are a second way to say the row, a label is a class
        return length > 0 or not isinstance(value, list)
    items = value if isinstance(value, list) else [value]
    hint = MEANING[key]
    if key == "position_ids":
        return items == list(range(length))
    if hint is WEIGHED:
        return all(item == 1 for item in items)
    if key.startswith("cu_"):
        return items == [0, length]
    if "len" in key:
        return items == [length]
    if hint is PACKED:  # which document each token is of; one number for all names the row
        return all(item == items[0] for item in items)
    return key == "token_type_ids" and not any(items)
