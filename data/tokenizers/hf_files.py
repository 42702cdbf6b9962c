"""What a Hugging Face folder says about its tokenizer: names of special tokens, added tokens, the chat template.

Several files of several ages may hold the same fact. The one that transformers 5 takes counts: the default template of
additional_chat_templates/ before chat_template.jinja before tokenizer_config.json; tokenizer.json before the files of
slow tokenizers; added_tokens_decoder before the flags in tokenizer.json, added_tokens.json and special_tokens_map.json;
generation_config.json before config.json. A broken file is one line that names it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import InputError

CONFIG, GENERATION, TEMPLATE = "tokenizer_config.json", "generation_config.json", "chat_template.jinja"
MAIN = ("tokenizer.json", "tokenizer.model", "vocab.json")  # the first one there is the tokenizer
BESIDE = (CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json")
FILES = (*MAIN, "merges.txt", *BESIDE, GENERATION)

_MODEL_TYPES = {
    **dict.fromkeys(("llama", "mistral"), "LlamaTokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
    "gpt2": "GPT2Tokenizer",
}
_DEFAULTS = {  # what these classes of transformers call their tokens where no file does
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GemmaTokenizer": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
    "Qwen2Tokenizer": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    "GPT2Tokenizer": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
}


@dataclass(frozen=True)
class Folder:
    """The facts. `names`: {"eos_token": "</s>", ...}, also what a template may write; `added`: by id."""

    path: Path  # for messages only
    files: dict[str, bytes]
    config: dict[str, Any]
    kind: str  # the class of transformers, without "Fast"; "" if unknown
    names: dict[str, str]
    added: dict[int, dict[str, Any]]
    template: str
    template_file: str
    ends: tuple[int, ...]  # eos_token_id of generation_config.json


def collect(path: Path, main: str) -> dict[str, bytes]:
    """The files of the folder `path` that go with the tokenizer `main`, which is not among them."""
    others = MAIN[: MAIN.index(main) + 1]  # what would be taken before `main`, where `main` was asked for by name
    found = {}
    for name in FILES:
        if name in others or not (path / name).is_file():
            continue
        try:
            found[name] = (path / name).read_bytes()
        except OSError as e:
            raise InputError(f"{path / name}: cannot be read ({e.strerror})") from None
    if (template := path / "additional_chat_templates" / "default.jinja").is_file():
        found[TEMPLATE] = _utf8(template, template.read_bytes()).encode()
    elif TEMPLATE not in found and any(template.parent.glob("*.jinja")) and _template(path, found)[0]:
        raise InputError(
            f"{template.parent}: because of its templates transformers does not read the one of {CONFIG}, and none of "
            f"them is {template.name}; copy the one that is meant to {path / TEMPLATE}"
        )
    return _with_config(path, found)


def _with_config(path: Path, files: dict[str, bytes]) -> dict[str, bytes]:
    """The files with what config.json alone says, which is no file of the tokenizer: the class of a GPT-2's, the ids
    that end a text where there is no generation_config.json."""
    if not (path / "config.json").is_file():
        return files
    try:
        model = parse(path, {"config.json": (path / "config.json").read_bytes()}, "config.json")
    except OSError as e:
        raise InputError(f"{path / 'config.json'}: cannot be read ({e.strerror})") from None
    config, kind = parse(path, files, CONFIG), model.get("model_type")
    if not config.get("tokenizer_class") and isinstance(kind, str) and kind in _MODEL_TYPES:
        files = files | {CONFIG: json.dumps(config | {"tokenizer_class": _MODEL_TYPES[kind]}).encode()}
    if GENERATION not in files and (ends := _ends(model, path / "config.json")):
        files = files | {GENERATION: json.dumps({"eos_token_id": ends}).encode()}
    return files


def parse(path: Path, files: dict[str, bytes], name: str) -> dict[str, Any]:
    """A JSON object, {} where there is no such file."""
    try:
        value = json.loads(files.get(name, b"{}").decode("utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # "\ud800" is valid JSON, and no text
    except (ValueError, RecursionError) as e:
        reason = "nested too deep" if isinstance(e, RecursionError) else e
        raise InputError(f"{path / name}: not valid JSON ({reason})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path / name}: a {type(value).__name__}; a JSON object is wanted")
    return value


def read_folder(path: Path, files: dict[str, bytes]) -> Folder:
    """The facts that `files` hold. InputError: one of them is broken."""
    config = parse(path, files, CONFIG)
    name = config.get("tokenizer_class")
    kind = name.removesuffix("Fast") if isinstance(name, str) else ""
    # transformers reads the map only where tokenizer_config.json is of the old kind, and then prefers it.
    old = "added_tokens_decoder" not in config
    given = config | (parse(path, files, "special_tokens_map.json") if old else {})
    named = {k: _text(v) for k, v in (_DEFAULTS.get(kind, {}) | given).items() if k.endswith("_token")}
    names = {k: v for k, v in named.items() if v}
    template, template_file = _template(path, files)
    return Folder(
        path=path,
        files=files,
        config=config,
        kind=kind,
        names=names,
        added=_added(path, files, given, set(names.values())),
        template=template,
        template_file=template_file,
        ends=_ends(parse(path, files, GENERATION), path / GENERATION),
    )


def _text(token: Any) -> str:
    """A token is a string or {"content": ...}."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _added(path: Path, files: dict[str, bytes], given: dict[str, Any], named: set[str]) -> dict[int, dict[str, Any]]:
    """{id: {"content", "special", ...}} by tokenizer_config.json, or by the older added_tokens.json."""
    listed = given.get("added_tokens_decoder")
    source = CONFIG if isinstance(listed, dict) else "added_tokens.json"
    if not isinstance(listed, dict):
        more = given.get("additional_special_tokens") or given.get("extra_special_tokens") or []
        special = named | {_text(token) for token in (more if isinstance(more, list) else [])}
        old = parse(path, files, "added_tokens.json")
        listed = {i: {"content": token, "special": token in special} for token, i in old.items()}
    try:
        found = {int(i): dict(token) for i, token in listed.items()}
    except (TypeError, ValueError):
        raise InputError(f"{path / source}: added tokens are no table of ids and tokens") from None
    bad = next((i for i, token in found.items() if not _text(token)), None)
    if bad is not None:
        raise InputError(f"{path / source}: added token {bad} has no content")
    return dict(sorted(found.items()))


