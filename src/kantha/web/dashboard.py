"""The run's page: `GET /`, complete without JavaScript and live with it, and what its charts ask for."""

import gzip
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

from fastapi import Query, Request, Response
from markupsafe import Markup
from pydantic import BaseModel, Field

from kantha.coordinator.status import BlanksStatus, Guess, HeldoutStatus, RoundStatus, RunStatus
from kantha.errors import StorageError
from kantha.spec import BLANK, RunSpec
from kantha.web import speech
from kantha.web.charts import CURVE_POINTS, LAST_ROUNDS, heldout_columns, make_charts, round_columns, thinned_heldout
from kantha.web.site import Site, headers_of_pages
from kantha.web.speech import gettext as _
from kantha.web.speech import ngettext, noop

SHOWN_ROUNDS = 8
_DAY = 86_400.0  # seconds
_SHORT = 600.0  # seconds; of a run that is younger, the speed of now tells more than its mean
_LATEST = 1.0  # seconds that what changes all the time is kept for all who ask
_SLOW = 10.0  # seconds that the whole curve is kept; who has it asks for what came since
_FOREVER = 1e9  # seconds
_MOST_ROUND = 2**53
_T = TypeVar("_T")

# What volunteers say that they are doing, of which those that we know are translated.
_STATES = {
    noop("loading"),
    noop("training"),
    noop("averaging"),
    noop("catching up"),
    noop("paused"),
}


class Blanks(BaseModel):
    """What the model fills into the blanks of the run's sentences."""

    sentences: list[str] = Field(description=f"Each with one word left blank, written {BLANK}.")
    rounds: list[BlanksStatus] = Field(
        description="Of the newest measured model, and of some earlier ones, oldest first."
    )


@dataclass(frozen=True)
class Progress:
    """How far a run is on the way to its goal."""

    samples: int
    goal: int
    seconds_left: float | None  # None: nobody knows

    @property
    def sentence(self) -> str:
        so_far = {
            "samples": speech.number(self.samples),
            "goal": speech.number(self.goal),
            "share": speech.percent(self.samples / self.goal),
        }
        if self.samples >= self.goal:
            return _("The goal of %(goal)s samples is reached: %(samples)s so far.", **so_far)
        if self.seconds_left is None:
            return _("%(samples)s of %(goal)s samples, which is %(share)s.", **so_far)
        if self.seconds_left < _DAY:
            return _(
                "%(samples)s of %(goal)s samples, which is %(share)s. At this speed the goal is reached in about "
                "%(time)s.",
                time=speech.duration(self.seconds_left),
                **so_far,
            )
        return _(
            "%(samples)s of %(goal)s samples, which is %(share)s. At the speed of the last day the goal is reached in "
            "about %(time)s, on %(day)s.",
            time=speech.duration(self.seconds_left),
            day=speech.day(datetime.fromtimestamp(time.time() + self.seconds_left, UTC).date()),
            **so_far,
        )


@dataclass(frozen=True)
class Saying:
    """One of the run's sentences, and what the model puts into its blank."""

    before: str
    after: str
    guesses: list[Guess]  # now, likeliest first
    earlier: list[tuple[int, str]]  # round, word; oldest first


def add_pages(site: Site) -> None:
    pages = _Pages(site)
    router = site.router()
    router.get("/")(pages.run)
    router.get("/live")(pages.live)
    router.get("/charts")(pages.charts)
    router.get("/chart-data")(pages.chart_data)
    site.app.include_router(router)
    site.app.get("/api/v1/blanks", summary="What the model fills into blanks")(pages.blanks)


