"""The arithmetic of a step by formula against what torch counts while transformers does it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.hub_models import MODELS, random_model
from tessera.models.families.table import model_config
from tessera.plan.flops import document_flops, step_flops


@pytest.mark.parametrize("case", ["llama", "llama tied", "qwen2", "gpt2", "gpt2 untied n_inner gelu"])
def test_the_formula_is_what_torch_counts(case, tmp_path):
    model, ids = random_model(case), torch.zeros(3, 20, dtype=torch.int64)
    model.set_attn_implementation("eager")  # its products are seen, masked or not
    try:
        with FlopCounterMode(display=False) as counter:
            model(ids, use_cache=False).logits.sum().backward()
    finally:
        model.set_attn_implementation("sdpa")
        model.zero_grad()
    own = model_config(MODELS[case].to_dict(), tmp_path)
    assert step_flops(own, [20] * 3) == 3 * document_flops(own, 20) == counter.get_total_flops()


def test_attention_grows_with_the_square_of_a_document_up_to_its_window(tmp_path):
    whole, windowed = (
        model_config(MODELS[name].to_dict(), tmp_path) for name in ("mistral", "mistral head_dim window")
    )
    assert document_flops(whole, 64) > 2 * document_flops(whole, 32)
    assert document_flops(windowed, 64) == 2 * document_flops(windowed, 32)  # its window is 16
