"""Our model equals transformers' own NomicBert, and our directories open in transformers and
sentence-transformers."""

from functools import partial

import numpy as np
import pytest
import torch
from tiny import random_texts, refused, tiny_model

from data.prefixes import PREFIXES
from data.store import pack
from model import ModelConfig, NomicBert, NomicBertForMaskedLM


@pytest.fixture(scope="module", autouse=True)
def libraries():
    """Imported when these tests run, and not when others are collected: it takes seconds."""
    global transformers, sentence_transformers
    transformers = pytest.importorskip("transformers")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    transformers.logging.disable_progress_bar()


TEXTS = ["", " ", "search_query: some words"]
TEXTS += [
    "\u0000 \n\tunprintable",
    "naïve café, 中文字符之间没有空格, done 😀👩‍💻 ok, qzxjv 🜁 ᚠᛇᚻ",
    "np.read_csv(path)[::-1] != None",
    "word " * 126,  # the trained length
    "some more words and others " * 120,
    "word " * 9000,  # truncated at 8,192 tokens
]


def theirs(cls, directory):
    """Their model from our directory: all weights are found, none is left over."""
    model, loading = cls.from_pretrained(directory, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


def deviation(ours, theirs):
    """The largest difference, over the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@torch.no_grad()
def deviations(model, other, length):
    """Of hidden states, of pooled embeddings and of MLM logits, for one text of random tokens."""
    tokens, cu_seqlens = pack(random_texts([length]))
    other.nomic_bert(torch.ones(1, 1, dtype=torch.long))  # it keeps the angles of the longest text
    hidden, expected = model.bert(tokens, cu_seqlens), other.nomic_bert(tokens[None])[0][0]
    mean = torch.nn.functional.normalize(expected.mean(0, keepdim=True))
    return (
        deviation(hidden, expected),
        deviation(model.bert.pool(hidden, cu_seqlens), mean),
        deviation(model.cls["predictions"](hidden[:256]), other.cls(expected[:256])),
    )


def both(directory, model=None):
    model = model or tiny_model(cls=NomicBertForMaskedLM)
    model.save_pretrained(directory)
    return model, theirs(transformers.AutoModelForMaskedLM, directory)


@pytest.mark.parametrize("s", [1.0, 2.0, 4.0])
def test_a_small_model_equals_theirs_up_to_four_times_the_trained_length(tmp_path, s):
    model, other = both(tmp_path, tiny_model(cls=NomicBertForMaskedLM, rope_factor=s))
    for length in (1, 2, 77, 128, 129, 300, 512):
        assert max(deviations(model, other, length)) < 1e-5, length


def test_the_published_shape_equals_theirs(tmp_path):
    """With 2 of its 12 layers, which are alike."""
    model, other = both(tmp_path, NomicBertForMaskedLM(ModelConfig(num_hidden_layers=2)))
    for length in (77, 2049):
        assert max(deviations(model, other, length)) < 1e-5, length


def test_gradients_equal_theirs(tmp_path):
    """Of the loss of masked language modelling, for every weight. Ours are saved as if they were
    weights, so that they come back under their names; the biases of their head we do not have."""
    model, other = both(tmp_path / "weights")
    tokens, cu_seqlens = pack(random_texts([77]))
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
    model, other = both(tmp_path)
    encoder = other.nomic_bert
    texts = short, long = [torch.from_numpy(text) for text in random_texts([100, 500])]
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = torch.arange(500) < torch.tensor([[100], [500]])
    with torch.no_grad():
        alone = encoder(short[None])[0][0]
        together = encoder(padded, attention_mask=mask)[0][0, :100]
        afterwards = encoder(long[None, :200])[0][0]
        encoder(short[None])  # below the trained length: the base is reset
        fresh = encoder(long[None, :200])[0][0]
        ours = model.bert(*pack(random_texts([100, 500])))[:100]
    assert deviation(together, alone) > 1e-3, "another text in the batch changes it"
    assert deviation(afterwards, fresh) > 1e-3, "an earlier text changes it"
    assert deviation(ours, alone) < 1e-5, "ours equals theirs for the text alone"


@pytest.fixture(scope="module")
def ours(data_tokenizer):
    return tiny_model(data_tokenizer)


@pytest.fixture
def directory(ours, tmp_path):
    ours.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_sentence_transformers_gives_our_embeddings_and_we_open_what_it_writes(ours, directory):
    """The first dimensions and the prefixes, too."""
    model = sentence_transformers.SentenceTransformer(directory, device="cpu")

    def encode(text, **options):
        return model.encode([text], **options)[0]

    close = partial(np.testing.assert_allclose, atol=1e-5)
    close(list(map(encode, TEXTS)), ours.encode(TEXTS))
    first = [encode(text, truncate_dim=16, normalize_embeddings=True) for text in TEXTS]
    close(first, ours.encode(TEXTS, dims=16))
    for name, prefix in PREFIXES.items():
        close(encode("words", prompt_name=name), ours.encode([prefix + "words"])[0])
    assert model.similarity_fn_name == "cosine"
    model.save(f"{directory}-theirs")
    again = NomicBert.from_pretrained(f"{directory}-theirs", dtype=torch.float32)
    close(again.encode(TEXTS), ours.encode(TEXTS))


def test_auto_classes_open_our_directories(ours, directory):
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        ids = ours.tokenizer.encode(text).ids[:-1][:8191] + [ours.tokenizer.token_to_id("[SEP]")]
        assert tokenizer(text, truncation=True)["input_ids"] == ids
    assert tokenizer.mask_token == "[MASK]" and tokenizer.pad_token_id == 0
    assert theirs(transformers.AutoModel, directory).config.rope_parameters["factor"] == 2.0


def test_the_encoder_of_stage_1_opens_in_both_libraries(ours, tmp_path):
    model = tiny_model(ours.tokenizer, NomicBertForMaskedLM)
    model.save_pretrained(tmp_path)
    encoder, tokens = transformers.AutoModel.from_pretrained(tmp_path), torch.arange(5, 50)
    assert deviation(model.bert(*pack([tokens.numpy()])), encoder(tokens[None])[0][0]) < 1e-5
    found = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu").encode(["words"])
    np.testing.assert_allclose(found, model.bert.encode(["words"]), atol=1e-5)


SMALL = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 128}


@pytest.mark.parametrize("original_names", [True, False], ids=["published names", "their names"])
@pytest.mark.parametrize("rope", [None, "default", "linear", "dynamic"])
def test_we_open_what_transformers_writes(tmp_path, rope, original_names):
    parameters = rope and {"rope_theta": 500.0, "rope_type": rope}
    if rope in ("linear", "dynamic"):
        parameters["factor"] = 3.0
    shape = {"max_position_embeddings": 128, "rope_parameters": parameters}
    torch.manual_seed(0)
    other = transformers.NomicBertForMaskedLM(transformers.NomicBertConfig(**SMALL, **shape)).eval()
    other.save_pretrained(tmp_path, save_original_format=original_names, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    model = NomicBertForMaskedLM.from_pretrained(tmp_path, dtype=torch.float32)
    for length in (1, 100, 300):
        assert max(deviations(model, other, length)) < 1e-5
    other.nomic_bert.save_pretrained(tmp_path / "encoder", save_original_format=original_names)
    encoder = NomicBert.from_pretrained(tmp_path / "encoder", torch.float32)
    tokens = pack([np.arange(5, 50)])
    assert deviation(encoder(*tokens), model.bert(*tokens)) < 1e-6


def test_their_masked_language_model_is_refused_if_its_head_has_biases(tmp_path):
    other = transformers.NomicBertForMaskedLM(transformers.NomicBertConfig(**SMALL))
    torch.nn.init.normal_(other.cls.predictions.bias)
    other.save_pretrained(tmp_path)
    assert NomicBert.from_pretrained(tmp_path)
    with refused("its MLM head has biases"):
        NomicBertForMaskedLM.from_pretrained(tmp_path)
