"""What a server of models has to offer, whatever its protocol, with failures that never end the night.

A client turns every failure into one of three: `Unavailable` (down, slow to load, restarted, disconnected: waiting may
help), `Unusable` (this answer is invalid, the next may be valid) and UserError (only the user can fix it). `Foreign`,
another program at that address, is retried like `Unavailable`, then becomes a UserError. Redirects are not followed:
requests go only to the configured host. Waiting is limited to `patience` seconds; after that the server is asked once
per experiment, without waiting, until it is back.
"""

import contextlib
import ipaddress
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from lab import network
from lab.agents.briefing import NoProposal
from lab.errors import UserError, one_line

PATIENCE = 120.0  # seconds
CONNECT_SECONDS = 5.0
CONTROL_SECONDS = 30.0  # for every request but an answer
UNLOAD_SECONDS = 60.0  # memory is released with a lag
LONGEST_PAUSE = 30.0  # seconds between two tries while the server is away
PORTS = {"http": 80, "https": 443}
GRAMMAR = re.compile(r"grammar|schema|format|repetition", re.IGNORECASE)  # in errors of status 400 and 500
MISSING = re.compile(r"model\b.*\bnot (found|exist)", re.IGNORECASE | re.DOTALL)
PAGE = 10_000  # characters of an error page that are searched for its title
TITLE = re.compile(r"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)

T = TypeVar("T")


class Unavailable(Exception):
    """The server cannot answer now; waiting may help."""


class Away(Unavailable):
    """Nothing listens at the server's address."""


class Foreign(Unavailable):
    """What answers there does not use the expected protocol, or stands in front of the server."""


class Unusable(Exception):
    """This answer is invalid; the next may be valid."""


class Refused(Unusable):
    """The server rejects an option of the request."""


class BadReply(Exception):
    """A reply with an error (status -1: in the middle of a stream), or without the expected JSON object."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Model:
    """An installed model."""

    name: str
    bytes: int  # of the weights; 0 when it is not known
    parameters: float  # billions; 0 when the server does not say
    context: int  # tokens that the model was made for, or was loaded with; 0 when it is not known
    thinks: bool  # it may think before it answers
    completes: bool  # False: embeddings only
    remote: str = ""  # host that runs it, when not the server itself: prompts go there


@dataclass(frozen=True)
class Answer:
    text: str
    prompt_tokens: int | None  # as counted by the server; None: unknown
    tokens: int


class ModelServer:
    """One server. A client adds `models`, `ask`, `unload` and what its protocol needs."""

    kind = ""  # name of the agent that asks it
    title = ""  # of the protocol or product
    start = ""  # how to start it
    suggestion = ""  # what to do when it has no model that can be used

    def __init__(
        self,
        url: str,
        host: str,  # the URL and where it comes from
        patience: float,
        answer_seconds: float,  # loading the model and reading the prompt included
        first_pause: float,
        log: Callable[[str], None],
    ) -> None:
        self.url, self.host, self.local = url, host, network.is_this_machine(url)
        self.patience, self.answer_seconds = patience, answer_seconds
        self.first_pause, self.log = first_pause, log
        self.asleep = False
        self.unread: dict[str, str] = {}  # installed model -> why its details cannot be read

    def models(self) -> list[Model]:
        """Installed models and their capabilities; those whose details cannot be read are in `unread`."""
        raise NotImplementedError

    def refuse_if_moved(self, model: Model) -> None:
        """Raise NoProposal when `model` runs elsewhere now and did not when it was chosen."""

    def ask(self, model: str, system: str, prompt: str, options: Mapping[str, Any],
            schema: Mapping[str, Any] | None = None, think: bool | None = None) -> Answer:  # fmt: skip
        """One streamed answer. Raises Unusable when it is cut, empty, endless or a broken request; NoProposal.
        `options` are num_ctx, num_predict, temperature and seed."""
        raise NotImplementedError

    def context(self, model: str) -> int | None:
        """Tokens of context that the loaded model really has; None when the server does not say."""
        return None

    def unload(self, model: str) -> bool:
        """Free the model's memory; False if it is still held."""
        raise NotImplementedError

    def same(self, one: str, other: str) -> bool:
        """Whether two names mean the same model."""
        return one == other

    def missing(self, model: str) -> str:
        """That this model is not installed, and what to do."""
        raise NotImplementedError

    @contextlib.contextmanager
    def translated(self, model: str) -> Iterator[None]:
        """Translates BadReply and exceptions of the network into those of this module."""
        with self._translated_network():
            try:
                yield
            except BadReply as error:
                raise self._meaning(error.status, str(error), model) from None

    def _limits(self) -> dict[str, Any]:
        """Arguments of an httpx client. Proxies from the environment do not apply to a local server, nor certificates
        to plain HTTP."""
        return {"trust_env": not self.local, "verify": self.url.startswith("https"), "follow_redirects": False}

    def _patiently(self, call: Callable[[], T], model: str = "") -> T:
        """`call()`, again with growing pauses while the server is unavailable. Raises NoProposal in the end, or
        UserError where another program answers."""
        deadline = time.monotonic() + (0.0 if self.asleep else self.patience)
        pause = self.first_pause
        while True:
            try:
                with self.translated(model):
                    result = call()
                break
            except Unavailable as error:
                left = deadline - time.monotonic()
                if left <= 0:
                    self.asleep = True
                    if isinstance(error, Foreign):
                        raise UserError(f"no {self.title} server at {self.host}: {error}") from None
                    raise NoProposal(f"the {self.title} server at {self.host} is not available: {error}") from None
                self.log(f"{self.title}: {error}; retrying in {min(pause, left):.0f} s")
                time.sleep(min(pause, left))
                pause = min(2 * pause, LONGEST_PAUSE)
        if self.asleep:
            self.asleep = False
            self.log(f"the {self.title} server at {self.host} is back")
        return result

    @contextlib.contextmanager
    def _translated_network(self) -> Iterator[None]:
        try:
            yield
        except (ConnectionError, httpx.ConnectError) as error:  # wrapped by a client, or the stream's bare one
            reason = str(error.__context__ or error)
            if "SSL" in reason:
                raise Foreign(one_line(reason, 100)) from None
            raise Away(f"it is not running; start it with: {self.start}") from None
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as error:
            reason = one_line(str(error), 100).partition(". ")[0]
            raise Unavailable(reason or type(error).__name__) from None
        except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
            raise Foreign(f"the program there does not use {self.title}'s protocol ({type(error).__name__})") from None

    def _meaning(self, status: int, text: str, model: str) -> Exception:
        """A useless answer by its status (-1: in the middle of a stream) and its error or body, as an exception of
        ours."""
        page = text.lstrip().startswith("<")
        title = TITLE.search(text[:PAGE])
        reason = one_line(title[1] if title else text, 160)
        if model and status == 404 and MISSING.search(text):
            return UserError(self.missing(model))
        if model and not page and (status in (400, 422) or GRAMMAR.search(text)):
            return Refused(f"the server refused the request: {reason}")
        if page or 0 < status < 500 or not model:
            return Foreign(f"the program there answers {status}{': ' * bool(reason)}{reason}")
        return Unavailable(f"the server failed: {reason}")


def address(host: str, name: str, port: int) -> str:
    """The URL that a setting means, read as Ollama reads OLLAMA_HOST: blanks and quotes around it, a bare IPv6 address,
    a port alone, 0.0.0.0 for a server that listens everywhere. Raises UserError for anything else. `name` is the
    setting's, `port` its default."""
    text, example = host.strip().strip("\"'"), f"127.0.0.1:{port}"
    if not text or text.startswith(":"):
        text = f"127.0.0.1{text}" if text.count(":") < 2 else text
    with contextlib.suppress(ValueError):
        text = f"[{ipaddress.IPv6Address(text.strip('[]'))}]"
    try:
        split = urlsplit(text if "://" in text else f"http://{text}")
        port = PORTS[split.scheme] if "://" in text else port
        port = port if split.port is None else split.port
        host_name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(split.hostname, split.hostname or "")
        if split.username or split.query or not port or not re.fullmatch(r"[\w.:%-]+", host_name):
            raise ValueError
        host_name = f"[{host_name}]" if ":" in host_name else host_name
        return str(httpx.URL(f"{split.scheme}://{host_name}:{port}{split.path.rstrip('/')}"))
    except (ValueError, KeyError, httpx.InvalidURL):
        raise UserError(f"{name} is not an address: {host!r}; write it as {example}") from None


def billions(label: str) -> float:
    """A number of parameters in billions: "7.6B", "494.03M"; 0 when it is something else."""
    with contextlib.suppress(ValueError):
        if label[-1:].upper() in ("B", "M"):
            number = float(label[:-1]) / (1 if label[-1:].upper() == "B" else 1000)
            return number if 0 <= number < math.inf else 0.0
    return 0.0
