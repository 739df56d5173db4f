"""Distances between sets of images, so far on raw pixels; pixels in and out of files.

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", 2017 (FID is this distance on Inception
features).
"""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the squared Fréchet distance of two Gaussians.

    mu1, mu2        [D]     means
    sigma1, sigma2  [D, D]  covariances, symmetric; may be rank-deficient
    returns         float, clamped at 0 against rounding

    The trace of (S1 S2)^(1/2) is the sum of the square roots of the eigenvalues of C' S2 C with S1 = C C'.
    That matrix is symmetric, so float64 eigenvalues replace the matrix square root, and no epsilon is needed:
    directions in which S1 has no variance are dropped, since they add nothing to the trace.
    Raises ValueError if the shapes do not fit or a value is not finite.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(np.asarray(a), dtype=torch.float64)
                                for a in (mu1, sigma1, mu2, sigma2))
    D = mu1.numel()
    if mu1.shape != (D,) or mu2.shape != (D,) or sigma1.shape != (D, D) or sigma2.shape != (D, D):
        shapes = ", ".join(str(list(a.shape)) for a in (mu1, sigma1, mu2, sigma2))
        raise ValueError(f"frechet_distance: expected means [D] and covariances [D, D], got {shapes}")
    if not all(a.isfinite().all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("frechet_distance: means and covariances must be finite")
    sigma1, sigma2 = (sigma1 + sigma1.T) / 2, (sigma2 + sigma2.T) / 2
    w, V = torch.linalg.eigh(sigma1)
    keep = w > w[-1] * D * torch.finfo(torch.float64).eps
    C = V[:, keep] * w[keep].sqrt()                                                                # [D, rank]
    trace_root = torch.linalg.eigvalsh(C.T @ sigma2 @ C).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace_root
    return max(distance.item(), 0.0)


def pixel_quality(sets, real, real_labels, judged=True):
    """Measures that need no network: sets of images against real training images, on raw pixels.

    sets         {name: (uint8 [n, 3, H, W], classes [n])}; one may be named "real held-out"
    real         uint8 [m, 3, H, W] training images, real_labels [m]
    returns      {row: {name: number}}

    - judged right: share of images in which an SVC (RBF, gamma "scale", C = 10), trained on the real ones,
      reads their class (if judged)
    - Fréchet distance: to the real images
    - nearest: median distance to the nearest real image, divided by that of the held-out ones; well below 1
      means memorised images
    All distances are Euclidean on pixels in [-1, 1]: the channel mean if all real images are grey, averaged
    down to 16x16 where images are larger.
    """
    grey = bool((real == real[:, :1]).all())
    real = _pixels(real, grey)
    sets = {name: (_pixels(images, grey), labels) for name, (images, labels) in sets.items()}
    rows = {}
    if judged:
        from sklearn.svm import SVC
        judge = SVC(gamma="scale", C=10).fit(real, real_labels)
        rows["judged right"] = {name: float((judge.predict(x) == labels.numpy()).mean())
                                for name, (x, labels) in sets.items()}
    rows["Fréchet distance"] = {name: frechet_distance(x.mean(0), x.T.cov(), real.mean(0), real.T.cov())
                                for name, (x, _) in sets.items()}
    nearest = {name: torch.cdist(x, real).amin(1).quantile(0.5).item() for name, (x, _) in sets.items()}
    unit = nearest.get("real held-out")
    rows["nearest" if unit else "nearest (absolute)"] = {name: d / (unit or 1) for name, d in nearest.items()}
    return rows


def _pixels(images, grey):
    """uint8 [n, 3, H, W] -> float64 [n, D]; see pixel_quality."""
    features = []
    for part in images.split(256):
        x = part.double() / 127.5 - 1
        x = x.mean(1, keepdim=True) if grey else x
        features.append(F.adaptive_avg_pool2d(x, [min(side, 16) for side in x.shape[-2:]]).flatten(1))
    return torch.cat(features)


def to_uint8(x):
    """Image in [0, 1] -> uint8 0..255, rounded to nearest and clamped: floor(255 x + 0.5)."""
    return (x * 255 + 0.5).floor().clamp(0, 255).to(torch.uint8)


def read_image(path):
    """One image file -> PIL image in RGB, turned upright as its EXIF data say.

    Raises ValueError naming the file if it is not a readable image.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error}); remove or replace it") from None
