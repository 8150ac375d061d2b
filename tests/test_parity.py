"""Our model equals transformers' own NomicBert, and our directories open in transformers and
sentence-transformers. `bench/parity.py` measures the whole grid at the published size."""

import json

import numpy as np
import pytest
import torch
from tiny import tiny_model

from bench.parity import deviation, deviations, theirs
from common.options import InputError
from data.store import pack
from data.tasks import PREFIXES
from model import ModelConfig, NomicBert, NomicBertForMaskedLM


@pytest.fixture(scope="module", autouse=True)
def libraries():
    """Imported when these tests run, and not when others are collected: it takes seconds."""
    global transformers, sentence_transformers
    transformers = pytest.importorskip("transformers")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    transformers.logging.disable_progress_bar()


TEXTS = {
    "empty": "",
    "a space": " ",
    "a letter": "a",
    "a prompt": "search_query: some words",
    "unprintable": "\u0000 \n\t",
    "accents": "naïve café, Ångström, Łódź",
    "Chinese": "中文字符之间没有空格",
    "emoji": "done 😀👩‍💻 ok",
    "code": "np.read_csv(path)[::-1] != None",
    "unknown words": "qzxjv 🜁 ᚠᛇᚻ",
    "at the trained length": "word " * 126,
    "beyond it": "some more words and others " * 120,
    "truncated at 8,192 tokens": "word " * 9000,
}


def both(directory, config):
    model = tiny_model(cls=NomicBertForMaskedLM, **vars(config))
    model.save_pretrained(directory)
    return model, theirs(transformers.AutoModelForMaskedLM, directory)


SMALL = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 128}


@pytest.mark.parametrize("s", [1.0, 2.0, 4.0])
def test_a_small_model_equals_theirs_up_to_four_times_the_trained_length(tmp_path, s):
    model, other = both(tmp_path, ModelConfig(**SMALL, rope_factor=s))
    for length in (1, 2, 77, 512, 2048, 2049, 4096, 8192):
        assert max(deviations(model, other, length)) < 1e-5, length


def test_the_published_shape_equals_theirs(tmp_path):
    torch.manual_seed(0)
    model = NomicBertForMaskedLM(ModelConfig())
    model.save_pretrained(tmp_path)
    other = theirs(transformers.AutoModelForMaskedLM, tmp_path)
    for length in (1, 77, 2049):
        assert max(deviations(model, other, length)) < 1e-5, length


def test_gradients_equal_theirs(tmp_path):
    """Of the loss of masked language modelling, for every weight. Ours are saved as if they were
    weights, so that they come back under their names; the biases of their head we do not have."""
    model, other = both(tmp_path / "weights", ModelConfig(**SMALL))
    tokens, cu_seqlens = pack([np.random.default_rng(0).integers(5, 320, 77)])
    positions = torch.arange(0, 77, 3)
    labels = torch.full((1, 77), -100)
    labels[0, positions] = tokens[positions]
    logits = model(tokens, cu_seqlens, positions)
    torch.nn.functional.cross_entropy(logits, tokens[positions]).backward()
    other(tokens[None], labels=labels).loss.backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad
    model.save_pretrained(tmp_path / "gradients")
    ours = theirs(transformers.AutoModelForMaskedLM, tmp_path / "gradients")
    for (name, found), expected in zip(ours.named_parameters(), other.parameters(), strict=True):
        if name not in ("cls.predictions.bias", "cls.predictions.transform.dense.bias"):
            assert deviation(found, expected.grad) < 1e-5, name


def test_they_scale_by_the_longest_text_so_far_and_we_by_each_text(tmp_path):
    """transformers' Dynamic NTK takes the padded length of the batch, and keeps the largest base
    until a text below the trained length comes. Ours is a function of the text alone."""
    model, other = both(tmp_path, ModelConfig(**SMALL, trained_length=128))
    encoder = other.nomic_bert
    rng = np.random.default_rng(0)
    short, long = (torch.from_numpy(rng.integers(5, 320, n)) for n in (100, 500))
    padded = torch.zeros(2, 500, dtype=torch.long)
    padded[0, :100], padded[1] = short, long
    mask = torch.arange(500) < torch.tensor([[100], [500]])
    with torch.no_grad():
        alone = encoder(short[None])[0][0]
        together = encoder(padded, attention_mask=mask)[0][0, :100]
        afterwards = encoder(long[None, :200])[0][0]
        encoder(short[None])  # below the trained length: the base is reset
        fresh = encoder(long[None, :200])[0][0]
        ours = model.bert(*pack([short.numpy(), long.numpy()]))[:100]
    assert deviation(together, alone) > 1e-3, "another text in the batch changes it"
    assert deviation(afterwards, fresh) > 1e-3, "an earlier text changes it"
    assert deviation(ours, alone) < 1e-5, "ours equals theirs for the text alone"


