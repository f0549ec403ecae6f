"""Makes an embedding per item from titles and genres: `python -m jobs.embed [--config FILE] [group.key=value ...]`."""

from bert4rec.cli import run_job
from bert4rec.config import Config
from bert4rec.data.movielens import fetch_if_default
from bert4rec.embedding.embed import EmbedResult, embed_titles, read_texts
from bert4rec.embedding.encoders import find_model
from bert4rec.progress import duration

SHOWN_TEXTS = 5


def embed_items(config: Config) -> EmbedResult:
    """Embed the titles of the config's data and print a summary."""
    model = find_model(config.embedding)  # report a missing model before any download
    fetch_if_default(config.data.data_dir)
    texts = read_texts(config.data.data_dir, config.embedding.with_genres, config.data.list_separator)
    print("texts, such as:\n" + "\n".join(f"    {text}" for text in texts["text"][:SHOWN_TEXTS].to_pylist()))
    result = embed_titles(config, texts)
    without_genres = texts["genres"].null_count
    print(
        f"{config.embedding.method}{f' {model}' if model else ''}: {result.num_items:,} items, width {result.width}; "
        f"{result.num_items - without_genres:,} with genres, {without_genres:,} without; "
        f"{result.num_new:,} newly embedded in {duration(result.seconds)}\nembeddings: {result.path}"
    )
    return result


if __name__ == "__main__":
    run_job("Embed the titles of all items.", embed_items)
