"""The doctor on a machine with GPUs: each is named with its memory, and pairs of them are measured over NCCL.

Skipped where there is none.
"""

import json
import subprocess
import sys

import pytest
import torch

from train.runs import environment

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_gpus_and_the_links_between_them():
    count = torch.cuda.device_count()
    words = [sys.executable, "-m", "tessera", "doctor", "--json"]
    around = environment(",".join(map(str, range(count))))
    done = subprocess.run(words, env=around, capture_output=True, text=True, timeout=600)
    found = json.loads(done.stdout)
    devices = [finding for finding in found["findings"] if finding["section"] == "devices"]
    named = [finding["text"] for finding in devices if finding["subject"].startswith("GPU ")]
    assert sum(torch.cuda.get_device_name(0) in text for text in named) >= 1
    assert not [
        finding for finding in found["findings"] if finding["subject"] == "backend" and finding["state"] != "ok"
    ]
    if count == 1:
        assert "pairs" not in found and any("one GPU" in finding["text"] for finding in found["findings"])
        return
    assert [pair["ranks"] for pair in found["pairs"]] == [[a, b] for a in range(count) for b in range(a + 1, count)]
    assert {end["gpu"] for end in found["ranks_measured"]} == set(range(count))
    assert min(pair["bytes_per_second"] for pair in found["pairs"]) > 1e8
