"""Make tiny random Hugging Face models and what transformers computes with them, for a JAX test to compare to.

    cd /tmp && python PATH/tests/golden/make_hf.py [CASE ...]

Run it in an environment with torch and transformers (made with torch 2.13 and transformers 5.23), from a folder that is
not the root of this repository (its folder `peft` would shadow a package). Without CASE it makes all of
`hf_cases.CASES`, and `params.json` and `published.json`. The same versions give the same bytes.

`hf/CASE/` holds `config.json` and `model.safetensors` as `save_pretrained` writes them (sharded for llama2; the config
of llama_legacy is rewritten to the spelling of 2024) and `expected.npz`, computed in float32 with eager attention:

    ids [3, 24], lengths [3]         random tokens; row b is as long as lengths[b]
    logits [3, 24, V]                zeros at padded places
    hidden_rms [3, L+1, 24]          rms over the width of output_hidden_states: the embeddings (scaled in Gemma), the
                                     outputs of the blocks but the last, and the output of the final norm
    packed_ids, packed_positions, packed_segments [1, 24], packed_logits [1, 24, V]
                                     three documents, segments 1, 2, 3, positions from 0 in each
    prompt_i [P], greedy_i [32], margin_i []
                                     greedy continuation with the cache, i = 0, 1; the smallest gap between the
                                     best and the second logit of its steps

Each row and each document is computed alone, without padding, by a fresh copy of the model. That is the definition; it
matters where rope depends on the length of the call, "dynamic" and "longrope": a row of 9 is not rotated as a row of 24
is, and "dynamic" remembers the longest call. With a cache "dynamic" keeps keys that were rotated with the frequencies
of shorter calls, and `greedy_i` is what that gives; Phi-3 drops its cache as the length passes
original_max_position_embeddings and computes it anew, so that its `greedy_i` is what it gives without a cache too.
"""

import copy
import json
import shutil
import sys
import zlib
from pathlib import Path

import hf_published
import numpy as np
import torch
from hf_cases import CASES
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

HERE = Path(__file__).parent / "hf"
LENGTHS, DOCUMENTS, PROMPTS, STEPS = (24, 17, 9), (11, 8, 5), (7, 12), 32
MARGIN, DISTINCT = 1e-3, 8  # a greedy run must be decided by more than rounding, and must not repeat a few tokens


def make_model(config: dict, seed: int):
    """A model with random values in every leaf: none is zero, one, or small enough to be ignored."""
    on_disk = getattr(torch, config.get("dtype", "float32"))
    config = AutoConfig.for_model(**copy.deepcopy(config))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(random_leaf(name, p.shape, config).to(on_disk))
    return model


def random_leaf(name: str, shape, config):
    """Values for one parameter. Under a tied head the final norm flips signs, or greedy would repeat its last token."""
    noise = torch.randn(shape)
    if len(shape) == 1:
        flips = config.tie_word_embeddings and name in ("model.norm.weight", "transformer.ln_f.weight")
        scale = (0.0 if name.endswith("bias") else 1.0) + 0.2 * noise
        scale = torch.where(torch.randn(shape) > 0, scale, -scale) if flips else scale
        return scale - 1.0 if config.model_type.startswith("gemma") else scale  # Gemma multiplies by 1 + weight
    if "wpe" in name:
        return 0.3 * noise
    if any(key in name for key in ("embed_tokens", "wte", "lm_head")):
        return 2.0 * shape[1] ** -0.5 * noise
    return 1.2 * shape[0 if config.model_type == "gpt2" else 1] ** -0.5 * noise


def forward(model, ids):
    """Logits [T, V] and rms of the hidden states [L+1, T] of one row alone, by a copy with untouched rope state."""
    with torch.no_grad():
        out = copy.deepcopy(model)(input_ids=ids[None], use_cache=False, output_hidden_states=True)
    rms = [h[0].pow(2).mean(-1).sqrt() for h in out.hidden_states]
    return out.logits[0].numpy(), torch.stack(rms).numpy()


def greedy(model, prompt):
    """The next tokens of `prompt` and the smallest margin of the decisions."""
    model = copy.deepcopy(model)
    model.generation_config = GenerationConfig()  # no eos, no pad: nothing stops it and nothing is masked
    out = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        **{"do_sample": False, "max_new_tokens": STEPS, "min_new_tokens": STEPS, "use_cache": True},
        **{"return_dict_in_generate": True, "output_logits": True},
    )
    tokens = out.sequences[0, len(prompt) :]
    best = torch.cat(out.logits).float().topk(2, -1).values
    assert tokens.shape == (STEPS,)
    return tokens.numpy().astype(np.int32), (best[:, 0] - best[:, 1]).min().numpy()


