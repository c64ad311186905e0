"""A loopback HTTP server that speaks Ollama's protocol, and misbehaves on demand.

Real: sockets, HTTP, chunked NDJSON streams, error bodies and their statuses, /api/tags, /api/show, /api/ps,
/api/chat (options, format, think, keep_alive, silent truncation to num_ctx), /api/generate for loading and unloading.
Not real: the language model. What it says is the test's `answer(request)`, by default an entry of the schema's enum
drawn by the request's seed. A fault is used up by one chat request, in order:

    down      the connection is closed before any answer        500       an error body with that status
    broken    closed in the middle of the stream                 error     an error object in the stream
    garbage   a line that is no JSON                             list      a line that is JSON but no object
    html      a proxy's page with status 200                     length    cut by num_predict
    hang      nothing at all until the server stops              trickle   a token every 50 ms, for ever
    empty     an answer without content                          endless   content without end
    half      the prompt is cut to half and nobody says so

A model's dict may add fields to its /api/tags entry (`listed`) and to its /api/show answer (`shown`), or replace the
latter by a status and a body (`show_fault`). `refuse(request)` may answer a chat request with a status and an error.
"""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import loopback_server
from loopback_server import BYTES_PER_TOKEN, LoopbackServer

CODER = {"parameters": 1_540_000_000, "size": 1_100_000_000, "context": 32_768, "capabilities": ["completion"]}


def from_schema(request: dict[str, Any]) -> str:
    """What constrained decoding would give: any value that the schema allows, by the request's seed."""
    draw = random.Random(request["options"]["seed"])
    change = request["format"]["properties"]["change"]["enum"]
    return json.dumps({"reason": "the rate is too low", "change": draw.choice(change)})


class OllamaServer(LoopbackServer):
    """What is installed, loaded and asked."""

    def __init__(
        self,
        models: dict[str, dict[str, Any]] | None = None,
        answer: Callable[[dict[str, Any]], str] = from_schema,
        faults: tuple[str, ...] = (),
    ) -> None:
        self.models = {"qwen2.5-coder:1.5b": CODER} if models is None else models
        self.answer, self.faults = answer, list(faults)
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.loaded: dict[str, int] = {}  # name -> num_ctx
        self.unload_faults: list[str] = []  # "500" or "hang", used up by requests to unload
        self.unload_lag = 0.0  # seconds for which /api/ps goes on listing an unloaded model
        self.refuse: Callable[[dict[str, Any]], tuple[int, str] | None] = lambda request: None  # status and error
        self.forced_context = 0  # what the server loads whatever num_ctx asks for
        super().__init__(Handler)

    def stop(self) -> None:
        super().stop()
        self.loaded.clear()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def chats(self) -> list[dict[str, Any]]:
        """The chat requests that asked for an answer."""
        return [body for path, body in self.requests if path == "/api/chat" and body.get("messages")]

    def unload(self, name: str) -> None:
        if self.unload_lag:
            threading.Timer(self.unload_lag, self.loaded.pop, (name, None)).start()
        else:
            self.loaded.pop(name, None)


