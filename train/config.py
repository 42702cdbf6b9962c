"""Run: everything that is needed to run a phase again, as frozen dataclasses that a recipe fills and flags override."""

import contextlib
import dataclasses
import datetime
import json
import re
import reprlib
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from .. import InputError, peft
from ..bounds import LARGEST, Bounds, Checked, Count, Decay, Positive, Seed, Share, did_you_mean, from_fields
from ..data.columns import Columns
from ..data.errors import Policy, RowErrors
from ..model import Config, Rope
from ..peft import Method, Subset
from ..strict_json import read_json
from .config_versions import VERSION, upgrade

# Environment in which glibc keeps freed memory and uses huge pages. XLA on CPU allocates a step's temporaries anew in
# each step (as PyTorch does); with glibc's defaults their page faults cost 10-20 % of a step.
MALLOC_ENV = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 35),
    "MALLOC_TOP_PAD_": str(1 << 28),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
# Fields that change how a model is computed, not what it computes.
RUNTIME_FIELDS = {f"model.{name}" for name in ("scan", "remat", "dtype", "logits_dtype", "attention", "family")}
FORCE = ("data", "tokenizer", "base", "method", "model", "lock")  # values of --force


@dataclasses.dataclass(frozen=True)
class Optim(Checked):
    """Optimizer, learning rate schedule, and their exceptions for parts of the trainable tree."""

    FLAGS: ClassVar[str] = "--optim."

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3  # peak learning rate
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup: float = 0.05  # steps, or below 1 a fraction of all steps
    decay: Share = 0.2  # wsd: the last fraction of the steps, in which the learning rate falls
    end: Share = 0.1  # final learning rate as a fraction of the peak
    b1: Decay = 0.9
    b2: Decay = 0.95
    eps: Annotated[float, Bounds(1e-30)] = 1e-8  # with 0 a gradient of 0 would give 0 / 0
    weight_decay: float = 0.1
    decay_where: str = ""  # rule over the trainable tree; empty: matrices, except prompts, prefixes and rotations
    clip: float = 1.0  # maximum global norm of the gradient; 0: off
    spike: float = 0.0  # skip steps whose loss is so many deviations above the last 128 (6 is usual); 0: off
    groups: tuple[tuple[str, float], ...] = ()  # rules over the trainable tree -> factor of the learning rate

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup >= 1 and self.warmup % 1:
            raise InputError(f"--optim.warmup {self.warmup}: wanted whole steps, or below 1 a fraction of all steps")


@dataclasses.dataclass(frozen=True)
class Data(Checked):
    """The source of training rows: domains for pretraining, a task or a file of examples for fine-tuning."""

    FLAGS: ClassVar[str] = "--data."

    domains: tuple[tuple[str, str, float], ...] = ()  # (name, source, weight); `five:web` is a domain of five_domains
    task: str = ""  # fine-tuning: a task's name (data/tasks), or the source of examples (data/sources.py)
    valid: str = ""  # fine-tuning on examples: another source, whose rows choose the checkpoint
    test: str = ""  # fine-tuning on examples: another source, whose rows measure the result
    root: str = ""  # the folder that named tasks and five_domains are read from
    columns: tuple[str, ...] = ()  # columns of a file of examples, OURS=THEIRS: prompt=question completion=answer
    ignore: tuple[str, ...] = ()  # columns, message fields and template variables of that file to leave out
    examples: int = 0  # fine-tuning: number of training examples, a smaller set being part of a larger one; 0: all
    T: Annotated[int, Bounds(2)] = 256  # tokens per row
    batch: Count = 8  # rows per step, over all devices
    pack: bool = True  # fine-tuning: put several examples into a row
    held_out: Share = 0.02  # fraction of the documents, or of a file's prompts, that is kept out of training
    vocab: Count = 4096  # pieces of a tokenizer trained on the domains
    tokenizer: str = ""  # a tokenizer file or folder to use instead
    cache: str = "auto"  # folder for tokenised domains; auto: the user's cache folder; empty: none
    bad_rows: Policy = "error"  # rows that cannot be used: stop, skip them, or repair them where possible
    max_bad_rows: Share = 0.01  # fraction of the rows that may be skipped or repaired

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.T * self.batch > LARGEST:
            raise InputError(f"--data.batch {self.batch} x --data.T {self.T}: wanted {LARGEST} tokens a step at most")
        Columns(self.columns, self.ignore)
        for name, *_ in self.domains:  # it names arrays in held_out.npz, and metrics
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise InputError(f"--data.domains: the name {name!r}: wanted letters, digits, '_', '-' and '.'")

    def row_errors(self) -> RowErrors:
        """Return a new count of bad rows with this policy and limit."""
        return RowErrors(self.bad_rows, self.max_bad_rows)


