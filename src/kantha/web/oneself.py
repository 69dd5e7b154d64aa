"""How somebody wants to be known, on /me: by which name, in which team; and how to leave for good."""

from collections.abc import Callable
from typing import Any

from fastapi import Request, Response

from kantha.coordinator.allowlist import LEAST_NAME, MOST_NAME, Shown
from kantha.errors import MembershipError
from kantha.web.site import Refusal, SentForm, Signed, Site, Visitor, as_sentence
from kantha.web.speech import gettext as _


def add_pages(site: Site) -> None:
    pages = _Pages(site)
    router = site.router()
    router.post("/me/shown")(pages.show_as)
    router.post("/me/team")(pages.choose_team)
    router.post("/me/forget")(pages.forget)
    site.app.include_router(router)


def of_oneself(site: Site, visitor: Visitor) -> dict[str, Any]:
    """What /me says of how the visitor is known."""
    profile = site.allowlist.profile(visitor.username)
    return {
        "profile": profile,
        "shown": [Shown.NAME, Shown.NICKNAME, Shown.HIDDEN],
        "teams": site.allowlist.teams(),
        "least_name": LEAST_NAME,
        "most_name": MOST_NAME,
        "may_choose_team": site.may_take_part(visitor),
    }


class _Pages:
    def __init__(self, site: Site) -> None:
        self._site = site

    def show_as(self, request: Request, visitor: Signed, form: SentForm) -> Response:
        shown = next((each for each in Shown if each == form.one("shown")), None)
        if shown is None:
            raise Refusal(400, _("Nothing was changed"), _("Choose how to be shown."))
        if shown is Shown.NICKNAME and visitor.standing.may_not:
            raise Refusal(403, _("Nothing was changed"), _("Who is kept out of this run takes no nickname in it."))
        nickname = form.one("nickname") if shown is Shown.NICKNAME else ""
        self._try(lambda: self._site.allowlist.show_as(visitor.username, shown, nickname))
        return self._site.redirect(request, "me#shown")

    def choose_team(self, request: Request, visitor: Signed, form: SentForm) -> Response:
        allowlist, chosen = self._site.allowlist, form.one("team")
        if form.one("action") == "leave":
            self._try(lambda: allowlist.join_team(visitor.username, None))
            return self._site.redirect(request, "me#team")
        if not self._site.may_take_part(visitor):
            raise Refusal(403, _("Teams are for members"), _("When a moderator has let you in, you can choose one."))
        if form.one("action") == "found":
            self._try(lambda: allowlist.found_team(visitor.username, form.one("name")))
        elif chosen.isascii() and chosen.isdecimal() and len(chosen) <= 9:
            self._try(lambda: allowlist.join_team(visitor.username, int(chosen)))
        else:
            raise Refusal(400, _("Nothing was changed"), _("Choose a team, or write down the name of a new one."))
        return self._site.redirect(request, "me#team")

    def forget(self, request: Request, visitor: Signed, form: SentForm) -> Response:
        if form.one("sure") != "yes":
            raise Refusal(
                400,
                _("Nothing was deleted"),
                _("To be deleted for good, tick the box that says so. Nothing brings it back."),
            )
        self._site.coordinator.polls.forget(visitor.number)
        self._site.allowlist.forget(visitor.username)  # last: until then all of it can be asked for again
        request.session.clear()
        return self._site.page(
            request,
            "message.html",
            title=_("You are forgotten"),
            text=_(
                "Your account, names, team, machines and sessions are deleted here, and your machines are no members "
                "any more. What they computed stays in the model and in the totals, under nobody's name. Thank you!"
            ),
            visitor=None,
        )

    def _try(self, change: Callable[[], object]) -> None:
        try:
            change()
        except MembershipError as error:
            raise Refusal(400, _("Nothing was changed"), as_sentence(error)) from None
