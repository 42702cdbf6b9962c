"""The house: imports go one way, files and functions stay small, nothing public is without a docstring."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p for folder in ("model", "peft", "data", "train") for p in (ROOT / folder).rglob("*.py"))
MAY_IMPORT = {"model": set(), "peft": {"model"}, "data": set(), "train": {"model", "peft", "data"}}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    here = path.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            target = (*here[: len(here) - node.level], *(node.module or "").split("."))
            names = [target[0]] if target[0] else [alias.name for alias in node.names]
            inside = {name for name in names if (ROOT / name).is_dir()} - {here[0]}
            assert inside <= MAY_IMPORT[here[0]], f"{path.name}:{node.lineno} imports {inside}"
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any((name or "").split(".")[0] == "graftax" for name in names), f"{path.name}: import relatively"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_small_and_documented(path):
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= 260
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            size = node.end_lineno - node.lineno + 1
            assert size <= 60, f"{node.name} has {size} lines"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node) or node.end_lineno - node.lineno < 4, f"{node.name} has no docstring"


def test_the_names_that_scripts_rely_on():
    from graftax import model, peft, train

    assert isinstance(train.recipes, dict)
    assert train.recipes["five_domains"]() == train.recipes["five_domains"]()
    assert isinstance(train.recipes["sft"](), train.Run)
    assert isinstance(model.presets["tiny"], model.Config)
    assert isinstance(peft.methods, dict)
    assert isinstance(peft.masks.named, dict)
    for owner, names in {
        model: ("Transformer", "generate", "init"),
        peft: ("Method", "Subset", "LoRA", "chain", "fold", "partition", "apply", "count"),
        train: ("make_train_step", "train", "load_run", "make_optimizer"),
        peft.masks: ("mask",),
    }.items():
        assert all(callable(getattr(owner, name)) for name in names)
