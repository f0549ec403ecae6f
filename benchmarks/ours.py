"""Our side of a measurement, without Ray: `python -m benchmarks.ours WORKLOAD`."""

import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.distributed
import torch.multiprocessing

from benchmarks.common import Histories, Meter, Workload, bytes_sent, peak_memory, report
from bert4rec.config import DataConfig, ModelConfig, TrainingConfig
from bert4rec.data.dataset import ItemTable
from bert4rec.data.windows import Windows, training_windows
from bert4rec.inference.ranking import Exclusions, score_next, top_k
from bert4rec.model.batches import iter_steps, steps_ahead
from bert4rec.model.layers import product
from bert4rec.model.losses import make_loss
from bert4rec.model.network import BERT4Rec
from bert4rec.model.shards import Shard
from bert4rec.training.loop import DDP_OPTIONS, PASS_TOKENS, make_optimizers, train_step

STEPS_OF_WORKERS = 10
"""After so many, workers agree whether the time is up."""
GPU_STEPS_AT_ONCE = 8
"""Steps after which a GPU is waited for: in a training it is waited for once an epoch."""


def windows_of(histories: Histories) -> Windows:
    offsets = torch.from_numpy(histories.offsets)
    times = None if histories.times is None else torch.from_numpy(histories.times)
    return Windows(torch.from_numpy(histories.items), offsets[:-1], offsets[1:], times)


def catalogue_of(ids: np.ndarray) -> ItemTable:
    """Items with these ids [V] and nothing else."""
    nothing = np.zeros(len(ids), np.int64)
    return ItemTable(
        ids=pa.array(ids),
        count=nothing,
        year=nothing.astype(np.int16),
        has_year=nothing.astype(bool),
        title=pa.nulls(len(ids), pa.string()),
        listed={},
    )


def model_config(workload: Workload) -> ModelConfig:
    return ModelConfig(
        hidden_units=workload.hidden,
        position_encoding="rotary" if workload.position_encoding == "rotary" else "learned",
        time_encoding=workload.time_encoding,
        num_heads=workload.num_heads,
        num_layers=workload.num_layers,
        max_len=workload.max_len,
        dropout_rate=workload.dropout,
        random_mask_prob=workload.mask_prob,
        last_item_mask_ratio=0.0,
    )


def train(workload: Workload, histories: Histories, rank: int = 0) -> dict[str, float]:
    """The loop of a training worker, over as many epochs as the time takes.

    Of several workers each runs this in a process of its own (`train_together`), and all return the same counts.
    """
    data = DataConfig(batch_size=workload.batch_size, use_full_data=True, min_interactions=2, seed=workload.seed)
    keys = ("precision", "optimizer", "loss", "num_negatives", "item_optimizer", "shard_items")
    training = TrainingConfig.model_validate({key: getattr(workload, key) for key in keys})
    device, size = torch.device(workload.device), workload.workers
    num_items = len(histories.item_ids)
    windows = training_windows(windows_of(histories), data)
    if workload.time_encoding == "none":
        windows = replace(windows, times=None)
    torch.manual_seed(workload.seed)
    shard = Shard(rank, size, num_items) if training.shard_items else None
    model = BERT4Rec(model_config(workload), num_items, shard=shard).to(device).train()
    model.loss = make_loss(training)
    if model.shards is not None:
        model.row_tables = model.shards.prepare(training, model.get_buffer("item_counts"))
    elif training.item_optimizer == "rowwise":
        model.train_by_rows()
    wrapped = torch.nn.parallel.DistributedDataParallel
    trained = wrapped(model, **DDP_OPTIONS) if size > 1 else model  # type: ignore[arg-type]
    optimizers = make_optimizers(model, training)
    scaler = torch.amp.GradScaler(device.type, enabled=workload.precision == "16-mixed")  # type: ignore[attr-defined]
    at_once = GPU_STEPS_AT_ONCE if device.type == "cuda" else STEPS_OF_WORKERS if size > 1 else 1
    warmup = at_once * (1 if at_once == STEPS_OF_WORKERS else 3)
    meter, epoch, waited, is_over = Meter(workload.seconds, warmup_steps=warmup), 0, 0.0, False
    lengths: list[torch.Tensor] = []  # of the users of each step that is not counted yet
    cpu, sent = 0.0, 0
    while not is_over:
        steps = iter_steps(windows, data, model.config, num_items, epoch, rank, size, PASS_TOKENS[device.type], device)
        if device.type == "cuda":
            steps = steps_ahead(steps)
        epoch += 1
        while not is_over:
            began = time.perf_counter()
            step = next(steps, None)
            waited += time.perf_counter() - began
            if step is None:
                break
            train_step(trained, step, optimizers, scaler, training, size)
            if meter.warmup_steps > 0:
                waited, cpu, sent = 0.0, time.process_time(), bytes_sent()
            lengths.append(torch.cat([(rows > 0).sum(1) for batch in step.batches for rows in batch.rectangles()]))
            if len(lengths) == at_once:
                _wait(device)
                is_over = _summed(size, [meter.add(each.cpu()) for each in lengths][-1])[0] > 0  # one ends all
                lengths.clear()
    result = meter.result()
    names = ("users", "tokens", "squares")
    counted = dict(zip(names, _summed(size, *(result[name] for name in names)), strict=True))
    costs = {"cpu_seconds": time.process_time() - cpu, "bytes_sent": (bytes_sent() - sent) / size}
    return {**result, **counted, **costs, "input_share": waited / result["seconds"]}


