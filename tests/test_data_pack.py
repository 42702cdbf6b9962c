"""Laws of the pretraining stream: every token once, targets are next tokens, nothing held out is read, exact resume."""

import itertools
import math
import zlib

import grain
import numpy as np
import pytest
from graftax import InputError
from graftax.data.documents import Document, is_held_out
from graftax.data.loader import Loader, batches
from graftax.data.mixture import domain_seed, pretrain_rows
from graftax.data.pack import Windows, tokenize
from graftax.data.tokenizers import train_tokenizer

T, FRACTION = 16, 0.2


def random_documents(name, n, seed):
    rng = np.random.default_rng(seed)
    words = np.array(["alpha", "beta", "gamma", "delta", "def", "return", "self", "12", "é▁", "\n\t"])
    return [
        Document(f"{name}/{i}", f"{name} {i} " + " ".join(rng.choice(words, rng.integers(0, 30)))) for i in range(n)
    ]


DOMAINS = {"code": random_documents("code", 60, 0), "prose": random_documents("prose", 40, 1)}


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    texts = [d.text for docs in DOMAINS.values() for d in docs]
    return train_tokenizer(texts, tmp_path_factory.mktemp("tok"), 330)


@pytest.fixture(scope="module")
def corpus(tok):
    return pretrain_rows(DOMAINS, {"code": 3, "prose": 1}, tok, T, 7, FRACTION)


def documents_of(tok, docs):
    return [[tok.bos, *tok.encode(d.text), tok.eos] for d in docs]


def check_row(row):
    """Holds for any row: shapes, and that targets, weights, positions agree with ids and segments."""
    n = int((row["segments"] > 0).sum())
    assert (row["segments"][:n] > 0).all()
    assert (row["weights"][n:] == 0).all()
    for name in ("ids", "targets", "segments", "positions"):
        assert row[name].dtype == np.int32
        assert row[name].shape == (T,)
    assert row["weights"].dtype == np.float32
    for t in range(n - 1):
        if row["segments"][t] == row["segments"][t + 1]:
            assert row["targets"][t] == row["ids"][t + 1]
            assert row["weights"][t] == 1
            assert row["positions"][t + 1] == row["positions"][t] + 1
        else:
            assert row["weights"][t] == 0
            assert row["positions"][t + 1] == 0
            assert row["segments"][t + 1] == row["segments"][t] + 1
    assert row["positions"][0] == 0


def test_one_pass_reads_every_token_once(tok):
    docs = DOMAINS["code"]
    order = np.random.default_rng(0).permutation(len(docs))
    rows = Windows(tokenize(docs, tok), order, T, first_row=100)
    whole = documents_of(tok, docs)
    ids, targets, pairs = [], [], []
    for i in range(len(rows)):
        row = rows[i]
        check_row(row)
        assert row["row"] == 100 + i
        used, learned = row["segments"] > 0, row["weights"] > 0
        ids += row["ids"][used].tolist()
        targets += row["targets"][learned].tolist()
        pairs += list(zip(row["ids"][learned].tolist(), row["targets"][learned].tolist(), strict=True))
    expected = [whole[k] for k in order]
    assert ids == [i for d in expected for i in d]
    assert targets == [i for d in expected for i in d[1:]]  # all but bos, and none across documents
    assert pairs == [pair for d in expected for pair in itertools.pairwise(d)]  # also where a window cuts a document
    with pytest.raises(IndexError):
        rows[len(rows)]


def epoch(corpus, name, which=0):
    """Rows of one domain in one epoch, in the order of the stream."""
    index, n = list(DOMAINS).index(name), corpus.rows[name]
    rows = []
    for i in itertools.count():
        row = corpus.train[i]
        if int(row["row"]) >> 40 == index:
            rows.append(row)
        if len(rows) == n * (which + 1):
            return rows[n * which :]


