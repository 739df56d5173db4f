"""FID and its relatives: Inception Score, precision and recall, of images in folders or in memory.

    python fid.py out/samples/images data/photos            # generated images against real ones
    python fid.py out/samples/images.npz reference.npz      # npz: images, or stored statistics
    python fid.py data/photos --save reference.npz

FID: Heusel et al. 2017. Inception Score: Salimans et al. 2016. Precision, recall: Kynkaanniemi et al. 2019.
"""

import argparse
import contextlib
import io
import json
import os
import re
import sys
import time
import warnings
from collections import namedtuple
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.models import inception
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

# Inception as torch-fidelity feeds it, like the original TensorFlow network (the Sphere Encoder's published
# numbers are of this kind), or as pytorch-fid, by PyTorch's resizing: other numbers; or raw pixels.
FEATURES = ("torch-fidelity", "pytorch-fid", "pixels")
INCEPTION_URL = ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                 "weights-inception-2015-12-05-6726825d.pth")
INCEPTION_SIZE = 299                    # pixels
ORIENTATION = 274                       # tag of EXIF data, 2 to 8 where the image has to be turned:
UPRIGHT = dict(enumerate(map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), 2))
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
HIDDEN = (".", "__MACOSX", "@eaDir")    # how names begin of files and folders that systems put beside images

