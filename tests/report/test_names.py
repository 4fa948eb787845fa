"""The report names what the monitor measures by the monitor's own names, without importing torch for it."""

from tessera.monitor.memory import KINDS
from tessera.monitor.report import TERMS
from tessera.monitor.timeline import IN_STEP
from tessera.report import metrics, ranks


def test_terms_and_kinds_are_those_of_the_monitor():
    assert set(metrics.TERMS) == set(TERMS) and metrics.KINDS == KINDS and set(ranks.OWN) == set(IN_STEP)
