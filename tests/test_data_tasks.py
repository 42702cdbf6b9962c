"""Tasks: held-out prompts never occur in train, scores are right, and the embedded corpus has not seen the test."""

import json
import math
import zipfile
from pathlib import Path

import pytest
from graftax import InputError
from graftax.data import python_library
from graftax.data.columns import Columns, chat_of
from graftax.data.python_library import normal
from graftax.data.tasks import python_functions, tasks
from graftax.data.tasks.base import Task, accuracy, drop_leaks, exact_match, floors
from graftax.data.tasks.file_task import file_task, whole_task

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def few_modules():
    """A fifth of the standard library, so that the test is quick; at least one module of every package."""
    python_library.modules.cache_clear()
    every, kept = python_library.SKIPPED, {"lib2to3", "distutils", "tkinter", "ctypes", "xmlrpc"}
    python_library.SKIPPED = every | kept
    yield python_library.modules()
    python_library.SKIPPED = every
    python_library.modules.cache_clear()


def test_the_corpus_holds_no_test_function(few_modules):
    tested = [f for f in python_library.functions() if f.part != "train"]
    assert {f.part for f in python_library.functions()} == {"train", "valid", "test"}
    code = "\0".join(normal(d.text) for d in python_library.code())
    assert [f.id for f in tested if normal(f.source) in code] == []
    whole = "\0".join(normal(d.text) for d in python_library.code(exclude_task_test=False))
    assert [f.id for f in tested if normal(f.source) not in whole] == []  # so the test above can see a leak
    kept = {part for d in python_library.prose() for part in d.text.rstrip("\n").split("\n\n")}
    long = [f for f in tested if len(f.docstring) > 60 and "\n\n" not in f.docstring]
    assert [f.id for f in long if f.docstring in kept] == []
    every = {part for d in python_library.prose(exclude_task_test=False) for part in d.text.rstrip("\n").split("\n\n")}
    assert sum(f.docstring in every for f in long) > len(long) / 2


def test_functions_are_what_the_lines_say(few_modules):
    texts = {d.id: d.text.split("\n") for d in python_library.code(exclude_task_test=False)}
    for f in python_library.functions()[::50]:
        lines = texts[f.id.partition(":")[0]][f.first - 1 : f.last]
        assert normal("\n".join(lines)) == normal(f.source)
        assert f.source.startswith(("def ", "async def ", "@"))


