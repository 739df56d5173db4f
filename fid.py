"""FID and its relatives: Inception Score, sFID, precision and recall, of images in folders or in memory.

    python fid.py out/samples data/photos                   # generated images against real ones
    python fid.py out/samples reference.npz                 # against stored statistics: FID and sFID
    python fid.py data/photos --save reference.npz

FID: Heusel et al. 2017. Inception Score: Salimans et al. 2016. sFID: Nash et al. 2021. Precision and recall:
Kynkaanniemi et al. 2019. Two conventions of preparing images are in use and give different numbers; every
result names its own.
"""

import argparse
import hashlib
import json
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import distributed
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.models import inception
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

# torch-fidelity: as the original TensorFlow network; the Sphere Encoder's published numbers are of this kind.
# pytorch-fid: PyTorch's bilinear resizing, and pixels in [-1, 1].
CONVENTIONS = ("torch-fidelity", "pytorch-fid")
METRICS = ("fid", "is", "pr", "sfid")
INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILES[0]}"
INCEPTION_SHA256 = "6726825d"           # its first digits
INCEPTION_SIZE = 299                    # pixels
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}

# ---- Measures ----------------------------------------------------------------------------------------------


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the squared Fréchet distance of two Gaussians.

    mu1, mu2        [D]     means
    sigma1, sigma2  [D, D]  covariances, symmetric; may be rank-deficient
    returns         float, clamped at 0 against rounding

    The trace of (S1 S2)^(1/2) is the sum of the singular values of C1' C2 with S1 = C1 C1', S2 = C2 C2'; they
    are the roots of the eigenvalues of the symmetric C1' S2 C1. So no matrix square root and no epsilon is
    needed: directions without variance are dropped, since they add nothing to the trace.
    Raises ValueError if the shapes do not fit or a value is not finite.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a, dtype=torch.float64, device="cpu")
                                for a in (mu1, sigma1, mu2, sigma2))
    D = mu1.numel()
    if mu1.shape != (D,) or mu2.shape != (D,) or sigma1.shape != (D, D) or sigma2.shape != (D, D):
        shapes = ", ".join(str(list(a.shape)) for a in (mu1, sigma1, mu2, sigma2))
        raise ValueError(f"frechet_distance: expected means [D] and covariances [D, D], got {shapes}")
    if not all(a.isfinite().all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("frechet_distance: means and covariances must be finite")
    sigma1, sigma2 = (sigma1 + sigma1.T) / 2, (sigma2 + sigma2.T) / 2
    (C1, regular1), (C2, regular2) = _factor(sigma1), _factor(sigma2)
    if regular1 and regular2:
        roots = torch.linalg.eigvalsh(C1.T @ sigma2 @ C1).clamp(min=0).sqrt()       # three times as fast
    else:
        roots = torch.linalg.svdvals(C1.T @ C2)                 # a root would turn a rounded 0 into 1e-8
    trace_root = roots.sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace_root
    return max(distance.item(), 0.0)


def _factor(sigma):
    """C [D, rank] with C C' = sigma, and whether sigma is far from singular: then a Cholesky factor."""
    C, failed = torch.linalg.cholesky_ex(sigma)
    pivots = C.diagonal().square()
    if not failed and pivots.min() > 1e-6 * pivots.max():
        return C, True
    w, V = torch.linalg.eigh(sigma)
    keep = w > w[-1:] * len(w) * torch.finfo(torch.float64).eps
    return V[:, keep] * w[keep].sqrt(), False


def inception_score(logits, splits=10, shuffle=True):
    """exp(mean KL(p(y|x) || p(y))) of the predicted classes, for each of several parts of the images.

    logits   [n, classes], those without bias of InceptionV3
    shuffle  deal the images out in torch-fidelity's fixed order; False cuts them as they come, as the ADM
             evaluator does, which makes the parts unlike each other if images are sorted by class
    returns  (mean, standard deviation) over the parts
    Raises ValueError for fewer images than parts.
    """
    n = len(logits)
    if not 1 <= splits <= n:
        raise ValueError(f"an Inception Score over {splits} parts needs at least as many images, got {n}")
    if shuffle:
        logits = logits[torch.from_numpy(np.random.RandomState(2020).permutation(n))]
    scores = []
    for i in range(splits):
        p = logits[i * n // splits:(i + 1) * n // splits].double().softmax(dim=1)        # [part, classes]
        divergence = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))
        scores.append(divergence.sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(generated, real, k=3, block=1024):
    """How many images lie in the other set's manifold: the union of balls reaching to the k-th neighbour.

    generated, real  [n, D] and [m, D] features
    block    rows of the distance matrix at a time: 50,000 columns of float32 take 0.2 GiB
    returns  (precision, recall): the share of generated images in the real manifold, and the reverse
    Raises ValueError for k images or fewer.
    """
    if min(len(generated), len(real)) <= k:
        raise ValueError(f"precision and recall need more than {k} images of each kind, got {len(generated)} "
                         f"and {len(real)}")

    def radii(x):           # the nearest one is the image itself
        return torch.cat([torch.cdist(part, x).kthvalue(k + 1, dim=1).values for part in x.split(block)])

    def share_inside(x, others):
        reach = radii(others)
        inside = torch.cat([(torch.cdist(part, others) <= reach).any(1) for part in x.split(block)])
        return inside.double().mean().item()

    return share_inside(generated, real), share_inside(real, generated)


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


# ---- Statistics --------------------------------------------------------------------------------------------


class FeatureStatistics:
    """Mean and covariance of a stream of features, summed in float64. Memory does not grow with the stream.

    count    number of features so far
    """

    def __init__(self, dim, device="cpu"):
        self.count = 0
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.products = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features):
        """Add a batch [n, dim]; however a stream is cut into batches, the result is the same."""
        features = features.to(self.sum)
        self.count += len(features)
        self.sum += features.sum(0)
        self.products.addmm_(features.T, features)
        return self

    def merge(self, other):
        """Add the features of another stream."""
        self.count += other.count
        self.sum += other.sum
        self.products += other.products
        return self

    def all_reduce(self):
        """Add the streams of all processes of torch.distributed."""
        count = torch.tensor(float(self.count), dtype=torch.float64, device=self.sum.device)
        for tensor in (count, self.sum, self.products):
            distributed.all_reduce(tensor)
        self.count = int(count)
        return self

    @property
    def mean(self):
        """[dim], float64."""
        return self.sum / self.count

    @property
    def covariance(self):
        """[dim, dim], float64, divided by count - 1. Raises ValueError for fewer than 2 features."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        if self.count <= len(self.sum):
            warnings.warn(f"only {self.count} images for {len(self.sum)} dimensions: their Fréchet distance "
                          f"is biased upwards, by a lot; published ones use 50,000 images", stacklevel=2)
        return (self.products - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def save_statistics(path, fid, sfid=None):
    """Write two FeatureStatistics as npz: mu, sigma and count; mu_s and sigma_s for sFID.

    Means are float32 and covariances float64, as torch-fidelity, pytorch-fid and the ADM evaluator write them
    and torch-fidelity insists on. An existing file is not overwritten: FileExistsError.
    """
    arrays = {"count": fid.count}
    for statistics, suffix in ((fid, ""), (sfid, "_s")):
        if statistics:
            arrays[f"mu{suffix}"] = statistics.mean.float().cpu().numpy()
            arrays[f"sigma{suffix}"] = statistics.covariance.cpu().numpy()
    with open(path, "xb") as file:
        np.savez_compressed(file, **arrays)


def load_statistics(path):
    """What an npz of any of these tools holds: {"mu", "sigma", ...}, arrays in float64.

    Raises FileNotFoundError or ValueError that names the file.
    """
    try:
        with np.load(path) as file:
            content = {name: file[name] for name in file.files if name != "arr_0"}      # ADM's 10,000 images
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable npz file ({error})") from None
    dim = content["mu"].size if "mu" in content else 0
    if "sigma" not in content or content["sigma"].shape != (dim, dim):
        raise ValueError(f"{path}: expected statistics mu [D] and sigma [D, D], found "
                         f"{', '.join(f'{name} {list(value.shape)}' for name, value in content.items())}")
    return {name: value.astype(np.float64) if value.dtype.kind == "f" else value.item()
            for name, value in content.items()}


# ---- Network -----------------------------------------------------------------------------------------------


class InceptionV3(inception.Inception3):
    """The Inception network of FID: torchvision's layers and names (566 of them in its state dict) with 1,008
    classes, average pools in which borders do not count, and one max pool. See load_inception."""

    def __init__(self):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False, inception_blocks=[
            inception.BasicConv2d, BlockA, inception.InceptionB, BlockC, inception.InceptionD, BlockE,
            inception.InceptionAux])
        self.Mixed_7c.pool = maximum

    @torch.no_grad()
    def forward(self, x, convention="torch-fidelity"):
        """Features of images.

        x        uint8 [B, 3, H, W]
        returns  pool [B, 2048] (FID, precision and recall), logits [B, 1008] without bias (Inception Score),
                 spatial [B, 2023] (sFID: 7 channels of a 17 x 17 layer; that it is the ADM evaluator's is an
                 inference, not checked against that evaluator)
        """
        x = prepare(x, convention).contiguous(memory_format=torch.channels_last)            # [B, 3, 299, 299]
        for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1", "Conv2d_3b_1x1",
                     "Conv2d_4a_3x3", "maxpool2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b",
                     "Mixed_6c"):
            x = self.get_submodule(name)(x)
        spatial = self.Mixed_6d.branch1x1(x)[:, :7].flatten(1)                              # [B, 7 * 17 * 17]
        for name in ("Mixed_6d", "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c"):
            x = self.get_submodule(name)(x)
        pool = x.mean((2, 3))
        return pool, pool @ self.fc.weight.T, spatial


def average(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def maximum(x):
    return F.max_pool2d(x, 3, stride=1, padding=1)


class BlockA(inception.InceptionA):
    def _forward(self, x):
        return [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)),
                self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                self.branch_pool(average(x))]


class BlockC(inception.InceptionC):
    def _forward(self, x):
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return [self.branch1x1(x), self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
                self.branch7x7dbl_5(self.branch7x7dbl_4(double)), self.branch_pool(average(x))]


class BlockE(inception.InceptionE):
    pool = staticmethod(average)

    def _forward(self, x):
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return [self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single),
                self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(self.pool(x))]


def prepare(x, convention):
    """uint8 images [B, 3, H, W] -> what the network takes, float [B, 3, 299, 299]; see CONVENTIONS."""
    if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"expected images uint8 [B, 3, H, W], got {x.dtype} {list(x.shape)}")
    if convention == "torch-fidelity":
        return (_resize_tf1(x.float()) - 128) / 128
    if convention == "pytorch-fid":
        size = (INCEPTION_SIZE, INCEPTION_SIZE)
        return 2 * F.interpolate(x.float() / 255, size, mode="bilinear", align_corners=False) - 1
    raise ValueError(f"the convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")


def _resize_tf1(x):
    """Bilinear resizing as in TensorFlow 1: pixel i of the result looks at i * in / out, corner to corner."""
    for dim in (2, 3):
        size = x.shape[dim]
        position = torch.arange(INCEPTION_SIZE, device=x.device) * (size / INCEPTION_SIZE)
        low = position.long()
        weight = (position - low).view([-1 if d == dim else 1 for d in range(4)])
        high = (low + 1).clamp(max=size - 1)
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight.to(x.dtype))
    return x


def load_inception(path=None, device="cpu"):
    """InceptionV3 with the published weights, in eval mode.

    path     the file; None looks in torch.hub's cache under both its names, then downloads it
    Raises FileNotFoundError that says what to place where, ValueError for another file.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    if path is None:
        path = next((cache / name for name in INCEPTION_FILES if (cache / name).is_file()), None)
    if path is None:
        path = cache / INCEPTION_FILES[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(INCEPTION_URL, path)
        except OSError as error:
            raise FileNotFoundError(f"FID needs {path}, which is missing and could not be downloaded "
                                    f"({getattr(error, 'reason', error)}); place {INCEPTION_URL} (SHA-256 "
                                    f"{INCEPTION_SHA256}...) there") from None
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise FileNotFoundError(f"{path} cannot be read ({error.strerror}); place {INCEPTION_URL} "
                                f"there") from None
    digest = hashlib.sha256(content).hexdigest()
    if not digest.startswith(INCEPTION_SHA256):
        raise ValueError(f"{path}: not FID's Inception network (SHA-256 {digest[:8]}..., expected "
                         f"{INCEPTION_SHA256}...); replace it by {INCEPTION_URL}")
    with torch.device(device):
        network = InceptionV3()
    network.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


class Extracted:
    """What one pass of the network over images leaves: statistics of FID and sFID, features, logits."""

    def __init__(self, batches, network, convention="torch-fidelity"):
        """batches   uint8 [B, 3, H, W] each, of any sizes"""
        device = network.fc.weight.device
        self.fid, self.sfid = FeatureStatistics(2048, device), FeatureStatistics(2023, device)
        pools, logits = [torch.zeros(0, 2048)], [torch.zeros(0, 1008)]
        for x in batches:
            pool, logit, spatial = network(x.to(device), convention)
            self.fid.update(pool)
            self.sfid.update(spatial)
            pools.append(pool.cpu())
            logits.append(logit.cpu())
        self.features, self.logits = torch.cat(pools), torch.cat(logits)            # [n, 2048], [n, 1008]

    def gather(self, places, count):
        """Join what all processes of torch.distributed extracted of `count` images; this one, the images at
        `places`."""
        device = self.fid.sum.device
        self.fid.all_reduce()
        self.sfid.all_reduce()
        for name in ("features", "logits"):
            mine = getattr(self, name)
            whole = torch.zeros(count, mine.shape[1], device=device)
            whole[places] = mine.to(device)
            distributed.all_reduce(whole)
            setattr(self, name, whole.cpu())
        return self


def compare(generated, real, metrics=METRICS):
    """Measures of generated images against real ones.

    generated, real  Extracted; real may also be a dictionary of load_statistics, for FID and sFID alone
    metrics          of METRICS; the Inception Score is that of the generated images
    returns          {name: number}
    Raises ValueError for a measure that the statistics do not hold.
    """
    stored = real if isinstance(real, dict) else None
    results = {}
    if "fid" in metrics:
        theirs = (stored["mu"], stored["sigma"]) if stored else (real.fid.mean, real.fid.covariance)
        results["FID"] = frechet_distance(generated.fid.mean, generated.fid.covariance, *theirs)
    if "is" in metrics:
        parts = min(10, len(generated.logits))
        results["Inception Score"], results["its deviation"] = inception_score(generated.logits, parts)
    if "pr" in metrics:
        if stored:
            raise ValueError("precision and recall need images on both sides, not stored statistics; leave "
                             "pr out of --metrics")
        results["precision"], results["recall"] = precision_recall(generated.features, real.features)
    if "sfid" in metrics:
        if stored and "mu_s" not in stored:
            raise ValueError("the stored statistics hold none of sFID (mu_s, sigma_s); leave sfid out of "
                             "--metrics")
        theirs = (stored["mu_s"], stored["sigma_s"]) if stored else (real.sfid.mean, real.sfid.covariance)
        # Its layer is an inference: not checked against the ADM evaluator.
        ours = generated.sfid.mean, generated.sfid.covariance
        results["sFID (unchecked)"] = frechet_distance(*ours, *theirs)
    return results


# ---- Images ------------------------------------------------------------------------------------------------


def to_uint8(x, truncate=False):
    """Image in [0, 1] -> uint8 0..255, rounded to nearest and clamped: floor(255 x + 0.5).

    truncate  floor(255 x) instead, as the official Sphere Encoder writes its samples
    """
    return (x * 255 + (0 if truncate else 0.5)).floor().clamp(0, 255).to(torch.uint8)


def read_image(path):
    """One image file -> PIL image in RGB, turned upright as its EXIF data say.

    Grey and palette images become RGB, 16-bit grey ones 8-bit, and an alpha channel is dropped.
    Raises ValueError naming the file if it is not a readable image, or an animated one.
    """
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"{image.n_frames} frames, expected a still image")
            if image.mode.startswith("I"):                              # convert() would clip it, not scale
                image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error}); remove or replace it") from None


