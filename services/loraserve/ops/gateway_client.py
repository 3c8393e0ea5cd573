"""Sends HTTP requests to a gateway. Failures become OpsError, with one line of text that includes a remedy."""

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
"""Request timeout. The gateway's own timeouts are shorter, and their messages name the silent process."""

PROGRESS_INTERVAL_S = 2.0

Ask = Callable[[str, Any], bytes]
"""`exchange` bound to one gateway: (path, body or None for GET) -> content of the answer."""


class OpsError(LoraServeError):
    """A command failed. The text is one line with a remedy. ``code`` is the gateway's error code, or ""."""

    def __init__(self, text: str, code: str = "") -> None:
        super().__init__(text)
        self.code = code


class GatewayAddress(NamedTuple):
    """The URL of a gateway and its API key. If ``api_key`` is "", requests carry no key."""

    url: str
    api_key: str = ""


def exchange(gateway: GatewayAddress, path: str, body: Any = None, timeout_s: float = TIMEOUT_S) -> bytes:
    """POST ``body`` as JSON, or GET if ``body`` is None, and return the answer's body. Raises OpsError on failure."""
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
        raise _http_error(gateway, path, error.code, error.read()) from error
    except TimeoutError as error:
        raise OpsError(
            f"{gateway.url} did not answer within {timeout_s:g} s; scripts/status shows which processes are up"
        ) from error
    except ValueError as error:
        raise OpsError(f"--url {gateway.url}: {error}; write it like http://127.0.0.1:8000") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        # If the answer is not HTTP, the reason contains its first line with a line break, so the text is stripped.
        detail = getattr(reason, "strerror", None) or str(reason).strip() or type(reason).__name__
        raise OpsError(
            f"no gateway answers at {gateway.url} ({detail}); start a cluster with scripts/up, "
            "or name another gateway with --url or LORASERVE_URL"
        ) from error


def _http_error(gateway: GatewayAddress, path: str, status: int, content: bytes) -> OpsError:
    """Return an OpsError with the message in the answer ``content``. Servers other than a gateway send none."""
    try:
        error = json.loads(content)["error"]
        message, code = str(error["message"]), str(error.get("code") or "")
    except (ValueError, LookupError, TypeError, AttributeError):
        return OpsError(
            f"{gateway.url}{path} answered HTTP {status} without a message; is it a LoRAServe gateway? Check --url"
        )
    if status == 401:
        problem = "the API key is not one of its keys" if gateway.api_key else "it requires an API key"
        return OpsError(f"{gateway.url}: {problem}; set --api-key or LORASERVE_API_KEY", code)
    return OpsError(message, code)


@contextmanager
def report_progress(what: str, to: TextIO = sys.stderr, interval_s: float = PROGRESS_INTERVAL_S) -> Iterator[None]:
    """Print ``what`` and the elapsed time every ``interval_s`` while the ``with`` block runs."""
    done = threading.Event()
    thread = threading.Thread(target=_print_until, args=(done, what, to, interval_s), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _print_until(done: threading.Event, what: str, to: TextIO, interval_s: float) -> None:
    started_s = time.monotonic()
    while not done.wait(interval_s):
        print(f"{what} ... {time.monotonic() - started_s:.0f} s", file=to, flush=True)
