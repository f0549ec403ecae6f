import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from bert4rec.config import DataConfig, ModelConfig
from bert4rec.data.windows import Windows, held_out, held_out_users, item_counts, training_windows
from bert4rec.model import batches, layers
from tests.helpers.datasets import random_histories
from tests.twins import reference

pytestmark = pytest.mark.unit

MODEL = ModelConfig(hidden_units=8, num_heads=2, max_len=6)


def windows_of(histories):
    lengths = torch.tensor([len(history) for history in histories])
    ends = torch.cumsum(lengths, 0)
    flat = torch.tensor([item for history in histories for item in history], dtype=torch.int32)
    return Windows(flat, ends - lengths, ends)


def rows_of(batch):
    """Each row of a packed batch: its tokens without padding, and the label of each."""
    labels = torch.zeros_like(batch.tokens).scatter_add_(0, batch.query, batch.labels)
    sizes = [group.rows * group.length for group in batch.groups]
    assert not batch.tokens[sum(sizes) :].any()
    for rectangle, own in zip(batch.rectangles(), labels[: sum(sizes)].split(sizes), strict=True):
        for row, answers in zip(rectangle.tolist(), own.view(rectangle.shape).tolist(), strict=True):
            start = sum(token == 0 for token in row)
            assert not any(answers[:start])
            yield tuple(row[start:]), tuple(answers[start:])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn_items(draw, windows, max_len):
    return batches.tokens_at(windows, draw(windows, max_len, seeded()))


def test_last_items_equals_the_slow_way():
    histories = list(random_histories(50, 30).values())
    for max_len in (1, 5, 30):
        got = batches.last_items(windows_of(histories), max_len)
        assert got.tolist() == reference.last_items(histories, max_len)


def test_windows_flat_and_to_keep_the_histories():
    windows = windows_of([[1, 2, 3], [], [4, 5]]).without_last(1)
    row, item = windows.flat()
    assert (row.tolist(), item.tolist()) == ([0, 0, 2], [1, 2, 4])
    assert windows.users(torch.tensor([2, 0])).flat()[1].tolist() == [4, 1, 2]


def test_item_counts_by_hand():
    windows = windows_of([[1, 2, 2], [5, 1]])
    assert item_counts(windows.users(torch.arange(2).repeat(70_000)), 5).tolist() == [
        140_000,
        140_000,
        0,
        0,
        70_000,
    ]
    assert item_counts(windows.without_last(1), 5).tolist() == [1, 1, 0, 0, 1]


def test_splits_by_hand():
    windows = windows_of([[1, 2, 3, 4], [5, 6], [7, 8, 9]])
    one = DataConfig(min_interactions=3, holdout=1)
    assert batches.last_items(training_windows(windows, one), 9).tolist() == [[1, 2, 3], [0, 7, 8]]
    history, target = held_out(windows, one, "validation")
    assert batches.last_items(history, 9).tolist() == [[1, 2, 3], [0, 7, 8]]
    assert target.tolist() == [4, 9]

    two = DataConfig(min_interactions=3, holdout=2)
    assert batches.last_items(training_windows(windows, two), 9).tolist() == [[1, 2], [0, 7]]
    history, target = held_out(windows, two, "validation")
    assert (batches.last_items(history, 9).tolist(), target.tolist()) == ([[1, 2], [0, 7]], [3, 8])
    history, target = held_out(windows, two, "test")
    assert (batches.last_items(history, 9).tolist(), target.tolist()) == ([[1, 2, 3], [0, 7, 8]], [4, 9])

    full = DataConfig(min_interactions=1, use_full_data=True)
    assert training_windows(windows, full).lengths.tolist() == [4, 2, 3]


