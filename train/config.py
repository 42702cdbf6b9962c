"""Run: everything that is needed to run a phase again, as frozen dataclasses that a recipe fills and flags override."""

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any, Literal

from .. import InputError, peft
from ..model import Config, Rope
from ..peft import Method, Subset

# Environment in which glibc keeps freed memory and uses huge pages. XLA on CPU allocates a step's temporaries anew in
# each step (as PyTorch does); with glibc's defaults their page faults cost 10-20 % of a step.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 35),
    "MALLOC_TOP_PAD_": str(1 << 28),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


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
    decay_where: str = ""  # rule over the trainable tree; empty: every matrix, no vector
    clip: float = 1.0  # global norm of the gradient; 0 is off
    groups: tuple[tuple[str, float], ...] = ()  # rules over the trainable tree -> factor of the learning rate

    def __post_init__(self) -> None:
        for field in ("lr", "warmup", "decay", "end", "eps", "weight_decay", "clip"):
            value = getattr(self, field)
            if not 0 <= value < float("inf"):
                raise InputError(f"--optim.{field.replace('_', '-')} {value}: wanted a finite number of 0 or more")


@dataclasses.dataclass(frozen=True)
class Data:
    """Where rows come from. Pretraining reads domains, fine-tuning a task or a file of examples."""

    domains: tuple[tuple[str, str, float], ...] = ()  # (name, source, weight); `five:web` is a domain of five_domains
    task: str = ""  # fine-tuning: a task's name (see data/tasks.py) or a .jsonl/.csv/.parquet file of examples
    root: str = ""  # the folder that named tasks and five_domains read from
    T: int = 256  # tokens in a row
    batch: int = 8  # rows in a step, over all devices
    pack: bool = True  # fine-tuning: several examples in a row
    held_out: float = 0.02  # part of the documents that no training row comes from
    vocab: int = 4096  # pieces of a tokenizer trained on the domains
    tokenizer: str = ""  # a file or folder to use instead
    cache: str = ".cache/data"  # tokenised domains; empty: none


@dataclasses.dataclass(frozen=True)
class Run:
    """One phase: a model or a base, a method, data, an optimizer, and where it goes."""

    recipe: str = ""
    phase: Literal["pretrain", "finetune"] = "pretrain"
    out: str = "runs/run"
    model: Config | None = None  # pretraining: the architecture
    base: str = ""  # fine-tuning: a run directory, a Hugging Face folder, or a hub id owner/name[@revision]
    dtype: Literal["", "float32", "bfloat16", "float16"] = ""  # what is multiplied; empty: as the base, fp32 on a CPU
    remat: Literal["", "none", "full", "dots"] = ""  # recomputation; empty: as the base
    method: Method = dataclasses.field(default_factory=Subset)
    data: Data = Data()
    optim: Optim = Optim()
    steps: int = 0  # fine-tuning: 0 means `epochs` over the examples
    epochs: float = 3.0
    seed: int = 0
    accumulate: int = 1  # parts a batch is cut into, one in memory at a time
    chunk: int = 8192  # tokens whose logits exist at once
    mesh: tuple[int, int, int] = (1, -1, 1)  # data, fsdp, tensor; -1: what is left
    log_every: int = 10
    eval_every: int = 0  # steps; 0: at the end only
    eval_tokens: int = 32768  # held-out tokens of each domain
    eval_rows: int = 0  # rows of a task's test that are generated and scored; 0: all
    score_base: bool = True  # fine-tuning: score the task before tuning too
    save_every: int = 0  # steps; 0: at the end only
    keep: int = 2  # newest checkpoints kept, and the best
    resume: bool = False  # go on from the newest checkpoint in `out`
    tensorboard: bool = True
    wandb: str = ""  # a Weights & Biases project to log to (pip install graftax[wandb])

    def __post_init__(self) -> None:
        for field in ("accumulate", "log_every", "keep"):
            if getattr(self, field) < 1:
                raise InputError(f"--{field.replace('_', '-')} {getattr(self, field)}: wanted 1 or more")
        if self.data.batch % self.accumulate:
            raise InputError(
                f"--data.batch {self.data.batch} does not divide into --accumulate {self.accumulate} parts"
            )


def to_json(run: Run) -> str:
    """config.json: every field; a method by its name and fields."""
    tree = dataclasses.asdict(run) | {"method": method_to_dict(run.method)}
    return json.dumps(tree, indent=1) + "\n"


def method_to_dict(method: Method) -> dict[str, Any]:
    """{"name": ..., fields}; of a chain {"chain": [...]}."""
    if isinstance(method, peft.Chain):
        return {"chain": [method_to_dict(m) for _, m in method.methods]}
    return {"name": type(method).__name__.lower(), **dataclasses.asdict(method)}  # type: ignore[call-overload]


def method_from_dict(tree: dict[str, Any], where: str) -> Method:
    """The inverse of method_to_dict; InputError names what is unknown."""
    if "chain" in tree:
        return peft.chain(*(method_from_dict(t, where) for t in tree["chain"]))
    name = tree.get("name", "")
    return build(method_class(name), {k: v for k, v in tree.items() if k != "name"}, f"{where}: method {name}")


def method_class(name: str) -> type[Method]:
    """The class of a method's CLI name."""
    if name not in peft.methods:
        raise InputError(
            f"unknown method {name!r}{close(name, peft.methods)}; there are {', '.join(sorted(peft.methods))}"
        )
    return peft.methods[name]


def from_json(path: Path) -> Run:
    """The Run of a config.json. Raises InputError with the file and the key."""
    try:
        tree = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable config.json ({error})") from None
    tree["method"] = method_from_dict(tree.get("method", {}), str(path))
    tree["model"] = tree.get("model") and config_from_dict(tree["model"], f"{path}: model")
    for key, cls in (("data", Data), ("optim", Optim)):
        tree[key] = build(cls, tree.get(key, {}), f"{path}: {key}")
    return build(Run, tree, str(path))


def config_from_dict(tree: dict[str, Any], where: str) -> Config:
    """A Config of its fields."""
    ropes = {k: build(Rope, tree[k], f"{where}.{k}") for k in ("rope", "rope_local") if tree.get(k)}
    return build(Config, tree | ropes, where)


def build(cls: Any, fields: dict[str, Any], where: str) -> Any:
    """cls(**fields) with lists as tuples; an unknown key is an error with the nearest one."""
    known = [f.name for f in dataclasses.fields(cls)]
    for key in fields:
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}{close(key, known)}")
    return cls(**{k: _tuples(v) for k, v in fields.items()})


def close(name: str, names: Any) -> str:
    """`; did you mean x?` or nothing."""
    found = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {found[0]}?" if found else ""


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
