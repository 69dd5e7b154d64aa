"""Getting in and staying in, as the person in front of the terminal sees it, against a coordinator that says what the
test wants."""

import io
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import segno
from rich.console import Console
from web_server import DEADLINE, RUN, Answer, Desk, Request, Server, asked, hang_up, refused, sign_in

from kantha.api import Admission, RunDescription
from kantha.coordinator.allowlist import Person
from kantha.coordinator.service import Coordinator
from kantha.errors import (
    FingerprintError,
    KanthaError,
    LeaseError,
    MembershipError,
    NotACoordinatorError,
    SignInError,
    StorageError,
    UnreachableError,
)
from kantha.swarm.identity import PeerIdentity
from kantha.swarm.membership import Certificate, KeyChange, MembershipRequest, RunKey, Trust
from kantha.volunteer import client as client_module
from kantha.volunteer import membership as module
from kantha.volunteer.client import CoordinatorClient
from kantha.volunteer.folders import PeerFolder
from kantha.volunteer.membership import Applicant, Renewal, enter, trust_run


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ASKED_SECONDS", 0.01)
    monkeypatch.setattr(module, "_LEAST_SECONDS", 0.001)
    monkeypatch.setattr(module, "_RETRY_SECONDS", 0.01)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> RunKey:
    return RunKey.generate(tmp_path_factory.mktemp("key") / "run.pem")


@pytest.fixture(scope="module")
def newer_key(tmp_path_factory: pytest.TempPathFactory) -> RunKey:
    return RunKey.generate(tmp_path_factory.mktemp("key") / "newer.pem")


@pytest.fixture
def desk(server: Server, key: RunKey) -> Desk:
    return Desk(server, key, refused("this test gave no answer"))


@pytest.fixture
def client(server: Server) -> Iterator[CoordinatorClient]:
    with CoordinatorClient(server.url) as client:
        yield client


@pytest.fixture
def applicant(identity: PeerIdentity) -> Applicant:
    return Applicant(identity, RUN, "kaggle", "Kaggle notebook, Tesla T4, 4 cores")


def come(
    client: CoordinatorClient, desk: Desk, applicant: Applicant, console: Console | None = None, **options: Any
) -> tuple[Admission, str]:
    """Enter; the admission, and what was said."""
    said = io.StringIO()
    trust = Trust(RUN, desk.key.public_key)
    stop = options.pop("stop", threading.Event())
    admission = enter(client, trust, applicant, console or Console(file=said, width=300), stop, **options)
    return admission, said.getvalue()


# ---- getting in


class Said(io.StringIO):
    """What was printed, for another thread to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()

    def write(self, text: str) -> int:
        with self._changed:
            written = super().write(text)
            self._changed.notify_all()
        return written

    def wait_for(self, pattern: str) -> str:
        with self._changed:
            assert self._changed.wait_for(lambda: re.search(pattern, self.getvalue()), DEADLINE), self.getvalue()
            found = re.search(pattern, self.getvalue())
        assert found is not None
        return found[0]


def test_a_coordinator_a_moderator_and_somebody_with_a_browser(
    coordinator_url: str, web_coordinator: Coordinator, identity: PeerIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real ones, up to what the pages do."""
    monkeypatch.setattr("kantha.coordinator.admission.POLL_SECONDS", 0.05)
    monkeypatch.setattr(web_coordinator, "sign_in", "huggingface")
    web_coordinator.ledger.close()
    web_coordinator.take(web_coordinator.run)  # type: ignore[attr-defined]
    admission, allowlist = web_coordinator.admission, web_coordinator.allowlist
    run, said = web_coordinator.run.spec.fingerprint, Said()
    trust, entered = Trust(run, web_coordinator.run.key().public_key), []

    def join() -> None:
        applicant = Applicant(identity, run, "colab", "Colab notebook, Tesla T4, 2 cores")
        with CoordinatorClient(coordinator_url) as client:
            entered.append(enter(client, trust, applicant, Console(file=said, width=300), threading.Event()))

    waits = threading.Thread(target=join)
    waits.start()
    code = said.wait_for(r"pair\?code=\S+").removeprefix("pair?code=")
    pairing = admission.pairing(code)
    assert (pairing.service, pairing.instance) == ("colab", "Colab notebook, Tesla T4, 2 cores")
    allowlist.sign_in(Person("asha", "6a", "huggingface", ()))
    admission.confirm(code, "asha")
    said.wait_for("⏳")
    allowlist.decide(["asha"], "approve", by="moderator")
    waits.join(DEADLINE)
    assert said.getvalue().rstrip().endswith("✅ You are in.")
    (answer,) = entered
    assert answer.certificate.membership.username == "asha"
    with CoordinatorClient(coordinator_url) as client:
        applicant = Applicant(identity, run, "colab", "Colab notebook")
        allowlist.decide(["asha"], "ban", by="moderator", reason="spam")
        peer = Peer()

        def train() -> None:
            soon = answer.model_copy(update={"renew_seconds": 0.01})
            with staying(client, applicant, soon, peer):
                assert peer.stop.wait(DEADLINE)

        with pytest.raises(MembershipError, match="banned you from this run: spam"):
            train()
    assert trust.take(admission.notice())
    assert trust.is_revoked(answer.certificate.membership.serial)


