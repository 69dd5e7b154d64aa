"""What the coordinator saves, and what it enters into the ledger."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from postgres import PostgresServer

from kantha.coordinator import ledger, service
from kantha.coordinator.allowlist import Allowlist
from kantha.coordinator.database import Database
from kantha.coordinator.rundir import RunDirectory
from kantha.coordinator.status import HeldoutStatus, RunStatus
from kantha.errors import StorageError
from kantha.spec import ScheduleState
from kantha.swarm.identity import PeerIdentity
from kantha.swarm.membership import Certificate, Membership, MembershipRequest, Notice, RunKey, Trust
from kantha.swarm.orders import Order, read_order
from kantha.swarm.reports import LEFT, Report, RoundReport
from kantha.training import Replica
from kantha.training.checkpoint import list_checkpoints, read_manifest
from kantha.web.app import build_app


@pytest.fixture
def coordinator(web_coordinator: Any) -> Any:
    """A coordinator without a swarm; what it says goes to `coordinator.said`."""
    web_coordinator.said = []
    web_coordinator._say = web_coordinator.said.append
    web_coordinator._no_save_before = 0.0
    web_coordinator._replica = Replica(web_coordinator.run.spec)
    return web_coordinator


def test_a_diverged_model_does_not_replace_a_good_checkpoint(coordinator: Any) -> None:
    coordinator._engine.round, coordinator._engine.lineage = 5, "after 5"
    with torch.no_grad():
        coordinator._replica.parameters[0][0] = float("nan")
    before = list_checkpoints(coordinator.run.checkpoints)
    coordinator._save_if_newer()
    assert list_checkpoints(coordinator.run.checkpoints) == before
    assert "not finite" in coordinator.said[0]

    coordinator._replica = Replica(coordinator.run.spec)
    coordinator._no_save_before = 0.0
    coordinator._save_if_newer()
    manifest = read_manifest(list_checkpoints(coordinator.run.checkpoints)[0])
    assert (manifest.round, manifest.lineage) == (5, "after 5")


def test_half_a_state_is_not_saved(coordinator: Any) -> None:
    """While the coordinator loads the swarm's state, weights and moments are of different rounds."""
    coordinator._engine.round, coordinator._engine.is_ready = 5, False
    coordinator._save_if_newer()
    assert read_manifest(list_checkpoints(coordinator.run.checkpoints)[0]).round == 0


def test_a_run_goes_on_where_its_evaluator_cannot(coordinator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, *_: Any) -> None:
            raise KeyError("a bug")

    monkeypatch.setattr(service, "Evaluator", Broken)
    coordinator.failure = None
    coordinator._guarded(coordinator._evaluate)
    assert coordinator.failure is None
    [said] = coordinator.said
    assert "held-out text is not measured any more" in said


def test_what_was_measured_on_heldout_text_is_in_the_status(coordinator: Any) -> None:
    assert coordinator._make_status().heldout == []
    entry = HeldoutStatus(
        round=0, loss=5.75, mlm_loss=5.0, mlm_accuracy=0.1, sop_loss=0.75, sop_accuracy=0.5, masked=300, pairs=90
    )
    coordinator.ledger.add_heldout(entry)
    assert coordinator._make_status().heldout == [entry]


# ---- annealing


def test_an_order_in_the_run_s_folder_is_taken_up_once_and_the_state_before_it_is_saved(coordinator: Any) -> None:
    run, engine = coordinator.run, coordinator._engine
    coordinator._take_up_order()
    assert engine.orders == []
    engine.round, engine.lineage, engine.schedule_state = 5, "after 5", ScheduleState(samples=320)
    order = Order.signed(run.key(), run.spec.fingerprint, 100)
    run.give_order(order)
    for _ in range(3):
        coordinator._take_up_order()
    assert [Order.model_validate_json(text) for text in engine.orders] == [order]
    manifest = read_manifest(list_checkpoints(run.checkpoints)[0])
    assert (manifest.round, manifest.schedule.samples) == (5, 320)


def test_an_order_that_is_not_the_organizer_s_is_told_and_not_given_to_the_swarm(
    coordinator: Any, tmp_path: Path
) -> None:
    run = coordinator.run
    run.give_order(Order.signed(RunKey.generate(tmp_path / "stranger.pem"), run.spec.fingerprint, 100))
    for _ in range(3):
        coordinator._take_up_order()
    assert coordinator._engine.orders == []
    assert [line for line in coordinator.said if "not signed by this run's key" in line] == coordinator.said
    assert len(coordinator.said) == 1


