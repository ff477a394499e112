"""What an operator changes while the server runs: adapters, where --allow-runtime-lora-updating, and caches."""

from __future__ import annotations

import structlog
from aiohttp import web

from carpool.engine.changes import LoadAdapter, ResetCaches, UnloadAdapter
from carpool.server.body import read_request
from carpool.server.errors import InvalidRequest
from carpool.server.keys import CONFIG, ENGINE
from carpool.server.protocol import decode_load_adapter_request, decode_unload_adapter_request

log = structlog.get_logger()


async def load_adapter(request: web.Request) -> web.Response:
    asked = await read_request(request, decode_load_adapter_request)
    asked.check()
    name, path = asked.lora_name, asked.lora_path
    if name in request.app[CONFIG].model_names:
        raise InvalidRequest(f"{name} is the model's own name.", "lora_name")
    await request.app[ENGINE].change(LoadAdapter(name, path, asked.load_inplace))
    log.info("adapter loaded", lora_name=name, lora_path=path)
    return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")


async def unload_adapter(request: web.Request) -> web.Response:
    """Those who asked for it before are still answered."""
    asked = await read_request(request, decode_unload_adapter_request)
    asked.check()
    await request.app[ENGINE].change(UnloadAdapter(asked.lora_name))
    log.info("adapter unloaded", lora_name=asked.lora_name)
    return web.Response(text=f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")


async def reset_caches(request: web.Request) -> web.Response:
    """Of keys and values, and of results."""
    await request.app[ENGINE].change(ResetCaches())
    log.info("caches reset")
    return web.Response()
