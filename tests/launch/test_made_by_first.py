"""Where another launcher has started the ranks, rank 0 makes the run for all of them, through their store."""

import threading

import pytest
from torch.distributed import HashStore

from tessera.core.errors import UserError
from tessera.launch.launch import _made_by_first


def on_every_rank(store: HashStore, make) -> list[str]:
    """What each of three ranks gets, or how it is refused; rank 0 comes last."""
    got = [""] * 3

    def rank(number: int) -> None:
        try:
            launch = store.add(f"tessera/launches/{number}", 1)  # as a rank counts its runs
            made = make if number == 0 else lambda: pytest.fail("made twice")
            got[number] = _made_by_first(store, number, launch, made)
        except UserError as error:
            got[number] = f"refused: {error}"

    threads = [threading.Thread(target=rank, args=(number,)) for number in (1, 2, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return got


def refuse() -> str:
    raise UserError("base_model", "nowhere", "is not there", "give a folder")


def test_all_ranks_get_what_rank_0_makes():
    assert on_every_rank(HashStore(), lambda: '{"step": 1}') == ['{"step": 1}'] * 3


def test_all_ranks_are_refused_what_rank_0_is():
    assert on_every_rank(HashStore(), refuse) == ["refused: base_model: nowhere\n  is not there\n  give a folder"] * 3


def test_a_second_run_on_the_same_store_is_another():
    store = HashStore()
    for made in ('{"run": 1}', '{"run": 2}'):
        assert on_every_rank(store, lambda made=made: made) == [made] * 3
    assert all(text.startswith("refused") for text in on_every_rank(store, refuse))
