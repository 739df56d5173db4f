"""FID and its relatives: Inception Score, sFID, precision and recall, of images in folders or in memory.

    python fid.py out/samples data/photos                   # generated images against real ones
    python fid.py out/samples reference.npz                 # against stored statistics: FID and sFID
    python fid.py data/photos --save reference.npz
    python fid.py out/samples data/photos --features resnet50       # on another network, then not called FID

FID: Heusel et al. 2017. Inception Score: Salimans et al. 2016. sFID: Nash et al. 2021. Precision and recall:
Kynkaanniemi et al. 2019. Two conventions of preparing images are in use and give different numbers; every
result names its own.
"""

import argparse
import contextlib
import hashlib
import json
import sys
import warnings
import zipfile
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader
from torchvision import models as torchvision_models
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
    return (share_inside(generated, real, manifold_radii(real, k, block), block),
            share_inside(real, generated, manifold_radii(generated, k, block), block))


def manifold_radii(x, k=3, block=1024):
    """Distance of each of x [n, D] to its k-th nearest other one, [n]. Raises ValueError for n <= k."""
    if len(x) <= k:
        raise ValueError(f"precision and recall need more than {k} images of each kind, got {len(x)}")
    # The nearest one is the image itself.
    return torch.cat([torch.cdist(part, x).kthvalue(k + 1, dim=1).values for part in x.split(block)])


def share_inside(x, others, radii, block=1024):
    """Share of x [n, D] that lies within the radius of any of others [m, D]."""
    inside = torch.cat([(torch.cdist(part, others) <= radii).any(1) for part in x.split(block)])
    return inside.double().mean().item()


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
    All distances are Euclidean on pixel_features, grey if all real images are.
    """
    grey = bool((real == real[:, :1]).all())
    real = pixel_features(real, grey)
    sets = {name: (pixel_features(images, grey), labels) for name, (images, labels) in sets.items()}
    rows = {}
    if judged:
        from sklearn.svm import SVC
        judge = SVC(gamma="scale", C=10).fit(real, real_labels)
        rows["judged right"] = {name: float((judge.predict(x) == labels.numpy()).mean())
                                for name, (x, labels) in sets.items()}
    rows["Fréchet distance"] = {name: frechet_distance(x.mean(0), x.T.cov(), real.mean(0), real.T.cov())
                                for name, (x, _) in sets.items()}
    nearest = {name: nearest_neighbours(x, real)[0].quantile(0.5).item() for name, (x, _) in sets.items()}
    unit = nearest.get("real held-out")
    rows["nearest" if unit else "nearest (absolute)"] = {name: d / (unit or 1) for name, d in nearest.items()}
    return rows


def nearest_neighbours(x, real, k=1, block=256):
    """Distances [n, k] of x [n, D] to the k nearest of real [m, D], ascending, and their places [n, k]."""
    parts = [torch.cdist(part, real).topk(k, largest=False) for part in x.split(block)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def memorisation(sets, real, k=4, near=1 / 3):
    """Whether images repeat training images, or mirrored ones. SE App. B.

    sets     {name: uint8 [n, 3, H, W]}; one may be named "real held-out"
    real     [2, m, D] features of the training images and of the mirrored ones, see pixel_features
    near     a near-duplicate is nearer than this share of the way to the second nearest training image
             (assumed: the paper shows near-duplicates and defines none; a third is Yoon et al. 2023)
    returns  {row: {name: number}}; and {name: (ratio of the two distances [n], places of the k nearest
             training images [n, k], which of them are mirrored [n, k])}

    - nearest or mirrored: median distance to the nearest, divided by that of the held-out images
    - near-duplicates: their share. A training image that is itself there twice hides its copies.
    """
    m, found, medians = real.shape[1], {}, {}
    if m < 2:
        raise ValueError(f"memorisation needs 2 training images or more, got {m}")
    k = min(k, m)
    for name, images in sets.items():
        distance, place = nearest_neighbours(pixel_features(images), real.flatten(0, 1), 2 * k)
        # Of an image and its mirrored self the nearer one counts: an image among the k nearest is among the
        # first 2 k of both kinds.
        again = (place[:, :, None] % m == place[:, None] % m).tril(-1).any(2)                     # [n, 2 k]
        distance, order = distance.masked_fill(again, torch.inf).sort(dim=1)
        distance, place = distance[:, :k], place.gather(1, order[:, :k])
        found[name] = distance[:, 0] / distance[:, 1].clamp(min=1e-12), place % m, place >= m
        medians[name] = distance[:, 0].quantile(0.5).item()
    unit = medians.get("real held-out")
    return {f"nearest or mirrored{'' if unit else ' (absolute)'}": {
                name: median / (unit or 1) for name, median in medians.items()},
            "near-duplicates": {name: (ratio < near).double().mean().item()
                                for name, (ratio, _, _) in found.items()}}, found


def pixel_features(images, grey=False):
    """Images uint8 [n, 3, H, W] -> float64 [n, D] in [-1, 1]: the channel mean if grey, averaged down to
    16x16 where they are larger."""
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


def save_statistics(path, extracted):
    """Write the statistics of Extracted as npz: mu, sigma, count, network and convention; for sFID mu_s and
    sigma_s.

    Means are float32 and covariances float64, as torch-fidelity, pytorch-fid and the ADM evaluator write them
    and torch-fidelity insists on. An existing file is not overwritten: FileExistsError.
    """
    arrays = {"count": extracted.fid.count, "features": extracted.name, "convention": extracted.convention}
    for statistics, suffix in ((extracted.fid, ""), (extracted.sfid, "_s")):
        if len(statistics.sum):
            arrays[f"mu{suffix}"] = statistics.mean.float().cpu().numpy()
            arrays[f"sigma{suffix}"] = statistics.covariance.cpu().numpy()
    with open(path, "xb") as file:
        np.savez_compressed(file, **arrays)


def load_statistics(path):
    """What an npz of any of these tools holds: {"mu", "sigma", ..., "features"}, arrays in float64.

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
    return {"features": "inception"} | {
        name: value.astype(np.float64) if value.dtype.kind == "f" else value.item()
        for name, value in content.items()}


