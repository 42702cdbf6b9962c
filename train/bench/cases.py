"""The cases of the benchmark, one line each. A case on another device or in another dtype is another line."""

import dataclasses
from typing import Any

from ...model import Config, presets

RANK, ALPHA = 8, 16.0  # LoRA on all seven matrices of a layer


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, a batch, and the methods whose train steps are compared."""

    name: str
    config: Config
    batch: int  # rows
    T: int  # tokens in a row
    methods: tuple[str, ...] = ("full", "lora")
    dtype: str = "float32"  # of matrix products and of a frozen base; trained parameters are fp32
    lean: bool = False  # as little memory as possible: scan + full remat + chunked loss; HF: gradient checkpointing
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        """Return the tokens of a step."""
        return self.batch * self.T

    def spec(self, method: str, steps: int) -> dict[str, Any]:
        """Return the settings of a contender as JSON."""
        config = dataclasses.replace(
            self.config,
            context=max(self.T, self.config.context),
            dtype=self.dtype,
            param_dtype="float32" if method == "full" else self.dtype,
            scan=self.lean or self.config.scan,
            remat="full" if self.lean else "none",
        )
        chunk = self.tokens // 8 if self.lean else 8192  # tokens
        return {
            "config": dataclasses.asdict(config), "method": method, "rank": RANK, "alpha": ALPHA, "lean": self.lean,
            "batch": self.batch, "T": self.T, "chunk": chunk, "device": self.device, "steps": steps,
        }  # fmt: skip


CASES = [
    Case("S", presets["s"], batch=8, T=256),
    Case("M", presets["m"], batch=4, T=256),
    Case("M lean", presets["m"], batch=4, T=256, methods=("lora",), lean=True),
]
