"""MovieLens archives, made by hand in miniature, against outputs written out by hand."""

import hashlib
import os
import sys
import urllib.error
import zipfile
from pathlib import Path

import pytest

from bert4rec.data import movielens
from bert4rec.errors import InputError
from jobs import movielens as job

pytestmark = pytest.mark.unit

GENRES = "unknown|0\nAction|1\nChildren's|2\nDrama|3\n\n"
U_ITEM = (
    "1|Toy Story (1995)|01-Jan-1995||http://x|0|0|1|0\n"
    "2|Heidi Fleiss: Hollywood Madam (1995) |09-Feb-1996||http://x|0|0|0|1\n"
    "267|unknown||||1|0|0|0\n"
    "3|Misérables, Les (1995)|01-Jan-1995||http://x|0|1|0|1\n"
    "4|Land Before Time III (1995) (V)|01-Jan-1994||http://x|0|0|1|0\n"
    "5|Dated|13-Dec-1996||http://x|0|0|0|1\n"
)
CSV_ITEMS = (
    "movieId,title,genres\n"
    '11,"American President, The (1995)",Comedy|Drama\n'
    '12,"""Great Performances"" Cats (1998)",Musical\n'
    "13,Cérémonie (1995) ,(no genres listed)\n"
    '14,"Babylon\t5\nagain",Sci-Fi\n'
)
CSV_RATINGS = "userId,movieId,rating,timestamp\n7,12,3.5,1112486027\n7,11,0.5,1112484676\n1,14,5.0,1094785740\n"
RATINGS_OUT = "user,item,time\n7,12,1112486027\n7,11,1112484676\n1,14,1094785740\n"

ARCHIVES: dict[str, dict[str, bytes]] = {
    "ml-100k": {
        "u.data": b"196\t267\t3\t881250949\n186\t3\t3\t891717742\n",
        "u.genre": GENRES.encode(),
        "u.item": U_ITEM.encode("latin-1"),
    },
    "ml-1m": {
        "ratings.dat": b"1::1193::5::978300760\n1::661::3::978302109\n",
        "movies.dat": "1193::Star Wars: Episode IV (1977)::Action|Sci-Fi\n661::Amélie, 2001::Comedy\n".encode(
            "latin-1"
        ),
    },
    "ml-20m": {"ratings.csv": CSV_RATINGS.encode(), "movies.csv": CSV_ITEMS.encode()},
}
ARCHIVES["ml-latest-small"] = ARCHIVES["ml-25m"] = ARCHIVES["ml-32m"] = ARCHIVES["ml-20m"]
ARCHIVES["ml-10m"] = {
    "ratings.dat": b"1::122::5::838985046\n2::110::3.5::868245777\n",
    "movies.dat": "122::Boomerang (1992)::Comedy|Romance\n110::Cérémonie, La (1995)::(no genres listed)\n".encode(),
}
CSV_OUT = {
    "train_ratings.csv": RATINGS_OUT,
    "titles.tsv": "item\ttitle\n11\tAmerican President, The (1995)\n"
    '12\t"Great Performances" Cats (1998)\n13\tCérémonie (1995)\n14\tBabylon 5 again\n',
    "genres.tsv": "item\tgenre\n11\tComedy\n11\tDrama\n12\tMusical\n14\tSci-Fi\n",
    "years.tsv": "item\tyear\n11\t1995\n12\t1998\n13\t1995\n",
}
EXPECTED = {
    "ml-100k": {
        "train_ratings.csv": "user,item,time\n196,267,881250949\n186,3,891717742\n",
        "titles.tsv": "item\ttitle\n1\tToy Story (1995)\n2\tHeidi Fleiss: Hollywood Madam (1995)\n267\tunknown\n"
        "3\tMisérables, Les (1995)\n4\tLand Before Time III (1995) (V)\n5\tDated\n",
        "genres.tsv": "item\tgenre\n1\tChildren's\n2\tDrama\n3\tAction\n3\tDrama\n4\tChildren's\n5\tDrama\n",
        "years.tsv": "item\tyear\n1\t1995\n2\t1995\n3\t1995\n4\t1995\n5\t1996\n",
    },
    "ml-1m": {
        "train_ratings.csv": "user,item,time\n1,1193,978300760\n1,661,978302109\n",
        "titles.tsv": "item\ttitle\n1193\tStar Wars: Episode IV (1977)\n661\tAmélie, 2001\n",
        "genres.tsv": "item\tgenre\n1193\tAction\n1193\tSci-Fi\n661\tComedy\n",
        "years.tsv": "item\tyear\n1193\t1977\n",
    },
    "ml-10m": {
        "train_ratings.csv": "user,item,time\n1,122,838985046\n2,110,868245777\n",
        "titles.tsv": "item\ttitle\n122\tBoomerang (1992)\n110\tCérémonie, La (1995)\n",
        "genres.tsv": "item\tgenre\n122\tComedy\n122\tRomance\n",
        "years.tsv": "item\tyear\n122\t1992\n110\t1995\n",
    },
    "ml-latest-small": CSV_OUT,
    "ml-20m": CSV_OUT,
    "ml-25m": CSV_OUT,
    "ml-32m": CSV_OUT,
}
# What RecBole makes of the first five rows of U_ITEM; it has no release dates.
RECBOLE_ITEMS = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "1\tToy Story\t1995\tChildren's\n"
    "2\tHeidi Fleiss: Hollywood Madam\t1995\tDrama\n"
    "267\tunkonwn\tunkonwn\tunknown\n"
    "3\tMisérables, Les (1995)\t1995\tAction Drama\n"
    "4\tLand Before Time III (1995)\tV\tChildren's\n"
)
RECBOLE = {
    "ml-100k.inter": b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + ARCHIVES["ml-100k"]["u.data"],
    "ml-100k.item": RECBOLE_ITEMS.encode(),
}


