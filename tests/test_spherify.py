import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from spherify import (add_noise, angle_between, angle_to_sigma, logit_normal_sigmas, official_sigmas,
                      sample_noise, sigma_to_angle, slerp, spherify, step_schedule, truncate_noise,
                      uniform_sigmas)

N_DRAWS = 100_000


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_drawn_from(cdf, draws):
    """A Kolmogorov-Smirnov test that 999 of 1,000 right samplers pass (ours are seeded)."""
    assert stats.kstest(np.asarray(draws, dtype=np.float64), cdf).statistic < 1.95 / math.sqrt(len(draws))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1)


# ---- spherify ----


@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 3), (4, 256, 8), (2, 3, 4, 5), (1, 1024, 64)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-5),
                                              (torch.bfloat16, 2**-8)])
def test_spherify_radius_is_sqrt_L(shape, dtype, tolerance):
    v = spherify(3 * normal(*shape, dtype=dtype))
    radius = v.double().flatten(1).norm(dim=1).numpy()
    assert v.dtype == dtype and v.shape == shape
    assert radius == pytest.approx(math.sqrt(math.prod(shape[1:])), rel=tolerance, abs=0)


def test_spherify_rounds_only_its_result_to_bf16():
    z = 3 * normal(8, 4096, dtype=torch.bfloat16)
    assert torch.equal(spherify(z), spherify(z.float()).bfloat16())


