"""A loopback HTTP server that speaks the part of the Hugging Face hub's API that `datasets` streaming uses.

It serves one dataset repository from memory: repository info, file tree, paths-info, and file content with ranges. It
records every request and misbehaves on demand: an answer with an error status, a connection cut in the middle of a
body, a slow answer, other content. Not covered: git, Xet, redirects to a content network, uploads.

    with serve({"a.parquet": parquet(["one", "two"])}, repo="owner/name") as server:
        subprocess.run(..., env=os.environ | {"HF_ENDPOINT": server.url})
"""

import hashlib
import io
import json
import re
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

REVISION = hashlib.sha1(b"the only commit").hexdigest()
ERROR_CODES = {401: "GatedRepo", 403: "GatedRepo"}


def parquet(texts: Iterable[str | None], column: str = "text", rows_per_group: int = 1000, **more: list) -> bytes:
    """A parquet file with one text column and the columns `more`."""
    sink = io.BytesIO()
    table = pa.table({column: pa.array(list(texts), pa.string()), **more})
    pq.write_table(table, sink, row_group_size=rows_per_group, compression="none")
    return sink.getvalue()


@dataclass
class Fault:
    """What goes wrong with requests whose path contains `path`."""

    path: str
    status: int = 0  # answer with this status instead
    cut: int | None = None  # close the connection after this many bytes of the body
    seconds: float = 0.0  # wait this long before answering
    content: bytes | None = None  # serve this instead
    skip: int = 0  # let this many matching requests pass first
    times: int = 1_000_000  # requests that go wrong


@dataclass
class Request:
    method: str
    path: str
    status: int
    sent: int  # bytes of body that went out


@dataclass
class Server:
    """The repository that is served, its faults, and what was asked of it."""

    files: dict[str, bytes]
    repo: str
    token: str  # required as a bearer token if not empty
    revision: str = REVISION
    url: str = ""
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def sent(self, name: str) -> int:
        """Bytes of the file `name` that went out."""
        return sum(request.sent for request in self.requests if request.path.endswith("/" + name))

    def fault(self, path: str) -> Fault | None:
        """The first fault that applies to this request, counted down."""
        with self.lock:
            for fault in self.faults:
                if fault.path in path and fault.times > 0:
                    fault.skip -= 1
                    fault.times -= fault.skip < 0
                    return fault if fault.skip < 0 else None
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Server

    def do_GET(self) -> None:
        self.handle_request()

    do_HEAD = do_POST = do_GET

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        posted = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        fault = self.hub.fault(path) or Fault("")
        time.sleep(fault.seconds)
        if fault.status:
            return self.answer(path, fault.status, b"", fault, ERROR_CODES.get(fault.status, ""))
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.answer(path, 401, b"", fault, "GatedRepo")
        self.route(path, posted, fault)

    def route(self, path: str, posted: str, fault: Fault) -> None:
        api, files = f"/api/datasets/{self.hub.repo}", f"/datasets/{self.hub.repo}/resolve/"
        if path == api or path.startswith(f"{api}/revision/"):
            return self.answer(path, 200, json.dumps(self.info()).encode(), fault)
        if path.startswith(f"{api}/tree/") or path.startswith(f"{api}/paths-info/"):
            wanted = re.findall(r"paths=([^&]*)", posted)
            entries = [e for e in self.tree() if not wanted or e["path"] in map(unquote, wanted)]
            return self.answer(path, 200, json.dumps(entries).encode(), fault)
        if path.startswith(files):
            name = path.removeprefix(files).partition("/")[2]
            content = self.hub.files.get(name)
            if content is None:
                return self.answer(path, 404, b"", fault, "EntryNotFound")
            return self.answer(path, 200, content if fault.content is None else fault.content, fault)
        self.answer(path, 404, b"", fault, "RepoNotFound")

    def info(self) -> dict:
        siblings = [{"rfilename": name} for name in self.hub.files]
        return {"_id": "1", "id": self.hub.repo, "sha": self.hub.revision, "siblings": siblings, "tags": []}

    def tree(self) -> list[dict]:
        return [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in self.hub.files.items()
        ]

    def answer(self, path: str, status: int, content: bytes, fault: Fault, code: str = "") -> None:
        """Send a range of `content` or all of it, or as much as the fault lets through."""
        extra = {"X-Error-Code": code, "ETag": hashlib.sha1(content).hexdigest(), "X-Repo-Commit": self.hub.revision}
        if status == 200 and (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            start, stop = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
            extra["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            status, content = 206, content[start:stop]
        self.send_response(status)
        for name, value in extra.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        body = b"" if self.command == "HEAD" else content if fault.cut is None else content[: fault.cut]
        self.hub.requests.append(Request(self.command, path, status, len(body)))
        self.wfile.write(body)
        self.close_connection = fault.cut is not None or self.close_connection

    def log_message(self, *_: object) -> None:
        """Requests are kept in Server.requests instead of being printed."""


@contextmanager
def serve(
    files: dict[str, bytes], repo: str = "owner/stories", faults: Iterable[Fault] = (), token: str = ""
) -> Iterator[Server]:
    """Serve `files` as the dataset `repo` on 127.0.0.1 until the block ends."""
    hub = Server(files, repo, token, faults=list(faults))
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    httpd.daemon_threads = True
    httpd.handle_error = lambda *_: None  # a client that hangs up, or is killed, is part of the tests
    hub.url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()
