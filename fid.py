"""FID and its relatives: Inception Score, precision and recall, of images in folders or in memory.

    python fid.py out/samples/images data/photos            # generated images against real ones
    python fid.py out/samples/images.npz reference.npz      # npz: images, or stored statistics
    python fid.py data/photos --save reference.npz

FID: Heusel et al. 2017. Inception Score: Salimans et al. 2016. Precision, recall: Kynkaanniemi et al. 2019.
"""

import argparse
import contextlib
import json
import os
import sys
import time
import warnings
from collections import namedtuple
from functools import lru_cache, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
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
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
HIDDEN = (".", "__MACOSX", "@eaDir")    # prefixes of files and folders that operating systems add

# ---- Measures ----------------------------------------------------------------------------------------------


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the squared Fréchet distance of two Gaussians.

    mu1, mu2        [D]     means
    sigma1, sigma2  [D, D]  covariances, symmetric; may be rank-deficient
    returns         float, clamped at 0 against rounding

    The trace of (S1 S2)^(1/2) is the sum of the singular values of C1' C2 with S1 = C1 C1', S2 = C2 C2'. So
    no matrix square root and no epsilon is needed: directions without variance are dropped, since they add
    nothing to the trace. Raises ValueError for unequal sizes, or a matrix that is no covariance."""
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a).cpu().double() for a in (mu1, sigma1, mu2, sigma2))
    if sigma1.shape != sigma2.shape:
        raise ValueError(f"features of {len(mu1)} and of {len(mu2)} dimensions cannot be compared")
    roots = torch.linalg.svdvals(_factor(sigma1).T @ _factor(sigma2))
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * roots.sum()
    return max(distance.item(), 0.0)


def _factor(sigma):
    """C [D, rank] with C C' = sigma."""
    w, V = torch.linalg.eigh((sigma + sigma.T) / 2)
    if w[0] < -1e-3 * w[-1] - 1e-6:                         # more than rounding, of constant images too
        raise ValueError("sigma of one of the two sets has a negative eigenvalue, so it is no covariance")
    keep = w > w[-1] * len(w) * torch.finfo(torch.float64).eps
    return V[:, keep] * w[keep].sqrt()


