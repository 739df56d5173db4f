"""Losses of both papers, one function per equation. SE Sec. 2.3, App. C.3; SLE Sec. 4.2-4.3.

Images come in [-1, 1] and are compared in [0, 1]: there smooth L1 with beta 1 is half the squared error,
which is what the weights of the released presets (25 and 50) are made for. Distances and means are float32
whatever autocast does; only the perceptual network may run in bf16.
"""

import math
import warnings
from functools import lru_cache
from pathlib import Path

import lpips
import torch
from scipy.special import betaincinv
from torch import nn
from torch.nn import functional as F
from torchvision.models import convnext_small
from torchvision.transforms.functional import normalize

from models import SiT, pretrained
from spherify import add_noise, at_least_float32, autocast, full_precision, spherify

WEIGHT_NAMES = ("recon_l1", "recon_perceptual", "con_l1", "con_perceptual", "lat_con")  # order of weights


def pixel_reconstruction_loss(x_noisy, x, perceptual=None):
    """Smooth L1 and perceptual distance of D(v_noisy) to the real image. SE Eq. 7.

    x_noisy     [B, 3, H, W]  D(v_noisy), in [-1, 1]
    x           [B, 3, H, W]  the real image, in [-1, 1]
    perceptual  callable on two such images giving one distance per image, or None
    returns     (smooth L1, perceptual) scalars; perceptual is 0 without a network"""
    with full_precision(x):
        l1 = F.smooth_l1_loss(at_least_float32(x_noisy) / 2, at_least_float32(x) / 2)   # / 2: as if in [0, 1]
    return l1, x_noisy.new_zeros(()) if perceptual is None else perceptual(x_noisy, x).float().mean()


def pixel_consistency_loss(x_NOISY, x_noisy, perceptual=None):
    """Smooth L1 and perceptual distance of D(v_NOISY) to D(v_noisy), which is a fixed target. SE Eq. 8.

    x_NOISY     [B, 3, H, W]  D(v_NOISY), in [-1, 1]
    x_noisy     [B, 3, H, W]  D(v_noisy), detached: without sg(.) it would learn to match the blurred image
    returns     (smooth L1, perceptual) scalars, as pixel_reconstruction_loss"""
    return pixel_reconstruction_loss(x_NOISY, x_noisy.detach(), perceptual)


def latent_consistency_loss(v, z_again, eps=1e-6):
    """1 - cosine similarity of E(D(v_NOISY)) and the clean latent, each one vector of length L. SE Eq. 9.

    v        [B, N, d]  clean latent, on the sphere or not (the cosine does not see the radius). Detached
                        here: Eq. 9 writes no sg(.), the released code has one; the gradient reaches the
                        encoder's second pass and, through the image, the decoder
    z_again  [B, N, d]  E(D(v_NOISY)), the encoder's second pass
    returns  scalar, mean over the batch"""
    with full_precision(v):
        v = at_least_float32(v.detach()).flatten(1)
        z_again = at_least_float32(z_again).flatten(1)                                                # [B, L]
        return (1 - F.cosine_similarity(v, z_again, dim=1, eps=eps)).mean()


