"""The community's polls: /name for the model's name, /polls for all of them."""

import csv
import io
import time
from typing import Annotated, Any

from fastapi import Path, Query, Request, Response
from fastapi.responses import JSONResponse

from kantha.coordinator.polls import (
    MOST_ENTRIES,
    MOST_LETTERS,
    NAME_POLL,
    Entry,
    Poll,
    PollError,
    Polls,
    PollState,
    Problem,
)
from kantha.web.site import NO_KEEPING, Form, Refusal, SentForm, Signed, Site, Visitor, visitor_of
from kantha.web.speech import gettext as _
from kantha.web.speech import noop, number

_ROWS = 100  # entries on one page
_NUMBERS = 9  # digits of an entry's number
PROBLEMS = {
    Problem.NO_POLL: noop("There is no such poll."),
    Problem.NOT_OPEN: noop("This poll has not opened yet; come back when it has."),
    Problem.CLOSED: noop("This poll has closed; its result is final."),
    Problem.NO_MEMBER: noop("Polls are for members: a moderator has to let you in first."),
    Problem.NO_ENTRY: noop("This poll has no such entry; load the page again."),
    Problem.NO_TEXT: noop("An entry is one line of at most %(most)s characters."),
    Problem.NO_LETTER: noop("An entry needs a letter or a digit; write one."),
    Problem.MARKS: noop("An entry cannot have so many marks on one letter; write it plainly."),
    Problem.THERE: noop("“%(text)s” is there already: vote for it."),
    Problem.WAS_HIDDEN: noop("“%(text)s” was proposed before, and a moderator hid it."),
    Problem.HIDDEN: noop("A moderator hid that entry; vote for another one."),
    Problem.YOUR_SHARE: noop("You have proposed %(most)s already, which is as many as one person may."),
    Problem.FULL: noop("This poll has %(most)s entries and takes no more; vote for one of them."),
}

Slug = Annotated[str, Path(pattern="^[a-z0-9-]{1,40}$")]
Page = Annotated[int, Query(ge=1, le=100)]


def add_pages(site: Site) -> None:
    pages = _Pages(site)
    router = site.router()
    router.get("/polls")(pages.all)
    router.get("/name")(pages.name)
    router.post("/name")(pages.take_part_in_name)
    router.get("/polls/{slug}")(pages.poll)
    router.post("/polls/{slug}")(pages.take_part)
    router.get("/polls/{slug}/results.csv")(pages.as_csv)
    router.get("/polls/{slug}/results.json")(pages.as_json)
    site.app.include_router(router)


