"""All settings: pydantic groups, read from one YAML file and `group.key=value` overrides.

The groups are frozen and refuse unknown keys.
"""

import difflib
import math
import numbers
import os
import re
from datetime import UTC, date, datetime
from types import UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from bert4rec import storage
from bert4rec.errors import InputError

LARGEST_TIME = 1e11
"""Largest Unix time: the year 5138 in seconds, but 1973 in milliseconds, so it tells the two units apart."""


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, values: Any) -> Any:  # noqa: ANN401 - the group's keys
        if not isinstance(values, dict):
            return values
        lists = {name for name, field in cls.model_fields.items() if "tuple" in str(field.annotation)}
        return {
            name: (value,) if name in lists and isinstance(value, int | str) else value
            for name, value in values.items()
        }


TimeUnit = Literal["s", "ms", "us", "ns", "date", "order"]


def moment_of(value: object) -> int:
    """Unix seconds of a Unix time, or of an ISO 8601 date or time, in UTC where it names no offset.

    Raises
    ------
    ValueError
        If it is neither.
    """
    expected = "expected a Unix time in seconds, or an ISO date or time such as 2026-01-01 or 2026-01-01T12:30"
    if isinstance(value, numbers.Real) and not isinstance(value, bool):  # of numpy too
        if not abs(seconds := float(value)) <= LARGEST_TIME:
            raise ValueError(f"{value} is no Unix time in seconds; {expected}")
        return math.floor(seconds)
    try:
        moment = datetime.fromisoformat(str(value))
    except ValueError:
        raise ValueError(f"{value!r} is no time; {expected}") from None
    return math.floor((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


class DataConfig(_Group):
    """The input files, and which part of them training uses."""

    data_dir: str = "data/ml-100k"
    """Directory of the input files: local, s3:// or gs://. Jobs download the default data set if it is missing."""
    data_file: str = "train_ratings.csv"
    """Interactions `user,item[,time]` in data_dir: a file, a folder of files, or a pattern (`*`, `**`); CSV, compressed
    CSV or Parquet."""
    columns: dict[Literal["user", "item", "time"], str | None] = {}
    """The file's own names of the columns, for example {user: userId, item: movieId, time: timestamp}. Without a
    header, their numbers: {user: 1, item: 2, time: 4}. time: null keeps the order of rows. Default: user, item and, if
    the file has it, time."""
    delimiter: str = Field(",", min_length=1, max_length=8)
    """What separates the fields of a CSV file: one character or several, such as `;`, `|`, `::` or tab."""
    header: bool = True
    """Whether the first line of a CSV file names the columns. false needs data.columns."""
    time_unit: Literal["auto"] | TimeUnit = "auto"
    """What numbers in the column time are: seconds, milli-, micro- or nanoseconds since 1970; dates such as 20240131 or
    20240131235959; or an order alone, without years. auto: what the size of all of them agrees on. ISO 8601 text and
    Parquet's dates and timestamps need no unit."""
    list_separator: str = "|"
    """Separates several values in one field of genres.tsv and writers.tsv, as in `Action|Comedy`. An empty text splits
    nothing."""
    batch_size: int = Field(512, ge=1)
    """Users per training step, counted over all workers."""
    min_interactions: int = Field(3, ge=1)
    """Training and validation leave out users with fewer interactions. These users still get recommendations."""
    use_full_data: bool = False
    """Train on every interaction. There is then no validation and no early stopping, and the best epoch is the one with
    the smallest train_loss."""
    sampling_strategy: Literal["recent", "weighted", "window"] = "recent"
    """Which max_len items of a longer history training reads. recent: the last ones. weighted: a random choice without
    replacement that prefers recent items (weight n for the n-th item) and keeps their order. window: consecutive items
    from a random place. weighted and window draw again each epoch."""
    include_new_items: bool = False
    """Add items that have metadata but no interactions to the catalogue, so that jobs can recommend them. Needs
    model.output_features=fused."""
    memory_mb: int = Field(4096, ge=1)
    """MiB that the interactions, and title embeddings, may each take in the memory of a training worker. If they need
    more, the worker reads them from its local disk; the result is the same."""
    min_item_interactions: int = Field(0, ge=0)
    """Reduce the data to their k-core: remove items with fewer interactions, then users with fewer, and repeat until
    nothing changes. Removed users get no recommendations. Published tables on MovieLens-1M use 5; 0 removes nothing."""
    split: Literal["leave-one-out", "temporal"] = "leave-one-out"
    """Which interactions training does not see: the last items of each user (data.holdout), or all interactions after a
    point in time (data.split_time)."""
    split_time: float = Field(0.9, gt=0)
    """Test cut-off of data.split=temporal: a Unix time, or a number below 1 for the share of interactions before it."""
    holdout: Literal[1, 2] = 1
    """How many last items of each user to hold out: 1 for validation alone, 2 for validation and test."""
    since: int | None = None
    """Leave out interactions before this moment: an ISO date or time (UTC), or a Unix time."""
    until: int | None = None
    """Leave out interactions from this moment on."""
    seed: int = Field(42, ge=0)
    """Random seed of the initial weights, the order of users, the masks and dropout."""

    @field_validator("columns", mode="before")
    @classmethod
    def _columns_are_names(cls, columns: object) -> object:
        """Numbers are names too, and YAML takes `{user:userId}` without a blank for a key alone."""
        if not isinstance(columns, dict):
            raise ValueError(
                f"data.columns={columns!r}: expected {{user: NAME, item: NAME, time: NAME}}, in quotes on "
                "a command line"
            )
        pairs = [
            key.split(":", 1) if value is None and ":" in str(key) else (key, value) for key, value in columns.items()
        ]
        return {key: str(value) if isinstance(value, int) else value for key, value in pairs}

    @field_validator("delimiter")
    @classmethod
    def _delimiter_can_separate(cls, delimiter: str) -> str:
        delimiter = {"tab": "\t", r"\t": "\t"}.get(delimiter, delimiter)
        if re.fullmatch(r"\\x[0-9a-f]{2}", delimiter):
            delimiter = chr(int(delimiter[2:], 16))
        if re.search(r'[\w"\r\n\x1f]', delimiter) or not delimiter.isascii():
            raise ValueError(
                f"data.delimiter={delimiter!r}: expected signs such as , ; | :: or tab, and no letter, digit or quote"
            )
        return delimiter

    @field_validator("since", "until", mode="before")
    @classmethod
    def _is_a_moment(cls, value: object) -> object:
        return None if value is None else moment_of(value)

    @model_validator(mode="after")
    def _columns_without_a_header_are_numbers(self) -> Self:
        named = [name for name in self.columns.values() if name is not None and not re.fullmatch(r"[1-9]\d*", name)]
        if not self.header and (named or not {"user", "item"} <= set(self.columns)):
            raise ValueError(
                "data.header=false needs the numbers of the columns, such as "
                'data.columns="{user: 1, item: 2, time: 4}"' + (f"; found {named[0]}" if named else "")
            )
        return self

    @model_validator(mode="after")
    def _since_is_before_until(self) -> Self:
        if self.since is not None and self.until is not None and self.since >= self.until:
            raise ValueError(f"data.since={self.since} is not before data.until={self.until} (Unix times)")
        return self

    @model_validator(mode="after")
    def _split_time_is_a_time_or_a_share(self) -> Self:
        if self.split_time == 1:
            raise ValueError("data.split_time=1 leaves nothing to test on; expected a share below 1, or a Unix time")
        return self

    @model_validator(mode="after")
    def _leaves_something_to_train_on(self) -> Self:
        if self.min_interactions <= self.holdout and self.split == "leave-one-out" and not self.use_full_data:
            raise ValueError(
                f"data.min_interactions={self.min_interactions} must be larger than data.holdout={self.holdout}, "
                "or a user has nothing left to train on"
            )
        return self


DATASET_KEYS = (
    *("columns", "delimiter", "header", "time_unit", "list_separator"),
    *("include_new_items", "min_item_interactions", "since", "split", "split_time", "until"),
)
"""Keys of `data` that change the prepared dataset made from the same files. All other keys change the training alone,
except `data_dir` and `data_file`, which name the files."""


def data_identity(data: DataConfig) -> dict[str, Any]:
    """The `DATASET_KEYS` that are set: they tell apart the prepared datasets made from the same files."""
    without = {"split_time"} if data.split == "leave-one-out" else set()
    return data.model_dump(mode="json", include=set(DATASET_KEYS) - without, exclude_defaults=True)


TimePart = Literal["rotary", "gap", "bias", "calendar"]
"""A way in which the network reads times; `model.time_encoding` combines them."""


class ModelConfig(_Group):
    """The network: BERT4Rec, arXiv 1904.06690, Section 3."""

    hidden_units: int = Field(256, ge=1)
    """Width of embeddings and hidden states."""
    num_heads: int = Field(4, ge=1)
    """Attention heads per block. The number must divide hidden_units."""
    num_layers: int = Field(2, ge=1)
    """Transformer blocks."""
    max_len: int = Field(200, ge=2)
    """Longest sequence that the network reads. In scoring, the appended [MASK] counts as one item."""
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    """What a place sees, and so what training asks. bidirectional: all places; training masks items and predicts them,
    as in the paper. causal: itself and the places before it; at each item, training predicts the next one, as scoring
    does (SASRec, Kang and McAuley 2018, arXiv 1808.09781), and masks nothing."""
    position_encoding: Literal["learned", "rotary"] = "learned"
    """How the network knows an item's place. learned: an embedding of its distance from the end, as in the paper.
    rotary: the same, and attention also rotates queries and keys by that distance (RoPE, Su et al. 2021, arXiv
    2104.09864), so that it sees how far apart two items are."""
    time_encoding: str = "none"
    """How the network knows when interactions happened: none, or one or more of rotary, gap, bias and calendar, joined
    by +, for example rotary+gap. rotary: attention rotates half of each head by time, with periods from a minute to a
    year. gap: an embedding of the logarithm of the time since the item before. bias: attention adds a learned number
    that depends on the time between two items. calendar: embeddings of the hour and the day of the week (UTC). Needs a
    column time."""
    dropout_rate: float = Field(0.2, ge=0, lt=1)
    """Dropout rate after the embeddings and after each sub-layer (Section 3.3)."""
    random_mask_prob: float = Field(0.2, gt=0, le=1)
    """Probability that training masks an item and predicts it (the masked-item task, Section 3.6)."""
    last_item_mask_ratio: float = Field(0.05, ge=0, le=1)
    """Probability that training also masks the last item of a sequence, which is the item that scoring predicts."""
    share_embeddings: bool = True
    """Use the item embeddings as output weights (equation 7). false: learn a separate output matrix."""
    output_transform: bool = True
    """Put the dense layer with GELU of equation 7 between the last block and the output weights. false: scores are the
    product of the last block's state and the weights."""
    use_genre_emb: bool = False
    """Fuse each item's genres (the mean of their embeddings) into its input vector. Needs genres.tsv."""
    use_director_emb: bool = False
    """Fuse the director into the input vector. Needs directors.tsv."""
    use_writer_emb: bool = False
    """Fuse the writers (the mean of their embeddings) into the input vector. Needs writers.tsv."""
    use_title_emb: bool | None = None
    """Fuse the title embedding of `jobs.embed`, which training does not change, into the input vector. Default: true if
    the embeddings exist."""
    metadata_fusion: Literal["concat", "add", "gate"] = "gate"
    """How an item's vectors become one. concat: a linear layer over all of them. add: their sum. gate: a weighted sum
    whose weights the model learns."""
    metadata_dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout rate of the metadata vectors."""
    output_features: Literal["ids", "fused"] = "ids"
    """Vectors that the output layer uses as weights. ids: the item embeddings, as in the paper. fused: the input
    vectors with metadata, which can also rank items without interactions (data.include_new_items). fused needs
    share_embeddings."""

    @field_validator("time_encoding")
    @classmethod
    def _time_encoding_is_known(cls, text: str) -> str:
        parts, known = {part.strip() for part in text.split("+")}, get_args(TimePart)
        if parts == {"none"}:
            return "none"
        if parts - set(known):
            raise ValueError(
                f"model.time_encoding={text}: expected none, or some of {', '.join(known)} joined by +, such as "
                "rotary+gap"
            )
        return "+".join(part for part in known if part in parts)  # one spelling, so that one model has one name

    @property
    def time_parts(self) -> tuple[str, ...]:
        """The parts of time_encoding; empty if the network reads no times."""
        return () if self.time_encoding == "none" else tuple(self.time_encoding.split("+"))

    @property
    def uses_metadata(self) -> bool:
        """Whether items have more than their id."""
        return any(getattr(self, key) for key in type(self).model_fields if key.startswith("use_"))

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if self.hidden_units % self.num_heads:
            raise ValueError(f"model.num_heads={self.num_heads} does not divide model.hidden_units={self.hidden_units}")
        if self.position_encoding == "rotary" and self.hidden_units // self.num_heads % 2:
            raise ValueError(
                "model.position_encoding=rotary needs an even width of each head, and model.hidden_units="
                f"{self.hidden_units} with model.num_heads={self.num_heads} gives {self.hidden_units // self.num_heads}"
            )
        if "rotary" in self.time_parts and (width := self.hidden_units // self.num_heads) % 2 + (width < 4):
            raise ValueError(
                "model.time_encoding=rotary needs heads of an even width of 4 or more, and model.hidden_units="
                f"{self.hidden_units} with model.num_heads={self.num_heads} gives {width}"
            )
        if self.output_features == "fused" and not self.share_embeddings:
            raise ValueError("model.output_features=fused needs model.share_embeddings=true")
        return self


Loss = Literal["cross-entropy", "sampled-softmax", "gbce"]
SAMPLED_LOSSES: tuple[Loss, ...] = ("sampled-softmax", "gbce")
"""Losses that compare a target with `training.num_negatives` items; all others compare it with every item."""
ShardedLoss = Literal["cross-entropy", "sampled-softmax", "gbce"]
SHARDED_LOSSES: tuple[Loss, ...] = get_args(ShardedLoss)
"""Losses that tables in shards can compute."""


class TrainingConfig(_Group):
    """How training runs, and on which hardware."""

    start_from: str | None = None
    """Model directory whose weights training starts from, instead of random ones. Training matches items by their
    ids."""
    num_epochs: int = Field(500, ge=1)
    """Most epochs that training may take. An epoch is a pass over all training users."""
    lr: float = Field(0.001, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.0, ge=0)
    """L2 penalty (adam) or decoupled weight decay (adamw, muon). It applies to matrices, not to biases, norms and the
    padding row."""
    optimizer: Literal["adam", "adamw", "muon"] = "adamw"
    """Optimiser. adam and adamw use torch's fused kernels. muon updates the transformer's matrices by Muon (Jordan et
    al. 2024, scaled as in arXiv 2502.16982) and all other weights by adamw."""
    item_optimizer: Literal["dense", "rowwise"] = "dense"
    """How to update the item embedding and the output layer's weights and biases. dense: each step updates all rows.
    rowwise: a step updates only the rows that it looked up, by AdamW, and its time hardly depends on the number of
    items. rowwise needs a loss that samples items."""
    shard_items: bool = False
    """Split the item table, its optimiser state and the output bias by rows over the training workers, for catalogues
    of which a worker cannot hold a copy. Workers then send each other the rows that a step looks up, and the hidden
    states at its masked places; each draws its share of the negatives from its own items."""
    scheduler: Literal["constant", "cosine", "linear"] = "constant"
    """Course of the learning rate after the warm-up. cosine and linear fall to zero at num_epochs."""
    warmup_epochs: float = Field(0.0, ge=0)
    """Epochs over which the learning rate rises linearly to lr. Fractions are allowed."""
    loss: Loss = "cross-entropy"
    """cross-entropy compares each target with all items. For large catalogues, the others compare it with num_negatives
    sampled items: sampled-softmax with log-Q correction, gbce by generalised binary cross-entropy (Petrov and Macdonald
    2023, arXiv 2308.07192)."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Probability that cross-entropy takes from the target and gives to all items alike (Szegedy et al. 2016, arXiv
    1512.00567), so that a network on little data is less sure. Needs training.loss=cross-entropy without shards."""
    num_negatives: int = Field(256, ge=1)
    """Negatives drawn per forward pass and shared by all its targets. Only losses that sample items use them."""
    negative_sampling: Literal["uniform", "popularity"] = "uniform"
    """How to draw negatives: uniformly, or in proportion to the interactions in the training data. popularity needs
    training.loss=sampled-softmax."""
    gbce_t: float = Field(0.75, ge=0, le=1)
    """Calibration t of gbce: 0 is plain binary cross-entropy, 1 removes all overconfidence that negative sampling
    causes."""
    gradient_clip_val: float | None = Field(None, gt=0)
    """Clip the gradient of a step to this norm. null: do not clip."""
    monitor_metric: str = "val_ndcg@10"
    """Metric that chooses the best checkpoint and decides on early stopping: a validation metric or train_loss."""
    early_stopping: bool = True
    """Stop when monitor_metric has not improved for early_stopping_patience validations."""
    early_stopping_patience: int = Field(20, ge=1)
    """Validations without improvement before training stops."""
    val_check_interval: int = Field(1, ge=1)
    """Validate and write a checkpoint every so many epochs, and after the last epoch."""
    checkpoint_minutes: float = Field(10, gt=0)
    """Save in the middle of an epoch too, every so many minutes, or more rarely where saving would take more than 1% of
    the time. A run that goes on from there ends with the same result."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Hardware for training and scoring. auto gives each worker a GPU if the cluster has enough of them."""
    num_workers: int | None = Field(None, ge=1)
    """Training (DDP) workers; on GPUs each has one GPU. Default: one per GPU, or one per CPU core, but no more than
    leaves each worker 8 users per step. A trial of a sweep has one worker by default."""
    min_workers: int | None = Field(None, ge=1)
    """Train with at least this many workers while nodes for num_workers are missing. Default: wait for all workers."""
    cpus_per_worker: int | None = Field(None, ge=1)
    """CPU cores and torch threads per worker; they override OMP_NUM_THREADS. Default: an equal share of the cluster's
    cores."""
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    """Floating-point precision of the forward and backward pass."""
    max_failures: int = Field(3, ge=0)
    """How often training may restart from the last checkpoint after a worker or its node has died."""

    @model_validator(mode="after")
    def _negatives_suit_the_loss(self) -> Self:
        if self.negative_sampling == "popularity" and self.loss != "sampled-softmax":
            raise ValueError("training.negative_sampling=popularity is for training.loss=sampled-softmax")
        return self

    @model_validator(mode="after")
    def _rows_can_be_updated_alone(self) -> Self:
        if self.item_optimizer == "rowwise":
            if self.loss not in SAMPLED_LOSSES:
                raise ValueError(
                    f"training.item_optimizer=rowwise needs training.loss={' or '.join(SAMPLED_LOSSES)}; {self.loss} "
                    "changes every item in each step"
                )
            if self.optimizer == "adam" and self.weight_decay:
                raise ValueError(
                    f"training.item_optimizer=rowwise with training.optimizer=adam needs training.weight_decay=0, not "
                    f"{self.weight_decay:g}: its L2 penalty changes every item in each step; adamw has no such limit"
                )
            if self.precision == "16-mixed":
                raise ValueError(
                    "training.item_optimizer=rowwise needs training.precision=32-true or bf16-mixed, whose gradients "
                    "are not scaled"
                )
        return self

    @model_validator(mode="after")
    def _labels_can_be_smoothed(self) -> Self:
        if self.label_smoothing and (self.loss != "cross-entropy" or self.shard_items):
            raise ValueError(
                f"training.label_smoothing={self.label_smoothing:g} needs training.loss=cross-entropy and "
                "training.shard_items=false"
            )
        return self

    @model_validator(mode="after")
    def _items_can_be_in_shards(self) -> Self:
        if self.shard_items and self.loss not in SHARDED_LOSSES:
            raise ValueError(
                f"training.shard_items=true needs training.loss={' or '.join(SHARDED_LOSSES)}, not {self.loss}"
            )
        if self.shard_items and self.precision == "16-mixed":
            raise ValueError(
                "training.shard_items=true needs training.precision=32-true or bf16-mixed, whose gradients are not "
                "scaled"
            )
        if self.shard_items and self.start_from is not None:
            raise ValueError(
                "training.shard_items=true cannot be combined with training.start_from, which reads whole tables"
            )
        return self

    @model_validator(mode="after")
    def _no_more_at_least_than_at_most(self) -> Self:
        if self.min_workers is not None and self.num_workers is None:
            raise ValueError(
                f"training.min_workers={self.min_workers} needs training.num_workers, the largest number of workers"
            )
        if self.min_workers is not None and self.num_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"training.min_workers={self.min_workers} is larger than training.num_workers={self.num_workers}"
            )
        return self


