"""Tessera's own decoder and optimizer step, in a process prepared as `tessera train` prepares a rank's."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workload import LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY, Shape
from tessera.core import device as devices
from tessera.core.mesh import Mesh
from tessera.data.batch import MicroBatch
from tessera.engine.optimizer import build_optimizer
from tessera.engine.step import Step
from tessera.layout.parallel import Parallel
from tessera.layout.streams import residual_layout
from tessera.models.decoder import Decoder
from tessera.models.hub import load_weights, read_model_config

IGNORED = -100


class Training:
    def __init__(self, step: Step):
        self.run = step
        self.number = 0

    def step(self, tokens: Tensor) -> tuple[float, float]:
        targets = F.pad(tokens[:, 1:], (0, 1), value=IGNORED)
        batch = MicroBatch(tokens, targets, valid=int((targets != IGNORED).sum()))
        result = self.run([batch], self.number, LEARNING_RATE)
        self.number += 1
        return result.loss, result.grad_norm


def build(shape: Shape, folder: Path, rank: int, world: int, sequence_parallel: bool) -> Training:
    """The 1D geometry over `world` ranks."""
    devices.prepare(torch.device("cpu"), tf32=False)
    parallel = Parallel(Mesh({"col": world}), residual_layout(sequence_parallel))
    model = Decoder(read_model_config(folder), parallel)
    load_weights(model, folder)
    optimizer = build_optimizer(model, "adamw_torch_fused", (0.9, 0.999), 1e-8, WEIGHT_DECAY)
    return Training(Step(model, optimizer, max_grad_norm=MAX_GRAD_NORM))
