"""Refuses a body that is too large or too slow while it is read. Knows bytes; the blob store counts uploads itself."""

import asyncio

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

UPLOADS_PREFIX = "/admin/blobs/"


class BodyLimit:
    """ASGI middleware. The errors are ones that the app's own handlers shape."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, timeout_seconds: float) -> None:
        """The time is for the whole body; an upload, which may be large, has it for each of its parts."""
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._timeout_seconds = timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        is_upload = scope["path"].startswith(UPLOADS_PREFIX)
        num_bytes, is_complete = 0, False
        deadline = loop.time() + self._timeout_seconds

        async def receive_within_limits() -> Message:
            nonlocal num_bytes, is_complete
            if is_complete:  # what comes now is only that the client has gone
                return await receive()
            try:
                async with asyncio.timeout_at(loop.time() + self._timeout_seconds if is_upload else deadline):
                    message = await receive()
            except TimeoutError:
                detail = f"the body did not come within {self._timeout_seconds:g} seconds"
                raise HTTPException(408, detail, {"connection": "close"}) from None
            if message["type"] == "http.disconnect" and not is_upload:  # uploads tell it themselves
                raise HTTPException(499, "the client hung up before its body was complete")
            is_complete = not message.get("more_body", False)
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes and not is_upload:
                raise HTTPException(413, f"the body has more than {self._max_body_bytes} bytes")
            return message

        await self._app(scope, receive_within_limits, send)
