"""The sphere: projection, noise and schedules of the Sphere Encoder and the Sphere Latent Encoder.

SE  = "Image Generation with a Sphere Encoder", arXiv 2602.15030, Sec. 2.1-2.3, 6 and App. C.2, C.6
SLE = "Sphere Latent Encoder", arXiv 2605.15592, Sec. 4.3

A latent is one point: all its tokens and channels together form a vector of length L = N * d on the
sphere of radius sqrt(L). Angles are in degrees everywhere, alpha = 0 is no noise, alpha -> 90 is only noise.
"""

import math

import numpy as np
import torch
from numpy.random import Generator, Philox
from torch.nn import functional as F


def spherify(z, eps=1e-6):
    """Project latents onto the sphere of radius sqrt(L), the paper's f. SE Eq. 1.

    z        [B, ...]  all dims but the first form one vector of length L; any float dtype
    returns  [B, ...]  same shape and dtype, norm sqrt(L)

    z / sqrt(mean(z^2) + eps): the norm is sqrt(L) rms / sqrt(rms^2 + eps), so a zero vector (every latent at
    initialisation) stays zero instead of becoming NaN. Works in float32 (float64 if given) whatever autocast
    does: a bf16 factor is off by up to 0.4 %, alike for all elements, and so the radius would be."""
    with full_precision(z):
        z_float = at_least_float32(z)
        mean_square = z_float.square().mean(dim=tuple(range(1, z.ndim)), keepdim=True)
        return (z_float * torch.rsqrt(mean_square + eps)).to(z.dtype)


def add_noise(v, sigma, e):
    """Move a point of the sphere by Gaussian noise and project it back. SE Eq. 4, 6; SLE Eq. 1.

    v        [B, ...]      points on the sphere
    sigma    float or [B]  noise magnitude, tan of the angle
    e        [B, ...]      standard Gaussian noise, not spherified; shared by v_NOISY and v_noisy
    returns  [B, ...]      f(v + sigma e), dtype of v

    At large L the result stands at the angle arctan(sigma) to v (SE Eq. 12); sigma = 0 gives f(v) = v."""
    if torch.is_tensor(sigma) and sigma.ndim > 0:
        sigma = sigma.reshape(-1, *[1] * (v.ndim - 1))                          # [B, 1, ...]
    with full_precision(v):
        v_float = at_least_float32(v)
        return spherify(v_float + sigma * e.to(v_float.dtype)).to(v.dtype)


def angle_between(v0, v1):
    """Angle in degrees between points of the sphere, whole latents [B, ...] -> [B]."""
    return torch.rad2deg(F.cosine_similarity(v0.flatten(1), v1.flatten(1)).clamp(-1, 1).acos())


def slerp(v0, v1, weight):
    """Points of the great circle through v0 and v1, at equal angles for equal steps of the weight.

    v0, v1   [B, ...]      whole points, not tokens; neither opposite nor the same (random ones never are)
    weight   float or [B]  0 gives v0, 1 gives v1
    returns  [B, ...]      norm sqrt(L)"""
    broad = [-1] + [1] * (v0.ndim - 1)
    weight = torch.as_tensor(weight).to(v0).reshape(broad)
    angle = torch.deg2rad(angle_between(v0, v1)).reshape(broad)                              # [B, 1, ...]
    return (((1 - weight) * angle).sin() * v0 + (weight * angle).sin() * v1) / angle.sin()


def angle_to_sigma(alpha):
    """Noise magnitude sigma = tan(alpha) of an angle in degrees, a float or a tensor. SE Eq. 11-12.

    Raises ValueError for an angle outside [0, 90)."""
    tensor = torch.is_tensor(alpha)
    if not (0 <= (alpha.min() if tensor else alpha) and (alpha.max() if tensor else alpha) < 90):
        raise ValueError(f"angles must lie in [0, 90) degrees, got {alpha}")
    return torch.tan(torch.deg2rad(alpha)) if tensor else math.tan(math.radians(alpha))


