"""What models fill into blanks, in the ledger."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kantha.coordinator.ledger import Ledger
from kantha.coordinator.status import BlanksStatus, Guess, HeldoutStatus


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    yield ledger
    ledger.close()


def filled(number: int, *words: str) -> BlanksStatus:
    return BlanksStatus(round=number, guesses=[[Guess(word=word, probability=0.5)] for word in words])


def measured(number: int) -> HeldoutStatus:
    return HeldoutStatus(
        round=number, loss=5.5, mlm_loss=5.0, mlm_accuracy=0.1, sop_loss=0.5, sop_accuracy=0.5, masked=300, pairs=90
    )


def test_what_is_filled_in_is_told_of_now_and_of_some_rounds_before(ledger: Ledger) -> None:
    assert ledger.blanks() == []
    for number in range(0, 401, 20):
        ledger.add_heldout(measured(number), filled(number, f"ক{number}", f"খ{number}"))
    assert [entry.round for entry in ledger.blanks()] == [0, 100, 200, 400]
    assert ledger.blanks()[-1] == filled(400, "ক400", "খ400")
    assert [entry.round for entry in ledger.blanks(earlier=1)] == [0, 400]


def test_a_sentence_without_a_guess_keeps_its_place(ledger: Ledger) -> None:
    blanks = BlanksStatus(round=3, guesses=[[], [Guess(word="ভাত", probability=0.5)]])
    ledger.add_heldout(measured(3), blanks)
    assert ledger.blanks() == [blanks]


def test_the_newer_word_counts_and_rounds_that_are_done_again_are_forgotten(ledger: Ledger) -> None:
    ledger.add_heldout(measured(20), filled(20, "এক", "দুই"))
    ledger.add_heldout(measured(20), filled(20, "তিন"))
    ledger.add_heldout(measured(40), filled(40, "চার"))
    assert ledger.blanks() == [filled(20, "তিন"), filled(40, "চার")]
    ledger.forget_rounds_after(20)
    assert ledger.blanks() == [filled(20, "তিন")]
