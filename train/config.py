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
from ..bounds import LARGEST, Bounds, Checked, Count, Decay, Positive, Seed, Share
from ..data.columns import Columns
from ..data.errors import Policy
from ..model import Config, Rope
from ..peft import Method, Subset
from ..strict_json import read_json
from .schema import build, did_you_mean

# Environment in which glibc keeps freed memory and uses huge pages. XLA on CPU allocates a step's temporaries anew in
# each step (as PyTorch does); with glibc's defaults their page faults cost 10-20 % of a step.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 35),
    "MALLOC_TOP_PAD_": str(1 << 28),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
RUNTIME_FIELDS = {
    f"model.{k}" for k in ("scan", "remat", "dtype", "logits_dtype", "attention", "family")
}  # computed, not what
ACCEPT = ("data", "tokenizer", "base", "method", "model", "lock")  # what --accept takes


@dataclasses.dataclass(frozen=True)
class Optim(Checked):
    """Optimizer, schedule, and what each part of the trainable tree gets."""

    FLAGS: ClassVar[str] = "--optim."

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3  # the peak
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup: float = 0.05  # steps, or below 1 a part of all steps
    decay: Share = 0.2  # wsd: the last part of the steps, in which the rate falls
    end: Share = 0.1  # the last rate over the peak
    b1: Decay = 0.9
    b2: Decay = 0.95
    eps: Annotated[float, Bounds(1e-30)] = 1e-8  # 0 would make 0 / 0 of a gradient of 0
    weight_decay: float = 0.1
    decay_where: str = ""  # rule over the trainable tree; empty: matrices, but no prompt, prefix or rotation
    clip: float = 1.0  # global norm of the gradient; 0 is off
    spike: float = 0.0  # leave out steps whose loss is so many deviations above the last 128 (6 is usual); 0 is off
    groups: tuple[tuple[str, float], ...] = ()  # rules over the trainable tree -> factor of the learning rate

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup >= 1 and self.warmup % 1:
            raise InputError(f"--optim.warmup {self.warmup}: wanted whole steps, or below 1 a part of all steps")


@dataclasses.dataclass(frozen=True)
class Data(Checked):
    """Where rows come from. Pretraining reads domains, fine-tuning a task or a file of examples."""

    FLAGS: ClassVar[str] = "--data."

    domains: tuple[tuple[str, str, float], ...] = ()  # (name, source, weight); `five:web` is a domain of five_domains
    task: str = ""  # fine-tuning: a task's name (see data/tasks) or the source of examples (data/sources.py)
    valid: str = ""  # fine-tuning on examples: another source, whose rows choose the checkpoint
    test: str = ""  # fine-tuning on examples: another source, whose rows judge the result
    root: str = ""  # the folder that named tasks and five_domains read from
    columns: tuple[str, ...] = ()  # of a file of examples, OURS=THEIRS: prompt=question completion=answer
    ignore: tuple[str, ...] = ()  # its columns, fields of messages and template variables that are left out
    examples: int = 0  # fine-tuning: so many of the task's training examples, fewer being part of more; 0: all
    T: Annotated[int, Bounds(2)] = 256  # tokens in a row
    batch: Count = 8  # rows in a step, over all devices
    pack: bool = True  # fine-tuning: several examples in a row
    held_out: Share = 0.02  # part of the documents, or of a file's prompts, that no training row comes from
    vocab: Count = 4096  # pieces of a tokenizer trained on the domains
    tokenizer: str = ""  # a file or folder to use instead
    cache: str = "auto"  # a folder for tokenised domains; auto: the user's own (train/caches.py); empty: none
    bad: Policy = "error"  # a row that cannot be used: is an error, is left out, is repaired where that can be
    bad_cap: Share = 0.01  # part of the rows that may be left out or repaired

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.T * self.batch > LARGEST:
            raise InputError(f"--data.batch {self.batch} x --data.T {self.T}: wanted {LARGEST} tokens a step at most")
        Columns(self.columns, self.ignore)
        for name, *_ in self.domains:  # it names arrays in held_out.npz, and metrics
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise InputError(f"--data.domains: the name {name!r}; letters, digits, '_', '-' and '.' are wanted")