def _summed(size: int, *values: float) -> list[float]:
    """Each value summed over all workers."""
    total = torch.tensor(values, dtype=torch.float64)
    if size > 1:
        torch.distributed.all_reduce(total)
    return total.tolist()


def train_together(workload: Workload) -> dict[str, float]:
    """The first worker's result, of as many gloo processes as there are workers, which share the threads."""
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
            _worker, (workload, directory), nprocs=workload.workers
        )
        result: dict[str, float] = json.loads(Path(directory, "result.json").read_text())
    return result


def _worker(rank: int, workload: Workload, directory: str) -> None:
    torch.set_num_threads(max(1, workload.threads // workload.workers))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=workload.workers
    )
    result = train(workload, Histories.load(workload.data), rank)
    if rank == 0:
        result["memory"] = peak_memory()
        Path(directory, "result.json").write_text(json.dumps(result))
    torch.distributed.barrier()  # nobody leaves while another still sums
    torch.distributed.destroy_process_group()
    os._exit(0)  # the end of Python's own sometimes aborts ("terminate called without an active exception")


def recommend(workload: Workload, histories: Histories) -> dict[str, float]:
    """From histories to arrays of original ids, for all users; on a CPU each thread ranks users of its own, as the
    job's workers do, which have a core each."""
    device = torch.device(workload.device)
    model = BERT4Rec(model_config(workload), len(histories.item_ids)).to(device).eval()
    began = time.perf_counter()
    windows = windows_of(histories)

    def rank(users: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        seen = windows.users(users).to(device)
        scores = score_next(model, seen)
        values, items = top_k(scores, Exclusions.of(seen, device=device), len(users), model.num_items, workload.topk)
        values, items = values.cpu(), items.cpu()
        found = torch.isfinite(values)
        row = torch.nonzero(found)[:, 0]
        return histories.user_ids[users[row].numpy()], histories.item_ids[items[found].numpy()], values[found].numpy()

    side_by_side = workload.threads if device.type == "cpu" else 1
    with ThreadPoolExecutor(side_by_side, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        columns = list(threads.map(rank, torch.split(torch.arange(len(windows)), workload.batch_size)))
    rows = [np.concatenate(column) for column in zip(*columns, strict=True)]
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "users": len(windows), "rows": len(rows[0])}


def matrix_peak(workload: Workload) -> dict[str, float]:
    """FLOP/s of square products, 1024 to 4096 wide (to 8192 on a GPU), in the precision of training.

    `torch` is the fastest single torch.mm, `flops` the fastest of those and of `product`, which our layers take;
    `sustained` is the mean over all products of the width and kind for which it is highest: on a machine whose speed
    comes and goes, that is what a training can be measured by.
    """
    dtype = {"32-true": torch.float32, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}[workload.precision]
    device = torch.device(workload.device)
    widths = (1024, 2048, 4096) if device.type == "cpu" else (2048, 4096, 8192)
    best, sustained = {"torch": 0.0, "ours": 0.0}, 0.0
    for width in widths:
        a, b, out = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(3))
        for name in best:
            times: list[float] = []
            end = time.perf_counter() + workload.seconds / len(widths) / len(best)
            while (began := time.perf_counter()) < end:
                torch.mm(a, b, out=out) if name == "torch" else product(a, b, out=out)
                _wait(device)
                times.append(time.perf_counter() - began)
            best[name] = max(best[name], 2 * width**3 / min(times))
            sustained = max(sustained, 2 * width**3 * len(times) / sum(times))
    return {"flops": max(best.values()), "torch": best["torch"], "sustained": sustained}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    workload = Workload.from_command_line()
    torch.set_num_threads(workload.threads)
    torch.manual_seed(workload.seed)
    if workload.task == "peak":
        report(**matrix_peak(workload))
    elif workload.task == "training" and workload.workers > 1:
        report(**train_together(workload))
    else:
        report(**{"training": train, "recommend": recommend}[workload.task](workload, Histories.load(workload.data)))


if __name__ == "__main__":
    main()
