"""What keys mean, and which say nothing, where data are streamed."""

from collections.abc import Mapping
from typing import Any

from tessera.config import compat
from tessera.config.schema import TrainConfig
from tessera.config.settled import Settled
from tessera.config.words import shown

_IN_ORDER = "the documents of a stream come in the order of its files"
_JOINED = "rows of sequence_len are cut from documents that follow one another"
_NO_END = "max_steps alone says where a stream ends"
_NOT_WRITTEN = "the rows of a stream are never written"
_AHEAD = "worker processes that live as long as the run tokenize a stream"
_IF_PREPARED = {
    "min_sample_len": _JOINED,
    "excess_length_strategy": _JOINED,
    "train_on_inputs": "every token of a stream is learnt",
    "dataset_prepared_path": _NOT_WRITTEN,
    "dataset_processes": "dataloader_num_workers says how many processes tokenize a stream",
}
"""Keys that have an effect on test_datasets alone, which are prepared before the run."""
NO_EFFECT = {
    "shuffle": _IN_ORDER,
    "num_epochs": _NO_END,
    **_IF_PREPARED,
    "shuffle_merged_datasets": _IN_ORDER,
    "dataloader_pin_memory": _AHEAD,
    "dataloader_persistent_workers": _AHEAD,
    "dataloader_multiprocessing_context": _AHEAD,
    "sample_packing_group_size": _JOINED,
    "sample_packing_bin_size": _JOINED,
    "sample_packing_sequentially": _IN_ORDER,
    "sample_packing_eff_est": _NO_END,
    "total_num_tokens": _NO_END,
    "sample_packing_mp_start_method": _JOINED,
    "dataset_keep_in_memory": _NOT_WRITTEN,
    "num_dataset_shards_to_save": _NOT_WRITTEN,
}
"""The keys that have no effect in a stream, and why: ours, and those of other tools that have another reason there."""


def settle_stream(given: Mapping[str, Any], out: Settled) -> None:
    """Give the keys of other tools in a stream their reasons, and heed axolotl's `pretrain_multipack_attn: false`.

    In axolotl it holds for pretraining_dataset alone: the documents of a packed row attend to one another.
    """
    if out.values.get("streaming") is not True:
        return
    for place, note in enumerate(out.notes):
        key, said, _ = note.partition(" has no effect: ")
        key = key.partition(":")[0]
        if said and key in NO_EFFECT:
            out.notes[place] = f"{key}: {shown(given[key])}{said}{NO_EFFECT[key]}"
    key = "pretrain_multipack_attn"
    if given.get(key) is not False or out.values.get("sample_packing") is not True:
        return
    if out.given_as.get("datasets") == "pretraining_dataset":
        out.values["sample_packing"] = False
        out.given_as["sample_packing"] = key
        out.notes.append(f"{key}: false means sample_packing: false: documents in a row attend to one another")
    else:
        out.notes.append(f"{key}: false has no effect: it holds for pretraining_dataset alone")


def without_effect_in_stream(config: TrainConfig, given_as: Mapping[str, str]) -> list[str]:
    """One line for each key of ours that was given and changes nothing in a stream."""
    if not config.streaming:
        return []
    lines = []
    for key, why in NO_EFFECT.items():
        value = getattr(config, key, None)
        counts = config.test_datasets and key in _IF_PREPARED
        if key in config.model_fields_set and not compat.asks_for_nothing(value) and not counts:
            lines.append(f"{given_as.get(key, key)}: {shown(value)} has no effect: {why}")
    return lines
