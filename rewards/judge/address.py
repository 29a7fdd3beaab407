"""A judge's address. It must not contain a secret, because recipes, logs and reports show it."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit


def check_url(url: str) -> None:
    """Raise ValueError for an invalid URL, or for a URL with a user name, a password or a query.

    The message does not show parts that may be secret.

    >>> check_url("http://127.0.0.1:8100/v1")
    >>> check_url("http://me:secret@judge/v1")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: base_url holds a user name or a password, which recipes, logs and reports would show...
    """
    secret = "a user name or a password" if "@" in url else ""
    try:
        parts = urlsplit(url)
        secret = secret or ("a query" if parts.query or parts.fragment else "")
        named = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        named = False
    if secret:
        raise ValueError(
            f"base_url holds {secret}, which recipes, logs and reports would show: "
            "put the key into an environment variable and name it by api_key_env"
        )
    if not named:
        raise ValueError(
            f"base_url={url!r:.200}: write the server's API root, such as http://127.0.0.1:8100/v1"
        )


def has_secret(url: str) -> bool:
    """Whether a text is a URL with a user name or a password."""
    scheme, separator, rest = url.partition("://")
    return bool(separator) and scheme.isalpha() and "@" in rest.partition("/")[0].partition("?")[0]


def refuse_secrets(params: Any, place: str = "params") -> None:
    """Raise ValueError for a URL with a user name or a password anywhere in a reward's parameters.

    >>> refuse_secrets({"servers": ["http://judge/v1"]})
    """
    if isinstance(params, str) and has_secret(params):
        raise ValueError(
            f"{place} holds a user name or a password in a URL, which configuration, logs and reports would show: "
            "put the key into an environment variable and name that variable"
        )
    inner = (
        params.items()
        if isinstance(params, Mapping)
        else enumerate(params)
        if isinstance(params, list)
        else ()
    )
    for key, value in inner:
        refuse_secrets(value, f"{place}.{key}")
