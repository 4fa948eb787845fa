"""The vocabulary-parallel cross entropy fused with the head: full logits never exist, nor do their gradients.

Each rank computes the logits of its part of the vocabulary, chunk of tokens by chunk; the ranks of `col` exchange, per
token, their local log-sum-exp, the target's logit where it lies with them and, with label smoothing, the sum of their
logits. From these every rank forms the gradients at once, in the forward, and keeps only dX and dW.

    L = lse(z) − (1 − ε) z_target − ε/V Σ z          dz = softmax(z) − (1 − ε) onehot(target) − ε/V

V is the global vocabulary. Loss and gradients are divided by `denominator`, the count of valid targets in the whole
optimizer step, so that sums over micro-batches and ranks are means over tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.core.collectives import all_gather, reduce_scatter
from tessera.product.roles import Roles, start_reduce, start_unshard

# mypy: disable-error-code="no-untyped-def"

IGNORE = -100


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x_TK: Tensor, w_VK: Tensor, bias_V: Tensor | None, targets_T: Tensor, head: "LossSpec", grad: bool
    ):
        roles = head.roles
        gathering = start_unshard(x_TK, roles.x_dim, roles.outputs)
        W = start_unshard(w_VK, roles.w_dim, roles.tokens).wait()
        X = gathering.wait()
        wide = torch.promote_types(X.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=X.device)
        training = grad and any(ctx.needs_input_grad)  # which says nothing of no_grad
        needs_x, needs_w, needs_b = (training and needed for needed in ctx.needs_input_grad[:3])
        dX = torch.empty_like(X) if needs_x else None
        dW: Tensor | None = None  # the first chunk writes, the others add: most often there is one
        db = torch.zeros_like(bias_V, dtype=wide) if needs_b and bias_V is not None else None
        inner = roles.inputs.size if roles.inputs else 1
        for first in range(0, X.shape[0], head.chunk_tokens * inner):
            part = slice(first, min(first + head.chunk_tokens * inner, X.shape[0]))
            z = X[part] @ W.T if bias_V is None or roles.inputs else torch.addmm(bias_V, X[part], W.T)
            z = reduce_scatter(z, 0, roles.inputs)
            targets = _own_part(targets_T[part], roles)
            if bias_V is not None and roles.inputs:
                z = z + bias_V
            chunk_loss, dz = _loss_and_logit_gradient(z.to(wide), targets, head)
            loss += chunk_loss
            if db is not None:
                db += dz.sum(0)
            if needs_x or needs_w:
                dz = all_gather(dz.to(X.dtype), 0, roles.inputs)
            if dX is not None:
                torch.mm(dz, W, out=dX[part])
            if needs_w:
                dW = _accumulate(dW, dz, X[part], wide if X.shape[0] > part.stop else X.dtype)
        if not training:
            return loss
        reducing = None if dX is None else start_reduce(dX, roles.x_dim, roles.outputs)
        if dW is not None:
            dW = reduce_scatter(dW.to(X.dtype), roles.w_dim, roles.tokens)
        ctx.handed_out = False  # so that they are scaled in place
        ctx.save_for_backward(reducing and reducing.wait(), dW, None if db is None else db.to(X.dtype))
        return loss

    @staticmethod
    def backward(ctx, d_loss: Tensor):
        if ctx.handed_out:
            raise RuntimeError("the gradients of this loss were formed once, in its forward, and are handed out once")
        ctx.handed_out = True
        gradients = (None if saved is None else saved.mul_(d_loss) for saved in ctx.saved_tensors)
        return *gradients, None, None, None


def _accumulate(dW: Tensor | None, dz: Tensor, X: Tensor, dtype: torch.dtype) -> Tensor:
    """dW + dzᵀ X; a sum over several chunks is kept in float32, as a product's own sum over tokens is."""
    if dW is None:
        return (dz.T @ X).to(dtype)
    return dW.addmm_(dz.T, X) if dW.dtype == X.dtype else dW.add_(dz.T @ X)


def _own_part(targets: Tensor, roles: Roles) -> Tensor:
    """The targets of the tokens this rank keeps after the logits are reduced over the `inputs` axes."""
    return targets if roles.inputs is None else targets.chunk(roles.inputs.size)[roles.inputs.rank]


@dataclass(frozen=True)
class LossSpec:
    """What the loss needs besides tensors: roles of the head's product, its vocabulary, and the loss's constants."""

    roles: Roles
    vocabulary: slice
    vocab_size: int
    denominator: float
    label_smoothing: float = 0.0
    chunk_tokens: int = 1024


def _loss_and_logit_gradient(z_TV: Tensor, targets_T: Tensor, head: LossSpec) -> tuple[Tensor, Tensor]:
    """The loss summed over these tokens, and dz in place of z; z are this rank's logits, in float32 or wider."""
    smoothing, V = head.label_smoothing, head.vocab_size
    here = (targets_T >= head.vocabulary.start) & (targets_T < head.vocabulary.stop)
    column = torch.where(here, targets_T - head.vocabulary.start, 0).unsqueeze(-1)
    target_z = torch.where(here, z_TV.gather(1, column).squeeze(-1), 0)
    sums = [z_TV.sum(-1)] if smoothing else []
    highest = z_TV.amax(-1, keepdim=True)
    exponentials = z_TV.sub_(highest).exp_()  # in place of the logits, and later the gradients in place of them
    local_lse = exponentials.sum(-1).log_().add_(highest.squeeze(-1))

    mine = torch.stack([local_lse, target_z, *sums])
    everyone = all_gather(mine.unsqueeze(0), 0, head.roles.outputs)
    lse, target_z = everyone[:, 0].logsumexp(0), everyone[:, 1].sum(0)
    losses = lse - (1 - smoothing) * target_z
    if smoothing:
        losses = losses - smoothing / V * everyone[:, 2].sum(0)

    valid = targets_T != IGNORE
    scale = (valid.to(lse.dtype) / head.denominator).unsqueeze(-1)
    dz = exponentials.mul_((highest - lse.unsqueeze(-1)).exp_().mul_(scale))
    if smoothing:
        dz.sub_(smoothing / V * scale)
    dz.scatter_add_(1, column, here.unsqueeze(-1) * scale * (smoothing - 1))
    return torch.where(valid, losses, 0).sum() / head.denominator, dz


def linear_cross_entropy(
    x_TK: Tensor, w_VK: Tensor, bias_V: Tensor | None, targets_T: Tensor, head: LossSpec
) -> Tensor:
    """Σ over this rank's tokens of the cross entropy of softmax(X Wᵀ + b) with `targets_T`, over `head.denominator`.

    x_TK lies in the residual layout, w_VK as a column-parallel weight; targets_T are the global ids of the tokens of
    this rank's (depth·row) part, −100 ignored. The result is alike on the ranks of `col`.
    """
    return _LinearCrossEntropy.apply(x_TK, w_VK, bias_V, targets_T, head, torch.is_grad_enabled())
