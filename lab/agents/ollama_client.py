"""The client of an Ollama server.

It wraps the official client; see lab.agents.server for what it makes of failures. Not covered: Ollama's /v1 routes,
which ignore num_ctx, and pulling models, which is the user's decision.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx

from lab import network
from lab.agents.answers import MAX_ANSWER
from lab.agents.briefing import NoProposal
from lab.agents.server import (
    CONNECT_SECONDS,
    CONTROL_SECONDS,
    LONGEST_PAUSE,
    PATIENCE,
    UNLOAD_SECONDS,
    Answer,
    Away,
    BadReply,
    Model,
    ModelServer,
    Unavailable,
    Unusable,
    address,
    billions,
)
from lab.errors import UserError

with network.hidden("OLLAMA_HOST"):  # importing ollama creates a client, which fails on an invalid value
    import ollama

PORT = 11434
LEAST_WEIGHTS = 1_000_000  # bytes; a model that runs elsewhere is listed with some hundred (382 seen)
CLOUD_NAME = re.compile(r"[:-]cloud(:|$)", re.IGNORECASE)  # gpt-oss:120b-cloud, glm-4.6:cloud
CLOUD_HOST = "ollama.com"  # default host of cloud models


class Client(ollama.Client):
    """The official client plus raw answers: its types drop the fields for models that run elsewhere."""

    def answer(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        """The JSON object that the server answers. Raises BadReply for anything else."""
        reply = self._client.request(method, path, json=body or None)
        try:
            body_json = reply.json()
        except ValueError:
            body_json = None
        if reply.is_success and isinstance(body_json, dict):
            return body_json
        text = body_json.get("error") if isinstance(body_json, dict) else None
        raise BadReply(reply.status_code, str(text or reply.text))


class Server(ModelServer):
    """One Ollama server; `host` as in OLLAMA_HOST, which is used when it is empty."""

    kind, title, start = "ollama", "Ollama", "ollama serve"
    suggestion = "run: ollama pull qwen2.5-coder:1.5b"

    def __init__(
        self,
        host: str = "",
        patience: float = PATIENCE,
        answer_seconds: float = 300.0,
        first_pause: float = 1.0,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        url = address(host or os.environ.get("OLLAMA_HOST", ""), "OLLAMA_HOST", PORT)
        shown = url if host or "OLLAMA_HOST" not in os.environ else f"{url} (OLLAMA_HOST)"
        super().__init__(url, shown, patience, answer_seconds, first_pause, log)
        limits = [httpx.Timeout(seconds, connect=CONNECT_SECONDS) for seconds in (answer_seconds, CONTROL_SECONDS)]
        with network.explained():
            self.client, self.control = (Client(self.url, timeout=limit, **self._limits()) for limit in limits)

    def models(self) -> list[Model]:
        """Installed models and their capabilities; those whose details cannot be read are in `unread`."""
        models, self.unread = [], {}
        for name, entry in self._patiently(self._listed).items():
            try:
                with self.translated(name):
                    models.append(self._model(name, entry))
            except (Unavailable, Unusable, UserError) as reason:
                self.unread[name] = f"{name} is installed, but the server cannot show it: {reason}"
        return models

    def absent(self) -> str:
        """Why no Ollama server answers here; "" if one does."""
        try:
            self._patiently(self._listed)
            return ""
        except (NoProposal, UserError) as reason:
            return str(reason)

    def refuse_if_moved(self, model: Model) -> None:
        """Raise NoProposal when `model` runs elsewhere now and did not when it was chosen."""
        entry = {"size": model.bytes, "remote_host": model.remote}
        if (now := self._patiently(lambda: self._model(model.name, entry), model.name)).remote != model.remote:
            raise NoProposal(f"{model.name} now runs at {now.remote}; train.py is not sent there unasked")

    def ask(
        self,
        model: str,
        system: str,
        prompt: str,
        options: Mapping[str, Any],
        schema: Mapping[str, Any] | None = None,
        think: bool | None = None,
    ) -> Answer:
        """One streamed answer. Raises Unusable when it is cut, empty, endless or a broken request; NoProposal."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        request = {"messages": messages, "options": dict(options), "think": think, "format": schema}
        return self._patiently(lambda: self._stream(model, request), model)

    def context(self, model: str) -> int | None:
        """Tokens of context that the loaded model really has; None when the server does not say."""
        for entry in self._patiently(lambda: self.control.ps().models):
            if full_name(entry.model or entry.name or "") == full_name(model):
                return entry.context_length
        return None

    def unload(self, model: str) -> bool:
        """Free the model's memory; True once /api/ps no longer lists it. A server that is away holds nothing."""
        deadline, asked, pause = time.monotonic() + UNLOAD_SECONDS, False, min(0.25, self.first_pause)
        while time.monotonic() < deadline:
            try:
                with self.translated(model):
                    if not asked:
                        self.control.generate(model, "", keep_alive=0)
                    asked = True
                    loaded = [full_name(entry.model or entry.name or "") for entry in self.control.ps().models]
                if full_name(model) not in loaded:
                    return True
            except (Away, UserError):  # the server, or the model itself, is gone
                return True
            except (Unavailable, Unusable) as error:
                self.log(f"could not unload {model}: {error}; trying again")
                pause = min(2 * pause, LONGEST_PAUSE)
            time.sleep(pause)
        return False

    def _listed(self) -> dict[str, dict[str, Any]]:
        """/api/tags by name."""
        entries = self.control.answer("GET", "/api/tags")["models"] or []
        named = {str(entry.get("model") or entry["name"]): entry for entry in entries}
        return {name: entry for name, entry in named.items() if name.isprintable()}

    def _model(self, name: str, entry: Mapping[str, Any]) -> Model:
        """A model from its entry in /api/tags and what /api/show adds."""
        shown = self.control.answer("POST", "/api/show", model=name)
        info = shown.get("model_info") or {}
        contexts = [_count(value) for key, value in info.items() if key.endswith(".context_length")]
        counted = _count(info.get("general.parameter_count"))
        label = (shown.get("details") or {}).get("parameter_size")
        abilities = shown.get("capabilities")
        size = _count(entry.get("size"))
        return Model(
            name=name,
            bytes=size,
            parameters=counted / 1e9 if counted else billions(label or ""),
            context=max(contexts, default=0),
            thinks="thinking" in (abilities or ()),
            completes=abilities is None or "completion" in abilities,
            remote=_host(entry) or _host(shown) or CLOUD_HOST * bool(size < LEAST_WEIGHTS or CLOUD_NAME.search(name)),
        )

    def _stream(self, model: str, request: Mapping[str, Any]) -> Answer:
        deadline = time.monotonic() + self.answer_seconds
        text, size, last = [], 0, None
        with contextlib.closing(self.client.chat(model, stream=True, **request)) as parts:
            for part in parts:
                text.append(part.message.content or "")
                size += len(text[-1])
                last = part
                if size > MAX_ANSWER:
                    raise Unusable(f"the answer is longer than {MAX_ANSWER // 1000} kB")
                if time.monotonic() > deadline and not part.done:
                    raise NoProposal(f"{model} gave no complete answer in {self.answer_seconds:.0f} s")
        if last is None or not last.done:
            raise Unavailable("the connection closed before the answer was complete")
        if last.done_reason == "length" and size:
            raise Unusable("the answer was cut at its length limit")
        return Answer("".join(text), last.prompt_eval_count or None, last.eval_count or 0)

    def same(self, one: str, other: str) -> bool:
        return full_name(one) == full_name(other)

    def missing(self, model: str) -> str:
        return f"the model {model} is not installed; run: ollama pull {model}"

    @contextlib.contextmanager
    def translated(self, model: str) -> Iterator[None]:
        with super().translated(model):
            try:
                yield
            except ollama.ResponseError as error:
                raise BadReply(error.status_code, str(error.error)) from None


def _count(value: Any) -> int:
    """A number of bytes, tokens or parameters; 0 for anything else."""
    return value if type(value) is int and 0 <= value < 2**63 else 0


def _host(entry: Mapping[str, Any]) -> str:
    """The remote host that runs a model, from the server's description of it; "" for the server itself."""
    host = entry.get("remote_host") or CLOUD_HOST * bool(entry.get("remote_model"))
    return urlsplit(host if "//" in host else f"//{host}").hostname or host


def full_name(name: str) -> str:
    """The name with its tag: "llama3" is "llama3:latest"."""
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"
