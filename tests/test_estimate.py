"""What a run takes: the count against operations that torch counted, and the paper's numbers."""

import numpy as np
import pytest
import torch
from test_runs import train
from tiny import tiny_model
from torch.utils.flop_counter import FlopCounterMode

import contrastive
import finetune
import mlm
from data.store import pack
from estimate import PEAKS, operations_per_token, saved_bytes_per_token, speed
from model import Config, NomicBertForMaskedLM
from options import InputError

STAGES = {"mlm": mlm, "contrastive": contrastive, "finetune": finetune}


@pytest.mark.parametrize("length", [16, 128])
def test_operations_are_those_that_torch_counts(length):
    """Forward and backward of real steps; in bf16, where attention is written out in products."""
    model = tiny_model()
    model.dtype = torch.bfloat16
    batch = pack([np.arange(5, 5 + length)] * 3)
    with FlopCounterMode(display=False) as counter:
        model(*batch).float().sum().backward()
    expected = 3 * length * operations_per_token(model.config, [length] * 3)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)


def test_the_head_counts_for_masked_tokens_only():
    model = tiny_model(cls=NomicBertForMaskedLM)
    tokens, cu_seqlens = pack([np.arange(5, 105)])
    places = torch.arange(30)
    model.bert.dtype = torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        model(tokens, cu_seqlens, places).float().sum().backward()
    expected = 100 * operations_per_token(model.config, [100], masked_share=0.30)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)


def test_longer_texts_weigh_more_in_the_mean():
    """Attention is paid for by the square of the length: of tokens, not of texts, the mean."""
    config = tiny_model().config
    apart = [operations_per_token(config, [n]) * n for n in (10, 110)]
    assert operations_per_token(config, [10, 110]) == pytest.approx(sum(apart) / 120)


def test_a_block_keeps_about_fifty_numbers_of_c_for_each_token():
    """10 of C, 4 of the inner size and what attention keeps, in half precision: some 40 KB."""
    config = Config(hidden_size=768, intermediate_size=3072)
    assert 30_000 < saved_bytes_per_token(config) < 50_000


def test_the_share_of_the_peak_is_shown_where_the_peak_is_known(monkeypatch):
    config, gpu = Config(), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    record = speed(config, [2048], tokens=8e6, seconds=10.0, device=gpu, world=2)
    operations = 8e6 * operations_per_token(config, [2048])
    assert record["tokens_per_second"] == 8e5
    assert record["share_of_peak"] == pytest.approx(operations / 10 / (2 * PEAKS["H100"]))
    assert "share_of_peak" not in speed(config, [2048], 8e6, 10.0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("stage", "lines"),
    [
        ("mlm", ["137,323,008 parameters", "100,000 steps  8.39e+11 tokens"]),
        ("contrastive", ["136,731,648 parameters", "48 MiB  embeddings gathered"]),
        ("finetune", ["136,731,648 parameters", "AdamW's two moments, float32, shared by 8"]),
    ],
)
def test_a_dry_run_of_the_paper_shows_its_numbers_and_writes_nothing(
    stage, lines, tmp_path, capsys
):
    """839 billion tokens in stage 1; 16,384 documents of 768 float32 numbers in stage 2."""
    out = tmp_path / "run"
    arguments = ["--preset=paper", "--dry-run", f"--data={tmp_path / 'none'}", f"--out={out}"]
    STAGES[stage].main(arguments)
    shown = capsys.readouterr().out
    assert all(line in shown for line in lines) and "8 x H100" in shown
    assert not out.exists()


def test_a_dry_run_measures_the_texts_that_are_there(data, capsys):
    contrastive.main([f"--data={data}", "--dry-run"])
    assert f"those of {data}" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# Options that make it faster


def test_compiled_blocks_give_the_losses_of_plain_ones(data, tmp_path):
    """Batches of many shapes; a compiler may round otherwise."""
    options = ("--precision=float32", "--micro-batch-tokens=300", "--eval-every=0")
    plain, _ = train(contrastive, data, tmp_path / "plain", *options)
    compiled, _ = train(contrastive, data, tmp_path / "compiled", *options, "--compile")
    np.testing.assert_allclose(compiled, plain, rtol=1e-3)


def test_compiling_without_a_compiler_is_an_error_that_says_so(data, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match="--compile needs a C"):
        train(mlm, data, tmp_path / "run", "--compile")


@pytest.mark.parametrize("stage", STAGES)
def test_an_option_for_gpus_is_refused_on_a_cpu(stage, data, tmp_path):
    with pytest.raises(InputError, match="--attention=varlen: it needs a CUDA GPU"):
        train(STAGES[stage], data, tmp_path / "run", "--attention=varlen")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_nothing_in_a_step_waits_for_the_gpu():
    """torch raises at the first synchronisation of host and device."""
    gpu = torch.device("cuda")
    texts = [np.arange(5, 5 + n) for n in (40, 9, 70, 33)]
    model = tiny_model().to(gpu)
    model.dtype = torch.bfloat16
    masked = tiny_model(cls=NomicBertForMaskedLM).to(gpu)
    masked.bert.dtype = torch.bfloat16
    tokens, cu_seqlens = pack(texts, gpu)
    places, answers = torch.arange(10, device=gpu), tokens[:10]

    def step():
        loss = mlm.backpropagate(masked, tokens, cu_seqlens, places, answers, 10)
        cached = contrastive.grad_cache(
            model, texts, lambda x: contrastive.info_nce(*x.chunk(2), 0.02), 64
        )
        return loss + cached

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
