"""The load generator behind `replay_server`: every request at its own time, each stream taken down as it comes, nothing ever retried."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from workbench.config import UnknownAdapterError, did_you_mean, require
from workbench.core import Request
from workbench.server.protocol import DONE, FAILED, PATHS, BrokenStream, EventDecoder, Form, ServerInfo, read_piece, refusal
from workbench.server.result import Heard

if TYPE_CHECKING:
    import httpx

ANSWER_S = 10.0
"""How long the server may take to say what it serves."""
LEAD_S = 0.05
"""Before the clock starts, so that the first request is ready when it is due."""
BEAT_S = 0.02
"""How often the client looks whether it can keep up."""


class Load:
    """One run of the load generator: an event loop in a thread of its own, so that a notebook's loop and Ctrl-C stay as they are."""

    def __init__(
        self,
        requests: tuple[Request, ...],
        url: str,
        api_key: str | None,
        model_of: Callable[[str | None], str] | None,
        form: Form,
        timeout_s: float,
        max_connections: int | None,
    ) -> None:
        self.requests, self.form, self.timeout_s, self.max_connections = requests, form, timeout_s, max_connections
        self.url = url.rstrip("/").removesuffix("/v1")
        require(self.url.startswith(("http://", "https://")), "url must begin with http:// or https://", url)
        self.headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if api_key is not None:
            self.headers["Authorization"] = f"Bearer {api_key}"
        self.model_of = model_of
        self.children: dict[str, list[Request]] = {}
        for request in requests:
            if request.parent_id is not None:
                self.children.setdefault(request.parent_id, []).append(request)
        self.heard: dict[str, Heard] = {}
        self.pauses: list[float] = []
        self.info: ServerInfo | None = None
        self.bar: Any = None

    def run(self, progress: bool | None) -> bool:
        """Send everything; whether Ctrl-C ended it. Raises what the preparation raises."""
        if progress is not False:
            from tqdm.auto import tqdm

            delay = 0 if progress else 3.0
            self.bar = tqdm(total=len(self.requests), desc="requests to the server", unit="req", leave=False, delay=delay)
        failure: list[BaseException] = []
        started: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = []

        async def main() -> None:
            task = asyncio.current_task()
            assert task is not None
            started.append((asyncio.get_running_loop(), task))
            await self._run()

        def thread() -> None:
            try:
                asyncio.run(main())
            except BaseException as error:
                failure.append(error)

        worker = threading.Thread(target=thread, name="workbench-load", daemon=True)
        worker.start()
        interrupted = False
        try:
            worker.join()
        except KeyboardInterrupt:
            interrupted = True
            while not started and worker.is_alive():
                time.sleep(0.001)
            for loop, task in started:
                with contextlib.suppress(RuntimeError):  # the loop has just ended
                    loop.call_soon_threadsafe(task.cancel)
            worker.join()
        finally:
            if self.bar is not None:
                self.bar.close()
        if interrupted and self.info is None:
            raise KeyboardInterrupt
        if failure and not (interrupted and isinstance(failure[0], asyncio.CancelledError)):
            raise failure[0]
        return interrupted

    async def _run(self) -> None:
        import httpx

        # our own timeout is the only one: httpx's would cut what is merely slow; and no proxy of the environment stands in between
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=self.url, headers=self.headers, timeout=None, limits=limits, trust_env=False) as client:
            self.info = await self._describe(client)
            names = {adapter: self._model(adapter, self.info) for adapter in {r.adapter for r in self.requests}}
            self.client, self.models = client, names
            self.gate = contextlib.nullcontext() if self.max_connections is None else asyncio.Semaphore(self.max_connections)
            self.zero_s = time.perf_counter() + LEAD_S
            beat = asyncio.create_task(self._beat())
            try:
                async with asyncio.TaskGroup() as group:
                    self.group = group
                    group.create_task(self._open())
            finally:
                beat.cancel()

    # what is there

    async def _describe(self, client: "httpx.AsyncClient") -> ServerInfo:
        """What the server says of itself. Raises ConnectionError where none answers."""
        import httpx

        step = "Start the server, or check url=."
        try:
            answer = await client.get("/v1/models", timeout=ANSWER_S)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            said = f"{type(error).__name__}: {error}"
            raise ConnectionError(f"a server must answer at {self.url}/v1/models, got {said}. {step}") from error
        require(answer.status_code not in (401, 403), "api_key must be one that the server takes", f"HTTP {answer.status_code}")
        models: tuple[str, ...] = ()
        bases: list[str] = []
        owner = None
        if answer.status_code == 200:
            try:
                listed = answer.json()["data"]
                models = tuple(str(entry["id"]) for entry in listed)
                bases = [str(entry["id"]) for entry in listed if not entry.get("parent")]
                owner = next((str(entry["owned_by"]) for entry in listed if entry.get("owned_by")), None)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                said = f"{type(error).__name__}: {error}"
                raise ConnectionError(f"{self.url}/v1/models must list models in OpenAI's form, got {said}. {step}") from error
        elif answer.status_code != 404:
            raise ConnectionError(
                f"a server must answer at {self.url}/v1/models, got {refusal(answer.status_code, answer.content)}. {step}"
            )
        self.base = bases[0] if bases else None
        version = await self._version(client)
        software = owner or answer.headers.get("server") or "server"
        name = software if version is None else version if software in version else f"{software} {version}"
        place = client.base_url.netloc.decode()
        return ServerInfo(
            name=f"{name} serving {self.base}" if self.base else name,
            device=f"{place} over HTTP, in wall-clock time",
            url=self.url,
            models=models,
            version=version,
        )

    async def _version(self, client: "httpx.AsyncClient") -> str | None:
        """vLLM's and our own /version, SGLang's /server_info (once /get_server_info); None where there is none of them."""
        import httpx

        for path in ("/version", "/server_info", "/get_server_info"):
            with contextlib.suppress(httpx.TransportError, ValueError, KeyError, TypeError):
                answer = await client.get(path, timeout=ANSWER_S)
                if answer.status_code == 200:
                    return str(answer.json()["version"])
        return None

    def _model(self, adapter: str | None, info: ServerInfo) -> str:
        if self.model_of is not None:
            name = self.model_of(adapter)
        else:
            name = adapter if adapter is not None else self.base
        if name is None:
            raise ValueError(f"{self.url} lists no model, so that the base has no name. Pass model_of=lambda adapter: name.")
        if info.models and name not in info.models:
            raise UnknownAdapterError(f"the server lists no model {name!r}. {did_you_mean(name, info.models)}")
        return name

    # the load

    def _now(self) -> float:
        return time.perf_counter() - self.zero_s

    async def _until(self, at: float) -> None:
        left_s = at - self._now()
        if left_s > 0:
            await asyncio.sleep(left_s)

    async def _beat(self) -> None:
        """How much later than asked this loop comes round: so late may a time be that it takes down."""
        while True:
            before = time.perf_counter()
            await asyncio.sleep(BEAT_S)
            self.pauses.append(max(0.0, time.perf_counter() - before - BEAT_S))

    async def _open(self) -> None:
        for request in sorted((r for r in self.requests if r.parent_id is None), key=lambda r: r.arrival_s):
            body = self._body(request)
            await self._until(request.arrival_s)
            self.group.create_task(self._one(request, body, request.arrival_s))

    async def _next_turn(self, request: Request, at: float) -> None:
        body = self._body(request)
        await self._until(at)
        await self._one(request, body, at)

    def _body(self, request: Request) -> bytes:
        return self.form.body(request, self.models[request.adapter])

    async def _one(self, request: Request, body: bytes, due_s: float) -> None:
        """One request from its time to its end, whatever that is."""
        heard = self.heard[request.request_id] = Heard(request, due_s, self.form.asked_tokens(request))
        heard.is_held = isinstance(self.gate, asyncio.Semaphore) and self.gate.locked()
        async with self.gate:
            heard.sent_s = self._now()
            kind, note = await self._outcome(heard, body)
            heard.end = (kind, self._now(), note)
        if self.bar is not None:
            self.bar.update()
        for child in self.children.get(request.request_id, ()):
            self.group.create_task(self._next_turn(child, heard.end[1] + child.think_s))

    async def _outcome(self, heard: Heard, body: bytes) -> tuple[str, str]:
        import httpx

        try:
            async with asyncio.timeout(self.timeout_s):
                return await self._stream(heard, body)
        except TimeoutError:
            return "aborted", f"timeout: no end within {self.timeout_s:g} s, {len(heard.pieces)} pieces came"
        except BrokenStream as error:
            return "aborted", str(error)
        except httpx.ConnectError as error:
            return "rejected", f"no connection: {error}"
        except httpx.TransportError as error:
            return "aborted", f"connection cut after {len(heard.pieces)} pieces: {type(error).__name__}: {error}"
        except Exception as error:  # one request's trouble is its own: the others go on
            return "aborted", f"the client failed: {type(error).__name__}: {error}"

    async def _stream(self, heard: Heard, body: bytes) -> tuple[str, str]:
        headers = {"X-Request-Id": heard.request.request_id}
        async with self.client.stream("POST", PATHS[self.form.endpoint], content=body, headers=headers) as response:
            if response.status_code != 200:
                return "rejected", refusal(response.status_code, await response.aread())
            kind = response.headers.get("content-type", "")
            if not kind.startswith("text/event-stream"):
                return "aborted", f"not a stream of events, but {kind or 'nothing said'}: {refusal(200, await response.aread())}"
            async for data, at in self._events(response):
                if data == DONE:
                    return _end_of(heard)
                before = 0 if not heard.pieces else None
                heard.hear(read_piece(data, before if heard.completion_tokens is None else heard.completion_tokens), at)
        return "aborted", f"the stream ended without {DONE} after {len(heard.pieces)} pieces"

    async def _events(self, response: "httpx.Response") -> AsyncIterator[tuple[str, float]]:
        decoder = EventDecoder()
        async for raw in response.aiter_raw():
            at = self._now()
            for data in decoder.feed(raw):
                yield data, at
        if decoder.is_cut:
            raise BrokenStream("the stream ended inside an event")


def _end_of(heard: Heard) -> tuple[str, str]:
    if heard.finish_reason in FAILED:
        return "aborted", f"the server ended it: finish_reason {heard.finish_reason!r}"
    if not heard.counts():
        return "aborted", "the stream ended without a token"
    return "finished", heard.finish_reason or ""