def inception_score(logits, splits=10):
    """exp(mean KL(p(y|x) || p(y))) of the predicted classes, for each of several parts of the images.

    logits   [n, classes], those without bias of InceptionV3; dealt out in torch-fidelity's fixed order
    returns  (mean, standard deviation) over the parts, at most the images of a part; published ones are of
             50,000 images. Raises ValueError if there are no more images than parts"""
    n = len(logits)
    if n <= splits:
        raise ValueError(f"an Inception Score of {splits} parts needs more than {splits} images, got {n}")
    scores = []
    order = np.random.RandomState(2020).permutation(n)
    for part in np.split(order, [i * n // splits for i in range(1, splits)]):
        p = logits[part].cpu().double().softmax(dim=1)                    # [part, classes]
        divergence = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))
        scores.append(divergence.sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(generated, real, k=3):
    """How many images lie in the other set's manifold: the union of balls reaching to the k-th neighbour.

    generated, real  [n, D] and [m, D] features
    returns  (precision, recall): the share of generated images in the real manifold, and the reverse
    Raises ValueError for a set of k images or fewer."""
    if min(len(generated), len(real)) <= k:
        raise ValueError(f"precision and recall need more than {k} images in either set")

    def share_inside(x, others):
        radii = nearest_neighbours(others, others, k + 1)[0][:, k]      # the nearest one is the image itself
        inside = torch.cat([(torch.cdist(part, others) <= radii).any(1) for part in x.split(1024)])
        return inside.cpu().double().mean().item()

    return share_inside(generated, real), share_inside(real, generated)


def nearest_neighbours(x, real, k=1):
    """Distances [n, k] of x [n, D] to the k nearest of real [m, D], ascending, and their places [n, k]."""
    parts = [torch.cdist(part, real).topk(k, largest=False) for part in x.split(1024)]
    distances, places = (torch.cat(rows) for rows in zip(*parts))
    return distances, places


def pixel_features(images, grey=False):
    """Images uint8 [n, 3, H, W] -> float64 [n, D] in [-1, 1], grey if asked, averaged to 16x16 if larger."""
    x = images.cpu().double() / 127.5 - 1
    if grey:
        x = x.mean(1, keepdim=True)
    return F.adaptive_avg_pool2d(x, [min(side, 16) for side in x.shape[-2:]]).flatten(1)


def is_grey(images):
    """Whether images [n, 3, H, W] are without colour."""
    return bool((images == images[:, :1]).all())


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
                          f"is biased upwards, by a lot; published ones use 50,000 images")
        return (self.products - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


# What is known of a set of images; of stored statistics the first alone.
Extracted = namedtuple("Extracted", "statistics features logits", defaults=(None, None))
Stored = namedtuple("Stored", "mean covariance count")


def extract(batches, network, device="cpu"):
    """Extracted of batches of uint8 images [B, 3, H, W]; network as feature_network gives it."""
    return extracted([network(x.to(device)) for x in batches])


def extracted(parts):
    """Extracted of a list of the features [B, D] and logits [B, classes] of batches of images."""
    features, logits = (torch.cat(rows) for rows in zip(*parts))
    return Extracted(FeatureStatistics(features.shape[1]).update(features), features, logits)


def compare(generated, real, features):
    """All measures that two Extracted allow, {name: number}; features is their kind, one of FEATURES: only
    Inception's Fréchet distance is called FID."""
    name = "Fréchet distance" if features == "pixels" else "FID"
    rows = {name: frechet_distance(generated.statistics.mean, generated.statistics.covariance,
                                   real.statistics.mean, real.statistics.covariance)}
    if generated.logits is not None and generated.logits.shape[1]:
        try:
            rows["Inception Score"], rows["its deviation"] = inception_score(generated.logits)
        except ValueError as error:
            warnings.warn(f"left out: {error}")
    if generated.features is not None and real.features is not None:
        rows["precision"], rows["recall"] = precision_recall(generated.features, real.features)
    return rows


def save_statistics(file, statistics, features):
    """Write npz: mu (float32: the official code insists), sigma, features, and the number of images, [] if
    it is not known."""
    np.savez_compressed(file, mu=np.float32(statistics.mean), sigma=statistics.covariance, features=features,
                        count=statistics.count or [])


def load_statistics(path, features):
    """Read an npz file of this or another tool.

    returns  Extracted, if the file has mu [D] and sigma [D, D], perhaps count and features; otherwise the
             images uint8 [n, 3, H, W], stored as arr_0 [n, H, W, 3]
    Raises ValueError naming the file, also if it says that its features are of another kind."""
    stored_features = count = None
    try:
        with np.load(path) as file:
            if "mu" not in file:
                x = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
                if x.dtype != torch.uint8 or x.shape[1] != 3:
                    raise ValueError("arr_0 is not uint8 [n, height, width, 3]")
                return x
            mu, sigma = (file[name].astype(float, casting="safe") for name in ("mu", "sigma"))
            if sigma.shape != mu.shape * 2 or not np.isfinite(mu.sum() + sigma.sum()):
                raise ValueError("sigma is not [D, D], or mu or sigma is not finite")
            with contextlib.suppress(KeyError, ValueError):             # these may be another tool's arrays
                stored_features = file["features"].item()
                count = int(file["count"].item())
    except Exception as error:                              # NumPy and zipfile know a dozen kinds
        raise ValueError(f"{path}: not an npz file of statistics (mu, sigma) or images ({error})") from None
    if stored_features not in (None, features):
        raise ValueError(f"{path} holds statistics of {stored_features}; name them: --features")
    return Extracted(Stored(mu, sigma, count))


# ---- Network -----------------------------------------------------------------------------------------------


class InceptionV3(inception.Inception3):
    """The Inception network of FID: torchvision's layers and names (566 of them in its state dict) with 1,008
    classes, average pools in which borders do not count, and one max pool. See feature_network."""

    def __init__(self, convention="torch-fidelity"):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False, inception_blocks=[
            inception.BasicConv2d, BlockA, inception.InceptionB, BlockC, inception.InceptionD, BlockE,
            inception.InceptionAux])
        self.Mixed_7b.pool = average
        self.Mixed_7c.pool = maximum
        self.convention = convention

    @torch.no_grad()
    def forward(self, x):
        """Images uint8 [B, 3, H, W] -> pool [B, 2048] (FID, precision, recall) and logits [B, 1008] without
        bias (Inception Score)."""
        x = prepare(x, self.convention).contiguous(memory_format=torch.channels_last)       # [B, 3, 299, 299]
        for layer in [*self.children()][:-3]:               # all but the average pool, dropout and fc
            x = layer(x)
        pool = x.mean((2, 3))
        return pool, pool @ self.fc.weight.T


average = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
maximum = nn.MaxPool2d(3, stride=1, padding=1)


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
    def _forward(self, x):
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return [self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single),
                self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(self.pool(x))]


def prepare(x, convention):
    """uint8 images [B, 3, H, W] -> what the network takes, float [B, 3, 299, 299]; see FEATURES."""
    if convention == "torch-fidelity":
        return (_resize_tf1(x.float()) - 128) / 128
    return 2 * F.interpolate(x.float() / 255, INCEPTION_SIZE, mode="bilinear") - 1


def _resize_tf1(x):
    """Bilinear resizing as in TensorFlow 1: pixel i of the result looks at i * in / out, corner to corner."""
    for _ in ("rows", "columns"):
        x = x.transpose(2, 3)                               # the side to resize is the last one
        size = x.shape[3]
        position = torch.arange(INCEPTION_SIZE, device=x.device) * (size / INCEPTION_SIZE)
        low = position.long()
        high = (low + 1).clamp(max=size - 1)
        x = torch.lerp(x[..., low], x[..., high], (position - low).to(x.dtype))
    return x


def feature_network(features="torch-fidelity", device="cpu", grey=False):
    """A callable on uint8 images [B, 3, H, W] that returns their features [B, D] and logits [B, 1008]; of raw
    pixels, averaged over the colours if the images are grey, logits [B, 0].

    Inception's weights come through torch.hub. Raises OSError that says which file to place where."""
    if features == "pixels":
        return lambda x: (pixel_features(x, grey), torch.zeros(len(x), 0))
    if features not in FEATURES:
        raise ValueError(f"--features must be one of {FEATURES}, got {features}")
    torch.backends.cudnn.allow_tf32 = False                 # features are float32 to their last digit
    network = InceptionV3(features)
    try:
        weights = torch.hub.load_state_dict_from_url(
            INCEPTION_URL, map_location="cpu", check_hash=True, weights_only=True)
        network.load_state_dict(weights)
    except Exception as error:                              # no network, or one of torch.load's many kinds
        raise OSError(f"Inception's weights are missing or damaged ({error!r}); place "
                      f"{INCEPTION_URL} into {torch.hub.get_dir()}/checkpoints/") from None
    return network.eval().to(device, memory_format=torch.channels_last)


# ---- Images ------------------------------------------------------------------------------------------------


def to_uint8(x, truncate=False):
    """Image in [0, 1] -> uint8 0..255, rounded to nearest and clamped: floor(255 x + 0.5); with truncate
    floor(255 x), as the official Sphere Encoder writes its samples."""
    return (x * 255 + (0 if truncate else 0.5)).floor().clamp(0, 255).to(torch.uint8)


def read_image(path):
    """One image file -> PIL image in RGB, turned upright as its EXIF data say, on white where transparent.

    Grey, palette and CMYK images become RGB; of the MPO files of phones the first frame is taken. Raises
    ValueError naming the file if it is no readable image, an animated one, or has more than 8 bits per
    channel: Pillow would clip these values, or drop their lower bits, whatever range they fill."""
    try:
        with Image.open(path) as image:
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise ValueError("several frames, expected a still image")
            deep_grey = image.mode[0] in "IF"               # integers or floats
            deep_colour = ";16" in str(image.tile) and image.format != "BMP"    # BMP's 16 bits are a pixel's
            if deep_grey or deep_colour:
                raise ValueError(f"mode {image.mode}: more than 8 bits per channel; convert it to 8 bits "
                                 f"first, as ImageMagick's `mogrify -depth 8` does")
            image.load()
            with contextlib.suppress(Exception):            # malformed EXIF fails once the pixels are turned
                ImageOps.exif_transpose(image, in_place=True)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                if image.getextrema()[3] != (255, 255):     # of the alpha channel
                    warnings.warn("transparent parts of images become white")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:                              # Pillow knows a dozen kinds
        raise ValueError(f"{path}: not a readable image ({error})") from None


