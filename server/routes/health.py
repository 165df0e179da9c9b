"""Health and metrics: what monitors ask for without a key. Knows no requests."""

import math

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from server.app_state import drain_of, service_of, settings_of

router = APIRouter(tags=["health"])


@router.get("/health/live")
async def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/health")
@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """Whether to send requests here: the engine's thread is alive, not only the process, and will stay. Else 503."""
    age_seconds = service_of(request).engine.heartbeat_age_seconds()
    is_alive = age_seconds <= settings_of(request).server.heartbeat_timeout_seconds
    shown_seconds = round(age_seconds, 3) if math.isfinite(age_seconds) else None  # infinite once the loop has ended
    status = "engine silent" if not is_alive else "shutting down" if drain_of(request).is_leaving else "ok"
    return JSONResponse({"status": status, "heartbeat_age_seconds": shown_seconds}, 200 if status == "ok" else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    return Response(service_of(request).metrics.render(), media_type=CONTENT_TYPE_LATEST)
