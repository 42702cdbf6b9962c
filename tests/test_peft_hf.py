"""Adapters that HF PEFT wrote: its logits, its loss, its gradients, and the same tensors back (tests/golden/peft)."""

import ast
import dataclasses
import json
import shutil
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graftax import InputError, peft
from graftax.model import Transformer, hf
from graftax.model.layout import restack
from graftax.peft import hf as adapters
from safetensors.numpy import load_file, save_file
from tiny import CASES as METHODS
from tiny import close, shaken

GOLDEN = Path(__file__).parent / "golden" / "peft"
CASES = sorted(p.parent.name for p in GOLDEN.glob("*/expected.npz"))
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def one_of_a_type():
    """The cases; all but the first of each HF PEFT type are not in the fast tier."""
    types = [json.loads((GOLDEN / case / CONFIG).read_text())["peft_type"] for case in CASES]
    return [
        pytest.param(case, marks=[pytest.mark.full] if kind in types[:i] else [])
        for i, (case, kind) in enumerate(zip(CASES, types, strict=True))
    ]


@lru_cache
def base(name):
    config, params = hf.load(GOLDEN / name)
    return config, Transformer(config), params


def computed(case):
    """(loss, logits, gradients) of a golden adapter, with what was loaded."""
    config, model, params = base(case.split("_")[0])
    method, trainable = adapters.load(GOLDEN / case, config, params)
    ids = jnp.asarray(np.load(GOLDEN / case / "expected.npz")["ids"])

    def loss(trainable):
        logits = peft.apply(model, params, method, trainable, ids)
        nll = -jax.nn.log_softmax(logits[:, :-1])
        return jnp.take_along_axis(nll, ids[:, 1:, None], -1).mean(), logits

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)
    return method, trainable, value, logits, grads


@pytest.mark.parametrize("case", one_of_a_type())
def test_logits_gradients_and_the_same_file_again(case, tmp_path):
    config, _, params = base(case.split("_")[0])
    method, trainable, value, logits, grads = computed(case)
    expected = np.load(GOLDEN / case / "expected.npz")
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(value, expected["loss"], rtol=1e-5)
    ours = adapters.named_tensors(config, method, grads, gradient=True)
    theirs = {k.removeprefix("grad/"): v for k, v in expected.items() if k.startswith("grad/")}
    assert set(ours) == set(theirs)
    for name, gradient in theirs.items():
        error = np.linalg.norm(ours[name] - gradient)
        assert error <= 1e-4 * np.linalg.norm(gradient) + 1e-7, f"{name}: {error}"
    before = load_file(GOLDEN / case / FILE)
    for name, given in (("again", {"params": params}), ("without the base", {})):
        adapters.save(tmp_path / name, config, method, trainable, **given)
        after = load_file(tmp_path / name / FILE)
        assert set(after) == set(before)
        for tensor, x in before.items():
            np.testing.assert_array_equal(after[tensor], x, err_msg=tensor)
    again, t = adapters.load(tmp_path / "again", config, params)
    assert again == method
    close(t, trainable, 0)


@pytest.mark.parametrize("case", ["llama_lora_patterns", "llama_lora_layers", "gpt2_adalora_pruned", "llama_shira",
                                  "llama_prefix", "gpt2_lora_all_bias", "llama_pissa"])  # fmt: skip
