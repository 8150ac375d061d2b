"""NomicBert from scratch: the encoder of Nomic Embed (arXiv 2402.01613, sec. 4.1.2).

What differs from BERT (Devlin et al., arXiv 1810.04805):
- rotary position embeddings instead of a table of positions (rope.py)
- SwiGLU instead of GELU in the feed-forward layers (Shazeer, arXiv 2002.05202)
- no biases in linear layers; dropout 0 (the released code leaves its hidden dropout at 0.1)
- a vocabulary padded to a multiple of 64

What it keeps: post-norm, token type embeddings (type 0 everywhere), and an MLM head whose last
matrix is the table of word embeddings.

What differs from most PyTorch code: there is no padding and no attention mask. A batch is one
packed stream of N tokens, and cu_seqlens (cumulative sequence lengths) says where its sequences
begin. Embeddings, norms and linear layers work on (N, C); only attention and pooling look at
sequences. No computation is spent on padding, and no text's embedding depends on what it was
batched with.

Shapes, in all files: N tokens in the packed batch, B sequences, H heads, D head size, C = H * D
hidden size, V vocabulary, M masked positions. A sequence is a text, or in stage 1 as much text as
fits. Modules have the names of the published checkpoints. In all files, [code] is the released
training code, github.com/nomic-ai/contrastors at commit 613ddfd.
"""

import functools
import itertools
import math
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from tqdm import tqdm

from common import checkpoint
from common.device import fast_dtype, move_to_device
from common.options import InputError
from data.prefixes import PROMPTS
from data.store import pack, split_by_tokens, truncate
from rope import Rope, rope_angles, rotate

SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
ON_GPU = {"micro_batch_tokens": 65_536, "compile": True}  # ours; they do not change the result
SHARED_PRESETS = {  # what the presets of all stages have in common
    "gpu": {**dict(zip(SHAPE, (512, 6, 8, 2048), strict=True)), **ON_GPU},
    "paper": {**dict(zip(SHAPE, (768, 12, 12, 3072), strict=True)), **ON_GPU},
}


@dataclass
class ModelConfig:
    """The model's shape. The defaults are nomic-bert-2048, 136,731,648 parameters without head."""

    vocab_size: int = 30528  # bert-base-uncased's 30,522, padded to a multiple of 64
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    rope_base: float = 1000.0  # sec. 3.4; the released mlm.yaml has 500,000, a later experiment
    trained_length: int = 2048  # tokens; RoPE scales beyond
    rope_scaling: str = "dynamic"
    rope_factor: float = 2.0

    @property
    def head_size(self):
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_options(cls, options, vocab_size, trained_length):
        """The shape that a stage's options ask for. Raises InputError for an impossible one."""
        size, heads = options.hidden_size, options.num_attention_heads
        if size % (2 * heads) or size < 4 * heads:
            reason = f"does not make {heads} heads of even size, at least 4"
            raise InputError(f"--hidden-size={size} {reason}")
        shape = {name: getattr(options, name) for name in (*SHAPE, "rope_base")}
        padded = math.ceil(vocab_size / 64) * 64  # matrix products are fastest with such sizes
        return cls(padded, trained_length=trained_length, **shape)


# ------------------------------------------------------------------------------------------------
# Precision. Weights are float32; each linear layer casts them to the type of its input. That type
# is set in one place, after the embeddings, and a reader can follow it from there: there is no
# autocast.


