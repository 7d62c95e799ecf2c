"""A proxy in front of an S3 server that loses, delays and cuts what it passes on; counts what it did."""

from __future__ import annotations

import contextlib
import http.client
import random
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit


@dataclass
class Faults:
    """What goes wrong from now on; may be changed at any time."""

    busy: float = 0.0  # share of requests answered 503
    slow: float = 0.0  # share delayed by `delay_s`
    delay_s: float = 2.0
    cut: float = 0.0  # share of downloads whose connection is closed in the middle of the body
    away: bool = False  # nobody answers: connections are closed at once
    seed: int = 0
    struck: Counter = field(default_factory=Counter)  # by kind
    requests: int = 0

    def __post_init__(self) -> None:
        self._random, self._lock = random.Random(self.seed), threading.Lock()

    def strikes(self, kind: str) -> bool:
        with self._lock:
            struck = (kind == "away" and self.away) or (kind != "away" and self._random.random() < getattr(self, kind))
            self.struck[kind] += struck
            return struck


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address) -> None:
        """Clients that hang up are part of the game."""


@contextlib.contextmanager
def faulty_s3(endpoint: str) -> Iterator[tuple[str, Faults]]:
    """Serves on a free loopback port what `endpoint` has; yields its own endpoint and the faults to set."""
    backend = urlsplit(endpoint)
    faults = Faults()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_) -> None:
            pass

        def _pass_on(self) -> None:
            faults.requests += 1
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if faults.strikes("away"):
                self.close_connection = True
                return
            if faults.strikes("slow"):
                time.sleep(faults.delay_s)
            if faults.strikes("busy"):
                self.send_response(503)
                message = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
                self.send_header("Content-Type", "application/xml")
                self.send_header("Content-Length", str(len(message)))
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else message)
                return
            connection = http.client.HTTPConnection(backend.hostname, backend.port, timeout=60)
            try:
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in ("connection", "expect"):
                        connection.putheader(name, value)
                connection.endheaders(body)
                answer = connection.getresponse()
                content = answer.read()
                self.send_response_only(answer.status, answer.reason)
                for name, value in answer.getheaders():
                    if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                        self.send_header(name, value)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
                self.send_header("Content-Length", str(length or 0))
                self.end_headers()
                if self.command == "GET" and len(content) > 1 and faults.strikes("cut"):
                    self.wfile.write(content[: len(content) // 2])
                    self.close_connection = True
                    return
                self.wfile.write(content)
            finally:
                connection.close()

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

    with _Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", faults
        finally:
            server.shutdown()
            thread.join()
