"""Chooses settings for a prepared dataset: `--config auto`.

`choose` is the rule, `FITTED_ON` the data sets that it was made from. docs/training.md shows both:
`python -m bert4rec.training.auto docs/training.md` writes them there.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bert4rec.config import Config, load_config
from bert4rec.data.dataset import PreparedDataset

MOST_USERS = 100_000
"""Of more users, an even sample of parts is looked at."""
SHORT, FEW, HUGE = 20, 300_000, 200_000
"""Items of the median user, interactions and items of the catalogue, on which the rule turns."""
ENOUGH = 50_000
"""Interactions from which on short histories are trained as such."""


class Facts(NamedTuple):
    """What the rule looks at."""

    users: int
    items: int
    interactions: int
    median: float
    """Interactions of the median user."""
    longest: float = 0.0
    """Interactions that 95% of the users do not exceed."""
    repeats: float = 0.0
    """Share of users whose last item they have had before."""
    has_times: bool = False
    """Whether interactions have Unix times, not an order alone."""
    features: tuple[str, ...] = ()
    """Metadata features that the items have."""
    has_validation: bool = True
    """False with data.use_full_data."""

    def __str__(self) -> str:
        return (
            f"{self.users:,} users, {self.items:,} items, {self.interactions:,} interactions ({self.median:g} of the "
            f"median user), {'with' if self.has_times else 'without'} times, {self.repeats:.0%} of the last items "
            f"repeat an earlier one, metadata: {', '.join(self.features) or 'none'}"
        )


class Rule(NamedTuple):
    """Settings for some data."""

    when: str
    applies: Callable[[Facts], bool]
    settings: dict[str, Any]
    why: str


def _is_short(facts: Facts) -> bool:
    return facts.median < SHORT and facts.interactions >= ENOUGH


def _is_small(facts: Facts) -> bool:
    return not _is_short(facts) and facts.interactions < FEW


def _is_long(facts: Facts) -> bool:
    return not _is_short(facts) and not _is_small(facts)


_SHARED = {
    "model.num_layers": 2,
    "model.position_encoding": "rotary",
    "training.optimizer": "muon",
    "training.scheduler": "linear",
    "training.warmup_epochs": 1,
    "training.weight_decay": 0.01,
    "training.gradient_clip_val": 5,
    "training.early_stopping": False,
    "training.val_check_interval": 4,
}
"""Settings of every network that the rule chooses."""
_NEXT_ITEM = _SHARED | {
    "model.num_heads": 2,
    "model.attention": "causal",
    "model.output_transform": False,
    "training.label_smoothing": 0.1,
}
"""Those of the networks that predict the next item."""
RULES = (
    Rule(
        f"short histories: the median user has fewer than {SHORT} items, of {ENOUGH:,} interactions or more",
        _is_short,
        _NEXT_ITEM
        | {
            "data.batch_size": 64,
            "model.hidden_units": 64,
            "model.max_len": 50,
            "model.dropout_rate": 0.4,
            "training.num_epochs": 12,
            "training.lr": 0.004,
        },
        "on Amazon Toys, predicting each next item reaches a validation NDCG@10 of 0.0747 in the mean of three seeds, "
        "0.0724 without label smoothing, and masking 0.0431",
    ),
    Rule(
        f"small data: other data of fewer than {FEW:,} interactions",
        _is_small,
        _NEXT_ITEM
        | {
            "data.batch_size": 16,
            "model.hidden_units": 64,
            "model.max_len": 200,
            "model.dropout_rate": 0.5,
            "training.num_epochs": 24,
            "training.lr": 0.002,
        },
        "on MovieLens-100K, predicting each next item reaches a validation NDCG@10 of 0.1176 in the mean of five "
        "seeds, and masking 0.1018 (configs/ml-100k.yaml)",
    ),
    Rule(
        f"fewer than {HUGE:,} items, if the data are validated",
        lambda facts: facts.items < HUGE and facts.has_validation,
        {"inference.blend": {"ease": "auto"}},
        "it raises the test NDCG@10 from 0.0628 to 0.0663 on Amazon Toys, from 0.1135 to 0.1286 on MovieLens-100K, and "
        "from 0.1864 to 0.1967 on MovieLens-1M",
    ),
    Rule(
        "long histories without times: other data without times",
        lambda facts: _is_long(facts) and not facts.has_times,
        _NEXT_ITEM
        | {
            "data.batch_size": 16,
            "data.sampling_strategy": "window",
            "model.hidden_units": 128,
            "model.max_len": 200,
            "model.dropout_rate": 0.2,
            "training.num_epochs": 12,
            "training.lr": 0.002,
        },
        "on MovieLens-1M, 12 epochs reach a validation NDCG@10 of 0.1848, and 28 epochs with masks at width 256 0.1842",
    ),
    Rule(
        "long histories with times: other data with times",
        lambda facts: _is_long(facts) and facts.has_times,
        _SHARED
        | {
            "data.batch_size": 16,
            "data.sampling_strategy": "window",
            "model.hidden_units": 256,
            "model.num_heads": 4,
            "model.max_len": 200,
            "model.time_encoding": "rotary+gap",
            "model.dropout_rate": 0.2,
            "model.random_mask_prob": 0.4,
            "model.last_item_mask_ratio": 0.3,
            "training.num_epochs": 28,
            "training.lr": 0.002,
        },
        "on MovieLens-1M with times it reaches a validation NDCG@10 of 0.1890, and 0.1842 without them; networks that "
        "predict the next item gained nothing from times",
    ),
    Rule(
        "long histories, but 95% of the users have fewer than 50 items",
        lambda facts: _is_long(facts) and facts.longest < 50,
        {"model.max_len": 50},
        "the cost of attention grows with its square, and nearly nobody has more (not measured)",
    ),
    Rule(
        "long histories, but 95% of the users have 50 to 99 items",
        lambda facts: _is_long(facts) and 50 <= facts.longest < 100,
        {"model.max_len": 100},
        "the cost of attention grows with its square, and nearly nobody has more (not measured)",
    ),
    Rule(
        "long histories of more than 5 million interactions",
        lambda facts: _is_long(facts) and facts.interactions > 5_000_000,
        {"data.batch_size": 64},
        "an epoch has enough steps, and larger ones are faster with GPUs and several workers (not measured)",
    ),
    Rule(
        "long histories of more than 50 million interactions",
        lambda facts: _is_long(facts) and facts.interactions > 50_000_000,
        {"data.batch_size": 256},
        "an epoch has enough steps, and larger ones are faster with GPUs and several workers (not measured)",
    ),
    Rule(
        f"{HUGE:,} items or more",
        lambda facts: facts.items >= HUGE,
        {
            "training.loss": "sampled-softmax",
            "training.label_smoothing": 0,
            "training.num_negatives": 1024,
            "training.item_optimizer": "rowwise",
        },
        "the time of a step then hardly depends on the number of items; full cross-entropy ranks better where it fits",
    ),
    Rule(
        "more than half of the users' last items repeat an earlier one",
        lambda facts: facts.repeats > 0.5,
        {"evaluation.exclude_seen": False, "inference.exclude_seen": False},
        "ranking only what a user has not had would count most targets as missed",
    ),
    Rule(
        "items with genres, directors or writers",
        lambda facts: bool(facts.features),
        {},
        "left out: on MovieLens-100K they gain 0.0036 of NDCG@10, which is less than the spread of three seeds; "
        "model.use_genre_emb=true tries them",
    ),
)


class Fitted(NamedTuple):
    """A data set behind the rule."""

    data: str
    facts: Facts
    config: str
    """The best settings that we know for it, which the rule gives."""
    figure: str
    page: str


FITTED_ON = (
    Fitted(
        "MovieLens-100K",
        Facts(943, 1_682, 100_000, 65, 311, 0, True, ("genre",)),
        "ml-100k-causal.yaml",
        "test NDCG@10 0.1135, with the blend 0.1286",
        "short_histories.md#blends",
    ),
    Fitted(
        "MovieLens-1M, 5-core, order without times",
        Facts(6_040, 3_416, 999_611, 96, 556),
        "ml-1m-causal.yaml",
        "test NDCG@10 0.1864, with the blend 0.1967",
        "short_histories.md#blends",
    ),
    Fitted(
        "MovieLens-1M, 5-core, two thirds with their true times",
        Facts(6_040, 3_416, 999_611, 96, 556, 0, True),
        "ml-1m-time.yaml",
        "test NDCG@10 0.1884, with the blend 0.1992",
        "short_histories.md#blends",
    ),
    Fitted(
        "generated short histories",
        Facts(40_000, 49_323, 360_477, 7, 20, 0, True),
        "short-histories.yaml",
        "test NDCG@10 0.2599 with masks, not measured since",
        "short_histories.md",
    ),
    Fitted(
        "Amazon Toys, 5-core",
        Facts(19_412, 11_924, 167_597, 6, 20, 0, False, ("genre",)),
        "short-histories.yaml",
        "test NDCG@10 0.0628, with the blend 0.0663",
        "short_histories.md#blends",
    ),
)


def facts_of(dataset: PreparedDataset, use_full_data: bool = False) -> Facts:
    """The facts of a prepared dataset: of its manifest, and of the histories of at most `MOST_USERS` users."""
    manifest, parts = dataset.manifest, dataset.parts()
    step = -(-manifest.num_users // MOST_USERS)
    lengths, num_repeats = [], 0
    for part in parts[::step]:
        read = dataset.read_part(part)
        lengths.append(read.lengths)
        row = np.repeat(np.arange(len(read)), read.lengths)
        last = read.items[read.offsets[1:] - 1]
        num_repeats += int((np.bincount(row[read.items == last[row]], minlength=len(read)) > 1).sum())
    found = np.concatenate(lengths)
    return Facts(
        manifest.num_users,
        manifest.num_items,
        manifest.num_interactions,
        float(np.median(found)),
        float(np.percentile(found, 95)),
        num_repeats / len(found),
        manifest.has_time and manifest.time_unit != "order",
        tuple(name for name, values in manifest.vocabularies.items() if values),
        not use_full_data,
    )


def choose(facts: Facts) -> list[Rule]:
    """The rules that apply, in order; a later one overrides an earlier one."""
    return [rule for rule in RULES if rule.applies(facts)]


def settings_of(rules: list[Rule]) -> dict[str, Any]:
    """The settings of rules, by key."""
    return {key: value for rule in rules for key, value in rule.settings.items()}


def config_for(dataset: PreparedDataset, overrides: list[str]) -> tuple[Config, list[str]]:
    """The config that the rule chooses, with the user's overrides on top, and lines that say what it chose and why.

    The config keeps the reasons in run.chosen.
    """
    facts = facts_of(dataset, load_config(None, overrides).data.use_full_data)
    rules, given = choose(facts), {override.partition("=")[0] for override in overrides}
    left = {key: value for key, value in settings_of(rules).items() if key not in given}
    chosen = {}
    for rule in rules:
        own = " ".join(f"{key}={_written(left[key])}" for key in rule.settings if left.get(key) == rule.settings[key])
        if own or not rule.settings:
            chosen[rule.when] = f"{own}{': ' * bool(own)}{rule.why}"
    config = load_config(None, [*(f"{key}={_written(value)}" for key, value in left.items()), *overrides])
    config = config.model_copy(update={"run": config.run.model_copy(update={"chosen": chosen})})
    return config, [f"--config auto found {facts}", *(f"  {when}: {what}" for when, what in chosen.items())]


def _written(value: Any) -> str:  # noqa: ANN401 - a YAML value
    return value if isinstance(value, str) else json.dumps(value).replace('"', "")


def markdown() -> str:
    """The rule and its data sets, for docs/training.md."""
    rows = [
        "| data | settings | why |",
        "| --- | --- | --- |",
        *(
            f"| {rule.when} | {' '.join(f'`{key}={_written(value)}`' for key, value in rule.settings.items()) or '–'} "
            f"| {rule.why} |"
            for rule in RULES
        ),
        "",
        "We made the rule from these data sets. It gives the best settings that we know for each of them:",
        "",
        "| data | users | items | interactions | of the median user | config | it reaches |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {each.data} | {each.facts.users:,} | {each.facts.items:,} | {each.facts.interactions:,} "
            f"| {each.facts.median:g} | [{each.config}](../configs/{each.config}) "
            f"| [{each.figure}](results/{each.page}) |"
            for each in FITTED_ON
        ),
    ]
    return "\n".join(rows) + "\n"


_PLACE = re.compile(r"(?<=<!-- rule: bert4rec/training/auto.py -->\n\n).*?(?=\n<!-- end -->)", re.S)


def with_rule(page: str) -> str:
    """The page with the rule as it is now."""
    return _PLACE.sub(lambda _: markdown(), page)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_rule(path.read_text()))
