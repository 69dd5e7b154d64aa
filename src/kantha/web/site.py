"""What all pages share: who looks at them, in which language, forms that can be trusted, errors that are pages.

A session is a signed cookie that says which account with the provider somebody signed in with; what its owner is called
by now, and where that person stands with the run, is looked up each time. Every form has the session's token, and must
come from these pages. All pages work without JavaScript.
"""

import functools
import gzip
import hashlib
import hmac
import re
import secrets
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlencode, urlsplit

import bokeh
from bokeh.util.paths import bokehjs_path
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import RedirectResponse
from fastapi.routing import APIRoute
from fastapi.templating import Jinja2Templates
from markupsafe import Markup, escape
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.middleware.sessions import SessionMiddleware

from kantha.coordinator.allowlist import Allowlist, Standing, State
from kantha.coordinator.limiter import TooManyRequestsError
from kantha.coordinator.service import Coordinator
from kantha.errors import MembershipError, SignInError, StorageError
from kantha.web import speech
from kantha.web.signin import Provider, session_key
from kantha.web.speech import gettext as _

# What a form may send, by its path; larger ones are turned away at the door. A path that ends in / stands for all
# below it.
FORMS = {  # bytes
    "/sign-in": 4 * 1024,
    "/sign-out": 4 * 1024,
    "/pair": 4 * 1024,
    "/me": 4 * 1024,
    "/me/": 4 * 1024,
    "/volunteers": 4 * 1024,
    "/desk": 768 * 1024,
    "/desk/": 16 * 1024,
    "/name": 8 * 1024,
    "/polls/": 8 * 1024,
}
FORM_TYPES = ("application/x-www-form-urlencoded", "multipart/form-data")
NO_KEEPING = {"Cache-Control": "no-store"}
_SESSION_SECONDS = 14 * 24 * 3600
_MOST_FIELDS = 400
_PATIENCE = 10.0  # seconds until another request makes what one began to make
_SHOWN_QUERY = ("code", "q", "state", "page", "by", "window", "of", "team")
_ADDRESS = re.compile(r"https://[^\s<>\"'`|\\^{}]+")
_HERE = Path(__file__).parent

_POLICY = {
    "default-src": "'self'",
    "object-src": "'none'",
    "base-uri": "'none'",
    "form-action": "'self'",  # sign-in begins with a link: Chromium would apply this to a form's redirects
    "frame-ancestors": "'none'",
}
# Bokeh styles its shadow roots with <style> elements that can carry neither a nonce nor a hash known beforehand, so
# style elements have to be allowed there; style attributes, inline scripts, eval and every other host are not.
_POLICY_WITH_CHARTS = _POLICY | {
    "script-src": "'self'",
    "style-src": "'self' 'unsafe-inline'",
    "style-src-attr": "'none'",
}


def largest_form(path: str) -> int | None:
    """In bytes, of those that may be sent to this path; None: none may."""
    if path in FORMS:
        return FORMS[path]
    return next((size for start, size in FORMS.items() if start.endswith("/") and path.startswith(start)), None)


