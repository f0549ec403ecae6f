"""Every job on an object store, against the same on a disk; and what a store does wrong.

What is always run needs no Ray: jobs in this process. Slow ones run jobs in processes of their own. The server is one
too (tests/helpers/s3_server.py): Moto, behind faults that a test sets.
"""

import contextlib
import json
import re
import subprocess
import sys
import time
from importlib import import_module
from types import SimpleNamespace

import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from bert4rec import lease, storage
from bert4rec.cluster.errors import first_line
from bert4rec.cluster.resources import Places
from bert4rec.config import load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.errors import InputError
from bert4rec.inference.recommend import recommend
from bert4rec.model.average import checkpoint_and_output
from jobs.evaluate import evaluate_model
from jobs.export import export_model
from jobs.pipeline import run_pipeline
from jobs.recommend import recommend_users
from tests.helpers.in_process import LocalRayData, map_parts
from tests.helpers.in_process import without_ray as without_ray_in
from tests.helpers.leases import assert_taken_over_from_a_killed_holder
from tests.helpers.s3_server import BUCKET, READ_ONLY
from tests.helpers.trainer import LocalTrainer, Quiet
from tests.integration.embedding.test_embed import encoder  # noqa: F401 - a fixture
from tests.integration.test_jobs import ROOT, data_dir, without_ray  # noqa: F401 - a fixture

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("s3")]

SMALL = [
    "model.hidden_units=8",
    "model.num_heads=2",
    "model.max_len=8",
    "training.num_epochs=2",
    "training.num_workers=1",
    "data.batch_size=16",
    "data.holdout=2",
    "inference.topk=5",
    "evaluation.protocols=[all, uniform-100]",
    "run.name=run",
]


def contents(root):
    """The bytes of each file below `root`, by its path in it."""
    filesystem, inner = storage.open_store(storage.absolute(str(root)))
    found = filesystem.get_file_info(pafs.FileSelector(inner, recursive=True))
    files = [info.path for info in found if info.is_file]
    return {path.removeprefix(f"{inner}/"): storage.read_bytes(f"{root}/{path[len(inner) + 1 :]}") for path in files}


def upload(directory, target):
    for name, content in contents(directory).items():
        storage.write_bytes(f"{target}/{name}", content)
    return target


def without_paths_and_times(content):
    """What two runs of the same must agree on."""
    if isinstance(content, dict):
        differ = {"seconds", "tokens_per_second", "dataset", "checkpoint", "run_path"}
        return {key: without_paths_and_times(value) for key, value in content.items() if key not in differ}
    return [without_paths_and_times(each) for each in content] if isinstance(content, list) else content


def assert_same_files(ours, theirs):
    """Prepared dataset, models, recommendations byte by byte; results without paths and times."""
    # the name of a dataset has a fingerprint of where its files were
    ours, theirs = (
        {
            re.sub(r"^prepared/films\d?-\w+/", "prepared/films/", name): content
            for name, content in contents(root).items()
        }
        for root in (ours, theirs)
    )
    own = {"snapshot.json", "tensorboard", "ray_tune", ".validate_storage_marker", "checkpoint_manager_snapshot.json"}
    names = [
        sorted(name for name in each if not own & set(name.split("/")) and not name.endswith(".lock"))
        for each in (ours, theirs)
    ]
    assert names[0] == names[1]
    for name in names[0]:
        is_prepared = name.startswith("prepared/") and name.endswith("manifest.json")
        if is_prepared or name.endswith((".safetensors", "config.json", ".csv", ".parquet", ".pt2")):
            assert ours[name] == theirs[name], name
        elif name.endswith(("run.json", "evaluation.json", "trial.json", "sweep.json")):
            assert without_paths_and_times(json.loads(ours[name])) == without_paths_and_times(json.loads(theirs[name]))


@pytest.fixture(scope="module")
def overrides(encoder):  # noqa: F811
    model = [f"embedding.model_name={encoder}", "embedding.method=bert-mean", "embedding.device=cpu"]
    return [*SMALL, *model, "model.use_title_emb=true", "model.use_genre_emb=true"]


@pytest.fixture(scope="module")
def in_process():
    """Jobs without Ray, in this process."""

    def put(value):
        return value

    with pytest.MonkeyPatch.context() as patch:
        without_ray_in(
            patch, *(import_module(f"bert4rec.{name}") for name in ("evaluation.evaluate", "inference.recommend"))
        )
        embed = import_module("bert4rec.embedding.embed")
        patch.setattr(embed, "map_parts", map_parts)
        patch.setattr(embed, "begin", lambda config, meanwhile=(): None)
        patch.setattr(embed, "ray", SimpleNamespace(put=put, get=put))
        patch.setattr(embed, "_resources", lambda embedding, folder: (False, 1))
        patch.setattr("jobs.prepare.begin", lambda config, meanwhile=(): None)
        patch.setattr("bert4rec.data.prepare._ray_data", LocalRayData)
        train = import_module("bert4rec.training.train")
        patch.setattr(train.resources, "begin", lambda config, meanwhile=(): None)
        patch.setattr(train.resources, "for_training", lambda config: Places(False, 1, 1))
        patch.setattr(train, "_trainer", LocalTrainer)
        for module in (embed, train):
            patch.setattr(module, "Progress", lambda *arguments: contextlib.nullcontext(Quiet()))
        yield


