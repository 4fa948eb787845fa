"""Whose time is whose, on made-up traces: of the host alone, and of a GPU, which no machine of these tests needs."""

from typing import Any

import pytest

from tessera.monitor.operators import kind_of, kind_of_kernel
from tessera.monitor.profiled import Spent, spent
from tessera.monitor.summary import as_json, as_text


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("products", "aten::mm aten::linear aten::bmm aten::addmm_ aten::_scaled_mm aten::_grouped_mm aten::einsum"),
        (
            "attention",
            "aten::scaled_dot_product_attention aten::_scaled_dot_product_flash_attention_for_cpu_backward "
            "aten::_flash_attention_forward",
        ),
        (
            "elementwise",
            "aten::mul aten::sum aten::silu_backward aten::_softmax aten::native_layer_norm aten::_foreach_add_ "
            "aten::_fused_adamw_ aten::linalg_vector_norm",
        ),
        ("copies", "aten::copy_ aten::clone aten::cat fsdp::split_with_sizes_copy fsdp::chunk_cat aten::zero_"),
        ("other", "aten::view aten::embedding aten::empty MmBackward0 torch::autograd::AccumulateGrad"),
        ("other", "autograd::engine::evaluate_function: MmBackward0"),
        ("python", "GatheredProduct GatheredProductBackward"),
    ],
)
def test_kinds_of_operators(kind, names):
    several = [names] if ": " in names else names.split()
    assert {name: kind_of(name) for name in several} == dict.fromkeys(several, kind)


def test_kinds_of_kernels():
    names = {
        "sm90_xmma_gemm_bf16": "products",
        "flash_fwd_kernel": "attention",
        "vectorized_elementwise_kernel": "elementwise",
        "CatArrayBatchedCopy": "copies",
        "something": "other",
    }
    assert {name: kind_of_kernel(name) for name in names} == names


def event(cat: str, name: str, start: float, end: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 7, "tid": tid, "ts": start, "dur": end - start, "args": args}


def made(*events: dict[str, Any]) -> Spent:
    """What is found in a step from 100 to 200 µs."""
    step = event("user_annotation", "tessera: step 4", 100, 200)
    return spent({"traceEvents": [{"ph": "M", "name": "process_name"}, *events, step]})


def micros(done: Spent) -> dict[str, float]:
    assert sum(done.seconds.values()) == pytest.approx(done.step)
    return {kind: round(1e6 * seconds, 3) for kind, seconds in done.seconds.items() if seconds}


def test_time_of_the_host_goes_to_the_outermost_operator_of_a_known_kind():
    done = made(
        event("cpu_op", "aten::linear", 90, 120),  # begins before the step
        event("cpu_op", "aten::t", 105, 108),
        event("cpu_op", "aten::mm", 110, 119),
        event("user_annotation", "tessera: all_reduce shard+col", 120, 130),
        event("cpu_op", "c10d::allreduce_", 122, 129),
        event("cpu_op", "aten::copy_", 123, 124),
        event("cpu_op", "GatheredProduct", 140, 170),
        event("user_annotation", "tessera: wait col", 141, 150),
        event("cpu_op", "aten::mm", 150, 160),
        event("cpu_op", "autograd::engine::evaluate_function: MulBackward0", 170, 190),
        event("cpu_op", "MulBackward0", 171, 189),
        event("cpu_op", "aten::mul", 172, 182),
        event("cpu_op", "aten::mm", 100, 200, tid=2),  # another thread
    )
    assert micros(done) == {
        "products": 30,  # 20 and 10; mm within linear is no product of its own
        "along shard·col": 10,
        "along col": 9,
        "elementwise": 10,
        "other": 10,
        "python": 31,
    }
    assert {kind: n for kind, n in done.calls.items() if n and kind != "python"} == {
        "products": 1,
        "along shard·col": 1,
        "along col": 1,
        "elementwise": 1,
        "other": 2,
    }
    assert 1e6 * done.names["along col"]["tessera: wait col"] == pytest.approx(9)


def test_a_child_that_ends_after_its_parent_by_rounding_counts_once():
    done = made(event("cpu_op", "aten::linear", 100, 120), event("cpu_op", "aten::mm", 110, 120.001))
    assert micros(done) == {"products": 20, "python": 80}


def launched(kernel: str, at: float, start: float, end: float, number: int, tid: int = 1, **how: Any) -> list[Any]:
    cat = how.get("cat", "kernel")
    return [
        event("cuda_runtime", "cudaLaunchKernel", at, at + 1, tid, correlation=number),
        event(cat, kernel, start, end, how.get("stream", 20), correlation=number),
    ]


def test_time_of_a_device_goes_to_what_runs_there_and_axes_are_those_of_the_launch():
    done = made(
        event("cpu_op", "aten::mm", 100, 105),
        *launched("nvjet_tst", 101, 110, 130, 1),
        event("user_annotation", "tessera: all_gather col", 105, 108, tid=2),  # the thread of the backward
        *launched("ncclDevKernel_AllGather", 106, 120, 150, 2, tid=2, stream=21),
        event("user_annotation", "tessera: reduce_scatter shard", 108, 112),
        *launched("ncclDevKernel_ReduceScatter", 109, 150, 160, 3, stream=22),
        *launched("Memcpy HtoD", 113, 160, 165, 4, cat="gpu_memcpy"),
        *launched("vectorized_elementwise_kernel", 115, 170, 172, 5),  # by no operator
        event("cpu_op", "aten::item", 173, 180),  # waits for the device
        event("gpu_user_annotation", "tessera: all_gather col", 120, 150, tid=21),
    )
    assert micros(done) == {
        "products": 20,
        "along col": 20,  # 10 more lie under the product
        "along shard": 10,
        "copies": 5,
        "elementwise": 2,
        "gaps": 10 + 7,  # until 110 a thread was in an operator; and in item
        "python": 5 + 1 + 20,
    }
    assert {kind: round(1e6 * s) for kind, s in done.hidden.items()} == {"along col": 10}
    assert {name: round(1e6 * s) for name, s in done.names["along col"].items()} == {"tessera: all_gather col": 30}
    assert "aten::mm" in done.names["products"]


def test_a_trace_without_its_step_is_an_error():
    with pytest.raises(ValueError, match="no step"):
        spent({"traceEvents": [event("cpu_op", "aten::mm", 1, 2)]})


def test_the_table_is_the_mean_of_its_steps():
    first = made(event("cpu_op", "aten::mm", 100, 150), event("user_annotation", "tessera: wait col", 160, 180))
    second = made(event("cpu_op", "aten::mm", 100, 170))
    table = as_json(3, {4: first, 5: second})
    assert (table["rank"], table["steps"], table["step_seconds"]) == (3, [4, 5], pytest.approx(1e-4))
    assert table["seconds"]["products"] == pytest.approx(60e-6)
    assert table["seconds"]["communication"] == {"col": pytest.approx(10e-6)}
    lines = [line.split() for line in as_text(3, {4: first, 5: second}).splitlines()]
    assert " ".join(lines[0]) == "rank 3, steps 4 to 5: 0.10 ms a step under the profiler"
    assert ["products", "0.06", "60.0%", "1", "aten::mm", "0.06"] in lines
    assert ["communication", "along", "col", "0.01", "10.0%", "0.5", "wait", "col", "0.01"] in lines
    assert [line[0] for line in lines[2:]] == ["products", "communication", "Python", "sum"], "nothing took no time"
