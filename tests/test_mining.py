"""Hard negatives: hard, negative, whatever the size and the number of processes."""

import resource
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from tiny import tiny_model, unit_rows

from data import prepare, store
from data.write import Tally, tokenizing, write_source
from finetune import Config
from mining import (
    Answers,
    check_mining,
    choose_negatives,
    fill_up,
    likely_answers,
    mine,
    mine_hard_negatives,
)
from options import InputError
from retrieval import distinct, top_k


def nearest(query, document, k):
    """A plain twin of the search: all scores, sorted."""
    return np.argsort(-(query @ document.T), axis=1, kind="stable")[:, :k]


def mine_plainly(query, document, k, margin=1.0):
    right, found = np.arange(len(query)), nearest(query, document, k)
    return mine_hard_negatives(query, document, right, found, found == right[:, None], margin)


# ------------------------------------------------------------------------------------------------
# Hard, and negative


def test_mined_negatives_are_never_the_positive():
    """The released script means to remove it, and compares a dictionary with a string."""
    mined, _ = mine_plainly(unit_rows(200), unit_rows(200, seed=1), 20)
    assert not (mined == np.arange(200)[:, None]).any()


@pytest.mark.parametrize("margin", [1.0, 0.95, 0.5])
def test_mined_negatives_are_the_nearest_that_score_below_a_margin_of_the_positive(margin):
    query, document = unit_rows(50), unit_rows(50, seed=1)
    mined, dropped = mine_plainly(query, document, 50, margin)
    count = 0
    for i, scores in enumerate(query @ document.T):
        wrong = [j for j in np.argsort(-scores) if j != i]
        bound = scores[i] * margin if scores[i] > 0 else scores[i] * (2 - margin)
        expected = [j for j in wrong if scores[j] < bound]
        count += len(wrong) - len(expected)
        assert mined[i][mined[i] >= 0].tolist() == expected
    assert dropped == count


def test_a_stricter_margin_drops_more_and_infinity_drops_nothing():
    query, document = unit_rows(100), unit_rows(100, seed=1)
    counts = [mine_plainly(query, document, 20, m)[1] for m in (np.inf, 1.0, 0.8, 0.5)]
    assert 0 == counts[0] < counts[1] < counts[2] < counts[3]


def test_a_margin_never_lets_a_document_above_the_positive_pass_even_where_cosines_are_negative():
    query = np.array([[1, 0]], np.float32)
    document = np.array([[-0.6, 0.8], [-0.59, 0.807], [-0.8, 0.6]], np.float32)
    found = np.array([[1, 2]])
    likely = likely_answers(query, document, np.array([0]), found, margin=0.95)
    assert likely.tolist() == [[True, False]]


def test_too_few_mined_negatives_are_filled_up_with_other_documents():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        filled = fill_up(np.array([3, -1, -1]), 2, 6, {0, 4}, rng)
        assert filled[0] == 3 and filled[1] in (1, 2, 5) and filled[2] == -1


def test_negatives_are_drawn_from_those_that_were_mined(source):
    mined = {"source": np.array([[3, 5, 7, -1]])}
    expected = {tuple(text) for text in source.texts("document", [3, 5, 7], 64)}
    drawn = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        chosen = {tuple(text) for text in choose_negatives(source, mined, 0, 2, 64, rng)}
        assert len(chosen) == 2 and chosen < expected
        drawn |= chosen
    assert drawn == expected


