"""The search space of a sweep, the record of each trial, and the choice of the next trial's values."""

import difflib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, assert_never

import numpy as np
from pydantic import ValidationError

from bert4rec.config import DATASET_KEYS, Config, nearest_key, parse_value
from bert4rec.errors import InputError

if TYPE_CHECKING:
    import optuna

DEFAULT_SPACE: dict[str, Any] = {
    "model.hidden_units": {"choice": [64, 128, 256]},
    "model.num_heads": {"choice": [2, 4, 8]},
    "model.num_layers": {"int": [1, 3]},
    "model.max_len": {"choice": [50, 100, 150, 200]},
    "model.dropout_rate": {"uniform": [0.1, 0.5]},
    "model.random_mask_prob": {"uniform": [0.1, 0.3]},
    "model.last_item_mask_ratio": {"uniform": [0, 0.5]},
    "training.lr": {"loguniform": [1e-4, 1e-2]},
    "training.weight_decay": {"uniform": [0, 0.1]},
    "data.batch_size": {"choice": [128, 256, 512]},
}

KINDS = ("choice", "uniform", "loguniform", "int")
SEARCHED_GROUPS = ("data", "model", "training")
THE_SAME_FOR_ALL = {
    *(f"data.{name}" for name in (*DATASET_KEYS, "data_dir", "data_file", "memory_mb")),
    *(f"data.{name}" for name in ("use_full_data", "holdout", "min_interactions")),
    *(f"training.{name}" for name in ("monitor_metric", "accelerator", "num_workers", "min_workers")),
    *(f"training.{name}" for name in ("checkpoint_minutes", "cpus_per_worker", "max_failures")),
}
MOST_DRAWS = 1000
"""Most draws for one trial. The first draw that is valid and new becomes the trial."""


class Draws(Protocol):
    """Source of drawn values: an `optuna.Trial`, or `_RandomDraws`."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...  # noqa: ANN401, D102

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...  # noqa: D102

    def suggest_int(self, name: str, low: int, high: int) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Domain:
    """The values that a sweep may give to one key."""

    key: str
    kind: str
    """One of `KINDS`. A fixed value is a choice with one value."""
    values: tuple[Any, ...]
    """The choices, or the lowest and the highest value."""
    when: dict[str, list[Any]] = field(default_factory=dict)
    """Values that other keys must have for this key to be drawn. Otherwise it keeps the config's value."""

    def draw(self, draws: Draws) -> Any:  # noqa: ANN401
        """Draw one value. Numbers are rounded to four digits, which are enough and easy to read."""
        if self.kind == "choice":
            return draws.suggest_categorical(self.key, self.values)
        low, high = self.values
        if self.kind == "int":
            return draws.suggest_int(self.key, low, high)
        value = draws.suggest_float(self.key, low, high, log=self.kind == "loguniform")
        return min(max(float(f"{value:.4g}"), low), high)

    def __contains__(self, value: object) -> bool:
        if self.kind == "choice":
            return value in self.values
        return isinstance(value, int | float) and self.values[0] <= value <= self.values[1]

    def distribution(self) -> "optuna.distributions.BaseDistribution":
        """The same domain as an Optuna distribution."""
        from optuna import distributions

        if self.kind == "choice":
            return distributions.CategoricalDistribution(self.values)
        low, high = self.values
        if self.kind == "int":
            return distributions.IntDistribution(low, high)
        return distributions.FloatDistribution(low, high, log=self.kind == "loguniform")


@dataclass
class Trial:
    """The record of one trial."""

    number: int
    values: dict[str, Any]
    """Drawn values by config key."""
    status: Literal["running", "finished", "stopped", "failed", "crashed"] = "running"
    """stopped: the scheduler stopped it. failed: its settings cannot be trained. crashed: its processes died."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Metrics of each validated epoch that has been reported."""
    seconds: float = 0.0
    """Wall time, including the start of its processes."""
    reason: str = ""
    """Why it failed or crashed."""

    @property
    def name(self) -> str:
        """Name of its directory in the sweep's directory."""
        return f"trial-{self.number:03d}"

    @property
    def epochs(self) -> int:
        """Number of epochs trained."""
        return int(self.history[-1]["epoch"]) if self.history else 0

    def best(self, monitor: str) -> dict[str, float]:
        """Metrics of the best epoch, or of the first of equal ones, as training chooses. There must be one."""
        return max(self.history, key=lambda metrics: score(metrics[monitor], monitor))

    def add(self, metrics: dict[str, float]) -> bool:
        """Add the metrics of an epoch to the history. Return False if the history has that epoch already."""
        if any(known["epoch"] == metrics["epoch"] for known in self.history):
            return False
        self.history.append(metrics)
        self.history.sort(key=lambda known: known["epoch"])
        return True


