"""Write docs/policies.md: a line per shipped policy, made from its docstring and its fields. `make format` runs it."""

import sys
from dataclasses import MISSING, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from workbench.fleet.routers import ROUTERS, StaticSplit  # noqa: E402
from workbench.policies import CATALOGUE  # noqa: E402  (scripts are no package)

TABLE = ROOT / "docs" / "policies.md"
HEAD = """# Policies

Each is a class in `workbench/policies/`, used as `wb.policies.NAME(...)`; its docstring has the rule in full. Made by `make format` from
those docstrings. 19 is `wb.StaticSplit(...)`: it needs a `wb.Fleet` of at least two replicas.

| | policy | what it does | source | parameters and defaults |
| --- | --- | --- | --- | --- |
"""
ROUTER_HEAD = """
## Routers

Which replica of a `wb.Fleet` a request goes to: `wb.routers.NAME(...)`, or a function `(request, fleet) -> int`.

| | router | what it does | source | parameters and defaults |
| --- | --- | --- | --- | --- |
"""


def on_one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(".:").replace("|", "\\|")


def parameters(policy: type) -> str:
    """The fields that are parameters: those in the repr."""
    shown = []
    for f in fields(policy):
        if f.repr:
            default = f.default if f.default_factory is MISSING else f.default_factory()
            shown.append(f"`{f.name}={default!r}`")
    return ", ".join(shown) or "none"


def row(number: int | str, policy: type) -> str:
    doc = policy.__doc__ or ""
    if "Source: " not in doc:
        raise ValueError(f"a policy's docstring must have a line `Source: ...`, {policy.__name__} has none")
    source = doc.split("Source: ")[1].split("\n\n")[0]
    return f"| {number} | `{policy.__name__}` | {on_one_line(doc.split(chr(10) * 2)[0])} | {on_one_line(source)} | {parameters(policy)} |"


def table() -> str:
    numbered = sorted((CATALOGUE | {19: (StaticSplit,)}).items())
    policies = [row(number, policy) for number, chosen in numbered for policy in chosen]
    return HEAD + "\n".join(policies) + "\n" + ROUTER_HEAD + "\n".join(row("", router) for router in ROUTERS) + "\n"


def main() -> None:
    TABLE.write_text(table(), encoding="utf-8")


if __name__ == "__main__":
    main()