def test_unrolled_layers_load_alike(case, tmp_path):
    config, _, params = base(case.split("_")[0])
    loose = dataclasses.replace(config, scan=False)
    apart = restack(params, loose)
    method, trainable = adapters.load(GOLDEN / case, loose, apart)
    expected = np.load(GOLDEN / case / "expected.npz")
    ids = jnp.asarray(expected["ids"])
    logits = jax.jit(lambda t: peft.apply(Transformer(loose), apart, method, t, ids))(trainable)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4, rtol=1e-4)
    adapters.save(tmp_path / "again", loose, method, trainable)
    again = load_file(tmp_path / "again" / FILE)
    for name, x in load_file(GOLDEN / case / FILE).items():
        np.testing.assert_array_equal(again[name], x, err_msg=name)
    assert adapters.load(tmp_path / "again", loose, apart)[0] == method


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if adapters.type_of(m)])
def test_what_is_made_here_comes_back(name, tmp_path):
    """Every method with a type of HF's: written, read, and the same logits."""
    config, model, params = base("gemma" if name == "lorahead" else "llama")  # of a tied base
    if name == "llamaadapter":
        method = dataclasses.replace(METHODS[name], layers=1)
    else:
        method = METHODS[name]
    if adapters.type_of(method) in ("P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"):
        method = dataclasses.replace(method, tokens=3)
    trainable = shaken(method.init(jax.random.key(0), params))
    adapters.save(tmp_path / "a", config, method, trainable, params=params)
    other, t = adapters.load(tmp_path / "a", config, params)
    logits = lambda *m: peft.apply(model, params, *m, jnp.arange(8)[None])  # noqa: E731
    got, wanted = jax.jit(lambda a, b: (logits(other, a), logits(method, b)))(t, trainable)
    close(got, wanted, 2e-5)


