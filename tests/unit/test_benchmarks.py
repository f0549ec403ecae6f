import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ablation, catalogue, common
from benchmarks import blend as blend_benchmark
from benchmarks import input as input_benchmark
from benchmarks.common import (
    SYNTHETIC_SHORT,
    Histories,
    Meter,
    OutOfMemoryError,
    Workload,
    descendants,
    markdown,
    peak_memory,
    read_histories,
    run,
    scoring_flops,
    share_of_peak,
    synthetic_histories,
    training_flops,
)
from benchmarks.foreign import rankings
from benchmarks.ours import model_config, train, windows_of
from benchmarks.plain import PlainBERT4Rec, plain_loss
from benchmarks.prepare import write_ratings
from benchmarks.short_histories import NUM_GENRES, PARTS, SERIES, ceiling_rank, short_histories
from bert4rec.config import ModelConfig, load_config
from bert4rec.model import layers
from bert4rec.model.batches import Step, last_items, mask_items, pack
from bert4rec.model.network import BERT4Rec
from bert4rec.training.loop import make_optimizers
from tests.helpers.datasets import random_histories, write_dataset

pytestmark = pytest.mark.unit


def small_workload(path, **changes):
    return Workload(**{"data": str(path), "hidden": 8, "max_len": 6, "batch_size": 4, "seconds": 0.05, **changes})


@pytest.fixture
def small_file(tmp_path):
    synthetic_histories(20, 30, 5, seed=0).save(str(tmp_path / "histories.npz"))
    return tmp_path / "histories.npz"


def test_histories_are_in_time_order_with_tokens_by_frequency(tmp_path):
    (tmp_path / "train_ratings.csv").write_text("user,item,time\n7,x,3\n5,y,2\n7,y,1\n5,z,1\n")
    histories = read_histories(str(tmp_path), seed=0)
    assert histories.user_ids.tolist() == [5, 7]
    names = histories.item_ids[histories.items - 1]
    assert [names[a:b].tolist() for a, b in zip(histories.offsets[:-1], histories.offsets[1:], strict=True)] == [
        ["z", "y"],
        ["y", "x"],
    ]
    assert histories.item_ids[0] == "y"


def test_without_a_time_the_order_of_the_file_is_kept(tmp_path):
    (tmp_path / "train_ratings.csv").write_text("user,item\n2,9\n1,8\n2,7\n2,8\n")
    histories = read_histories(str(tmp_path), seed=0)
    assert histories.item_ids[histories.items - 1].tolist() == [8, 9, 7, 8]
    assert histories.offsets.tolist() == [0, 1, 4]


def test_histories_come_back_from_their_file(small_file):
    loaded, made = Histories.load(str(small_file)), synthetic_histories(20, 30, 5, seed=0)
    for name in vars(made):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(made, name))


def test_short_histories_are_short_and_the_same_each_time():
    histories = read_histories(SYNTHETIC_SHORT, seed=1)
    assert len(histories.lengths) == 40_000
    assert histories.lengths.min() >= 2
    assert histories.lengths.mean() == pytest.approx(9, abs=0.2)
    assert len(histories.item_ids) == 54_000
    assert histories.items.min() >= 1
    assert histories.items.max() <= 54_000
    np.testing.assert_array_equal(histories.items, read_histories(SYNTHETIC_SHORT, seed=1).items)


def count_flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_training_flops_are_those_torch_counts_where_nothing_is_padding(monkeypatch):
    monkeypatch.setattr(layers, "USES_ONEDNN", False)  # whose operator torch does not count
    workload = small_workload("", hidden=16, mask_prob=1.0, dropout=0.0)
    num_users, length, num_items = 3, 6, 11
    model = BERT4Rec(model_config(workload), num_items)
    tokens = torch.randint(1, num_items + 1, (num_users, length))
    batch = pack(tokens, tokens, torch.device("cpu"))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        counted = count_flops(lambda: model(batch).backward())
    needed = training_flops(workload, num_users * length, num_users * length**2, num_items)
    assert counted == needed


