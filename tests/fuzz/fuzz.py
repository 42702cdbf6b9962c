"""Coverage-guided fuzzing of what reads other people's files. Not in CI: it wants atheris, and time.

    pip install --target ATHERIS atheris
    PYTHONPATH=ATHERIS python tests/fuzz/fuzz.py TARGET -max_total_time=600

TARGET is jsonl, config, manifest, safetensors, adapter or tokenizer; flags are libFuzzer's. An input may be refused by
an InputError of one line. Anything else is a finding: another exception, or a file opened outside of a temporary
folder (and of the code itself). Findings lie in ./fuzz-TARGET-*, and are run again by naming the file.
"""

import contextlib
import json
import os
import random
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
import atheris

with atheris.instrument_imports(include=["graftax"]):
    import jax
    import jax.numpy as jnp
    from graftax import InputError
    from graftax.data.errors import RowErrors
    from graftax.data.sft import sft_rows
    from graftax.data.sources import documents
    from graftax.data.tasks.file_task import file_task
    from graftax.data.tokenizers import (
        huggingface,  # noqa: F401  (else imported late, and not instrumented)
        load_tokenizer,
        train_tokenizer,
    )
    from graftax.model import hf
    from graftax.model.hf.files import DTYPES, read_index
    from graftax.peft import hf as adapters
    from graftax.train.config import Data, Optim, Run, from_json, to_json
    from graftax.train.runs.checkpoint import CheckpointWriter

GOLDEN = Path(__file__).parents[1] / "golden"
HERE = Path(tempfile.mkdtemp(prefix="fuzz-"))
TOKENIZER = train_tokenizer([f"a few words, number {i}\n" for i in range(200)], HERE / "tokenizer", 300)
VALUES = [None, True, -1, 0, 1, 3.5, float("nan"), 1e400, 10**30, "", "x", "(", "../x", "/etc/passwd", "\ud800", [], {}]


# --- targets: bytes -> whatever, or InputError ---


def jsonl(data: bytes) -> None:
    for suffix in (".jsonl", ".json", ".csv", ".txt"):
        path = HERE / f"rows{suffix}"
        path.write_bytes(data)
        for policy in ("error", "skip", "repair"):
            with refused():
                list(documents(str(path), errors=RowErrors(policy, 1)))
            with refused():
                bad = RowErrors(policy, 1)
                sft_rows(file_task(path, 0.5, 0, bad).pairs(), TOKENIZER, 16, 0, False, bad)


def config(data: bytes) -> None:
    path = HERE / "config.json"
    path.write_bytes(data)
    with refused():
        to_json(from_json(path))


def manifest(data: bytes) -> None:
    folder = HERE / "checkpoints"
    (folder / "1").mkdir(parents=True, exist_ok=True)
    (folder / "1" / "manifest.json").write_bytes(data)
    for call in (
        lambda found: found.steps(),
        lambda found: found.best(),
        lambda found: found.restore(1, "trainable", {"a": jnp.zeros(2)}),
    ):
        with refused():
            call(CheckpointWriter(folder))


def safetensors(data: bytes) -> None:
    """A file of tensors, or what begins with `{`: the index of several."""
    listed, path = HERE / "st" / "model.safetensors.index.json", HERE / "st" / "model.safetensors"
    path.parent.mkdir(exist_ok=True)
    listed.unlink(missing_ok=True)
    (listed if data[:1] == b"{" else path).write_bytes(data)
    with refused():
        for tensor in read_index(path.parent).values():
            if tensor.dtype in DTYPES and tensor.shape:
                for _ in tensor.chunks(0, tensor.shape[0]):
                    pass


def adapter(data: bytes) -> None:
    """Two lines: adapter_config.json, and {name: [dtype, shape]} of zeros that the file holds."""
    first, _, second = data.partition(b"\n")
    folder, config, params = HERE / "adapter", *base()
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes(first)
    (folder / "adapter_model.safetensors").write_bytes(filled(second))
    with refused():
        adapters.load(folder, config, params)


def tokenizer(data: bytes) -> None:
    """Two lines: tokenizer.json and tokenizer_config.json."""
    first, _, second = data.partition(b"\n")
    folder = HERE / "hf"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes(first)
    (folder / "tokenizer_config.json").write_bytes(second)
    with refused():
        found = load_tokenizer(folder)
        assert max(found.encode("a b <s> \u00e9"), default=0) < found.vocab_size


# --- what they need ---


@contextlib.contextmanager
def refused():
    try:
        yield
    except InputError as error:
        if "\n" in str(error):
            raise AssertionError(f"more than one line: {error}") from None


def base(found: list[Any] = []) -> tuple[Any, Any]:  # noqa: B006
    """(config, params) of a tiny base, read once."""
    if not found:
        found += hf.load(GOLDEN / "peft" / "llama")
    return found[0], found[1]


