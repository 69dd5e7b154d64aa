import json
import os
import stat
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from hivemind.p2p import PeerID
from pydantic import ValidationError

from kantha.errors import MembershipError, SwarmError
from kantha.swarm import membership
from kantha.swarm.identity import PeerIdentity, peer_id_of, verify_signature
from kantha.swarm.membership import (
    CLOCK_SKEW,
    LIFETIME,
    MOST_NOTICE,
    OLD_KEY_SECONDS,
    Announcement,
    Certificate,
    MembershipRequest,
    Notice,
    RunKey,
    Trust,
)

RUN, OTHER_RUN = "0f" * 32, "1e" * 32
NO_RSA_KEYS = [
    "",
    "garbage",
    "ssh-rsa",
    "ssh-rsa AAAA",
    "ssh-xyz AAAA",
    "বাংলা",
    "sk-ssh-ed25519@openssh.com AAAAGnNrLXNzaC1lZDI1NTE5QG9wZW5zc2guY29tAAAAIA==",
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAINdamAGCsQq31Uv+08lkBzoO4XLz2qYjJa8CGmj3B1Ea",
]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def set_clock(monkeypatch: pytest.MonkeyPatch, seconds_from_now: float) -> None:
    now = time.time() + seconds_from_now
    monkeypatch.setattr(membership, "time", SimpleNamespace(time=lambda: now))


@pytest.fixture
def run_key(tmp_path: Path) -> RunKey:
    return RunKey.generate(tmp_path / "run.pem")


@pytest.fixture
def request_to_join(identity: PeerIdentity) -> MembershipRequest:
    return MembershipRequest.signed(identity, RUN, username="আশা", service="kaggle")


@pytest.fixture
def certificate(run_key: RunKey, request_to_join: MembershipRequest, identity: PeerIdentity) -> Certificate:
    return run_key.certify(RUN, "আশা", identity.peer_id, "kaggle")


# ---- identity


def test_the_peer_id_is_the_one_that_hivemind_and_libp2p_use(identity: PeerIdentity) -> None:
    theirs = PeerID.from_identity(identity.path.read_bytes()).to_base58()
    assert identity.peer_id == theirs
    assert peer_id_of(identity.public_key) == theirs


def test_an_identity_is_made_once_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "peer.key"
    umask = os.umask(0)
    try:
        first = PeerIdentity(path)
    finally:
        os.umask(umask)
    assert mode(path) & 0o077 == 0
    content = path.read_bytes()
    again = PeerIdentity(path)
    assert (again.peer_id, again.public_key) == (first.peer_id, first.public_key)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"no key at all", b"\x08\x00\x12\x03abc"])
