"""The modules of a transformers model, and the rules that pick their parameters here."""

import dataclasses
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, Literal, NamedTuple

from ...model.config import Config
from ...model.pattern import compile_pattern
from ...model.tree import true_ranges

Place = tuple[str, int | None]  # path of a parameter without its layer, and the layer


class Module(NamedTuple):
    """One module of a transformers model that has a weight."""

    name: str
    path: str  # of its weight here, without a layer: `layers/attn/q`
    layer: int | None
    kind: Literal["matrix", "table", "position table", "norm", "tied head"]
    bias: str  # path of its bias, or empty
    shape: tuple[int, ...]  # of its weight here

    @property
    def places(self) -> list[Place]:
        """The places of the weight and, if there is one, of the bias."""
        return [(path, self.layer) for path in (self.path, self.bias) if path]


@dataclasses.dataclass(frozen=True)
class HFModel:
    """The model that transformers makes of a config: its modules by name, and the rules that pick them here."""

    config: Config
    family: str  # model_type
    conv1d: bool  # its matrices lie as [in, out], as they do here
    modules: Mapping[str, Module]
    shapes: Any  # the params tree of stacked layers, as shapes

    @cached_property
    def at(self) -> dict[Place, Module]:
        """The module of each weight and bias."""
        return {place: module for module in self.modules.values() for place in module.places}

    @property
    def table(self) -> Module:
        """The module of the token table."""
        return self.at["embed/table", None]

    def rules(self, values: Mapping[Place, Any]) -> tuple[tuple[str, Any], ...]:
        """Return rules that give each place its value; layers of one value share a rule."""
        order = {place: i for i, place in enumerate(self.at)}
        rows: dict[str, dict[int | None, Any]] = {}
        for path, layer in sorted(values, key=lambda place: order[place]):
            rows.setdefault(path, {})[layer] = values[path, layer]
        rules, L = [], self.config.L
        for path, row in rows.items():
            for value in dict.fromkeys(row.values()):
                for start, stop in [(0, L)] if None in row else true_ranges([row.get(i) == value for i in range(L)]):
                    part = None not in row and (start, stop) != (0, L)
                    rules.append((path.replace("layers/", f"layers/[{start}:{stop}]/") if part else path, value))
        return tuple(rules)

    def where(self, places: Iterable[Place]) -> str:
        """Return the rule, with commas between its parts, that picks the places."""
        return ", ".join(rule for rule, _ in self.rules(dict.fromkeys(places, True)))

    def short_names(self, modules: Iterable[Module]) -> list[str]:
        """Return target_modules that mean exactly the modules: the shortest ends of their paths, or whole paths."""
        names = {module.name for module in modules}
        for parts in (1, 2):
            ends = {".".join(name.split(".")[-parts:]) for name in names}
            if all(ends_with(name, ends) == (name in names) for name in self.modules):
                return sorted(ends)
        return sorted(names)

    @property
    def prompt_sizes(self) -> dict[str, Any]:
        """The sizes that the config of a prompt repeats."""
        config = self.config
        return {"num_layers": config.L, "num_attention_heads": config.N, "token_dim": config.D,
                "num_transformer_submodules": 1}  # fmt: skip


def ends_with(module: str, names: Iterable[str]) -> bool:
    """Return whether a name is the path of a module, or its end from a dot on: HF PEFT's rule for lists."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first key that matches the end of a module's path, from a dot on."""
    return next(
        (x for key, x in (patterns or {}).items() if compile_pattern(rf"(.*\.)?({key})$").match(module)), default
    )


def by_suffix(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first key that matches the end of a longer path, else that of the path itself."""
    values = patterns or {}
    return next(
        (x for key, x in values.items() if compile_pattern(rf".*\.{key}$").match(module)), values.get(module, default)
    )
