"""Routes of `vllm serve`, for the operator: list, add, replace and remove stacks. Off unless VLLM_PLUGINS names them.

GET /v1/shifts, POST /v1/shifts with {"name": ..., "source": ...}, DELETE /v1/shifts/NAME.
"""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import asyncio
import json
from typing import Any

from ..errors import MimicError
from .running import ADD, failed, forget, stacks_of
from .sources import check_name, resolve


class Endpoint:
    """What vLLM wants of a plugin with routes."""

    name = "mimic_core"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Put the routes into the server."""
        app.add_route("/v1/shifts", _listed, methods=["GET"])
        app.add_route("/v1/shifts", _add, methods=["POST"])
        app.add_route("/v1/shifts/{name}", _remove, methods=["DELETE"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Keep what the routes need."""
        state.mimic_core_engine = engine_client


async def _listed(request: Any) -> Any:
    return _answer(request.app.state.mimic_core_engine)


async def _add(request: Any) -> Any:
    engine = request.app.state.mimic_core_engine
    try:
        asked = json.loads(await request.body())
        name, source = check_name(asked["name"]), asked["source"]
        stacks = stacks_of(engine)
        found = await asyncio.to_thread(resolve, source)
        failed(await engine.collective_rpc(ADD, args=(name, *found[:2])))
        stacks[name] = found
    except (ValueError, KeyError, TypeError, MimicError) as error:
        return _answer(engine, error)
    return _answer(engine)


async def _remove(request: Any) -> Any:
    engine = request.app.state.mimic_core_engine
    try:
        forget(stacks_of(engine), request.path_params["name"])
    except MimicError as error:
        return _answer(engine, error)
    return _answer(engine)


def _answer(engine: Any, error: Exception | None = None) -> Any:
    from starlette.responses import JSONResponse

    if error is not None:
        return JSONResponse({"error": {"message": f"{type(error).__name__}: {error}"}}, status_code=400)
    return JSONResponse({"shifts": list(stacks_of(engine))})
