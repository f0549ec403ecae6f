"""What each config key changes, by key; and that the code which decides it agrees.

A key that the code forgets shows in none of its results: the wrong dataset is taken for up to date, or a filter does
nothing. So each key is really set to another value here.
"""

import os
import shutil
from typing import NamedTuple

import pytest
import torch

from bert4rec import storage
from bert4rec.config import DATASET_KEYS, Config, data_identity, load_config, parse_value
from bert4rec.data.dataset import PreparedDataset
from bert4rec.data.prepare import _up_to_date
from bert4rec.embedding.embed import read_texts
from bert4rec.embedding.encoders import identify
from bert4rec.errors import InputError
from bert4rec.evaluation import evaluate
from bert4rec.inference import fit_blend, recommend
from bert4rec.inference.ranking import Ranking
from bert4rec.training import warm_start
from bert4rec.training.train import what_shapes_the_result
from bert4rec.tune import space, tune
from tests.helpers.datasets import random_histories, random_times, write_dataset
from tests.helpers.in_process import exported, without_ray
from tests.helpers.trainer import Quiet
from tests.unit.model.test_network import make_model

pytestmark = pytest.mark.unit

DATASET = "the prepared dataset: another directory and fingerprint"
MODEL = "the trained model: another name of the run"
NETWORK = "the network: training.start_from refuses a model of the other value"
DRAWN = "a sweep may draw it"
SWEEP = "what a sweep tries: another name of the sweep"
EVALUATION = "what is ranked in an evaluation"
RECOMMENDATIONS = "recommendations: they are made again"
PROGRAM = "exported programs"
VECTORS = "title embeddings: they are made again"

TRAINED = {MODEL, DRAWN}
NOTHING: set[str] = set()
"""It is about where, how fast, for how long or for whom, and about what is written besides."""


class Key(NamedTuple):
    other: str
    """A value that is not the default."""
    changes: set[str]
    beside: tuple[str, ...] = ()
    """Overrides that both values need."""


TFIDF = ("embedding.method=tfidf-svd",)
SAMPLED = ("training.loss=sampled-softmax",)
TWO = ("training.num_workers=2",)