def test_scoring_flops_are_those_torch_counts_where_nothing_is_padding(monkeypatch):
    monkeypatch.setattr(layers, "USES_ONEDNN", False)
    workload = small_workload("", hidden=16)
    num_users, num_items = 3, 11
    model = BERT4Rec(model_config(workload), num_items).eval()
    tokens = torch.randint(1, num_items + 1, (num_users, 6))
    batch = pack(tokens, None, torch.device("cpu"))

    def score():
        states = model.project(model.encode(batch))
        torch.nn.functional.linear(states, *model.output_weights())

    with torch.inference_mode(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        counted = count_flops(score)
    assert counted == scoring_flops(workload, np.array([5, 9, 30]), num_items)  # all read 6 positions


def test_the_rankings_that_another_library_gets_are_those_of_our_metrics(tmp_path):
    config = load_config(None, [f"run.storage_path={tmp_path}", "data.data_dir=/d"])
    histories = random_histories(300, 30, longest=9)
    write_dataset(Path(config.prepared_path), histories, 30)
    model = BERT4Rec(ModelConfig(hidden_units=8, num_heads=2, max_len=6), 30, "test")
    model.save_pretrained(str(tmp_path / "m"))
    ours, given = rankings(config, str(tmp_path / "m"), 200)
    assert len(given["target"]) == 200
    ranks = []
    for user, target in enumerate(given["target"].tolist()):
        scores = dict(zip(given["item"][given["user"] == user], given["score"][given["user"] == user], strict=True))
        ranks.append(sum(score >= scores[target] for score in scores.values()))
    ranks = np.array(ranks)
    assert len(set(given["user"])) == 200
    assert ours["hr@10"] == pytest.approx((ranks <= 10).mean())
    assert ours["ndcg@10"] == pytest.approx(np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0).mean())
    assert ours["mrr"] == pytest.approx((1 / ranks).mean())


def test_an_ablation_has_a_row_for_each_change(tmp_path, monkeypatch, capsys):
    fixed = "model.hidden_units=8 model.num_heads=2 training.num_epochs=2 training.val_check_interval=1"
    config = load_config("configs/short-histories.yaml", [f"run.storage_path={tmp_path}", "data.data_dir=/d"])
    write_dataset(Path(config.prepared_path), random_histories(60, 30), 30)
    arguments = ["", "model.attention=causal model.dropout_rate=0", "--data", "/d", "--runs", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["ablation.py", *arguments, "--keep", str(tmp_path / "kept"), "--all", fixed])
    threads = torch.get_num_threads()
    ablation.main()
    torch.set_num_threads(threads)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if " | 1 / 2 | " in line]
    assert [row[0] for row in rows] == ["| nothing", "| `model.attention=causal model.dropout_rate=0`"]
    assert rows[0][2:4] != rows[1][2:4]
    assert BERT4Rec.from_pretrained(str(tmp_path / "kept" / "1")).config.dropout_rate == 0


@pytest.mark.parametrize("model", ["ease", "item-knn"])
def test_a_blend_is_measured(model, monkeypatch, capsys):
    options = ["--items", "60", "--users", "40", "--ranked", "20", "--hidden", "8", "--batch", "7"]
    monkeypatch.setattr(sys, "argv", ["benchmarks/blend.py", "--model", model, *options])
    threads = torch.get_num_threads()
    blend_benchmark.main()
    torch.set_num_threads(threads)
    assert f"| {model}, 60 items |" in capsys.readouterr().out


