"""What a peer that asks is answered: codes, certificates, leases, notices."""

import base64
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from limits import RateLimitItemPerHour, RateLimitItemPerMinute
from sqlalchemy import select

from kantha import api
from kantha.coordinator import admission as module
from kantha.coordinator.admission import CODE_LETTERS, LEASE_SECONDS, PAIRING_SECONDS, Admission, in_words
from kantha.coordinator.allowlist import Allowlist, Person, State
from kantha.coordinator.database import Database
from kantha.coordinator.ledger import Ledger
from kantha.coordinator.limiter import TooManyRequestsError
from kantha.errors import LeaseError, MembershipError
from kantha.spec import RunSpec
from kantha.spec.models import ServiceSpec
from kantha.swarm import membership as rules
from kantha.swarm.identity import PeerIdentity
from kantha.swarm.membership import (
    RENEWAL,
    Certificate,
    DepartureRequest,
    DownloadRequest,
    MembershipRequest,
    Notice,
    RunKey,
    Trust,
)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> list[PeerIdentity]:
    folder = tmp_path_factory.mktemp("machines")
    return [PeerIdentity(folder / f"{number}.key") for number in range(6)]


class Coordinator:
    """The books of a coordinator, its clock, and what volunteers send to it."""

    def __init__(self, folder: Path, place: Path | str, spec: RunSpec, sign_in: Any) -> None:
        self.place, self.spec, self.sign_in = place, spec, sign_in
        self.run = spec.fingerprint
        self.key = RunKey.generate(folder / "run.pem")
        self.ahead = 0.0  # seconds that have passed by its clock
        self.notified: list[str] = []
        self.start()

    def start(self) -> None:
        """Also once more, on what the one before has written."""
        self.database = Database(self.place)
        self.allowlist = Allowlist(self.database, self.notified.append, self.now)
        self.admission = Admission(self.database, self.spec, self.key, self.sign_in, self.allowlist, self.now)
        self.trust = Trust(self.run, self.key.public_key)

    def now(self) -> float:
        return time.time() + self.ahead

    def request(self, machine: PeerIdentity, **fields: Any) -> MembershipRequest:
        return MembershipRequest.signed(machine, self.run, **fields)

    def join(self, machine: PeerIdentity, **fields: Any) -> api.Admission:
        """A member's request; the certificate in the answer is good for all peers."""
        answer = self.admission.admit(self.request(machine, **fields))
        assert isinstance(answer, api.Admission)
        self.trust.take(answer.notice)
        self.trust.verify(answer.certificate, machine.peer_id)
        return answer

    def wait(self, machine: PeerIdentity, **fields: Any) -> api.Waiting:
        answer = self.admission.admit(self.request(machine, **fields))
        assert isinstance(answer, api.Waiting)
        return answer

    def pair(self, machine: PeerIdentity, username: str) -> None:
        self.allowlist.sign_in(Person(username, f"number-of-{username}", "huggingface", ()))
        self.admission.confirm(self.wait(machine).code, username)

    def member(self, username: str, *machines: PeerIdentity) -> None:
        for machine in machines:
            self.pair(machine, username)
        self.allowlist.decide([username], "approve", "mod")

    def is_revoked(self, certificate: Certificate) -> bool:
        self.trust.take(self.admission.notice())
        return self.trust.is_revoked(certificate.membership.serial)


@pytest.fixture
def spec(tiny_run: Any) -> RunSpec:
    services = {"local": ServiceSpec(max_instances=4), "kaggle": ServiceSpec(), "colab": ServiceSpec()}
    return tiny_run.spec.model_copy(update={"services": services})


@pytest.fixture
def local(tmp_path: Path, place: Path | str, spec: RunSpec) -> Iterator[Coordinator]:
    coordinator = Coordinator(tmp_path, place, spec, "local")
    yield coordinator
    coordinator.database.close()


@pytest.fixture
def hub(tmp_path: Path, place: Path | str, spec: RunSpec) -> Iterator[Coordinator]:
    """Of a run that people sign in to."""
    coordinator = Coordinator(tmp_path, place, spec, "huggingface")
    yield coordinator
    coordinator.database.close()


