import gzip

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert4rec.data import vectors
from bert4rec.data.ids import as_ids
from bert4rec.data.vectors import read_vectors_of, to_lists, write_table, write_tsv
from bert4rec.errors import InputError
from tests.helpers.vectors import read_vectors

pytestmark = pytest.mark.unit

VECTORS = [[0.1, -2.0, 3e-9], [1e20, 0.0, 1 / 3]]


def lists(rows, kind=None):
    return pa.array(rows, kind or pa.list_(pa.float32()))


def write_parquet(path, ids, rows, kind=None):
    pq.write_table(pa.table({"item": ids, "embedding": lists(rows, kind)}), path)
    return str(path)


def write_lines(path, *lines):
    path.write_bytes("\n".join(lines).encode())
    return str(path)


@pytest.mark.parametrize("ids", [[7, -3], ["007", "8"], ["a b", "é"], ['"x', '"y"'], ['a"b', '""']])
def test_what_is_written_is_read(tmp_path, ids):
    table = pa.table({"item": ids, "embedding": lists(VECTORS), "text": ["a", "b"]})
    write_table(str(tmp_path / "v.parquet"), table)
    write_tsv(str(tmp_path / "v.tsv"), pa.array(ids), lists(VECTORS))
    for name in ("v.parquet", "v.tsv"):
        found, matrix = read_vectors(str(tmp_path / name))
        assert found.to_pylist() == ids
        assert matrix.dtype == np.float32
        np.testing.assert_array_equal(matrix, np.array(VECTORS, np.float32))


def test_one_altered_bit_or_a_missing_end_is_found(tmp_path):
    """In Parquet as this job writes it; a TSV has no checksum."""
    path = tmp_path / "v.parquet"
    write_table(str(path), pa.table({"item": range(500), "embedding": lists(np.random.rand(500, 8).tolist())}))
    whole = path.read_bytes()
    for position in np.linspace(4, len(whole) - 1200, 40).astype(int):  # the pages; the footer is behind them
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(InputError, match=r"v\.parquet: "):
            read_vectors(str(path))
    for length in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"v\.parquet: "):
            read_vectors(str(path))


def test_the_established_format_byte_by_byte(tmp_path):
    write_tsv(str(tmp_path / "v.tsv"), pa.array([1, 20]), lists([[0.5, -1.25], [1e-9, 3]]))
    assert (tmp_path / "v.tsv").read_text() == "item\ttitle\n1\t0.5 -1.25\n20\t1e-9 3\n"


def test_a_slice_is_written_as_what_it_shows(tmp_path):
    write_tsv(str(tmp_path / "v.tsv"), pa.array([1, 2, 3])[1:], lists([[1], [2], [3]])[1:])
    assert (tmp_path / "v.tsv").read_text() == "item\ttitle\n2\t2\n3\t3\n"


def test_other_writers_tsv(tmp_path):
    content = '\ufeffitem\ttitle\r\n"1"\t"0.5  +1.5 "\r\n\r\n2\t 2. .5\r\n'
    (tmp_path / "v.tsv.gz").write_bytes(gzip.compress(content.encode()))
    ids, matrix = read_vectors(str(tmp_path / "v.tsv.gz"))
    assert ids.equals(pa.array([1, 2]))
    assert matrix.tolist() == [[0.5, 1.5], [2.0, 0.5]]
    ids, matrix = read_vectors(write_lines(tmp_path / "v.tsv", "title\tyear\titem", "1 2\t1999\tx"))
    assert (ids.to_pylist(), matrix.tolist()) == (["x"], [[1.0, 2.0]])


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float16(), 2)])
def test_other_writers_parquet(tmp_path, kind):
    ids = pa.array(["b", "a", "c"], pa.dictionary(pa.int8(), pa.large_string()))
    found, matrix = read_vectors(write_parquet(tmp_path / "v.parquet", ids, [[1, 2], [3, 4], [5, 6]], kind))
    assert found.equals(pa.array(["b", "a", "c"]))
    assert matrix.tolist() == [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1\t1 2", "", "2\t1 2 3"], "line 4: a vector of 3 numbers; the first has 2"),
        (["1\t1 2", "2\t"], "line 3: a vector of 0 numbers; the first has 2"),
        (["1\t ", "2\t1"], "line 2: a vector of 0 numbers; expected one or more"),
        (["1\t1 2", "2\t1 x2"], "line 3: 'x2' is not a finite float32 number"),
        (["1\t1 2", "2\t0.5,1 2"], "line 3: '0.5,1' is not a finite float32 number"),
        (["1\t1 nan"], "line 2: 'nan' is not a finite float32 number"),
        (["1\t1 2", "2\t-inf 1"], "line 3: '-inf' is not a finite float32 number"),
        (["1\t1e39 1"], "line 2: '1e39' is not a finite float32 number"),
        (["1\t1", "2\t1", "3\t1", "2\t5"], "line 5: item 2 occurs a second time"),
        (["1\t1", "\t1"], "line 3: item is missing"),
        (["1\t1", "2\t1\t1"], "line 3: 3 fields, expected 2, separated by tabs"),
        ([], "no vectors in it"),
    ],
)
def test_bad_lines(tmp_path, lines, message):
    path = write_lines(tmp_path / "v.tsv", "item\ttitle", *lines, "")
    with pytest.raises(InputError) as error:
        read_vectors(path)
    assert message in str(error.value)
    assert path in str(error.value)