@dataclasses.dataclass(frozen=True)
class Run(Checked):
    """One phase: a model or a base, a method, data, an optimizer, and where it goes."""

    recipe: str = ""
    phase: Literal["pretrain", "finetune"] = "pretrain"
    out: str = "runs/run"
    model: Config | None = None  # pretraining: the architecture
    base: str = ""  # fine-tuning: a run directory, a Hugging Face folder, or a hub id owner/name[@revision]
    dtype: Literal["", "float32", "bfloat16", "float16"] = ""  # what is multiplied; empty: as the base, fp32 on a CPU
    remat: Literal["", "none", "dots", "offload", "attention", "full"] = (
        ""  # what is kept (Config.remat); empty: as the base
    )
    layers: Literal["", "stacked", "unrolled"] = ""  # in one array a matrix, or in L; empty: as the base, or the recipe
    method: Method = dataclasses.field(default_factory=Subset)
    data: Data = Data()
    optim: Optim = Optim()
    steps: int = 0  # fine-tuning: 0 means `epochs` over the examples
    epochs: Positive = 3.0
    seed: Seed = 0
    date: str = ""  # that a chat template writes (strftime_now), as 2026-11-29; empty: that of the run's first start
    quantize: Literal["", "int8", "nf4"] = ""  # fine-tuning: the base's matrices, which then only a method can adapt
    accumulate: Count = 1  # parts a batch is cut into, one in memory at a time
    offload: bool = False  # the optimizer's state stays in the hosts' memory between the updates
    chunk: Count = 8192  # tokens whose logits exist at once on a device
    mesh: Annotated[tuple[int, ...], Bounds(-1)] = (1, -1, 1)  # data, fsdp, tensor[, context]; -1: what is left
    log_every: Count = 10
    eval_every: int = 0  # steps; 0: at the end only
    eval_tokens: int = 32768  # held-out tokens of each domain; 0: all
    eval_rows: int = 0  # rows of a task's test that are generated and scored; 0: all
    score_base: bool = True  # fine-tuning: score the task before tuning too
    save_every: int = 0  # steps; 0: at the end only
    keep: Count = 2  # newest checkpoints kept, and the best
    resume: str = "never"  # auto: from the newest good checkpoint in `out`, if it has one; a step: from that one
    accept: str = ""  # what may differ from the checkpoint, with commas between (ACCEPT), or lock: take the folder over
    verify: Literal["full", "fast", "off"] = "full"  # loading: every digest, the files' sizes, the manifest alone
    max_bad: int = 10  # steps in a row that are left out (NaN, infinity, spikes) until the run stops; 0: never
    tensorboard: bool = True
    wandb: str = ""  # a Weights & Biases project to log to (pip install graftax[wandb])

    def __post_init__(self) -> None:
        super().__post_init__()
        check_date(self.date)
        if not re.fullmatch("never|auto|[0-9]+", self.resume):
            raise InputError(f"--resume {self.resume}: wanted auto, never, or the step of a checkpoint")
        for word in filter(None, self.accept.split(",")):
            if word not in ACCEPT:
                raise InputError(
                    f"--accept {word}{did_you_mean(word, ACCEPT)}: wanted {', '.join(ACCEPT)}, commas between"
                )
        if self.quantize and self.phase == "pretrain":
            raise InputError(f"--quantize {self.quantize}: of a frozen base; pretraining has none")
        if self.data.batch % self.accumulate:
            raise InputError(
                f"--data.batch {self.data.batch} does not divide into --accumulate {self.accumulate} parts"
            )


def check_date(text: str) -> None:
    """InputError for what is neither empty nor a date."""
    with contextlib.suppress(ValueError):
        if not text or datetime.date.fromisoformat(text).isoformat() == text:
            return
    raise InputError(f"--date {text}: a date is wanted, as 2026-11-29")


def to_json(run: Run) -> str:
    """config.json: every field; a method by its name and fields."""
    tree = dataclasses.asdict(run) | {"method": method_to_dict(run.method)}
    return json.dumps(tree, indent=1) + "\n"


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted name: value} of nested dicts, as in config.json."""
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return {prefix: tree}
    pairs = [flatten(v, f"{prefix}.{k}" if prefix else k) for k, v in tree.items()]
    return {k: v for pair in pairs for k, v in pair.items()}


def check_config_unchanged(run: Run, manifest: dict[str, Any], where: Path) -> None:
    """InputError if config.json no longer says of the model and the method what it said when a checkpoint was saved."""
    then, now = flatten(manifest.get("config", {})), flatten(json.loads(to_json(run)))
    for key in sorted(set(then) & set(now) - RUNTIME_FIELDS):
        if key.startswith(("model.", "method.", "quantize", "phase")) and then[key] != now[key]:
            raise InputError(
                f"{where / 'config.json'}: {key} is {short(now[key])}, but step {manifest['step']} was saved with "
                f"{short(then[key])}; put that back (all of it is under 'config' in its manifest.json)"
            )


def short(value: Any) -> str:
    """A value as JSON, cut if it is long."""
    text = json.dumps(value)
    return text if len(text) < 100 else text[:97] + "..."


def method_to_dict(method: Method) -> dict[str, Any]:
    """{"name": ..., fields}; of a chain {"chain": [...]}."""
    if isinstance(method, peft.Chain):
        return {"chain": [method_to_dict(m) for _, m in method.methods]}
    return {"name": type(method).__name__.lower(), **dataclasses.asdict(method)}  # type: ignore[call-overload]


def method_from_dict(tree: Any, where: str) -> Method:
    """The inverse of method_to_dict; InputError names what is unknown."""
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
    return build(cls, {k: v for k, v in tree.items() if k != "name"}, f"{where}: method {name}")


def method_class(name: str) -> type[Method]:
    """The class of a method's CLI name."""
    if name not in peft.methods:
        raise InputError(
            f"unknown method {name!r}{did_you_mean(name, peft.methods)}; there are {', '.join(sorted(peft.methods))}"
        )
    return peft.methods[name]


def from_json(path: Path) -> Run:
    """The Run of a config.json. Raises InputError with the file and the key."""
    return from_dict(read_json(path), path)


def from_dict(tree: dict[str, Any], path: Path) -> Run:
    """The Run of what a config.json holds."""
    if isinstance(tree.get("resume"), bool):  # as it was written once
        tree["resume"] = "auto" if tree["resume"] else "never"
    if "method" in tree:
        tree["method"] = method_from_dict(tree["method"], str(path))
    if tree.get("model") is not None:
        tree["model"] = config_from_dict(tree["model"], f"{path}: model")
    for key, cls in (("data", Data), ("optim", Optim)):
        tree[key] = build(cls, tree.get(key, {}), f"{path}: {key}")
    return build(Run, tree, str(path))


def config_from_dict(tree: Any, where: str) -> Config:
    """A Config of its fields."""
    given = tree if isinstance(tree, dict) else {}
    ropes = {k: build(Rope, given[k], f"{where}.{k}") for k in ("rope", "rope_local") if given.get(k) is not None}
    return build(Config, given | ropes if given else tree, where)
