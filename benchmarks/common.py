"""What the measurements share: data, the work that counts, subprocesses, environments of peers, and tables.

Only numpy and the standard library at the top: this file is also imported in the environments of the peers.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from pathlib import Path
from typing import Any, Self

import numpy as np

SYNTHETIC_SHORT = "synthetic-short"
_ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
"""Where `--record` appends a line of JSON a run, in NAME.jsonl; `benchmarks.render` makes the tables of the docs."""
LEAST_MEMORY = 2**30
"""Bytes that a measured process has to leave to the machine."""


@dataclass(frozen=True)
class Workload:
    """One measurement of one implementation, as it is handed to its process."""

    data: str
    """File of `Histories.save`."""
    task: str = "training"
    hidden: int = 64
    max_len: int = 200
    num_layers: int = 2
    dropout: float = 0.2
    mask_prob: float = 0.2
    batch_size: int = 64
    """Users an optimiser step, or scored at once."""
    loader_workers: int = 0
    """Processes of a peer's DataLoader."""
    seconds: float = 10.0
    """Shortest time that is measured, after the warm-up."""
    threads: int = 1
    seed: int = 42
    topk: int = 10
    device: str = "cpu"
    precision: str = "32-true"
    """Of ours; see training.precision."""
    workers: int = 1
    """DDP workers of ours, which share the threads."""
    optimizer: str = "adamw"
    """Of ours; see training.optimizer."""
    position_encoding: str = "learned"
    """Of ours; see model.position_encoding."""
    time_encoding: str = "none"
    """Of ours; see model.time_encoding."""
    loss: str = "cross-entropy"
    """Of ours; see training.loss."""
    num_negatives: int = 256
    """Of ours; see training.num_negatives."""
    item_optimizer: str = "dense"
    """Of ours; see training.item_optimizer."""
    shard_items: bool = False
    """Of ours; see training.shard_items."""
    object_store: int = 0
    """Bytes of Ray's object store; 0 for Ray's default."""

    @property
    def num_heads(self) -> int:
        return 2 if self.hidden < 256 else 4

    @classmethod
    def from_command_line(cls) -> Self:
        """Of a process that `run` started."""
        return cls(**json.loads(sys.argv[1]))


@dataclass(frozen=True)
class Histories:
    """What every implementation reads: user n has items[offsets[n]:offsets[n+1]], from 1, in order of time."""

    items: np.ndarray
    """[T] int32, the most frequent item is 1."""
    offsets: np.ndarray
    """[N+1] int64."""
    user_ids: np.ndarray
    """[N] original ids."""
    item_ids: np.ndarray
    """[V] original ids; item i has item_ids[i-1]."""
    times: np.ndarray | None = None
    """[T] int64 Unix seconds, if the data have times."""

    def save(self, path: str) -> None:
        """Write one .npz file."""
        np.savez(path, **{name: values for name, values in vars(self).items() if values is not None})

    @classmethod
    def load(cls, path: str) -> Self:
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            return cls(**arrays)

    @property
    def lengths(self) -> np.ndarray:
        """[N] items a user."""
        return np.diff(self.offsets)

    def __str__(self) -> str:
        return f"{len(self.lengths):,} users, {len(self.item_ids):,} items, {len(self.items):,} interactions"


def read_histories(data: str, seed: int) -> Histories:
    """A directory with train_ratings.csv (`user,item[,time]`; file order without a time), or "synthetic-short"."""
    if data == SYNTHETIC_SHORT:
        return synthetic_histories(40_000, 54_000, 9, seed)
    import pandas as pd

    ratings = pd.read_csv(os.path.join(data, "train_ratings.csv"))
    by_time = ["time"] if "time" in ratings else []
    ratings = ratings.sort_values(["user", *by_time], kind="stable")
    items, item_ids = pd.factorize(ratings["item"])
    histories = _histories(ratings["user"].to_numpy(), items, np.asarray(item_ids))
    return replace(histories, times=ratings["time"].to_numpy(np.int64)) if by_time else histories


def synthetic_histories(num_users: int, num_items: int, mean_length: int, seed: int) -> Histories:
    """Items of falling (Zipf) frequency; lengths from 2, exponential above it."""
    random = np.random.default_rng(seed)
    lengths = 2 + random.exponential(mean_length - 1.5, num_users).astype(np.int64)
    weight = 1 / np.arange(1, num_items + 1)
    cumulative = np.cumsum(weight / weight.sum())
    items = np.searchsorted(cumulative, random.random(lengths.sum())).clip(max=num_items - 1)
    return _histories(np.repeat(np.arange(1, num_users + 1), lengths), items, np.arange(1, num_items + 1))


def _histories(users: np.ndarray, items: np.ndarray, item_ids: np.ndarray) -> Histories:
    """From rows sorted by user, and items as indices into `item_ids`."""
    counts = np.bincount(items, minlength=len(item_ids))
    order = np.argsort(-counts, kind="stable")
    token = np.empty(len(order), np.int32)
    token[order] = np.arange(1, len(order) + 1)
    starts = np.flatnonzero(np.append(True, users[1:] != users[:-1]))
    return Histories(token[items], np.append(starts, len(users)), users[starts], item_ids[order])


