"""A real HTTP server between the robot and the store that refuses, breaks off, stalls or lies when told to.

Requests pass unchanged (their signatures cover the host that the client asked for), so what is behind it is
the real store. Lies need more than passing: what it stores instead of what it was given, it signs with keys
of its own.
"""

from __future__ import annotations

import hashlib
import http.client
import time
from enum import IntEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from flywheel.edge.link import Words
from flywheel.store import EmbeddedStore

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

STALL_S = 3.0  # longer than the client waits


class Fault(IntEnum):
    """What goes wrong with every request."""

    NONE = 0
    CUT = 1  # no connection at all
    UNAUTHORIZED = 2  # 401
    FORBIDDEN = 3  # 403
    BROKEN = 4  # 500
    BUSY = 5  # 503 SlowDown
    STALL = 6  # takes the request and says nothing
    BREAK_OFF = 7  # half of an answer
    STORES_OTHER = 8  # acknowledges, and keeps other bytes
    FORGETS = 9  # acknowledges, and keeps nothing
    READS_OTHER = 10  # gives back other bytes than it keeps


_STATUS = {
    Fault.UNAUTHORIZED: (401, "InvalidAccessKeyId"),
    Fault.FORBIDDEN: (403, "AccessDenied"),
    Fault.BROKEN: (500, "InternalError"),
    Fault.BUSY: (503, "SlowDown"),
}


class Faulty(ThreadingHTTPServer):
    """Listens on a free port of 127.0.0.1; ``words[word]`` says which ``Fault`` holds now, ``words[port]``
    where the store listens: one that was killed may have to come back elsewhere."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, behind: EmbeddedStore, words: Words, word: int, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self._keys, self._words, self._word, self._port = behind, words, word, port
        self._clients: dict[int, S3Client] = {}

    @property
    def endpoint(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def fault(self) -> Fault:
        """What holds now."""
        return Fault(int(self._words[self._word]))

    @property
    def behind(self) -> int:
        """The port of the store."""
        return int(self._words[self._port])

    def client(self) -> S3Client:
        """For its own writes."""
        port = self.behind
        if port not in self._clients:
            from flywheel.store import Store

            k, endpoint = self._keys, f"http://127.0.0.1:{port}"
            store = Store(f"s3://{k.bucket}", endpoint, access_key=k.access_key, secret_key=k.secret_key)
            self._clients[port] = store._client
        return self._clients[port]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is killed in the middle of a request is what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Faulty

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        fault = self.server.fault
        if fault is Fault.CUT:
            self.close_connection = True
            return
        if fault is Fault.STALL:
            time.sleep(STALL_S)
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault in _STATUS:
            self._refuse(*_STATUS[fault])
            return
        if self.command == "PUT" and fault in (Fault.FORGETS, Fault.STORES_OTHER):
            self._lie(fault, body)
            return
        self._pass(fault, body)

    do_PUT = do_HEAD = do_POST = do_DELETE = do_GET

    def _pass(self, fault: Fault, body: bytes) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=30)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("expect", "connection")}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException):
            self.close_connection = True
            return
        finally:
            connection.close()
        if fault is Fault.READS_OTHER and self.command == "GET" and data:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        if fault is Fault.BREAK_OFF:
            data, self.close_connection = data[: len(data) // 2], True
        if self.command != "HEAD":
            self.wfile.write(data)

    def _lie(self, fault: Fault, body: bytes) -> None:
        bucket, _, key = unquote(urlsplit(self.path).path).lstrip("/").partition("/")
        if fault is Fault.STORES_OTHER and body:
            metadata = {k[11:]: v for k, v in self.headers.items() if k.lower().startswith("x-amz-meta-")}
            condition: Any = {"IfNoneMatch": "*"} if self.headers.get("If-None-Match") else {}
            other = body[:-1] + bytes([body[-1] ^ 1])
            try:
                self.server.client().put_object(
                    Bucket=bucket, Key=key, Body=other, Metadata=metadata, **condition
                )
            except Exception as e:
                status = getattr(e, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
                self._refuse(int(status), "PreconditionFailed" if status == 412 else "InternalError")
                return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _refuse(self, status: int, code: str) -> None:
        data = f"<Error><Code>{code}</Code><Message>as told</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