def test_a_stranger_signs_in_is_let_in_and_goes_on_by_itself(
    client: CoordinatorClient, desk: Desk, applicant: Applicant
) -> None:
    certificate = desk.certify(applicant.identity)
    desk.then(sign_in(), sign_in(), asked(), asked(), desk.admission(certificate))
    admission, said = come(client, desk, applicant)
    assert admission.certificate == certificate
    lines = said.splitlines()
    link = f"{desk.url}/pair?code=ABCD-EFGH"
    order = [
        next(number for number, line in enumerate(lines) if part in line)
        for part in ("this machine shows ABCD-EFGH", "code   ABCD-EFGH", link, "goes on by itself", "⏳ Asked.", "✅")
    ]
    assert order == sorted(order)
    assert said.count(link) == said.count("⏳") == said.count("✅") == 1
    assert "█" not in said  # nobody can point a camera at a log
    requests = [MembershipRequest.model_validate(content) for content in desk.to("/api/v1/memberships")]
    assert len({request.nonce for request in requests}) == len(requests) == 5
    assert {request.verified_peer_id() for request in requests} == {applicant.identity.peer_id}
    assert {(request.username, request.service, request.take_over) for request in requests} == {("", "kaggle", False)}


def terminal(width: int) -> Console:
    return Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), force_terminal=True, width=width)


def shown(console: Console) -> str:
    console.file.flush()
    return console.file.buffer.getvalue().decode()  # type: ignore[attr-defined, no-any-return]


def test_in_a_terminal_the_link_is_there_for_a_phone_too(
    client: CoordinatorClient, desk: Desk, applicant: Applicant
) -> None:
    desk.then(sign_in(), desk.admission(desk.certify(applicant.identity)))
    drawn = io.StringIO()
    segno.make_qr(f"{desk.url}/pair?code=ABCD-EFGH", error="l").terminal(drawn, border=2, compact=True)
    for width, fits in ((100, True), (20, False)):
        desk.then(sign_in(), desk.admission(desk.certify(applicant.identity)))
        console = terminal(width)
        come(client, desk, applicant, console)
        said = shown(console)
        assert all(line in said for line in drawn.getvalue().splitlines()) is fits
        assert "ABCD-EFGH" in said
        assert "\x1b[?25h" in said  # the cursor is back


def test_a_code_that_ends_is_replaced_three_times(client: CoordinatorClient, desk: Desk, applicant: Applicant) -> None:
    said = io.StringIO()
    desk.then(*(sign_in(f"AAAA-AAA{number}") for number in range(9)))
    with pytest.raises(SignInError, match="nobody signed in: 4 codes") as caught:
        come(client, desk, applicant, Console(file=said, width=300))
    assert caught.value.exit_code == 32
    codes = [line.split()[1] for line in said.getvalue().splitlines() if line.strip().startswith("code ")]
    assert codes == ["AAAA-AAA0", "AAAA-AAA1", "AAAA-AAA2", "AAAA-AAA3"]
    assert said.getvalue().count("here is a new one") == 3


def test_the_end_of_a_code_is_told_in_the_time_of_this_machine(
    client: CoordinatorClient, desk: Desk, applicant: Applicant
) -> None:
    for expires, told in ((time.time() + 600, True), (0.0, False), (1e300, False)):
        desk.then(sign_in(expires=expires), desk.admission(desk.certify(applicant.identity)))
        _, said = come(client, desk, applicant)
        assert ("good until" in said) is told


