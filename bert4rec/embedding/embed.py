"""Makes a vector per item from its title and genres: by encoders on Ray Data actors, or by TF-IDF and SVD.

The job embeds each distinct text once. The Parquet file stores the texts and, in its metadata, the identity of the
model, so that a later run embeds only new texts. Actors write their parts beside the file, so that a killed job keeps
finished parts.
"""

import os
import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch

from bert4rec import lease, storage
from bert4rec.cluster.resources import begin
from bert4rec.cluster.users import map_parts
from bert4rec.config import Config, EmbeddingConfig
from bert4rec.data.dataset import Part
from bert4rec.data.files import find_metadata, readable
from bert4rec.data.ids import as_ids
from bert4rec.data.metadata import read_metadata
from bert4rec.data.vectors import to_lists, write_table, write_tsv
from bert4rec.embedding.encoders import Encode, find_model, fit_tfidf_svd, identify, load_encoder, weight_bytes
from bert4rec.errors import InputError
from bert4rec.progress import Progress, Reporter

_MODEL = b"bert4rec.model"
_ACTOR_BYTES = 2**30  # memory of an encoder's actor without its weights: Python, torch and the states of a batch


@dataclass(frozen=True)
class EmbedResult:
    """What `embed_titles` wrote."""

    path: str
    num_items: int
    width: int
    num_new: int
    """Items whose vector was not there before."""
    seconds: float


def read_texts(data_dir: str, with_genres: bool, list_separator: str = "|") -> pa.Table:
    """Read the columns `item`, `text` and `genres` (null if it has none) of each item with a title, in file order.

    Raises
    ------
    InputError
        If there is no titles.tsv, or a file has an unusable line.
    """
    files = find_metadata(data_dir)
    if "titles" not in files:
        raise InputError(f"{data_dir}: no titles.tsv; expected one with the columns item and title")
    titles = read_metadata(data_dir, files["titles"], "title", list_separator).table
    if not len(titles):
        raise InputError(f"{storage.join(data_dir, files['titles'])}: no titles in it")
    _, first = np.unique(_codes(titles["item"]), return_index=True)  # the first title of an item counts, as in prepare
    items, title = (titles[name].take(pa.array(first)).combine_chunks() for name in ("item", "title"))
    genres = pa.nulls(len(items), pa.string())
    if "genres" in files:
        genres = _join_genres(items, read_metadata(data_dir, files["genres"], "genre", list_separator).table)
    text = pc.binary_join_element_wise(title, genres, ". Genres: ", null_handling="skip") if with_genres else title
    return pa.table({"item": as_ids(items), "text": text, "genres": genres})


def _join_genres(items: pa.Array, rows: pa.Table) -> pa.Array:
    """Each item's distinct genres in file order, separated by commas; null if it has none."""
    row = pc.index_in(rows["item"], items)
    rows, row = rows.filter(row.is_valid()).combine_chunks(), row.drop_null().to_numpy()
    _, once = np.unique(np.stack([row, _codes(rows["genre"])]), axis=1, return_index=True)
    once.sort()
    order = once[np.argsort(row[once], kind="stable")]
    ends = np.cumsum(np.bincount(row[once], minlength=len(items)))
    lists = pa.ListArray.from_arrays(
        pa.array(np.append(0, ends), pa.int32()), rows["genre"].take(pa.array(order)).combine_chunks()
    )
    return pc.if_else(pc.greater(pc.list_value_length(lists), 0), pc.binary_join(lists, ", "), None)


def _codes(values: pa.ChunkedArray) -> np.ndarray:
    """Numbers of the distinct values, by first occurrence."""
    codes: np.ndarray = values.combine_chunks().dictionary_encode().indices.to_numpy()
    return codes