Protocol = Literal[
    "all", "all-with-seen", "popularity-100", "popularity-100-of-all", "uniform-100", "uniform-100-of-all"
]
QueryTime = Literal["last", "target"]
ItemModel = Literal["item-knn", "ease"]
Baseline = Literal["popularity", "popularity-7-days"] | ItemModel


class EvaluationConfig(_Group):
    """How validation and `jobs.evaluate` rank held-out items (docs/evaluation.md)."""

    exclude_seen: bool = True
    """Leave items that the user has seen out of the ranking, as recommendation does. false turns the protocol all into
    all-with-seen."""
    split: Literal["auto", "validation", "test"] = "auto"
    """Split whose targets `jobs.evaluate` ranks. auto: test if data.holdout is 2 or data.split is temporal, otherwise
    validation."""
    protocols: tuple[Protocol, ...] = Field(("all",), min_length=1)
    """Items among which `jobs.evaluate` ranks the target. all: all items that the user has not seen. all-with-seen: all
    items. popularity-100, uniform-100: 100 sampled items that are nowhere in the user's history. ...-100-of-all: 100
    items sampled from all but the target, without those that the user has seen, as in some published figures."""
    query_time: QueryTime = "last"
    """When validation and `jobs.evaluate` ask a model with model.time_encoding for the held-out item. last: at the
    usual time (the median gap in the training data) after the item before it, as nobody knows when a user comes back.
    target: at the time of the held-out item itself, as in HSTU's figures, which are not comparable with others.
    `jobs.evaluate` reports both and names them."""
    seed: int = Field(42, ge=0)
    """Random seed of the sampled items, which are the same for every model."""
    baselines: tuple[Baseline, ...] = ("popularity",)
    """Baselines that `jobs.evaluate` ranks beside the model: popularity, popularity in the last 7 days, and two
    item-item models."""
    candidates: bool = False
    """Rank targets among what the rules of `inference` allow this user: inference.candidates, exclude and
    exclude_future. A target that they exclude counts as missed. Validation in training obeys the same rules."""
    max_baseline_items: int = Field(20_000, ge=1)
    """Largest catalogue for the baseline ease, whose memory grows with the square of the number of items (12 bytes
    each) and whose time grows with the cube. For a larger catalogue, `jobs.evaluate` skips ease and prints a note."""


