"""Recommends items to all users or to a few: `python -m jobs.recommend [--config FILE] [group.key=value ...]`."""

from bert4rec.cli import run_job
from bert4rec.config import Config
from bert4rec.data.dataset import PreparedDataset, Sequences
from bert4rec.errors import InputError
from bert4rec.inference import fit_blend
from bert4rec.inference.few_users import choose_users, users_of_dataset, users_of_file
from bert4rec.inference.moment import moment_asked
from bert4rec.inference.ranking import Ranking, load_for
from bert4rec.inference.recommend import CSV, PARQUET, RecommendResult, check_request, recommend, write_few
from bert4rec.inference.recommender import Ranked, Recommender, device_for
from bert4rec.model.average import checkpoint_and_output
from bert4rec.progress import duration

SHOWN_NEW_USERS, SHOWN_HISTORY = 10, 5


def recommend_users(config: Config) -> None:
    """Recommend to all users or to a few users, or list similar items, as the config asks."""
    if not config.inference.is_for_few:
        recommend_all(config)
        return
    inference, ranking = config.inference, Ranking.of(config.inference)
    checkpoint, output_path = checkpoint_and_output(config)
    dataset = PreparedDataset(config.prepared_path)
    if inference.output_path:
        check_request(inference, dataset, output_path)
    model = load_for(dataset, checkpoint, ranking)
    ranking, notes = fit_blend.settled(ranking, config, dataset, checkpoint, model)
    recommender = Recommender(model.to(device_for(config.training.accelerator)), dataset.items())
    print(f"model: {checkpoint}")
    for note in [*notes, *recommender.rules(ranking).notes]:
        print(f"note: {note}")
    if inference.users is not None or inference.users_file is not None:
        sequences, last = _few_users(config, dataset, recommender)
        if (moment := moment_asked(inference, model, last)) is not None:
            inference = inference.model_copy(update={"at": moment})
            sequences = sequences.asked_at(moment)
        ranking = fit_blend.fit(ranking, config, dataset, checkpoint)
        ranked = list(recommender.rank(sequences, inference, ranking))
        shown = len(sequences) if inference.users is not None else min(len(sequences), SHOWN_NEW_USERS)
        _show_users(recommender, sequences, ranked, shown, dataset.descriptions())
        if inference.output_path:
            print()
            _say_what_was_written(config, write_few(ranked, inference, ranking, checkpoint, output_path))
        elif shown < len(sequences):
            print(f"\n… and {len(sequences) - shown:,} more users; inference.output_path=DIR writes them all")
    for item in inference.similar_to or ():
        _show_similar(recommender, item, inference.topk)


def recommend_all(config: Config, checkpoint: str | None = None) -> str:
    """Write recommendations by `checkpoint` (default: the config's). Return the output directory."""
    checkpoint, output_path = checkpoint_and_output(config, checkpoint)
    _say_what_was_written(config, recommend(config, config.prepared_path, checkpoint, output_path))
    return output_path


def _say_what_was_written(config: Config, result: RecommendResult) -> None:
    rate = f", {result.num_users / result.seconds:,.0f} users/s" if result.seconds > 1 else ""
    print(
        f"{result.num_rows:,} recommendations for {result.num_users:,} users in {duration(result.seconds)}{rate}; "
        f"{result.num_short_users:,} users have fewer than {config.inference.topk}"
    )
    if result.num_empty_users > result.num_users / 2:
        print(
            f"note: WARNING {result.num_empty_users:,} of {result.num_users:,} users get no recommendation: they have "
            "seen every other item, or it was released in a later year than their last interaction "
            "(inference.exclude_future). Are the times right that jobs.prepare prints?"
        )
    names = {"parquet": PARQUET, "csv": CSV}
    print("\n".join(f"{form}: {result.output_path}/{names[form]}" for form in config.inference.formats))


def _few_users(config: Config, dataset: PreparedDataset, recommender: Recommender) -> tuple[Sequences, int | None]:
    """The histories, and the time of the last interaction where they are from, if it has times."""
    users, path = config.inference.users, config.inference.users_file
    if path is None:
        last = dataset.time_span()[1] if dataset.manifest.has_time else None
        return users_of_dataset(dataset, users or ()), last
    sequences, notes = users_of_file(path, recommender.items, config.data)
    for note in notes:
        print(f"note: {path}: {note}")
    if sequences.times is None and recommender.model.reads_times:
        raise InputError(f"{path}: no column time, which the model needs (model.time_encoding)")
    last = None if sequences.times is None else int(sequences.times.max())
    return sequences if users is None else choose_users(sequences, users, path), last


def _show_users(
    recommender: Recommender, sequences: Sequences, ranked: list[Ranked], count: int, descriptions: list[str]
) -> None:
    """Print the last items and the recommendations of the first `count` users. `descriptions` [V] are of the items."""
    ids = recommender.items.ids.to_pylist()
    title_of = dict(zip(ids, descriptions, strict=True))
    rows: dict[int | str, list[tuple[int | str, float]]] = {}
    for batch in ranked:
        for row in batch.table.to_pylist() if len(rows) < count else ():
            rows.setdefault(row["user"], []).append((row["item"], row["score"]))
    for place, user in enumerate(sequences.users[:count].to_pylist()):
        history = sequences.items[sequences.offsets[place] : sequences.offsets[place + 1]]
        plural = "s" * (len(history) > 1)
        print(f"\nuser {user}, {len(history)} interaction{plural}" + ("; the last:" if len(history) > 1 else ":"))
        for token in history[-SHOWN_HISTORY:]:
            print(f"{'':>4}{ids[token - 1]!s:>10}  {title_of[ids[token - 1]]}")
        print("  recommended:" if user in rows else "  recommended: nothing, as the rules leave no item")
        _show_table("score", [(item, title_of[item], score) for item, score in rows.get(user, [])])


def _show_similar(recommender: Recommender, item: int | str, topk: int) -> None:
    similar = recommender.similar(item, topk)
    title = recommender.items.title[int(recommender.tokens([item])[0])].as_py()
    print(f"\nsimilar to item {item}{f', {title}' if title else ''}:")
    _show_table("cosine", list(similar.fillna({"title": ""}).itertuples(index=False, name=None)))


def _show_table(value: str, rows: list[tuple[int | str, str, float]]) -> None:
    """Print rank, item, value and title. The title comes last because it may be long."""
    width = max([10, *(len(str(item)) for item, _, _ in rows)])
    print(f"{'rank':>6}{'item':>{width + 2}}{value:>9}  title")
    for rank, (item, title, number) in enumerate(rows, 1):
        print(f"{rank:>6}{item!s:>{width + 2}}{number:>9.3f}  {title}")


if __name__ == "__main__":
    run_job(
        "Write the top items of every user, or print them for a few (inference.users, users_file, similar_to).",
        recommend_users,
    )
