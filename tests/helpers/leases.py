"""A job that holds a directory and is killed."""

import os
import signal
import subprocess
import sys

import pytest

from bert4rec import lease, storage
from bert4rec.errors import InputError
from tests.helpers.commands import ROOT

HOLDS = "import sys, time; from bert4rec import lease\nwith lease.held(sys.argv[1]): print('holds'); time.sleep(60)"


def assert_taken_over_from_a_killed_holder(directory):
    """Nobody else may hold `directory` while the job lives, and this process may once it has been killed."""
    command = [sys.executable, "-u", "-c", HOLDS, directory]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "holds\n"
        with pytest.raises(InputError, match=f"pid {job.pid},"), lease.held(directory):
            pass
        job.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, job.pid, os.WEXITED | os.WNOWAIT)  # ended, and still a process until someone waits for it
        with lease.held(directory):
            assert storage.read_json(f"{directory}/{lease.HOLDER}")["pid"] == os.getpid()
        job.wait()
    assert not storage.exists(f"{directory}/{lease.HOLDER}")
