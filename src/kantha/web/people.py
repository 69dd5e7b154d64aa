"""The pages about a person: /sign-in, /pair to confirm a machine, /me."""

import re
import secrets
import time

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse
from limits import RateLimitItemPerMinute

from kantha.coordinator.allowlist import Person, State
from kantha.coordinator.limiter import SIGN_INS, Limiter, address_of
from kantha.web import speech
from kantha.web.oneself import of_oneself
from kantha.web.site import Refusal, SentForm, Signed, Site, Visitor, visitor_of
from kantha.web.speech import gettext as _
from kantha.web.speech import noop

_MOST_NAME = 40  # characters, as of `kantha join --name`
_GUESSES = RateLimitItemPerMinute(20)  # pairing codes that one person may look up
# Sign-in leads back to one of these and nowhere else.
_WAYS_BACK = re.compile(
    r"(me|desk|name|join|volunteers(/\d{1,9})?|polls(/[a-z0-9-]{1,40})?|pair(\?code=[A-Za-z0-9-]{1,20})?)?"
)
_STANDINGS = {
    State.NEW: noop("You have not asked to join yet. Ask, and a moderator of the run will answer."),
    State.ASKED: noop("Asked. A moderator of the run answers; a `kantha join` that waits starts when you are in ✅."),
    State.APPROVED: noop("You are in. `kantha join` with the run's link starts on any of your machines."),
    State.REFUSED: noop("A moderator did not let you in: %(reason)s"),
    State.SUSPENDED: noop("A moderator suspended you for now: %(reason)s"),
    State.BANNED: noop("A moderator banned you from this run: %(reason)s"),
}
PLACES = {
    "local": noop("own machine"),
    "kaggle": "Kaggle",
    "colab": "Colab",
    "hosted": noop("hosted notebook"),
}


def add_pages(site: Site) -> None:
    pages = _Pages(site)
    router = site.router()
    router.get("/sign-in")(pages.begin_sign_in)
    router.post("/sign-in")(pages.sign_in_by_name)
    router.get("/sign-in/callback")(pages.finish_sign_in)
    router.post("/sign-out")(pages.sign_out)
    router.get("/pair")(pages.pair)
    router.post("/pair")(pages.confirm)
    router.get("/me")(pages.me)
    router.post("/me")(pages.ask)
    site.app.include_router(router)


