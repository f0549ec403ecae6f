"""All settings: pydantic groups (frozen, unknown keys refused), from one YAML file and `group.key=value` overrides."""

import difflib
import os
from datetime import date
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bert4rec import storage
from bert4rec.errors import InputError


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class DataConfig(_Group):
    """What is read, and which part of it is trained on."""

    data_dir: str = "data/ml-100k"
    """Directory (local or s3://, gs://) of the input files; the default is fetched when it is not there."""
    data_file: str = "train_ratings.csv"
    """Interactions `user,item[,time]` in data_dir: a file name or a glob pattern; CSV, compressed CSV or Parquet."""
    batch_size: int = Field(512, ge=1)
    """Users a training step, over all workers."""
    min_interactions: int = Field(3, ge=1)
    """Users with fewer interactions are left out of training and validation (they still get recommendations)."""
    use_full_data: bool = False
    """Train on every interaction: no validation, no early stopping, the best epoch is the one of least train_loss."""
    sampling_strategy: Literal["recent", "weighted", "window"] = "recent"
    """Of a history longer than max_len: the last max_len items; or, drawn anew each epoch, max_len without replacement,
    probability rising linearly with recency, order kept; or max_len that follow one another."""
    include_new_items: bool = False
    """Give items that have metadata but no interactions a place in the catalogue, so that they can be recommended;
    needs model.output_features=fused."""
    memory_mb: int = Field(4096, ge=1)
    """MiB of a training worker for the interactions; more are read from its local disk, with the same result."""
    min_item_interactions: int = Field(0, ge=0)
    """Leave items with fewer interactions out of the data, then users with fewer, again until none is left to leave out
    (the k-core; published tables on MovieLens-1M use 5); such users get no recommendations. 0: every item and user."""
    split: Literal["leave-one-out", "temporal"] = "leave-one-out"
    """What is kept from training: each user's last items (data.holdout), or all from a moment on (data.split_time)."""
    split_time: float = Field(0.9, gt=0)
    """Test cut-off of data.split=temporal: a Unix time, or, below 1, the share of interactions before it."""
    holdout: Literal[1, 2] = 1
    """Last items of each user kept from training: 1 gives train / validation, 2 train / validation / test."""
    seed: int = Field(42, ge=0)
    """Seed of the weights, the order of users, the masks and dropout."""

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


DATASET_KEYS = ("include_new_items", "min_item_interactions", "split", "split_time")
"""Keys of `data` that make another prepared dataset of the same files; all others are of the training alone, but for
`data_dir` and `data_file`, which name the files."""


def data_identity(data: DataConfig) -> dict[str, Any]:
    """What makes one prepared dataset another than the next of the same files: `DATASET_KEYS` that are set."""
    without = {"split_time"} if data.split == "leave-one-out" else set()
    return data.model_dump(mode="json", include=set(DATASET_KEYS) - without, exclude_defaults=True)