# ---- Measures ----------------------------------------------------------------------------------------------


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the squared Fréchet distance of two Gaussians.

    mu1, mu2        [D]     means
    sigma1, sigma2  [D, D]  covariances, symmetric; may be rank-deficient
    returns         float, clamped at 0 against rounding

    The trace of (S1 S2)^(1/2) is the sum of the singular values of C1' C2 with S1 = C1 C1', S2 = C2 C2'; they
    are the roots of the eigenvalues of the symmetric C1' S2 C1. So no matrix square root and no epsilon is
    needed: directions without variance are dropped, since they add nothing to the trace."""
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a).cpu().double() for a in (mu1, sigma1, mu2, sigma2))
    if sigma1.shape != sigma2.shape:
        raise ValueError(f"features of {len(mu1)} and of {len(mu2)} dimensions cannot be compared")
    sigma1, sigma2 = (sigma1 + sigma1.T) / 2, (sigma2 + sigma2.T) / 2
    (C1, regular1), (C2, regular2) = _factor(sigma1), _factor(sigma2)
    if regular1 and regular2:
        roots = torch.linalg.eigvalsh(C1.T @ sigma2 @ C1).clamp(min=0).sqrt()       # three times as fast
    else:
        roots = torch.linalg.svdvals(C1.T @ C2)                 # a root would turn a rounded 0 into 1e-8
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * roots.sum()
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


def inception_score(logits, splits=10):
    """exp(mean KL(p(y|x) || p(y))) of the predicted classes, for each of several parts of the images.

    logits   [n, classes], those without bias of InceptionV3; dealt out in torch-fidelity's fixed order
    returns  (mean, standard deviation) over the parts, at most the images of a part: a warning says so if
             these are fewer than the classes. Raises ValueError if there are no more images than parts"""
    scores, (n, classes) = [], logits.shape
    if n <= splits:
        raise ValueError(f"an Inception Score of {splits} parts needs more than {splits} images, got {n}")
    if n < splits * classes:
        warnings.warn(f"the Inception Score of {n} images in {splits} parts is at most {n / splits:g}; "
                      f"published ones use 50,000 images")
    order = np.random.RandomState(2020).permutation(n)
    for part in np.split(order, [i * n // splits for i in range(1, splits)]):
        p = logits[torch.from_numpy(part)].cpu().double().softmax(dim=1)                    # [part, classes]
        divergence = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))
        scores.append(divergence.sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(generated, real, k=3):
    """How many images lie in the other set's manifold: the union of balls reaching to the k-th neighbour.

    generated, real  [n, D] and [m, D] features
    returns  (precision, recall): the share of generated images in the real manifold, and the reverse
    Raises ValueError for a set of k images or fewer."""
    if min(len(generated), len(real)) <= k:
        raise ValueError(f"precision and recall need more than {k} images, got {len(generated)}, {len(real)}")
    def share_inside(x, others):
        radii = nearest_neighbours(others, others, k + 1)[0][:, k]      # the nearest one is the image itself
        inside = torch.cat([(torch.cdist(part, others) <= radii).any(1) for part in x.split(1024)])
        return inside.cpu().double().mean().item()
    return share_inside(generated, real), share_inside(real, generated)


def nearest_neighbours(x, real, k=1):
    """Distances [n, k] of x [n, D] to the k nearest of real [m, D], ascending, and their places [n, k]."""
    parts = [torch.cdist(part, real).topk(k, largest=False) for part in x.split(1024)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def pixel_features(images, grey=False):
    """Images uint8 [n, 3, H, W] -> float64 [n, D] in [-1, 1], grey if asked, averaged to 16x16 if larger."""
    x = images.cpu().double() / 127.5 - 1
    x = x.mean(1, keepdim=True) if grey else x
    return F.adaptive_avg_pool2d(x, [min(side, 16) for side in x.shape[-2:]]).flatten(1)


# ---- Statistics --------------------------------------------------------------------------------------------


class FeatureStatistics:
    """Mean [dim] and covariance [dim, dim] of a stream of features, summed in float64."""

    def __init__(self, dim):
        self.count = 0
        self.sum = torch.zeros(dim, dtype=torch.float64)
        self.products = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features):
        """Add features [n, dim]; however a stream is cut into batches, the result is the same."""
        x = features.cpu().double()                         # in this order: an MPS device has no float64
        self.count += len(x)
        self.sum += x.sum(0)
        self.products.addmm_(x.T, x)
        return self

    @property
    def mean(self):
        return self.sum / self.count

    @property
    def covariance(self):
        """Divided by count - 1. Raises ValueError for fewer than 2 features."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        if self.count <= len(self.sum):
            warnings.warn(f"only {self.count} images for {len(self.sum)} dimensions: their Fréchet distance "
                          f"is biased upwards, by a lot; published ones use 50,000 images", stacklevel=2)
        return (self.products - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


# What is known of a set of images; of stored statistics the first alone.
Extracted = namedtuple("Extracted", "statistics features logits", defaults=(None, None))
Stored = namedtuple("Stored", "mean covariance count")


def extract(batches, network, device="cpu"):
    """Extracted of batches of uint8 images [B, 3, H, W]; network as feature_network gives it."""
    features, logits = (torch.cat(parts) for parts in zip(*(network(x.to(device)) for x in batches)))
    return Extracted(FeatureStatistics(features.shape[1]).update(features), features, logits)


def compare(generated, real, features):
    """All measures of one Extracted against another that the two allow, {row: number}."""
    (mu1, sigma1), (mu2, sigma2) = ((x.statistics.mean, x.statistics.covariance) for x in (generated, real))
    name, logits = "Fréchet distance" if features == "pixels" else "FID", generated.logits
    rows = {name: frechet_distance(mu1, sigma1, mu2, sigma2)}
    if logits is not None and logits.shape[1]:
        try:
            rows["Inception Score"], rows["its deviation"] = inception_score(logits)
        except ValueError as error:
            warnings.warn(f"left out: {error}")
    if generated.features is not None and real.features is not None:
        rows["precision"], rows["recall"] = precision_recall(generated.features, real.features)
    return rows


def save_statistics(file, statistics, features):
    """Write npz: mu (float32: the official code insists), sigma, features, and how many images, if known."""
    known = {"count": statistics.count} if statistics.count else {}
    np.savez_compressed(file, mu=np.float32(statistics.mean), sigma=np.float64(statistics.covariance),
                        features=features, **known)


def load_statistics(path, features):
    """What an npz file of this or another tool holds: Extracted from mu [D], sigma [D, D], perhaps count and
    features; else the images uint8 [n, H, W, 3] called arr_0, as [n, 3, H, W]. Raises OSError or ValueError
    that names the file, also if its features are said to be others."""
    try:
        with np.load(path) as file:
            if "mu" not in file.files and "arr_0" in file.files:
                x = file["arr_0"]
                if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or not x.size:
                    raise ValueError(f"arr_0 is {x.dtype} {x.shape}, images are uint8 [n, height, width, 3]")
                return torch.from_numpy(x).permute(0, 3, 1, 2)
            mu, sigma, count, said = file["mu"], file["sigma"], None, features
            with contextlib.suppress(KeyError, ValueError):             # another tool may mean an array by it
                count = int(file["count"].item())
            with contextlib.suppress(KeyError, ValueError):
                said = file["features"].item()
        if mu.ndim != 1 or sigma.shape != mu.shape * 2 or not np.isfinite(mu.sum() + sigma.sum()):
            raise ValueError(f"mu has shape {mu.shape}, sigma {sigma.shape}, or they are not finite")
    except OSError:
        raise
    except Exception as error:                              # NumPy and zipfile know a dozen kinds
        raise ValueError(f"{path}: not an npz file of statistics (mu, sigma) or images ({error})") from None
    if said != features:
        raise ValueError(f"{path} holds statistics of {said}; name them: --features")
    return Extracted(Stored(mu, sigma, count))


# ---- Network -----------------------------------------------------------------------------------------------


class InceptionV3(inception.Inception3):
    """The Inception network of FID: torchvision's layers and names (566 of them in its state dict) with 1,008
    classes, average pools in which borders do not count, and one max pool. See feature_network."""

    def __init__(self, convention="torch-fidelity"):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False, inception_blocks=[
            inception.BasicConv2d, BlockA, inception.InceptionB, BlockC, inception.InceptionD, BlockE,
            inception.InceptionAux])
        self.Mixed_7c.pool = maximum                        # one of the two average pools of BlockE
        self.convention = convention

    @torch.no_grad()
    def forward(self, x):
        """Images uint8 [B, 3, H, W] -> pool [B, 2048] (FID, precision, recall) and logits [B, 1008] without
        bias (Inception Score)."""
        x = prepare(x, self.convention).contiguous(memory_format=torch.channels_last)       # [B, 3, 299, 299]
        for name, layer in self.named_children():           # in order, up to the average pool
            if name not in ("avgpool", "dropout", "fc"):
                x = layer(x)
        pool = x.mean((2, 3))
        return pool, pool @ self.fc.weight.T