class _Pages:
    def __init__(self, site: Site) -> None:
        self._site = site

    @property
    def _polls(self) -> Polls:
        return self._site.coordinator.polls

    # ---- looking

    def all(self, request: Request) -> Response:
        polls = [(poll, self._polls.winners(poll.slug)) for poll in self._polls.all()]
        return self._site.page(request, "polls.html", polls=polls, where=_where, now=time.time())

    def name(self, request: Request, page: Page = 1) -> Response:
        if self._polls.poll(NAME_POLL) is None:
            return self._site.page(request, "no_poll.html")
        return self._show(request, NAME_POLL, page)

    def poll(self, request: Request, slug: Slug, page: Page = 1) -> Response:
        if slug == NAME_POLL:
            return self._site.redirect(request, NAME_POLL)
        return self._show(request, slug, page)

    def _show(self, request: Request, slug: str, page: int) -> Response:
        poll, visitor = self._existing(slug), visitor_of(request)
        entries = self._entries(poll, visitor)
        shown = [entry for entry in entries if not entry.hidden]
        mine = sum(entry.is_mine for entry in entries)
        return self._site.page(
            request,
            "poll.html",
            visitor,
            poll=poll,
            where=_where(slug),
            entries=entries[(page - 1) * _ROWS : page * _ROWS],
            most_votes=max([entry.votes for entry in shown], default=0),
            winners=[entry for entry in shown if entry.place == 1 and entry.votes],
            earlier=page - 1 if page > 1 else None,
            later=page + 1 if len(entries) > page * _ROWS else None,
            takes_part=visitor is not None and self._takes_part(visitor),
            left=max(0, MOST_ENTRIES - mine),
            most_letters=MOST_LETTERS,
            said=request.session.pop("said", "") if visitor is not None else "",
            names=self._names(entries) if visitor is not None and visitor.is_moderator else {},
            now=time.time(),
        )

    def _existing(self, slug: str) -> Poll:
        poll = self._polls.poll(slug)
        if poll is None:
            raise Refusal(404, _("No such poll"), _("There is no poll here. All polls of this run are at /polls."))
        return poll

    def _entries(self, poll: Poll, visitor: Visitor | None) -> list[Entry]:
        if visitor is None:
            return self._polls.entries(poll.slug)
        return self._polls.entries(poll.slug, visitor.number, with_hidden=visitor.is_moderator)

    def _names(self, entries: list[Entry]) -> dict[int, str]:
        """Usernames of those who proposed them, for moderators."""
        return self._site.allowlist.usernames({entry.by for entry in entries if entry.by is not None})

    def _takes_part(self, visitor: Visitor) -> bool:
        return self._site.may_take_part(visitor) or visitor.is_moderator

    # ---- taking part

    def take_part_in_name(self, request: Request, visitor: Signed, form: SentForm) -> Response:
        return self._take_part(request, NAME_POLL, visitor, form)

    def take_part(self, request: Request, slug: Slug, visitor: Signed, form: SentForm) -> Response:
        return self._take_part(request, slug, visitor, form)

    def _take_part(self, request: Request, slug: str, visitor: Visitor, form: Form) -> Response:
        """What was done is said by the button that was pressed: vote, take_back, propose, hide or show."""
        poll = self._existing(slug)
        try:
            if "propose" in form.fields:
                return self._propose(request, poll, visitor, form)
            for act in ("vote", "take_back", "hide", "show"):
                if act in form.fields:
                    entry = _number(form.one(act))
                    self._act(act, poll, entry, visitor, form)
                    return self._site.redirect(request, f"{_where(slug)}#entry-{entry}")
        except PollError as error:
            raise Refusal(400, _("Nothing was changed"), problem_sentence(error)) from None
        raise Refusal(400, _("Nothing was changed"), _("Choose an entry, or write one."))

    def _act(self, act: str, poll: Poll, entry: int, visitor: Visitor, form: Form) -> None:
        if act == "vote":
            self._polls.vote(poll.slug, entry, visitor.number)
        elif act == "take_back":
            self._polls.take_back(poll.slug, entry, visitor.number)
        elif not visitor.is_moderator:
            raise Refusal(403, _("This is for moderators"), _("Only moderators hide and show entries."))
        elif act == "hide":
            if not form.one("reason"):
                text = _("To hide an entry takes a reason, which who proposed it is told; give one.")
                raise Refusal(400, _("Nothing was changed"), text)
            self._polls.hide(poll.slug, entry, form.one("reason"), visitor.username)
        else:
            self._polls.show(poll.slug, entry, visitor.username)

    def _propose(self, request: Request, poll: Poll, visitor: Visitor, form: Form) -> Response:
        text = form.one("propose")
        is_open_question = (
            poll.state == PollState.OPEN and len(text) <= MOST_LETTERS and not self._polls.is_there(poll.slug, text)
        )
        if is_open_question and not form.one("sure"):
            texts = self._polls.alike(poll.slug, text)
            alike = [entry for entry in self._polls.entries(poll.slug, visitor.number) if entry.text in texts]
            if alike:
                where = _where(poll.slug)
                return self._site.page(request, "alike.html", visitor, poll=poll, where=where, text=text, alike=alike)
        entry = self._polls.propose(poll.slug, text, visitor.number)
        request.session["said"] = _("“%(text)s” is entered, with your vote for it.", text=text)
        return self._site.redirect(request, f"{_where(poll.slug)}#entry-{entry}")

    # ---- for other programs

    def as_json(self, slug: Slug) -> Response:
        poll = self._existing(slug)
        content: dict[str, Any] = {
            "poll": poll.slug,
            "title": poll.title,
            "question": poll.question,
            "opens": poll.opens,
            "closes": poll.closes,
            "state": poll.state.value,
            "final": poll.state == PollState.CLOSED,
            "voters": poll.voters,
            "entries": [
                {"place": entry.place, "text": entry.text, "votes": entry.votes}
                for entry in self._polls.entries(poll.slug)
            ],
        }
        return JSONResponse(content, headers=_file_headers(poll, "json"))

    def as_csv(self, slug: Slug) -> Response:
        poll = self._existing(slug)
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["place", "text", "votes", "voters", "state"])
        for entry in self._polls.entries(poll.slug):
            # a spreadsheet takes what begins so for a formula, and a stranger wrote it
            shield = "'" if entry.text[0] in "=+-@" else ""
            writer.writerow([entry.place, shield + entry.text, entry.votes, poll.voters, poll.state.value])
        headers = _file_headers(poll, "csv")
        return Response(text.getvalue().encode("utf-8-sig"), media_type="text/csv; charset=utf-8", headers=headers)


def _where(slug: str) -> str:
    """A poll's page, without a slash before it."""
    return slug if slug == NAME_POLL else f"polls/{slug}"


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _NUMBERS):
        raise PollError(Problem.NO_ENTRY)
    return int(text)


def problem_sentence(error: PollError) -> str:
    """In the page's language."""
    values = {name: number(value) if isinstance(value, int) else value for name, value in error.values.items()}
    return _(PROBLEMS[error.problem], **values)


def _file_headers(poll: Poll, suffix: str) -> dict[str, str]:
    name = f"poll-{poll.slug}.{suffix}"  # a slug has no letter that would need quoting
    return {
        "Content-Disposition": f'attachment; filename="{name}"',
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
        **NO_KEEPING,
    }
