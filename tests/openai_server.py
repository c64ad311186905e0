"""A loopback server that speaks OpenAI's protocol as llama-server, LM Studio or mlx_lm.server do, and misbehaves on
demand.

Real: sockets, HTTP, server-sent events, error bodies in the ways of different servers, /v1/models,
/v1/chat/completions, /props, LM Studio's /api/v1/models and its unload, the router's /models/unload. Not real: the
language model, as in ollama_server. A fault is used up by one chat request, in order:

    down     the connection is closed before any answer     401, 500, 503   an error body with that status
    broken   closed in the middle of the stream             error           an error object in the stream
    html     a page with status 404                         garbage         a line that is no JSON
    empty    no choices at all                              nothing         choices without content
    whole    one JSON object in place of a stream           length          cut at max_tokens
    hang     nothing until the server stops                 pings           comments for ever
    huge     content without end                            line            one line without end
    half     the prompt is cut to half
"""

import json
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import loopback_server
from loopback_server import BYTES_PER_TOKEN, LoopbackServer

LLAMA = {"owned_by": "llamacpp", "meta": {"n_params": 1_543_714_304, "size": 1_111_370_752, "n_ctx_train": 32_768}}


def from_schema(request: dict[str, Any]) -> str:
    """Any value that the schema allows, by the request's seed."""
    schema = request["response_format"]["json_schema"]["schema"]
    change = random.Random(request["seed"]).choice(schema["properties"]["change"]["enum"])
    return json.dumps({"reason": "the rate is too low", "change": change})


def encoded(line: str) -> bytes:
    """An event of the stream; a line that begins with NUL has no end."""
    return line[1:].encode() if line.startswith("\0") else line.encode() + b"\n\n"


class OpenAIServer(LoopbackServer):
    """What is served, loaded and asked. `product`: llama, mlx, router or lmstudio."""

    def __init__(
        self,
        models: tuple[str, ...] = ("models/qwen2.5-coder-1.5b-q4_k_m.gguf",),
        product: str = "llama",
        answer: Callable[[dict[str, Any]], str] = from_schema,
        faults: tuple[str, ...] = (),
    ) -> None:
        self.models, self.product, self.answer, self.faults = models, product, answer, list(faults)
        self.requests: list[tuple[str, dict[str, Any], str]] = []  # path, body, key
        self.loaded: set[str] = set()
        self.context = 8192
        self.listed: Any = None  # in place of the list of models
        self.refuse: Callable[[dict[str, Any]], tuple[int, Any] | None] = lambda request: None
        super().__init__(Handler)
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def chats(self) -> list[dict[str, Any]]:
        return [body for path, body, _ in self.requests if path == "/v1/chat/completions"]

    def entry(self, name: str) -> dict[str, Any]:
        """As /v1/models tells it."""
        entry = {"id": name, "object": "model"}
        if self.product == "llama":
            entry |= LLAMA
        elif self.product == "router":
            entry |= {"status": {"value": "loaded" if name in self.loaded else "unloaded"}}
        return entry

    def detail(self, name: str) -> dict[str, Any]:
        """As LM Studio's own route tells it."""
        instances = [{"id": f"{name}:2", "config": {"context_length": self.context}}] * (name in self.loaded)
        kind = "embedding" if "embed" in name else "llm"
        known = {"type": kind, "size_bytes": 4_700_000_000, "params_string": "7B", "max_context_length": 32_768}
        return {"key": name, "loaded_instances": instances} | known


class Handler(loopback_server.Handler):
    text, events = "text/html", "text/event-stream"

    def do_GET(self) -> None:
        hub = self.hub
        hub.requests.append((self.path, {}, self.headers.get("Authorization", "")))
        if self.path == "/v1/models":
            entries = {"object": "list", "data": [hub.entry(name) for name in hub.models]}
            self.reply(200, entries if hub.listed is None else hub.listed)
        elif self.path == "/props" and hub.product == "llama":
            self.reply(200, {"default_generation_settings": {"n_ctx": hub.context}, "total_slots": 1})
        elif self.path == "/api/v1/models" and hub.product == "lmstudio":
            self.reply(200, {"models": [hub.detail(name) for name in hub.models]})
        else:
            self.reply(404, {"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}})

    def do_POST(self) -> None:
        body = self.body()
        self.hub.requests.append((self.path, body, self.headers.get("Authorization", "")))
        if self.path == "/models/unload" and self.hub.product == "router":
            self.hub.loaded.discard(body["model"])
            self.reply(200, {"success": True})
        elif self.path == "/api/v1/models/unload" and self.hub.product == "lmstudio":
            self.hub.loaded.discard(body["instance_id"].removesuffix(":2"))
            self.reply(200, {"instance_id": body["instance_id"]})
        elif self.path == "/v1/chat/completions":
            self.chat(body)
        else:
            self.reply(404, {"error": {"code": 404, "message": "File Not Found"}})

    def chat(self, body: dict[str, Any]) -> None:
        if body["model"] not in self.hub.models:
            return self.reply(404, {"error": {"message": f"The model `{body['model']}` does not exist"}})
        if refusal := self.hub.refuse(body):
            return self.reply(refusal[0], refusal[1] if isinstance(refusal[1], str) else {"error": refusal[1]})
        fault = self.hub.faults.pop(0) if self.hub.faults else ""
        if fault == "down":
            self.drop()
        elif fault == "503":
            self.reply(503, {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}})
        elif fault in ("401", "500"):
            self.reply(int(fault), {"error": {"message": "Invalid API Key" if fault == "401" else "boom"}})
        elif fault == "html":
            self.reply(404, "<html><title>Nothing here</title></html>")
        elif fault == "hang":
            self.hub.stopping.wait()
        elif fault == "whole":
            self.hub.loaded.add(body["model"])
            message = {"role": "assistant", "content": self.hub.answer(body)}
            self.reply(200, {"choices": [{"message": message, "finish_reason": "stop"}], "usage": self.usage(body)})
        else:
            self.hub.loaded.add(body["model"])
            self.stream(map(encoded, self.lines(body, fault)), fault == "broken")

    def usage(self, body: dict[str, Any], share: float = 1.0) -> dict[str, int]:
        sent = sum(len(message["content"].encode()) for message in body["messages"]) / BYTES_PER_TOKEN
        return {"prompt_tokens": int(sent * share), "completion_tokens": 20}

    def lines(self, body: dict[str, Any], fault: str) -> Iterator[str]:
        """The lines of one streamed answer."""

        def chunk(content: str, reason: str | None = None) -> str:
            return "data: " + json.dumps({"choices": [{"delta": {"content": content}, "finish_reason": reason}]})

        while fault in ("pings", "huge", "line") and not self.hub.stopping.is_set():
            time.sleep(0.02 if fault == "pings" else 0)
            yield {"pings": ": ping", "huge": chunk("so " * 5000), "line": "\0" + "x" * 100_000}[fault]
        text = "" if fault in ("empty", "nothing") else self.hub.answer(body)
        middle = len(text) // 2
        if fault != "empty":
            yield chunk(text[:middle])
            if fault == "error":
                yield 'data: {"error": {"code": 500, "message": "Compute error."}}'
            elif fault == "garbage":
                yield "data: {half a li"
            yield chunk(text[middle:], "length" if fault == "length" else "stop")
        if "stream_options" in body:
            yield "data: " + json.dumps({"choices": [], "usage": self.usage(body, 0.5 if fault == "half" else 1.0)})
        yield "data: [DONE]"
