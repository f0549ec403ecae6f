"""Draws the charts of a report's page: titles and plotly figures, as the page's template takes them.

Titles and ids are untrusted text, and plotly interprets some HTML, so charts get escaped text.
Shapes: V items.
"""

import html
import json
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa

from bert4rec.data.dataset import ItemTable, Ragged

Metrics = dict[str, float]
Chart = dict[str, Any]
"""title, caption and figure (plotly's JSON)."""

COLOURS = ("#3b82d9", "#e0812b", "#22a179", "#9a72e0", "#dd5470", "#8a8f98")  # readable on white and on black
_LOGARITHMIC = {"type": "log", "dtick": 1, "tickformat": ","}
_LEGEND = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
_CATEGORIES = {"type": "category"}
_TOP_GENRES = 18
_CURVE_POINTS = 300
_BINS = sorted({round(2 ** (half / 2)) for half in range(80)})


def line(x: Any, y: Any, name: str, number: int, **more: Any) -> go.Scatter:  # noqa: ANN401 - arrays or lists
    """A curve in the colour of its number."""
    more = {"mode": "lines", **more}
    style = {"color": COLOURS[number % len(COLOURS)], "width": 2}
    return go.Scatter(x=x, y=y, name=html.escape(name), line=style, **more)


def bars(title: str, caption: str, x: Any, y: Any, counted: str) -> Chart:  # noqa: ANN401 - arrays or lists
    """Bar chart of how many of what is `counted` each name of `x` has."""
    hover = f"%{{x}}: %{{y:,}} {counted}<extra></extra>"
    drawn = go.Bar(x=x, y=y, marker_color=COLOURS[0], hovertemplate=hover)
    return chart(title, caption, [drawn], _CATEGORIES, {"title": counted})


def histogram(title: str, caption: str, values: np.ndarray, counted: str) -> Chart:
    """Bar chart over ranges that grow with the values. The label of a range names its first and last whole number."""
    top = next(edge for edge in _BINS if edge > values.max())
    edges = np.array([0, *(edge for edge in _BINS if edge <= top)])
    counts, _ = np.histogram(values, edges)
    used = np.flatnonzero(counts)
    ranges = range(int(used[0]), int(used[-1]) + 1)
    labels = [f"{edges[i]:,}" if edges[i + 1] - edges[i] == 1 else f"{edges[i]:,}–{edges[i + 1] - 1:,}" for i in ranges]
    return bars(title, caption, labels, [int(counts[i]) for i in ranges], counted)


def by_year(title: str, items: ItemTable, weights: dict[str, np.ndarray]) -> Chart:
    """Chart of the share of each weight [V] by year of release."""
    first, last = int(items.year[items.has_year].min()), int(items.year[items.has_year].max())
    traces = []
    for number, (label, weight) in enumerate(weights.items()):
        by_year = np.bincount(items.year[items.has_year] - first, weight[items.has_year], minlength=last - first + 1)
        share = by_year / max(by_year.sum(), 1)
        traces.append(line(np.arange(first, last + 1), share, label, number).update(hovertemplate="%{y:.1%}"))
    return chart(
        title,
        f"share of {' and of '.join(weights)} by the item's year",
        traces,
        {"tickformat": "d"},
        {"tickformat": ".0%"},
    )


def by_genre(names: list[str], genres: Ragged, watched: np.ndarray, recommended: np.ndarray) -> Chart:
    """Chart of the share of each genre in what is watched and in what is recommended, both [V]."""
    item = np.repeat(np.arange(len(genres.offsets) - 1), np.diff(genres.offsets))
    shares = []
    for weight in (watched, recommended):
        counts = np.bincount(genres.values, weight[item], minlength=len(names))
        shares.append(counts / max(counts.sum(), 1))
    top = np.argsort(-shares[0], kind="stable")[:_TOP_GENRES][::-1]
    drawn = [
        go.Bar(
            y=[html.escape(names[genre]) for genre in top],
            x=share[top],
            name=label,
            orientation="h",
            marker_color=COLOURS[number],
            hovertemplate="%{x:.1%}",
        )
        for number, label, share in ((1, "recommendations", shares[1]), (0, "interactions", shares[0]))
    ]  # plotly stacks upwards
    return chart(
        "Genres",
        "share of interactions and of recommendations",
        drawn,
        {"tickformat": ".0%", "showgrid": True},
        {"showgrid": False, **_CATEGORIES},
        height=130 + 24 * len(top),
        bargap=0.25,
        hovermode="y unified",
        legend={**_LEGEND, "traceorder": "reversed"},
    )