def _template(path: Path, files: dict[str, bytes]) -> tuple[str, str]:
    """(the template, the file it is in); ("", "") if there is none."""
    name = TEMPLATE
    if name in files:
        return _utf8(path / name, files[name]), str(path / name)
    processor = parse(path, files, "chat_template.json").get("chat_template")  # transformers' tokenizers do not read it
    name, found = CONFIG, parse(path, files, CONFIG).get("chat_template")
    if found is None:
        name, found = "chat_template.json", processor
    if isinstance(found, list):
        found = {str(one.get("name")): one.get("template") for one in found if isinstance(one, dict)}
    if isinstance(found, dict):
        if "default" not in found:
            raise InputError(f"{path / name}: chat templates {sorted(found)}; one named default is wanted")
        found = found["default"]
    if found is None or found == "":
        return "", ""
    if not isinstance(found, str):
        raise InputError(f"{path / name}: chat_template is a {type(found).__name__}; text is wanted")
    return found, str(path / name)


def _utf8(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 ({e})") from None


def _ends(tree: dict[str, Any], where: Path) -> tuple[int, ...]:
    """The ids that end a text by a generation_config.json, or a config.json."""
    found = tree.get("eos_token_id")
    ends = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(i) is int for i in ends):
        raise InputError(f"{where}: eos_token_id is {found!r}; an id or a list of ids is wanted")
    return tuple(ends)
