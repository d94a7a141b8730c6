"""Find the implementations of an interface in a package, so that adding one is adding a file."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


def implementations(package: ModuleType, base: type[T]) -> list[type[T]]:
    """Import every module of a package and return the subclasses of `base` defined in it.

    The order is that of the module names.
    """
    classes: list[type[T]] = []
    for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
        members = vars(importlib.import_module(f"{package.__name__}.{module}"))
        classes += [
            member
            for member in members.values()
            if isinstance(member, type)
            and issubclass(member, base)
            and member is not base
            and member.__module__ == f"{package.__name__}.{module}"
        ]
    return classes
