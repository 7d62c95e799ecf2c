"""Connections to S3 from the usual AWS variables, and clear messages for the errors of its libraries."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from pyarrow import fs as pafs

from vlmo_ray.errors import UserError

_CONNECT_S, _REQUEST_S, _ATTEMPTS = 2, 30, 3
# Errors that pass: the server is too busy, restarting or not reachable, or hung up during an answer.
_PASSING = re.compile(
    r"500|502|503|504|429|SlowDown|SLOW_DOWN|ServiceUnavailable|SERVICE_UNAVAILABLE|InternalError|INTERNAL_FAILURE|"
    r"RequestTimeout|REQUEST_TIMEOUT|Throttling\w*|THROTTLING|NETWORK_CONNECTION|EndpointConnectionError|"
    r"ConnectTimeoutError|ReadTimeoutError|ConnectionClosedError|ResponseStreamingError|IncompleteReadError|"
    r"HTTPClientError|ConnectionError|ConditionalRequestConflict|curlCode: (6|7|16|18|28|52|55|56|92)"
)


class StorageBusy(UserError):
    """The storage does not answer, or asks to come back later; another attempt may succeed."""


def _settings() -> dict[str, str]:
    """What a connection depends on. Connections are cached by it, so that a changed environment has an effect."""
    env = os.environ.get
    if env("AWS_SESSION_TOKEN") and not (env("AWS_ACCESS_KEY_ID") and env("AWS_SECRET_ACCESS_KEY")):
        raise UserError(
            "AWS_SESSION_TOKEN is set without AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; set all, or none"
        )
    file = os.path.expanduser(env("AWS_CONFIG_FILE") or "~/.aws/config")
    endpoint, region = _profile(file, env("AWS_PROFILE") or "") if os.path.exists(file) else ("", "")
    return {
        "endpoint": env("AWS_ENDPOINT_URL_S3") or env("AWS_ENDPOINT_URL") or endpoint,
        "region": env("AWS_REGION") or env("AWS_DEFAULT_REGION") or region or "us-east-1",
        "key": env("AWS_ACCESS_KEY_ID") or "",
        "secret": env("AWS_SECRET_ACCESS_KEY") or "",
        "token": env("AWS_SESSION_TOKEN") or "",
    }


@functools.lru_cache(maxsize=4)
def _profile(file: str, name: str) -> tuple[str, str]:
    """(endpoint, region) of a profile in the AWS config file, which pyarrow does not look up; "" for what it lacks."""
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    session = Session(profile=name or None)
    session.set_config_variable("config_file", file)
    try:
        profile = session.get_scoped_config()
    except BotoCoreError as error:
        raise UserError(f"{file}: {error}; check AWS_PROFILE") from error
    services = session.full_config.get("services", {}).get(profile.get("services"), {})
    endpoint = services.get("s3", {}).get("endpoint_url") or profile.get("endpoint_url")
    return endpoint or "", profile.get("region") or ""


@functools.lru_cache(maxsize=4)
def _filesystem(anonymous: bool, *, endpoint: str, region: str, key: str, secret: str, token: str) -> pafs.S3FileSystem:
    scheme, _, host = endpoint.rpartition("://")
    return pafs.S3FileSystem(
        anonymous=anonymous,
        access_key=None if anonymous else key or None,
        secret_key=None if anonymous else secret or None,
        session_token=None if anonymous else token or None,
        region=region,
        endpoint_override=host.rstrip("/") or None,
        scheme=scheme or "https",
        connect_timeout=_CONNECT_S,
        request_timeout=_REQUEST_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
    )


@functools.lru_cache(maxsize=4)
def _client(probe: bool, anonymous: bool, *, endpoint: str, region: str, key: str, secret: str, token: str):
    from boto3.session import Session  # slow to import, and not needed to read a folder
    from botocore import UNSIGNED
    from botocore.config import Config

    options: dict[str, Any] = {"signature_version": UNSIGNED} if anonymous else {}
    if endpoint and not os.environ.get("AWS_REQUEST_CHECKSUM_CALCULATION"):
        # Servers other than AWS often refuse the trailing checksums that boto3 sends by default.
        options["request_checksum_calculation"] = "when_required"
    config = Config(
        connect_timeout=_CONNECT_S,
        read_timeout=4 if probe else _REQUEST_S,
        retries={"total_max_attempts": 2 if probe else _ATTEMPTS, "mode": "standard"},
        max_pool_connections=32,
        **options,
    )
    url = endpoint if "://" in endpoint or not endpoint else f"https://{endpoint}"
    # a new session: boto3's default one remembers the first credentials that it saw
    session = Session(key or None, secret or None, token or None, region)
    return session.client("s3", endpoint_url=url or None, config=config)


@contextlib.contextmanager
def explained(address: str) -> Iterator[None]:
    """Turn what the S3 libraries raise about `address` into FileNotFoundError or a UserError."""
    import boto3.exceptions
    import botocore.exceptions as aws

    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{address} does not exist") from error
    except (OSError, ValueError, aws.BotoCoreError, aws.ClientError, boto3.exceptions.Boto3Error) as error:
        if isinstance(error, UserError):
            raise
        code = _code(error)
        if code in ("NoSuchKey", "NO_SUCH_KEY"):
            raise FileNotFoundError(f"{address} does not exist") from error
        kind = StorageBusy if _PASSING.fullmatch(code) else UserError
        raise kind(f"{address}: {_reason(code, error, address)}") from error


def _code(error: Exception) -> str:
    """The S3 error code, HTTP status, exception name or curl code, whichever the libraries give."""
    import botocore.exceptions as aws

    if isinstance(error.__context__, aws.ClientError):  # a failed upload has it only there
        error = error.__context__
    if isinstance(error, aws.ClientError):
        return error.response["Error"]["Code"]
    for pattern in (r"HTTP status (\d+)", r"(curlCode: \d+)", r"AWS Error (\w+)"):
        if found := re.search(pattern, str(error)):
            return found.group(1)
    return type(error).__name__


def _reason(code: str, error: Exception, address: str) -> str:
    where = _settings()["endpoint"] or "AWS"
    bucket = address.removeprefix("s3://").split("/")[0]
    match code:
        case "NoSuchBucket" | "NO_SUCH_BUCKET":
            return f"the bucket {bucket!r} does not exist at {where}; create it or correct the address"
        case "NoCredentialsError" | "PartialCredentialsError":
            return "there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        case "InvalidAccessKeyId" | "INVALID_ACCESS_KEY_ID" | "InvalidClientTokenId" | "INVALID_CLIENT_TOKEN_ID":
            return f"{where} does not know the access key; check AWS_ACCESS_KEY_ID"
        case "SignatureDoesNotMatch" | "SIGNATURE_DOES_NOT_MATCH":
            return f"{where} refuses the signature; check AWS_SECRET_ACCESS_KEY"
        case "ExpiredToken" | "RequestExpired" | "REQUEST_EXPIRED":
            return "the session token has expired; renew AWS_SESSION_TOKEN"
        case "AccessDenied" | "ACCESS_DENIED" | "403" | "Forbidden":
            return f"{where} denies access; check the keys and their rights on the bucket {bucket!r}"
        case "PermanentRedirect" | "AuthorizationHeaderMalformed" | "301":
            return f"the bucket is not in the region {_settings()['region']!r}; set AWS_REGION"
        case "SSLError" | "curlCode: 35" | "curlCode: 60":
            return f"no TLS connection with {where}; for a plain server AWS_ENDPOINT_URL begins with http://"
        case "EndpointConnectionError" | "ConnectTimeoutError" | "ReadTimeoutError" | "ConnectionClosedError":
            return f"cannot reach {where}; check AWS_ENDPOINT_URL and the network"
        case "ValueError" if "endpoint" in str(error):
            return f"AWS_ENDPOINT_URL={where!r} is not a URL such as http://host:port"
        case "404":
            return f"{where} answers 404 Not Found: is AWS_ENDPOINT_URL that of an S3 server?"
    if code == "NETWORK_CONNECTION" or code.startswith("curlCode"):
        return f"cannot reach {where} or it hung up ({code}); check AWS_ENDPOINT_URL and the network"
    if _PASSING.fullmatch(code):
        return f"{where} is too busy or out of order ({code})"
    return str(error)


def filesystem(anonymous: bool = False) -> pafs.S3FileSystem:
    """For reading; `anonymous` sends no credentials."""
    return _filesystem(anonymous, **_settings())


def client(probe: bool = False, anonymous: bool = False):
    """boto3's, for writing; `probe` gives up within seconds."""
    return _client(probe, anonymous, **_settings())


