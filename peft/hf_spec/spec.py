"""How Hugging Face PEFT stores a method: the data that each method declares beside itself, `hf = HFSpec(...)`.

    class LoHa(Method):
        hf = HFSpec(
            "LOHA",                                                       # peft_type in adapter_config.json
            keys={"r": Key(8, "rank"), "alpha": Key(8.0, "alpha")},       # its keys: HF PEFT's default, our field
            tensors=TRANSPOSED.tensors(b1="hada_w1_a", a1="hada_w1_b"),   # arrays in adapter_model.safetensors
        )

The reader and the writer over specs are in peft/hf. What a table cannot say, a spec says by hooks: small functions in
the method's file. The classes of one peft_type differ by `flags`: DoRA is LORA with use_dora.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Literal, NamedTuple

from .modules import HFModel, Module, Place, by_pattern
from .values import LAYERS, NAME_LIST, NAMES, NUMBERS, RANKS, ValueKind, kind_like

PREFIX = "base_model.model."  # of the tensors of a module
AdapterConfig = dict[str, Any]  # an adapter_config.json
Tensors = dict[str, Any]  # {name: array} of an adapter_model.safetensors


# Keys of the prompts' configs that repeat the sizes of the model.
PROMPT_NEUTRAL = ("num_layers", "num_attention_heads", "token_dim", "num_transformer_submodules")


class Layout(NamedTuple):
    """How HF PEFT lays an array out, and a gradient, if that transforms in another way."""

    from_hf: Callable[[Any], Any]
    to_hf: Callable[[Any], Any]
    grad_to_hf: Callable[[Any], Any] | None = None
    embed_scaled: bool = False  # HF PEFT has it behind the scale of Gemma's embeddings, graftax before it

    def scaled(self, factor: float) -> "Layout":
        """Return the layout of an array that HF PEFT has multiplied by `factor`."""
        return Layout(lambda x: self.from_hf(x) / factor, lambda x: self.to_hf(x) * factor,
                      lambda x: self.to_hf(x) / factor)  # fmt: skip

    def tensors(self, **names: str) -> "dict[str, HFTensor]":
        """Return the tensors of arrays that all have this layout: array="name in the file"."""
        return {array: HFTensor(name, self) for array, name in names.items()}


class HFTensor(NamedTuple):
    """One tensor of a file: its name behind that of its module (see `HFSpec.owner`), and its layout."""

    name: str
    layout: Layout


IDENTITY = Layout(lambda x: x, lambda x: x)
TRANSPOSED = Layout(lambda x: x.T, lambda x: x.T)
COLUMN = Layout(lambda x: x[:, 0], lambda x: x[:, None])
ROW = Layout(lambda x: x[0], lambda x: x[None])


class Key(NamedTuple):
    """One key of an adapter_config.json, whose value may differ between modules."""

    default: Any  # of HF PEFT
    field: str = ""  # of the method
    kind: ValueKind | None = None  # of its values, if not those like the default
    exceptions: str = ""  # key that holds other values for some modules
    rules: str = ""  # field that holds them; without it, modules that differ get methods of their own
    find: Callable[[Any, str, Any], Any] = by_pattern  # (exceptions, module, default) -> value
    fixed_default: bool = False  # the key keeps its value, and `write_modules` writes the exceptions


MODULE_KEYS = {"target_modules": Key(None, kind=NAMES), "exclude_modules": Key(None, kind=NAMES),
               "layers_pattern": Key(None, kind=NAMES), "layers_to_transform": Key(None, kind=LAYERS),
               "modules_to_save": Key(None, kind=NAME_LIST)}  # fmt: skip


class Entry(NamedTuple):
    """One tensor of a file, and the array, or the layer of an array, that it is in a trainable tree."""

    name: str
    layout: Layout
    branch: str  # of a chain, else empty
    key: str
    leaf: str  # empty: the key holds the array itself
    layer: int | None  # index into a stacked array


class AdapterFile(NamedTuple):
    """What the names of a method's tensors depend on besides its own arrays."""

    model: HFModel
    alone: bool  # no other method is the file's main one
    adapted: frozenset[str]  # paths that the main method wraps


class Picked(NamedTuple):
    """The modules that a config names."""

    targets: list[Module]
    saved: list[Module]  # by modules_to_save
    biased: list[Module]  # by bias


class Companion(NamedTuple):
    """How HF PEFT keeps what trains beside a main method: whole modules, biases, rows of the token table."""

    read: Callable[[AdapterConfig, Picked, HFModel], Any]  # the method, or None
    # (method, what it trains, targets of the main method, its spec, model) -> keys of the config
    write: Callable[[Any, set[Place], list[Module], "HFSpec", HFModel], AdapterConfig]
    # (what it trains, model) -> the spec of a file that holds this method alone; None: there is none
    alone: Callable[[set[Place], HFModel], "HFSpec | None"] = lambda places, model: None
    last: bool = False  # bound after the main method


