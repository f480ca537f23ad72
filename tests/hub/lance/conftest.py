"""An S3 server of this machine, as boto3, pyarrow and LanceDB find one: through the environment."""

import logging
import os
from collections.abc import Iterator

import pytest

BUCKET = "vectors"


@pytest.fixture(scope="module")
def s3_environment() -> Iterator[dict[str, str]]:
    """Variables with which a process finds a server with one bucket."""
    boto3 = pytest.importorskip("boto3", reason="needs boto3 and moto, which `dev` brings")
    moto = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    client = boto3.client(
        "s3", endpoint_url=environment["AWS_ENDPOINT_URL"], aws_access_key_id="key", aws_secret_access_key="secret",
        region_name="us-east-1",
    )  # fmt: skip
    client.create_bucket(Bucket=BUCKET)
    yield environment
    server.stop()


@pytest.fixture
def s3(s3_environment, monkeypatch) -> str:
    """Address of an empty folder of a bucket."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{os.urandom(4).hex()}"