# ---- what is checked of every request


def leave(coordinator: Coordinator, machine: PeerIdentity, **fields: Any) -> Callable[[], object]:
    request = DepartureRequest.signed(machine, fields.pop("run", coordinator.run), **fields)
    return lambda: coordinator.admission.depart(request)


def join(coordinator: Coordinator, machine: PeerIdentity, **fields: Any) -> Callable[[], object]:
    run = fields.pop("run", coordinator.run)
    request = MembershipRequest.signed(machine, run, username="Asha", **fields)
    return lambda: coordinator.admission.admit(request)


def download(coordinator: Coordinator, machine: PeerIdentity, **fields: Any) -> Callable[[], object]:
    request = DownloadRequest.signed(machine, fields.pop("run", coordinator.run), **fields)
    header = f"Kantha {base64.urlsafe_b64encode(request.model_dump_json().encode()).decode()}"
    return lambda: coordinator.admission.check_download(header)


ASKING = pytest.mark.parametrize("asking", [join, leave, download])


@ASKING
def test_a_request_is_good_for_once_even_after_a_restart(
    local: Coordinator, machines: list[PeerIdentity], asking: Any
) -> None:
    local.join(machines[0], username="Asha")
    ask = asking(local, machines[0])
    ask()
    with pytest.raises(MembershipError, match="used before"):
        ask()
    local.database.close()
    local.start()
    with pytest.raises(MembershipError, match="used before"):
        ask()


@ASKING
def test_a_request_that_was_refused_is_used_too(local: Coordinator, machines: list[PeerIdentity], asking: Any) -> None:
    local.join(machines[0], username="Asha")
    local.allowlist.decide(["Asha"], "ban", "organizer", "spam")
    ask = asking(local, machines[0])
    if asking is not leave:  # which is no matter for whom
        with pytest.raises(MembershipError, match=r"spam|no certificate"):
            ask()
        local.allowlist.decide(["Asha"], "approve", "organizer")
    else:
        ask()
    with pytest.raises(MembershipError, match="used before"):
        ask()


@ASKING
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"run": "0f" * 32}, "another run"),
        ({"issued": int(time.time()) - 3600}, "clock"),
        ({"issued": 10**12}, "clock"),
    ],
)
def test_a_request_for_another_run_or_time_is_refused(
    local: Coordinator, machines: list[PeerIdentity], asking: Any, change: dict[str, Any], reason: str
) -> None:
    local.join(machines[0], username="Asha")
    with pytest.raises(MembershipError, match=reason):
        asking(local, machines[0], **change)()


def test_requests_that_are_too_old_to_be_used_are_forgotten(local: Coordinator, machines: list[PeerIdentity]) -> None:
    for _ in range(3):
        local.join(machines[0], username="Asha")
    local.ahead = 3600
    local.join(machines[1], username="Mitu")
    with local.database.reading() as session:
        assert machines[0].peer_id not in set(session.scalars(select(module._Nonce.peer_id)))


def test_a_peer_that_asks_too_often_is_told_when_to_come_back(local: Coordinator, machines: list[PeerIdentity]) -> None:
    for _ in range(40):
        local.join(machines[0], username="Asha")
    with pytest.raises(TooManyRequestsError) as caught:
        local.join(machines[0], username="Asha")
    assert 1 <= caught.value.seconds <= 61
    local.join(machines[1], username="Asha")
    leave(local, machines[0])()


def test_what_others_send_under_a_peers_name_does_not_count_against_it(
    local: Coordinator, machines: list[PeerIdentity]
) -> None:
    request = local.request(machines[0], username="Asha").model_copy(update={"username": "Mitu"})
    for _ in range(50):
        with pytest.raises(MembershipError, match="not signed"):
            local.admission.admit(request)
    local.join(machines[0], username="Asha")


