"""NomicBert from scratch: the encoder of Nomic Embed (arXiv 2402.01613, sec. 4.1.2).

What differs from BERT (Devlin et al., arXiv 1810.04805):
- rotary positions instead of a table of positions (rope.py)
- SwiGLU instead of GELU in the feed-forward layers (Shazeer, arXiv 2002.05202)
- no biases in linear layers; dropout 0 (the released code leaves its hidden dropout at 0.1)
- a vocabulary padded to a multiple of 64

What it keeps: post-norm, token type embeddings (type 0 everywhere), an MLM head whose last matrix
is the table of word embeddings.

What differs from most PyTorch code: there is no padding and no attention mask. A batch is one
packed stream of N tokens, and cu_seqlens says where its texts begin. Embeddings, norms and linear
layers work on (N, C); only attention and pooling look at texts. Nothing is computed for padding,
and no text's embedding depends on what it was batched with.

Shapes: N tokens in the packed batch, B texts, H heads, D head size, C = H * D hidden size,
V vocabulary, M masked places. Modules have the names of the published checkpoints.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from tqdm import tqdm

import checkpoint
import export
from attention import attention, choose, packing
from data.store import cut, micro_batches, pack, send
from options import InputError
from processes import fast_dtype
from rope import Rope, rope_angles, rotate


@dataclass
class Config:
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
    mlm_head_bias: bool = False  # transformers' own head has biases, the published one has none

    @property
    def head_size(self):
        return self.hidden_size // self.num_attention_heads


# ------------------------------------------------------------------------------------------------
# Precision. Weights are float32; each layer casts them to the type of its input. That type is set
# at one place, behind the embeddings, and from there a reader can follow it: there is no autocast.


class Linear(nn.Linear):
    """x W^T in the type of x. No bias, but in the MLM head of some checkpoints."""

    def __init__(self, in_features, out_features, bias=False):
        super().__init__(in_features, out_features, bias=bias)

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class LayerNorm(nn.LayerNorm):
    """With weight and bias, in the type of x."""

    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def initialize(module):
    """Normal with standard deviation 0.02, as BERT's; norms begin with weight 1 and bias 0."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=0.02)


# ------------------------------------------------------------------------------------------------
# A block


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.head_size = config.num_attention_heads, config.head_size
        self.Wqkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, cos, sin, packing):
        q, k, v = self.Wqkv(x).view(-1, 3, self.heads, self.head_size).unbind(1)  # (N, H, D) each
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return self.out_proj(attention(q, k, v, packing).flatten(1))  # (N, C)


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

    def forward(self, x, cos, sin, packing):
        x = self.norm1(x + self.attn(x, cos, sin, packing))
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
        self.dtype = torch.float32  # of the activations
        self.attention = "auto"  # the way to compute it (attention.py)
        self.tokenizer = None  # for `encode` and `save_pretrained`
        self.layer_norm = False  # of embeddings, before their first dimensions are taken
        initialize(self)

    @property
    def device(self):
        return self.emb_ln.weight.device

    def forward(self, tokens, cu_seqlens):
        """The hidden states of the last layer.

        tokens (N,) int64; cu_seqlens (B + 1,) int32, where each text begins and the last ends (on
        the CPU it spares a GPU a pause) -> (N, C) in self.dtype."""
        way = choose(self.attention, tokens.device, self.dtype)
        order, texts = packing(cu_seqlens, way, tokens.device)  # where the texts are
        angles = rope_angles(texts.cu_seqlens, len(tokens), self.config.head_size, self.rope)
        if order is not None:
            tokens, angles = tokens[order], angles[order]  # (N,), (N, D/2)
        x = self.emb_ln(self.embeddings(tokens)).to(self.dtype)  # (N, C)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.encoder.layers:
            x = layer(x, cos, sin, texts)
        return x if order is None else torch.empty_like(x).index_copy(0, order, x)

    def embed(self, tokens, cu_seqlens):
        """Embeddings of a packed batch: (B, C) float32, unit length."""
        return self.pool(self(tokens, cu_seqlens), cu_seqlens)

    def pool(self, hidden, cu_seqlens, dims=None):
        """The mean of each text's hidden states at unit length (sec. 3.1): (N, C) -> (B, dims).

        dims: the first dimensions only (Matryoshka)."""
        x = mean_pool(hidden, cu_seqlens)  # (B, C)
        if self.layer_norm:  # of nomic-embed-text-v1.5: no weights, so it takes off x's mean
            x = F.layer_norm(x, x.shape[1:])
        return F.normalize(x[:, :dims], dim=-1)

    @torch.no_grad()
    def encode(self, texts, max_tokens=checkpoint.MAX_TOKENS, dims=None, micro_batch_tokens=None):
        """Embeddings of a list of strings, in its order: (n, dims) float32 numpy, unit length.

        A task prefix such as "search_query: " is part of the text. Texts are cut to max_tokens;
        beyond the trained length RoPE scales as `self.rope` says. dims: the first dimensions only,
        after Matryoshka; None is all. micro_batch_tokens: how many go through the model at once;
        None is what suits the device. Raises InputError for dims out of range, a string in place
        of a list, a model without tokenizer."""
        size = self.config.hidden_size
        if dims is not None and not 0 < dims <= size:
            raise InputError(f"dims={dims}: embeddings of this model have {size} dimensions")
        if isinstance(texts, str):
            raise InputError("encode takes a list of texts: write [text]")
        if self.tokenizer is None:
            raise InputError("there was no tokenizer.json beside the model: set model.tokenizer")
        texts = list(texts)
        texts = [
            cut(np.array(encoding.ids), max_tokens)
            for start in range(0, len(texts), 10_000)  # an encoding takes more memory than its ids
            for encoding in self.tokenizer.encode_batch_fast(texts[start : start + 10_000])
        ]
        embeddings = np.empty((len(texts), dims or size), np.float32)
        # a CPU is fastest while activations stay in its cache, a GPU while all of it has work
        at_once = micro_batch_tokens or (2048 if self.device.type == "cpu" else 65_536)
        groups = micro_batches([len(text) for text in texts], at_once) if texts else []
        cast = {n: p.to(self.dtype) for n, p in self.named_parameters() if n.startswith("encoder.")}
        for group in tqdm(groups, "encoding", disable=len(groups) < 100 or None, leave=False):
            tokens, cu_seqlens = pack([texts[i] for i in group], self.device)
            # self(tokens, cu_seqlens), but the weights are cast once and not at every call
            hidden = functional_call(self, cast, (tokens, cu_seqlens))
            embeddings[group] = self.pool(hidden, cu_seqlens, dims).cpu()
        return embeddings

    @classmethod
    def from_pretrained(cls, where, dtype=None, rope_factor=None, device="cpu"):
        """Opens a checkpoint, with or without MLM head: a directory of ours, a published one, one
        that transformers or SentenceTransformer wrote; or a name on the hub, which is downloaded.

        dtype: of the activations; None is the fast one on the device. rope_factor: Dynamic NTK with
        this s beyond the trained length, whatever the checkpoint says (the paper takes 2, the
        published files leave it open). Raises InputError for files missing, damaged, or not fitting
        together."""
        return open_model(cls, where, dtype, rope_factor, device)

    def save_pretrained(self, directory):
        """Writes a directory that AutoModel, AutoTokenizer and SentenceTransformer open."""
        export.write_checkpoint(directory, self, self, "NomicBertModel")


