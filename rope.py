"""Rotary position embeddings (RoPE), and ways to read texts longer than any that training saw.

RoPE (Su et al., arXiv 2104.09864) turns each pair of features of a query or key by an angle that
grows with its position: angle = position * frequency. The dot product of two turned vectors then
depends on the distance between them, and not on where they stand. The D/2 pairs of a head turn at
different speeds,

    frequency_i = base ^ (-2i / D),    i = 0 ... D/2 - 1

from one radian per token down to about 1 / base: fast pairs tell neighbours apart, slow ones tell
beginning from end. Nomic Embed (arXiv 2402.01613, from here on "the paper") trains with base 1,000
at up to 2,048 tokens (sec. 3.4). Beyond that length the slow pairs reach angles that the model
never saw in training, and its quality collapses. Three changes help without training:

    linear    divide positions by a factor (position interpolation, arXiv 2306.15595). The slow
              pairs stay in the range that was trained, but the fast ones lose their resolution
    ntk       raise the base (NTK-aware scaling): the slowest pair is slowed by the factor, the
              fastest not at all
    dynamic   ntk, with the factor that each text's own length asks for (Dynamic NTK, the paper's
              eq. 5). Texts up to the trained length are left as they are

In the published code the scaling follows the length of the padded batch, and the table of angles
only grows. So an embedding depends on the other texts of its batch and on earlier batches. Here it
depends on the text alone.

The sequences of a batch stand one behind the other, N tokens in all, without padding. cu_seqlens
(B + 1,) says where each of the B sequences begins, and where the last one ends (model.py).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rope:
    """How positions become angles."""

    base: float = 1000.0
    trained_length: int = 2048  # tokens
    scaling: str = "dynamic"  # "none", "linear", "ntk" or "dynamic"
    factor: float = 2.0  # of linear and ntk; s of eq. 5 for dynamic: 2 in the paper (sec. 5.2.2)


def frequencies(base, head_size):
    """Radians per token of each pair, base ^ (-2i / D): (...,) -> (..., D/2)."""
    exponents = torch.arange(0, head_size, 2, device=base.device, dtype=base.dtype) / head_size
    return 1.0 / base[..., None] ** exponents


def ntk_base(base, factor, head_size):
    """The base with which the slowest pair, of frequency base ^ -((D - 2) / D), turns `factor`
    times slower."""
    return base * factor ** (head_size / (head_size - 2))


def dynamic_ntk_base(base, length, trained_length, s, head_size):
    """Eq. 5: base * (s * L / L_trained - (s - 1)) ^ (D / (D - 2)) where L > L_trained, else base.

    The factor is 1 at L = L_trained, so nothing jumps there. length: (B,) -> (B,)."""
    factor = s * length / trained_length - (s - 1)
    return ntk_base(base, factor.clamp(min=1.0), head_size)


def rope_angles(cu_seqlens, N, head_size, rope):
    """The angle of each pair of each token: cu_seqlens (B + 1,) -> (N, D/2), in radians.

    Computed once in a forward pass; all layers and heads share it. In float32, with the operations
    in the order of the published code: at position 8,192 the rounding of a frequency changes the
    angle by up to a thousandth of a radian, which would change an embedding's fifth digit."""
    starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()  # (B,)
    sequence = torch.repeat_interleave(lengths, output_size=N)  # (N,): which one a token is in
    position = torch.arange(N, device=lengths.device) - starts[sequence]  # (N,): from 0 in each
    base = torch.full_like(lengths, rope.base, dtype=torch.float32)  # (B,)
    if rope.scaling == "ntk":
        base = ntk_base(base, rope.factor, head_size)
    elif rope.scaling == "dynamic":
        length = lengths.float()
        base = dynamic_ntk_base(base, length, rope.trained_length, rope.factor, head_size)
    frequency = frequencies(base, head_size)  # (B, D/2)
    if rope.scaling == "linear":
        frequency = frequency / rope.factor
    return position[:, None] * frequency[sequence]


def rotate(x, cos, sin):
    """Turns the pairs (x_i, x_(i + D/2)) of the last dimension by their angles.

    x: (N, ..., D); cos, sin: (N, D/2). In this form ("rotate half", as GPT-NeoX) a pair is not two
    neighbours, but one feature of the first half with one of the second."""
    shape = (len(x), *[1] * (x.dim() - 2), -1)  # all that lies between N and D turns alike
    cos, sin = cos.view(shape), sin.view(shape)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
