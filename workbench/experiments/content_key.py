"""Keys by content: what a run depends on, as a hash that is the same in every process, and differs when the run could.

Code counts by its bytecode (of one Python version), so that a class written in a notebook cell has a key of its own, and neither
comments nor its place in the file change it.
"""

import dataclasses
import dis
import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from enum import Enum
from functools import cache, cached_property, partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import pandas as pd

# What decides neither what a replay does nor what its summary says: a change in one of these keeps the results of earlier runs.
# (Policies and widgets are not read as files: a policy counts by its own code.)
NOT_PART_OF_A_RUN = (
    "__init__.py",
    "check.py",
    "verify.py",
    "bench/",
    "experiments/",
    "latency/whole_replays.py",
    "model_error.py",
    "plots/",
    "policies/",
    "runtime/",
    "serve/",
    "widgets/",
)
IGNORED = {
    "__module__",
    "__dict__",
    "__weakref__",
    "__doc__",
    "__annotations__",
    "__firstlineno__",
    "__static_attributes__",
    "__match_args__",
}
IGNORED |= {
    "__dataclass_fields__",
    "__dataclass_params__",
    "__parameters__",
    "__abstractmethods__",
    "_abc_impl",
    "__annotate_func__",
    "__slotnames__",
}


def content_key(*values: Any) -> str:
    """32 hex digits of the content of values: numbers, text, containers, dataclasses, frames, functions, classes and their instances.

    An object with `identity()` counts as what that returns. A path counts as the bytes of its file. Raises TypeError, naming the value,
    for what has no content to hash (open files, tensors, generators).
    """
    digest = hashlib.blake2b(digest_size=16)
    _Walk(digest.update).value(values, "value")
    return digest.hexdigest()


