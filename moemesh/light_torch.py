"""What `import torch` loads and no rank uses, put off until somebody asks for it.

A third of the processor time of a new rank's start, which counts most where many ranks start on few cores.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

UNUSED = ("torch._meta_registrations", "torch.export")
"""Shapes without data, of tensors on the device "meta", and the export of whole models."""


class _PutOff(ModuleType):
    """In the place of a module until something of it is wanted."""

    def __getattr__(self, name: str) -> Any:
        # What Python itself looks for in every module, but for whether it is a package: that comes before a part of it.
        if name.startswith("__") and name != "__path__":
            raise AttributeError(f"{self.__name__} has not been loaded, and so no {name}")
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def put_off_unused() -> None:
    """Before the first `import torch`; later it changes nothing."""
    if "torch" not in sys.modules:
        sys.modules.update({name: _PutOff(name) for name in UNUSED})
