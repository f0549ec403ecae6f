"""Renders one self-contained HTML page of a run: data, training, metrics, recommendations and sample users.

If an input is missing (titles, times, recommendations), the page says what it cannot show. Titles and ids are untrusted
text, which the template escapes.
Shapes: N users, V items.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import plotly.offline
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bert4rec import storage
from bert4rec.config import Config, InferenceConfig, QueryTime
from bert4rec.config_docs import all_keys
from bert4rec.data.dataset import ItemTable, PreparedDataset, moment_text
from bert4rec.evaluation.protocols import ASKED, BLENDED, MODEL, OTHER_QUERY
from bert4rec.report import charts
from bert4rec.report.charts import Chart, Metrics
from bert4rec.report.effects import RULES, Effects
from bert4rec.runs import REPORT

SHOWN_USERS = 24
SHOWN_HISTORY = 100
"""How many last items of a sample user's history the page shows."""
_TOP_ITEMS = 15
SESSION_SECONDS = 30 * 60
"""A session ends where nothing follows for so long."""
_GAPS = {
    "same second": 0,
    "under a minute": 1,
    "to 30 minutes": 60,
    "to a day": SESSION_SECONDS,
    "to a week": 86_400,
    "to 30 days": 7 * 86_400,
    "to a year": 30 * 86_400,
    "over a year": 365 * 86_400,
}
"""Kinds of gaps between interactions, and the first second of each."""


@dataclass(frozen=True)
class Recommendations:
    """Results of `jobs.recommend`: a directory with one Parquet file per part of `PreparedDataset.parts`."""

    parts_path: str
    settings: dict[str, Any]
    """The inference settings behind the recommendations."""
    num_short_users: int


@dataclass
class Section:
    """A part of the page."""

    title: str
    text: str = ""
    missing: list[str] = field(default_factory=list)
    """Sentences that say what the page cannot show, and why."""
    tiles: list[tuple[str, str]] = field(default_factory=list)
    """A number, and what it counts."""
    charts: list[Chart] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)


def render(
    config: Config,
    dataset: PreparedDataset,
    name: str,
    run: dict[str, Any] | None,
    evaluation: dict[str, Any] | None,
    recommendations: Recommendations | str,
    effects: Effects | str | None = None,
) -> str:
    """Render the page.

    Parameters
    ----------
    name : str
        Name of the run.
    run : dict or None
        `history` (metrics of each validated epoch) and `best_metrics`; None while training is not finished.
    evaluation : dict or None
        Results of `jobs.evaluate`: metrics by protocol and system, in groups of users, and beyond accuracy.
    recommendations : Recommendations or str
        The recommendations, or a string that says why there are none.
    effects : Effects, str or None
        What the rules change, or a string that says why the page cannot show it. None: not asked for.
    """
    items = dataset.items()
    given = recommendations if isinstance(recommendations, Recommendations) else None
    recommended = None if given is None else _count_recommended(dataset, items, given)
    settings = config.inference.model_dump() if given is None else given.settings
    users = _read_users(dataset, items, settings.get("at"))  # results of earlier versions lack the key
    sections = [
        _data_section(config, dataset, items, users),
        _times_section(dataset),
        _training_section(config, run),
        _metrics_section(evaluation),
        _recommended_section(dataset, items, given, recommended, str(recommendations)),
        _filter_section(items, users, settings),
        *_rules_section(settings, effects),
    ]
    environment = jinja2.Environment(
        autoescape=True, loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined
    )
    return environment.get_template(REPORT).render(
        name=name,
        summary=_summary(config, dataset, run),
        sections=sections,
        charts=[chart["figure"] for section in sections for chart in section.charts],
        browser=_browser(dataset, items, users, given, effects if isinstance(effects, Effects) else None),
        without_recommendations="" if given else str(recommendations),
        settings=_settings(config),
        plotly_js=plotly.offline.get_plotlyjs(),
        plotly_version=plotly.__version__,
    )


@dataclass(frozen=True)
class _Users:
    length: np.ndarray
    """[N] interactions."""
    seen: np.ndarray
    """[N] distinct items."""
    future: np.ndarray
    """[N] unseen items released in a later year than that of inference.at, or of the user's last interaction."""
    last_year: np.ndarray
    """[N] int year of the last interaction, 0 if unknown."""