def test_one_person_cannot_fill_the_notice_with_revocations(
    local: Coordinator, machines: list[PeerIdentity], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines that oust each other again and again: all peers are told of a limited number of revocations."""
    monkeypatch.setattr(module, "CERTIFICATES", RateLimitItemPerHour(6))
    for number in range(6):
        local.join(machines[number % 2], username="Asha", service="kaggle", take_over=True)
    with pytest.raises(TooManyRequestsError):
        local.join(machines[0], username="Asha", service="kaggle", take_over=True)
    local.join(machines[2], username="Mitu", service="kaggle")  # nobody else is touched


@ASKING
def test_strangers_may_ask_so_often_together_and_members_still_do(
    hub: Coordinator, machines: list[PeerIdentity], monkeypatch: pytest.MonkeyPatch, asking: Any
) -> None:
    hub.member("asha", machines[0])
    hub.join(machines[0])
    monkeypatch.setattr(module, "STRANGERS", RateLimitItemPerMinute(4))
    for machine in (machines[1], machines[2]):
        for _ in range(2):
            with contextlib.suppress(MembershipError):
                asking(hub, machine)()
    with pytest.raises(TooManyRequestsError):
        asking(hub, machines[1])()
    asking(hub, machines[0])()


def test_so_many_codes_are_given_in_a_minute(
    hub: Coordinator, machines: list[PeerIdentity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAIRINGS", RateLimitItemPerMinute(2))
    for machine in (machines[0], machines[1], machines[0]):
        hub.wait(machine)
    with pytest.raises(TooManyRequestsError):
        hub.wait(machines[2])
    hub.wait(machines[1])


# ---- a run without sign-in


def test_on_one_machine_everybody_is_let_in_by_name(local: Coordinator, machines: list[PeerIdentity]) -> None:
    answer = local.join(machines[0], username="আশা", instance="a laptop")
    membership = answer.certificate.membership
    assert (membership.username, membership.roles, membership.service) == ("আশা", ("trainer",), "local")
    assert answer.renew_seconds < LEASE_SECONDS / 3
    assert Ledger(local.database).members() == {machines[0].peer_id: "আশা"}
    assert [(each.username, each.label) for each in local.admission.leases("আশা")] == [("আশা", "a laptop")]
    assert local.notified == []
    with pytest.raises(MembershipError, match="--name"):
        local.admission.admit(local.request(machines[1]))


def test_whoever_is_kept_out_on_the_command_line_stays_out_on_one_machine_too(
    local: Coordinator, machines: list[PeerIdentity]
) -> None:
    certificate = local.join(machines[0], username="Asha").certificate
    Allowlist(Database(local.place)).decide(["asha"], "ban", "organizer", "it was a joke")
    assert local.is_revoked(certificate)
    with pytest.raises(MembershipError, match="it was a joke"):
        local.join(machines[0], username="Asha")


def test_a_name_of_one_machine_is_not_approved_where_people_sign_in(
    local: Coordinator, machines: list[PeerIdentity]
) -> None:
    local.join(machines[0], username="asha")
    standing = local.allowlist.sign_in(Person("asha", "1", "huggingface", ()))
    assert standing.state is State.NEW


def test_a_run_without_sign_in_takes_no_token(local: Coordinator, machines: list[PeerIdentity]) -> None:
    with pytest.raises(MembershipError, match="no sign-in"):
        local.admission.sign_in_with(local.request(machines[0]), Person("asha", "1", "huggingface", ()))


# ---- pairing


def test_a_machine_is_paired_its_owner_asks_and_is_let_in(hub: Coordinator, machines: list[PeerIdentity]) -> None:
    waiting = hub.wait(machines[0], service="kaggle", instance="a notebook", username="ignored")
    assert waiting.state == "sign_in"
    assert waiting.path == f"pair?code={waiting.code}"
    assert waiting.code in waiting.message
    assert set(waiting.code) - {"-"} <= set(CODE_LETTERS)
    assert len(waiting.code) == 9
    assert waiting.expires == pytest.approx(time.time() + PAIRING_SECONDS, abs=10)
    assert hub.wait(machines[0], service="kaggle").code == waiting.code  # the person reads one, not a new one each time
    assert hub.wait(machines[1]).code != waiting.code
    typed = f" {waiting.code.lower().replace('-', ' ')} "
    pairing = hub.admission.pairing(typed)
    assert pairing is not None
    assert (pairing.code, pairing.service, pairing.instance) == (waiting.code, "kaggle", "a notebook")

    hub.allowlist.sign_in(Person("asha", "1", "huggingface", ()))
    hub.admission.confirm(typed, "asha")
    waiting = hub.wait(machines[0], service="kaggle")
    assert (waiting.state, waiting.code) == ("asked", "")
    assert waiting.message == hub.allowlist.standing("asha").sentence
    assert hub.wait(machines[0], service="kaggle").message.startswith("⏳")
    assert hub.notified == ["asha"]
    hub.allowlist.decide(["asha"], "approve", "mod")
    answer = hub.join(machines[0], service="kaggle")
    assert (answer.certificate.membership.username, answer.certificate.membership.service) == ("asha", "kaggle")
    assert hub.wait(machines[1]).state == "sign_in"


def test_a_code_is_good_once_and_for_ten_minutes(hub: Coordinator, machines: list[PeerIdentity]) -> None:
    for number, name in enumerate(("asha", "thief")):
        hub.allowlist.sign_in(Person(name, str(number), "huggingface", ()))
    code = hub.wait(machines[0]).code
    hub.admission.confirm(code, "asha")
    assert hub.admission.pairing(code) is None
    hub.start()
    with pytest.raises(MembershipError, match="used already"):
        hub.admission.confirm(code, "thief")
    hub.allowlist.decide(["asha"], "approve", "mod")
    assert hub.join(machines[0]).certificate.membership.username == "asha"

    old = hub.wait(machines[1]).code
    hub.ahead += PAIRING_SECONDS + 1
    assert hub.admission.pairing(old) is None
    with pytest.raises(MembershipError, match="has ended"):
        hub.admission.confirm(old, "asha")
    assert hub.wait(machines[1]).code != old


@pytest.mark.parametrize("code", ["", "AAAA-AAAA", "'; DROP TABLE pairings; --", "ক" * 40, "\ud800", "x" * 10**6])
def test_a_code_that_no_machine_shows_pairs_nothing(hub: Coordinator, code: str) -> None:
    hub.allowlist.sign_in(Person("asha", "1", "huggingface", ()))
    assert hub.admission.pairing(code) is None
    with pytest.raises(MembershipError, match="no machine shows"):
        hub.admission.confirm(code, "asha")


def test_nobody_pairs_a_machine_without_signing_in(hub: Coordinator, machines: list[PeerIdentity]) -> None:
    code = hub.wait(machines[0]).code
    with pytest.raises(MembershipError, match="nobody named"):
        hub.admission.confirm(code, "asha")
    assert hub.admission.pairing(code) is not None


def test_a_token_pairs_at_once(hub: Coordinator, machines: list[PeerIdentity]) -> None:
    person = Person("asha", "1", "huggingface", ("bengal",))
    waiting = hub.admission.sign_in_with(hub.request(machines[0]), person)
    assert isinstance(waiting, api.Waiting)
    assert waiting.state == "asked"
    assert hub.notified == ["asha"]
    hub.allowlist.decide(["asha"], "approve", "mod")
    assert hub.join(machines[0]).certificate.membership.username == "asha"
    request = hub.request(machines[1])
    assert isinstance(hub.admission.sign_in_with(request, person), api.Admission)
    with pytest.raises(MembershipError, match="used before"):
        hub.admission.sign_in_with(request, person)
    with pytest.raises(MembershipError, match="another account"):
        hub.admission.sign_in_with(hub.request(machines[2]), Person("asha", "2", "huggingface", ()))
    assert hub.wait(machines[2]).state == "sign_in"


def test_a_machine_that_gets_another_owner_loses_what_the_first_one_had(
    hub: Coordinator, machines: list[PeerIdentity]
) -> None:
    hub.member("asha", machines[0])
    before = hub.join(machines[0]).certificate
    hub.allowlist.decide(["mitu"], "approve", "mod")
    answer = hub.admission.sign_in_with(hub.request(machines[0]), Person("mitu", "2", "huggingface", ()))
    assert isinstance(answer, api.Admission)
    assert answer.certificate.membership.username == "mitu"
    assert hub.is_revoked(before)
    assert not hub.is_revoked(answer.certificate)
    assert hub.admission.leases("asha") == []
    assert len(hub.admission.leases("mitu")) == 1


def test_an_account_that_changed_its_name_gets_a_certificate_with_it(
    hub: Coordinator, machines: list[PeerIdentity]
) -> None:
    hub.member("asha", machines[0])
    hub.join(machines[0])
    hub.allowlist.sign_in(Person("ashok", "number-of-asha", "huggingface", ()))
    assert hub.join(machines[0]).certificate.membership.username == "ashok"
    assert Ledger(hub.database).members() == {machines[0].peer_id: "ashok"}


# ---- revocation


@pytest.mark.parametrize("action", ["refuse", "suspend", "ban"])
def test_whoever_is_kept_out_loses_certificates_and_leases_at_once(
    hub: Coordinator, machines: list[PeerIdentity], action: Any
) -> None:
    hub.member("asha", machines[0], machines[1])
    hub.member("mitu", machines[2])
    first, second = (hub.join(machine).certificate for machine in machines[:2])
    other = hub.join(machines[2]).certificate
    before = Notice.model_validate_json(hub.admission.notice())
    assert before.revoked == {}
    hub.allowlist.decide(["asha"], action, "mod", "a broken machine")
    notice = Notice.model_validate_json(hub.admission.notice())
    assert notice.number > before.number
    assert notice.revoked == {each.membership.serial: each.membership.expires for each in (first, second)}
    assert hub.is_revoked(first)
    assert not hub.is_revoked(other)
    assert hub.admission.leases("asha") == []
    with pytest.raises(MembershipError, match="a broken machine"):
        hub.join(machines[0])
    with pytest.raises(MembershipError, match="no certificate"):
        download(hub, machines[0])()

    hub.allowlist.decide(["asha"], "approve", "mod")
    fresh = hub.join(machines[0]).certificate
    assert not hub.is_revoked(fresh)
    assert hub.is_revoked(first)


def test_a_certificate_of_a_machine_that_left_before_is_revoked_too(
    hub: Coordinator, machines: list[PeerIdentity]
) -> None:
    hub.member("asha", machines[0])
    certificate = hub.join(machines[0]).certificate
    leave(hub, machines[0])()
    hub.allowlist.decide(["asha"], "ban", "mod", "spam")
    assert hub.is_revoked(certificate)


def test_a_notice_is_made_anew_only_for_news_and_its_numbers_grow_through_restarts(
    hub: Coordinator, machines: list[PeerIdentity], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.member("asha", machines[0])
    hub.join(machines[0])
    first = hub.admission.notice()
    assert hub.admission.notice() == first
    hub.database.close()
    hub.start()
    assert hub.admission.notice() == first
    hub.allowlist.decide(["asha"], "suspend", "mod", "later")
    hub.start()
    # the coordinator's clock went back by a year
    monkeypatch.setattr(rules.time, "time_ns", lambda clock=rules.time.time_ns: clock() - 365 * 86_400 * 10**9)
    second = Notice.model_validate_json(hub.admission.notice())
    assert second.number == Notice.model_validate_json(first).number + 1
    assert len(second.revoked) == 1


def test_a_certificate_that_has_ended_is_not_told_any_more(hub: Coordinator, machines: list[PeerIdentity]) -> None:
    hub.member("asha", machines[0])
    certificate = hub.join(machines[0]).certificate
    hub.allowlist.decide(["asha"], "ban", "mod", "spam")
    assert hub.is_revoked(certificate)
    hub.ahead = rules.LIFETIME + rules.CLOCK_SKEW  # somebody's slow clock may still believe it
    assert list(Notice.model_validate_json(hub.admission.notice()).revoked) == [certificate.membership.serial]
    hub.ahead = rules.LIFETIME + 3 * rules.CLOCK_SKEW
    assert Notice.model_validate_json(hub.admission.notice()).revoked == {}


def test_a_notice_holds_the_revocations_that_matter_longest(
    hub: Coordinator, machines: list[PeerIdentity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_REVOKED", 1)
    hub.member("asha", machines[0])
    hub.member("mitu", machines[1])
    hub.join(machines[0])
    monkeypatch.setattr(rules, "LIFETIME", 2 * rules.LIFETIME)
    longest = hub.admission._key.certify  # with the longer life
    monkeypatch.setattr(hub.key, "certify", lambda *given, **more: longest(*given, **more, lifetime=10**6))
    last = hub.join(machines[1]).certificate
    hub.allowlist.decide(["asha", "mitu"], "ban", "mod", "spam")
    assert list(Notice.model_validate_json(hub.admission.notice()).revoked) == [last.membership.serial]


# ---- certificates


def test_a_member_that_asks_again_keeps_its_certificate_for_an_hour(
    hub: Coordinator, machines: list[PeerIdentity]
) -> None:
    hub.member("asha", machines[0])
    first = hub.join(machines[0]).certificate
    assert hub.join(machines[0]).certificate == first
    hub.start()
    hub.ahead = RENEWAL - 10
    assert hub.join(machines[0]).certificate == first
    hub.ahead = RENEWAL + 10
    second = hub.join(machines[0]).certificate
    assert second.membership.serial != first.membership.serial
    assert not hub.is_revoked(first)


def test_the_coordinator_has_a_certificate_of_its_own(hub: Coordinator, machines: list[PeerIdentity]) -> None:
    certificate = hub.admission.averager_certificate(machines[0].peer_id)
    membership = hub.trust.verify(certificate, machines[0].peer_id)
    assert (membership.roles, membership.username) == (("averager",), "coordinator")


def test_after_a_change_of_the_key_everybody_gets_a_certificate_by_the_new_one(
    hub: Coordinator, machines: list[PeerIdentity], tmp_path: Path
) -> None:
    hub.member("asha", machines[0], machines[1])
    before = hub.join(machines[0]).certificate
    revoked = hub.join(machines[1]).certificate
    hub.admission.notice()
    fresh = RunKey.generate(tmp_path / "fresh.pem")
    hub.admission.rotate(fresh, [hub.key.change_to(fresh.public_key, hub.run)])
    assert hub.admission.public_key == fresh.public_key

    peer = Trust(hub.run, hub.key.public_key)  # joined before, knows the old key alone
    assert peer.take(hub.admission.notice())
    assert peer.run_key == fresh.public_key
    after = hub.join(machines[0]).certificate
    assert after.verify(fresh.public_key, hub.run, machines[0].peer_id)
    assert peer.verify(after, machines[0].peer_id)
    assert peer.verify(before, machines[0].peer_id)  # for some minutes
    hub.allowlist.decide(["asha"], "ban", "mod", "spam")
    peer.take(hub.admission.notice())
    for certificate in (before, revoked, after):
        assert peer.is_revoked(certificate.membership.serial)
    own = hub.admission.averager_certificate(machines[2].peer_id)
    assert own.verify(fresh.public_key, hub.run, machines[2].peer_id)
    # after a restart, members that have not renewed yet are known still
    trust = hub.admission.trust()
    assert trust.run_key == fresh.public_key
    by_the_old_key = hub.key.certify(hub.run, "mitu", machines[3].peer_id)
    assert trust.verify(by_the_old_key, machines[3].peer_id).username == "mitu"
    assert trust.is_revoked(before.membership.serial)


# ---- downloads


def test_checkpoints_are_for_members(hub: Coordinator, machines: list[PeerIdentity]) -> None:
    hub.member("asha", machines[0])
    with pytest.raises(MembershipError, match="join first"):
        download(hub, machines[0])()
    hub.join(machines[0])
    download(hub, machines[0])()
    with pytest.raises(MembershipError, match="join first"):
        download(hub, machines[1])()
    hub.ahead = rules.LIFETIME + 1
    with pytest.raises(MembershipError, match="join first"):
        download(hub, machines[0])()


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Kantha",
        "Kantha ",
        "Kantha !!!",
        "Kantha e30=",
        "Bearer e30=",
        "Kantha " + base64.b64encode(b'{"purpose": "download"}').decode(),
        "Kantha " + "A" * 10**6,
        "Kantha ক",
    ],
    ids=lambda header: header[:20],
)
def test_a_header_that_is_none_is_refused(hub: Coordinator, header: str) -> None:
    with pytest.raises(MembershipError, match="for members"):
        hub.admission.check_download(header)


def test_a_request_to_join_is_no_request_to_download(local: Coordinator, machines: list[PeerIdentity]) -> None:
    local.join(machines[0], username="Asha")
    other = local.request(machines[0], username="Asha")
    with pytest.raises(MembershipError, match="for members"):
        local.admission.check_download(f"Kantha {base64.b64encode(other.model_dump_json().encode()).decode()}")


# ---- leases


@pytest.fixture
def asha(hub: Coordinator, machines: list[PeerIdentity]) -> Coordinator:
    """All machines are Asha's, who is in."""
    hub.member("asha", *machines)
    return hub


def test_a_second_instance_is_refused_with_where_the_first_one_runs(
    asha: Coordinator, machines: list[PeerIdentity]
) -> None:
    first = asha.join(machines[0], service="kaggle", instance="nb-1").certificate
    for asha.ahead in range(0, 7800, 150):
        asha.join(machines[0], service="kaggle", instance="nb-1")
        asha.admission._limiter = type(asha.admission._limiter)()  # two hours are not over in a minute
    with pytest.raises(LeaseError) as caught:
        asha.join(machines[1], service="kaggle")
    for part in ("kaggle (nb-1)", "2 h 7 min", "--take-over", "3 minutes"):
        assert part in str(caught.value)
    assert not asha.is_revoked(first)
    assert len(str(caught.value)) < 1_000


def test_a_lease_that_is_not_renewed_for_three_minutes_is_free(asha: Coordinator, machines: list[PeerIdentity]) -> None:
    killed = asha.join(machines[0], service="kaggle").certificate
    asha.ahead = LEASE_SECONDS - 5
    with pytest.raises(LeaseError):
        asha.join(machines[1], service="kaggle")
    assert not asha.is_revoked(killed)
    asha.ahead = LEASE_SECONDS + 1
    asha.join(machines[1], service="kaggle")
    assert asha.is_revoked(killed)  # else somebody would compute without a lease
    with pytest.raises(LeaseError):
        asha.join(machines[0], service="kaggle")


def test_a_member_that_fell_silent_goes_on_where_nobody_took_its_place(
    asha: Coordinator, machines: list[PeerIdentity]
) -> None:
    certificate = asha.join(machines[0], service="kaggle").certificate
    asha.ahead = 1_000
    assert asha.join(machines[0], service="kaggle").certificate == certificate
    assert not asha.is_revoked(certificate)


def test_whoever_leaves_gives_the_place_back_at_once(asha: Coordinator, machines: list[PeerIdentity]) -> None:
    asha.join(machines[0], service="kaggle")
    leave(asha, machines[0])()
    asha.join(machines[1], service="kaggle")
    leave(asha, machines[0])()  # it has none: the other one's stays
    with pytest.raises(LeaseError):
        asha.join(machines[0], service="kaggle")


def test_take_over_ends_the_first_one_at_once(asha: Coordinator, machines: list[PeerIdentity]) -> None:
    first = asha.join(machines[0], service="kaggle").certificate
    colab = asha.join(machines[2], service="colab").certificate
    answer = asha.join(machines[1], service="kaggle", take_over=True)
    assert first.membership.serial in Notice.model_validate_json(answer.notice).revoked
    assert asha.is_revoked(first)
    assert not asha.is_revoked(answer.certificate)
    assert not asha.is_revoked(colab)
    with pytest.raises(LeaseError):
        asha.join(machines[0], service="kaggle")
    asha.join(machines[1], service="kaggle")


def test_kaggle_and_colab_go_together_and_other_people_do_not_count(
    asha: Coordinator, machines: list[PeerIdentity], other_identity: PeerIdentity
) -> None:
    asha.join(machines[0], service="kaggle")
    asha.join(machines[1], service="colab")
    asha.member("mitu", other_identity)
    asha.join(other_identity, service="kaggle")
    assert [each.service for each in asha.admission.leases("asha")] == ["kaggle", "colab"]


def test_four_instances_of_ones_own_and_no_more(asha: Coordinator, machines: list[PeerIdentity]) -> None:
    certificates = [asha.join(machine).certificate for machine in machines[:4]]
    with pytest.raises(LeaseError, match="and 3 more"):
        asha.join(machines[4])
    asha.ahead = LEASE_SECONDS / 2
    for machine in machines[1:4]:
        asha.join(machine)
    asha.ahead = LEASE_SECONDS + 1
    asha.join(machines[4])  # takes the place of the one that fell silent
    assert [asha.is_revoked(each) for each in certificates] == [True, False, False, False]
    answer = asha.join(machines[5], take_over=True)
    assert {each.peer_id for each in asha.admission.leases("asha")} == {machines[5].peer_id}
    assert [asha.is_revoked(each) for each in certificates] == [True] * 4
    assert not asha.is_revoked(answer.certificate)


def test_one_that_fell_silent_keeps_its_certificate_while_there_are_places(
    asha: Coordinator, machines: list[PeerIdentity]
) -> None:
    certificate = asha.join(machines[0]).certificate
    asha.ahead = LEASE_SECONDS + 1
    for machine in machines[1:4]:
        asha.join(machine)
    assert not asha.is_revoked(certificate)
    asha.join(machines[0])


def test_of_several_that_ask_together_one_gets_the_place(asha: Coordinator, machines: list[PeerIdentity]) -> None:
    start = threading.Barrier(len(machines))
    answers: list[object] = []

    def ask(machine: PeerIdentity) -> None:
        request = asha.request(machine, service="kaggle")
        start.wait(timeout=10)
        try:
            answers.append(asha.admission.admit(request))
        except Exception as error:  # noqa: BLE001  looked at below
            answers.append(error)

    threads = [threading.Thread(target=ask, args=(machine,)) for machine in machines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(type(answer).__name__ for answer in answers) == ["Admission"] + ["LeaseError"] * (len(machines) - 1)


def test_a_service_that_the_run_does_not_take_is_refused(asha: Coordinator, machines: list[PeerIdentity]) -> None:
    with pytest.raises(MembershipError, match="no volunteers on hosted, only on colab, kaggle, local"):
        asha.join(machines[0], service="hosted")


def test_a_machine_that_says_another_service_has_one_place_and_one_certificate(
    asha: Coordinator, machines: list[PeerIdentity]
) -> None:
    first = asha.join(machines[0], service="colab").certificate
    second = asha.join(machines[0], service="kaggle").certificate
    assert second.membership.service == "kaggle"
    assert asha.is_revoked(first)
    assert not asha.is_revoked(second)
    assert [each.service for each in asha.admission.leases("asha")] == ["kaggle"]
    asha.join(machines[1], service="colab")


def test_leases_live_on_while_the_coordinator_is_away(asha: Coordinator, machines: list[PeerIdentity]) -> None:
    killed = asha.join(machines[1], service="colab").certificate
    asha.ahead = LEASE_SECONDS + 20  # that one is silent for longer than the others live
    asha.join(machines[0], service="kaggle")
    asha.ahead += 7200
    asha.start()
    asha.admission.restart()
    with pytest.raises(LeaseError):
        asha.join(machines[2], service="kaggle")
    asha.join(machines[3], service="colab")
    assert asha.is_revoked(killed)
    asha.ahead += LEASE_SECONDS + 1
    asha.join(machines[2], service="kaggle")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-5, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (7_800, "2 h 10 min"),
        (7_200, "2 h"),
        (47 * 3600, "47 h"),
        (49 * 3600, "2 days"),
    ],
)
def test_a_length_of_time_is_told_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
