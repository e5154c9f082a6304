"""A hub served on 127.0.0.1 that answers huggingface_hub with the real one's headers, redirects and errors."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".bin", ".safetensors", ".parquet")  # the real hub stores these on another server and redirects there


@dataclass
class Repository:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False


@dataclass
class Hub:
    """Repositories by page (`owner/name`, `datasets/owner/name`), the requests so far, and the faults to simulate."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # by SHA-256
    requests: list[str] = field(default_factory=list)  # "GET path range"
    cuts: list[int] = field(default_factory=list)  # the next downloads of large files end after these numbers of bytes
    status: int = 200  # any other answers every request
    download_status: int = 200  # the same for large files
    token_refused: bool = False
    log_in_page: bool = False
    hanging: threading.Event = field(default_factory=threading.Event)  # answers wait until it is set
    before_answer: Callable[[str], None] = lambda path: None

    def add(self, page: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit to a branch and return its hash."""
        repository = self.repositories.setdefault(page, Repository())
        contents = b"".join(name.encode() + hashlib.sha1(data).digest() for name, data in sorted(files.items()))
        commit = hashlib.sha1(contents).hexdigest()
        repository.commits[commit] = files
        repository.branches[branch] = commit
        self.large |= {hashlib.sha256(data).hexdigest(): data for name, data in files.items() if name.endswith(LARGE)}
        return commit

    def downloads(self) -> list[str]:
        """Return the repository paths of the large files sent, each followed by the requested range, if any."""
        names = {
            hashlib.sha256(data).hexdigest(): name
            for repository in self.repositories.values()
            for files in repository.commits.values()
            for name, data in files.items()
        }
        sent = [request.removeprefix("GET /cdn/") for request in self.requests if request.startswith("GET /cdn/")]
        return [names[request[:64]] + request[64:] for request in sent]


@contextmanager
def serve() -> Iterator[Hub]:
    """Serve an empty hub until the block ends."""
    hub = Hub()
    hub.hanging.set()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _answer(hub, self)

        do_HEAD = do_GET

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.hanging.set()
        server.shutdown()
        thread.join()
        server.server_close()


def _answer(hub: Hub, request: BaseHTTPRequestHandler) -> None:
    path = urlsplit(request.path).path
    wanted = request.headers.get("Range", "")
    hub.requests.append(f"{request.command} {path} {wanted}".strip())
    hub.hanging.wait(20)  # a limit, so that no test hangs
    hub.before_answer(path)
    if hub.status != 200:
        return _send(request, hub.status, b"")
    if hub.log_in_page:
        return _send(request, 200, b"<html>Welcome to the airport. Accept our terms.</html>")
    if hub.token_refused:
        return _refuse(request, 401, "", "Invalid credentials in Authorization header")
    if path.startswith("/cdn/"):
        return _send_large(hub, request, hub.large[path.removeprefix("/cdn/")], wanted)

    is_api = path.startswith("/api/")
    page, _, rest = path.removeprefix("/api/models/").removeprefix("/api/").strip("/").partition(
        "/revision/" if is_api else "/resolve/"
    )  # fmt: skip
    repository = hub.repositories.get(page)
    if repository is None:
        # What clients that aren't logged in get. The real hub has sent it with the code and without.
        code = "RepoNotFound" if page.startswith("datasets/") else ""
        return _refuse(request, 401, code, "Invalid username or password.")
    revision, _, name = rest.partition("/")
    revision = unquote(revision) or "main"
    commit = repository.branches.get(revision, revision)
    if commit not in repository.commits:
        return _refuse(request, 404, "RevisionNotFound", f"Invalid rev id: {revision}")
    files = repository.commits[commit]
    if is_api:
        listing = {"id": page.removeprefix("datasets/"), "sha": commit, "private": False, "tags": [], "downloads": 0}
        listing["siblings"] = [{"rfilename": file} for file in reversed(files)]
        return _send(request, 200, json.dumps(listing).encode(), {"Content-Type": "application/json"})
    if repository.gated:
        return _refuse(request, 401, "GatedRepo", f"Access to model {page} is restricted.")
    headers = {"X-Repo-Commit": commit}
    name = unquote(name)
    if name not in files:
        return _refuse(request, 404, "EntryNotFound", "Entry not found", headers)
    if not name.endswith(LARGE):
        return _send(request, 200, files[name], headers | {"ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"'})
    digest = hashlib.sha256(files[name]).hexdigest()
    headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(files[name]))}
    return _send(request, 302, b"", headers | {"Location": f"{hub.url.replace('127.0.0.1', 'localhost')}/cdn/{digest}"})


def _send_large(hub: Hub, request: BaseHTTPRequestHandler, data: bytes, wanted: str) -> None:
    if hub.download_status != 200:
        return _send(request, hub.download_status, b"")
    start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
    headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if wanted else {}
    cut = hub.cuts.pop(0) if hub.cuts else None
    return _send(request, 206 if wanted else 200, data[start:], headers, cut)


def _refuse(request: BaseHTTPRequestHandler, status: int, code: str, message: str, headers: dict | None = None) -> None:
    headers = (headers or {}) | {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    _send(request, status, json.dumps({"error": message}).encode(), headers)


def _send(
    request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict | None = None, cut: int | None = None
) -> None:
    request.send_response(status)
    for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
        request.send_header(name, value)
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(body[:cut])
    request.close_connection = True