def training_flops(workload: Workload, tokens: float, squares: float, num_items: int) -> float:
    """Floating-point operations that the loss and its gradients need, for any implementation of the model.

    A multiply-add counts as 2 operations, the backward pass as twice the forward pass. With D hidden units, V items,
    n tokens of a user and m = mask_prob * n targets, the multiply-adds of the forward pass are
        each block but the last: 12 D^2 n (linear layers) + 2 D n^2 (attention)
        the last block:           2 D^2 n (keys and values) + 10 D^2 m + 2 D n m
        output layer:             D^2 m + D V m.
    Padding, states and logits that no target needs, embeddings, norms and activations count nothing.

    Parameters
    ----------
    tokens, squares
        Sum of n, and of n^2, over the users.
    """
    width, share = workload.hidden, workload.mask_prob
    inner = 12 * width**2 * tokens + 2 * width * squares
    last = (2 + 10 * share) * width**2 * tokens + 2 * share * width * squares
    output = share * (width**2 + width * num_items) * tokens
    return 6 * ((workload.num_layers - 1) * inner + last + output)


def scoring_flops(workload: Workload, lengths: np.ndarray, num_items: int) -> float:
    """Floating-point operations of scoring all items once for each user; see `training_flops`."""
    read = np.minimum(lengths + 1, workload.max_len).astype(float)  # with [MASK] behind the items
    width = workload.hidden
    inner = 12 * width**2 * read + 2 * width * read**2
    last = 2 * width**2 * read + 10 * width**2 + 2 * width * read
    return float(2 * ((workload.num_layers - 1) * inner + last + width**2 + width * num_items).sum())


class Meter:
    """Counts what a training does from the end of its warm-up until its time is up."""

    def __init__(self, seconds: float, warmup_steps: int = 3) -> None:
        self.seconds = seconds
        self.warmup_steps = warmup_steps
        self.began = time.perf_counter()
        self.counts = {"steps": 0, "users": 0, "tokens": 0, "squares": 0}

    def add(self, lengths: Any) -> bool:  # noqa: ANN401 - a tensor or an array
        """Count an optimiser step over users with so many real tokens each; whether the time is up."""
        self.warmup_steps -= 1
        if self.warmup_steps >= 0:
            self.began = time.perf_counter()
            return False
        step = {"steps": 1, "users": len(lengths), "tokens": int(lengths.sum()), "squares": int((lengths**2).sum())}
        self.counts = {name: count + step[name] for name, count in self.counts.items()}
        return time.perf_counter() - self.began >= self.seconds

    def result(self) -> dict[str, float]:
        """Counts, and seconds that they took until now."""
        return {**self.counts, "seconds": time.perf_counter() - self.began}


def peak_memory() -> int:
    """Bytes that this process held at most (VmHWM: ru_maxrss would begin with the parent's)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status; peak memory needs Linux")


def available_memory() -> int:
    """Bytes that new processes of this machine can take."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no MemAvailable in /proc/meminfo; it needs Linux")


def descendants(pid: int) -> list[int]:
    """`pid`, its children, theirs, and so on."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for each in found:
        found += parents.get(each, [])
    return found


def bytes_sent() -> int:
    """Bytes that this machine's processes have sent to one another over TCP, as gloo's workers do."""
    (line,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])


def report(**result: float) -> None:
    """Hand the result, and this process's peak memory where it names none, to `run`."""
    print(json.dumps({"memory": peak_memory(), **result}), flush=True)


class OutOfMemoryError(Exception):
    """A measured process needs more memory than the machine has."""


