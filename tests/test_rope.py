"""What rotary embeddings and their scalings promise."""

import math

import pytest
import torch

from rope import Rope, dynamic_ntk_base, frequencies, ntk_base, rope_angles, rotate

D = 64


def angles_of(length, rope):
    """The angles of one text alone: (length, D/2)."""
    return rope_angles(torch.tensor([0, length], dtype=torch.int32), length, D, rope)


def base_behind(frequency):
    """The base that gives a vector of frequencies: its last is base ^ -((D - 2) / D)."""
    return frequency[-1].double() ** (-D / (D - 2))


def test_rotary_attention_depends_only_on_distance():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, D, generator=generator, dtype=torch.float64)
    angles = angles_of(200, Rope()).double()

    def score(i, j):
        q = rotate(query[None], angles[i : i + 1].cos(), angles[i : i + 1].sin())
        k = rotate(key[None], angles[j : j + 1].cos(), angles[j : j + 1].sin())
        return (q * k).sum().item()

    for distance in (0, 1, 17, 99):
        assert score(100, 100 - distance) == pytest.approx(score(199, 199 - distance), abs=1e-4)
    assert score(100, 99) != pytest.approx(score(99, 100), abs=1e-4), "before and after differ"


def test_rotation_keeps_lengths_and_leaves_position_zero_alone():
    x = torch.randn(5, 3, D)
    angles = angles_of(5, Rope())
    turned = rotate(x, angles.cos(), angles.sin())
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    assert torch.equal(turned[0], x[0])


def test_pairs_turn_from_one_radian_per_token_down_to_about_one_over_base():
    frequency = frequencies(torch.tensor(1000.0, dtype=torch.float64), D)
    assert frequency[0] == 1.0
    assert frequency[-1] == pytest.approx(1000 ** (-62 / 64))
    for i in range(D // 2):
        assert frequency[i] == pytest.approx(1000 ** (-2 * i / D))


def test_every_text_of_a_packed_batch_counts_from_zero():
    lengths = [3, 1, 7]
    cu_seqlens = torch.tensor([0, 3, 4, 11], dtype=torch.int32)
    packed = rope_angles(cu_seqlens, 11, D, Rope())
    alone = torch.cat([angles_of(length, Rope()) for length in lengths])
    assert torch.equal(packed, alone)


def test_linear_scaling_divides_positions():
    plain, linear = Rope(scaling="none"), Rope(scaling="linear", factor=4.0)
    assert torch.allclose(angles_of(401, linear)[400], angles_of(401, plain)[100], atol=1e-5)


def test_ntk_slows_the_slowest_pair_by_the_factor_and_the_fastest_not_at_all():
    base = torch.tensor(1000.0, dtype=torch.float64)
    plain, scaled = frequencies(base, D), frequencies(ntk_base(base, 8.0, D), D)
    assert scaled[0] == plain[0]
    assert (plain[-1] / scaled[-1]).item() == pytest.approx(8.0)
    ratio = plain / scaled
    assert (ratio.diff() > 0).all(), "in between, the slower the pair the more it is slowed"


def test_dynamic_ntk_equals_plain_rope_up_to_the_trained_length():
    dynamic, plain = Rope(scaling="dynamic"), Rope(scaling="none")
    for length in (1, 77, 2047, 2048):
        assert torch.equal(angles_of(length, dynamic), angles_of(length, plain))


@pytest.mark.parametrize(("length", "base"), [(4096, 3108.22), (8192, 7453.48)])
def test_dynamic_ntk_has_the_published_base_beyond_it(length, base):
    """s = 2, trained at 2,048, head size 64: eq. 5."""
    rope = Rope(base=1000.0, trained_length=2048, scaling="dynamic", factor=2.0)
    assert base_behind(angles_of(length, rope)[1]) == pytest.approx(base, rel=1e-4)
    expected = 1000 * (2 * length / 2048 - 1) ** (64 / 62)
    assert expected == pytest.approx(base, abs=0.01)


def test_dynamic_ntk_does_not_jump_at_the_trained_length():
    base = torch.tensor([1000.0], dtype=torch.float64)
    for s in (1, 2, 4):
        just_beyond = dynamic_ntk_base(base, torch.tensor([2049.0]), 2048, s, D)
        assert just_beyond.item() == pytest.approx(1000 * (1 + s / 2048) ** (64 / 62))


def test_a_long_neighbour_does_not_change_a_text():
    """The published code takes the length of the padded batch, and remembers the longest ever."""
    cu_seqlens = torch.tensor([0, 100, 5100, 5200], dtype=torch.int32)
    packed = rope_angles(cu_seqlens, 5200, D, Rope())
    alone = angles_of(100, Rope())
    assert torch.equal(packed[:100], alone)
    assert torch.equal(packed[5100:], alone)
    assert torch.equal(packed[100:5100], angles_of(5000, Rope()))


def test_angles_are_precise_at_the_end_of_a_long_text():
    angles = angles_of(8192, Rope(scaling="none"))
    for i in (0, 1, 15, 31):
        exact = 8191 * 1000 ** (-2 * i / D)
        assert math.cos(exact) == pytest.approx(angles[-1, i].double().cos().item(), abs=1e-3)
