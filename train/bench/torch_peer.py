"""HF Transformers + PEFT as a contender: the same model, batch and optimizer in eager PyTorch.

It runs in a Python that has torch, transformers and peft; nothing here imports graftax. Attention is SDPA, AdamW fused.
"""

import time
from collections.abc import Callable
from typing import Any

from .peer import peak_rss, serve, threads


def build(spec: dict[str, Any]) -> tuple[Callable[[], float], dict[str, Any], Callable[[], Any]]:
    """Return (step, facts, function of the peak device memory) for a spec of `cases.py`."""
    import numpy as np
    import torch  # pyrefly: ignore
    import transformers  # pyrefly: ignore

    import peft  # pyrefly: ignore

    libraries, start = peak_rss(), time.perf_counter()
    torch.manual_seed(0)
    torch.set_num_threads(threads())
    device = "cuda" if spec["device"] == "gpu" else "cpu"
    model = _model(spec, transformers, peft, torch).to(device)
    ids = np.random.default_rng(0).integers(0, spec["config"]["V"], (spec["batch"], spec["T"] + 1))
    inputs, targets = (torch.from_numpy(x.copy()).to(device) for x in (ids[:, :-1], ids[:, 1:]))
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    dtype = getattr(torch, spec["config"]["dtype"])

    def step() -> float:
        adamw.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(input_ids=inputs, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        del logits
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    def device_peak() -> float | None:
        return torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else None

    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    return step, {"libraries": libraries, "build": time.perf_counter() - start, "versions": versions}, device_peak


def _model(spec: dict[str, Any], transformers: Any, peft: Any, torch: Any) -> Any:
    c = spec["config"]
    config = transformers.LlamaConfig(
        vocab_size=c["V"], hidden_size=c["D"], intermediate_size=c["F"], num_hidden_layers=c["L"],
        num_attention_heads=c["N"], num_key_value_heads=c["K"], head_dim=c["H"], max_position_embeddings=c["context"],
        rms_norm_eps=c["norm_eps"], tie_word_embeddings=c["tied"], attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, c["param_dtype"]))
    model.config.use_cache = False
    if spec["lean"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if spec["method"] == "lora":
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lora = peft.LoraConfig(r=spec["rank"], lora_alpha=spec["alpha"], lora_dropout=0.0, target_modules=names)
        model = peft.get_peft_model(model, lora)
    return model.train()


if __name__ == "__main__":
    serve(build)