def test_lines_are_the_parsers_lines(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(
        "x = 1\n\f\ndef f():\n    '''Doc.'''\n    return '\u2028'\n\n@d\nclass C:\n    @d\n    def g(self): pass\n"
    )
    module = python_library.parse_module(path, "p/m.py")
    assert [(f.id, f.package, f.source) for f in module.functions] == [
        ("p/m.py:3:f", "p", "def f():\n    '''Doc.'''\n    return '\u2028'\n"),
        ("p/m.py:9:C.g", "p", "@d\ndef g(self): pass\n"),
    ]


def test_the_corpus_is_deterministic_and_shares_ids(few_modules):
    code, prose = list(python_library.code()), list(python_library.prose())
    assert code == list(python_library.code())
    assert prose == list(python_library.prose())
    ids = {d.id for d in code}
    assert len(ids) == len(code)
    assert all(d.id in ids or d.id.startswith("topics/") for d in prose)  # a module is held out of both or neither
    assert any(d.id == "json/decoder.py" for d in code)
    assert not any(d.id.startswith(("test/", "site-packages/")) for d in code)


def test_copies_of_a_function_are_in_one_part():
    source = (
        "def f(self, x):\n    # why\n    y = x + 1\n    print('something long enough', y)\n    return y * self.value\n"
        * 2
    )
    assert python_library.part(source) == python_library.part(source.replace("    # why\n", "").replace("    ", "\t"))


@pytest.mark.full
@pytest.mark.parametrize("name", ["package", "next_statement", "next_token"])
def test_python_functions(few_modules, name):
    task = getattr(python_functions, name)()
    part = {f.id: f.part for f in python_library.functions()}
    prompts = {p: {normal(r["prompt"]) for r in getattr(task, p)} for p in ("train", "valid", "test")}
    for p in prompts:
        rows = getattr(task, p)
        assert len(prompts[p]) == len(rows) > 50
        assert all(part[row["meta"]["id"]] == p for row in rows)
        assert {row["completion"] for row in rows} <= set(task.choices)
        assert max(len(row["prompt"]) for row in rows) <= python_functions.CHARS
    assert not prompts["train"] & (prompts["valid"] | prompts["test"])
    assert not prompts["valid"] & prompts["test"]
    assert task.train == getattr(python_functions, name)().train
    floor = floors(task)
    assert 0 < floor["majority"] <= floor["naive_bayes"] < 0.95
    assert accuracy(task.test, [row["completion"] for row in task.test]) == {"accuracy": 1.0}


def test_cuts_are_where_the_label_starts():
    source = "def f(a, b):\n    x = [a, 'b']\n    if a:\n        return self.x\n    selfish = 1\n    for i in x: pass\n"
    cuts = python_functions.statement_cuts(source)
    assert [(source[:at].count("\n"), label) for at, label in cuts] == [(2, "if"), (3, "return"), (5, "for")]
    cuts = python_functions.token_cuts(source)
    for at, label in cuts:
        fits = {"name": source[at].isalpha(), "keyword": source[at].isalpha(), "string": source[at] == "'"}
        assert fits.get(label, source[at] == {"newline": "\n"}.get(label, label)), (at, label)
    assert [label for _, label in cuts[:6]] == ["newline", "name", "=", "name", ",", "string"]


def test_naive_bayes_by_hand():
    train = [
        {"prompt": "a a b", "completion": "x"},
        {"prompt": "b c", "completion": "y"},
        *[{"prompt": "d", "completion": "y"}],
    ]
    test = [
        {"prompt": "a", "completion": "x"},
        {"prompt": "c c zzz", "completion": "y"},
        {"prompt": "a", "completion": "y"},
    ]
    assert floors(Task("t", train, [], test, accuracy)) == {"majority": 2 / 3, "naive_bayes": 2 / 3}


def test_exact_match_and_leaks():
    rows = [{"prompt": "p", "completion": "yes"}, {"prompt": "q", "completion": "no"}]
    assert exact_match(rows, [" yes\n", "No"]) == 0.5
    with pytest.raises(ValueError, match="zip"):
        exact_match(rows, ["yes"])
    with pytest.raises(InputError, match="no rows to score"):
        exact_match([], [])
    assert drop_leaks(rows, [{"prompt": " p "}]) == (rows[1:], 1)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_file_task(tmp_path):
    rows = [{"prompt": f"q {i % 100}", "completion": f"a {i}"} for i in range(200)]
    rows.append(
        {"messages": [{"role": r, "content": c} for r, c in (("user", "u"), ("assistant", "v"), ("user", "w"))]}
    )
    rows[-1]["messages"].append({"role": "assistant", "content": "z"})
    path = write(tmp_path / "mine.jsonl", rows)
    task = file_task(path, 0.3, 1)
    assert len(task.train) + len(task.valid) + len(task.test) == 201
    prompts = [{str(r["prompt"]) for r in part} for part in (task.train, task.valid, task.test)]
    assert all(prompts)
    assert len(set.union(*prompts)) == sum(map(len, prompts)), "no prompt is in two parts"
    shuffled = file_task(write(tmp_path / "other.jsonl", rows[::-1]), 0.3, 1)
    assert {r["completion"] for r in shuffled.valid} == {r["completion"] for r in task.valid}
    assert {r["completion"] for r in file_task(path, 0.3, 2).valid} != {r["completion"] for r in task.valid}
    assert task.score(task.valid, ["no"] * len(task.valid)) == {"exact_match": 0.0}
    chat = next(r for r in task.train + task.valid + task.test if isinstance(r["prompt"], list))
    assert (len(chat["prompt"]), chat["completion"], chat["where"]) == (3, "z", f"{path}:201")
    assert next(task.pairs("train"))[0].startswith(f"{path}:")


def pairs(*numbers):
    return [{"prompt": f"q {i}", "completion": f"a {i % 3}"} for i in numbers]


def test_files_to_choose_and_to_judge_by(tmp_path):
    """What a file gives is not taken from the training file, and what is held out is not trained on."""
    path = write(tmp_path / "mine.jsonl", pairs(*range(60)))
    valid, test = (write(tmp_path / f"{n}.jsonl", pairs(*range(n, n + 6))) for n in (57, 100))
    split = file_task(path, 0.3)
    both = file_task(path, 0.3, valid=str(valid), test=str(test))
    assert [len(part) for part in (both.train, both.valid, both.test)] == [57, 6, 6]
    assert both.dropped == 3
    assert both.choices == ["a 0", "a 1", "a 2"]
    test_given = file_task(path, 0.3, test=str(test))
    assert test_given.test == both.test
    assert {r["prompt"] for r in test_given.valid} == {r["prompt"] for r in split.valid + split.test}
    assert file_task(path, 0.3, valid=str(valid)).test, "the other part is held out"
    every = file_task(path, 0)
    assert [len(part) for part in (every.train, every.valid, every.test)] == [60, 0, 0]
    assert len(file_task(path, 0, test=str(test)).train) == 60
    whole = whole_task(path)
    assert [row["prompt"] for row in whole.test] == [f"q {i}" for i in range(60)]
    assert whole.choices == both.choices
    assert whole_task(test).choices is None
    assert whole_task(test, train=every.train).choices == both.choices
    for kwargs, message in (({"test": str(path)}, "60 rows leave none for training: all prompts are held out"),
                         ({"valid": str(test), "test": str(test)}, "100.jsonl: every prompt is among the test rows"),
                         ({"test": str(tmp_path / "none.jsonl")}, "none.jsonl: no such file")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            file_task(path, 0.3, **kwargs)


def test_file_task_keeps_all_that_a_row_says(tmp_path):
    """From a file to the messages, tools, variables and weights of training, evaluation and choices."""
    call = {"name": "f", "arguments": {"a": 1}}
    first, last = {"role": "assistant", "content": "x", "weight": 0}, {"role": "assistant", "tool_calls": [call]}
    rows = [
        {"messages": [first, {"role": "user", "content": f"q {i}"}, last], "chat_template_kwargs": {"k": i}}
        | {"hint": "b", "persona": "p", "tools": [{"name": "f"}]}
        for i in range(40)
    ]
    columns = Columns(("system=persona",), ("hint",))
    task = file_task(write(tmp_path / "a.jsonl", rows), 0.3, columns=columns)
    where, row = next(task.pairs("valid"))
    chat = chat_of(row, where)
    assert [turn["role"] for turn in chat.messages] == ["system", "assistant", "user", "assistant"]
    assert (chat.messages[0]["content"], chat.messages[-1]["tool_calls"]) == ("p", [call])
    assert (chat.tools, list(chat.variables), chat.learnt) == ([{"name": "f"}], ["k"], [False, False, False, True])
    assert task.choices is None
    with pytest.raises(InputError, match=r"a\.jsonl:1: fields .*: column 'hint' beside 'messages' is not read"):
        file_task(tmp_path / "a.jsonl", 0.3)


def test_file_task_refuses(tmp_path):
    rows = [{"prompt": "q", "completion": "a"}]
    with pytest.raises(
        InputError, match=r"1 rows leave none for validation at .*, or train .* with --data\.held-out 0$"
    ):
        file_task(write(tmp_path / "a.jsonl", rows), 0.1, 0)
    with pytest.raises(InputError, match=r"--data\.held-out 1: expected a number in \[0, 1\)"):
        file_task(tmp_path / "a.jsonl", 1, 0)
    turns = [{"role": "assistant", "content": "v"}, {"role": "user", "content": "u"}]
    with pytest.raises(InputError, match=r"b\.jsonl:1: the last message is from user"):
        file_task(write(tmp_path / "b.jsonl", [{"messages": turns}]), 0.1, 0)


@pytest.fixture
def public(tmp_path):
    """The three data sets in small, with a test prompt in train and the one latin-1 file."""
    (tmp_path / "clinc150").mkdir()
    clinc = {
        "train": [["hi there", "greet_me"], ["bye", "leave"]],
        "val": [["yo", "leave"]],
        "test": [["bye", "leave"]],
    }
    (tmp_path / "clinc150" / "data_full.json").write_text(json.dumps(clinc | {"oos_test": [["x", "oos"]]}))
    (tmp_path / "snips").mkdir()
    spans = [
        {"text": "play "},
        {"text": " Beyoncé ", "entity": "artist"},
        {"text": " from "},
        {"text": "2001", "entity": "year"},
    ]
    for name, data, code in (
        ("train_PlayMusic_full", [spans, *([{"text": f"play {i}"}] for i in range(90))], "latin-1"),
        ("validate_PlayMusic", [[{"text": "play 5"}], [{"text": "play it"}]], "utf-8"),
    ):
        text = json.dumps({"PlayMusic": [{"data": d} for d in data]}, ensure_ascii=False)
        (tmp_path / "snips" / f"{name}.json").write_text(text, encoding=code)
    (tmp_path / "e2e_nlg").mkdir()
    files = {
        "trainset": "mr,ref\r\nname[A],One A\r\nname[A],Two A\r\nname[T],leaks\r\n",
        "devset": 'mr,ref\r\n"name[B], food[Thai]",B is Thai\r\n',
        "testset_w_refs": 'mr,ref\nname[T],T is\nname[T],It is the good old T\n"name[C], food[Thai]",C serves thai\n',
    }
    with zipfile.ZipFile(tmp_path / "e2e_nlg" / "e2e-dataset.zip", "w") as archive:
        for name, text in files.items():
            archive.writestr(f"e2e-dataset/{name}.csv", text)
    return tmp_path


def test_clinc150(public):
    task = tasks["clinc150"](public)
    assert task.train == [{"prompt": "hi there", "completion": "greet me"}]
    assert task.dropped == 1
    assert [r["prompt"] for r in task.test] == ["bye"]


def test_snips(public):
    task = tasks["snips"](public)
    frame = next(r for r in task.train + task.valid if "artist" in r["completion"])
    assert frame == {"prompt": "play  Beyoncé  from 2001", "completion": "PlayMusic | artist = Beyoncé | year = 2001"}
    assert task.dropped == 1  # "play 5"
    assert len(task.train) + len(task.valid) == 90
    scores = task.score([frame, frame], ["PlayMusic | artist = Beyoncé", frame["completion"]])
    assert scores == {"frame_exact_match": 0.5, "intent_accuracy": 1.0}


def test_e2e_nlg(public):
    task = tasks["e2e_nlg"](public)
    assert [r["completion"] for r in task.train] == ["One A", "Two A"]
    assert task.dropped == 1
    assert [(r["prompt"], len(r["meta"]["references"])) for r in task.test] == [
        ("name[T]", 2),
        ("name[C], food[Thai]", 1),
    ]
    scores = task.score(task.test, ["It is the good old T", "nothing"])
    assert scores["slot_name"] == 0.5
    assert scores["slot_food"] == 0.0
    perfect = task.score(task.test, ["It is the good old T", "C serves thai"])
    assert perfect["bleu"] > scores["bleu"] > 0
    assert perfect["slot_food"] == 1.0


@pytest.mark.parametrize("name", ["clinc150", "snips", "e2e_nlg"])
def test_missing_or_broken_data_is_one_line(public, name):
    folder = public / name
    for path in folder.iterdir():
        path.write_text("{}")
    with pytest.raises(InputError, match=name) as caught:
        tasks[name](public)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no such file"):
        tasks[name](public / "nowhere")


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("clinc150", (15_000, 3_000, 4_500)), ("snips", (13_784, 0, 700)), ("e2e_nlg", (42_061, 547, 630))],
)
def test_the_real_data(name, sizes):
    task = tasks[name](SHARED)
    held_out = {r["prompt"] for r in task.test + task.valid}
    assert not held_out & {r["prompt"] for r in task.train}
    assert not {r["prompt"] for r in task.test} & {r["prompt"] for r in task.valid}
    assert len(task.train) + len(task.valid) + task.dropped == sizes[0] + sizes[1]
    assert len(task.test) == sizes[2]
    best = task.score(task.test, [r["completion"] for r in task.test])
    first = next(iter(best.values()))
    assert math.isclose(first, 100 if name == "e2e_nlg" else 1, rel_tol=1e-6)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")
def test_real_latin1_is_refused_by_the_general_reader():
    from graftax.data.sources import documents

    with pytest.raises(InputError, match=r"train_PlayMusic_full\.json:\d+: not UTF-8"):
        next(documents(str(SHARED / "snips" / "train_PlayMusic_full.json")))
