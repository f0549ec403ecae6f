"""How a job starts or joins Ray, and how many workers, CPU cores and GPUs it requests."""

import importlib
import json
import logging
import os
import secrets
import shlex
import socket
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import ray
import ray.util
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import ActorID, PlacementGroupID
from ray.core.generated.gcs_pb2 import ActorTableData, PlacementGroupTableData
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bert4rec import storage
from bert4rec.config import Config
from bert4rec.errors import InputError

_shows_messages = False


def show_messages() -> None:
    """Let the messages of Ray and its workers through (--verbose)."""
    global _shows_messages
    _shows_messages = True


def begin(config: Config, meanwhile: tuple[str, ...] = ()) -> None:
    """Join the cluster of RAY_ADDRESS (as in a submitted job), else start Ray on this machine, unless it runs already.

    Parameters
    ----------
    meanwhile : tuple of str
        Modules that the work needs: they are imported while Ray's processes start.

    Raises
    ------
    InputError
        If no cluster answers, or its nodes do not see the same files (`check_shared`).
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")  # ours report instead
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning about accelerator variables
    importing = threading.Thread(target=lambda: [importlib.import_module(name) for name in meanwhile], daemon=True)
    importing.start()
    if not ray.is_initialized():
        _start_ray()
        check_shared(config)
    importing.join()
    for name in ("ray.data", "ray.train"):  # which set their levels when they are imported
        logging.getLogger(name).setLevel(_level())


def _level() -> int:
    return logging.INFO if _shows_messages else logging.ERROR


def _start_ray() -> None:
    address = os.environ.get("RAY_ADDRESS") or "local"
    print("starting Ray" if address == "local" else f"joining Ray at {address}")
    only_here: dict[str, Any] = {}
    if address == "local":  # processes that would only take time from the work
        only_here = {"include_dashboard": False, "num_cpus": usable_cores()}
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine's nodes away
        os.environ.setdefault("RAY_worker_niceness", "0")  # with Ray's 15 its other processes interrupt the work's
        if (python := shlex.quote(sys.executable)) != sys.executable:  # Ray gives it to a shell as it is
            only_here["runtime_env"] = {"py_executable": python}
        if not _keeps_tokens():  # as Ray would do at home
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    else:
        _check_answers(address)
    try:
        ray.init(address=address, log_to_driver=_shows_messages, logging_level=_level(), **only_here)
    except Exception as error:  # Ray raises this class itself
        if "timed out during startup" in str(error):
            ray.shutdown()
            raise TimeoutError("Ray did not start within its 30 s: the machine is too busy; run it again") from None
        if "AF_UNIX path length" in str(error):  # that of its sockets
            name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "Ray's directory")
            raise InputError(
                f"{name}={os.environ.get(name)}: too long for Ray, whose sockets there may have paths of at most 107 "
                "bytes; set RAY_TMPDIR=/tmp"
            ) from None
        if address == "local" or not isinstance(error, (OSError, RuntimeError)):
            raise
        raise InputError(f"RAY_ADDRESS={address}: no Ray cluster of this version answers there ({error})") from None


def _keeps_tokens() -> bool:
    """Whether Ray may write the token of a new cluster to ~/.ray, or has one there, or elsewhere."""
    if "RAY_AUTH_TOKEN_PATH" in os.environ:
        return True
    directory = os.path.join(os.path.expanduser("~"), ".ray")
    if not os.path.isabs(directory):  # nobody knows this user
        return False
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError:
        return False
    return os.access(directory, os.W_OK)


ANSWER_SECONDS = 3.0
"""How long a cluster's head may take to answer at first. `ray.init` itself tries for minutes, without a word."""


def _check_answers(address: str) -> None:
    """Check that RAY_ADDRESS is one that jobs take, and that its port answers.

    Raises
    ------
    InputError
        If not, within about ten seconds.
    """
    expected = "expected HOST:PORT of a cluster's head, such as 10.0.0.5:6379"
    where = f"RAY_ADDRESS={address}"
    if address.startswith(("http://", "https://")):
        raise InputError(f"{where}: an address for `ray job submit` (its RAY_API_SERVER_ADDRESS); {expected}")
    if address.startswith("ray://"):
        raise InputError(
            f"{where}: a job's own process reads and writes the run, so it must run in the cluster, not behind Ray "
            f"Client; submit it (`ray job submit`), or run it on a node with RAY_ADDRESS=HOST:6379"
        )
    if address == "auto":
        try:
            found = canonicalize_bootstrap_address(address)
        except ConnectionError:
            raise InputError(f"{where}: no Ray cluster runs on this machine; {expected}") from None
    else:
        found = address
    host, colon, port = str(found).rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 65536):
        raise InputError(f"{where}: not an address; {expected}")
    result: list[str] = []
    # In a thread, because a name server that does not answer holds it up for longer.
    looking = threading.Thread(target=lambda: result.append(_look_at(host.strip("[]"), int(port))), daemon=True)
    looking.start()
    looking.join(2 * ANSWER_SECONDS)
    problem = result[0] if result else f"{host} is not found in {2 * ANSWER_SECONDS:g} s"
    if problem:
        raise InputError(f"{where}: no Ray cluster answers there ({problem}); {expected}")


