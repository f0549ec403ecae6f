"""Slow and simple implementations of the optimised functions, for tests to compare with."""

import csv
import itertools
import math
import os
from datetime import UTC, datetime
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F

from bert4rec.model.network import BERT4Rec


def last_items(items: list[list[int]], max_len: int) -> list[list[int]]:
    """The last items of each row, padded on the left with 0 to the longest row."""
    kept = [row[-max_len:] for row in items]
    width = max(len(row) for row in kept)
    return [[0] * (width - len(row)) + row for row in kept]


def hidden_states(model: BERT4Rec, sequence: list[int], times: list[int] | None = None) -> torch.Tensor:
    """[L, D]: the paper's network for one sequence without padding, one head and one layer at a time; `times` are Unix
    seconds of each token, or with causal attention of the one after it."""
    item_times = times
    if times and model.config.attention == "causal":
        item_times = [times[0], *times[:-1]]
    parts = model.config.time_encoding.split("+")
    width, heads = model.config.hidden_units, model.config.num_heads
    x = torch.stack(
        [
            model.items(torch.tensor(token)) + model.position_embedding.weight[len(sequence) - 1 - place]
            for place, token in enumerate(sequence)
        ]
    )
    if "gap" in parts:
        x = x + torch.stack([model.times.gap.weight[row] for row in gap_rows(times)])
    if "calendar" in parts:
        moments = [datetime.fromtimestamp(time, UTC) for time in times]
        x = x + torch.stack([model.times.hour.weight[at.hour] + model.times.day.weight[at.weekday()] for at in moments])
    x = F.layer_norm(x, (width,), model.embedding_norm.weight, model.embedding_norm.bias)
    for layer, block in enumerate(model.blocks):
        query = x @ block.query.weight.T + block.query.bias
        key_value = x @ block.key_value.weight.T + block.key_value.bias
        key, value = key_value[:, :width], key_value[:, width:]
        size = width // heads
        outputs = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            head_query, head_key = query[:, part], key[:, part]
            angles = [
                [0.0 if model.config.position_encoding == "learned" else angle for angle in row]
                for row in angles_by_place(len(sequence), size)
            ]
            of_keys = angles
            if "rotary" in parts:
                count = size // 4
                angles, of_keys = (
                    [row[: size // 2 - count] + angles_by_time(t, count) for row, t in zip(angles, each, strict=True)]
                    for each in (times, item_times)
                )
            if any(map(any, angles)):  # turning by 0 takes its time too
                head_query, head_key = rotated(head_query, angles), rotated(head_key, of_keys)
            products = head_query @ head_key.T / math.sqrt(size)
            if "bias" in parts:
                table = model.times.bias[layer, :, head]
                rows = [torch.stack([table[between(a, b)] for b in item_times]) for a in times]
                products = products + torch.stack(rows)
            if model.config.attention == "causal":
                later = [[other > place for other in range(len(sequence))] for place in range(len(sequence))]
                products = products.masked_fill(torch.tensor(later), -math.inf)
            attention = torch.softmax(products, dim=1)
            outputs.append(attention @ value[:, part])
        attended = torch.cat(outputs, dim=1) @ block.attention_output.weight.T + block.attention_output.bias
        x = F.layer_norm(x + attended, (width,), block.attention_norm.weight, block.attention_norm.bias)
        first, _, second = block.feed_forward
        inner = F.gelu(x @ first.weight.T + first.bias)
        x = F.layer_norm(
            x + inner @ second.weight.T + second.bias, (width,), block.output_norm.weight, block.output_norm.bias
        )
    return x


def angles_by_place(length: int, size: int) -> list[list[float]]:
    """By place and pair: p / 10000^(2j/size); p is the distance from the end (arXiv 2104.09864)."""
    return [[(length - 1 - place) / 10_000 ** (2 * j / size) for j in range(size // 2)] for place in range(length)]


def angles_by_time(time: int, count: int) -> list[float]:
    """The angles of a Unix time for `count` periods of whole seconds, from a minute to a year in equal ratios."""
    ratio = (365 * 24 * 60) ** (1 / max(count - 1, 1))
    return [2 * math.pi * (time / round(60 * ratio**j) % 1) for j in range(count)]


def gap_rows(times: list[int]) -> list[int]:
    """Row 0 for the first token, then 1 + floor(log2(seconds since the token before + 1))."""
    return [0] + [1 + math.floor(math.log2(b - a + 1)) for a, b in itertools.pairwise(times)]


def between(query_time: int, time: int) -> int:
    """floor(log2(seconds between + 1)), and 32 more if the query is the earlier one."""
    return math.floor(math.log2(abs(query_time - time) + 1)) + (32 if query_time < time else 0)


def rotated(x: torch.Tensor, angles: list[list[float]]) -> torch.Tensor:
    """[L, size]: rotate columns 2j and 2j+1 of each row by the angle of that row and pair."""
    rows = []
    for place, own in enumerate(angles):
        row = []
        for j, angle in enumerate(own):
            a, b = x[place, 2 * j], x[place, 2 * j + 1]
            row += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
        rows.append(torch.stack(row))
    return torch.stack(rows)


def logits(model: BERT4Rec, sequence: list[int], times: list[int] | None = None) -> torch.Tensor:
    """[L, V]: equation 7 at every position."""
    states = hidden_states(model, sequence, times)
    if model.config.output_transform:
        states = F.gelu(states @ model.output_transform.weight.T + model.output_transform.bias)
    weights = model.output_weights()[0]
    return states @ weights.T + model.output_bias


def loss(model: BERT4Rec, masked: list[list[int]], labels: list[list[int]]) -> torch.Tensor:
    """Mean cross-entropy over all targets of padded rows, one target at a time."""
    losses = []
    for tokens, targets in zip(masked, labels, strict=True):
        start = next(place for place, token in enumerate(tokens) if token)
        scores = logits(model, tokens[start:])
        for place, target in enumerate(targets[start:]):
            if target:
                losses.append(-torch.log_softmax(scores[place], dim=0)[target - 1])
    return torch.stack(losses).mean()


def recommendations(
    model: BERT4Rec,
    history: list[int],
    k: int,
    years: list[int | None],
    last_year: int | None,
    exclude_seen: bool = True,
    exclude_future: bool = True,
    popularity_discount: float = 0,
    times: list[int] | None = None,
    at: int | None = None,
) -> list[tuple[int, float]]:
    """(token, score) of the best k items for one user, one item at a time; asked for at `at`, if that is given."""
    recent = history[-(model.config.max_len - 1) :]
    moments = None if times is None else [*times[-len(recent) :], at]
    if at is not None:
        last_year = datetime.fromtimestamp(at, UTC).year
    scores = logits(model, [*recent, model.num_items + 1], moments)[-1].tolist()
    scores = discounted(model, scores, popularity_discount)
    kept = []
    for token in range(1, model.num_items + 1):
        year = years[token - 1]
        if exclude_seen and token in history:
            continue
        if exclude_future and year is not None and last_year is not None and year > last_year:
            continue
        kept.append((token, scores[token - 1]))
    return sorted(kept, key=lambda pair: -pair[1])[:k]


def blended(scores: list[float], item_weights: list[list[float]], history: list[int], weight: float) -> list[float]:
    """The network's scores, -inf of items that it cannot score, with those of an item-item model added."""
    num_items = len(scores)
    others = [sum(item_weights[own - 1][item] for own in set(history)) for item in range(num_items)]
    known = [item for item in range(num_items) if scores[item] > -math.inf]

    def mean_and_deviation(values: list[float]) -> tuple[float, float]:
        mean = sum(values[item] for item in known) / len(known)
        return mean, math.sqrt(sum((values[item] - mean) ** 2 for item in known) / len(known))

    _, own = mean_and_deviation(scores)
    mean, deviation = mean_and_deviation(others)
    if deviation == 0:
        return scores
    return [m + weight * own * (e - mean) / deviation for m, e in zip(scores, others, strict=True)]


def discounted(model: BERT4Rec, scores: list[float], popularity_discount: float) -> list[float]:
    """Subtract `popularity_discount` times log(1 + the item's training interactions) from each score."""
    counts = model.item_counts.tolist()
    return [score - popularity_discount * math.log(1 + n) for score, n in zip(scores, counts, strict=True)]


def rank(scores: list[float], target: int, excluded: set[int]) -> int:
    """Rank, from 1, of `target`, an index from 0. Equal scores rank before it; an excluded target ranks last."""
    if target in excluded:
        return len(scores) + 1
    others = [score for item, score in enumerate(scores) if item != target and item not in excluded]
    return 1 + sum(score >= scores[target] for score in others)


class PreparedTwin(NamedTuple):
    users: list[tuple]
    """(user, original ids of the items in time order, last_year or None), sorted by user."""
    items: list[tuple]
    """(item, count, year, title, genres, director, writers) in token order; None or [] if unknown."""
    num_duplicates: int
    times: list[list[int]]
    """Whole Unix seconds of each user's interactions, sorted by user; none if the data have no times."""


def prepared_with_pandas(data_dir, data_file="train_ratings.csv", k=0):
    """The prepared dataset of the k-core of one CSV file and its metadata, in the original ids and names."""
    ratings = pd.read_csv(os.path.join(data_dir, data_file), dtype={"user": str, "item": str}, keep_default_na=False)
    for column in ("user", "item"):
        ratings[column] = ids_as_they_are_kept(list(ratings[column]))
    has_time, num_duplicates = "time" in ratings, 0
    if has_time:
        num_duplicates = int(ratings.duplicated(["user", "item", "time"]).sum())
        ratings = ratings.drop_duplicates(["user", "item", "time"]).sort_values("time", kind="stable")
    ratings = k_core(ratings, k)
    users, times = [], []
    for user, rows in ratings.groupby("user"):
        if has_time:
            times.append([math.floor(time) for time in rows["time"]])
        year = datetime.fromtimestamp(rows["time"].iloc[-1], UTC).year if has_time else None
        users.append((user, list(rows["item"]), year))
    counts = ratings["item"].value_counts()
    order = sorted(counts.index, key=lambda item: (-counts[item], item))
    metadata = {name: metadata_rows(data_dir, name) for name in ("years", "titles", "genres", "directors", "writers")}

    def first(name, item):
        return next((value for of, value in metadata[name] if of == str(item)), None)

    def distinct(name, item):
        return list(dict.fromkeys(value for of, value in metadata[name] if of == str(item)))

    items = [
        (
            item,
            counts[item],
            int(year) if (year := first("years", item)) else None,
            first("titles", item),
            distinct("genres", item),
            first("directors", item),
            distinct("writers", item),
        )
        for item in order
    ]
    return PreparedTwin(sorted(users), items, num_duplicates, times)


def ids_as_they_are_kept(ids):
    """Integers if each id is the usual spelling of an int64, otherwise the strings."""
    try:
        numbers = [int(identifier) for identifier in ids]
    except ValueError:
        return ids
    usual = all(str(number) == identifier for number, identifier in zip(numbers, ids, strict=True))
    return numbers if usual and all(-(2**63) <= number < 2**63 for number in numbers) else ids


def metadata_rows(data_dir, name):
    path = os.path.join(data_dir, f"{name}.tsv")
    if not os.path.exists(path):
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [tuple(row) for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)][1:]


def negatives(weights, own, user, seed, count):
    """The `count` items (from 0) with the largest log(weight) + Gumbel noise, largest first, without tokens in
    `own`."""

    def mix(number):
        number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        number = (number ^ (number >> 27)) * 0x94D049BB133111EB % 2**64
        return number ^ (number >> 31)

    keys = {}
    for item, weight in enumerate(weights):
        if weight > 0 and item + 1 not in own:
            bits = mix((mix((mix(seed) + user) % 2**64) + item * 0x9E3779B97F4A7C15) % 2**64)
            uniform = ((bits >> 11) + 0.5) * 2**-53
            keys[item] = math.log(weight) - math.log(-math.log(uniform))
    return sorted(keys, key=lambda item: -keys[item])[:count]


def item_knn(histories, num_items, num_neighbours):
    """[V, V] cosine of two items' sets of users. Each row keeps only the largest; of equal ones, the first."""
    users = [{n for n, items in enumerate(histories) if token in items} for token in range(1, num_items + 1)]
    result = [[0.0] * num_items for _ in range(num_items)]
    for i, ours in enumerate(users):
        cosine = {
            j: len(ours & theirs) / math.sqrt(len(ours) * len(theirs))
            for j, theirs in enumerate(users)
            if j != i and ours & theirs
        }
        for j in sorted(cosine, key=lambda j: (-cosine[j], j))[:num_neighbours]:
            result[i][j] = cosine[j]
    return result


def ease(histories, num_items, l2):
    """[V, V]: column j is the ridge regression of item j's users on the users of all other items."""
    matrix = torch.zeros(len(histories), num_items, dtype=torch.float64)
    for row, items in enumerate(histories):
        matrix[row, [token - 1 for token in items]] = 1
    result = torch.zeros(num_items, num_items, dtype=torch.float64)
    for j in range(num_items):
        others = [i for i in range(num_items) if i != j]
        x, y = matrix[:, others], matrix[:, j]
        penalty = l2 * torch.eye(len(others), dtype=torch.float64)
        result[others, j] = torch.linalg.solve(x.T @ x + penalty, x.T @ y)
    return result


def k_core(ratings, k):
    """Drop rows of rare items, then of rare users, and repeat until nothing changes."""
    while k:
        kept = ratings[ratings.groupby("item")["item"].transform("size") >= k]
        kept = kept[kept.groupby("user")["user"].transform("size") >= k]
        if len(kept) == len(ratings):
            break
        ratings = kept
    return ratings