def score(metric: float, monitor: str) -> float:
    """The metric with the sign that makes larger values better."""
    return -metric if monitor == "train_loss" else metric


@dataclass(frozen=True)
class Space:
    """The domains, in the order of drawing, and the config whose keys they vary."""

    domains: tuple[Domain, ...]
    config: Config

    @classmethod
    def of(cls, config: Config) -> Self:
        """Read tune.space of the config.

        Raises
        ------
        InputError
            If the space is empty, a key does not exist or cannot be searched, a value is out of range for its key, or
            no combination is valid.
        """
        written = DEFAULT_SPACE if config.tune.space is None else config.tune.space
        if not written:
            raise InputError("tune.space is empty; nothing to search over")
        space = cls(tuple(_domain(key, value) for key, value in written.items()), config)
        problem = ""
        for seed in range(MOST_DRAWS):
            try:
                with_values(config, space.draw(_RandomDraws(np.random.default_rng(seed))))
            except ValidationError as error:
                problem = "; ".join(str(p.get("ctx", {}).get("error", p["msg"])) for p in error.errors())
                continue
            return space
        raise InputError(f"tune.space: none of {MOST_DRAWS:,} draws is a valid config; the last: {problem}")

    def draw(self, draws: Draws) -> dict[str, Any]:
        """Draw values by key, for the keys whose condition holds."""
        values: dict[str, Any] = {}
        for domain in self.domains:
            if self._applies(domain, values):
                values[domain.key] = domain.draw(draws)
        return values

    def own_values(self) -> dict[str, Any]:
        """The config's own values, except for keys that the space fixes."""
        values: dict[str, Any] = {}
        for domain in self.domains:
            if self._applies(domain, values):
                is_fixed = domain.kind == "choice" and len(domain.values) == 1
                values[domain.key] = domain.values[0] if is_fixed else value_of(self.config, domain.key)
        return values

    def num_epochs(self, values: dict[str, Any]) -> int:
        """Largest number of epochs that a trial with these values trains."""
        return int(values.get("training.num_epochs", self.config.training.num_epochs))

    @property
    def most_epochs(self) -> int:
        """Largest number of epochs of any trial."""
        searched = [max(domain.values) for domain in self.domains if domain.key == "training.num_epochs"]
        return int(max([self.config.training.num_epochs, *searched]))

    def is_valid(self, values: dict[str, Any]) -> bool:
        """Whether the config with `values` is valid."""
        try:
            with_values(self.config, values)
        except ValidationError:
            return False
        return True

    def next_values(self, trials: list[Trial]) -> dict[str, Any] | None:
        """New, valid values for the trial after `trials`, or None if none are left. Equal trials give equal values."""
        tune, seed, number = self.config.tune, self.config.data.seed, len(trials)
        tried = [trial.values for trial in trials]
        if tune.include_config and not trials and self.is_valid(self.own_values()):
            return self.own_values()
        match tune.search:
            case "random":
                draws = _RandomDraws(np.random.default_rng([seed, number]))
                candidates = (self.draw(draws) for _ in range(MOST_DRAWS))
                return next((values for values in candidates if values not in tried and self.is_valid(values)), None)
            case "tpe":
                return self._suggested(trials, tried, seed + number)
            case _:
                assert_never(tune.search)

    def _suggested(self, trials: list[Trial], tried: list[dict[str, Any]], seed: int) -> dict[str, Any] | None:
        """What Optuna's estimator suggests."""
        import optuna

        study = self.study(trials, optuna.samplers.TPESampler(seed=seed % 2**32))
        for _ in range(MOST_DRAWS):
            asked = study.ask()
            values = self.draw(asked)
            if values not in tried and self.is_valid(values):
                return values
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
        return None

    def study(
        self, trials: list[Trial], sampler: "optuna.samplers.BaseSampler | None" = None, for_plots: bool = False
    ) -> "optuna.Study":
        """Make an Optuna study of the trials.

        Parameters
        ----------
        for_plots : bool
            Count the best metric of a trial as its result even if it did not train to the end.
        """
        import optuna
        from optuna.trial import TrialState

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        monitor = self.config.monitor
        study = optuna.create_study(
            direction="minimize" if monitor == "train_loss" else "maximize", sampler=sampler, study_name="sweep"
        )
        by_key = {domain.key: domain for domain in self.domains}
        for trial in trials:
            params = {key: value for key, value in trial.values.items() if value in by_key[key]}
            known: dict[str, Any] = {
                "state": TrialState.PRUNED
            }  # Optuna ranks a failed trial below all trials with metrics
            best = trial.best(monitor)[monitor] if trial.history else None
            if for_plots or trial.status == "finished":
                known = {"state": TrialState.COMPLETE, "value": best}
            elif trial.status == "stopped":
                known["intermediate_values"] = {trial.epochs: best}
            elif trial.status in ("running", "crashed"):
                known = {"state": TrialState.RUNNING}
            distributions = {key: by_key[key].distribution() for key in params}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, **known))
        return study

    def _applies(self, domain: Domain, values: dict[str, Any]) -> bool:
        return all(values.get(key, value_of(self.config, key)) in allowed for key, allowed in domain.when.items())


