"""The files of a Hugging Face tokenizer: which belong to it, and the facts that transformers does not return.

These are the path of the chat template and the ids that end a text. Two files may hold the same fact; the precedence is
that of transformers 5. A broken file raises an InputError that names it.
"""

import json
from pathlib import Path
from typing import Any

from ... import InputError
from .tokenizer import CONFIG, GENERATION

TEMPLATE, PROCESSOR_TEMPLATE = "chat_template.jinja", "chat_template.json"
SPECIAL_MAP, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
MAIN = ("tokenizer.json", "tokenizer.model", "vocab.json")  # a folder's tokenizer is in the first of these it holds
BESIDE = (CONFIG, SPECIAL_MAP, ADDED_TOKENS, TEMPLATE, PROCESSOR_TEMPLATE)
_FILES = (*MAIN, "merges.txt", *BESIDE, GENERATION)
_CLASSES = {  # model_type of config.json -> tokenizer class, where tokenizer_config.json names none
    **dict.fromkeys(("llama", "mistral"), "LlamaTokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
    "gpt2": "GPT2Tokenizer",
}


def collect_files(folder: Path, main: str) -> dict[str, bytes]:
    """Return {name: content} of the files in `folder` that belong to the tokenizer in the file `main`, without `main`.

    Files that `load_tokenizer` would prefer to `main` are left out. config.json is not a file of the tokenizer; what it
    alone says is added to the others: the tokenizer class and the ids that end a text.
    """
    preferred = MAIN[: MAIN.index(main) + 1]
    names = [name for name in _FILES if name not in preferred and (folder / name).is_file()]
    files = {name: _read(folder / name) for name in names}
    additional = folder / "additional_chat_templates"
    if (additional / "default.jinja").is_file():
        files[TEMPLATE] = _text(additional / "default.jinja", _read(additional / "default.jinja")).encode()
    elif TEMPLATE not in files and any(additional.glob("*.jinja")) and find_template(folder, files)[0]:
        raise InputError(
            f"{additional}: transformers reads the templates here instead of the one in {CONFIG}, and none of them is "
            f"default.jinja; copy the template to use to {folder / TEMPLATE}"
        )
    if (folder / "config.json").is_file():
        model = parse_object(folder, {"config.json": _read(folder / "config.json")}, "config.json")
        config, model_type = parse_object(folder, files, CONFIG), model.get("model_type")
        if not config.get("tokenizer_class") and isinstance(model_type, str) and model_type in _CLASSES:
            files[CONFIG] = json.dumps(config | {"tokenizer_class": _CLASSES[model_type]}).encode()
        if GENERATION not in files and (ids := _eos_ids(model, folder / "config.json")):
            files[GENERATION] = json.dumps({"eos_token_id": ids}).encode()
    return files


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None


def _text(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 ({e})") from None


def parse_object(folder: Path, files: dict[str, bytes], name: str) -> dict[str, Any]:
    """Return the JSON object in the file `name`; {} if there is no such file. Raises InputError for anything else."""
    try:
        value = json.loads(files.get(name, b"{}").decode("utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # "\ud800" is valid JSON, but not Unicode text
    except (ValueError, RecursionError) as e:
        reason = "nested too deep" if isinstance(e, RecursionError) else e
        raise InputError(f"{folder / name}: not valid JSON ({reason})") from None
    if not isinstance(value, dict):
        raise InputError(f"{folder / name}: a {type(value).__name__}; expected a JSON object")
    return value


def token_text(token: Any) -> str:
    """Return the text of a token, which files write as a string or as {"content": ...}; "" for anything else."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def find_template(folder: Path, files: dict[str, bytes]) -> tuple[str, str]:
    """Return (the chat template, the path of its file), or ("", "").

    chat_template.json comes last: transformers reads it for processors only.
    """
    if TEMPLATE in files:
        return _text(folder / TEMPLATE, files[TEMPLATE]), str(folder / TEMPLATE)
    for name, config in [(name, parse_object(folder, files, name)) for name in (CONFIG, PROCESSOR_TEMPLATE)]:
        template = config.get("chat_template")
        if isinstance(template, list):
            template = {str(item.get("name")): item.get("template") for item in template if isinstance(item, dict)}
        if isinstance(template, dict):
            if "default" not in template:
                raise InputError(f"{folder / name}: chat templates {sorted(template)}; expected one named default")
            template = template["default"]
        if template is not None and not isinstance(template, str):
            raise InputError(f"{folder / name}: chat_template is a {type(template).__name__}; expected text")
        if template is not None:
            return template, str(folder / name) if template else ""
    return "", ""


def listed_tokens(folder: Path, files: dict[str, bytes]) -> dict[int, dict[str, Any]]:
    """Return {id: {"content", "special", ...}} of the tokens in added_tokens_decoder, or else in added_tokens.json."""
    config = parse_object(folder, files, CONFIG)
    listed, source = config.get("added_tokens_decoder"), folder / CONFIG
    if listed is None:
        source = folder / ADDED_TOKENS
        listed = {i: {"content": token} for token, i in parse_object(folder, files, ADDED_TOKENS).items()}
    try:
        tokens = {int(i): dict(token) for i, token in listed.items()}
    except (AttributeError, TypeError, ValueError):
        raise InputError(f"{source}: added tokens are no table of ids and tokens") from None
    empty = next((i for i, token in tokens.items() if not token_text(token)), None)
    if empty is not None:
        raise InputError(f"{source}: added token {empty} has no content")
    return tokens


def generation_eos_ids(folder: Path, files: dict[str, bytes]) -> tuple[int, ...]:
    """Return the eos_token_id of generation_config.json: one id, several, or none."""
    return _eos_ids(parse_object(folder, files, GENERATION), folder / GENERATION)


def _eos_ids(config: dict[str, Any], path: Path) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids):
        raise InputError(f"{path}: eos_token_id is {value!r}; expected an id or a list of ids")
    return tuple(ids)
