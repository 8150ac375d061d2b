"""What rotary embeddings and their scalings promise."""

import math

import pytest
import torch

from rope import Rope, dynamic_ntk_base, frequencies, ntk_base, rope_angles, rotate

D = 64


def angles_of(length, rope):
    """The angles of one text alone: (length, D/2)."""
    return rope_angles(torch.tensor([0, length], dtype=torch.int32), length, D, rope)


def test_a_pair_is_turned_by_its_angle():
    theta = torch.tensor([[0.7]])
    turned = rotate(torch.tensor([[1.0, 0.0]]), theta.cos(), theta.sin())
    assert turned.shape == (1, 2)
    assert turned[0].tolist() == pytest.approx([math.cos(0.7), math.sin(0.7)])


def test_a_pair_is_a_feature_of_each_half():
    """Pairs of neighbours would keep every property below, and not be the published model."""
    theta = torch.tensor([[0.3, 0.7, 1.1]])
    for i in range(3):
        turned = rotate(torch.eye(6)[[i]], theta.cos(), theta.sin())
        expected = torch.eye(6)[i] * theta[0, i].cos() + torch.eye(6)[i + 3] * theta[0, i].sin()
        torch.testing.assert_close(turned[0], expected)


@pytest.mark.parametrize("between", [(), (4,), (3, 2)])
def test_all_that_lies_between_n_and_d_turns_alike(between):
    """As many heads as tokens, too, where angles without dimensions of size 1 would still fit."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, *between, 6, generator=generator)
    theta = torch.rand(4, 3, generator=generator)
    turned = rotate(x, theta.cos(), theta.sin())
    assert turned.shape == x.shape
    for i, (a, b) in enumerate(zip(*x.chunk(2, dim=-1), strict=True)):
        cos, sin = theta[i].cos(), theta[i].sin()
        torch.testing.assert_close(turned[i], torch.cat((a * cos - b * sin, b * cos + a * sin), -1))


def test_the_score_of_query_and_key_depends_only_on_their_distance():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, D, generator=generator, dtype=torch.float64)
    angles = angles_of(200, Rope()).double()

    def turned(x, position):
        return rotate(x[None], angles[position, None].cos(), angles[position, None].sin())

    def score(i, j):
        return (turned(query, i) * turned(key, j)).sum().item()

    for distance in (0, 1, 17, 99):
        assert score(100, 100 - distance) == pytest.approx(score(199, 199 - distance), abs=1e-4)
    assert score(100, 99) != pytest.approx(score(99, 100), abs=1e-4), "before and after differ"


def test_linear_scaling_divides_positions():
    plain, linear = Rope(scaling="none"), Rope(scaling="linear", factor=4.0)
    assert torch.allclose(angles_of(401, linear)[400], angles_of(401, plain)[100], atol=1e-5)


def test_ntk_slows_the_slowest_pair_by_the_factor_and_the_fastest_not_at_all():
    base = torch.tensor(1000.0, dtype=torch.float64)
    ratio = frequencies(base, D) / frequencies(ntk_base(base, 8.0, D), D)
    assert ratio[0] == 1 and ratio[-1].item() == pytest.approx(8.0)
    assert (ratio.diff() > 0).all(), "in between, the slower the pair, the more it is slowed"


def test_dynamic_ntk_equals_plain_rope_up_to_the_trained_length():
    for length in (1, 77, 2047, 2048):
        assert torch.equal(angles_of(length, Rope()), angles_of(length, Rope(scaling="none")))


@pytest.mark.parametrize(("length", "base"), [(4096, 3108.22), (8192, 7453.48)])
def test_dynamic_ntk_has_the_published_base_beyond_the_trained_length(length, base):
    """Eq. 5 with s = 2, trained length 2,048, head size 64. The slowest frequency is
    base ^ -((D - 2) / D)."""
    slowest = angles_of(length, Rope(1000.0, 2048, "dynamic", 2.0))[1, -1].double()
    assert slowest ** (-D / (D - 2)) == pytest.approx(base, rel=1e-4)
    assert 1000 * (2 * length / 2048 - 1) ** (64 / 62) == pytest.approx(base, abs=0.01)


@pytest.mark.parametrize("s", [1, 2, 4])
def test_dynamic_ntk_does_not_jump_at_the_trained_length(s):
    base = torch.tensor([1000.0], dtype=torch.float64)
    just_beyond = dynamic_ntk_base(base, torch.tensor([2049.0]), 2048, s, D)
    assert just_beyond.item() == pytest.approx(1000 * (1 + s / 2048) ** (64 / 62))


def test_each_text_counts_from_zero_and_has_the_base_of_its_own_length():
    """The published code takes the length of the padded batch, and remembers the longest ever."""
    cu_seqlens = torch.tensor([0, 100, 5100, 5101, 5201], dtype=torch.int32)
    alone = torch.cat([angles_of(length, Rope()) for length in (100, 5000, 1, 100)])
    assert torch.equal(rope_angles(cu_seqlens, 5201, D, Rope()), alone)


def test_pair_i_turns_by_base_to_the_minus_2i_over_D_per_token_also_at_the_end_of_a_long_text():
    angles = angles_of(8192, Rope(scaling="none"))[-1].double()
    exact = [math.cos(8191 * 1000 ** (-2 * i / D)) for i in range(D // 2)]
    assert angles.cos().tolist() == pytest.approx(exact, abs=1e-3)
