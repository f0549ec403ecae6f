"""The whole pipeline where much is missing, all of it at once; each of it alone is in docs/reliability.md."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.integration.test_jobs import ROOT, SMALL, data_dir, without_ray  # noqa: F401 - a fixture

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NO_USER = """
import os, pwd

def unknown(*_):
    raise KeyError("getpwuid(): uid not found")

pwd.getpwuid = pwd.getpwnam = unknown
"""
SMALL_SHM = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sh"]


def test_the_pipeline_where_much_is_missing(data_dir, tmp_path):  # noqa: F811
    """No user name, no home, one core and three actors, stdout in ASCII, blanks, # and % in all paths, 64 MB of shared
    memory where the tests may mount it."""
    odd = tmp_path / "odd #1 100%20"
    odd.mkdir()
    shutil.copytree(data_dir, odd / "da ta#")
    titles = (odd / "da ta#" / "titles.tsv").read_text().replace("Film", "Amélie")
    (odd / "da ta#" / "titles.tsv").write_text(titles, encoding="utf-8")
    (odd / "environment").symlink_to(sys.prefix)
    (odd / "sitecustomize.py").write_text(NO_USER)
    before = SMALL_SHM if subprocess.run([*SMALL_SHM, "true"], capture_output=True).returncode == 0 else []
    names = {"HOME", "USER", "LOGNAME", "USERNAME", "RAY_AUTH_TOKEN_PATH"}
    environment = {key: value for key, value in without_ray().items() if key not in names}
    environment |= {"HOME": "/proc/none", "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(odd)}
    done = subprocess.run(
        [
            *before,
            str(odd / "environment" / "bin" / "python"),
            *("-m", "jobs.pipeline", *SMALL, "inference.num_workers=3", "training.num_workers=1"),
            *(f"data.data_dir={odd / 'da ta#'}", f"run.storage_path={odd / 'runs #'}", "run.name=run"),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {max(os.sched_getaffinity(0))}),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "    Am?lie " in done.stdout
    run = odd / "runs #" / "run"
    assert len(json.loads((run / "run.json").read_text())["history"]) == 2
    assert len(pd.read_csv(run / "recommendations" / "recommendations.csv")) == 400
    assert "Amélie" in Path(run / "report.html").read_text(encoding="utf-8")