class ModelConfig(_Group):
    """The network (BERT4Rec, arXiv 1904.06690, Section 3)."""

    hidden_units: int = Field(256, ge=1)
    """Width of embeddings and hidden states."""
    num_heads: int = Field(4, ge=1)
    """Attention heads; must divide hidden_units."""
    num_layers: int = Field(2, ge=1)
    """Transformer blocks."""
    max_len: int = Field(200, ge=2)
    """Longest sequence, the appended [MASK] of scoring counted in."""
    position_encoding: Literal["learned", "rotary"] = "learned"
    """Where an item stands: a learned embedding of its distance from the end (as the paper); or, besides, queries and
    keys turned by it (RoPE, Su et al. 2021, arXiv 2104.09864), so that attention sees how far apart two items are."""
    dropout_rate: float = Field(0.2, ge=0, lt=1)
    """Dropout after the embeddings and after each sub-layer (Section 3.3)."""
    random_mask_prob: float = Field(0.2, gt=0, le=1)
    """Probability that an item becomes a target of the masked-item task (Section 3.6)."""
    last_item_mask_ratio: float = Field(0.05, ge=0, le=1)
    """Probability that, besides, the last item of a sequence is masked."""
    share_embeddings: bool = True
    """Output weights tied to the item embedding (equation 7), or a matrix of their own."""
    use_genre_emb: bool = False
    """Add each item's genres (mean of their embeddings) to its input; needs genres.tsv."""
    use_director_emb: bool = False
    """The same for the director; needs directors.tsv."""
    use_writer_emb: bool = False
    """The same for the writers (mean); needs writers.tsv."""
    use_title_emb: bool | None = None
    """The same for the title embedding of `jobs.embed`, kept frozen; default: where embeddings exist."""
    metadata_fusion: Literal["concat", "add", "gate"] = "gate"
    """How item and metadata become one vector: a linear layer over all, their sum, or a sum weighted by gates."""
    metadata_dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout of the metadata vectors."""
    output_features: Literal["ids", "fused"] = "ids"
    """Output weights: item embeddings alone (as the paper), or the same fused vectors as the input; with those, items
    without interactions (data.include_new_items) can be ranked. Needs share_embeddings."""

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if self.hidden_units % self.num_heads:
            raise ValueError(f"model.num_heads={self.num_heads} does not divide model.hidden_units={self.hidden_units}")
        if self.position_encoding == "rotary" and self.hidden_units // self.num_heads % 2:
            raise ValueError(
                "model.position_encoding=rotary needs an even width of each head, and model.hidden_units="
                f"{self.hidden_units} with model.num_heads={self.num_heads} gives {self.hidden_units // self.num_heads}"
            )
        if self.output_features == "fused" and not self.share_embeddings:
            raise ValueError("model.output_features=fused needs model.share_embeddings=true")
        return self


class TrainingConfig(_Group):
    """How the network is trained, and on what."""

    start_from: str | None = None
    """Model directory whose weights training begins with, instead of random ones; items are matched by their ids."""
    num_epochs: int = Field(500, ge=1)
    """Passes over the training users, at most."""
    lr: float = Field(0.001, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.0, ge=0)
    """L2 penalty (adam) or decoupled decay (adamw, muon) of matrices; biases, norms and the padding row have none."""
    optimizer: Literal["adam", "adamw", "muon"] = "adamw"
    """Optimiser; the fused kernels of torch. muon: the transformer's matrices by Muon (Jordan et al. 2024, as scaled in
    arXiv 2502.16982), all else by adamw."""
    scheduler: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up: constant, or falling to zero at num_epochs."""
    warmup_epochs: float = Field(0.0, ge=0)
    """Epochs in which the learning rate rises linearly to lr; fractions are allowed."""
    loss: Literal["cross-entropy", "sampled-softmax", "gbce"] = "cross-entropy"
    """Over all items; or, for large catalogues, over num_negatives drawn ones: softmax with log-Q correction, or
    generalised binary cross-entropy (Petrov and Macdonald 2023, arXiv 2308.07192)."""
    num_negatives: int = Field(256, ge=1)
    """Items drawn for each forward pass, shared by its targets; of the sampled losses."""
    negative_sampling: Literal["uniform", "popularity"] = "uniform"
    """Negatives drawn evenly, or (sampled-softmax) in proportion to the interactions in the training data."""
    gbce_t: float = Field(0.75, ge=0, le=1)
    """Calibration t of gbce: 0 is plain binary cross-entropy, 1 takes all overconfidence of the sampling away."""
    gradient_clip_val: float | None = Field(None, gt=0)
    """Largest norm of the gradient of a step; none by default."""
    monitor_metric: str = "val_ndcg@10"
    """Metric that chooses the best checkpoint and drives early stopping: a validation metric or train_loss."""
    early_stopping: bool = True
    """Stop when monitor_metric has not improved for early_stopping_patience validations."""
    early_stopping_patience: int = Field(20, ge=1)
    """Validations without improvement before training stops."""
    val_check_interval: int = Field(1, ge=1)
    """Epochs from one validation, and checkpoint, to the next; the last epoch always has both."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where training and scoring run; auto takes a GPU a worker where the cluster has enough of them."""
    num_workers: int | None = Field(None, ge=1)
    """Distributed (DDP) workers, one GPU each on GPUs; default: one for each GPU, or for each CPU core, but only so
    many that each has 8 users of a step or more; a trial of a sweep has one."""
    min_workers: int | None = Field(None, ge=1)
    """Workers, at least, to go on with while nodes for num_workers are missing; default: wait for all of them."""
    cpus_per_worker: int | None = Field(None, ge=1)
    """CPU cores, and torch threads, a worker, whatever OMP_NUM_THREADS says; default: the cluster's cores shared
    evenly."""
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    """Arithmetic of the forward and backward pass."""
    max_failures: int = Field(3, ge=0)
    """Times that training restarts from the last checkpoint after a worker or its node died."""

    @model_validator(mode="after")
    def _negatives_suit_the_loss(self) -> Self:
        if self.negative_sampling == "popularity" and self.loss != "sampled-softmax":
            raise ValueError("training.negative_sampling=popularity is for training.loss=sampled-softmax")
        return self

    @model_validator(mode="after")
    def _no_more_at_least_than_at_most(self) -> Self:
        if self.min_workers is not None and self.num_workers is None:
            raise ValueError(f"training.min_workers={self.min_workers} needs training.num_workers, the most to have")
        if self.min_workers is not None and self.num_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"training.min_workers={self.min_workers} is larger than training.num_workers={self.num_workers}"
            )
        return self