def test_autocast_changes_neither_spherify_nor_add_noise():
    v, e = normal(2, 9, 5), normal(2, 9, 5, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = spherify(v), add_noise(v, 2.0, e)
    assert torch.equal(inside[0], spherify(v)) and torch.equal(inside[1], add_noise(v, 2.0, e))


def test_zero_stays_zero_with_finite_gradient():
    z = torch.zeros(2, 3, 4, requires_grad=True)
    spherify(z).sum().backward()
    assert torch.equal(spherify(z), torch.zeros(2, 3, 4)) and z.grad.isfinite().all()


@pytest.mark.parametrize("rms", [1e-4, 1e-3, 0.1, 0.3, 10.0])
def test_spherify_radius_falls_only_for_tiny_latents_as_its_formula_says(rms):
    z = torch.full((1, 50), rms, dtype=torch.float64)
    expected = math.sqrt(50) * rms / math.sqrt(rms**2 + 1e-6)
    assert spherify(z).norm().item() == pytest.approx(expected, rel=1e-12)
    assert rms < 0.3 or expected == pytest.approx(math.sqrt(50), rel=1e-5)


def test_spherify_commutes_with_rotations_of_the_whole_latent():
    z = normal(3, 5, 4, dtype=torch.float64)                # so not every token is normalised by itself
    rotation = torch.linalg.qr(normal(20, 20, seed=1, dtype=torch.float64)).Q
    rotated = lambda z: (z.flatten(1) @ rotation).view_as(z)
    torch.testing.assert_close(spherify(rotated(z)), rotated(spherify(z)), rtol=1e-10, atol=1e-10)


def test_gradients_of_spherify_and_add_noise_are_exact():
    z = normal(2, 3, 4, dtype=torch.float64).requires_grad_()
    sigma = torch.tensor([0.5, 3.0], dtype=torch.float64, requires_grad=True)
    e = normal(2, 3, 4, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(spherify, z)
    assert torch.autograd.gradcheck(lambda z, sigma: add_noise(spherify(z), sigma, e), (z, sigma))


# ---- noise ----


@pytest.mark.parametrize("alpha", [10.0, 45.0, 80.0, 85.0, 89.0])
def test_noise_angle_is_arctan_sigma(alpha):
    v, e = spherify(normal(4, 1024, 64)), normal(4, 1024, 64, seed=1)
    cosine = torch.cosine_similarity(v.flatten(1), add_noise(v, angle_to_sigma(alpha), e).flatten(1))
    # At L = 65,536 the angle of v and e itself scatters by 1 / sqrt(L) = 0.22 degrees about 90; 4 deviations.
    assert torch.rad2deg(torch.acos(cosine)).numpy() == pytest.approx(alpha, abs=0.9)


def test_noisy_latents_stay_on_the_sphere_each_with_its_own_sigma_and_zero_leaves_them():
    v, e, sigma = spherify(normal(3, 6, 5)), normal(3, 6, 5, seed=1), torch.tensor([0.0, 1.0, 5.0])
    noisy = add_noise(v, sigma, e)
    assert noisy.flatten(1).norm(dim=1).numpy() == pytest.approx(math.sqrt(30), rel=1e-5)
    torch.testing.assert_close(noisy[0], v[0], rtol=1e-5, atol=0)
    alone = [add_noise(v[i:i + 1], sigma[i].item(), e[i:i + 1]) for i in range(3)]
    torch.testing.assert_close(noisy, torch.cat(alone))


def test_noise_of_equal_direction_lies_on_one_great_circle():
    v, e = spherify(normal(1, 30, dtype=torch.float64)), normal(1, 30, seed=1, dtype=torch.float64)
    points = torch.cat([v, add_noise(v, 0.7, e), add_noise(v, 5.0, e)])
    assert torch.linalg.matrix_rank(points) == 2


def test_angles_and_sigmas_are_inverse():
    assert angle_to_sigma(80.0) == pytest.approx(5.6712818, rel=1e-7)
    assert angle_to_sigma(45.0) == pytest.approx(1.0)
    alphas = torch.linspace(0, 89.9, 50, dtype=torch.float64)
    torch.testing.assert_close(sigma_to_angle(angle_to_sigma(alphas)), alphas)
    assert [sigma_to_angle(angle_to_sigma(a)) for a in (0.0, 12.5, 89.0)] == pytest.approx([0.0, 12.5, 89.0])


# ---- noise magnitudes ----


def test_sigma_is_uniform_up_to_sigma_max_and_sub_noise_a_uniform_half_of_it(generator):
    sigma, sigma_sub = uniform_sigmas(N_DRAWS, 80.0, generator=generator)
    assert_drawn_from(stats.uniform(0, angle_to_sigma(80.0)).cdf, sigma)
    x = lambda t: np.clip(t / (0.5 * angle_to_sigma(80.0)), 1e-12, 1)
    product_of_two_uniforms = lambda t: x(t) * (1 - np.log(x(t)))
    assert_drawn_from(product_of_two_uniforms, sigma_sub)


@pytest.mark.parametrize("hard_prob", [0.0, 0.1, 1.0])
def test_hard_draws_are_a_tenth_and_uniform_over_the_whole_band(generator, hard_prob):
    sigma, _ = uniform_sigmas(N_DRAWS, 80.0, 85.0, hard_prob, generator=generator)
    low, high = angle_to_sigma(80.0), angle_to_sigma(85.0)
    hard = lambda t: np.clip((t - low) / (high - low), 0, 1)
    assert_drawn_from(lambda t: (1 - hard_prob) * np.clip(t / low, 0, 1) + hard_prob * hard(t), sigma)
    if hard_prob in (0.0, 1.0):
        assert ((sigma > low) == hard_prob).all()           # never and always
    assert hard_prob == 0 or 84.99 < sigma_to_angle(sigma.max().item()) <= 85.0


def test_the_text_of_c2_draws_angles_uniformly_below_and_within_the_hard_band(generator):
    again = generator.clone_state()
    sigma, sigma_sub = uniform_sigmas(N_DRAWS, 85.0, 89.0, 0.1, "angle", generator)
    angle, hard = sigma_to_angle(sigma.double()), sigma > angle_to_sigma(85.0)
    assert abs(hard.double().mean() - 0.1) < 4 * math.sqrt(0.09 / N_DRAWS)
    assert_drawn_from(stats.uniform(0, 85).cdf, angle[~hard])
    assert_drawn_from(stats.uniform(85, 4).cdf, angle[hard])
    assert_drawn_from(stats.uniform(0, 0.5).cdf, (sigma_sub / sigma)[sigma > 0])
    uniform_in_sigma = uniform_sigmas(N_DRAWS, 85.0, 89.0, 0.1, generator=again)[0]
    above_87 = [(x[hard] > angle_to_sigma(87.0)).double().mean().item() for x in (sigma, uniform_in_sigma)]
    assert above_87 == pytest.approx([0.5, 0.83], abs=0.03)
    with pytest.raises(ValueError, match="mapping"):
        uniform_sigmas(4, 85.0, mapping="radius")


def test_official_hard_draws_reach_a_tenth_of_the_band_and_leave_the_small_noise(generator):
    again = generator.clone_state()
    sigma, sigma_sub = official_sigmas(N_DRAWS, 80.0, 85.0, generator=generator)
    base, base_sub = official_sigmas(N_DRAWS, 80.0, generator=again)
    low, high = angle_to_sigma(80.0), angle_to_sigma(85.0)
    hard = sigma > low
    assert abs(hard.double().mean() - 0.1) < 4 * math.sqrt(0.09 / N_DRAWS)
    assert_drawn_from(stats.uniform(low, 0.1 * (high - low)).cdf, sigma[hard])
    assert sigma_to_angle(sigma.max().item()) == pytest.approx(80.9, abs=0.02)
    assert torch.equal(sigma[~hard], base[~hard]) and torch.equal(sigma_sub, base_sub)


@pytest.mark.parametrize("draw, alpha_hard", [(uniform_sigmas, 85.0), (official_sigmas, None)])
def test_small_noise_is_at_most_half_the_large_noise_of_the_same_sample(generator, draw, alpha_hard):
    sigma, sigma_sub = draw(N_DRAWS, 80.0, alpha_hard, 0.5, generator=generator)
    ratio, hard = (sigma_sub / sigma)[sigma > 0], sigma[sigma > 0] > angle_to_sigma(80.0)
    assert (sigma_sub <= 0.5 * sigma).all() and hard.any() == (alpha_hard is not None)
    assert_drawn_from(stats.uniform(0, 0.5).cdf, ratio)
    if hard.any():                                          # s times the hard sigma, not the one it replaces
        assert_drawn_from(stats.uniform(0, 0.5).cdf, ratio[hard])


def test_official_draws_hit_every_stratum_once_and_both_ends(generator):
    r = official_sigmas(42, 45.0, generator=generator)[0].sort().values
    assert r[0] == 0 and r[-1] == pytest.approx(1)
    assert torch.equal((r[1:-1] * 40).floor(), torch.arange(40.0))
    sigma, sigma_sub = official_sigmas(42, 45.0, generator=generator)
    s = (sigma_sub / sigma)[sigma > 0].sort().values * 2 * 40               # s is spread in the same way
    assert ((s[1:] - s[:-1]) < 4).all() and s[0] < 3 and s[-1] > 37


def test_logit_normal_draws_are_the_larger_and_smaller_of_two(generator):
    sigma, sigma_sub = logit_normal_sigmas(N_DRAWS, 85.0, mean=-0.5, std=1.5, generator=generator)
    one = lambda t: stats.norm(-0.5, 1.5).cdf(special.logit(np.clip(t / angle_to_sigma(85.0), 0, 1)))
    assert (sigma >= sigma_sub).all()
    assert_drawn_from(lambda t: one(t) ** 2, sigma)
    assert_drawn_from(lambda t: 1 - (1 - one(t)) ** 2, sigma_sub)


def test_logit_normal_draws_are_linear_in_sigma_or_in_the_angle():
    of_sigma, of_angle = (torch.stack(logit_normal_sigmas(1000, 85.0, 0.3, 1.2, mapping,
                                                          torch.Generator().manual_seed(1)))
                          for mapping in ("sigma", "angle"))
    torch.testing.assert_close(sigma_to_angle(of_angle) / 85, of_sigma / angle_to_sigma(85.0), rtol=1e-4,
                               atol=1e-5)


# ---- schedule and seeded noise ----


def test_schedule_ends_where_equation_13_says():
    assert step_schedule(4, 1.0).tolist() == pytest.approx([2 / 3, 1 / 3, 0.0])
    assert step_schedule(5, 2.0).tolist() == pytest.approx([9 / 16, 4 / 16, 1 / 16, 0.0])
    assert step_schedule(6, 0.0).tolist() == [1.0] * 5                      # also at t = T, where 0^0 stands
    assert step_schedule(1, 1.0).tolist() == []
    # the official code's, at 1 / T
    torch.testing.assert_close(step_schedule(5, 1, "released"), torch.tensor([0.8, 0.6, 0.4, 0.2]))
    assert torch.equal(step_schedule(5, 0, "released"), torch.ones(4))
    with pytest.raises(ValueError, match="linear"):
        step_schedule(5, 1, "linear")


def test_noise_of_a_sample_depends_on_seed_and_index_alone():
    whole = sample_noise(7, 0, 16, (5, 3), draws=4)
    parts = torch.cat([sample_noise(7, first, min(3, 16 - first), (5, 3), draws=4)
                       for first in range(0, 16, 3)], dim=1)
    assert torch.equal(whole, parts)
    assert torch.equal(whole[:1], sample_noise(7, 0, 16, (5, 3)))           # however many draws follow
    reference = np.random.Generator(np.random.Philox(key=[7, 9])).standard_normal((4, 5, 3), dtype=np.float32)
    assert np.array_equal(whole[:, 9].numpy(), reference)


def test_noise_is_standard_normal_and_differs_between_seeds_indices_and_draws():
    assert_drawn_from(stats.norm.cdf, sample_noise(0, 0, 100, (1000,)).flatten())
    seeds = [0, 1, 2**32, 2**32 + 1, 2**64 - 1]
    vectors = torch.cat([sample_noise(seed, 0, 2, (6,), draws=2).flatten(0, 1) for seed in seeds])
    assert len(torch.unique(vectors, dim=0)) == len(vectors) == 20


@pytest.mark.parametrize("call, named", [
    (lambda: angle_to_sigma(90.0), "90.0"), (lambda: angle_to_sigma(torch.tensor([10.0, math.nan])), ".*nan"),
    (lambda: uniform_sigmas(4, 80.0, 70.0), "70.0"), (lambda: official_sigmas(2, 80.0), "2"),
    (lambda: logit_normal_sigmas(4, 95.0, mapping="angle"), "95.0"),
    (lambda: logit_normal_sigmas(4, 85.0, mapping="cosine"), "'cosine'"),
    (lambda: truncate_noise(torch.zeros(2), 0.0), "0.0"), (lambda: step_schedule(4, -1.0), "4, -1.0"),
    (lambda: sample_noise(-1, 0, 1, (2,)), "-1"), (lambda: sample_noise(2**64, 0, 1, (2,)), str(2**64))])
def test_bad_input_is_a_value_error_that_names_the_value(call, named):
    with pytest.raises(ValueError, match=f"got {named}"):
        call()


def test_slerp_keeps_the_radius_and_turns_at_constant_speed_around_the_whole_sphere():
    v0, v1 = spherify(normal(3, 5, 7)), spherify(normal(3, 5, 7, seed=1))
    points = [slerp(v0, v1, w) for w in torch.linspace(0, 1, 6)]
    torch.testing.assert_close(points[0], v0, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(points[-1], v1, rtol=1e-4, atol=1e-5)
    for point in points:
        torch.testing.assert_close(point.flatten(1).norm(dim=1), torch.full((3,), math.sqrt(35)))
    angle = lambda a, b: torch.cosine_similarity(a.flatten(1), b.flatten(1)).acos()
    for a, b in zip(points, points[1:]):
        torch.testing.assert_close(angle(a, b), angle(v0, v1) / 5, rtol=1e-3, atol=1e-4)
    assert (points[2].norm(dim=2) - v0.norm(dim=2)).abs().max() > 0.01      # no token keeps its own radius
    weights = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(slerp(v0, v1, weights)[1], slerp(v0, v1, 0.5)[1])


def test_angles_are_those_of_whole_latents_and_never_nan():
    v = spherify(normal(4, 5, 7))
    turned = torch.stack([v[0], -v[1], v[2].flip(0), v[3] + 0])
    expected = [0, 180, math.degrees(math.acos((v[2] * v[2].flip(0)).sum() / 35)), 0]
    assert angle_between(v, turned).numpy() == pytest.approx(expected, rel=1e-4, abs=0.1)


def test_truncated_noise_keeps_every_numbers_rank_within_the_truncated_normal():
    e = normal(50_000).double()
    for bound in (0.1, 1.0, 3.0):
        moved = truncate_noise(e, bound)
        expected = stats.truncnorm(-bound, bound).ppf(stats.norm.cdf(e.numpy()))
        np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-9)
        assert moved.abs().max() <= bound
    torch.testing.assert_close(truncate_noise(e, 40.0), e, rtol=0, atol=1e-9)
    assert truncate_noise(e[:2].float(), 1.0).dtype == torch.float32
