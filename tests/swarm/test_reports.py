from types import SimpleNamespace
from typing import Any

import pytest
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.dht.routing import DHTID
from hivemind.dht.schema import SchemaValidator
from hivemind.dht.validation import CompositeValidator, DHTRecord
from hivemind.utils import MSGPackSerializer, get_dht_time
from pydantic.v1 import ValidationError

from kantha.swarm import reports
from kantha.swarm.identity import PeerIdentity
from kantha.swarm.reports import LEFT, PRESENT, ROUNDS_KEPT, UNCONFIRMED, Report, ReportSchema, Roster

ROUND: dict[str, Any] = {
    "round": 3,
    "lineage": "0123456789abcdef",
    "samples": 64,
    "seconds": 2.5,
    "waited": 0.25,
    "mlm_loss_sum": 300.0,
    "sop_loss_sum": 44.0,
    "peers": 3,
}
FAILED: dict[str, Any] = {"round": 2, "reason": "a peer stalled (Qm1234)"}
REPORT: dict[str, Any] = {
    "time": 1.7e9,
    "role": "trainer",
    "state": "training",
    "dialable": False,
    "ready": True,
    "round": 3,
    "lineage": "0123456789abcdef",
    "sketch": [0.5, -0.25],
    "samples": 8,
    "samples_per_second": 5.5,
    "device": "CPU",
    "version": "0.1.0",
    "certificate": "{}",
    "rounds": [ROUND],
    "failed": [FAILED],
}
PREFIX = "kantha-0123"

BAD_REPORTS: list[dict[str, Any]] = [
    {"time": "now"},
    {"time": -1.0},
    {"time": float("nan")},
    {"time": 1e12},
    {"role": "boss"},
    {"role": "trainer "},
    {"state": "x" * 41},
    {"state": 3},
    {"dialable": 1},
    {"dialable": None},
    {"ready": "yes"},
    {"round": -1},
    {"round": 1.5},
    {"round": "3"},
    {"round": True},
    {"round": 10**9 + 1},
    {"samples": -1},
    {"lineage": "x" * 65},
    {"lineage": 3},
    {"sketch": [0.0] * 65},
    {"sketch": [float("nan")]},
    {"sketch": [1e12]},
    {"sketch": ["0.5"]},
    {"sketch": None},
    {"samples": 10**9 + 1},
    {"samples_per_second": -0.5},
    {"samples_per_second": float("inf")},
    {"device": "x" * 61},
    {"device": None},
    {"version": "x" * 21},
    {"certificate": "x" * 2_001},
    {"certificate": None},
    {"rounds": None},
    {"rounds": [ROUND] * (ROUNDS_KEPT + 1)},
    {"rounds": [3]},
    {"failed": None},
    {"failed": [FAILED] * 9},
    {"failed": [{**FAILED, "round": -1}]},
    {"failed": [{**FAILED, "reason": "x" * 101}]},
    {"failed": [{**FAILED, "reason": None}]},
    {"failed": [{"round": 2}]},
]
BAD_ROUNDS: list[dict[str, Any]] = [
    {"round": -1},
    {"samples": -64},
    {"samples": "64"},
    {"seconds": -0.1},
    {"waited": -0.1},
    {"waited": float("inf")},
    {"lineage": "x" * 65},
    {"lineage": None},
    {"mlm_loss_sum": float("nan")},
    {"mlm_loss_sum": -1.0},
    {"sop_loss_sum": 1e12},
    {"peers": 0},
    {"peers": 10**6 + 1},
]
CHANGES = [*BAD_REPORTS, *({"rounds": [{**ROUND, **change}]} for change in BAD_ROUNDS)]


def test_a_report_arrives_as_it_was_sent() -> None:
    report = Report.parse_obj({**REPORT, "rounds": [ROUND] * ROUNDS_KEPT})
    assert Report.parse_obj(MSGPackSerializer.loads(MSGPackSerializer.dumps(report.dict()))) == report


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_malformed_report_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Report.parse_obj({**REPORT, **change})


@pytest.mark.parametrize("missing", REPORT)
def test_a_report_with_a_gap_is_refused(missing: str) -> None:
    with pytest.raises(ValidationError):
        Report.parse_obj({name: value for name, value in REPORT.items() if name != missing})


# ---- what a peer of the DHT lets another one store


def validator(identity: PeerIdentity) -> CompositeValidator:
    """The rules that every node of the swarm applies to every record."""
    return CompositeValidator([SchemaValidator(ReportSchema, prefix=PREFIX), RSASignatureValidator(identity.key)])