class SharedProjections(NamedTuple):
    """Random projections that all targets share, stored once in a file or drawn again from the config's seed.

    A method has them in its field `given`, as FixedArrays `a` and `b`, with `drawn` if they are not stored.
    """

    names: tuple[str, str]
    projections: Callable[[Any, int, int], Any]  # (method, largest D, largest F) -> the two arrays
    draw: Callable[[Any, Any, int, int], Any]  # (torch's generator, method, D, F) -> those that HF PEFT draws
    copied: bool = False  # each target has a copy in the file

    @staticmethod
    def stored(method: Any) -> bool:
        """Return whether the file of a method holds the projections."""
        return method.given is None or "drawn" not in method.given


class FixedTensors(NamedTuple):
    """Tensors of a file that do not train and that each target has for itself."""

    # (method, its entries, its trainable tree, params, tensors) -> the method with them; takes them out of `tensors`
    from_hf: Callable[[Any, list[Entry], Any, Any, Tensors], Any]
    to_hf: Callable[[Any, list[Entry], Any, Any], Tensors]  # (method, its entries, its trainable tree, shapes)
    integers: tuple[str, ...] = ()  # ends of the names of those that are whole numbers


def no_fields(*_: Any) -> dict[str, Any]:
    """Return nothing: the hook of a spec that has nothing to add."""
    return {}


@dataclasses.dataclass(frozen=True)
class HFSpec:
    """How HF PEFT stores a method. An empty spec: it has no type for it."""

    type: str = ""
    keys: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # key of the config -> a Key, or its default
    neutral: tuple[str, ...] = ()  # keys that change nothing that is computed here
    tensors: Mapping[str, HFTensor] = dataclasses.field(default_factory=dict)  # array -> tensor
    table_tensors: Mapping[str, HFTensor] = dataclasses.field(default_factory=dict)  # the same of a token table
    flags: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # values of the config that mean this class
    other_flags: tuple[str, ...] = ()  # flags of other classes that `read` understands
    kinds: tuple[str, ...] = ("matrix",)  # of modules that it acts on; none: it acts before the text
    default_targets: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # by model_type
    conv1d: bool = True  # HF PEFT takes Conv1D matrices (GPT-2)
    own_bias: str | None = (
        None  # value of `bias` for those of the targets, if not `<type>_only`; "": it has no such key
    )
    base_tables: Literal["copied", "residual", "omitted"] = "copied"  # what a file holds of an adapted embed_tokens
    shared: SharedProjections | None = None
    fixed: FixedTensors | None = None
    companion: Companion | None = None

    # Hooks. `read` returns fields for a module (None before the text): (config, fields so far, module, model).
    read: Callable[[AdapterConfig, Mapping[str, Any], Any, HFModel], dict[str, Any]] = no_fields
    write: Callable[[Any], AdapterConfig] = no_fields  # keys, which all methods of a file share
    # Keys that depend on the modules: (method, {module: its arrays}, model).
    write_modules: Callable[[Any, Mapping[Module, Any], HFModel], AdapterConfig] = no_fields
    # The fields that pick the targets: (config, targets, model).
    where: Callable[[AdapterConfig, list[Module], HFModel], dict[str, Any]] = lambda c, modules, model: {
        "where": model.where((m.path, m.layer) for m in modules)
    }
    owner: Callable[[str], str] = lambda module: f"{PREFIX}{module}."  # module -> what its tensors' names begin with
    # Tensors of one place in place of `tensors`: (path, layer, file) -> [(array, tensor with its whole name)].
    locate: Callable[[str, int | None, AdapterFile], list[tuple[str, HFTensor]]] | None = None
    # What a file holds may be simpler than the method: a config as its file was made, (config, tensors) -> config,
    stored_config: Callable[[AdapterConfig, Tensors], AdapterConfig] = lambda c, tensors: c
    # and what is written for a method: (method, trainable, shapes of the base) -> (method, trainable).
    to_exportable: Callable[[Any, Any, Any], tuple[Any, Any]] = lambda method, trainable, shapes: (method, trainable)
    # Tensors that a file has joined into one: (tensors, trainable) -> tensors, and back.
    split: Callable[[Tensors, Any], Tensors] = lambda tensors, trainable: tensors
    join: Callable[[Tensors], Tensors] = lambda tensors: tensors

    def variant(self, **changes: Any) -> "HFSpec":
        """Return the spec with some attributes changed."""
        return dataclasses.replace(self, **changes)

    @cached_property
    def all_keys(self) -> dict[str, Key]:
        """Every key that is understood, with those of all types that act on modules, and those of exceptions."""
        keys = {key: x if isinstance(x, Key) else Key(x) for key, x in self.keys.items()}
        for x in list(keys.values()):
            if x.exceptions:
                keys[x.exceptions] = Key({}, kind=NUMBERS if isinstance(x.default, float) else RANKS)
        if self.kinds:
            keys |= MODULE_KEYS | ({} if self.own_bias == "" else {"bias": Key("none")})
        return {key: x._replace(kind=x.kind or kind_like(x.default)) for key, x in keys.items()}
