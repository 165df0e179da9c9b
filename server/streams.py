"""Sends a generation as server-sent events, in the order that OpenAI's clients check. Knows chunks, not their content.

Per choice: an opening chunk (chat), token chunks, one closing chunk with the finish reason; the last closing chunk of a
prompt carries the `brainstacks` extension. Then, only if asked for, a chunk of usage; then `[DONE]`. An error after the
headers is an event of its own and ends the stream.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.types import FinishedEvent, PromptEvent, TokensEvent
from server.answers import AnswerShape, Json, is_long, mix_report, usage
from server.boundary import RequestRecord
from server.disconnect import LAST_SENDS_SECONDS, run_for_client, send_last
from server.error_responses import event_of
from server.errors import ClientGone, answer_for, is_internal
from server.generation import Generation

logger = logging.getLogger(__name__)

EVENT_END = b"\n\n"
DONE = b"data: [DONE]" + EVENT_END


class AnswerStream(Response):
    """Owns its generation: whatever becomes of the client, the generation is closed when this ends."""

    media_type = "text/event-stream"

    def __init__(
        self,
        generation: Generation,
        shape: AnswerShape,
        *,
        record: RequestRecord,
        wants_usage: bool,
        wants_running_usage: bool = False,
        deadline: float,
        headers: Mapping[str, str],
        last_sends_seconds: float = LAST_SENDS_SECONDS,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        self._generation = generation
        self._shape = shape
        self._record = record
        self._wants_usage = wants_usage
        self._wants_running_usage = wants_running_usage
        self._deadline = deadline
        self._last_sends_seconds = last_sends_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        last_event = b""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await run_for_client(receive, self._send_events(send), deadline=self._deadline)
        except ClientGone as error:
            self._record.status = answer_for(error).status
        except Exception as error:  # the headers are out: an event is the only way left to say it
            self._record.status = answer_for(error).status
            if is_internal(error):
                logger.exception("stream failed")
            last_event = event_of(error)
        finally:
            self._generation.close()  # before anything else is sent: sending may block
        await send_last(_send_part(send, last_event, more=False), within_seconds=self._last_sends_seconds)

    async def _send_events(self, send: Send) -> None:
        begin = b"data: " + orjson.dumps(self._shape.envelope(chunk=True)).removesuffix(b"}") + b","
        async for chunk in self._chunks():
            await _send_part(send, begin + orjson.dumps(chunk).removeprefix(b"{") + EVENT_END)
        await _send_part(send, DONE)

    async def _chunks(self) -> AsyncIterator[Json]:
        written = 0

        def counts() -> Json:
            if self._wants_running_usage:
                return {"usage": usage(self._generation, written=written)}
            return {"usage": None} if self._wants_usage else {}

        for index in range(self._generation.num_choices):
            if (choice := self._shape.opening(index)) is not None:
                yield {"choices": [choice]} | counts()
        unfinished = {id(run): len(run.plan.samplings) for run in self._generation.runs}
        async for index, event in self._generation.events():
            report: Json = {}
            choices: Sequence[Json] = ()
            if isinstance(event, PromptEvent):
                shape = partial(self._shape.prompt, index, event)
                choice = await asyncio.to_thread(shape) if is_long(event.prompt_logprobs) else shape()
                choices = () if choice is None else (choice,)
            elif isinstance(event, TokensEvent):
                written += len(event.token_ids)
                choices = self._shape.tokens(index, event)
            else:
                assert isinstance(event, FinishedEvent)
                run = self._generation.run_of(index)
                unfinished[id(run)] -= 1
                choices = self._shape.finish(index, event)
                report = {"brainstacks": mix_report(run)} if unfinished[id(run)] == 0 else {}
            for number, choice in enumerate(choices, start=1):
                yield {"choices": [choice]} | counts() | (report if number == len(choices) else {})
        if self._wants_usage:
            yield {"choices": [], "usage": usage(self._generation)}


async def _send_part(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
