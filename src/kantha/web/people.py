"""The pages about persons, in a run that people sign in to: /sign-in, /pair, /me, and the moderators' /desk.

All of them work without JavaScript. A session is a signed cookie that holds the number of an account with the provider;
what its owner is called by now, and where that person stands with the run, is looked up each time. Every form has the
session's token, and must come from these pages.
"""

import hmac
import re
import secrets
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, get_args
from urllib.parse import urlencode, urlsplit

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse
from fastapi.routing import APIRoute
from limits import RateLimitItemPerMinute
from markupsafe import Markup, escape
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.middleware.sessions import SessionMiddleware

from kantha.coordinator.allowlist import MOST_REASON, Action, Standing, State, parse_names
from kantha.coordinator.limiter import SIGN_INS, Limiter, TooManyRequestsError, address_of
from kantha.coordinator.service import Coordinator
from kantha.errors import MembershipError, SignInError, StorageError
from kantha.web.pages import NO_KEEPING, Invitation, load_assets, make_templates
from kantha.web.signin import Provider, session_key

# What a form may send, by its path; larger ones are turned away at the door.
FORMS = {"/sign-out": 4 * 1024, "/pair": 4 * 1024, "/me": 4 * 1024, "/desk": 768 * 1024}  # bytes
FORM_TYPES = ("application/x-www-form-urlencoded", "multipart/form-data")