def test_who_waits_for_long_hears_that_it_still_waits(
    client: CoordinatorClient, desk: Desk, applicant: Applicant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_QUIET_SECONDS", 0.0)
    desk.then(sign_in(), sign_in(), asked(), asked(), asked(), desk.admission(desk.certify(applicant.identity)))
    _, said = come(client, desk, applicant)
    assert said.count("still waiting for somebody to sign in") == 1
    assert said.count("still waiting for a moderator's answer") == 2


@pytest.mark.parametrize("before", [[], [sign_in()], [asked()]], ids=["at once", "signing in", "asked"])
@pytest.mark.parametrize(
    ("status", "error", "code"), [(403, MembershipError, 24), (409, LeaseError, 31)], ids=["refused", "taken"]
)
def test_a_refusal_is_told_in_the_coordinators_words(
    client: CoordinatorClient,
    desk: Desk,
    applicant: Applicant,
    before: list[Answer],
    status: int,
    error: type[KanthaError],
    code: int,
) -> None:
    desk.then(*before, refused("End it there\x1b[2J, or with --take-over", status))
    with pytest.raises(error, match=r"End it there\?\[2J, or with --take-over$") as caught:
        come(client, desk, applicant)
    assert str(caught.value).startswith(desk.url)
    assert caught.value.exit_code == code


def test_only_who_comes_takes_over_not_who_stays(client: CoordinatorClient, desk: Desk, applicant: Applicant) -> None:
    """Or two instances would throw each other out for ever."""
    desk.then(asked(), desk.admission(desk.certify(applicant.identity)))
    admission, _ = come(client, desk, applicant, take_over=True)
    assert [request["take_over"] for request in desk.to("/memberships")] == [True, True]
    with staying(client, applicant, admission):
        desk.wait_for(2, "/memberships")
    assert {request["take_over"] for request in desk.to("/memberships")[2:]} == {False}


def test_ctrl_c_leaves_the_waiting_room(client: CoordinatorClient, desk: Desk, applicant: Applicant) -> None:
    desk.then(asked())
    stop = threading.Event()
    stop.set()
    with pytest.raises(KeyboardInterrupt):
        come(client, desk, applicant, stop=stop)
    assert len(desk.arrived) == 1


@pytest.mark.parametrize(
    "away",
    [hang_up, (503, {"detail": "the disk is full"}), (502, {}), (200, {"page": "of a proxy"})],
    ids=["hangs up", "full disk", "proxy", "page"],
)
def test_a_coordinator_that_starts_again_meanwhile_is_waited_for(
    client: CoordinatorClient, desk: Desk, applicant: Applicant, away: Answer
) -> None:
    desk.then(asked(), away, away, asked(), away, asked(), desk.admission(desk.certify(applicant.identity)))
    _, said = come(client, desk, applicant)
    assert said.count("the coordinator is away") == said.count("the coordinator is back") == 2
    assert said.count("⏳") == 1


def test_a_coordinator_that_stays_away_is_not_waited_for_for_ever(
    client: CoordinatorClient, desk: Desk, applicant: Applicant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AWAY_SECONDS", 0.0)
    desk.then(asked(), (503, {}))
    with pytest.raises(UnreachableError, match="HTTP 503"):
        come(client, desk, applicant)


@pytest.mark.parametrize(
    "path", ["//evil.example/pair", "/pair", "pair\x1b[2J", "pair#x", "pair?next=http://x", "pair code", ""]
)
def test_a_link_leads_to_the_run_or_nowhere(
    client: CoordinatorClient, desk: Desk, applicant: Applicant, path: str
) -> None:
    said = io.StringIO()
    desk.then(sign_in(path=path))
    with pytest.raises(NotACoordinatorError, match="none would give"):
        come(client, desk, applicant, Console(file=said, width=300))
    assert "link" not in said.getvalue()


@pytest.mark.parametrize("whose", ["another key", "another peer", "another run", "ended", "revoked"])
def test_a_certificate_that_other_peers_would_refuse_is_refused(
    client: CoordinatorClient,
    desk: Desk,
    applicant: Applicant,
    newer_key: RunKey,
    other_identity: PeerIdentity,
    whose: str,
) -> None:
    peer_id = applicant.identity.peer_id
    certificate = {
        "another key": newer_key.certify(RUN, "asha", peer_id),
        "another peer": desk.certify(other_identity),
        "another run": desk.key.certify("1e" * 32, "asha", peer_id),
        "ended": desk.certify(applicant.identity, lifetime=-3600),
        "revoked": desk.certify(applicant.identity),
    }[whose]
    notice = desk.key.notify(RUN, {certificate.membership.serial: certificate.membership.expires})
    desk.then(desk.admission(certificate, notice.model_dump_json() if whose == "revoked" else ""))
    with pytest.raises(MembershipError):
        come(client, desk, applicant)


# ---- a busy coordinator


def busy(seconds: str) -> Callable[[Request], None]:
    return lambda request: request.say(b'{"detail": "too many"}', 429, {"Retry-After": seconds})


def test_a_busy_coordinator_is_waited_for(client: CoordinatorClient, desk: Desk, applicant: Applicant) -> None:
    desk.then(busy("0"), busy("0"), desk.admission(desk.certify(applicant.identity)))
    come(client, desk, applicant)
    assert len({request["nonce"] for request in desk.to("")}) == 1  # nobody has used it yet


@pytest.mark.parametrize("seconds", ["31", "999999999999999999", "Mon, 23 Nov 2026 00:00:00 GMT"])
def test_but_not_for_longer_than_a_request_is_good(
    client: CoordinatorClient, desk: Desk, applicant: Applicant, monkeypatch: pytest.MonkeyPatch, seconds: str
) -> None:
    monkeypatch.setattr(client_module, "_BUSY_SECONDS", 4.0)
    desk.then(busy(seconds))
    began = time.monotonic()
    with pytest.raises(UnreachableError, match="too many requests from here"):
        come(client, desk, applicant)
    assert time.monotonic() - began < DEADLINE / 2


# ---- staying in


class Peer:
    """What the swarm's node is told."""

    def __init__(self) -> None:
        self.certificates: list[Certificate] = []
        self.notices: list[str] = []
        self.said: list[str] = []
        self.stop = threading.Event()
        self.changed = threading.Condition()
        self.believes = True

    def take(self, what: list[Any], item: Any) -> None:
        if not self.believes:
            raise MembershipError("not signed by the run's key")
        with self.changed:
            what.append(item)
            self.changed.notify_all()

    def say(self, line: str) -> None:
        with self.changed:
            self.said.append(line)
            self.changed.notify_all()

    def wait(self, what: Callable[[], object]) -> None:
        with self.changed:
            assert self.changed.wait_for(what, DEADLINE), self.said


def staying(client: CoordinatorClient, applicant: Applicant, admission: Admission, peer: Peer | None = None) -> Renewal:
    peer = peer or Peer()
    renewal = Renewal(client, applicant, admission, peer.say, peer.stop)
    renewal.start(lambda new: peer.take(peer.certificates, new), lambda new: peer.take(peer.notices, new))
    return renewal


def admitted(desk: Desk, certificate: Certificate) -> Admission:
    desk.then(desk.admission(certificate))
    return Admission(certificate=certificate, notice="", renew_seconds=0.01)


def test_a_member_gets_new_certificates_and_notices_and_gives_its_place_back(
    client: CoordinatorClient, desk: Desk, applicant: Applicant
) -> None:
    admission = admitted(desk, desk.certify(applicant.identity))
    peer, newer = Peer(), desk.certify(applicant.identity)
    notice = desk.key.notify(RUN, {}).model_dump_json()
    with staying(client, applicant, admission, peer) as renewal:
        desk.wait_for(2)
        assert peer.certificates == []  # the one it has is as good
        desk.then(desk.admission(newer, notice))
        peer.wait(lambda: peer.certificates)
        assert peer.certificates == [newer]
        assert peer.notices[-1] == notice
        desk.wait_for(2)
        assert peer.certificates == [newer]
        renewal.raise_if_ended()
    assert peer.said == []
    assert not peer.stop.is_set()
    assert len(desk.to("/departures")) == 1
    requests = desk.to("/memberships")
    assert len({request["nonce"] for request in requests}) == len(requests)


def test_an_outage_is_told_once_and_its_end_too(client: CoordinatorClient, desk: Desk, applicant: Applicant) -> None:
    admission = admitted(desk, desk.certify(applicant.identity))
    until = time.strftime("%H:%M", time.localtime(admission.certificate.membership.expires))
    peer = Peer()
    with staying(client, applicant, admission, peer):
        desk.then((502, {}), hang_up, hang_up, (200, {}), refused("not found", 404), (503, {}))
        desk.wait_for(8)
        assert peer.said == [f"the coordinator does not answer; training goes on until {until} without it"]
        desk.then(desk.admission(admission.certificate))
        peer.wait(lambda: len(peer.said) == 2)
    assert peer.said[1] == "the coordinator is back"
    assert not peer.stop.is_set()


def test_an_answer_that_is_not_the_runs_own_is_no_answer(
    client: CoordinatorClient, desk: Desk, applicant: Applicant
) -> None:
    admission = admitted(desk, desk.certify(applicant.identity))
    peer = Peer()
    peer.believes = False
    desk.then(desk.admission(desk.certify(applicant.identity)))
    with staying(client, applicant, admission, peer):
        peer.wait(lambda: peer.said)
        desk.wait_for(2)
        assert len(peer.said) == 1
        assert not peer.stop.is_set()


@pytest.mark.parametrize(
    ("status", "error"), [(403, MembershipError), (409, LeaseError)], ids=["banned", "another took over"]
)
def test_who_may_not_stay_stops_and_hears_why(
    client: CoordinatorClient, desk: Desk, applicant: Applicant, status: int, error: type[KanthaError]
) -> None:
    admission = admitted(desk, desk.certify(applicant.identity))
    peer = Peer()

    def train() -> None:
        with staying(client, applicant, admission, peer) as renewal:
            desk.wait_for(1)
            desk.then(refused("A moderator banned you: spam", status))
            assert peer.stop.wait(DEADLINE)
            renewal.raise_if_ended()
            raise AssertionError("it goes on")

    with pytest.raises(error, match="A moderator banned you: spam") as caught:
        train()
    assert caught.value.exit_code == {403: 24, 409: 31}[status]
    assert desk.to("/departures") == []  # it has no place to give back


def test_the_reason_comes_before_what_went_wrong_because_of_it(
    client: CoordinatorClient, desk: Desk, applicant: Applicant
) -> None:
    """The swarm refuses a peer whose certificate is revoked, perhaps before this one has heard why."""
    admission = admitted(desk, desk.certify(applicant.identity))
    desk.then(refused("A moderator suspended you: away"))
    peer = Peer()

    def train() -> None:
        with staying(client, applicant, admission, peer):
            assert peer.stop.wait(DEADLINE)
            raise UnreachableError("no peer answers")

    with pytest.raises(MembershipError, match="suspended you"):
        train()


def test_a_member_whose_certificate_ends_leaves(client: CoordinatorClient, desk: Desk, applicant: Applicant) -> None:
    admission = admitted(desk, desk.certify(applicant.identity, lifetime=-1))
    desk.then(hang_up)
    peer = Peer()

    def train() -> None:
        with staying(client, applicant, admission, peer):
            assert peer.stop.wait(DEADLINE)

    with pytest.raises(MembershipError, match=r"certificate ended at .* join again"):
        train()


def test_a_member_that_slept_past_its_end_may_come_back(
    client: CoordinatorClient, desk: Desk, applicant: Applicant
) -> None:
    """A laptop: the coordinator is there, and gives it a new one."""
    ended = desk.certify(applicant.identity, lifetime=-3600)
    newer, peer = desk.certify(applicant.identity), Peer()
    desk.then(desk.admission(newer))
    with staying(client, applicant, Admission(certificate=ended, notice="", renew_seconds=0.01), peer):
        peer.wait(lambda: peer.certificates == [newer])


def test_a_member_that_shall_sign_in_again_is_told_once_and_trains_on(
    client: CoordinatorClient, desk: Desk, applicant: Applicant
) -> None:
    admission = admitted(desk, desk.certify(applicant.identity))
    peer = Peer()
    with staying(client, applicant, admission, peer):
        desk.then(sign_in())
        desk.wait_for(4)
        peer.wait(lambda: peer.said)
        assert len(peer.said) == 1
        assert f"{desk.url}/pair?code=ABCD-EFGH" in peer.said[0]
        assert not peer.stop.is_set()


def test_leaving_does_not_wait_for_a_coordinator_that_is_stuck(
    client: CoordinatorClient, desk: Desk, applicant: Applicant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LEAVE_SECONDS", 0.1)
    free = threading.Event()
    admission = admitted(desk, desk.certify(applicant.identity))
    desk.then(lambda request: (free.wait(DEADLINE), request.say(b"", 204))[1])
    with staying(client, applicant, admission):
        desk.wait_for(1)
        began = time.monotonic()
    assert time.monotonic() - began < DEADLINE / 2
    free.set()


def test_a_place_that_cannot_be_given_back_ends_by_itself(
    client: CoordinatorClient, desk: Desk, applicant: Applicant, caplog: pytest.LogCaptureFixture
) -> None:
    desk.departure = refused("who are you?")
    with staying(client, applicant, admitted(desk, desk.certify(applicant.identity))):
        pass
    assert "the lease was not given back" in caplog.text


def test_who_leaves_before_it_has_begun_gives_its_place_back_too(
    client: CoordinatorClient, desk: Desk, applicant: Applicant
) -> None:
    admission = admitted(desk, desk.certify(applicant.identity))
    peer = Peer()
    with pytest.raises(KeyboardInterrupt), Renewal(client, applicant, admission, peer.say, peer.stop):
        raise KeyboardInterrupt
    assert len(desk.to("/departures")) == 1


# ---- the run's key


def describe(key: RunKey, *changes: KeyChange, revoked: dict[str, int] | None = None) -> RunDescription:
    notice = key.notify(RUN, revoked or {}, changes)
    return RunDescription.model_construct(fingerprint=RUN, public_key=key.public_key, notice=notice.model_dump_json())


def test_the_key_of_the_link_is_the_one_believed(server: Server, key: RunKey, newer_key: RunKey) -> None:
    with CoordinatorClient(f"{server.url}/#{key.public_key.upper()}") as client:
        assert client.url == server.url
        folder = PeerFolder(RUN, "")
        assert trust_run(client, describe(key), folder).run_key == key.public_key
        with pytest.raises(FingerprintError, match=r"of the link.*somebody else may be answering") as caught:
            trust_run(client, describe(newer_key), folder)
        assert caught.value.exit_code == 22
        change = key.change_to(newer_key.public_key, RUN)
        assert trust_run(client, describe(newer_key, change), folder).run_key == newer_key.public_key


@pytest.mark.parametrize("link", ["http://127.0.0.1/#", "http://127.0.0.1/#abc", f"http://127.0.0.1#{'0f' * 33}"])
def test_half_a_key_in_a_link_is_not_believed(link: str) -> None:
    with pytest.raises(UnreachableError, match="copy the link"):
        CoordinatorClient(link)


def test_without_one_the_key_seen_first_is_kept(
    client: CoordinatorClient, key: RunKey, newer_key: RunKey, tmp_path: Path
) -> None:
    assert trust_run(client, describe(key), PeerFolder(RUN, "")).run_key == key.public_key
    folder = PeerFolder(RUN, "")  # another peer of this machine, perhaps tomorrow
    with pytest.raises(FingerprintError, match=r"seen when this machine first joined.*URL#KEY"):
        trust_run(client, describe(newer_key), folder)
    forged = newer_key.change_to(newer_key.public_key, RUN).model_copy(update={"old": key.public_key})
    with pytest.raises(FingerprintError, match="does not confirm"):
        trust_run(client, describe(newer_key, forged), folder)
    change = key.change_to(newer_key.public_key, RUN)
    assert trust_run(client, describe(newer_key, change), folder).run_key == newer_key.public_key
    # and from now on it is the newer one: who has the old key cannot name another
    newest = RunKey.generate(tmp_path / "newest.pem")
    for description in (describe(key), describe(newest, key.change_to(newest.public_key, RUN))):
        with pytest.raises(FingerprintError):
            trust_run(client, description, folder)
    chain = (change, newer_key.change_to(newest.public_key, RUN))
    assert trust_run(client, describe(newest, *chain), folder).run_key == newest.public_key


def test_what_was_taken_back_stays_taken_back_at_the_next_start(
    client: CoordinatorClient, key: RunKey, identity: PeerIdentity
) -> None:
    """Also where the coordinator, or who claims to be it, does not say so any more."""
    certificate = key.certify(RUN, "mallory", identity.peer_id)
    older = describe(key)
    folder = PeerFolder(RUN, "")
    newer = key.notify(RUN, {certificate.membership.serial: certificate.membership.expires}, after=2**52)
    folder.save_notice(newer.model_dump_json())
    trust = trust_run(client, older, folder)
    with pytest.raises(MembershipError, match="revoked"):
        trust.verify(certificate, identity.peer_id)
    (folder.path / "notice.json").write_text("{", encoding="utf-8")
    trust_run(client, older, folder).verify(certificate, identity.peer_id)  # damaged: left out


def test_a_kept_key_that_is_damaged_is_told(client: CoordinatorClient, key: RunKey) -> None:
    folder = PeerFolder(RUN, "")
    trust_run(client, describe(key), folder)
    (folder.run_folder / "run-key").write_text("?", encoding="utf-8")
    with pytest.raises(StorageError, match=r"run-key: damaged.*URL#KEY"):
        trust_run(client, describe(key), folder)