def run(
    module: str, workload: Workload, python: str = "", root: str = "", environment: Mapping[str, str] | None = None
) -> dict[str, float]:
    """The result of `module` in a process of its own, with the workload's threads.

    Parameters
    ----------
    python
        Another Python than this one.
    root
        Another checkout than this one; it may be of a commit whose `Workload` has fewer fields.

    Raises
    ------
    OutOfMemoryError
        If it leaves the machine less than `LEAST_MEMORY`; it is ended before the system ends another process.
    """
    defaults = {field.name: field.default for field in fields(Workload)}
    given = {name: value for name, value in asdict(workload).items() if value != defaults[name]}
    threads = {name: str(workload.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    process = subprocess.Popen(
        [python or sys.executable, "-W", "ignore", "-m", module, json.dumps(given)],
        cwd=root or _ROOT,
        env={**os.environ, **threads, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, errors = _output_within_memory(process)
    finally:
        if process.poll() is None:
            for pid in descendants(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.communicate()
    if process.returncode and any(said in errors for said in ("can't allocate memory", "signal SIGKILL")):
        raise OutOfMemoryError(f"{module}: {errors.splitlines()[-1]}")
    if process.returncode:
        sys.exit(f"{module} failed:\n{errors[-4000:]}")
    result: dict[str, float] = json.loads(out.splitlines()[-1])
    return result


def _output_within_memory(process: subprocess.Popen[str]) -> tuple[str, str]:
    while True:
        try:
            return process.communicate(timeout=0.05)
        except subprocess.TimeoutExpired:
            if (left := available_memory()) < LEAST_MEMORY:
                raise OutOfMemoryError(f"it left {left / 2**20:,.0f} MiB of the machine's memory") from None


def environment(name: str, requirements: Sequence[str]) -> str:
    """Python of a virtual environment with `requirements`, made on the first call and kept in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    home = cache / "bert4rec-benchmarks" / name
    python, complete = home / "bin" / "python", home / "requirements.txt"
    wanted = "\n".join(requirements)
    if not complete.exists() or complete.read_text() != wanted:
        print(f"making the environment {home}", file=sys.stderr)
        venv.create(home, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True, stdout=sys.stderr)
        complete.write_text(wanted)
    return str(python)


def rectools_environment() -> str:
    """Python with RecTools 0.19, which wants an older numpy and pandas."""
    return environment("rectools-0.19", ["rectools[torch]==0.19.*", _same_torch()])


def recbole_environment() -> str:
    """Python with RecBole 1.2.1, which imports pkg_resources and calls what numpy 2 and pandas 2.3 no longer have."""
    return environment(
        "recbole-1.2.1", ["recbole==1.2.1", _same_torch(), "numpy<2", "pandas<2.3", "scipy<1.14", "setuptools<81"]
    )


def _same_torch() -> str:
    return f"torch=={importlib.metadata.version('torch').partition('+')[0]}"


def machine() -> str:
    """CPU, whether it has AVX-512, cores and memory, in a line."""
    fields = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    cpu = fields.get("model name", platform.machine()).replace("(R)", "").removesuffix(" Processor")
    avx512 = "with" if "avx512f" in fields.get("flags", "").split() else "without"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cpu} {avx512} AVX-512, {available_cores()} cores, {memory:.0f} GiB"


def versions() -> str:
    """Python and the packages that figures depend on, in a line."""
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "ray", "numpy"))
    return f"Python {platform.python_version()}, {packages}"


def commit() -> str:
    """The commit that is measured, with a + where files differ from it."""
    short = ["git", "-C", str(_ROOT), "describe", "--always", "--abbrev=7", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(short, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or not a clone
        return "unknown"


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def median(results: Sequence[Mapping[str, float]], name: str) -> float:
    """Median of one figure over the repeats."""
    return float(np.median([result[name] for result in results]))


def spread(results: Sequence[Mapping[str, float]], name: str, form: str = ",.0f") -> str:
    """Lowest and highest of one figure over the repeats."""
    values = [result[name] for result in results]
    return f"{min(values):{form}}–{max(values):{form}}" if len(values) > 1 else "1 turn"


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Beside so many processes that compute all the time, one core each."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def share_of_peak(rate: float, peaks: Sequence[Mapping[str, float]]) -> str:
    """Of the best product in any turn, of the products' mean speed, and of torch's own best where that is slower."""
    best, torch = (max(peak[name] for peak in peaks) for name in ("flops", "torch"))
    sustained = median(peaks, "sustained")
    others = f"; {rate / torch:.1%} of torch.mm's {torch / 1e9:.0f}" if torch < 0.9 * best else ""
    return f"{rate / best:.1%} of {best / 1e9:.0f}; {rate / sustained:.1%} of {sustained / 1e9:.0f} sustained{others}"


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table of rows with the same columns."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def options(description: str) -> argparse.ArgumentParser:
    """A parser with the options of all measurements."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--threads", type=int, default=available_cores(), help="of every implementation")
    parser.add_argument("--seed", type=int, default=42)
    add_record(parser)
    return parser


def add_record(parser: argparse.ArgumentParser) -> None:
    """The option that `publish` is given."""
    parser.add_argument(
        "--record", action="store_true", help=f"append to {RESULTS.name}/NAME.jsonl, for `python -m benchmarks.render`"
    )


def publish(name: str, notes: Sequence[str], rows: Sequence[Mapping[str, str]], is_recorded: bool) -> None:
    """Print the result of the running program; if asked, append it to NAME.jsonl with what it takes to repeat it."""
    arguments = [word for word in sys.argv[1:] if word != "--record"]
    module = f"benchmarks.{Path(sys.argv[0]).stem}"
    record = {
        "date": str(date.today()),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "command": f"python -m {module} {shlex.join(arguments)}".rstrip(),
        "notes": list(notes),
        "rows": [dict(row) for row in rows],
    }
    print("\n\n".join([f"`{record['command']}`", f"{record['machine']}; {record['versions']}", *notes, markdown(rows)]))
    if is_recorded:
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
