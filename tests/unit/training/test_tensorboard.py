import pyarrow.fs as pafs
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bert4rec import storage
from bert4rec.training.tensorboard import TensorBoardLog

pytestmark = pytest.mark.unit

HISTORY = [{"epoch": epoch, "train_loss": 3.0 - epoch, "seconds": 1.0} for epoch in (1, 2)]


def losses(directory):
    events = EventAccumulator(str(directory)).Reload()
    return [(event.step, event.value) for event in events.Scalars("train_loss")]


def test_a_resumed_run_on_an_object_store_has_the_curves_of_before(tmp_path, monkeypatch):
    """Only the second epoch is recorded here; a filesystem that is not the local one stands for the store."""
    store = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    with monkeypatch.context() as patch:
        patch.setattr(storage, "open_store", lambda path: (store, path))
        log = TensorBoardLog("run")
        log.record(HISTORY[1])
        assert not list(tmp_path.iterdir())
        log.close_with({"training.lr": 0.1}, HISTORY[1], HISTORY)
    assert losses(tmp_path / "run" / "tensorboard") == [(1, 2.0), (2, 1.0)]


def test_a_local_run_is_written_as_it_goes_and_once(tmp_path):
    log = TensorBoardLog(str(tmp_path))
    for metrics in HISTORY:
        log.record(metrics)
    assert losses(tmp_path / "tensorboard") == [(1, 2.0), (2, 1.0)]
    log.close_with({"training.lr": 0.1}, HISTORY[1], HISTORY)
    assert losses(tmp_path / "tensorboard") == [(1, 2.0), (2, 1.0)]