def test_an_epoch_is_every_row_and_no_held_out_document(corpus, tok):
    for index, (name, docs) in enumerate(DOMAINS.items()):
        rows = sorted(epoch(corpus, name), key=lambda row: row["row"])
        assert [int(row["row"]) for row in rows] == [(index << 40) + i for i in range(corpus.rows[name])]
        stream = [int(i) for row in rows for i in row["ids"][row["segments"] > 0]]
        train = documents_of(tok, [d for d in docs if not is_held_out(d.id, FRACTION)])
        cuts = [0, *(i + 1 for i, token in enumerate(stream) if token == tok.eos)]
        got = [stream[a:b] for a, b in itertools.pairwise(cuts)]
        assert sorted(got) == sorted(train)
        assert corpus.tokens[name] == len(stream)


def test_epochs_are_reshuffled_and_seeds_matter(corpus, tok):
    order = [[int(row["row"]) for row in epoch(corpus, "prose", which)] for which in (0, 1)]
    assert order[0] != order[1]
    assert sorted(order[0]) == sorted(order[1])
    again = pretrain_rows(DOMAINS, {"prose": 1, "code": 3.0}, tok, T, 7, FRACTION)
    assert again.digest == corpus.digest
    first = [int(corpus.train[i]["row"]) for i in range(50)]
    assert [int(again.train[i]["row"]) for i in range(50)] == first
    other = pretrain_rows(DOMAINS, {"code": 3, "prose": 1}, tok, T, 8, FRACTION)
    assert [int(other.train[i]["row"]) for i in range(50)] != first
    assert domain_seed(7, "a") != domain_seed(7, "b")


def test_the_mixture_has_the_weights_all_along(corpus):
    domain = np.array([int(corpus.train[i]["row"]) >> 40 for i in range(400)])
    for n in (40, 400):
        assert abs((domain[:n] == 0).mean() - 0.75) <= 1 / n


def test_digest_tells_streams_apart(corpus, tok):
    def digest(domains=DOMAINS, weights=(3, 1), T=T, seed=7, fraction=FRACTION):
        return pretrain_rows(domains, dict(zip(domains, weights, strict=True)), tok, T, seed, fraction).digest

    changed = dict(DOMAINS, code=[Document(DOMAINS["code"][0].id, "other"), *DOMAINS["code"][1:]])
    digests = [digest(), digest(changed), digest(weights=(1, 1)), digest(T=32), digest(seed=1), digest(fraction=0.3)]
    assert len(set(digests)) == 6
    assert digests[0] == corpus.digest


def test_held_out_rows_cover_the_bytes_they_claim(corpus, tok):
    for name, docs in DOMAINS.items():
        held = [d for d in docs if is_held_out(d.id, FRACTION)]
        out = corpus.held_out[name]
        ids = [int(i) for row in out.rows for i in row["ids"][row["segments"] > 0]]
        assert ids == [i for d in documents_of(tok, held) for i in d]
        assert sum(int(row["weights"].sum()) for row in out.rows) == len(ids) - len(held)
        text = "".join(d.text for d in held).encode()
        assert out.n_bytes == len(text)
        assert math.isclose(out.zlib_bits_per_byte, 8 * len(zlib.compress(text, 9)) / len(text))
    every = [int(row["row"]) for out in corpus.held_out.values() for row in out.rows]
    trained = {int(row["row"]) for name in DOMAINS for row in epoch(corpus, name)}
    assert len(set(every)) == len(every)
    assert not set(every) & trained


def test_a_twin_of_a_held_out_document_is_not_trained_on(tok):
    held = next(d for d in DOMAINS["code"] if is_held_out(d.id, FRACTION))
    free = next(f"twin/{i}" for i in range(99) if not is_held_out(f"twin/{i}", FRACTION))
    domains = dict(DOMAINS, prose=[*DOMAINS["prose"], Document(free, held.text)])  # in another domain even
    corpus = pretrain_rows(domains, {"code": 1, "prose": 1}, tok, T, 0, FRACTION)
    assert corpus.dropped == {"code": 0, "prose": 1}
    assert (
        corpus.tokens["prose"] == pretrain_rows(DOMAINS, {"code": 1, "prose": 1}, tok, T, 0, FRACTION).tokens["prose"]
    )