CHANGES = {
    "data.data_dir": Key("/other", {DATASET}),
    "data.data_file": Key("other.csv", {DATASET}),
    "data.columns": Key("{user: u, item: i}", {DATASET, MODEL}),
    "data.delimiter": Key("tab", {DATASET, MODEL}),
    "data.header": Key("false", {DATASET, MODEL}, ("data.columns={user: 1, item: 2}",)),
    "data.time_unit": Key("ms", {DATASET, MODEL}),
    "data.list_separator": Key("&", {DATASET, MODEL, VECTORS}),
    "data.batch_size": Key("7", TRAINED),
    "data.min_interactions": Key("5", {MODEL, EVALUATION}),
    "data.use_full_data": Key("true", {MODEL, EVALUATION}),
    "data.sampling_strategy": Key("window", TRAINED),
    "data.include_new_items": Key("true", {DATASET, MODEL}, ("model.output_features=fused",)),
    "data.memory_mb": Key("7", NOTHING),
    "data.min_item_interactions": Key("5", {DATASET, MODEL}),
    "data.since": Key("2020-01-01", {DATASET, MODEL}),
    "data.until": Key("2020-01-01", {DATASET, MODEL}),
    "data.split": Key("temporal", {DATASET, MODEL, EVALUATION}),
    "data.split_time": Key("0.5", {DATASET, MODEL}, ("data.split=temporal",)),
    "data.holdout": Key("2", {MODEL, EVALUATION}),
    "data.seed": Key("7", TRAINED),
    "model.hidden_units": Key("64", {*TRAINED, NETWORK}),
    "model.num_heads": Key("2", {*TRAINED, NETWORK}),
    "model.num_layers": Key("1", {*TRAINED, NETWORK}),
    "model.max_len": Key("7", {*TRAINED, NETWORK}),
    "model.position_encoding": Key("rotary", {*TRAINED, NETWORK}),
    "model.time_encoding": Key("rotary", {*TRAINED, NETWORK}),
    "model.dropout_rate": Key("0.5", TRAINED),
    "model.random_mask_prob": Key("0.5", TRAINED),
    "model.last_item_mask_ratio": Key("0.5", TRAINED),
    "model.share_embeddings": Key("false", {*TRAINED, NETWORK}),
    "model.output_transform": Key("false", {*TRAINED, NETWORK}),
    "model.attention": Key("causal", {*TRAINED, NETWORK}),
    "model.use_genre_emb": Key("true", {*TRAINED, NETWORK}),
    "model.use_director_emb": Key("true", {*TRAINED, NETWORK}),
    "model.use_writer_emb": Key("true", {*TRAINED, NETWORK}),
    "model.use_title_emb": Key("false", {*TRAINED, NETWORK}),
    "model.metadata_fusion": Key("concat", {*TRAINED, NETWORK}),
    "model.metadata_dropout": Key("0.5", TRAINED),
    "model.output_features": Key("fused", {*TRAINED, NETWORK}),
    "training.start_from": Key("MODEL", TRAINED),
    "training.num_epochs": Key("7", TRAINED),
    "training.lr": Key("0.5", TRAINED),
    "training.weight_decay": Key("0.5", TRAINED),
    "training.optimizer": Key("muon", TRAINED),
    "training.item_optimizer": Key("rowwise", TRAINED, SAMPLED),
    "training.shard_items": Key("true", TRAINED),
    "training.scheduler": Key("cosine", TRAINED),
    "training.warmup_epochs": Key("2", TRAINED),
    "training.loss": Key("gbce", TRAINED),
    "training.label_smoothing": Key("0.1", TRAINED),
    "training.num_negatives": Key("7", TRAINED),
    "training.negative_sampling": Key("popularity", TRAINED, SAMPLED),
    "training.gbce_t": Key("0.5", TRAINED),
    "training.gradient_clip_val": Key("1", TRAINED),
    "training.monitor_metric": Key("val_mrr", {MODEL}),
    "training.early_stopping": Key("false", TRAINED),
    "training.early_stopping_patience": Key("7", TRAINED),
    "training.val_check_interval": Key("7", TRAINED),
    "training.accelerator": Key("cpu", NOTHING),
    "training.num_workers": Key("2", {MODEL}),
    "training.min_workers": Key("1", NOTHING, TWO),
    "training.cpus_per_worker": Key("2", NOTHING),
    "training.precision": Key("bf16-mixed", TRAINED),
    "training.checkpoint_minutes": Key("7", NOTHING),
    "training.max_failures": Key("7", NOTHING),
    "evaluation.exclude_seen": Key("false", {MODEL, EVALUATION}),
    "evaluation.split": Key("validation", {EVALUATION}, ("data.holdout=2",)),
    "evaluation.protocols": Key("[uniform-100]", {EVALUATION}),
    "evaluation.query_time": Key("target", {MODEL, EVALUATION}, ("model.time_encoding=gap",)),
    "evaluation.seed": Key("7", {EVALUATION}, ("evaluation.protocols=[uniform-100]",)),
    "evaluation.baselines": Key("[popularity-7-days]", {EVALUATION}),
    "evaluation.candidates": Key("true", {MODEL, EVALUATION}, ("inference.candidates=FOR_ALL",)),
    "evaluation.max_baseline_items": Key("7", {EVALUATION}, ("evaluation.baselines=[ease]",)),
    "embedding.method": Key("bert-mean", {VECTORS}),
    "embedding.model_name": Key("OTHER_MODEL", {VECTORS}),
    "embedding.with_genres": Key("false", {VECTORS}),
    "embedding.width": Key("7", {VECTORS}, TFIDF),
    "embedding.batch_size": Key("7", NOTHING),
    "embedding.device": Key("cpu", NOTHING),
    "embedding.output_path": Key("other.parquet", NOTHING),
    "embedding.write_tsv": Key("true", NOTHING),
    "embedding.overwrite": Key("true", NOTHING),
    "embedding.backup_original": Key("true", NOTHING),
    "inference.checkpoint_path": Key("other", NOTHING),
    "inference.topk": Key("7", {RECOMMENDATIONS}),
    "inference.batch_size": Key("7", {RECOMMENDATIONS}),
    "inference.num_workers": Key("7", NOTHING),
    "inference.score_memory_mb": Key("7", {RECOMMENDATIONS}),
    "inference.exclude_seen": Key("false", {RECOMMENDATIONS, PROGRAM}, ("export.topk=3",)),
    "inference.exclude_future": Key("false", {RECOMMENDATIONS}),
    "inference.at": Key("2026-01-01", {RECOMMENDATIONS}),
    "inference.popularity_discount": Key("0.5", {RECOMMENDATIONS, EVALUATION, PROGRAM}),
    "inference.blend": Key("{ease: 0.9}", {RECOMMENDATIONS, EVALUATION, PROGRAM}),  # which is refused
    "inference.candidates": Key("FOR_ALL", {RECOMMENDATIONS, PROGRAM}),
    "inference.candidates_default": Key("all", {RECOMMENDATIONS}),
    "inference.exclude": Key("FOR_ALL", {RECOMMENDATIONS, PROGRAM}),
    "inference.max_per": Key("{genre: 1}", {RECOMMENDATIONS, EVALUATION, PROGRAM}, ("export.topk=3",)),
    "inference.diversity": Key("0.9", {RECOMMENDATIONS, EVALUATION, PROGRAM}, ("export.topk=3",)),
    "inference.diversity_pool": Key(
        "5", {RECOMMENDATIONS, EVALUATION, PROGRAM}, ("export.topk=3", "inference.diversity=0.9")
    ),
    "inference.min_score": Key("3", {RECOMMENDATIONS, EVALUATION, PROGRAM}, ("export.topk=3",)),
    "inference.scores": Key("probability", {RECOMMENDATIONS, PROGRAM}, ("export.topk=3",)),
    "inference.formats": Key("[csv]", {RECOMMENDATIONS}),
    "inference.output_path": Key("other", NOTHING),
    "inference.users": Key("[1]", NOTHING),
    "inference.users_file": Key("other.csv", NOTHING),
    "inference.similar_to": Key("[1]", NOTHING),
    "export.formats": Key("[torch]", {PROGRAM}),
    "export.topk": Key("7", {PROGRAM}),
    "export.output_path": Key("other", NOTHING),
    "tune.space": Key("{training.lr: {choice: [0.1]}}", {SWEEP}),
    "tune.search": Key("tpe", {SWEEP}),
    "tune.scheduler": Key("none", {SWEEP}),
    "tune.num_trials": Key("7", NOTHING),
    "tune.include_config": Key("false", {SWEEP}),
    "tune.max_concurrent_trials": Key("7", NOTHING),
    "tune.time_budget_minutes": Key("7", NOTHING),
    "tune.grace_epochs": Key("7", {SWEEP}),
    "tune.reduction_factor": Key("7", {SWEEP}),
    "tune.max_failed_trials": Key("7", NOTHING),
    "tune.refit": Key("true", NOTHING),
    "run.name": Key("other", NOTHING),
    "run.storage_path": Key("/other", NOTHING),
    "run.chosen": Key("{long histories: width 256}", NOTHING),
    "run.mlflow_uri": Key("sqlite:///other.db", NOTHING),
}