@pytest.fixture(scope="module")
def both(data_dir, overrides, tmp_path_factory, in_process):  # noqa: F811
    """The pipeline on a disk and on the store: the config of each."""
    root = tmp_path_factory.mktemp("disk")
    places = {
        "disk": [f"data.data_dir={upload(data_dir, f'{root}/films')}", f"run.storage_path={root}/runs"],
        "store": [
            f"data.data_dir={upload(data_dir, f's3://{BUCKET}/films')}",
            f"run.storage_path=s3://{BUCKET}/runs",
        ],
    }
    configs = {}
    for place, paths in places.items():
        configs[place] = load_config(None, [*overrides, *paths])
        run_pipeline(configs[place])
    return configs


def test_the_pipeline_leaves_the_files_that_it_leaves_on_a_disk(both):
    roots = [both[place].run.storage_path for place in ("disk", "store")]
    assert_same_files(*roots)
    names = set(contents(roots[1]))
    assert {"run/run.json", "run/evaluation.json", "run/report.html"} < names
    assert "run/recommendations/recommendations.csv" in names
    assert any(name.startswith("run/tensorboard/events") for name in names)
    vectors = [storage.read_bytes(config.embeddings_path) for config in both.values()]
    assert vectors[0] == vectors[1]
    pages = [storage.read_bytes(f"{root}/run/report.html").decode() for root in roots]
    shown = [page.count("<tr") + page.count("<svg") + page.count("plotly") for page in pages]
    assert shown[0] == shown[1] > 10


def test_a_few_users_similar_items_an_export_and_an_evaluation(both, capsys):
    more = {
        "users": ["inference.users=[3, 1]", "inference.output_path={}/few"],
        "similar": ["inference.similar_to=[103]"],
        "new": ["inference.users_file={}/new.csv", "inference.output_path={}/new"],
    }
    shown = {}
    for place, config in both.items():
        root = config.run.storage_path
        storage.write_bytes(f"{root}/new.csv", b"user,item\nx,103\nx,104\ny,110\n")
        for name, options in more.items():
            config_of = load_config(None, [*SMALL, *(option.format(root) for option in options)])
            config_of = config_of.model_copy(update={"run": config.run, "data": config.data})
            capsys.readouterr()
            recommend_users(config_of)
            shown[place, name] = [
                line for line in capsys.readouterr().out.splitlines() if "/" not in line and " in 0:" not in line
            ]
        export_model(config.model_copy(update={"export": config.export.model_copy(update={"formats": ("torch",)})}))
        storage.remove(f"{root}/run/evaluation.json")
        evaluate_model(config)
    for name in more:
        assert shown["disk", name] == shown["store", name] != []
    roots = [both[place].run.storage_path for place in ("disk", "store")]
    files = [
        {k: v for k, v in contents(root).items() if "items.csv" in k or "few" in k or "new" in k} for root in roots
    ]
    assert files[0].keys() == files[1].keys()
    for name in files[0]:
        assert files[0][name] == files[1][name] or name.endswith("manifest.json")
    evaluations = [storage.read_json(f"{root}/run/evaluation.json") for root in roots]
    assert without_paths_and_times(evaluations[0]) == without_paths_and_times(evaluations[1])


def test_requests_that_are_refused_now_and_then_are_made_again(both, s3, monkeypatch):
    config = both["store"]
    before = s3.counts()["faults"]
    monkeypatch.setattr(lease, "RENEWAL", 0.5)  # a slow store makes it wait for several of them
    s3.faults(unavailable=0.1)
    try:
        dataset = PreparedDataset(config.prepared_path, verify=True)
        checkpoint, _ = checkpoint_and_output(config)
        output = f"s3://{BUCKET}/again"
        recommend(config, dataset.path, checkpoint, output)
    finally:
        s3.faults()
    assert s3.counts()["faults"] > before
    found, expected = contents(output), contents(f"{config.run.storage_path}/run/recommendations")
    assert {name: found[name] for name in found if name.endswith((".csv", ".parquet"))} == {
        name: expected[name] for name in expected if name.endswith((".csv", ".parquet"))
    }


def test_a_run_on_a_store_is_for_one_job_at_a_time(s3):
    assert_taken_over_from_a_killed_holder(f"s3://{BUCKET}/held")


