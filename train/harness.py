"""Runs in EleutherAI's lm-evaluation-harness: `pip install 'graftax[lm_eval]'`, and as its own command does

    python -m graftax.train.harness --model graftax --model_args run=runs/sft --tasks FOLDER/task.yaml --limit 100

or in Python `lm_eval.simple_evaluate(model=harness.model("runs/sft"), tasks=[...])`. A run is whatever `load_run`
takes: a run directory, a Hugging Face folder or hub id, an HF PEFT folder. What is measured is what the harness's own
`hf` model measures of the same folder: the same ids, windows and truncation from the left. (A run's own tokenizer puts
bos before a text, as in pretraining; the tokenizer of its export to Hugging Face does not.)
"""

import importlib
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from .. import InputError
from ..bounds import LARGEST
from ..data.sft import render_prompt
from ..model import Sampling, generate, max_text_length
from .choices import pair_scores
from .runs.load import load_run

CHAT = "<graftax chat>"  # before the messages, as JSON, of a text that is to go through the chat template
NEW = 256  # tokens at most, where a task does not say
Ids = list[int]


class Harness:
    """What the harness asks of a model; its requests have `args`. Each answer is in the order of the requests."""

    def __init__(self, run: str, base: str = "", batch_size: int | str = 8, max_length: int = 0, **_: Any):
        got = load_run(run, base=base)
        self.bound, self.tokenizer = got.bound, got.tokenizer
        self.batch = 8 if str(batch_size).startswith("auto") else _whole("batch_size", batch_size, 1)
        most = min(max_text_length(got.config, got.bound[2].length), got.config.context)
        self.longest = _whole("max_length", max_length or most, 2, most)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether greedy decoding writes it) of each (context, continuation)."""
        return self._scored([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """log p of each text from its beginning, in windows of the model's length: each token once, the last window
        full of what stands before it."""
        texts = [self.tokenizer.encode(request.args[0]) for request in requests]
        windows = [list(self._windows(ids)) for ids in texts]
        scores = iter(self._scored([pair for some in windows for pair in some]))
        return [sum(next(scores)[0] for _ in some) for some in windows]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What is written behind each context, up to the first of its stops."""
        answers, groups = [""] * len(requests), defaultdict(list)
        for i, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(i)
        for said, which in groups.items():
            asked = json.loads(said)
            until = [asked["until"]] if isinstance(asked.get("until"), str) else asked.get("until") or []
            until = [stop for stop in until if stop]
            new = min(_whole("max_gen_toks", asked.get("max_gen_toks", NEW), 1), self.longest - 1)
            prompts = [self._ids(requests[i].args[0])[-(self.longest - new) :] for i in which]
            for i, text in zip(which, self._written(prompts, new, until, _sampling(asked)), strict=True):
                answers[i] = text
        return answers

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A text that stands for messages; they become ids when it is read, as in training."""
        return CHAT + json.dumps(chat_history)  # where it does not end with a question, the last reply goes on

    def chat_template(self, chat_template: Any = False) -> str:
        """What fingerprints the template."""
        return self.tokenizer.template or "graftax"

    @property
    def tokenizer_name(self) -> str:
        """What fingerprints the tokenizer."""
        return self.tokenizer.digest

    def _ids(self, text: str) -> Ids:
        """The ids of a context, bos included where the tokenizer has one."""
        if not text.startswith(CHAT):
            return list(self.tokenizer.prompt(text)) or [self.tokenizer.bos]
        turns, end = json.JSONDecoder().raw_decode(text, len(CHAT))
        began = turns.pop(-1) if turns[-1]["role"] == "assistant" else {"content": ""}  # a reply that is to go on
        return render_prompt(turns, self.tokenizer) + self.tokenizer.encode(began["content"] + text[end:])

    def _pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """(prompt, tail): the ids of both together, cut where those of the context end; its last spaces go on."""
        if not context:
            return [self.tokenizer.bos], self._whole(self.tokenizer.encode(continuation), continuation, context)
        cut = len(context.rstrip()) if context.strip() and not context.startswith(CHAT) else len(context)
        context, continuation = context[:cut], context[cut:] + continuation
        prompt = self._ids(context)
        if context.startswith(CHAT):
            tail = self.tokenizer.encode(continuation)
        else:
            tail = self._ids(context + continuation)[len(prompt) :]
        tail = self._whole(tail, continuation, context)
        return prompt[-(self.longest + 1 - len(tail)) :], tail

    def _whole(self, tail: Ids, continuation: str, context: str) -> Ids:
        """As much of a tail as the model holds. InputError for an empty one."""
        if not tail:
            raise InputError(f"a continuation is empty: {continuation!r} behind {context[-40:]!r}")
        return tail[-self.longest :]

    def _windows(self, ids: Ids) -> Iterator[tuple[Ids, Ids]]:
        whole = [self.tokenizer.bos, *ids]
        for start in range(0, len(ids), self.longest):
            end = min(start + self.longest, len(ids))
            yield whole[max(end - self.longest, 0) : start + 1], ids[start:end]

    def _scored(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
        """Those of like length together, so that few shapes compile: 32, 64, 128, ... positions."""
        found: list[Any] = [None] * len(pairs)
        groups = defaultdict(list)
        for i, (prompt, tail) in enumerate(pairs):
            groups[max(32, 1 << (len(prompt) + len(tail) - 2).bit_length())].append(i)
        for T, which in sorted(groups.items()):
            losses, greedy = pair_scores(*self.bound, [pairs[i] for i in which], self.batch, T)
            for i, loss, best in zip(which, losses, greedy, strict=True):
                found[i] = (-float(loss), bool(best))
        return found

    def _written(self, prompts: Sequence[Ids], new: int, until: Sequence[str], how: Sampling) -> list[str]:
        model, bound, context = self.bound
        ends = [self.tokenizer.encode(stop) for stop in until]  # one that is a token ends a row when it is written
        stops = (*self.tokenizer.stops, *(ids[0] for ids in ends if len(ids) == 1))
        allowed = self.tokenizer.has_token(model.config.V)
        order, texts = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [""] * len(prompts)
        for at in range(0, len(order), self.batch):
            which = order[at : at + self.batch]
            filled = which + which[:1] * (self.batch - len(which))
            ids = generate(model, bound, [prompts[i] for i in filled], new, stop=stops, sampling=how, allowed_V=allowed,
                           context=context)  # fmt: skip
            for i, out in zip(which, ids, strict=False):
                text = self.tokenizer.decode(out)
                texts[i] = text[: min((text.find(stop) for stop in until if stop in text), default=len(text))]
        return texts


def _sampling(asked: dict[str, Any]) -> Sampling:
    """How a task's generation arguments say that tokens are drawn. Raises InputError for a number out of its bounds."""
    drawn, heat = asked.get("do_sample"), asked.get("temperature")
    heat = float(bool(drawn)) if heat is None else heat
    mass = 1.0 if asked.get("top_p") is None else asked["top_p"]
    for key, value in (("temperature", heat), ("top_p", mass)):
        if type(value) not in (int, float):
            raise InputError(f"{key}={value!r}: a number is wanted")
    how = Sampling(heat, _whole("top_k", asked.get("top_k") or 0), mass)
    if drawn and not heat:
        raise InputError("temperature=0 with do_sample: wanted a temperature above 0, or no do_sample")
    return Sampling() if drawn is False else how


def _whole(name: str, value: Any, least: int = 0, most: int = LARGEST) -> int:
    """An argument as a whole number. Raises InputError if it is none, or out of bounds."""
    if not re.fullmatch("[0-9]{1,10}", str(value)) or not least <= int(value) <= most:
        raise InputError(f"{name}={value}: a whole number from {least} to {most} is wanted")
    return int(value)


def installed(module: str) -> Any:
    """A module of the harness. InputError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError("lm-evaluation-harness is not installed; pip install 'graftax[lm_eval]'") from None


def model_class() -> Any:
    """The class that the harness registers as `graftax`: it takes no model that is not an LM of its own."""
    LM = installed("lm_eval.api.model").LM

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        LM.__init__(self)
        Harness.__init__(self, *args, **kwargs)

    return type("Graftax", (Harness, LM), {"__init__": begin})


def model(run: str, **kwargs: Any) -> Any:
    """A run as a model of the harness."""
    return model_class()(run, **kwargs)


def main() -> None:
    """The harness's own command, with the model `graftax`."""
    installed("lm_eval.api.registry").register_model("graftax")(model_class())
    installed("lm_eval.__main__").cli_evaluate()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"graftax: {error}", file=sys.stderr)
        raise SystemExit(2) from None