class InferenceConfig(_Group):
    """How `jobs.recommend` scores users and what it writes."""

    checkpoint_path: tuple[str, ...] | None = Field(None, min_length=1)
    """Model directory to score with, or run, whose best model it is. With several, [a, b, c], the scores are the mean
    of theirs: models of one catalogue, such as of some seeds. Default: the best model of run.name, or of the newest run
    in run.storage_path."""
    topk: int = Field(10, ge=1)
    """Largest number of recommendations per user."""
    batch_size: int = Field(512, ge=1)
    """Users that one worker scores at once."""
    num_workers: int | None = Field(None, ge=1)
    """Scoring workers, each with one GPU or one CPU core. Default: as many as the cluster has room for when the job
    starts."""
    score_memory_mb: int = Field(256, ge=1)
    """MiB for the scores of one batch. The job ranks a larger catalogue in blocks of items of that size."""
    exclude_seen: bool = True
    """Never recommend an item that is anywhere in the user's history."""
    exclude_future: bool = True
    """Never recommend an item released in a later year than that of inference.at, or, where that is not set and the
    model reads no times, of the user's last interaction. Applies if both years are known."""
    at: int | Literal["now"] | None = None
    """When users are asked for their next item: an ISO date or time (UTC), a Unix time, or now. A model with
    model.time_encoding reads it at [MASK]; it may not be before a user's last interaction. Default: the time of the
    last interaction in the data."""
    popularity_discount: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Prefer less popular items: subtract this factor times log(1 + training interactions) from each item's score."""
    blend: dict[ItemModel, Literal["auto"] | float] = {}
    """Add the scores of an item-item model, {ease: 0.06} or {item-knn: 0.06}: the weight of its standardised scores
    beside the network's. auto takes the weight that ranks best on the validation. It helps most where histories are
    short. ease needs at most evaluation.max_baseline_items items; beyond that, jobs take item-knn and say so."""
    candidates: tuple[str, ...] | None = Field(None, min_length=1)
    """Files of what may be recommended: CSV or Parquet, names or glob patterns. With the column `item`, the only items
    that anybody may get; with the columns `user,item`, the only items that this user may get."""
    candidates_default: Literal["none", "all"] = "none"
    """What users get who have no row in the lists `user,item` of inference.candidates: none gives them nothing, all
    gives them any item."""
    exclude: tuple[str, ...] | None = Field(None, min_length=1)
    """Files of what must never be recommended, in the same two forms: for everybody, or for each user."""
    max_per: dict[str, PositiveInt] = {}
    """At most so many items of a list share a value of a feature, for example {genre: 3, director: 1}. The list is
    filled from further down."""
    diversity: float = Field(0.0, ge=0, le=1)
    """How much a list avoids items that are alike, by their vectors in the model (maximal marginal relevance). 0 is the
    order of the scores; 1 looks at nothing but the differences."""
    diversity_pool: int = Field(100, ge=1)
    """The best so many items of a user, among which inference.diversity chooses."""
    min_score: float | None = Field(None, allow_inf_nan=False)
    """Leave out items with a lower score. In the unit of inference.scores."""
    scores: Literal["logit", "probability"] = "logit"
    """The scores that are written. probability: the softmax of the logits over all items that the user may get."""
    formats: tuple[Literal["parquet", "csv"], ...] = Field(("parquet", "csv"), min_length=1)
    """File formats to write."""
    output_path: str | None = None
    """Directory of the results. Default: `recommendations` beside the model directory."""
    users: tuple[int | str, ...] | None = Field(None, min_length=1)
    """Score only these users, for example [1, 2]. The job prints their recommendations with titles, and writes files
    only if output_path is set."""
    users_file: str | None = None
    """Score new users, who are not in the data. Names a CSV or Parquet file of their histories, `user,item[,time]`. The
    job prints and writes as for inference.users."""
    similar_to: tuple[int | str, ...] | None = Field(None, min_length=1)
    """For each of these items, for example [50, 100], print the topk items with the most similar vectors in the model
    (cosine)."""

    @field_validator("checkpoint_path", mode="before")
    @classmethod
    def _one_path_is_a_list(cls, paths: object) -> object:
        return [paths] if isinstance(paths, str) else paths

    @field_validator("at", mode="before")
    @classmethod
    def _at_is_a_moment(cls, value: object) -> object:
        return value if value is None or value == "now" else moment_of(value)

    @field_validator("blend", mode="before")
    @classmethod
    def _blend_is_one_weight(cls, blend: object) -> object:
        weights = list(blend.values()) if isinstance(blend, dict) else [None]
        is_number = [isinstance(each, int | float) and 0 <= each < math.inf for each in weights]
        if len(weights) > 1 or not all(
            number or each == "auto" for number, each in zip(is_number, weights, strict=True)
        ):
            raise ValueError(
                f"inference.blend={blend!r}: expected one item-item model with auto or a weight of 0 or more, such as "
                "{ease: auto} or {ease: 0.06}"
            )
        return blend

    @property
    def is_for_few(self) -> bool:
        """Whether the config asks for anything other than recommendations for every user of the data."""
        return not (self.users is None and self.users_file is None and self.similar_to is None)