@dataclasses.dataclass(frozen=True)
class Run(Checked):
    """Configuration of one run: a model or a base, a method, data, an optimizer, and the output folder."""

    recipe: str = ""
    phase: Literal["pretrain", "finetune"] = "pretrain"
    out: str = "runs/run"
    model: Config | None = None  # pretraining: the architecture
    base: str = ""  # fine-tuning: a run folder, a Hugging Face folder, or a hub id owner/name[@revision]
    dtype: Literal["", "float32", "bfloat16", "float16"] = ""  # dtype of products; empty: the base's, fp32 on a CPU
    remat: Literal["", "none", "dots", "offload", "attention", "full"] = ""  # activations kept; empty: as the base
    layers: Literal["", "stacked", "unrolled"] = ""  # one array [L, ...] per matrix, or L arrays; empty: as the base
    method: Method = dataclasses.field(default_factory=Subset)
    data: Data = Data()
    optim: Optim = Optim()
    steps: int = 0  # fine-tuning: 0 means `epochs` over the examples
    epochs: Positive = 3.0
    seed: Seed = 0
    date: str = ""  # date that a chat template writes (strftime_now), as 2026-11-29; empty: date of the first start
    quantize: Literal["", "int8", "nf4"] = ""  # fine-tuning: quantise the base's matrices; only a method can adapt them
    accumulate: Count = 1  # microbatches per step, one in memory at a time
    offload: bool = False  # keep the optimizer state in host memory between updates
    chunk: Count = 8192  # tokens whose logits are in memory at once, per device
    mesh: Annotated[tuple[int, ...], Bounds(-1)] = (1, -1, 1)  # data, fsdp, tensor[, context]; -1: remaining devices
    log_every: Count = 10
    eval_every: int = 0  # steps; 0: at the end only
    eval_tokens: int = 32768  # held-out tokens per domain; 0: all
    eval_rows: int = 0  # rows of a task's test that are generated and scored; 0: all
    eval_base_first: bool = True  # fine-tuning: score the task before tuning too
    save_every: int = 0  # steps; 0: at the end only
    keep: Count = 2  # newest checkpoints to keep, besides the best
    resume: str = "never"  # auto: from the newest good checkpoint in `out`, if there is one; a step: from that one
    force: str = ""  # parts that may differ from the checkpoint (FORCE), comma separated; lock: take the folder over
    verify: Literal["full", "fast", "off"] = "full"  # when loading: check all digests, file sizes, or the manifest only
    max_skipped: int = 10  # stop after so many skipped steps in a row (NaN, infinity, spikes); 0: never
    tensorboard: bool = True
    wandb: str = ""  # a Weights & Biases project to log to (pip install graftax[wandb])

    def __post_init__(self) -> None:
        super().__post_init__()
        check_date(self.date)
        if not re.fullmatch("never|auto|[0-9]+", self.resume):
            raise InputError(f"--resume {self.resume}: wanted auto, never, or the step of a checkpoint")
        for part in filter(None, self.force.split(",")):
            if part not in FORCE:
                hint = did_you_mean(part, FORCE)
                raise InputError(f"--force {part}{hint}: wanted {', '.join(FORCE)}, comma separated")
        if self.quantize and self.phase == "pretrain":
            raise InputError(f"--quantize {self.quantize}: applies to a frozen base, which pretraining lacks; drop it")
        if self.data.batch % self.accumulate:
            raise InputError(
                f"--data.batch {self.data.batch} does not divide into --accumulate {self.accumulate} parts"
            )


def check_date(text: str) -> None:
    """Raise InputError for a string that is neither empty nor a date."""
    with contextlib.suppress(ValueError):
        if not text or datetime.date.fromisoformat(text).isoformat() == text:
            return
    raise InputError(f"--date {text}: wanted a date, as 2026-11-29")


