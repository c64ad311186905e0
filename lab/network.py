"""Network variables of the environment, which every HTTP client reads: without them, or one line for a wrong one."""

import ipaddress
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from lab.errors import UserError, one_line

PROXIES = re.compile(r"(http|https|all|no)_proxy", re.IGNORECASE)
CERTIFICATES = re.compile(r"SSL_CERT_FILE|SSL_CERT_DIR|SSLKEYLOGFILE")
PASSWORD = re.compile(r"//[^/@]*@")


@contextmanager
def hidden(*more: str) -> Iterator[None]:
    """The environment without network variables and `more`: for a library that makes a client when it is imported."""
    names = [*_set(PROXIES), *_set(CERTIFICATES), *more]
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


@contextmanager
def explained() -> Iterator[None]:
    """Around making an HTTP client, which connects to nothing: what fails there is a variable, and a UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(_complaint(error)) from None


def is_this_machine(url: str) -> bool:
    """Whether the host of `url` is a loopback address, to which no proxy is meant to stand in the way."""
    try:
        name = urlsplit(url).hostname or ""
        return name == "localhost" or name.endswith(".localhost") or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _complaint(error: Exception) -> str:
    names = _set(CERTIFICATES if isinstance(error, OSError) else PROXIES)
    told = ", ".join(f"{name}={PASSWORD.sub('//...@', os.environ[name])}" for name in names)
    reason = one_line(PASSWORD.sub("//...@", str(error)), 100).partition(". ")[0]
    return f"no connection can be made with {told or 'the proxies of this system'} ({reason}); unset or correct it"


def _set(names: re.Pattern[str]) -> list[str]:
    return [name for name in os.environ if names.fullmatch(name)]
