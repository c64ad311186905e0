"""The client of a server that speaks OpenAI's protocol: llama-server, mlx_lm.server, LM Studio and others.

Three routes and one stream, so httpx is enough, which the Ollama client brings: the package `openai` would add its
settings from the environment, retries and models of answers that these servers do not keep to. Its own API key is sent
to a server that was named, never to one that was found. How a server frees a model's memory is not part of the
protocol: LM Studio and llama-server's router are asked by routes of their own, another server keeps it, which is said.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx

from lab import network
from lab.agents.answers import MAX_ANSWER, THINKING
from lab.agents.briefing import NoProposal
from lab.agents.server import (
    CONNECT_SECONDS,
    CONTROL_SECONDS,
    PATIENCE,
    UNLOAD_SECONDS,
    Answer,
    Away,
    BadReply,
    Foreign,
    Model,
    ModelServer,
    Unavailable,
    Unusable,
    address,
    billions,
)
from lab.errors import UserError

PORT = 8080
USUAL_PORTS = (PORT, 1234, 8000)  # llama-server and mlx_lm.server; LM Studio; vLLM
FIND_SECONDS = 1.0  # for the list of models of a server on a usual port
MAX_STREAM = 20_000_000  # characters of one reply, with thoughts and what wraps each token
UNLOADED_CONTEXT = 4096  # tokens; LM Studio loads a model with about this many when it is asked for an answer
OPTIONAL = ("stream_options", "seed", "chat_template_kwargs")  # left out once a server refuses them
EMBEDDINGS = re.compile(r"embed|rerank|bge-|whisper", re.IGNORECASE)
SIZE = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?[bm])(?![a-z])", re.IGNORECASE)  # qwen2.5-coder-1.5b
BITS = re.compile(r"(\d+)-?bit|[qf]p?(\d+)", re.IGNORECASE)  # 4bit, Q4_K_M, fp16


class OpenAIServer(ModelServer):
    """One server. `base_url` is what OpenAI's clients call so: with its path, which is /v1 where it has none."""

    kind, title = "openai", "OpenAI-compatible"
    start = "llama-server -m FILE.gguf, mlx_lm.server --model NAME, or LM Studio's server"
    suggestion = "load a smaller one there, or name one with --model"

    def __init__(
        self,
        base_url: str,
        named: bool = True,  # by the user, not found on a usual port
        patience: float = PATIENCE,
        answer_seconds: float = 300.0,
        first_pause: float = 1.0,
        control_seconds: float = CONTROL_SECONDS,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        url = address(base_url, "BASE_URL", PORT)
        self.path = urlsplit(url).path.rstrip("/") or "/v1"
        url = url.removesuffix(urlsplit(url).path)
        super().__init__(url, url + self.path, patience, answer_seconds, first_pause, log)
        key = os.environ.get("OPENAI_API_KEY", "") if named else ""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limit = httpx.Timeout(control_seconds, connect=min(CONNECT_SECONDS, control_seconds))
        with network.explained():
            self.client = httpx.Client(base_url=self.url, timeout=limit, headers=headers, **self._limits())
        self.manager = ""  # "LM Studio" or "router": how to free memory
        self.left_out: set[str] = set()  # optional fields that the server refused
        self.known: tuple[str, ...] = ()  # models at the last look
        self.told = False  # that memory stays occupied

    def models(self) -> list[Model]:
        return self._patiently(self._models)

    def ask(
        self,
        model: str,
        system: str,
        prompt: str,
        options: Mapping[str, Any],
        schema: Mapping[str, Any] | None = None,
        think: bool | None = None,
    ) -> Answer:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        request = {"model": model, "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        request |= {key: options[key] for key in ("temperature", "seed")} | {"max_tokens": options["num_predict"]}
        if schema:
            named = {"name": "answer", "strict": True, "schema": schema}
            request["response_format"] = {"type": "json_schema", "json_schema": named}
        if think is False:
            request["chat_template_kwargs"] = {"enable_thinking": False}
        return self._patiently(lambda: self._without_refused(model, request), model)

    def unload(self, model: str) -> bool:
        """True once its memory is free, and where it is another machine's. A server that cannot be asked is named once;
        it is no news after that."""
        if not self.local:
            return True
        if not self.manager:
            if not self.told:
                self.log(f"{self.host} cannot be asked to unload {model}: its memory is occupied during every run")
            self.told = True
            return True
        deadline, asked = time.monotonic() + UNLOAD_SECONDS, []
        while time.monotonic() < deadline:
            try:
                with self.translated(""):
                    if not (loaded := self._loaded(model)):
                        return True
                    for path, body in (each for each in loaded if each not in asked):
                        self._json("POST", path, **body)
                        asked.append((path, body))
            except Away:
                return True
            except (Unavailable, Unusable, UserError) as error:
                self.log(f"could not unload {model}: {error}; trying again")
            time.sleep(min(1.0, self.first_pause))
        return False

    def same(self, one: str, other: str) -> bool:
        """The path to a file may be left out, as may its suffix."""
        return other in (one, one.rpartition("/")[2], one.rpartition("/")[2].removesuffix(".gguf"))

    def missing(self, model: str) -> str:
        listed = ", ".join(self.known) or "none"
        return f"the server at {self.host} has no model {model}; it lists: {listed}"

    def _meaning(self, status: int, text: str, model: str) -> Exception:
        if status in (401, 403) and not text.lstrip().startswith("<"):
            return UserError(f"the server at {self.host} answers {status}: set OPENAI_API_KEY to its key")
        return super()._meaning(status, text, model)

    def _models(self) -> list[Model]:
        """Its list, with what LM Studio and llama-server tell beyond the protocol."""
        entries = self._json("GET", f"{self.path}/models")["data"]
        self.known = tuple(entry["id"] for entry in entries)
        if any(not isinstance(name, str) for name in self.known):
            raise TypeError("a model without a name")
        self.manager = "router" if any("status" in entry for entry in entries) else ""
        details = {} if any(entry.get("meta") for entry in entries) or self.manager else self._details()
        self.manager = "LM Studio" if details else self.manager
        return [self._model(entry | details.get(entry["id"], {})) for entry in entries]

    def _details(self) -> dict[str, dict[str, Any]]:
        """LM Studio's models by name; {} for another server."""
        try:
            listed = self._json("GET", "/api/v1/models")["models"]
            return {entry["key"]: entry for entry in listed if "loaded_instances" in entry}
        except (BadReply, LookupError, TypeError):
            return {}

    def _model(self, entry: Mapping[str, Any]) -> Model:
        name, meta = entry["id"], entry.get("meta") or {}
        counted = meta.get("n_params")
        label = entry.get("params_string") or next(iter(SIZE.findall(name)), "")
        parameters = counted / 1e9 if isinstance(counted, int) else billions(label)
        bits = next((int(a or b) for a, b in BITS.findall(name)), 16)
        estimate = parameters * 1e9 * bits / 8
        return Model(
            name=name,
            bytes=int(meta.get("size") or entry.get("size_bytes") or estimate),
            parameters=parameters,
            context=self._context(entry, meta),
            thinks=True,  # nobody says; one that does not is told not to in vain
            completes=entry.get("type") not in ("embedding", "embeddings") and not EMBEDDINGS.search(name),
        )

    def _context(self, entry: Mapping[str, Any], meta: Mapping[str, Any]) -> int:
        """Tokens that the model is loaded with; those that it was made for where that is not told."""
        if self.manager == "LM Studio":
            most = entry.get("max_context_length") or UNLOADED_CONTEXT
            loaded = [each["config"]["context_length"] for each in entry["loaded_instances"]]
            return min(loaded or [min(most, UNLOADED_CONTEXT)])
        if meta and not self.manager:
            with contextlib.suppress(BadReply, LookupError, TypeError):
                return int(self._json("GET", "/props")["default_generation_settings"]["n_ctx"])
        return int(meta.get("n_ctx_train") or 0)

    def _loaded(self, model: str) -> list[tuple[str, dict[str, str]]]:
        """The requests that free what this model holds; [] once it holds nothing."""
        if self.manager == "LM Studio":
            instances = self._details().get(model, {}).get("loaded_instances", [])
            return [("/api/v1/models/unload", {"instance_id": each["id"]}) for each in instances]
        states = {entry["id"]: entry["status"]["value"] for entry in self._json("GET", f"{self.path}/models")["data"]}
        return [("/models/unload", {"model": model})] * (states.get(model) in ("loaded", "loading"))

    def _json(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        """The JSON object that the server answers. Raises BadReply for an error."""
        reply = self.client.request(method, path, json=body or None)
        if not reply.is_success:
            raise BadReply(reply.status_code, _error(reply.text))
        if not isinstance(answer := reply.json(), dict):
            raise TypeError("no object")
        return answer

    def _without_refused(self, model: str, request: dict[str, Any]) -> Answer:
        """An answer, asked for again without each optional field that the server refuses by name."""
        while True:
            try:
                return self._stream(model, {key: value for key, value in request.items() if key not in self.left_out})
            except BadReply as error:
                named = {key for key in OPTIONAL if key in request and key in str(error)} - self.left_out
                if error.status not in (400, 422) or not named:
                    raise
                self.left_out |= named

    def _stream(self, model: str, request: Mapping[str, Any]) -> Answer:
        """A streamed answer, or a whole one from a server that does not stream."""
        deadline = time.monotonic() + self.answer_seconds
        limit = httpx.Timeout(self.answer_seconds, connect=CONNECT_SECONDS)
        text, ended, usage = "", "", {}
        with self.client.stream("POST", f"{self.path}/chat/completions", json=request, timeout=limit) as reply:
            if not reply.is_success:
                raise BadReply(reply.status_code, _error(reply.read().decode(errors="replace")))
            for chunk in _chunks(reply, deadline):
                if "error" in chunk:
                    raise BadReply(-1, _error(json.dumps(chunk)))
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"][:1]:
                    text += (choice.get("delta") or choice.get("message") or {}).get("content") or ""
                    ended = choice.get("finish_reason") or ended or "no"
                if len(text) > MAX_ANSWER:
                    raise Unusable(f"the answer is longer than {MAX_ANSWER // 1000} kB")
        if not ended:
            raise Unusable("the answer has no choices")
        if ended == "length" and THINKING.sub("", text).strip():
            raise Unusable("the answer was cut at its length limit")
        return Answer(text, usage.get("prompt_tokens"), usage.get("completion_tokens") or 0)


def _chunks(reply: httpx.Response, deadline: float) -> Iterator[dict[str, Any]]:
    """The JSON objects of a reply: of each `data:` line of a stream, or of the whole body. Raises Unavailable when the
    stream ends before it is complete."""
    streams = "event-stream" in reply.headers.get("content-type", "")
    rest, size, complete = "", 0, False
    for piece in reply.iter_text():
        size += len(piece)
        if time.monotonic() > deadline:
            raise NoProposal("no complete answer within the time for one")
        if size > MAX_STREAM:
            raise Unusable(f"the reply is longer than {MAX_STREAM // 10**6} MB")
        *lines, rest = (rest + piece).split("\n") if streams else (rest + piece,)
        for line in lines:
            data = line.strip().removeprefix("data:").strip() if line.startswith("data:") else ""
            complete = complete or data == "[DONE]"
            if data and data != "[DONE]":
                chunk = json.loads(data)
                complete = complete or any(choice.get("finish_reason") for choice in chunk.get("choices", ()))
                yield chunk
    if not streams:
        yield json.loads(rest)
    elif not complete:
        raise Unavailable("the connection closed before the answer was complete")


def _error(body: str) -> str:
    """The message of an error in the ways that servers write it, or the body."""
    with contextlib.suppress(ValueError, AttributeError):
        record = json.loads(body)
        error = record.get("error") or record.get("detail") or record.get("message") or body
        return str(error.get("message") or error) if isinstance(error, dict) else str(error)
    return body


def found(log: Callable[[str], None] = lambda line: None) -> Iterator[OpenAIServer]:
    """Servers on the usual ports of this machine that list a model."""
    for port in USUAL_PORTS:
        url = f"http://127.0.0.1:{port}"
        with contextlib.suppress(UserError, NoProposal, Foreign):
            glance = OpenAIServer(url, named=False, patience=0.0, control_seconds=FIND_SECONDS)
            if any(model.completes for model in glance.models()):
                yield OpenAIServer(url, named=False, log=log)