class Linear(nn.Linear):
    """x W^T in the type of x, without a bias."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    """With weight and bias, computed in float32. In bf16 a CPU adds up the gradients of weight and
    bias with an error of 5% and more, and would not be faster."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def initialize(module):
    """Normal with standard deviation 0.02, as BERT; norms keep weight 1 and bias 0."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=0.02)


# ------------------------------------------------------------------------------------------------
# Attention within each sequence of a packed batch: softmax(Q K^T / sqrt(D)) V


@dataclass
class Segments:
    """Where the sequences of a packed batch are."""

    kernel: Callable | None  # reads cu_seqlens itself; None: PyTorch's own attention, by groups
    cu_seqlens: torch.Tensor  # (B + 1,) int32, on the device
    longest: int  # for kernels: tokens of the longest sequence, or more
    groups: list  # (length, count): so many sequences in a row have this length


@functools.cache
def varlen_kernel(device_type, dtype):
    """A kernel that reads cu_seqlens: flash-attn's, where that package is installed, else torch's.
    None on a CPU and for float32, for which there is no such kernel."""
    if device_type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    try:
        from flash_attn import flash_attn_varlen_func as kernel
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn as kernel
    return kernel


def find_segments(cu_seqlens, kernel, device):
    """Segments from cu_seqlens (B + 1,) int32, best on the CPU: fetching it from a GPU waits until
    the GPU is done with all that it has to do."""
    lengths = cu_seqlens.cpu().diff().tolist()  # (B,)
    cu_seqlens = move_to_device(cu_seqlens, device)
    if kernel is not None:
        # a power of two: few values, for each of which torch.compile may compile anew
        return Segments(kernel, cu_seqlens, 1 << max(6, (max(lengths) - 1).bit_length()), [])
    groups = [(length, len([*run])) for length, run in itertools.groupby(lengths)]
    return Segments(None, cu_seqlens, 0, groups)


def packed_attention(q, k, v, segments, training=False):
    """Attention within each sequence: (N, H, D) each -> (N, H, D)."""
    if segments.kernel is not None:
        starts, longest = segments.cu_seqlens, segments.longest  # the same for queries and keys
        return segments.kernel(q, k, v, starts, starts, longest, longest)
    # PyTorch's own attention needs sequences of one length. Those of equal length share a call if
    # they stand together, as in all micro-batches of data/store.py, which are sorted by length
    outputs, sizes = [], [length * count for length, count in segments.groups]
    slices = zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    for (length, count), qkv in zip(segments.groups, slices, strict=True):
        # (count * length, H, D) each -> (count, H, length, D)
        rectangles = (x.view(count, length, *x.shape[1:]).transpose(1, 2) for x in qkv)
        output = attend(*rectangles, training).transpose(1, 2)
        outputs.append(output.flatten(0, 1))  # (count * length, H, D)
    return torch.cat(outputs)


def attend(q, k, v, training=False):
    """softmax(Q K^T / sqrt(D)) V: (B, H, length, D) each -> (B, H, length, D)."""
    if training and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # written out, its backward pass is several times as fast there as that of PyTorch's kernel
        return ((q / q.shape[-1] ** 0.5) @ k.mT).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


# ------------------------------------------------------------------------------------------------
# A block


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.head_size = config.num_attention_heads, config.head_size
        self.Wqkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = Linear(config.hidden_size, config.hidden_size)
        self.packed_attention = packed_attention  # compile_blocks may replace it

    def forward(self, x, cos, sin, segments):
        qkv = self.Wqkv(x).view(-1, 3, self.heads, self.head_size)  # (N, 3, H, D)
        q, k = rotate(qkv[:, :2], cos, sin).unbind(1)  # (N, H, D) each; in one call
        v = qkv[:, 2]
        x = self.packed_attention(q, k, v, segments, self.training)  # (N, H, D)
        return self.out_proj(x.flatten(1))  # (N, C)


class GatedMLP(nn.Module):
    """SwiGLU: fc2(fc11(x) * silu(fc12(x))). fc12 is the gate."""

    def __init__(self, config):
        super().__init__()
        self.fc11 = Linear(config.hidden_size, config.intermediate_size)
        self.fc12 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.fc2(self.fc11(x) * F.silu(self.fc12(x)))


class Block(nn.Module):
    """Post-norm: the norm follows the residual sum, as in BERT."""

    def __init__(self, config):
        super().__init__()
        self.attn = Attention(config)
        self.norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = GatedMLP(config)
        self.norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x, cos, sin, segments):
        x = self.norm1(x + self.attn(x, cos, sin, segments))
        return self.norm2(x + self.mlp(x))


# ------------------------------------------------------------------------------------------------
# The encoder


class Embeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)

    def forward(self, tokens):
        return self.word_embeddings(tokens) + self.token_type_embeddings.weight[0]


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))


class NomicBert(nn.Module):
    """Packed tokens -> hidden states; texts -> embeddings."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.emb_ln = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = Encoder(config)
        self.rope = Rope(
            config.rope_base, config.trained_length, config.rope_scaling, config.rope_factor
        )
        self.dtype = torch.get_default_dtype()  # of the activations
        self.tokenizer = None  # for `encode` and `save_pretrained`
        initialize(self)

    @property
    def device(self):
        return self.emb_ln.weight.device

    def forward(self, tokens, cu_seqlens):
        """The hidden states of the last layer.

        tokens (N,) int64; cu_seqlens (B + 1,) int32, where each sequence begins and the last ends
        (on the CPU, so that a GPU need not be waited for) -> (N, C) in self.dtype."""
        kernel = varlen_kernel(tokens.device.type, self.dtype)
        segments = find_segments(cu_seqlens, kernel, tokens.device)
        x = self.emb_ln(self.embeddings(tokens)).to(self.dtype)  # (N, C)
        angles = rope_angles(segments.cu_seqlens, len(x), self.config.head_size, self.rope)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)  # (N, D/2)
        for layer in self.encoder.layers:
            x = layer(x, cos, sin, segments)
        return x

    def embed(self, tokens, cu_seqlens):
        """Embeddings of a packed batch: (B, C) float32, unit length."""
        return self.pool(self(tokens, cu_seqlens), cu_seqlens)

    def pool(self, hidden, cu_seqlens, dims=None):
        """The mean of each sequence's hidden states at unit length (sec. 3.1): (N, C) -> (B, dims).

        dims: the first dimensions only (Matryoshka). For nomic-embed-text-v1.5 its card says to
        apply a LayerNorm without weights before they are taken, which this does not do."""
        return F.normalize(mean_pool(hidden, cu_seqlens)[:, :dims], dim=-1)

    @torch.no_grad()
    def encode(self, texts, max_tokens=None, dims=None, micro_batch_tokens=None):
        """Embeddings of a list of strings, in its order: float32 numpy (n, dims), unit length.

        A task prefix such as "search_query: " is part of the text. Texts are truncated to
        max_tokens; None is 8,192, with a warning where a text is longer. Beyond the trained length
        RoPE scales as `self.rope` says. dims: the first dimensions only, after Matryoshka; None is
        all. micro_batch_tokens: how many tokens go through the model at once; None is what suits
        the device. Raises InputError for max_tokens or dims out of range, for anything but a list
        of strings, and without a tokenizer."""
        size = self.config.hidden_size
        limit = checkpoint.MAX_TOKENS if max_tokens is None else max_tokens
        if dims is not None and not 1 <= dims <= size:
            raise InputError(f"dims={dims}: embeddings of this model have {size} dimensions")
        if limit < 3:
            raise InputError(f"max_tokens={limit}: [CLS], a token and [SEP] make at least 3")
        if self.tokenizer is None:
            raise InputError("no tokenizer.json beside the model: put it there, or set .tokenizer")
        if isinstance(texts, str):
            raise InputError("encode takes a list of texts: write [text]")
        try:
            texts = list(texts)
            texts = [
                np.array(encoding.ids)
                for start in range(0, len(texts), 10_000)  # encodings take more memory than ids
                for encoding in self.tokenizer.encode_batch_fast(texts[start : start + 10_000])
            ]
        except TypeError as error:
            raise InputError(f"encode takes a list of strings of valid Unicode: {error}") from None
        if max_tokens is None and (longer := sum(len(text) > limit for text in texts)):
            warnings.warn(f"{longer} texts are truncated to {limit:,} tokens", stacklevel=3)
        texts = [truncate(text, limit) for text in texts]
        embeddings = np.empty((len(texts), dims or size), np.float32)
        # a CPU is fastest while activations stay in its cache, as 2,048 tokens of 768 features do;
        # a GPU with enough work at once
        fast = 2048 * 768 // size if self.device.type == "cpu" else 65_536
        budget = micro_batch_tokens or fast
        groups = split_by_tokens([len(text) for text in texts], budget) if texts else []
        matrices = (p for p in self.encoder.named_parameters("encoder") if p[1].dim() == 2)
        cast = {name: matrix.to(self.dtype) for name, matrix in matrices}
        for group in tqdm(groups, "encoding", disable=len(groups) < 100 or None, leave=False):
            tokens, cu_seqlens = pack([texts[i] for i in group], self.device)
            # self(tokens, cu_seqlens), with weights that are cast once and not in every call
            hidden = functional_call(self, cast, (tokens, cu_seqlens))
            embeddings[group] = self.pool(hidden, cu_seqlens, dims).cpu()
        return embeddings

    def about(self):
        """What a run prints: the type of the activations and the attention implementation."""
        kernel = varlen_kernel(self.device.type, self.dtype)
        attention = kernel.__name__ if kernel else "scaled_dot_product_attention"
        return {"activations": str(self.dtype).removeprefix("torch."), "attention": attention}

    def compile_blocks(self):
        """Lets torch.compile fuse the operations of a block. Blocks are all alike, so one
        compilation serves them all; shapes are dynamic, so it serves all batches."""
        if self.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            raise InputError("--compile needs a C++ compiler on a CPU: install g++")
        for layer in self.encoder.layers:
            if varlen_kernel(self.device.type, self.dtype) is None:
                # every batch has other groups of lengths, and would be compiled anew
                layer.attn.packed_attention = torch.compiler.disable(packed_attention)
            layer.compile(dynamic=True)

    @classmethod
    def from_pretrained(cls, where, dtype=None, rope_factor=None, device="cpu"):
        """Opens a checkpoint, with or without MLM head: a directory of ours, a published one, one
        that transformers or SentenceTransformer wrote; or a name on the hub, which is downloaded.

        dtype: of the activations; None is the fast one on the device. rope_factor: Dynamic NTK with
        this s beyond the trained length, whatever the checkpoint says (the paper takes 2, the
        published files leave it open). Raises InputError for files that are missing, damaged, or do
        not fit together, and for rope_factor out of range."""
        return open_model(cls, where, dtype, rope_factor, device)

    def save_pretrained(self, directory):
        """Writes a directory that AutoModel, AutoTokenizer and SentenceTransformer open."""
        save_model(directory, self, self, "NomicBertModel")


