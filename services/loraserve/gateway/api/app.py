"""The HTTP application: routes, and the request ids, API keys, limits and errors common to all routes."""

import hmac
import secrets
from collections.abc import Awaitable, Callable
from importlib.metadata import PackageNotFoundError, version

from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage

from loraserve.gateway.api import admin, chat, completions, models, tokenize
from loraserve.gateway.api.generate import CLIENT_LEFT
from loraserve.gateway.context import ARRIVED_S, GATEWAY, REQUEST_ID, Gateway
from loraserve.gateway.errors import SERVER, ApiError, bad_request, unavailable

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

OPEN_PATHS = frozenset(("/health", "/live", "/ping", "/metrics", "/version"))
"""Paths that need no API key, for probes and scrapers. Their answers contain no user data."""

MAX_REQUEST_ID = 128


def make_app(gateway: Gateway) -> web.Application:
    app = web.Application(middlewares=[observe, guard], client_max_size=gateway.config.gateway.max_body_bytes)
    app[GATEWAY] = gateway
    app.on_response_prepare.append(add_request_id)
    app.add_routes(
        [
            web.post("/v1/chat/completions", chat.chat_completions),
            web.post("/v1/completions", completions.completions),
            web.get("/v1/models", models.list_models),
            web.get("/v1/models/{id:.+}", models.get_model),
            web.post("/v1/load_lora_adapter", models.load_adapter),
            web.post("/v1/unload_lora_adapter", models.unload_adapter),
            web.post("/tokenize", tokenize.tokenize),
            web.post("/detokenize", tokenize.detokenize),
            web.get("/health", admin.show_health),
            web.get("/ping", admin.show_health),
            web.get("/live", admin.show_live),
            web.get("/metrics", show_metrics),
            web.get("/version", show_version),
            web.get("/admin/cluster", admin.show_cluster),
            web.get("/admin/plan", admin.show_plan),
            web.get("/admin/story/{id:.+}", admin.show_story),
            web.post("/admin/rebalance", admin.rebalance),
            web.post("/admin/engines/{id}/drain", admin.drain_engine),
            web.post("/admin/engines/{id}/undrain", admin.undrain_engine),
        ]
    )
    return app


async def show_metrics(http: web.Request) -> web.Response:
    body = http.app[GATEWAY].render_metrics()
    return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


async def show_version(_: web.Request) -> web.Response:
    try:
        return web.json_response({"version": version("loraserve")})
    except PackageNotFoundError:
        return web.json_response({"version": "unknown"})


@web.middleware
async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Assign a request id, convert every error to OpenAI's format, and count the answer."""
    gateway = request.app[GATEWAY]
    request[ARRIVED_S] = gateway.clock.monotonic_s()
    request[REQUEST_ID] = request_id(request.headers.get("x-request-id", ""))
    with gateway.active():
        response = await _answer_errors(gateway, request, handler)
    resource = request.match_info.route.resource
    gateway.metrics.http.labels(resource.canonical if resource else "unknown", response.status).inc()
    return response


async def _answer_errors(gateway: Gateway, request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as error:
        return error_response(error)
    except web.HTTPException as error:
        return error_response(http_error(gateway, request, error), error)
    except (BadHttpMessage, web.RequestPayloadError):
        return unreadable_body(request)
    except ConnectionError:
        return web.Response(status=CLIENT_LEFT)
    except Exception:
        gateway.log.exception("request_crashed", request_id=request[REQUEST_ID], path=request.path)
        message = f"Internal error; see request id {request[REQUEST_ID]} in the gateway's log"
        return error_response(ApiError(500, message, type_=SERVER, code="internal_error"))


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Check the API key, and refuse POST requests while the gateway shuts down."""
    gateway = request.app[GATEWAY]
    keys = gateway.config.gateway.api_keys
    if keys and request.path not in OPEN_PATHS and not has_key(request.headers.get("Authorization", ""), keys):
        message = "Incorrect or missing API key; send it as 'Authorization: Bearer KEY'"
        raise ApiError(401, message, code="invalid_api_key")
    if gateway.draining and request.method == "POST":
        raise unavailable("This gateway is shutting down; try again", "shutting_down")
    return await handler(request)


def has_key(header: str, keys: tuple[str, ...]) -> bool:
    scheme, _, given = header.partition(" ")
    # Each comparison takes constant time, so that timing reveals nothing about a key.
    token = given.strip().encode("utf-8", "surrogateescape")
    matches = [hmac.compare_digest(token, key.encode()) for key in keys]
    return scheme.lower() == "bearer" and any(matches)


def request_id(given: str) -> str:
    """Return the client's id if it is safe in headers and log lines, else a new id."""
    usable = given.isascii() and given.isprintable() and 0 < len(given) <= MAX_REQUEST_ID
    return given if usable else f"req-{secrets.token_hex(12)}"


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["x-request-id"] = request.get(REQUEST_ID, "")


def http_error(gateway: Gateway, request: web.Request, error: web.HTTPException) -> ApiError:
    """Convert an aiohttp error to OpenAI's format."""
    where = f"{request.method} {request.path}"
    match error.status:
        case 404:
            return ApiError(404, f"Unknown path: {where}", code="not_found")
        case 405:
            return ApiError(405, f"Method not allowed: {where}", code="method_not_allowed")
        case 413:
            limit = gateway.config.gateway.max_body_bytes
            message = f"The request body is larger than {limit} bytes; send less, or raise gateway.max_body_bytes"
            return ApiError(413, message, code="request_too_large")
        case status:
            return ApiError(status, error.reason, code="http_error")


def unreadable_body(request: web.Request) -> web.Response:
    """Answer 400 for an unreadable body. Closes the connection, since later data on it is unreadable too."""
    message = "The request body does not match its Content-Encoding or Transfer-Encoding"
    response = error_response(bad_request(message, code="invalid_body"))
    # Without this, aiohttp would continue reading, fail, and close the connection without an answer.
    request.content.feed_eof()
    response.force_close()
    return response


def error_response(error: ApiError, cause: web.HTTPException | None = None) -> web.Response:
    allowed = {"Allow": cause.headers["Allow"]} if cause is not None and "Allow" in cause.headers else {}
    headers = {**error.headers, **allowed}
    return web.Response(status=error.status, body=error.encode(), content_type="application/json", headers=headers)