def test_temporal_splits_by_hand():
    """Of the first user one is trained on, the second has too few for training, yet enough for the test; the third has
    no target in between; the fourth none in the test, the fifth neither."""
    windows = windows_of([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11], [12, 13, 14], [15, 16]])
    before = {"validation": np.array([2, 1, 2, 2, 2]), "test": np.array([3, 3, 2, 3, 2])}
    data = DataConfig(split="temporal", min_interactions=2, holdout=2)
    assert training_windows(windows, data, before).flat()[1].tolist() == [1, 2, 9, 10, 12, 13, 15, 16]
    history, target = held_out(windows, data, "validation", before)
    assert (batches.last_items(history, 9).tolist(), target.tolist()) == ([[1, 2], [12, 13]], [3, 14])
    history, target = held_out(windows, data, "test", before)
    assert batches.last_items(history, 9).tolist() == [[1, 2, 3], [5, 6, 7], [0, 9, 10]]
    assert target.tolist() == [4, 8, 11]
    assert held_out_users(windows, data, "test", before).tolist() == [0, 1, 2]

    full = DataConfig(split="temporal", min_interactions=3, use_full_data=True)
    assert training_windows(windows, full, before).lengths.tolist() == [4, 4, 3, 3]


def test_masking_frequencies():
    model = ModelConfig(random_mask_prob=0.3, last_item_mask_ratio=0.25)
    num_items, rows, columns = 1000, 4000, 20
    tokens = torch.randint(1, num_items + 1, (rows, columns), generator=seeded())
    tokens[:, :5] = 0
    masked, labels = batches.mask_items(tokens, model, num_items, seeded(1))
    inner_tokens, inner, inner_labels = tokens[:, 5:-1], masked[:, 5:-1], labels[:, 5:-1]
    target = inner_labels > 0
    count = inner.numel()

    def close(share, expected, of):
        assert abs(share - expected) < 4 * (expected * (1 - expected) / of) ** 0.5

    close(target.float().mean().item(), 0.3, count)
    of_targets = int(target.sum())
    close((inner[target] == num_items + 1).float().mean().item(), 0.8, of_targets)
    kept = 0.1 + 0.1 / num_items  # a random item may be the same one
    close((inner[target] == inner_tokens[target]).float().mean().item(), kept, of_targets)
    # the last column: a target by either draw; [MASK] by the boost, or by 0.8 of the ordinary draw
    close((labels[:, -1] > 0).float().mean().item(), 1 - 0.7 * 0.75, rows)
    close((masked[:, -1] == num_items + 1).float().mean().item(), 0.25 + 0.75 * 0.3 * 0.8, rows)


def test_masking_touches_targets_only():
    tokens = torch.randint(0, 50, (200, 9), generator=seeded()).sort(dim=1).values
    tokens[:, -1] = 49
    masked, labels = batches.mask_items(tokens, MODEL, 50, seeded(1))
    target = labels > 0
    assert (masked[~target] == tokens[~target]).all()
    assert (labels[target] == tokens[target]).all()
    assert (masked[tokens == 0] == 0).all()
    assert not target[tokens == 0].any()
    assert masked.max() <= 51


def test_weighted_sampling_keeps_order_and_draws_by_recency():
    """Inclusion probabilities of 2 of 3 items with weights 1, 2, 3, by enumeration of the successive draws."""
    weights = [1, 2, 3]
    expected = [0.0] * 3
    for first, second in itertools.permutations(range(3), 2):
        probability = weights[first] / 6 * weights[second] / (6 - weights[first])
        expected[first] += probability
        expected[second] += probability
    num_rows = 40_000
    histories = [[1, 2, 3]] * num_rows + [[4, 5]]
    drawn = drawn_items(batches.weighted_places, windows_of(histories), 2)
    assert drawn[-1].tolist() == [4, 5]
    drawn = drawn[:-1]
    assert (drawn[:, 0] < drawn[:, 1]).all()
    for item, probability in zip((1, 2, 3), expected, strict=True):
        share = (drawn == item).any(1).float().mean().item()
        assert abs(share - probability) < 4 * (probability * (1 - probability) / num_rows) ** 0.5


def test_weighted_sampling_mixes_long_and_short_histories():
    histories = list(random_histories(80, 40, longest=20).values())
    drawn = drawn_items(batches.weighted_places, windows_of(histories), 6)
    for history, row in zip(histories, drawn.tolist(), strict=True):
        items = [token for token in row if token]
        assert len(items) == min(6, len(history))
        assert items == [item for item in history if item in items]


def test_windows_of_long_histories_follow_one_another_and_are_drawn_evenly():
    windows = windows_of([list(range(1, 8))] * 30_000 + [[8, 9]])
    drawn = drawn_items(batches.window_places, windows, 5)
    assert drawn[-1].tolist() == [0, 0, 0, 8, 9]
    assert (drawn[:-1].diff(dim=1) == 1).all()
    for first in (1, 2, 3):
        share = (drawn[:-1, 0] == first).float().mean().item()
        assert abs(share - 1 / 3) < 4 * (2 / 9 / 30_000) ** 0.5


