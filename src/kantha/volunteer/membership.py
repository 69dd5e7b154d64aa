"""How a volunteer gets in, and stays in.

    ask ─▶ sign in: code and link ─▶ asked ⏳ ─▶ in ✅ ─▶ renewed every 45 s, while it trains ─▶ the lease is given back
     └──────────── a run without sign-in ────────▶┘

`enter` waits for all that people have to do. `Renewal` is a thread beside the training. The coordinator may be away
for a while: for `enter` half an hour, for a member until its certificate ends.
"""

import io
import logging
import re
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType

import segno
from pydantic import SecretStr
from rich.console import Console
from rich.text import Text

from kantha.api import Admission, RunDescription, TokenSignIn, Waiting
from kantha.errors import (
    FingerprintError,
    KanthaError,
    LeaseError,
    MembershipError,
    NotACoordinatorError,
    SignInError,
    UnreachableError,
    printable,
)
from kantha.spec import Service
from kantha.swarm.identity import PeerIdentity
from kantha.swarm.membership import Announcement, Certificate, DepartureRequest, MembershipRequest, Trust
from kantha.volunteer.client import CoordinatorClient
from kantha.volunteer.folders import PeerFolder

_MORE_CODES = 3  # after the first has ended without a sign-in
_ASKED_SECONDS = 10.0  # between two looks whether a moderator has answered
_QUIET_SECONDS = 600.0  # between two lines while nothing happens, where there is no terminal
_AWAY_SECONDS = 1800.0  # that somebody waits for a coordinator that went away meanwhile
_LEAST_SECONDS = 0.1  # between two requests, whatever the coordinator says
_RETRY_SECONDS = 15.0  # until a member asks a coordinator again that did not answer
_LEAVE_SECONDS = 5.0  # for saying goodbye
_PATH = re.compile(r"\w[\w.?=&%/-]*", re.ASCII)
_CODE = re.compile(r"[A-Z0-9-]+")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Applicant:
    """Who asks, and from where."""

    identity: PeerIdentity
    run: str  # its fingerprint
    service: Service
    instance: str  # for the owner to know this machine by
    username: str = ""  # where the run has no sign-in

    def request(self, take_over: bool = False) -> MembershipRequest:
        """Raises `MembershipError` where the name cannot be used."""
        return MembershipRequest.signed(
            self.identity,
            self.run,
            username=self.username,
            service=self.service,
            instance=self.instance,
            take_over=take_over,
        )


def trust_run(client: CoordinatorClient, description: RunDescription, folder: PeerFolder) -> Trust:
    """Whom to believe: the run's key of the link, or the one seen at the first join, and what it says of a newer one.

    The newest key and notice are kept for the next time. Raises `FingerprintError` where the coordinator's key is
    another, and `StorageError` where what was kept is damaged.
    """
    known = client.run_key or folder.load_run_key()
    trust = Trust(description.fingerprint, known or description.public_key)
    if kept := folder.load_notice():
        try:
            trust.take(kept)
        except MembershipError as error:
            _log.warning("left out the notice that was kept: %s", error)
    confirmed = ""
    if description.notice:
        try:
            trust.take(description.notice)
        except MembershipError as error:
            confirmed = f"; {error}"
    if trust.run_key != description.public_key or confirmed:
        source = "of the link" if client.run_key else "seen when this machine first joined"
        raise FingerprintError(
            f"{client.url}: the run's key is not the one {source} (known {trust.run_key[:12]}…, announced "
            f"{description.public_key[:12]}…{confirmed}): somebody else may be answering there. Do not join; ask the "
            "organizer for the link with the run's key, URL#KEY, and join with that"
        )
    folder.save_run_key(trust.run_key)
    folder.save_notice(trust.notice)
    return trust


def enter(
    client: CoordinatorClient,
    trust: Trust,
    applicant: Applicant,
    console: Console,
    stop: threading.Event,
    *,
    take_over: bool = False,
    token: Callable[[], SecretStr] | None = None,
) -> Admission:
    """Get in, however long people take over it; `stop`, or Ctrl-C, leaves with `KeyboardInterrupt`.

    :param take_over: end the other instances on this service
    :param token: gives a Hugging Face token to sign in with; it is only asked for where the coordinator does not know
        this machine yet
    :return: a certificate that other peers will believe
    :raises MembershipError: with the coordinator's reason
    :raises LeaseError: where another instance has the place
    :raises SignInError: where nobody signs in
    :raises UnreachableError: or `NotACoordinatorError`, where the coordinator is away from the start, or for too long
    """
    answer = client.ask(applicant.request(take_over))
    if isinstance(answer, Waiting) and answer.state == "sign_in" and token is not None:
        answer = client.sign_in(TokenSignIn(request=applicant.request(take_over), token=token()))
    if isinstance(answer, Waiting):
        waits = _WaitingRoom(client, console)
        with waits.spinner:
            answer = waits.until_admitted(answer, lambda: client.ask(applicant.request(take_over)), stop)
        _say(console, "✅ You are in.")
    if answer.notice:
        trust.take(answer.notice)
    trust.verify(answer.certificate, applicant.identity.peer_id)
    return answer