def test_people_are_told_how_the_annealing_goes(coordinator: Any) -> None:
    engine = coordinator._engine
    states = [
        ScheduleState(samples=320),
        ScheduleState(samples=320).obey(1, 100),
        ScheduleState(samples=320).obey(1, 100).advance(50),
        ScheduleState(samples=320).obey(1, 100).advance(50).obey(2, 0),
        ScheduleState(samples=400).obey(3, 64),
        ScheduleState(samples=400).obey(3, 64).advance(64),
    ]
    for engine.round, engine.schedule_state in enumerate(states):
        coordinator._say_how_annealing_goes()
        coordinator._say_how_annealing_goes()
    began, back, again, finished = coordinator.said
    assert began == "round 1: annealing began, over 100 samples"
    assert "taken back" in back
    assert again == "round 4: annealing began, over 64 samples"
    assert "finished" in finished
    assert "kantha publish" in finished


def test_an_annealing_of_one_round_is_told_to_begin_and_to_end(coordinator: Any) -> None:
    coordinator._engine.schedule_state = ScheduleState(samples=320).obey(1, 10).advance(64)
    coordinator._say_how_annealing_goes()
    began, finished = coordinator.said
    assert "began" in began
    assert "finished" in finished


# ---- what the swarm is told


class Node:
    """Takes what the coordinator tells the swarm."""

    peer_id = "Qm"

    def __init__(self) -> None:
        self.notices: list[Notice] = []
        self.certificates: list[Certificate] = []

    def take_notice(self, text: str) -> None:
        self.notices.append(Notice.model_validate_json(text))

    def set_certificate(self, certificate: Certificate) -> None:
        self.certificates.append(certificate)


@pytest.fixture
def node(coordinator: Any) -> Node:
    coordinator._node = Node()
    return coordinator._node


def look(coordinator: Any) -> None:
    """The next look, without waiting for it."""
    coordinator._look_after = 0.0
    coordinator._publish_notice()


def test_the_swarm_is_told_what_is_new_and_nothing_twice(coordinator: Any, node: Node, identity: PeerIdentity) -> None:
    for _ in range(3):
        look(coordinator)
    assert [notice.revoked for notice in node.notices] == [{}]
    run = coordinator.run.spec.fingerprint
    [own] = node.certificates
    assert own.verify(coordinator.run.key().public_key, run, "Qm").roles == ("averager",)

    coordinator.admission.admit(MembershipRequest.signed(identity, run, username="asha"))
    Allowlist(Database(coordinator.run.ledger)).decide(["asha"], "ban", "organizer", "spam")  # another program
    coordinator._publish_notice()
    assert len(node.notices) == 1  # not looked yet
    for _ in range(3):
        look(coordinator)
    assert [len(notice.revoked) for notice in node.notices] == [0, 1]
    assert len(node.certificates) == 1
    coordinator._certify_after = 0.0  # an hour later
    look(coordinator)
    assert len(node.certificates) == 2


def test_a_new_key_is_taken_up_while_the_run_is_served(coordinator: Any, node: Node, identity: PeerIdentity) -> None:
    run = coordinator.run
    order = Order.signed(run.key(), run.spec.fingerprint, 100)
    run.give_order(order)
    coordinator._take_up_order()
    look(coordinator)
    trust = Trust(run.spec.fingerprint, coordinator.describe().public_key)
    change = RunDirectory.open(run.path).rotate_key()  # another program
    for _ in range(2):
        look(coordinator)
        coordinator._take_up_order()
    assert coordinator.describe().public_key == change.new
    trust.take(node.notices[-1].model_dump_json())
    assert trust.run_key == change.new
    assert [each.signature == "" for each in node.certificates] == [False, False]
    assert node.certificates[-1].verify(change.new, run.spec.fingerprint, "Qm")
    answer = coordinator.admission.admit(MembershipRequest.signed(identity, run.spec.fingerprint, username="asha"))
    assert answer.certificate.verify(change.new, run.spec.fingerprint, identity.peer_id)
    # the order that was given is followed by those who know the new key alone
    text = coordinator._engine.orders[-1]
    assert read_order(text, Trust(run.spec.fingerprint, change.new)).number == order.number
    assert [line for line in coordinator.said if "new key" in line] == coordinator.said[-1:]


