"""Error and time of ways to sum a large float32 gradient's norm on one thread: `python benchmarks/norm.py`."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch._foreach_norm": lambda g: torch._foreach_norm([g])[0],
    "by rows, then float64": lambda g: torch.linalg.vector_norm(g, dim=-1).double().norm(),
    "vector_norm, dtype float64": lambda g: torch.linalg.vector_norm(g, dtype=torch.float64),
}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gradient = torch.randn(8192, 512) * torch.rand(8192, 1) * 1e-3
    exact = gradient.double().norm().item()
    for name, way in WAYS.items():
        seconds = []
        for _ in range(10):
            begun = time.perf_counter()
            norm = way(gradient)
            seconds.append(time.perf_counter() - begun)
        print(f"{name:28} off by {abs(norm.item() - exact) / exact:.1e}, {min(seconds) * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