class ImageFolder:
    """All images under a folder, sorted by path, each uint8 [3, H, W]; for a DataLoader.

    Raises FileNotFoundError or ValueError, naming folder or file: no folder, no images, unequal sizes.
    """

    def __init__(self, folder):
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder}: no such folder (and no .npz file)")
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        self.paths = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
        self.others = [path for path in files if path.suffix.lower() not in IMAGE_SUFFIXES]
        if not self.paths:
            raise ValueError(f"{folder}: no images in it or below (looked for "
                             f"{' '.join(sorted(IMAGE_SUFFIXES))})")
        self.size = read_image(self.paths[0]).size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        image = read_image(self.paths[i])
        if image.size != self.size:
            raise ValueError(f"{self.paths[i]} has {image.width}x{image.height} pixels, {self.paths[0]} "
                             f"{self.size[0]}x{self.size[1]}; resize them all alike first")
        return pil_to_tensor(image)


# ---- Command line ------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser("fid.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"fid.py: {message} (--help lists the options)\n")
    parser.add_argument("images", help="folder of generated images")
    parser.add_argument("reference", nargs="?", help="folder of real images, or statistics in an npz file")
    parser.add_argument("--metrics", type=lambda text: text.split(","),
                        help=f"of {','.join(METRICS)} (default all, for an npz fid)")
    parser.add_argument("--convention", choices=CONVENTIONS, default=CONVENTIONS[0],
                        help="how images are resized and scaled (default %(default)s)")
    parser.add_argument("--save", metavar="FILE.npz", help="write the statistics of the first folder")
    parser.add_argument("--inception-weights", metavar="FILE", help="default: torch.hub's cache, or download")
    parser.add_argument("--batch-size", type=int, default=50, help="images at a time (default %(default)s)")
    parser.add_argument("--workers", type=int, default=0,
                        help="processes that read images (default %(default)s)")
    parser.add_argument("--device", help="default cuda if there is one, else cpu")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"fid.py: {message}", file=sys.stderr)
            run(args)
    except (ValueError, OSError) as error:
        line = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        parser.exit(2, f"fid.py: {line}\n")
    except KeyboardInterrupt:
        parser.exit(130, "fid.py: interrupted\n")


