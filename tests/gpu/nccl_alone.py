"""A program: the collectives of the door over NCCL in a group of one rank, for each dtype that travels.

All but `shift` and `exchange`, which need another rank.
"""

from datetime import timedelta

import torch
import torch.distributed as dist

from tessera.core import collectives, device
from tessera.core.mesh import Group


def main() -> None:
    own = device.local_device()
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    dist.init_process_group(device.backend(own), store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
    group = Group(("row",), 1, 0, dist.group.WORLD)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64):
        x = torch.arange(24, device=own).view(2, 3, 4).to(dtype)
        for dim in range(3):
            for start in (collectives.start_all_gather, collectives.start_reduce_scatter):
                check(start(x, dim, group), x)
        check(collectives.start_all_reduce(x.clone(), group), x)
        check(collectives.start_broadcast(x, 0, group), x)
        check(collectives.start_reduce_to(x.clone(), 0, group), x)
        check(collectives.start_all_to_all(x, [2], [2], group), x)
        whole = torch.empty_like(x)
        collectives.gather_into(whole, x, group, async_op=False)
        assert whole.equal(x)
        collectives.reduce_scatter_into(whole.zero_(), x, group, async_op=True).wait()
        assert whole.equal(x)
        assert collectives.largest(x.clone(), group).equal(x)
    everyone = [None]
    dist.all_gather_object(everyone, "kept by the CPU")
    assert everyone == ["kept by the CPU"]
    dist.destroy_process_group()
    print("each gives back what went in")


def check(pending: collectives.Pending, expected: torch.Tensor) -> None:
    assert pending.wait().equal(expected)


if __name__ == "__main__":
    main()
