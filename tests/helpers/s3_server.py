"""An S3 server with faults: `python -m tests.helpers.s3_server PORT`. Moto holds the objects, in its memory.

`S3Server` starts it as a process. `faults` of a running server are set by a PUT of JSON to /_faults.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

KEY, SECRET, REGION = "test-key", "test-secret", "us-east-1"
BUCKET, READ_ONLY = "bucket", "read-only"

ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'


class Faulty:
    """Moto's application, behind the faults of a real server."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self.application, self.lock = application, threading.Lock()
        self.faults: dict[str, float] = {}
        self.written: dict[str, float] = {}
        self.num_requests = self.num_faults = 0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if path == "/_faults":
            if method == "PUT":
                self.faults = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
            counts = json.dumps({"requests": self.num_requests, "faults": self.num_faults}).encode()
            start_response("200 OK", [("Content-Length", str(len(counts)))])
            return [counts]
        self.num_requests += 1
        writes = method in ("PUT", "POST", "DELETE")
        if f"Credential={KEY}/" not in environ.get("HTTP_AUTHORIZATION", ""):
            return self._refuse(start_response, "403 Forbidden", "InvalidAccessKeyId", "The access key is not known.")
        if writes and path.startswith(f"/{READ_ONLY}/") and self.faults.get("read_only", 1):
            return self._refuse(start_response, "403 Forbidden", "AccessDenied", "Access Denied")
        if random.random() < self.faults.get("unavailable", 0):
            self.num_faults += 1
            return self._refuse(start_response, "503 Slow Down", "SlowDown", "Please reduce your request rate.")
        if writes:
            with self.lock:
                self.written[path] = time.monotonic()
        body = self.application(environ, start_response)
        if method == "GET" and "list-type" in parse_qs(environ["QUERY_STRING"]) and self.faults.get("lag"):
            return self._lagging(b"".join(body), path)
        return body

    def _refuse(self, start_response: Callable[..., Any], status: str, code: str, message: str) -> list[bytes]:
        body = ERROR.format(code=code, message=message).encode()
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    def _lagging(self, body: bytes, bucket: str) -> list[bytes]:
        """The listing without what was written in the last seconds; blanks keep its length."""
        since = time.monotonic() - self.faults["lag"]
        with self.lock:
            recent = {path for path, when in self.written.items() if when > since}

        def shown(found: re.Match[bytes]) -> bytes:
            key = unquote(re.search(rb"<Key>(.*?)</Key>", found[0])[1].decode())  # type: ignore[index]
            is_recent = f"{bucket.rstrip('/')}/{key}" in recent
            self.num_faults += is_recent
            return b" " * len(found[0]) if is_recent else found[0]

        return [re.sub(rb"<Contents>.*?</Contents>", shown, body, flags=re.S)]


class S3Server:
    """The server as a process; use it as a context manager. It ends with the process that started it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.endpoint = f"http://127.0.0.1:{port}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def __enter__(self) -> "S3Server":
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.s3_server", str(self.port), str(os.getpid())],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + 60
        while not self._answers():
            assert self.process.poll() is None, "the S3 server ended"
            assert time.monotonic() < end, "the S3 server does not answer"
            time.sleep(0.1)
        return self

    def _answers(self) -> bool:
        try:
            self.counts()
        except OSError:
            return False
        return True

    def counts(self) -> dict[str, int]:
        """How many requests there were, and how many of them got a fault."""
        with urllib.request.urlopen(f"{self.endpoint}/_faults", timeout=10) as answer:
            return json.loads(answer.read())  # type: ignore[no-any-return]

    def faults(self, **faults: float) -> None:
        """Set the faults: `unavailable`, the share of requests that get a 503; `lag` of listings in seconds."""
        content = json.dumps(faults).encode()
        request = urllib.request.Request(f"{self.endpoint}/_faults", data=content, method="PUT")
        urllib.request.urlopen(request, timeout=10).close()

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def main(port: int, parent: int) -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import run_simple

    def end_with_the_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end_with_the_parent, daemon=True).start()
    MotoRequestHandler.protocol_version = "HTTP/1.1"  # connections stay open
    MotoRequestHandler.log_request = lambda *_: None
    from moto.s3.models import s3_backends

    for bucket in (BUCKET, READ_ONLY):
        s3_backends["123456789012"]["aws"].create_bucket(bucket, REGION)
    application = DomainDispatcherApplication(create_backend_app)
    run_simple("127.0.0.1", port, Faulty(application), threaded=True, request_handler=MotoRequestHandler)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
