import json

import pytest

from bert4rec import evaluate, prepare, train
from tests.stored_run import STORED, config_of, metrics_of

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]


def test_a_stored_run_has_its_metrics_to_the_last_digit_and_is_learnt_again(tmp_path):
    config = config_of(tmp_path)
    dataset = prepare(config)
    stored = json.loads((STORED / "metrics.json").read_text())
    assert metrics_of(evaluate(config, dataset, str(STORED / "model"))) == stored
    # On another machine the order of additions may differ, and with it the weights, a little.
    again = metrics_of(evaluate(config, dataset, train(config, dataset).best_checkpoint))
    for protocol, systems in stored["protocols"].items():
        assert again["protocols"][protocol]["popularity"] == systems["popularity"]
        assert again["protocols"][protocol]["BERT4Rec"]["ndcg@10"] == pytest.approx(
            systems["BERT4Rec"]["ndcg@10"], abs=0.03
        )