def changed(case, folder, tensors=None, **keys):
    """A golden adapter in `folder`, with changes to its tensors and its config."""
    shutil.copytree(GOLDEN / case, folder)
    if tensors:
        held = {k: np.array(v) for k, v in load_file(folder / FILE).items()}
        tensors(held)
        save_file(held, folder / FILE)
    config = json.loads((folder / CONFIG).read_text()) | keys
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
WRONG = {
    "missing": ("llama_lora", lambda t: t.pop(Q), {}, rf"1 missing: {Q}"),
    "unexpected": ("llama_lora", lambda t: t.update(more=np.zeros(2)), {}, r"1 unexpected: more"),
    "shape": ("llama_lora", lambda t: t.update({Q: np.zeros((3, 7))}), {}, r"shape: .*\[3, 7\] \(wanted \[3, 16\]\)"),
    "type": ("llama_lora", None, {"peft_type": "LORAX"}, "peft_type 'LORAX' is not known"),
    "key": ("llama_lora", None, {"use_qalora": True}, "use_qalora = True is not understood"),
    "targets": ("llama_lora", None, {"target_modules": ["q_prj"]}, "q_prj match no module .* did you mean q_proj"),
    "pissa_niter": ("llama_pissa", None, {"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight"),
    "two": ("llama_dora", None, {"lora_bias": True}, "DoRA with LoRABias in one adapter"),
    "saved": ("llama_lora", None, {"modules_to_save": ["score"]}, "modules_to_save 'score' is no module"),
    "norms": ("llama_lora", None, {"target_modules": "model.norm"}, "LORA of model.norm, a norm"),
    "projections": ("llama_vera", lambda t: t.pop("base_model.vera_A"), {}, "base_model.vera_A is missing"),
    "places": ("llama_shira", lambda t: t.pop(next(k for k in t if "indices" in k)), {}, "shira_indices is missing"),
    "past": ("llama_prefix", lambda t: t.update(prompt_embeddings=np.zeros((5, 4))), {}, r"prompt_embeddings \[5, 4\]"),
    "base": ("llama_lora_embed", lambda t: t.update({next(k for k in t if "base_layer" in k): np.ones((61, 16))}), {},
             "is not the base's"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name, tmp_path):
    case, tensors, keys, said = WRONG[name]
    config, _, params = base("llama")
    with pytest.raises(InputError, match=said):
        adapters.load(changed(case, tmp_path / "bad", tensors, **keys), config, params)


def test_folders_that_hold_no_adapter(tmp_path):
    config, _, params = base("llama")
    with pytest.raises(InputError, match=r"has no adapter_config\.json"):
        adapters.load(tmp_path, config, params)
    folder = changed("llama_lora", tmp_path / "bin")
    (folder / FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="is a pickle"):
        adapters.load(folder, config, params)
    with pytest.raises(InputError, match="target_modules"):
        adapters.load(GOLDEN / "llama_lora", *base("gpt2")[::2])


def test_what_hf_peft_has_no_file_for_is_refused(tmp_path):
    config, _, params = base("llama")
    for method, said in (
        (peft.Houlsby(), "Houlsby: HF PEFT has no file"),
        (type("Mine", (peft.LoRA,), {})(), "Mine: HF PEFT has no file"),  # it may compute something else
        (peft.chain(peft.LoRA(rank=2), peft.Prompt(tokens=2)), "at once: an HF PEFT folder holds one"),
        (peft.chain(peft.Subset("layers/[:1]/attn_norm/.*"), peft.LoRA(rank=2)), None),
        (peft.Subset("layers/attn/q"), "Subset: HF PEFT has no file"),
    ):
        trainable = method.init(jax.random.key(0), params)
        if said is None:  # whole modules beside a LoRA: modules_to_save
            adapters.save(tmp_path / "fine", config, method, trainable)
            assert json.loads((tmp_path / "fine" / CONFIG).read_text())["modules_to_save"]
            continue
        with pytest.raises(InputError, match=said):
            adapters.save(tmp_path / "no", config, method, trainable)
        assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("case", ["llama_lora_embed", "llama_lora_lm_head"])
def test_a_changed_method_does_not_lose_the_tables_of_its_file(case, tmp_path):
    config, _, params = base("llama")
    method, trainable = adapters.load(GOLDEN / case, config, params)
    other = dataclasses.replace(method, dropout=0.1)
    with pytest.raises(InputError, match=r"has the base's (embed/table|head/matrix) in it, .* params="):
        adapters.save(tmp_path / "a", config, other, trainable)
    assert not (tmp_path / "a").exists()
    adapters.save(tmp_path / "a", config, other, trainable, params=params)
    assert set(load_file(tmp_path / "a" / FILE)) == set(load_file(GOLDEN / case / FILE))


def test_lm_head_of_a_tied_base(tmp_path):
    """LoRA of it is the projection's alone; what HF PEFT computes otherwise, and what one file cannot hold, is said."""
    config = base("gemma")[0]
    c = {"peft_type": "LORA", "r": 4, "target_modules": ["lm_head"]}
    assert adapters.method_from_config(c, config) == peft.LoRAHead(rank=4, alpha=8)
    assert adapters.method_from_config(c | {"use_rslora": True, "lora_dropout": 0.1}, config).rslora
    assert "head" not in adapters.method_from_config(c | {"target_modules": "all-linear"}, config).where
    whole = c | {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "lm_head"]}
    assert [type(m) for _, m in adapters.method_from_config(whole, config).methods] == [peft.Head, peft.LoRA]
    for changes, words in (
        ({"use_dora": True}, "DoRA of lm_head, which is the token table"),
        ({"peft_type": "LOHA"}, "LOHA of lm_head, which is the token table"),
        ({"peft_type": "IA3", "r": None}, "IA3 of lm_head, which is the token table"),
        ({"trainable_token_indices": [3]}, "trainable tokens beside LORA of lm_head"),
        ({"exclude_modules": ["lm_head"]}, "match no module"),
    ):
        with pytest.raises(InputError, match=words):
            adapters.method_from_config(c | changes, config)
    mixed = peft.chain(peft.LoRAHead(), peft.DoRA(where="layers/attn/q"))
    shapes = jax.eval_shape(mixed.init, jax.random.key(0), base("gemma")[2])
    with pytest.raises(InputError, match="LoRAHead and DoRA at once: an HF PEFT folder holds one"):
        adapters.save(tmp_path / "a", config, mixed, shapes)
    with pytest.raises(InputError, match="this base has a head of its own; take --method lora"):
        peft.count(peft.LoRAHead(), base("llama")[2])


def test_the_reader_and_writer_know_no_method_by_name():
    """What is known of a method stands in its own file, so that a new one with a type of HF PEFT's is one file."""
    names = {cls.__name__ for cls in peft.methods.values()}
    types = {cls.hf.type for cls in peft.methods.values()} - {""}
    for path in (Path(peft.__file__).parent / "hf").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            word = getattr(node, "id", getattr(node, "attr", getattr(node, "value", None)))
            assert not (isinstance(word, str) and word in names | types), f"{path.name}:{node.lineno} names {word}"
