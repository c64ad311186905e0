"""The environment variables that every HTTP client reads (proxies, certificates): hide them, or explain a wrong one."""

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
    """Hide the network variables and `more` while a library is imported that creates an HTTP client on import."""
    names = [*_set(PROXIES), *_set(CERTIFICATES), *more]
    values = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(values)


@contextmanager
def explained() -> Iterator[None]:
    """Wrap the creation of an HTTP client. It does not connect yet, so an error means a wrong variable: a UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(_explain(error)) from None


def is_this_machine(url: str) -> bool:
    """Whether the host of `url` is a loopback address, which needs no proxy."""
    try:
        name = urlsplit(url).hostname or ""
        return name == "localhost" or name.endswith(".localhost") or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _explain(error: Exception) -> str:
    names = _set(CERTIFICATES if isinstance(error, OSError) else PROXIES)
    settings = ", ".join(f"{name}={PASSWORD.sub('//...@', os.environ[name])}" for name in names)
    reason = one_line(PASSWORD.sub("//...@", str(error)), 100).partition(". ")[0]
    return f"no connection can be made with {settings or 'the proxies of this system'} ({reason}); unset or fix it"


def _set(names: re.Pattern[str]) -> list[str]:
    return [name for name in os.environ if names.fullmatch(name)]
