"""Distances between sets of images. So far the Fréchet distance, and pixels in and out of files.

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", 2017 (FID is this distance on Inception
features).
"""

import numpy as np
import torch
from PIL import Image, ImageOps


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