average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)


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
    """uint8 images [B, 3, H, W] -> what the network takes, float [B, 3, 299, 299]; see FEATURES."""
    if convention == "torch-fidelity":
        return (_resize_tf1(x.float()) - 128) / 128
    return 2 * F.interpolate(x.float() / 255, (INCEPTION_SIZE, INCEPTION_SIZE), mode="bilinear") - 1


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


def feature_network(features="torch-fidelity", device="cpu"):
    """A callable on uint8 images [B, 3, H, W]: features [B, D] and logits [B, 1008], or [B, 0] of raw pixels.
    Inception's weights come through torch.hub; raises OSError that says which file to place where."""
    if features == "pixels":
        return lambda x: (pixel_features(x), torch.zeros(len(x), 0))
    torch.backends.cudnn.allow_tf32 = False                 # features are float32 to their last digit
    network = InceptionV3(features)
    try:
        network.load_state_dict(torch.hub.load_state_dict_from_url(
            INCEPTION_URL, map_location="cpu", check_hash=True, weights_only=True))
    except Exception as error:                              # no network, or one of torch.load's many kinds
        raise OSError(f"Inception's weights are missing or damaged ({error}); place {INCEPTION_URL} into "
                      f"{torch.hub.get_dir()}/checkpoints/") from None
    return network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


# ---- Images ------------------------------------------------------------------------------------------------


def to_uint8(x, truncate=False):
    """Image in [0, 1] -> uint8 0..255, rounded to nearest and clamped: floor(255 x + 0.5); with truncate
    floor(255 x), as the official Sphere Encoder writes its samples."""
    return (x * 255 + (0 if truncate else 0.5)).floor().clamp(0, 255).to(torch.uint8)


