"""A run that is made up: its page over a status and a ledger that the test changes."""

import time
from collections.abc import Sequence

from fastapi import FastAPI
from fastapi.testclient import TestClient

from kantha.coordinator.admission import Admission, SignIn
from kantha.coordinator.allowlist import Allowlist
from kantha.coordinator.bulletin import Bulletin
from kantha.coordinator.database import Database
from kantha.coordinator.ledger import Ledger
from kantha.coordinator.polls import Polls
from kantha.coordinator.rundir import RunDirectory
from kantha.coordinator.status import BlanksStatus, Guess, HeldoutStatus, RoundStatus, RunStatus, VolunteerStatus
from kantha.errors import StorageError
from kantha.web.app import build_app

ADDRESS = "http://127.0.0.1:8600"


def make_volunteer(name: str, **changes: object) -> VolunteerStatus:
    volunteer = VolunteerStatus(
        name=name,
        peer_id=f"peer of {name}",
        state="training",
        round=12,
        samples_in_round=30,
        samples=1234,
        samples_per_second=5.25,
        loss=6.875,
        device="CPU, 2 cores",
        seconds_since_seen=75,
    )
    return volunteer.model_copy(update=changes)


def make_round(number: int, **changes: object) -> RoundStatus:
    loss = 8 - number / 1000
    entry = RoundStatus(
        round=number,
        samples=260 + number,
        loss=loss + 0.69,
        mlm_loss=loss,
        sop_loss=0.69,
        volunteers=3,
        finished=time.time() - 3600 + number,
        seconds=40.0,
        learning_rate=0.01,
        computing_share=0.95,
        failed=False,
    )
    return entry.model_copy(update=changes)


def make_heldout(number: int) -> HeldoutStatus:
    loss = 8.1 - number / 1000
    return HeldoutStatus(
        round=number,
        loss=loss + 0.68,
        mlm_loss=loss,
        mlm_accuracy=0.0625 + number / 1000,
        sop_loss=0.68,
        sop_accuracy=0.5175,
        masked=2300,
        pairs=512,
    )


def make_blanks(number: int, *words: str) -> BlanksStatus:
    """One guess for each sentence, and a second one that is as good as none."""
    return BlanksStatus(
        round=number,
        guesses=[[Guess(word=word, probability=0.25), Guess(word="ও", probability=0.001)] for word in words],
    )


def make_rounds(count: int, failed: Sequence[int] = ()) -> list[RoundStatus]:
    return [
        make_round(number, failed=number in failed, reason="a peer stalled" if number in failed else None)
        for number in range(1, count + 1)
    ]


class MadeUpLedger:
    """What the page asks of a ledger."""

    def __init__(self) -> None:
        self.rounds: list[RoundStatus] = []
        self.scores: list[HeldoutStatus] = []
        self.filled: list[BlanksStatus] = []
        self.is_away = False  # as a database that cannot be reached

    def _look(self) -> None:
        if self.is_away:
            raise StorageError("the ledger cannot be used")

    def curve(self, points: int) -> list[RoundStatus]:
        self._look()
        return self.rounds[-points:]

    def last_rounds(self, count: int) -> list[RoundStatus]:
        self._look()
        return self.rounds[-count:]

    def heldout(self) -> list[HeldoutStatus]:
        self._look()
        return self.scores

    def blanks(self) -> list[BlanksStatus]:
        self._look()
        return self.filled

    def recent(self, seconds: float) -> dict[int | None, int]:
        self._look()
        return {1: sum(entry.samples for entry in self.rounds if entry.finished > time.time() - seconds)}


class MadeUpRun:
    """All of a coordinator that these pages ask, without a swarm."""

    def __init__(self, run: RunDirectory, sign_in: SignIn = "local", address: str = ADDRESS) -> None:
        self.run, self.sign_in, self.address = run, sign_in, address
        database = Database(run.ledger)
        Ledger(database)  # makes the tables
        self.allowlist = Allowlist(database)
        self.admission = Admission(database, run.spec, run.key(), sign_in, self.allowlist)
        self.bulletin = Bulletin(database)
        self.polls = Polls(database, self.allowlist, sign_in)
        self.ledger = MadeUpLedger()
        self.volunteers = ["Asha", "Mitu", "রফিক"]
        self.changes: dict[str, object] = {}
        self.app: FastAPI = build_app(self)  # type: ignore[arg-type]
        self.begin(0)

    def begin(self, count: int, failed: Sequence[int] = (), **changes: object) -> None:
        """A run that is so far, of which nothing else is known.

        :param changes: to the status
        """
        self.ledger.is_away = False
        self.ledger.filled = []
        self.go_on(count, failed, **changes)

    def go_on(self, count: int, failed: Sequence[int] = (), **changes: object) -> None:
        self.ledger.rounds = make_rounds(count, failed)
        self.ledger.scores = [make_heldout(number) for number in range(0, count, 5)]
        self.changes = changes
        self.app.state.site.forget_kept()

    def status(self) -> RunStatus:
        rounds = self.ledger.rounds
        status = RunStatus(
            name=self.run.spec.name,
            goal=self.run.spec.goal,
            goal_samples=self.run.spec.schedule.goal_samples,
            fingerprint=self.run.spec.fingerprint,
            address=self.address,
            round=len(rounds),
            target_batch_size=256,
            samples_in_round=64,
            samples=sum(entry.samples for entry in rounds),
            samples_per_second=21.5,
            seconds_to_next_round=8.9,
            failed_rounds=sum(entry.failed for entry in rounds),
            computing_share=0.9934 if rounds else None,
            checkpoint_round=len(rounds) // 10 * 10,
            learning_rate=0.01,
            volunteers=[make_volunteer(name) for name in self.volunteers],
            heldout=self.ledger.scores,
            rounds=rounds[-50:],
        )
        return status.model_copy(update=self.changes)

    def client(self) -> TestClient:
        return TestClient(self.app, base_url=ADDRESS, client=("127.0.0.1", 1234))
