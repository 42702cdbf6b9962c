"""Hugging Face bases: what transformers computes, graftax computes; what is written, transformers would read."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from graftax import InputError
from graftax.model import Config, Transformer, generate, init, presets, resize
from graftax.model.hf import config_from_hf, config_to_hf, fetch_checkpoint, load, save
from graftax.model.hf.files import read_header, read_index
from graftax.model.layers import Embed, Norm
from graftax.model.layout import restack
from graftax.model.sharding import make_mesh
from graftax.model.transformer import Block
from graftax.model.tree import named
from graftax.peft import Subset, count
from safetensors.numpy import save_file
from tiny import same

GOLDEN = Path(__file__).parent / "golden" / "hf"
CASES = sorted(p.name for p in GOLDEN.iterdir() if p.is_dir())
PUBLISHED = json.loads((GOLDEN / "published.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_logits_states_and_greedy_text_are_those_of_transformers(case):
    config, params = load(GOLDEN / case, dtype="float32")
    want = np.load(GOLDEN / case / "expected.npz")
    # Padded on the right, layer by layer.
    unrolled = dataclasses.replace(config, scan=False)
    lengths_B = jnp.asarray(want["lengths"])[:, None]
    segments_BT = (jnp.arange(24) < lengths_B).astype(jnp.int32)
    positions_BT = jnp.minimum(jnp.arange(24), lengths_B - 1)
    seen = jax.jit(
        lambda p, *at: Transformer(unrolled).apply(
            {"params": p}, *at, mutable=["intermediates"],
            capture_intermediates=lambda m, name: name == "__call__" and isinstance(m, Block | Embed | Norm),
        )
    )  # fmt: skip
    logits, state = seen(restack(params, unrolled), want["ids"], positions_BT, segments_BT)
    real = np.asarray(segments_BT, bool)
    np.testing.assert_allclose(np.asarray(logits)[real], want["logits"][real], atol=1e-4)
    states = state["intermediates"]
    layers = [states["layers"][str(i)]["__call__"][0][0] for i in range(config.L - 1)]
    hidden = [states["embed"]["__call__"][0], *layers, states["final_norm"]["__call__"][0]]
    rms = np.stack([np.sqrt(np.square(x).mean(-1)) for x in hidden], axis=1)
    np.testing.assert_allclose(rms * real[:, None], want["hidden_rms"] * real[:, None], atol=1e-4)
    # Packed, the layers stacked.
    packed = [want[f"packed_{k}"] for k in ("ids", "positions", "segments")]
    logits = jax.jit(Transformer(config).apply)({"params": params}, *packed)
    np.testing.assert_allclose(logits, want["packed_logits"], atol=1e-4)
    # With a cache, token by token, two prompts of different lengths at once.
    prompts = [want[f"prompt_{i}"].tolist() for i in (0, 1)]
    assert generate(Transformer(config), params, prompts, 32) == [want[f"greedy_{i}"].tolist() for i in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_read_again_bit_for_bit(case, tmp_path):
    config, params = load(GOLDEN / case)
    for name, like in (("bare", None), ("like", GOLDEN / case)):
        save(tmp_path / name, config, params, like=like, shard_bytes=20_000)
        again, read = load(tmp_path / name)
        assert again == config
        assert same(read, params)
        theirs, ours = read_index(GOLDEN / case), read_index(tmp_path / name)
        assert {k: (t.shape, t.dtype) for k, t in theirs.items()} == {k: (t.shape, t.dtype) for k, t in ours.items()}
    kept = json.loads((tmp_path / "like" / "config.json").read_text())
    first = json.loads((GOLDEN / case / "config.json").read_text())
    assert all(kept[k] == v for k, v in first.items() if k not in ("dtype", "torch_dtype"))
    assert kept["torch_dtype"] == config.param_dtype


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config = config_from_hf(PUBLISHED[name])
    total = json.loads((GOLDEN / "params.json").read_text())[name]
    assert count(Subset("all"), config) == count(Subset("all"), presets[name]) == total
    run = {k: getattr(config, k) for k in ("param_dtype", "dtype", "remat")}
    assert dataclasses.replace(presets[name], **run) == config
    assert config_from_hf(config_to_hf(config)) == dataclasses.replace(config, param_dtype="float32", dtype="float32")


def test_a_native_base_takes_the_first_family_that_fits(tmp_path):
    config = Config(V=61, D=32, L=2, N=4, K=2, H=8, F=48, context=64, qkv_bias=True)
    params = init(config, jax.random.key(0))
    save(tmp_path / "out", config, params)
    again, read = load(tmp_path / "out")
    assert again.family == "qwen2"
    assert same(read, params)
    with pytest.raises(InputError, match=r"no Hugging Face family computes.*gated = False"):
        save(tmp_path / "none", dataclasses.replace(config, gated=False), params)
    assert not (tmp_path / "none").exists()


def test_layers_unrolled_are_written_alike(tmp_path):
    config, params = load(GOLDEN / "phi3")
    unrolled = dataclasses.replace(config, scan=False)
    save(tmp_path / "out", unrolled, restack(params, unrolled))
    assert same(load(tmp_path / "out")[1], params)


def test_onto_a_mesh_and_into_another_dtype():
    config, params = load(GOLDEN / "phi3")
    _, split = load(GOLDEN / "phi3", mesh=make_mesh((4, 2, 1)))
    assert same(split, params)
    gate = named(split)["layers/mlp/gate"]
    assert gate.addressable_shards[0].data.shape[1] == config.D // 2
    halved, bf16 = load(GOLDEN / "phi3", dtype=jnp.bfloat16)
    assert halved.param_dtype == halved.dtype == "bfloat16"
    assert same(bf16, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def test_resize_is_the_mean_and_leaves_the_rest():
    for case in ("llama2", "qwen3"):
        config, params = load(GOLDEN / case)
        V, ids = config.V, np.arange(12)[None]
        larger, more = resize(config, params, V + 5)
        before = Transformer(config).apply({"params": params}, ids)
        after = Transformer(larger).apply({"params": more}, ids)
        np.testing.assert_allclose(after[..., :V], before, atol=1e-6)
        np.testing.assert_allclose(after[..., V:], before.mean(-1, keepdims=True).repeat(5, -1), atol=1e-5)
        table = named(more)["embed/table"]
        np.testing.assert_allclose(table[V:], np.asarray(table[:V]).mean(0)[None].repeat(5, 0), atol=1e-6)
        assert ("head/matrix" in named(more)) == (not config.tied)
        assert same(resize(larger, more, V)[1], params)
        used = np.arange(V) < V - 3  # the last three are spare rows, and a new token takes one of them
        _, more = resize(config, params, V + 1, used, [V - 2])
        for path, axis in (("embed/table", 0), ("head/matrix", 1)):
            if path in named(more):
                old, now = (np.moveaxis(np.asarray(named(p)[path]), axis, 0) for p in (params, more))
                assert np.array_equal(np.delete(now, [V - 2, V], 0), np.delete(old, V - 2, 0))
                np.testing.assert_allclose(now[[V - 2, V]], old[used].mean(0)[None].repeat(2, 0), atol=1e-6)


def test_one_file_of_weights_counts_before_an_index(tmp_path):
    folder = shutil.copytree(GOLDEN / "llama2", tmp_path / "both")
    config, params = load(folder)
    other = jax.tree.map(lambda x: x + 1, params)
    save(tmp_path / "whole", config, other)
    shutil.copy(tmp_path / "whole" / "model.safetensors", folder)
    assert same(load(folder)[1], other)


LINEAR = {"rope_type": "linear", "factor": 2.0}
PARAMETERS = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5.0}
ROPES = [  # what config.json says, and (kind, theta, factor) that transformers 5.24 takes
    ({"rope_theta": 7.0, "rope_parameters": PARAMETERS}, ("linear", 5.0, 4.0)),
    ({"rope_theta": 7.0, "rope_parameters": {"rope_type": "default"}}, ("default", 7.0, 1.0)),
    ({"rope_theta": 7.0, "rope_parameters": PARAMETERS, "rope_scaling": LINEAR}, ("linear", 7.0, 2.0)),
    ({"rope_parameters": PARAMETERS, "rope_scaling": LINEAR}, ("linear", 10_000.0, 2.0)),
    ({"rope_theta": 7.0, "rope_parameters": PARAMETERS, "rope_scaling": None}, ("linear", 5.0, 4.0)),
    ({"rope_theta": 7.0, "rope_scaling": {**LINEAR, "rope_theta": 3.0}}, ("linear", 3.0, 2.0)),
    ({"rope_theta": 7.0, "rope_scaling": {**LINEAR, "type": "dynamic"}}, ("linear", 7.0, 2.0)),
]


@pytest.mark.parametrize(("said", "taken"), ROPES)
def test_of_two_ropes_the_one_of_transformers_counts(said, taken):
    tree = json.loads((GOLDEN / "llama3" / "config.json").read_text())
    del tree["rope_parameters"]
    rope = config_from_hf(tree | said).rope
    assert (rope.kind, rope.theta, rope.factor) == taken


@pytest.mark.parametrize(("said", "taken"), [
    ({"torch_dtype": "bfloat16", "dtype": "float16"}, "float16"),
    ({"torch_dtype": "bfloat16", "dtype": None}, "bfloat16"),
])  # fmt: skip
def test_of_two_dtypes_the_one_of_transformers_counts(said, taken):
    tree = json.loads((GOLDEN / "llama3" / "config.json").read_text())
    assert config_from_hf(tree | said).param_dtype == taken


def test_a_hub_id_is_read_from_the_cache(tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    there = tmp_path / "models--some--model"
    shutil.copytree(GOLDEN / "qwen2", there / "snapshots" / "abc123")
    (there / "refs").mkdir()
    (there / "refs" / "main").write_text("abc123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_checkpoint("some/model") == there / "snapshots" / "abc123"
    assert load("some/model")[0] == load(GOLDEN / "qwen2")[0]
    with pytest.raises(InputError, match="some/other: no such folder, and as a hub id: LocalEntryNotFoundError"):
        fetch_checkpoint("some/other")
    with pytest.raises(InputError, match="no such folder, and not a hub id"):
        fetch_checkpoint("/no/where")


# --- what is refused: (what is done to a good folder, what the message says) ---


def edit(**changes):
    def do(folder: Path) -> None:
        path = folder / "config.json"
        tree = json.loads(path.read_text())
        tree |= changes
        path.write_text(json.dumps({k: v for k, v in tree.items() if v != "DROP"}))

    return do


def tensors(folder: Path, change) -> None:
    """Rewrite model.safetensors by `change(dict)`."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        held = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    change(held)
    save_file(held, folder / "model.safetensors")


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def shards(**where):
    def do(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")  # which would count before an index
        names = dict.fromkeys(read_header(folder / "model-1.safetensors"), "model-1.safetensors")
        tree = {"weight_map": names | {k.replace("__", "."): v for k, v in where.items()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(tree))

    return do


def drop(held):
    del held["model.layers.1.mlp.up_proj.weight"]


def extra(held):
    held["model.layers.0.self_attn.sinks"] = np.zeros(3, np.float32)


def reshape(held):
    held["model.norm.weight"] = np.zeros(3, np.float32)


def integers(held):
    held["model.norm.weight"] = held["model.norm.weight"].astype(np.int32)


def untied(held):
    held["lm_head.weight"] = held["model.embed_tokens.weight"] + 1


K = "model.layers.0.mlp.up_proj.weight".replace(".", "__")
REFUSED = {
    "architecture": (edit(model_type="mixtral"), "model_type 'mixtral' is not known; families: llama"),
    "no architecture": (edit(model_type="DROP"), "model_type None is not known"),
    "images": (edit(model_type="gemma3", text_config={"a": 1}), "text and images"),
    "a key": (
        edit(logit_scale=0.5, sliding_windw=8),
        "not understood.*logit_scale = 0.5; sliding_windw = 8$",
    ),
    "a switch": (edit(use_bidirectional_attention=True), "use_bidirectional_attention = True"),
    "quantised": (edit(quantization_config={"bits": 4}), "quantization_config = {'bits': 4}"),
    "rope kind": (edit(rope_parameters={"rope_type": "mrope"}), "rope_type 'mrope' is not known"),
    "rope key": (edit(rope_parameters={"rope_type": "linear", "factor": 2, "beta": 1}), "kind linear: unknown beta"),
    "rope factor": (edit(rope_parameters={"rope_type": "llama3"}), "kind llama3: missing factor, low_freq_factor"),
    "rope number": (
        edit(rope_parameters={"rope_type": "linear", "factor": "two"}),
        "rope: factor is 'two'; wanted a number",
    ),
    "activation": (edit(hidden_act="mish"), "hidden_act: activation 'mish' is not known"),
    "a size": (edit(vocab_size="DROP"), "config.json: has no vocab_size"),
    "a type": (edit(num_hidden_layers="two"), "num_hidden_layers is 'two'; wanted an integer from 1 to 10000"),
    "a bound": (edit(num_hidden_layers=10**30), "num_hidden_layers is 1000.*; wanted an integer from 1 to 10000"),
    "null": (edit(rms_norm_eps=None), "rms_norm_eps is null"),
    "a string": (edit(rope_scaling="x"), "rope_scaling is 'x'; wanted an object"),
    "part": (edit(rope_parameters={"partial_rotary_factor": 0.5}), "unknown partial_rotary_factor"),
    "unread": (
        edit(
            sliding_window=4,
            layer_types=["full_attention"] * 3,
            model_type="mistral",
            attention_bias=False,
            num_hidden_layers=3,
        ),
        "layer_types differs from what this family does",
    ),
    "heads": (edit(head_dim=None, num_attention_heads=5), "does not divide into 5 heads"),
    "layer types": (
        edit(layer_types=["linear_attention"]),
        "layer_types is .*; wanted 2 of full_attention, sliding_attention",
    ),
    "dtype": (edit(dtype="float8"), "dtype 'float8'"),
    "sizes disagree": (edit(vocab_size=99), "of another shape: model.embed_tokens.weight .*wanted .99"),
    "depth disagrees": (edit(num_hidden_layers=5), "missing: model.layers."),
    "missing": (lambda f: tensors(f, drop), "1 missing: model.layers.1.mlp.up_proj.weight"),
    "unexpected": (lambda f: tensors(f, extra), "1 unexpected: model.layers.0.self_attn.sinks"),
    "shape": (lambda f: tensors(f, reshape), "1 of another shape: model.norm.weight .3."),
    "integers": (lambda f: tensors(f, integers), "of a type that is not F64/F32/F16/BF16: model.norm.weight I32"),
    "tied": (
        lambda f: tensors(f, untied),
        "lm_head.weight differs from model.embed_tokens.weight, but config.json says",
    ),
    "truncated": (truncate, "model.safetensors: not a whole safetensors file"),
    "pickle": (pickled, "pytorch_model.bin is a pickle, which runs code when it is read"),
    "nothing": (lambda f: (f / "model.safetensors").unlink(), "has neither model.safetensors nor"),
    "missing shard": (shards(**{K: "model-0.safetensors"}), "names model-0.safetensors, which is not there"),
    "escape": (shards(**{K: "../x.safetensors"}), "names the file '../x.safetensors'; wanted the plain name"),
    "misplaced": (
        shards(more__weight="model-1.safetensors"),
        "places more.weight in model-1.safetensors, which does not",
    ),
    "index": (
        lambda f: (f / "model.safetensors").rename(f / "model.safetensors.index.json").write_text("{}"),
        "has no weight_map",
    ),
    "no json": (lambda f: (f / "config.json").write_text("{"), "config.json: not readable as JSON"),
    "twice": (lambda f: (f / "config.json").write_text('{"a": 1, "a": 2}'), "duplicate key 'a'"),
}


# Keys of a config.json and values of every wrong kind: a Config or one line, never a traceback.
WRONG = [None, "", "x", -1, 0, 1, 0.5, True, [], [1], {}, {"a": 1}, 10**30, float("inf"), float("nan"), "4"]


def test_any_value_of_any_key_is_understood_or_refused():
    for case in ("llama_yarn", "gemma3", "gpt2", "phi3_long", "qwen2", "gemma2", "stablelm"):
        tree = json.loads((GOLDEN / case / "config.json").read_text())
        rope = tree.get("rope_parameters", {})
        inner = {**rope, **rope.get("full_attention", {})} if isinstance(rope, dict) else {}
        for value in WRONG:
            for key in [*tree, "rope_scaling", "sliding_window_pattern", "rope_theta", "rope_local_base_freq"]:
                with contextlib.suppress(InputError):
                    config_to_hf(config_from_hf(tree | {key: value}))
            for key in inner:
                with contextlib.suppress(InputError):
                    config_from_hf(tree | {"rope_scaling": inner | {key: value}})


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_line(what, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(GOLDEN / "smollm2", folder)
    damage, message = REFUSED[what]
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_half_precision_and_old_files_are_read(tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(GOLDEN / "gpt2", folder)

    def old(held):  # as the first GPT-2 files are: no prefix, and tables that are computed
        for name in list(held):
            held[name.removeprefix("transformer.")] = held.pop(name).astype(np.float16)
        held["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)

    tensors(folder, old)
    config, params = load(folder)
    assert config.param_dtype == "float16"
    want = jax.tree.map(lambda x: x.astype(jnp.float16), load(GOLDEN / "gpt2")[1])
    assert same(params, want)
    assert named(load(folder, dtype=ml_dtypes.bfloat16)[1])["embed/table"].dtype == jnp.bfloat16
