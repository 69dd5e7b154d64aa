"""`/join`: the two steps for each place where a volunteer can run, what to expect there, and where one stands."""

from dataclasses import dataclass
from datetime import date

from fastapi import Request, Response

from kantha.coordinator.allowlist import State
from kantha.spec import Service
from kantha.web.site import Site, Visitor, visitor_of
from kantha.web.speech import gettext as _
from kantha.web.speech import noop

_INSTALL = "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e ."
_NAMES: dict[Service, str] = {
    "local": noop("Your own machine"),
    "kaggle": "Kaggle",
    "colab": "Colab",
    "hosted": noop("Another hosted notebook"),
}
_EXPECT: dict[Service, str] = {
    "local": noop(
        "Linux on an x86-64 processor, or WSL2 on Windows, with Python 3.11 to 3.13. A processor helps, a GPU helps "
        "much more. It computes as long as the command runs; Ctrl-C leaves, and what was computed is handed in."
    ),
    "kaggle": noop(
        "A notebook in the browser, with a GPU that Kaggle lends. Nothing is installed on your own machine, and when "
        "the session ends, the others go on."
    ),
    "colab": noop(
        "A notebook in the browser, with a GPU that Google lends. Nothing is installed on your own machine, and when "
        "the session ends, the others go on."
    ),
    "hosted": noop(
        "Any other notebook or server with Linux on x86-64 and Python 3.11 to 3.13 that you may use for this."
    ),
}
_STANDINGS = {
    State.NEW: noop("You have not asked yet. Ask now, or just start: to join is to ask."),
    State.ASKED: noop("You have asked. A moderator answers, and a `kantha join` that waits goes on by itself."),
    State.APPROVED: noop("You are in: the second step starts at once, on any of your machines."),
    State.REFUSED: noop("A moderator did not let you in: %(reason)s"),
    State.SUSPENDED: noop("A moderator suspended you for now: %(reason)s"),
    State.BANNED: noop("A moderator banned you from this run: %(reason)s"),
}


@dataclass(frozen=True)
class Way:
    """One place to run at."""

    service: Service
    name: str
    expect: str
    rules: str  # empty: nothing to say
    checked: date | None  # when somebody looked the rules up
    machines: int  # at once, of one volunteer
    is_notebook: bool


def add_pages(site: Site) -> None:
    router = site.router()

    def join(request: Request) -> Response:
        visitor = visitor_of(request)
        command = f"kantha join {site.link}"
        if site.is_local:
            command += f" --name {visitor.username if visitor else 'YOUR-NAME'}"
        return site.page(
            request,
            "join.html",
            visitor,
            ways=_ways(site),
            install=_INSTALL,
            command=command,
            standing=_standing(site, visitor),
        )

    router.get("/join")(join)
    site.app.include_router(router)


def _ways(site: Site) -> list[Way]:
    return [
        Way(
            service=service,
            name=_(_NAMES[service]),
            expect=_(_EXPECT[service]),
            rules=_(spec.rules) if spec.rules else "",  # those of the presets are translated
            checked=spec.checked,
            machines=spec.max_instances,
            is_notebook=service != "local",
        )
        for service in _NAMES
        if (spec := site.coordinator.run.spec.services.get(service)) is not None
        # without sign-in, volunteers on this machine alone are let in
        and (service == "local" or not site.is_local)
    ]


def _standing(site: Site, visitor: Visitor | None) -> str:
    """A sign, and where this person stands; empty: nobody is signed in."""
    if visitor is None:
        return ""
    state = State.APPROVED if site.may_take_part(visitor) else visitor.standing.state
    return f"{state.sign} {_(_STANDINGS[state], reason=visitor.standing.reason)}".strip()
