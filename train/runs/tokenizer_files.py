"""The tokenizer of a run as transformers reads it: its files, every id that ends a reply, and the chat template."""

import json
from pathlib import Path
from typing import Any

from ...data.sft import encode_example
from ...data.tokenizers.hf_files import GENERATION, TEMPLATE
from ...data.tokenizers.sentencepiece_bpe import for_transformers
from ...data.tokenizers.tokenizer import Tokenizer
from ...strict_json import read_json
from ..progress import console

PROBE = [("system", " a"), ("user", "b c\n"), ("assistant", "\n  d"), ("user", "1\u00e9"), ("assistant", "e ")]


def write_tokenizer(folder: Path, tokenizer: Tokenizer, chat: bool) -> None:
    """Write the files of a tokenizer into a folder that has none.

    generation_config.json lists every id that ends a reply here. chat: where the tokenizer came without a template,
    write the one that graftax tunes with; left out, and said, if its text would give other ids than training had.
    """
    made = for_transformers(tokenizer)
    made.save(folder)
    named = [kind for kind in ("bos", "eos", "pad") if f"{kind}_token" in made.names]
    ids: dict[str, Any] = {f"{kind}_token_id": getattr(made, kind) for kind in named}
    said = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
    stops = list(dict.fromkeys((*tokenizer.stops, *made.stops)))
    tree = ids | said | {"eos_token_id": stops[0] if len(stops) == 1 else stops}
    (folder / GENERATION).write_text(json.dumps(tree, indent=2) + "\n", "utf-8")
    if chat and not made.template_file:
        turns = [{"role": role, "content": content} for role, content in PROBE]
        if encode_example(turns, made) == encode_example(turns, tokenizer):
            (folder / TEMPLATE).write_text(made.template, "utf-8")
        else:
            console.print("no chat template is written: as one text a chat would have other ids than in training, "
                          "because this tokenizer has no tokens for roles", soft_wrap=True)  # fmt: skip
