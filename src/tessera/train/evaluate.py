"""eval_loss: the mean loss over the rows held out, the same on every rank."""

import torch

from tessera.core.axes import AXES
from tessera.core.collectives import all_reduce
from tessera.engine.gradients import first_copy
from tessera.train.build import Built


@torch.no_grad()
def evaluate(built: Built) -> float:
    """Nats a token over every held-out row, each counted once. Every rank calls it."""
    mesh, model = built.mesh, built.model
    batches = built.held_out.eval_batches()
    total, valid = torch.zeros(2, dtype=torch.float64, device=mesh.device), 0
    for batch in map(model.cut, batches):
        total[0] += model(batch.to(mesh.device), 1.0)
        valid += batch.valid
    total[1] = valid
    streams = model.parallel.streams
    for number, cut in enumerate((streams.loss, streams.batch)):
        if not first_copy(mesh, cut):
            total[number] = 0
    loss, count = all_reduce(total, mesh.group(AXES)).tolist()
    return loss / max(1, count)
