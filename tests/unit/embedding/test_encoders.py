import pytest

from bert4rec.embedding.encoders import fit_tfidf_svd

pytestmark = pytest.mark.unit


def test_a_catalogue_whose_titles_share_a_single_word():
    assert fit_tfidf_svd(["film 1", "film 2", "other"], 8).tolist() == [[1], [1], [0]]
