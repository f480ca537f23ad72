"""A LanceDB database: where it is, whether its table is ours, and what its errors mean."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bifocal.errors import BifocalError, first_line
from bifocal.hub.search.hits import SearchError

ITEMS = "items"
PARTS = "items_parts"  # what was written when: a log
CALIBRATION = "items_calibration"  # samples of both kinds that make their scores comparable
TABLES = (ITEMS, PARTS, CALIBRATION)
FORMAT = 1
_METADATA = b"bifocal"
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
# Whether a store answers at all is asked with these: by itself, the client waits for minutes.
_QUICK = {"connect_timeout": "5s", "timeout": "5s", "client_max_retries": "0"}
_REASONS = {
    r"NoSuchBucket": "there is no such bucket",
    r"Failed to get AWS credentials|CredentialsNotLoaded|no providers in chain": (
        "there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    ),
    r"AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|PermissionDenied": "access is denied",
    r"Connection refused|dns error|tcp connect error|timed out": "the store does not answer",
}


def is_address(uri: str) -> bool:
    """Return whether a database is in a store, not in a folder of this machine."""
    return "://" in uri


def connect(uri: str, create: bool = False, quick: bool = False) -> Any:
    """Return a connection. Credentials and endpoint are those of the environment, as LanceDB reads them (`AWS_...`).

    Args:
        uri: a folder, or an address that LanceDB knows.
        create: whether a folder that does not exist is created.
        quick: whether a store that does not answer is given up after half a minute.

    Raises:
        SearchError: if there is no such folder, or it is a file.
    """
    options: dict[str, str] = {}
    if is_address(uri):
        endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), "")
        if uri.startswith("s3://") and endpoint.startswith("http://"):
            options["allow_http"] = "true"  # boto3, too, takes the endpoint as it is given
        if quick:
            options |= _QUICK
    else:
        folder = Path(uri).expanduser()
        if folder.exists() and not folder.is_dir():
            raise SearchError(f"'{uri}' is a file, not a database. Choose a folder.")
        if not create and not folder.exists():  # LanceDB would create the folder
            raise SearchError(f"There is no database at '{uri}'. Make one with bifocal embed --database.")
        uri = str(folder)
    os.environ.setdefault("LANCE_LOG", "error")  # it warns of each table that is new
    import lancedb

    return lancedb.connect(uri, storage_options=options or None)


@contextmanager
def errors_as_search_errors(uri: str) -> Iterator[None]:
    """Turn errors of LanceDB and of the stores below it, which are of many kinds, into SearchErrors."""
    try:
        yield
    except BifocalError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        message = str(error)
        reason = next((said for pattern, said in _REASONS.items() if re.search(pattern, message)), None)
        raise SearchError(
            f"The database at '{uri}' cannot be used ({reason or first_line(error)[:200]}). Check address and "
            "permissions."
        ) from error


def table_names(database: Any) -> list[str]:
    """Return the names of all tables of a database."""
    names: list[str] = []
    token = None
    while True:
        answer = database.list_tables(page_token=token)
        names += answer.tables
        token = answer.page_token
        if not token:
            return names


def with_settings(schema: Any, settings: Mapping[str, Any]) -> Any:
    """Return the schema of a table that records its settings."""
    return schema.with_metadata({_METADATA: json.dumps({**settings, "table_format": FORMAT}).encode()})


def read_settings(table: Any, uri: str) -> dict[str, Any]:
    """Return the settings that a table was created with.

    Raises:
        SearchError: if it was written by another version or program.
    """
    try:
        settings = json.loads((table.schema.metadata or {})[_METADATA])
        is_ours = settings["table_format"] == FORMAT
    except (KeyError, TypeError, ValueError):
        is_ours = False
    if not is_ours:
        raise SearchError(
            f"The table '{table.name}' at '{uri}' was written by another version or program. Choose another address."
        )
    return settings


def require_same_settings(recorded: Mapping[str, Any], own: Mapping[str, Any], uri: str) -> None:
    """Check that a table was written with these settings.

    The model may have moved: its weights count, not its path.

    Raises:
        SearchError: if a setting differs.
    """
    if recorded["weights"] != own["weights"]:
        raise SearchError(
            f"The vectors at '{uri}' are of other weights (of '{recorded['model']}', {recorded['weights']}, not "
            f"{own['weights']}). Choose another address."
        )
    for name in sorted({*recorded, *own} - {"model", "table_format"}):
        if recorded.get(name) != own.get(name):
            raise SearchError(
                f"The database at '{uri}' was written with other settings ({name.replace('_', ' ')}: "
                f"{recorded.get(name)}, not {own.get(name)}). Use the same, or choose another address."
            )


def quoted(value: str) -> str:
    """Return a text as a literal of SQL."""
    return "'" + value.replace("'", "''") + "'"
