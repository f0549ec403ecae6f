"""Turns texts into vectors: by encoders from a folder or the hub, or by TF-IDF and SVD.

The packages for this are an optional extra and take seconds to import, so each function imports what it needs.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, assert_never

import numpy as np
import torch

from bert4rec import storage
from bert4rec.config import EmbeddingConfig
from bert4rec.errors import InputError

BERT_MEAN_TOKENS = 128
"""Tokens of a text that bert-mean reads."""
_WEIGHTS = (".safetensors", ".bin")
_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", ".model")
_HUB_SECONDS = 5

Encode = Callable[[list[str]], np.ndarray]


def find_model(embedding: EmbeddingConfig) -> str | None:
    """Return the folder of the encoder on this machine, or None if the method needs none. Downloads it if necessary.

    Raises
    ------
    InputError
        If a package is not installed, or the model is not available.
    """
    package = {"sentence-transformers": "sentence_transformers", "bert-mean": "transformers", "tfidf-svd": "sklearn"}
    if importlib.util.find_spec(package[embedding.method]) is None:
        raise InputError(
            f"embedding.method={embedding.method} needs the package {package[embedding.method]}, which is not "
            'installed; install it with: pip install -e ".[embeddings]"'
        )
    if embedding.method == "tfidf-svd":
        return None
    choices = "set embedding.model_name to a local folder, or embedding.method=tfidf-svd"
    folder = os.path.abspath(os.path.expanduser(embedding.model_name))
    if not os.path.isdir(folder):
        try:
            folder = _get_from_hub(embedding.model_name)
        except Exception as error:  # the errors of the hub's client share no other class
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"embedding.model_name={embedding.model_name}: no such folder, and the hub does not provide it "
                f"({reason}); {choices}"
            ) from None
    files = _model_files(folder)
    needed = {"config.json": ["config.json"], "weights": _WEIGHTS, "a tokenizer": _TOKENIZERS}
    for name, endings in needed.items():  # without tokenizer files, transformers makes a tokenizer that knows no words
        if not any(file.name.endswith(tuple(endings)) for file in files):
            raise InputError(f"{folder}: no whole model in it, {name} is missing ({', '.join(endings)}); {choices}")
    return folder


def identify(embedding: EmbeddingConfig, folder: str | None, texts: list[str]) -> bytes:
    """JSON of everything that a vector depends on besides its own text."""
    identity: dict[str, Any] = {"method": embedding.method}
    if folder is None:
        identity |= {"width": embedding.width, "texts": storage.fingerprint(texts)}
    else:
        digest = hashlib.sha256()
        for file in _model_files(folder):
            digest.update(f"{file.relative_to(folder)}\n".encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        identity["model"] = digest.hexdigest()
    return json.dumps(identity).encode()


def weight_bytes(folder: str) -> int:
    """Size of the model's weights on disk."""
    return sum(file.stat().st_size for file in _model_files(folder) if file.suffix in _WEIGHTS)


def load_encoder(embedding: EmbeddingConfig, folder: str, device: Literal["cpu", "cuda"]) -> Encode:
    """Load the encoder in `folder`. It turns n texts into float32 vectors [n, width].

    If this machine has no such folder, the model is looked up again. The vectors of sentence-transformers have length
    1. Those of bert-mean are the mean over all tokens except padding, [CLS] and [SEP] included, and keep their lengths.
    """
    if not os.path.isdir(folder):
        folder = find_model(embedding) or folder
    match embedding.method:
        case "sentence-transformers":
            return _load_sentence_transformer(folder, device)
        case "bert-mean":
            return _load_bert_mean(folder, device)
        case "tfidf-svd":
            raise AssertionError("tfidf-svd has no encoder")
        case _:
            assert_never(embedding.method)


def fit_tfidf_svd(texts: list[str], width: int) -> np.ndarray:
    """Vectors [n, at most width] of length 1, or of length 0 for a text that shares no word with another.

    Raises
    ------
    InputError
        If no two texts share a word.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    try:
        counted = TfidfVectorizer(max_features=5000, ngram_range=(1, 2), stop_words="english", min_df=2)
        weights = counted.fit_transform(texts)
    except ValueError as error:  # no vocabulary is left
        raise InputError(
            f"embedding.method=tfidf-svd: no word is in two of the {len(texts)} texts ({error}); "
            "use an encoder (embedding.method=sentence-transformers or bert-mean)"
        ) from None
    if weights.shape[1] == 1:  # a single word; the SVD needs two
        return np.asarray(normalize(weights.toarray()))
    # fit, then transform: fit_transform may give equal texts vectors that differ in the last bits.
    svd = TruncatedSVD(min(width, *weights.shape), random_state=0).fit(weights)
    vectors: np.ndarray = normalize(svd.transform(weights))
    return vectors


def _load_sentence_transformer(folder: str, device: str) -> Encode:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device=device, local_files_only=True).float()

    def encode(texts: list[str]) -> np.ndarray:
        vectors = model.encode(texts, batch_size=len(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors)

    return encode


def _load_bert_mean(folder: str, device: str) -> Encode:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).float().to(device).eval()

    def encode(texts: list[str]) -> np.ndarray:
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=BERT_MEAN_TOKENS, return_tensors="pt")
        tokens = tokens.to(device)
        with torch.inference_mode():
            states = model(**tokens).last_hidden_state  # (B, L, D)
        real = tokens["attention_mask"].unsqueeze(-1)  # (B, L, 1), 0 at padding
        mean: np.ndarray = ((states * real).sum(1) / real.sum(1)).cpu().numpy()
        return mean

    return encode


def _get_from_hub(name: str) -> str:
    """Folder of the model in the hub's cache. If the hub does not answer, use what the cache has."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        # Only this call of the client takes a timeout; other calls wait for ever or retry for minutes.
        revision = HfApi().model_info(name, timeout=_HUB_SECONDS).sha
    except Exception:
        try:
            return str(snapshot_download(name, local_files_only=True))
        except (OSError, ValueError):
            pass
        raise
    wanted = ["*.json", "*.txt", "*.model", "*.safetensors"]
    return str(snapshot_download(name, revision=revision, allow_patterns=wanted))


def _model_files(folder: str) -> list[Path]:
    """Files that define the model, sorted by name."""
    suffixes = {".json", ".txt", ".model", *_WEIGHTS}
    return sorted(file for file in Path(folder).rglob("*") if file.suffix in suffixes and file.is_file())
