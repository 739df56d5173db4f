"""The sphere: projection, noise and schedules of the Sphere Encoder and the Sphere Latent Encoder.

SE  = "Image Generation with a Sphere Encoder", arXiv 2602.15030, Sec. 2.1, 2.2, 6 and App. C.2, C.6
SLE = "Sphere Latent Encoder", arXiv 2605.15592, Sec. 4.3

A latent is one point: all its tokens and channels together form a vector of length L = N * d on the
sphere of radius sqrt(L). Angles are in degrees everywhere, alpha = 0 is no noise, alpha -> 90 is only noise.
"""

import math

import numpy as np
import torch
from numpy.random import Generator, Philox
from torch.nn import functional as F

MAPPINGS = ("sigma", "angle")


def spherify(z, eps=1e-6):
    """Project latents onto the sphere of radius sqrt(L), the paper's f. SE Eq. 1.

    z        [B, ...]  all dims but the first form one vector of length L; any float dtype
    returns  [B, ...]  same shape and dtype, norm sqrt(L)

    z / sqrt(mean(z^2) + eps): the norm is sqrt(L) rms / sqrt(rms^2 + eps), so a zero vector (every latent
    at initialisation) stays zero instead of becoming NaN. Works in float32 (float64 if given) whatever
    autocast does: a bf16 factor is off by up to 0.4 %, alike for all elements, so the error would not
    average out of the radius.
    Raises ValueError if z has fewer than two dims or is not floating point.
    """
    if z.ndim < 2 or not z.is_floating_point():
        raise ValueError(f"spherify: expected floats [B, ...] of two dims or more, got {_describe(z)}")
    with torch.autocast(z.device.type, enabled=False):
        z_float = at_least_float32(z)
        mean_square = z_float.square().mean(dim=tuple(range(1, z.ndim)), keepdim=True)
        return (z_float * torch.rsqrt(mean_square + eps)).to(z.dtype)


def add_noise(v, sigma, e):
    """Move a point of the sphere by Gaussian noise and project it back. SE Eq. 4 and 6.

    v        [B, ...]      points on the sphere
    sigma    float or [B]  noise magnitude, tan of the angle
    e        [B, ...]      standard Gaussian noise, not spherified; shared by v_NOISY and v_noisy
    returns  [B, ...]      f(v + sigma e), dtype of v

    At large L the result stands at the angle arctan(sigma) to v (SE Eq. 12); sigma = 0 gives f(v) = v.
    Raises ValueError if e is not of v's shape or sigma is neither a number nor [B].
    """
    if e.shape != v.shape:
        raise ValueError(f"add_noise: e must have the shape of v, got e {_describe(e)} and v {_describe(v)}")
    if isinstance(sigma, torch.Tensor) and sigma.ndim > 0:
        if sigma.shape != v.shape[:1]:
            raise ValueError(f"add_noise: sigma must be a number or [{v.shape[0]}], got {_describe(sigma)}")
        sigma = sigma.reshape(-1, *[1] * (v.ndim - 1))                          # [B, 1, ...]
    with torch.autocast(v.device.type, enabled=False):
        v_float = at_least_float32(v)
        return spherify(v_float + sigma * e.to(v_float.dtype)).to(v.dtype)


def angle_between(v0, v1):
    """Angle in degrees between points of the sphere, whole latents [B, ...] -> [B]."""
    return torch.rad2deg(F.cosine_similarity(v0.flatten(1), v1.flatten(1)).clamp(-1, 1).acos())


def slerp(v0, v1, weight):
    """Points of the great circle through v0 and v1, at equal angles for equal steps of the weight.

    v0, v1   [B, ...]      points of the sphere; whole latents, not token by token
    weight   float or [B]  0 gives v0, 1 gives v1
    returns  [B, ...]      norm sqrt(L)

    (Points that are opposite, or the same, have no such circle; random ones never are.)
    """
    broad = [-1] + [1] * (v0.ndim - 1)
    weight = torch.as_tensor(weight, dtype=v0.dtype, device=v0.device).reshape(broad)
    angle = torch.deg2rad(angle_between(v0, v1)).reshape(broad)                              # [B, 1, ...]
    return (((1 - weight) * angle).sin() * v0 + (weight * angle).sin() * v1) / angle.sin()