class ExportConfig(_Group):
    """What `jobs.export` writes: the model as a program that needs no other code of this package, or its vectors."""

    formats: tuple[Literal["torch", "onnx", "vectors"], ...] = Field(("torch", "onnx"), min_length=1)
    """Formats to write. torch: model.pt2 for torch.export. onnx: model.onnx, which needs the extra `export`. vectors:
    items.parquet and users.parquet, whose vectors have the scores as inner products."""
    topk: int | None = Field(None, ge=1)
    """The program returns this many best items per history, without the items of the history if inference.exclude_seen.
    Default: it returns the scores of all items."""
    output_path: str | None = None
    """Directory of the result. Default: `export` beside the model directory."""


class EmbeddingConfig(_Group):
    """How `jobs.embed` makes title embeddings."""

    method: Literal["sentence-transformers", "bert-mean", "tfidf-svd"] = "sentence-transformers"
    """How a text becomes a vector. sentence-transformers: a model of that library. bert-mean: the mean over the tokens
    of an encoder of the transformers library. tfidf-svd: TF-IDF and SVD, which needs no download."""
    model_name: str = "mixedbread-ai/mxbai-embed-large-v1"
    """The encoder: its name on the hub, or a local folder. tfidf-svd ignores this key."""
    with_genres: bool = True
    """Embed "{title}. Genres: {genre}, {genre}". false: embed the title alone."""
    width: int = Field(128, ge=1)
    """Largest width of the vectors of tfidf-svd. An encoder has its own width."""
    batch_size: int = Field(64, ge=1)
    """Texts that one worker encodes at once."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Hardware for the encoders."""
    output_path: str | None = None
    """Parquet file of the embeddings, which training reads. Default: title_embeddings.parquet in data.data_dir."""
    write_tsv: bool = False
    """Also write a .tsv file beside it: each line has the item and its numbers, separated by blanks."""
    overwrite: bool = False
    """Embed every item again. false: embed only items whose text or model has changed."""
    backup_original: bool = False
    """Keep a copy of the previous file with the ending .bak."""