def test_a_source_keeps_the_negatives_that_it_brings(tokenizer, tmp_path, capsys):
    """Two each, but row 0, which has none, and gets other rows' documents; never its own, which
    every second row has."""
    rows = [
        {
            "query": word,
            "document": word if i % 2 else "the same",
            "negatives": [word * 2, word * 3],
        }
        for i, word in enumerate(WORDS)
    ]
    rows[0]["negatives"] = []
    with tokenizing(tokenizer, processes=1) as tokenize:
        write_source(tmp_path / "own", rows, dict(query="q: ", document="d: "), tokenize, Tally())
    source = store.Source(tmp_path / "own", tokenizer)
    mined = mine(tiny_model(tokenizer), [source], settings(tmp_path / "out"))
    assert mined == {} and "own: has negatives of its own" in capsys.readouterr().out
    own = source.texts("document", [0], 64)[0].tolist()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        given = source.texts("negative", source.negatives(5), 64)
        for text in choose_negatives(source, mined, 5, 2, 64, rng):
            assert text.tolist() in [ids.tolist() for ids in given]
        random = choose_negatives(source, mined, 0, 3, 64, rng)
        assert len(random) == 3 and own not in [ids.tolist() for ids in random]


# ------------------------------------------------------------------------------------------------
# At size


def test_the_best_of_blocks_are_the_best_of_all_and_ties_go_to_lower_numbers():
    """Whole numbers, so that scores are exact and full of ties."""
    rng = np.random.default_rng(0)
    query, document = (rng.integers(-2, 3, (n, 6)).astype("f") for n in (60, 500))
    exact = query @ document.T
    assert len(np.unique(exact)) < 100, "nearly all scores are ties"
    for block in ((4096, 8192), (7, 13), (1, 499)):
        for k in (1, 5, 100, 999):
            scores, numbers = top_k(query, document, k, block)
            assert np.array_equal(numbers, nearest(query, document, k)), (block, k)
            assert np.array_equal(scores, np.take_along_axis(exact, numbers, 1))


def test_equal_things_get_the_number_of_the_first():
    first, number = distinct([b"b", b"a", b"b", b"c", b"a"])
    assert first.tolist() == [0, 1, 3] and number.tolist() == [0, 1, 0, 2, 1]


# the last four of 30 rows: a copy of document 0; a document that is document 1 as far as it is
# read; and another answer to each of the queries 2 and 3
WORDS = [a + b + c for a in "rst" for b in "aei" for c in "nlm"]
PAIRS = [(f"query of {word} and {word[::-1]}", f"text {word * 2}") for word in WORDS[:26]]
PAIRS += [("nobody asks", PAIRS[0][1]), ("nobody knows", PAIRS[1][1] + " more" * 30)]
PAIRS += [(PAIRS[2][0], "another answer"), (PAIRS[3][0], "one more answer")]


@pytest.fixture
def source(tokenizer, tmp_path):
    prepare.write_pairs(tmp_path / "source", PAIRS, ("q: ", "d: "), tokenizer)
    return store.Source(tmp_path / "source", tokenizer)


def settings(out, **values):
    return Config(**{"out": str(out), "mined": 29, "margin": np.inf, **values})


@pytest.mark.parametrize("miner", ["model", "bm25"])
def test_copies_and_answers_to_an_equal_query_are_no_negatives(miner, source, tokenizer, tmp_path):
    """At margin inf, so that nothing but the marks can tell."""
    length = len(source.texts("document", [1], 99)[0])
    settings_ = settings(tmp_path / "out", miner=miner, document_tokens=length)
    mined = mine(tiny_model(tokenizer), [source], settings_)["source"]
    assert not set(mined[0]) & {0, 26} and not set(mined[26]) & {0, 26}, "copies"
    assert not set(mined[1]) & {1, 27} and not set(mined[27]) & {1, 27}, "equal as far as read"
    assert not set(mined[2]) & {2, 28} and not set(mined[28]) & {2, 28}, "two answers"
    different = [row[row >= 0] for row in mined]
    assert all(len(row) == len(set(row)) for row in different)
    assert [len(row) for row in different[:4]] == [27, 27, 26, 26], "all others are found"


