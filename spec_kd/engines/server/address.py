"""The address of a server, which may hold a password: what is sent of it, what is shown, and what is refused."""

import base64
from urllib.parse import unquote, urlsplit, urlunsplit

from spec_kd.secrets import hide_secrets


def check_base_url(base_url: str, api_key_env: str = "OPENAI_API_KEY") -> None:
    """Raises `ValueError` for what is no address of a server, without the secrets in it."""
    try:
        parts = urlsplit(base_url)
        shown = hide_userinfo(base_url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port  # raises above 65535
    except ValueError:
        parts, shown, is_address = urlsplit(""), hide_secrets(base_url), False
    if not is_address:
        raise ValueError(f"`base_url={shown!r}` is no address of a server: it looks like http://localhost:8000/v1.")
    if parts.query or parts.fragment:
        raise ValueError(
            f"`base_url` has something after {hide_userinfo(base_url)!r} (`?...` or `#...`), which would end up in the "
            f"middle of every request's address. Leave it out; an API key belongs into the environment variable "
            f"{api_key_env}."
        )


def hide_userinfo(url: str) -> str:
    """The URL without user name, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class Userinfo:
    """User name and password of a URL, shown nowhere."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        self._pair = None if parts.username is None else (parts.username, parts.password or "")

    def build_headers(self) -> dict[str, str]:
        """As HTTP clients send them (RFC 7617)."""
        if self._pair is None:
            return {}
        text = ":".join(map(unquote, self._pair))
        return {"Authorization": f"Basic {base64.b64encode(text.encode()).decode()}"}

    def hide(self, text: str) -> str:
        """The text of a server, which may repeat the password."""
        for secret in sorted({*(self._pair or ())[1:], *map(unquote, (self._pair or ())[1:])} - {""}, key=len):
            text = text.replace(secret, "[hidden]")
        for header in self.build_headers().values():
            text = text.replace(header.removeprefix("Basic "), "[hidden]")
        return text

    def __repr__(self) -> str:
        return "Userinfo([hidden])"
