"""An Ollama client whose failures never end the night.

It wraps the official client and turns every failure into one of three: `Unavailable` (down, slow to load, restarted,
disconnected: waiting may help), `Unusable` (this answer is invalid, the next may be valid) and UserError (only the user
can fix it). `Foreign`, another program at that address, is retried like `Unavailable`, then becomes a UserError.
Redirects are not followed: requests go only to the configured host. Waiting is limited to `patience` seconds; after
that the server is asked once per experiment, without waiting, until it is back. Not covered: Ollama's /v1 routes, which
ignore num_ctx, and pulling models, which is the user's decision.
"""

import contextlib
import ipaddress
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from lab import network
from lab.agents.answers import MAX_ANSWER
from lab.agents.briefing import NoProposal
from lab.errors import UserError, one_line

with network.hidden("OLLAMA_HOST"):  # importing ollama creates a client, which fails on an invalid value
    import ollama

PATIENCE = 120.0  # seconds
CONNECT_SECONDS = 5.0
CONTROL_SECONDS = 30.0  # for every request but an answer
UNLOAD_SECONDS = 60.0  # memory is released with a lag
LONGEST_PAUSE = 30.0  # seconds between two tries while the server is away
LEAST_WEIGHTS = 1_000_000  # bytes; a model that runs elsewhere is listed with some hundred (382 seen)
CLOUD_NAME = re.compile(r"[:-]cloud(:|$)", re.IGNORECASE)  # gpt-oss:120b-cloud, glm-4.6:cloud
CLOUD_HOST = "ollama.com"  # default host of cloud models
PORTS = {"http": 80, "https": 443}
MISSING = re.compile(r"model ['\"].*not found")
GRAMMAR = re.compile(r"grammar|schema|format|repetition", re.IGNORECASE)  # in errors of status 400 and 500
PAGE = 10_000  # characters of an error page that are searched for its title
TITLE = re.compile(r"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)

T = TypeVar("T")


class Unavailable(Exception):
    """The server cannot answer now; waiting may help."""


class Away(Unavailable):
    """Nothing listens at the server's address."""


class Foreign(Unavailable):
    """What answers there is not an Ollama server, or stands in front of it."""


class Unusable(Exception):
    """This answer is invalid; the next may be valid."""


class Refused(Unusable):
    """The server rejects an option of the request."""


@dataclass(frozen=True)
class Model:
    """An installed model."""

    name: str
    bytes: int  # of the weights
    parameters: float  # billions; 0 when the server does not say
    context: int  # tokens that the model was made for
    thinks: bool  # supports thinking before it answers
    completes: bool  # False: embeddings only
    remote: str = ""  # host that runs it, when not the server itself: prompts go there


@dataclass(frozen=True)
class Answer:
    text: str
    prompt_tokens: int | None  # as counted by the server; None: unknown
    tokens: int


class Client(ollama.Client):
    """The official client plus raw answers: its types drop the fields for models that run elsewhere."""

    def answer(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        """The JSON object that the server answers. Raises one of this module's exceptions for anything else."""
        reply = self._client.request(method, path, json=body or None)
        try:
            body_json = reply.json()
        except ValueError:
            body_json = None
        if reply.is_success and isinstance(body_json, dict):
            return body_json
        text = body_json.get("error") if isinstance(body_json, dict) else None
        raise _meaning(reply.status_code, str(text or reply.text), body.get("model", ""))


class Server:
    """One Ollama server; `host` as in OLLAMA_HOST, which is used when it is empty."""

    def __init__(
        self,
        host: str = "",
        patience: float = PATIENCE,
        answer_seconds: float = 300.0,  # loading the model and reading the prompt included
        first_pause: float = 1.0,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.url = address(host or os.environ.get("OLLAMA_HOST", ""))
        self.host = self.url if host or "OLLAMA_HOST" not in os.environ else f"{self.url} (OLLAMA_HOST)"
        self.local = network.is_this_machine(self.url)
        # Proxies from the environment do not apply to a local server, nor certificates to plain HTTP.
        more = {"trust_env": not self.local, "verify": self.url.startswith("https"), "follow_redirects": False}
        limits = [httpx.Timeout(seconds, connect=CONNECT_SECONDS) for seconds in (answer_seconds, CONTROL_SECONDS)]
        with network.explained():
            self.client, self.control = (Client(self.url, timeout=limit, **more) for limit in limits)
        self.patience, self.answer_seconds = patience, answer_seconds
        self.first_pause, self.log = first_pause, log
        self.asleep = False
        self.unread: dict[str, str] = {}  # installed model -> why its details cannot be read

    def models(self) -> list[Model]:
        """Installed models and their capabilities; those whose details cannot be read are in `unread`."""
        models, self.unread = [], {}
        for name, entry in self._patiently(self._listed).items():
            try:
                with _translated(name):
                    models.append(self._model(name, entry))
            except (Unavailable, Unusable, UserError) as reason:
                self.unread[name] = f"{name} is installed, but the server cannot show it: {reason}"
        return models

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
                with _translated(model):
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

    def _patiently(self, call: Callable[[], T], model: str = "") -> T:
        """`call()`, again with growing pauses while the server is unavailable. Raises NoProposal in the end, or
        UserError where another program answers."""
        deadline = time.monotonic() + (0.0 if self.asleep else self.patience)
        pause = self.first_pause
        while True:
            try:
                with _translated(model):
                    result = call()
                break
            except Unavailable as error:
                left = deadline - time.monotonic()
                if left <= 0:
                    self.asleep = True
                    if isinstance(error, Foreign):
                        raise UserError(f"no Ollama server at {self.host}: {error}") from None
                    raise NoProposal(f"the Ollama server at {self.host} is not available: {error}") from None
                self.log(f"Ollama: {error}; retrying in {min(pause, left):.0f} s")
                time.sleep(min(pause, left))
                pause = min(2 * pause, LONGEST_PAUSE)
        if self.asleep:
            self.asleep = False
            self.log(f"the Ollama server at {self.host} is back")
        return result


@contextlib.contextmanager
def _translated(model: str) -> Iterator[None]:
    """Translate exceptions of the client and the network into those of this module."""
    try:
        yield
    except ollama.ResponseError as error:
        raise _meaning(error.status_code, str(error.error), model) from None
    except (ConnectionError, httpx.ConnectError) as error:  # the client's own wrapping, or the stream's bare one
        reason = str(error.__context__ or error)
        if "SSL" in reason:
            raise Foreign(one_line(reason, 100)) from None
        raise Away("it is not running; start it with: ollama serve") from None
    except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as error:
        reason = one_line(str(error), 100).partition(". ")[0]
        raise Unavailable(reason or type(error).__name__) from None
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:  # not Ollama's protocol
        raise Foreign(f"the program there does not use Ollama's protocol ({type(error).__name__})") from None


def _meaning(status: int, text: str, model: str) -> Exception:
    """A useless answer by its status (-1: in the middle of a stream) and its error or body, as an exception of ours."""
    page = text.lstrip().startswith("<")
    title = TITLE.search(text[:PAGE])
    reason = one_line(title[1] if title else text, 160)
    if model and status == 404 and MISSING.search(text):
        return UserError(f"the model {model} is not installed; run: ollama pull {model}")
    if model and not page and (status == 400 or GRAMMAR.search(text)):
        return Refused(f"the server refused the request: {reason}")
    if page or 0 < status < 500 or not model:
        return Foreign(f"the program there answers {status}{': ' * bool(reason)}{reason}")
    return Unavailable(f"the server failed: {reason}")


def address(host: str) -> str:
    """The URL that OLLAMA_HOST means, read as Ollama reads it: blanks and quotes around it, a bare IPv6 address, a
    port alone, 0.0.0.0 for a server that listens everywhere. Raises UserError for anything else."""
    text = host.strip().strip("\"'")
    if not text or text.startswith(":"):
        text = f"127.0.0.1{text}" if text.count(":") < 2 else text
    with contextlib.suppress(ValueError):
        text = f"[{ipaddress.IPv6Address(text.strip('[]'))}]"
    try:
        split = urlsplit(text if "://" in text else f"http://{text}")
        port = PORTS[split.scheme] if "://" in text else 11434
        port = port if split.port is None else split.port
        name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(split.hostname, split.hostname or "")
        if split.username or split.query or not port or not re.fullmatch(r"[\w.:%-]+", name):
            raise ValueError
        return str(httpx.URL(f"{split.scheme}://{f'[{name}]' if ':' in name else name}:{port}{split.path.rstrip('/')}"))
    except (ValueError, KeyError, httpx.InvalidURL):
        raise UserError(f"OLLAMA_HOST is not an address: {host!r}; write it as 127.0.0.1:11434") from None


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


def billions(label: str) -> float:
    """Ollama's parameter_size in billions: "7.6B", "494.03M"; 0 when it is something else."""
    with contextlib.suppress(ValueError):
        if label[-1:].upper() in ("B", "M"):
            number = float(label[:-1]) / (1 if label[-1:].upper() == "B" else 1000)
            return number if 0 <= number < math.inf else 0.0
    return 0.0
