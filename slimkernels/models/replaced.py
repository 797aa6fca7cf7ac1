"""Replaces attributes of modules for the calls of one thread, invisibly to other threads, copies and pickles.

A replacement is kept in a context variable, never on the module, which other threads may call at the same time. While
any thread replaces attributes of a module, the module's class is a subclass that looks them up there, with the name of
the class it stands for.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch import nn

_replacements: ContextVar[tuple[tuple[nn.Module, dict[str, Any]], ...]] = ContextVar("replacements", default=())
_lock = threading.Lock()
# The number of contexts, of all threads, in which a module has replaced attributes.
_num_contexts: dict[nn.Module, int] = {}


@contextlib.contextmanager
def replaced(module: nn.Module, **attributes: Any) -> Iterator[None]:
    """Makes ``module.NAME`` the given value within the context, in this thread (or asyncio task) only.

    Calls of ``module``, or of a wrapper around it, run a replaced ``forward``, with the hooks of the module.

    Args:
        module: The module.
        **attributes: Values of methods and properties of the module's class.
    """
    token = _replacements.set((*_replacements.get(), (module, attributes)))
    with _lock:
        _num_contexts[module] = _num_contexts.get(module, 0) + 1
        if not isinstance(module, _Replaceable):
            module.__class__ = _replaceable(type(module))
    try:
        yield
    finally:
        with _lock:
            _num_contexts[module] -= 1
            if not _num_contexts[module]:
                del _num_contexts[module]
                # The class is another where something, such as FSDP2, has changed it since; it can stay.
                if type(module).__dict__.get("_is_replaceable"):
                    module.__class__ = type(module).__mro__[2]
        _replacements.reset(token)


def subclass_of(base: type, mixin: type, **namespace: Any) -> type:
    """Makes a subclass of ``mixin`` and ``base`` that shows the name of ``base``, as saved configurations hold it."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (mixin, base), names | namespace)


class _Replaceable:
    """A base class of the classes that look up replaced attributes; their instances are pickled as the class below."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, arguments, *rest = super().__reduce_ex__(max(2, protocol))  # pyright: ignore[reportGeneralTypeIssues]
        if arguments and arguments[0] is type(self):
            make, arguments = new_instance, (type(self).__mro__[2],)
        return make, arguments, *rest


def new_instance(cls: type) -> Any:
    """Makes an instance of a class without initialising it, for pickles."""
    return object.__new__(cls)


@functools.cache
def _replaceable(base: type) -> type:
    names = [name for name in ("forward", "loss_function") if hasattr(base, name)]
    return subclass_of(
        base, _Replaceable, _is_replaceable=True, **{name: _ReplaceableAttribute(base, name) for name in names}
    )


class _ReplaceableAttribute:
    """A descriptor that returns the replacement of this context, if there is one, and else what ``base`` has.

    It sets and deletes what ``base`` would, such as a ``forward`` that accelerate sets on the instance.
    """

    def __init__(self, base: type, name: str) -> None:
        self.name = name
        self.inherited = inspect.getattr_static(base, name)
        self.is_property = hasattr(self.inherited, "__set__")

    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        if module is None:
            return self.inherited.__get__(None, owner)
        for replaced_module, attributes in reversed(_replacements.get()):
            if replaced_module is module and self.name in attributes:
                return attributes[self.name]
        if not self.is_property and self.name in module.__dict__:
            return module.__dict__[self.name]
        return self.inherited.__get__(module, owner)

    def __set__(self, module: nn.Module, value: Any) -> None:
        if self.is_property:
            self.inherited.__set__(module, value)
        else:
            module.__dict__[self.name] = value

    def __delete__(self, module: nn.Module) -> None:
        if self.is_property:
            self.inherited.__delete__(module)
        elif self.name in module.__dict__:
            del module.__dict__[self.name]
        else:
            raise AttributeError(self.name)
