"""What tests of several packages share."""

from collections.abc import Iterator

import fsspec
import pytest
from fsspec import AbstractFileSystem


@pytest.fixture(scope="session")  # file systems remember the server that they were made for
def s3_bucket() -> Iterator[AbstractFileSystem]:
    """A server that speaks S3, with an empty bucket named "bucket"; s3:// leads to it."""
    pytest.importorskip("s3fs", reason="needs s3fs: pip install s3fs")
    server_module = pytest.importorskip("moto.server", reason="needs moto: pip install 'moto[s3]' flask flask-cors")
    with pytest.MonkeyPatch.context() as patch:
        server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        bucket = fsspec.filesystem("s3", skip_instance_cache=True)
        bucket.mkdir("bucket")
        yield bucket
        server.stop()
