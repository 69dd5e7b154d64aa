"""The run's charts: Bokeh models without data, and the data that `static/charts.js` fetches for them.

All charts share one source of rounds and one range of rounds, so that who zooms into one sees the same rounds in all.
The script puts numbers into the source, and texts in the reader's digits beside them, which the tooltips show.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from bokeh.document import Document
from bokeh.models import (
    BasicTicker,
    BoxAnnotation,
    BoxZoomTool,
    CDSView,
    ColumnDataSource,
    DataRange1d,
    GroupFilter,
    HoverTool,
    LinearScale,
    LogScale,
    LogTicker,
    PanTool,
    Range1d,
    WheelZoomTool,
)
from bokeh.plotting import figure

from kantha.coordinator.status import HeldoutStatus, RoundStatus
from kantha.web.speech import gettext as _

LAST_ROUNDS = 200  # each by itself; of the earlier ones the charts show a choice, so that they stay about as large
CURVE_POINTS = 1000
HELDOUT_POINTS = 150  # about as many rings as still look like rings

# In colours that keep a contrast of 3:1 to both the light and the dark cloth; page.css colours the rest.
_INDIGO, _LEAF, _TURMERIC, _MADDER = "#5870c4", "#4c8a62", "#a9741f", "#c8453f"
_PATCH = "#fffcf5"
_FAINT = 0.4  # alpha of what was measured round by round, behind its smoothed line
_COLUMNS = (
    ("round", None),
    ("samples", None),
    ("loss", 4),
    ("mlm_loss", 4),
    ("sop_loss", 4),
    ("volunteers", None),
    ("speed", 2),
    ("learning_rate", 10),
    ("computing", 4),
    ("finished", 0),
    ("failed", None),
)
_SMOOTHED = ("loss", "mlm_loss", "sop_loss", "speed", "computing")
_HELDOUT_COLUMNS = ("round", "loss", "mlm_loss", "mlm_accuracy", "sop_loss", "sop_accuracy")


def make_charts() -> dict[str, Any]:
    """The charts, in the language of the request: what `Bokeh.embed.embed_items` takes, as `docs` and `items`.

    They go into the elements `chart-loss`, `chart-speed`, `chart-volunteers`, `chart-rate` and `chart-computing`.
    """
    names = [name for name, _digits in _COLUMNS]
    texts = [f"{name}_text" for name in names]
    smoothed = [f"{name}_smooth" for name in _SMOOTHED]
    source = ColumnDataSource({name: [] for name in (*names, *texts, *smoothed, "outcome")}, name="rounds")
    heldout_texts = [f"{name}_text" for name in _HELDOUT_COLUMNS]
    heldout = ColumnDataSource({name: [] for name in (*_HELDOUT_COLUMNS, *heldout_texts)}, name="heldout")
    rounds = Range1d(0, 1, name="shown", min_interval=2)
    charts = {
        "loss": _loss(source, heldout, rounds),
        "speed": _small("speed", source, rounds, "speed", _("@speed_text samples per second"), smooth=True),
        "volunteers": _small("volunteers", source, rounds, "volunteers", _("Volunteers: @volunteers_text")),
        "rate": _small("rate", source, rounds, "learning_rate", _("Learning rate @learning_rate_text")),
        "computing": _small(
            "computing",
            source,
            rounds,
            "computing",
            _("@computing_text of the time computing"),
            smooth=True,
            is_from_0=False,  # it is near 1, where the differences are
        ),
    }
    charts["volunteers"].yaxis.ticker = BasicTicker(min_interval=1, desired_num_ticks=4)
    document = Document()
    for plot in charts.values():
        document.add_root(plot)
    places = {plot.id: f"chart-{name}" for name, plot in charts.items()}
    item = {"docid": "run", "root_ids": list(places), "roots": places}
    return {"docs": {"run": document.to_json(deferred=False)}, "items": [item]}


def _figure(name: str, height: int, rounds: Range1d, values: Range1d | DataRange1d) -> figure:
    plot = figure(
        name=name,
        height=height,
        sizing_mode="stretch_width",
        x_range=rounds,
        y_range=values,
        window_axis="x",  # a DataRange1d follows the rounds that are shown
        toolbar_location=None,
        tools="",
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        min_border_left=56,  # the same for all, so that equal rounds stand below each other
        min_border_right=12,
    )
    chosen = BoxAnnotation(visible=False, level="overlay", fill_color=_INDIGO, fill_alpha=0.15, line_color=_INDIGO)
    # page and finger scroll the page, and not the chart, until the reader chooses otherwise; charts.js does that
    plot.add_tools(
        PanTool(name="move", dimensions="width"),
        BoxZoomTool(name="part", dimensions="width", overlay=chosen),
        WheelZoomTool(name="wheel", dimensions="width"),
    )
    plot.toolbar.active_drag = None
    plot.toolbar.active_scroll = None
    plot.xaxis.ticker = BasicTicker(min_interval=1)
    plot.xgrid.visible = False
    plot.axis.axis_label_text_font_style = "normal"
    plot.axis.axis_line_color = None
    plot.axis.major_tick_line_color = None
    plot.axis.minor_tick_line_color = None
    return plot


def _loss(source: ColumnDataSource, heldout: ColumnDataSource, rounds: Range1d) -> figure:
    """The loss curves. charts.js shows a renderer where all words of its name are ticked, exchanges the scale and the
    ticker of the y axis for those in `tags`, and fits that axis: Bokeh does not follow the rounds on a log scale."""
    plot = _figure("loss", 340, rounds, Range1d(0, 1))
    plot.xaxis.axis_label = _("round")
    plot.yaxis.axis_label = _("loss")
    plot.tags = [[LinearScale(), BasicTicker()], [LogScale(), LogTicker()]]
    curves = [
        ("total", "loss", _INDIGO, _("loss @loss_text")),
        ("words", "mlm_loss", _LEAF, _("hidden words @mlm_loss_text")),
        ("order", "sop_loss", _TURMERIC, _("sentence order @sop_loss_text")),
    ]
    outcome = _("Round @round_text @outcome") + "<br>"
    facts = "<br>" + _("@volunteers_text volunteers, @samples_text samples") + "<br>@finished_text"
    measured = _("Held-out text, round @round_text")
    for name, column, color, tooltip in curves:
        look = {"source": source, "color": color, "visible": name == "total"}
        raw = plot.line("round", column, name=f"{name} raw", width=1, alpha=_FAINT, **look)
        # sewn: a running stitch over a faint thread, which keeps the line whole where rounds are close
        smooth = f"{column}_smooth"
        plot.line("round", smooth, name=name, width=3.5, dash=[11, 7], line_cap="round", **look)
        line = plot.line("round", smooth, name=name, width=2, alpha=0.45, **look)
        # one hover tool a curve, since a hidden curve answers none; it tells the round's own loss, not the smoothed one
        text = f"<strong>{outcome}</strong>{tooltip}{facts}" if name == "total" else f"{outcome}{tooltip}"
        plot.add_tools(_hover(line, text, "right" if name == "total" else "left"))
        raw.level = "underlay"
    plot.scatter(
        "round",
        "loss",
        source=source,
        view=CDSView(filter=GroupFilter(column_name="failed", group=1)),
        name="total",
        marker="x",
        size=12,
        color=_MADDER,
        line_width=3,
    )
    # The same three sums on held-out text, in the same colours: rings, since they are measured at checkpoints only.
    guessed = {
        "mlm_loss": _("@mlm_accuracy_text guessed right"),
        "sop_loss": _("@sop_accuracy_text guessed right"),
    }
    measured = _("Held-out text, round @round_text")
    for name, column, color, tooltip in curves:
        look = {"name": f"{name} heldout", "visible": name == "total", "line_color": color}
        plot.line("round", column, source=heldout, line_width=1, line_alpha=0.7, **look)
        rings = plot.scatter("round", column, source=heldout, size=9, line_width=2.5, fill_color=_PATCH, **look)
        text = f"<strong>{measured}</strong><br>{tooltip}"
        if column in guessed:
            text += f"<br>{guessed[column]}"
        plot.add_tools(HoverTool(renderers=[rings], mode="mouse", attachment="below", tooltips=text))
    return plot


def _small(
    name: str,
    source: ColumnDataSource,
    rounds: Range1d,
    column: str,
    tooltip: str,
    smooth: bool = False,
    is_from_0: bool = True,
) -> figure:
    values = DataRange1d(range_padding=0.12, default_span=0.1)
    if is_from_0:
        values.start = 0
    plot = _figure(name, 150, rounds, values)
    plot.yaxis.ticker = BasicTicker(desired_num_ticks=4)
    if smooth:
        plot.line("round", column, source=source, color=_INDIGO, width=1, alpha=_FAINT)
        line = plot.line("round", f"{column}_smooth", source=source, color=_INDIGO, width=2.5)
    elif column == "volunteers":
        line = plot.step("round", column, source=source, color=_INDIGO, width=2.5, mode="center")
    else:
        line = plot.line("round", column, source=source, color=_INDIGO, width=2.5)
    plot.add_tools(_hover(line, _("Round @round_text") + f"<br>{tooltip}", "right"))
    return plot


def _hover(line: Any, tooltip: str, side: str) -> HoverTool:
    return HoverTool(renderers=[line], mode="vline", line_policy="nearest", attachment=side, tooltips=tooltip)


def round_columns(rounds: Iterable[RoundStatus], before: int = 0) -> dict[str, list[Any]]:
    """One list a column; None where something is not known, or is no number, which JSON has no word for.

    :param before: the round before the first one
    """
    rows = []
    for entry in rounds:
        # a point that stands for many rounds has nearly always one that failed: a cross would say nothing
        rows.append(_row(entry, entry.failed and entry.round == before + 1))
        before = entry.round
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(_COLUMNS)
    return {
        name: [_rounded(value, digits) for value in column]
        for (name, digits), column in zip(_COLUMNS, columns, strict=True)
    }


def _row(entry: RoundStatus, failed: bool) -> tuple[float | None, ...]:
    return (
        entry.round,
        entry.samples,
        entry.loss,
        entry.mlm_loss,
        entry.sop_loss,
        entry.volunteers,
        entry.samples / entry.seconds if entry.seconds else None,
        entry.learning_rate,
        entry.computing_share,
        entry.finished,
        int(failed),
    )


def _rounded(value: float | None, digits: int | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return value if digits is None else round(value, digits or None)


def heldout_columns(heldout: Sequence[HeldoutStatus]) -> dict[str, list[Any]]:
    """One list a column."""
    return {name: [_rounded(getattr(entry, name), 4) for entry in heldout] for name in _HELDOUT_COLUMNS}


def thinned_heldout(heldout: Sequence[HeldoutStatus]) -> Sequence[HeldoutStatus]:
    """All there is, or one in every so many and the last one."""
    step = max(1, math.ceil(len(heldout) / HELDOUT_POINTS))
    return heldout[::-step][::-1]
