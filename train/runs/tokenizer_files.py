"""Write the tokenizer of a run as transformers reads it, with every id that ends a reply and the chat template."""

import json
from pathlib import Path
from typing import Any

from ...data.sft import encode_example
from ...data.tokenizers import Tokenizer, for_transformers
from ...data.tokenizers.hf_files import TEMPLATE
from ...data.tokenizers.tokenizer import GENERATION
from ...model.hf.files import read_json
from ..progress import console

PROBE = [("system", " a"), ("user", "b c\n"), ("assistant", "\n  d"), ("user", "1\u00e9"), ("assistant", "e ")]


def write_tokenizer(folder: Path, tokenizer: Tokenizer, chat: bool) -> None:
    """Write the files of a tokenizer into a folder that has none.

    generation_config.json lists every id that ends a reply. With `chat`, a tokenizer without a template gets the one
    that graftax tunes with. If its text would have other ids than training had, it is left out and a message says so.
    """
    written = for_transformers(tokenizer)
    written.save(folder)
    kinds = [kind for kind in ("bos", "eos", "pad") if f"{kind}_token" in written.names]
    ids: dict[str, Any] = {f"{kind}_token_id": getattr(written, kind) for kind in kinds}
    config = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
    stops = list(dict.fromkeys((*tokenizer.stops, *written.stops)))
    config = ids | config | {"eos_token_id": stops[0] if len(stops) == 1 else stops}
    (folder / GENERATION).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    if chat and not written.template_file:
        turns = [{"role": role, "content": content} for role, content in PROBE]
        if encode_example(turns, written) == encode_example(turns, tokenizer):
            (folder / TEMPLATE).write_text(written.template, "utf-8")
        else:
            console.print(
                "no chat template is written: a chat as one text would have other ids than in training, because this "
                "tokenizer has no tokens for roles",
                soft_wrap=True,
            )