def test_plain_implementation_has_our_arithmetic():
    workload = small_workload("", dropout=0.0)
    histories = synthetic_histories(12, 30, 5, seed=3)
    num_items = len(histories.item_ids)
    torch.manual_seed(0)
    ours, plain = BERT4Rec(model_config(workload), num_items), PlainBERT4Rec(workload, num_items)
    with torch.no_grad():
        plain.item_embedding.weight.copy_(ours.items.embedding.weight)
        plain.position_embedding.weight.copy_(ours.position_embedding.weight.flip(0))
        for block, layer in zip(ours.blocks, plain.encoder.layers, strict=True):
            layer.self_attn.in_proj_weight.copy_(torch.cat([block.query.weight, block.key_value.weight]))
            layer.self_attn.out_proj.load_state_dict(block.attention_output.state_dict())
            layer.norm1.load_state_dict(block.attention_norm.state_dict())
            layer.linear1.load_state_dict(block.feed_forward[0].state_dict())
            layer.linear2.load_state_dict(block.feed_forward[-1].state_dict())
            layer.norm2.load_state_dict(block.output_norm.state_dict())
        plain.output_transform.load_state_dict(ours.output_transform.state_dict())
    items = last_items(windows_of(histories), workload.max_len)
    tokens, labels = mask_items(items, ours.config, num_items, torch.Generator().manual_seed(0))
    padded = torch.zeros(len(tokens), workload.max_len, dtype=torch.int64)
    padded[:, -tokens.shape[1] :] = tokens
    padded_labels = torch.zeros_like(padded)
    padded_labels[:, -labels.shape[1] :] = labels
    rows = torch.argsort((tokens > 0).sum(1), descending=True)
    expected = ours(pack(tokens[rows], labels[rows], torch.device("cpu"))) / (labels > 0).sum()
    torch.testing.assert_close(plain_loss(plain(padded), padded_labels), expected)


def test_meter_counts_from_the_end_of_the_warm_up():
    meter = Meter(seconds=0, warmup_steps=2)
    steps = [torch.tensor([3, 4]), torch.tensor([1, 1]), torch.tensor([2, 5])]
    assert [meter.add(lengths) for lengths in steps] == [False, False, True]
    counted = meter.result()
    assert (counted["steps"], counted["users"], counted["tokens"], counted["squares"]) == (1, 2, 7, 29)
    assert counted["seconds"] >= 0


@pytest.mark.parametrize("module", ["benchmarks.ours", "benchmarks.plain"])
def test_training_runs_in_a_process_of_its_own(small_file, module):
    result = run(module, small_workload(small_file))
    assert result["tokens"] > result["users"] > 0
    assert result["seconds"] >= 0.05
    assert result["memory"] > 50 * 2**20


def test_what_leaves_too_little_memory_is_ended_with_all_that_it_started(small_file, monkeypatch):
    monkeypatch.setattr(common, "LEAST_MEMORY", 2**60)
    before = descendants(os.getpid())
    with pytest.raises(OutOfMemoryError, match="MiB of the machine's memory"):
        run("benchmarks.ours", small_workload(small_file, workers=2))
    assert descendants(os.getpid()) == before


def test_a_table_too_large_is_a_row_of_its_own(monkeypatch, capsys):
    def measured(module, workload, environment):
        if not workload.shard_items:
            raise OutOfMemoryError("it left 9 MiB")
        figures = {"seconds": 1.0, "cpu_seconds": 2.0, "bytes_sent": 4e6, "memory": 3 * 2**20}
        return {**figures, "steps": 10}

    monkeypatch.setattr(catalogue, "run", measured)
    options = ["--items", "30", "--item-optimizer", "dense", "--workers", "2", "--shard-items"]
    monkeypatch.setattr(sys, "argv", ["benchmarks/catalogue.py", *options])
    catalogue.main()
    printed = capsys.readouterr()
    assert "| dense, 30 items, hidden 64, 2 workers | out of memory |  |" in printed.out
    whole = "| 100.0 | 100.0–100.0 | 200.0 | 1.00× | 3 |  | 0.40 |"
    assert f"| dense, 30 items, hidden 64, 2 workers, in shards {whole}" in printed.out
    assert printed.err.count("it left 9 MiB") == 1


def test_rows_alone_are_measured_by_their_own_step(monkeypatch):
    made = []
    monkeypatch.setattr(
        "benchmarks.ours.make_optimizers", lambda *given: made.append(make_optimizers(*given)) or made[0]
    )
    workload = small_workload("", loss="sampled-softmax", num_negatives=3, item_optimizer="rowwise")
    result = train(workload, synthetic_histories(20, 30, 5, seed=0))
    assert result["steps"] > 0
    assert result["cpu_seconds"] > 0
    assert [type(each).__name__ for each in made[0]] == ["AdamW", "RowwiseAdam"]