def read_image(path):
    """One image file -> PIL image in RGB, turned upright as its EXIF data say, on white where transparent.

    Grey and palette images become RGB; grey floats 0..1 and integers 0..65535 become 8 bits; an MPO of phones
    is its first frame. Raises ValueError naming the file if it is no readable image, an animated one, or one
    of more than 8 bits that does not fill its range, as 12 bits in 16 do: it would be nearly black."""
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise ValueError(f"{image.n_frames} frames, expected a still image")
            packing, x, top, turn = str(image.tile), None, 255, None
            image.load()
            with contextlib.suppress(Exception):            # malformed EXIF data: the pixels are fine
                turn = UPRIGHT.get(image.getexif().get(ORIENTATION))
            image = image if turn is None else image.transpose(turn)
            if image.mode[0] in "IF":                       # grey; convert() would clip it, not scale
                top = 1 if image.mode == "F" else 32767 if ";16S" in packing else 65535
                x = np.where(np.asarray(image) == image.info.get("transparency"), top, image)
                image = Image.fromarray(to_uint8(torch.from_numpy(x / top)).numpy())
            elif ";16" in packing:                          # of 16 bits per colour Pillow gives the upper 8
                x = np.asarray(image.convert("RGB"))
            if x is not None and not (0 <= x.min() and top / 16 <= x.max() <= top):
                raise ValueError(f"values of {x.min()} to {x.max()}, expected 0 to {top}: scale them first")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                if image.getextrema()[3][0] < 255:
                    warnings.warn("transparent parts of images become white")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:                              # Pillow knows a dozen kinds
        raise ValueError(f"{path}: not a readable image ({error})") from None


def find_images(folder):
    """Paths of all images below a folder, sorted. Links are followed, HIDDEN names left out; a warning names
    what else was left out. Raises ValueError for a folder without images."""
    paths, others = [], []
    for where, folders, files in os.walk(folder, followlinks=True):
        above = {path.resolve() for path in (Path(where), *Path(where).absolute().parents)}
        folders[:] = [name for name in folders              # a link to a folder above would have no end
                      if not name.startswith(HIDDEN) and Path(where, name).resolve() not in above]
        for path in (Path(where, name) for name in files if not name.startswith(HIDDEN)):
            (paths if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() else others).append(path)
    if not paths:
        raise ValueError(f"{folder}: no such folder, or no images in it or below (looked for "
                         f"{' '.join(IMAGE_SUFFIXES)})")
    if others:
        warnings.warn(f"{folder}: left out {len(others)} files that are no images, such as {min(others)}")
    return sorted(paths)


class ImageSet:
    """Image files; those at a list of places are uint8 [n, 3, H, W], after a transform of the PIL image."""

    def __init__(self, paths, transform=pil_to_tensor):
        self.paths, self.transform = paths, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, places):
        return torch.stack([self.transform(read_image(self.paths[i])) for i in places])

    def batches(self, size=64):
        """Yield all images as [size, 3, H, W], read by threads: Pillow decodes without Python's lock. Raises
        ValueError for unequal sizes, and at the end, naming every file that cannot be read."""
        faults, first = [], None
        with ThreadPool() as pool:
            quiet = os.environ.get("RANK", "0") != "0" or None          # without a terminal, too
            for i in tqdm(range(0, len(self), size), "reading images", unit="batch", disable=quiet):
                images = pool.map(self._image_or_fault, range(i, min(i + size, len(self))))
                faults += [fault for fault in images if isinstance(fault, str)]
                for path, x in zip(self.paths[i:i + size], [] if faults else images):
                    first = x if first is None else first
                    if x.shape != first.shape:
                        raise ValueError(f"{path} has {x.shape[2]}x{x.shape[1]} pixels, {self.paths[0]} "
                                         f"{first.shape[2]}x{first.shape[1]}; resize them all alike first")
                if not faults:
                    yield torch.stack(images)
        if faults:
            raise ValueError(f"{len(faults)} of {len(self)} images cannot be used; remove or replace them: "
                             f"{'; '.join(faults)}")

    def _image_or_fault(self, i):
        try:
            return self.transform(read_image(self.paths[i]))
        except ValueError as error:
            return str(error)