class _Pages:
    def __init__(self, site: Site) -> None:
        self._site = site
        self._limiter = Limiter()
        self._callback = f"{site.address}/sign-in/callback"

    # ---- sign-in

    async def begin_sign_in(self, request: Request, to: str = "") -> Response:
        """:param to: the page to come back to"""
        site = self._site
        request.session["to"] = to if _WAYS_BACK.fullmatch(to) else ""
        if site.is_local:
            token = request.session.setdefault("form", secrets.token_urlsafe(24))
            return await run_in_threadpool(site.page, request, "name.html", token=token, most=_MOST_NAME)
        if site.provider is None:
            text = _(
                "Its organizer has not set up sign-in in the browser. On the machine that shall help, `kantha join "
                "%(link)s --token` takes a Hugging Face token of the kind 'Read', which is used once and forgotten.",
                link=site.link,
            )
            organizer = _(
                "For the organizer: make an OAuth application at https://huggingface.co/settings/applications/new with "
                "the scopes openid and profile and the redirect URL %(callback)s, put its client_id and "
                "client_secret into keys/oauth.json in the run's folder (chmod 600), and start `kantha serve` again.",
                callback=self._callback,
            )
            return site.page(
                request, "message.html", status=404, title=_("This run takes tokens only"), text=text, more=organizer
            )
        self._limiter.hit(SIGN_INS, "begin", address_of(request))
        return await site.provider.begin(request, self._callback)

    async def finish_sign_in(self, request: Request) -> Response:
        if self._site.provider is None:
            raise Refusal(404, _("This run takes tokens only"), _("There is no sign-in in the browser here."))
        self._limiter.hit(SIGN_INS, "finish", address_of(request))
        to = request.session.get("to", "")
        person = await self._site.provider.finish(request)
        await run_in_threadpool(self._site.allowlist.sign_in, person)
        self._site.sign_in(request, person.subject)
        return RedirectResponse(f"{self._site.address}/{to}", 303)

    def sign_in_by_name(self, request: Request, form: SentForm) -> Response:
        """In a run without sign-in, where requests of this machine alone get so far: who says a name is believed."""
        if not self._site.is_local:
            raise Refusal(404, _("Sign in with Hugging Face"), _("In this run a name alone is not believed."))
        name = form.one("name")
        if not name or len(name) > _MOST_NAME:
            text = _("A name has 1 to %(most)s characters, in one line.", most=speech.number(_MOST_NAME))
            raise Refusal(400, _("This can be no name"), text)
        standing = self._site.allowlist.sign_in(Person(name, "", "local", ()))
        to = request.session.get("to", "")
        self._site.sign_in(request, standing.username)
        return self._site.redirect(request, to)

    def sign_out(self, request: Request, form: SentForm) -> Response:
        request.session.clear()
        return self._site.redirect(request, "")

    # ---- pairing

    def pair(self, request: Request, code: str = "") -> Response:
        site = self._site
        if site.is_local:
            raise Refusal(404, _("No code is needed here"), _("In this run a machine joins with a name alone."))
        visitor, shown = visitor_of(request), _readable(code)
        if visitor is None:
            # which machine it is, only those hear who have a name: others could try codes out unnoticed
            address = site.sign_in_address(f"pair?code={shown}" if shown else "pair")
            return site.page(request, "pair.html", code=shown, sign_in=address)
        self._check_may_join(visitor)
        if not shown:
            return site.page(request, "pair.html", visitor, is_wrong=bool(code))
        self._limiter.hit(_GUESSES, visitor.username.casefold())
        pairing = site.coordinator.admission.pairing(shown)
        if pairing is None:
            return site.page(request, "pair.html", visitor, 404, is_gone=True, code=shown)
        seconds, place = time.time() - pairing.asked, _(PLACES[pairing.service])
        return site.page(
            request, "pair.html", visitor, code=pairing.code, pairing=pairing, seconds=seconds, place=place
        )

    def confirm(self, request: Request, visitor: Signed, form: SentForm) -> Response:
        if form.one("answer") != "yes":
            raise Refusal(
                200,
                _("Nothing was confirmed"),
                _(
                    "That machine is not let in under your name, and its code ends by itself. If somebody sent you the "
                    "link, tell a moderator of the run."
                ),
            )
        self._check_may_join(visitor)
        self._limiter.hit(_GUESSES, visitor.username.casefold())
        self._site.coordinator.admission.confirm(form.one("code"), visitor.username)
        self._site.allowlist.ask(visitor.username)  # to join is to ask
        return self._site.redirect(request, "me")

    def _check_may_join(self, visitor: Visitor) -> None:
        if visitor.standing.may_not:
            raise Refusal(403, _("You cannot join this run"), self._sentence(visitor))

    # ---- oneself

    def me(self, request: Request, visitor: Signed) -> Response:
        site = self._site
        return site.page(
            request,
            "me.html",
            visitor,
            standing=visitor.standing,
            sentence=self._sentence(visitor),
            machines=[
                (instance.label or _(PLACES[instance.service]), instance.since)
                for instance in site.coordinator.admission.leases(visitor.username)
            ],
            now=time.time(),
            link=site.link,
            **of_oneself(site, visitor),
        )

    def ask(self, request: Request, visitor: Signed, form: SentForm) -> Response:
        self._site.allowlist.ask(visitor.username)
        return self._site.redirect(request, "me")

    def _sentence(self, visitor: Visitor) -> str:
        """Where this person stands, and what happens next."""
        standing = visitor.standing
        if self._site.may_take_part(visitor):
            return f"{State.APPROVED.sign} {_(_STANDINGS[State.APPROVED])}"
        return f"{standing.state.sign} {_(_STANDINGS[standing.state], reason=standing.reason)}".strip()


def _readable(code: str) -> str:
    """A pairing code as terminals show it, of what a person may have typed; empty: it can be none."""
    letters = "".join(letter for letter in code[:40].upper() if letter.isalnum() and letter.isascii())
    return f"{letters[:4]}-{letters[4:]}" if len(letters) == 8 else ""