def run(args):
    stored = args.reference and args.reference.endswith(".npz")
    metrics = args.metrics or (["fid"] if stored else list(METRICS))
    if unknown := set(metrics) - set(METRICS):
        raise ValueError(f"--metrics must be of {','.join(METRICS)}, got {min(unknown)}")
    if not args.reference and not args.save:
        raise ValueError("give a second folder or npz file to compare with, or --save FILE.npz")
    if args.batch_size < 1 or args.workers < 0:
        raise ValueError(f"--batch-size must be at least 1 and --workers at least 0, got {args.batch_size} "
                         f"and {args.workers}")
    if args.reference and Path(args.images).resolve() == Path(args.reference).resolve():
        raise ValueError(f"{args.images}: compared with itself")
    if args.save and Path(args.save).exists():
        raise ValueError(f"{args.save} already exists; remove it or choose another name")
    folders = [ImageFolder(folder) for folder in (args.images, args.reference) if folder and not
               folder.endswith(".npz")]
    reference = load_statistics(args.reference) if stored else None
    network = load_inception(args.inception_weights,
                             args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for folder in folders:
        if folder.others:
            print(f"{len(folder.others)} files that are no images, such as {folder.others[0]}, are left out",
                  file=sys.stderr)
    extracted = [Extracted(tqdm(DataLoader(folder, args.batch_size, num_workers=args.workers), unit="batch",
                                desc=str(folder.paths[0].parent), disable=None), network, args.convention)
                 for folder in folders]
    if args.save:
        save_statistics(args.save, extracted[0].fid, extracted[0].sfid)
        print(f"{args.save}: statistics of {extracted[0].fid.count} images", file=sys.stderr)
    if args.reference:
        results = compare(extracted[0], reference or extracted[1], metrics)
        counts = [len(folder) for folder in folders] + ([reference.get("count")] if stored else [])
        if args.json:
            print(json.dumps({"images": args.images, "reference": args.reference, "counts": counts,
                              "convention": args.convention, **results}))
            return
        known = " and ".join(str(count or "unknown") for count in counts)
        print(f"{args.images} against {args.reference}: {known} images, convention {args.convention}")
        for name, value in results.items():
            print(f"{name:20}{value:12.4f}")


if __name__ == "__main__":
    main()
