"""For the rest of the world: metrics, exports of the ledger, badges, a feed of milestones, and the API's own pages."""

import csv
import io
import itertools
import json
import math
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, Literal

from fastapi import Depends, Request, Response
from fastapi.responses import StreamingResponse
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel, Field

from kantha import __version__
from kantha.coordinator.ledger import Activity
from kantha.coordinator.limiter import EXPORTS, Limiter, address_of, is_local
from kantha.coordinator.milestones import Milestone
from kantha.coordinator.service import Coordinator
from kantha.coordinator.status import RunStatus
from kantha.web import speech
from kantha.web.api_docs import read_schema
from kantha.web.site import Site
from kantha.web.speech import gettext as _

BADGE_SECONDS = 300  # that a badge, or the feed, may be kept by whoever shows it
MOST_MILESTONES = 200  # that are told at once
_PORTION = 500  # rows of an export that are written at once
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would compute instead of showing
_Form = Literal["csv", "json"]
_TYPES: dict[_Form, str] = {"csv": "text/csv; charset=utf-8", "json": "application/json"}
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SHARED = {"Cache-Control": f"public, max-age={BADGE_SECONDS}", "Cross-Origin-Resource-Policy": "cross-origin"}


class MilestoneStatus(BaseModel):
    """Something that the community reached."""

    key: str = Field(description="Names this milestone for ever.")
    kind: str = Field(description="round, goal, samples, people, loss, record, annealing, finished, poll opened, …")
    number: int = Field(description="What was reached: percent of the goal, samples, people, a loss; 0: no number.")
    round: int | None = Field(description="The round in which it was reached; null: it was in none.")
    time: float = Field(description="When it was reached, seconds since 1970.")
    sentence: str = Field(description="The same for people, in the language of the request.")


class PersonExport(BaseModel):
    """What one person did in the whole run; the last one is all who are not shown, together."""

    number: int | None = Field(description="The person's number, as in addresses of pages; null: those not shown.")
    name: str | None = Field(description="As that person wants to be called; null: those not shown.")
    people: int = Field(description="How many people these figures are of: 1, but for those not shown.")
    samples: int = Field(description="Examples that went into finished rounds.")
    seconds: float = Field(description="Spent computing, of all their machines together.")
    rounds: int = Field(description="Rounds with samples, of each of their machines.")
    last_day: str = Field(description="The last day (UTC) on which they computed, as 2026-06-07.")


def add_pages(site: Site) -> None:
    world = _World(site)
    router = site.router()
    router.get("/milestones")(world.milestones_page)
    router.get("/api/docs")(world.api_page)
    site.app.include_router(router)

    app = site.app
    app.get("/metrics", include_in_schema=False)(world.metrics)
    app.get("/feed.atom", include_in_schema=False)(world.feed)
    app.get("/badge/{name}.svg", include_in_schema=False)(world.badge)
    app.get("/api/v1/milestones", summary="Milestones, the newest first")(world.milestones)
    for form, kind in _TYPES.items():
        answers: dict[int | str, dict[str, Any]] = {
            200: {"content": {kind.partition(";")[0]: {}}, "description": "Written while it is sent."},
            429: {"description": "So many exports were made in the last minute; Retry-After says when to come again."},
        }
        for table, make, summary in (
            ("rounds", world.export_rounds, "All finished rounds, the first one first"),
            ("volunteers", world.export_volunteers, "What each person did, most samples first"),
        ):
            app.get(
                f"/api/v1/export/{table}.{form}",
                summary=f"{summary}, as {form.upper()}",
                operation_id=f"export_{table}_{form}",
                response_class=StreamingResponse,
                responses=answers,
                dependencies=[Depends(world.may_export)],
            )(make(form))