class News:
    """What the moderators tell everybody, heard from the coordinator or from any peer."""

    def __init__(self, trust: Trust, folder: PeerFolder) -> None:
        """:param folder: keeps what was told here, so that it is not told again when the program is started again"""
        self._trust, self._folder = trust, folder
        self._told = folder.load_announced()

    @property
    def paused(self) -> str:
        """Why nobody shall compute now; empty: the run goes on."""
        return self._trust.paused

    def fresh(self) -> list[Announcement]:
        """Announcements that were not told here yet, oldest first; from now on they were."""
        current = self._trust.announcements
        if current == self._told:
            return []
        fresh = [each for each in current if each not in self._told]
        self._told = current
        self._folder.save_announced(current)
        return fresh


class _WaitingRoom:
    """What somebody sees who is not in yet."""

    def __init__(self, client: CoordinatorClient, console: Console) -> None:
        self._client = client
        self._console = console
        self._code = self._state = ""
        self._codes = 0
        self._said = time.monotonic()
        self.spinner: AbstractContextManager[object] = (
            console.status("waiting; this goes on by itself (Ctrl-C leaves)") if console.is_terminal else nullcontext()
        )

    def until_admitted(
        self, answer: Waiting, ask: Callable[[], Admission | Waiting], stop: threading.Event
    ) -> Admission:
        """Ask again and again. Raises what `enter` raises."""
        away: float | None = None
        while True:
            self._show(answer)
            pause = max(answer.poll_seconds, _LEAST_SECONDS)
            if answer.state == "asked":
                pause = max(pause, _ASKED_SECONDS)
            if stop.wait(pause):
                raise KeyboardInterrupt
            try:
                newer = ask()
            except (UnreachableError, NotACoordinatorError) as error:
                if away is None:
                    away = time.monotonic()
                    self._say(f"{error}\nthe coordinator is away; asking again for {_AWAY_SECONDS / 60:.0f} min …")
                elif time.monotonic() - away > _AWAY_SECONDS:
                    raise
                continue
            if away is not None:
                away = None
                self._say("the coordinator is back")
            if isinstance(newer, Admission):
                return newer
            answer = newer

    def _show(self, answer: Waiting) -> None:
        if answer.state == "sign_in" and answer.code != self._code:
            if self._codes > _MORE_CODES:
                raise SignInError(
                    f"nobody signed in: {self._codes} codes have ended. Join again when you have a browser at hand; "
                    "`kantha join --token` signs in without one"
                )
            self._codes += 1
            self._show_code(answer)
        elif answer.state == "asked" and self._state != "asked":
            sign = "" if answer.message.startswith("⏳") else "⏳ "
            self._say(f"{sign}{printable(answer.message)}\nLeave this running, or come back later: Ctrl-C leaves.")
        elif not self._console.is_terminal and time.monotonic() - self._said > _QUIET_SECONDS:
            what = "somebody to sign in" if answer.state == "sign_in" else "a moderator's answer"
            self._say(f"still waiting for {what} (Ctrl-C leaves)")
        self._code, self._state = answer.code, answer.state

    def _show_code(self, answer: Waiting) -> None:
        link = _link(self._client, answer)
        if self._codes > 1:
            self._say("That code has ended without a sign-in; here is a new one.")
        self._say(f"{printable(answer.message)}\n\n    code   {answer.code}\n    link   {link}\n")
        if (picture := _qr_code(link, self._console)) is not None:
            # its own colours: a camera wants dark on light, whatever the terminal has
            self._console.print(Text(picture, style="#ffffff on #000000"), soft_wrap=True)
        seconds = answer.expires - time.time()
        until = f" The code is good until {_clock(answer.expires)}." if 0 < seconds < 86_400 else ""
        self._say(f"Nothing is to be typed here: once you have confirmed, it goes on by itself.{until} Ctrl-C leaves.")

    def _say(self, line: str) -> None:
        self._said = time.monotonic()
        _say(self._console, line)


def _link(client: CoordinatorClient, answer: Waiting) -> str:
    """Where to confirm a code. Raises `NotACoordinatorError` where it is not on the run's page."""
    if not (_PATH.fullmatch(answer.path) and _CODE.fullmatch(answer.code)):
        raise NotACoordinatorError(f"{client.url}: answered with a code that none would give; tell the organizer")
    return f"{client.url}/{answer.path}"


def _qr_code(link: str, console: Console) -> str | None:
    """For a phone's camera; None where nobody would see it."""
    if not console.is_terminal or not console.encoding.startswith("utf"):
        return None
    code, drawn = segno.make_qr(link, error="l"), io.StringIO()
    if code.symbol_size(border=2)[0] > console.width:
        return None
    code.terminal(drawn, border=2, compact=True)
    return drawn.getvalue()


