"""Methods: what trains and how it is bound to the base. `methods` finds every Method in this folder by itself."""

import importlib
import pkgutil

from ..model import Weight, static
from . import merging, hf, masks, rows
from .base import Chain, Method, apply, chain, count, fold, merge, partition
from .methods.subset import Subset

methods: dict[str, type[Method]] = {}  # CLI name -> class: every public Method of every file here
for _info in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f"{__name__}.{_info.name}")
    for _name, _class in list(vars(_module).items()):
        if isinstance(_class, type) and issubclass(_class, Method) and _class.__module__ == _module.__name__:
            methods[_name.lower()] = globals()[_name] = _class
for _name in ("method", "chain"):  # the base, and what only `chain` makes
    del methods[_name]

__all__ = [
    "Chain", "Method", "Subset", "Weight", "apply", "arithmetic", "chain", "count", "fold", "hf", "masks", "merge",
    "methods", "partition", "rows",
    "static", *sorted(c.__name__ for c in methods.values() if c is not Subset),
]  # fmt: skip