def embed_titles(config: Config, texts: pa.Table) -> EmbedResult:
    """Write the vectors of `texts` (of `read_texts`) to `config.embeddings_path`, embedding only what is new.

    The file has the columns `item`, `embedding` and `text`. Vectors have length 1, or 0 with tfidf-svd for a text that
    shares no word; vectors of bert-mean keep their lengths. The number of actors does not change the file.

    Raises
    ------
    InputError
        If the model is not available, the texts share no words (tfidf-svd), embedding.device=gpu but there is no GPU,
        or the file is not writable, was not written by this job, or is being written by another one.
    """
    began = time.monotonic()
    embedding, path = config.embedding, config.embeddings_path
    folder = find_model(embedding)
    if not path.endswith(".parquet"):
        raise InputError(f"embedding.output_path={embedding.output_path}: expected a name that ends in .parquet")
    with lease.held(os.path.dirname(path), f"{os.path.basename(path)}.{lease.HOLDER}"):
        num_items, width, num_new = _embed(config, folder, texts)
    return EmbedResult(path, num_items, width, num_new, time.monotonic() - began)


def _embed(config: Config, folder: str | None, texts: pa.Table) -> tuple[int, int, int]:
    """Write the files. Return the number of items, the width, and how many items are new."""
    embedding, path = config.embedding, config.embeddings_path
    work = f"{path}.unfinished"
    all_texts = texts["text"].to_pylist()
    identity = identify(embedding, folder, all_texts)
    previous = None if embedding.overwrite else _read_previous(path)
    known = pa.table({"text": pa.array([], pa.string()), "embedding": pa.array([], pa.list_(pa.float32()))})
    if previous is not None and previous.schema.metadata[_MODEL] == identity:
        known = previous.select(known.column_names).replace_schema_metadata(None)
    is_new = pc.invert(pc.is_in(texts["text"], known["text"]))
    new = pc.unique(texts["text"].filter(is_new))
    if len(new) and folder is None:
        known = pa.table({"text": texts["text"], "embedding": to_lists(fit_tfidf_svd(all_texts, embedding.width))})
    elif len(new) and folder is not None:
        begin(config, meanwhile=("ray.data",))
        known = pa.concat_tables([known, _encode_all(embedding, folder, identity, new, work)])
    rows = pc.index_in(texts["text"], known["text"]).combine_chunks()
    vectors = known["embedding"].combine_chunks().take(rows)
    table = pa.table({"item": texts["item"], "embedding": vectors, "text": texts["text"]}, metadata={_MODEL: identity})
    if previous is None or not table.equals(previous, check_metadata=True):
        if embedding.backup_original and storage.exists(path):
            storage.write_bytes(f"{path}.bak", storage.read_bytes(path))
        write_table(path, table)
    if embedding.write_tsv:
        write_tsv(f"{path.removesuffix('.parquet')}.tsv", texts["item"].combine_chunks(), vectors)
    storage.remove(work)
    return len(table), len(vectors[0]), pc.sum(is_new).as_py()


class Embedder:
    """Actor that embeds the texts of a part and writes their vectors."""

    def __init__(
        self,
        embedding: EmbeddingConfig,
        folder: str,
        texts: ray.ObjectRef,
        work: str,
        use_gpu: bool,
        reporter: Reporter,
    ) -> None:
        self.embedding, self.folder, self.texts, self.work = embedding, folder, ray.get(texts), work
        self.use_gpu, self.reporter = use_gpu, reporter
        self.encode: Encode | None = None

    def __call__(self, part: Part) -> dict[str, list[str]]:
        """Write the vectors of a part. Return why the model cannot be loaded, or an empty string."""
        if self.encode is None:
            try:
                torch.set_num_threads(1)  # the actor has one core, whatever OMP_NUM_THREADS says
                self.encode = load_encoder(self.embedding, self.folder, "cuda" if self.use_gpu else "cpu")
            except Exception as error:  # the files of a foreign model may cause any error
                return {"error": [f"{type(error).__name__}: {error}"]}
        vectors = []
        for low in range(part.low, part.high, self.embedding.batch_size):
            batch = self.texts[low : min(low + self.embedding.batch_size, part.high)]
            vectors.append(self.encode(batch.to_pylist()))
            self.reporter.advance(len(batch))
        texts, embeddings = self.texts[part.low : part.high], to_lists(np.concatenate(vectors))
        write_table(_part_path(self.work, part), pa.table({"text": texts, "embedding": embeddings}))
        return {"error": [""]}