@pytest.mark.parametrize(
    ("ids", "rows", "message"),
    [
        ([1, 2, 3], [[1, 2], [1, 2], [1]], "row 3: a vector of 1 numbers; the first has 2"),
        ([1, 2], [[1], None], "row 2: a vector of 0 numbers; the first has 1"),
        ([1, 2], [[1, 2], [3, float("nan")]], "row 2: 'nan' is not a finite float32 number"),
        ([1, 2], [[1, None], [3, 4]], "row 1: 'None' is not a finite float32 number"),
        ([1, 2], [[1], [1e300]], "row 2: '1e+300' is not a finite float32 number"),
        ([5, 6, 5], [[1], [2], [3]], "row 3: item 5 occurs a second time"),
        ([5, None], [[1], [2]], "row 2: item is missing"),
    ],
)
def test_bad_rows(tmp_path, ids, rows, message):
    path = write_parquet(tmp_path / "v.parquet", pa.array(ids), rows, pa.list_(pa.float64()))
    with pytest.raises(InputError) as error:
        read_vectors(path)
    assert message in str(error.value)


def test_files_that_are_no_vectors(tmp_path):
    pq.write_table(pa.table({"item": [1], "vector": [1.0]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"item": [1], "embedding": [1.0]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"item": [1.5], "embedding": [[1.0]]}), tmp_path / "c.parquet")
    for name, message in [
        ("a.parquet", "no column embedding; found item, vector"),
        ("b.parquet", "column embedding is double; expected lists of numbers"),
        ("c.parquet", "column item is double; expected integers or strings"),
        ("d.parquet", "cannot be read"),
        ("d.tsv", "cannot be read"),
    ]:
        with pytest.raises(InputError, match=message):
            read_vectors(str(tmp_path / name))
    for content, message in [
        ("", "the file is empty"),
        ("item\tembedding\n1\t1\n", "no column title"),
        ("item\ttitle\n1\t\udcff\n", "not UTF-8"),
    ]:
        (tmp_path / "v.tsv").write_text(content, errors="surrogateescape")
        with pytest.raises(InputError, match=message):
            read_vectors(str(tmp_path / "v.tsv"))
    (tmp_path / "v.parquet").write_text("no")
    with pytest.raises(InputError, match="not a Parquet file"):
        read_vectors(str(tmp_path / "v.parquet"))


def test_ids_are_integers_only_where_all_are_spelled_so():
    assert as_ids(pa.array(["7", "-8"])).equals(pa.array([7, -8]))
    for spelled in (["7", "08"], ["+7"], ["7 "], ["9223372036854775808"], ["1.0"]):
        assert as_ids(pa.array(spelled)).to_pylist() == spelled


def test_a_large_catalogue(tmp_path):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(20_000, 64)).astype(np.float32)
    offsets = pa.array(np.arange(20_001) * 64, pa.int32())
    write_tsv(str(tmp_path / "v.tsv"), pa.array(np.arange(20_000)), pa.ListArray.from_arrays(offsets, matrix.ravel()))
    np.testing.assert_array_equal(read_vectors(str(tmp_path / "v.tsv"))[1], matrix)


@pytest.mark.parametrize("name", ["v.parquet", "v.tsv"])
@pytest.mark.parametrize("memory_mb", [0, 1])
def test_vectors_of_a_catalogue_lie_in_memory_or_on_disk(tmp_path, monkeypatch, name, memory_mb):
    """In its order, read in blocks of two rows; zeros where there is none. Vectors of other items count for nothing."""
    monkeypatch.setattr(vectors, "_ROWS_AT_ONCE", 2)
    own, rows = pa.array([9, 2, 7, 5, 1]), np.arange(10, dtype=np.float32).reshape(5, 2) + 1
    if name == "v.tsv":
        write_tsv(str(tmp_path / name), own, to_lists(rows))
    else:
        write_table(str(tmp_path / name), pa.table({"item": own, "embedding": to_lists(rows)}))
    found = read_vectors_of(str(tmp_path / name), pa.array(["1", "3", "9", "7"]), memory_mb)
    assert found.tolist() == [[9, 10], [0, 0], [1, 2], [5, 6]]
    assert isinstance(found, np.memmap) == (memory_mb == 0)
    with pytest.raises(InputError, match="none of its 5 items, such as 9, 2, 7, is in the catalogue"):
        read_vectors_of(str(tmp_path / name), pa.array(["x"]), memory_mb)


def test_an_unusable_vector_of_a_later_block_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "_ROWS_AT_ONCE", 2)
    rows = pa.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0]], pa.list_(pa.float32()))
    write_table(str(tmp_path / "v.parquet"), pa.table({"item": [1, 2, 3, 4], "embedding": rows}))
    with pytest.raises(InputError, match="row 4: a vector of 1 numbers; the first has 2"):
        read_vectors_of(str(tmp_path / "v.parquet"), pa.array(["1"]), 1)
