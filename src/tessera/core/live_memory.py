"""Peak bytes of live tensors, counted exactly: every storage that an operator returns, until it is freed."""

import sys
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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


class Change(NamedTuple):
    """A storage, by its number in the order in which they were made, grows by so many bytes; or it goes."""

    number: int
    grown: int


class LoggedMemory(PeakMemory):
    """Also keeps every change, so that it can say afterwards what was alive when."""

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[Change] = []
        self.made = 0
        self._number: dict[int, int] = {}

    def number(self, tensor: Tensor) -> int | None:
        """Which storage a tensor's is, in the order in which they were made; None of one that is not counted."""
        return self._number.get(tensor.untyped_storage()._cdata)

    def _add(self, key: int, size: int) -> None:
        if key not in self._sizes:
            self._number[key] = self.made
            self.made += 1
            self._begins(key)
        self.changes.append(Change(self._number[key], size - self._sizes.get(key, 0)))
        super()._add(key, size)

    def _begins(self, key: int) -> None:
        """A storage counts from here on, the last one made: for what keeps more of each."""

    def _freed(self, key: int) -> None:
        self.changes.append(Change(self._number.pop(key), -self._sizes[key]))
        super()._freed(key)


class SitedMemory(LoggedMemory):
    """Also knows where each storage was made, and where parts of the step begin.

    `sites` has of each storage the operator that made it and the innermost functions of this package that called it;
    `marks` the places of `changes` at which a part of the step began, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sites: list[str] = []
        self.marks: list[tuple[int, str]] = []
        self._operator = ""

    def mark(self, name: str) -> None:
        """A part of the step begins here."""
        self.marks.append((len(self.changes), name))

    def alive_at_peak(self, since: int = 0) -> Counter[str]:
        """Bytes by site when most was alive, of the changes from number `since` on."""
        alive = most = place = 0
        for index, change in enumerate(self.changes):
            alive += change.grown
            if index >= since and alive > most:
                most, place = alive, index
        found: Counter[str] = Counter()
        for change in self.changes[: place + 1]:
            found[self.sites[change.number]] += change.grown
        return +found

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._operator = str(function).removeprefix("aten.")
        return super().__torch_dispatch__(function, types, args, kwargs)

    def _begins(self, key: int) -> None:
        self.sites.append(_site(self._operator))


_PACKAGE = str(Path(__file__).parents[1])


def _site(operator: str) -> str:
    """E.g. "mm.default in product/gathered.py backward, in nn/mlp.py forward": at most two functions."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < 2:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith(_PACKAGE) and file != __file__ and not file.endswith("plan/count.py"):
            place = f"{file.removeprefix(_PACKAGE).lstrip('/')} {name}"
            found += [place] if place not in found else []
        frame = frame.f_back  # type: ignore[assignment]
    return ", in ".join([f"{operator} in {found[0]}", *found[1:]]) if found else operator
