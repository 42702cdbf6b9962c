"""Make tiny adapters with Hugging Face PEFT and what it computes with them, for a JAX test to compare to.

    python PATH/tests/golden/make_peft.py [BASE or CASE ...]

Run it in an environment with torch, transformers and peft (made with 2.13, 5.23 and 0.21.2), from a folder that is not
the root of this repository. Without CASE it makes all bases, all of `peft_cases.CASES`, and `counts.json`; "counts"
makes `counts.json` alone. The same versions give the same bytes.

`peft/llama`, `peft/gpt2` and `peft/gemma` are the base models. `peft/CASE/` holds `adapter_config.json` (its
target_modules sorted) and `adapter_model.safetensors` as `PeftModel.save_pretrained` writes them, with every trainable
value moved from where it starts, and `expected.npz`, computed in float32 with eager attention and without dropout by
what `from_pretrained` reads back:

    ids [2, 12]          random tokens; 3 and 40 are in row 0 and 17 in row 1, which are the trainable tokens
    logits [2, 12, V]    at the places of `ids`; those of virtual tokens are cut off
    loss []              mean cross-entropy of ids[:, 1:] under logits[:, :-1]
    grad/NAME            d loss / d NAME for each trainable tensor NAME of the file
    state/NAME           what the logits depend on and the file does not hold: the frozen projections of vera_noproj and
                         randlora_noproj, the frequencies [2, n] (rows, columns) of fourierft

A prompt, a p-tuning encoder and a prefix are saved as the embeddings that they give, and read back for inference, where
nothing is computed to get them: `grad/prompt_embeddings` is with respect to those. `pissa`, `olora` change the weights
of the base as they are read (see `init_lora_weights`). `boft_butterfly` needs a CUDA kernel for what `_Fbd` does here.
HF's own backward pass of C3A is right for the kernel and wrong for the input, so that layers below get wrong gradients;
with `_Convolution` they are those of the forward pass. Those of DoRA hold the norm fixed, those of COFT the projection.

`counts.json` maps a published model to {method: number of trainable parameters}. It is counted on models with one and
with two layers on the meta device and continued to the depth of the model. A method that HF refuses is left out.
"""

import json
import os
import shutil
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent / "peft"
for place in [p for p in sys.path if Path(p or ".").resolve() == HERE.parents[2]]:
    sys.path.remove(place)  # it has a folder `peft` too
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from make_hf import make_model  # noqa: E402
from peft.tuners import boft, c3a  # noqa: E402
from peft_cases import BASES, CASES, COUNTED, COUNTS, SCALE  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, logging  # noqa: E402

import peft  # noqa: E402

CHANGE = 0.25, 4.0  # rms by which an adapter must move the logits, and may at most


class _Fbd:
    """The CUDA kernel of BOFT: [N, D, H, H] to N block-diagonal matrices, and what comes back of a gradient."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*each) for each in blocks])]

    @staticmethod
    def backward(grad, blocks):
        n, d, h, _ = blocks.shape
        return [torch.diagonal(grad.reshape(n, d, h, d, h), dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()]


class _Convolution:
    """The block-circular convolution of C3A with the gradient that it has."""

    @staticmethod
    def apply(x, kernel):
        _, n, b = kernel.shape
        product = torch.einsum("...nb,mnb->...mb", torch.fft.ifft(x.unflatten(-1, (n, b))), torch.fft.fft(kernel))
        return torch.fft.fft(product).real.flatten(-2)


def load_base(name: str):
    """Read peft/NAME."""
    model = AutoModelForCausalLM.from_pretrained(HERE / name, dtype=torch.float32, attn_implementation="eager")
    model.name_or_path = f"../{name}"
    return model.eval()


def logits_of(model, ids):
    """Logits [B, T, V] at the places of `ids`."""
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]


def train(model, ids, plain, name: str) -> float:
    """Add noise to every trainable value: `SCALE` of it, or as little as moves the logits away from `plain`."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(zlib.crc32(name.encode()) % 10000)
    starts, noise = ([make(p.detach()) for p in trainable] for make in (torch.clone, torch.randn_like))

    def move(scale):
        _ = [p.data.copy_(start + scale * step) for p, start, step in zip(trainable, starts, noise, strict=True)]

    for scale in SCALE.get(name.split("_")[1], 0.01 * 1.2 ** np.arange(30)):
        move(scale)
        change = (logits_of(model, ids).detach() - plain).pow(2).mean().sqrt()
        if change > CHANGE[0]:
            move(scale)  # again: the forward pass of coft has moved it
            return scale
    raise RuntimeError(f"{name}: the logits change by {change} only")


def prune(model) -> None:
    """What the last allocation of AdaLoRA does: mask E, and write down which ranks are left. One module has none."""
    pattern = {}
    for i, (name, p) in enumerate(model.base_model.model.named_parameters()):
        if ".lora_E." in name:
            kept = torch.arange(len(p)).roll(i) < (2, 3, 0, 1)[len(pattern) % 4]
            p.data *= kept[:, None]
            pattern[name] = kept.tolist()
    model.peft_config["default"].rank_pattern = pattern


