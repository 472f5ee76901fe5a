"""Explains why a connection to a server failed: HTTP libraries wrap the cause several times and name the wrapper."""

import socket
import ssl
from collections.abc import Iterator
from urllib.parse import urlsplit


def explain_connection_error(error: BaseException, url: str) -> tuple[str, bool]:
    """Finds the cause of an error of the HTTP library, and whether it may pass.

    Args:
        error (`BaseException`): The error, with its causes in `__cause__` and `__context__`.
        url (`str`): Address of the connection, which the explanation may show.

    Returns:
        `tuple[str, bool]`: A clause without a period, and whether another attempt makes sense.
    """
    causes = list(dict.fromkeys(_list_causes(error)))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its TLS certificate is not accepted ({cause.verify_message or cause})", False
    for cause in causes:
        if isinstance(cause, ssl.SSLError):
            reason = getattr(cause, "reason", None) or cause
            return f"TLS could not be set up ({reason}); a server of plain HTTP has an address with http://", False
    for cause in causes:
        if isinstance(cause, socket.gaierror):
            may_pass = cause.errno == socket.EAI_AGAIN
            return f"the name {urlsplit(url).hostname!r} has no address ({cause.strerror or cause})", may_pass
    for cause in causes:
        if isinstance(cause, ConnectionRefusedError):
            return "nothing listens there (connection refused)", True
    for cause in causes:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror.lower(), True
    innermost = next((cause for cause in reversed(causes) if str(cause)), error)
    kind = type(error.__cause__ or error).__name__
    return f"{kind}: {innermost}" if str(innermost) else kind, True


def _list_causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes, from the outermost to the innermost."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        found = waiting.pop(0)
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        waiting += [found.__cause__, found.__context__]
        waiting += list(found.exceptions) if isinstance(found, BaseExceptionGroup) else []
