"""The moderators' desk: people, their machines, what everybody is told, polls, pause and annealing."""

import datetime
import time
from collections.abc import Callable
from typing import Annotated, get_args
from urllib.parse import urlencode

from fastapi import Path, Query, Request, Response

from kantha.coordinator.allowlist import MOST_REASON, Action, State, parse_names
from kantha.coordinator.annealing import cancel_annealing, order_annealing, ordered_annealing, plan_annealing
from kantha.coordinator.bulletin import LONGEST_DAYS
from kantha.coordinator.polls import MOST_QUESTION, MOST_TITLE, NAME_POLL, PollError
from kantha.errors import KanthaError, MembershipError, OrderError, RunDirectoryError
from kantha.swarm.membership import MOST_WORDS
from kantha.web.people import PLACES
from kantha.web.polls import problem_sentence
from kantha.web.site import Form, Refusal, SentForm, Signed, Site, Visitor, as_sentence
from kantha.web.speech import gettext as _
from kantha.web.speech import ngettext, noop

_ROWS = 50  # people on one page of the desk
_LOG_ROWS = 100
_MOST_DIGITS = 16  # of samples to anneal over
_POLL_DAYS = 7  # that a new poll is open, if nobody says otherwise
_HOURS = (6, 24, 72, 168, 720)  # that an announcement may be shown
_ACTIONS = {
    "approve": noop("Approve"),
    "refuse": noop("Refuse"),
    "suspend": noop("Suspend"),
    "ban": noop("Ban"),
}
_STATES = {
    State.NEW: noop("has not asked"),
    State.ASKED: noop("waits for an answer"),
    State.APPROVED: noop("approved"),
    State.REFUSED: noop("refused"),
    State.SUSPENDED: noop("suspended"),
    State.BANNED: noop("banned"),
}
_DEEDS = {  # in the log
    "ask": noop("asked to join"),
    "approve": noop("approved"),
    "refuse": noop("refused"),
    "suspend": noop("suspended"),
    "ban": noop("banned"),
    "rename": noop("has another name"),
    "moderator": noop("made moderator"),
    "no moderator": noop("no moderator any more"),
    "rule": noop("set a rule"),
    "no rule": noop("took a rule back"),
    "announce": noop("announced"),
    "end announcement": noop("ended an announcement"),
    "pause": noop("paused the run"),
    "resume": noop("let the run go on"),
    "anneal": noop("ordered the annealing"),
    "cancel annealing": noop("took the annealing back"),
    "end lease": noop("freed a place"),
    "open poll": noop("made a poll"),
    "change poll": noop("changed a poll"),
    "close poll": noop("closed a poll"),
    "hide entry": noop("hid an entry"),
    "show entry": noop("showed an entry again"),
}


def add_pages(site: Site) -> None:
    desk = _Desk(site)
    router = site.router()
    router.get("/desk")(desk.desk)
    router.post("/desk")(desk.decide)
    router.post("/desk/anneal")(desk.anneal)  # before the others: its first step is a page
    router.post("/desk/{deed}")(desk.do)
    site.app.include_router(router)