def mean_pool(hidden, cu_seqlens):
    """The mean of each text's hidden states, [CLS], [SEP] and prefix included: (N, C) -> (B, C).

    Adds up in float64, since a running sum of 8,192 float32 numbers may be wrong in the fourth
    digit, and returns float32, or float64 if the hidden states are float64."""
    lengths = move_to_device(cu_seqlens, hidden.device).diff()  # (B,)
    text = torch.repeat_interleave(lengths, output_size=len(hidden))  # (N,): text of each token
    sums = torch.zeros(len(lengths), hidden.shape[1], dtype=torch.float64, device=hidden.device)
    means = sums.index_add(0, text, hidden.double()) / lengths[:, None]  # (B, C)
    return means.to(torch.promote_types(hidden.dtype, torch.float32))


# ------------------------------------------------------------------------------------------------
# The head of masked language modelling


class Transform(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x):
        return self.layer_norm(F.silu(self.dense(x)))  # BERT has GELU here


class Predictions(nn.Module):
    def __init__(self, config, word_embeddings):
        super().__init__()
        self.transform = Transform(config)
        self.decoder = Linear(config.hidden_size, config.vocab_size)
        initialize(self)
        self.decoder.weight = word_embeddings.weight  # tied

    def forward(self, x):
        return self.decoder(self.transform(x))