class Clock:
    """Seconds that pass only while somebody sleeps or works."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    process_time = perf_counter

    def sleep(self, seconds):
        self.now += seconds


def test_input_counts_tokens_and_what_a_device_waits(monkeypatch):
    """A step of 6 tokens takes 1 s to assemble, and 3 s at 2 tokens/s."""
    clock = Clock()
    monkeypatch.setattr(input_benchmark, "time", clock)

    def steps():
        while True:
            clock.sleep(1)
            yield Step([], 1, 6, torch.empty(0))

    assert input_benchmark._waiting(steps(), rate=2, seconds=11) == pytest.approx(0.25)
    assembled = input_benchmark._assembled(steps(), seconds=5)
    assert assembled == {"tokens": 30, "rate": 6, "cpu_seconds": 5}


def test_recommend_ranks_for_every_user(small_file):
    result = run("benchmarks.ours", small_workload(small_file, task="recommend", topk=3))
    assert result["users"] == 20
    assert result["rows"] == 60


def test_peak_memory_holds_what_was_freed():
    before = peak_memory()
    block = np.ones(64 * 2**20, np.uint8)
    del block
    assert peak_memory() >= before
    assert peak_memory() > 64 * 2**20


def test_a_child_and_its_child_are_descendants():
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        found = descendants(os.getpid())
        child.stdin.write(b"\n")
    assert child.pid in found
    assert len(found) >= 3


def test_synthetic_ratings_are_complete_and_reproducible(tmp_path):
    for name in ("a.csv", "b.csv"):
        write_ratings(str(tmp_path / name), 5000, seed=4)
    lines = (tmp_path / "a.csv").read_text().splitlines()
    assert lines[0] == "user,item,time"
    assert len(lines) == 5001
    assert all(len(line.split(",")) == 3 for line in lines)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_table():
    assert markdown([{"a": "1", "b": "2"}]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_short_histories_keep_their_rules():
    ratings, ranks = short_histories(300, seed=1)
    item_ids = np.random.default_rng(1).permutation(NUM_GENRES * SERIES * PARTS) + 1
    place = np.empty(len(item_ids) + 1, np.int64)
    place[item_ids] = np.arange(len(item_ids))
    read_on = []
    for _, user in ratings.groupby("user"):
        series, part = np.divmod(place[user["item"].to_numpy()], PARTS)
        assert len(set(series // SERIES)) <= 2
        assert user["time"].is_monotonic_increasing
        follows = (series[1:] == series[:-1]) & (part[1:] == part[:-1] + 1)
        assert len(set(series[1:][~follows])) == (~follows).sum(), "a series is begun once"
        read_on += list(follows[part[:-1] + 1 < PARTS])
    assert not ratings.duplicated(["user", "item"]).any()
    assert np.mean(read_on) == pytest.approx(0.5, abs=0.03)
    assert len(ranks) == 300
    assert ranks.min() == 1


def test_ceiling_rank_by_hand():
    nothing = np.zeros((2, SERIES), bool)
    assert ceiling_rank(7, 3, nothing, (7, 4)) == 1  # the next part has 1/2, any other less
    # The best series of each genre have the same probability; its parts, from the first, come behind the next part.
    assert ceiling_rank(7, 3, nothing, (0, 0)) == 2
    assert ceiling_rank(7, 3, nothing, (0, 5)) == 7
    assert ceiling_rank(7, PARTS - 1, nothing, (0, 5)) == 6  # no next part
    assert ceiling_rank(7, PARTS - 1, nothing, (1, 0)) == 19  # behind the parts of two best series
    begun = nothing.copy()
    begun[1, 0] = True  # then the rest of genre 1 shares more, and its second series is the best but one
    assert ceiling_rank(SERIES, PARTS - 1, begun, (SERIES + 1, 2)) == 12


def test_share_of_the_peak_names_the_mean_speed_and_a_slower_torch():
    turns = [{"flops": 200e9, "torch": 100e9, "sustained": 90e9}, {"flops": 190e9, "torch": 125e9, "sustained": 110e9}]
    assert share_of_peak(50e9, turns) == "25.0% of 200; 50.0% of 100 sustained; 40.0% of torch.mm's 125"
    alike = [{"flops": 200e9, "torch": 199e9, "sustained": 160e9}]
    assert share_of_peak(50e9, alike) == "25.0% of 200; 31.2% of 160 sustained"
