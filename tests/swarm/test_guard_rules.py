"""The guard of one process, without a network: who is a member, and what is heard of notices."""

import asyncio
import gc
from collections.abc import Callable
from pathlib import Path

import pytest

from kantha.errors import MembershipError
from kantha.swarm import guard as guard_module
from kantha.swarm.guard import Guard
from kantha.swarm.membership import MOST_CERTIFICATE, MOST_NOTICE, RunKey, Trust

RUN = "0f" * 32
Make = Callable[..., Guard]


@pytest.fixture
def key(tmp_path: Path) -> RunKey:
    return RunKey.generate(tmp_path / "run.pem")


@pytest.fixture
def make(key: RunKey) -> Make:
    def make(peer: str, **options: object) -> Guard:
        return Guard(Trust(RUN, key.public_key), key.certify(RUN, peer, peer, **options))  # type: ignore[arg-type]

    return make


def test_who_greets_is_a_member_until_its_certificate_ends(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asha, rafiq = make("asha"), make("rafiq", lifetime=1_000)
    with pytest.raises(MembershipError, match="not greeted"):
        asha.check("rafiq")
    asha.meet("rafiq", rafiq.show())
    asha.check("rafiq")
    now = guard_module.time.time()
    monkeypatch.setattr(guard_module.time, "time", lambda: now + 2_000)
    with pytest.raises(MembershipError, match="ended"):
        asha.check("rafiq")
    with pytest.raises(MembershipError, match="not greeted"):  # it may come with a new one
        asha.check("rafiq")


def test_a_greeting_of_another_peer_is_no_greeting(make: Make) -> None:
    asha, rafiq = make("asha"), make("rafiq")
    with pytest.raises(MembershipError, match="another peer"):
        asha.meet("eve", rafiq.show())
    with pytest.raises(MembershipError, match="not greeted"):
        asha.check("eve")


@pytest.mark.parametrize(
    "greeting", [b"", b"{}", b"[1]", b"\xff" * 100, b"x" * (MOST_CERTIFICATE + 2 * MOST_NOTICE + 1)]
)
def test_what_is_no_greeting_is_refused(make: Make, greeting: bytes) -> None:
    with pytest.raises(MembershipError, match="greeting"):
        make("asha").meet("eve", greeting)


def test_a_notice_goes_from_peer_to_peer_and_ends_a_membership_at_once(make: Make, key: RunKey) -> None:
    asha, rafiq, mitu = make("asha"), make("rafiq"), make("mitu")
    asha.meet("mitu", mitu.show())
    revoked = mitu.certificate.membership
    rafiq.trust.take(key.notify(RUN, {revoked.serial: revoked.expires}).model_dump_json())
    asha.check("mitu")
    asha.meet("rafiq", rafiq.show())
    with pytest.raises(MembershipError, match="revoked"):
        asha.check("mitu")
    with pytest.raises(MembershipError, match="revoked"):
        asha.meet("mitu", mitu.show())
    with pytest.raises(MembershipError, match="revoked"):
        asha.read(mitu.certificate.model_dump_json(), "mitu")


def test_a_peer_with_the_run_s_new_key_brings_the_proof(make: Make, key: RunKey, tmp_path: Path) -> None:
    asha, rafiq = make("asha"), make("rafiq")
    new = RunKey.generate(tmp_path / "new.pem")
    rafiq.trust.take(new.notify(RUN, {}, [key.change_to(new.public_key, RUN)]).model_dump_json())
    rafiq.certificate = new.certify(RUN, "rafiq", "rafiq")
    asha.meet("rafiq", rafiq.show())
    asha.check("rafiq")
    rafiq.meet("asha", asha.show())  # asha's is by the old key, which counts for a while
    assert asha.trust.run_key == new.public_key


def test_a_forged_notice_in_a_greeting_changes_nothing(make: Make, tmp_path: Path) -> None:
    asha, eve = make("asha"), make("eve")
    stranger = RunKey.generate(tmp_path / "stranger.pem")
    forged = stranger.notify(RUN, {asha.certificate.membership.serial: 2**40})
    eve.trust._notice = forged
    with pytest.raises(MembershipError, match="not signed by the run's key"):
        asha.meet("eve", eve.show())
    assert asha.trust.number == 0


def test_a_record_shows_whose_it_is(make: Make) -> None:
    asha, rafiq = make("asha"), make("rafiq")
    shown = rafiq.certificate.model_dump_json()
    assert asha.read(shown, "rafiq").username == "rafiq"
    for certificate, peer in [(shown, "eve"), ("", "rafiq"), ("x" * 3_000, "rafiq"), ("{}", "rafiq")]:
        with pytest.raises(MembershipError):
            asha.read(certificate, peer)


def test_nobody_guards_with_a_certificate_that_others_would_refuse(key: RunKey, tmp_path: Path) -> None:
    stranger = RunKey.generate(tmp_path / "stranger.pem")
    with pytest.raises(MembershipError, match="not signed by the run's key"):
        Guard(Trust(RUN, key.public_key), stranger.certify(RUN, "eve", "eve"))


def test_a_greeting_that_fails_when_nobody_waits_for_it_any_more_is_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module._GuardedP2P, "__del__", lambda _: None)  # it has no daemon to end

    async def call_and_give_up() -> list[str]:
        told: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["message"]))
        one = guard_module._GuardedP2P()
        called, given_up = asyncio.Event(), asyncio.Event()

        async def fail(_: object) -> None:
            called.set()
            await given_up.wait()
            raise OSError("the peer is gone")

        monkeypatch.setattr(one, "_exchange", fail)
        caller = asyncio.ensure_future(one._greet("peer"))  # type: ignore[arg-type]
        await called.wait()
        caller.cancel()
        await asyncio.wait([caller])
        greeting = one._greetings["peer"]  # type: ignore[index]
        given_up.set()
        await asyncio.wait([greeting])
        assert not one._greetings
        del greeting
        gc.collect()
        return told

    assert asyncio.run(call_and_give_up()) == []
