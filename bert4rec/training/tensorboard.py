"""TensorBoard events of a run: curves, gates, and every setting in the HPARAMS tab."""

import shutil
import tempfile
from functools import cached_property
from typing import TYPE_CHECKING

import pyarrow.fs as pafs

from bert4rec import storage
from bert4rec.config import Config
from bert4rec.data.dataset import Manifest
from bert4rec.data.features import FEATURES

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

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
    def _writer(self) -> "SummaryWriter":
        # Imports torch, which would only keep a training waiting before it begins.
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self._directory)  # type: ignore[no-untyped-call]

    def record(self, metrics: dict[str, float]) -> None:
        """The curves of one epoch, where they can be followed."""
        if self._is_local:
            self._write(metrics)

    def _write(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            if name not in _NOT_CURVES:
                self._writer.add_scalar(name, value, int(metrics["epoch"]))
        self._writer.flush()

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
        self._writer.add_hparams(settings, metrics, run_name=".")
        self._writer.close()
        if not self._is_local:
            filesystem, inner = storage.open_store(self._target)
            filesystem.create_dir(inner, recursive=True)
            pafs.copy_files(self._directory, inner, destination_filesystem=filesystem)
            shutil.rmtree(self._directory)
