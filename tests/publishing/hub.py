"""A Hugging Face hub on loopback: what `huggingface_hub` asks of one to make a model repository and to fill it.

It speaks the plain protocol (preupload, LFS batch, PUT, commit), not Xet, whose server side is not public.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = (".safetensors", ".png")  # what goes to the storage of large files, as by a real repository's .gitattributes


@dataclass
class Repository:
    visibility: str
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)  # their messages


class Hub:
    """What the server holds, and what came to it. Tests set `break_after` to make it fail."""

    def __init__(self, token: str, owner: str) -> None:
        self.token = token
        self.owner = owner
        self.url = ""
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # large files by SHA-256, committed or not
        self.arrived: list[tuple[str, int]] = []  # whole bodies of files, with their sizes
        self.broken = 0  # PUTs that the server cut off
        self.break_after: int | None = None  # bytes of a PUT after which the connection is cut


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that hangs up on a connection that was cut is no news."""


@contextmanager
def serving(token: str, owner: str) -> Iterator[Hub]:
    hub = Hub(token, owner)
    server = _Server(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            if not self._may():
                return None
            name = "/".join(self.path.split("/")[3:5])
            if not self.path.startswith("/api/models/") or name not in hub.repositories:
                return self._answer({"error": f"not here: {self.path}"}, 404)
            is_private = hub.repositories[name].visibility == "private"
            return self._answer({"id": name, "sha": "0" * 40, "private": is_private, "siblings": []})

        def do_POST(self) -> None:
            body = self._body()
            if not self._may():
                return None
            name = "/".join(self.path.split("/")[3:5])
            if self.path == "/api/repos/create":
                return self._create(json.loads(body))
            if self.path == "/api/validate-yaml":
                return self._answer({"errors": [], "warnings": []})
            if self.path.endswith(".git/info/lfs/objects/batch"):
                return self._batch(json.loads(body))
            if "/preupload/" in self.path:
                return self._preupload(hub.repositories[name], json.loads(body))
            if "/commit/" in self.path:
                return self._commit(name, [json.loads(line) for line in body.splitlines()])
            return self._answer({"error": f"not here: {self.path}"}, 404)

        def do_PUT(self) -> None:
            if self.path.startswith("/api/models/"):
                body = json.loads(self._body())
                if self._may():
                    hub.repositories["/".join(self.path.split("/")[3:5])].visibility = body["visibility"]
                    self._answer({})
                return
            # storage, whose addresses are signed: no token
            if hub.break_after is not None and int(self.headers["content-length"]) > hub.break_after:
                self.rfile.read(hub.break_after)
                hub.broken += 1
                self.close_connection = True
                self.connection.close()
                return
            body = self._body()
            assert self.path == f"/storage/{hashlib.sha256(body).hexdigest()}"
            hub.objects[self.path.removeprefix("/storage/")] = body
            hub.arrived.append((self.path, len(body)))
            self._answer({})

        def _create(self, wanted: dict[str, Any]) -> None:
            name = f"{wanted['organization']}/{wanted['name']}"
            if wanted["organization"] != hub.owner:
                return self._answer({"error": "You don't have the rights to create a model there"}, 403)
            known = name in hub.repositories
            if not known:
                hub.repositories[name] = Repository(wanted.get("visibility", "public"))
            return self._answer({"url": f"{hub.url}/{name}"}, 409 if known else 200)

        def _preupload(self, repository: Repository, wanted: dict[str, Any]) -> None:
            files = []
            for file in wanted["files"]:
                is_large = file["path"].endswith(LARGE)
                content = repository.files.get(file["path"])
                files.append(
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if is_large else "regular",
                        "shouldIgnore": False,
                        "oid": None if content is None else _sha256(content) if is_large else _git_hash(content),
                    }
                )
            self._answer({"files": files})

        def _batch(self, wanted: dict[str, Any]) -> None:
            objects = []
            for item in wanted["objects"]:
                actions = {"upload": {"href": f"{hub.url}/storage/{item['oid']}"}}
                objects.append(item if item["oid"] in hub.objects else item | {"actions": actions})
            self._answer({"transfer": "basic", "objects": objects})

        def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
            repository = hub.repositories[name]
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    repository.commits.append(value["summary"])
                elif line["key"] == "file":
                    content = base64.b64decode(value["content"])
                    repository.files[value["path"]] = content
                    hub.arrived.append((value["path"], len(content)))
                elif line["key"] == "lfsFile":
                    repository.files[value["path"]] = hub.objects[value["oid"]]
            oid = f"{len(repository.commits):040x}"
            self._answer({"commitUrl": f"{hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})

        def _may(self) -> bool:
            if self.headers["authorization"] == f"Bearer {hub.token}":
                return True
            self._answer({"error": "Invalid username or password."}, 401)
            return False

        def _body(self) -> bytes:
            if self.headers["transfer-encoding"] != "chunked":
                return self.rfile.read(int(self.headers["content-length"] or 0))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _answer(self, content: dict[str, Any], status: int = 200) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