class _Pages:
    def __init__(self, site: Site) -> None:
        self._site = site
        self._known: dict[str, Any] = {}  # what was known last, while the database is away

    @property
    def _spec(self) -> RunSpec:
        return self._site.coordinator.run.spec

    def run(self, request: Request) -> Response:
        status = self._site.coordinator.status()
        return self._site.page(
            request,
            "run.html",
            has_charts=True,
            goal=_(self._spec.goal) if self._spec.goal else "",  # that of a preset is translated
            now=status,
            state=_state(status),
            parts=self._parts(status),
        )

    def live(self, request: Request) -> Response:
        """The page's live parts alone, made once for all who look."""
        packed: _Packed = self._site.kept("live", _LATEST, lambda: _Packed(self._live(), "text/html"))
        return packed.answer(request)

    def _live(self) -> str:
        status = self._site.coordinator.status()
        return self._site.render(
            "run_live.html",
            news=self._site.news(),
            now=status,
            state=_state(status),
            parts=self._parts(status),
        )

    def _parts(self, status: RunStatus) -> Markup:
        """What is the same for all who look now."""
        parts: Markup = self._site.kept("run", _LATEST, lambda: Markup(self._make_parts(status)))
        return parts

    def _make_parts(self, status: RunStatus) -> str:
        return self._site.render(
            "run_parts.html",
            spec=self._spec,
            status=status,
            averaging=status.samples_in_round >= status.target_batch_size,
            progress=self._progress(status),
            today=min(status.samples, self._samples_of_a_day()),  # a round may have finished between the two
            last_rounds=status.rounds[: -SHOWN_ROUNDS - 1 : -1],
            sayings=self._sayings(),
            sentence=_sentence,
            heldout_sentence=_heldout_sentence,
            doing=_doing,
            rate=_rate,
        )

    # ---- what the page asks the ledger, at most every so many seconds

    def _kept(self, key: str, seconds: float, make: Callable[[], _T], otherwise: _T) -> _T:
        """What `make` returns now or did a while ago; while the database is away, what was known last."""
        try:
            value: _T = self._site.kept(key, seconds, make)
        except StorageError:  # the shell says so, on every page
            return self._known.get(key, otherwise)
        self._known[key] = value
        return value

    def _curve(self) -> list[RoundStatus]:
        return self._kept("curve", _SLOW, lambda: self._site.coordinator.ledger.curve(CURVE_POINTS), [])

    def _last_rounds(self) -> list[RoundStatus]:
        return self._kept("last rounds", _LATEST, lambda: self._site.coordinator.ledger.last_rounds(LAST_ROUNDS), [])

    def _heldout(self) -> list[HeldoutStatus]:
        return self._kept("heldout", _LATEST, self._site.coordinator.ledger.heldout, [])

    def _filled(self) -> list[BlanksStatus]:
        return self._kept("blanks", _SLOW, self._site.coordinator.ledger.blanks, [])

    def _samples_of_a_day(self) -> int:
        """Up to now, from this time yesterday on."""
        recent: dict[int | None, int] = self._kept(
            "recent", _SLOW, lambda: self._site.coordinator.ledger.recent(_DAY), {}
        )
        return sum(recent.values())

    def _progress(self, status: RunStatus) -> Progress | None:
        goal = status.goal_samples
        if goal is None:
            return None
        curve = self._curve()
        age = time.time() - (curve[0].finished if curve else time.time())
        speed = status.samples_per_second if age < _SHORT else self._samples_of_a_day() / min(age, _DAY)
        return Progress(status.samples, goal, (goal - status.samples) / speed if speed > 0 else None)

    def _sayings(self) -> list[Saying]:
        filled = self._filled()
        sayings = []
        for number, sentence in enumerate(self._spec.evaluation.sentences):
            before, _blank, after = sentence.partition(BLANK)
            words = [(each.round, each.guesses[number]) for each in filled if number < len(each.guesses)]
            earlier = [(at, guesses[0].word) for at, guesses in words[:-1] if guesses]
            sayings.append(Saying(before, after, words[-1][1] if words else [], earlier))
        return sayings

    # ---- what its scripts ask

    def charts(self, request: Request) -> Response:
        """The charts without data, in the language of the request."""
        packed = self._site.kept("charts", _FOREVER, lambda: _Packed(json.dumps(make_charts())))
        return packed.answer(request)

    def chart_data(
        self,
        request: Request,
        after: Annotated[int | None, Query(ge=0, le=_MOST_ROUND)] = None,
        measured: Annotated[int, Query(ge=-1, le=_MOST_ROUND)] = -1,
    ) -> Response:
        """Rounds later than `after` and held-out scores of rounds later than `measured`; all, where that is not among
        the last, or the swarm began anew from before it."""
        last = self._last_rounds()
        if after is None or not last or not last[0].round - 1 <= after <= last[-1].round:
            return self._kept("chart data", _SLOW, lambda: _Packed(self._whole()), _Packed(_data(True, [], []))).answer(
                request
            )
        rounds = [entry for entry in last if entry.round > after]
        heldout = [entry for entry in self._heldout() if entry.round > measured]
        return _Packed(_data(False, rounds, heldout, after)).answer(request)

    def _whole(self) -> str:
        return _data(True, self._curve(), thinned_heldout(self._heldout()))

    def blanks(self) -> Blanks:
        """What the model fills into blanks, now and at some earlier rounds."""
        return Blanks(sentences=list(self._spec.evaluation.sentences), rounds=self._filled())


