"""What a layout costs and which one to take. The folder is a function too: `tessera.plan(model, cluster, training)`."""

import sys
from inspect import Signature, signature
from types import ModuleType
from typing import Any


class _Called(ModuleType):
    """This folder as a module that is a function too: importing a module of it would hide a function of its name."""

    def __call__(self, *args: Any, **keys: Any) -> Any:
        """`plan.recommend.plan`."""
        from tessera.plan.recommend import plan

        return plan(*args, **keys)

    @property
    def __signature__(self) -> Signature:
        """That of the function, for `inspect.signature` and editors."""
        from tessera.plan.recommend import plan

        return signature(plan)


sys.modules[__name__].__class__ = _Called
