"""Folders and buckets give the same answers; S3 mistakes become sentences within seconds."""

from __future__ import annotations

import http.server
import os
import pickle
import re
import resource
import socket
import threading
import time

import pytest
from botocore.exceptions import ClientError

from vlmo_ray.data import s3
from vlmo_ray.data.store import Store, open_store
from vlmo_ray.demo.local_s3 import local_s3
from vlmo_ray.errors import UserError


@pytest.fixture(params=["folder", "bucket"])
def store(request, tmp_path):
    uri = str(tmp_path / "new" / "set") if request.param == "folder" else request.getfixturevalue("bucket")
    return open_store(uri, create=True)


def test_write_read_list_delete(store):
    store.write("b.bin", b"0123456789")
    store.write("sub/a.bin", b"xyz")
    store.write("sub-a.bin", b"")
    assert store.read("b.bin") == b"0123456789"
    assert store.read("b.bin", 3, 4) == b"3456"
    assert store.read("b.bin", 8) == b"89"
    assert store.read("b.bin", 8, 100) == b"89"
    assert store.list() == ["b.bin", "sub-a.bin", "sub/a.bin"]
    assert store.sizes("sub") == {"sub-a.bin": 0, "sub/a.bin": 3}
    versions = store.versions("sub")
    store.write("sub/a.bin", b"zyx")
    later = store.versions("sub")
    assert later.keys() == versions.keys() and later["sub/a.bin"] != versions["sub/a.bin"]
    assert later["sub-a.bin"] == versions["sub-a.bin"]
    store.write("sub/a.bin", b"xyz")
    assert store.list("sub/") == ["sub/a.bin"]
    assert store.list("none/") == []
    assert store.exists("sub/a.bin") and not store.exists("sub") and store.size("b.bin") == 10
    store.write("b.bin", b"new")
    assert store.read("b.bin") == b"new"
    with store.open_input("sub/a.bin") as file, store.open_stream("sub/a.bin") as stream:
        assert file.read_at(1, 2) == b"z" and stream.read() == b"xyz"
    store.delete("b.bin")
    store.delete("b.bin")
    store.delete_folder("sub")
    assert store.list() == ["sub-a.bin"]
    with pytest.raises(FileNotFoundError, match=r"b\.bin"):
        store.read("b.bin")


def test_a_file_that_is_replaced_all_the_time_is_read_whole(store):
    contents, end = [b"short", b"\x80" * 3000, b"of some length" * 40], threading.Event()
    store.write("x", contents[0])

    def replace_again_and_again():
        while not end.is_set():
            for content in contents:
                store.write("x", content)

    thread = threading.Thread(target=replace_again_and_again)
    thread.start()
    try:
        found, least, until = set(), 300, time.monotonic() + 30
        while (least := least - 1) > 0 or (found != set(contents) and time.monotonic() < until):
            found.add(store.read("x"))
    finally:
        end.set()
        thread.join()
    assert found == set(contents)


def test_replaced_only_if_it_is_the_version_that_was_read(store):
    assert store.replace("x", b"1", None) and not store.replace("x", b"2", None)
    content, version = store.read_version("x")
    assert content == b"1"
    assert store.replace("x", b"3", version) and not store.replace("x", b"4", version)
    assert store.read("x") == b"3"
    assert not store.replace("absent", b"5", version) and not store.exists("absent")
    if store.is_s3:
        store.delete("x", version)
        assert store.read("x") == b"3"
    store.delete("x", store.read_version("x")[1])
    assert not store.exists("x")


def test_a_server_without_conditional_writes(bucket, monkeypatch):
    def without(self, **request):
        if "IfMatch" in request or "IfNoneMatch" in request:
            raise ClientError({"Error": {"Code": "NotImplemented", "Message": "no such header"}}, "PutObject")
        return put(**request)

    store = Store(bucket)
    put = store._client().put_object
    monkeypatch.setattr(type(store._client()), "put_object", without)
    assert store.replace("x", b"1", None) and store.replace("x", b"2", "other")
    assert store.read("x") == b"2"


def test_a_failed_write_leaves_nothing_and_keeps_the_old(store):
    store.write("x", b"old")
    with pytest.raises(RuntimeError), store.create("x") as file:
        file.write(b"half of the new")
        raise RuntimeError
    assert store.read("x") == b"old" and store.list() == ["x"]
    if not store.is_s3:
        assert os.listdir(store.root) == ["x"]


def test_large_upload(bucket):
    data = os.urandom(20 << 20)  # several parts
    store = open_store(bucket, create=True)
    store.write("large", data)
    assert store.read("large") == data


def test_pickled_without_secrets(bucket):
    store = open_store(bucket, create=True)
    store.write("x", b"1")
    pickled = pickle.dumps(store)
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in pickled
    assert pickle.loads(pickled).read("x") == b"1"


def test_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Store("a/b/").uri == str(tmp_path / "a/b") == Store(f"file://{tmp_path}/a/b").uri
    assert Store("s3://bucket/p/").uri == "s3://bucket/p"
    assert Store("s3://bucket/p").address("x/y") == "s3://bucket/p/x/y"
    for wrong in ("gs://bucket/p", "s3://", "https://host/p"):
        with pytest.raises(UserError, match="s3://"):
            Store(wrong)


