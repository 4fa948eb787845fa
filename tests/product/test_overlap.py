"""Whose weights are gathered ahead, without ranks: each site is a name, a gather a line in a log."""

import pytest

from tessera.product.overlap import BACKWARD, FORWARD, Overlap, Pass

SITES = {
    FORWARD: ["q", "up", "down"],
    BACKWARD: ["down", "up", "q"],
    Pass(False, 1): ["Q", "UP"],
    Pass(True, 1): ["UP", "Q"],
}


class Gathers:
    """What was issued and what was used, in order; a gather has the version of the weights when it was issued."""

    def __init__(self):
        self.overlap, self.log, self.version = Overlap(), [], 0

    def run(self, this, then=None, sites=None):
        """One pass; the log from its beginning to its end."""
        begun = len(self.log)
        self.overlap.begin(this, then)
        for site in sites or SITES[this]:
            self.ask(site)
        return self.log[begun:]

    def ask(self, site):
        assert self.overlap.gather(site, lambda: self.issue(site)) == (site, self.version), "another gather's weights"
        self.log.append(f"use {site}")

    def issue(self, site):
        self.log.append(f"issue {site}")
        return site, self.version

    def wasted(self):
        issued, used = (sum(line.startswith(word) for line in self.log) for word in ("issue", "use"))
        return issued - used


@pytest.fixture
def gathers():
    return Gathers()


@pytest.fixture
def learnt(gathers):
    for this in SITES:
        gathers.run(this)
    gathers.log.clear()
    return gathers


AT_ONCE = ["issue q", "use q", "issue up", "use up", "issue down", "use down"]
AHEAD = ["issue q", "issue up", "use q", "issue down", "use up", "use down"]


def test_an_order_is_learnt_once(gathers):
    assert gathers.run(FORWARD) == AT_ONCE
    assert gathers.run(FORWARD) == AHEAD


def test_the_last_product_gathers_the_first_weights_of_the_pass_announced(learnt):
    assert learnt.run(FORWARD, Pass(False, 1)) == [*AHEAD[:-1], "issue Q", "use down"]
    assert learnt.run(Pass(False, 1), Pass(True, 1)) == ["issue UP", "use Q", "issue UP", "use UP"]
    assert learnt.run(Pass(True, 1), BACKWARD) == ["issue Q", "use UP", "issue down", "use Q"]
    learnt.run(BACKWARD)
    assert learnt.wasted() == 0


def test_an_evaluation_is_a_forward_that_nothing_follows(learnt):
    assert learnt.run(FORWARD) == AHEAD
    assert learnt.run(FORWARD, BACKWARD)[:2] == AHEAD[:2]


def test_weights_gathered_for_a_pass_that_does_not_come_are_never_used(learnt):
    """They may have changed since: a forward alone, new weights, and the pass that it had announced."""
    learnt.run(FORWARD, BACKWARD)
    learnt.overlap.begin(FORWARD)
    learnt.version += 1
    assert learnt.run(BACKWARD)[0] == "issue down"
    assert learnt.wasted() == 1


def test_a_backward_that_nobody_begins_goes_on_with_its_forward(learnt):
    both = SITES[FORWARD] + SITES[BACKWARD]
    assert learnt.run(FORWARD, BACKWARD, both)[:6] == [*AHEAD[:-1], "issue down"]
    assert learnt.wasted() == 0
    learnt.run(FORWARD, BACKWARD)
    learnt.run(BACKWARD)
    assert learnt.run(FORWARD) == AHEAD, "the order is that of the last time"


def test_a_pass_that_breaks_off_or_asks_in_another_order_is_learnt_anew(learnt):
    learnt.run(FORWARD, BACKWARD, ["q"])
    learnt.run(FORWARD, None, ["q", "down", "up"])
    assert learnt.run(FORWARD, None, ["q", "down", "up"]) == [
        line.replace("up", "x").replace("down", "up").replace("x", "down") for line in AHEAD
    ]