def _data(whole: bool, rounds: Sequence[RoundStatus], heldout: Sequence[HeldoutStatus], before: int = 0) -> str:
    columns = {"whole": whole, "rounds": round_columns(rounds, before), "heldout": heldout_columns(heldout)}
    return json.dumps(columns, separators=(",", ":"))


class _Packed:
    """An answer that is the same for many, compressed once, where that is worth it."""

    _WORTH = 4096  # bytes

    def __init__(self, text: str, media_type: str = "application/json") -> None:
        self._content, self._media_type = text.encode(), media_type
        self._gzipped = gzip.compress(self._content, 6, mtime=0) if len(self._content) > self._WORTH else None

    def answer(self, request: Request) -> Response:
        headers = headers_of_pages()
        if self._gzipped is not None and "gzip" in request.headers.get("accept-encoding", ""):
            headers |= {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
            return Response(self._gzipped, media_type=self._media_type, headers=headers)
        return Response(self._content, media_type=self._media_type, headers=headers)


# ---- sentences


def _doing(state: str) -> str:
    return _(state) if state in _STATES else state


def _rate(rate: float) -> str:
    """A learning rate, to three significant digits."""
    if not (math.isfinite(rate) and rate > 0):
        return speech.number(rate)
    return speech.digits(f"{rate:.{2 - math.floor(math.log10(rate))}f}".rstrip("0"))


def _state(status: RunStatus) -> str:
    if status.annealed == 1:
        return ngettext(
            "The run is finished, after %(num)s round: its model is annealed. Thank you!",
            "The run is finished, after %(num)s rounds: its model is annealed. Thank you!",
            status.round,
        )
    if status.paused:
        return _("The run is paused, volunteers wait.")
    if not status.volunteers:
        return _("Nobody is helping right now.")
    here = len(status.volunteers)
    if status.annealed is None:
        return ngettext(
            "Round %(round)s is under way with %(num)s volunteer.",
            "Round %(round)s is under way with %(num)s volunteers.",
            here,
            round=speech.number(status.round + 1),
        )
    return ngettext(
        "Round %(round)s is under way with %(num)s volunteer. The annealing is %(share)s done.",
        "Round %(round)s is under way with %(num)s volunteers. The annealing is %(share)s done.",
        here,
        round=speech.number(status.round + 1),
        share=speech.percent(status.annealed),
    )


def _sentence(entry: RoundStatus) -> str:
    facts = [
        ngettext("%(num)s volunteer", "%(num)s volunteers", entry.volunteers),
        ngettext("%(num)s sample", "%(num)s samples", entry.samples),
    ]
    if entry.seconds is not None:
        facts.append(speech.duration(entry.seconds))
    facts.append(_("loss %(loss)s", loss=speech.number(entry.loss, 2)))
    values = {"round": speech.number(entry.round), "facts": ", ".join(facts)}
    if not entry.failed:
        return _("Round %(round)s: %(facts)s", **values)
    if not entry.reason:
        return _("Round %(round)s failed at first and was tried again: %(facts)s", **values)
    return _(
        "Round %(round)s failed at first (%(reason)s) and was tried again: %(facts)s", reason=entry.reason, **values
    )


def _heldout_sentence(heldout: list[HeldoutStatus]) -> str:
    if not heldout:
        return _("Held-out text has not been measured yet.")
    last = heldout[-1]
    return _(
        "Held-out text at round %(round)s: loss %(loss)s; %(words)s of the hidden words guessed right, and %(orders)s "
        "of the sentence orders.",
        round=speech.number(last.round),
        loss=speech.number(last.loss, 2),
        words=speech.percent(last.mlm_accuracy),
        orders=speech.percent(last.sop_accuracy),
    )
