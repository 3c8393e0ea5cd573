"""GET /v1/models, POST /v1/load_lora_adapter and POST /v1/unload_lora_adapter, compatible with vLLM."""

from typing import Any

from aiohttp import web

from loraserve.errors import PeerError, RequestTimeoutError
from loraserve.gateway.api.schema import LoadAdapterRequest, UnloadAdapterRequest, read_request
from loraserve.gateway.context import GATEWAY, Gateway
from loraserve.gateway.errors import ApiError, bad_request, refused, unavailable
from loraserve.gateway.registry import STORE
from loraserve.messages import AdapterRef, AdapterRegistered, AdapterUnregistered, RegisterAdapter, UnregisterAdapter

REGISTER_TIMEOUT_S = 120.0
"""The store checks and packs the adapter before it answers. That is slow for a large adapter on a slow disk."""

UNREGISTER_TIMEOUT_S = 10.0

ADAPTER_CODES = frozenset(
    (
        *("bad_format", "bad_shape", "bad_rank", "not_finite", "unsupported", "not_found", "duplicate", "bad_name"),
        *("forbidden", "too_large"),
    )
)
"""Error codes with which the store refuses an adapter or its name. Other codes are failures of the store."""


async def list_models(http: web.Request) -> web.Response:
    gateway = http.app[GATEWAY]
    adapters = [adapter_card(gateway, adapter) for adapter in gateway.registry.adapters]
    return web.json_response({"object": "list", "data": [base_card(gateway), *adapters]})


async def get_model(http: web.Request) -> web.Response:
    gateway = http.app[GATEWAY]
    target = await gateway.resolve(http.match_info["id"])
    return web.json_response(adapter_card(gateway, target.adapter) if target.adapter else base_card(gateway))


async def load_adapter(http: web.Request) -> web.Response:
    gateway = http.app[GATEWAY]
    request, _ = await read_request(http, LoadAdapterRequest)
    if not request.lora_name or not request.lora_path:
        param = "lora_path" if request.lora_name else "lora_name"
        raise bad_request("Both 'lora_name' and 'lora_path' must be provided.", param, "missing_required_parameter")
    if request.lora_name == gateway.model_name:
        message = f"lora_name: '{request.lora_name}' is the base model's name; choose another"
        raise bad_request(message, "lora_name", "invalid_value")
    await register(gateway, request.lora_name, request.lora_path, bool(request.load_inplace))
    return web.Response(text=f"Success: LoRA adapter '{request.lora_name}' added successfully.")


async def unload_adapter(http: web.Request) -> web.Response:
    gateway = http.app[GATEWAY]
    request, _ = await read_request(http, UnloadAdapterRequest)
    if not request.lora_name:
        raise bad_request("'lora_name' must be provided.", "lora_name", "missing_required_parameter")
    try:
        await gateway.bus.request(
            STORE, UnregisterAdapter(name=request.lora_name), AdapterUnregistered, UNREGISTER_TIMEOUT_S
        )
    except PeerError as error:
        if error.code != "not_found":
            raise refused(error.code, error.message) from error
        message = f"The lora adapter '{request.lora_name}' cannot be found."
        raise ApiError(404, message, type_="NotFoundError", param="lora_name", code="not_found") from error
    except RequestTimeoutError as error:
        raise store_silent(error) from error
    await gateway.registry.refresh()
    gateway.log.info("adapter_unloaded", adapter=request.lora_name)
    return web.Response(text=f"Success: LoRA adapter '{request.lora_name}' removed successfully.")


async def register(gateway: Gateway, name: str, path: str, replace: bool) -> AdapterRef:
    """Register an adapter with the store and update ``RegistryCopy``. Raises ApiError, 400 for an invalid adapter."""
    message = RegisterAdapter(name=name, path=path, replace=replace)
    try:
        done = await gateway.bus.request(STORE, message, AdapterRegistered, REGISTER_TIMEOUT_S)
    except PeerError as error:
        raise refused_adapter(name, error) from error
    except RequestTimeoutError as error:
        raise store_silent(error) from error
    await gateway.registry.refresh()
    gateway.log.info("adapter_registered", adapter=name, version=done.adapter.version, created=done.created)
    return done.adapter


def refused_adapter(name: str, error: PeerError) -> ApiError:
    if error.code not in ADAPTER_CODES:
        return refused(error.code, error.message)
    if error.code == "duplicate":
        message = (
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, "
            "set 'load_inplace' to True."
        )
        return bad_request(message, "lora_name", "duplicate")
    return bad_request(f"The lora adapter '{name}' cannot be loaded: {error.message}", "lora_path", error.code)


def store_silent(error: RequestTimeoutError) -> ApiError:
    return unavailable(f"The adapter store did not answer ({error}); try again", "no_store")


def base_card(gateway: Gateway) -> dict[str, Any]:
    return card(gateway, gateway.model_name) | {"root": gateway.model_name, "parent": None}


def adapter_card(gateway: Gateway, adapter: AdapterRef) -> dict[str, Any]:
    own = {"version": adapter.version, "rank": adapter.rank, "slab_bytes": adapter.slab_bytes}
    return card(gateway, adapter.name) | {"root": adapter.name, "parent": gateway.model_name} | own


def card(gateway: Gateway, name: str) -> dict[str, Any]:
    try:
        context: int | None = gateway.context_tokens()
    except ApiError:
        context = None
    created = int(gateway.started_unix_s)
    return {"id": name, "object": "model", "created": created, "owned_by": "loraserve", "max_model_len": context}
