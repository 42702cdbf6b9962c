"""The smaller commands: each a frozen dataclass of its flags with `run`."""

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.table import Table
from rich.text import Text

from .. import InputError, peft
from ..data.sft import render_prompt
from ..data.sources import documents, text_of
from ..data.tasks import tasks
from ..data.tokenizer import train_tokenizer
from ..model import Sampling, generate, presets, shapes_of
from ..peft import Subset, masks
from . import report
from .config import Optim, check_date, close
from .evaluate import choose, held_out_losses, longest_answer, outputs, scored
from .export import Verify
from .inputs import task_of
from .optim import make_optimizer
from .progress import console
from .runs import load_run

Arg = Annotated[str, tyro.conf.Positional]


@dataclasses.dataclass(frozen=True)
class Eval:
    """Held-out loss and bits per byte of a run's base domains, and its task's score. Example: graftax eval runs/sft"""

    folder: Arg
    base: str = ""  # where its base is now, if it moved
    task: str = ""  # another task, or a file of examples
    root: str = ""  # the folder the task is read from
    columns: tuple[str, ...] = ()  # of that file, OURS=THEIRS: prompt=question completion=answer
    ignore: tuple[str, ...] = ()  # its columns, fields of messages and template variables that are left out
    tokens: int = 0  # held-out tokens of each domain; 0: all
    rows: int = 0  # test rows; 0: all
    choices: bool = False  # answer with the likeliest of the task's choices, not by generation
    verify: Verify = "full"  # every digest, the files' sizes, the manifest alone

    def run(self) -> dict[str, Any]:
        """Evaluate, say the numbers, and return them."""
        got = load_run(self.folder, base=self.base, verify=self.verify)
        data = dataclasses.replace(
            got.run.data, task=self.task or got.run.data.task, root=self.root or got.run.data.root,
            columns=self.columns or (() if self.task in tasks else got.run.data.columns),
            ignore=self.ignore or (() if self.task in tasks else got.run.data.ignore),
        )  # fmt: skip
        args, found = got.bound, {}
        if got.held_out:
            found["held_out"] = held_out_losses(*args, got.held_out, 8, self.tokens)
            for name, v in found["held_out"].items():
                console.print(f"{name}: loss {v['loss']:.4f} · perplexity {v['perplexity']:.2f} · "
                              f"bits per byte {v['bits_per_byte']:.4f} (zlib {v['zlib']:.2f})")  # fmt: skip
        if data.task:
            task = task_of(data)
            rows = scored(task, got.tokenizer, self.rows)
            if self.choices:
                if task.choices is None:
                    raise InputError(f"--choices: {task.name} has no list of choices; drop the flag")
                answers = choose(*args, got.tokenizer, rows, task.choices)
            else:
                answers = outputs(*args, got.tokenizer, rows, longest_answer(rows, got.tokenizer))
            found["scores"] = task.score(rows, answers)
            console.print(
                f"{task.name}, {len(rows)} rows: " + " · ".join(f"{k} {v:.4f}" for k, v in found["scores"].items())
            )
        return found


@dataclasses.dataclass(frozen=True)
class Generate:
    """Text from a run. Example: graftax generate runs/sft --prompt "what is my balance" --chat"""

    folder: Arg
    prompt: str = ""
    chat: bool = False  # put the prompt into the chat template, as fine-tuning does
    new: int = 64  # tokens at most
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int = 0
    date: str = ""  # that the chat template writes, as 2026-11-29; empty: the run's, of a model without a run today's
    base: str = ""  # where its base is now, if it moved
    verify: Verify = "full"  # every digest, the files' sizes, the manifest alone

    def run(self) -> dict[str, Any]:
        """Generate, print the text, and return it."""
        check_date(self.date)
        text_of({"prompt": self.prompt}, "prompt", "--prompt")
        how = Sampling(self.temperature, self.top_k, self.top_p)
        got = load_run(self.folder, base=self.base, verify=self.verify)
        turns, tokenizer = [{"role": "user", "content": self.prompt}], got.tokenizer
        dated = dataclasses.replace(tokenizer, date=self.date or tokenizer.date)
        ids = render_prompt(turns, dated) if self.chat else tokenizer.prompt(self.prompt)
        model, bound, context = got.bound
        out = generate(
            model, bound, [ids], self.new, stop=got.tokenizer.stops, how=how, key=jax.random.key(self.seed),
            context=context,
        )  # fmt: skip
        text = got.tokenizer.decode(out[0])
        console.print(Text("" if self.chat else self.prompt, "dim") + Text(text), soft_wrap=True)
        return {"prompt": self.prompt, "text": text, "tokens": len(out[0])}


