"""The mean that new rows of the vocabulary begin with is the same to the last bit for every slice that a rank reads."""

import pytest
import torch

from tessera.models.new_rows import BLOCK, mean_of_rows


@pytest.mark.parametrize("rows", [1, 7, BLOCK, BLOCK + 1, 3 * BLOCK + 517])
def test_the_mean_is_the_same_for_every_slice(rows):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows + 5, 48, generator=generator) * 10 ** torch.randn(48, generator=generator)
    whole = mean_of_rows(weight.__getitem__, rows, (slice(0, 48),))
    assert whole.dtype == torch.float64
    torch.testing.assert_close(whole, weight[:rows].double().mean(0), rtol=1e-12, atol=1e-12)
    for begin, end in ((0, 1), (0, 24), (24, 48), (5, 38)):
        assert torch.equal(mean_of_rows(weight.__getitem__, rows, (slice(begin, end),)), whole[begin:end])


def test_of_a_bias_it_is_one_number():
    assert mean_of_rows(torch.arange(9.0).__getitem__, 5, ()) == 2
