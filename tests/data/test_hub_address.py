"""Hubs that are none, and variables of the network that keep from one: one line that names what to change."""

import pytest
from hub_reader import refused
from loopback_server import LOGIN

from lab.interface import doctor

JSON = "application/json"
HUBS = {
    "page": (200, LOGIN),
    "login": (302, "", "text/plain", "elsewhere"),
    "nothing": (200, ""),
    "empty object": (200, "{}", JSON),
    "list": (200, "[1]", JSON),
    "null": (200, "null", JSON),
    "text": (200, '"hello"', JSON),
    "no commit": (200, '{"id": "owner/stories"}', JSON),
    "wrong types": (200, '{"id": "owner/stories", "sha": "x", "siblings": 3}', JSON),
}


@pytest.mark.parametrize("kind", HUBS)
def test_a_hub_that_is_none_is_told_in_one_line(page, tmp_path, kind):
    status, body, *more = HUBS[kind]
    if len(more) == 2:
        more[1] = page(200, LOGIN).url
    server = page(status, body, *more)
    told = refused(server.url, tmp_path)
    assert f"{server.url} (HF_ENDPOINT) does not answer as a hub" in told
    assert "PRESET=offline or FILES=" in told
    assert len(server.requests) < 9  # a page does not pass by waiting


HUB_VARIABLES = {
    "ALL_PROXY": "socks://127.0.0.1:9",
    "all_proxy": "socks5://127.0.0.1:9",
    "http_proxy": ":::",
    "SSL_CERT_FILE": "/nope.pem",
}


@pytest.mark.parametrize("name", HUB_VARIABLES)
def test_a_variable_that_keeps_from_the_hub_is_named(tmp_path, name):
    told = refused("http://hub.invalid", tmp_path, {name: HUB_VARIABLES[name]})
    assert f"{name}={HUB_VARIABLES[name]}" in told


@pytest.mark.parametrize("endpoint", ["nonsense", "http://", "ftp://x", "", "http://127.0.0.1:99999", "http://[::1"])
def test_an_endpoint_that_is_none_is_named(tmp_path, endpoint):
    told = refused(endpoint, tmp_path)
    assert f"HF_ENDPOINT is not an address: {endpoint!r}" in told
    assert "PRESET=offline or FILES=" in told


def test_a_mirror_on_this_machine_is_asked_without_proxy(page, tmp_path):
    mirror, proxy = page(407, LOGIN), page(200, LOGIN)
    told = refused(mirror.url, tmp_path, {"http_proxy": proxy.url, "NO_PROXY": "example.com"})
    assert "answers 407" in told
    assert proxy.requests == []


@pytest.mark.parametrize("kind", HUBS)
def test_doctor_tells_a_hub_from_a_page(page, monkeypatch, kind):
    status, body, *more = HUBS[kind]
    if len(more) == 2:
        more[1] = page(200, LOGIN).url
    server = page(status, body, *more)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    [finding] = doctor._hub()
    if "owner" in body:
        assert (finding.level, finding.message) == ("ok", f"{server.url} (HF_ENDPOINT) answers (200)")
    else:
        assert finding.level == "warning"
        assert finding.message.startswith(f"{server.url} (HF_ENDPOINT) does not answer like a hub")
        assert finding.fix == "correct HF_ENDPOINT, or: make prepare PRESET=offline"


@pytest.mark.parametrize("name", HUB_VARIABLES)
def test_doctor_names_a_variable_that_keeps_from_the_hub(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://hub.invalid")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv(name, HUB_VARIABLES[name])
    [finding] = doctor._hub()
    assert finding.level == "warning"
    assert f"{name}={HUB_VARIABLES[name]}" in finding.message
    assert finding.fix == "unset it, or: make prepare PRESET=offline"