def sigma_to_angle(sigma):
    """Angle arctan(sigma) in degrees of a noise magnitude, a float or a tensor of at least 0. SE Eq. 12."""
    return torch.rad2deg(torch.atan(sigma)) if torch.is_tensor(sigma) else math.degrees(math.atan(sigma))


def uniform_sigmas(batch, alpha_max, alpha_hard=None, hard_prob=0.1, mapping="sigma", generator=None):
    """Noise magnitudes of the Sphere Encoder. SE Eq. 5-6, App. C.2.

    batch       number of samples B
    alpha_max   degrees, the angle of r = 1, with r ~ U[0, 1]
    alpha_hard  degrees or None; with probability hard_prob a sample lies in the whole band from alpha_max to
                alpha_hard instead
    mapping     what is uniform in both: "sigma", r tan(alpha_max), as Eq. 5 and the official code; "angle",
                tan(r alpha_max), as the text of C.2. Of 85 to 89 degrees, "sigma" is mostly above 87
    generator   torch.Generator on the CPU, or None for the global one
    returns     sigma [B], sigma_sub [B]   float32 on the CPU; sigma_sub = s sigma with s ~ U[0, 0.5]
    Raises ValueError for angles outside [0, 90), alpha_hard below alpha_max or an unknown mapping."""
    r, s, decides, within = torch.rand(4, batch, generator=generator)
    sigma = _between(0, alpha_max, r, mapping)
    if alpha_hard is not None:
        sigma = torch.where(decides < hard_prob, _between(alpha_max, alpha_hard, within, mapping), sigma)
    return sigma, 0.5 * s * sigma


def official_sigmas(batch, alpha_max, alpha_hard=None, hard_prob=0.1, generator=None):
    """The same, drawn as the official code does where it departs from the paper.

    r and s are spread over the batch: B - 2 equal strata with one draw each, one exact 0 and one exact 1, in
    random order. A draw below hard_prob also sets the magnitude of a hard case, so that only the lowest
    tenth of the band is reached (80.9 of 85 degrees); sigma_sub is s times the sigma that it replaces.
    Raises ValueError also for a batch below 3."""
    if batch < 3:
        raise ValueError(f"the official draws need a batch of at least 3, got {batch}")

    def spread():
        inner = (torch.arange(batch - 2) + torch.rand(batch - 2, generator=generator)) / (batch - 2)
        return torch.cat([inner, torch.tensor([0.0, 1.0])])[torch.randperm(batch, generator=generator)]

    base = _between(0, alpha_max, spread())
    s = spread()
    decides = torch.rand(batch, generator=generator)
    hard = base if alpha_hard is None else _between(alpha_max, alpha_hard, decides)
    return torch.where(decides < hard_prob, hard, base), 0.5 * s * base


def _between(low, high, share, mapping="sigma"):
    """Magnitudes between two angles, at shares of the way that are linear in sigma or in the angle."""
    if high < low:
        raise ValueError(f"alpha_hard must be at least alpha_max, which is at least 0; got {high} and {low}")
    if mapping not in ("sigma", "angle"):
        raise ValueError(f"the mapping must be sigma or angle, got {mapping!r}")
    least = angle_to_sigma(low)                                             # raises for impossible angles
    most = angle_to_sigma(high)
    if mapping == "angle":
        return angle_to_sigma(low + share * (high - low))
    return least + share * (most - least)


