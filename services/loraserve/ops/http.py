"""One HTTP exchange with a gateway, and what to tell people when it fails."""

import http.client
import json
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TextIO

from loraserve.errors import LoraServeError

TIMEOUT_S = 150.0
"""Longer than a gateway gives the store or the planner, whose own words are better than a timeout here."""

PATIENCE_S = 2.0
"""After this long, and again each time it has passed, people are told that something is still going on."""


class OpsError(LoraServeError):
    """Could not be done: one line for people, with the remedy. ``code`` is the gateway's, "" where it gave none."""

    def __init__(self, text: str, code: str = "") -> None:
        super().__init__(text)
        self.code = code


class GatewayAddress(NamedTuple):
    """Where the gateway is, and the key it wants ("" where it wants none)."""

    url: str
    api_key: str = ""


def exchange(gateway: GatewayAddress, path: str, body: Any = None, timeout_s: float = TIMEOUT_S) -> bytes:
    """GET, or POST where there is a body. Raises OpsError where there is no answer or it is a refusal."""
    url = gateway.url.rstrip("/") + path
    headers = {"Content-Type": "application/json"}
    if gateway.api_key:
        headers["Authorization"] = f"Bearer {gateway.api_key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            content: bytes = response.read()
            return content
    except urllib.error.HTTPError as error:
        raise refusal(gateway, path, error.code, error.read()) from error
    except TimeoutError as error:
        raise OpsError(
            f"{gateway.url} did not answer within {timeout_s:g} s; scripts/status shows who is well"
        ) from error
    except ValueError as error:
        raise OpsError(f"--url {gateway.url}: {error}; write it like http://127.0.0.1:8000") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise OpsError(no_gateway(gateway.url, reason)) from error


def no_gateway(url: str, reason: object) -> str:
    # What does not speak HTTP is quoted by its first line, which has an end of line.
    detail = getattr(reason, "strerror", None) or str(reason).strip() or type(reason).__name__
    return (
        f"no gateway answers at {url} ({detail}); start a cluster with scripts/up, "
        "or name another with --url or LORASERVE_URL"
    )


def refusal(gateway: GatewayAddress, path: str, status: int, content: bytes) -> OpsError:
    """The gateway's own words where it gave any; who listens there may also be something else altogether."""
    try:
        error = json.loads(content)["error"]
        said, code = str(error["message"]), str(error.get("code") or "")
    except (ValueError, LookupError, TypeError, AttributeError):
        text = f"{gateway.url}{path} answered HTTP {status} without a reason; is that a LoRAServe gateway? See --url"
        return OpsError(text)
    if status == 401:
        given = "the key given is not one of its keys" if gateway.api_key else "it wants an API key"
        return OpsError(f"{gateway.url}: {given}; set --api-key or LORASERVE_API_KEY", code)
    return OpsError(said, code)


@contextmanager
def patience(what: str, to: TextIO = sys.stderr, every_s: float = PATIENCE_S) -> Iterator[None]:
    """Says ``what`` is still going on whenever another ``every_s`` have passed inside."""
    done = threading.Event()
    thread = threading.Thread(target=_say_until, args=(done, what, to, every_s), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _say_until(done: threading.Event, what: str, to: TextIO, every_s: float) -> None:
    started_s = time.monotonic()
    while not done.wait(every_s):
        print(f"{what} ... {time.monotonic() - started_s:.0f} s", file=to, flush=True)


Ask = Callable[[str, Any], bytes]
"""``exchange`` with one gateway: path and body, None for GET."""
