"""Where vectors of texts come from: encoders in a folder or on the hub, and TF-IDF with SVD.

Their packages are an optional extra and take seconds to import, so each is imported where it is used.
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
"""Longest text of bert-mean, in tokens."""
_WEIGHTS = (".safetensors", ".bin")
_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", ".model")
_HUB_SECONDS = 5

Encode = Callable[[list[str]], np.ndarray]


def find_model(embedding: EmbeddingConfig) -> str | None:
    """Folder of the encoder on this machine, from the hub where it is a name; None where the method needs none.

    Raises
    ------
    InputError
        If a package is not installed, or the model cannot be had.
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
                f"embedding.model_name={embedding.model_name}: no such folder, and not to be had from the hub "
                f"({reason}); {choices}"
            ) from None
    files = _model_files(folder)
    needed = {"config.json": ["config.json"], "weights": _WEIGHTS, "a tokenizer": _TOKENIZERS}
    for name, endings in needed.items():  # without a tokenizer's files, transformers makes one that knows no word
        if not any(file.name.endswith(tuple(endings)) for file in files):
            raise InputError(f"{folder}: no whole model in it, {name} is missing ({', '.join(endings)}); {choices}")
    return folder


def identify(embedding: EmbeddingConfig, folder: str | None, texts: list[str]) -> bytes:
    """What, beside its own text, a vector depends on; as JSON."""
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
    """The encoder in `folder` (found anew on a machine that has no such folder): texts to float32 vectors [n, width].

    Of sentence-transformers the vectors have length 1. Of bert-mean they are the mean over the tokens that are not
    padding, [CLS] and [SEP] among them, and keep their lengths.
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
    """Vectors [n, at most width] of length 1, or 0 for a text without a word that another text has.

    Raises
    ------
    InputError
        If no word is in two texts.
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
    if weights.shape[1] == 1:  # a single word; the SVD wants two
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
    """Folder of the model in the hub's cache, as it is there where the hub does not answer."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        # The one call of the client that takes a timeout; the others wait for ever, or try for minutes.
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
    """Files that define the model, in order of names."""
    suffixes = {".json", ".txt", ".model", *_WEIGHTS}
    return sorted(file for file in Path(folder).rglob("*") if file.suffix in suffixes and file.is_file())