# ------------------------------------------------------------------------------------------------
# Ours -> disk -> theirs


@pytest.fixture(scope="module")
def ours(data_tokenizer):
    return tiny_model(data_tokenizer)


@pytest.fixture
def directory(ours, tmp_path):
    ours.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def one_by_one(model, texts, **options):
    return np.concatenate([model.encode([text], **options) for text in texts])


def test_sentence_transformers_gives_our_embeddings(ours, tmp_path):
    """The first dimensions and the prefixes, too."""
    ours.save_pretrained(tmp_path)
    model = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    texts = list(TEXTS.values())
    np.testing.assert_allclose(one_by_one(model, texts), ours.encode(texts), atol=1e-5)
    first = one_by_one(model, texts, truncate_dim=16, normalize_embeddings=True)
    np.testing.assert_allclose(first, ours.encode(texts, dims=16), atol=1e-5)
    for name, prefix in PREFIXES.items():
        found, expected = model.encode(["words"], prompt_name=name), ours.encode([prefix + "words"])
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert model.similarity_fn_name == "cosine"
    again = NomicBert.from_pretrained(tmp_path, dtype=torch.float32)
    np.testing.assert_allclose(again.encode(texts[:8]), ours.encode(texts[:8]), atol=1e-6)


def test_auto_classes_open_our_directories(ours, directory, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    for text in TEXTS.values():
        ids = ours.tokenizer.encode(text).ids[:-1][:8191] + [ours.tokenizer.token_to_id("[SEP]")]
        assert tokenizer(text, truncation=True)["input_ids"] == ids
    assert tokenizer.mask_token == "[MASK]" and tokenizer.pad_token_id == 0
    assert theirs(transformers.AutoModel, directory).config.rope_parameters["factor"] == 2.0

    masked = tiny_model(ours.tokenizer, NomicBertForMaskedLM)
    masked.save_pretrained(tmp_path / "masked")
    theirs(transformers.AutoModelForMaskedLM, tmp_path / "masked")
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "masked")
    tokens = torch.arange(5, 50)
    assert deviation(masked.bert(*pack([tokens.numpy()])), encoder(tokens[None])[0][0]) < 1e-5
    stage1 = sentence_transformers.SentenceTransformer(str(tmp_path / "masked"), device="cpu")
    found, expected = stage1.encode(["some words"]), masked.bert.encode(["some words"])
    np.testing.assert_allclose(found, expected, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# Theirs -> disk -> ours


@pytest.mark.parametrize("original_names", [True, False], ids=["published names", "their names"])
@pytest.mark.parametrize("rope", [None, "default", "linear", "dynamic"])
def test_we_open_what_transformers_writes(tmp_path, rope, original_names):
    parameters = rope and {"rope_theta": 500.0, "rope_type": rope}
    if rope in ("linear", "dynamic"):
        parameters["factor"] = 3.0
    shape = {"max_position_embeddings": 128, "rope_parameters": parameters}
    config = transformers.NomicBertConfig(**SMALL, **shape)
    torch.manual_seed(0)
    other = transformers.NomicBertModel(config).eval()
    other.save_pretrained(tmp_path, save_original_format=original_names)
    model = NomicBert.from_pretrained(tmp_path, dtype=torch.float32)
    for length in (1, 100, 300):
        ids = torch.randint(5, 320, (length,))
        with torch.no_grad():
            expected = other(ids[None])[0][0]
            assert deviation(model(*pack([ids.numpy()])), expected) < 1e-5


@pytest.mark.parametrize("original_names", [True, False], ids=["published names", "their names"])
def test_we_open_their_masked_language_model_unless_its_head_has_biases(tmp_path, original_names):
    torch.manual_seed(0)
    other = transformers.NomicBertForMaskedLM(transformers.NomicBertConfig(**SMALL)).eval()
    other.save_pretrained(tmp_path / "a", save_original_format=original_names)
    model = NomicBertForMaskedLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert max(deviations(model, other, 50)) < 1e-5
    torch.nn.init.normal_(other.cls.predictions.bias)
    other.save_pretrained(tmp_path / "b", save_original_format=original_names)
    assert NomicBert.from_pretrained(tmp_path / "b")
    with pytest.raises(InputError, match="its MLM head has biases"):
        NomicBertForMaskedLM.from_pretrained(tmp_path / "b")


def test_we_open_what_sentence_transformers_writes(ours, directory, tmp_path):
    model = sentence_transformers.SentenceTransformer(str(directory), device="cpu")
    model.save(str(tmp_path / "theirs"))
    assert "pooling_mode" in json.loads((tmp_path / "theirs/1_Pooling/config.json").read_text())
    again = NomicBert.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    texts = list(TEXTS.values())
    np.testing.assert_allclose(again.encode(texts), ours.encode(texts), atol=1e-5)