def pack(path: Path, files: dict[str, bytes], folder: str) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(f"{folder}/{name}", content)
    return str(path)


def unpack(path: Path, files: dict[str, bytes]) -> str:
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    return str(path)


def outputs(path: Path) -> dict[str, str]:
    return {file.name: file.read_bytes().decode() for file in path.iterdir()}


@pytest.fixture
def workdir(tmp_path, monkeypatch) -> Path:
    """A current directory without data, where the hashes of the real ml-100k are those of ours."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(movielens, "ML_100K_RATINGS_SHA256", sha256(EXPECTED["ml-100k"]["train_ratings.csv"].encode()))
    monkeypatch.setattr(movielens, "RECBOLE_ITEMS_SHA256", sha256(RECBOLE["ml-100k.item"]))
    return tmp_path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def unreachable(name: str, path: Path) -> None:
    raise urllib.error.URLError("Name or service not known")


def recbole_wheel(directory: str) -> Path:
    return Path(pack(Path(directory, "recbole.whl"), RECBOLE, movielens.RECBOLE_DIR))


@pytest.mark.parametrize("name", movielens.NAMES)
@pytest.mark.parametrize("packed", ["zip", "directory", "directory of a directory"])
def test_convert_writes_our_files(tmp_path, name, packed):
    if packed == "zip":
        archive = pack(tmp_path / "a.zip", ARCHIVES[name], name)
    elif packed == "directory":
        archive = unpack(tmp_path / "a", ARCHIVES[name])
    else:
        archive = str(Path(unpack(tmp_path / "a" / name, ARCHIVES[name])).parent)
    count = movielens.convert(archive, name, str(tmp_path / "deep" / "out"))
    assert count == EXPECTED[name]["train_ratings.csv"].count("\n") - 1
    assert outputs(tmp_path / "deep" / "out") == EXPECTED[name]
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_crlf_and_bom_are_read(tmp_path):
    files = {name: b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n") for name, content in ARCHIVES["ml-20m"].items()}
    movielens.convert(unpack(tmp_path / "a", files), "ml-20m", str(tmp_path / "out"))
    assert outputs(tmp_path / "out") == CSV_OUT


def test_convert_streams_over_many_blocks(tmp_path):
    rows = 200_000  # some 3 MB: three blocks of pyarrow's reader
    lines = [f"{n // 50}::{n % 977 + 1}::{n % 5 + 1}::{900000000 + n}" for n in range(rows)]
    archive = unpack(tmp_path / "a", ARCHIVES["ml-1m"] | {"ratings.dat": "\n".join(lines).encode()})
    assert movielens.convert(archive, "ml-1m", str(tmp_path / "out")) == rows
    expected = ["user,item,time", *(f"{n // 50},{n % 977 + 1},{900000000 + n}" for n in range(rows))]
    assert (tmp_path / "out" / "train_ratings.csv").read_text().splitlines() == expected


def test_recbole_gives_the_same_files_as_grouplens(tmp_path):
    rows = U_ITEM.encode("latin-1").splitlines(keepends=True)[:5]
    grouplens = unpack(tmp_path / "a", ARCHIVES["ml-100k"] | {"u.item": b"".join(rows)})
    movielens.convert(grouplens, "ml-100k", str(tmp_path / "grouplens"))
    movielens.convert(str(recbole_wheel(str(tmp_path))), "recbole", str(tmp_path / "recbole"))
    assert outputs(tmp_path / "recbole") == outputs(tmp_path / "grouplens")


BAD = [
    ("ml-1m", "movies.dat", None, r"no movies.dat in it; found ratings.dat"),
    ("ml-100k", "u.genre", None, r"no u.genre in it"),
    (
        "ml-100k",
        "u.data",
        b"1\t2\t3\t4\n1\t2\t3\n",
        r"u.data: .*Row #2: Expected 4 columns, got 3.*user\titem\trating\ttime",
    ),
    (
        "ml-100k",
        "u.data",
        b"1\t2\t3\t4\n1\tx\t3\t4\n",
        r"u.data: .*Row #2: .*invalid value 'x'; expected whole numbers",
    ),
    ("ml-100k", "u.data", b"1\t2\t3\t4\n1\t\t3\t4\n", r"u.data: .*invalid value ''; expected whole numbers"),
    ("ml-100k", "u.data", b"", r"u.data: .*Empty CSV file"),
    ("ml-1m", "ratings.dat", b"1::2::3::4\n1,2,3,4\n", r"ratings.dat: .*Row #2: .*1,2,3,4; .*user::item::rating::time"),
    ("ml-20m", "ratings.csv", b"user,item,rating,time\n1,2,3,4\n", r"ratings.csv: .*'userId'.*expected .*movieId"),
    ("ml-20m", "ratings.csv", b"userId,movieId,rating,timestamp\n", r"ratings.csv: no ratings in it"),
    (
        "ml-100k",
        "u.item",
        b"1|Toy Story (1995)|01-Jan-1995||x|0\n",
        r"u.item, row 1: 6 fields, expected 9: item\|title",
    ),
    (
        "ml-1m",
        "movies.dat",
        b"1::A (1995)::Drama\n2::B\n",
        r"movies.dat, row 2: 2 fields, expected 3: item::title::genres",
    ),
    (
        "ml-25m",
        "movies.csv",
        b"id,title,genres\n",
        r"movies.csv, row 1: header id,title,genres, expected 3: movieId,title",
    ),
    ("ml-32m", "movies.csv", b"movieId,title,genres\n1,A, B,Drama\n", r"movies.csv, row 2: 4 fields, expected 3"),
    ("ml-32m", "movies.csv", b"movieId,title,genres\n1,\xe9,Drama\n", r"damaged, or no ml-32m archive .*utf-8"),
]


@pytest.mark.parametrize(("name", "file", "content", "message"), BAD)
def test_bad_archive_is_one_clear_error_and_leaves_nothing(tmp_path, name, file, content, message):
    files = dict(ARCHIVES[name])
    del files[file]
    if content is not None:
        files[file] = content
    with pytest.raises(InputError, match=message):
        movielens.convert(unpack(tmp_path / "a", files), name, str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["a"]


def test_damaged_zip_is_an_error(tmp_path):
    stored = tmp_path / "a.zip"
    with zipfile.ZipFile(stored, "w") as archive:
        for name, content in ARCHIVES["ml-1m"].items():
            archive.writestr(name, content)
    whole = stored.read_bytes()
    for damaged in (whole[:-30], whole.replace(b"978302109", b"978302108", 1), b"<html>not found</html>"):
        stored.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.zip: damaged, or no ml-1m archive"):
            movielens.convert(str(stored), "ml-1m", str(tmp_path / "out"))
    with pytest.raises(InputError, match="no such archive"):
        movielens.convert(str(tmp_path / "b.zip"), "ml-1m", str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["a.zip"]


def test_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    archive = pack(tmp_path / "a.zip", ARCHIVES["ml-1m"], "ml-1m")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(movielens, "_write_ratings", interrupt)
    with pytest.raises(KeyboardInterrupt):
        movielens.convert(archive, "ml-1m", str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["a.zip"]


def test_overwrite_replaces_only_a_conversion(tmp_path):
    archive = pack(tmp_path / "a.zip", ARCHIVES["ml-1m"], "ml-1m")
    out = tmp_path / "out"
    unpack(out, {"train_ratings.csv": b"old"})
    with pytest.raises(InputError, match=r"holds train_ratings.csv, and --overwrite is not given"):
        movielens.convert(archive, "ml-1m", str(out))
    movielens.convert(archive, "ml-1m", str(out), overwrite=True)
    assert outputs(out) == EXPECTED["ml-1m"]
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"holds thesis.tex, which is no conversion's"):
        movielens.convert(archive, "ml-1m", str(out), overwrite=True)
    with pytest.raises(InputError, match=r"a\.zip: holds a\.zip"):
        movielens.convert(archive, "ml-1m", archive, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["a.zip", "out"]


def test_ensure_takes_the_archive_on_disk_then_leaves_it_alone(workdir, monkeypatch, capsys):
    monkeypatch.setattr(movielens, "download", unreachable)
    (workdir / "data").mkdir()
    pack(workdir / "data" / "ml-100k.zip", ARCHIVES["ml-100k"], "ml-100k")
    movielens.ensure_ml_100k()
    assert outputs(workdir / "data" / "ml-100k") == EXPECTED["ml-100k"]
    said = capsys.readouterr().out
    assert said.startswith("data/ml-100k: 2 ratings of ml-100k from data/ml-100k.zip. MovieLens is for research use")
    assert said.count("\n") == 1
    os.remove("data/ml-100k/years.tsv")  # optional: whoever removes it means it
    movielens.ensure_ml_100k()
    assert len(outputs(workdir / "data" / "ml-100k")) == 3


def test_ensure_falls_back_on_recbole(workdir, monkeypatch, capsys):
    monkeypatch.setattr(movielens, "download", unreachable)
    monkeypatch.setattr(movielens, "download_recbole", recbole_wheel)
    movielens.ensure_ml_100k("elsewhere")
    assert (workdir / "elsewhere" / "train_ratings.csv").read_text() == EXPECTED["ml-100k"]["train_ratings.csv"]
    assert "from the wheel of recbole==1.2.1 (https://" in capsys.readouterr().out
    assert os.listdir(workdir) == ["elsewhere"]


def test_both_sources_unreachable_is_one_error_that_says_what_to_do(workdir, monkeypatch):
    def no_index(directory: str) -> Path:
        raise OSError("No matching distribution found")

    monkeypatch.setattr(movielens, "download", unreachable)
    monkeypatch.setattr(movielens, "download_recbole", no_index)
    with pytest.raises(InputError) as error:
        movielens.ensure_ml_100k()
    assert str(error.value) == (
        "ml-100k is not available: https://files.grouplens.org/datasets/movielens/ml-100k.zip: "
        "Name or service not known; "
        "pip download recbole==1.2.1, which holds a copy: No matching distribution found; "
        "put ml-100k.zip at data/ml-100k.zip, or set data.data_dir to a directory of input files"
    )
    assert os.listdir(workdir) == []
    with pytest.raises(InputError, match=r"ml-1m.zip: Name or service not known; put ml-1m.zip at data/ml-1m.zip"):
        movielens.provide("ml-1m")


@pytest.mark.parametrize("constant", ["ML_100K_RATINGS_SHA256", "RECBOLE_ITEMS_SHA256"])
def test_hash_mismatch_names_found_and_expected(workdir, monkeypatch, constant):
    found = getattr(movielens, constant)
    monkeypatch.setattr(movielens, constant, "0" * 64)
    monkeypatch.setattr(movielens, "download", unreachable)
    monkeypatch.setattr(movielens, "download_recbole", recbole_wheel)
    with pytest.raises(InputError, match=f"sha256 {found}, expected {'0' * 64}"):
        movielens.ensure_ml_100k()
    assert os.listdir(workdir / "data" if (workdir / "data").exists() else workdir) == []


def test_download_keeps_only_what_has_the_published_md5(tmp_path, monkeypatch):
    archive = Path(pack(tmp_path / "a.zip", ARCHIVES["ml-1m"], "ml-1m"))
    monkeypatch.setattr(movielens, "URL", archive.as_uri().replace("a.zip", "{}.zip"))
    archive.rename(tmp_path / "ml-1m.zip")
    (tmp_path / "to").mkdir()
    with pytest.raises(InputError, match=f"md5 [0-9a-f]{{32}}, expected {movielens.MD5['ml-1m']}"):
        movielens.download("ml-1m", tmp_path / "to" / "ml-1m.zip")
    assert os.listdir(tmp_path / "to") == []
    content = (tmp_path / "ml-1m.zip").read_bytes()
    monkeypatch.setitem(movielens.MD5, "ml-1m", hashlib.md5(content).hexdigest())
    movielens.download("ml-1m", tmp_path / "to" / "ml-1m.zip")
    assert (tmp_path / "to" / "ml-1m.zip").read_bytes() == content
    assert os.listdir(tmp_path / "to") == ["ml-1m.zip"]


def test_an_archive_that_changes_has_the_md5_that_lies_beside_it(tmp_path, monkeypatch):
    archive = Path(pack(tmp_path / "ml-latest-small.zip", ARCHIVES["ml-latest-small"], "ml-latest-small"))
    monkeypatch.setattr(movielens, "URL", archive.as_uri().replace("ml-latest-small", "{}"))
    beside = tmp_path / "ml-latest-small.zip.md5"
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    target = tmp_path / "to" / "ml-latest-small.zip"
    for text, message in (
        (f"MD5 (ml-latest-small.zip) = {'0' * 32}\n", f"{md5}, expected 0{{32}}"),
        ("<html>", "no MD5"),
    ):
        beside.write_text(text)
        with pytest.raises(InputError, match=message):
            movielens.download("ml-latest-small", target)
        assert not target.exists()
    beside.write_text(f"{md5}  ml-latest-small.zip\n")
    movielens.download("ml-latest-small", target)
    assert target.read_bytes() == archive.read_bytes()


def test_download_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    class Broken:
        headers = {"Content-Length": "100"}  # noqa: RUF012
        blocks = iter([b"x" * 40, b""])

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def read(self, size: int) -> bytes:
            return next(self.blocks)

    monkeypatch.setattr(movielens.urllib.request, "urlopen", lambda url, timeout: Broken())
    with pytest.raises(OSError, match="broke off after 40 of 100 bytes"):
        movielens.download("ml-1m", tmp_path / "ml-1m.zip")
    assert os.listdir(tmp_path) == []


def test_job_prints_one_line_and_exits_with_2_on_bad_input(workdir, monkeypatch, capsys):
    archive = pack(workdir / "a.zip", ARCHIVES["ml-25m"], "ml-25m")
    command = ["movielens", "ml-25m", "--archive", archive, "--out", "out"]
    monkeypatch.setattr(sys, "argv", command)
    assert job.main() == 0
    assert outputs(workdir / "out") == CSV_OUT
    assert job.main() == 0
    assert capsys.readouterr().out.splitlines()[1] == "out: already there, left alone"
    monkeypatch.setattr(sys, "argv", ["movielens", "ml-1m", "--archive", archive])
    assert job.main() == 2
    assert capsys.readouterr().err == f"error: {archive}: no movies.dat in it; found ml-25m\n"
    monkeypatch.setattr(sys, "argv", ["movielens", "ml-11m"])
    with pytest.raises(SystemExit, match="2"):
        job.main()