# ---- Network -----------------------------------------------------------------------------------------------


class InceptionV3(inception.Inception3):
    """The Inception network of FID: torchvision's layers and names (566 of them in its state dict) with 1,008
    classes, average pools in which borders do not count, and one max pool. See load_inception."""

    name, dims = "inception", (2048, 1008, 2023)

    def __init__(self, convention="torch-fidelity"):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False, inception_blocks=[
            inception.BasicConv2d, BlockA, inception.InceptionB, BlockC, inception.InceptionD, BlockE,
            inception.InceptionAux])
        self.Mixed_7c.pool = maximum
        self.convention = convention

    @torch.no_grad()
    def forward(self, x):
        """Features of images.

        x        uint8 [B, 3, H, W]
        returns  pool [B, 2048] (FID, precision and recall), logits [B, 1008] without bias (Inception Score),
                 spatial [B, 2023] (sFID: 7 channels of a 17 x 17 layer; that it is the ADM evaluator's is an
                 inference, not checked against that evaluator)
        """
        x = prepare(x, self.convention).contiguous(memory_format=torch.channels_last)       # [B, 3, 299, 299]
        for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1", "Conv2d_3b_1x1",
                     "Conv2d_4a_3x3", "maxpool2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b",
                     "Mixed_6c"):
            x = self.get_submodule(name)(x)
        spatial = self.Mixed_6d.branch1x1(x)[:, :7].flatten(1)                              # [B, 7 * 17 * 17]
        for name in ("Mixed_6d", "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c"):
            x = self.get_submodule(name)(x)
        pool = x.mean((2, 3))
        return pool, pool @ self.fc.weight.T, spatial

    def fold(self):
        """Fold every batch norm into the convolution before it; a pass over memory less for each."""
        for module in self.modules():
            if isinstance(module, inception.BasicConv2d):
                module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
        return self


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