def in_parts(texts: pa.Array, batch_size: int) -> tuple[pa.Array, list[Part]]:
    """Sort the texts by length, longest first, so that batches have little padding. Divide them into parts of
    batches."""
    lengths = pa.table({"length": pc.utf8_length(texts), "text": texts})
    texts = texts.take(pc.sort_indices(lengths, sort_keys=[("length", "descending"), ("text", "ascending")]))
    size = batch_size * max(4, -(-len(texts) // (256 * batch_size)))
    starts = range(0, len(texts), size)
    return texts, [Part(i, low, min(low + size, len(texts))) for i, low in enumerate(starts)]


def _encode_all(embedding: EmbeddingConfig, folder: str, identity: bytes, new: pa.Array, work: str) -> pa.Table:
    """Return texts and vectors of `new`. Parts that an earlier run left in `work` are not embedded again."""
    use_gpu, num_workers = _resources(embedding, folder)
    new, parts = in_parts(new, embedding.batch_size)
    marker = storage.join(work, "identity.json")
    task = {
        "model": identity.decode(),
        "texts": storage.fingerprint(new.to_pylist()),
        "batch_size": embedding.batch_size,
    }
    if not storage.exists(marker) or storage.read_json(marker) != task:
        storage.remove(work)
        storage.write_json(marker, task)
    missing = [part for part in parts if not storage.exists(_part_path(work, part))]
    with Progress("embedding", len(new), "texts") as reporter:
        reporter.skip(len(new) - sum(part.high - part.low for part in missing))
        arguments = (embedding, folder, ray.put(new), work, use_gpu, reporter)
        for result in map_parts(missing, Embedder, arguments, num_workers, use_gpu) if missing else ():
            if errors := [error for error in result["error"] if error]:
                raise InputError(f"{folder}: not usable as a model of {embedding.method} ({errors[0]})")
    filesystem, inner = storage.open_store(work)
    return pa.concat_tables([pq.read_table(_part_path(inner, part), filesystem=filesystem) for part in parts])


def _resources(embedding: EmbeddingConfig, folder: str) -> tuple[bool, int]:
    """Whether each actor gets a GPU, and the number of actors: one per GPU, or one per core if memory allows."""
    total = ray.cluster_resources()
    if embedding.device == "gpu" and not total.get("GPU"):
        raise InputError("embedding.device=gpu, but the cluster has no GPU; set embedding.device=auto or cpu")
    if embedding.device != "cpu" and total.get("GPU"):
        return True, int(total["GPU"])
    actor_bytes = 2 * weight_bytes(folder) + _ACTOR_BYTES  # twice, because 16-bit weights become 32-bit
    return False, max(1, min(int(total.get("CPU", 1)), int(total["memory"] // actor_bytes)))


@storage.patient
def _read_previous(path: str) -> pa.Table | None:
    """Read the file of an earlier run; None if there is none."""
    if not storage.exists(path):
        return None
    filesystem, inner = storage.open_store(path)
    try:
        with readable(path):
            table = pq.read_table(inner, filesystem=filesystem, page_checksum_verification=True)
    except pa.ArrowInvalid:
        table = pa.table({})
    if _MODEL not in (table.schema.metadata or {}):
        raise InputError(
            f"{path}: not written by this job; set another embedding.output_path, or embedding.overwrite=true"
        )
    return table


def _part_path(work: str, part: Part) -> str:
    return storage.join(work, f"part-{part.number:05d}.parquet")