class _World:
    def __init__(self, site: Site) -> None:
        self._site = site
        self._limiter = Limiter()
        self._processes = ProcessCollector(registry=None)

    @property
    def _coordinator(self) -> Coordinator:
        return self._site.coordinator

    # ---- metrics

    def metrics(self) -> Response:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Figures(self._coordinator))
        registry.register(self._processes)
        return Response(generate_latest(registry), media_type=_METRICS_TYPE)

    # ---- exports

    def may_export(self, request: Request) -> None:
        if not is_local(request):
            self._limiter.hit(EXPORTS, "export", address_of(request))

    def export_rounds(self, form: _Form) -> Callable[[], Response]:
        def export() -> Response:
            """Each round added up over its volunteers' reports; no person is in it."""
            return _stream((entry.model_dump() for entry in self._coordinator.ledger.export_rounds()), "rounds", form)

        return export

    def export_volunteers(self, form: _Form) -> Callable[[], Response]:
        def export() -> Response:
            """People are named as they want to be; those who want to be shown to nobody are one row, so that the
            totals are right."""
            return _stream((person.model_dump() for person in self._people()), "volunteers", form)

        return export

    def _people(self) -> list[PersonExport]:
        names = self._coordinator.allowlist.shown()
        shown: list[Activity] = []
        others: list[Activity] = []
        for each in self._coordinator.ledger.contributors():
            (shown if each.person in names else others).append(each)
        people = [
            PersonExport(
                number=each.person,
                name=names[each.person],
                people=1,
                samples=each.samples,
                seconds=each.seconds,
                rounds=each.rounds,
                last_day=each.day.isoformat(),
            )
            for each in shown
            if each.person is not None
        ]
        if others:
            people.append(
                PersonExport(
                    number=None,
                    name=None,
                    people=len(others),
                    samples=sum(each.samples for each in others),
                    seconds=sum(each.seconds for each in others),
                    rounds=sum(each.rounds for each in others),
                    last_day=max(each.day for each in others).isoformat(),
                )
            )
        return people

    # ---- badges

    def badge(self, name: Literal["samples", "volunteers", "loss", "round"]) -> Response:
        content = self._site.kept(f"badge {name}", 10, lambda: self._make_badge(name))
        return Response(content, media_type="image/svg+xml", headers=_SHARED)

    def _make_badge(self, name: str) -> bytes:
        status = self._coordinator.status()
        if name == "samples":
            return _badge(_("samples"), speech.number(status.samples))
        if name == "volunteers":
            here = len({volunteer.name for volunteer in status.volunteers})
            people = self._coordinator.ledger.totals().people
            return _badge(
                _("volunteers"),
                _("%(people)s, %(here)s now", people=speech.number(people), here=speech.number(here)),
            )
        if name == "loss":
            curve = status.heldout or status.rounds
            return _badge(_("loss"), speech.number(curve[-1].loss if curve else None, 2))
        return _badge(_("rounds"), speech.number(status.round))

    # ---- milestones

    def milestones(self) -> list[MilestoneStatus]:
        """First round, parts of the goal, powers of ten of samples, people, whole numbers of the held-out loss, best
        days, annealing, polls."""
        return [
            MilestoneStatus(
                key=each.key,
                kind=each.kind,
                number=each.number,
                round=each.round,
                time=each.time,
                sentence=_sentence(each),
            )
            for each in self._coordinator.milestones.newest(MOST_MILESTONES)
        ]

    def milestones_page(self, request: Request) -> Response:
        newest = self._coordinator.milestones.newest(MOST_MILESTONES)
        return self._site.page(
            request,
            "milestones.html",
            milestones=[(_sentence(each), each) for each in newest],
            address=self._site.address,
            badges=("round", "samples", "volunteers", "loss"),
        )

    def feed(self) -> Response:
        run, address = self._coordinator.run.spec, self._site.address
        newest = self._coordinator.milestones.newest(MOST_MILESTONES)
        ET.register_namespace("", _ATOM)
        feed = ET.Element(f"{{{_ATOM}}}feed", {"xml:lang": speech.language()})
        _add(feed, "id", _urn(run.fingerprint, ""))
        _add(feed, "title", _("Milestones of %(run)s", run=run.name))
        _add(feed, "updated", _iso(newest[0].time if newest else 0.0))
        _add(feed, "link", rel="self", href=f"{address}/feed.atom")
        _add(feed, "link", rel="alternate", href=f"{address}/milestones")
        _add(_add(feed, "author"), "name", run.name)
        for each in newest:
            entry = _add(feed, "entry")
            _add(entry, "id", _urn(run.fingerprint, each.key))
            _add(entry, "title", _sentence(each))
            _add(entry, "updated", _iso(each.time))
            _add(entry, "link", rel="alternate", href=f"{address}/milestones")
            _add(entry, "content", _sentence(each), type="text")
        content = ET.tostring(feed, encoding="utf-8", xml_declaration=True)
        return Response(content, media_type="application/atom+xml", headers=_SHARED)

    # ---- the API

    def api_page(self, request: Request) -> Response:
        return self._site.page(request, "api.html", api=read_schema(self._site.app.openapi()))


