"""HiRA: a low-rank factor on each entry of the matrix (ICLR 2025, openreview TwJrTz9cRS)."""

from typing import Any, ClassVar

from jax import Array

from ...bounds import Size
from ...model import Weight
from ..hf_spec import PREFIX, TRANSPOSED, HFSpec, Key
from ..random_projections import recomputed
from .lora import LoRA, LoRAWeight


class HiRAWeight(LoRAWeight):
    """x @ (w + w * (a b)), whose update can have the rank of w."""

    def __rmatmul__(self, x: Array) -> Array:
        @recomputed
        def update(x: Array, w: Any, a: Array, b: Array) -> Array:
            return x @ ((w.dense() if isinstance(w, Weight) else w) * (a @ b))

        return x @ self.w + update(self.dropped(x), self.w, self.a, self.b)

    def __getitem__(self, ids: Array) -> Array:
        return self.w[ids] * (1 + self.a[ids] @ self.b)


def _stored_ranks(c: dict[str, Any], tensors: Any) -> dict[str, Any]:
    """Return the config with the ranks of the file: HF PEFT does not always make those of its rank_pattern."""
    ranks = {name.removeprefix(PREFIX).removesuffix(".hira_A"): x.shape[0]
             for name, x in tensors.items() if name.endswith(".hira_A") and x.ndim == 2}  # fmt: skip
    return c | {"rank_pattern": ranks}


class HiRA(LoRA):
    """W * (1 + A B), with B = 0 at first; there is no alpha (openreview TwJrTz9cRS).

    A [D, R] and B [R, F] as in LoRA. HF PEFT: HIRA.
    """

    weight: ClassVar[type[LoRAWeight]] = HiRAWeight
    demo = False

    rank: Size = 32

    hf = HFSpec(
        "HIRA",
        keys={"r": Key(32, "rank", exceptions="rank_pattern", rules="ranks"), "hira_dropout": Key(0.0, "dropout")},
        tensors=TRANSPOSED.tensors(a="hira_A", b="hira_B"),
        table_tensors={
            **TRANSPOSED.tensors(a="hira_embedding_A"),
            **TRANSPOSED._replace(embed_scaled=True).tensors(b="hira_embedding_B"),
        },
        kinds=("matrix", "table"),
        stored_config=_stored_ranks,
    )

    def scale(self, rank: int, alpha: Any) -> Any:
        return 1.0
