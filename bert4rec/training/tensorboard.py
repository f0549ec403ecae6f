"""TensorBoard events of a run: curves, gates, and every setting in the HPARAMS tab."""

import shutil
import tempfile
import time
from functools import cached_property
from typing import TYPE_CHECKING

import pyarrow.fs as pafs

from bert4rec import storage
from bert4rec.config import Config
from bert4rec.data.dataset import Manifest
from bert4rec.data.features import FEATURES

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

EVENTS = "tensorboard"
_NOT_CURVES = ("epoch", "seconds")


class TensorBoardLog:
    """Writes events into `<run>/tensorboard` as training goes; on an object store all at once, when it is closed."""

    def __init__(self, run_path: str) -> None:
        self._target = storage.join(run_path, EVENTS)
        filesystem, inner = storage.open_store(self._target)
        self._is_local = isinstance(filesystem, pafs.LocalFileSystem)
        self._directory = inner if self._is_local else tempfile.mkdtemp()

    @cached_property
    def _writer(self) -> "EventFileWriter":
        # Not torch's SummaryWriter: where Ray has removed the driver's working directory, the import of torch ends it
        # without a word, as MKL calls exit.
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        return EventFileWriter(self._directory)

    def record(self, metrics: dict[str, float]) -> None:
        """The curves of one epoch, where they can be followed."""
        if self._is_local:
            self._write(metrics)

    def _write(self, metrics: dict[str, float]) -> None:
        self._add_scalars({name: metrics[name] for name in metrics if name not in _NOT_CURVES}, int(metrics["epoch"]))
        self._writer.flush()

    def _add_scalars(self, values: dict[str, float], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()]), step)

    def _add(self, summary: "Summary", step: int = 0) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def close(
        self, config: Config, manifest: Manifest, best_metrics: dict[str, float], history: list[dict[str, float]]
    ) -> None:
        """Settings and sizes with the best epoch's metrics, and the end."""
        settings: dict[str, bool | str | float | int] = {}
        for group, fields in config.model_dump(mode="json").items():
            for name, value in fields.items():
                settings[f"{group}.{name}"] = value if isinstance(value, bool | int | float | str) else str(value)
        settings |= {f"num_{name}": getattr(manifest, f"num_{name}") for name in ("users", "items", "interactions")}
        settings |= {f"num_{FEATURES[name].file}": len(values) for name, values in manifest.vocabularies.items()}
        self.close_with(settings, best_metrics, history)

    def close_with(
        self,
        settings: dict[str, bool | str | float | int],
        best_metrics: dict[str, float],
        history: list[dict[str, float]],
    ) -> None:
        """These settings with the best epoch's metrics, and the end; `history`: all epochs, those before a kill too."""
        for epoch in [] if self._is_local else history:
            self._write(epoch)
        metrics = {f"best/{name}": value for name, value in best_metrics.items()}
        for summary in _hparams(settings, list(metrics)):
            self._add(summary)
        self._add_scalars(metrics, 0)
        self._writer.close()
        if not self._is_local:
            filesystem, inner = storage.open_store(self._target)
            filesystem.create_dir(inner, recursive=True)
            pafs.copy_files(self._directory, inner, destination_filesystem=filesystem)
            shutil.rmtree(self._directory)


def _hparams(settings: dict[str, bool | str | float | int], metrics: list[str]) -> list["Summary"]:
    """What the HPARAMS tab reads: the names of settings and metrics, the settings' values, and that the run ended well.

    TensorBoard's own functions for this need TensorFlow.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.api_pb2 import DataType, Experiment, HParamInfo, MetricInfo, MetricName, Status
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo

    kinds = {bool: DataType.DATA_TYPE_BOOL, str: DataType.DATA_TYPE_STRING}
    names = [
        HParamInfo(name=name, type=kinds.get(type(value), DataType.DATA_TYPE_FLOAT64))
        for name, value in settings.items()
    ]
    curves = [MetricInfo(name=MetricName(tag=name)) for name in metrics]
    start = SessionStartInfo()
    for name, value in settings.items():
        kind = {bool: "bool_value", str: "string_value"}.get(type(value), "number_value")
        setattr(start.hparams[name], kind, value)
    contents = {
        metadata.EXPERIMENT_TAG: HParamsPluginData(experiment=Experiment(hparam_infos=names, metric_infos=curves)),
        metadata.SESSION_START_INFO_TAG: HParamsPluginData(session_start_info=start),
        metadata.SESSION_END_INFO_TAG: HParamsPluginData(
            session_end_info=SessionEndInfo(status=Status.Value("STATUS_SUCCESS"))
        ),
    }
    return [
        Summary(value=[Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(content))])
        for tag, content in contents.items()
    ]
