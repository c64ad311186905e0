"""What the loopback servers of the tests share: sockets, threads, streams, and a page of another program."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

BYTES_PER_TOKEN = 3.6
LOGIN = "<html><head><title>Sign in to the model proxy</title></head></html>"


class LoopbackServer:
    """Serves from construction until `stop()`; `start()` serves again on the same port."""

    def __init__(self, handler: type["Handler"]) -> None:
        self.handler, self.port = handler, 0
        self.start()

    def start(self) -> None:
        self.stopping = threading.Event()
        self.connections: list[socket.socket] = []
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), type("Bound", (self.handler,), {"hub": self}))
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.stopping.set()
        self.http.shutdown()
        self.http.server_close()
        for connection in self.connections:  # kept-alive ones end with the server, as when a process ends
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    text: ClassVar[str] = "text/plain"  # type of a reply that is not JSON
    events: ClassVar[str]  # type of a stream
    hub: Any

    def setup(self) -> None:
        super().setup()
        self.hub.connections.append(self.connection)

    def log_message(self, *args: Any) -> None:
        pass

    def body(self) -> dict[str, Any]:
        return json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def drop(self) -> None:
        """Close the connection without an answer."""
        self.connection.close()
        self.close_connection = True

    def stream(self, pieces: Iterator[bytes], broken: bool) -> None:
        """A chunk for each piece; `broken`: the connection ends after the first."""
        self.send_response(200)
        self.send_header("Content-Type", self.events)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for data in pieces:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
                self.wfile.flush()
                if broken:
                    self.close_connection = True
                    return
            self.wfile.write(b"0\r\n\r\n")
        except OSError:  # the client hung up, which cancels the answer
            self.close_connection = True

    def reply(self, status: int, content: Any) -> None:
        """Text as it is, anything else as JSON."""
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", self.text if isinstance(content, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Page:
    """Another program on a port: one answer to every request, which it records."""

    def __init__(self, status: int, body: str, kind: str = "text/html", location: str = "") -> None:
        self.requests: list[str] = []

        class Answer(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:
                self.requests.append(handler.path)
                handler.send_response(status)
                handler.send_header("Content-Type", kind)
                handler.send_header("Content-Length", str(len(body)))
                if location:
                    handler.send_header("Location", location)
                handler.end_headers()
                handler.wfile.write(body.encode())

            do_POST = do_HEAD = do_GET

            def log_message(handler, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()
