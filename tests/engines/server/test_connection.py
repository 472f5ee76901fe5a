import socket
import ssl

import pytest
from local_server import GREEDY, build_engine

from spec_kd.engines.server.client import ServerRequestError
from spec_kd.engines.server.connection import explain_connection_error

URL = "https://the-host:8000/v1"


def wrap(cause):
    """As HTTP libraries do: wrapped twice, once in a group."""
    try:
        try:
            raise OSError("All connection attempts failed") from ExceptionGroup("many", [cause])
        except OSError as error:
            raise RuntimeError("All connection attempts failed") from error
    except RuntimeError as error:
        return error


def make_certificate_error():
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_message = "self-signed certificate"
    return error


@pytest.mark.parametrize(
    ("cause", "words", "may_pass"),
    [
        (make_certificate_error(), "certificate is not accepted (self-signed certificate)", False),
        (ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number"), "an address with http://", False),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "'the-host' has no address (Name or", False),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure"), "'the-host' has no address (Temporary", True),
        (ConnectionRefusedError(111, "Connection refused"), "connection refused", True),
        (ConnectionResetError(104, "Connection reset by peer"), "connection reset by peer", True),
        (RuntimeError("peer closed connection"), "peer closed connection", True),
    ],
)
def test_the_cause_is_named(cause, words, may_pass):
    text, is_transient = explain_connection_error(wrap(cause), URL)
    assert words in text and is_transient == may_pass


def test_a_port_where_nothing_listens(serve, prompts):
    server, _ = serve()
    engine = build_engine(server, max_retries=1)
    server.stop()
    with pytest.raises(ServerRequestError, match=r"in 2 attempts; the last: the connection to http://127.*refused"):
        engine.generate(prompts[:1], GREEDY)


def test_tls_to_a_server_without_it_fails_at_once(serve, prompts):
    server, _ = serve()
    engine = build_engine(server, base_url=server.base_url.replace("http:", "https:"), max_retries=5)
    with pytest.raises(ServerRequestError, match=r"TLS could not be set up.*an address with http://"):
        engine.generate(prompts[:1], GREEDY)
    assert not server.requests


def test_a_name_without_an_address(serve, prompts):
    server, _ = serve()
    engine = build_engine(server, base_url="http://no-such-host.invalid:1/v1", max_retries=0)
    with pytest.raises(ServerRequestError, match=r"the name 'no-such-host.invalid' has no address"):
        engine.generate(prompts[:1], GREEDY)