def logit_normal_sigmas(batch, alpha_max, mean=0.0, std=1.0, mapping="sigma", generator=None):
    """Noise magnitudes of the Sphere Latent Encoder. SLE Sec. 4.3.

    batch       number of samples B
    alpha_max   degrees, the angle of r = 1
    mean, std   of the normal draw whose sigmoid is r in (0, 1) (assumed 0 and 1: our text lacks them)
    mapping     from r to sigma: "sigma", r tan(alpha_max), as SE Eq. 5 (assumed: our text lacks the formula),
                or "angle", tan(r alpha_max)
    generator   torch.Generator on the CPU, or None for the global one
    returns     sigma [B], sigma_sub [B]   float32 on the CPU; the larger and the smaller of two draws
    Raises ValueError for an angle outside [0, 90) or an unknown mapping."""
    r = torch.sigmoid(mean + std * torch.randn(2, batch, generator=generator))              # [2, B]
    sigma = _between(0, alpha_max, r, mapping)
    return sigma.amax(0), sigma.amin(0)


def step_schedule(steps, gamma, schedule="eq13"):
    """Relative noise strength r of steps 2..T of few-step generation. SE Eq. 13.

    steps    T, at least 1; the first step has no entry, since it decodes pure noise
    gamma    decay rate, at least 0; 0 keeps r = 1 (the paper's best)
    schedule at gamma 1, "eq13" falls linearly to 0 at step T; "released", as the official code, to 1 / T
    returns  [T - 1]  float32
    Raises ValueError for steps < 1, gamma < 0 or an unknown schedule."""
    if steps not in range(1, 10**6) or not gamma >= 0 or schedule not in ("eq13", "released"):
        raise ValueError(f"steps must be at least 1, gamma at least 0, the schedule eq13 or released, got "
                         f"{steps}, {gamma} and {schedule}")
    t = torch.arange(2, steps + 1, dtype=torch.float64)
    return ((1 - (t - 1) / (steps if schedule == "released" else steps - 1)) ** gamma).float()


def sample_noise(seed, first, count, shape, draws=1):
    """The Gaussian noise of sample i of a seed: a function of (seed, i) alone.

    seed     0 .. 2^64 - 1
    first    index i of the first sample; the call makes samples first .. first + count - 1
    shape    of one sample, (N, d)
    draws    how many vectors per sample: draw t is the noise of step t
    returns  [draws, count, *shape]  float32 on the CPU

    One counter-based generator per sample, keyed by (seed, i), so batch size, number of processes and number
    of images change nothing. (A CPU torch.Generator would use only the low 32 bits of a seed.)
    Raises ValueError for a seed outside its range."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must lie in 0 .. 2^64 - 1, got {seed}")
    noise = np.empty((draws, count, *shape), np.float32)
    for k in range(count):
        rng = Generator(Philox(key=np.array([seed, first + k], np.uint64)))
        noise[:, k] = rng.standard_normal((draws, *shape), np.float32)
    return torch.from_numpy(noise)


def truncate_noise(e, bound):
    """Standard Gaussian noise e [...] -> noise [...] of the normal truncated to [-bound, bound]. SE App. C.6.

    Each number moves to where the same share of the truncated normal lies below it: a function of e, in the
    dtype of e. Raises ValueError for a bound that is not above 0."""
    if not bound > 0:
        raise ValueError(f"the bound of a truncated prior must be above 0, got {bound}")
    x = e.cpu().double()
    outside = torch.special.ndtr(torch.tensor(-bound, dtype=torch.float64))                 # of one tail
    beyond = torch.special.ndtr(-x.abs())                       # a lower tail keeps more digits than an upper
    return (-torch.special.ndtri(outside + beyond * (1 - 2 * outside)) * x.sign()).to(e)


def autocast(device, precision):
    """A context or decorator in which networks compute in bf16, if the precision is "bf16", or "auto" and the
    torch.device a GPU. What they return, geometry and losses are float32 all the same."""
    bf16 = precision == "bf16" or precision == "auto" and device.type == "cuda"
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def full_precision(x):
    """A context in which autocast changes nothing on the device of x."""
    return torch.autocast(x.device.type, enabled=False)


def at_least_float32(x):
    """x in float32 if it comes in a shorter float type, else as it is."""
    return x.float() if x.dtype.itemsize < 4 else x
