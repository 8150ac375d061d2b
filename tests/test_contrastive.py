"""InfoNCE and GradCache against their plain twins, and gathering against one process."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import LargestTensor, gradients, random_texts, tiny_model
from torch import multiprocessing

import contrastive
from common.files import load_tokenizer
from contrastive import embed, gather, grad_cache, info_nce, info_nce_in_blocks
from data.store import text_keys
from model import NomicBert, NomicBertForMaskedLM


def unit_rows(n, E=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, E, generator=generator, dtype=torch.float64), dim=-1)


def test_info_nce_equals_a_loop():
    """With more documents than queries: every negative counts."""
    query, document = unit_rows(5, seed=1), unit_rows(12, seed=2)
    expected = 0.0
    for i in range(5):
        scores = [math.exp((query[i] @ document[j]).item() / 0.02) for j in range(12)]
        expected -= math.log(scores[3 + i] / sum(scores))
    assert info_nce(query, document, 0.02, first=3).item() == pytest.approx(expected)


def test_info_nce_of_equal_embeddings_is_ln_n_and_of_perfect_ones_almost_0():
    same, rows = unit_rows(1).expand(8, -1), unit_rows(8)
    assert info_nce(same, same, 0.02).item() / 8 == pytest.approx(math.log(8))
    assert info_nce(rows, rows, 0.02).item() / 8 < 1e-6


def test_copies_of_the_right_document_are_no_negatives():
    """64 pairs with 8 different documents: with the copies no loss is below ln 8."""
    texts = [np.array([5, 6 + i % 8, 9]) for i in range(64)]
    keys, rows = text_keys(texts), unit_rows(8)[torch.arange(64) % 8]
    assert len(set(keys.tolist())) == 8
    assert info_nce(rows, rows, 0.02).item() / 64 == pytest.approx(math.log(8))
    assert info_nce(rows, rows, 0.02, keys=keys).item() / 64 < 1e-6
    document, by_hand = unit_rows(64, seed=3), []  # the loss of each query
    for i in range(64):
        counted = [j for j in range(64) if j == i or j % 8 != i % 8]
        log_p = F.log_softmax(rows[i] @ document[counted].T / 0.02, 0)
        by_hand.append(-log_p[counted.index(i)].item())
    for first, last in ((0, 64), (21, 41)):
        loss = info_nce(rows[first:last], document, 0.02, first, keys).item()
        assert loss == pytest.approx(sum(by_hand[first:last]))


@pytest.mark.parametrize("logits_in_memory", [1, 1000, 10_000])
def test_info_nce_in_blocks_is_info_nce_of_the_whole_matrix(logits_in_memory):
    results = []
    keys = torch.arange(100) % 40
    for function, more in ((info_nce, ()), (info_nce_in_blocks, (logits_in_memory,))):
        query, document = (unit_rows(100, seed=i).requires_grad_() for i in (1, 2))
        loss = function(query[:60], document, 0.05, 30, keys, *more)
        loss.backward()
        results.append((loss.detach(), query.grad, document.grad))
    for whole, blocks in zip(*results, strict=True):
        torch.testing.assert_close(blocks, whole, rtol=1e-12, atol=1e-12)


def test_no_more_logits_are_in_memory_than_allowed():
    query, document = (torch.randn(512, 16).requires_grad_() for _ in range(2))
    for logits_in_memory in (64 * 512, 512 * 512):
        with LargestTensor() as largest:
            info_nce_in_blocks(query, document, 0.05, 0, None, logits_in_memory).backward()
        assert largest.elements == logits_in_memory


# For GradCache
TEXTS = random_texts(np.random.default_rng(0).integers(3, 40, 16))


def loss_of(embeddings):
    query, document = embeddings.chunk(2)
    return info_nce(query, document, 0.05) / len(query)


def whole_batch(dtype=torch.float32):
    model = tiny_model()
    model.dtype = dtype
    loss = loss_of(embed(model, TEXTS, 100_000))
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize("micro_batch_tokens", [1, 50, 200, 100_000])
def test_grad_cache_has_the_gradient_of_the_whole_batch(micro_batch_tokens):
    loss, expected = whole_batch()
    model = tiny_model()
    assert grad_cache(model, TEXTS, loss_of, micro_batch_tokens).item() == pytest.approx(loss)
    torch.testing.assert_close(gradients(model), expected, rtol=0, atol=1e-5)


def test_grad_cache_keeps_the_activations_of_one_micro_batch_at_a_time():
    live, peak = 0, {}

    class Kept:
        def __init__(self, x):
            nonlocal live
            self.x, live = x, live + x.numel()
            peak[tokens] = max(peak.get(tokens, 0), live)

        def __del__(self):
            nonlocal live
            live -= self.x.numel()

    for tokens in (50, 100_000):
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
            grad_cache(tiny_model(), TEXTS, loss_of, tokens)
    assert peak[50] < 0.5 * peak[100_000], "numbers kept for backward"


def test_in_bf16_both_passes_of_grad_cache_compute_the_same():
    """Attention has another kernel for evaluation: training chooses it, not the grad mode."""
    _, expected = whole_batch(torch.bfloat16)
    model = tiny_model()
    model.dtype = torch.bfloat16
    grad_cache(model, TEXTS, loss_of, 100_000)
    assert (gradients(model) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_plain_gradient_accumulation_has_another_gradient():
    """Four small batches are not one large one: their queries miss each other's documents."""
    _, expected = whole_batch()
    model = tiny_model()
    for i in range(0, 8, 2):
        (loss_of(embed(model, TEXTS[i : i + 2] + TEXTS[8 + i : 10 + i], 100_000)) / 4).backward()
    assert (gradients(model) - expected).abs().max() > 0.1 * expected.abs().max()


