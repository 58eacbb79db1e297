"""The HTTP side of `serve`: tornado's handlers, and what passes requests to the loop's thread and tokens back."""

import asyncio
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

from tornado.iostream import StreamClosedError
from tornado.web import Application, RequestHandler

from workbench.serve.completions import Answer, Ask, BadRequest, Model, read_ask
from workbench.serve.live import Delivery, LiveRun

# One that could never run is the client's mistake; one that a policy turned away may come again.
STATUS = {"refused": 400, "rejected": 429, "aborted": 500}
MAX_ID = 200


class Desk:
    """Hands requests to the loop and its deliveries to whoever waits; everything but `deliver` runs in the HTTP thread."""

    def __init__(self, run: LiveRun, model_of: Callable[[], Model], about: Mapping[str, Any]) -> None:
        self.run, self.model_of, self.about = run, model_of, about
        self.loop: asyncio.AbstractEventLoop | None = None
        self.error: str | None = None
        self._waiting: dict[str, asyncio.Queue[Delivery | None]] = {}
        self._numbers = itertools.count(1)

    def deliver(self, deliveries: Mapping[str, Delivery]) -> None:
        """From the loop's thread: one wake-up of the HTTP thread a step."""
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self._hand_out, deliveries)

    def _hand_out(self, deliveries: Mapping[str, Delivery]) -> None:
        for name, delivery in deliveries.items():
            if name in self._waiting:
                self._waiting[name].put_nowait(delivery)

    def name(self, wanted: str | None) -> str:
        """An id that no request at hand has: the client's own where it is free."""
        number = next(self._numbers)
        if wanted is None or len(wanted) > MAX_ID:
            return f"req-{number}"
        return wanted if wanted not in self._waiting and not self.run.is_known(wanted) else f"{wanted}#{number}"

    def open(self, ask: Ask) -> "asyncio.Queue[Delivery | None]":
        queue: asyncio.Queue[Delivery | None] = asyncio.Queue()
        self._waiting[ask.request.request_id] = queue
        if self.error is not None or not self.run.submit(ask.request):
            del self._waiting[ask.request.request_id]
            raise BadRequest(self.error or "the server is stopping", 503)
        return queue

    def close(self, ask: Ask, *, is_over: bool) -> None:
        self._waiting.pop(ask.request.request_id, None)
        if not is_over:
            self.run.cancel(ask.request.request_id)

    async def drained(self) -> None:
        """Once every client has its answer."""
        while self._waiting:
            await asyncio.sleep(0.01)


class Base(RequestHandler):
    """Errors in OpenAI's form."""

    def initialize(self, desk: Desk) -> None:
        self.desk = desk

    def fail(self, status: int, message: str) -> None:
        self.set_status(status)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.finish({"error": {"message": message, "type": kind, "param": None, "code": status}})

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        self.fail(status_code, self._reason)


class Unknown(Base):
    def prepare(self) -> None:
        self.fail(404, f"no such path, got {self.request.path!r}. There are /v1/models, /v1/completions and /v1/chat/completions.")


class Models(Base):
    def get(self) -> None:
        model = self.desk.model_of()
        longest = self.desk.run.executor.info.max_model_len
        base = {"id": model.name, "object": "model", "owned_by": "loquetier-workbench", "max_model_len": longest, "parent": None}
        adapters = [{"id": name, "object": "model", "owned_by": "loquetier-workbench", "parent": model.name} for name in model.adapters]
        self.finish({"object": "list", "data": [base, *adapters]})


class About(Base):
    def get(self) -> None:
        self.finish(dict(self.desk.about))


class Health(Base):
    def get(self) -> None:
        if self.desk.error is None:
            self.finish({})
        else:
            self.fail(503, self.desk.error)


class Completions(Base):
    def initialize(self, desk: Desk, is_chat: bool) -> None:
        super().initialize(desk)
        self.is_chat = is_chat
        self.queue: asyncio.Queue[Delivery | None] | None = None

    def on_connection_close(self) -> None:
        if self.queue is not None:
            self.queue.put_nowait(None)

    async def post(self) -> None:
        model = self.desk.model_of()
        try:
            name = self.desk.name(self.request.headers.get("X-Request-Id"))
            ask = read_ask(self.request.body, is_chat=self.is_chat, request_id=name, model=model)
            queue = self.queue = self.desk.open(ask)
        except BadRequest as error:
            self.fail(error.status, str(error))
            return
        self.set_header("X-Request-Id", name)
        is_over = False
        try:
            answer = Answer(ask, model)
            is_over = await (self._stream(answer, queue) if ask.is_streamed else self._whole(answer, queue))
        except StreamClosedError:
            pass
        finally:
            self.desk.close(ask, is_over=is_over)

    async def _whole(self, answer: Answer, queue: "asyncio.Queue[Delivery | None]") -> bool:
        tokens: list[int] = []
        while True:
            delivery = await queue.get()
            if delivery is None:
                raise StreamClosedError
            tokens += delivery.tokens
            if delivery.end is None:
                continue
            phase, note = delivery.end
            if phase == "finished":
                self.finish(answer.whole(tokens))
            else:
                self.fail(STATUS[phase], note or phase)
            return True

    async def _stream(self, answer: Answer, queue: "asyncio.Queue[Delivery | None]") -> bool:
        """One event a token; the status line waits for the first token, so that a rejection still has one of its own."""
        has_begun = False
        while True:
            delivery = await queue.get()
            if delivery is None:
                raise StreamClosedError
            phase, note = delivery.end or ("", "")
            is_finished = phase == "finished"
            if not has_begun and delivery.end is not None and not is_finished:
                self.fail(STATUS[phase], note or phase)
                return True
            if not has_begun:
                self.set_header("Content-Type", "text/event-stream; charset=utf-8")
                self.set_header("Cache-Control", "no-cache")
                has_begun = True
            for chunk in answer.chunks(delivery.tokens, is_finished=is_finished):
                self._event(chunk)
            if delivery.end is None:
                await self.flush()
                continue
            if is_finished:
                if answer.ask.include_usage:
                    self._event(answer.final_chunk())
            else:
                self._event({"error": {"message": note or phase, "type": "server_error", "param": None, "code": STATUS[phase]}})
            self.write("data: [DONE]\n\n")
            await self.finish()
            return True

    def _event(self, value: Mapping[str, Any]) -> None:
        self.write(f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n")


def application(desk: Desk) -> Application:
    """The routes, without tornado's own access log."""
    handlers: list[Any] = [
        ("/v1/models", Models, {"desk": desk}),
        ("/v1/completions", Completions, {"desk": desk, "is_chat": False}),
        ("/v1/chat/completions", Completions, {"desk": desk, "is_chat": True}),
        ("/version", About, {"desk": desk}),
        ("/health", Health, {"desk": desk}),
    ]
    return Application(handlers, default_handler_class=Unknown, default_handler_args={"desk": desk}, log_function=lambda handler: None)
