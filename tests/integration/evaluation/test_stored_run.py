import json

import pytest

from bert4rec import evaluate, prepare, train
from tests.helpers.stored_run import STORED, config_of, metrics_of

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]


@pytest.fixture
def stored():
    return json.loads((STORED / "metrics.json").read_text())


def test_a_stored_run_has_its_metrics_to_the_last_digit(tmp_path, stored):
    config = config_of(tmp_path)
    assert metrics_of(evaluate(config, prepare(config), str(STORED / "model"))) == stored


@pytest.mark.slow
def test_a_stored_run_is_learnt_again(tmp_path, stored):
    """On another machine the order of additions may differ, and with it the weights, a little."""
    config = config_of(tmp_path)
    dataset = prepare(config)
    again = metrics_of(evaluate(config, dataset, train(config, dataset).best_checkpoint))
    for protocol, systems in stored["protocols"].items():
        ndcg = again["protocols"][protocol]["BERT4Rec"]["ndcg@10"]
        assert ndcg == pytest.approx(systems["BERT4Rec"]["ndcg@10"], abs=0.03)
