"""A real HTTP server that speaks OpenAI's embeddings protocol, and misbehaves as it is told."""

import hashlib
import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

WIDTH = 8
KEY = "sk-secret-0123456789"
TEXTS = [f"text number {i}" for i in range(40)]
Api = Callable[..., Any]  # the fixture `api`: settings -> HttpEmbedder


def vector(text: str, width: int = WIDTH) -> list[float]:
    """A unit vector made of the text."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
    values = np.random.default_rng(seed).normal(size=width)
    return (values / np.linalg.norm(values)).tolist()


EXPECTED = np.array([vector(text) for text in TEXTS], np.float32)


def answer(texts: list[str], width: int = WIDTH) -> dict[str, Any]:
    data = [{"object": "embedding", "index": i, "embedding": vector(text, width)} for i, text in enumerate(texts)]
    # As an API that counts a token a word; real ones count more, but never more than bytes.
    return {"object": "list", "data": data, "usage": {"total_tokens": sum(len(text.split()) for text in texts)}}


Reply = tuple[int, dict[str, str], bytes]
Behaviour = Callable[[dict[str, Any]], Reply | None]  # None: what it should be


def status(code: int, message: str = "", headers: dict[str, str] | None = None, error_code: str = "") -> Behaviour:
    body = json.dumps({"error": {"message": message, "code": error_code or None}}).encode()
    return lambda request: (code, headers or {}, body)


def raw(body: bytes, code: int = 200) -> Behaviour:
    return lambda request: (code, {}, body)


def changed(change: Callable[[dict[str, Any]], Any]) -> Behaviour:
    """A good answer, changed in place, or replaced by what `change` returns."""

    def behave(request: dict[str, Any]) -> Reply:
        good = answer(request["input"])
        return 200, {}, json.dumps(change(good) or good).encode()

    return behave


class Endpoint:
    """What it was asked and how; `then` queues behaviours, one for each of the next requests."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.authorizations: set[str | None] = set()
        self.paid: Counter[str] = Counter()  # texts that were embedded and sent
        self.times: list[float] = []
        self.most_at_once = 0
        self.url = ""
        self.always: Behaviour | None = None
        self._next: deque[Behaviour] = deque()
        self._at_once = 0
        self._lock = threading.Lock()

    def then(self, *behaviours: Behaviour) -> None:
        self._next.extend(behaviours)

    def handle(self, path: str, authorization: str | None, request: dict[str, Any]) -> Reply:
        with self._lock:
            self.requests.append(request)
            self.times.append(time.monotonic())
            self.authorizations.add(authorization)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            behave = self._next.popleft() if self._next else self.always
        try:
            if path != "/v1/embeddings":
                return 404, {}, b'{"detail": "Not Found"}'
            reply = behave(request) if behave else None
            if reply is None:
                reply = 200, {}, json.dumps(answer(request["input"], request.get("dimensions", WIDTH))).encode()
            if reply[0] == 200:
                with self._lock:
                    self.paid.update(request["input"])
            return reply
        finally:
            with self._lock:
                self._at_once -= 1


@contextmanager
def serve() -> Iterator[Endpoint]:
    endpoint = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            code, headers, body = endpoint.handle(self.path, self.headers["Authorization"], request)
            try:
                self.send_response(code)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)
                # A Content-Length that promises more: the connection breaks in the middle of the body.
                self.close_connection = headers.get("Content-Length") is not None
            except OSError:  # the client has gone
                self.close_connection = True

        def log_message(self, *_: Any) -> None: ...

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, *_: Any) -> None: ...  # clients that are killed break connections

    server = Server(("127.0.0.1", 0), Handler)
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