ALL_KEYS = [f"{group}.{key}" for group, field in Config.model_fields.items() for key in field.annotation.model_fields]


class Deciders:
    """The parts of the code that decide what is made again, by what they decide on."""

    def __init__(self, root):
        histories = random_histories(60, 130, longest=9)
        before = {name: [1] * 60 for name in ("recent_validation", "recent_test", "recent_last")}
        before |= {"validation": [min(3, len(h)) for h in histories.values()]}
        before |= {"test": [min(5, len(h)) for h in histories.values()]}
        genres, times = [[token % 3] for token in range(130)], random_times(histories)
        path = write_dataset(root / "d", histories, 130, before=before, genres=genres, times=times)
        self.dataset = PreparedDataset(path)
        model = make_model(130, time_encoding="gap")
        model.item_counts += torch.arange(130, 0, -1)
        self.names = {"MODEL": str(root / "m"), "OTHER_MODEL": str(root / "o")}
        model.save_pretrained(self.names["MODEL"])
        self.names["FOR_ALL"] = str(root / "list.csv")
        (root / "list.csv").write_text("item\n" + "".join(f"{item}\n" for item in range(101, 231, 3)))
        make_model(130, max_len=9).save_pretrained(self.names["OTHER_MODEL"])
        for path in (self.names["MODEL"], self.names["OTHER_MODEL"]):
            shutil.copy(f"{self.dataset.path}/items.parquet", path)
        self.scored = str(shutil.copytree(root / "m", root / "s"))  # evaluation may add files
        (root / "titles.tsv").write_text("item\ttitle\n1\tOne\n")
        (root / "genres.tsv").write_text("item\tgenre\n1\tWar&Peace\n")
        self.root = root
        tokens = torch.arange(1, 61).view(2, 30)
        self.program_inputs = tokens, 1000 * tokens, torch.tensor([100_000, 200_000])

    def what(self, config):
        """By what an entry names: something that differs where that does."""
        return {
            DATASET: (os.path.basename(config.prepared_path), data_identity(config.data)),
            MODEL: what_shapes_the_result(config),
            NETWORK: {k: v for k, v in config.model.model_dump().items() if k not in warm_start._MAY_DIFFER},
            SWEEP: {k: v for k, v in tune._identity(config, self.dataset.manifest).items() if k.startswith("tune.")},
            EVALUATION: self._evaluated(config),
            RECOMMENDATIONS: recommend._identity(self.names["MODEL"], config.inference, Ranking.of(config.inference)),
            PROGRAM: self._programs(config),
            VECTORS: self._embedded(config),
        }

    def _programs(self, config):
        try:
            return exported(config, self.names["MODEL"], self.program_inputs)
        except InputError as error:
            return str(error)

    def _evaluated(self, config):
        names, notes = evaluate._usable_baselines(config, self.dataset)
        with pytest.MonkeyPatch.context() as patch:
            without_ray(patch, evaluate)
            counts = evaluate._item_counts(self.dataset, config, 1)
            ranking = fit_blend.fit(Ranking.of(config.inference), config, self.dataset, self.scored)
        systems = evaluate._systems([name for name in names if name not in evaluate.FITTED], None, ranking)
        opened = (self.dataset.path, self.dataset.manifest.fingerprint)
        arguments = (config, *opened, self.scored, ranking, systems, counts, {}, False, Quiet())
        worker = evaluate._Evaluator(*arguments)
        counted = [{k: v.tolist() for k, v in worker(part).items()} for part in self.dataset.parts()]
        return names, notes, evaluate.evaluated_protocols(config), evaluate.evaluated_split(config), counted

    def _embedded(self, config):
        embedding = config.embedding
        folder = embedding.model_name if os.path.isdir(embedding.model_name) else self.names["MODEL"]
        separator = config.data.list_separator
        texts = read_texts(str(self.root), embedding.with_genres, separator)["text"].to_pylist()
        return identify(embedding, None if embedding.method == "tfidf-svd" else folder, texts), texts


