"""`serve`: an engine behind OpenAI's HTTP interface on a real socket, scheduled by a policy through the replay's own loop."""

import contextlib
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from workbench.config import SLO, FinetuneJob, require
from workbench.policy import Policy, policy_label

if TYPE_CHECKING:
    from workbench.results.replay import Replay

START_S, CLOSE_S = 30.0, 5.0


class Server:
    """A running server: `url` while it runs, `stop()` to end it. A context manager. Make one with `serve`."""

    def __init__(self, run: Any, desk: Any, sockets: Sequence[Any], host: str) -> None:
        self._run, self._desk, self._sockets = run, desk, sockets
        self.port: int = sockets[0].getsockname()[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._replay: Replay | None = None
        self._error: BaseException | None = None
        self._has_stopped = threading.Event()
        self._is_listening = threading.Event()
        self._loop = threading.Thread(target=self._serve, name="workbench-loop", daemon=True)
        self._http = threading.Thread(target=self._listen, name="workbench-http", daemon=True)
        self._http.start()
        require(self._is_listening.wait(START_S), f"the socket must listen within {START_S:g} s", self.url)
        self._loop.start()
        self._run.has_begun.wait()
        if self._error is not None:
            self.stop()

    def _serve(self) -> None:
        try:
            self._replay = self._run.run()
        except BaseException as error:  # said by `stop`, and to every client
            self._error = error
            self._desk.error = f"{type(error).__name__}: {error}"
        finally:
            self._has_stopped.set()

    def _listen(self) -> None:
        import asyncio

        asyncio.run(self._http_loop())

    async def _http_loop(self) -> None:
        import asyncio

        from tornado.httpserver import HTTPServer

        from workbench.serve.app import application

        server = HTTPServer(application(self._desk))
        server.add_sockets(self._sockets)
        self._desk.loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        self._is_listening.set()
        await self._closing.wait()
        server.stop()
        with contextlib.suppress(TimeoutError):  # what was delivered last is on its way to clients, who may be slow
            await asyncio.wait_for(self._desk.drained(), CLOSE_S)
        await server.close_all_connections()

    @property
    def models(self) -> tuple[str, ...]:
        """The names that requests may give: the base's, then its adapters'."""
        model = self._desk.model_of()
        return (model.name, *model.adapters)

    @property
    def error(self) -> str | None:
        """Why the loop failed, if it did; clients get it with status 503."""
        return self._desk.error

    def wait(self) -> None:
        """Until the loop ends by itself, which it does only when it fails."""
        self._has_stopped.wait()

    def stop(self, *, drain: bool = True) -> "Replay | None":
        """End the server, by default once all requests have ended; what it did as a Replay, if it was told to record.

        Raises ReplayError if policy or executor failed.
        """
        self._run.stop(drain=drain)
        self._loop.join()
        if self._http.is_alive():
            self._desk.loop.call_soon_threadsafe(self._closing.set)
            self._http.join()
        if self._error is not None:
            raise self._error
        return self._replay if self._run.keep else None

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.stop(drain=kind is None)

    def __repr__(self) -> str:
        return f"Server({self.url}, {self._run.label} on {self._run.executor.info.name})"


def serve(
    engine: Any,
    *,
    port: int = 0,
    host: str = "127.0.0.1",
    policy: Policy | None = None,
    jobs: Sequence[FinetuneJob] = (),
    slo: SLO | Mapping[str, SLO] | None = None,
    seed: int = 0,
    name: str | None = None,
    record: bool = False,
) -> Server:
    """Serve an `Engine` at `http://host:port/v1` until `.stop()`: /v1/models, /v1/completions, /v1/chat/completions, streamed or not.

    An adapter's name is a model's name, as vLLM has it; `name` is the base's (None: the engine's). `policy` (None: FCFS) schedules the
    requests through ledger and plan beside the fine-tune `jobs`, as in `replay(clock="wall")`. `port=0` takes a free one. `record=True`
    keeps events and steps, which `stop()` gives as a Replay: the server's own side of what its clients measured. There is no
    authentication: serve to others behind a proxy that has it.
    Returns once requests can come. Raises ValueError for a base named as one of its adapters, OSError for a port that is taken,
    RuntimeError for an engine that is busy.
    """
    from importlib.metadata import PackageNotFoundError, version

    from tornado.netutil import bind_sockets

    from workbench.policies import FCFS
    from workbench.serve.app import Desk
    from workbench.serve.completions import Model
    from workbench.serve.live import LiveRun

    base, chosen = name or engine.name, policy or FCFS()
    require(base not in engine.adapter_infos, "the base must not have the name of an adapter", base, "Pass name=.")
    tokenizer = engine.tokenizer
    fast = tokenizer is None or hasattr(tokenizer, "backend_tokenizer")
    require(fast, "the tokenizer must be one of the tokenizers library (tokenizer.json)", type(tokenizer).__name__)
    info = engine.info
    vocab_size = engine.fused.dims.vocab_size
    try:
        release = version("loquetier-workbench")
    except PackageNotFoundError:
        release = "uninstalled"
    # the default asks for no prediction: a policy of one's own may, and the engine measures itself first
    with engine.uncalibrated() if policy is None else contextlib.nullcontext():
        run = LiveRun(engine, chosen, jobs, slo, seed, deliver=lambda deliveries: desk.deliver(deliveries), keep=record)
    about = {"version": f"loquetier-workbench {release}", "engine": info.name, "device": info.device, "policy": policy_label(chosen)}
    desk = Desk(run, lambda: Model(base, tuple(run.known_adapters), tokenizer, vocab_size, info.eos_token_ids), about)
    return Server(run, desk, bind_sockets(port, host), host)