class TuneConfig(_Group):
    """How `jobs.tune` searches for settings."""

    space: dict[str, Any] | None = None
    """Config keys to search and their values, for example {model.hidden_units: {choice: [64, 128]}, training.lr:
    {loguniform: [1e-4, 1e-2]}}. A key may also have uniform, int (both ends included) or one fixed value. docs/tune.md
    lists the default space and explains conditions."""
    search: Literal["random", "tpe"] = "random"
    """random: independent draws. tpe: Optuna's tree-structured Parzen estimator, which learns from earlier trials."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha stops a trial whose best monitor_metric so far is not among the best 1/reduction_factor of the trials that
    have trained as long. none trains all trials to the end."""
    num_trials: int = Field(16, ge=1)
    """Trials of the whole sweep. A larger number than before continues a finished sweep."""
    include_config: bool = True
    """Give the first trial the config's own values, so that the other trials have something to beat."""
    max_concurrent_trials: int | None = Field(None, ge=1)
    """Most trials that run at once, each with training.num_workers workers. Default: as many as the cluster has CPU
    cores or GPUs for."""
    time_budget_minutes: float | None = Field(None, gt=0)
    """Stop all trials after this many minutes. The same command continues the sweep for as many minutes again."""
    grace_epochs: int = Field(5, ge=1)
    """Epochs that asha lets every trial train before it compares trials."""
    reduction_factor: float = Field(3, gt=1)
    """asha compares trials after grace_epochs, and again each time a trial has trained this many times as long."""
    max_failed_trials: int = Field(3, ge=0)
    """End the sweep if more trials than this fail."""
    refit: bool = False
    """After the search, train the best settings on the full data (data.use_full_data), up to the epoch in which the
    best trial was best."""


