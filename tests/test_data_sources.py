"""Reading: every source gives the same documents each time, and every bad input one line with path and row."""

import gzip
import json
import os

import datasets
import pyarrow
import pyarrow.parquet as pq
import pytest
from graftax import InputError
from graftax.data import clean, unpack
from graftax.data.documents import Document, is_held_out
from graftax.data.errors import RowErrors
from graftax.data.five_domains import five_domains
from graftax.data.sources import documents, rows


def test_plain_text_is_cut_without_loss(tmp_path):
    text = "".join(f"Paragraph {i} " + "word " * (i % 90) + "\n\n" for i in range(400)) + "x" * 20_000 + "\n\nend"
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text(text)
    docs = list(documents(str(tmp_path / "books")))
    assert "".join(d.text for d in docs) == text
    assert [d.id for d in docs] == [f"books/a.txt#{n}" for n in range(len(docs))]
    assert max(len(d.text) for d in docs) <= 8192
    assert docs == list(documents(str(tmp_path / "books" / ".." / "books")))


def test_cut_pieces_concatenate_with_any_characters():
    text = "é\r\n\r\n" * 50 + "\f\u2028🙂" * 300 + "\n\n\n\n x\n" * 40
    for size in (7, 64, 1000):
        assert "".join(clean.cut(text, size)) == text
        assert max(len(p.encode()) for p in clean.cut(text, size)) <= max(size, 12)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "glob"])
def test_structured_sources_give_the_same_texts(tmp_path, kind):
    texts = ["one\ntwo, three", "NA", "3", "é \u2028 '\""]
    table = datasets.Dataset.from_dict({"body": texts})
    path = tmp_path / f"x.{'jsonl' if kind == 'glob' else kind}"
    if kind in ("jsonl", "glob"):
        table.to_json(path)
    elif kind == "json":
        table.to_json(path, lines=False)
    else:
        getattr(table, f"to_{kind}")(str(path))
    spec = str(tmp_path / "*.jsonl") if kind == "glob" else str(path)
    assert [d.text for d in documents(spec, field="body")] == texts
    assert [row for _, row in rows(spec)] == [{"body": t} for t in texts]


TEXTS = ["one\ttwo", "three é"]
JSONL = b"".join(b'{"text": %s}\n' % json.dumps(text).encode() for text in TEXTS)
TABLES = {  # the same two documents under each name
    "A.JSONL": JSONL, "a.ndjson": JSONL, "a.json": JSONL, "a.Json": json.dumps([{"text": t} for t in TEXTS]).encode(),
    "a.CSV": "text\none\ttwo\nthree é\n".encode(), "a.tsv": 'text\tb\n"one\ttwo"\t1\nthree é\t2\n'.encode(),
    "a.jsonl.gz": gzip.compress(JSONL), "a.JSONL.ZST": pyarrow.Codec("zstd").compress(JSONL).to_pybytes(),
    "gz.jsonl": gzip.compress(JSONL), "a.csv.gz": gzip.compress("text\none\ttwo\nthree é\n".encode()),
    "two.jsonl.gz": b"".join(map(gzip.compress, JSONL.splitlines(keepends=True))),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_known_by_its_suffix_in_any_case_and_unpacked(tmp_path, name):
    (tmp_path / name).write_bytes(TABLES[name])
    assert [d.text for d in documents(str(tmp_path / name))] == TEXTS
    assert [row["text"] for _, row in rows(str(tmp_path / name))] == TEXTS


def parquet(path, texts):
    pq.write_table(pyarrow.table({"text": texts}), path, compression="NONE")
    os.utime(path, (1e9, 1e9))


def test_parquet_is_known_by_its_first_bytes_and_read_anew_each_time(tmp_path):
    path = tmp_path / "data.txt"
    parquet(path, ["red"] * 9)
    size = path.stat().st_size
    assert [row["text"] for _, row in rows(str(path))] == ["red"] * 9
    parquet(path, ["tan"] * 9)  # of the same name, size and age
    assert path.stat().st_size == size
    assert [d.text for d in documents(str(path))] == ["tan"] * 9
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"data.txt: not readable as parquet .*; check the file"):
        list(documents(str(path), errors=RowErrors("repair", 1)))