class NomicBertForMaskedLM(nn.Module):
    """The encoder with its head: packed tokens -> logits at masked positions."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.bert = NomicBert(config)
        predictions = Predictions(config, self.bert.embeddings.word_embeddings)
        self.cls = nn.ModuleDict({"predictions": predictions})

    def forward(self, tokens, cu_seqlens, positions):
        """tokens (N,), cu_seqlens (B + 1,), positions (M,) in the packed batch -> logits (M, V).

        Nothing is computed for other positions: in a small model the head is half the work."""
        hidden = self.bert(tokens, cu_seqlens).index_select(0, positions)  # (M, C)
        return self.cls["predictions"](hidden)

    @classmethod
    def from_pretrained(cls, where, dtype=None, rope_factor=None, device="cpu"):
        """As NomicBert.from_pretrained. Raises InputError where there is no MLM head, as well."""
        return open_model(cls, where, dtype, rope_factor, device)

    def save_pretrained(self, directory):
        """Writes a directory that AutoModelForMaskedLM opens, and those that open an encoder."""
        save_model(directory, self, self.bert, "NomicBertForMaskedLM")


# ------------------------------------------------------------------------------------------------
# Checkpoints


def open_model(cls, where, dtype, rope_factor, device):
    """The model of class cls that a directory or a name on the hub holds."""
    directory = checkpoint.find_checkpoint(where)
    config = ModelConfig(**checkpoint.read_config(directory))
    if rope_factor is not None:
        if not 1 <= rope_factor <= 1000:
            raise InputError(f"rope_factor={rope_factor}: give a number from 1 to 1000")
        config.rope_scaling, config.rope_factor = "dynamic", rope_factor
    weights = checkpoint.read_weights(directory)
    head = {name: weights.pop(name) for name in list(weights) if name.startswith("cls.")}
    with torch.device("meta"):  # shapes without memory
        model = encoder = cls(config)
    if cls is NomicBertForMaskedLM:
        encoder = model.bert
        weights = {f"bert.{name}": weight for name, weight in weights.items()}
        weights |= checkpoint.read_head(head, weights, directory)
    checkpoint.check_weights(model.state_dict(), weights, directory)
    model.load_state_dict(weights, assign=True)
    if cls is NomicBertForMaskedLM:  # assigned apart from each other: tie them again
        model.cls["predictions"].decoder.weight = encoder.embeddings.word_embeddings.weight
    model.to(device)
    encoder.tokenizer = checkpoint.read_tokenizer(directory, config.vocab_size)
    encoder.dtype = dtype or fast_dtype(encoder.device)
    checkpoint.check_pooling(directory)
    return model.eval()


def save_model(directory, model, encoder, architecture):
    config, weights = asdict(model.config), model.state_dict()
    checkpoint.write_checkpoint(
        directory, config, weights, encoder.tokenizer, architecture, PROMPTS
    )
