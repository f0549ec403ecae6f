"""Ray nodes on this machine, each a `ray start` of its own, away from any other Ray; and jobs that run on them."""

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tests.helpers.processes import descendants, free_port, wait_for
from tests.integration.test_jobs import ROOT, without_ray

BIN = Path(sys.executable).parent


def _end_with_the_tests() -> None:
    """Linux sends SIGTERM when the process of the tests ends, however that comes; `ray start` then ends its own."""
    ctypes.CDLL("libc.so.6").prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Nodes:
    """A head and what joins it; use as a context manager, which ends all of it."""

    def __init__(
        self, head_cpus: int, dashboard: bool = False, autoscaling: Callable[[str], dict] | None = None
    ) -> None:
        """`autoscaling` makes the cluster's config from the head's address."""
        self.directory = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short, as it holds sockets
        token = self.directory / "token"
        token.write_text("a" * 64)
        self.address, self.dashboard = f"127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}"
        self.environment = without_ray() | {
            "PATH": f"{BIN}:{os.environ['PATH']}",  # a job's `python` is the head's
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
            "RAY_raylet_start_wait_time_s": "60",  # on a machine that others use too
            "RAY_health_check_period_ms": "500",  # the loss of a node is noticed sooner than by default
            "RAY_health_check_failure_threshold": "4",
        }
        options = [
            f"--num-cpus={head_cpus}",
            f"--port={self.address.split(':')[1]}",
            f"--temp-dir={self.directory}/ray",
        ]
        options += [f"--include-dashboard={dashboard}", f"--dashboard-port={self.dashboard.split(':')[2]}"]
        options += [f"--ray-client-server-port={free_port()}"]
        more = {}
        if autoscaling is not None:
            config = self.directory / "cluster.json"
            config.write_text(json.dumps(autoscaling(self.address)))
            options += [f"--autoscaling-config={config}"]
            identifier = "f" * 51 + "00000"
            more = {
                "RAY_FAKE_CLUSTER": "1",
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_enable_autoscaler_v2": "1",
                "RAY_CLOUD_INSTANCE_ID": identifier,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": identifier,
            }
        self.started: list[subprocess.Popen] = []
        self.head = self._start("head", ["--head", *options], more)
        if dashboard:
            wait_for(self._answers)

    def _start(
        self, name: str, options: list[str], environment: dict[str, str], before: tuple[str, ...] = ()
    ) -> subprocess.Popen:
        log = self.directory / f"{name}.log"
        memory = ["--object-store-memory=100000000", f"--dashboard-agent-listen-port={free_port()}"]
        with log.open("wb") as output:
            node = subprocess.Popen(
                [
                    *before,
                    str(BIN / "ray"),
                    "start",
                    "--block",
                    *options,
                    *memory,
                    "--min-worker-port=0",
                    "--max-worker-port=0",
                ],
                env=self.environment | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=_end_with_the_tests,
            )
        self.started.append(node)
        wait_for(lambda: "Ray runtime started" in log.read_text() or node.poll() is not None, why=str(log))
        assert node.poll() is None, log.read_text()
        return node

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.dashboard}/api/version", timeout=5).close()
        except urllib.error.HTTPError:  # such as: no token
            return True
        except OSError:
            return False
        return True

    def add(self, cpus: int = 1, before: tuple[str, ...] = ()) -> subprocess.Popen:
        """A node; `before` is put before its command."""
        return self._start(f"node{len(self.started)}", [f"--address={self.address}", f"--num-cpus={cpus}"], {}, before)

    def job(self, name: str, *arguments: str) -> subprocess.Popen:
        """A job that joins the cluster."""
        return self._run(["-m", f"jobs.{name}", *arguments], self.directory / f"{name}.log")

    def python(self, code: str, output: Path) -> subprocess.Popen:
        """A program that joins the cluster."""
        return self._run(["-c", code], output)

    def _run(self, arguments: list[str], output: Path) -> subprocess.Popen:
        job = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=self.environment | {"RAY_ADDRESS": self.address},
            stdout=output.open("wb"),
            stderr=subprocess.STDOUT,
            preexec_fn=_end_with_the_tests,
        )
        self.started.append(job)
        return job

    def cli(self, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
        """`ray job ...`, to its end."""
        command = [str(BIN / "ray"), "job", arguments[0], "--address", self.dashboard, *arguments[1:]]
        done = subprocess.run(command, cwd=cwd, env=self.environment, capture_output=True, text=True)
        done.stdout = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
        return done

    def kill(self, process: subprocess.Popen) -> None:
        """SIGKILL a node, or a job, with all that it started."""
        for pid in [process.pid, *descendants(process.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for process in reversed(self.started):
            self.kill(process)
        if kind is None:
            shutil.rmtree(self.directory, ignore_errors=True)  # processes that are ending may still write