def load_inception(path=None, device="cpu", convention="torch-fidelity"):
    """InceptionV3 with the published weights, in eval mode.

    path     the file; None looks in torch.hub's cache under both its names, then downloads it
    Raises FileNotFoundError that says what to place where, ValueError for another file.
    """
    path = _published(INCEPTION_URL, INCEPTION_FILES, INCEPTION_SHA256, path)
    with torch.device(device):
        network = InceptionV3(convention)
    network.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    return network.eval().requires_grad_(False).fold().to(memory_format=torch.channels_last)


def _published(url, names, sha256, path=None):
    """Path of a published file, whose SHA-256 begins as given; see load_inception."""
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    if path is None:
        path = next((cache / name for name in names if (cache / name).is_file()), None)
    if path is None:
        path = cache / names[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path)
        except OSError as error:
            raise FileNotFoundError(f"{path} is missing and could not be downloaded "
                                    f"({getattr(error, 'reason', error)}); place {url} (SHA-256 {sha256}...) "
                                    f"there") from None
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise FileNotFoundError(f"{path} cannot be read ({error.strerror}); place {url} there") from None
    digest = hashlib.sha256(content).hexdigest()
    if not digest.startswith(sha256):
        raise ValueError(f"{path}: not the file of that name (SHA-256 {digest[:8]}..., expected "
                         f"{sha256}...); replace it by {url}")
    return path


class Classifier(nn.Module):
    """Any classifier of torchvision as a feature network: the input of its last Linear layer, and its logits.

    name     of the model, such as resnet50; after a colon that of its weights, such as
             mobilenet_v2:IMAGENET1K_V1, if they are not its best
    Raises ValueError for an unknown name, FileNotFoundError if its weights are missing.
    """

    def __init__(self, name):
        super().__init__()
        model, _, version = name.partition(":")
        try:
            if model not in torchvision_models.list_models(module=torchvision_models):
                raise KeyError
            weights = torchvision_models.get_model_weights(model)[version or "DEFAULT"]
        except KeyError:
            raise ValueError(f"--features must be inception, pixels or a classifier of torchvision, such as "
                             f"resnet50 or mobilenet_v2:IMAGENET1K_V1, got {name!r}") from None
        self.name, self.convention, self.transform, self.seen = name, "", weights.transforms(), None
        file = weights.url.rsplit("/", 1)[1]
        _published(weights.url, [file], file.rsplit("-", 1)[1].split(".")[0])
        self.model = torchvision_models.get_model(model, weights=weights)      # some need more than a file
        linear = [module for module in self.model.modules() if isinstance(module, nn.Linear)][-1:]
        if not linear:
            raise ValueError(f"--features {name}: this network ends in no Linear layer; choose another")
        linear[0].register_forward_pre_hook(self.see)
        self.dims = (linear[0].in_features, linear[0].out_features, 0)

    def see(self, linear, inputs):
        self.seen = inputs[0]

    @torch.no_grad()
    def forward(self, x):
        """uint8 [B, 3, H, W] -> features [B, D], logits [B, classes], nothing for sFID [B, 0]."""
        logits = self.model(self.transform(x))
        return self.seen.flatten(1), logits, logits[:, :0]


class Pixels(nn.Module):
    """Raw pixels in [-1, 1] as features, averaged (or repeated) to 16 x 16: no network and no weights."""

    name, dims, convention = "pixels", (3 * 16 * 16, 0, 0), ""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(127.5))

    def forward(self, x):
        """uint8 [B, 3, H, W] -> features [B, 768], no logits [B, 0], nothing for sFID [B, 0]."""
        features = F.adaptive_avg_pool2d(x.float() / self.scale - 1, 16).flatten(1)
        return features, features[:, :0], features[:, :0]


def feature_network(name="inception", inception_weights=None, device="cpu", convention="torch-fidelity"):
    """The network on whose features sets of images are compared; see load_inception, Classifier, Pixels."""
    if inception_weights and name != "inception":
        raise ValueError(f"--inception-weights belongs to --features inception, got --features {name}")
    if name == "inception":
        return load_inception(inception_weights, device, convention)
    network = Pixels() if name == "pixels" else Classifier(name)
    return network.eval().requires_grad_(False).to(device)