Protocol = Literal[
    "all", "all-with-seen", "popularity-100", "popularity-100-of-all", "uniform-100", "uniform-100-of-all"
]
Baseline = Literal["popularity", "popularity-7-days", "item-knn", "ease"]


class EvaluationConfig(_Group):
    """How validation and `jobs.evaluate` rank (docs/evaluation.md)."""

    exclude_seen: bool = True
    """Leave the user's seen items out of the ranking, as recommendation does; false turns protocol all into
    all-with-seen."""
    split: Literal["auto", "validation", "test"] = "auto"
    """Target that `jobs.evaluate` ranks; auto: test where data.holdout is 2 or data.split temporal, else validation."""
    protocols: tuple[Protocol, ...] = Field(("all",), min_length=1)
    """What `jobs.evaluate` ranks the target among: all items but the seen ones (all), all items (all-with-seen), 100
    items that the user never had, drawn by popularity (popularity-100) or uniformly (uniform-100); or what is not seen
    of 100 drawn from all items but the target (...-100-of-all), as in some published figures."""
    seed: int = Field(42, ge=0)
    """Seed of the drawn items: the same ones for every model."""
    baselines: tuple[Baseline, ...] = ("popularity",)
    """What `jobs.evaluate` ranks beside the model: popularity, that of the last 7 days, and two item-item models."""
    max_baseline_items: int = Field(20_000, ge=1)
    """Largest catalogue for ease, whose memory and time grow with its square (12 bytes each) and cube; a larger one
    leaves it out, which is said."""


class InferenceConfig(_Group):
    """Scoring of all users."""

    checkpoint_path: str | None = None
    """Model directory; default: the best one of run.name, or of the newest run in run.storage_path."""
    topk: int = Field(10, ge=1)
    """Recommendations a user, at most."""
    batch_size: int = Field(512, ge=1)
    """Users scored at once by one worker."""
    num_workers: int | None = Field(None, ge=1)
    """Scoring workers, one GPU or one CPU core each; default: as many as the cluster has when the job begins."""
    score_memory_mb: int = Field(256, ge=1)
    """MiB for the scores of one batch; larger catalogues are ranked in blocks of items of that size."""
    exclude_seen: bool = True
    """Never recommend an item of the user's whole history."""
    exclude_future: bool = True
    """Never recommend an item released in a later year than the user's last interaction, where both are known."""
    popularity_discount: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Recommend less popular items: this times log(1 + training interactions) is taken from each item's score."""
    formats: tuple[Literal["parquet", "csv"], ...] = Field(("parquet", "csv"), min_length=1)
    """Files to write."""
    output_path: str | None = None
    """Directory of the results; default: `recommendations` beside the run's checkpoints."""
    users: tuple[int | str, ...] | None = Field(None, min_length=1)
    """Only these users, as [1, 2]: their recommendations are printed with titles, and written if output_path is set."""
    users_file: str | None = None
    """The same for new users, whom the data do not have: a CSV or Parquet file `user,item[,time]` of histories."""
    similar_to: tuple[int | str, ...] | None = Field(None, min_length=1)
    """Print, for each of these items, as [50, 100], the topk most similar ones: cosine of the model's item vectors."""

    @field_validator("users", "similar_to", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, value: object) -> object:
        return (value,) if isinstance(value, int | str) else value

    @property
    def is_for_few(self) -> bool:
        """Whether something else is wanted than recommendations for every user of the data."""
        return not (self.users is None and self.users_file is None and self.similar_to is None)


class ExportConfig(_Group):
    """The model as a program of its own (`jobs.export`)."""

    formats: tuple[Literal["torch", "onnx"], ...] = Field(("torch", "onnx"), min_length=1)
    """torch: a program of torch.export, model.pt2; onnx: model.onnx, which needs the extra `export`."""
    topk: int | None = Field(None, ge=1)
    """The program gives that many items a history, those in it left out if inference.exclude_seen; default: the scores
    of all items."""
    output_path: str | None = None
    """Directory of the result; default: `export` beside the run's checkpoints."""


class EmbeddingConfig(_Group):
    """Title embeddings (`jobs.embed`)."""

    method: Literal["sentence-transformers", "bert-mean", "tfidf-svd"] = "sentence-transformers"
    """A sentence-transformers model; the mean over a transformers encoder's tokens; or TF-IDF and SVD, which needs no
    download."""
    model_name: str = "mixedbread-ai/mxbai-embed-large-v1"
    """Name on the hub, or a local folder, of the encoder; tfidf-svd has none."""
    with_genres: bool = True
    """Embed "{title}. Genres: {genre}, {genre}"; else the title alone."""
    width: int = Field(128, ge=1)
    """Components of tfidf-svd, at most; the encoders have their own width."""
    batch_size: int = Field(64, ge=1)
    """Texts encoded at once."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where encoders run."""
    output_path: str | None = None
    """Parquet file of the embeddings, read by training; default: title_embeddings.parquet in data.data_dir."""
    write_tsv: bool = False
    """Also write a .tsv of the established format (item, blank-separated floats) beside it."""
    overwrite: bool = False
    """Embed every item again, instead of only those whose text or model is new."""
    backup_original: bool = False
    """Keep the previous file as .bak."""


