"""The run's page: `GET /`, complete without JavaScript and live with it; everything it loads comes from this server.

people.py has the pages about persons, in the same cloth.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bokeh.embed import json_item
from bokeh.models import AjaxDataSource, BasicTicker, CDSView, DataRange1d, GroupFilter, HoverTool
from bokeh.plotting import figure
from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from fastapi.templating import Jinja2Templates

from kantha.coordinator.status import HeldoutStatus, RoundStatus, RunStatus
from kantha.web.site import NO_KEEPING, load_assets

SHOWN_ROUNDS = 8
CHART_POLL_MILLISECONDS = 2000
# Of a long run the chart shows the last rounds and a choice of the earlier ones, so that it stays about as large.
CHART_LAST_ROUNDS = 200
CHART_EARLIER_ROUNDS = 800
CHART_HELDOUT_ROUNDS = 150  # about as many rings as still look like rings

# Bokeh styles its shadow roots with <style> elements that can carry neither a nonce nor a hash known beforehand, so
# style elements have to be allowed; style attributes, inline scripts, eval and every other host are not.
CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self'",
        "style-src 'self' 'unsafe-inline'",
        "style-src-attr 'none'",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)

_HERE = Path(__file__).parent
# The curves in colours that keep a contrast of 3:1 to both the light and the dark cloth; page.css colours the rest.
_INDIGO, _LEAF, _TURMERIC, _MADDER = "#5870c4", "#4c8a62", "#a9741f", "#c8453f"
_PATCH = "#fffcf5"


@dataclass(frozen=True)
class Invitation:
    """What the run's page says to one who looks at it, in a run that people sign in to."""

    link: str  # of the run, with its key: what `kantha join` takes
    sign_in: str  # address
    username: str = ""  # empty: signed out
    sign: str = ""  # ⏳, ✅ …; empty: has not asked
    state: str = ""  # the same in a word


def page_router(
    get_status: Callable[[], RunStatus], get_invitation: Callable[[Request], Invitation | None] | None = None
) -> APIRouter:
    """The routes of the run's page; both are called once for each request, in a worker thread.

    The page's script also polls `api/v1/status`, which the application serves next to this router.

    :param get_invitation: None in a run of local identities
    """
    names, assets = load_assets()
    chart = json_item(_chart(), "chart")
    templates = make_templates()
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    def page(request: Request) -> Response:
        status = get_status()
        return templates.TemplateResponse(
            request,
            "run.html",
            {
                "status": status,
                "last_rounds": status.rounds[: -SHOWN_ROUNDS - 1 : -1],
                "shown_rounds": SHOWN_ROUNDS,
                "assets": names,
                "chart": chart,
                "invitation": get_invitation(request) if get_invitation is not None else None,
            },
            headers={
                "Content-Security-Policy": CONTENT_SECURITY_POLICY,
                "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer",
                **NO_KEEPING,
            },
        )

    @router.get("/chart-data")
    def chart_data() -> Response:
        return JSONResponse(_columns(_thinned(get_status().rounds)), headers=NO_KEEPING)

    @router.get("/heldout-data")
    def heldout_data() -> Response:
        return JSONResponse(_heldout_columns(get_status().heldout), headers=NO_KEEPING)

    @router.get("/static/{file}")
    def static(file: str, request: Request) -> Response:
        asset = assets.get(file)
        if asset is None:
            raise HTTPException(404)
        headers = {
            # The names carry a version or a digest: what is behind one never changes.
            "Cache-Control": "public, max-age=31536000, immutable",
            "Vary": "Accept-Encoding",
            "X-Content-Type-Options": "nosniff",
        }
        if "gzip" in request.headers.get("accept-encoding", ""):
            return Response(asset.gzipped, media_type=asset.media_type, headers=headers | {"Content-Encoding": "gzip"})
        return Response(asset.content, media_type=asset.media_type, headers=headers)

    return router


def make_templates() -> Jinja2Templates:
    """The templates, with what writes numbers and times in them."""
    templates = Jinja2Templates(_HERE / "templates")
    templates.env.filters.update(
        number=_number,
        percent=_percent,
        duration=_duration,
        ago=_ago,
        many=_many,
        sentence=_sentence,
        heldout_sentence=_heldout_sentence,
        state=_state,
    )
    # Bokeh's documents refer back to models earlier in them, so `tojson` must leave the order alone.
    templates.env.policies["json.dumps_kwargs"] = {"sort_keys": False}
    return templates