WAYS = "gathered", "gathered without gradient", "not gathered"


def gradients_of_a_process(rank, world, folder, pairs=16, E=16):
    """Saves the gradient of the mean loss over all pairs, of which each process has a share."""
    init = f"file://{folder}/store-{world}"
    torch.distributed.init_process_group("gloo", init, rank=rank, world_size=world)
    own = slice(rank * pairs // world, (rank + 1) * pairs // world)
    for way in WAYS:
        weight = unit_rows(E, E, seed=3).requires_grad_()
        query, document = unit_rows(pairs, E, seed=1), unit_rows(pairs, E, seed=2)
        q, d = (F.normalize(x[own] @ weight, dim=-1) for x in (query + document, document))
        documents, first = (d, 0) if way == "not gathered" else (gather(d), own.start)
        if way == "gathered without gradient":  # except for the documents of this process
            documents = documents.detach().clone()
            documents[own] = d
        (info_nce(q, documents, 0.05, first) / pairs).backward()
        torch.distributed.all_reduce(weight.grad)
        torch.save(weight.grad.flatten(), f"{folder}/{way}-{world}.pt")
    torch.distributed.destroy_process_group()


def test_only_gathering_with_gradient_has_the_gradient_of_one_process(tmp_path):
    results = {}
    for world in (1, 2, 4):
        arguments = (gradients_of_a_process, (world, tmp_path), world)
        multiprocessing.start_processes(*arguments, start_method="fork")
        results[world] = [torch.load(tmp_path / f"{way}-{world}.pt") for way in WAYS]
    true = results[1][0]
    for gathered, *others in (results[2], results[4]):
        torch.testing.assert_close(gathered, true, rtol=1e-12, atol=1e-12)
        without, local = (F.cosine_similarity(gradient, true, 0) for gradient in others)
        assert local < without < 0.999


@pytest.mark.parametrize("cls", [NomicBertForMaskedLM, NomicBert])
def test_a_run_starts_from_all_the_weights_of_the_checkpoint(cls, data, tmp_path):
    tiny_model(load_tokenizer(data), cls).save_pretrained(tmp_path / "init")
    arguments = [f"--data={data}", f"--init={tmp_path}/init", f"--out={tmp_path}/out", "--lr=0"]
    contrastive.main([*arguments, "--steps=1", "--batch-size=4", "--eval-every=0"])
    models = (NomicBert.from_pretrained(tmp_path / name) for name in ("init", "out"))
    before, after = (model.state_dict() for model in models)
    assert all(torch.equal(before[name], after[name]) for name in before | after)
