"""What autograd saves comes back from host memory as it was; what is to stay does; two layers are on the device."""

from contextlib import nullcontext

import torch

from tessera.core.host_memory import LEAST, HostMemory
from tessera.core.live_memory import PeakMemory

CPU = torch.device("cpu")


def forms():
    x = torch.arange(24000, dtype=torch.float64).view(20, 30, 40)
    yield from (x, x.transpose(0, 2), x[:, 3:7], x[:, :, ::2], x.movedim(1, 0)[2:5], x[0, 0].expand(30, 40))
    yield x[:, :1].expand(20, 30, 40)


def test_every_form_of_a_tensor_comes_back():
    memory = HostMemory(CPU)
    with memory.saving():
        packed = [(x, memory.pack(x)) for x in forms()]
        packed += [(x.contiguous(), memory.pack(x.contiguous())) for x in forms()]  # of each the memory is free again
    assert all(not isinstance(kept, torch.Tensor) for _, kept in packed)
    for x, kept in reversed(packed):
        back = memory.unpack(kept)
        assert torch.equal(back, x) and back.data_ptr() != x.data_ptr()
        if x.is_contiguous() or x.transpose(0, -1).is_contiguous():
            assert back.stride() == x.stride()


def test_what_is_saved_twice_travels_once():
    memory, x = HostMemory(CPU), torch.arange(64.0 * 64).view(64, 64)
    with memory.saving():
        kept = [memory.pack(x), memory.pack(x.view(-1)), memory.pack(x.T)]
        assert memory.bytes == x.nbytes
        x.add_(1)
        changed = memory.pack(x)
        assert memory.bytes == 2 * x.nbytes
    flat, turned = memory.unpack(kept[1]), memory.unpack(kept[2])
    assert torch.equal(flat.view(64, 64), memory.unpack(kept[0])) and torch.equal(turned.T, x - 1)
    assert torch.equal(memory.unpack(changed), x)


def test_weights_casts_of_them_and_small_tensors_stay():
    memory = HostMemory(CPU)
    weight, x = torch.nn.Parameter(torch.randn(64, 64)), torch.randn(64, 64)
    with memory.saving([weight.detach()]):
        for staying in (weight, weight.T, weight.to(torch.bfloat16), torch.ones(LEAST // 4 - 1)):
            assert memory.pack(staying) is staying
        assert memory.pack(x) is not x
    assert memory.bytes == x.nbytes


def test_two_layers_at_most_are_on_the_device():
    """However many there are: with what the backward itself holds, five tensors; without, those of every layer."""

    def peak(layers, memory=None):
        x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with PeakMemory() as live:
            y = x
            for _ in range(layers):
                with nullcontext() if memory is None else memory.saving():
                    y = y.tanh()
            y.sum().backward()
        return live.peak / x.nbytes, x.grad

    (plain, wanted), (held, gradient) = peak(12), peak(12, HostMemory(CPU))
    assert torch.equal(wanted, gradient)
    assert plain >= 12 and peak(6, HostMemory(CPU))[0] == held < 5.01
