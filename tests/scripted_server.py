"""A server that answers each request as its id says: well, or in one of the ways in which servers fail."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable

from tornado.httpserver import HTTPServer
from tornado.iostream import StreamClosedError
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

GAP_S = 0.01


def piece(text: str = "x", ids: list[int] | None = None, done: int | None = None, reason: str | None = None) -> dict:
    """A completion's chunk; with token ids, or with the running count of tokens, if given."""
    choice = {"index": 0, "text": text, "finish_reason": reason} | ({} if ids is None else {"token_ids": ids})
    return {"object": "text_completion", "choices": [choice]} | ({} if done is None else {"usage": usage(done)})


def usage(done: int) -> dict:
    return {"prompt_tokens": 4, "completion_tokens": done, "total_tokens": 4 + done}


class Completions(RequestHandler):
    def initialize(self, seen: dict) -> None:
        self.seen = seen

    async def post(self) -> None:
        name = self.request.headers["X-Request-Id"]
        self.seen[name] = json.loads(self.request.body) | {"authorization": self.request.headers.get("Authorization")}
        try:
            await BEHAVIOURS[name.split("-")[0]](self)
        except StreamClosedError:
            pass

    async def event(self, value: dict | str, end: str = "\n\n", gap_s: float = GAP_S) -> None:
        self.set_header("Content-Type", "text/event-stream")
        self.write(f"data: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}{end}")
        await self.flush()
        await asyncio.sleep(gap_s)

    async def pieces(self, *given: dict, done: bool = True) -> None:
        for one in given:
            await self.event(one)
        if done:
            await self.event("[DONE]")

    def refuse(self, status: int, body: object) -> None:
        self.set_status(status)
        self.finish(body if isinstance(body, dict) else str(body))

    async def cut(self) -> None:
        await self.event(piece(ids=[5]))
        self.request.connection.stream.close()

    async def slow(self) -> None:
        await self.event(piece(ids=[5]))
        await asyncio.sleep(60)

    async def inside(self) -> None:
        await self.event(piece(ids=[5]))
        await self.event(piece(ids=[6]), end="")

    async def page(self) -> None:
        self.set_header("Content-Type", "text/html")
        self.finish("<html>a proxy's page</html>")

    async def wait(self) -> None:
        await asyncio.sleep(0.3)
        await self.pieces(piece(ids=[5]))


BEHAVIOURS: dict[str, Callable] = {
    "good": lambda h: h.pieces(piece(ids=[5]), piece("\u2028y", ids=[6]), piece("", ids=[7], reason="length")),
    "busy": lambda h: asyncio.sleep(0, h.refuse(429, {"error": {"message": "too many requests"}})),
    "broken": lambda h: asyncio.sleep(0, h.refuse(500, "Internal Server Error")),
    "cut": Completions.cut,
    "slow": Completions.slow,
    "inside": Completions.inside,
    "page": Completions.page,
    "wait": Completions.wait,
    "malformed": lambda h: h.pieces(piece(ids=[5]), '{"choices": [', done=False),
    "alien": lambda h: h.pieces({"hello": "world"}),
    "error": lambda h: h.pieces(piece(ids=[5]), {"error": {"message": "CUDA out of memory"}}),
    "undone": lambda h: h.pieces(piece(ids=[5], reason="length"), done=False),
    "empty": lambda h: h.pieces(),
    "aborted": lambda h: h.pieces(piece(ids=[5], reason="abort")),
    # three tokens at once, then two, then one: as token ids, as a running count, as a total at the end, or not told at all
    "ids": lambda h: h.pieces(piece(ids=[1, 2, 3]), piece(ids=[4, 5]), piece(ids=[6], reason="length")),
    "counted": lambda h: h.pieces(piece("", done=0), piece(done=3), piece(done=5), piece("", done=6, reason="length")),
    "total": lambda h: h.pieces(piece(), piece(), piece(), piece("", reason="length"), {"choices": [], "usage": usage(6)}),
    "ending": lambda h: h.pieces(piece(), piece(), piece(), piece("", done=6, reason="length")),
    "untold": lambda h: h.pieces(piece(), piece(), piece("", reason="length")),
}


class Models(RequestHandler):
    def initialize(self, models: object) -> None:
        self.models = models

    def get(self) -> None:
        if self.request.headers.get("Authorization") == "Bearer wrong":
            self.set_status(401)
        self.finish({"object": "list", "data": self.models} if isinstance(self.models, list) else str(self.models))


class Version(RequestHandler):
    def initialize(self, leaves: "ScriptedServer | None") -> None:
        self.leaves = leaves

    def get(self) -> None:
        self.finish({"version": "1.2.3"})

    def on_finish(self) -> None:
        if self.leaves is not None:
            self.leaves.closing.set()


class ScriptedServer:
    """The server in a thread. A context manager; `url`, and `seen`: each request's body by id. `leaves`: once it has said who it is."""

    def __init__(self, models: object = None, *, leaves: bool = False) -> None:
        listed = [{"id": "base", "owned_by": "scripted"}, {"id": "a", "parent": "base"}] if models is None else models
        self.seen: dict[str, dict] = {}
        handlers = [
            ("/v1/models", Models, {"models": listed}),
            ("/version", Version, {"leaves": self if leaves else None}),
            ("/v1/(?:chat/)?completions", Completions, {"seen": self.seen}),
        ]
        self.app = Application(handlers, log_function=lambda handler: None)
        self.sockets = bind_sockets(0, "127.0.0.1")
        self.url = f"http://127.0.0.1:{self.sockets[0].getsockname()[1]}"
        self.is_ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.main()), daemon=True)

    async def main(self) -> None:
        server = HTTPServer(self.app)
        server.add_sockets(self.sockets)
        self.loop, self.closing = asyncio.get_running_loop(), asyncio.Event()
        self.is_ready.set()
        await self.closing.wait()
        server.stop()
        await server.close_all_connections()

    def __enter__(self) -> "ScriptedServer":
        self.thread.start()
        self.is_ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(RuntimeError):  # it has left
            self.loop.call_soon_threadsafe(self.closing.set)
        self.thread.join()
