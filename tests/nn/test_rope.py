"""Rotary positions against transformers', plain and with Llama 3's scaling."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from support.compare import error
from tessera.nn.rope import RopeConfig, rope_frequencies, rope_table, rotate

HEAD_DIM, LENGTH = 64, 300
CONFIGS = {
    "plain": RopeConfig(),
    "another base": RopeConfig(theta=500000.0),
    "llama 3.1": RopeConfig(500000.0, 8.0, 1.0, 4.0, 8192),
    "llama 3.2": RopeConfig(500000.0, 32.0, 1.0, 4.0, 8192),
    "stretched early": RopeConfig(10000.0, 4.0, 2.0, 8.0, 64),
}


def theirs(config):
    parameters = {"rope_type": "default", "rope_theta": config.theta}
    if config.factor != 1:
        parameters |= {
            "rope_type": "llama3",
            "factor": config.factor,
            "low_freq_factor": config.low_freq_factor,
            "high_freq_factor": config.high_freq_factor,
            "original_max_position_embeddings": config.original_max_positions,
        }
    return LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=4 * HEAD_DIM,
            num_attention_heads=4,
            head_dim=HEAD_DIM,
            max_position_embeddings=16384,
            rope_theta=config.theta,
            rope_parameters=parameters,
        )
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_rotation_and_its_gradient_equal_transformers(name):
    config = CONFIGS[name]
    torch.manual_seed(0)
    q, k = torch.randn(2, LENGTH, 4, HEAD_DIM), torch.randn(2, LENGTH, 2, HEAD_DIM)
    dq, dk = torch.randn_like(q), torch.randn_like(k)
    table = rope_table(torch.arange(LENGTH), HEAD_DIM, config, torch.float32)
    ours = [q.clone().requires_grad_(), k.clone().requires_grad_()]
    turned = [rotate(x, table) for x in ours]
    torch.autograd.backward(turned, [dq, dk])

    reference = [q.clone().requires_grad_(), k.clone().requires_grad_()]
    cos, sin = theirs(config)(q, torch.arange(LENGTH).unsqueeze(0))
    want = apply_rotary_pos_emb(*reference, cos, sin, unsqueeze_dim=2)
    torch.autograd.backward(want, [dq, dk])
    for value, expected in zip([*turned, *(x.grad for x in ours)], [*want, *(x.grad for x in reference)], strict=True):
        assert error(value.detach(), expected.detach()) <= 1e-6
        assert (value - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["llama 3.1", "llama 3.2", "stretched early"])
def test_the_scaling_is_seen(name):
    config = CONFIGS[name]
    scaled, plain = rope_frequencies(HEAD_DIM, config), rope_frequencies(HEAD_DIM, RopeConfig(config.theta))
    ratio = plain / scaled
    assert ratio[0] == 1 and abs(ratio[-1] - config.factor) < 1e-4, "short wavelengths stay, long ones are stretched"
    assert ((ratio > 1.01) & (ratio < config.factor - 0.01)).any(), "and between them the two are blended"
    tables = [rope_table(torch.arange(LENGTH), HEAD_DIM, c, torch.float32) for c in (config, RopeConfig(config.theta))]
    x = torch.ones(1, LENGTH, 1, HEAD_DIM)
    assert error(rotate(x, tables[0]), rotate(x, tables[1])) > 1e-2


def test_scores_depend_on_distances_only():
    torch.manual_seed(1)
    table = rope_table(torch.arange(40), 8, RopeConfig(), torch.float64)
    q, k = (torch.randn(8, dtype=torch.float64).expand(1, 40, 1, 8) for _ in range(2))
    scores = rotate(q, table)[0, :, 0] @ rotate(k, table)[0, :, 0].T
    for distance in (-7, 0, 11):
        diagonal = scores.diagonal(distance)
        assert (diagonal - diagonal[0]).abs().max() < 1e-5  # the angles are float32
    assert (
        scores.diagonal(0)[0] - scores.diagonal(11)[0] > 1e-2 or scores.diagonal(11)[0] - scores.diagonal(0)[0] > 1e-2
    )


def by_halves(x, cos, sin):
    """(x1 cos − x2 sin, x2 cos + x1 sin), half by half, each rounded where a fused multiply-add would round."""
    first, second = x.chunk(2, -1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([(first * cos).addcmul(second, sin, value=-1), (second * cos).addcmul(first, sin)], -1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [2, 6, 16, 64])
def test_halves_turned_as_one_are_the_formula_in_halves_bit_for_bit(head_dim, dtype):
    torch.manual_seed(2)
    cos, sin = rope_table(torch.arange(40), head_dim, RopeConfig(), dtype)
    wide = torch.randn(2, 40, 3, head_dim + 5, dtype=dtype)
    for x in (wide[..., :head_dim].contiguous(), wide[..., 5:]):  # as a product gives them, and strided
        x = x.detach().requires_grad_()
        y, dy = rotate(x, (cos, sin)), torch.randn_like(x)
        y.backward(dy)
        assert torch.equal(y, by_halves(x, cos, sin))
        assert torch.equal(x.grad, by_halves(dy, cos, -sin))
        assert not torch.equal(y, by_halves(x, cos, -sin)), "the other way round is something else"
