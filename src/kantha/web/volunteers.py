"""The volunteers: /volunteers with its leaderboard, a page for each of them, and certificates of contribution."""

import math
from bisect import bisect_right
from datetime import UTC, date, datetime, timedelta
from itertools import groupby
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from fastapi import Query, Request, Response
from pydantic import BaseModel, Field

from kantha.coordinator.allowlist import MOST_REASON
from kantha.coordinator.certificate import ELEMENT, Certificate
from kantha.coordinator.leaderboard import Board, By, Career, Leaderboard, Place, Window
from kantha.errors import MembershipError
from kantha.web import speech
from kantha.web.people import PLACES
from kantha.web.site import Refusal, SentForm, Signed, Site, Visitor, as_sentence, headers_of_pages, visitor_of
from kantha.web.speech import gettext as _
from kantha.web.speech import noop

_ROWS = 50  # of the board on one page
_BOARD_SECONDS = 5.0  # that a board which was written is shown
_SHOWN_SESSIONS = 8
_QUILT_WEEKS = 53
_SHADES = 4  # of a patch, beside that of an empty one
_WINDOWS = {
    Window.TODAY: noop("Today"),
    Window.WEEK: noop("7 days"),
    Window.MONTH: noop("30 days"),
    Window.ALL: noop("All"),
}
_ORDERS = {By.SAMPLES: noop("Samples"), By.HOURS: noop("Hours"), By.STREAK: noop("Days in a row")}
_WIDTH, _HEIGHT = 1200, 848  # of a certificate, in the shape of A4 paper


_WindowName = Literal["today", "week", "month", "all"]
_OrderName = Literal["samples", "hours", "streak"]


class PlaceInfo(BaseModel):
    """One line of the board."""

    rank: int = Field(description="From 1; who is level shares it.")
    number: int = Field(description="Of the person, as in /volunteers/NUMBER, or of the team.")
    name: str = Field(description="That it is shown by.")
    samples: int = Field(description="Samples in finished rounds.")
    seconds: float = Field(description="Spent computing, on all machines together.")
    streak: int = Field(description="Days in a row (UTC) with samples, up to today or yesterday; of a team, its best.")
    people: int = Field(description="1, or of a team: how many of it took part.")


class SumsInfo(BaseModel):
    """What some people gave together."""

    people: int = Field(description="How many they are.")
    samples: int = Field(description="Samples in finished rounds.")
    seconds: float = Field(description="Spent computing, on all machines together.")


class BoardInfo(BaseModel):
    """Who gave how much; the total is of everybody, also of those who are not shown."""

    window: _WindowName = Field(description="Over which days (UTC).")
    by: _OrderName = Field(description="In which order.")
    places: list[PlaceInfo] = Field(description="Best first.")
    hidden: SumsInfo = Field(
        description="People who do not want to be shown, or left for good; of teams: who is in none."
    )
    total: SumsInfo = Field(description="Everybody, whether shown or not.")


def add_pages(site: Site) -> None:
    pages = _Pages(site)
    router = site.router()
    router.get("/volunteers")(pages.board)
    router.post("/volunteers")(pages.moderate)
    router.get("/volunteers/{number}")(pages.person)
    router.get("/volunteers/{number}/certificate")(pages.certificate)
    router.get("/volunteers/{number}/certificate.svg")(pages.certificate_picture)
    router.get("/volunteers/{number}/certificate.json")(pages.certificate_file)
    site.app.include_router(router)
    site.app.get("/api/v1/volunteers", summary="The leaderboard")(pages.board_as_json)


