import json
import re
from typing import get_args

import pytest

from bert4rec.config import Protocol, load_config
from bert4rec.evaluation.evaluate import Evaluation, evaluated_protocols
from bert4rec.evaluation.protocols import PROTOCOLS, Drawn
from jobs import evaluate as job

pytestmark = pytest.mark.unit


def test_every_protocol_has_a_row():
    assert set(PROTOCOLS) == set(get_args(Protocol))


@pytest.mark.parametrize("name", get_args(Protocol))
def test_a_row_is_what_its_name_says(name):
    row = PROTOCOLS[name]
    drawn = re.fullmatch(r"(popularity|uniform)-(\d+)(-of-all)?", name)
    if drawn is None:
        assert row.drawn is None
        assert row.ranks_seen == (name == "all-with-seen")
    else:
        by, count, of_all = drawn.groups()
        assert row.drawn == Drawn(int(count), by, "target" if of_all else "own")
        assert not row.ranks_seen
        assert f"{int(count):,} items drawn {'by popularity' if by == 'popularity' else 'uniformly'}" in row.description
    descriptions = [each.description for each in PROTOCOLS.values()]
    assert descriptions.count(row.description) == 1
    if row.with_seen:
        assert PROTOCOLS[row.with_seen].ranks_seen
        assert PROTOCOLS[row.with_seen].drawn == row.drawn


def test_seen_items_turn_a_protocol_into_its_other_one():
    wanted = "evaluation.protocols=[uniform-100, all, all-with-seen]"
    assert evaluated_protocols(load_config(None, [wanted])) == ["uniform-100", "all", "all-with-seen"]
    with_seen = load_config(None, [wanted, "evaluation.exclude_seen=false"])
    assert evaluated_protocols(with_seen) == ["uniform-100", "all-with-seen"]


def test_the_result_is_written_before_it_is_printed(tmp_path, monkeypatch):
    """An evaluation takes minutes; what is wrong with a table of it must not cost them."""
    metrics = {"model": {"hr@10": 0.5}}
    result = Evaluation(
        "m", "d", "f", 1, 1, {}, "test", 0.0, None, {}, False, 0, 42, {"all": metrics}, {}, {}, metrics, []
    )
    monkeypatch.setattr(job, "evaluate", lambda *arguments: result)
    with pytest.raises(KeyError):  # a result without `data` cannot be printed
        job.evaluate_model(load_config(), str(tmp_path / "model"))
    assert json.loads((tmp_path / "evaluation.json").read_text())["protocols"] == {"all": metrics}