class _Figures(Collector):
    """The run's figures, as of now."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def collect(self) -> Iterator[Metric]:
        status, totals = self._coordinator.status(), self._coordinator.ledger.totals()
        yield InfoMetricFamily(
            "kantha_run",
            "The run that is served",
            {"name": status.name, "fingerprint": status.fingerprint, "version": __version__},
        )
        for name, help_, value in (
            ("rounds", "Finished rounds of the ledger", totals.rounds),
            ("samples", "Samples in all finished rounds", totals.samples),
            ("failed_rounds", "Finished rounds that had to be tried again", totals.failed),
            ("computing_seconds", "Seconds that volunteers computed", totals.seconds),
            ("waiting_seconds", "Seconds that volunteers were there and did not compute", totals.waited),
        ):
            yield CounterMetricFamily(f"kantha_{name}", help_, value)
        for name, help_, number in self._gauges(status, totals.people):
            if number is not None and math.isfinite(number):
                yield GaugeMetricFamily(f"kantha_{name}", help_, number)
        yield self._losses(status)

    def _gauges(self, status: RunStatus, people: int) -> Iterator[tuple[str, str, float | None]]:
        yield "round", "Finished rounds of the swarm", status.round
        yield "people", "People with samples in a finished round", people
        yield "volunteers", "Peers that compute now", len(status.volunteers)
        yield "samples_per_second", "What the present volunteers compute together", status.samples_per_second
        yield "round_samples", "Samples towards the running round", status.samples_in_round
        yield "round_target_samples", "Samples that make the running round", status.target_batch_size
        yield "learning_rate", "Of the step that ends the running round", status.learning_rate
        yield "checkpoint_round", "Round of the newest checkpoint", status.checkpoint_round
        yield "annealed_ratio", "Share of the annealing that is done", status.annealed
        yield "goal_samples", "Samples that the run means to reach", self._coordinator.run.spec.schedule.goal_samples
        yield "paused", "1 while the moderators pause the run", float(bool(status.paused))
        yield "problem", "1 while the coordinator says that something is wrong", float(bool(status.problem))
        if status.rounds:
            yield "last_round_timestamp_seconds", "When the last round was finished", status.rounds[-1].finished

    @staticmethod
    def _losses(status: RunStatus) -> Metric:
        family = GaugeMetricFamily("kantha_loss", "Newest loss, nats", labels=("text", "task"))
        for text, curve in (("training", status.rounds), ("heldout", status.heldout)):
            for task, name in (("both", "loss"), ("masked tokens", "mlm_loss"), ("sentence order", "sop_loss")):
                loss = getattr(curve[-1], name) if curve else None
                if loss is not None and math.isfinite(loss):
                    family.add_metric((text, task), loss)
        return family


def _sentence(milestone: Milestone) -> str:
    return milestone.sentence(_, speech.number)


# ---- writing


def _stream(rows: Iterable[dict[str, Any]], name: str, form: _Form) -> Response:
    """What the ledger cannot read is raised now, as long as it can be answered."""
    parts = (_csv_parts if form == "csv" else _json_parts)(iter(rows))
    first = next(parts)
    return StreamingResponse(
        itertools.chain([first], parts),
        media_type=_TYPES[form],
        headers={"Content-Disposition": f'attachment; filename="{name}.{form}"'},
    )


def _portions(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while some := [_finite(row) for row in itertools.islice(rows, _PORTION)]:
        yield some


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no other numbers."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


def _csv_parts(rows: Iterator[dict[str, Any]]) -> Iterator[str]:
    out = io.StringIO()
    writer = None
    for some in _portions(rows):
        if writer is None:
            writer = csv.DictWriter(out, list(some[0]))
            writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in some)
        yield out.getvalue()
        out.seek(0)
        out.truncate()
    if writer is None:
        yield ""


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _json_parts(rows: Iterator[dict[str, Any]]) -> Iterator[str]:
    before = "["
    for some in _portions(rows):
        yield before + ",\n".join(json.dumps(row, ensure_ascii=False) for row in some)
        before = ",\n"
    yield "[]" if before == "[" else "]"


_SVG = "http://www.w3.org/2000/svg"
_ATOM = "http://www.w3.org/2005/Atom"
_LETTER = 7.5  # width in pixels, with room to spare
_PADDING = 9


def _badge(label: str, value: str) -> bytes:
    """Two patches with a word on each, in colours that have a contrast of 7:1 to white and more."""
    left, right = (round(len(text) * _LETTER + 2 * _PADDING) for text in (label, value))
    svg = ET.Element(
        "svg",
        {"xmlns": _SVG, "width": str(left + right), "height": "20", "role": "img", "aria-label": f"{label}: {value}"},
    )
    ET.SubElement(svg, "title").text = f"{label}: {value}"
    for start, width, colour in ((0, left, "#23253a"), (left, right, "#2f3f86")):
        ET.SubElement(svg, "rect", x=str(start), width=str(width), height="20", fill=colour)
    text = ET.SubElement(
        svg,
        "g",
        {"fill": "#ffffff", "text-anchor": "middle", "font-family": "Verdana,Geneva,sans-serif", "font-size": "11"},
    )
    for middle, word in ((left / 2, label), (left + right / 2, value)):
        ET.SubElement(text, "text", x=f"{middle:g}", y="14").text = word
    return ET.tostring(svg, encoding="utf-8")


def _add(parent: ET.Element, name: str, text: str | None = None, **attributes: str) -> ET.Element:
    child = ET.SubElement(parent, f"{{{_ATOM}}}{name}", attributes)
    child.text = text
    return child


def _urn(fingerprint: str, key: str) -> str:
    """The same for the same milestone of the same run, wherever it is served."""
    return uuid.uuid5(uuid.NAMESPACE_OID, f"{fingerprint} {key}").urn


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
