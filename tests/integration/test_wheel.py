"""A wheel of the repository, which pip builds without a network, works in an empty directory."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec

import pytest

from tests.helpers.commands import ROOT
from tests.helpers.datasets import random_histories

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    for needed in ("pip", "setuptools"):
        if find_spec(needed) is None:
            pytest.skip(f"no {needed} here, which builds the wheel")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("bert4rec", "jobs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = ["pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out)]
    subprocess.run([sys.executable, "-m", *build, str(source)], check=True)
    (path,) = out.glob("*.whl")
    return path


def test_a_wheel_has_every_file_of_the_package(wheel):
    with zipfile.ZipFile(wheel) as opened:
        inside = {name for name in opened.namelist() if ".dist-info/" not in name}
    files = [path for folder in ("bert4rec", "jobs") for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert inside == {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


@pytest.mark.slow
def test_the_pipeline_of_a_wheel_works_outside_of_the_repository(wheel, tmp_path):
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(installed)
    (empty / "data" / "ml-100k").mkdir(parents=True)  # where the default config looks for its data
    rows = [f"{user},{item}" for user, items in random_histories(40, 30).items() for item in items]
    (empty / "data" / "ml-100k" / "train_ratings.csv").write_text("\n".join(["user,item", *rows]) + "\n")
    environment = os.environ | {"PYTHONPATH": str(installed)}
    found = subprocess.run(
        [sys.executable, "-c", "import bert4rec, jobs; print(bert4rec.__file__, jobs.__file__)"],
        **{"cwd": empty, "env": environment, "capture_output": True, "text": True, "check": True},
    )
    assert found.stdout.count(str(installed)) == 2
    small = ["model.hidden_units=16", "model.num_heads=2", "training.num_epochs=1", "training.num_workers=1"]
    result = subprocess.run(
        [sys.executable, "-m", "jobs", "pipeline", *small, "run.name=small"],
        **{"cwd": empty, "env": environment, "capture_output": True, "text": True},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "MovieLens-100K with configs/ml-100k.yaml" in result.stdout
    for written in ("evaluation.json", "recommendations/recommendations.csv", "report.html"):
        assert (empty / "runs" / "small" / written).stat().st_size