@cache
def code_version() -> str:
    """16 hex digits of the package's modules that decide what a replay does (the engine and the kernels are not among them)."""
    digest = hashlib.blake2b(f"{sys.version_info[:2]}".encode(), digest_size=8)
    package = Path(__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        name = file.relative_to(package).as_posix()
        if not name.startswith(NOT_PART_OF_A_RUN):
            digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


class _Walk:
    """Feeds a digest with tagged content; what refers to itself, and code, is fed once."""

    def __init__(self, feed: Callable[[bytes], Any]) -> None:
        self.feed_bytes = feed
        self.open: dict[int, int] = {}

    def feed(self, tag: str, content: str | bytes = b"") -> None:
        content = content.encode() if isinstance(content, str) else content
        self.feed_bytes(f"{tag}:{len(content)}:".encode() + content)

    def value(self, value: Any, where: str) -> None:
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, type(Ellipsis))):
            self.feed(type(value).__name__, value if isinstance(value, bytes) else repr(value))
            return
        if isinstance(value, np.generic):
            self.feed("scalar", f"{value.dtype}{value!r}")
            return
        if id(value) in self.open:
            self.feed("again", str(self.open[id(value)]))
            return
        self.open[id(value)] = len(self.open)
        try:
            if not (self.container(value, where) or self.data(value) or self.code(value, where)):
                self.instance(value, where)
        finally:
            # code is one object wherever it is named; equal data may be one object here and two in another process
            if not isinstance(value, (FunctionType, type)):
                del self.open[id(value)]

    def container(self, value: Any, where: str) -> bool:
        if isinstance(value, Mapping):
            self.feed("mapping", str(len(value)))
            for key in sorted(value, key=repr):
                self.value(key, f"a key of {where}")
                self.value(value[key], f"{where}[{key!r}]")
        elif isinstance(value, Set):
            self.feed("set", "|".join(sorted(content_key(v) for v in value)))
        elif isinstance(value, range) or (isinstance(value, Sequence) and type(value) in (list, tuple)):
            self.feed("sequence", str(len(value)))
            for i, one in enumerate(value):
                self.value(one, f"{where}[{i}]")
        else:
            return False
        return True

    def data(self, value: Any) -> bool:
        if isinstance(value, np.ndarray) and value.dtype != object:
            self.feed("array", f"{value.dtype}{value.shape}")
            self.feed("bytes", np.ascontiguousarray(value).tobytes())
        elif isinstance(value, (pd.DataFrame, pd.Series)):
            self.feed("frame", repr(list(value.columns) if isinstance(value, pd.DataFrame) else value.name))
            self.feed("bytes", pd.util.hash_pandas_object(value).to_numpy().tobytes())
        elif isinstance(value, Path):
            self.feed("file", value.read_bytes() if value.is_file() else repr(value))
        else:
            return False
        return True

    def code(self, value: Any, where: str) -> bool:
        if isinstance(value, partial):
            self.value([value.func, value.args, value.keywords], where)
        elif isinstance(value, MethodType):
            self.value([value.__func__, value.__self__], where)
        elif isinstance(value, FunctionType):
            self.function(value, where)
        elif isinstance(value, (staticmethod, classmethod)):
            self.value(value.__func__, where)
        elif isinstance(value, property):
            self.value([value.fget, value.fset], where)
        elif isinstance(value, cached_property):
            self.value(value.func, where)
        elif isinstance(value, Enum):
            self.value([type(value).__qualname__, value.name, value.value], where)
        elif isinstance(value, type):
            self.type(value, where)
        elif isinstance(value, ModuleType) or inspect.isbuiltin(value):
            self.feed("name", getattr(value, "__name__", repr(value)))
        elif callable(value) and isinstance(getattr(value, "__name__", None), str) and is_installed(type(value).__module__):
            self.feed("name", f"{getattr(value, '__module__', '')}.{value.__name__}")
        else:
            return False
        return True

    def function(self, function: FunctionType, where: str) -> None:
        """Its code, defaults, closure, and the globals that it uses."""
        # code run by exec() without a module's name says "builtins", where no Python function is
        if function.__module__ != "builtins" and is_installed(function.__module__):
            self.feed("name", f"{function.__module__}.{function.__qualname__}")
            return
        self.code_object(function.__code__)
        self.value([function.__defaults__, function.__kwdefaults__], where)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                self.value(cell.cell_contents, f"{name} in {where}")
            except ValueError:
                self.feed("empty cell", name)
        for name in sorted(_names(function.__code__)):
            if name in function.__globals__ and not name.startswith("__"):
                self.feed("global", name)
                self.value(function.__globals__[name], f"{name} in {where}")

    def code_object(self, code: CodeType) -> None:
        self.feed("code", code.co_code)
        self.feed("names", repr((code.co_names, code.co_varnames, code.co_freevars, code.co_flags)))
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self.code_object(constant)
            elif isinstance(constant, frozenset):
                self.feed("constant", repr(sorted(constant, key=repr)))
            else:
                self.feed("constant", repr(constant))

    def type(self, cls: type, where: str) -> None:
        self.feed("class", cls.__qualname__)
        if is_installed(cls.__module__):
            self.feed("module", cls.__module__)
            return
        for base in cls.__bases__:
            self.value(base, where)
        for name, member in sorted(vars(cls).items()):
            # what @dataclass writes follows from the fields
            made = isinstance(member, FunctionType) and member.__code__.co_filename == "<string>"
            if name not in IGNORED and not made and not inspect.ismemberdescriptor(member) and not inspect.isgetsetdescriptor(member):
                self.feed("member", name)
                self.value(member, f"{cls.__qualname__}.{name}")

    def instance(self, value: Any, where: str) -> None:
        """An object: what it says it is, or its class and what it holds."""
        identity = getattr(value, "identity", None)
        self.value(type(value), where)
        if callable(identity):
            self.feed("identity", str(identity()))
        elif dataclasses.is_dataclass(value):
            for f in dataclasses.fields(value):
                self.feed("field", f.name)
                self.value(getattr(value, f.name), f"{where}.{f.name}")
        elif hasattr(value, "__dict__") and not is_installed(type(value).__module__):
            for name, held in sorted(vars(value).items()):
                self.feed("attribute", name)
                self.value(held, f"{where}.{name}")
        else:
            raise TypeError(
                f"a key needs values with content, got {type(value).__name__} as {where}. "
                "Give its class a method identity() -> str, or run without a cache (cache=None)."
            )


def _names(code: CodeType) -> set[str]:
    """Globals that a function and the functions inside it look up."""
    own = {str(i.argval) for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return own.union(*(_names(c) for c in code.co_consts if isinstance(c, CodeType)))


@cache
def is_installed(module: str | None) -> bool:
    """Whether a module is part of Python or an installed package: its version stands for its code. Ours is read by `code_version`."""
    if module is None or module == "__main__":
        return False
    root = module.split(".")[0]
    if root in sys.stdlib_module_names or root == "workbench":
        # policies are code of their own; the rest of the package is in code_version
        return not module.startswith(("workbench.policies", "workbench.widgets"))
    file = getattr(sys.modules.get(root), "__file__", None) or getattr(sys.modules.get(module), "__file__", None)
    return file is not None and any(part in ("site-packages", "dist-packages") for part in Path(file).parts)