def get(client, bucket: str, key: str) -> tuple[bytes, str]:
    """A whole object and its ETag."""
    from botocore.exceptions import IncompleteReadError, ResponseStreamingError

    for left in reversed(range(_ATTEMPTS)):
        answer = client.get_object(Bucket=bucket, Key=key)
        try:
            return answer["Body"].read(), answer["ETag"]
        except (IncompleteReadError, ResponseStreamingError):  # what boto3 does not retry by itself
            if not left:
                raise
    raise AssertionError("no attempts")


def put_if(client, bucket: str, key: str, data: bytes, etag: str | None) -> bool:
    """Write an object if its ETag is still this one, or, for None, if there is no object; returns whether it was."""
    condition = {"IfMatch": etag} if etag else {"IfNoneMatch": "*"}
    return _if(functools.partial(client.put_object, Bucket=bucket, Key=key, Body=data), condition)


def delete(client, bucket: str, key: str, etag: str | None = None) -> bool:
    """Delete an object, if it has this ETag; returns whether it is gone."""
    condition = {"IfMatch": etag} if etag else {}
    return _if(functools.partial(client.delete_object, Bucket=bucket, Key=key), condition)


def _if(request: Callable[..., Any], condition: dict[str, str]) -> bool:
    """Whether the object was as the condition says; a server that has no conditions is asked without."""
    from botocore.exceptions import ClientError

    try:
        request(**condition)
    except ClientError as error:
        match error.response["Error"]["Code"]:
            case "PreconditionFailed" | "412" | "NoSuchKey":
                return False
            case "NotImplemented" | "501":
                request()
            case _:
                raise
    return True
