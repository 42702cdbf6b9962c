"""Trainable parameters of each method on published models equal HF PEFT's (tests/golden/peft/counts.json)."""

import json
import sys
from pathlib import Path

import pytest
from graftax import peft
from graftax.model import presets

GOLDEN = Path(__file__).parent / "golden"
COUNTS = json.loads((GOLDEN / "peft" / "counts.json").read_text())
TYPES = {
    "LoraConfig": "LORA", "VeraConfig": "VERA", "AdaLoraConfig": "ADALORA", "LoHaConfig": "LOHA", "LoKrConfig": "LOKR",
    "OFTConfig": "OFT", "BOFTConfig": "BOFT", "HRAConfig": "HRA", "IA3Config": "IA3", "MissConfig": "MISS",
    "RandLoraConfig": "RANDLORA", "FourierFTConfig": "FOURIERFT", "ShiraConfig": "SHIRA", "C3AConfig": "C3A",
    "HiraConfig": "HIRA", "RoadConfig": "ROAD", "LNTuningConfig": "LN_TUNING", "PromptTuningConfig": "PROMPT_TUNING",
    "TrainableTokensConfig": "TRAINABLE_TOKENS", "PromptEncoderConfig": "P_TUNING",
    "PrefixTuningConfig": "PREFIX_TUNING", "AdaptionPromptConfig": "ADAPTION_PROMPT",
}  # fmt: skip
# Every method on the kinds of model that there are; a few methods on all of them.
KINDS = ("llama-3.1-8b", "qwen3-0.6b", "gemma-2-2b", "gpt2")
FEW = ("lora r16 all-linear", "ia3", "ln", "prefix 30", "oft b32 all-linear")


def spelled(model, name):
    """The adapter_config.json of a counted setting."""
    sys.path.insert(0, str(GOLDEN))
    from peft_cases import COUNTS as settings

    cls, kwargs = settings[name]
    family = "gpt2" if model.startswith("gpt2") else "other"
    settings_of = {k: v[family] if isinstance(v, dict) else v for k, v in kwargs.items()}
    return {"peft_type": TYPES[cls], **settings_of}


@pytest.mark.full
@pytest.mark.parametrize("model", COUNTS)
def test_counts_are_those_of_hf_peft(model):
    names = [n for n in COUNTS[model] if model in KINDS or n in FEW]
    expected = {n: COUNTS[model][n] for n in names if not n.endswith("lstm")}  # that encoder is not here
    methods = {n: peft.hf.method_from_config(spelled(model, n), presets[model]) for n in expected}
    assert {n: peft.count(method, presets[model]) for n, method in methods.items()} == expected
    assert len(expected) >= 4


@pytest.mark.full
def test_seventy_billion_are_counted_without_memory():
    assert peft.count(peft.LoRA(rank=8), presets["llama-3.1-70b"]) == 103_546_880
