"""Run: everything that is needed to run a phase again, as frozen dataclasses that a recipe fills and flags override."""

import dataclasses
import json
import re
import reprlib
from pathlib import Path
from typing import Any, Literal

from .. import InputError, peft
from ..data.bad import Policy
from ..model import Config, Rope
from ..model.hf_files import read_json
from ..peft import Method, Subset
from .typed import build, close

# Environment in which glibc keeps freed memory and uses huge pages. XLA on CPU allocates a step's temporaries anew in
# each step (as PyTorch does); with glibc's defaults their page faults cost 10-20 % of a step.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 35),
    "MALLOC_TOP_PAD_": str(1 << 28),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
HOW = {f"model.{k}" for k in ("scan", "remat", "dtype", "logits_dtype", "attention", "family")}  # computed, not what
ACCEPT = ("data", "tokenizer", "base", "method", "model", "lock")  # what --accept takes


@dataclasses.dataclass(frozen=True)
class Optim:
    """Optimizer, schedule, and what each part of the trainable tree gets."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3  # the peak
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup: float = 0.05  # steps, or below 1 a part of all steps
    decay: float = 0.2  # wsd: the last part of the steps, in which the rate falls
    end: float = 0.1  # the last rate over the peak
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_where: str = ""  # rule over the trainable tree; empty: matrices, but no prompt, prefix or rotation
    clip: float = 1.0  # global norm of the gradient; 0 is off
    spike: float = 0.0  # leave out steps whose loss is so many deviations above the last 128 (6 is usual); 0 is off
    groups: tuple[tuple[str, float], ...] = ()  # rules over the trainable tree -> factor of the learning rate

    def __post_init__(self) -> None:
        for field in ("lr", "warmup", "decay", "end", "eps", "weight_decay", "clip", "spike"):
            value = getattr(self, field)
            if not 0 <= value < float("inf"):
                raise InputError(f"--optim.{field.replace('_', '-')} {value}: wanted a finite number of 0 or more")
        for field in ("b1", "b2"):
            if not 0 <= getattr(self, field) < 1:
                raise InputError(f"--optim.{field} {getattr(self, field)}: wanted a number of 0 or more, below 1")
        for rule, factor in self.groups:
            if not 0 <= factor < float("inf"):
                raise InputError(f"--optim.groups {rule} {factor}: wanted a finite factor of 0 or more")


@dataclasses.dataclass(frozen=True)
class Data:
    """Where rows come from. Pretraining reads domains, fine-tuning a task or a file of examples."""

    domains: tuple[tuple[str, str, float], ...] = ()  # (name, source, weight); `five:web` is a domain of five_domains
    task: str = ""  # fine-tuning: a task's name (see data/tasks.py) or a .jsonl/.csv/.parquet file of examples
    root: str = ""  # the folder that named tasks and five_domains read from
    examples: int = 0  # fine-tuning: so many of the task's training examples, fewer being part of more; 0: all
    T: int = 256  # tokens in a row
    batch: int = 8  # rows in a step, over all devices
    pack: bool = True  # fine-tuning: several examples in a row
    held_out: float = 0.02  # part of the documents that no training row comes from
    vocab: int = 4096  # pieces of a tokenizer trained on the domains
    tokenizer: str = ""  # a file or folder to use instead
    cache: str = ".cache/data"  # tokenised domains; empty: none
    bad: Policy = "error"  # a row that cannot be used: is an error, is left out, is repaired where that can be
    bad_cap: float = 0.01  # part of the rows that may be left out or repaired

    def __post_init__(self) -> None:
        for field, least in (("T", 2), ("batch", 1), ("vocab", 1), ("examples", 0)):
            if getattr(self, field) < least:
                raise InputError(f"--data.{field} {getattr(self, field)}: wanted {least} or more")
        for field in ("held_out", "bad_cap"):
            if not 0 <= getattr(self, field) <= 1:
                raise InputError(f"--data.{field.replace('_', '-')} {getattr(self, field)}: wanted a number in 0..1")
        for name, *_ in self.domains:  # it names arrays in held_out.npz, and metrics
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise InputError(f"--data.domains: the name {name!r}; letters, digits, '_', '-' and '.' are wanted")


@dataclasses.dataclass(frozen=True)
class Run:
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
    epochs: float = 3.0
    seed: int = 0
    quantize: Literal["", "int8", "nf4"] = ""  # fine-tuning: the base's matrices, which then only a method can adapt
    accumulate: int = 1  # parts a batch is cut into, one in memory at a time
    offload: bool = False  # the optimizer's state stays in the hosts' memory between the updates
    chunk: int = 8192  # tokens whose logits exist at once on a device
    mesh: tuple[int, ...] = (1, -1, 1)  # data, fsdp, tensor, and if wanted context; -1: what is left
    log_every: int = 10
    eval_every: int = 0  # steps; 0: at the end only
    eval_tokens: int = 32768  # held-out tokens of each domain
    eval_rows: int = 0  # rows of a task's test that are generated and scored; 0: all
    score_base: bool = True  # fine-tuning: score the task before tuning too
    save_every: int = 0  # steps; 0: at the end only
    keep: int = 2  # newest checkpoints kept, and the best
    resume: str = "never"  # auto: from the newest good checkpoint in `out`, if it has one; a step: from that one
    accept: str = ""  # what may differ from the checkpoint, with commas between (ACCEPT), or lock: take the folder over
    verify: Literal["full", "fast", "off"] = "full"  # loading: every digest, the files' sizes, the manifest alone
    max_bad: int = 10  # steps in a row that are left out (NaN, infinity, spikes) until the run stops; 0: never
    tensorboard: bool = True
    wandb: str = ""  # a Weights & Biases project to log to (pip install graftax[wandb])

    def __post_init__(self) -> None:
        least = dict.fromkeys(("accumulate", "log_every", "keep"), 1)
        for field in ("steps", "epochs", "max_bad", "eval_every", "eval_tokens", "eval_rows", "save_every"):
            least[field] = 0
        for field, n in least.items():
            if not n <= getattr(self, field) < float("inf"):
                raise InputError(f"--{field.replace('_', '-')} {getattr(self, field)}: wanted {n} or more")
        if not re.fullmatch("never|auto|[0-9]+", self.resume):
            raise InputError(f"--resume {self.resume}: wanted auto, never, or the step of a checkpoint")
        for word in filter(None, self.accept.split(",")):
            if word not in ACCEPT:
                raise InputError(f"--accept {word}{close(word, ACCEPT)}: wanted {', '.join(ACCEPT)}, commas between")
        if self.quantize and self.phase == "pretrain":
            raise InputError(f"--quantize {self.quantize}: of a frozen base; pretraining has none")
        if self.data.batch % self.accumulate:
            raise InputError(
                f"--data.batch {self.data.batch} does not divide into --accumulate {self.accumulate} parts"
            )


def to_json(run: Run) -> str:
    """config.json: every field; a method by its name and fields."""
    tree = dataclasses.asdict(run) | {"method": method_to_dict(run.method)}
    return json.dumps(tree, indent=1) + "\n"


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted name: value} of nested dicts, as in config.json."""
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return {prefix: tree}
    pairs = [flat(v, f"{prefix}.{k}" if prefix else k) for k, v in tree.items()]
    return {k: v for pair in pairs for k, v in pair.items()}


def held_still(run: Run, manifest: dict[str, Any], where: Path) -> None:
    """InputError if config.json no longer says of the model and the method what it said when a checkpoint was saved."""
    then, now = flat(manifest.get("config", {})), flat(json.loads(to_json(run)))
    for key in sorted(set(then) & set(now) - HOW):
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
            f"unknown method {name!r}{close(name, peft.methods)}; there are {', '.join(sorted(peft.methods))}"
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