class Handler(loopback_server.Handler):
    events = "application/x-ndjson"

    def do_GET(self) -> None:
        self.hub.requests.append((self.path, {}))
        if self.path == "/api/tags":
            self.reply(200, {"models": [self.entry(name) for name in self.hub.models]})
        elif self.path == "/api/ps":
            loaded = dict(self.hub.loaded)
            models = [self.entry(name) | {"size_vram": 0, "context_length": loaded[name]} for name in loaded]
            self.reply(200, {"models": models})
        else:
            self.reply(404, "404 page not found")

    def do_POST(self) -> None:
        body = self.body()
        self.hub.requests.append((self.path, body))
        name = body.get("model", "")
        name = name if ":" in name else f"{name}:latest"
        if name not in self.hub.models:
            self.reply(404, {"error": f"model '{name}' not found"})
        elif self.path == "/api/show":
            self.reply(*self.hub.models[name].get("show_fault", (200, self.shown(name))))
        elif self.path in ("/api/chat", "/api/generate"):
            self.infer(name, body)
        else:
            self.reply(404, "404 page not found")

    def entry(self, name: str) -> dict[str, Any]:
        model = self.hub.models[name]
        told = {"name": name, "model": name, "size": model["size"], "digest": "0" * 64, "details": self.details(name)}
        return told | model.get("listed", {})

    def details(self, name: str) -> dict[str, Any]:
        size = f"{self.hub.models[name]['parameters'] / 1e9:.1f}B"
        return {"format": "gguf", "family": "qwen2", "parameter_size": size, "quantization_level": "Q4_K_M"}

    def shown(self, name: str) -> dict[str, Any]:
        model = self.hub.models[name]
        info = {
            "general.architecture": "qwen2",
            "general.parameter_count": model["parameters"],
            "qwen2.context_length": model["context"],
        }
        told = {"details": self.details(name), "model_info": info, "capabilities": model["capabilities"]}
        return told | model.get("shown", {})

    def infer(self, name: str, body: dict[str, Any]) -> None:
        if not (body.get("messages") or body.get("prompt")):
            unloads = body.get("keep_alive") == 0
            fault = self.hub.unload_faults.pop(0) if unloads and self.hub.unload_faults else ""
            if fault == "500":
                return self.reply(500, {"error": "server busy"})
            if fault == "hang":
                self.hub.stopping.wait()
            self.hub.unload(name) if unloads else self.hub.loaded.setdefault(name, 4096)
            reason = "unload" if unloads else "load"
            return self.reply(200, {"model": name, "response": "", "done": True, "done_reason": reason})
        if body.get("think") is not None and "thinking" not in self.hub.models[name]["capabilities"]:
            return self.reply(400, {"error": f'"{name}" does not support thinking'})
        if refusal := self.hub.refuse(body):
            return self.reply(refusal[0], {"error": refusal[1]})
        fault = self.hub.faults.pop(0) if self.hub.faults else ""
        if fault == "down":
            self.drop()
        elif fault == "500":
            self.reply(500, {"error": "llama runner process has terminated: exit status 2"})
        elif fault == "html":
            self.reply(200, "<html>Please log in</html>")
        elif fault == "hang":
            self.hub.stopping.wait()
        else:
            pieces = (line.encode() + b"\n" for line in self.lines(name, body, fault))
            self.stream(pieces, broken=fault == "broken")

    def lines(self, name: str, body: dict[str, Any], fault: str) -> Iterator[str]:
        """The NDJSON lines of one answer."""
        context = self.hub.forced_context or body["options"].get("num_ctx", 4096)
        self.hub.loaded[name] = context
        sent = int(sum(len(m["content"].encode()) for m in body["messages"]) / BYTES_PER_TOKEN)
        counted = min(sent, context - 1) // (2 if fault == "half" else 1)

        def log(text: str) -> str:
            return json.dumps({"model": name, "message": {"role": "assistant", "content": text}, "done": False})

        if fault in ("trickle", "endless"):
            while not self.hub.stopping.is_set():
                time.sleep(0.05 if fault == "trickle" else 0)
                yield log("so " if fault == "trickle" else "so " * 5000)
        text = "" if fault == "empty" else self.hub.answer(body)
        middle = len(text) // 2
        yield log(text[:middle])
        if fault == "error":
            yield json.dumps({"error": "an error was encountered while running the model: CUDA error"})
        elif fault == "garbage":
            yield "{half a li"
        elif fault == "list":
            yield "[1, 2]"
        yield log(text[middle:])
        last = {"done": True, "done_reason": "length" if fault == "length" else "stop"}
        last |= {"prompt_eval_count": counted, "eval_count": len(text) // 4, "load_duration": 1}
        yield json.dumps(json.loads(log("")) | last)