def sphere_encoder_loss(model, x, y, sigma, sigma_sub, e, weights=(1, 1, 1, 1, 0.1), perceptual=None,
                        swd_weight=0.0):
    """The objective: one batch through E, f, D and E again, and the weighted sum of Eq. 7-9. SE Eq. 10.

    model       SphereEncoder
    x           [B, 3, H, W]  real images in [-1, 1]
    y           [B] or [4, B] classes; four rows are those of the four passes E(x), D(v_NOISY), D(v_noisy) and
                              E(D(v_NOISY)), so that class dropout can be independent in each
    sigma, sigma_sub   [B]    noise magnitudes of v_NOISY and of v_noisy
    e           [B, N, d]     Gaussian noise, the same for both
    weights     of WEIGHT_NAMES, in that order; a pass that only zero weights would use is not computed
    perceptual  see pixel_reconstruction_loss
    swd_weight  of the sliced Wasserstein loss of E(x), a regularisation that the paper tries and drops; its
                directions are e of its images, made orthogonal (assumed: no draw of its own)
    returns     loss, {name: unweighted part}; the parts are detached and stay on the device"""
    recon_l1, recon_perceptual, con_l1, con_perceptual, lat_con = weights
    y_clean, y_NOISY, y_noisy, y_again = y if y.ndim == 2 else [y] * 4
    zero = x.new_zeros(())
    parts = dict.fromkeys(WEIGHT_NAMES, zero)

    z = model.encode(x, y_clean)
    v = spherify(z)                                                                                   # Eq. 1
    v_noisy = add_noise(v, sigma_sub, e)                                                              # Eq. 6
    if any((con_l1, con_perceptual, lat_con)):
        v_NOISY = add_noise(v, sigma, e)                                                              # Eq. 4
        x_NOISY, x_noisy = model.decode(torch.cat([v_NOISY, v_noisy]), torch.cat([y_NOISY, y_noisy])).chunk(2)
    else:
        x_noisy = model.decode(v_noisy, y_noisy)

    parts["recon_l1"], parts["recon_perceptual"] = pixel_reconstruction_loss(
        x_noisy, x, perceptual if recon_perceptual else None)
    if con_l1 or con_perceptual:
        parts["con_l1"], parts["con_perceptual"] = pixel_consistency_loss(
            x_NOISY, x_noisy, perceptual if con_perceptual else None)
    if lat_con:
        parts["lat_con"] = latent_consistency_loss(v, model.encode(x_NOISY, y_again))

    loss = sum((weight * parts[name] for name, weight in zip(WEIGHT_NAMES, weights) if weight), zero)
    if swd_weight:
        directions = orthogonal_directions(e.flatten(1).T)                                       # [L, B]
        parts["swd"] = sliced_wasserstein_loss(z, directions)                                         # C.3
        loss = loss + swd_weight * parts["swd"]
    return loss, {name: part.detach() for name, part in parts.items()}


# ---- Distance to the uniform distribution ------------------------------------------------------------------


def sliced_wasserstein_loss(z, directions):
    """Squared sliced Wasserstein distance of latents to the uniform distribution on the sphere. SE App. C.3.

    z           [B, N, d]  latents, before f (the paper's choice) or after
    directions  [L, M]     see orthogonal_directions
    returns     scalar, in units of a latent's element

    In one dimension the nearest arrangement is the sorted one: the k-th smallest projection belongs to the
    (k - 1/2) / B quantile of a coordinate of the uniform distribution, which is exact, not drawn. So the
    result falls as 1 / B for B uniform points, but is not 0."""
    with full_precision(z):
        projections = at_least_float32(z).flatten(1) @ directions                                     # [B, M]
        quantiles = sphere_quantiles(len(z), len(directions)).to(projections.dtype).to(z.device)      # [B]
        return (projections.sort(dim=0).values - quantiles[:, None]).square().mean()


