"""What tests of the launcher share."""

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def hangup_as_usual() -> Iterator[None]:
    """SIGHUP does what it does by default, for this process and those that it starts, though nohup runs the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
