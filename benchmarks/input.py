"""Tokens/s of assembling steps, and how much of it a device would wait for: `python -m benchmarks.input`.

The steps are a GPU's: few groups, large passes. The device is pretended: it takes a set time for each token, during
which the process sleeps.
"""

import time
from collections.abc import Iterator

import torch

from benchmarks.common import Histories, median, options, publish, read_histories, spread, synthetic_histories
from benchmarks.ours import windows_of
from bert4rec.config import DataConfig, ModelConfig
from bert4rec.model import batches
from bert4rec.model.batches import Step, iter_steps, steps_ahead
from bert4rec.training.loop import PASS_TOKENS

SHORT = "short"
"""Synthetic histories of ten items on average."""


def main() -> None:
    parser = options("How fast the steps of a training are assembled.")
    parser.add_argument("--data", nargs="+", default=[SHORT], help=f"{SHORT}, or directories with train_ratings.csv")
    parser.add_argument("--users", type=int, nargs="+", default=[4096, 16384], help="a step")
    parser.add_argument("--max-len", type=int, default=50)
    parser.add_argument("--rates", type=float, nargs="*", default=[1e6, 2e6], help="tokens/s of the pretended device")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3, help="measured in each turn")
    args = parser.parse_args()
    batches.GROUP_TOKENS["cpu"] = batches.GROUP_TOKENS["cuda"]  # groups as for a GPU
    rows = []
    for name in args.data:
        histories = synthetic_histories(200_000, 1_000_000, 10, args.seed) if name == SHORT else read_histories(name, 0)
        for users in args.users:

            def steps(histories: Histories = histories, users: int = users) -> Iterator[Step]:
                return _steps(histories, users, args.max_len, args.seed)

            for threads in range(1, args.threads + 1):
                torch.set_num_threads(threads)
                turns = [_assembled(steps(), args.seconds) for _ in range(args.repeats)]
                per_core = [turn["tokens"] / turn["cpu_seconds"] for turn in turns]
                rows.append(
                    {
                        "claim": f"assembly alone, {threads} thread{'s' * (threads > 1)}, {users:,} users, {name}",
                        "M tokens/s": f"{median(turns, 'rate') / 1e6:.2f}",
                        "spread": spread([{"rate": turn["rate"] / 1e6} for turn in turns], "rate", ".2f"),
                        "M tokens a CPU second": f"{sorted(per_core)[len(per_core) // 2] / 1e6:.2f}",
                        "waiting": "",
                    }
                )
            torch.set_num_threads(1)
            for rate in args.rates:
                for is_ahead in (False, True):
                    made = steps_ahead(steps()) if is_ahead else steps()
                    waiting = _waiting(made, rate, args.seconds)
                    rows.append(
                        {
                            "claim": f"{'ahead of' if is_ahead else 'between the steps of'} a device of "
                            f"{rate / 1e6:g} M tokens/s, {users:,} users, {name}",
                            "M tokens/s": "",
                            "spread": "1 turn",
                            "M tokens a CPU second": "",
                            "waiting": f"{waiting:.1%}",
                        }
                    )
    notes = [
        f"max_len {args.max_len}, seed {args.seed}; medians of {args.repeats} turns of at least {args.seconds:g} s.",
        "Tokens are real ones, M is a million; a CPU second: of one core, which other processes disturb "
        "less than the wall time; waiting: share of the time in which the pretended device has nothing to do.",
    ]
    publish("input", notes, rows, args.record)


def _steps(histories: Histories, users: int, max_len: int, seed: int) -> Iterator[Step]:
    """The steps of epoch after epoch."""
    data = DataConfig(batch_size=users, use_full_data=True, min_interactions=2, seed=seed)
    model, windows = ModelConfig(max_len=max_len), windows_of(histories)
    epoch, device = 0, torch.device("cpu")
    while True:
        yield from iter_steps(windows, data, model, len(histories.item_ids), epoch, 0, 1, PASS_TOKENS["cuda"], device)
        epoch += 1


def _assembled(steps: Iterator[Step], seconds: float) -> dict[str, float]:
    """Tokens of the steps that the time takes, after the first one."""
    next(steps)
    began, cpu, tokens = time.perf_counter(), time.process_time(), 0
    while (taken := time.perf_counter() - began) < seconds:
        tokens += next(steps).num_tokens
    return {"tokens": tokens, "rate": tokens / taken, "cpu_seconds": time.process_time() - cpu}


def _waiting(steps: Iterator[Step], rate: float, seconds: float) -> float:
    """Share of the time in which a device of `rate` tokens/s waits for its next step, after the first one."""
    next(steps)
    began, worked = time.perf_counter(), 0.0
    while time.perf_counter() - began < seconds:
        busy = next(steps).num_tokens / rate
        ends = time.perf_counter() + busy
        time.sleep(busy)
        worked += busy + max(0.0, time.perf_counter() - ends)  # that the system woke it late is no waiting for input
    taken = time.perf_counter() - began
    return 1 - worked / taken


if __name__ == "__main__":
    main()
