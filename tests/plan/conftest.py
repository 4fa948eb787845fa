"""What tests of the planner share."""

import pytest


@pytest.fixture
def small_buffers(monkeypatch):
    """Buffers of the communication library as small as the models of tests are: theirs do not decide what fits."""
    for name in ("CONNECTION", "PEER_CONNECTION"):
        monkeypatch.setattr(f"tessera.plan.buffers.{name}", 2**10)