def test_folder_errors(tmp_path):
    with pytest.raises(UserError, match=r"nothing_here does not exist"):
        open_store(str(tmp_path / "nothing_here"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        open_store(str(tmp_path / "file"), create=True)
    for name in ("file/below", "n" * 300, "."):
        with pytest.raises(FileNotFoundError):
            Store(str(tmp_path)).read(name)


def _unused_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


MISTAKES = {
    "no bucket": ({}, "s3://no-such-bucket/p", "the bucket 'no-such-bucket' does not exist"),
    "empty prefix": ({}, "s3://vlmo/never-written", "is empty"),
    "secret": ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "s3://vlmo/p", "check AWS_SECRET_ACCESS_KEY"),
    "key": ({"AWS_ACCESS_KEY_ID": "wrong"}, "s3://vlmo/p", "check AWS_ACCESS_KEY_ID"),
    "refused": ({"AWS_ENDPOINT_URL": f"http://127.0.0.1:{_unused_port()}"}, "s3://vlmo/p", "cannot reach"),
    "unknown host": ({"AWS_ENDPOINT_URL": "http://host.invalid"}, "s3://vlmo/p", "cannot reach"),
    "not a URL": ({"AWS_ENDPOINT_URL": "http://"}, "s3://vlmo/p", "AWS_ENDPOINT_URL"),
}


@pytest.mark.parametrize("env, uri, message", MISTAKES.values(), ids=MISTAKES)
def test_s3_mistakes(s3_server, monkeypatch, env, uri, message):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    start = time.monotonic()
    with pytest.raises(UserError, match=message) as caught:
        open_store(uri)
    assert uri in str(caught.value)
    if "empty" not in message:
        with pytest.raises(UserError, match=message):
            open_store(uri, create=True)
        with pytest.raises(UserError, match=r"AWS_|bucket"):
            Store(uri).write("x", b"1")
    assert time.monotonic() - start < 20  # three attempts


def test_read_after_the_keys_went_wrong(bucket, monkeypatch):
    store = open_store(bucket, create=True)
    store.write("403.bin", b"1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match="check AWS_SECRET_ACCESS_KEY"):
        store.read("403.bin")
    with pytest.raises(UserError, match="denies access"):  # without an answer's body pyarrow learns no more
        store.read("403.bin", 0, 1)


def test_a_server_that_never_answers(s3_server, monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(UserError, match="cannot reach"):
            open_store("s3://vlmo/p")
        assert time.monotonic() - start < 15


def test_no_storm_of_retries(s3_server, monkeypatch):
    calls = []

    class Busy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            calls.append(self.path)
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(UserError, match="503"):
            open_store("s3://vlmo/p")
        server.shutdown()
    assert 1 <= len(calls) <= 3


def test_missing_server_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(UserError, match=r"pip install 'vlmo-ray\[demo\]'"), local_s3(tmp_path / "s3"):
        pass


def test_a_full_disk_is_told_with_the_address(tmp_path):
    """No file of this process may be larger than 1 kB for a moment, as when the disk is full."""
    source = tmp_path / "source"
    source.write_bytes(bytes(100_000))
    store = Store(str(tmp_path / "store"))
    free = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, free[1]))
    try:
        for attempt in (lambda: store.upload(source, "large"), lambda: store.write("large", bytes(100_000))):
            with pytest.raises(UserError, match=re.escape(store.address("large"))):
                attempt()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
    assert store.list() == []


def test_an_endpoint_of_the_aws_profile_is_used_by_all_clients(tmp_path, monkeypatch):
    config = tmp_path / "config"
    config.write_text(
        "[default]\nendpoint_url = http://127.0.0.1:1\nregion = eu-north-1\n"
        "[profile mine]\nservices = local\n[services local]\ns3 =\n  endpoint_url = http://127.0.0.1:2\n"
    )
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    assert (s3._settings()["endpoint"], s3._settings()["region"]) == ("http://127.0.0.1:1", "eu-north-1")
    assert s3.client().meta.endpoint_url == "http://127.0.0.1:1"
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1"):
        Store("s3://bucket/x").read("name")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    assert s3.client().meta.endpoint_url == "http://127.0.0.1:2"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:3")  # the environment comes first
    assert s3.client().meta.endpoint_url == "http://127.0.0.1:3"
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(UserError, match="nobody"):
        Store("s3://bucket/x").read("name")


def test_an_anonymous_address_sends_no_credentials(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    store = Store("s3://bucket/prefix/?anonymous")
    assert (store.uri, store.root) == ("s3://bucket/prefix?anonymous", "bucket/prefix")
    assert store.path("a/b") == "bucket/prefix/a/b" and store.address("a") == "s3://bucket/prefix/a"
    sent = []
    client = store._client()
    client.meta.events.register("before-send.s3", lambda request, **_: sent.append(dict(request.headers)))
    with pytest.raises(Exception, match="127"):
        client.get_object(Bucket="bucket", Key="x")
    assert sent and not any("Authorization" in headers for headers in sent)
    assert "'anonymous': True" in repr(store.fs.__reduce__())
    with pytest.raises(UserError, match=r"the only flag is \?anonymous"):
        Store("s3://bucket/prefix?public")


def test_a_session_token_without_its_keys_is_named(monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    with pytest.raises(UserError, match="AWS_SESSION_TOKEN is set without AWS_ACCESS_KEY_ID"):
        Store("s3://bucket/x").read("name")
