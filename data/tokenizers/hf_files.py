"""The files of a Hugging Face tokenizer: which belong to it, and the facts that transformers does not return.

Two files may hold the same fact; the precedence is that of transformers 5. A broken file raises an InputError that
names it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import InputError
from .tokenizer import CONFIG, GENERATION

TEMPLATE, PROCESSOR_TEMPLATE = "chat_template.jinja", "chat_template.json"
SPECIAL_MAP, ADDED_TOKENS, MERGES = "special_tokens_map.json", "added_tokens.json", "merges.txt"
MAIN = ("tokenizer.json", "tokenizer.model", "vocab.json")  # a folder's tokenizer is in the first of these it holds
BESIDE = (CONFIG, SPECIAL_MAP, ADDED_TOKENS, TEMPLATE, PROCESSOR_TEMPLATE)
_CLASSES = {  # model_type of config.json -> tokenizer class, where tokenizer_config.json names none
    **dict.fromkeys(("llama", "mistral"), "LlamaTokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
    "gpt2": "GPT2Tokenizer",
}


@dataclass(frozen=True)
class TokenizerFiles:
    """The main file of a tokenizer and those beside it, as bytes."""

    folder: Path  # where they were read; for messages
    main: str  # name of the main file
    data: bytes  # its content
    beside: dict[str, bytes]  # {name: content}

    @property
    def path(self) -> Path:
        """The path of the main file."""
        return self.folder / self.main

    def json(self, name: str) -> dict[str, Any]:
        """Return the JSON object in a file; {} if there is no such file."""
        return _parse(self.folder / name, self.data if name == self.main else self.beside.get(name, b"{}"))

    def listed_tokens(self) -> dict[int, dict[str, Any]]:
        """Return {id: {"content", "special", ...}}: added_tokens_decoder, or without it added_tokens.json."""
        listed, path = self.json(CONFIG).get("added_tokens_decoder"), self.folder / CONFIG
        if listed is None:
            listed, path = self.json(ADDED_TOKENS), self.folder / ADDED_TOKENS
            listed = {i: {"content": token} for token, i in listed.items()}
        try:
            tokens = {int(i): dict(token) for i, token in listed.items()}
        except (AttributeError, TypeError, ValueError):
            raise InputError(f"{path}: added tokens are no table of ids and tokens") from None
        if empty := [i for i, token in tokens.items() if not token_text(token)]:
            raise InputError(f"{path}: added token {empty[0]} has no content")
        return tokens

    def template(self) -> tuple[str, str]:
        """Return (the chat template, the path of its file), or ("", "").

        chat_template.json comes last: transformers reads it for processors only.
        """
        if TEMPLATE in self.beside:
            return _utf8(self.folder / TEMPLATE, self.beside[TEMPLATE]), str(self.folder / TEMPLATE)
        for name, config in [(name, self.json(name)) for name in (CONFIG, PROCESSOR_TEMPLATE)]:
            path, template = self.folder / name, config.get("chat_template")
            if isinstance(template, list):
                template = {str(item.get("name")): item.get("template") for item in template if isinstance(item, dict)}
            if isinstance(template, dict):
                if "default" not in template:
                    raise InputError(f"{path}: chat templates {sorted(template)}; expected one named default")
                template = template["default"]
            if template is not None and not isinstance(template, str):
                raise InputError(f"{path}: chat_template is a {type(template).__name__}; expected text")
            if template is not None:
                return template, str(path) if template else ""
        return "", ""

    def eos_ids(self) -> tuple[int, ...]:
        """Return the eos_token_id of generation_config.json: one id, several, or none."""
        return _eos_ids(self.folder / GENERATION, self.json(GENERATION))


def read_files(path: Path) -> TokenizerFiles:
    """Read the main file `path` and the files beside it that belong to the same tokenizer.

    Files that `load_tokenizer` would prefer to `path` are left out. config.json is not a file of the tokenizer; what it
    alone says is added to the others: the tokenizer class and the ids that end a text.
    """
    folder, data = path.parent, _read(path)
    main = "tokenizer.model" if path.suffix != ".json" else path.name if path.name in MAIN else "tokenizer.json"
    names = (*MAIN[MAIN.index(main) + 1 :], MERGES, *BESIDE, GENERATION)
    beside = {name: _read(folder / name) for name in names if (folder / name).is_file()}
    files = TokenizerFiles(folder, main, data, beside)
    additional = folder / "additional_chat_templates"
    if (additional / "default.jinja").is_file():
        beside[TEMPLATE] = _utf8(additional / "default.jinja", _read(additional / "default.jinja")).encode()
    elif TEMPLATE not in beside and any(additional.glob("*.jinja")) and files.template()[0]:
        raise InputError(
            f"{additional}: transformers reads the templates here instead of the one in {CONFIG}, and none of them is "
            f"default.jinja; copy the template to use to {folder / TEMPLATE}"
        )
    if (folder / "config.json").is_file():
        model = _parse(folder / "config.json", _read(folder / "config.json"))
        config, model_type = files.json(CONFIG), model.get("model_type")
        if not config.get("tokenizer_class") and isinstance(model_type, str) and model_type in _CLASSES:
            beside[CONFIG] = json.dumps(config | {"tokenizer_class": _CLASSES[model_type]}).encode()
        if GENERATION not in beside and (ids := _eos_ids(folder / "config.json", model)):
            beside[GENERATION] = json.dumps({"eos_token_id": ids}).encode()
    return files


def token_text(token: Any) -> str:
    """Return the text of a token, which files write as a string or as {"content": ...}; "" for anything else."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); expected the file of a tokenizer") from None


def _utf8(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 ({e})") from None


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # "\ud800" is valid JSON, but not Unicode text
    except (ValueError, RecursionError) as e:
        reason = "nested too deep" if isinstance(e, RecursionError) else e
        raise InputError(f"{path}: not valid JSON ({reason})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: a {type(value).__name__}; expected a JSON object")
    return value


def _eos_ids(path: Path, config: dict[str, Any]) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids):
        raise InputError(f"{path}: eos_token_id is {value!r}; expected an id or a list of ids")
    return tuple(ids)