def value_of(config: Config, key: str) -> Any:  # noqa: ANN401
    """The config's value for a key such as model.max_len."""
    group, _, name = key.partition(".")
    return getattr(getattr(config, group), name)


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """Return the config with `values` by key.

    Raises
    ------
    pydantic.ValidationError
        If the result is not a valid config.
    """
    content = config.model_dump()
    for key, value in values.items():
        group, _, name = key.partition(".")
        content[group][name] = value
    return Config.model_validate(content)


class _RandomDraws:
    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def suggest_categorical(self, name: str, choices: Any) -> Any:  # noqa: ANN401
        return choices[int(self._rng.integers(len(choices)))]

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        if log:
            return float(np.exp(self._rng.uniform(np.log(low), np.log(high))))
        return float(self._rng.uniform(low, high))

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return int(self._rng.integers(low, high + 1))


def _domain(key: str, written: Any) -> Domain:  # noqa: ANN401
    """Make the domain of `key` from its entry in tune.space, and check that the key can have each value."""
    _check_key(key)
    if key.partition(".")[0] not in SEARCHED_GROUPS or key in THE_SAME_FOR_ALL:
        raise InputError(
            f"tune.space: {key} cannot be searched over: trials must have the same data, metric and "
            f"resources; expected other keys of {', '.join(SEARCHED_GROUPS)}"
        )
    if not isinstance(written, dict):
        written = {"choice": [written]}
    rest = dict(written)
    when = rest.pop("when", {})
    if len(rest) != 1 or not isinstance(when, dict):
        raise InputError(
            f"tune.space: {key}: {written}: expected a value, or one of {', '.join(KINDS)} with a list, and, if "
            "wanted, when: {other.key: value}"
        )
    ((kind, values),) = rest.items()
    if kind not in KINDS:
        close = difflib.get_close_matches(str(kind), KINDS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise InputError(f"tune.space: {key}: {kind!r} is none of {', '.join(KINDS)}{hint}")
    values = _listed(values)
    if kind == "choice":
        if not values or not all(value is None or isinstance(value, bool | int | float | str) for value in values):
            raise InputError(f"tune.space: {key}: {written}: expected a list of single values to choose from")
    else:
        number = int if kind == "int" else (int, float)
        if len(values) != 2 or not all(isinstance(v, number) for v in values) or not values[0] < values[1]:
            of = "whole numbers" if kind == "int" else "numbers"
            raise InputError(f"tune.space: {key}: {written}: expected two {of}, the lowest and the highest value")
        if kind == "loguniform" and values[0] <= 0:
            raise InputError(f"tune.space: {key}: {written}: the lowest value of loguniform must be above 0")
    for value in values:
        _check_value(key, value)
    for other in when:
        _check_key(other)
    return Domain(key, kind, tuple(values), {other: _listed(allowed) for other, allowed in when.items()})


def _listed(values: Any) -> list[Any]:  # noqa: ANN401
    values = values if isinstance(values, list) else [values]
    return [parse_value(value) if isinstance(value, str) else value for value in values]


def _check_key(key: str) -> None:
    group, _, name = key.partition(".")
    section = Config.model_fields.get(group)
    if section is None or name not in section.annotation.model_fields:  # type: ignore[union-attr]
        raise InputError(f"tune.space: config key {key} does not exist{nearest_key(key)}")


def _check_value(key: str, value: Any) -> None:  # noqa: ANN401
    """Raise an InputError if the key cannot have the value, whatever the other keys are."""
    group, _, name = key.partition(".")
    try:
        Config.model_validate({group: {name: value}})
    except ValidationError as error:
        for problem in error.errors():
            if problem["loc"][:2] == (group, name):
                raise InputError(f"tune.space: {key}={value!r}: {problem['msg']}") from None
