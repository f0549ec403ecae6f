"""What a job prints where it cannot be shown, or where nobody reads it; in processes of their own."""

import os
import subprocess
import sys

import pytest

from tests.helpers.commands import ROOT

pytestmark = pytest.mark.unit

JOB = "from bert4rec.cli import run_job; run_job('', lambda config: [print('Amélie', n) for n in range({})])"


def job(lines, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", JOB.format(lines), "data.data_dir=d"],
        cwd=ROOT,
        env={**os.environ, "PYTHONUTF8": "0", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_what_stdout_cannot_show_is_a_question_mark():
    printed, errors = job(2, PYTHONIOENCODING="ascii").communicate()
    assert (printed, errors) == ("Am?lie 0\nAm?lie 1\n", "")


def test_when_nobody_reads_the_job_ends_with_one_line():
    """As with `| head -1`."""
    with job(10**6, PYTHONIOENCODING="utf-8") as reading:
        assert reading.stdout.readline() == "Amélie 0\n"
        reading.stdout.close()
        assert reading.stderr.read() == "error: nobody reads the output any more; run the same command to continue\n"
    assert reading.returncode == 1