def mean_pool(hidden, cu_seqlens):
    """The mean of each text's hidden states, [CLS], [SEP] and prefix included: (N, C) -> (B, C)
    float32, or float64 if these are."""
    lengths = send(cu_seqlens, hidden.device).diff()  # (B,)
    text = torch.repeat_interleave(lengths, output_size=len(hidden))  # (N,): the number of its text
    full = torch.promote_types(hidden.dtype, torch.float32)
    # a running sum of 8,192 float32 numbers loses digits, which training does not feel
    exact = full if torch.is_grad_enabled() else torch.float64
    sums = torch.zeros(len(lengths), hidden.shape[1], dtype=exact, device=hidden.device)
    return (sums.index_add(0, text, hidden.to(exact)) / lengths[:, None]).to(full)


# ------------------------------------------------------------------------------------------------
# The head of masked language modelling


class Transform(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, config.mlm_head_bias)
        self.layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x):
        return self.layer_norm(F.silu(self.dense(x)))  # BERT has GELU here


class Predictions(nn.Module):
    def __init__(self, config, word_embeddings):
        super().__init__()
        self.transform = Transform(config)
        self.decoder = Linear(config.hidden_size, config.vocab_size, config.mlm_head_bias)
        initialize(self)
        self.decoder.weight = word_embeddings.weight  # tied

    def forward(self, x):
        return self.decoder(self.transform(x))


class NomicBertForMaskedLM(nn.Module):
    """The encoder with its head: packed tokens -> scores of the vocabulary at masked places."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.bert = NomicBert(config)
        predictions = Predictions(config, self.bert.embeddings.word_embeddings)
        self.cls = nn.ModuleDict({"predictions": predictions})

    def forward(self, tokens, cu_seqlens, places):
        """tokens (N,), cu_seqlens (B + 1,), places (M,) in the packed batch -> (M, V).

        Nothing is computed for other places: of a small model the head is half the work."""
        return self.cls["predictions"](self.bert(tokens, cu_seqlens).index_select(0, places))

    @classmethod
    def from_pretrained(cls, where, dtype=None, rope_factor=None, device="cpu"):
        """As `NomicBert.from_pretrained`. Raises InputError where there is no MLM head, as well."""
        return open_model(cls, where, dtype, rope_factor, device)

    def save_pretrained(self, directory):
        """Writes a directory that AutoModelForMaskedLM opens, and those that open an encoder."""
        export.write_checkpoint(directory, self, self.bert, "NomicBertForMaskedLM")


# ------------------------------------------------------------------------------------------------
# Opening a checkpoint


def open_model(cls, where, dtype, rope_factor, device):
    """The model of class cls that a directory or a name on the hub holds."""
    directory = checkpoint.find(where)
    config = Config(**checkpoint.read_config(directory))
    weights = checkpoint.read_weights(directory)
    if rope_factor is not None:
        config.rope_scaling, config.rope_factor = "dynamic", rope_factor
    head = {name: weights.pop(name) for name in list(weights) if name.startswith("cls.")}
    masked = cls is NomicBertForMaskedLM
    if masked:
        weights = {f"bert.{name}": weight for name, weight in weights.items()}
        weights |= checkpoint.read_head(head, config, weights, directory)
    model = checkpoint.build(cls, config, weights, directory)
    encoder = model.bert if masked else model
    if masked:
        model.cls.predictions.decoder.weight = encoder.embeddings.word_embeddings.weight  # tied
    model.to(device)
    encoder.tokenizer = checkpoint.read_tokenizer(directory, config.vocab_size)
    encoder.dtype = dtype or fast_dtype(encoder.device)
    encoder.layer_norm = checkpoint.read_modules(directory)
    return model
