"""A run in memory: its base, its adapter, and what can be computed from them."""

import dataclasses
import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from ...data.mixture import HeldOut
from ...data.tokenizers import Tokenizer
from ...model import Config, Context, Transformer
from ...peft import Method, Subset, merge
from ..config import Run, method_to_dict
from .lineage import lineage_of
from .manifest import fingerprint


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A run ready for use: `params` is its base; `method` and `trainable` are what it added."""

    folder: Path
    run: Run
    config: Config
    params: Any
    method: Method
    trainable: Any
    tokenizer: Tokenizer
    held_out: dict[str, HeldOut]  # of the base's own domains
    manifest: dict[str, Any]
    quantized_from: str = ""  # fingerprint of the parameters that a quantised base was made of

    @property
    def lineage(self) -> list[dict[str, Any]]:
        """The records of this run and of all its predecessors, the oldest first."""
        return lineage_of(self.folder, self.run, self.manifest)

    @property
    def tuned_on_chats(self) -> bool:
        """Whether graftax has fine-tuned this model or a predecessor, which is always on chats."""
        return any(record["phase"] == "finetune" for record in self.lineage)

    @property
    def model(self) -> Transformer:
        return Transformer(self.config)

    @property
    def bound(self) -> tuple[Transformer, Any, Context]:
        """(model, bound parameters, context): the arguments of evaluation and generation."""
        return self.model, self.method.bind(self.params, self.trainable), self.method.context(self.trainable)

    @cached_property
    def merged(self) -> Any:
        """One base that computes the same. Raises InputError if there is none (prompts, adapters)."""
        return merge(self.method, self.params, self.trainable)

    @property
    def base(self) -> Any:
        """The parameters that a further method can be applied to: quantised ones as they are, else `merged`."""
        return self.params if self.quantized_from else self.merged

    @cached_property
    def fingerprint(self) -> str:
        """The identity of `base`: a digest of its values or, if it is quantised, of those before quantisation.

        A base that has to be computed (a merged LoRA) is rounded differently on other devices and meshes. It is
        identified by what it is computed from: the fingerprint of its own base, the method, and the trained values.
        """
        if self.quantized_from or isinstance(self.method, Subset):
            return self.quantized_from or fingerprint(self.merged)
        method = json.dumps(method_to_dict(self.method), default=lambda x: x.digest, sort_keys=True)
        parts = (self.manifest["base"], method, fingerprint(self.trainable))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
