"""The house: imports go one way and in no cycle, the core imports no extra, files and functions stay small, nothing
public is without a docstring."""

import ast
from functools import partial
from pathlib import Path

import jax
import pytest
from conftest import FAST_METHODS
from graftax import peft
from graftax.model import Weight
from graftax.peft import Chain, Method
from mutations import MUTATIONS, stale
from tiny import CASES, make_base

ROOT = Path(__file__).parents[1]
FILES = sorted(p for folder in ("model", "peft", "data", "train") for p in (ROOT / folder).rglob("*.py"))
MAY_IMPORT = {"model": set(), "peft": {"model"}, "data": set(), "train": {"model", "peft", "data"}}
CORE = {  # what a newcomer reads; see the design
    "model": "config presets weight tree layers attention rope transformer loss generate init quantize sharding",
    "peft": "__init__ base masks targets methods/lora methods/subset",
    "data": "documents sources clean pack mixture sft loader errors",
    "train": "config recipes optim step setup loop evaluate",
}
EXTRAS = tuple(
    f"{folder}.{name}"
    for folder, names in {
        "model": "hf kernels",
        "peft": "hf",
        "train": "runs cluster experiments plan bench cli",
    }.items()
    for name in names.split()
)
# peft/__init__ lists every public name, so that an editor finds `peft.hf`; nothing else of the core imports an extra.
EXPORTED_EXTRAS = {"peft": {"peft.hf"}}


def module_name(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imported_modules():
    """{module: modules of graftax that it imports, also inside functions}."""
    files = {module_name(path): path for path in [*FILES, *ROOT.glob("*.py")] if path != ROOT / "setup.py"}
    graph = {}
    for module, path in files.items():
        package = list(path.relative_to(ROOT).parts[:-1])
        graph[module] = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                parts = package[: len(package) + 1 - node.level] + (node.module.split(".") if node.module else [])
                for alias in node.names:
                    target = ".".join([*parts, alias.name])
                    graph[module].add(target if target in files else ".".join(parts))
        graph[module] &= files.keys() - {module}
    return graph


def test_the_core_imports_no_extra():
    graph = imported_modules()
    for folder, names in CORE.items():
        for name in names.split():
            module = f"{folder}.{name.replace('/', '.')}".removesuffix(".__init__")
            assert module in graph, f"{module} is no module"
            extras = {m for m in graph[module] if any(m == e or m.startswith(e + ".") for e in EXTRAS)}
            assert extras <= EXPORTED_EXTRAS.get(module, set()), f"{module} imports {extras}"


def test_no_imports_in_a_cycle():
    graph = imported_modules()

    def reached(start):
        seen, todo = set(), [start]
        while todo:
            new = graph[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    cyclic = {module: found for module in graph if module in (found := reached(module))}
    cycles = {frozenset(m for m in cyclic if m in cyclic[module] and module in cyclic[m]) for module in cyclic}
    assert not cycles, f"modules that import each other: {[sorted(cycle) for cycle in cycles]}"


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


def test_the_fast_tier_covers_every_hook_and_weight():
    """Law 4 runs over all methods there, the other laws over FAST_METHODS."""
    methods = [type(link) for name in FAST_METHODS for link in links(CASES[name])]
    for hook in (name for name, value in vars(Method).items() if callable(value) and not name.startswith("__")):
        overriding = {cls for cls in peft.methods.values() if getattr(cls, hook) is not getattr(Method, hook)}
        assert not overriding or overriding & set(methods), f"no method of the fast tier overrides {hook}"
    base, bound = make_base(), set()
    for method in CASES.values():
        frozen = jax.eval_shape(method.frozen_params, base.params)
        trainable = jax.eval_shape(method.init, jax.random.key(0), base.params)
        bound |= weight_classes([frozen, jax.eval_shape(partial(bind_and_transpose, method), frozen, trainable)])
    defined = {cls for cls in subclasses(Weight) if cls.__module__.startswith("graftax.peft.methods")}
    assert defined <= {base for cls in bound for base in cls.__mro__}


def bind_and_transpose(method, frozen, trainable):
    """The bound tree, and the transposed table, which is the output projection of a tied base."""
    bound = method.bind(frozen, trainable)
    return bound, bound["embed"]["table"].T


def weight_classes(tree):
    """The classes of all weights in a tree, those inside another weight included."""
    is_weight = lambda x: isinstance(x, Weight)  # noqa: E731
    weights = [w for w in jax.tree.leaves(tree, is_leaf=is_weight) if is_weight(w)]
    return {type(w) for w in weights}.union(*(weight_classes(list(vars(w).values())) for w in weights))


def links(method):
    return [link for _, link in method.methods] if isinstance(method, Chain) else [method]


def subclasses(cls):
    return {cls}.union(*(subclasses(sub) for sub in cls.__subclasses__()))


def test_every_mutation_can_be_tried():
    """`make mutate` replaces a text that must occur once in its file; a refactoring moves these texts along."""
    assert not stale(), f"tests/mutations.py: give the present text of {', '.join(stale())}"
    files = {word for mutation in MUTATIONS for word in mutation.tests.split() if word.endswith(".py")}
    assert all((ROOT / "tests" / name).is_file() for name in files)
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