@pytest.fixture(scope="module")
def deciders(tmp_path_factory):
    return Deciders(tmp_path_factory.mktemp("deciders"))


def test_every_key_has_an_entry():
    missing = [key for key in ALL_KEYS if key not in CHANGES]
    assert not missing, f"say in CHANGES of {__file__} what {', '.join(missing)} changes"
    assert not set(CHANGES) - set(ALL_KEYS)


@pytest.mark.parametrize("key", CHANGES)
def test_a_key_changes_what_its_entry_says(key, deciders):
    if key not in ALL_KEYS:
        pytest.skip("told by the test above")
    entry = CHANGES[key]
    value = deciders.names.get(entry.other, entry.other)
    beside = [each.replace("FOR_ALL", deciders.names["FOR_ALL"]) for each in entry.beside]
    base, other = (load_config(None, [*beside, *overrides]) for overrides in ([], [f"{key}={value}"]))
    assert base != other
    before, after = deciders.what(base), deciders.what(other)
    changed = {what for what in before if before[what] != after[what]}
    try:
        space._domain(key, parse_value(value) if not value.startswith("[") else value)
        changed.add(DRAWN)
    except InputError:
        pass
    assert changed == entry.changes, "either the entry is wrong, or the code forgets the key"


def test_a_dataset_of_other_options_is_not_taken_for_up_to_date(tmp_path):
    for key in DATASET_KEYS:
        entry = CHANGES[f"data.{key}"]
        base, other = (load_config(None, [*entry.beside, *more]) for more in ([], [f"data.{key}={entry.other}"]))
        path = write_dataset(tmp_path / key, {1: [1, 2], 2: [2]}, 2, identity=data_identity(base.data))
        inputs = PreparedDataset(path).manifest.inputs
        assert _up_to_date(path, inputs, base.data) is not None
        assert _up_to_date(path, inputs, other.data) is None
        manifest = PreparedDataset(path).manifest
        assert manifest.model_copy(update={"identity": data_identity(other.data)}).fingerprint != manifest.fingerprint


def test_a_key_that_came_later_renames_no_run():
    """Pinned: another fingerprint, and every run gets another name, so that none is continued."""
    defaults = what_shapes_the_result(load_config(None, ["training.num_workers=1"]))
    assert storage.fingerprint(defaults) == "0232de4b68dc657b", (
        "the default of a key that is as old as the first version has changed, or a key is gone"
    )