def shapes_and_config(base: str) -> Any:
    """The parameters of a run directory, or their shapes for a preset."""
    if base in presets:
        return shapes_of(presets[base])
    if not Path(base).exists():
        raise InputError(
            f"{base!r} is no preset and no run directory{close(base, presets)}; presets: {', '.join(presets)}"
        )
    return load_run(base).merged


@dataclasses.dataclass(frozen=True)
class Masks:
    """What a mask picks of a base: parameters, counts, optimizer bytes. Example: graftax masks 5m --where norms"""

    base: Arg
    where: str = "all"  # a mask's name, or a rule over paths: 'layers/[4:]/mlp/.*'

    def run(self) -> dict[str, Any]:
        """Print the table; returns its totals."""
        params, method = shapes_and_config(self.base), Subset(self.where)
        trainable = jax.eval_shape(method.init, jax.random.key(0), params)
        title = f"{self.base} · where {self.where} · names: {', '.join(masks.named)}, last_K"
        return report.show(console, title, method, params, trainable, make_optimizer(Optim(), trainable, 1))


@dataclasses.dataclass(frozen=True)
class Methods:
    """The methods: formula, what each trains of a preset, what it can do. Example: graftax methods --preset gpt2"""

    preset: str = "llama-3.1-8b"

    def run(self) -> dict[str, Any]:
        """Print the table; returns {method: its row, "trainable" null where the base has nothing for it}."""
        shapes, rows = shapes_and_config(self.preset), {}
        total = sum(x.size for x in jax.tree.leaves(shapes))
        table = Table("name", "formula", f"trains of {self.preset}", "start", "fold", "HF PEFT", "paper", box=None)
        for name, cls in sorted(peft.methods.items()):
            about: Any = re.match(r"(.*?)(?: \(([^()]*)\))?\.?$", (cls.__doc__ or "").splitlines()[0])
            method, (formula, paper), said = cls(), about.groups(""), "nothing it has"
            row: dict[str, Any] = {"formula": formula, "paper": paper, "identity": method.identity, "trainable": None,
                   "folds": foldable(method), "hf_peft": peft.hf.type_of(method)}  # fmt: skip
            try:
                row["trainable"] = peft.count(method, shapes)
                said = f"{row['trainable']:,} ({row['trainable'] / total:.3%})"
            except InputError:  # BitFit of a base without biases
                pass
            start, folds = "base" if method.identity else "other", "yes" if row["folds"] else "no"
            table.add_row(name, Text(formula), said, start, folds, row["hf_peft"] or "-", row["paper"])
            rows[name] = row
        console.print(table)
        return rows


def foldable(method: peft.Method) -> bool:
    """Whether a base alone can compute what a base with the method does."""
    small = shapes_of(dataclasses.replace(presets["tiny"], qkv_bias=True))
    try:
        jax.eval_shape(lambda p: peft.merge(method, p, method.init(jax.random.key(0), p)), small)
    except InputError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Train a SentencePiece tokenizer. Example: graftax tokenizer 'books/*.txt' --out tok --vocab 4096"""

    source: Arg  # embedded:code, embedded:prose, hub:owner/name, a file, folder or glob
    out: str
    vocab: int = 4096

    def run(self) -> dict[str, Any]:
        """Train, write, and say what a token holds."""
        out = Path(self.out)
        if (out / "tokenizer.model").exists():
            raise InputError(f"{out / 'tokenizer.model'} exists; take another --out")
        texts = [d.text for d in documents(self.source)]
        out.mkdir(parents=True, exist_ok=True)
        made = train_tokenizer(texts, out / "tokenizer.model", self.vocab)
        tokens = sum(len(made.encode(t)) for t in texts[:200])
        share = sum(len(t.encode()) for t in texts[:200]) / max(tokens, 1)
        console.print(
            f"wrote {out / 'tokenizer.model'}: {made.vocab_size} pieces, {share:.2f} bytes a token, {made.digest[:12]}"
        )
        return {"out": str(out), "vocab": made.vocab_size, "bytes_per_token": share, "digest": made.digest}
