"""The virtualized module: many adapted views of one set of base weights."""

from weakref import WeakKeyDictionary, WeakSet

from torch import nn

_VIEWS: "WeakKeyDictionary[nn.Module, WeakSet[nn.Module]]" = WeakKeyDictionary()


def has_views(base: nn.Module) -> bool:
    """Whether views of `base` are alive."""
    return bool(_VIEWS.get(base))