def test_a_disk_that_refuses_is_said_and_tried_again(
    coordinator: Any, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> str:
        raise StorageError("ledger.sqlite: make room")

    with monkeypatch.context() as patch:
        patch.setattr(coordinator.admission, "notice", refuse)
        look(coordinator)
        coordinator._publish_notice()
    assert coordinator.said == ["ledger.sqlite: make room; it is tried again in 30 s"]
    look(coordinator)
    assert len(node.notices) == 1


# ---- reports


def done(number: int, lineage: str = "", **changes: Any) -> RoundReport:
    values = {"seconds": 9.0, "waited": 1.0, "mlm_loss_sum": 50.0, "sop_loss_sum": 5.0, "peers": 2}
    return RoundReport(**{"round": number, "lineage": lineage or f"after {number}", "samples": 10, **values, **changes})


def report(*rounds: RoundReport, **changes: Any) -> Report:
    values = {
        "time": 1.0,
        "role": "trainer",
        "state": "training",
        "dialable": True,
        "ready": True,
        "round": max((entry.round for entry in rounds), default=0),
        "lineage": "",
        "sketch": [],
        "samples": 4,
        "samples_per_second": 2.0,
        "device": "CPU",
        "version": "1",
        "certificate": "{}",
        "rounds": list(rounds),
        "failed": [],
    }
    return Report(**{**values, **changes})


def member(coordinator: Any, peer: str) -> Membership:
    return Membership(
        serial="0f" * 8,
        run=coordinator.run.spec.fingerprint,
        username=peer.title(),
        peer_id=peer,
        service="local",
        roles=("trainer",),
        issued=0,
        expires=100,
    )


def collect(coordinator: Any, monkeypatch: pytest.MonkeyPatch, *seen: dict[str, Report]) -> None:
    """Let the coordinator read what the swarm's peers report, one look after the other; all of them are members."""
    for peer in {peer for reports in seen for peer in reports}:
        coordinator.ledger.add_member(member(coordinator, peer))
    looks = iter(seen)

    class Node:
        def reports(self) -> dict[str, Report]:
            reports = next(looks, None)
            if reports is None:
                coordinator._stop.set()
                return coordinator._last
            coordinator._last = reports
            coordinator._engine.roster.update(reports)
            return reports

    monkeypatch.setattr(service, "_COLLECT_SECONDS", 0.0)
    coordinator._stop = threading.Event()
    coordinator._node = Node()
    coordinator._collect()


def test_what_volunteers_report_is_in_the_status(coordinator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator._engine.round = 2
    failed = [{"round": 2, "reason": "a peer stalled"}]
    reports = {"asha": report(done(1), done(2)), "mitu": report(done(2, waited=11.0), failed=failed)}
    collect(coordinator, monkeypatch, reports)
    status = coordinator._make_status()
    assert [(entry.round, entry.samples, entry.failed, entry.reason) for entry in status.rounds] == [
        (1, 10, False, None),
        (2, 20, True, "a peer stalled"),
    ]
    assert status.computing_share == pytest.approx(27 / 40)
    assert (status.failed_rounds, status.samples_in_round, status.samples_per_second) == (1, 8, 4.0)
    assert [(volunteer.name, volunteer.samples) for volunteer in status.volunteers] == [("Asha", 20), ("Mitu", 10)]
    assert coordinator.ledger.seconds_by_device(2).keys() == {"CPU"}
    assert coordinator.said == ["Asha joined (2 here now)", "Mitu joined (2 here now)"]


def test_the_status_of_a_long_run_has_its_last_rounds_and_the_totals_of_all(coordinator: Any) -> None:
    coordinator.ledger.add_rounds("asha", [done(number) for number in range(1, 71)])
    coordinator.ledger.mark_failed(3, "a peer stalled")
    status = coordinator._make_status()
    assert [entry.round for entry in status.rounds] == list(range(21, 71))
    assert (status.samples, status.failed_rounds, status.computing_share) == (700, 1, 0.9)
    assert RunStatus.model_validate_json(status.model_dump_json()) == status


def test_a_status_before_the_first_round_has_no_computing_share(coordinator: Any) -> None:
    assert coordinator._make_status().computing_share is None


def test_a_round_counts_with_the_result_that_the_coordinator_has(
    coordinator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a network that fell apart only one part's rounds are in the model."""
    coordinator._engine.round = 2
    coordinator._engine.lineages = {1: "after 1", 2: "after 2"}
    other = {"mitu": report(done(1), done(2, "another"), done(3), done(4, samples=7))}
    collect(coordinator, monkeypatch, {"asha": report(done(1), done(2)), **other})
    assert coordinator.ledger.samples_by_peer() == {"asha": 20, "mitu": 10 + 10 + 7}


def test_samples_that_a_leaver_handed_in_count_when_the_others_have_finished_the_round(
    coordinator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator._engine.round, coordinator._engine.lineages = 2, {2: "after 2"}
    left = report(done(2), done(3).copy(update={"lineage": ""}), state=LEFT)
    collect(coordinator, monkeypatch, {"asha": left}, {"asha": left.copy(update={"time": 2.0})})
    assert coordinator.ledger.samples_by_peer() == {"asha": 10}
    coordinator._engine.round, coordinator._engine.lineages = 3, {2: "after 2", 3: "after 3"}
    collect(coordinator, monkeypatch, {"asha": left})
    assert coordinator.ledger.samples_by_peer() == {"asha": 20}
    assert not coordinator._handed_in


def test_who_was_killed_before_it_could_report_is_credited_by_the_result(
    coordinator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rafiq alone had samples in round 3, and its last report is of round 2."""
    engine = coordinator._engine
    engine.round = 3
    engine.lineages = {number: f"after {number}" for number in (1, 2, 3)}
    engine.shares = {number: {"asha": 0.0, "rafiq": 10.0, "coordinator": 0.0} for number in (1, 2, 3)}
    reports = {"asha": report(*(done(number, samples=0) for number in (1, 2, 3))), "rafiq": report(done(1), done(2))}
    collect(coordinator, monkeypatch, reports)
    assert [entry.round for entry in coordinator._make_status().rounds] == [1, 2]  # its report may be under way
    monkeypatch.setattr(ledger, "_REPORT_COMES", 0.0)
    collect(coordinator, monkeypatch, reports)
    status = coordinator._make_status()
    assert [(entry.round, entry.samples, entry.loss) for entry in status.rounds] == [
        (1, 10, 5.5),
        (2, 10, 5.5),
        (3, 10, None),
    ]
    assert status.samples == 30
    assert RunStatus.model_validate_json(status.model_dump_json()).rounds == status.rounds


def test_a_result_that_the_full_disk_refused_is_entered_later(
    coordinator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_result = coordinator.ledger.add_result
    tries: list[int] = []

    def full_once(number: int, *result: Any) -> None:
        tries.append(number)
        if len(tries) == 1:
            raise StorageError("ledger.sqlite: make room")
        add_result(number, *result)

    monkeypatch.setattr(coordinator.ledger, "add_result", full_once)
    monkeypatch.setattr(ledger, "_REPORT_COMES", 0.0)
    coordinator._engine.lineages, coordinator._engine.shares = {1: "after 1"}, {1: {"asha": 10.0}}
    same = {"asha": report()}
    collect(coordinator, monkeypatch, same, same, same)
    assert coordinator.ledger.samples_by_peer() == {"asha": 10}
    assert tries == [1, 1]


def test_nobody_can_have_done_rounds_of_a_far_future(coordinator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = [{"round": 10**8, "reason": "x"}, {"round": 1, "reason": "y"}]
    collect(coordinator, monkeypatch, {"asha": report(done(1), done(10**8), round=1, failed=failed)})
    assert [entry.round for entry in coordinator.ledger.rounds()] == [1]
    assert coordinator.ledger.failures() == {1: "y"}


def test_a_newcomer_that_still_loads_the_state_makes_nobody_forget(
    coordinator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says round 0 until it knows better; the run goes on at the round of the coordinator's checkpoint."""
    coordinator.ledger.add_rounds("asha", [done(number) for number in range(1, 8)])
    coordinator._engine.round = 5
    collect(coordinator, monkeypatch, {"mitu": report(ready=False, state="loading")})
    assert [entry.round for entry in coordinator.ledger.rounds()] == [1, 2, 3, 4, 5]  # 6 and 7 are done again


def test_rounds_of_a_living_swarm_are_not_forgotten(coordinator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator comes back with an older checkpoint."""
    coordinator.ledger.add_rounds("asha", [done(number) for number in range(1, 8)])
    coordinator._engine.round = 5
    collect(coordinator, monkeypatch, {"asha": report(done(7))})
    assert [entry.round for entry in coordinator.ledger.rounds()] == [1, 2, 3, 4, 5, 6, 7]


def test_a_report_that_the_full_disk_refused_is_entered_later(
    coordinator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_rounds = coordinator.ledger.add_rounds
    tries: list[str] = []

    def full_once(peer: str, rounds: list[RoundReport]) -> None:
        tries.append(peer)
        if len(tries) == 1:
            raise StorageError("ledger.sqlite: make room")
        add_rounds(peer, rounds)

    monkeypatch.setattr(coordinator.ledger, "add_rounds", full_once)
    same = {"asha": report(done(1))}
    collect(coordinator, monkeypatch, same, same)
    assert coordinator.ledger.samples_by_peer() == {"asha": 10}
    assert tries == ["asha", "asha"]
    assert "ledger.sqlite: make room" in coordinator.said


# ---- a disk or a database that refuses


class Steps:
    """What the swarm's peers report at each look of the coordinator, with something that happens before it."""

    def __init__(self, *steps: tuple[Any, dict[str, Report]]) -> None:
        self.steps = list(steps)
        self.last: dict[str, Report] = {}
        self.stop = threading.Event()

    def reports(self) -> dict[str, Report]:
        if not self.steps:
            self.stop.set()
            return self.last
        happens, self.last = self.steps.pop(0)
        happens()
        return self.last


@pytest.fixture
def in_postgresql(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> PostgresServer:
    """Asked for before the coordinator: its ledger is on this server."""
    monkeypatch.setenv("KANTHA_DATABASE_URL", postgres.make_database())
    return postgres


def test_while_the_database_is_away_the_status_is_answered_and_reports_are_kept(
    in_postgresql: PostgresServer, coordinator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rafiq comes, reports forty rounds and goes while the server is down; his report has the last 32 at a time."""
    statuses: list[RunStatus] = []
    answers: list[int] = []
    client = TestClient(build_app(coordinator), base_url="http://127.0.0.1:8600")

    def look() -> None:
        statuses.append(coordinator._make_status())
        coordinator._status = None
        answers.extend(client.get(path).status_code for path in ("/", "/api/v1/status"))

    rounds = [done(number) for number in range(1, 43)]
    coordinator._engine.round = 42
    early, late = {"asha": report(rounds[0])}, {"asha": report(rounds[0], time=2.0)}
    steps = Steps(
        (lambda: None, early),
        (look, early),
        (in_postgresql.stop, late | {"rafiq": report(*rounds[:32], failed=[{"round": 2, "reason": "x"}])}),
        (look, late | {"rafiq": report(*rounds[10:42], time=2.0)}),
        (lambda: None, late),  # the DHT has forgotten him
        (in_postgresql.start, late),
        (lambda: None, late),
        (look, late),
    )
    for peer in ("asha", "rafiq"):
        coordinator.ledger.add_member(member(coordinator, peer))
    monkeypatch.setattr(service, "_COLLECT_SECONDS", 0.0)
    coordinator._stop, coordinator._node = steps.stop, steps
    try:
        coordinator._collect()
    finally:
        if in_postgresql.is_down:
            in_postgresql.start()
    before, away, after = statuses
    assert (before.problem, after.problem) == ("", "")
    assert "records cannot be read right now" in away.problem
    assert away.rounds == before.rounds
    assert (before.samples, away.samples, after.samples) == (10, 10, 10 + 42 * 10)
    assert after.failed_rounds == 1
    assert coordinator.ledger.samples_by_peer() == {"asha": 10, "rafiq": 420}
    assert answers == [200] * 6
    assert len([line for line in coordinator.said if "there is no connection" in line]) == 1  # not at every look


def test_while_the_disk_is_full_the_status_says_so(coordinator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise StorageError("ledger.sqlite: make room")

    with monkeypatch.context() as patch:
        patch.setattr(coordinator.ledger, "add_rounds", refuse)
        collect(coordinator, monkeypatch, {"asha": report(done(1))}, {"asha": report(done(1), time=2.0)})
    assert "records cannot be written right now" in coordinator._make_status().problem
    assert "ledger.sqlite" not in coordinator._make_status().problem  # nobody else's business
    assert coordinator.said.count("ledger.sqlite: make room") == 1
    collect(coordinator, monkeypatch, {"asha": report(done(1))})
    status = coordinator._make_status()
    assert (status.problem, status.samples) == ("", 10)


def test_a_learning_rate_is_entered_with_the_result_of_its_round(
    coordinator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = coordinator._engine
    engine.round, engine.lineages = 1, {1: "after 1"}
    engine.shares, engine.learning_rates = {1: {"asha": 10.0}}, {1: 0.125}
    collect(coordinator, monkeypatch, {"asha": report(done(1))})
    assert [entry.learning_rate for entry in coordinator._make_status().rounds] == [0.125]