def record(identity: PeerIdentity, value: object, key: str = f"{PREFIX}_reports") -> DHTRecord:
    return DHTRecord(
        key=DHTID.generate(source=key).to_bytes(),
        subkey=MSGPackSerializer.dumps(RSASignatureValidator(identity.key).local_public_key),
        value=MSGPackSerializer.dumps(value),
        expiration_time=get_dht_time() + 60,
    )


def signed(identity: PeerIdentity, value: object, key: str = f"{PREFIX}_reports") -> DHTRecord:
    plain = record(identity, value, key)
    return DHTRecord(plain.key, plain.subkey, validator(identity).sign_value(plain), plain.expiration_time)


def test_a_peer_may_store_its_own_report(identity: PeerIdentity, other_identity: PeerIdentity) -> None:
    assert validator(other_identity).validate(signed(identity, REPORT))


@pytest.mark.parametrize("change", [{"round": -1}, {"rounds": [ROUND] * (ROUNDS_KEPT + 1)}, {"samples": "64"}], ids=str)
def test_a_malformed_report_is_not_stored(
    identity: PeerIdentity, other_identity: PeerIdentity, change: dict[str, Any]
) -> None:
    assert not validator(other_identity).validate(signed(identity, {**REPORT, **change}))


def test_an_unsigned_report_is_not_stored(identity: PeerIdentity, other_identity: PeerIdentity) -> None:
    assert not validator(other_identity).validate(record(identity, REPORT))


def test_a_report_of_nobody_is_not_stored(identity: PeerIdentity, other_identity: PeerIdentity) -> None:
    plain = record(identity, REPORT)
    anonymous = DHTRecord(plain.key, MSGPackSerializer.dumps(b"somebody"), plain.value, plain.expiration_time)
    assert not validator(other_identity).validate(anonymous)


def test_nobody_stores_a_report_in_the_name_of_another(identity: PeerIdentity, other_identity: PeerIdentity) -> None:
    mine = signed(other_identity, REPORT)
    forged = DHTRecord(mine.key, record(identity, REPORT).subkey, mine.value, mine.expiration_time)
    assert not validator(other_identity).validate(forged)


# ---- who is here


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(reports, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def report(time: float, **changes: object) -> Report:
    return Report.parse_obj({**REPORT, "time": time, **changes})


def test_a_peer_is_here_while_its_report_keeps_changing(clock: Clock) -> None:
    roster = Roster()
    assert roster.update({"a": report(1.0), "b": report(1.0)}) == ["a", "b"]
    clock.now += PRESENT - 1
    assert roster.update({"a": report(2.0), "b": report(1.0)}) == ["a"]
    clock.now += 2
    assert {peer: age for peer, (_, age) in roster.present("trainer").items()} == {"a": 2.0}
    clock.now += PRESENT - 3
    assert roster.present("trainer").keys() == {"a"}
    clock.now += 1
    assert roster.present("trainer") == {}
    roster.update({"b": report(3.0)})
    assert roster.present("trainer").keys() == {"b"}


def test_other_machines_clocks_decide_nothing(clock: Clock) -> None:
    roster = Roster()
    roster.update({"ahead": report(9e9), "behind": report(5.0)})
    clock.now += 5
    roster.update({"ahead": report(8e9), "behind": report(4.0)})  # set back: the report is new all the same
    clock.now += PRESENT - 1
    assert roster.present("trainer").keys() == {"ahead", "behind"}


def test_an_old_report_that_the_dht_still_holds_keeps_nobody_here(clock: Clock) -> None:
    roster = Roster()
    for _ in range(10):
        roster.update({"a": report(1.0)})
        clock.now += PRESENT / 4
    assert roster.present("trainer") == {}


def test_a_report_that_was_there_at_the_first_look_is_believed_for_a_moment(clock: Clock) -> None:
    """Its peer may be dead: the DHT keeps what it said for minutes."""
    roster = Roster()
    roster.update({"a": report(1.0), "b": report(1.0)})
    clock.now += UNCONFIRMED - 1
    assert roster.present("trainer").keys() == {"a", "b"}
    roster.update({"a": report(2.0), "b": report(1.0)})
    clock.now += 2
    assert roster.present("trainer").keys() == {"a"}


def test_a_peer_that_said_goodbye_is_gone_at_once(clock: Clock) -> None:
    roster = Roster()
    roster.update({"a": report(1.0), "b": report(1.0)})
    assert roster.update({"a": report(2.0, state=LEFT)}) == ["a"]  # its last rounds are still to be read
    assert roster.present("trainer").keys() == {"b"}


def test_trainers_and_averagers_are_counted_apart(clock: Clock) -> None:
    roster = Roster()
    roster.update({"a": report(1.0), "c": report(1.0, role="averager", samples=5)})
    assert roster.present("trainer").keys() == {"a"}
    assert roster.present("averager")["c"][0].samples == 5