def chart(
    title: str,
    caption: str,
    traces: list[Any],
    x: dict[str, Any] | None = None,
    y: dict[str, Any] | None = None,
    **layout: Any,  # noqa: ANN401 - plotly's own
) -> Chart:
    """A figure with its heading. The style sheet of the page sets the colours of text and grid."""
    figure = go.Figure(
        traces,
        {
            "template": "none",
            "height": 300,
            "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 12},
            "hovermode": "x unified" if len(traces) > 1 else "closest",
            "hoverlabel": {"bgcolor": "#23272f", "bordercolor": "#23272f", "font": {"color": "#ffffff"}},
            "legend": _LEGEND,
            "showlegend": len(traces) > 1,
            "dragmode": False,  # a finger on the chart scrolls the page
            "xaxis": {"automargin": True, "zeroline": False, "showgrid": False, **(x or {})},
            "yaxis": {"automargin": True, "zeroline": False, **(y or {})},
            **layout,
        },
    )
    return {"title": title, "caption": caption, "figure": json.loads(figure.to_json())}


def by_system(
    title: str, caption: str, groups: dict[str, dict[str, Metrics]], metric: str, sizes: dict[str, float] | None = None
) -> Chart:
    """Bar chart of one metric, with a group of bars per key of `groups` and a bar per system; `sizes` are the users of
    each group."""
    names = [html.escape(group) + (f"<br>{sizes[group]:,} users" if sizes else "") for group in groups]
    systems = list(dict.fromkeys(system for group in groups.values() for system in group))
    drawn = [
        go.Bar(
            x=names,
            y=[group.get(system, {}).get(metric) for group in groups.values()],
            name=html.escape(system),
            marker_color=COLOURS[number % len(COLOURS)],
            hovertemplate="%{y:.4f}",
        )
        for number, system in enumerate(systems)
    ]
    return chart(title, caption, drawn, _CATEGORIES, bargap=0.25)


def popularity(items: ItemTable) -> Chart:
    """Chart of the interactions of each item that has some."""
    by_count = np.argsort(-items.count, kind="stable")
    by_count = by_count[items.count[by_count] > 0]
    shown = np.unique(np.geomspace(1, len(by_count), _CURVE_POINTS).astype(np.int64)) - 1
    curve = line(shown + 1, items.count[by_count[shown]], "interactions", 0, text=_labels(items, by_count[shown]))
    return chart(
        "Popularity",
        "interactions of each item, most popular first; both axes are logarithmic",
        [curve.update(hovertemplate="%{text}<br>rank %{x:,}: %{y:,} interactions<extra></extra>")],
        {"title": "rank", "showgrid": True, **_LOGARITHMIC},
        {"title": "interactions", **_LOGARITHMIC},
    )


def concentration(items: ItemTable, recommended: np.ndarray) -> Chart:
    """Chart of the share of interactions and of recommendations [V] that the most popular items have."""
    by_count = np.argsort(-items.count, kind="stable")
    shown = np.unique(np.linspace(1, len(by_count), _CURVE_POINTS).astype(np.int64))
    traces = []
    for number, (label, weight) in enumerate((("interactions", items.count), ("recommendations", recommended))):
        share = np.cumsum(weight[by_count]) / max(weight.sum(), 1)
        traces.append(line(shown / len(by_count), share[shown - 1], label, number).update(hovertemplate="%{y:.0%}"))
    return chart(
        "Popularity of what is recommended",
        "share that goes to the most popular items; the steeper, the more it is the same few",
        traces,
        {"title": "most popular items, share of the catalogue", "tickformat": ".0%"},
        {"tickformat": ".0%", "rangemode": "tozero"},
    )


def _labels(items: ItemTable, chosen: np.ndarray) -> list[str]:
    """Titles for a chart, escaped because plotly interprets some HTML."""
    ids, titles = (column.take(pa.array(chosen)).to_pylist() for column in (items.ids, items.title))
    return [html.escape((title or str(item))[:80]) for item, title in zip(ids, titles, strict=True)]
