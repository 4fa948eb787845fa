"""Peak bytes of live tensors, counted exactly: every storage that an operator returns, until it is freed."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, UntypedStorage
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """While active, `current` and `peak` are the bytes of tensors made since it was entered and still alive.

    A tensor from before counts once an operator has returned a view of it. Storages are counted once, whatever views
    share them, and a DTensor as its local shard; what libraries allocate inside one operator is not seen. A storage
    that is resized, as FSDP2 does with the weights that it gathers, counts as large as it is. Works on every device, on
    one rank; entered inside a FakeTensorMode, it counts that mode's tensors as if they had data.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._fake: FakeTensorMode | None = None

    def __enter__(self) -> "PeakMemory":
        self._fake, self._resize = active_fake_mode(), UntypedStorage.resize_
        setattr(UntypedStorage, "resize_", lambda storage, size: self._resized(storage, size))  # noqa: B010
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        setattr(UntypedStorage, "resize_", self._resize)  # noqa: B010
        super().__exit__(*error)

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again with local tensors
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # DTensor propagates shapes with meta tensors and fake ones of another mode, which hold no bytes
            if isinstance(leaf, Tensor) and getattr(leaf, "fake_mode", self._fake) is self._fake and not leaf.is_meta:
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._add(key, storage.nbytes())
            weakref.finalize(storage, self._freed, key)

    def _add(self, key: int, size: int) -> None:
        self.current += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.current)

    def _freed(self, key: int) -> None:
        self.current -= self._sizes.pop(key)

    def _resized(self, storage: UntypedStorage, size: int) -> Any:
        result = self._resize(storage, size)
        if storage._cdata in self._sizes:
            self._add(storage._cdata, size)
        return result
