"""`python -m workbench.serve`: a model directory and its adapters behind OpenAI's HTTP interface."""

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import Any

from workbench.config import EngineConfig, did_you_mean, require


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m workbench.serve", description=__doc__)
    made.add_argument("--model", required=True, help="a Hugging Face directory (config.json and safetensors)")
    made.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=DIR", help="a PEFT directory, served as the model NAME; repeatable"
    )
    made.add_argument("--served-model-name", help="what the base is called (default: the directory's name)")
    made.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    made.add_argument("--port", type=int, default=8000, help="port, 0 for a free one (default: %(default)s)")
    made.add_argument("--policy", default="FCFS", help="a policy of workbench.policies with its defaults (default: %(default)s)")
    made.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    made.add_argument("--dtype", help="float32, bfloat16 or float16 (default: bfloat16 on CUDA, float32 on the CPU)")
    made.add_argument("--max-model-len", type=int, help="longest context in tokens (default: the model's, as far as memory allows)")
    made.add_argument("--record", metavar="DIR", help="write what the server did there at its end, as a replay")
    return made


def policy_of(name: str) -> Any:
    """The shipped policy of this name with its defaults; None for the server's own default. Raises ValueError for another name."""
    from workbench import policies

    if name not in policies.__all__ or name == "CATALOGUE":
        known = [n for n in policies.__all__ if n != "CATALOGUE"]
        raise ValueError(f"policy must be one of workbench.policies, got {name!r}. {did_you_mean(name, known)}")
    return None if name == "FCFS" else getattr(policies, name)()


def adapters_of(pairs: Sequence[str]) -> dict[str, str]:
    """{name: directory} of NAME=DIR. Raises ValueError for another form or a name given twice."""
    named = [pair.partition("=") for pair in pairs]
    for (name, sign, folder), pair in zip(named, pairs, strict=True):
        require(bool(name and sign and folder), "adapter must be NAME=DIR", pair)
    names = [name for name, _, _ in named]
    require(len(set(names)) == len(names), "adapter names must be distinct", names)
    return {name: folder for name, _, folder in named}


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; then requests in flight end first, and a second signal ends them too."""
    options = parser().parse_args(arguments)
    try:
        policy, adapters = policy_of(options.policy), adapters_of(options.adapter)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    from workbench.runtime.engine import Engine
    from workbench.serve import serve

    config = EngineConfig(max_model_len=options.max_model_len)
    engine = Engine.from_pretrained(options.model, adapters, device=options.device, dtype=options.dtype, config=config)
    server = serve(
        engine, port=options.port, host=options.host, policy=policy, name=options.served_model_name, record=options.record is not None
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"{server!r} serves {', '.join(server.models)} at {server.url}/v1", flush=True)
    try:
        server.wait()
    except KeyboardInterrupt:
        print("ending once the requests in flight have ended; again to end them too", flush=True)
    try:
        replay = server.stop()
    except KeyboardInterrupt:
        replay = server.stop(drain=False)
    if replay is not None:
        print(f"recorded in {replay.save(options.record)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
