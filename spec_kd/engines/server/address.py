"""The address of a server: what is checked, what is sent, and what is shown, since it may hold a password."""

import base64
from urllib.parse import unquote, urlsplit, urlunsplit

from spec_kd.secrets import hide_secrets


def check_base_url(base_url: str, api_key_env: str = "OPENAI_API_KEY") -> None:
    """Raises `ValueError` unless `base_url` is the address of a server. The error does not show its secrets."""
    try:
        parts = urlsplit(base_url)
        shown = hide_userinfo(base_url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port  # raises above 65535
    except ValueError:
        parts, shown, is_address = urlsplit(""), hide_secrets(base_url), False
    if not is_address:
        raise ValueError(f"`base_url={shown!r}` is no address of a server. Write it as in http://localhost:8000/v1.")
    if parts.query or parts.fragment:
        raise ValueError(
            f"`base_url` has a `?...` or `#...` after {hide_userinfo(base_url)!r}, which would end up in the middle of "
            f"every request's address. Remove it; an API key belongs into the environment variable {api_key_env}."
        )


def hide_userinfo(url: str) -> str:
    """The URL without user name, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class Userinfo:
    """User name and password of a URL, which are shown nowhere."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        self._pair = None if parts.username is None else (parts.username, parts.password or "")

    def build_headers(self) -> dict[str, str]:
        """The header in which HTTP clients send them (RFC 7617); no header without a user name."""
        if self._pair is None:
            return {}
        text = ":".join(map(unquote, self._pair))
        return {"Authorization": f"Basic {base64.b64encode(text.encode()).decode()}"}

    def hide(self, text: str) -> str:
        """A server's text without the password, which it may repeat."""
        for secret in sorted({*(self._pair or ())[1:], *map(unquote, (self._pair or ())[1:])} - {""}, key=len):
            text = text.replace(secret, "[hidden]")
        for header in self.build_headers().values():
            text = text.replace(header.removeprefix("Basic "), "[hidden]")
        return text

    def __repr__(self) -> str:
        return "Userinfo([hidden])"