def test_cache_gives_the_same_rows_and_damage_is_named(corpus, tok, tmp_path):
    def run():
        return pretrain_rows(DOMAINS, {"code": 3, "prose": 1}, tok, T, 7, FRACTION, cache_dir=tmp_path)

    for _ in range(2):
        cached = run()
        assert cached.digest == corpus.digest
        assert all((cached.train[i]["ids"] == corpus.train[i]["ids"]).all() for i in range(60))
    folders = list(tmp_path.iterdir())
    assert len(folders) == 2
    raw = bytearray((folders[0] / "flat.npy").read_bytes())
    raw[-3] ^= 1
    (folders[0] / "flat.npy").write_bytes(raw)
    with pytest.raises(InputError, match="damaged; delete this folder"):
        run()


def test_large_vocabularies_do_not_overflow(tok):
    class Big:
        vocab_size, bos, eos = 70_000, 1, 2

        def encode_batch(self, texts):
            return [[65_535, 65_536, 69_999] for _ in texts]

    row = Windows(tokenize([Document("a", "x")], Big()), np.arange(1), T)[0]
    assert row["ids"][:5].tolist() == [1, 65_535, 65_536, 69_999, 2]
    assert tokenize([Document("a", "x")], tok).flat.dtype == np.uint16


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"code": 1}, "domain 'prose' has no weight"),
        ({"code": 1, "prose": 1, "cod": 1}, "'cod', which is no domain; did you mean 'code'"),
        ({"code": 0, "prose": 1}, "weight 0 of domain 'code'"),
        ({"code": math.nan, "prose": 1}, "weight nan"),
    ],
)
def test_bad_weights(tok, weights, message):
    with pytest.raises(InputError, match=message):
        pretrain_rows(DOMAINS, weights, tok, T, 0, FRACTION)


def test_an_empty_side_is_named(tok):
    few = {"a": [Document("x", "text")]}
    with pytest.raises(InputError, match=r"'a': none of its 1 documents is in the held-out 0\.001"):
        pretrain_rows(few, {"a": 1}, tok, T, 0, 0.001)
    with pytest.raises(InputError, match="'a': no training documents are left of 1"):
        pretrain_rows(few, {"a": 1}, tok, T, 0, 1 - 1e-12)
    assert pretrain_rows(few, {"a": 1}, tok, T, 0, 0.0).held_out["a"].rows == []


def take(loader, n):
    return [int(r) for _ in range(n) for r in next(loader)["row"]]


def test_resume_by_row_whatever_the_batch_size(corpus):
    whole = take(Loader(corpus.train, 6), 20)
    assert whole == [int(corpus.train[i]["row"]) for i in range(120)]
    first = Loader(corpus.train, 5)
    got = take(first, 6)
    state = first.state()
    first.close()
    assert state == {"next_row": 30}  # prefetched batches do not count
    second = Loader(corpus.train, 9, start=state["next_row"])  # 30 is no multiple of 9
    assert got + take(second, 10) == whole
    assert second.state() == {"next_row": 120}
    with pytest.raises(InputError, match="start row -1"):
        Loader(corpus.train, 3, start=-1)
    with pytest.raises(InputError, match="batch size 0"):
        Loader(corpus.train, 0)


def test_loader_puts_each_batch_and_ends_with_whole_batches(corpus):
    rows = grain.MapDataset.source([corpus.train[i] for i in range(7)])
    put = list(Loader(rows, 3, put=lambda batch: batch | {"put": True}))
    assert [b["row"].shape for b in put] == [(3,), (3,)]
    assert all(b["put"] and b["ids"].shape == (3, T) for b in put)


def test_evaluation_batches_have_one_shape(corpus):
    rows = corpus.held_out["code"].rows[:7]
    got = list(batches(rows, 4))
    assert [b["ids"].shape for b in got] == [(4, T), (4, T)]
    assert [int(r) for b in got for r in b["row"]] == [int(row["row"]) for row in rows] + [-1]
    assert got[1]["weights"][3].sum() == 0
    assert got[1]["segments"][3].sum() == 0
    assert list(batches([], 4)) == []
