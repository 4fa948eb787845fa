"""Values in few bits: taken from their own values they are the same bits of values again."""

import pytest
import torch

from tessera.engine.quantised import Quantised

SIGNED_4 = torch.tensor([-0.8875, -0.6625, -0.4375, -0.2125, -0.0775, -0.0325, -0.0055, 0.0])
SIGNED_4 = torch.cat([SIGNED_4, -SIGNED_4[:7].flip(0), torch.ones(1)])
UNSIGNED_4 = torch.linspace(0, 1, 17)[1:]
SIGNED_8 = torch.cat([torch.linspace(-0.99, 0.99, 255), torch.ones(1)])
UNSIGNED_8 = torch.linspace(0, 1, 256)
MAPS = {"signed 8": SIGNED_8, "unsigned 8": UNSIGNED_8, "signed 4": SIGNED_4, "unsigned 4": UNSIGNED_4}


def empty(qmap: torch.Tensor, count: int, block: int) -> Quantised:
    packed = len(qmap) == 16
    codes = torch.zeros(count // 2 if packed else count, dtype=torch.uint8)
    return Quantised(codes, torch.zeros(-(-count // block)), qmap, block, packed)


@pytest.mark.parametrize("name", MAPS)
def test_values_come_back_as_they_were_in_the_same_blocks(name):
    """Blocks whose largest magnitude is negative too: its code is the lowest of the map, which is not -1."""
    qmap, generator = MAPS[name], torch.Generator().manual_seed(3)
    numbers = torch.randn(200 * 128, generator=generator) * torch.rand(200 * 128, generator=generator) ** 8
    first, second = (empty(qmap, numbers.numel(), 128) for _ in range(2))
    first.take(numbers if name.startswith("signed") else numbers.abs())
    values = first.values()
    largest = values.view(-1, 128).abs().amax(1)
    if name.startswith("signed"):
        assert (values.view(-1, 128).amin(1) == -largest).sum() > 50, "no block led by a negative value"
    second.take(values)
    assert torch.equal(second.values(), values)
    assert values.unique().numel() > 100


def test_a_scale_of_a_library_comes_back_where_the_largest_value_has_another_code():
    """As torchao and bitsandbytes leave a block: the scale is the largest magnitude, the value of its code is less."""
    generator = torch.Generator().manual_seed(5)
    scale = torch.rand(300, generator=generator) + 0.1
    codes = torch.randint(1, 255, (300, 256), generator=generator)
    codes[:, 7] = torch.where(torch.arange(300) % 2 == 0, 0, 255)
    values = (SIGNED_8[codes] * scale.view(-1, 1)).reshape(-1)
    found = empty(SIGNED_8, values.numel(), 256)
    found.take(values)
    assert torch.equal(found.values(), values)


def test_other_values_are_quantised_to_the_nearest():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    found = empty(SIGNED_8, 1000, 256)  # the last block is not full
    found.take(values)
    largest = torch.nn.functional.pad(values, (0, 24)).view(-1, 256).abs().amax(1)
    assert torch.equal(found.scale, largest)
    assert (found.values() - values).abs().max() <= largest.max() * 0.011
    assert found.values().shape == values.shape


def test_zeros():
    for qmap in MAPS.values():
        found = empty(qmap, 512, 128)
        found.take(torch.zeros(512))
        assert not found.values().any()
