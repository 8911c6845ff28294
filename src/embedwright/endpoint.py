"""The address of an OpenAI-compatible server, and its API key. The key goes to that server only and is never shown."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urlsplit

from embedwright.errors import InputError

_OPENAI = "https://api.openai.com/v1"
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server. `url` has no user and password; requests and messages both use it."""

    url: str
    client: dict[str, Any] = field(repr=False)  # arguments for openai's clients
    secrets: tuple[str, ...] = field(repr=False)

    def hide(self, message: object) -> str:
        """Returns `message` as text without the key and the password, which some servers repeat in their errors."""
        text = str(message)
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text


def endpoint(base_url: str, api_key_env: str | None = None) -> Endpoint:
    """Returns the server at `base_url`, with the key in the environment variable `api_key_env`.

    Without `api_key_env`, `$OPENAI_API_KEY` is sent to its own server only: `$OPENAI_BASE_URL`, or OpenAI's. A user and
    password in the address are sent as HTTP basic authentication. Raises InputError for a bad address, one with a
    query, or a variable that is not set.
    """
    parts = _split(base_url)
    host = parts.netloc.rpartition("@")[2]
    url = f"{parts.scheme}://{host}{parts.path}"
    openai = _is_openai(parts)
    if api_key_env is not None:
        key = _named_key(api_key_env, url)
    else:
        key = os.environ.get("OPENAI_API_KEY", "").strip() if openai else ""
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    basic = base64.b64encode(f"{user}:{password}".encode()).decode() if parts.username is not None else ""
    if basic and api_key_env is not None:
        raise InputError(f"{url}: give a user and password in the address or an API key, not both")
    headers: dict[str, Any] = {} if openai else _not_sent()
    headers["Authorization"] = f"Basic {basic}" if basic else f"Bearer {key or 'none'}"
    hidden = (key, basic, password or user, parts.password or parts.username)
    secrets = {spelt for secret in hidden if secret for spelt in (secret, quote(secret, safe=""), repr(secret)[1:-1])}
    client = {"base_url": url, "api_key": key or "none", "default_headers": headers}
    return Endpoint(url, client, tuple(sorted(secrets, key=len, reverse=True)))


def refusal(error: Any) -> str:
    """Returns the text of openai's `APIStatusError`, with advice if the key or the address is the reason."""
    if error.status_code in (401, 403):
        return (
            f"{error} (pass its key with --api-key-env NAME; "
            "$OPENAI_API_KEY is sent to $OPENAI_BASE_URL or OpenAI alone)"
        )
    if 300 <= error.status_code < 400:
        to = shown(error.response.headers.get("location", "an address that it does not say"))
        return f"{error.status_code}: the server sends us on to {to}; name that one if it is meant"
    return str(error)


def shown(address: str) -> str:
    """Returns an address, valid or not, without user, password, query and fragment."""
    scheme, found, rest = address.partition("://")
    if not found:
        scheme, rest = "", address
    rest = re.split(r"[?#]", rest.rpartition("@")[2])[0]
    return f"{scheme.rpartition('@')[2]}{found}{rest}"


def shown_model(name: str) -> str:
    """Returns the name of a model, of a server's (`http://host/v1#model`) with the address as `shown`."""
    if "://" not in name:
        return name
    address, mark, model = name.rpartition("#")
    return f"{shown(address)}#{model}" if mark else shown(name)


def key_variables(given: Sequence[str], servers: Sequence[str]) -> dict[str, str]:
    """Maps each server's address to the variable of its key, from options `NAME` (one server) or `HOST=NAME`.

    Raises InputError for a host without a server, and for a plain `NAME` that several servers would get.
    """
    hosts = {server: _split(server.rpartition("#")[0] or server).netloc.rpartition("@")[2] for server in servers}
    known = sorted(set(hosts.values()))
    variables: dict[str, str] = {}
    for option in given:
        host, named, name = option.rpartition("=")
        if not named and len(known) != 1:
            raise InputError(f"--api-key-env: of {len(known)} servers, say which one: HOST=NAME ({', '.join(known)})")
        if named and host not in known:
            raise InputError(f"--api-key-env {host}=...: no server has this host; there are {', '.join(known)}")
        variables |= {server: name for server, own in hosts.items() if not named or own == host}
    return variables


def _split(base_url: str) -> SplitResult:
    try:
        parts = urlsplit(base_url)
        good = parts.scheme in _PORTS and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good:
        raise InputError(f"{shown(base_url)} is not the address of a server: write it as http://HOST:PORT/v1")
    if parts.query or parts.fragment:
        raise InputError(
            f"{shown(base_url)}: an address of a server has no ? or # here; give a key by the name of the environment "
            "variable that holds it (api_key_env)"
        )
    return parts


def _is_openai(parts: SplitResult) -> bool:
    """Returns whether the environment's `OPENAI_...` variables are for this server."""
    home = urlsplit(os.environ.get("OPENAI_BASE_URL") or _OPENAI)
    here, there = ((at.scheme, at.hostname, at.port or _PORTS.get(at.scheme)) for at in (parts, home))
    return here == there


def _named_key(name: str, url: str) -> str:
    key = os.environ.get(name, "").strip()
    if key and key.isascii() and key.isprintable():
        return key
    if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):  # the user may have given the key itself
        raise InputError(f"{url}: give the NAME of the environment variable that holds the API key, not the key")
    raise InputError(f"{url}: ${name}, which is to hold its API key, is {'no key' if key else 'not set'}")


def _not_sent() -> dict[str, Any]:
    """Returns headers that openai's clients take from the environment, each left out: they are for another server."""
    from openai import Omit

    lines = os.environ.get("OPENAI_CUSTOM_HEADERS", "").split("\n")
    own = [line.partition(":")[0].strip() for line in lines if ":" in line]
    names = ("OpenAI-Organization", "OpenAI-Project", *own)
    return {name: Omit() for name in names if name.lower() != "authorization"}
