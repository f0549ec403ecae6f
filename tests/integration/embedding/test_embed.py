import shutil
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from bert4rec.config import load_config
from bert4rec.embedding.embed import embed_titles, read_texts
from bert4rec.embedding.encoders import find_model, identify
from bert4rec.errors import InputError
from jobs.embed import embed_items
from tests.helpers.vectors import read_vectors

embed = sys.modules[embed_titles.__module__]

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]

TITLES = {
    7: "Toy Story (1995)",
    1: "Toy Soldiers (1991)",
    5: "Alien (1979)",
    6: "Alien (1979)",
    2: "Aliens, The Long Story of Space",
    3: "M (1931)",
    4: "Space Story, A",
    8: "Qx",
}
GENRES = [(7, "Comedy"), (5, "Horror"), (7, "Animation"), (5, "Sci-Fi"), (6, "Horror"), (6, "Sci-Fi"), (7, "Comedy")]
TOY_STORY, ALIEN, QX = 0, 2, 7


def write_data(path, titles=TITLES, genres=GENRES):
    path.mkdir(exist_ok=True)
    rows = [("item", "title"), *titles.items()]
    (path / "titles.tsv").write_text("".join(f"{item}\t{title}\n" for item, title in rows))
    (path / "genres.tsv").write_text("".join(f"{item}\t{genre}\n" for item, genre in [("item", "genre"), *genres]))
    return path


def config_of(data, **settings):
    options = [f"embedding.{key}={value}" for key, value in settings.items()]
    return load_config(None, [f"data.data_dir={data}", *options])


def run(data, **settings):
    config = config_of(data, **settings)
    return embed_titles(config, read_texts(config.data.data_dir, config.embedding.with_genres))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A BERT of random weights, with a vocabulary of letters and a few words."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = str(tmp_path_factory.mktemp("model") / "bert")
    letters = [mark + chr(code) for code in range(33, 127) if not chr(code).isupper() for mark in ("", "##")]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, "story", "toy", "genres"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.BertWordPieceTokenizer(vocab=vocabulary)
    transformers.BertTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=160, **shape)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_texts(tmp_path):
    texts = read_texts(str(write_data(tmp_path)), with_genres=True)
    assert texts["item"].to_pylist() == list(TITLES)
    assert texts["text"].to_pylist()[:4] == [
        "Toy Story (1995). Genres: Comedy, Animation",
        "Toy Soldiers (1991)",
        "Alien (1979). Genres: Horror, Sci-Fi",
        "Alien (1979). Genres: Horror, Sci-Fi",
    ]
    assert texts["genres"].null_count == 5
    assert read_texts(str(tmp_path), with_genres=False)["text"].to_pylist() == list(TITLES.values())
    (tmp_path / "genres.tsv").unlink()
    assert read_texts(str(tmp_path), with_genres=True)["text"].to_pylist() == list(TITLES.values())
    (tmp_path / "titles.tsv").write_text("item\ttitle\nx\tfirst\n08\ta\nx\tsecond\n")
    texts = read_texts(str(tmp_path), with_genres=True).to_pydict()
    assert (texts["item"], texts["text"]) == (["x", "08"], ["first", "a"])
    (tmp_path / "titles.tsv").unlink()
    with pytest.raises(InputError, match=r"no titles\.tsv"):
        read_texts(str(tmp_path), with_genres=True)


def test_tfidf_svd(tmp_path, capsys):
    pytest.importorskip("sklearn")
    data = write_data(tmp_path / "data")
    settings = {"method": "tfidf-svd", "width": 3}
    assert embed_items(config_of(data, write_tsv="true", **settings)).num_new == len(TITLES)
    shown = capsys.readouterr().out
    assert "    Toy Story (1995). Genres: Comedy, Animation\n" in shown
    assert "8 items, width 3; 3 with genres, 5 without; 8 newly embedded" in shown
    file = data / "title_embeddings.parquet"
    ids, vectors = read_vectors(str(file))
    assert ids.to_pylist() == list(TITLES)
    # "Qx" shares no word with any other title: nothing is known of it.
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 1, 1, 1, 1, 0, 1, 0], atol=1e-6)
    np.testing.assert_array_equal(vectors[ALIEN], vectors[ALIEN + 1])
    assert vectors[TOY_STORY] @ vectors[1] > vectors[TOY_STORY] @ vectors[ALIEN]
    tsv_ids, tsv_vectors = read_vectors(str(data / "title_embeddings.tsv"))
    assert tsv_ids.equals(ids)
    np.testing.assert_array_equal(tsv_vectors, vectors)

    before, changed_at = file.read_bytes(), file.stat().st_mtime_ns
    assert run(data, **settings).num_new == 0
    assert file.stat().st_mtime_ns == changed_at
    assert run(data, overwrite="true", backup_original="true", **settings).num_new == len(TITLES)
    assert file.read_bytes() == (data / "title_embeddings.parquet.bak").read_bytes() == before
    write_data(data, TITLES | {8: "Qx Story"})
    assert run(data, **settings).num_new == len(TITLES)
    assert np.linalg.norm(read_vectors(str(file))[1][QX]) == pytest.approx(1)
    assert sorted(path.name for path in data.iterdir()) == [
        "genres.tsv",
        "title_embeddings.parquet",
        "title_embeddings.parquet.bak",
        "title_embeddings.tsv",
        "titles.tsv",
    ]


