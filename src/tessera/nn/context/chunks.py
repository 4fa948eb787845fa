"""Ulysses in N groups of heads: only one group's gathered q, k, v and result exist, forward and backward.

    forward    group by group: q, k·v traded; attention; the result traded back
    backward   group by group: q, k·v, d_out·out traded; gradients; dq, dk·dv traded back

What is kept between the two is this rank's own: q, k, v, result and log-sum-exp. So q, k, v and the result are traded
once more than without groups, where they are kept as they arrived. With U ranks, T tokens of a rank, H query heads of
D features and c key/value heads of each group after they are repeated (N c is K where U N divides the K heads of k and
of v, else more), a rank receives in elements, each times (U - 1) / U and with all heads of the rank at N = 1:

    pass       N = 1                    in groups
    forward    T D (2 H + 2 c)          T D (2 H + 2 N c)            in 3 and 3 N calls
    backward   T D (2 H + 2 c)          T D (4 H + 4 N c)            in 3 and 5 N calls

Beside its own, a rank holds of gathered q, k, v and result T D (2 H + 2 c) elements at N = 1, and T D (2 H / N + 2 c)
in groups; N exchanges or rings move along the owners' axes what one did.

The idea is untied Ulysses' (UPipe, 2026).
"""

import torch
from torch import Tensor

from tessera.core.mesh import Group
from tessera.nn.context.heads import kv_heads_of, repeats, to_heads, to_tokens
from tessera.nn.context.passes import Pass, backward_pass, forward_pass
from tessera.nn.kernels.function import attention
from tessera.nn.once import Once


class _Groups:
    """The N groups of heads, and how the tensors of one of them are traded."""

    def __init__(self, count: int, group: Group, heads: int, kv_heads: int) -> None:
        each = heads // count
        self.group, self.kv_heads = group, kv_heads
        self.queries = [slice(g * each, (g + 1) * each) for g in range(count)]
        self.keys = [kv_heads_of(range(part.start, part.stop), heads, kv_heads) for part in self.queries]

    def gather(self, x_THD: Tensor, g: int) -> Tensor:
        """The group's query heads of a tensor [T, H, ...]."""
        return to_heads(x_THD[:, self.queries[g]], self.group)

    def gather_keys(self, k_THD: Tensor, v_THD: Tensor, g: int) -> Tensor:
        """The keys and values that the group's queries read, [U T, 2, c / U, D]."""
        index = torch.tensor(self.keys[g], device=k_THD.device)
        kv_TH2D = torch.stack([k_THD.index_select(1, index), v_THD.index_select(1, index)], 2)
        again = repeats(len(index), self.group.size)
        return to_heads(kv_TH2D.repeat_interleave(again, 1) if again > 1 else kv_TH2D, self.group).transpose(1, 2)

    def add_keys(self, dkv_TH2D: Tensor, gathered_T2HD: Tensor, g: int) -> None:
        """The conjugate of `gather_keys`: bring gradients home and add them."""
        own = to_tokens(gathered_T2HD.transpose(1, 2), self.group)
        index = torch.tensor(self.keys[g], device=own.device)
        dkv_TH2D.index_add_(1, index, own.unflatten(1, (len(index), -1)).sum(2, dtype=dkv_TH2D.dtype))


def attention_in_groups(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    count: int,
    ulysses: Group,
    begin: Pass,
    scale: float | None,
    softcap: float | None,
    once: Once | None = None,
) -> Tensor:
    """`shared_attention` with heads traded along `ulysses` in `count` groups one after another.

    The query heads divide by `count` · ranks, and by the kv heads.
    """
    groups, options = _Groups(count, ulysses, q_THD.shape[1], k_THD.shape[1]), (begin, scale, softcap)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        out_THD, found = torch.empty_like(q), []
        for g, heads in enumerate(groups.queries):
            kv = groups.gather_keys(k, v, g)
            out, lse = forward_pass(groups.gather(q, g), kv, *options)
            out_THD[:, heads] = to_tokens(out, groups.group)
            found.append(lse)
        return [out_THD, torch.stack(found)]

    def backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse_NHT: Tensor) -> tuple[Tensor, ...]:
        dq = torch.empty_like(q)
        dkv_TH2D = torch.zeros_like(torch.stack([k, v], 2), dtype=lse_NHT.dtype)
        for g, heads in enumerate(groups.queries):
            results = torch.stack([d_out[:, heads], out[:, heads]], 2)
            d_out_g, out_g = to_heads(results, groups.group).unbind(2)
            del results  # of which the group's ranks have their parts now
            kv = groups.gather_keys(k, v, g)
            dq_g, dkv_g = backward_pass(d_out_g, groups.gather(q, g), kv, out_g, lse_NHT[g], *options)
            dq[:, heads] = to_tokens(dq_g, groups.group)
            groups.add_keys(dkv_TH2D, dkv_g, g)
        return dq, *dkv_TH2D.to(k.dtype).unbind(2)

    return attention(forward, backward, q_THD, k_THD, v_THD, once=once)[0]