def find_images(folder):
    """Paths of all images below a folder, sorted. Links are followed, HIDDEN names left out; a warning names
    what else was left out. Raises OSError or ValueError for a folder that cannot be read or has no images."""
    files = set(files_below(folder, Path(folder).resolve().parents))
    paths = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    others = files.difference(paths)
    if not paths:
        raise ValueError(f"{folder}: no images in it or below (looked for {' '.join(IMAGE_SUFFIXES)})")
    if others:
        warnings.warn(f"{folder}: left out {len(others)} files that are no images, such as {min(others)}")
    return sorted(paths)


def files_below(folder, above):
    """Yield the paths of all files below a folder. A link to one of the folders above would have no end."""
    place = Path(folder).resolve()
    if place in above:
        return
    for entry in os.scandir(folder):
        if entry.name.startswith(HIDDEN):
            continue
        if entry.is_dir():
            yield from files_below(entry, (*above, place))
        else:
            yield Path(entry)


class ImageSet:
    """Image files; those at a list of places are uint8 [n, 3, H, W], after a transform of the PIL image."""

    def __init__(self, paths, transform=pil_to_tensor):
        self.paths = paths
        self.transform = transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, places):
        return torch.stack([self.transform(read_image(self.paths[i])) for i in places])

    def batches(self, size=64):
        """Yield all images, in order, as uint8 [size, 3, H, W], the last batch perhaps smaller.

        Raises ValueError for unequal sizes, and at the end, naming every file that cannot be read; no batch
        follows the first such file."""
        faults = []
        shape = None

        def read(path):
            try:
                return self.transform(read_image(path))
            except ValueError as error:
                faults.append(str(error))

        with ThreadPool() as pool:                          # Pillow decodes without Python's lock
            for i in tqdm(range(0, len(self), size), "reading images",
                          disable=not is_first_process() or None):        # None: shown on a terminal only
                paths = self.paths[i:i + size]
                images = pool.map(read, paths)
                if faults:
                    continue                                # only to find the others
                shape = shape or images[0].shape
                for path, x in zip(paths, images):
                    if x.shape != shape:
                        raise ValueError(f"{path} has another size than {self.paths[0]}; resize all images "
                                         f"alike first")
                yield torch.stack(images)
        if faults:
            raise ValueError(f"{len(faults)} of {len(self)} images cannot be used; remove or replace them: "
                             f"{'; '.join(sorted(faults))}")


