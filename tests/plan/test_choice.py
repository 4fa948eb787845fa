"""The keys that a layout writes are those of a config that asks for it."""

from dataclasses import replace

import pytest

from tessera.config.load import make_config
from tessera.models.shapes import shape_of
from tessera.plan.choice import Layout, Training
from tessera.plan.cluster import cluster_of
from tessera.plan.fit import checked_peak
from tessera.train.foresee import foresee, layout_of

LAYOUTS = [
    Layout({"shard": 2}, 2, 4),
    Layout({"shard": 2}, 2, 4, "selective", reshard=False, offload=True),
    Layout({"shard": 2}, 2, 4, "true", offload=True),
    Layout({"shard": 2}, 2, 4, offload=True, tiles=None),
    Layout({"shard": 2, "col": 2}, 2, 4, tiles=3, offload_params=True),
    Layout({"ring": 2, "row": 2, "col": 2}, 4, 1, "true", slices=2),
    Layout({"row": 2, "col": 2}, 4, 1, schedule="summa"),
    Layout({"replicate": 2, "shard": 2, "inner": 2}, 4, 1, "selective", offload_params=True),
]
MODEL = shape_of("8B")


def config_of(layout, **keys):
    values = {"base_model": "8B", "datasets": [{"path": "none.jsonl", "type": "completion"}], "sequence_len": 512}
    return make_config(values | layout.keys | keys, "test")[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_config_of_the_keys_asks_for_the_layout(layout):
    cluster = cluster_of("8xA100-80")
    found, training = layout_of(config_of(layout), MODEL, cluster)
    assert replace(found, beside=layout.beside, sizes=layout.sizes) == layout
    assert found.sizes == dict(layout.sizes)
    # the one value costs what the config's own step does
    judged = foresee(config_of(layout), MODEL, cluster)
    assert checked_peak(MODEL, layout, Training(512, 16)) == judged.peak.total
    assert training.dtype == "bfloat16"


def test_what_a_config_asks_for_beside_reaches_its_cost():
    """FSDP2 in one piece, kept copies, a smoothed loss, another optimizer: each makes a peak of its own."""
    layout, cluster = Layout({"shard": 2, "col": 2}, 2, 2), cluster_of("8xA100-80")
    peaks = set()
    for keys in (
        {},
        {"fsdp_config": {"auto_wrap_policy": "NO_WRAP"}},
        {"tensor_parallel_keep_gathered": True},
        {"sequence_parallel": False},
        {"optimizer": "sgd"},
    ):
        config = config_of(layout, **keys)
        own, training = layout_of(config, MODEL, cluster)
        peak = checked_peak(MODEL, own, training)
        assert peak == foresee(config, MODEL, cluster).peak.total
        peaks.add(peak)
    assert len(peaks) == 5
