"""In which language a page speaks: gettext catalogues and Babel's numbers and dates.

A page's language is the one that its visitor chose by `?lang=`, else the browser's. It goes with the request, so all
that makes a page may ask for it. Bengali has Bengali digits.
"""

import datetime
import functools
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from urllib.parse import parse_qs

from babel import Locale, dates, negotiate_locale, numbers
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po
from babel.support import NullTranslations, Translations
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LANGUAGES = {"en": "English", "bn": "বাংলা"}  # the first is what all texts are written in
COOKIE = "lang"
_COOKIE_SECONDS = 365 * 24 * 3600
_LOCALES = Path(__file__).parent / "locales"
_MOST_HEADER = 500  # characters of Accept-Language and of cookies that are looked at
_GROUPS = {"en": "#,##0", "bn": "#,##,##0"}  # lakh and crore

_language: ContextVar[str] = ContextVar("language", default="en")


def language() -> str:
    """Of what is being made now: a key of `LANGUAGES`."""
    return _language.get()


@contextmanager
def speaking(code: str) -> Iterator[None]:
    """All texts made in here are in this language."""
    token = _language.set(code)
    try:
        yield
    finally:
        _language.reset(token)


@functools.cache
def _catalogue(code: str) -> NullTranslations:
    """Compiled when it is first needed: a folder of .po files is all there is to keep."""
    path = _LOCALES / code / "LC_MESSAGES" / "kantha.po"
    if code == "en":
        return NullTranslations()
    with path.open("rb") as file:
        catalogue = read_po(file, locale=code)
    compiled = io.BytesIO()
    write_mo(compiled, catalogue)
    compiled.seek(0)
    return Translations(compiled)


def gettext(message: str, **values: object) -> str:
    """The message in the page's language, with `%(name)s` filled in where values are given."""
    text = _catalogue(language()).gettext(message) if message else ""  # to gettext, "" is the catalogue's header
    return text % values if values else text


def ngettext(one: str, many: str, count: int, **values: object) -> str:
    """The same for a number of things; `%(num)s` is that number as people read it."""
    text = _catalogue(language()).ngettext(one, many, count)
    return text % {"num": number(count), **values}


def plural(one: str, many: str, count: int) -> str:
    """`ngettext` for templates, which fill in all but `%(num)s` themselves."""
    return _catalogue(language()).ngettext(one, many, count).replace("%(num)s", number(count))


def noop(message: str) -> str:
    """Marks a text that is translated later, where it is used."""
    return message


def number(value: float | None, places: int = 0) -> str:
    """:param places: after the point"""
    if value is None or not math.isfinite(value):
        return "–"
    pattern = _GROUPS[language()] + (f".{'0' * places}" if places else "")
    return digits(numbers.format_decimal(value, format=pattern, locale=_locale()))  # Babel leaves digits Latin


def percent(share: float | None, places: int = 1) -> str:
    """:param share: 1 is all"""
    return "–" if share is None or not math.isfinite(share) else f"{number(100 * share, places)} %"


def duration(seconds: float | None) -> str:
    """45 s, 12 min 5 s, 2 h 10 min, 3 days."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    whole = max(0, round(seconds))
    if whole < 60:
        return gettext("%(seconds)s s", seconds=number(whole))
    if whole < 3600:
        return gettext("%(minutes)s min %(seconds)s s", minutes=number(whole // 60), seconds=number(whole % 60))
    if whole < 48 * 3600:
        return gettext("%(hours)s h %(minutes)s min", hours=number(whole // 3600), minutes=number(whole % 3600 // 60))
    return ngettext("%(num)s day", "%(num)s days", whole // 86400)


def ago(seconds: float) -> str:
    """How long since something happened."""
    return gettext("just now") if seconds < 2 else gettext("%(time)s ago", time=duration(seconds))


def moment(seconds: float) -> str:
    """A point in time, in UTC.

    :param seconds: since 1970
    """
    then = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return digits(dates.format_datetime(then, "d MMM y, HH:mm", locale=_locale()))


def day(date: datetime.date) -> str:
    return digits(dates.format_date(date, "d MMM y", locale=_locale()))


def month(date: datetime.date) -> str:
    return digits(dates.format_date(date, "LLLL y", locale=_locale()))


def digits(text: str) -> str:
    """A text whose digits are those of the page's language: numbers without groups, such as years and codes."""
    return text.translate(_BENGALI) if language() == "bn" else text


_BENGALI = str.maketrans("0123456789", "০১২৩৪৫৬৭৮৯")


@functools.cache
def _locale_of(code: str) -> Locale:
    return Locale.parse(code)


def _locale() -> Locale:
    return _locale_of(language())


class Speaking:
    """Middleware: finds out each request's language, and keeps one that was chosen in a cookie."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        chosen = parse_qs(scope["query_string"].decode("latin-1")).get("lang", [""])[-1]

        async def remember(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.add_vary_header("Accept-Language, Cookie")
                if chosen in LANGUAGES:
                    headers.append(
                        "Set-Cookie", f"{COOKIE}={chosen}; Max-Age={_COOKIE_SECONDS}; Path=/; SameSite=Lax; HttpOnly"
                    )
            await send(message)

        with speaking(chosen if chosen in LANGUAGES else _preferred(Headers(scope=scope))):
            await self._app(scope, receive, remember)


def _preferred(headers: Headers) -> str:
    try:
        cookie = SimpleCookie(headers.get("cookie", "")[:8_000]).get(COOKIE)
    except CookieError:
        cookie = None
    if cookie is not None and cookie.value in LANGUAGES:
        return cookie.value
    wanted = []
    for part in headers.get("accept-language", "")[:_MOST_HEADER].split(","):
        tag, _, weight = part.strip().partition(";q=")
        try:
            wanted.append((-float(weight or 1), tag))
        except ValueError:
            continue
    found = negotiate_locale([tag for _, tag in sorted(wanted, key=lambda each: each[0])], list(LANGUAGES), sep="-")
    return found or "en"