_SESSION_SECONDS = 14 * 24 * 3600
_GUESSES = RateLimitItemPerMinute(20)  # pairing codes that one person may look up
_ROWS = 50  # people on one page of the desk
_LOG_ROWS = 100
# Sign-in leads back to one of these and nowhere else.
_WAYS_BACK = re.compile(r"(me|desk|pair(\?code=[A-Za-z0-9-]{1,20})?)?")
_PLACES = {"local": "own machine", "kaggle": "Kaggle", "colab": "Colab", "hosted": "hosted notebook"}
_HEADERS = {
    "Content-Security-Policy": "; ".join(
        [
            "default-src 'self'",
            "object-src 'none'",
            "base-uri 'none'",
            "form-action 'self'",  # sign-in begins with a link: Chromium would apply this to a form's redirects
            "frame-ancestors 'none'",
        ]
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # "no-referrer" would hide the origin of our own forms from us, too
    **NO_KEEPING,
}


@dataclass(frozen=True)
class Visitor:
    """Who is signed in at a browser."""

    standing: Standing
    token: str  # of the session: what every form of it has to send

    @property
    def username(self) -> str:
        return self.standing.username


class _Refusal(Exception):
    """A page that says what is wrong and what to do about it, instead of the one that was asked for."""

    def __init__(self, status: int, title: str, text: str) -> None:
        self.status, self.title, self.text = status, title, text
        super().__init__(text)


class _SignInFirst(Exception):
    """Nobody is signed in, on a page that is somebody's."""


def _visitor_of(request: Request) -> Visitor | None:
    """Asks the database."""
    subject, token = request.session.get("subject"), request.session.get("form")
    if not subject or not token:
        return None
    standing = request.app.state.coordinator.allowlist.account(subject)
    return Visitor(standing, token) if standing is not None else None


def _signed_in(request: Request) -> Visitor:
    visitor = _visitor_of(request)
    if visitor is None:
        raise _SignInFirst
    return visitor


@dataclass(frozen=True)
class _Form:
    fields: dict[str, list[str]]
    file: str  # what was uploaded, as text

    def one(self, name: str) -> str:
        return self.fields.get(name, [""])[0].strip()


def _form_is_old() -> _Refusal:
    return _Refusal(
        403,
        "Please once more",
        "You have signed in or out since that page was loaded, so nothing was done. Load it again and repeat it.",
    )


async def _read_form(request: Request) -> _Form:
    """A form that its owner sent from one of these pages. Raises `_Refusal` for any other."""
    _check_origin(request)
    expected = request.session.get("form", "")
    if not expected:  # nothing that a stranger sends is read
        raise _form_is_old()
    _, options = parse_options_header(request.headers.get("content-type"))
    if options.get(b"charset", b"utf-8").lower() != b"utf-8":
        # of Python's codecs, some take minutes and some make strings that are none
        raise _Refusal(415, "This form cannot be read", "Its text is not in UTF-8, so nothing was done.")
    fields: dict[str, list[str]] = {}
    content = b""
    async with request.form(max_files=1, max_fields=4 * _ROWS, max_part_size=FORMS["/desk"]) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                content = await value.read()
            else:
                fields.setdefault(name, []).append(value)
    token = fields.get("form", [""])[0]
    if not hmac.compare_digest(token.encode(), expected.encode()):
        raise _form_is_old()
    try:
        return _Form(fields, content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _Refusal(
            400, "This file cannot be read", "It is no text in UTF-8. Save it as CSV in UTF-8, or paste the names."
        ) from None


def _check_origin(request: Request) -> None:
    """A page from elsewhere must not send these forms.

    Browsers tell where a form is from by Sec-Fetch-Site over TLS and on loopback, and by Origin. What sends neither is
    no browser, and has nobody's session.
    """
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    is_ours = site in (None, "same-origin")
    if origin is not None:
        # behind a proxy, this server may be asked for by another name than the browser knows
        hosts = (request.headers.get("host", "").lower(), _host_of(request.app.state.coordinator.address))
        is_ours = is_ours and _host_of(origin) in hosts
    if not is_ours:
        raise _Refusal(
            403,
            "This form came from elsewhere",
            "Another page wanted to act in your name, so nothing was done. If it was you: open the run by its link, "
            "and repeat it there.",
        )


def _host_of(address: str) -> str | None:
    """With its port."""
    try:
        return urlsplit(address).netloc.lower()
    except ValueError:
        return None


Signed = Annotated[Visitor, Depends(_signed_in)]
SentForm = Annotated[_Form, Depends(_read_form)]


def add_people(app: FastAPI, coordinator: Coordinator, provider: Provider | None) -> Callable[[Request], Invitation]:
    """Give the web application the pages about persons, and sessions.

    :param provider: who people sign in with; None: in this run by tokens only
    :returns: what the run's page says to one who looks at it
    :raises RunDirectoryError: where the key of the sessions cannot be used
    """
    is_https = urlsplit(coordinator.address).scheme == "https"
    app.add_middleware(
        SessionMiddleware,
        secret_key=session_key(coordinator.run.keys),
        session_cookie="__Host-kantha" if is_https else "kantha",  # __Host-: no other host can have set it
        max_age=_SESSION_SECONDS,
        same_site="lax",  # it comes along on the way back from the provider
        https_only=is_https,
    )
    app.state.coordinator = coordinator
    pages = _Pages(coordinator, provider)
    app.include_router(pages.router(), include_in_schema=False)
    return pages.invitation


class _Pages:
    def __init__(self, coordinator: Coordinator, provider: Provider | None) -> None:
        self._coordinator = coordinator
        self._provider = provider
        self._limiter = Limiter()
        self._callback = f"{coordinator.address}/sign-in/callback"
        self._templates = make_templates()
        self._templates.env.filters.update(
            place=lambda service: _PLACES.get(service, service), clock=_clock, marked=_marked
        )

    def router(self) -> APIRouter:
        router = APIRouter(route_class=self._route_class())
        router.get("/sign-in")(self.begin_sign_in)
        router.get("/sign-in/callback")(self.finish_sign_in)
        router.post("/sign-out")(self.sign_out)
        router.get("/pair")(self.pair)
        router.post("/pair")(self.confirm)
        router.get("/me")(self.me)
        router.post("/me")(self.ask)
        router.get("/desk")(self.desk)
        router.post("/desk")(self.decide)
        return router

    def _route_class(self) -> type[APIRoute]:
        """Routes whose errors are pages."""
        pages = self

        class PageRoute(APIRoute):
            def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
                handle = super().get_route_handler()

                async def answer(request: Request) -> Response:
                    try:
                        return await handle(request)
                    except _SignInFirst:
                        path = request.url.path.removeprefix("/")
                        return RedirectResponse(pages._sign_in_address(path), 303)
                    except _Refusal as error:
                        refusal = error
                    except TooManyRequestsError as error:
                        refusal = _Refusal(429, "Too often", _as_sentence(error))
                    except SignInError as error:
                        refusal = _Refusal(400, "Sign-in did not work", _as_sentence(error))
                    except MembershipError as error:
                        refusal = _Refusal(403, "This is not possible", _as_sentence(error))
                    except StorageError as error:
                        refusal = _Refusal(503, "Out of order", f"{_as_sentence(error)} Tell the organizer of the run.")
                    return pages._page(
                        request, "message.html", status=refusal.status, title=refusal.title, text=refusal.text
                    )

                return answer

        return PageRoute

    def _page(
        self, request: Request, template: str, visitor: Visitor | None = None, status: int = 200, **content: Any
    ) -> Response:
        context = {
            "run": self._coordinator.run.spec,
            "assets": load_assets()[0],
            "visitor": visitor,
            "up": "../" if request.url.path.startswith("/sign-in/") else "./",
            **content,
        }
        return self._templates.TemplateResponse(request, template, context, status, _HEADERS)

    def _sign_in_address(self, to: str) -> str:
        """Under the run's address, where the session will be; the page may be open under another name of the host."""
        return f"{self._coordinator.address}/sign-in?{urlencode({'to': to})}"

    def _link(self) -> str:
        """Of the run, with its key: what `kantha join` takes."""
        return f"{self._coordinator.address}#{self._coordinator.admission.public_key}"

    def invitation(self, request: Request) -> Invitation:
        visitor = _visitor_of(request)
        if visitor is None:
            return Invitation(self._link(), self._sign_in_address(""))
        state = visitor.standing.state
        return Invitation(self._link(), self._sign_in_address(""), visitor.username, state.sign, state.value)

    # ---- sign-in

    async def begin_sign_in(self, request: Request, to: str = "") -> Response:
        """:param to: the page to come back to"""
        if self._provider is None:
            text = (
                "Its organizer has not set up sign-in in the browser. On the machine that shall help, `kantha join "
                f"{self._link()} --token` takes a Hugging Face token of the kind 'Read', which is used once and "
                "forgotten."
            )
            organizer = (
                "For the organizer: make an OAuth application at https://huggingface.co/settings/applications/new with "
                f"the scopes openid and profile and the redirect URL {self._callback}, put its client_id and "
                "client_secret into keys/oauth.json in the run's folder (chmod 600), and start `kantha serve` again."
            )
            return self._page(
                request, "message.html", status=404, title="This run takes tokens only", text=text, more=organizer
            )
        self._limiter.hit(SIGN_INS, "begin", address_of(request))
        request.session["to"] = to if _WAYS_BACK.fullmatch(to) else ""
        return await self._provider.begin(request, self._callback)

    async def finish_sign_in(self, request: Request) -> Response:
        if self._provider is None:
            raise _Refusal(404, "This run takes tokens only", "There is no sign-in in the browser here.")
        self._limiter.hit(SIGN_INS, "finish", address_of(request))
        to = request.session.get("to", "")
        person = await self._provider.finish(request)
        await run_in_threadpool(self._coordinator.allowlist.sign_in, person)
        request.session.clear()
        request.session["subject"] = person.subject
        request.session["form"] = secrets.token_urlsafe(24)
        return RedirectResponse(f"{self._coordinator.address}/{to}", 303)

    def sign_out(self, request: Request, form: SentForm) -> Response:
        request.session.clear()
        return RedirectResponse("./", 303)

    # ---- pairing

    def pair(self, request: Request, code: str = "") -> Response:
        visitor, shown = _visitor_of(request), _readable(code)
        if visitor is None:
            # which machine it is, only those hear who have a name: others could try codes out unnoticed
            address = self._sign_in_address(f"pair?code={shown}" if shown else "pair")
            return self._page(request, "pair.html", code=shown, sign_in=address)
        self._check_may_join(visitor)
        if not shown:
            return self._page(request, "pair.html", visitor, is_wrong=bool(code))
        self._limiter.hit(_GUESSES, visitor.username.casefold())
        pairing = self._coordinator.admission.pairing(shown)
        if pairing is None:
            return self._page(request, "pair.html", visitor, 404, is_gone=True, code=shown)
        seconds = time.time() - pairing.asked
        return self._page(request, "pair.html", visitor, code=pairing.code, pairing=pairing, seconds=seconds)

    def confirm(self, request: Request, visitor: Signed, form: SentForm) -> Response:
        if form.one("answer") != "yes":
            raise _Refusal(
                200,
                "Nothing was confirmed",
                "That machine is not let in under your name, and its code ends by itself. If somebody sent you the "
                "link, tell a moderator of the run.",
            )
        self._check_may_join(visitor)
        self._limiter.hit(_GUESSES, visitor.username.casefold())
        self._coordinator.admission.confirm(form.one("code"), visitor.username)
        self._coordinator.allowlist.ask(visitor.username)  # to join is to ask
        return RedirectResponse("./me", 303)

    def _check_may_join(self, visitor: Visitor) -> None:
        if visitor.standing.may_not:
            raise _Refusal(403, "You cannot join this run", visitor.standing.sentence)

    # ---- oneself

    def me(self, request: Request, visitor: Signed) -> Response:
        return self._page(
            request,
            "me.html",
            visitor,
            standing=visitor.standing,
            instances=self._coordinator.admission.leases(visitor.username),
            now=time.time(),
            link=self._link(),
        )

    def ask(self, request: Request, visitor: Signed, form: SentForm) -> Response:
        self._coordinator.allowlist.ask(visitor.username)
        return RedirectResponse("./me", 303)

    # ---- the desk

    def desk(
        self,
        request: Request,
        visitor: Signed,
        q: str = "",
        state: str = "",
        page: Annotated[int, Query(ge=1, le=10_000)] = 1,
    ) -> Response:
        """:param q: a part of the usernames to show"""
        self._check_moderates(visitor)
        allowlist = self._coordinator.allowlist
        wanted = State(state) if state in list(State) else None
        people = allowlist.people(wanted, q[:100], limit=_ROWS + 1, offset=(page - 1) * _ROWS)
        asked = allowlist.people(State.ASKED, limit=_ROWS)
        counts = allowlist.count()
        return self._page(
            request,
            "desk.html",
            visitor,
            said=request.session.pop("said", ""),
            asked=asked,
            counts=counts,
            people=people[:_ROWS],
            states=list(State),
            wanted=wanted,
            q=q[:100],
            earlier=_query(q, state, page - 1) if page > 1 else "",
            later=_query(q, state, page + 1) if len(people) > _ROWS else "",
            actions=get_args(Action),
            rules=allowlist.rules(),
            log=allowlist.log(_LOG_ROWS),
            now=time.time(),
            most_reason=MOST_REASON,
        )

    def decide(self, request: Request, visitor: Signed, form: SentForm) -> Response:
        self._check_moderates(visitor)
        action = next((known for known in get_args(Action) if known == form.one("action")), None)
        if action is None:
            raise _Refusal(400, "Nothing was decided", "Choose what to do: approve, refuse, suspend or ban.")
        try:
            names = [*form.fields.get("name", []), *parse_names(form.one("names")), *parse_names(form.file)]
            if not names:
                raise MembershipError("tick somebody, paste names, or choose a file")
            decided = self._coordinator.allowlist.decide(names, action, visitor.username, form.one("reason"))
        except MembershipError as error:
            raise _Refusal(400, "Nothing was decided", _as_sentence(error)) from None
        who = ", ".join(f"{each.username} {each.state.sign}" for each in decided[:5])
        more = f" and {len(decided) - 5:,} more" if len(decided) > 5 else ""
        request.session["said"] = f"{action}: {who}{more}"
        return RedirectResponse("./desk", 303)

    def _check_moderates(self, visitor: Visitor) -> None:
        if not self._coordinator.allowlist.is_moderator(visitor.username):
            raise _Refusal(
                403,
                "The desk is for moderators",
                f"{visitor.username} is no moderator of this run. Its organizer names them: `kantha members RUN "
                "moderator NAME`.",
            )


def _readable(code: str) -> str:
    """A pairing code as terminals show it, of what a person may have typed; empty: it can be none."""
    letters = "".join(letter for letter in code[:40].upper() if letter.isalnum() and letter.isascii())
    return f"{letters[:4]}-{letters[4:]}" if len(letters) == 8 else ""


def _as_sentence(error: Exception) -> str:
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}."


def _marked(text: str) -> Markup:
    """A sentence whose `commands` stand between backticks, as the terminal says it, for a page."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 and number + 1 < len(parts) else escape(part)
        for number, part in enumerate(parts)
    )


def _clock(seconds: float) -> str:
    """A moment as the log has it.

    :param seconds: since 1970
    """
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def _query(q: str, state: str, page: int) -> str:
    return "?" + urlencode({"q": q[:100], "state": state, "page": page})
