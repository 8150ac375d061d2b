"""A published checkpoint is continued on one's own notes: the three commands of README."""

import itertools
import json
import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from test_checkpoint import v1
from tiny import cases, tiny_model
from tokenizers import Tokenizer, processors

import contrastive
import evaluate
import finetune
from common.files import SPECIAL_TOKENS, fingerprint, load_tokenizer
from data import folder
from data.prefixes import PREFIXES
from data.tasks import read_task
from data.tokenizer import train_tokenizer
from model import NomicBert

TOPICS = """rain: drops fall from grey clouds until everything gets wet
bread: flour yeast and water rise slowly in warm ovens
chess: one queen and two knights attack the black king
garden: seeds roots need soil spades compost much patience
trains: on rails engines pull heavy waggons towards the station
fever: hot body weak voice doctor brings tablets every evening
sheep: wool grass flock shepherd dog hills bells lambs
glass: sand melts white furnace blower pipe bottle cools
voting: ballot box party campaign mayor counts result majority
diving: tank mask bubbles deep reef pressure fins current"""
TOPICS = dict(line.split(": ") for line in TOPICS.split("\n"))
# no heading stands in its text: which words belong to it has to be learned


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A checkpoint in the published form, with a tokenizer that knows the words of 45 notes beside
    it. Each note has a section on two topics, which stand together in no other note."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    rng, texts = random.Random(0), [" ".join(PREFIXES.values())] * 20
    for number, pair in enumerate(itertools.combinations(TOPICS, 2)):
        words = rng.sample(" ".join(TOPICS[topic] for topic in pair).split(), 15)
        texts.append(f"# Note {number}\n\n## {' and '.join(pair)}\n\n{' '.join(words)}\n")
        (tmp_path / "notes" / f"{number}.md").write_text(texts[-1])
    tokenizer = train_tokenizer(texts, 800)
    model = tiny_model(tokenizer, num_hidden_layers=1, trained_length=2048)
    model.save_pretrained(tmp_path / "published")
    v1(tmp_path / "published")
    return tmp_path / "published"


@pytest.mark.parametrize(("stage", "hub"), [(contrastive, False), (finetune, True)])
def test_trained_on_notes_it_finds_held_out_sections(published, monkeypatch, capsys, stage, hub):
    """In stage 2 from a directory, in stage 3 from a name on the hub."""
    init, tokenizer = "published", "published/tokenizer.json"
    if hub:
        download = lambda name, **_: str(published)  # noqa: E731
        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        init = tokenizer = "nomic-ai/a-name"
    out = f"out/{stage.__name__}"
    folder.main(["notes", f"--tokenizer={tokenizer}"])
    options = ["--data=out/notes", "--batch-size=32", "--steps=40", "--lr=3e-3"]
    stage.main([f"--init={init}", *options, "--eval-every=0"])

    def reciprocal_ranks(model):
        """Of the held-out notes, in searches for their headings."""
        for split in ("dev", "test"):
            _, queries, judged, _ = read_task("out/notes/retrieval/heading-section", split)
            for query, sections in judged.items():
                words = ["search", queries[query].split(" > ")[-1]]
                capsys.readouterr()
                evaluate.main([*words, f"--model={model}", "--data=out/notes", "--model-only"])
                names = re.findall(r"\d+\.md", capsys.readouterr().out)
                note = next(iter(sections)).split("#")[0]
                yield 1 / (1 + names.index(note)) if note in names else 0.0

    before, after = list(reciprocal_ranks(init)), list(reciprocal_ranks(out))
    assert len(before) >= 3 and np.mean(after) > np.mean(before) + 0.3
    assert fingerprint(load_tokenizer(out)) == fingerprint(load_tokenizer(published))


def test_a_name_on_the_hub_opens_from_its_cache_or_is_an_error_of_one_line(published, tmp_path):
    repository = tmp_path / "models--nomic-ai--nomic-embed-text-v1"
    for name in ("refs", "snapshots"):
        (repository / name).mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = published.rename(repository / "snapshots" / ("0" * 40))
    code = (
        "from model import NomicBert; from common.options import cli\n"
        "model = NomicBert.from_pretrained('nomic-ai/nomic-embed-text-v1')\n"
        "print(model.encode(['grey clouds']).tolist())\n"
        "cli(lambda _: NomicBert.from_pretrained('nobody/nothing'))"
    )
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    expected = NomicBert.from_pretrained(snapshot).encode(["grey clouds"])
    np.testing.assert_allclose(json.loads(result.stdout), expected, atol=1e-6)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "no directory nobody/nothing here" in result.stderr


@cases("special", SPECIAL_TOKENS)
def test_a_special_token_in_a_text_is_read_as_its_characters(published, special):
    """In a tokenizer of ours, and in one like that of bert-base-uncased, which truncates and
    pads."""
    tokenizer = Tokenizer.from_file("published/tokenizer.json")
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save("bert.json")
    for path in ("published/tokenizer.json", "bert.json"):
        tokenizer = load_tokenizer(path)
        texts = [f"grey{special} clouds", f"grey [ {special[1:-1]} ] clouds", "grey clouds"]
        written, spaced, ordinary = (x.ids for x in tokenizer.encode_batch_fast(texts))
        assert written == spaced and len(written) > len(ordinary) == 4
        assert fingerprint(tokenizer) == fingerprint(Tokenizer.from_str(tokenizer.to_str()))