def headers_of_pages(has_charts: bool = False) -> dict[str, str]:
    policy = _POLICY_WITH_CHARTS if has_charts else _POLICY
    return {
        "Content-Security-Policy": "; ".join(f"{name} {sources}" for name, sources in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "same-origin",  # "no-referrer" would hide the origin of our own forms from us, too
        **NO_KEEPING,
    }


@dataclass(frozen=True)
class News:
    """Something that everybody has to know now, at the top of every page."""

    kind: Literal["problem", "paused", "announcement"]
    text: str
    time: float = 0.0  # seconds since 1970; 0: is not told


@dataclass(frozen=True)
class Visitor:
    """Who is signed in at a browser."""

    standing: Standing
    token: str  # of the session: what every form of it has to send

    @property
    def number(self) -> int:
        """By which tables and public addresses know this person."""
        return self.standing.number

    @property
    def username(self) -> str:
        return self.standing.username

    @property
    def is_moderator(self) -> bool:
        return self.standing.is_moderator and not self.standing.may_not


class Refusal(Exception):
    """A page that says what is wrong and what to do about it, instead of the one that was asked for."""

    def __init__(self, status: int, title: str, text: str) -> None:
        self.status, self.title, self.text = status, title, text
        super().__init__(text)


class _SignInFirst(Exception):
    """Nobody is signed in, on a page that is somebody's."""


def visitor_of(request: Request) -> Visitor | None:
    """Asks the database."""
    subject, token = request.session.get("subject"), request.session.get("form")
    if not subject or not token:
        return None
    site: Site = request.app.state.site
    # who signs in by a name alone has no account that could be called by another name
    standing = site.allowlist.standing(subject) if site.is_local else site.allowlist.account(subject)
    return Visitor(standing, token) if standing is not None and standing.number else None


def _visitor_if_known(request: Request) -> Visitor | None:
    """Also where the database does not answer: the page that says so must not fail as well."""
    try:
        return visitor_of(request)
    except StorageError:
        return None


def _signed_in(request: Request) -> Visitor:
    visitor = visitor_of(request)
    if visitor is None:
        raise _SignInFirst
    return visitor


@dataclass(frozen=True)
class Form:
    fields: dict[str, list[str]]
    file: str  # what was uploaded, as text

    def one(self, name: str) -> str:
        return self.fields.get(name, [""])[0].strip()


def _form_is_old() -> Refusal:
    return Refusal(
        403,
        _("Please once more"),
        _("You have signed in or out since that page was loaded, so nothing was done. Load it again and repeat it."),
    )


async def _read_form(request: Request) -> Form:
    """A form that its owner sent from one of these pages. Raises `Refusal` for any other."""
    _check_origin(request)
    expected = request.session.get("form", "")
    if not expected:  # nothing that a stranger sends is read
        raise _form_is_old()
    _type, options = parse_options_header(request.headers.get("content-type"))
    if options.get(b"charset", b"utf-8").lower() != b"utf-8":
        # of Python's codecs, some take minutes and some make strings that are none
        raise Refusal(415, _("This form cannot be read"), _("Its text is not in UTF-8, so nothing was done."))
    fields: dict[str, list[str]] = {}
    content = b""
    async with request.form(max_files=1, max_fields=_MOST_FIELDS, max_part_size=FORMS["/desk"]) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                content = await value.read()
            else:
                fields.setdefault(name, []).append(value)
    token = fields.get("form", [""])[0]
    if not hmac.compare_digest(token.encode(), expected.encode()):
        raise _form_is_old()
    try:
        return Form(fields, content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise Refusal(
            400,
            _("This file cannot be read"),
            _("It is no text in UTF-8. Save it as CSV in UTF-8, or paste the names."),
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
        hosts = (request.headers.get("host", "").lower(), _host_of(request.app.state.site.address))
        is_ours = is_ours and _host_of(origin) in hosts
    if not is_ours:
        raise Refusal(
            403,
            _("This form came from elsewhere"),
            _(
                "Another page wanted to act in your name, so nothing was done. If it was you: open the run by its "
                "link, and repeat it there."
            ),
        )


def _host_of(address: str) -> str | None:
    """With its port."""
    try:
        return urlsplit(address).netloc.lower()
    except ValueError:
        return None


Signed = Annotated[Visitor, Depends(_signed_in)]
SentForm = Annotated[Form, Depends(_read_form)]


class Site:
    """One run's pages. Each module of pages has an `add_pages(site)`."""

    def __init__(self, app: FastAPI, coordinator: Coordinator, provider: Provider | None) -> None:
        """Gives the application sessions, languages and `/static`.

        :param provider: who people sign in with; None: by tokens only or, in a run without sign-in, by a name
        :raises RunDirectoryError: where the key of the sessions cannot be used
        """
        self.app, self.coordinator, self.provider = app, coordinator, provider
        self.is_local = coordinator.sign_in == "local"
        self._templates = _make_templates()
        self._kept: dict[tuple[str, str], tuple[float, Any]] = {}
        self._lock = threading.Lock()
        is_https = urlsplit(self.address).scheme == "https"
        app.state.site = self
        app.add_middleware(
            SessionMiddleware,
            secret_key=session_key(coordinator.run.keys),
            session_cookie="__Host-kantha" if is_https else "kantha",  # __Host-: no other host can have set it
            max_age=_SESSION_SECONDS,
            same_site="lax",  # it comes along on the way back from the provider
            https_only=is_https,
        )
        app.add_middleware(speech.Speaking)
        app.get("/static/{file}", include_in_schema=False)(_static)

    @property
    def allowlist(self) -> Allowlist:
        return self.coordinator.allowlist

    @property
    def address(self) -> str:
        """The run's, without a slash at its end."""
        return self.coordinator.address

    @property
    def link(self) -> str:
        """Of the run: what `kantha join` takes."""
        return self.address if self.is_local else f"{self.address}#{self.coordinator.admission.public_key}"

    def sign_in_address(self, to: str) -> str:
        """Under the run's address, where the session will be; the page may be open under another name of the host.

        :param to: the page to come back to
        """
        return f"{self.address}/sign-in?{urlencode({'to': to})}"

    def news(self) -> list[News]:
        announcements, pause = self.coordinator.bulletin.known()
        paused = []
        if pause is not None:
            text = _("The run is paused: “%(reason)s” – volunteers wait, and go on by themselves.", reason=pause.reason)
            paused = [News("paused", text, pause.since)]
        return paused + [News("announcement", each.text, each.time) for each in announcements]

    def may_take_part(self, visitor: Visitor) -> bool:
        """Whether this person is a member: approved or, where nobody has to ask, not kept out."""
        standing = visitor.standing
        return standing.state == State.APPROVED or (self.is_local and not standing.may_not)

    def sign_in(self, request: Request, subject: str) -> None:
        """From now on this browser is that account's."""
        request.session.clear()
        request.session["subject"] = subject
        request.session["form"] = secrets.token_urlsafe(24)

    def router(self) -> APIRouter:
        """For pages: errors become pages, too. To be given to `app.include_router` when all routes are in it."""
        return APIRouter(route_class=self._route_class(), include_in_schema=False)

    def redirect(self, request: Request, to: str) -> Response:
        """After a form: to another page, by its address without a slash before it."""
        return RedirectResponse(f"{_up(request)}{to}", 303)

    def page(
        self,
        request: Request,
        template: str,
        visitor: Visitor | None = None,
        status: int = 200,
        has_charts: bool = False,
        **content: Any,
    ) -> Response:
        """A page in its visitor's language, from a template that extends base.html.

        :param visitor: None: whoever is signed in
        """
        context = {
            "run": self.coordinator.run.spec,
            "visitor": visitor or _visitor_if_known(request),
            "sign_in": self.sign_in_address(request.url.path.removeprefix("/")),
            "is_local": self.is_local,
            "news": self.news(),
            "assets": load_assets()[0],
            "up": _up(request),
            "here": request.url.path,
            "language": speech.language(),
            "languages": [
                (code, name, "?" + urlencode({**(_shown_query(request) if status == 200 else {}), "lang": code}))
                for code, name in speech.LANGUAGES.items()
            ],
            **content,
        }
        return self._templates.TemplateResponse(request, template, context, status, headers_of_pages(has_charts))

    def render(self, template: str, **content: Any) -> str:
        """A part of a page, for `kept`."""
        return self._templates.get_template(template).render(content)

    def kept(self, key: str, seconds: float, make: Callable[[], Any]) -> Any:
        """What `make` returns, made anew after so many seconds, for each language: what many pages ask for at once.

        While one request makes it anew, the others get what was there before.
        """
        at = (key, speech.language())
        with self._lock:
            known = self._kept.get(at)
            if known is not None and time.monotonic() < known[0]:
                return known[1]
            if known is not None:
                self._kept[at] = (time.monotonic() + _PATIENCE, known[1])
        value = make()
        with self._lock:
            self._kept[at] = (time.monotonic() + seconds, value)
        return value

    def forget_kept(self) -> None:
        """Whoever asks next gets it made anew."""
        with self._lock:
            self._kept.clear()

    def _route_class(self) -> type[APIRoute]:
        site = self

        class PageRoute(APIRoute):
            def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
                handle = super().get_route_handler()

                async def answer(request: Request) -> Response:
                    try:
                        return await handle(request)
                    except _SignInFirst:
                        return RedirectResponse(site.sign_in_address(request.url.path.removeprefix("/")), 303)
                    except Refusal as error:
                        refusal = error
                    except TooManyRequestsError as error:
                        refusal = Refusal(429, _("Too often"), as_sentence(error))
                    except SignInError as error:
                        refusal = Refusal(400, _("Sign-in did not work"), as_sentence(error))
                    except MembershipError as error:
                        refusal = Refusal(403, _("This is not possible"), as_sentence(error))
                    except StorageError as error:
                        text = _("%(what)s Tell the organizer of the run.", what=as_sentence(error))
                        refusal = Refusal(503, _("Out of order"), text)
                    return site.page(
                        request, "message.html", status=refusal.status, title=refusal.title, text=refusal.text
                    )

                return answer

        return PageRoute


def as_sentence(error: Exception) -> str:
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}."


def _shown_query(request: Request) -> dict[str, str]:
    """What of the address says which page is shown; the rest is repeated nowhere."""
    return {name: value[:100] for name, value in request.query_params.items() if name in _SHOWN_QUERY}


def _up(request: Request) -> str:
    """From this page to the run's, relative, for what is served under a path of a proxy."""
    return "../" * (request.url.path.count("/") - 1) or "./"


def _marked(text: str) -> Markup:
    """A sentence whose `commands` stand between backticks, as the terminal says it, for a page."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 and number + 1 < len(parts) else escape(part)
        for number, part in enumerate(parts)
    )


def _linked(text: str) -> Markup:
    """What moderators wrote; addresses in it that begin with https:// are links, and nothing else is."""
    parts, end = [], 0
    for found in _ADDRESS.finditer(text):
        address = found[0].rstrip(".,:;!?।)]}’”\"'")
        try:
            is_plain = bool(urlsplit(address).hostname) and "@" not in urlsplit(address).netloc
        except ValueError:
            is_plain = False
        if is_plain:
            link = Markup('<a href="{0}" rel="noopener noreferrer nofollow">{0}</a>').format(address)
            parts += [escape(text[end : found.start()]), link]
            end = found.start() + len(address)
    return Markup("").join([*parts, escape(text[end:])])


def _make_templates() -> Jinja2Templates:
    templates = Jinja2Templates(_HERE / "templates")
    env: Any = templates.env
    env.autoescape = True  # else only of the files that it takes for HTML
    env.add_extension("jinja2.ext.i18n")
    env.install_gettext_callables(speech.gettext, speech.plural, newstyle=True)
    env.filters.update(
        number=speech.number,
        percent=speech.percent,
        duration=speech.duration,
        ago=speech.ago,
        moment=speech.moment,
        day=speech.day,
        month=speech.month,
        digits=speech.digits,
        marked=_marked,
        translated=speech.gettext,  # of what may be one of our own texts
        linked=_linked,
    )
    # Bokeh's documents refer back to models earlier in them, so `tojson` must leave the order alone.
    env.policies["json.dumps_kwargs"] = {"sort_keys": False}
    return templates


@dataclass(frozen=True)
class Asset:
    content: bytes
    gzipped: bytes
    media_type: str


@functools.cache  # compressing the scripts takes its time
def load_assets() -> tuple[dict[str, str], dict[str, Asset]]:
    """What `/static` serves: its names by the templates' keys, and the files by these names."""
    names: dict[str, str] = {}
    assets: dict[str, Asset] = {}

    def add(key: str, name: str, content: bytes, media_type: str) -> None:
        names[key] = name
        assets[name] = Asset(content, gzip.compress(content, mtime=0), media_type)

    bokeh_script = Path(bokehjs_path()) / "js" / "bokeh.min.js"
    add("bokeh", f"bokeh-{bokeh.__version__}.min.js", bokeh_script.read_bytes(), "text/javascript")
    for key, file, media_type in [
        ("charts", "charts.js", "text/javascript"),
        ("clipboard", "clipboard.js", "text/javascript"),
        ("live", "live.js", "text/javascript"),
        ("certificate", "certificate.js", "text/javascript"),
        ("style", "page.css", "text/css"),
        ("icon", "page.svg", "image/svg+xml"),
    ]:
        content = (_HERE / "static" / file).read_bytes()
        stem, _dot, suffix = file.partition(".")
        add(key, f"{stem}-{hashlib.sha256(content).hexdigest()[:12]}.{suffix}", content, media_type)
    return names, assets


def _static(file: str, request: Request) -> Response:
    asset = load_assets()[1].get(file)
    if asset is None:
        raise HTTPException(404)
    headers = {
        # The names carry a version or a digest: what is behind one never changes.
        "Cache-Control": "public, max-age=31536000, immutable",
        "Vary": "Accept-Encoding",
        "X-Content-Type-Options": "nosniff",
    }
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(asset.gzipped, media_type=asset.media_type, headers=headers | {"Content-Encoding": "gzip"})
    return Response(asset.content, media_type=asset.media_type, headers=headers)
