"""How much each method trains on published models: what HF PEFT trains (tests/golden/peft/counts.json)."""

import json
from pathlib import Path

import pytest
from graftax import peft
from graftax.model import presets
from graftax.peft import HRA, DoRA, HiRA, LNTuning, LoHa, LoKr, LoRA, MiSS, Prefix, Prompt

COUNTS = json.loads((Path(__file__).parent / "golden" / "peft" / "counts.json").read_text())
# GPT-2's c_attn is one matrix for HF PEFT and three here: its adapters have other counts.
MODELS = [name for name in COUNTS if not name.startswith("gpt2")]
METHODS = {
    "lora r8 q,v": LoRA(rank=8, where="layers/attn/[qv]"),
    "lora r8 all-linear": LoRA(rank=8),
    "lora r16 all-linear": LoRA(rank=16),
    "dora r8 all-linear": DoRA(rank=8),
    "dora r16 all-linear": DoRA(rank=16),
    "loha r8 all-linear": LoHa(rank=8),
    "lokr r8 all-linear": LoKr(rank=8),
    "hira r32 all-linear": HiRA(rank=32),
    "hra r8 all-linear": HRA(rank=8),
    "miss r64 all-linear": MiSS(rank=64),
    "prompt 20": Prompt(tokens=20),
    "prefix 30": Prefix(tokens=30),
}


@pytest.mark.parametrize("model", MODELS)
def test_counts_are_those_of_hf_peft(model):
    wanted = {name: COUNTS[model][name] for name in METHODS if name in COUNTS[model]}
    assert {name: peft.count(METHODS[name], presets[model]) for name in wanted} == wanted
    assert len(wanted) >= 10


def test_all_norms_of_llama():
    """Elsewhere HF PEFT leaves some norms out: Qwen's first of each layer, and its norms of queries and keys."""
    for model in ("llama-2-7b", "llama-3.1-8b", "mistral-7b"):
        assert peft.count(LNTuning(), presets[model]) == COUNTS[model]["ln"]
