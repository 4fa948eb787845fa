"""Tessera trains Transformer language models with tensor parallelism in every geometry, on PyTorch.

The names below are imported on first use: `import tessera` alone loads neither torch nor a GPU package.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tessera.config.schema import TrainConfig
    from tessera.core.errors import UserError
    from tessera.core.mesh import Mesh
    from tessera.plan.choice import Training
    from tessera.plan.communication import estimate_communication_time
    from tessera.plan.recommend import Plan, plan
    from tessera.product.gathered import matmul

__version__ = "0.1.0"
__all__ = [
    "Mesh",
    "Plan",
    "TrainConfig",
    "Training",
    "UserError",
    "__version__",
    "estimate_communication_time",
    "matmul",
    "plan",
]

_HOME = {
    "Mesh": "tessera.core.mesh",
    "Plan": "tessera.plan.recommend",
    "Training": "tessera.plan.choice",
    "TrainConfig": "tessera.config.schema",
    "UserError": "tessera.core.errors",
    "estimate_communication_time": "tessera.plan.communication",
    "matmul": "tessera.product.gathered",
}


def __getattr__(name: str) -> Any:
    if name == "plan":  # a folder of modules that can be called: see its __init__.py
        return import_module("tessera.plan")
    if name not in _HOME:
        raise AttributeError(f"module 'tessera' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)
