"""A page to search an index with texts and pictures, on Ray Serve."""

from __future__ import annotations

import hashlib
import hmac
import importlib.resources
import json
import socket
import time
from typing import Any

import numpy as np

from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.search.index import Found, Index, Queries
from vlmo_ray.search.sheet import thumbnail

_LARGEST = 20 << 20  # bytes of a picture that is asked with
_MOST = 200  # results
COOKIE = "vlmo_token"
_NAME = "vlmo-search"  # of the application


class Search:
    """Answers requests: the page, results as JSON, pictures. Made once in each replica."""

    def __init__(self, index: str, model: str = "", token: str = "", fast: bool = False):
        self.index = Index(index)
        self.queries = Queries(self.index, model)
        self.token, self.fast = token, fast
        self.index.keep(fast)
        self.cookie = hashlib.sha256(f"vlmo search {token}".encode()).hexdigest()
        self.page = (importlib.resources.files("vlmo_ray.search") / "serve.html").read_text()

    def answer(
        self, method: str, path: str, asked: dict[str, str], body: bytes, token: str = ""
    ) -> tuple[int, str, bytes, dict[str, str]]:
        """(status, type, content, headers) for a request; `asked` are its query parameters, `token` its secret."""
        headers: dict[str, str] = {}
        if self.token:
            given = asked.get("token", token).encode()
            if not any(hmac.compare_digest(given, right.encode()) for right in (self.token, self.cookie)):
                return self._problem(
                    401, "this page asks for a token: open it with ?token=... at the end of its address"
                )
            if "token" in asked:
                headers["Set-Cookie"] = f"{COOKIE}={self.cookie}; HttpOnly; SameSite=Strict; Path=/"
        try:
            if (method, path) == ("GET", "/"):
                return 200, "text/html; charset=utf-8", self.page.encode(), headers
            if (method, path) == ("GET", "/about"):
                return self._json(self._about())
            if (method, path) == ("GET", "/search"):
                return self._json(self._results(self.queries.text(asked.get("q", "")), asked))
            if (method, path) == ("POST", "/search"):
                if len(body) > _LARGEST:
                    return self._problem(413, f"the picture is larger than {_LARGEST >> 20} MB")
                return self._json(self._results(self.queries.image(body), asked))
            if (method, path) == ("GET", "/image"):
                return self._image(asked)
        except UserError as error:
            return self._problem(400, str(error))
        return self._problem(404, f"there is no {method} {path}")

    def _about(self) -> dict[str, Any]:
        found = self.index.embedding
        return {"data": found.data, "what": found.what, "rows": found.rows}

    def _results(self, vector: np.ndarray, asked: dict[str, str]) -> dict[str, Any]:
        top = asked.get("top", "24")
        if not _is_number(top) or not 1 <= int(top) <= _MOST:
            raise UserError(f"top={top} must be from 1 to {_MOST}")
        began = time.perf_counter()
        [results] = (self.index.search_fast if self.fast else self.index.search)(vector, int(top))
        shown = [self._shown(found) for found in results]
        return {"results": shown, "seconds": time.perf_counter() - began}

    def _shown(self, found: Found) -> dict[str, Any]:
        values = self.index.record(found).values
        image = f"/image?chunk={found.chunk}&row={found.row}" if "image" in values else ""
        return {
            "id": found.id, "score": found.score, "address": found.address, "text": values.get("text", ""),
            "image": image,
        }  # fmt: skip

    def _image(self, asked: dict[str, str]) -> tuple[int, str, bytes, dict[str, str]]:
        chunk, row = asked.get("chunk", ""), asked.get("row", "")
        if not (_is_number(chunk) and _is_number(row)):
            raise UserError("an image is named by its chunk and its row")
        record = self.index.record_at(int(chunk), int(row))
        data = thumbnail(record.values["image"]) if record and "image" in record.values else b""
        if not data:
            return self._problem(404, "there is no such image")
        return 200, "image/jpeg", data, {"Cache-Control": "private, max-age=3600"}

    def _json(self, content: dict[str, Any]) -> tuple[int, str, bytes, dict[str, str]]:
        return 200, "application/json", json.dumps(content).encode(), {}

    def _problem(self, status: int, sentence: str) -> tuple[int, str, bytes, dict[str, str]]:
        return status, "application/json", json.dumps({"problem": sentence}).encode(), {}


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def end() -> None:
    """Ends the page; where Ray Serve was started for it, the rest goes with the Ray of this process."""
    from ray import serve as ray_serve

    ray_serve.delete(_NAME)


def serve(
    index: str, *, model: str = "", token: str = "", fast: bool = False, host: str = "127.0.0.1", port: int = 8000
) -> str:
    """Starts the page on the Ray cluster and returns its address; it stays until `ray.serve.shutdown`.

    Args:
        index: what `vlmo embed` wrote.
        model: where the model is by now, if not where it was.
        token: a secret that every request must bring, in the address, a cookie or as a bearer; "": none.
        fast: whether faiss answers.
        host: the address that is listened on; 0.0.0.0 lets other machines in, and then takes a token.
        port: the port.

    Raises UserError for an index that cannot be searched, a missing extra, and an open page without a token.
    """
    if host not in ("127.0.0.1", "localhost") and not token:
        raise UserError(f"--host {host} lets other machines in: set VLMO_SEARCH_TOKEN to a secret first")
    try:
        from ray import serve as ray_serve
        from starlette.requests import Request
        from starlette.responses import Response
    except ImportError as error:
        raise UserError(f"Ray Serve is not installed ({error}): pip install 'vlmo-ray[serve]'") from error
    index, model = Store(index).uri, model and Store(model).uri  # a replica has another working directory
    Search(index, model, token, fast)  # here its errors are sentences
    if ray_serve.status().proxies:
        raise UserError("Ray Serve runs on this cluster already, with a host and a port of its own; end it first")

    @ray_serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=8)
    class Page:
        def __init__(self):
            self.search = Search(index, model, token, fast)

        async def __call__(self, request: Request) -> Response:
            body = b""
            async for part in request.stream():
                body += part
                if len(body) > _LARGEST:
                    break
            bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
            secret = bearer or request.cookies.get(COOKIE, "")
            asked = dict(request.query_params)
            status, kind, content, headers = self.search.answer(request.method, request.url.path, asked, body, secret)
            return Response(content, status, headers, kind)

    with socket.socket() as probe:
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"{host}:{port} cannot be listened on ({error.strerror}); give another --port") from error
    ray_serve.start(http_options={"host": host, "port": port})
    ray_serve.run(Page.bind(), name=_NAME, route_prefix="/")
    return f"http://{host}:{port}/"