def check_metrics(metrics, network, stored=None):
    """The measures asked for; for None all (with stored statistics: FID) that a network's features allow.

    stored   dictionary of load_statistics, the real side, if it is not a set of images
    Raises ValueError for a measure that features or statistics do not allow.
    """
    # Inception Score and sFID are of Inception alone.
    allowed = METRICS if network.name == "inception" else ("fid", "pr")
    if metrics is None:
        metrics = allowed if stored is None else ("fid",)
    if wrong := [metric for metric in metrics if metric not in allowed]:
        raise ValueError(f"--metrics must be of {','.join(allowed)} with --features {network.name}, "
                         f"got {wrong[0]}")
    if stored is not None:
        if stored["features"] != network.name or len(stored["mu"]) != network.dims[0]:
            raise ValueError(f"the stored statistics are of {len(stored['mu'])} features of "
                             f"{stored['features']}, expected {network.dims[0]} of {network.name}")
        if stored.get("convention", network.convention) != network.convention:      # other tools name none
            raise ValueError(f"the stored statistics are of the convention {stored['convention']}; give it "
                             f"as --convention, or store them anew")
        if "pr" in metrics:
            raise ValueError("precision and recall need images on both sides, not stored statistics; leave "
                             "pr out of --metrics")
        if "sfid" in metrics and "mu_s" not in stored:
            raise ValueError("the stored statistics hold none of sFID (mu_s, sigma_s); leave sfid out of "
                             "--metrics")
    return metrics


class Extracted:
    """What one pass of a feature network over images leaves: statistics, and features and logits if needed.

    batches  uint8 [B, 3, H, W] each, of any sizes
    metrics  of METRICS, those to be computed: what none of them needs is not kept
    """

    def __init__(self, batches, network, metrics=METRICS):
        device = next(iter(network.state_dict().values())).device
        summed = "cpu" if device.type == "mps" else device                          # which has no float64
        self.name, self.convention, self.metrics = network.name, network.convention, metrics
        self.fid, self.sfid = (FeatureStatistics(network.dims[i], summed) for i in (0, 2))
        empty = torch.zeros(0, device=device)
        features, logits = [empty.view(0, network.dims[0])], [empty.view(0, network.dims[1])]
        for x in batches:
            pool, logit, spatial = network(x.to(device))
            self.fid.update(pool)
            self.sfid.update(spatial)
            if "pr" in metrics:
                features.append(pool)
            if "is" in metrics:
                logits.append(logit)
        self.features, self.logits = torch.cat(features), torch.cat(logits)         # [n, D], [n, classes]

    @cached_property
    def radii(self):
        return manifold_radii(self.features)

    def gather(self, places, count):
        """Join what all processes of torch.distributed extracted of `count` images; this one, the images at
        `places`. Every process must have been given the same metrics."""
        self.fid.all_reduce()
        self.sfid.all_reduce()
        for name, needed in (("features", "pr"), ("logits", "is")):
            if needed in self.metrics:
                mine = getattr(self, name)
                whole = mine.new_zeros(count, mine.shape[1])
                whole[places] = mine
                distributed.all_reduce(whole)
                setattr(self, name, whole)
        return self


def compare(sets, real, metrics):
    """Measures of sets of images against real ones.

    sets     {name: Extracted}
    real     Extracted; or a dictionary of load_statistics, for FID and sFID alone
    metrics  of METRICS, as check_metrics allows
    returns  {row: {name: number}}; a row is called FID only if the features are Inception's
    """
    stored = real if isinstance(real, dict) else None
    network = next(iter(sets.values())).name
    suffix = "" if network == "inception" else f" ({network})"
    rows = {}
    if "fid" in metrics:
        theirs = (stored["mu"], stored["sigma"]) if stored else (real.fid.mean, real.fid.covariance)
        rows[f"FD{suffix}" if suffix else "FID"] = {
            name: frechet_distance(x.fid.mean, x.fid.covariance, *theirs) for name, x in sets.items()}
    if "is" in metrics:
        scores = {name: inception_score(x.logits, min(10, len(x.logits))) for name, x in sets.items()}
        rows["Inception Score"] = {name: score for name, (score, _) in scores.items()}
        rows["its deviation"] = {name: deviation for name, (_, deviation) in scores.items()}
    if "pr" in metrics:
        rows[f"precision{suffix}"] = {name: share_inside(x.features, real.features, real.radii)
                                      for name, x in sets.items()}
        rows[f"recall{suffix}"] = {name: share_inside(real.features, x.features, x.radii)
                                   for name, x in sets.items()}
    if "sfid" in metrics:
        theirs = (stored["mu_s"], stored["sigma_s"]) if stored else (real.sfid.mean, real.sfid.covariance)
        # Its layer is an inference: not checked against the ADM evaluator.
        rows["sFID (unchecked)"] = {name: frechet_distance(x.sfid.mean, x.sfid.covariance, *theirs)
                                    for name, x in sets.items()}
    return rows


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


