"""Write docs/policies.md: a line per shipped policy, made from its docstring and its fields. `make format` runs it."""

import sys
from dataclasses import MISSING, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from workbench.policies import CATALOGUE  # noqa: E402  (scripts are no package)

TABLE = ROOT / "docs" / "policies.md"
HEAD = """# Policies

Each is a class in `workbench/policies/`, used as `wb.policies.NAME(...)`; its docstring has the rule in full. Made by `make format` from
those docstrings. 19, a static split of replicas, needs more than one executor and is not there.

| | policy | what it does | source | parameters and defaults |
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


def row(number: int, policy: type) -> str:
    doc = policy.__doc__ or ""
    if "Source: " not in doc:
        raise ValueError(f"a policy's docstring must have a line `Source: ...`, {policy.__name__} has none")
    source = doc.split("Source: ")[1].split("\n\n")[0]
    return f"| {number} | `{policy.__name__}` | {on_one_line(doc.split(chr(10) * 2)[0])} | {on_one_line(source)} | {parameters(policy)} |"


def table() -> str:
    return HEAD + "\n".join(row(number, policy) for number, chosen in CATALOGUE.items() for policy in chosen) + "\n"


def main() -> None:
    TABLE.write_text(table(), encoding="utf-8")


if __name__ == "__main__":
    main()
