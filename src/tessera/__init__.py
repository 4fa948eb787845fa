"""Tessera trains Transformer language models with tensor parallelism in every geometry, on PyTorch.

The names below are imported on first use: `import tessera` alone loads neither torch nor a GPU package.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tessera.config.schema import TrainConfig
    from tessera.core.errors import UserError
    from tessera.core.mesh import Mesh
    from tessera.product.gathered import matmul

__version__ = "0.1.0"
__all__ = ["Mesh", "TrainConfig", "UserError", "__version__", "matmul"]

_HOME = {
    "Mesh": "tessera.core.mesh",
    "TrainConfig": "tessera.config.schema",
    "UserError": "tessera.core.errors",
    "matmul": "tessera.product.gathered",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tessera' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)
