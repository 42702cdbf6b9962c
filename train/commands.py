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
from ..bounds import Checked, Count, Seed
from ..data.columns import Columns
from ..data.fields import text_of
from ..data.sft import render_prompt
from ..data.sources import documents
from ..data.tasks import tasks
from ..data.tasks.base import Task
from ..data.tasks.file_task import same_prompts, whole_task
from ..data.tokenizers import train_tokenizer
from ..model import Sampling, generate, presets, shapes_of
from ..model.hf.hub import did_you_mean_folder
from ..peft import Subset, masks
from .config import Optim, check_date, did_you_mean
from .evaluate import choose_answers, generate_answers, held_out_losses, longest_reply, scored_rows
from .inputs import check_examples_file, load_task, report_row_errors, trained_rows, with_answerable_rows
from .optim import make_optimizer
from .progress import console
from .runs import report
from .runs.checkpoint import Verify
from .runs.load import load_run
from .runs.loaded import LoadedRun

Arg = Annotated[str, tyro.conf.Positional]


@dataclasses.dataclass(frozen=True)
class Eval(Checked):
    """Held-out loss and bits per byte of a run's base domains, and its task's score. Example: graftax eval runs/sft"""

    folder: Arg
    base: str = ""  # where its base is now, if it moved
    task: str = ""  # another task, which is scored on its test; or a file of examples, all rows of which are scored
    root: str = ""  # the folder the task is read from
    columns: tuple[str, ...] = ()  # of that file, OURS=THEIRS: prompt=question completion=answer
    ignore: tuple[str, ...] = ()  # its columns, fields of messages and template variables that are left out
    tokens: int = 0  # held-out tokens of each domain; 0: all
    rows: int = 0  # rows that are scored, evenly out of all of them; 0: all
    choices: bool = False  # answer with the likeliest of the task's choices, not by generation
    verify: Verify = "full"  # every digest, the files' sizes, the manifest alone

    def run(self) -> dict[str, Any]:
        """Evaluate, say the numbers, and return them."""
        got = load_run(self.folder, base=self.base, verify=self.verify)
        task = self.judged_by(got) if self.task or got.run.data.task else None
        args, found = got.bound, {}
        if got.held_out:
            found["held_out"] = held_out_losses(*args, got.held_out, 8, self.tokens)
            for name, v in found["held_out"].items():
                console.print(f"{name}: loss {v['loss']:.4f} · perplexity {v['perplexity']:.2f} · "
                              f"bits per byte {v['bits_per_byte']:.4f} (zlib {v['zlib']:.2f})")  # fmt: skip
        return found | (self.score(task, got) if task else {})

    def judged_by(self, got: LoadedRun) -> Task:
        """All rows of a file, the test of a named task, or the rows that the run itself was judged by."""
        data = dataclasses.replace(
            got.run.data, root=self.root or got.run.data.root,
            columns=self.columns or (() if self.task in tasks else got.run.data.columns),
            ignore=self.ignore or (() if self.task in tasks else got.run.data.ignore),
        )  # fmt: skip
        bad, file = data.row_errors(), self.task or data.test
        if not file or file in tasks:
            named = dataclasses.replace(data, task=file, valid="", test="") if file else data
            task = load_task(named, bad)
        else:
            trained = trained_rows(data, got.run.seed)
            task = whole_task(check_examples_file(file), bad, trained or [], Columns(data.columns, data.ignore))
            seen = same_prompts(task.test, trained or [])
            if seen or trained is None:
                said = f"{seen:,} of {len(task.test):,} rows have a prompt that the run was trained on"
                unknown = "the run's training rows are not here, so it is not known whether these are among them"
                console.print(f"{task.name}: {said if seen else unknown}", soft_wrap=True)
        task = with_answerable_rows(task, got.tokenizer, got.config, got.bound[2].length, bad)
        report_row_errors(bad)
        return task

    def score(self, task: Task, got: LoadedRun) -> dict[str, Any]:
        """{"scores": of a task, "rows": how many rows have been scored}; {} for a task without any."""
        args, rows = got.bound, scored_rows(task, got.tokenizer, self.rows)
        if not rows:
            console.print(f"{task.name}: no row was kept back to judge by; give --task FILE", soft_wrap=True)
            return {}
        if self.choices:
            if task.choices is None:
                raise InputError(f"--choices: {task.name} has no list of choices; drop the flag")
            answers = choose_answers(*args, got.tokenizer, rows, task.choices)
        else:
            answers = generate_answers(*args, got.tokenizer, rows, longest_reply(rows, got.tokenizer))
        scores, total = task.score(rows, answers), len(task.test or task.valid)
        part = f"{len(rows):,} rows" if len(rows) == total else f"{len(rows):,} of {total:,} rows"
        console.print(f"{task.name}, {part}: " + " · ".join(f"{k} {v:.4f}" for k, v in scores.items()))
        return {"scores": scores, "rows": len(rows)}


@dataclasses.dataclass(frozen=True)
class Generate(Checked):
    """Text from a run. Example: graftax generate runs/sft --prompt "what is my balance" --chat"""

    folder: Arg
    prompt: str = ""
    chat: bool = False  # put the prompt into the chat template, as fine-tuning does
    new: Count = 64  # tokens at most
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: Seed = 0
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
        tokens, key = got.tokenizer, jax.random.key(self.seed)
        out = generate(
            model, bound, [ids], self.new, stop=tokens.stops, sampling=how, key=key,
            allowed_V=tokens.has_token(model.config.V), context=context,
        )  # fmt: skip
        text = got.tokenizer.decode(out[0])
        console.print(Text("" if self.chat else self.prompt, "dim") + Text(text), soft_wrap=True)
        return {"prompt": self.prompt, "text": text, "tokens": len(out[0])}


def shapes_and_config(base: str) -> Any:
    """The parameters of a run directory, or their shapes for a preset."""
    if base in presets:
        return shapes_of(presets[base])
    if not Path(base).exists():
        near = did_you_mean(base, presets) or did_you_mean_folder(base)
        raise InputError(f"{base!r} is no preset and no run directory{near}; presets: {', '.join(presets)}")
    return load_run(base).merged


@dataclasses.dataclass(frozen=True)
class Masks(Checked):
    """What a mask picks of a base: parameters, counts, optimizer bytes. Example: graftax masks 5m --where norms"""

    base: Arg
    where: str = "all"  # a mask's name, or a rule over paths: 'layers/[4:]/mlp/.*'

    def run(self) -> dict[str, Any]:
        """Print the table; returns its totals."""
        params, method = shapes_and_config(self.base), Subset(self.where)
        trainable = jax.eval_shape(method.init, jax.random.key(0), params)
        title = f"{self.base} · where {self.where} · names: {', '.join(masks.named)}, last_K"
        return report.print_parameters(console, title, method, params, trainable, make_optimizer(Optim(), trainable, 1))


@dataclasses.dataclass(frozen=True)
class Methods(Checked):
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
class Tokenizer(Checked):
    """Train a SentencePiece tokenizer. Example: graftax tokenizer 'books/*.txt' --out tok --vocab 4096"""

    source: Arg  # embedded:code, embedded:prose, hub:owner/name, a file, folder or glob
    out: str
    vocab: Count = 4096

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
