import pyarrow.fs as pafs
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter

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


def test_settings_are_those_that_torch_writes(tmp_path):
    settings = {"training.lr": 0.1, "training.num_epochs": 3, "model.attention": "causal"}
    TensorBoardLog(str(tmp_path)).close_with(settings, HISTORY[1], HISTORY)
    with SummaryWriter(str(tmp_path / "torch")) as writer:
        writer.add_hparams(settings, {"best/epoch": 2, "best/train_loss": 1.0, "best/seconds": 1.0}, run_name=".")
    own, expected = (
        EventAccumulator(str(tmp_path / name)).Reload().summary_metadata for name in ("tensorboard", "torch")
    )
    tags = ["_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"]
    for tag in tags:
        got, wanted = (HParamsPluginData.FromString(each[tag].plugin_data.content) for each in (own, expected))
        assert got == wanted