def to_json(run: Run) -> str:
    """Return the contents of config.json: every field; a method by its name and fields."""
    tree = {"version": VERSION} | dataclasses.asdict(run) | {"method": method_to_dict(run.method)}
    return json.dumps(tree, indent=1) + "\n"


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return {dotted name: value} of nested dicts and lists, as in config.json."""
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return {prefix: tree}
    pairs = [flatten(v, f"{prefix}.{k}" if prefix else k) for k, v in tree.items()]
    return {k: v for pair in pairs for k, v in pair.items()}


def check_config_unchanged(run: Run, manifest: dict[str, Any], folder: Path) -> None:
    """Raise InputError if the model or the method in config.json is not the one that a checkpoint was saved with."""
    saved, now = flatten(upgrade(manifest.get("config", {}))), flatten(json.loads(to_json(run)))
    for key in sorted(set(saved) & set(now) - RUNTIME_FIELDS):
        if key.startswith(("model.", "method.", "quantize", "phase")) and saved[key] != now[key]:
            raise InputError(
                f"{folder / 'config.json'}: {key} is {shorten(now[key])}, but step {manifest['step']} was saved with "
                f"{shorten(saved[key])}; restore that value (manifest.json of the step has all of them under 'config')"
            )


def shorten(value: Any) -> str:
    """Return a value as JSON, cut to 100 characters."""
    text = json.dumps(value)
    return text if len(text) < 100 else text[:97] + "..."


def method_to_dict(method: Method) -> dict[str, Any]:
    """Return {"name": ..., fields}, or {"chain": [...]} for a chain."""
    if isinstance(method, peft.Chain):
        return {"chain": [method_to_dict(m) for _, m in method.methods]}
    return {"name": type(method).__name__.lower(), **dataclasses.asdict(method)}  # type: ignore[call-overload]


def method_from_dict(tree: Any, where: str) -> Method:
    """Return the method of `method_to_dict`. Raises InputError for an unknown name or field."""
    if not isinstance(tree, dict):
        raise InputError(f"{where}: method is a {type(tree).__name__}; an object with its name and fields is wanted")
    if "chain" in tree:
        if not isinstance(tree["chain"], list) or not tree["chain"]:
            raise InputError(f"{where}: chain is {reprlib.repr(tree['chain'])}; a list of methods is wanted")
        return peft.chain(*(method_from_dict(t, where) for t in tree["chain"]))
    name = str(tree.get("name", ""))
    try:
        cls = method_class(name)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return from_fields(cls, {k: v for k, v in tree.items() if k != "name"}, f"{where}: method {name}")


def method_class(name: str) -> type[Method]:
    """Return the class of a method's name. Raises InputError for an unknown one."""
    if name not in peft.methods:
        hint = did_you_mean(name, peft.methods)
        raise InputError(f"unknown method {name!r}{hint}; there are {', '.join(sorted(peft.methods))}")
    return peft.methods[name]


def from_json(path: Path) -> Run:
    """Return the Run of a config.json. Raises InputError with the file and the key."""
    return from_dict(read_json(path), path)


def from_dict(tree: dict[str, Any], path: Path) -> Run:
    """Return the Run of the object in a config.json."""
    if tree.get("version", 1) not in range(1, VERSION + 1):
        raise InputError(f"{path}: version {tree['version']}, this graftax reads 1 to {VERSION}; update graftax")
    tree = {key: value for key, value in upgrade(tree).items() if key != "version"}
    if "method" in tree:
        tree["method"] = method_from_dict(tree["method"], str(path))
    if tree.get("model") is not None:
        tree["model"] = config_from_dict(tree["model"], f"{path}: model")
    for key, cls in (("data", Data), ("optim", Optim)):
        tree[key] = from_fields(cls, tree.get(key, {}), f"{path}: {key}")
    return from_fields(Run, tree, str(path))


def config_from_dict(tree: Any, where: str) -> Config:
    """Return the model Config of its fields."""
    fields = tree if isinstance(tree, dict) else {}
    ropes = {
        name: from_fields(Rope, fields[name], f"{where}.{name}")
        for name in ("rope", "rope_local")
        if fields.get(name) is not None
    }
    return from_fields(Config, fields | ropes if fields else tree, where)
