"""The admin endpoints: domains, uploads, cache, router. Knows HTTP and StoreAdmin; every route needs the admin key."""

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Path, Request, Response
from starlette.requests import ClientDisconnect

from server.access import AdminRoute, Handler
from server.admin_schemas import DomainName, RegisterDomainRequest, SetRouterRequest, Sha256, Tier
from server.app_state import deadline_of, service_of, store_admin_of
from server.disconnect import run_for_client
from server.disk_faults import disk_faults
from server.errors import ClientGone, InvalidRequest
from stack_store.uploads import BlobWriter

WRITE_BYTES = 1024 * 1024
MAX_GENERATION_DIGITS = 20


class StoreRoute(AdminRoute):
    """An admin route, whose files may be on a disk that is full or broken."""

    def get_route_handler(self) -> Handler:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            with disk_faults(service_of(request).metrics):
                return await handler(request)

        return handle


async def _follow_store(request: Request) -> None:
    """An administrator sees and changes the store as it is, whoever changed it last."""
    await store_admin_of(request).follow()


router = APIRouter(prefix="/admin", route_class=StoreRoute, tags=["admin"], dependencies=[Depends(_follow_store)])

IfMatch = Annotated[str | None, Header(description="the generation that the caller has seen")]


@router.get("/domains")
async def list_domains(request: Request, response: Response) -> dict[str, Any]:
    """Every registered domain."""
    shown = store_admin_of(request).list_domains()
    response.headers["etag"] = f'"{shown["generation"]}"'
    return shown


@router.get("/domains/{name}")
async def show_domain(request: Request, response: Response, name: DomainName) -> dict[str, Any]:
    """One domain."""
    shown = store_admin_of(request).show_domain(name)
    response.headers["etag"] = f'"{shown["generation"]}"'
    return shown


@router.put("/domains/{name}")
async def register_domain(
    request: Request, response: Response, name: DomainName, body: RegisterDomainRequest, if_match: IfMatch = None
) -> dict[str, Any]:
    """Registers or replaces a domain while requests run. The same call again changes nothing."""
    shown, is_new = await store_admin_of(request).register(
        name, body.stacks, dry_run=body.dry_run, expected_generation=_generation(if_match)
    )
    response.status_code = 201 if is_new and not body.dry_run else 200
    return shown


@router.delete("/domains/{name}")
async def remove_domain(request: Request, name: DomainName, if_match: IfMatch = None) -> dict[str, Any]:
    """Deletes a domain; requests that use it finish."""
    return await store_admin_of(request).remove(name, expected_generation=_generation(if_match))


@router.post("/domains/{name}/verify")
async def verify_domain(request: Request, name: DomainName) -> dict[str, Any]:
    """Reads every byte of a domain's files again and tells of each whether it is what was registered."""
    return await store_admin_of(request).verify(name)


@router.post("/domains/{name}/{action}")
async def change_residency(
    request: Request, name: DomainName, action: Literal["pin", "unpin", "prefetch"], tier: Tier = "device"
) -> dict[str, Any]:
    """Keeps a domain resident in a tier, lets it go, or starts to load it."""
    store_admin = store_admin_of(request)
    if action == "pin":
        return await run_for_client(request.receive, store_admin.pin(name, tier), deadline=deadline_of(request))
    if action == "unpin":
        return store_admin.unpin(name, tier)
    return store_admin.prefetch(name, tier)


@router.get("/cache")
async def show_cache(request: Request) -> dict[str, Any]:
    """What is resident, leased, pinned and loading."""
    return store_admin_of(request).show_cache()


@router.put(
    "/blobs/{sha256}",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def upload_blob(request: Request, sha256: Annotated[Sha256, Path()]) -> dict[str, Any]:
    """Receives one file; it is kept only if its digest is the one that was promised."""
    try:
        return {"sha256": sha256, "bytes": await _receive(request, sha256)}
    except ClientDisconnect as error:
        raise ClientGone("the client hung up") from error


@router.put("/router")
async def set_router(request: Request, body: SetRouterRequest, if_match: IfMatch = None) -> dict[str, Any]:
    """Installs a router and makes it live."""
    return await store_admin_of(request).set_router(body, expected_generation=_generation(if_match))


async def _receive(request: Request, sha256: str) -> int:
    """The bytes that came."""
    num_bytes = 0
    with await asyncio.to_thread(store_admin_of(request).sources.uploads.receive, sha256) as writer:
        buffer = bytearray()
        async for chunk in request.stream():
            buffer += chunk
            if len(buffer) >= WRITE_BYTES:
                num_bytes += await _write(writer, buffer)
        num_bytes += await _write(writer, buffer)
        await asyncio.to_thread(writer.commit)
    return num_bytes


async def _write(writer: BlobWriter, buffer: bytearray) -> int:
    """Off the event loop. Empties the buffer; how many bytes there were."""
    chunk = bytes(buffer)
    buffer.clear()
    await asyncio.to_thread(writer.write, chunk)
    return len(chunk)


def _generation(if_match: str | None) -> int | None:
    """A bare number, or an entity tag as ETag shows it. `*` matches every generation."""
    if if_match is None or if_match.strip() == "*":
        return None
    number = if_match.strip().removeprefix("W/").strip('"')
    if not number.isdecimal() or len(number) > MAX_GENERATION_DIGITS:
        shown = if_match[: 2 * MAX_GENERATION_DIGITS]
        raise InvalidRequest(f"If-Match must be a generation number, got {shown!r}", param="If-Match")
    return int(number)