class RunConfig(_Group):
    """Names and places of runs."""

    name: str | None = Field(None, pattern=r"^[\w.-]+$")
    """Directory of the run or sweep in storage_path. By default its name follows from the data and the settings, so
    that the same command continues the same run."""
    storage_path: str = "runs"
    """Root directory of prepared datasets and runs: a local path, or a URI that all nodes can reach."""
    chosen: dict[str, str] = {}
    """What `--config auto` chose for these data, and why. It writes this key itself, for the run's config.yaml."""
    mlflow_uri: str | None = None
    """MLflow tracking server, or a database such as sqlite:///mlflow.db, to which training also logs. Needs the extra
    `mlflow`."""

    @field_validator("name")
    @classmethod
    def _name_is_free(cls, name: str | None) -> str | None:
        if name in (".", "..", "prepared"):
            raise ValueError(f"run.name={name} is no name for a run: run.storage_path/{name} has another purpose")
        return name


class Config(_Group):
    """All groups of settings."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    inference: InferenceConfig = InferenceConfig()
    export: ExportConfig = ExportConfig()
    tune: TuneConfig = TuneConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _monitor_metric_exists(self) -> Self:
        if self.training.monitor_metric not in (known := [*METRIC_NAMES, "train_loss"]):
            close = difflib.get_close_matches(self.training.monitor_metric, known, n=1)
            raise ValueError(
                f"training.monitor_metric={self.training.monitor_metric!r} is not a metric; "
                f"expected one of {', '.join(known)}" + (f" (did you mean {close[0]}?)" if close else "")
            )
        return self

    @model_validator(mode="after")
    def _new_items_can_be_scored(self) -> Self:
        if self.data.include_new_items and self.model.output_features != "fused":
            raise ValueError(
                "data.include_new_items=true needs model.output_features=fused: "
                "an item without interactions has nothing but its metadata to be scored by"
            )
        return self

    @model_validator(mode="after")
    def _output_is_in_shards_too(self) -> Self:
        if self.training.shard_items and self.model.output_features == "fused":
            raise ValueError(
                "training.shard_items=true needs model.output_features=ids; fused scores each item by what other "
                "workers learn too"
            )
        if self.training.shard_items and not self.model.share_embeddings:
            raise ValueError("training.shard_items=true needs model.share_embeddings=true")
        if self.training.shard_items and self.evaluation.candidates:
            raise ValueError(
                "training.shard_items=true needs evaluation.candidates=false: validation does not obey lists of items "
                "there; jobs.evaluate does, with training.shard_items=false"
            )
        return self

    @property
    def monitor(self) -> str:
        """The metric that chooses the best checkpoint: train_loss on the full data, where there is no validation."""
        return "train_loss" if self.data.use_full_data else self.training.monitor_metric

    @property
    def data_name(self) -> str:
        """Short name of the data, from which names of directories are made."""
        return os.path.basename(storage.absolute(self.data.data_dir).rstrip("/")) or "data"

    @property
    def embeddings_path(self) -> str:
        """Path of the title embeddings."""
        return storage.absolute(
            self.embedding.output_path or storage.join(self.data.data_dir, "title_embeddings.parquet")
        )

    @property
    def prepared_path(self) -> str:
        """Directory of the prepared dataset. All runs on the same input and dataset options share it."""
        files = {"data_dir": storage.absolute(self.data.data_dir), "data_file": self.data.data_file}
        source = files | data_identity(self.data)
        name = f"{self.data_name}-{storage.fingerprint(source)[:8]}"
        return storage.join(storage.absolute(self.run.storage_path), "prepared", name)


METRIC_CUTOFFS = (1, 5, 10, 20)
METRIC_NAMES = (
    *(f"val_{name}@{k}" for name in ("hr", "ndcg") for k in METRIC_CUTOFFS),
    "val_mrr",
)


def load_config(path: str | None = None, overrides: list[str] | None = None) -> Config:
    """Read a YAML file (or take the defaults) and apply `group.key=value` overrides, whose values are YAML too.

    A key of text takes its value as it is written: run.name=007 is text, and so are ids.

    Raises
    ------
    InputError
        If the file cannot be read, a key does not exist (the message names the nearest) or a value is out of range.
    """
    content: dict[str, Any] = {}
    if path is not None:
        content = _read_yaml(path)
    for override in overrides or []:
        key, equals, value = override.partition("=")
        group, dot, name = key.partition(".")
        if not (equals and dot and name):
            raise InputError(
                f"{override!r} is no override; expected group.key=value, such as model.hidden_units=64"
                f"{nearest_key(key)}"
            )
        section = content.setdefault(group, {})
        section[name] = _parse_for(group, name, value)
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise InputError(_explain(error, path)) from None


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        text = storage.read_bytes(path)
        content, written = yaml.safe_load(text), yaml.load(text, yaml.BaseLoader)
    except FileNotFoundError:
        raise InputError(f"{path}: no such config file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML ({error})") from None
    content = content or {}
    if not isinstance(content, dict) or not all(isinstance(group, dict) for group in content.values()):
        raise InputError(f"{path}: expected groups ({', '.join(Config.model_fields)}) of `key: value` lines")
    return {
        group: {name: _of_type(group, name, value, written[str(group)][str(name)]) for name, value in keys.items()}
        for group, keys in content.items()
    }


def _parse_for(group: str, name: str, text: str) -> Any:  # noqa: ANN401 - any YAML value
    """The value of a key on the command line."""
    annotation = _annotation(group, name)
    choices = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    if str in choices:
        return None if type(None) in choices and text.strip() in ("", "null", "~") else text
    try:
        written = yaml.load(text, yaml.BaseLoader)
    except yaml.YAMLError:
        written = text
    return _of_type(group, name, parse_value(text), written)


def _of_type(group: str, name: str, value: Any, written: Any) -> Any:  # noqa: ANN401 - any YAML value
    """A key's value, where YAML has read `value` and the user has `written` text, or lists and mappings of text.

    A key that may hold text gets it as it is written, because YAML takes 007, 1_000, yes and 12:30 for other things
    than ids or names.
    """
    annotation = str(_annotation(group, name))
    return _as_written(value, written) if re.search(r"\bstr\b", annotation) and "Any" not in annotation else value


def _as_written(value: Any, written: Any) -> Any:  # noqa: ANN401 - any YAML value
    """The text `written` for each scalar of `value`, except for null."""
    if isinstance(value, dict):
        return {key: _as_written(each, text) for each, (key, text) in zip(value.values(), written.items(), strict=True)}
    if isinstance(value, list):
        return [_as_written(each, text) for each, text in zip(value, written, strict=True)]
    return None if value is None else written


def _annotation(group: str, name: str) -> Any:  # noqa: ANN401 - a type; Any for no key
    section = Config.model_fields[group].annotation if group in Config.model_fields else None
    fields = section.model_fields if section is not None else {}  # type: ignore[union-attr]
    return fields[name].annotation if name in fields else Any


def parse_value(text: str) -> Any:  # noqa: ANN401 - any YAML scalar or list
    """Parse `text` as a YAML value. Numbers such as 1e-3, which YAML 1.1 takes for text, become numbers."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return text
    return text if isinstance(value, date) else value


def _explain(error: ValidationError, path: str | None) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"config key {key} does not exist{nearest_key(key)}")
        elif problem["type"] == "value_error":  # our own messages name their keys
            lines.append(str(problem["ctx"]["error"]))
        else:
            lines.append(f"{key}={problem['input']!r}: {problem['msg']}")
    return (f"{path}: " if path else "") + "; ".join(lines)


def nearest_key(key: str) -> str:
    """A hint at the existing config key that is nearest to `key`, or an empty string."""
    known = [f"{group}.{name}" for group, field in Config.model_fields.items() for name in _keys(field.annotation)]
    close = difflib.get_close_matches(key, [*known, *Config.model_fields], n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _keys(group: Any) -> list[str]:  # noqa: ANN401 - a pydantic class
    return list(group.model_fields)
