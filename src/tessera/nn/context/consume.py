import torch


def _v(x):
    return x.transpose(0, 1).unsqueeze(0)


def forward_tiles(q, rounds, *, scale, softcap):
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(q.shape, dtype=wide)
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=wide)
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    for k, v, tiles in rounds:
        for t in tiles:
            o, l = op(_v(q[t.q0:t.q1]), _v(k[t.k0:t.k1]), _v(v[t.k0:t.k1]), 0.0, t.causal, scale=scale)
            o, l = o[0].transpose(0, 1), l[0]
            if t.causal:
                out[t.q0:t.q1], lse[:, t.q0:t.q1] = o, l
            else:
                L = lse[:, t.q0:t.q1].clone()
                out[t.q0:t.q1].lerp_(o.to(wide), torch.sigmoid(l - L).T[..., None])
                lse[:, t.q0:t.q1] = torch.logaddexp(L, l)
    return out.to(q.dtype), lse


def backward_tiles(do, q, out, lse, k, v, tiles, dq, *, scale, softcap):
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    dk, dv = torch.zeros_like(k, dtype=lse.dtype), torch.zeros_like(v, dtype=lse.dtype)
    for t in tiles:
        a = slice(t.q0, t.q1); b = slice(t.k0, t.k1)
        x, y, z = op(_v(do[a]), _v(q[a]), _v(k[b]), _v(v[b]), _v(out[a]), lse[None, :, a], 0.0, t.causal, scale=scale)
        dq[a] += x[0].transpose(0, 1); dk[b] += y[0].transpose(0, 1); dv[b] += z[0].transpose(0, 1)
    return dk, dv
