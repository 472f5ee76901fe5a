"""A local S3 server, and machines that have no copies yet."""

import hashlib

import fsspec
import pytest

from spec_kd import addresses

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def server():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(name, value)
        yield
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # whose address is that of this server
    server.stop()


@pytest.fixture
def bucket(server, machine, request):
    """The address of an empty bucket."""
    name = f"bucket-{hashlib.md5(request.node.name.encode()).hexdigest()[:12]}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Starts on another machine: one that has no copies."""

    def enter(name):
        monkeypatch.setattr(addresses, "COPIES", tmp_path / name)
        (tmp_path / name).mkdir(exist_ok=True)

    enter("first machine")
    return enter