def test_ask_next_keeps_room_for_the_mask():
    model = MODEL.model_copy(update={"max_len": 3})
    got, times = batches.ask_next(windows_of([[1, 2, 3, 4], [5]]), model, num_items=9)
    assert got.tolist() == [[3, 4, 10], [0, 5, 10]]
    assert times is None
    assert batches.ask_next(windows_of([[], [1]]), model, num_items=9)[0].tolist() == [[0, 10], [1, 10]]


def test_the_next_items_by_hand():
    """The last six items of each history, at [MASK] and at all items but the last; a step has each once."""
    windows, model = windows_of([[1, 2, 3, 4, 5, 6, 7], [8], [9, 10]]), MODEL.model_copy(update={"attention": "causal"})
    (step,) = batches.iter_steps(windows, DataConfig(), model, 30, 0, 0, 1, 10_000, torch.device("cpu"))
    rows = sorted(row for batch in step.batches for row in rows_of(batch))
    assert rows == [((31,), (8,)), ((31, 2, 3, 4, 5, 6), (2, 3, 4, 5, 6, 7)), ((31, 9), (9, 10))]
    assert (step.num_targets, step.num_tokens) == (9, 9)
    asked, times = batches.ask_next(windows_of([[1, 2, 3, 4, 5, 6, 7], [8], []]), model, 30)
    assert asked.tolist() == [[31, 3, 4, 5, 6, 7], [0, 0, 0, 0, 31, 8], [0, 0, 0, 0, 0, 31]]
    assert times is None
    timed = replace(
        windows_of([[1, 2, 3, 4], [5]]), times=torch.tensor([10, 20, 30, 40, 90]), asked=torch.tensor([50, 99])
    )
    asked, times = batches.ask_next(timed, model.model_copy(update={"max_len": 4}), 30)
    assert asked.tolist() == [[31, 2, 3, 4], [0, 0, 31, 5]]
    assert times.tolist() == [[20, 30, 40, 50], [0, 0, 90, 99]]  # of the next item
    nothing = windows_of([[1], []]).users(torch.tensor([1]))
    assert batches.ask_next(nothing, model, 30)[0].tolist() == [[0, 31]]


def test_by_length_covers_all_rows_in_parts_of_the_budget():
    lengths = torch.tensor([3, 0, 7, 2, 9, 9, 1, 30])
    parts = [part.tolist() for part in batches.by_length(lengths, 18)]
    # 62 tokens (an empty row counts as one) are 4 parts of 15.5: rows end at 30, in the second; 39, in the third; 48...
    assert parts == [[7], [4], [5, 2, 0, 3, 6, 1]]
    assert all(lengths[part].sum() < 18 + lengths[part].max() for part in parts)
    assert [part.tolist() for part in batches.by_length(lengths[:0], 18)] == []


@pytest.mark.parametrize("fills", [False, True])
def test_pack_keeps_every_row_and_label_and_pads_little(monkeypatch, fills):
    monkeypatch.setattr(layers, "USES_ONEDNN", fills)
    lengths = sorted(torch.randint(1, 200, (300,), generator=seeded()).tolist(), reverse=True)
    tokens = torch.zeros(300, 200, dtype=torch.int64)
    for row, length in enumerate(lengths):
        tokens[row, -length:] = torch.randint(1, 1000, (length,), generator=seeded(row))
    labels = torch.where(torch.rand(tokens.shape, generator=seeded()) < 0.2, tokens, 0)
    batch = batches.pack(tokens, labels, torch.device("cpu"))
    expected = [
        (tuple(row[200 - length :]), tuple(answers[200 - length :]))
        for length, row, answers in zip(lengths, tokens.tolist(), labels.tolist(), strict=True)
    ]
    assert list(rows_of(batch)) == expected
    assert len(batch.tokens) < (17 / 16 if fills else 1) * (1.05 * sum(lengths) + 32 * len(batch.groups))
    distance = [place for length in lengths for place in range(length - 1, -1, -1)]
    assert batch.position[batch.tokens > 0].tolist() == distance
    assert batch.wanted.tolist() == batch.labels.nonzero().flatten().tolist()
    last = batches.pack(tokens, None, torch.device("cpu"))
    assert last.wanted.tolist() == list(range(len(tokens)))
    assert last.tokens[last.query][: len(tokens)].tolist() == tokens[:, -1].tolist()
    assert last.labels.tolist() == [1] * len(tokens) + [0] * (len(last.labels) - len(tokens))