def test_bert_mean_is_the_mean_over_real_tokens(tmp_path, encoder, monkeypatch):
    import transformers

    data = write_data(tmp_path / "data")
    settings = {"method": "bert-mean", "model_name": encoder, "batch_size": 1}
    file, parts = data / "title_embeddings.parquet", data / "title_embeddings.parquet.unfinished"

    def die(*_):
        raise KeyboardInterrupt

    # Killed when all parts are there, and one of them lost; the rerun has one actor instead of two.
    with monkeypatch.context() as patch:
        patch.setattr(embed, "write_table", die)
        with pytest.raises(KeyboardInterrupt):
            run(data, **settings)
    assert not file.exists()
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in parts.glob("*.parquet")}
    assert sorted(before) == ["part-00000.parquet", "part-00001.parquet"]
    (parts / "part-00000.parquet").unlink()
    after, write_table = {}, embed.write_table

    def look_and_write(*arguments):
        after.update({path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in parts.glob("*.parquet")})
        write_table(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(embed, "_resources", lambda *_: (False, 1))
        patch.setattr(embed, "write_table", look_and_write)
        assert run(data, **settings).num_new == len(TITLES)
    assert after["part-00001.parquet"] == before["part-00001.parquet"]
    assert after["part-00000.parquet"][0] == before["part-00000.parquet"][0]
    assert not parts.exists()

    vectors = read_vectors(str(file))[1]
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    model = transformers.AutoModel.from_pretrained(encoder).eval()
    texts = read_texts(str(data), with_genres=True)["text"].to_pylist()
    with torch.no_grad():
        expected = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
    np.testing.assert_allclose(vectors, torch.stack(expected).numpy(), atol=1e-5)
    assert run(data, **settings).num_new == 0

    # A changed title, in a batch padded for a longer one, and an item that is new but whose text is not.
    write_data(data, {**TITLES, 3: "M", 1: "A story much longer than that one", 9: "Qx"})
    assert run(data, **settings | {"batch_size": 64}).num_new == 2
    table = pq.read_table(file)
    assert table["item"].to_pylist() == [*TITLES, 9]
    again = read_vectors(str(file))[1]
    unchanged = [row for row, item in enumerate(TITLES) if item not in (1, 3)]
    np.testing.assert_array_equal(again[unchanged], vectors[unchanged])
    np.testing.assert_array_equal(again[len(TITLES)], vectors[QX])
    with torch.no_grad():
        expected = model(**tokenizer("M", return_tensors="pt")).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(again[list(TITLES).index(3)], expected.numpy(), atol=1e-5)


def test_sentence_transformers_is_encode(tmp_path, encoder):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    transformer = modules.Transformer(encoder)
    model = sentence_transformers.SentenceTransformer(
        modules=[transformer, modules.Pooling(16, pooling_mode="cls"), modules.Dense(16, 6)], device="cpu"
    )
    folder = str(tmp_path / "model")
    model.save_pretrained(folder)
    data = write_data(tmp_path / "data")
    result = run(data, model_name=folder, output_path=tmp_path / "out" / "e.parquet", with_genres="false")
    assert (result.num_items, result.width, result.num_new) == (len(TITLES), 6, len(TITLES))
    ids, vectors = read_vectors(str(tmp_path / "out" / "e.parquet"))
    assert ids.to_pylist() == list(TITLES)
    expected = model.encode(list(TITLES.values()), normalize_embeddings=True)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_another_model_in_the_same_folder_is_another_model(tmp_path, encoder):
    folder = tmp_path / "model"
    shutil.copytree(encoder, folder)
    embedding = config_of(tmp_path, method="bert-mean", model_name=folder).embedding
    identity = identify(embedding, str(folder), [])
    assert identity == identify(embedding, encoder, [])
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert identity != identify(embedding, str(folder), [])


def test_what_cannot_be_embedded_is_one_message(tmp_path, encoder, monkeypatch):
    data = write_data(tmp_path / "data", {1: "Alien", 2: "Brazil", 3: "Casino"}, [])
    with pytest.raises(InputError, match=r"no word is in two of the 3 texts.*use an encoder"):
        run(data, method="tfidf-svd")
    with pytest.raises(InputError, match=r"expected a name that ends in \.parquet"):
        run(data, method="tfidf-svd", output_path=data / "e.tsv")
    with pytest.raises(InputError, match="the cluster has no GPU"):
        run(data, method="bert-mean", model_name=encoder, device="gpu")
    file = data / "title_embeddings.parquet"
    for content in (b"mine", None):
        file.write_bytes(content) if content else pq.write_table(read_texts(str(data), True), file)
        with pytest.raises(InputError, match="not written by this job"):
            run(data, method="tfidf-svd")
    shutil.copytree(encoder, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="not usable as a model of bert-mean"):
        run(data, method="bert-mean", model_name=tmp_path / "model", overwrite="true")
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="a tokenizer is missing"):
        run(data, method="bert-mean", model_name=tmp_path / "model")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install -e \"\.\[embeddings\]\""):
        run(data)


@pytest.mark.parametrize("name", ["nobody/such-model", "no/such/folder"])
def test_a_model_that_cannot_be_had_is_told_at_once(name, monkeypatch):
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    began = time.monotonic()
    with pytest.raises(InputError, match=r"local folder, or embedding\.method=tfidf-svd"):
        find_model(load_config(None, [f"embedding.model_name={name}"]).embedding)
    assert time.monotonic() - began < 10