def _chart() -> figure:
    """The loss curves; their data come from `/chart-data` and `/heldout-data`, again and again, by Bokeh's polling."""
    source, heldout = (
        AjaxDataSource(
            name=name,
            data_url=url,
            method="GET",
            mode="replace",
            polling_interval=CHART_POLL_MILLISECONDS,
            data=columns,
        )
        for name, url, columns in [
            ("rounds", "chart-data", _columns([])),
            ("heldout", "heldout-data", _heldout_columns([])),
        ]
    )
    plot = figure(
        name="loss",
        height=340,
        sizing_mode="stretch_width",
        y_range=DataRange1d(only_visible=True, range_padding=0.08),
        x_axis_label="round",
        y_axis_label="loss",
        toolbar_location=None,
        tools="",
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        min_border_right=12,
    )
    # The total is sewn: a running stitch over a faint thread, which keeps the line whole where rounds are close.
    # page.js shows a renderer where all words of its name are ticked. One hover tool a curve, since a hidden curve
    # answers none.
    plot.line("round", "loss", source=source, name="total", color=_INDIGO, width=3.5, dash=[11, 7], line_cap="round")
    total = plot.line("round", "loss", source=source, name="total", color=_INDIGO, width=2, alpha=0.45)
    words = plot.line("round", "mlm_loss", source=source, name="words", color=_LEAF, width=2, visible=False)
    order = plot.line("round", "sop_loss", source=source, name="order", color=_TURMERIC, width=2, visible=False)
    plot.scatter(
        "round",
        "loss",
        source=source,
        view=CDSView(filter=GroupFilter(column_name="outcome", group="failed")),
        name="total",
        marker="x",
        size=12,
        color=_MADDER,
        line_width=3,
    )
    for line, side, tooltip in [
        (
            total,
            "right",
            "<strong>Round @round</strong> (@outcome)<br>loss @loss{0.00}<br>samples @samples{0,0}<br>"
            "volunteers @volunteers",
        ),
        (words, "left", "Round @round<br>hidden words @mlm_loss{0.00}"),
        (order, "right", "Round @round<br>sentence order @sop_loss{0.00}"),
    ]:
        hover = HoverTool(renderers=[line], mode="vline", line_policy="nearest", attachment=side, tooltips=tooltip)
        plot.add_tools(hover)
    # The same three sums on held-out text, in the same colours: rings, since they are measured at checkpoints only.
    for name, loss, color, share, tooltip in [
        ("total", "loss", _INDIGO, None, "loss @loss{0.00}"),
        ("words", "mlm_loss", _LEAF, "mlm_accuracy", "hidden words @mlm_loss{0.00}"),
        ("order", "sop_loss", _TURMERIC, "sop_accuracy", "sentence order @sop_loss{0.00}"),
    ]:
        look = {"name": f"{name} heldout", "visible": name == "total", "line_color": color}
        plot.line("round", loss, source=heldout, line_width=1, line_alpha=0.7, **look)
        rings = plot.scatter("round", loss, source=heldout, size=9, line_width=2.5, fill_color=_PATCH, **look)
        right = f"<br>@{share}{{0.0 %}} guessed right" if share else ""
        text = f"<strong>Held-out text</strong>, round @round<br>{tooltip}{right}"
        plot.add_tools(HoverTool(renderers=[rings], mode="mouse", attachment="below", tooltips=text))
    plot.xaxis.ticker = BasicTicker(min_interval=1)
    plot.xaxis.formatter.use_scientific = False
    plot.xgrid.visible = False
    plot.axis.axis_label_text_font_style = "normal"
    plot.axis.axis_line_color = None
    plot.axis.major_tick_line_color = None
    plot.axis.minor_tick_line_color = None
    return plot


def _thinned(rounds: list[RoundStatus]) -> list[RoundStatus]:
    """All of the last rounds, and of the earlier ones one in every so many: a failed one where there is any."""
    earlier, last = rounds[:-CHART_LAST_ROUNDS], rounds[-CHART_LAST_ROUNDS:]
    step = max(1, math.ceil(len(earlier) / CHART_EARLIER_ROUNDS))
    chunks = (earlier[start : start + step] for start in range(0, len(earlier), step))
    return [next((entry for entry in chunk if entry.failed), chunk[0]) for chunk in chunks] + last


def _columns(rounds: list[RoundStatus]) -> dict[str, list[Any]]:
    # A loss that nobody reported cannot be drawn; one that is not a number cannot be written as JSON either.
    drawn = [
        r for r in rounds if all(loss is not None and math.isfinite(loss) for loss in (r.loss, r.mlm_loss, r.sop_loss))
    ]
    return {
        "round": [r.round for r in drawn],
        "loss": [r.loss for r in drawn],
        "mlm_loss": [r.mlm_loss for r in drawn],
        "sop_loss": [r.sop_loss for r in drawn],
        "samples": [r.samples for r in drawn],
        "volunteers": [r.volunteers for r in drawn],
        "outcome": ["failed" if r.failed else "complete" for r in drawn],
    }


def _heldout_columns(heldout: list[HeldoutStatus]) -> dict[str, list[Any]]:
    """All there is, or one in every so many and the last one."""
    step = max(1, math.ceil(len(heldout) / CHART_HELDOUT_ROUNDS))
    drawn = heldout[::-step][::-1]
    return {
        name: [getattr(entry, name) for entry in drawn]
        for name in ("round", "loss", "mlm_loss", "mlm_accuracy", "sop_loss", "sop_accuracy")
    }


# The words and numbers of the page. static/page.js writes the same ones when it updates; tests/web keeps them in step.


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{_number(100 * share, 1)} %"


def _duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _ago(seconds: float) -> str:
    return "just now" if seconds < 2 else f"{_duration(seconds)} ago"


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _state(status: RunStatus) -> str:
    if status.annealed == 1:
        return f"The run is finished, after {_many(status.round, 'round')}: its model is annealed. Thank you!"
    if not status.volunteers:
        return "Nobody is helping right now."
    annealing = "" if status.annealed is None else f" The annealing is {_percent(status.annealed)} done."
    helping = _many(len(status.volunteers), "volunteer")
    return f"Round {_number(status.round + 1)} is under way with {helping}.{annealing}"


def _sentence(entry: RoundStatus) -> str:
    facts = f"{_many(entry.volunteers, 'volunteer')}, {_many(entry.samples, 'sample')}, loss {_number(entry.loss, 2)}"
    if entry.failed:
        why = f" ({entry.reason})" if entry.reason else ""
        return f"Round {entry.round} failed at first{why} and was tried again: {facts}"
    return f"Round {entry.round}: {facts}"


def _heldout_sentence(heldout: list[HeldoutStatus]) -> str:
    if not heldout:
        return "Held-out text has not been measured yet."
    last = heldout[-1]
    return (
        f"Held-out text at round {_number(last.round)}: loss {_number(last.loss, 2)}; {_percent(last.mlm_accuracy)} of "
        f"the hidden words guessed right, and {_percent(last.sop_accuracy)} of the sentence orders."
    )
