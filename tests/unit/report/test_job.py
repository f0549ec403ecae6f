import json
from dataclasses import fields

import pytest
import yaml

from bert4rec import storage
from bert4rec.config import load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.errors import InputError
from bert4rec.evaluation.evaluate import Evaluation
from jobs.report import report_run
from tests.helpers.datasets import write_dataset
from tests.unit.report.test_page import HISTORIES, RUN, evaluation_of, write_recommendations

pytestmark = pytest.mark.unit


@pytest.fixture
def run(tmp_path):
    """A finished run whose settings name a dataset that lies elsewhere by now, as in a directory that was moved."""
    dataset = PreparedDataset(write_dataset(tmp_path / "prepared" / "films", HISTORIES, 5))
    write_dataset(tmp_path / "prepared" / "other", {1: [1, 2]}, 3)
    path = tmp_path / "run"
    path.mkdir()
    config = load_config(None, ["run.storage_path=/nowhere", "model.hidden_units=64"])
    (path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (path / "identity.json").write_text(json.dumps({"dataset": dataset.manifest.fingerprint}))
    (path / "run.json").write_text(json.dumps(RUN))
    return path


def recommend(run, fingerprint, formats=("parquet",)):
    given = write_recommendations(run / "recommendations.parquet", [(1, 105, 1, 2.5)], formats=formats)
    (run / "recommendations").mkdir()
    (run / "recommendations.parquet").rename(run / "recommendations" / "recommendations.parquet")
    manifest = {
        "identity": {"settings": given.settings} | ({"dataset": fingerprint} if fingerprint != "a few users" else {}),
        "counts": {"num_short_users": 2},
    }
    storage.commit(str(run / "recommendations"), manifest)


def test_a_run_is_found_with_its_dataset_and_recommendations(run, capsys):
    recommend(run, json.loads((run / "identity.json").read_text())["dataset"])
    path = report_run(str(run))
    assert path == str(run / "report.html")
    assert capsys.readouterr().out == f"report: {path}\n"
    page = (run / "report.html").read_text()
    assert "Most recommended" in page
    assert '<tr class="changed"><td>model.hidden_units</td><td>64</td></tr>' in page
    assert "<tr><td>model.num_heads</td><td>4</td></tr>" in page


@pytest.mark.parametrize(
    ("fingerprint", "formats", "words"),
    [
        ("another", ["parquet"], "are for other data"),
        ("a few users", ["parquet"], "or for a few users only"),
        (None, ["csv"], "have no Parquet files"),
    ],
)
def test_recommendations_that_cannot_be_shown(run, fingerprint, formats, words):
    recommend(run, fingerprint or json.loads((run / "identity.json").read_text())["dataset"], formats)
    report_run(str(run), output=str(run / "page.html"))
    page = (run / "page.html").read_text()
    assert words in page
    assert "Most recommended" not in page


def test_a_run_without_its_dataset_is_refused(run):
    (run / "identity.json").write_text('{"dataset": "another"}')
    with pytest.raises(InputError, match=r"its prepared dataset \(fingerprint another\) is not at .*films"):
        report_run(str(run))
    with pytest.raises(InputError, match="no run"):
        report_run(str(run.parent))


def test_what_jobs_evaluate_wrote_is_shown(run):
    assert set(evaluation_of({})) <= {field.name for field in fields(Evaluation)}
    systems = {"BERT4Rec": {"num_users": 3, "ndcg@10": 0.123456}}
    evaluation = {"split": "test", "num_users": 3, "num_items": 5, "notes": [], "beyond_accuracy": systems}
    evaluation |= {"protocols": {"all": systems}, "by_history_length": {"all": {"1-9": systems}}}
    (run / "evaluation.json").write_text(json.dumps(evaluation | {"by_target_popularity": {"all": {"head": systems}}}))
    report_run(str(run))
    assert "<td>0.1235</td>" in (run / "report.html").read_text()