def expect(model, seed: int):
    """Everything that `expected.npz` holds, for tokens drawn with `seed`."""
    torch.manual_seed(seed)
    vocab, longest = model.config.vocab_size, LENGTHS[0]
    ids = torch.randint(0, vocab, (len(LENGTHS), longest))
    packed = torch.randint(0, vocab, (sum(DOCUMENTS),))
    logits = np.zeros((len(LENGTHS), longest, vocab), np.float32)
    rms = np.zeros((len(LENGTHS), model.config.num_hidden_layers + 1, longest), np.float32)
    for b, n in enumerate(LENGTHS):
        logits[b, :n], rms[b, :, :n] = forward(model, ids[b, :n])
    documents = [forward(model, part)[0] for part in packed.split(DOCUMENTS)]
    arrays = {
        "ids": ids.numpy().astype(np.int32),
        "lengths": np.array(LENGTHS, np.int32),
        "logits": logits,
        "hidden_rms": rms,
        "packed_ids": packed[None].numpy().astype(np.int32),
        "packed_positions": np.concatenate([np.arange(n, dtype=np.int32) for n in DOCUMENTS])[None],
        "packed_segments": np.repeat(np.arange(1, 1 + len(DOCUMENTS), dtype=np.int32), DOCUMENTS)[None],
        "packed_logits": np.concatenate(documents)[None],
    }
    for i, n in enumerate(PROMPTS):
        prompt = torch.randint(0, vocab, (n,))
        arrays[f"prompt_{i}"] = prompt.numpy().astype(np.int32)
        arrays[f"greedy_{i}"], arrays[f"margin_{i}"] = greedy(model, prompt)
    return arrays


def save(model, name: str):
    """Write the model to hf/NAME as transformers does, less its generation config."""
    out = HERE / name
    shutil.rmtree(out, ignore_errors=True)
    model = copy.deepcopy(model).to(getattr(torch, CASES[name].get("dtype", "float32")))
    model.save_pretrained(out, max_shard_size="10KB" if name == "llama2" else "1GB")
    (out / "generation_config.json").unlink(missing_ok=True)
    for file in out.iterdir():
        file.chmod(0o644)
    if name == "llama_legacy":
        config = json.loads((out / "config.json").read_text())
        rope = config.pop("rope_parameters")
        config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
        config |= {"transformers_version": "4.43.0"}
        (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load(name: str):
    """Read hf/NAME back, in float32; the goldens are of what is on disk."""
    model, info = AutoModelForCausalLM.from_pretrained(
        HERE / name, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), (name, info)
    return model.eval()


def make_case(name: str) -> str:
    """Make hf/NAME with the first seed whose greedy runs are decided; returns a line of the table."""
    start = zlib.crc32(name.encode()) % 10000
    for seed in range(start, start + 200):
        made = make_model(CASES[name], seed)
        save(made, name)
        model = load(name)
        probe = torch.arange(24)
        gap = np.abs(forward(made, probe)[0] - forward(model, probe)[0]).max()
        assert gap < 1e-5, f"{name}: loading it changes the logits by {gap}"
        arrays = expect(model, seed)
        margin = min(arrays["margin_0"], arrays["margin_1"])
        distinct = min(len(np.unique(arrays[f"greedy_{i}"])) for i in range(len(PROMPTS)))
        if margin > MARGIN and distinct >= DISTINCT:
            break
    else:
        raise RuntimeError(f"{name}: no seed gives decided and varied greedy runs")
    np.savez_compressed(HERE / name / "expected.npz", **arrays)
    weights = sum(p.stat().st_size for p in (HERE / name).glob("*.safetensors"))
    total = sum(p.stat().st_size for p in (HERE / name).iterdir())
    count = sum(p.numel() for p in model.parameters())
    spread = arrays["logits"][0].std()
    return f"{name:14}{count:8}{weights:9}{total:9}{seed:7}{margin:9.4f}{distinct:9}{spread:8.2f}"


def main(names):
    """Make the cases named, or all of them and the published shapes."""
    logging.disable_progress_bar()
    print("case            params  weights    total   seed   margin distinct  spread")
    for name in names or CASES:
        print(make_case(name), flush=True)
    if not names:
        hf_published.write(HERE)
        print("all files:", sum(p.stat().st_size for p in HERE.rglob("*") if p.is_file()), "bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
