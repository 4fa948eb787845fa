"""Layouts of several ranks whose tensors lie on one GPU, against one process on it.

NCCL wants a GPU for each rank; gloo does not, so one is enough to run what a rank does there: its streams, its device
code, its collectives of GPU tensors. gloo sends none of them from rank to rank, so the shifts of Cannon are left out.
Skipped where there is no GPU.
"""

import pytest
import torch

from support.pool import Pool
from verify.test_check import LAYOUTS
from verify.verify_cases import check_on, save_models, settings

CASES = {name: case for name, case in LAYOUTS.items() if "cannon" not in case[2].values()} | {
    "offloaded": (
        4,
        "llama",
        {"dp_shard_size": 2, "tensor_parallel_size": 2, "fsdp_config": {"offload_params": True}},
    ),
}

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def pools():
    """Ranks of their own: those of other tests must not see a GPU."""
    made = {world: Pool(world) for world in (4, 8)}
    yield made
    for one in made.values():
        one.close()


@pytest.mark.parametrize("layout", CASES)
def test_a_right_layout_passes_on_a_gpu(pools, models, layout):
    world, model, keys = CASES[layout]
    for result in pools[world].run(check_on, "cuda:0", settings(models[model], **keys)):
        assert result.ok and not result.diagnosis