def test_plain_text_is_unpacked(tmp_path):
    for name in ("web", "books", "encyclopedia", "forum"):
        (tmp_path / "five" / name).mkdir(parents=True)
    for name in ("a.txt.gz", "b.md.GZ", "five/web/c.MD.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"\xef\xbb\xbfhi\r\n"))
    assert [d.text for d in documents(str(tmp_path / "*.*"))] == ["hi\r\n"] * 2
    assert [d.text for d in five_domains(tmp_path / "five")["web"]()] == ["hi\n"]


def test_what_unpacks_to_more_than_memory_is_read_line_by_line_or_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(unpack, "MAX_READ", 1 << 20)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"text": "%s"}\n' % (b"a" * 1000) * 2000))
    assert sum(1 for _ in rows(str(tmp_path / "rows.jsonl.gz"))) == 2000
    for name, words in (("bomb.txt.gz", "decompresses to more than"), ("bomb.jsonl.gz", "1: a line of more than")):
        (tmp_path / name).write_bytes(gzip.compress(b"a" * (2 << 20)))
        with pytest.raises(InputError, match=f"{name}:.*{words} 1,048,576 bytes"):
            list(documents(str(tmp_path / name)))


def test_several_sources(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_text(json.dumps({"text": name}))
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert [row["text"] for _, row in rows(f"{a}/x.jsonl, {b},{c}/*.jsonl")] == ["a", "b", "c"]
    assert [d.text for d in documents(f"{c},{a}")] == ["c", "a"]
    (tmp_path / "a,b").mkdir()
    (tmp_path / "a,b" / "x.txt").write_text("both")
    assert [d.text for d in documents(f"{a},b")] == ["both"], "a name with a comma"
    for spec, words in (
        (f"{b},{b}", "duplicate source"),
        (f"{b},", "a source has an empty name"),
        ("", "has an empty name"),
    ):
        with pytest.raises(InputError, match=words):
            list(rows(spec))


def test_bom_is_dropped(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hi"}\r\n')
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhi")
    assert [d.text for d in documents(str(tmp_path))] == ["hi", "hi"]


BAD = {  # file name: (bytes, what the message says)
    "a.jsonl": (
        b'{"text": "x"}\n{"text": "y" 3}\n',
        r"a.jsonl:2: not valid JSON \(Expecting ',' delimiter at column 14",
    ),
    "b.jsonl": (b'{"text": "x"}\n["y"]\n', "b.jsonl:2: a list; expected one JSON object per line"),
    "c.jsonl": (b'{"text": "x"}\n\n{"txt": "y"}\n', "c.jsonl:3: no field 'text', only .'txt'"),
    "d.jsonl": (b'{"text": null}\n', "d.jsonl:1: 'text' is null"),
    "e.jsonl": (b'{"text": ["x"]}\n', "e.jsonl:1: 'text' is a list"),
    "f.jsonl": (b'{"text": "x"}\n{"text": "caf\xe9"}\n', "f.jsonl:2: not UTF-8 .byte 0xe9 at offset 27"),
    "g.jsonl": (b"\n \n", "g.jsonl: no rows"),
    "h.jsonl": (b'{"text": "\\ud800"}\n', "h.jsonl:1: 'text' has the lone surrogate"),
    "i.jsonl": (b'{"text": ' + b"[" * 200_000 + b"\n", "i.jsonl:1: "),
    "j.jsonl": (b'{"text": ' + b"1" * 5000 + b"}\n", "j.jsonl:1: JSON that cannot be read"),
    "k.txt": (b"one\ntwo \xff\n", "k.txt:2: not UTF-8 .byte 0xff at offset 8"),
    "l.txt": (b"  \n", "l.txt: no text in it"),
    "m.json": (b'[{"text": "x"},\n 3]', "m.json:2: a number"),
    "n.json": (b'{"text": "x"}', "n.json: an object with .'text'.; expected one JSON array"),
    "o.json": (b'[{"text": "x"}\n{"text": "y"}]', "o.json:2: not valid JSON"),
    "p.csv": (b"", "p.csv: no rows"),
    "q.csv": (b"text\nx\ncaf\xe9\n", "q.csv:3: not UTF-8"),
    "r.csv": (b'text,b\nx,1\n"y,2,3\nz', "r.csv:4: not valid CSV"),
    "s.csv": (b"body\nx\n", "s.csv:2: no field 'text'"),
    "t.parquet": (b"PAR1 nothing", "t.parquet: not readable as parquet"),
    "u.csv": (b"text\n", "u.csv: no rows"),
    "v.csv": (b"text,b\nx,1\ny,2,3\n", "v.csv:3: 3 cells; expected 2"),
    "w.csv": (b"text,b\nx\n", "w.csv:2: 1 cells; expected 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line_with_its_place(tmp_path, name):
    raw, message = BAD[name]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(InputError, match=message) as caught:
        list(documents(str(tmp_path / name)))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("*.jsonl", "matches no file"),
        (".", "holds no files"),
        ("embedded:cod", "no such embedded corpus"),
        ("hub:a/b/c/d", "not a hub spec"),
    ],
)
def test_a_bad_spec_is_one_line(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        list(documents(spec))


def test_rows_are_not_read_from_plain_text(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    for spec in (str(tmp_path / "a.txt"), str(tmp_path), "embedded:code"):
        with pytest.raises(InputError, match="has no rows"):
            list(rows(spec))


def test_hub_spec(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name == "no/such":
            raise FileNotFoundError("Dataset 'no/such' doesn't exist\non the hub")
        return [{"text": "x"}, {"text": 3}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    docs = documents("hub:org/set:cfg@test[:10]")
    assert next(docs) == Document("org/set@test[:10]:1", "x")
    with pytest.raises(InputError, match=r"org/set@test\[:10\]:2: 'text' is a number"):
        next(docs)
    assert next(documents("hub:set")).id == "set@train:1"
    assert asked == [("org/set", "cfg", "test[:10]"), ("set", None, "train")]
    with pytest.raises(InputError, match=r"hub:no/such: the hub gave no data \(Dataset 'no/such' doesn't exist\)"):
        list(rows("hub:no/such"))


def test_the_split_is_by_id_alone_and_grows_with_the_fraction():
    ids = [f"d{i}" for i in range(2000)]
    few, many = ({i for i in ids if is_held_out(i, fraction)} for fraction in (0.1, 0.2))
    assert 140 < len(few) < 260
    assert few < many
    with pytest.raises(InputError, match=r"fraction 1\.5"):
        is_held_out("d0", 1.5)


def test_cleaning():
    book = "head\n*** START OF THIS PROJECT GUTENBERG EBOOK A\nB ***\n\nText *** here\n\nEnd of Project Gutenberg's A"
    assert clean.strip_gutenberg(book) == "Text *** here\n"
    assert clean.strip_gutenberg("no markers\n") == "no markers\n"
    assert clean.strip_front_matter("---\na: 1\n---\n\nBody\n---\nmore") == "Body\n---\nmore"
    assert clean.strip_front_matter("Body\n---\nmore\n---\n") == "Body\n---\nmore\n---\n"
    assert clean.lf("a\r\nb\rc\n") == "a\nb\nc\n"
    wiki = " \n = One = \n \n text \n = = Sub = = \n more \n = Two = \n x\n"
    assert [title for title, _ in clean.wikitext_articles(wiki)] == ["One", "Two"]
    assert "more" in dict(clean.wikitext_articles(wiki))["One"]


@pytest.fixture
def domain_root(tmp_path):
    files = {
        "web/posts/a.md": "---\nt: 1\n---\nA post\r\n",
        "web/LICENSE.md": "licence",
        "books/b.txt": "\ufeffx\r\n*** START OF THIS PROJECT GUTENBERG EBOOK B ***\r\nOnce\r\nEnd of Project Gutenberg",
        "encyclopedia/wikitext2_test.txt": " \n = T = \n \n text\n",
        "encyclopedia/bio/m1.md": "---\nt: 1\n---\nCells",
        "forum/irc/train/2008-06-03.train-a.raw.txt": "[09:19] <a> hi\n=== b left\n",
        "forum/irc/dev/2008-06-03_12.raw.txt": "=== b left\n[12:00] <c> ho\n",
        "forum/irc/dev/2009-01-01_12.raw.txt": "x\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    return tmp_path


def test_five_domains(domain_root):
    domains = five_domains(domain_root)
    assert list(domains) == ["web", "books", "encyclopedia", "forum", "code"]
    read = {name: [tuple(d) for d in domains[name]()] for name in list(domains)[:4]}
    assert read["web"] == [("web/posts/a.md", "A post\n")]
    assert read["books"] == [("books/b.txt", "Once\n")]
    assert [i for i, _ in read["encyclopedia"]] == ["encyclopedia/wikitext2_test.txt#0 T", "encyclopedia/bio/m1.md"]
    day = "[09:19] <a> hi\n=== b left\n[12:00] <c> ho\n"  # one document a day; dev comes first by path
    assert [i for i, _ in read["forum"]] == ["forum/2008-06-03", "forum/2009-01-01"]
    assert sorted(read["forum"][0][1].splitlines()) == sorted(day.splitlines())
    (domain_root / "forum").rename(domain_root / "forums")
    with pytest.raises(InputError, match="forum: no such folder"):
        five_domains(domain_root)