class Renewal:
    """Keeps a membership alive while the program works. A context manager; leaving it gives the lease back.

    Where the member may not stay (suspended, banned, another instance took over, the certificate ended), `stop` is set,
    and leaving the context raises why, whatever else went wrong because of it.
    """

    def __init__(
        self,
        client: CoordinatorClient,
        applicant: Applicant,
        admission: Admission,
        say: Callable[[str], None],
        stop: threading.Event,
    ) -> None:
        """
        :param say: tells the volunteer a line; called by the thread
        :param stop: set to end the training
        """
        self._client, self._applicant = client, applicant
        self._certificate, self._seconds = admission.certificate, admission.renew_seconds
        self._say, self._stop = say, stop
        self._on_certificate: Callable[[Certificate], None] | None = None
        self._on_notice: Callable[[str], None] | None = None
        self._failure: Exception | None = None
        self._is_away = False
        self._code = ""
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="renewal", daemon=True)

    def start(self, on_certificate: Callable[[Certificate], None], on_notice: Callable[[str], None]) -> None:
        """Renew from now on; to be called when the program has forked what it forks.

        :param on_certificate: gets a new certificate; raises `MembershipError` where it is not good
        :param on_notice: gets the organizer's newest notice, before the certificate; raises the same
        """
        self._on_certificate, self._on_notice = on_certificate, on_notice
        self._thread.start()

    def raise_if_ended(self) -> None:
        """Raises `MembershipError` or `LeaseError` where this member may not stay."""
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> "Renewal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.hurry()
        self._leaving.set()
        if self._thread.ident is None:
            self._thread.start()  # only to say goodbye
        self._thread.join(_LEAVE_SECONDS)
        if self._failure is not None and error is not self._failure and not isinstance(error, KeyboardInterrupt):
            raise self._failure from None

    # ---- the thread

    def _run(self) -> None:
        try:
            pause = self._seconds
            while not self._leaving.wait(max(pause, _LEAST_SECONDS)):
                pause = self._renew()
            self._depart()
        except Exception as error:  # noqa: BLE001  whatever it is, the main thread raises it
            self._failure = error
            self._stop.set()

    def _renew(self) -> float:
        """Seconds until the next time. Raises `MembershipError` or `LeaseError` where there is none."""
        try:
            answer = self._client.ask(self._applicant.request())
            if isinstance(answer, Waiting):
                return self._asked_again(answer)
        except (UnreachableError, NotACoordinatorError) as error:
            return self._without(error)
        except LeaseError as error:
            raise LeaseError(f"another of your machines has taken over from this one. {error}") from None
        assert self._on_certificate is not None
        assert self._on_notice is not None
        try:
            if answer.notice:
                self._on_notice(answer.notice)
            if answer.certificate != self._certificate:
                self._on_certificate(answer.certificate)
        except MembershipError as error:  # not the run's own word: somebody stands in between
            return self._without(NotACoordinatorError(f"{self._client.url}: is not believed ({error})"))
        self._certificate, self._seconds = answer.certificate, answer.renew_seconds
        if self._is_away:
            self._is_away = False
            self._say("the coordinator is back")
        return self._seconds

    def _without(self, error: KanthaError) -> float:
        """Go on for as long as the certificate lasts."""
        left = self._certificate.membership.expires - time.time()
        until = _clock(self._certificate.membership.expires)
        if left <= 0:
            raise MembershipError(
                f"the membership certificate ended at {until}, and there is nobody to renew it ({error}); "
                "join again when the coordinator is back"
            )
        _log.warning("not renewed: %s", error)
        if not self._is_away:
            self._is_away = True
            self._say(f"the coordinator does not answer; training goes on until {until} without it")
        return min(_RETRY_SECONDS, self._seconds, left)

    def _asked_again(self, answer: Waiting) -> float:
        """The coordinator no longer knows whose machine this is."""
        left = self._certificate.membership.expires - time.time()
        until = _clock(self._certificate.membership.expires)
        message = printable(answer.message)
        if left <= 0:
            raise MembershipError(f"the membership certificate ended at {until}: {message}; join again")
        if (answer.code or answer.state) != self._code:
            self._code = answer.code or answer.state
            where = f" {_link(self._client, answer)}" if answer.code else ""
            self._say(f"{message}{where} (until {until} training goes on as it is)")
        return min(max(answer.poll_seconds, _ASKED_SECONDS), left)

    def _depart(self) -> None:
        try:
            self._client.depart(DepartureRequest.signed(self._applicant.identity, self._applicant.run))
        except KanthaError as error:  # the lease ends by itself
            _log.warning("the lease was not given back: %s", error)


def _clock(seconds: float) -> str:
    """:param seconds: since 1970"""
    return time.strftime("%H:%M", time.localtime(seconds))


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
