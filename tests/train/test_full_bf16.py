"""bf16: full: parameters, gradients and optimizer state are bfloat16, in checkpoints and in the folder too."""

import json

import pytest
import torch
import yaml

from checkpoint.test_resume import copy_of, losses
from tessera.checkpoint.folder import read_checkpoint
from train.runs import Workshop, exported, plain_loop, run

LAYOUTS = [{}, {"tensor_parallel_size": 2, "bfloat16": True}, {"tensor_parallel_size": 2, "dp_shard_size": 2}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_all_is_bfloat16_and_goes_on_exactly(workshop: Workshop, tmp_path, layout):
    own = {"max_steps": 6, "save_steps": 3, "micro_batch_size": 2, "save_dtype": "bfloat16"} | layout
    keys = own if "bfloat16" in own else own | {"bf16": "full"}
    keys = keys if "bf16" in keys else keys | {"bf16": "auto"}
    settings = workshop.settings("llama 64", tmp_path / "whole", **keys)
    whole, model = run(settings), exported(settings)
    _, metadata = read_checkpoint(tmp_path / "whole" / "checkpoint-3")
    found = {name.rpartition("/")[2]: entry.properties.dtype for name, entry in metadata.state_dict_metadata.items()}
    assert found.pop("step") == torch.float32
    assert set(found.values()) == {torch.bfloat16} and {"exp_avg", "exp_avg_sq"} <= found.keys()
    assert {tensor.dtype for tensor in model.values()} == {torch.bfloat16}
    assert "bfloat16" in json.dumps(json.loads((tmp_path / "whole" / "config.json").read_text()))
    assert yaml.safe_load((tmp_path / "whole" / "resolved_config.yaml").read_text())["bf16"] == "full"

    data_ranks = settings.get("dp_shard_size", 1)
    plain = plain_loop(settings | {"micro_batch_size": 2 * data_ranks})
    assert [m["loss"] for m in whole] == pytest.approx(plain.losses, rel=0.03)

    resumed = copy_of(settings, tmp_path / "run")
    assert losses(run(resumed)) == losses(whole)
    assert all(torch.equal(tensor, model[name]) for name, tensor in exported(resumed).items())


def test_it_is_not_the_same_as_computing_in_bfloat16(workshop: Workshop, tmp_path):
    own = {"max_steps": 4, "tensor_parallel_size": 2}
    full, over_float32 = (
        run(workshop.settings("llama", tmp_path / str(value), **own, bf16=value)) for value in ("full", True)
    )
    assert losses(full) != losses(over_float32)
    assert [m["loss"] for m in full] == pytest.approx([m["loss"] for m in over_float32], rel=0.05)