class _Pages:
    def __init__(self, site: Site) -> None:
        self._site = site

    @property
    def _leaderboard(self) -> Leaderboard:
        return self._site.coordinator.leaderboard

    # ---- the board

    def board(
        self,
        request: Request,
        of: str = "people",
        window: str = "all",
        by: str = "samples",
        team: str = "",
        page: Annotated[int, Query(ge=1, le=10_000)] = 1,
    ) -> Response:
        """
        :param of: people, or teams
        :param team: the number of one whose people to show
        """
        days = Window(window) if window in list(Window) else Window.ALL
        order = By(by) if by in list(By) else By.SAMPLES
        shown_team = None
        if team:
            shown_team = next((each for each in self._site.allowlist.teams() if str(each.number) == team), None)
            if shown_team is None:
                raise Refusal(404, _("No such team"), _("Nobody is in a team of this number, or not any longer."))
        of_teams = of == "teams" and shown_team is None
        board = (
            self._leaderboard.teams(days, order)
            if of_teams
            else self._leaderboard.people(days, order, shown_team.number if shown_team else None)
        )
        pages = max(1, math.ceil(len(board.places) / _ROWS))
        page = min(page, pages)
        query = {"of": "teams"} if of_teams else {"team": team} if shown_team else {}

        def address(**changes: object) -> str:
            said = {**query, "window": days.value, "by": order.value, **changes}
            usual: dict[str, object] = {"window": "all", "by": "samples", "page": 1, "of": "people"}
            kept = {name: value for name, value in said.items() if value != usual.get(name)}
            return f"volunteers?{urlencode(kept)}" if kept else "volunteers"

        visitor = visitor_of(request)
        key = f"board {of_teams} {days} {order} {team} {page}"
        return self._site.page(
            request,
            "volunteers.html",
            visitor,
            board=board,
            team=shown_team,
            of_teams=of_teams,
            rows=self._site.kept(
                key,
                _BOARD_SECONDS,
                lambda: self._site.render(
                    "board.html",
                    board=board,
                    places=board.places[(page - 1) * _ROWS : page * _ROWS],
                    is_last=page == pages,
                    of_teams=of_teams,
                ),
            ),
            people_or_teams=[
                (_("People"), not of_teams, address(of="people")),
                (_("Teams"), of_teams, address(of="teams")),
            ],
            windows=[(_(text), each is days, address(window=each.value)) for each, text in _WINDOWS.items()],
            orders=[(_(text), each is order, address(by=each.value)) for each, text in _ORDERS.items()],
            own=None if of_teams else self._own_place(visitor, board, address),
            page=page,
            pages=pages,
            earlier=address(page=page - 1) if page > 1 else "",
            later=address(page=page + 1) if page < pages else "",
            most_reason=MOST_REASON,
        )

    def _own_place(self, visitor: Visitor | None, board: Board, address: Any) -> dict[str, object] | None:
        """Where the visitor stands; who is hidden is told alone."""
        if visitor is None:
            return None
        place = board.place_of(visitor.number)
        if place is None:
            return {"place": None}
        page = 1 + board.places.index(place) // _ROWS
        return {"place": place, "address": address(page=page), "page": page}

    def board_as_json(
        self,
        of: Annotated[str, Query(pattern="^(people|teams)$", description="people, or teams.")] = "people",
        window: Annotated[_WindowName, Query(description="Over which days (UTC).")] = "all",
        by: Annotated[_OrderName, Query(description="In which order.")] = "samples",
        page: Annotated[int, Query(ge=1, le=10_000, description="From 1.")] = 1,
        size: Annotated[int, Query(ge=1, le=500, description="Places on one page.")] = 100,
    ) -> BoardInfo:
        """The leaderboard: people or teams, best first."""
        days, order = Window(window), By(by)
        board = self._leaderboard.teams(days, order) if of == "teams" else self._leaderboard.people(days, order)
        return BoardInfo(
            window=window,
            by=by,
            places=[_place_info(place) for place in board.places[(page - 1) * size : page * size]],
            hidden=SumsInfo(**vars(board.hidden)),
            total=SumsInfo(**vars(board.total)),
        )

    def moderate(self, request: Request, visitor: Signed, form: SentForm) -> Response:
        """A moderator takes away a nickname, or dissolves a team."""
        if not visitor.is_moderator:
            raise Refusal(403, _("This is for moderators"), _("Only moderators of this run take names away."))
        number = form.one("number")
        try:
            if not number.isdecimal() or len(number) > 9:
                raise MembershipError("say whose, by a number")
            if form.one("action") == "nickname":
                self._site.allowlist.take_nickname(int(number), visitor.username, form.one("reason"))
                return self._site.redirect(request, "volunteers")
            if form.one("action") == "team":
                self._site.allowlist.dissolve_team(int(number), visitor.username, form.one("reason"))
                return self._site.redirect(request, "volunteers?of=teams")
            raise MembershipError("say what to take away: a nickname, or a team")
        except MembershipError as error:
            raise Refusal(400, _("Nothing was done"), as_sentence(error)) from None

    # ---- a person

    def person(self, request: Request, number: str) -> Response:
        visitor = visitor_of(request)
        career = self._career(number, visitor)
        today = datetime.now(UTC).date()
        is_own = visitor is not None and visitor.number == career.profile.number
        return self._site.page(
            request,
            "volunteer.html",
            visitor,
            career=career,
            name=career.profile.name or career.profile.username,  # only its owner sees a hidden one
            is_own=is_own,
            has_certificate=self._leaderboard.contribution(career) is not None,
            quilt=_quilt(career, today),
            months=_months(career),
            machines=[
                (_service(machine.service), machine.device, machine.samples, machine.seconds)
                for machine in career.machines
                if machine.samples
            ],
            sessions=[
                (_service(stay.service), stay.label if is_own else "", stay.began, max(0.0, stay.seen - stay.began))
                for stay in career.sessions[:_SHOWN_SESSIONS]
            ],
            most_reason=MOST_REASON,
        )

    def _career(self, number: str, visitor: Visitor | None) -> Career:
        """Of somebody who is shown and did something, or of the visitor. Raises `Refusal`: nobody else is told apart
        from somebody who does not exist."""
        career = None
        if number.isascii() and number.isdecimal() and len(number) <= 9:
            career = self._leaderboard.career(int(number))
        is_own = career is not None and visitor is not None and visitor.number == career.profile.number
        if career is None or not (is_own or (career.profile.name is not None and career.samples > 0)):
            raise Refusal(
                404,
                _("Nobody is shown here"),
                _("There is no volunteer of this number, or one who does not want to be shown."),
            )
        return career

    # ---- certificates

    def certificate(self, request: Request, number: str) -> Response:
        signed = self._signed(request, number)
        return self._site.page(
            request,
            "certificate.html",
            certificate=signed,
            link=f"{self._site.address}#{self._site.coordinator.admission.public_key}",
            file_name=f"certificate-{signed.person}",
        )

    def certificate_picture(self, request: Request, number: str) -> Response:
        return Response(
            self._drawn(self._signed(request, number)), media_type="image/svg+xml", headers=headers_of_pages()
        )

    def certificate_file(self, request: Request, number: str) -> Response:
        return Response(
            self._signed(request, number).model_dump_json(indent=1),
            media_type="application/json",
            headers=headers_of_pages(),
        )

    def _signed(self, request: Request, number: str) -> Certificate:
        visitor = visitor_of(request)
        career = self._career(number, visitor)
        contribution = self._leaderboard.contribution(career)
        if contribution is None:
            raise Refusal(
                404,
                _("No certificate yet"),
                _(
                    "A certificate needs samples in a finished round, and a name: choose on your own page how to be "
                    "shown."
                ),
            )
        return self._site.coordinator.admission.attest(contribution)

    def _drawn(self, certificate: Certificate) -> str:
        return self._site.render(
            "certificate.svg",
            certificate=certificate,
            content=certificate.model_dump_json(),
            element=ELEMENT,
            width=_WIDTH,
            height=_HEIGHT,
            name_size=_fitting(certificate.name, 66, 960),
            run_size=_fitting(certificate.run_name, 38, 960),
            seal=_seal(certificate.signature),
            language=speech.language(),
            figures=[
                (speech.number(certificate.samples), _("samples")),
                (speech.number(certificate.seconds / 3600, 1), _("hours of computing")),
                (speech.number(certificate.rounds), _("rounds")),
            ],
        )