def test_groups_end_where_padding_costs_more_than_another_group():
    lengths = np.array([50, 50, 49, 30, 30, 3])
    assert list(batches._group_ends(lengths, 0)) == [3, 5, 6]
    assert list(batches._group_ends(lengths, 32)) == [5, 6]
    assert list(batches._group_ends(lengths, 2048)) == [6]


def test_steps_made_ahead_are_the_same():
    windows = windows_of(list(random_histories(43, 30, longest=15).values()))
    data, started = DataConfig(batch_size=4, sampling_strategy="weighted"), []

    def steps():
        return batches.iter_steps(windows, data, MODEL, 30, 2, 0, 1, 20, torch.device("cpu"))

    for ahead, plain in zip(batches.steps_ahead(steps(), lambda: started.append(1)), steps(), strict=True):
        assert (ahead.num_targets, ahead.num_tokens) == (plain.num_targets, plain.num_tokens)
        for batch, other in zip(ahead.batches, plain.batches, strict=True):
            assert batch.groups == other.groups
            assert all(torch.equal(*pair) for pair in zip(batch[:5], other[:5], strict=True))
    assert started == [1]


def test_steps_made_ahead_fail_where_they_would():
    def failing():
        yield 1
        raise ValueError("the second")

    steps = batches.steps_ahead(failing())
    assert next(steps) == 1
    with pytest.raises(ValueError, match="the second"):
        next(steps)


@pytest.mark.parametrize(
    ("strategy", "attention"),
    [("recent", "bidirectional"), ("weighted", "bidirectional"), ("window", "bidirectional"), ("window", "causal")],
)
def test_workers_share_a_step_whatever_their_number(strategy, attention):
    histories = list(random_histories(43, 30, longest=15).values())
    windows = windows_of(histories)
    data = DataConfig(batch_size=10, seed=3, sampling_strategy=strategy)
    model = MODEL.model_copy(update={"attention": attention})

    def rows_of_steps(world_size):
        """Per step: the multiset of (input, labels) rows over all workers, and the announced target count."""
        per_rank = [
            list(batches.iter_steps(windows, data, model, 30, 2, rank, world_size, 20, torch.device("cpu")))
            for rank in range(world_size)
        ]
        assert len({len(steps) for steps in per_rank}) == 1
        result = []
        for steps in zip(*per_rank, strict=True):
            rows, targets = [], 0
            for batch in (batch for step in steps for batch in step.batches):
                for row, answers in rows_of(batch):
                    rows.append((row, answers))
                    targets += sum(label > 0 for label in answers)
            assert {step.num_targets for step in steps} == {targets}
            assert {step.num_tokens for step in steps} == {sum(len(tokens) for tokens, _ in rows)}
            result.append(sorted(rows))
        return result

    alone = rows_of_steps(1)
    assert sum(len(rows) for rows in alone) == 43
    assert rows_of_steps(2) == alone
    assert rows_of_steps(1) == alone  # drawn again, the same


def test_a_worker_without_users_still_takes_the_step():
    steps = [
        list(batches.iter_steps(windows_of([[1, 2]]), DataConfig(), MODEL, 5, 0, rank, 2, 100, torch.device("cpu")))
        for rank in range(2)
    ]
    assert [len(worker) for worker in steps] == [1, 1]
    idle = steps[1][0].batches
    assert len(idle) == 1
    assert not idle[0].labels.any()


def test_epochs_differ():
    windows = windows_of(list(random_histories(30, 30, longest=10).values()))

    def first(epoch):
        steps = batches.iter_steps(windows, DataConfig(), MODEL, 30, epoch, 0, 1, 10_000, torch.device("cpu"))
        return next(iter(steps)).batches[0].tokens.tolist()

    assert first(0) == first(0)
    assert first(0) != first(1)