class _Desk:
    def __init__(self, site: Site) -> None:
        self._site = site
        self._deeds: dict[str, Callable[[Visitor, Form], str]] = {  # each says what was done
            "announce": self._announce,
            "end-announcement": self._end_announcement,
            "pause": self._pause,
            "resume": self._resume,
            "end-lease": self._end_lease,
            "make-poll": self._make_poll,
            "change-poll": self._change_poll,
            "close-poll": self._close_poll,
        }

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
        coordinator = self._site.coordinator
        allowlist = coordinator.allowlist
        wanted = State(state) if state in list(State) else None
        people = allowlist.people(wanted, q[:100], limit=_ROWS + 1, offset=(page - 1) * _ROWS)
        now = time.time()
        return self._site.page(
            request,
            "desk.html",
            visitor,
            said=request.session.pop("said", ""),
            asked=allowlist.people(State.ASKED, limit=_ROWS),
            counts=allowlist.count(),
            people=people[:_ROWS],
            wanted=wanted,
            q=q[:100],
            earlier=_query(q, state, page - 1) if page > 1 else "",
            later=_query(q, state, page + 1) if len(people) > _ROWS else "",
            actions={action: _(_ACTIONS[action]) for action in get_args(Action)},
            states={each: _(text) for each, text in _STATES.items()},
            deeds={action: _(text) for action, text in _DEEDS.items()},
            rules=allowlist.rules(),
            log=allowlist.log(_LOG_ROWS),
            most_reason=MOST_REASON,
            most_words=MOST_WORDS,
            announcements=coordinator.bulletin.announcements(),
            hours=[(each, _length(each)) for each in _HOURS],
            pause=coordinator.bulletin.paused(),
            leases=coordinator.admission.all_leases(),
            places={service: _(text) for service, text in PLACES.items()},
            polls=coordinator.polls.all(),
            new_poll=self._new_poll(now),
            most_title=MOST_TITLE,
            most_question=MOST_QUESTION,
            as_input=_as_input,
            annealed=coordinator.status().annealed,
            annealing=ordered_annealing(coordinator.run),
            now=now,
        )

    # ---- people

    def decide(self, request: Request, visitor: Signed, form: SentForm) -> Response:
        self._check_moderates(visitor)
        action = next((known for known in get_args(Action) if known == form.one("action")), None)
        if action is None:
            raise Refusal(400, _("Nothing was decided"), _("Choose what to do: approve, refuse, suspend or ban."))
        try:
            names = [*form.fields.get("name", []), *parse_names(form.one("names")), *parse_names(form.file)]
            if not names:
                raise Refusal(400, _("Nothing was decided"), _("Tick somebody, paste names, or choose a file."))
            decided = self._site.coordinator.allowlist.decide(names, action, visitor.username, form.one("reason"))
        except MembershipError as error:
            raise Refusal(400, _("Nothing was decided"), as_sentence(error)) from None
        who = ", ".join(f"{each.username} {each.state.sign}" for each in decided[:5])
        if len(decided) > 5:
            who = ngettext("%(who)s and %(num)s more", "%(who)s and %(num)s more", len(decided) - 5, who=who)
        request.session["said"] = _("%(action)s: %(who)s", action=_(_ACTIONS[action]), who=who)
        return self._site.redirect(request, "desk")

    def _end_lease(self, visitor: Visitor, form: Form) -> str:
        name = self._site.coordinator.admission.end_lease(form.one("peer")[:80], visitor.username)
        return _("The place of %(name)s is free.", name=name)

    # ---- the run

    def do(
        self, request: Request, deed: Annotated[str, Path(max_length=40)], visitor: Signed, form: SentForm
    ) -> Response:
        self._check_moderates(visitor)
        act = self._deeds.get(deed)
        if act is None:
            raise Refusal(404, _("Nothing was done"), _("The desk knows no such thing."))
        try:
            request.session["said"] = act(visitor, form)
        except MembershipError as error:
            raise _nothing_done(error) from None
        return self._site.redirect(request, "desk")

    def _announce(self, visitor: Visitor, form: Form) -> str:
        hours = next((each for each in _HOURS if str(each) == form.one("hours")), None)
        if hours is None:
            raise MembershipError(f"an announcement is shown for at most {LONGEST_DAYS} days; choose for how long")
        self._site.coordinator.bulletin.announce(form.one("text"), hours, visitor.username)
        return _("Announced: every page shows it now, every volunteer's console within a minute.")

    def _end_announcement(self, visitor: Visitor, form: Form) -> str:
        self._site.coordinator.bulletin.end(_whole(form.one("id")), visitor.username)
        return _("The announcement is shown no longer.")

    def _pause(self, visitor: Visitor, form: Form) -> str:
        self._site.coordinator.bulletin.pause(form.one("reason"), visitor.username)
        return _("The run is paused: within a minute, all volunteers wait.")

    def _resume(self, visitor: Visitor, form: Form) -> str:
        self._site.coordinator.bulletin.resume(visitor.username)
        return _("The run goes on: within a minute, all volunteers compute again.")

    def anneal(self, request: Request, visitor: Signed, form: SentForm) -> Response:
        """In two steps: the first shows what the order would mean."""
        self._check_moderates(visitor)
        run, allowlist = self._site.coordinator.run, self._site.allowlist
        try:
            if form.one("cancel"):
                cancel_annealing(run)
                allowlist.note(visitor.username, "cancel annealing")
                said = _("The learning rate goes back to its peak with the next round.")
            else:
                plan = plan_annealing(run, _whole(form.one("samples")) if form.one("samples") else None)
                if form.one("confirm") != "yes":
                    return self._site.page(request, "anneal.html", visitor, plan=plan)
                order_annealing(run, plan)
                allowlist.note(visitor.username, "anneal", f"{plan.samples:,} samples")
                said = _("Ordered: annealing begins with the next round.")
        except (OrderError, RunDirectoryError, MembershipError) as error:
            raise _nothing_done(error) from None
        request.session["said"] = said
        return self._site.redirect(request, "desk")

    # ---- polls

    def _make_poll(self, visitor: Visitor, form: Form) -> str:
        polls, slug = self._site.coordinator.polls, form.one("slug")
        poll = polls.make(slug, form.one("title"), form.one("question"), *_times(form), visitor.username)
        return _("“%(title)s” is set up.", title=poll.title)

    def _change_poll(self, visitor: Visitor, form: Form) -> str:
        polls, slug = self._site.coordinator.polls, form.one("slug")
        poll = polls.change(slug, form.one("title"), form.one("question"), *_times(form), visitor.username)
        return _("“%(title)s” is changed.", title=poll.title)

    def _close_poll(self, visitor: Visitor, form: Form) -> str:
        self._site.coordinator.polls.close(form.one("slug"), visitor.username)
        return _("The poll has closed; its result is final.")

    def _new_poll(self, now: float) -> dict[str, object]:
        """What the form for a new poll says before anybody writes into it."""
        is_first = self._site.coordinator.polls.poll(NAME_POLL) is None
        return {
            "slug": NAME_POLL if is_first else "",
            # in English, as all texts are: pages translate it
            "title": noop("The model's name") if is_first else "",
            "question": noop("What shall the model that we train together be called?") if is_first else "",
            "opens": now,
            "closes": now + _POLL_DAYS * 86_400,
        }

    def _check_moderates(self, visitor: Visitor) -> None:
        if not visitor.is_moderator:
            raise Refusal(
                403,
                _("The desk is for moderators"),
                _(
                    "%(name)s is no moderator of this run. Its organizer names them: `kantha members RUN moderator "
                    "NAME`.",
                    name=visitor.username,
                ),
            )