# ---- Command line ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path, overwrite=True, sync=True):
    """A file to write beside a path, which takes the path's name when it is whole and is removed if not; with
    sync it is on the disk by then, whatever the power does."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{uuid4().hex}.tmp")               # of this writer alone
    try:
        with open(beside, "xb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        if overwrite or not path.exists():                  # perhaps another process came first
            os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error     # of torch.save
        full = isinstance(cause, OSError) and cause.errno and not cause.filename
        raise OSError(f"{path} not written: {cause.strerror}") if full else error
    finally:
        beside.unlink(missing_ok=True)


def pick_device(name=None):
    """Device of a name; of None, the GPU if there is one. Turns TF32 off. Raises ValueError for no device."""
    torch.backends.cudnn.allow_tf32 = False                 # PyTorch's default for matrix products
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        x = torch.zeros(1, device=name)
        x.item()                                            # there are devices without numbers
        return x.device
    except Exception as error:
        why = str(error).splitlines()[0].partition("Expected one of")[0]                # a long list
        raise ValueError(f"--device {name} cannot be used here, cpu can {f'({why})' * bool(why)}") from None


@contextlib.contextmanager
def errors_in_one_line(program):
    """The one place where a mistake becomes a line, with exit code 2, as a warning does; of all commands."""
    first = os.environ.get("RANK", "0") == "0"              # the others of torchrun would say the same
    warnings.formatwarning = lambda message, *_: f"{program}: {message}\n" if first else ""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")            # a console may lack a letter
    try:
        if program != "train.py" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(f"runs as one process: python {program}; only train.py runs under torchrun")
        yield
    except (ValueError, OSError, FloatingPointError, KeyboardInterrupt, RuntimeError, TypeError) as error:
        message = str(error) or "interrupted"
        if isinstance(error, (RuntimeError, TypeError)) and not re.search(
                r"state_dict|keyword arg|multiple values|not supported between|C(\+\+)? compiler", message):
            raise                                           # a mistake of ours
        if isinstance(error, RuntimeError) and "compiler" in message:
            message = f"--compile finds no compiler that works: {message}"
        if "Original Traceback" in message:                 # of a process that reads images: look at the end
            message = message.strip().splitlines()[-1].removeprefix("ValueError: ")
        if not first:
            time.sleep(10)      # if the first process makes the same mistake, torchrun ends this one now
        print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)


@errors_in_one_line("fid.py")
def main(argv=None):
    parser = argparse.ArgumentParser("fid.py", "fid.py A [B] [options]; --help lists them", __doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", metavar="A", help="generated images: a folder, or an npz file of images or of statistics")
    add("reference", metavar="B", nargs="?", help="real ones, likewise")
    add("--features", choices=FEATURES, default=FEATURES[0],
        help="of Inception, fed as by torch-fidelity or pytorch-fid, or raw pixels (%(default)s)")
    add("--save", metavar="FILE.npz", help="write the statistics of A")
    add("--batch-size", type=int, default=50, help="images at a time (%(default)s)")
    add("--device", help="(cuda if there is one, else cpu)")
    add("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)
    if not args.reference and not args.save:
        raise ValueError("give a second folder or npz file to compare with, or --save FILE.npz")
    if args.save and Path(args.save).exists():
        raise ValueError(f"{args.save} already exists; remove it or choose another name")
    device = pick_device(args.device)
    sets = [load_statistics(path, args.features) if path.lower().endswith(".npz")
            else ImageSet(find_images(path)) for path in (args.images, args.reference) if path]
    saved = whole_file(args.save, overwrite=False) if args.save else contextlib.nullcontext()
    with saved as file:                                     # a place that cannot be written to fails now
        network = None
        for k, images in enumerate(sets):
            if not isinstance(images, Extracted):
                network = network or feature_network(args.features, device)
                split = images.batches if isinstance(images, ImageSet) else images.split
                sets[k] = extract(split(args.batch_size), network, device)
        if args.save:
            save_statistics(file, sets[0].statistics, args.features)
    if args.reference:
        result = {"images": args.images, "reference": args.reference, "features": args.features,
                  "counts": [images.statistics.count for images in sets], **compare(*sets, args.features)}
        print(json.dumps(result) if args.json else "\n".join(f"{k:20}{v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