def angle_to_sigma(alpha):
    """Noise magnitude sigma = tan(alpha) of an angle in degrees. SE Eq. 11-12.

    alpha    float or tensor, degrees in [0, 90)      returns the same kind
    Raises ValueError for an angle outside [0, 90).
    """
    if isinstance(alpha, torch.Tensor):
        if not bool(((alpha >= 0) & (alpha < 90)).all()):
            raise ValueError(f"angles must lie in [0, 90) degrees, got {alpha.min():g} to {alpha.max():g}")
        return torch.tan(torch.deg2rad(alpha))
    if not 0 <= alpha < 90:
        raise ValueError(f"an angle must lie in [0, 90) degrees, got {alpha}")
    return math.tan(math.radians(alpha))


def sigma_to_angle(sigma):
    """Angle arctan(sigma) in degrees of a noise magnitude, the inverse of angle_to_sigma. SE Eq. 12.

    sigma    float or tensor, at least 0              returns the same kind
    Raises ValueError for a negative sigma.
    """
    if isinstance(sigma, torch.Tensor):
        if not bool((sigma >= 0).all()):
            raise ValueError(f"sigma must be at least 0, got {sigma.min():g}")
        return torch.rad2deg(torch.atan(sigma))
    if not sigma >= 0:
        raise ValueError(f"sigma must be at least 0, got {sigma}")
    return math.degrees(math.atan(sigma))


def uniform_sigmas(batch, alpha_max, alpha_hard=None, hard_prob=0.1, stratified=False, generator=None,
                   official_hard=False):
    """Noise magnitudes of the Sphere Encoder. SE Eq. 5-6, App. C.2.

    batch       number of samples B
    alpha_max   degrees; sigma = r tan(alpha_max) with r ~ U[0, 1]
    alpha_hard  degrees or None; with probability hard_prob a sample's sigma is drawn instead from the whole
                band between tan(alpha_max) and tan(alpha_hard), uniformly in sigma (assumed: as in Eq. 5; the
                text of C.2 speaks of uniform angles but Eq. 5 and the official code are uniform in sigma)
    stratified  spread r (and s below) over the batch as the official code does: B - 2 equal strata with one
                draw each, one exact 0 and one exact 1, in random order; needs B >= 3
    generator   torch.Generator on the CPU, or None for the global one
    official_hard
                draw hard cases as the official code does: the number that fell below hard_prob also sets the
                magnitude, so that only the lowest tenth of the band is reached (80.9 of 85 degrees), and
                sigma_sub is s times the sigma that the hard one replaces
    returns     sigma [B], sigma_sub [B]   float32 on the CPU; sigma_sub = s sigma with s ~ U[0, 0.5]

    Raises ValueError for angles outside [0, 90), alpha_hard below alpha_max, hard_prob outside [0, 1].
    """
    sigma_max = angle_to_sigma(alpha_max)
    if not 0 <= hard_prob <= 1:
        raise ValueError(f"hard_prob must lie in [0, 1], got {hard_prob}")
    draw = _stratified if stratified else _uniform
    sigma = draw(batch, generator) * sigma_max
    s = 0.5 * draw(batch, generator)
    if alpha_hard is None:
        return sigma, s * sigma
    sigma_hard = angle_to_sigma(alpha_hard)
    if sigma_hard < sigma_max:
        raise ValueError(f"alpha_hard must be at least alpha_max = {alpha_max}, got {alpha_hard}")
    decides = _uniform(batch, generator)
    within = decides if official_hard else _uniform(batch, generator)                # place in the hard band
    mixed = torch.where(decides < hard_prob, sigma_max + within * (sigma_hard - sigma_max), sigma)
    return mixed, s * (sigma if official_hard else mixed)