# ---- Files, processes, command line ------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path, sync=True):
    """A binary file to write beside a path, which takes the path's name when it is whole and is removed if
    not; with sync it is on the disk by then, whatever the power does. Raises OSError naming the path if it
    cannot be written."""
    path = Path(path)
    os.makedirs(path.parent, exist_ok=True)
    beside = Path(f"{path}.{uuid4()}.tmp")                  # of this writer alone
    try:
        with open(beside, "xb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        for cause in (error, error.__context__):            # torch.save hides the second behind its own
            if isinstance(cause, OSError) and cause.strerror:           # such as a full disk
                raise OSError(f"{path} not written: {cause.strerror}") from None
        raise
    finally:
        beside.unlink(missing_ok=True)


def pick_device(name=None):
    """Device of a name; without one, the GPU if there is one. Turns TF32 off. Raises ValueError if the device
    cannot be used."""
    torch.backends.cudnn.allow_tf32 = False                 # as it is for matrix products by default
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        x = torch.zeros(1, device=name)
        x.item()                                            # there are devices without numbers
        return x.device
    except Exception as error:                              # kinds of devices have kinds of errors
        raise ValueError(f"--device {name} cannot be used here ({error!r})") from None


def is_first_process():
    """Whether this is rank 0, the process that prints; always true without torchrun."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def errors_in_one_line(program):
    """Turns a user's mistake into one line, "program: message", and exit code 2, for every command.

    A mistake is a ValueError, OSError, FloatingPointError or KeyboardInterrupt (exit code 130); any other
    exception is one of ours and keeps its traceback. Warnings become such lines, too. If nobody reads what is
    printed any more, the program ends."""
    first = is_first_process()
    warnings.formatwarning = lambda message, *_: f"{program}: {message}\n" if first else ""
    with contextlib.suppress(AttributeError):               # of another kind of stream
        sys.stdout.reconfigure(errors="replace", line_buffering=True)       # a console may lack a letter
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    try:
        if program != "train.py" and not alone or alone and not first:
            raise ValueError("only train.py runs as several processes, and only torchrun starts them (RANK, "
                             "WORLD_SIZE)")
        yield
    except BrokenPipeError:
        os._exit(0)
    except (ValueError, OSError, FloatingPointError, KeyboardInterrupt) as error:
        if not first:
            time.sleep(10)      # if the first process makes the same mistake, torchrun ends this one now
        message = " ".join(str(error).split()) or "interrupted"
        print(f"{program}: {message}", file=sys.stderr)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)


class Parser(argparse.ArgumentParser):
    """The options of a program, of which a wrong one is a mistake like any other."""

    def __init__(self, program, description=None, **options):
        super().__init__(program, f"{program} [options]; --help lists them", description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        raise ValueError(message)


def whole_number(text, least=0):
    """0, 1, 2, ..."""
    if int(text) < least:
        raise ValueError
    return int(text)


def positive(text):
    """1, 2, 3, ..."""
    return whole_number(text, 1)


def number(text):
    """A number from 0 to a billion."""
    if not 0 <= float(text) < 1e9:
        raise ValueError
    return float(text)


@errors_in_one_line("fid.py")
def main(argv=None):
    parser = Parser("fid.py", __doc__)
    add = parser.add_argument
    add("images", metavar="A", help="generated images: a folder, or an npz file of images or of statistics")
    add("reference", metavar="B", nargs="?", help="real ones, likewise")
    add("--features", default="torch-fidelity",
        help="of Inception, fed as by torch-fidelity or pytorch-fid, or raw pixels (%(default)s)")
    add("--save", metavar="FILE.npz", help="write the statistics of A")
    add("--device", help="(cuda if there is one, else cpu)")
    add("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)
    if not (args.reference or args.save):
        raise ValueError("give a second folder or npz file to compare with, or --save FILE.npz")
    if args.save and Path(args.save).exists():
        raise ValueError(f"{args.save} already exists; remove it or choose another name")
    device = pick_device(args.device)
    sets = [images_or_statistics(path, args.features) for path in (args.images, args.reference)
            if path is not None]
    saved = whole_file(args.save) if args.save else contextlib.nullcontext()
    with saved as file:                                     # a place that cannot be written to fails now
        network = lru_cache(partial(feature_network, args.features, device))
        sets = [extract_or_keep(images, network, device) for images in sets]
        if args.save:
            save_statistics(file, sets[0].statistics, args.features)
    if args.reference:
        result = {"images": args.images, "reference": args.reference, "features": args.features,
                  "counts": [x.statistics.count for x in sets], **compare(*sets, args.features)}
        if args.json:
            print(json.dumps(result))
        else:
            for name, value in result.items():
                print(f"{name:20}{value}")


def images_or_statistics(path, features):
    """Batches of images of a folder or of an npz file, or Extracted of an npz file of statistics."""
    if not str(path).endswith(".npz"):
        return ImageSet(find_images(path)).batches()
    stored = load_statistics(path, features)
    if torch.is_tensor(stored):
        return stored.split(64)
    return stored


def extract_or_keep(images, network, device):
    """Extracted of what images_or_statistics gives. `network` is a function that returns the network: it is
    called only if it is needed."""
    if isinstance(images, Extracted):
        return images
    return extract(images, network(), device)


if __name__ == "__main__":
    main()
