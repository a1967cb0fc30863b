"""The store's own rules: keys, errors, lost answers, broken-off bodies. integration/ has the real server."""

from __future__ import annotations

import http.server
import io
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from hypothesis import given
from hypothesis import strategies as st

from flywheel.config import Deployment
from flywheel.errors import (
    ConfigError,
    Conflict,
    IntegrityError,
    NotFound,
    StoreError,
    StoreRefused,
    StoreUnavailable,
)
from flywheel.refusals import refusal
from flywheel.schema import RobotReport, sha256_bytes
from flywheel.store import EMBEDDED_FILE, Store

Behaviour = Callable[["Handler"], None]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers each request with the next of the server's behaviours; the last one stays."""

    server: Server

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _serve(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append(self)
        behaviours = self.server.behaviours
        (behaviours.pop(0) if len(behaviours) > 1 else behaviours[0])(self)

    do_GET = do_PUT = do_HEAD = do_DELETE = _serve

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    """A store that misbehaves on demand."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviours: list[Behaviour] = []
        self.seen: list[Handler] = []


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def client(server: Server, attempts: int = 2) -> Store:
    return Store(
        "s3://bucket/pre",
        f"http://127.0.0.1:{server.server_port}",
        access_key="AKEY",
        secret_key="SECRET",
        timeout_s=5,
        attempts=attempts,
    )


def lose_the_answer(h: Handler) -> None:
    h.close_connection = True


def test_creator_whose_answer_was_lost_still_wins(server: Server) -> None:
    """The write arrived, its answer did not; the retry meets our own object: no conflict."""

    def head(h: Handler) -> None:
        sent = server.seen[0].headers
        h.answer(
            200,
            x_amz_meta_writer=sent["x-amz-meta-writer"],
            x_amz_meta_sha256=sent["x-amz-meta-sha256"],
            Content_Length="0",
        )

    server.behaviours = [lose_the_answer, lambda h: h.answer(412), head]
    assert client(server).create("k", b"mine") == sha256_bytes(b"mine")


def test_creator_who_came_second_loses(server: Server) -> None:
    server.behaviours = [
        lambda h: h.answer(412),
        lambda h: h.answer(200, x_amz_meta_writer="somebody-else", x_amz_meta_sha256="00"),
    ]
    with pytest.raises(Conflict, match="somebody else wrote it first"):
        client(server).create("k", b"mine")


def test_body_that_breaks_off_is_read_again_from_the_start(server: Server, tmp_path: Path) -> None:
    data = b"0123456789" * 1000

    def cut(h: Handler) -> None:
        h.answer(200, data[:5000], Content_Length=str(len(data)))
        h.close_connection = True

    def whole(h: Handler) -> None:
        h.answer(200, data)

    server.behaviours = [cut, whole]
    assert client(server).get("k", sha256_bytes(data)) == data
    server.behaviours = [cut, whole]
    client(server).get_file("k", tmp_path / "f", sha256_bytes(data))
    assert (tmp_path / "f").read_bytes() == data
    server.behaviours = [cut]
    with pytest.raises(StoreUnavailable, match="GET k"):
        client(server).get("k")
    with pytest.raises(StoreUnavailable):
        client(server).get_file("k", tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_server_that_ignores_the_condition_fails_the_probe(server: Server) -> None:
    server.behaviours = [lambda h: h.answer(200, ETag='"0"')]
    with pytest.raises(StoreRefused, match="ignores If-None-Match"):
        client(server).probe()
    assert server.seen[-1].command == "DELETE"


def test_upload_carries_its_md5_and_sha256(server: Server) -> None:
    server.behaviours = [lambda h: h.answer(200, ETag='"0"')]
    client(server).put("k", b"data")
    headers = server.seen[0].headers
    assert headers["content-md5"] == "jXd/OF09/siBXSD3SWAm3A=="
    assert headers["x-amz-meta-sha256"] == sha256_bytes(b"data")
    assert server.seen[0].path == "/bucket/pre/k"


@pytest.mark.parametrize(
    "key", ["", "/abs", "a//b", "../up", "a/../b", "a/.", "nul\0", "new\nline", "x" * 1100, "end/"]
)
def test_key_that_could_leave_its_prefix_or_break_a_listing_is_refused(server: Server, key: str) -> None:
    store = client(server)
    for use in (store.get, store.exists, store.delete, lambda k: store.put(k, b"")):
        with pytest.raises(StoreError, match="object key"):
            use(key)
    assert server.seen == []


@pytest.mark.parametrize(
    ("status", "code", "kind", "says"),
    [
        (403, "InvalidAccessKeyId", StoreRefused, "AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", StoreRefused, "AWS_SECRET_ACCESS_KEY"),
        (403, "RequestTimeTooSkewed", StoreRefused, "clock"),
        (403, "AccessDenied", StoreRefused, "policy"),
        (401, "", StoreRefused, "AWS_ACCESS_KEY_ID"),
        (403, "QuotaExceeded", StoreRefused, "quota"),
        (413, "EntityTooLarge", StoreRefused, "too large"),
        (507, "", StoreRefused, "quota"),
        (404, "NoSuchKey", NotFound, "no such object"),
        (404, "404", NotFound, "no such object"),
        (404, "NoSuchBucket", StoreRefused, "FLYWHEEL_STORE"),
        (412, "PreconditionFailed", Conflict, "first"),
        (409, "ConditionalRequestConflict", Conflict, "first"),
        (400, "BadDigest", IntegrityError, "damaged"),
        (400, "XAmzContentSHA256Mismatch", IntegrityError, "damaged"),
        (400, "RequestTimeout", StoreUnavailable, "try again"),
        (503, "SlowDown", StoreUnavailable, "try again"),
        (429, "", StoreUnavailable, "try again"),
        (500, "InternalError", StoreUnavailable, "try again"),
        (301, "PermanentRedirect", StoreRefused, "AWS_DEFAULT_REGION"),
        (400, "InvalidArgument", StoreError, "InvalidArgument"),
    ],
)
def test_every_refusal_has_its_error_and_remedy(
    status: int, code: str, kind: type[StoreError], says: str
) -> None:
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error = refusal(ClientError(answer, "Op"), "GET k: s3://b at http://e")  # type: ignore[arg-type]
    assert type(error) is kind
    assert says in str(error)
    assert str(error).startswith("GET k: s3://b at http://e")


@given(st.sampled_from(list(HTTPStatus)), st.text(max_size=20))
def test_no_answer_escapes_the_error_tree(status: HTTPStatus, code: str) -> None:
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": int(status)}}
    assert isinstance(refusal(ClientError(answer, "Op"), "x"), StoreError)  # type: ignore[arg-type]


def test_missing_credentials_are_a_refusal(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    with pytest.raises(StoreRefused, match="no credentials; set AWS_ACCESS_KEY_ID"):
        Store("s3://b0b", f"http://127.0.0.1:{server.server_port}").get("k")


def test_no_store_at_all_says_how_to_get_one(tmp_path: Path) -> None:
    nowhere = Deployment.from_env({"FLYWHEEL_HOME": str(tmp_path)})
    with pytest.raises(StoreUnavailable, match="flywheel up"):
        Store.from_env(nowhere)
    (tmp_path / EMBEDDED_FILE).write_text('{"secret_key": "hidden"}')
    with pytest.raises(ConfigError, match=r"store\.json: malformed") as e:
        Store.from_env(nowhere)
    assert "hidden" not in str(e.value)


@pytest.mark.parametrize("url", ["", "bucket", "s3://", "s3://UPPER", "http://b/c"])
def test_malformed_url_is_a_config_error(url: str) -> None:
    with pytest.raises(ConfigError, match="must look like s3://"):
        Store(url, "http://127.0.0.1:1", access_key="a", secret_key="b")


def test_malformed_document_names_its_field(server: Server) -> None:
    server.behaviours = [lambda h: h.answer(200, b'{"site": 3}')]
    with pytest.raises(StoreError, match=r"doc\.json: site: "):
        client(server).get_json("doc.json", RobotReport)


def test_versions_have_no_gap_and_other_objects_are_not_versions(server: Server) -> None:
    server.behaviours = [lambda h: h.answer(404)]
    with pytest.raises(StoreError, match="has no version 6"):
        client(server).append_version("state/x", 7, b"")
    with pytest.raises(ValueError, match="count from 1"):
        client(server).append_version("state/x", 0, b"")
    names = ["00000001.json", "00000003.json", "notes.txt", "123.json", "99999999.json.part"]
    listing = "".join(
        f"<Contents><Key>pre/state/x/{n}</Key><Size>1</Size>"
        "<LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
        for n in names
    )
    page = f"<ListBucketResult><IsTruncated>false</IsTruncated>{listing}</ListBucketResult>".encode()
    server.seen.clear()
    server.behaviours = [lambda h: h.answer(200, page), lambda h: h.answer(200, b"three")]
    assert client(server).latest("state/x") == (3, b"three")
    assert server.seen[-1].path == "/bucket/pre/state/x/00000003.json"


def test_sub_store_keeps_to_its_prefix(server: Server) -> None:
    server.behaviours = [lambda h: h.answer(200, ETag='"0"')]
    sub = client(server).sub("runs/7")
    sub.put("k", io.BytesIO(b"x").getvalue())
    assert server.seen[0].path == "/bucket/pre/runs/7/k"
    assert "SECRET" not in repr(sub) + str(sub.__dict__)