def _place_info(place: Place) -> PlaceInfo:
    return PlaceInfo(
        rank=place.rank,
        number=place.number,
        name=place.name,
        samples=place.samples,
        seconds=place.seconds,
        streak=place.streak,
        people=place.people,
    )


def _service(service: str) -> str:
    return _(PLACES[service]) if service in PLACES else service


def _quilt(career: Career, today: date) -> dict[str, Any]:
    """The last year as a quilt: a column for each week, a patch for each day, the darker the more samples."""
    first = today - timedelta(days=today.weekday(), weeks=_QUILT_WEEKS - 1)  # a Monday
    samples = {day.date: day.samples for day in career.days if day.date >= first}
    ordered = sorted(samples.values())
    patches = []
    for offset in range((today - first).days + 1):
        day = first + timedelta(days=offset)
        count = samples.get(day, 0)
        # by rank, so that a few great days do not make all others look alike
        shade = math.ceil(_SHADES * bisect_right(ordered, count) / len(ordered)) if count else 0
        patches.append({"x": offset // 7, "y": offset % 7, "shade": shade, "day": day, "samples": count})
    return {
        "patches": patches,
        "weeks": _QUILT_WEEKS,
        "days": len(samples),
        "first": first,
        "most": max(ordered, default=0),
    }


def _months(career: Career) -> list[dict[str, Any]]:
    """The newest first."""
    months = []
    for _month, days in groupby(reversed(career.days), key=lambda day: (day.date.year, day.date.month)):
        listed = list(days)
        months.append(
            {
                "first": listed[-1].date.replace(day=1),
                "days": len(listed),
                "samples": sum(day.samples for day in listed),
                "seconds": sum(day.seconds for day in listed),
            }
        )
    return months


def _fitting(text: str, largest: float, width: float) -> float:
    """Size of a font in which a text is about as wide as there is room."""
    return round(min(largest, width / (0.56 * max(1, len(text)))), 1)


def _seal(signature: str) -> list[dict[str, float]]:
    """The signature as a ring of stitches, one for each byte, the longer the larger it is: no two look the same."""
    stitches = []
    for number, byte in enumerate(bytes.fromhex(signature)):
        angle = 2 * math.pi * number / 64 - math.pi / 2
        inner, outer = 44.0, 52.0 + 26.0 * byte / 255
        stitches.append(
            {
                "x1": round(inner * math.cos(angle), 2),
                "y1": round(inner * math.sin(angle), 2),
                "x2": round(outer * math.cos(angle), 2),
                "y2": round(outer * math.sin(angle), 2),
            }
        )
    return stitches