def logit_normal_sigmas(batch, alpha_max, mean=0.0, std=1.0, mapping="sigma", generator=None):
    """Noise magnitudes of the Sphere Latent Encoder. SLE Sec. 4.3.

    batch       number of samples B
    alpha_max   degrees, the angle of r = 1
    mean, std   of the normal draw before the logistic function, whose result is r in (0, 1) (assumed 0 and 1:
                our text lacks the values)
    mapping     from r to sigma: "sigma", r tan(alpha_max), as SE Eq. 5 (assumed: our text lacks the formula),
                or "angle", tan(r alpha_max)
    generator   torch.Generator on the CPU, or None for the global one
    returns     sigma [B], sigma_sub [B]   float32 on the CPU; the larger and the smaller of two draws

    Raises ValueError for an angle outside [0, 90), a negative std or an unknown mapping.
    """
    sigma_max = angle_to_sigma(alpha_max)
    if not std >= 0 or mapping not in MAPPINGS:
        raise ValueError(f"std must be at least 0 and the mapping one of {', '.join(MAPPINGS)}, "
                         f"got {std} and {mapping!r}")
    r = torch.sigmoid(mean + std * torch.randn(2, _checked(batch), generator=generator))    # [2, B]
    sigma = r * sigma_max if mapping == "sigma" else angle_to_sigma(r * alpha_max)
    return sigma.amax(0), sigma.amin(0)


def step_schedule(steps, gamma, official=False):
    """Relative noise strength r of steps 2..T of few-step generation. SE Eq. 13.

    steps    T, at least 1; the first step has no entry, since it decodes pure noise
    gamma    decay rate, at least 0; 0 keeps r = 1 (the paper's best), 1 falls linearly to 0 at step T
    official at gamma 1 fall to 1 / T instead, as the official code does (which knows only gamma 0 and 1)
    returns  [T - 1]  float32
    Raises ValueError for steps < 1 or gamma < 0.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps}")
    if not gamma >= 0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")
    r = [(1 - (t - 1) / (steps if official else steps - 1)) ** gamma for t in range(2, steps + 1)]
    return torch.tensor(r, dtype=torch.float32)


def sample_noise(seed, first, count, shape, draws=1):
    """The Gaussian noise of sample i of a seed: a function of (seed, i) alone.

    seed     0 .. 2^64 - 1
    first    index i of the first sample; the call makes samples first .. first + count - 1
    shape    of one sample, (N, d)
    draws    how many vectors per sample: draw t is the noise of step t
    returns  [draws, count, *shape]  float32 on the CPU

    One counter-based generator per sample, keyed by (seed, i), so batch size, number of processes and the
    number of images asked for change nothing. (A CPU torch.Generator would use only the low 32 bits of a
    seed.)
    Raises ValueError for a seed or an index outside its range.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must lie in 0 .. 2^64 - 1, got {seed}")
    if not 0 <= first < 2**63:
        raise ValueError(f"the index of a sample must be at least 0, got {first}")
    noise = np.empty((draws, count, *shape), dtype=np.float32)
    for k in range(count):
        rng = Generator(Philox(key=np.array([seed, first + k], dtype=np.uint64)))
        for t in range(draws):
            noise[t, k] = rng.standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(noise)


def truncate_noise(e, bound):
    """Standard Gaussian noise -> noise of the normal truncated to [-bound, bound]. SE App. C.6.

    e        [...]  of standard Gaussian numbers
    bound    above 0
    returns  [...]  each number moved to where the same share of the truncated normal lies below it, so that
             the result is a function of e; dtype of e
    Raises ValueError for a bound that is not above 0.
    """
    if not bound > 0:
        raise ValueError(f"the bound of a truncated prior must be above 0, got {bound}")
    outside = torch.special.ndtr(torch.tensor(-bound, dtype=torch.float64, device=e.device))     # in one tail
    beyond = torch.special.ndtr(-e.double().abs())              # a lower tail keeps more digits than an upper
    return (-torch.special.ndtri(outside + beyond * (1 - 2 * outside)) * e.sign()).to(e.dtype)


def at_least_float32(x):
    """x in float32 if it comes in a shorter float type, else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _uniform(batch, generator):
    return torch.rand(_checked(batch), generator=generator)


def _stratified(batch, generator):
    if batch < 3:
        raise ValueError(f"stratified draws need a batch of at least 3, got {batch}")
    inner = (torch.arange(batch - 2) + torch.rand(batch - 2, generator=generator)) / (batch - 2)
    return torch.cat([inner, torch.tensor([0.0, 1.0])])[torch.randperm(batch, generator=generator)]


def _checked(batch):
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    return batch


def _describe(x):
    return f"{x.dtype} {list(x.shape)}"
