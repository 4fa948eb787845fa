"""On a GPU the terms of a step are its time, and memory by kind is what the allocator says."""

import pytest
import torch

from train.runs import Workshop, metrics, run_command

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("every", [1, 3])
def test_terms_are_the_step_and_kinds_the_peak(workshop: Workshop, tmp_path, every):
    settings = workshop.settings("llama", tmp_path / "run", max_steps=9, logging_steps=every)
    done = run_command(settings, gpus="0")
    assert done.returncode == 0, done.stderr
    lines = metrics(settings)
    measured = [line for line in lines if "seconds" in line]
    for line in measured[1:]:
        terms = line["seconds"]
        whole = sum(terms[term] for term in ("compute", "data", "optimizer", "idle", "other"))
        steps = [other["step_seconds"] for other in lines if line["step"] - every < other["step"] <= line["step"]]
        assert whole == pytest.approx(sum(steps) / len(steps), rel=0.05, abs=1e-3)
    kinds = next(line["memory"]["kinds_gib"] for line in lines if "kinds_gib" in line.get("memory", {}))
    assert 0 < sum(kinds.values()) <= max(line["memory_gib"] for line in lines) * 1.01
