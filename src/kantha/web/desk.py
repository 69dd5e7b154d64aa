"""The moderators' desk."""

import time
from typing import Annotated, get_args
from urllib.parse import urlencode

from fastapi import Query, Request, Response

from kantha.coordinator.allowlist import MOST_REASON, Action, State, parse_names
from kantha.errors import MembershipError
from kantha.web.site import Refusal, SentForm, Signed, Site, Visitor, as_sentence
from kantha.web.speech import gettext as _

_ROWS = 50  # people on one page of the desk
_LOG_ROWS = 100


def add_pages(site: Site) -> None:
    pages = _Desk(site)
    router = site.router()
    router.get("/desk")(pages.desk)
    router.post("/desk")(pages.decide)
    site.app.include_router(router)


class _Desk:
    def __init__(self, site: Site) -> None:
        self._site = site

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
        allowlist = self._site.coordinator.allowlist
        wanted = State(state) if state in list(State) else None
        people = allowlist.people(wanted, q[:100], limit=_ROWS + 1, offset=(page - 1) * _ROWS)
        asked = allowlist.people(State.ASKED, limit=_ROWS)
        counts = allowlist.count()
        return self._site.page(
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
            raise Refusal(400, _("Nothing was decided"), _("Choose what to do: approve, refuse, suspend or ban."))
        try:
            names = [*form.fields.get("name", []), *parse_names(form.one("names")), *parse_names(form.file)]
            if not names:
                raise MembershipError("tick somebody, paste names, or choose a file")
            decided = self._site.coordinator.allowlist.decide(names, action, visitor.username, form.one("reason"))
        except MembershipError as error:
            raise Refusal(400, _("Nothing was decided"), as_sentence(error)) from None
        who = ", ".join(f"{each.username} {each.state.sign}" for each in decided[:5])
        more = f" and {len(decided) - 5:,} more" if len(decided) > 5 else ""
        request.session["said"] = f"{action}: {who}{more}"
        return self._site.redirect(request, "desk")

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


def _query(q: str, state: str, page: int) -> str:
    return "?" + urlencode({"q": q[:100], "state": state, "page": page})