def filled(names: bytes) -> bytes:
    """A safetensors file with these names, or the bytes themselves."""
    try:
        tree, at = json.loads(names), 0
        head = {}
        for name, (dtype, shape) in tree.items():
            size = {"F32": 4, "I32": 4, "F64": 8, "I64": 8, "U8": 1, "BOOL": 1}.get(dtype, 2)
            for n in shape:
                size *= n
            head[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            at += size
        raw = json.dumps(head).encode()
        return struct.pack("<Q", len(raw)) + raw + bytes(min(at, 1 << 20))
    except Exception:
        return names


def seeds(name: str) -> list[bytes]:
    one = lambda path: json.dumps(json.loads(path.read_text())).encode()  # noqa: E731
    if name == "jsonl":
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        rows = [{"text": "a", "prompt": "a", "completion": "b"}, {"messages": turns}]
        rows += [{"prompt": turns, "completion": "c"}, {"instruction": "a", "input": "b", "output": "c"}]
        call = {"role": "assistant", "weight": 1, "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]}
        rows += [{"messages": [*turns, call], "tools": [{"name": "f"}], "chat_template_kwargs": {"x": 1}}]
        sent = [{"from": "human", "value": "a"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}]
        rows += [{"conversations": sent, "system": "s"}, {"prompt": "a", "completion": "b", "history": [["c", "d"]]}]
        return [b"\n".join(json.dumps(row).encode() for row in rows), json.dumps(rows).encode(), b"text,b\na,b\n"]
    if name == "config":
        run = Run(model=hf.load(GOLDEN / "peft" / "llama")[0], data=Data(domains=(("a", "b", 1.0),)), optim=Optim())
        return [
            to_json(run).encode(),
            b'{"method": {"chain": [{"name": "lora"}, {"name": "subset", "where": "norms"}]}}',
        ]
    if name == "manifest":
        leaf = {"shape": [2], "dtype": "float32", "sha256": "0" * 64}
        return [json.dumps({"step": 1, "score": 2.0, "leaves": {"trainable": {"a": leaf}}}).encode()]
    if name == "safetensors":
        raw = [path.read_bytes() for path in sorted((GOLDEN / "peft").glob("llama_h*/*.safetensors"))]
        return [*raw, b'{"weight_map": {"a": "model.safetensors"}}']
    if name == "tokenizer":
        folders = [GOLDEN / "tokenizers" / name for name in ("qwen", "llama3", "gemma")]
        return [one(f / "tokenizer.json") + b"\n" + one(f / "tokenizer_config.json") for f in folders]
    found = []
    for path in sorted((GOLDEN / "peft").glob("llama_*/adapter_config.json")):
        raw = (path.parent / "adapter_model.safetensors").read_bytes()
        head = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        names = {k: [v["dtype"], v["shape"]] for k, v in head.items() if k != "__metadata__"}
        found.append(one(path) + b"\n" + json.dumps(names).encode())
    return found


# --- mutation that keeps JSON JSON half of the time ---


def changed(tree: Any, rng: random.Random) -> Any:
    """A tree with one thing in it changed, added or left out."""
    if isinstance(tree, dict | list) and tree and rng.random() < 0.9:
        key = rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        tree = tree.copy()
        what = rng.random()
        if what < 0.7:
            tree[key] = changed(tree[key], rng)
        elif what < 0.8:
            del tree[key]
        elif isinstance(tree, dict):
            tree[str(rng.choice([rng.choice(VALUES), f"{key}x", rng.choice(list(tree))] if tree else ["x"]))] = tree[
                key
            ]
        else:
            tree.append(rng.choice([tree[key], rng.choice(VALUES)]))
        return tree
    return rng.choice([rng.choice(VALUES), [tree], {"a": tree}, rng.randrange(-3, 99), str(tree)])


def mutated(data: bytes, size: int, seed: int) -> bytes:
    """libFuzzer's custom mutator: a line of JSON, or the header of a safetensors file, as a tree."""
    rng = random.Random(seed)
    if rng.random() < 0.5:
        return atheris.Mutate(data, size)
    n = int.from_bytes(data[:8], "little") if len(data) > 8 else 0
    with contextlib.suppress(Exception):
        if 0 < n < len(data):
            head = json.dumps(changed(json.loads(data[8 : 8 + n]), rng)).encode()
            return struct.pack("<Q", len(head)) + head + data[8 + n :]
        lines = data.split(b"\n")
        k = rng.randrange(len(lines))
        lines[k] = json.dumps(changed(json.loads(lines[k]), rng)).encode()
        return b"\n".join(lines)[:size]
    return atheris.Mutate(data, size)


# --- no file elsewhere ---

CODE = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]), "/proc", "/sys", "/dev", "/usr/share/zoneinfo")
WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")


def watch(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook: raises for a file opened, made or removed elsewhere, and for a process or a connection."""
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect"):
        raise AssertionError(f"{event} {args}")
    if (event == "open" or event in WRITES) and isinstance(args[0], str | bytes | os.PathLike):
        path = os.path.realpath(os.fsdecode(args[0]))
        reads = event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if not path.startswith((str(HERE), *(CODE if reads else ("/dev/null",)))):
            raise AssertionError(f"{event} {path}")


def main() -> None:
    name = sys.argv.pop(1)
    target, corpus = globals()[name], HERE / "corpus"
    corpus.mkdir()
    for n, data in enumerate(seeds(name)):
        (corpus / str(n)).write_bytes(data)
        target(data)  # what is read late (locales, modules) is read now
    sys.addaudithook(watch)
    flags = [f"-artifact_prefix=fuzz-{name}-", "-rss_limit_mb=6000", "-timeout=60", "-max_len=100000", *sys.argv[1:]]
    given = any(not flag.startswith("-") for flag in sys.argv[1:])
    atheris.Setup([sys.argv[0], *flags, *([] if given else [str(corpus)])], target, custom_mutator=mutated)
    atheris.Fuzz()


jax.config.update("jax_compilation_cache_dir", None)
if __name__ == "__main__":
    main()