@lru_cache(maxsize=64)
def sphere_quantiles(n, L):
    """Quantiles (k - 1/2) / n of one coordinate t of a uniform point on the sphere of radius sqrt(L), [n].

    (1 + t / sqrt(L)) / 2 has the distribution Beta((L - 1) / 2, (L - 1) / 2); for large L t is Gaussian."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return math.sqrt(L) * (2 * torch.from_numpy(betaincinv((L - 1) / 2, (L - 1) / 2, u.numpy())) - 1)


def orthogonal_directions(gaussian):
    """Orthonormal random directions, uniform among all such sets: Rowland et al. 2019, Alg. 3.

    gaussian  [L, M] of standard Gaussian numbers
    returns   [L, min(L, M)] with orthonormal columns"""
    Q, R = torch.linalg.qr(gaussian)
    return Q * R.diagonal().sign()                          # the signs make Q uniform (Haar)


# ---- Sphere Latent Encoder ---------------------------------------------------------------------------------

LATENT_WEIGHT_NAMES = ("recon_distance", "recon_cosine", "con_distance", "con_cosine", "lat_con")
DISTANCES = {"l1": F.l1_loss, "smooth-l1": F.smooth_l1_loss, "l2": F.mse_loss}


def latent_reconstruction_loss(z_hat_noisy, z, distance="l2"):
    """Distance and cosine of F(v_noisy) to the clean latent. SLE Eq. 2.

    z_hat_noisy  [B, N, d]  prediction from the latent with the smaller noise (assumed, as in SE Eq. 7: the
                            paper says "between the predicted latent and the clean latent")
    z            [B, N, d]  the tokenizer's latent, Euclidean and not f(z) (assumed: the last prediction is
                            decoded as it is, so it must have the tokenizer's scale)
    distance     of DISTANCES; our text has lost the paper's symbol
    returns      (distance, 1 - cosine) scalars, the cosine of whole latents (assumed, as f and SE Eq. 9)
    Raises ValueError for an unknown distance."""
    if distance not in DISTANCES:
        raise ValueError(f"the distance must be one of {', '.join(DISTANCES)}, got {distance!r}")
    with full_precision(z):
        a = at_least_float32(z_hat_noisy)
        b = at_least_float32(z)
        # A fresh denoiser predicts 0, where the gradient's norm is 1 / eps; later norms are near sqrt(L).
        cosine = F.cosine_similarity(a.flatten(1), b.flatten(1), dim=1, eps=1.0)
        return DISTANCES[distance](a, b), (1 - cosine).mean()


def latent_prediction_consistency_loss(z_hat_NOISY, z_hat_noisy, distance="l2"):
    """The same pair between F(v_NOISY) and F(v_noisy), which is a fixed target. SLE Eq. 3.

    z_hat_NOISY  [B, N, d]  prediction from the latent with the larger noise
    z_hat_noisy  [B, N, d]  prediction from the latent with the smaller noise, detached here (the paper's sg)
    returns      (distance, 1 - cosine) scalars, as latent_reconstruction_loss"""
    return latent_reconstruction_loss(z_hat_NOISY, z_hat_noisy.detach(), distance)


def denoiser_consistency_ablation_loss(denoiser, z, z_hat_NOISY, y):
    """1 - cosine of F(f(F(v_NOISY))) and the clean latent: what the paper removes. SLE Sec. 4.3.

    Assumed: SE Eq. 9 with the denoiser in the place of decoder and encoder; the paper's simplified variant is
    in an appendix that is not in our text. Costs a third pass of the denoiser. Returns a scalar."""
    return latent_consistency_loss(z, denoiser(spherify(z_hat_NOISY), y), eps=1.0)     # as for Eq. 2 and 3


def sphere_latent_loss(denoiser, z, y, sigma, sigma_sub, e, weights=(1, 1, 1, 1, 0), distance="l2"):
    """The objective of the Sphere Latent Encoder: the weighted sum of SLE Eq. 2 and 3, on latents alone.

    denoiser    SiT
    z           [B, N, d]        clean latents of the tokenizer
    y           [B] or [>=3, B]  classes; rows are those of the passes F(v_NOISY), F(v_noisy) and the
                                 ablation's, so that class dropout can be independent in each
    sigma, sigma_sub   [B]       noise magnitudes of v_NOISY and of v_noisy
    e           [B, N, d]        Gaussian noise, the same for both (assumed, as in SE Sec. 2.3), added to
                                 v = f(z) (assumed, as SE Eq. 4; noise on z would only be of another scale)
    weights     of LATENT_WEIGHT_NAMES, in order (assumed 1: our text lacks them; the last is the ablation's)
    returns     loss, {name: unweighted part}; the parts are detached and stay on the device"""
    y_NOISY, y_noisy, y_again = y[:3] if y.ndim == 2 else [y] * 3
    v = spherify(z)
    v_NOISY = add_noise(v, sigma, e)                                                             # SLE Eq. 1
    v_noisy = add_noise(v, sigma_sub, e)
    z_hat_NOISY, z_hat_noisy = denoiser(torch.cat([v_NOISY, v_noisy]), torch.cat([y_NOISY, y_noisy])).chunk(2)

    parts = [*latent_reconstruction_loss(z_hat_noisy, z, distance),
             *latent_prediction_consistency_loss(z_hat_NOISY, z_hat_noisy, distance),
             denoiser_consistency_ablation_loss(denoiser, z, z_hat_NOISY, y_again) if weights[4]
             else z.new_zeros(())]
    loss = sum(weight * part for weight, part in zip(weights, parts) if weight)
    return loss, {name: part.detach() for name, part in zip(LATENT_WEIGHT_NAMES, parts)}


class Objective(nn.Module):
    """SE Eq. 10, or SLE Eq. 2 and 3, as one forward for DistributedDataParallel and torch.compile."""

    def __init__(self, model, preset):
        super().__init__()
        self.model = model
        self.preset = preset
        sees = not isinstance(model, SiT) and (preset.weights[1] or preset.weights[3])
        self.perceptual = perceptual_distance(preset.perceptual) if sees else None

    def forward(self, x, y, sigma, sigma_sub, e):
        """x: images [B, 3, H, W], or for a denoiser also latents [B, N, d]; y: [B, 4], classes of the passes.
        The networks compute in the preset's precision."""
        p = self.preset
        with autocast(x.device, p.precision):
            if isinstance(self.model, SiT):
                if x.ndim == 4:
                    x = self.model.tokenizer.encode(x)                                       # [B, N, d]
                return sphere_latent_loss(self.model, x, y.T, sigma, sigma_sub, e, p.weights, p.distance)
            return sphere_encoder_loss(self.model, x, y.T, sigma, sigma_sub, e, p.weights, self.perceptual,
                                       p.swd_weight)


# ---- Perceptual distance -----------------------------------------------------------------------------------

VGG16 = "https://download.pytorch.org/models/vgg16-397923af.pth"
CONVNEXT_SMALL = "https://download.pytorch.org/models/convnext_small-0c510722.pth"


def perceptual_distance(name):
    """The perceptual distance of SE Sec. 2.3, frozen: two [B, 3, H, W] in [-1, 1] -> one distance per image.

    name     "lpips": SE speaks of features of a static VGG, SLE Sec. 3 and the official code of LPIPS;
             or "lpips+convnext": the official code's
    Images must be at least 16 pixels wide and high. Raises OSError that names a missing or damaged file."""
    if name not in ("lpips", "lpips+convnext"):
        raise ValueError(f"the perceptual distance must be lpips or lpips+convnext, got {name!r}")
    network = LPIPS(pretrained(VGG16))
    if name == "lpips+convnext":
        network = LPIPSConvNeXt(network, pretrained(CONVNEXT_SMALL))
    return network.requires_grad_(False).eval()


class LPIPS(lpips.LPIPS):
    """LPIPS on VGG-16, from the package lpips, whose learned heads are the released system's, byte for byte.

    vgg  state dict of torchvision's vgg16, of which the convolutions are used; None leaves them random
    The trunk may run in bf16; distances of its features are float32 (in the package they would not be)."""

    def __init__(self, vgg=None):
        heads = Path(lpips.__file__).with_name("weights") / "v0.1/vgg.pth"     # else sought beside this file
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torchvision")  # lpips 0.1.4 uses its old argument names
            super().__init__(net="vgg", pnet_rand=True, verbose=False, model_path=heads)
        if vgg is not None:
            for layers in self.net.children():                               # five slices of VGG's features
                layers.load_state_dict({name: vgg[f"features.{name}"] for name in layers.state_dict()})

    def forward(self, a, b):
        a_features, b_features = (self.net(self.scaling_layer(x)) for x in (a, b))
        distance = 0
        with full_precision(a):
            for head, *pair in zip(self.lins, a_features, b_features):                     # [B, C, h, w] each
                f, g = (lpips.normalize_tensor(at_least_float32(features)) for features in pair)
                distance = distance + head((f - g).square()).mean((1, 2, 3))
        return distance                                                                           # [B]


class LPIPSConvNeXt(nn.Module):
    """(LPIPS + 0.1 MSE of ConvNeXt-S logits) / 1.1: the official code trains with it; the paper names VGG."""

    def __init__(self, lpips, convnext):
        super().__init__()
        self.lpips = lpips
        self.convnext = convnext_small()
        self.convnext.load_state_dict(convnext)

    def forward(self, a, b):
        a_logits, b_logits = (self.convnext(self.prepare(x)).float() for x in (a, b))              # [B, 1000]
        return (self.lpips(a, b) + 0.1 * (a_logits - b_logits).square().mean(1)) / 1.1             # [B]

    def prepare(self, x):
        x = F.interpolate((x + 1) / 2, size=(224, 224), mode="bilinear", antialias=True)
        return normalize(x, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
