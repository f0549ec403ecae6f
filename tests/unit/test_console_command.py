"""`bert4rec JOB` is `python -m jobs.JOB`, and the default config is part of the package."""

import sys
import tomllib
from importlib import import_module

import pytest

from bert4rec import cli
from bert4rec.config import load_config
from jobs import __main__ as command
from tests.helpers.commands import ROOT

pytestmark = pytest.mark.unit

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bert4rec", *words])
    with pytest.raises(SystemExit) as exit_of:
        command.main()
    return exit_of.value.code


def test_the_entry_point_is_there():
    module, _, function = PROJECT["project"]["scripts"]["bert4rec"].partition(":")
    assert getattr(import_module(module), function) is command.main


@pytest.mark.parametrize("job", ["train", "movielens"])
def test_a_job_gets_the_rest_of_the_words(job, monkeypatch, capsys):
    assert run(monkeypatch, job, "--help") == 0
    usage = capsys.readouterr().out.partition("\n")[0]
    assert usage.startswith(f"usage: bert4rec {job}" if job == "train" else "usage: python -m jobs.movielens")


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), ([], 2), (["trian"], 2)])
def test_without_a_job_all_are_listed(words, code, monkeypatch, capsys):
    assert run(monkeypatch, *words) == code
    out, err = capsys.readouterr()
    listed = [line.split()[0] for line in (err if code else out).splitlines()[3:]]
    files = sorted(path.stem for path in (ROOT / "jobs").glob("[!_]*.py"))
    assert listed == files


def test_the_default_config_ships_with_the_package():
    path = cli.DEFAULT_CONFIG.relative_to(ROOT / "bert4rec")
    assert any(path.match(pattern) for pattern in PROJECT["tool"]["setuptools"]["package-data"]["bert4rec"])
    assert not cli.DEFAULT_CONFIG.is_symlink()
    assert (ROOT / "configs" / path.name).samefile(cli.DEFAULT_CONFIG)
    assert load_config(str(cli.DEFAULT_CONFIG)).data_name == "ml-100k"