def test_mining_equals_its_plain_twin(source, tokenizer, tmp_path):
    model = tiny_model(tokenizer)
    config = settings(tmp_path / "out", mined=5, margin=1.0, precision="float32")
    mined = mine(model, [source], config)["source"]
    query, document = (
        model.encode([f"{side[0]}: {pair[side == 'document']}" for pair in PAIRS], tokens)
        for side, tokens in (("query", config.query_tokens), ("document", config.document_tokens))
    )
    scores = query @ document.T
    for i in range(26):
        wrong = [
            j for j in np.argsort(-scores[i], kind="stable")
            if PAIRS[j][1] != PAIRS[i][1] and PAIRS[j][0] != PAIRS[i][0] and j != 26
        ][:6]  # fmt: skip
        top = [j for j in np.argsort(-scores[i], kind="stable") if j != 26][:6]
        expected = [j for j in top if j in wrong and scores[i, j] < scores[i, i]][:5]
        got = mined[i][mined[i] >= 0].tolist()
        assert got == expected or (not expected and len(got) == config.negatives), i
    assert not (tmp_path / "out" / "mining.tmp").exists()


def test_two_processes_mine_what_one_does(data, tmp_path):
    """Each chunk of rows is the same, whichever process it falls to: so are its negatives."""
    script = (
        "import sys, torch, numpy as np; sys.path[:0] = [{root!r}, {root!r} + '/tests']\n"
        "import processes, mining; from data import store; from finetune import Config\n"
        "from tiny import tiny_model; import functools\n"
        "mining.shared_rows = functools.partial(mining.shared_rows, chunk=32)\n"
        "config = Config(out=sys.argv[1], mined=5, batch_size=2); processes.start(config)\n"
        "tokenizer = store.load_tokenizer({data!r})\n"
        "sources = store.open_sources({data!r} + '/stage3', tokenizer)\n"
        "torch.set_num_threads(1); mining.mine(tiny_model(tokenizer), sources, config)\n"
    ).format(root=str(ROOT), data=str(data))
    path = tmp_path / "mine.py"
    path.write_text(script)
    two = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517"]
    found, shown = [], []
    for out, launch in (("one", []), ("two", two)):
        command = [sys.executable, *launch, path, tmp_path / out]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        found.append(np.load(tmp_path / out / "negatives.npz")["summary-body"])
        shown.append(result.stdout)
    assert len(found[0]) > 64, "there is something to share"
    assert np.array_equal(*found)
    assert shown[0] == shown[1], "and the same counts"


# ------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"miner": "google"}, "--miner=google: give model or bm25"),
        ({"margin": 0.0}, "--margin=0.0: give more than 0"),
        ({"margin": float("nan")}, "--margin=nan: give more than 0"),
        ({"negatives": 30}, "the smallest source has 30 rows"),
    ],
)
def test_settings_that_cannot_work_are_named(values, message, source, tmp_path):
    with pytest.raises(InputError, match=message):
        check_mining(settings(tmp_path, **values), [source])


def test_a_query_with_too_few_wrong_documents_is_named(tokenizer, tmp_path):
    pairs = [("the same query", f"text {word}") for word in WORDS[:5]]
    prepare.write_pairs(tmp_path / "source", pairs, ("q: ", "d: "), tokenizer)
    source = store.Source(tmp_path / "source", tokenizer)
    with pytest.raises(InputError, match="of 5 different documents, 5 answer the same query"):
        mine(tiny_model(tokenizer), [source], settings(tmp_path / "out"))


def test_an_answer_is_known_by_every_query_of_its_words(source):
    answers = Answers(source, {"query": 48, "document": 64})
    assert answers.of(0).tolist() == answers.of(26)[:1].tolist() == [0]
    assert answers.known(np.array([2, 4]), np.array([[2, 27], [2, 27]])).tolist() == [
        [True, True],
        [False, False],
    ]


def test_a_full_disk_is_named_and_leaves_no_scratch(source, tokenizer, tmp_path):
    """No file may grow beyond 1,000 bytes, which the embeddings do."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot write .*source.documents: File too large"):
            mine(tiny_model(tokenizer), [source], settings(tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "out").iterdir())