def _read_users(dataset: PreparedDataset, items: ItemTable, at: int | str | None = None) -> _Users:
    """Read the statistics of every user, part by part; `at` is inference.at."""
    asked = None if at is None else datetime.now(UTC).year if at == "now" else datetime.fromtimestamp(int(at), UTC).year
    release = np.where(items.has_year, items.year.astype(np.int32), np.iinfo(np.int32).min)
    ascending = np.sort(release)
    columns: list[tuple[np.ndarray, ...]] = []
    for part in dataset.parts():
        sequences = dataset.read_part(part)
        last = np.where(sequences.has_last_year, sequences.last_year.astype(np.int32), np.iinfo(np.int32).max)
        last = last if asked is None else np.full_like(last, asked)
        pairs = np.repeat(np.arange(len(sequences), dtype=np.int64), sequences.lengths) * len(release)
        user, item = np.divmod(np.unique(pairs + sequences.items - 1), len(release))
        seen = np.bincount(user, minlength=len(sequences))
        seen_later = np.bincount(user[release[item] > last[user]], minlength=len(sequences))
        later = len(release) - np.searchsorted(ascending, last, side="right")
        year = np.where(sequences.has_last_year, sequences.last_year, 0)
        columns.append((sequences.lengths, seen, later - seen_later, year))
    return _Users(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def _read_gaps(dataset: PreparedDataset) -> tuple[np.ndarray, np.ndarray, int]:
    """[G] number of gaps of each kind of `_GAPS`, [M] number of interactions of each session, and the number of users
    who have one session."""
    gaps, sessions, num_single = np.zeros(len(_GAPS), np.int64), [], 0
    for part in dataset.parts():
        sequences = dataset.read_part(part, with_times=True)
        assert sequences.times is not None
        begins = np.zeros(len(sequences.times), bool)
        begins[sequences.offsets[:-1]] = True
        gap = np.diff(sequences.times, prepend=sequences.times[0])
        gaps += np.bincount(np.digitize(gap[~begins], [*_GAPS.values()][1:]), minlength=len(_GAPS))
        begins |= gap >= SESSION_SECONDS
        num_single += int((np.add.reduceat(begins.astype(np.int64), sequences.offsets[:-1]) == 1).sum())
        sessions.append(np.diff(np.append(np.flatnonzero(begins), len(begins))))
    return gaps, np.concatenate(sessions), num_single


def _count_recommended(dataset: PreparedDataset, items: ItemTable, given: Recommendations) -> np.ndarray:
    """[V] number of users to whom each item is recommended."""
    counts = np.zeros(len(items.ids), np.int64)
    for part in dataset.parts():
        token = pc.index_in(_read_part(given, part.number)["item"], items.ids)
        counts += np.bincount(token.drop_null().to_numpy(), minlength=len(counts))
    return counts


@storage.patient
def _read_part(given: Recommendations, number: int) -> pa.Table:
    filesystem, inner = storage.open_store(storage.join(given.parts_path, f"part-{number:05d}.parquet"))
    return pq.read_table(inner, filesystem=filesystem)


def _summary(config: Config, dataset: PreparedDataset, run: dict[str, Any] | None) -> list[tuple[str, str]]:
    manifest = dataset.manifest
    tiles = [
        (f"{manifest.num_users:,}", "users"),
        (f"{manifest.num_items:,}", "items"),
        (f"{manifest.num_interactions:,}", "interactions"),
    ]
    if run is not None:
        best = run["best_metrics"]
        tiles.append((f"{int(best['epoch'])} of {int(run['history'][-1]['epoch'])}", "best epoch, of epochs trained"))
        shown = dict.fromkeys([config.monitor, "val_ndcg@10", "val_hr@10"])
        tiles += [
            (f"{best[name]:.4f}", _metric_title(name) + " in validation" * name.startswith("val_"))
            for name in shown
            if name in best
        ]
    return tiles


def _data_section(config: Config, dataset: PreparedDataset, items: ItemTable, users: _Users) -> Section:
    manifest = dataset.manifest
    section = Section("Data", f"{config.data_name}: {', '.join(each.name for each in manifest.inputs)}")
    longer = (users.length > config.model.max_len - 1).mean()
    filled = manifest.num_interactions / (manifest.num_users * manifest.num_items)
    section.tiles = [
        (f"{np.median(users.length):,.0f}", "interactions of the median user"),
        (f"{users.length.min():,} – {users.length.max():,}", "shortest and longest history"),
        (f"{longer:.0%}", f"of users have more than fit into model.max_len={config.model.max_len}"),
        (f"{filled:.2%}", "of all user × item pairs are interactions"),
    ]
    section.charts.append(
        charts.histogram(
            "Lengths of histories", "interactions a user; ranges widen to the right", users.length, "users"
        )
    )
    section.charts.append(charts.popularity(items))
    if items.has_year.any():
        weights = {"items": np.ones(len(items.ids), np.int64), "interactions": items.count}
        section.charts.append(charts.by_year("Years of release", items, weights))
        unknown = int((~items.has_year).sum())
        if unknown:
            section.missing.append(f"Items without a year of release: {unknown:,}.")
    else:
        section.missing.append("No item has a year of release.")
    years, counts = np.unique(users.last_year[users.last_year != 0], return_counts=True)
    if len(years) > 1:
        title = "Years of the last interaction"
        section.charts.append(charts.bars(title, "of each user", years.astype(str), counts, "users"))
    section.missing += [note[0].upper() + note[1:] + "." for note in manifest.notes]
    return section


def _times_section(dataset: PreparedDataset) -> Section:
    section = Section("Gaps and sessions")
    if not dataset.manifest.has_time:
        section.missing.append("The data have no column time.")
        return section
    gaps, length, num_single = _read_gaps(dataset)
    first, last = dataset.time_span()
    section.text = (
        f"From {moment_text(first)} to {moment_text(last)}. A session ends where nothing follows for "
        f"{SESSION_SECONDS // 60} minutes."
    )
    section.tiles = [
        (f"{len(length):,}", "sessions"),
        (f"{len(length) / dataset.manifest.num_users:.1f}", "sessions of a user, on average"),
        (f"{num_single / dataset.manifest.num_users:.0%}", "of users have one session only"),
        (f"{gaps[0] / max(gaps.sum(), 1):.0%}", "of interactions follow another within the same second"),
    ]
    caption = "time between two interactions of a user that follow one another"
    section.charts.append(charts.bars("Gaps", caption, list(_GAPS), gaps.tolist(), "gaps"))
    section.charts.append(
        charts.histogram("Lengths of sessions", "interactions a session; ranges widen to the right", length, "sessions")
    )
    return section


def _training_section(config: Config, run: dict[str, Any] | None) -> Section:
    section = Section("Training")
    if run is None:
        section.missing.append("Training has not finished. Run the same command to continue it.")
        return section
    history, best = run["history"], run["best_metrics"]
    epochs = [metrics["epoch"] for metrics in history]

    def curves(names: Iterable[str], visible: Iterable[str] = ()) -> list[Any]:
        # Markers, because a curve of one epoch is a single point.
        return [
            charts.line(
                epochs,
                [metrics.get(name) for metrics in history],
                _metric_title(name),
                number,
                mode="lines+markers" if len(epochs) < 40 else "lines",
                visible=True if not visible or name in visible else "legendonly",
                hovertemplate="%{y:,.4~r}",
            )
            for number, name in enumerate(names)
        ]

    def chart(title: str, caption: str, names: list[str], visible: Iterable[str] = (), **y: Any) -> None:  # noqa: ANN401
        at_best = {"type": "line", "x0": best["epoch"], "x1": best["epoch"], "yref": "paper", "y0": 0, "y1": 1}
        style = {"line": {"color": charts.COLOURS[-1], "dash": "dot", "width": 1}}
        x = {"title": "epoch", "tickformat": "d", **({"dtick": 1} if epochs[-1] <= 12 else {})}
        section.charts.append(charts.chart(title, caption, curves(names, visible), x, y, shapes=[at_best | style]))

    section.text = f"The dotted line is the best epoch, {int(best['epoch'])}, by {_metric_title(config.monitor)}."
    chart("Training loss", "mean over the masked items, at the validated epochs", ["train_loss"])
    validation = [name for name in history[-1] if name.startswith("val_") and "/" not in name]
    if validation:
        preferred = [name for name in validation if name.endswith(("@10", "mrr")) or name == config.monitor]
        validation = [*preferred, *(name for name in validation if name not in preferred)]
        chart("Validation", "a click in the legend shows or hides a metric", validation, preferred)
    else:
        section.missing.append("No validation: data.use_full_data=true trains on every interaction.")
    gates = [name for name in history[-1] if name.startswith("val_gate/")]
    if gates:
        chart(
            "Gates", "mean weight of the item's own embedding and of each kind of metadata", gates, rangemode="tozero"
        )
    chart("Speed", "tokens a second, all workers together", ["tokens_per_second"], rangemode="tozero")
    chart("Learning rate", "at the end of each epoch", ["lr"], rangemode="tozero")
    return section


def _metrics_section(evaluation: dict[str, Any] | None) -> Section:
    section = Section("Metrics against baselines")
    if evaluation is None:
        section.missing.append("Not evaluated: python -m jobs.evaluate ranks held-out items beside baselines.")
        return section
    protocols: dict[str, dict[str, Metrics]] = evaluation["protocols"]
    section.text = (
        f"Each user's held-out item of the {evaluation['split']} split, {evaluation['num_users']:,} users, "
        f"{evaluation['num_items']:,} items. What each protocol ranks is in docs/evaluation.md."
        + _discount(evaluation)
        + _query_time(evaluation)
        + _blend(evaluation)
    )
    for metric in ("ndcg@10", "hr@10"):
        caption = "under each protocol" if len(protocols) > 1 else f"protocol {next(iter(protocols))}"
        section.charts.append(charts.by_system(_metric_title(metric), caption, protocols, metric))
    for key, what in (("by_history_length", "length of history"), ("by_target_popularity", "popularity of the target")):
        for protocol, groups in list(evaluation[key].items())[:1]:
            sizes = {group: next(iter(systems.values()))["num_users"] for group, systems in groups.items()}
            inhabited = {group: systems for group, systems in groups.items() if sizes[group]}
            title, caption = f"NDCG@10 by {what}", f"protocol {protocol}"
            section.charts.append(charts.by_system(title, caption, inhabited, "ndcg@10", sizes))
    named = {f"Protocol {protocol}": systems for protocol, systems in protocols.items()}
    for title, systems in (named | {"Beyond accuracy": evaluation["beyond_accuracy"]}).items():
        names = list(dict.fromkeys(name for metrics in systems.values() for name in metrics))
        rows = [[_metric_title(name), *(_number(metrics.get(name)) for metrics in systems.values())] for name in names]
        caption = "of the first ten items of each user" if title == "Beyond accuracy" else ""
        section.tables.append({"title": title, "caption": caption, "columns": ["", *systems], "rows": rows})
    section.missing += [note[0].upper() + note[1:] + "." for note in evaluation["notes"]]
    return section


def _recommended_section(
    dataset: PreparedDataset,
    items: ItemTable,
    given: Recommendations | None,
    recommended: np.ndarray | None,
    reason: str,
) -> Section:
    section = Section("What is recommended")
    if given is None or recommended is None:
        section.missing.append(reason)
        return section
    covered = int((recommended > 0).sum())
    section.text = f"The top {given.settings['topk']} of {dataset.manifest.num_users:,} users." + _discount(
        given.settings
    )
    section.tiles = [
        (f"{int(recommended.sum()):,}", "recommendations"),
        (f"{covered:,} ({covered / len(items.ids):.0%})", "items recommended to anyone: coverage of the catalogue"),
        (f"{_typical(items.count, recommended):,}", "interactions of the median recommended item"),
        (f"{_typical(items.count, items.count):,}", "the same of the median watched one"),
        (f"{given.num_short_users:,}", f"users have fewer than {given.settings['topk']} left"),
    ]
    section.charts.append(charts.concentration(items, recommended))
    if items.has_year.any():
        weights = {"interactions": items.count, "recommendations": recommended}
        section.charts.append(charts.by_year("Years of release", items, weights))
    size, genres = items.listed["genre"]
    if size:
        section.charts.append(charts.by_genre(dataset.manifest.vocabularies["genre"], genres, items.count, recommended))
    else:
        section.missing.append("No genres: there is no genres.tsv.")
    top = np.argsort(-recommended, kind="stable")[:_TOP_ITEMS]
    names, users = dataset.names(), max(dataset.manifest.num_users, 1)
    section.tables.append(
        {
            "title": "Most recommended",
            "caption": "with the number of users that it is recommended to, and of its interactions",
            "columns": ["", "released", "users", "interactions"],
            "rows": [
                [
                    names[i],
                    str(items.year[i]) if items.has_year[i] else "",
                    f"{recommended[i]:,} ({recommended[i] / users:.0%})",
                    f"{items.count[i]:,}",
                ]
                for i in top
                if recommended[i]
            ],
        }
    )
    return section


def _discount(made_with: dict[str, Any]) -> str:
    discount = made_with.get("popularity_discount")  # results of earlier versions lack the key
    return f" The model's scores are with inference.popularity_discount={discount:g}." if discount else ""


def _query_time(evaluation: dict[str, Any]) -> str:
    query_time: QueryTime | None = evaluation.get("query_time")  # results of earlier versions lack the key
    if query_time is None:
        return ""
    other, other_time = OTHER_QUERY[query_time]
    return f" {MODEL} is asked for it {ASKED[query_time]}, {other} {ASKED[other_time]}."


def _blend(evaluation: dict[str, Any]) -> str:
    blend = evaluation.get("rules", {}).get("blend")  # results of earlier versions lack the key
    if blend is None:
        return ""
    how = "chosen on the validation" if blend["is_chosen"] else "as inference.blend has it"
    return f" {BLENDED[blend['model']]} adds the scores of {blend['model']} with weight {blend['weight']:g}, {how}."


def _filter_section(items: ItemTable, users: _Users, settings: dict[str, Any]) -> Section:
    section = Section("What is filtered", f"Of the {len(items.ids):,} items, these can not be recommended to a user.")
    if settings["exclude_seen"]:
        section.tiles.append((f"{np.median(users.seen):,.0f}", "seen items of the median user"))
        section.charts.append(
            charts.histogram(
                "Seen items", "distinct items of the whole history; ranges widen to the right", users.seen, "users"
            )
        )
    else:
        section.missing.append("Seen items are not filtered: inference.exclude_seen=false.")
    is_asked = settings.get("at") is not None  # results of earlier versions lack the key
    nothing = np.zeros(len(users.seen), np.int64)
    nothing += users.seen if settings["exclude_seen"] else 0
    nothing += users.future if settings["exclude_future"] else 0
    num_empty = int((nothing >= len(items.ids)).sum())
    if num_empty > len(nothing) / 2:
        section.missing.append(
            f"WARNING: the filters leave nothing for {num_empty:,} of {len(nothing):,} users. Are the times of the "
            "interactions right (data.time_unit)? inference.exclude_future=false recommends later releases too."
        )
    if not settings["exclude_future"]:
        section.missing.append("Later releases are not filtered: inference.exclude_future=false.")
    elif not items.has_year.any() or (not is_asked and not (users.last_year != 0).any()):
        section.missing.append(
            "No later releases are filtered: that takes years of release, and times of interactions or inference.at."
        )
    else:
        section.tiles += [
            (f"{np.median(users.future):,.0f}", "later releases, for the median user"),
            (f"{users.future.max():,}", "later releases, for the user with most"),
        ]
        year = "asked for (inference.at)" if is_asked else "of the user's last interaction"
        caption = f"unseen items released after the year {year}"
        section.charts.append(charts.histogram("Later releases", caption, users.future, "users"))
    return section


def _rules_section(settings: dict[str, Any], effects: Effects | str | None) -> list[Section]:
    """The rules that are set, and what each of them changes; nothing where none is set."""
    default = InferenceConfig().model_dump()
    keys = [key for own in RULES.values() for key in own]
    set_here = {key: settings[key] for key in keys if key in settings and settings[key] != default[key]}
    if not set_here:
        return []
    text = "; ".join(f"inference.{name}={_plain(_listed(value))}" for name, value in set_here.items())
    section = Section("What the rules change", f"The rules of the lists: {text}.")
    if isinstance(effects, Effects):
        columns = ["", "users with another list", "taken away", "come instead", "places moved by what stays"]
        rows = [
            [
                each.rule,
                f"{each.num_users:,} ({each.num_users / effects.num_users:.0%})",
                f"{each.num_taken:,}",
                f"{each.num_added:,}",
                f"{each.moved:.2f}",
            ]
            for each in effects.rules
        ]
        caption = (
            f"recommendations of {effects.num_users:,} users of all lengths of history, with this rule and without any"
        )
        section.tables.append({"title": "Each rule alone", "caption": caption, "columns": columns, "rows": rows})
    elif effects is not None:
        section.missing.append(effects)
    return [section]


def _listed(value: Any) -> Any:  # noqa: ANN401 - a YAML value
    return list(value) if isinstance(value, tuple) else value


def spread(lengths: np.ndarray, count: int) -> np.ndarray:
    """Ascending places of `count` users, from the shortest history to the longest, given lengths [N]."""
    by_length = np.argsort(lengths, kind="stable")
    places = np.linspace(0, len(by_length) - 1, min(count, len(by_length))).round().astype(np.int64)
    return np.sort(by_length[places])


def _browser(
    dataset: PreparedDataset,
    items: ItemTable,
    users: _Users,
    given: Recommendations | None,
    effects: Effects | None = None,
) -> dict[str, Any]:
    """Sample users from the shortest to the longest history, and by index the items of their histories and top-k."""
    sample = spread(users.length, SHOWN_USERS)
    names, genre_names = _titles(items), dataset.manifest.vocabularies["genre"]
    _, genres = items.listed["genre"]
    shown: list[dict[str, Any]] = []
    known: dict[int, list[Any]] = {}
    for part in dataset.parts():
        inside = sample[(sample >= part.low) & (sample < part.high)]
        if not len(inside):
            continue
        sequences = dataset.read_part(part)
        rows = None if given is None else _read_part(given, part.number)
        for row in (inside - part.low).tolist():
            low, high = sequences.offsets[row : row + 2]
            history = (sequences.items[max(low, high - SHOWN_HISTORY) : high] - 1).tolist()
            top: list[tuple[int, float]] = []
            if rows is not None:
                mine = rows.filter(pc.equal(rows["user"], sequences.users[row])).sort_by("rank")
                tokens = pc.index_in(mine["item"], items.ids).to_pylist()
                top = [
                    (token, round(score, 4))
                    for token, score in zip(tokens, mine["score"].to_pylist(), strict=True)
                    if token is not None
                ]
            before: list[tuple[int, float]] = []
            if effects is not None:
                listed = effects.before.get(sequences.users[row].as_py(), [])
                tokens = pc.index_in(pa.array([item for item, _ in listed], items.ids.type), items.ids).to_pylist()
                before = [(token, round(score, 4)) for token, (_, score) in zip(tokens, listed, strict=True)]
            for item in (*history, *(item for item, _ in (*top, *before))):
                year = int(items.year[item]) if items.has_year[item] else None
                its_genres = genres.values[genres.offsets[item] : genres.offsets[item + 1]].tolist()
                known[item] = [names[item], year, [genre_names[genre] for genre in its_genres]]
            user = str(sequences.users[row].as_py())
            year = int(sequences.last_year[row]) if sequences.has_last_year[row] else None
            shown.append({"user": user, "length": int(high - low), "year": year, "history": history[::-1], "top": top})
            if effects is not None:
                shown[-1]["before"] = before
    shown.sort(key=lambda user: user["length"])
    return {"users": shown, "items": known}


def _settings(config: Config) -> list[dict[str, Any]]:
    values = config.model_dump(mode="json")
    return [
        {"key": f"{key.group}.{key.name}", "value": _plain(value), "changed": _plain(value) != key.default}
        for key in all_keys()
        for value in [values[key.group][key.name]]
    ]


def _plain(value: Any) -> str:  # noqa: ANN401 - a YAML value
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    return json.dumps(value)


def _titles(items: ItemTable) -> list[str]:
    """[V] title of each item, or its id if it has no title."""
    pairs = zip(items.ids.to_pylist(), items.title.to_pylist(), strict=True)
    return [title or str(item) for item, title in pairs]


def _typical(values: np.ndarray, weights: np.ndarray) -> int:
    """Weighted median: half of the total weight is on values up to it."""
    order = np.argsort(values, kind="stable")
    cumulated = np.cumsum(weights[order])
    return int(values[order[np.searchsorted(cumulated, cumulated[-1] / 2)]])


def _metric_title(name: str) -> str:
    """Such as "NDCG@10" for val_ndcg@10."""
    for known, title in (("hr@", "HR@"), ("ndcg@", "NDCG@"), ("mrr", "MRR")):
        if name.removeprefix("val_").startswith(known):
            return name.removeprefix("val_").replace(known, title)
    return {"lr": "learning rate"}.get(name, name.removeprefix("val_gate/").replace("_", " "))


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4f}"