def test_a_listing_that_lags_loses_no_part(both, s3):
    """Parts are found by name; a reader who lists them is waited for."""
    config = both["store"]
    checkpoint, _ = checkpoint_and_output(config)
    output = f"s3://{BUCKET}/lagging"
    before = s3.counts()["faults"]
    s3.faults(lag=2)
    try:
        result = recommend(config, config.prepared_path, checkpoint, output)
    finally:
        s3.faults()
    assert s3.counts()["faults"] > before
    filesystem, inner = storage.open_store(f"{output}/recommendations.parquet")
    assert len(pq.read_table(inner, filesystem=filesystem)) == result.num_rows == 40 * 5
    files = storage.read_sealed(f"{output}/manifest.json")["files"]
    assert sorted(files) == ["part-00000.parquet", "recommendations.csv"]


def test_a_store_that_cannot_be_used_is_one_line_before_any_work(both, monkeypatch):
    config = both["disk"]

    def message_of(path):
        elsewhere = config.model_copy(update={"run": config.run.model_copy(update={"storage_path": path})})
        with pytest.raises(InputError) as raised:
            run_pipeline(elsewhere)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "s3://nobody/runs" in (found := message_of("s3://nobody/runs"))
    assert "Bucket 'nobody' not found" in found
    assert "cannot be written" in (found := message_of(f"s3://{READ_ONLY}/runs"))
    assert "Access Denied" in found
    with pytest.raises(InputError, match="s3://nobody/films: no such directory"):
        run_pipeline(
            config.model_copy(update={"data": config.data.model_copy(update={"data_dir": "s3://nobody/films"})})
        )
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone-else")
    assert "ACCESS_DENIED" in (found := message_of(f"s3://{BUCKET}/elsewhere"))
    assert found.endswith("check the credentials and their rights")


def test_a_store_that_is_gone_is_one_line(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(storage, "_SECONDS_OF_PATIENCE", 1)
    with pytest.raises(OSError, match="AWS Error NETWORK_CONNECTION") as raised:
        storage.exists(f"s3://{BUCKET}/x")
    assert "\n" not in first_line(raised.value)


# In processes of their own


def job(name, *arguments):
    command = [sys.executable, "-m", f"jobs.{name}", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=without_ray(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_a_killed_pipeline_goes_on_while_requests_are_refused(data_dir, overrides, s3, tmp_path):  # noqa: F811
    """Killed in training and in scoring; every twentieth request gets a 503."""
    more = ["training.num_epochs=12", "training.early_stopping=false", "training.checkpoint_minutes=1e-6"]
    upload(data_dir, f"s3://{BUCKET}/films2")
    store = [f"data.data_dir=s3://{BUCKET}/films2", f"run.storage_path=s3://{BUCKET}/killed"]
    disk = [f"data.data_dir={upload(data_dir, f'{tmp_path}/films')}", f"run.storage_path={tmp_path}/runs"]
    whole = job("pipeline", *overrides, *more, *disk)
    assert whole.wait() == 0, whole.stdout.read()
    s3.faults(unavailable=0.05)
    try:
        for marker in ("run/checkpoint_manager_snapshot.json", "run/recommendations/_unfinished/identity.json"):
            driver = job("pipeline", *overrides, *more, *store)
            while not storage.exists(f"s3://{BUCKET}/killed/{marker}"):
                assert driver.poll() is None, driver.stdout.read()
                time.sleep(0.05)
            driver.kill()
            driver.wait()
        last = job("pipeline", *overrides, *more, *store)
        assert last.wait() == 0, last.stdout.read()
    finally:
        s3.faults()
    assert_same_files(f"{tmp_path}/runs", f"s3://{BUCKET}/killed")


@pytest.mark.slow
def test_a_killed_sweep_goes_on(data_dir, s3, tmp_path):  # noqa: F811
    settings = [*SMALL, "model.use_title_emb=false", "training.num_epochs=8", "tune.num_trials=3", "run.name=sweep"]
    settings += ["tune.space={training.lr: {choice: [1e-3, 3e-3, 1e-2]}}", "tune.search=random", "tune.scheduler=none"]
    upload(data_dir, f"s3://{BUCKET}/films3")
    store = [f"data.data_dir=s3://{BUCKET}/films3", f"run.storage_path=s3://{BUCKET}/sweeps"]
    disk = [f"data.data_dir={upload(data_dir, f'{tmp_path}/films')}", f"run.storage_path={tmp_path}/sweeps"]
    for paths in (store, disk):
        prepared = job("prepare", *settings, *paths)
        assert prepared.wait() == 0, prepared.stdout.read()
    whole = job("tune", *settings, *disk)
    assert whole.wait() == 0, whole.stdout.read()
    driver = job("tune", *settings, *store)
    trial = f"s3://{BUCKET}/sweeps/sweep/trial-001/trial.json"
    while not (storage.exists(trial) and storage.read_json(trial)["history"]):
        assert driver.poll() is None, driver.stdout.read()
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    again = job("tune", *settings, *store)
    assert again.wait() == 0, again.stdout.read()
    results = [
        storage.read_json(f"{root}/sweep/sweep.json") for root in (f"{tmp_path}/sweeps", f"s3://{BUCKET}/sweeps")
    ]
    assert without_paths_and_times(results[0]) == without_paths_and_times(results[1])