def test_a_damaged_identity_is_told_by_its_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "peer.key"
    path.write_bytes(content)
    with pytest.raises(SwarmError) as caught:
        PeerIdentity(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_signature_holds_for_its_message_and_its_key_only(
    identity: PeerIdentity, other_identity: PeerIdentity
) -> None:
    signature = identity.sign(b"message")
    assert verify_signature(identity.public_key, b"message", signature)
    assert not verify_signature(identity.public_key, b"messagf", signature)
    assert not verify_signature(other_identity.public_key, b"message", signature)
    assert not verify_signature(identity.public_key, b"message", other_identity.sign(b"message"))


@pytest.mark.parametrize("signature", ["", "AAAA", "!not base64!", "বাংলা", "A" * 344])
def test_garbage_is_no_signature(identity: PeerIdentity, signature: str) -> None:
    assert verify_signature(identity.public_key, b"message", signature) is False


@pytest.mark.parametrize("key", NO_RSA_KEYS)
def test_what_is_no_rsa_key_has_no_peer_id(key: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  the message is that of the caller
        peer_id_of(key)


@pytest.mark.parametrize("key", NO_RSA_KEYS)
def test_nothing_is_signed_by_what_is_no_rsa_key(identity: PeerIdentity, key: str) -> None:
    assert verify_signature(key, b"message", identity.sign(b"message")) is False


# ---- asking to be let in


def test_a_request_tells_who_asks(request_to_join: MembershipRequest, identity: PeerIdentity) -> None:
    sent = MembershipRequest.model_validate_json(request_to_join.model_dump_json())
    assert sent.verified_peer_id() == identity.peer_id


@pytest.mark.parametrize(
    "change",
    [
        {"run": OTHER_RUN},
        {"username": "আশা "},
        {"service": "local"},
        {"take_over": True},
        {"nonce": "0" * 32},
        {"signature": ""},
        {"signature": "AAAA"},
    ],
)
def test_a_request_that_was_changed_is_refused(request_to_join: MembershipRequest, change: dict[str, object]) -> None:
    with pytest.raises(MembershipError, match="not signed"):
        request_to_join.model_copy(update=change).verified_peer_id()


def test_a_request_cannot_be_made_younger(request_to_join: MembershipRequest) -> None:
    with pytest.raises(MembershipError, match="not signed"):
        request_to_join.model_copy(update={"issued": request_to_join.issued + 1}).verified_peer_id()


def test_nobody_asks_with_the_key_of_another_peer(
    request_to_join: MembershipRequest, other_identity: PeerIdentity
) -> None:
    with pytest.raises(MembershipError, match="not signed"):
        request_to_join.model_copy(update={"public_key": other_identity.public_key}).verified_peer_id()


def test_a_request_from_a_wrong_clock_is_told_the_difference(
    request_to_join: MembershipRequest, identity: PeerIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    for difference in (-CLOCK_SKEW - 40, CLOCK_SKEW + 40):
        set_clock(monkeypatch, difference)
        with pytest.raises(MembershipError, match="clock") as caught:
            request_to_join.verified_peer_id()
        told = [int(word) for word in str(caught.value).split() if word.isdigit()]
        assert abs(told[0] - abs(difference)) <= 2
    for difference in (2 - CLOCK_SKEW, CLOCK_SKEW - 10):
        set_clock(monkeypatch, difference)
        assert request_to_join.verified_peer_id() == identity.peer_id


def test_a_request_from_a_time_that_no_clock_shows_is_refused(request_to_join: MembershipRequest) -> None:
    with pytest.raises(MembershipError):
        request_to_join.model_copy(update={"issued": 10**400}).verified_peer_id()


@pytest.mark.parametrize("key", NO_RSA_KEYS)
def test_a_request_with_a_key_of_another_kind_is_refused(request_to_join: MembershipRequest, key: str) -> None:
    with pytest.raises(MembershipError, match="not signed"):
        request_to_join.model_copy(update={"public_key": key}).verified_peer_id()


@pytest.mark.parametrize("character", ["\n", "\x1b", "\x9b", "\u202a", "\u202e", "\u2066", "\u2069"])
def test_a_name_that_plays_with_terminals_is_refused(
    identity: PeerIdentity, request_to_join: MembershipRequest, character: str
) -> None:
    with pytest.raises(MembershipError, match="--name"):
        MembershipRequest.signed(identity, RUN, username=f"A{character}sha")
    with pytest.raises(ValidationError):
        MembershipRequest.model_validate({**request_to_join.model_dump(), "username": f"A{character}sha"})


# ---- certificates


def test_a_certificate_holds_for_its_run_and_peer(
    certificate: Certificate, run_key: RunKey, identity: PeerIdentity
) -> None:
    sent = Certificate.model_validate_json(certificate.model_dump_json())
    granted = sent.verify(run_key.public_key, RUN, identity.peer_id)
    assert (granted.username, granted.service, granted.peer_id) == ("আশা", "kaggle", identity.peer_id)
    assert granted.roles == ("trainer",)
    assert granted.expires - granted.issued == LIFETIME


def test_a_certificate_of_another_key_is_refused(
    certificate: Certificate, identity: PeerIdentity, tmp_path: Path
) -> None:
    stranger = RunKey.generate(tmp_path / "stranger.pem").public_key
    for key in (stranger, "", "zz", "00" * 32, "00" * 31):
        with pytest.raises(MembershipError, match="not signed by the run's key"):
            certificate.verify(key, RUN, identity.peer_id)


@pytest.mark.parametrize(
    "change", [{"username": "someone else"}, {"expires": 2**40}, {"roles": ("trainer", "averager")}, {"run": OTHER_RUN}]
)
def test_a_certificate_that_was_changed_is_refused(
    certificate: Certificate, run_key: RunKey, identity: PeerIdentity, change: dict[str, object]
) -> None:
    forged = certificate.model_copy(update={"membership": certificate.membership.model_copy(update=change)})
    with pytest.raises(MembershipError, match="not signed by the run's key"):
        forged.verify(run_key.public_key, str(change.get("run", RUN)), identity.peer_id)


def test_a_certificate_for_another_run_or_peer_is_refused(
    certificate: Certificate, run_key: RunKey, identity: PeerIdentity, other_identity: PeerIdentity
) -> None:
    for run, peer in [(OTHER_RUN, identity.peer_id), (RUN, other_identity.peer_id)]:
        with pytest.raises(MembershipError, match="another run or another peer"):
            certificate.verify(run_key.public_key, run, peer)


def test_a_certificate_holds_for_its_lifetime(
    certificate: Certificate, run_key: RunKey, identity: PeerIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds in (LIFETIME - 10, LIFETIME + CLOCK_SKEW - 10, -CLOCK_SKEW + 10):
        set_clock(monkeypatch, seconds)
        certificate.verify(run_key.public_key, RUN, identity.peer_id)
    for seconds, cause in (
        (LIFETIME + CLOCK_SKEW + 10, "ended (69|7[0-9]) s ago, or this machine's clock is wrong"),
        (-CLOCK_SKEW - 10, "begins (69|7[0-9]) s from now: this machine's clock is slow"),
    ):
        set_clock(monkeypatch, seconds)
        with pytest.raises(MembershipError, match=cause):
            certificate.verify(run_key.public_key, RUN, identity.peer_id)


# ---- notices


def test_a_revoked_certificate_is_refused(certificate: Certificate, run_key: RunKey, identity: PeerIdentity) -> None:
    trust = Trust(RUN, run_key.public_key)
    assert trust.verify(certificate, identity.peer_id) == certificate.membership
    notice = run_key.notify(RUN, {certificate.membership.serial: certificate.membership.expires})
    assert trust.take(notice.model_dump_json())
    with pytest.raises(MembershipError, match="revoked"):
        trust.verify(certificate, identity.peer_id)
    again = run_key.certify(RUN, "আশা", identity.peer_id)  # let in again
    assert trust.verify(again, identity.peer_id) == again.membership


def test_the_newest_notice_counts(run_key: RunKey) -> None:
    trust = Trust(RUN, run_key.public_key)
    first = run_key.notify(RUN, {"a" * 16: 1})
    second = run_key.notify(RUN, {"b" * 16: 1}, after=first.number)
    assert second.number > first.number
    assert trust.take(second.model_dump_json())
    assert not trust.take(first.model_dump_json()), "an old notice is no news, even if it comes later"
    assert not trust.take(second.model_dump_json())
    assert (trust.is_revoked("a" * 16), trust.is_revoked("b" * 16)) == (False, True)
    assert Notice.model_validate_json(trust.notice) == second


def test_a_notice_that_is_not_the_organizer_s_changes_nothing(run_key: RunKey, tmp_path: Path) -> None:
    trust = Trust(RUN, run_key.public_key)
    stranger = RunKey.generate(tmp_path / "stranger.pem")
    good = run_key.notify(RUN, {"a" * 16: 1})
    for text in (
        "",
        "{}",
        "[" * 10_000,
        "x" * (MOST_NOTICE + 1),
        stranger.notify(RUN, {}).model_dump_json(),
        run_key.notify(OTHER_RUN, {}).model_dump_json(),
        good.model_copy(update={"revoked": {}}).model_dump_json(),
        good.model_copy(update={"number": good.number + 1}).model_dump_json(),
        stranger.notify(RUN, {}, [stranger.change_to(stranger.public_key, RUN)]).model_dump_json(),
        stranger.notify(
            RUN, {}, [stranger.change_to(stranger.public_key, RUN).model_copy(update={"old": run_key.public_key})]
        ).model_dump_json(),
    ):
        with pytest.raises(MembershipError):
            trust.take(text)
    assert (trust.number, trust.run_key) == (0, run_key.public_key)


ANNOUNCED = Announcement(id=1, text="সভা আজ রাতে", time=1, until=2**40)


def test_a_notice_tells_announcements_and_that_the_run_is_paused(run_key: RunKey) -> None:
    trust = Trust(RUN, run_key.public_key)
    over = ANNOUNCED.model_copy(update={"id": 2, "until": 2})
    notice = run_key.notify(RUN, {}, announcements=[ANNOUNCED, over], paused="the text is mended")
    assert trust.take(notice.model_dump_json())
    assert (trust.announcements, trust.paused) == ((ANNOUNCED,), "the text is mended")
    assert Trust(RUN, run_key.public_key).take(trust.notice), "a peer hands it on as it is"
    assert trust.take(run_key.notify(RUN, {}, after=notice.number).model_dump_json())
    assert (trust.announcements, trust.paused) == ((), "")


@pytest.mark.parametrize(
    "change",
    [
        {"paused": ""},
        {"paused": "for ever"},
        {"announcements": ()},
        {"announcements": (ANNOUNCED.model_copy(update={"text": "send money"}),)},
        {"announcements": (ANNOUNCED.model_copy(update={"until": 2**41}),)},
    ],
)
def test_nobody_else_announces_or_pauses(run_key: RunKey, change: dict[str, object]) -> None:
    trust = Trust(RUN, run_key.public_key)
    notice = run_key.notify(RUN, {}, announcements=[ANNOUNCED], paused="the text is mended")
    with pytest.raises(MembershipError, match="not signed"):
        trust.take(notice.model_copy(update=change).model_dump_json())
    assert (trust.number, trust.announcements, trust.paused) == (0, (), "")


@pytest.mark.parametrize(
    "change",
    [
        {"paused": "x" * 301},
        {"paused": "a\nb"},
        {"announcements": [ANNOUNCED.model_dump()] * 4},
        {"announcements": [{**ANNOUNCED.model_dump(), "text": "\x1b[2J"}]},
        {"announcements": [{**ANNOUNCED.model_dump(), "text": ""}]},
        {"announcements": [{**ANNOUNCED.model_dump(), "link": "https://example.org"}]},
    ],
)
def test_not_even_the_run_s_key_makes_a_notice_of_anything(run_key: RunKey, change: dict[str, object]) -> None:
    fields = run_key.notify(RUN, {}).model_dump(mode="json", exclude={"signature"}) | change
    content = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(MembershipError, match="damaged, too long"):
        Trust(RUN, run_key.public_key).take(json.dumps(fields | {"signature": run_key.sign(content).hex()}))


def test_a_notice_from_before_there_were_announcements_is_believed(run_key: RunKey) -> None:
    """A run that is served by a newer program has one in its database, its volunteers in their folders."""
    fields = {"run": RUN, "number": 5, "revoked": {"a" * 16: 1}, "changes": []}
    content = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    trust = Trust(RUN, run_key.public_key)
    assert trust.take(json.dumps(fields | {"signature": run_key.sign(content).hex()}))
    assert trust.is_revoked("a" * 16)


def test_the_longest_notice_still_fits(run_key: RunKey) -> None:
    revoked = {f"{number:016x}": 2**40 for number in range(5_000)}
    changes = [run_key.change_to(run_key.public_key, RUN)] * 100
    long = [ANNOUNCED.model_copy(update={"text": "ক" * 300})] * 3
    assert len(run_key.notify(RUN, revoked, changes, 0, long, "ক" * 300).model_dump_json().encode()) < MOST_NOTICE


# ---- a new run key


def test_a_new_key_is_believed_by_the_word_of_the_old_one(
    certificate: Certificate, run_key: RunKey, identity: PeerIdentity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second, third = RunKey.generate(tmp_path / "2.pem"), RunKey.generate(tmp_path / "3.pem")
    changes = [run_key.change_to(second.public_key, RUN), second.change_to(third.public_key, RUN)]
    trusts = [Trust(RUN, key.public_key) for key in (run_key, second, third)]  # whenever one came to the run
    new = third.certify(RUN, "আশা", identity.peer_id)
    for trust in trusts:
        trust.take(third.notify(RUN, {}, changes).model_dump_json())
        assert trust.run_key == third.public_key
        trust.verify(new, identity.peer_id)
    trusts[0].verify(certificate, identity.peer_id)  # for a while, all get new ones
    set_clock(monkeypatch, OLD_KEY_SECONDS + CLOCK_SKEW + 5)
    with pytest.raises(MembershipError, match="not signed by the run's key"):
        trusts[0].verify(certificate, identity.peer_id)
    assert not trusts[0].is_signed(b"", run_key.sign(b"").hex())
    trusts[0].verify(new, identity.peer_id)


def test_a_key_has_one_successor(run_key: RunKey, tmp_path: Path) -> None:
    """Whoever steals a key after it was replaced names no other one to peers that know of it."""
    second, thief = RunKey.generate(tmp_path / "2.pem"), RunKey.generate(tmp_path / "thief.pem")
    trust = Trust(RUN, run_key.public_key)
    trust.take(second.notify(RUN, {}, [run_key.change_to(second.public_key, RUN)]).model_dump_json())
    stolen = thief.notify(RUN, {}, [run_key.change_to(thief.public_key, RUN)], after=trust.number)
    with pytest.raises(MembershipError, match="another successor"):
        trust.take(stolen.model_dump_json())
    assert trust.run_key == second.public_key
    with pytest.raises(MembershipError, match="not signed"):  # nor do notices by the old key count any more
        trust.take(run_key.notify(RUN, {}, after=trust.number).model_dump_json())


# ---- the run's key


def test_the_runs_key_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.pem"
    umask = os.umask(0)
    try:
        key = RunKey.generate(path)
    finally:
        os.umask(umask)
    assert mode(path) == 0o600
    assert RunKey.load(path).public_key == key.public_key


def test_the_runs_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "run.pem"
    key = RunKey.generate(path)
    with pytest.raises(FileExistsError):
        RunKey.generate(path)
    assert RunKey.load(path).public_key == key.public_key


def test_a_file_that_holds_no_run_key_is_refused(tmp_path: Path) -> None:
    rsa_key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for content in (b"", b"garbage", rsa_key):
        (tmp_path / "run.pem").write_bytes(content)
        with pytest.raises(ValueError):  # noqa: PT011  the message is that of the caller
            RunKey.load(tmp_path / "run.pem")
    with pytest.raises(FileNotFoundError):
        RunKey.load(tmp_path / "none.pem")