def _look_at(host: str, port: int) -> str:
    """What keeps us from the head, or an empty string. A head speaks gRPC; whoever does not is something else."""
    try:
        socket.create_connection((host, port), ANSWER_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):  # its handshake needs the cluster's certificates
        return ""
    channel = grpc.insecure_channel(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    try:
        grpc.channel_ready_future(channel).result(timeout=ANSWER_SECONDS)
    except grpc.FutureTimeoutError:
        return f"what listens on port {port} does not answer as a head does"
    finally:
        channel.close()
    return ""


USERS_A_WORKER = 8
"""Users of a step, at least, for each worker of a default training: with fewer, workers mostly wait for each other."""


GPU_CORES = 4
"""CPU cores of a worker with a GPU, at most, by default: with more, its small tensors wait for threads."""


class Places(NamedTuple):
    """What a training requests."""

    use_gpu: bool
    """Whether each worker gets a GPU."""
    num_workers: int
    cpus_per_worker: int


def for_training(config: Config) -> Places:
    """The workers of a training, and how many CPU cores each gets: as many as fit.

    Raises
    ------
    InputError
        If the workers do not fit on this machine; a cluster that we joined may still grow.
    """
    training, nodes = config.training, _nodes()
    gpus = sum(gpu for _, gpu in nodes)
    use_gpu = training.accelerator == "gpu" or (training.accelerator == "auto" and gpus >= (training.num_workers or 1))
    wanted = training.num_workers
    if wanted is None:
        each = training.cpus_per_worker or 1
        wanted = max(1, min(_room(nodes, use_gpu, each), config.data.batch_size // USERS_A_WORKER))
    largest = max((min(cpu, GPU_CORES) if use_gpu else cpu for cpu, _ in nodes), default=0)
    sizes = [training.cpus_per_worker] if training.cpus_per_worker else range(largest, 0, -1)
    fitting = next((cores for cores in sizes if _room(nodes, use_gpu, cores) >= wanted), None)
    if fitting is None:
        each_takes = f"{training.cpus_per_worker or 1} CPU cores" + (" and a GPU" if use_gpu else "")
        _cannot_start(f"training.num_workers={wanted} workers of {each_takes} each")
    return Places(use_gpu, wanted, fitting or training.cpus_per_worker or 1)


def _room(nodes: list[tuple[int, int]], use_gpu: bool, cores: int) -> int:
    """How many workers of that many cores, and a GPU each if wanted, the nodes hold."""
    return sum(min(cpu // cores, gpu) if use_gpu else cpu // cores for cpu, gpu in nodes)


def usable_cores() -> int:
    """CPU cores that this process may use: those of its affinity, and no more than its control group's quota.

    Ray counts the machine's cores, of which a container, a batch system or `taskset` often grants fewer.
    """
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    return max(1, int(min([cores, *_quotas(Path("/sys/fs/cgroup"), _own_group())])))


def _own_group() -> str:
    """This process's control group (version 2), "" where there is none to be seen."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return ""
    return next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")


def _quotas(root: Path, group: str) -> list[float]:
    """Cores that the control group and those around it may use, where they are limited (cpu.max, or version 1's)."""
    found = []
    for directory in [root / group, *(root / group).parents]:
        if root not in (directory, *directory.parents):
            break
        try:
            quota, period = (directory / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue
        if quota != "max":
            found.append(int(quota) / int(period))
    try:
        quota_v1, period_v1 = (int((root / "cpu" / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    except (OSError, ValueError):
        return found
    return [*found, quota_v1 / period_v1] if quota_v1 > 0 else found


def most_at_once(config: Config) -> int:
    """How many training workers, of training.cpus_per_worker cores or one, the cluster holds as it is now.

    Raises
    ------
    InputError
        If the workers of one training do not fit on this machine.
    """
    return _room(_nodes(), for_training(config).use_gpu, config.training.cpus_per_worker or 1)


@contextmanager
def releasing_abandoned() -> Iterator[None]:
    """Inside this block, remove the placement groups of trainings that were stopped from outside, for instance by ASHA.

    Ray Train leaves that to a helper process, which asks the dashboard, and gives up where there is none, or where it
    finds several Rays on the machine; the next training would wait for ever.
    """
    is_over = threading.Event()

    def release() -> None:
        while not is_over.wait(1):
            _release_abandoned()

    thread = threading.Thread(target=release, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _release_abandoned() -> None:
    job, state = ray.get_runtime_context().get_job_id(), ray._private.state.state._connect_and_get_accessor()
    for serialized in state.get_placement_group_table():
        group = PlacementGroupTableData.FromString(serialized)
        if group.creator_job_id.hex() != job or group.state == PlacementGroupTableData.REMOVED:
            continue
        creator = ActorID(group.creator_actor_id)
        if creator.is_nil():  # Ray Tune's own, which the driver made; an actor made Ray Train's
            continue
        # A group that was registered after its actor's death does not say that the actor is dead.
        actor = state.get_actor_info(creator)
        if actor is None or ActorTableData.FromString(actor).state == ActorTableData.DEAD:
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))


def for_scoring(config: Config) -> tuple[bool, int]:
    """Whether scoring workers get a GPU each, and how many workers there are.

    Raises
    ------
    InputError
        If this machine lacks what one worker takes.
    """
    nodes = _nodes()
    gpus, cpus = sum(gpu for _, gpu in nodes), sum(cpu for cpu, _ in nodes)
    use_gpu = config.training.accelerator == "gpu" or (config.training.accelerator == "auto" and gpus > 0)
    if use_gpu and not gpus:
        _cannot_start("training.accelerator=gpu")
    return use_gpu, config.inference.num_workers or max(1, gpus if use_gpu else cpus)


def check_submitted(config: Config) -> None:
    """Check that a submitted job does not write into its own working directory, which Ray deletes after it.

    Raises
    ------
    InputError
        If run.storage_path is relative.
    """
    path = config.run.storage_path
    settings = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env") or {}
    if settings.get("working_dir") and "://" not in path and not os.path.isabs(os.path.expanduser(path)):
        raise InputError(
            f"run.storage_path={path} is relative, and the folder of a submitted job is deleted "
            "after it; set an absolute path on a disk that all nodes share, or s3:// or gs://"
        )


def check_shared(config: Config) -> None:
    """Check before any work that every node sees what another one writes. A single machine needs no check.

    Raises
    ------
    InputError
        If a local `run.storage_path` or `data.data_dir` is not the same on all nodes.
    """
    given = {"run.storage_path": config.run.storage_path, "data.data_dir": config.data.data_dir}
    local = {key: storage.absolute(path) for key, path in given.items() if "://" not in path}
    root = local.get("run.storage_path")
    if not local or not (look := _look_from_other_nodes()):
        return
    if not os.path.isdir(storage.absolute(config.data.data_dir)):
        local.pop("data.data_dir", None)  # whoever needs it says so
    if root:
        storage.check_writable(root)
        local["run.storage_path"] = storage.join(root, f".shared-{uuid.uuid4().hex}")
        storage.write_bytes(local["run.storage_path"], b"")
    try:
        for answer in [each.remote(list(local.values())) for each in look]:
            try:
                node, missing = ray.get(answer)
            except RayError:  # the node was lost meanwhile
                continue
            if wrong := next((key for key, path in local.items() if path in missing), None):
                raise InputError(
                    f"{wrong}={given[wrong]}: node {node} does not see what this node has there; set a path on a disk "
                    "that all nodes share, or s3:// or gs://"
                )
    finally:
        if root:
            storage.remove(local["run.storage_path"])


def _look_from_other_nodes() -> list[Any]:
    """One task for each other node. A cluster that is only a head gets one task for its first worker node."""

    def missing(paths: list[str]) -> tuple[str, list[str]]:
        return ray.util.get_node_ip_address(), [path for path in paths if not os.path.exists(path)]

    here, alive = ray.get_runtime_context().get_node_id(), [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    if alive == [here]:
        if any(cpu for cpu, _ in _nodes()):
            return []
        print("waiting for the first node of the cluster")
        return [ray.remote(num_cpus=1)(missing)]
    there = [NodeAffinitySchedulingStrategy(node, soft=False) for node in alive if node != here]
    return [ray.remote(num_cpus=0)(missing).options(scheduling_strategy=strategy) for strategy in there]


def _nodes() -> list[tuple[int, int]]:
    """CPU cores and GPUs of each node."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(int(resources.get("CPU", 0)), int(resources.get("GPU", 0))) for resources in alive]


def _cannot_start(wanted: str) -> None:
    """Ray would wait for ever for what does not come."""
    present = " + ".join(f"{cpu} CPU cores, {gpu} GPUs" for cpu, gpu in _nodes())
    if not os.environ.get("RAY_ADDRESS"):
        raise InputError(f"{wanted} do not fit on this machine, which has {present}")
    print(f"note: {wanted} do not fit on the cluster's nodes ({present}); waiting for it to grow")
