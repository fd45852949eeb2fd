"""A Hugging Face hub small enough for tests: repositories in memory, over HTTP on this machine."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def commit(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


class FakeHub(ThreadingHTTPServer):
    """Serves `repositories`, name -> file -> content, and takes new ones from whoever shows `TOKEN`.

    Another revision than the main branch is the repository `name@revision`.
    """

    TOKEN = "hf_for_tests"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.gated: set[str] = set()
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode())

    def files(self, name: str, revision: str) -> dict[str, bytes] | None:
        """A repository's files, by a revision's name or commit; None when the refusal has been sent."""
        revisions = [key.partition("@")[2] or "main" for key in self.server.repositories if key.split("@")[0] == name]
        found = next((one for one in revisions if revision in (one, commit(one))), None)
        if name in self.server.gated:
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif found is None:
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound" if revisions else "RepoNotFound"})
        else:
            return self.server.repositories[name if found == "main" else f"{name}@{found}"]
        return None

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/([\w.-]+)", self.path.partition("?")[0]):
            files = self.files(match[1], match[2])
            if files is not None:
                siblings = [{"rfilename": file} for file in files]
                self.answer_json({"id": match[1], "modelId": match[1], "sha": commit(match[2]), "siblings": siblings})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(\w+)", self.path.partition("?")[0]):
            files = self.files(match[1], match[2])
            if files is not None:
                entries = [
                    {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for file, content in files.items()
                ]
                self.answer_json(entries)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(\w+)/(.+)", self.path):
            files = self.files(match[1], match[2])
            if files is not None:
                content = files[match[3]]
                headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": match[2]}
                self.answer(200, content, headers)
        else:
            self.answer(404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {self.server.TOKEN}":
            self.answer(401, b'{"error": "Invalid credentials"}')
        elif self.path == "/api/validate-yaml":
            self.answer_json({"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.private[name] = asked.get("private", asked.get("visibility") == "private")
            self.server.repositories.setdefault(name, {})
            self.answer_json({"url": f"{self.server.url}/{name}"})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", self.path):
            asked = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
            self.answer_json({"files": modes})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.repositories[match[1]][line["value"]["path"]] = content
            url = f"{self.server.url}/{match[1]}/commit/{commit('main')}"
            self.answer_json({"commitUrl": url, "commitOid": commit("main"), "hookOutput": ""})
        else:
            self.answer(404)