class TuneConfig(_Group):
    """The search of `jobs.tune`."""

    space: dict[str, Any] | None = None
    """What is drawn, by config key, such as {model.hidden_units: {choice: [64, 128]}, training.lr: {loguniform: [1e-4,
    1e-2]}}; also uniform, int (both ends included), a plain value; default and conditions: docs/tune.md."""
    search: Literal["random", "tpe"] = "random"
    """Independent draws, or Optuna's tree-structured Parzen estimator, which learns from the trials before."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha stops a trial whose best monitor_metric so far is not among the first 1/reduction_factor of those that got
    as far; none lets all run to the end."""
    num_trials: int = Field(16, ge=1)
    """Trials of the whole sweep; more than before continues a finished sweep."""
    include_config: bool = True
    """The first trial takes the config's own values, so that the search has something to beat."""
    max_concurrent_trials: int | None = Field(None, ge=1)
    """Trials at once, training.num_workers workers each; default: as many as the cluster has CPU cores (GPUs) for."""
    time_budget_minutes: float | None = Field(None, gt=0)
    """Minutes after which no trial goes on; the same command continues with as many again."""
    grace_epochs: int = Field(5, ge=1)
    """Epochs that asha gives every trial."""
    reduction_factor: float = Field(3, gt=1)
    """asha compares after grace_epochs, and each time that a trial has trained this many times as long."""
    max_failed_trials: int = Field(3, ge=0)
    """More failed trials than this end the sweep."""
    refit: bool = False
    """Train the best settings on the full data (data.use_full_data) for as many epochs as the best trial's best."""


class RunConfig(_Group):
    """Where runs live."""

    name: str | None = Field(None, pattern=r"^[\w.-]+$")
    """Directory of the run, or sweep, in storage_path; default: named after the data and the config, so that the same
    command continues, and finishes, the same run."""
    storage_path: str = "runs"
    """Root of prepared datasets and runs: local, or a URI that all nodes reach."""
    mlflow_uri: str | None = None
    """MLflow tracking server, or a database as sqlite:///mlflow.db, to log training to besides TensorBoard; needs the
    extra `mlflow`."""

    @field_validator("name")
    @classmethod
    def _name_is_free(cls, name: str | None) -> str | None:
        if name in (".", "..", "prepared"):
            raise ValueError(f"run.name={name} is no name for a run: run.storage_path/{name} is another directory")
        return name


class Config(_Group):
    """All groups."""

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
                f"training.monitor_metric={self.training.monitor_metric!r} is no metric of ours; "
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

    @property
    def monitor(self) -> str:
        """The metric that chooses the best checkpoint; on the full data there is no validation, only train_loss."""
        return "train_loss" if self.data.use_full_data else self.training.monitor_metric

    @property
    def data_name(self) -> str:
        """The data's short name, for directories."""
        return os.path.basename(storage.absolute(self.data.data_dir).rstrip("/")) or "data"

    @property
    def embeddings_path(self) -> str:
        """File of the title embeddings."""
        return storage.absolute(
            self.embedding.output_path or storage.join(self.data.data_dir, "title_embeddings.parquet")
        )

    @property
    def prepared_path(self) -> str:
        """Directory of the prepared dataset: one for each input, shared by all runs on it."""
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
    """The config of a YAML file (or the defaults) with `group.key=value` overrides; values are read as YAML.

    Raises
    ------
    InputError
        For a file that cannot be read, a key that does not exist (the nearest is named) or a value out of range.
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
        section[name] = parse_value(value)
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise InputError(_explain(error, path)) from None


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(storage.read_bytes(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such config file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML ({error})") from None
    content = content or {}
    if not isinstance(content, dict) or not all(isinstance(group, dict) for group in content.values()):
        raise InputError(f"{path}: expected groups ({', '.join(Config.model_fields)}) of `key: value` lines")
    return content


def parse_value(text: str) -> Any:  # noqa: ANN401 - any YAML scalar or list
    """The value that YAML reads in `text`; numbers such as 1e-3, which YAML 1.1 takes for text, are numbers."""
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
    """A hint at the config key that `key` was perhaps meant to be, or nothing."""
    known = [f"{group}.{name}" for group, field in Config.model_fields.items() for name in _keys(field.annotation)]
    close = difflib.get_close_matches(key, [*known, *Config.model_fields], n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _keys(group: Any) -> list[str]:  # noqa: ANN401 - a pydantic class
    return list(group.model_fields)
