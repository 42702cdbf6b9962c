"""Does HF PEFT read the adapters that graftax writes, and compute the same logits?

    python tests/golden/check_adapters.py make OUT                    where graftax is installed
    cd /tmp && python PATH/tests/golden/check_adapters.py check OUT   where torch, transformers and peft are

`make` writes one adapter for each method that HF PEFT has a type for, on the tiny Llama and the tiny GPT-2 of `peft/`,
with noise on every value, and the logits graftax computes with it. `check` loads each with PeftModel.from_pretrained
and says how far HF's logits are from them; exit code 1 above 1e-4, or if peft warns about keys.
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
IDS = np.random.default_rng(0).integers(3, 50, (2, 12))


def make(out: Path) -> None:
    """Write the adapters and expected.npz of each."""
    import dataclasses

    import jax
    from graftax import InputError, peft
    from graftax.model import Transformer, hf

    sys.path.insert(0, str(HERE.parent))
    from tiny import shaken

    lora = peft.LoRA(rank=3, alpha=5.0)
    more = {
        "lora_ranks": dataclasses.replace(lora, ranks=(("layers/[:1]/.*", 2),), alphas=((".*/(o|down)", 9.0),)),
        "lora_bias_all": peft.chain(peft.Subset("biases"), lora),
        "lora_norms": peft.chain(peft.Subset("final_norm/.*"), lora),
        "lora_tokens": peft.chain(lora, peft.Tokens(ids=(3, 17))),
        "lora_table": dataclasses.replace(lora, where="embed/table, linear"),
        "lora_head": peft.chain(peft.Head(), lora),
        "miss_bat": peft.MiSSBat(rank=4),
        "oft_exact": peft.OFT(block=4, terms=0),
        "boft_8": peft.BOFT(block=2),
        "lokr_both": peft.LoKr(rank=1, both=True, factor=4),
        "prompt": peft.Prompt(tokens=5),
        "prefix": peft.Prefix(tokens=5),
        "prefixmlp": peft.PrefixMLP(tokens=5),
        "ptuning": peft.PTuning(tokens=5),
        "randlora": peft.RandLoRA(rank=3, alpha=6.0),
        "hra": peft.HRA(rank=4),
        "miss": peft.MiSS(rank=4),
        "fourierft": peft.FourierFT(n=20, scale=20.0),
        "shira": peft.SHiRA(rank=2),
        "c3a": peft.C3A(block=4),
        "road": peft.RoAd(group=4),
        "llamaadapter": peft.LLaMAAdapter(tokens=3, layers=2),
        "vera": peft.VeRA(rank=5),
        "ia3": peft.IA3(),
    }
    for name in ("llama", "gpt2"):
        config, params = hf.load(HERE / "peft" / name)
        model = Transformer(config)
        compute = lambda m, t, model=model, params=params: peft.apply(model, params, m, t, IDS)  # noqa: E731
        logits_of = jax.jit(compute, static_argnums=0)
        for case, method in ({n: cls() for n, cls in peft.methods.items()} | more).items():
            if name == "gpt2" and case == "ia3":
                method = peft.IA3(where="layers/attn/qkv")
            if name == "gpt2" and case == "llamaadapter":
                method = dataclasses.replace(method, after_output_proj=True)
            if not peft.hf.type_of(method) and not isinstance(method, peft.Chain):
                continue
            try:
                trainable = shaken(method.init(jax.random.key(0), params), 0.1)
                peft.hf.save(out / f"{name}_{case}", config, method, trainable, str(HERE / "peft" / name))
            except InputError as error:
                print(f"{name} {case}: {error}")
                continue
            logits = logits_of(method, trainable)
            np.savez(out / f"{name}_{case}" / "expected.npz", logits=logits)


def check(out: Path) -> int:
    """Load each with HF PEFT and compare; returns how many differ."""
    import warnings

    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE.parents[1]]
    import torch
    from transformers import AutoModelForCausalLM

    from peft import PeftModel

    bad = 0
    for folder in sorted(p.parent for p in out.glob("*/expected.npz")):
        expected = np.load(folder / "expected.npz")["logits"]
        model = AutoModelForCausalLM.from_pretrained(
            HERE / "peft" / folder.name.split("_")[0], dtype=torch.float32, attn_implementation="eager"
        )
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            try:
                model = PeftModel.from_pretrained(model, folder).eval()
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor(IDS), use_cache=False).logits.numpy()
                worst = float(np.abs(logits[:, -IDS.shape[1] :] - expected).max())
            except Exception as error:  # whatever it is, it is the verdict on this folder
                worst, heard = float("inf"), [*heard, error]
        keys = [str(getattr(w, "message", w)) for w in heard]
        keys = [text for text in keys if "key" in text.lower() or worst == float("inf")]
        wrong = worst > 1e-4 or bool(keys)
        bad += wrong
        print(f"{'BAD ' if wrong else 'ok  '} {folder.name}: {worst:.1e} {' | '.join(keys)[:300]}")
    return bad


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        sys.exit(bool(check(Path(sys.argv[2]))))