def save(model, initial, name: str) -> None:
    """Write the adapter to peft/NAME; `initial` is a folder with the adapter as it was made."""
    out = HERE / name
    shutil.rmtree(out, ignore_errors=True)
    initial = initial if name.endswith("_converted") else None
    model.save_pretrained(out, path_initial_model_for_weight_conversion=initial)
    (out / "README.md").unlink()
    config = json.loads((out / "adapter_config.json").read_text())
    config = {k: sorted(v) if k.endswith("_modules") and isinstance(v, list) else v for k, v in config.items()}
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def load(name: str):
    """Read peft/NAME back; prompts and prefixes for inference, where the saved embeddings are used as they are."""
    learns_prompt = issubclass(getattr(peft, CASES[name][1]), peft.PromptLearningConfig)
    base = load_base(CASES[name][0])
    model = peft.PeftModel.from_pretrained(base, str(HERE / name), is_trainable=not learns_prompt).eval()
    if learns_prompt:
        tensors = {"prompt_embeddings": model.prompt_encoder["default"].embedding.weight.requires_grad_(True)}
    else:
        state = model.state_dict(keep_vars=True)
        tensors = peft.get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    return model, {key: value for key, value in tensors.items() if value.requires_grad}


def hidden_state(model, name: str):
    """What the logits depend on and neither the file nor the config spells out."""
    state = {}
    if name.endswith("_noproj"):
        for key in [f"{name.split('_')[1]}_{side}" for side in "AB"]:
            state[f"state/base_model.{key}"] = getattr(model.base_model, key)["default"].numpy()
    for key, module in model.named_modules():
        if hasattr(module, "fourierft_spectrum"):
            state[f"state/{key}.indices"] = module.indices["default"].numpy().astype(np.int32)
    return state


def make_case(name: str) -> str:
    """Make peft/NAME; returns a line of the table."""
    base, cls, kwargs = CASES[name]
    boft.layer._FBD_CUDA = _Fbd if name.endswith("_butterfly") else False
    c3a.layer.BlockCircularConvolution = _Convolution
    torch.manual_seed(zlib.crc32(name.encode()) % 10000)
    made = load_base(base)
    ids = torch.randint(0, made.config.vocab_size, (2, 12))
    ids[0, 2], ids[1, 5], ids[0, 9] = 3, 17, 40
    plain = logits_of(made, ids).detach()
    made = peft.get_peft_model(made, getattr(peft, cls)(task_type="CAUSAL_LM", **kwargs)).eval()
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(f"{folder}/initial")
        scale = train(made, ids, plain, name)
        if name.endswith("_pruned"):
            prune(made)
        save(made, f"{folder}/initial", name)
    model, tensors = load(name)
    file = load_file(HERE / name / "adapter_model.safetensors")
    assert all(torch.equal(file[key], value.detach()) for key, value in tensors.items()), name
    logits = logits_of(model, ids)
    gap = (logits - logits_of(made, ids)).abs().max().item() if "_converted" not in name else 0.0
    change = (logits - plain).pow(2).mean().sqrt().item()
    assert (gap < 1e-4) * (CHANGE[0] / 2 < change < CHANGE[1]), (name, gap, change)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    grads = dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True))
    arrays = {"ids": ids.numpy().astype(np.int32), "logits": logits.detach().numpy(), "loss": loss.detach().numpy()}
    arrays |= {f"grad/{key}": value.numpy() for key, value in grads.items()} | hidden_state(model, name)
    np.savez_compressed(HERE / name / "expected.npz", **arrays)
    least = min((value.abs().max().item() for value in grads.values() if value.numel()), default=0)
    return f"{name:26}{len(file):5}{len(grads):6}{scale:7.2f}{change:7.2f}{gap:9.1e}{least:9.1e}"


def count(preset: dict, method: str, layers: int) -> int:
    """Trainable parameters of one method on a published model cut to `layers` layers."""
    cls, kwargs = COUNTS[method]
    own = "gpt2" if preset["model_type"] == "gpt2" else "other"
    kwargs = {k: v[own] if isinstance(v, dict) else v for k, v in kwargs.items()}
    if "adapter_layers" in kwargs:
        kwargs["adapter_layers"] = min(layers, kwargs["adapter_layers"])
    config = AutoConfig.for_model(**preset | {"n_layer" if own == "gpt2" else "num_hidden_layers": layers})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config = getattr(peft, cls)(task_type="CAUSAL_LM", **kwargs)
    config.mask_fn = None  # SHiRA cannot draw places there
    with torch.device("meta" if cls == "BOFTConfig" else "cpu"):
        model = peft.get_peft_model(model, config)
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "ranknum" not in name)


def count_all() -> None:
    """Write counts.json."""
    published = json.loads((HERE.parent / "hf" / "published.json").read_text())
    boft.layer._FBD_CUDA = False
    boft.layer.BOFTLayer.perm2mat = lambda self, indices: torch.zeros(())
    counts = {}
    for name in COUNTED:
        preset, counts[name] = published[name], {}
        depth = preset.get("num_hidden_layers") or preset["n_layer"]
        for method in COUNTS:
            try:
                one, two = (count(preset, method, layers) for layers in (1, 2))
            except Exception as error:
                print(f"{name}: {method}: {type(error).__name__}: {str(error)[:90]}", flush=True)
                continue
            counts[name][method] = one + (min(depth, COUNTS[method][1].get("adapter_layers", depth)) - 1) * (two - one)
        print(name, len(counts[name]), flush=True)
    (HERE / "counts.json").write_text(json.dumps(counts, indent=1) + "\n")


def main(names):
    """Make the cases named, or the bases, all of the cases, and the counts."""
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    for name in [name for name in names if name in BASES] if names else BASES:
        make_model(BASES[name], zlib.crc32(name.encode()) % 10000).save_pretrained(HERE / name)
        (HERE / name / "generation_config.json").unlink(missing_ok=True)
    print("case                      files grads  scale change      gap least grad")
    for name in [name for name in names or CASES if name in CASES]:
        print(make_case(name), flush=True)
    if not names or "counts" in names:
        count_all()
    files = [p for p in HERE.rglob("*") if p.is_file()]
    for file in files:
        file.chmod(0o644)
    print("all files:", sum(p.stat().st_size for p in files), "bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
