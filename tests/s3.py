"""A local S3 server in a process of its own, which can fail a share of the requests."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

SERVER = """
import json, random, sys, time
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

inner = DomainDispatcherApplication(create_backend_app)
chance, asked, failed = {"share": 0.0, "denied": []}, [0], [0]
draw = random.Random(1)

def app(environ, start_response):
    if environ["PATH_INFO"] == "/_faults":
        size = int(environ.get("CONTENT_LENGTH") or 0)
        if size:
            chance.update(json.loads(environ["wsgi.input"].read(size)))
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps({"asked": asked[0], "failed": failed[0]}).encode()]
    asked[0] += 1
    if environ["REQUEST_METHOD"] in chance["denied"]:
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response("403 Forbidden", [("Content-Type", "application/xml")])
        return [b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>planted</Message></Error>"]
    if draw.random() < chance["share"]:
        failed[0] += 1
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        kind = draw.choice([*["500 Internal Server Error", "503 Slow Down"] * 4, "late"])
        if kind == "late":
            time.sleep(4)
            kind = "500 Internal Server Error"
        code = {"5": "InternalError", "503": "SlowDown"}.get(kind[:3], "InternalError")
        start_response(kind, [("Content-Type", "application/xml")])
        return [f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>planted</Message></Error>".encode()]
    return inner(environ, start_response)

server = make_server("127.0.0.1", 0, app, threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
"""
KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"}


class S3Server:
    """The address of the server, and the control of its failures."""

    def __init__(self, port: int) -> None:
        self.port = port

    def uri(self, prefix: str) -> str:
        """Return the URI of a workspace on the server."""
        return f"s3://bucket/{prefix}?endpoint_override=127.0.0.1:{self.port}&scheme=http&allow_bucket_creation=true"

    def fail(self, share: float) -> None:
        """From now on, answer this share of all requests with 500 or 503, at once or after 4 seconds."""
        self._send_request(json.dumps({"share": share}).encode())

    def deny(self, *methods: str) -> None:
        """From now on, answer the HTTP requests with these methods, and no others, with 403."""
        self._send_request(json.dumps({"denied": methods}).encode())

    def counts(self) -> dict[str, int]:
        """Return the numbers of requests received (`asked`) and failed so far."""
        return self._send_request(None)

    def _send_request(self, body: bytes | None) -> dict[str, int]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/_faults", data=body)
        with urllib.request.urlopen(request) as answer:
            counts: dict[str, int] = json.load(answer)
            return counts


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run a server with an empty bucket during a block, with its keys in the environment of this and new processes."""
    old_environment = dict(os.environ)
    os.environ.update(KEYS, AWS_EC2_METADATA_DISABLED="true")
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            server = S3Server(int(process.stdout.readline()))
            bucket_request = urllib.request.Request(f"http://127.0.0.1:{server.port}/bucket", method="PUT")
            urllib.request.urlopen(bucket_request).close()
            yield server
        finally:
            process.kill()
            for name in set(os.environ) - set(old_environment):
                del os.environ[name]
            os.environ.update(old_environment)