def _nothing_done(error: KanthaError) -> Refusal:
    text = problem_sentence(error) if isinstance(error, PollError) else as_sentence(error)
    return Refusal(400, _("Nothing was done"), text)


def _times(form: Form) -> tuple[float, float]:
    """When a poll opens and closes. Raises `MembershipError`."""
    return _moment(form.one("opens")), _moment(form.one("closes"))


def _moment(text: str) -> float:
    """Of an <input type="datetime-local">, which is said to be in UTC."""
    try:
        then = datetime.datetime.strptime(text[:16], "%Y-%m-%dT%H:%M")
    except ValueError:
        raise MembershipError("a time is given as 2026-11-30T18:00, in UTC; choose one") from None
    return then.replace(tzinfo=datetime.UTC).timestamp()


def _as_input(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M", time.gmtime(seconds))


def _whole(text: str) -> int:
    """Raises `MembershipError`."""
    if not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS):
        raise MembershipError("that is no whole number; give one")
    return int(text)


def _length(hours: int) -> str:
    if hours < 48:
        return ngettext("%(num)s hour", "%(num)s hours", hours)
    return ngettext("%(num)s day", "%(num)s days", hours // 24)


def _query(q: str, state: str, page: int) -> str:
    return "?" + urlencode({"q": q[:100], "state": state, "page": page})