@contextlib.contextmanager
def warnings_in_one_line(program):
    """Show warnings as a user of the command line wants them: each once, without the place in the code."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"{program}: {message}", file=sys.stderr)
        yield


def words(text):
    return tuple(text.split(","))


FEATURES_HELP = ("inception, pixels, or a classifier of torchvision such as resnet50 or "
                 "mobilenet_v2:IMAGENET1K_V1; only with inception is it called FID")


def main(argv=None):
    parser = argparse.ArgumentParser("fid.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"fid.py: {message} (--help lists the options)\n")
    parser.add_argument("images", help="folder of generated images")
    parser.add_argument("reference", nargs="?", help="folder of real images, or statistics in an npz file")
    parser.add_argument("--metrics", type=words,
                        help=f"of {','.join(METRICS)} (default all that the features and files allow)")
    parser.add_argument("--features", default="inception", help=f"{FEATURES_HELP} (default %(default)s)")
    parser.add_argument("--convention", choices=CONVENTIONS, default=CONVENTIONS[0],
                        help="how images are resized and scaled for Inception (default %(default)s)")
    parser.add_argument("--save", metavar="FILE.npz", help="write the statistics of the first folder")
    parser.add_argument("--inception-weights", metavar="FILE", help="default: torch.hub's cache, or download")
    parser.add_argument("--batch-size", type=int, default=50, help="images at a time (default %(default)s)")
    parser.add_argument("--workers", type=int, default=0,
                        help="processes that read images (default %(default)s)")
    parser.add_argument("--device", help="default cuda if there is one, else cpu")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)
    try:
        with warnings_in_one_line("fid.py"):
            run(args)
    except (ValueError, OSError) as error:
        line = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        parser.exit(2, f"fid.py: {line}\n")
    except KeyboardInterrupt:
        parser.exit(130, "fid.py: interrupted\n")


def run(args):
    stored = args.reference and args.reference.endswith(".npz")
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
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    network = feature_network(args.features, args.inception_weights, device, args.convention)
    metrics = check_metrics(args.metrics, network, reference)
    for folder in folders:
        if folder.others:
            print(f"{len(folder.others)} files that are no images, such as {folder.others[0]}, are left out",
                  file=sys.stderr)
    extracted = [Extracted(tqdm(DataLoader(folder, args.batch_size, num_workers=args.workers), unit="batch",
                                desc=str(folder.paths[0].parent), disable=None), network, metrics)
                 for folder in folders]
    if args.save:
        save_statistics(args.save, extracted[0])
        print(f"{args.save}: statistics of {extracted[0].fid.count} images", file=sys.stderr)
    if args.reference:
        rows = compare({"images": extracted[0]}, reference or extracted[1], metrics)
        results = {row: columns["images"] for row, columns in rows.items()}
        counts = [len(folder) for folder in folders] + ([reference.get("count")] if stored else [])
        convention = args.convention if network.name == "inception" else None
        if args.json:
            print(json.dumps({"images": args.images, "reference": args.reference, "counts": counts,
                              "features": network.name, "convention": convention, **results}))
            return
        known = " and ".join(str(count or "unknown") for count in counts)
        print(f"{args.images} against {args.reference}: {known} images, "
              + (f"convention {convention}" if convention else f"features {network.name}"))
        width = max(map(len, results))
        for name, value in results.items():
            print(f"{name:{width}}{value:12.4f}")


if __name__ == "__main__":
    main()
