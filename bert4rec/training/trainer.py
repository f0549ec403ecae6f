"""Ray Train's trainer for torch, without what would only keep our workers waiting before their first step.

Ray's `TorchTrainer` does the same more slowly (docs/results/start.md). The module of its `TorchConfig` imports torch in
the driver and in the controller, which compute nothing. It starts a process for Ray Data's shards, of which we have
none, and one that removes abandoned placement groups, which needs the dashboard that a Ray of our own does not have.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray._common.network_utils import build_address
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.exceptions import RayError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

SECONDS_TO_ABORT = 20
"""How long an interrupted driver waits for the controller to end the workers."""


class Trainer(DataParallelTrainer):  # type: ignore[misc]
    """`TorchTrainer` for workers that read their data themselves; its `backend_config` is a `ProcessGroup`."""

    _controller: Any = None

    def fit(self) -> Any:  # noqa: ANN401 - ray.train.Result
        """Train to the end."""
        get_or_create_autoscaling_coordinator()  # the controller would wait for its process
        try:
            return super().fit()
        except KeyboardInterrupt:
            if self._controller is not None:
                with suppress(RayError):  # the controller ends itself, or was ended by the same Ctrl+C
                    ray.get(self._controller.abort.remote(), timeout=SECONDS_TO_ABORT)
            raise

    def _register_sigint_handler(self, controller: Any) -> None:  # noqa: ANN401 - Ray's
        """Leave Ctrl+C as it is: Ray's handler would stay after the training, and swallow the next one."""
        self._controller = controller

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, not_needed())]


def not_needed() -> tuple[type, ...]:
    """Ray Train's callbacks that would only start a process. A cluster that we joined keeps its cleaner."""
    return (DatasetsCallback,) if os.environ.get("RAY_ADDRESS") else (DatasetsCallback, PlacementGroupCleanerCallback)


@dataclass
class ProcessGroup(BackendConfig):  # type: ignore[misc]
    """`TorchConfig` with torch imported in the workers alone."""

    backend: str
    """gloo or nccl."""

    @property
    def backend_cls(self) -> type["_Backend"]:
        """What Ray Train's controller calls."""
        return _Backend

    def to_dict(self) -> dict[str, Any]:
        """For Ray's own records."""
        return {"backend": self.backend}


class _Backend(Backend):  # type: ignore[misc]
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: ProcessGroup) -> None:  # noqa: ANN401 - Ray's
        address, port = worker_group.execute_single(0, get_address_and_port)
        url, size = f"tcp://{build_address(address, port)}", len(worker_group)
        joining = [
            worker_group.execute_single_async(rank, _join, backend_config.backend, url, rank, size)
            for rank in range(size)
        ]
        ray.get(joining)

    def on_shutdown(self, worker_group: Any, backend_config: ProcessGroup) -> None:  # noqa: ANN401
        ray.get(worker_group.execute_async(_leave), timeout=30)


def _join(backend: str, url: str, rank: int, world_size: int) -> None:
    from ray.train.torch.config import _setup_torch_process_group

    _setup_torch_process_group(backend, rank, world_size, url)


def _leave() -> None:
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=True)
