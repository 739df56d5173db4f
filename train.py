"""Training and evaluation of both papers' models. SE Sec. 2.3, 3, 4, App. B-D; SLE Sec. 4, 5.

    python train.py                                                   # handwritten digits, in minutes
    python train.py --preset digits-latent                            # the same with a Sphere Latent Encoder
    python train.py --preset folder --data photos --out out/photos    # any folder of class folders
    torchrun --nproc_per_node=8 train.py --preset fashion-mnist       # one process per GPU
    python train.py --evaluate out/digits/last.pt
    python train.py --export out/real --count 100                     # real images as files
"""

import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import cached_property, lru_cache
from inspect import signature
from pathlib import Path

import numpy as np
import torch
from numpy.random import SeedSequence
from torch import distributed, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from fid import (CONVENTIONS, FEATURES_HELP, METRICS, Extracted, check_metrics, compare, feature_network,
                 load_statistics, memorisation, pixel_features, pixel_quality, read_image, to_uint8,
                 warnings_in_one_line, words)
from losses import (DISTANCES, LATENT_WEIGHT_NAMES, PERCEPTUAL, WEIGHT_NAMES, orthogonal_directions,
                    perceptual_distance, sliced_wasserstein, sphere_encoder_loss, sphere_latent_loss)
from models import RAE, RAEBlock, RAEDecoder, SiT, SphereEncoder, SphereTokenizer, Transformer, weights_digest
from sample import (POSITIONS, RAE_OPTIONS, Parser, add_rae_options, build, build_tokenizer, floats,
                    generate, generate_latent, image_transform, ints, load, options_for, pick_device,
                    picture, project_to_3d, rae_arguments, read_checkpoint, reconstruct, sampler,
                    save_checkpoint, sphere_picture, steps_label, stored_tokenizer, to_float, to_pil,
                    to_sphere)
from spherify import MAPPINGS, logit_normal_sigmas, uniform_sigmas

# ---- Presets -----------------------------------------------------------------------------------------------


def size(text):
    return ints(text) if "," in text else text


def option(default, help, low=None, high=math.inf, parse=None, choices=None):
    """A field that is a command-line option: its help, the closed range of a number, how words become its
    value (if its type does not tell)."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "parse": parse,
                                            "choices": choices})


@dataclass(frozen=True)
class Preset:
    """Everything that a result depends on but the seed. Every field is a command-line option of its name.

    Defaults: class dropout and share of hard cases are the paper's (Sec. 2.4, C.2); batch, optimizer, rates,
    clipping, EMA and the use of plain weights the official code's (the paper's Table 16 is not in our text);
    what a preset below does not set, and intervals, are ours.
    """

    dataset: str = option("folder", "digits, fashion-mnist, cifar10, flowers102, animal-faces, imagenet, or "
                                    "folder (class folders of images)")
    data: str = option("data", "folder with the data set's files; digits needs none")
    image_size: int = option(64, "pixels, height and width", 1)
    flip: bool = option(True, "mirror images at random, probability 0.5")
    conditional: bool = option(True, "condition encoder and decoder on the class")

    patch_size: int = option(4, "P, pixels")
    latent_dim: int = option(32, "d, channels of a latent token; L = N d")
    encoder_size: str | tuple = option("small", "small .. giant, or width,depth,heads")
    decoder_size: str | tuple = option("small", "small .. giant, or width,depth,heads")
    mixer_depth: int = option(4, "blocks of each MLP-Mixer")
    pixel_head: str = option("linear", "linear or conv")
    encoder_classes: bool = option(True, "condition the encoder too, not the decoder alone")
    batch_norm: bool = option(False, "normalise the encoder's output before the projection, App. C.3")

    alpha_max: float = option(80.0, "degrees, largest angle of the usual noise")
    alpha_hard: float = option(85.0, "degrees, largest angle of the hard cases")
    hard_prob: float = option(0.1, "share of hard cases; 0 = off", 0, 1)
    stratified: bool = option(False, "spread the noise magnitudes over the global batch")
    official_hard: bool = option(False, "draw hard cases as the official code does, from a narrow band")

    tokenizer: str = option("none", "none: train a Sphere Encoder; else a Sphere Latent Encoder, on latents "
                                    "of rae, a Sphere Encoder's preset (trained first) or its checkpoint")
    denoiser_size: str | tuple = option("B", "S, B, L, XL, or width,depth,heads")
    noise_mean: float = option(0.0, "of the normal draws of the logit-normal noise", -math.inf)
    noise_std: float = option(1.0, "of the normal draws of the logit-normal noise", 0)
    noise_mapping: str = option("sigma", "what is linear in such a draw", choices=MAPPINGS)
    distance: str = option("l2", "between latents", choices=tuple(DISTANCES))
    token_cosine: bool = option(False, "cosine per token instead of whole latents")
    gamma: float = option(1.0, "decay of the noise when a Sphere Latent Encoder samples, 0 = fixed; with "
                               "--evaluate, of any model", 0)
    fresh: bool = option(False, "fresh noise at every step then, instead of the same one; likewise")

    weights: tuple = option((1.0, 1.0, 0.5, 0.5, 0.1), "loss weights: " + " ".join(WEIGHT_NAMES)
                            + "; with a tokenizer: " + " ".join(LATENT_WEIGHT_NAMES))
    swd_weight: float = option(0.0, "of the sliced Wasserstein loss, App. C.3, of every process's "
                                    "micro-batch by itself; 0 = off", 0)
    perceptual: str = option("lpips-vgg", f"perceptual distance: {', '.join(PERCEPTUAL)}")
    class_dropout: float = option(0.1, "probability of the null class, for each pass of each image", 0, 1)

    batch_size: int = option(256, "images per iteration, over all processes and micro-batches", 1)
    epochs: float = option(0, "length of the training; 0 = as --iterations says", 0)
    iterations: int = option(0, "length of the training; 0 = as --epochs says", 0)
    lr: float = option(1e-4, "peak learning rate of the decoder, for a batch of --lr-batch", 0)
    min_lr: float = option(1e-6, "learning rate at the end of the cosine, for a batch of --lr-batch", 0)
    lr_batch: int = option(256, "batch for which the rates are given; they scale linearly with the batch", 1)
    warmup: float = option(0.01, "share of the training with linear warm-up", 0, 1)
    encoder_lr_scale: float = option(0.1, "learning rate of the encoder, as a factor", 0)
    betas: tuple = option((0.9, 0.95), "of AdamW")
    weight_decay: float = option(0.0, "of AdamW, on matrices only", 0)
    clip: float = option(1.0, "largest norm of the gradient; 0 = off", 0)
    ema: float = option(0.9997, "largest decay of the averaged weights, which begins lower", 0, 1)
    use_ema: bool = option(False, "sample with the averaged weights")
    precision: str = option("auto", "bf16 (autocast, but geometry and losses in float32), float32, or auto: "
                                    "bf16 on a GPU")

    log_every: int = option(50, "iterations between lines of log.jsonl", 1)
    checkpoint_every: int = option(1000, "iterations between checkpoints", 1)
    picture_every: int = option(5000, "iterations between pictures; 0 = only at the end", 0)


CIFAR10 = Preset(
    dataset="cifar10", image_size=32, patch_size=2, latent_dim=8,           # paper Sec. 3.1: L = 16 x 16 x 8
    encoder_size="large", decoder_size="large",                             # paper Sec. 3.1
    mixer_depth=2, pixel_head="conv",                                       # script; paper: 4 layers, no head
    alpha_max=80.0, alpha_hard=85.0,                                        # paper C.2
    weights=(1.0, 1.0, 0.5, 0.5, 0.1),                                      # script
    epochs=5000, warmup=10 / 5000)                                          # paper Sec. 3.1; script
AT_256 = Preset(
    image_size=256, patch_size=8, encoder_size="large", decoder_size="large",       # paper Sec. 3.2, Table 5
    mixer_depth=4, pixel_head="linear",                                     # paper Sec. 2.4; script
    alpha_max=85.0, alpha_hard=89.0,                                        # paper Sec. 6, C.2
    log_every=10)
ANIMAL_FACES = replace(
    AT_256, dataset="animal-faces", data="data/afhq", conditional=False,    # paper Sec. 3.2
    latent_dim=128, epochs=1000,                                            # paper Sec. 3.2: L = 32^2 x 128
    weights=(25.0, 1.0, 1.0, 1.0, 0.1), warmup=10 / 1000)                   # script
FLOWERS102 = replace(
    AT_256, dataset="flowers102", latent_dim=128, epochs=1000,              # paper Sec. 3.2
    weights=(25.0, 1.0, 1.0, 1.0, 0.1), warmup=10 / 1000)                   # script
IMAGENET = replace(
    AT_256, dataset="imagenet", data="data/imagenet",
    latent_dim=64, epochs=800,                                              # paper Sec. 3.2: L = 32^2 x 64
    weights=(50.0, 1.0, 25.0, 1.0, 0.1), warmup=5 / 800)                    # script
# Little noise and no classes: a Sphere Encoder that serves as tokenizer. Of its losses only Eq. 7 is left.
TOKENIZER = {"conditional": False, "alpha_max": 45.0, "alpha_hard": 45.0, "hard_prob": 0.0,
             "weights": (1.0, 0.0, 0.0, 0.0, 0.0)}
# On the RAE's latents. The model card has the sizes of images and denoisers and the use of averaged weights,
# our text of the paper the flips. All else is assumed: rates, EMA and batch are those of the RAE's authors
# for their diffusion models, the epochs the Sphere Encoder's.
RAE_LATENTS = Preset(
    tokenizer="rae", image_size=256, denoiser_size="B", alpha_max=85.0, weights=(1.0, 1.0, 1.0, 1.0, 0.0),
    perceptual="none", batch_size=1024, lr=2e-4, min_lr=2e-5, lr_batch=1024, ema=0.9995, use_ema=True,
    epochs=1000, warmup=10 / 1000, log_every=10)
BASE = {"encoder_size": "base", "decoder_size": "base"}
SCRIPT = {**BASE, "perceptual": "lpips-convnext", "stratified": True, "official_hard": True}

# "paper": arXiv 2602.15030. "script": what the official code's scripts and defaults set.
PRESETS = {
    # Real 8x8 digits shown at 16x16. Sizes, rates and the weight of lat_con are ours, for minutes on a
    # laptop; the encoder is smaller than the decoder, because that leaves time for more iterations.
    "digits": Preset(
        dataset="digits", image_size=16, flip=False, patch_size=4, latent_dim=16,
        encoder_size=(64, 1, 4), decoder_size=(96, 3, 4), mixer_depth=2,
        weights=(1.0, 0.0, 1.0, 0.0, 0.02), perceptual="none",
        batch_size=32, iterations=2200, lr=4e-3, min_lr=1e-5, lr_batch=32, warmup=50 / 2200,
        encoder_lr_scale=1.0, ema=0.99, use_ema=True, log_every=10, checkpoint_every=200, picture_every=500),
    # 28x28 clothes in a frame of 32x32, not mirrored since all shoes point left; ours, an hour on 2 cores.
    "fashion-mnist": Preset(
        dataset="fashion-mnist", image_size=32, flip=False, patch_size=4, latent_dim=8,
        encoder_size=(64, 1, 4), decoder_size=(96, 4, 4), mixer_depth=2,
        weights=(1.0, 0.0, 1.0, 0.0, 0.02), perceptual="none",
        batch_size=32, iterations=16_000, lr=3e-3, min_lr=1e-5, lr_batch=32, warmup=200 / 16_000,
        encoder_lr_scale=1.0, ema=0.999, use_ema=True, picture_every=4000),
    # Four tokens of 8x8 pixels: a quarter of the work of 4x4 ones, and a smoother latent space. All of it
    # ours, as are the denoisers' settings; together as long as "digits".
    "digits-tokenizer": Preset(
        dataset="digits", image_size=16, flip=False, patch_size=8, latent_dim=32,
        encoder_size=(96, 1, 4), decoder_size=(96, 2, 4), mixer_depth=2, **TOKENIZER, perceptual="none",
        batch_size=64, iterations=2000, lr=4e-3, min_lr=1e-5, lr_batch=64, warmup=50 / 2000,
        encoder_lr_scale=1.0, ema=0.99, use_ema=True, log_every=10, checkpoint_every=200),
    "digits-latent": Preset(
        dataset="digits", image_size=16, flip=False, tokenizer="digits-tokenizer", denoiser_size=(128, 4, 4),
        alpha_max=81.0, noise_mean=-1.0, noise_std=1.5, weights=(1.0, 1.0, 1.0, 1.0, 0.0), perceptual="none",
        batch_size=64, iterations=1600, lr=2e-3, min_lr=1e-5, lr_batch=64, warmup=50 / 1600,
        weight_decay=0.1, ema=0.99, use_ema=True, log_every=10, checkpoint_every=200, picture_every=500),
    "fashion-mnist-tokenizer": Preset(
        dataset="fashion-mnist", image_size=32, flip=False, patch_size=8, latent_dim=32,
        encoder_size=(96, 1, 4), decoder_size=(128, 3, 4), mixer_depth=2, **TOKENIZER, perceptual="none",
        batch_size=64, iterations=5000, lr=3e-3, min_lr=1e-5, lr_batch=64, warmup=100 / 5000,
        encoder_lr_scale=1.0, ema=0.999, use_ema=True),
    "fashion-mnist-latent": Preset(
        dataset="fashion-mnist", image_size=32, flip=False, tokenizer="fashion-mnist-tokenizer",
        denoiser_size=(128, 6, 4), alpha_max=82.0, noise_mean=-1.0, noise_std=1.5,
        weights=(1.0, 1.0, 1.0, 1.0, 0.0), perceptual="none", batch_size=64, iterations=16_000, lr=2e-3,
        min_lr=1e-5, lr_batch=64, warmup=200 / 16_000, ema=0.999, use_ema=True, picture_every=4000),
    "animal-faces-latent": replace(RAE_LATENTS, dataset="animal-faces", data="data/afhq"),
    "flowers102-latent": replace(RAE_LATENTS, dataset="flowers102"),
    "imagenet-latent": replace(RAE_LATENTS, dataset="imagenet", data="data/imagenet", denoiser_size="XL",
                               epochs=800, warmup=5 / 800),
    "cifar10": CIFAR10,
    "cifar10-uncond": replace(CIFAR10, conditional=False, epochs=10_000, warmup=10 / 10_000),   # paper App. D
    "animal-faces": ANIMAL_FACES,
    "flowers102": FLOWERS102,
    "imagenet-l": IMAGENET,
    "imagenet-xl": replace(IMAGENET, encoder_size="xlarge", decoder_size="xlarge"),          # paper Sec. 3.2
    # The model of the paper's ablations, Sec. 6: L = 16^2 x 256. Assumed to share all else with imagenet-l.
    "imagenet-ablation": replace(IMAGENET, patch_size=16, latent_dim=256, epochs=200, warmup=5 / 200, **BASE),
    # What the official scripts train as they stand: base models, where the paper's are large, on their noise
    # and perceptual distance.
    "cifar10-base": replace(CIFAR10, **SCRIPT),
    "animal-faces-base": replace(ANIMAL_FACES, **SCRIPT),
    "flowers102-base": replace(FLOWERS102, **SCRIPT),
    "imagenet-base": replace(IMAGENET, **SCRIPT),
    # Any folder of class folders; all of it ours.
    "folder": Preset(iterations=100_000),
}


def is_latent(preset):
    """Whether a preset trains a Sphere Latent Encoder."""
    return preset.tokenizer != "none"


PRESET_OPTIONS = {f.name for f in fields(Preset)}


def total_iterations(preset, images):
    """Length of a training on so many images."""
    return preset.iterations or math.ceil(preset.epochs * images / preset.batch_size)


# ---- Data --------------------------------------------------------------------------------------------------

# Number of classes, and what --data must hold.
DATASETS = {
    "digits": (10, ""),
    "fashion-mnist": (10, "FashionMNIST/raw/ with the four unpacked files train-images-idx3-ubyte ... "
                          "(Debian: package dataset-fashion-mnist)"),
    "cifar10": (10, "cifar-10-batches-py/, from https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
    "flowers102": (102, "flowers-102/ with jpg/, imagelabels.mat and setid.mat, from "
                        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"),
    "animal-faces": (3, "AFHQ's train/ and val/ (or test/), each with cat/, dog/ and wild/"),
    "imagenet": (1000, "train/ and val/, each with 1,000 folders of images, one per class"),
    "folder": (10, "one sub-folder of images per class, or train/ and val/ (or test/) of that form"),
}


def load_data(preset):
    """Training set, held-out set (None if the data set has none) and class names of a preset.

    The sets are indexable, with labels in `.targets`; an item is (uint8 [3, S, S], class), grey repeated to 3
    channels. As in the paper, Flowers-102 and Animal-Faces train on all their images.
    Raises ValueError or FileNotFoundError that says what to put where.
    """
    if preset.dataset not in DATASETS:
        raise ValueError(f"--dataset must be one of {', '.join(DATASETS)}, got {preset.dataset!r}")
    try:
        return _load_data(preset.dataset, Path(preset.data), preset.image_size)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"{preset.data}: {preset.dataset} is not there ({reason}); --data must name "
                                f"a folder that holds {DATASETS[preset.dataset][1]}") from None


def _load_data(dataset, root, S):
    if dataset == "digits":
        from sklearn.datasets import load_digits
        digits = load_digits()
        images = torch.from_numpy(digits.images).float()[:, None] / 16                     # [1797, 1, 8, 8]
        train, held_out = (in_memory(images[part], digits.target[part], S)
                           for part in (slice(1500), slice(1500, None)))
        return train, held_out, [str(name) for name in digits.target_names]
    if dataset == "fashion-mnist":
        from torchvision.datasets import FashionMNIST
        parts = [FashionMNIST(root, train=train, download=True) for train in (True, False)]
        train, held_out = (in_memory(F.pad(part.data.float()[:, None] / 255, (2, 2, 2, 2)), part.targets, S)
                           for part in parts)
        return train, held_out, parts[0].classes
    if dataset == "cifar10":
        from torchvision.datasets import CIFAR10
        parts = [CIFAR10(root, train=train, download=True) for train in (True, False)]
        train, held_out = (in_memory(torch.from_numpy(part.data).permute(0, 3, 1, 2) / 255, part.targets, S)
                           for part in parts)
        return train, held_out, parts[0].classes
    if dataset == "flowers102":
        from scipy.io import loadmat
        from torchvision.datasets import Flowers102
        Flowers102(root, download=True)
        folder = root / "flowers-102"
        labels = loadmat(folder / "imagelabels.mat")["labels"][0].tolist()                          # 1..102
        files = [(folder / "jpg" / f"image_{i:05d}.jpg", label - 1) for i, label in enumerate(labels, 1)]
        return ImageFiles(files, S), None, [str(k) for k in range(1, 103)]

    from torchvision.datasets import ImageFolder
    split = (root / "train").is_dir() or dataset != "folder"
    train = ImageFolder(root / "train" if split else root)
    held_out = next((ImageFolder(root / name) for name in ("val", "test")
                     if split and (root / name).is_dir()), None)
    if dataset != "folder" and not (len(train.classes) == DATASETS[dataset][0] and held_out):
        raise ValueError(f"{root}: expected {DATASETS[dataset][1]}; found {len(train.classes)} folders in "
                         f"train/ and {'a' if held_out else 'no'} val/ or test/; --preset folder takes any")
    if held_out and held_out.classes != train.classes:
        raise ValueError(f"{held_out.root}: its class folders differ from those of {train.root}")
    if dataset == "animal-faces":
        return ImageFiles(train.samples + held_out.samples, S), None, train.classes
    return ImageFiles(train.samples, S), ImageFiles(held_out.samples, S) if held_out else None, train.classes


def in_memory(images, targets, size):
    """Images [B, 1 or 3, H, W] in [0, 1] -> data set of uint8 [3, size, size]; resized bilinearly."""
    images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=size < images.shape[-1])
    data = TensorDataset(to_uint8(images).expand(-1, 3, -1, -1), torch.as_tensor(targets))
    data.targets = data.tensors[1].tolist()
    return data


def export(preset, out, count=None):
    """Write a preset's images as PNG files: out/train/CLASS/000012.png and, held-out ones, out/val/CLASS/....

    count    at most so many of each part, a fixed random choice from all classes in turn; None: all
    The number is the image's place in its data set. `--preset folder --data out` trains on them, fid.py reads
    them, sample.py edits them. Raises ValueError if the folder holds anything already.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; --export needs a new folder")
    train_set, held_out, class_names = load_data(preset)
    for part, data in (("train", train_set), ("val", held_out)):
        order = [] if data is None else torch.randperm(len(data), generator=seeded(0)).tolist()
        seen, turns = Counter(), {}
        for place in order:
            turns[place] = seen[data.targets[place]], data.targets[place]
            seen[data.targets[place]] += 1
        chosen = sorted(order, key=turns.get)[:count]
        for place in tqdm(chosen, desc=part, unit="image", disable=None):
            image, label = data[place]
            folder = out / part / class_names[label].replace("/", "-")              # "T-shirt/top"
            folder.mkdir(parents=True, exist_ok=True)
            to_pil(to_float(image)).save(folder / f"{place:06d}.png")
        if chosen:
            say(f"{out / part}: {len(chosen)} images")


class ImageFiles(Dataset):
    """Image files with their classes: the shorter side is resized to `size` (bicubic), the centre cropped."""

    def __init__(self, samples, size):
        self.size = size
        self.paths, self.targets = zip(*samples)
        self.transform = image_transform(size)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return self.transform(read_image(self.paths[i])), self.targets[i]


def batch_indices(size, batch_size, seed, steps, mine=slice(None)):
    """Yield, for every step, the data-set indices of a part of the global batch.

    The data are one endless sequence of epochs, each a permutation drawn from (seed, epoch); the batch of
    step s begins at position s * batch_size. So a step's batch needs no history, and no image is dropped.
    """
    @lru_cache(maxsize=2)
    def order(epoch):
        return torch.randperm(size, generator=seeded(seed, 0, epoch)).tolist()

    for step in steps:
        positions = range(step * batch_size, (step + 1) * batch_size)[mine]
        yield [order(position // size)[position % size] for position in positions]


# ---- Latents -----------------------------------------------------------------------------------------------


def new_tokenizer(preset, out, rae):
    """The tokenizer that a new run of a Sphere Latent Encoder is trained on; see Preset.tokenizer."""
    if preset.tokenizer == "rae":
        tokenizer = RAE(**rae)
    else:
        path = out / "tokenizer" / "last.pt" if preset.tokenizer in PRESETS else Path(preset.tokenizer)
        model = load(path)
        if not isinstance(model, SphereEncoder):
            raise ValueError(f"{path} holds a Sphere Latent Encoder; --tokenizer needs rae, a preset or a "
                             f"checkpoint of a Sphere Encoder")
        tokenizer = SphereTokenizer(model)
    if tuple(tokenizer.image_size) != (preset.image_size,) * 2:
        raise ValueError(f"--image-size {preset.image_size} must be that of the tokenizer "
                         f"{preset.tokenizer}, {tokenizer.image_size[0]}")
    return tokenizer


class LatentCache(Dataset):
    """Latents of a whole data set in a memory-mapped file, latents.bin in a folder; computed if it is absent.

    An item i is (z [N, d], class) of image i; if flips are drawn, item n + i is that of image i mirrored. The
    file begins with what its latents depend on: the digests of tokenizer and data.
    Raises ValueError naming the file, if it is of another tokenizer or data set, or cut short.
    """

    header = 4096                                           # bytes

    def __init__(self, folder, data, tokenizer, flip, device, workers=0):
        self.targets = data.targets
        shape = (1 + flip, len(data), *tokenizer.latent_shape)
        path = Path(folder) / "latents.bin"
        key = {"tokenizer": weights_digest(tokenizer), "data set": data_digest(data), "shape": list(shape)}
        first_process_first(lambda: path.exists() or self.write(path, key, data, tokenizer, device, workers))
        with open(path, "rb") as file:
            head = file.read(self.header)
        try:
            stored = json.loads(head)
        except ValueError:
            stored = {}
        for name, value in key.items():
            if stored.get(name) != value:
                raise ValueError(f"{path} holds latents of another {name}; delete it, or name another "
                                 f"folder: --latent-cache")
        size, expected = path.stat().st_size, self.header + 4 * math.prod(shape)
        if size != expected:
            raise ValueError(f"{path} has {size} bytes, expected {expected}: it was cut short; delete it")
        self.latents = np.memmap(path, np.float32, "r", self.header, shape).reshape(-1, *shape[2:])

    def write(self, path, key, data, tokenizer, device, workers):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{process_rank()[0]}.tmp")     # each machine writes its own
        with open(beside, "wb") as file:
            file.write(json.dumps(key).encode().ljust(self.header))
            file.flush()
            if hasattr(os, "posix_fallocate"):              # a full disk is told now, and not by a bus error
                os.posix_fallocate(file.fileno(), 0, self.header + 4 * math.prod(key["shape"]))
        latents = np.memmap(beside, np.float32, "r+", self.header, tuple(key["shape"]))
        loader = DataLoader(data, batch_size=64, num_workers=workers, generator=seeded(0))
        place = 0
        for images, _ in tqdm(loader, desc="latents", unit="batch", disable=process_rank()[0] > 0 or None):
            x = to_float(images.to(device))
            for variant in range(len(latents)):
                z = tokenizer.encode(x.flip(-1) if variant else x)
                latents[variant, place:place + len(x)] = z.cpu().numpy()
            place += len(x)
        latents.flush()
        os.replace(beside, path)

    def __len__(self):
        return len(self.latents)

    def __getitem__(self, i):
        return torch.from_numpy(self.latents[i].copy()), self.targets[i % len(self.targets)]


def data_digest(data):
    """SHA-256 of images in memory, or of the names and sizes of image files and of the size they get."""
    digest = hashlib.sha256()
    if isinstance(data, TensorDataset):
        digest.update(data.tensors[0].contiguous().numpy())
    else:
        files = [("/".join(Path(path).parts[-2:]), os.path.getsize(path)) for path in data.paths]
        digest.update(json.dumps([data.size, files]).encode())
    digest.update(json.dumps(list(data.targets)).encode())
    return digest.hexdigest()


def mirrored(indices, images, preset, seed, steps, mine):
    """Indices of images -> those of LatentCache, where a step's flips are other items."""
    for step, batch in zip(steps, indices):
        flip = random_draws(preset, seed, step)["flip"][mine]
        yield [index + images * int(flipped) for index, flipped in zip(batch, flip)]


# ---- Randomness --------------------------------------------------------------------------------------------


def hashed(*key):
    """A key of integers -> 32 bits, all that a CPU generator of torch uses of a seed."""
    return int(SeedSequence(key).generate_state(1)[0])


def seeded(*key):
    return torch.Generator().manual_seed(hashed(*key))


def random_draws(preset, seed, step):
    """All random scalars of a training step, for the whole global batch: a function of (seed, step) alone.

    returns  flip [B], drop [4, B] (null class in E(x), D(v_NOISY), D(v_noisy), E(D(v_NOISY)); of a denoiser,
             in its two or three passes), sigma [B], sigma_sub [B], e_seed [B]
    """
    B, generator = preset.batch_size, seeded(seed, 1, step)
    if is_latent(preset):
        sigma, sigma_sub = logit_normal_sigmas(B, preset.alpha_max, preset.noise_mean, preset.noise_std,
                                               preset.noise_mapping, generator)
    else:
        sigma, sigma_sub = uniform_sigmas(B, preset.alpha_max, preset.alpha_hard, preset.hard_prob,
                                          preset.stratified, generator, preset.official_hard)
    return {
        "flip": (torch.rand(B, generator=generator) < 0.5) & preset.flip,
        "drop": torch.rand(4, B, generator=generator) < preset.class_dropout,
        "sigma": sigma,
        "sigma_sub": sigma_sub,
        "e_seed": torch.randint(2**63 - 1, (B,), generator=generator),
    }


def gaussian(seeds, shape, device):
    """Training noise e [len(seeds), *shape], drawn on the device, each sample from a seed of its own."""
    generator = torch.Generator(device)
    return torch.stack([torch.randn(shape, device=device, generator=generator.manual_seed(seed))
                        for seed in seeds.tolist()])


def random_directions(model, *key):
    """256 directions (at most L) for a sliced Wasserstein distance of the model's latents, [L, M]."""
    L = math.prod(model.latent_shape)
    return orthogonal_directions(torch.randn(L, min(L, 256), generator=seeded(*key, 3)))


# ---- Training ----------------------------------------------------------------------------------------------


class Objective(nn.Module):
    """SE Eq. 10, or SLE Eq. 2 and 3, as one forward for DistributedDataParallel and torch.compile. Draws
    nothing itself."""

    def __init__(self, model, perceptual, preset):
        super().__init__()
        self.model, self.perceptual, self.preset = model, perceptual, preset

    def forward(self, x, y, sigma, sigma_sub, e, directions=None):
        """x: images [B, 3, H, W], or latents [B, N, d] for a denoiser."""
        p = self.preset
        if is_latent(p):
            return sphere_latent_loss(self.model, x, y, sigma, sigma_sub, e, p.weights, p.distance,
                                      p.token_cosine)
        return sphere_encoder_loss(self.model, x, y, sigma, sigma_sub, e, p.weights, self.perceptual,
                                   p.swd_weight, directions)


def build_model(preset, class_names, latent_shape=None):
    """A preset's network; latent_shape (N, d) is that of a denoiser's tokenizer."""
    if preset.conditional and len(class_names) < 2:
        raise ValueError(f"{preset.data} has only the class {class_names[0]!r}; --no-conditional trains "
                         f"without classes")
    class_names = class_names if preset.conditional else []
    if is_latent(preset):
        model = SiT(*latent_shape, len(class_names), preset.denoiser_size, preset.alpha_max, preset.gamma,
                    not preset.fresh)
    else:
        model = SphereEncoder(preset.image_size, preset.patch_size, preset.latent_dim, len(class_names),
                              preset.encoder_size, preset.decoder_size, preset.mixer_depth,
                              preset.pixel_head, preset.alpha_max, preset.encoder_classes,
                              preset.batch_norm)
    model.class_names = class_names
    return model


def build_optimizer(model, preset):
    """AdamW in groups: of encoder, decoder or denoiser the matrices (decayed) and the rest (not decayed)."""
    networks = ([(model, 1.0)] if is_latent(preset)
                else [(model.encoder, preset.encoder_lr_scale), (model.decoder, 1.0)])
    groups = [{"params": [p for p in network.parameters() if p.requires_grad and (p.ndim > 1) == matrices],
               "weight_decay": preset.weight_decay * matrices, "lr_scale": scale}
              for network, scale in networks for matrices in (True, False)]
    return torch.optim.AdamW(groups, lr=preset.lr, betas=tuple(preset.betas), fused=True)


def learning_rate(preset, step, total):
    """Linear warm-up, then a cosine that reaches its minimum at the end; both scale with the global batch.

    The official code ends its cosine a warm-up earlier and stays at the minimum; the paper does not say.
    """
    scale = preset.batch_size / preset.lr_batch
    warmup = round(preset.warmup * total)
    if step < warmup:
        return scale * preset.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    return scale * (preset.min_lr + (preset.lr - preset.min_lr) * (1 + math.cos(math.pi * progress)) / 2)


def update_ema(ema, model, decay, step):
    """Move the averaged weights towards the model's. The decay rises with the step (assumed: at 0.9997 from
    the first step on, a short run's average would still be mostly its initial zero output)."""
    decay = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        for average, parameter in zip(ema.parameters(), model.parameters()):
            average.lerp_(parameter, 1 - decay)
        for average, buffer in zip(ema.buffers(), model.buffers()):         # statistics of a batch norm
            average.copy_(buffer)


def train(preset, out, seed=0, resume=False, device=None, workers=None, accumulate=1, compile=False,
          activation_checkpointing=False, perceptual_weights=None, rae=None, latent_cache=None,
          evaluate_every=0, evaluation=None):
    """Train a preset into a folder; under torchrun, as one of its processes. Returns the checkpoint's path.

    preset   Preset (see PRESETS). If its tokenizer is a preset too, that is trained first, into out/tokenizer
    out      folder for last.pt, log.jsonl, losses.png and samples-*.png; must not hold another run unless
             resume. With several machines, one that all of them see
    seed     with the preset decides every number of the run, whatever the number of processes
    resume   continue from out/last.pt exactly where it was written; preset and seed must be that run's
    workers  processes that read images; None is 0 for data in memory, else up to 8

    These change memory and speed, and results only by rounding:
    accumulate                micro-batches per iteration
    compile                   torch.compile the objective
    activation_checkpointing  compute the blocks' activations again in the backward pass, do not store them
    perceptual_weights        folder of the perceptual networks' files, see losses.perceptual_distance
    rae                       arguments of models.RAE, such as the places of its files
    latent_cache              folder of latents.bin, see LatentCache; None: out if the images are in memory,
                              else no cache; "none": no cache, images are encoded in every iteration

    evaluate_every  epochs between evaluations, written to evaluations.jsonl; 0 = off. The checkpoint whose
             Fréchet distance (FID, if measured) at the last of its numbers of steps is lowest is kept as
             best.pt. The training itself is not changed by it
    evaluation      Evaluation, for these

    Raises ValueError or OSError for bad input, before anything is written where it can be known by then (an
    unreadable image cannot: mend it and resume), FloatingPointError if a loss or gradient is not finite,
    KeyboardInterrupt after saving if Ctrl-C or SIGTERM came.
    """
    rank, world = process_rank()
    out = Path(out)
    last, log, evaluations = out / "last.pt", out / "log.jsonl", out / "evaluations.jsonl"
    check_preset(preset, world, accumulate)
    check_batch_norm(preset, world, accumulate, activation_checkpointing)
    evaluation = evaluation or Evaluation()
    check_evaluation(evaluation, preset)
    if not 0 <= evaluate_every < math.inf or evaluate_every and not {"pixels", "fid"} & {*evaluation.metrics}:
        raise ValueError(f"--evaluate-every must be at least 0 and needs pixels or fid in --metrics, "
                         f"got {evaluate_every:g} and {','.join(evaluation.metrics)}")
    if seed < 0 or (workers or 0) < 0:
        raise ValueError(f"--seed and --workers must be at least 0, got {seed} and {workers}")
    checkpoint = check_folder(preset, out, seed, resume)
    if checkpoint and checkpoint["step"] == total_iterations(preset, checkpoint["images"]):
        say(f"{last}: already trained for all its {checkpoint['step']} iterations")
        return last
    with process_group(device) as device, interruptible() as interrupted:
        data, held_out, class_names = first_process_first(lambda: load_data(preset))
        measure = Evaluator(evaluation, data, held_out, device) if evaluate_every else None
        if preset.tokenizer in PRESETS and not checkpoint:
            say(f"{out / 'tokenizer'}: first the tokenizer, {preset.tokenizer}")
            begun = resume and (out / "tokenizer" / "last.pt").exists()
            small = replace(PRESETS[preset.tokenizer], data=preset.data, precision=preset.precision)
            train(small, out / "tokenizer", seed, begun, device, workers,
                  perceptual_weights=perceptual_weights)

        # Networks and averages, optimizer
        tokenizer, perceptual = None, None
        if is_latent(preset):
            tokenizer = first_process_first(
                lambda: build_tokenizer(checkpoint.get("tokenizer"), last, rae) if checkpoint
                else new_tokenizer(preset, out, rae or {})).to(device)
        elif any(preset.weights[1::2]):
            perceptual = first_process_first(
                lambda: perceptual_distance(preset.perceptual, perceptual_weights))
        total = total_iterations(preset, len(data))
        measure_every = max(1, round(evaluate_every * len(data) / preset.batch_size))
        best = {"score": math.inf, "step": 0,
                "evaluation": json.loads(json.dumps(asdict(evaluation), default=str))}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hashed(seed, 2))
            model = build_model(preset, class_names, tokenizer and tokenizer.latent_shape).to(device)
        if checkpoint:
            trained_on = checkpoint["images"], checkpoint["class_names"]
            if trained_on != (len(data), model.class_names):
                raise ValueError(f"{last} was trained on {trained_on[0]} images of {trained_on[1]}; "
                                 f"{preset.data} now has {len(data)} of {class_names}; restore the data set")
        if workers is None:
            machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            workers = 0 if isinstance(data, TensorDataset) else min(8, os.cpu_count() // machine)
        source = data                                       # of what the loss is of: images or latents
        if tokenizer and (latent_cache or isinstance(data, TensorDataset)) and latent_cache != "none":
            source = LatentCache(latent_cache or out, data, tokenizer, preset.flip, device, workers)
        ema = copy.deepcopy(model).requires_grad_(False).eval()
        for module in model.modules():
            if isinstance(module, Transformer):
                module.recompute = activation_checkpointing
        if tokenizer:
            model.attach(tokenizer)
            ema.attach(tokenizer)
        objective = Objective(model, perceptual, preset).to(device)
        if world > 1:
            if device.type == "cuda":                       # a batch norm, if any, sees the global batch
                objective = nn.SyncBatchNorm.convert_sync_batchnorm(objective)
            ddp = nn.parallel.DistributedDataParallel
            renamed = "forward_sync_buffers" in signature(ddp).parameters              # since torch 2.15
            objective = ddp(objective, device_ids=[device] if device.type == "cuda" else None,
                            gradient_as_bucket_view=True,
                            **{"forward_sync_buffers" if renamed else "broadcast_buffers": False})
        if compile:
            # Its DDP optimizer refuses activation checkpointing in some versions of torch.
            torch._dynamo.config.optimize_ddp = not activation_checkpointing
            objective.compile(dynamic=False)            # in place: parameters keep their names
        on_gpu = device.type == "cuda"
        bf16 = preset.precision == "bf16" or preset.precision == "auto" and on_gpu
        optimizer = build_optimizer(model, preset)

        kept_tokenizer = tokenizer and stored_tokenizer(tokenizer)  # once: of an RAE it digests all weights

        def save(step, path=last):
            save_checkpoint(path, {
                "kind": "sphere-latent-encoder" if tokenizer else "sphere-encoder",
                "tokenizer": kept_tokenizer,
                "config": model.config, "class_names": model.class_names,
                "use_ema": preset.use_ema, "model": model.state_dict(), "ema": ema.state_dict(),
                "optimizer": optimizer.state_dict(), "step": step, "seed": seed, "preset": asdict(preset),
                "images": len(data), "best": best})

        start = 0
        if checkpoint:
            model.load_state_dict(checkpoint["model"])
            ema.load_state_dict(checkpoint["ema"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            start = checkpoint["step"]
            stored_best = checkpoint.get("best", best)
            if measure is None or stored_best["evaluation"] == best["evaluation"]:
                best = stored_best                          # else measured otherwise: a new best begins
            if measure is None and best["step"]:
                say(f"{last}: goes on without the evaluations of before; --evaluate-every and its options "
                    f"are not stored")
            checkpoint = None                               # so that its memory can go
            if rank == 0:
                cut_log(log, start)
                cut_log(evaluations, start)
        elif rank == 0:
            save(0)                                     # from here on the folder is a run, and can be resumed

        share = preset.batch_size // world
        mine = slice(rank * share, (rank + 1) * share)      # this process's part of every global batch
        micro_batches = [slice(i, i + share // accumulate) for i in range(0, share, share // accumulate)]
        steps = range(start, total)
        indices = batch_indices(len(data), preset.batch_size, seed, steps, mine)
        if source is not data:
            indices = mirrored(indices, len(data), preset, seed, steps, mine)
        loader = DataLoader(source, batch_sampler=indices, num_workers=workers, pin_memory=on_gpu,
                            generator=seeded(seed))         # iterated once, so its workers persist
        window, began = [], time.time()
        with tqdm(total=total, initial=start, desc=out.name, unit="it", mininterval=1,
                  disable=rank > 0 or None) as bar:          # None: no bar in a file or a notebook
            for step, (images, labels) in zip(steps, loader):
                rate = learning_rate(preset, step, total)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["lr_scale"]
                drawn = {name: tensor[..., mine] for name, tensor in random_draws(preset, seed, step).items()}
                e = gaussian(drawn.pop("e_seed"), model.latent_shape, device)                # [B, N, d]
                directions = random_directions(model, seed, step).to(device) if preset.swd_weight else None
                drawn = {name: tensor.to(device, non_blocking=True) for name, tensor in drawn.items()}
                sigma, sigma_sub = drawn["sigma"], drawn["sigma_sub"]                        # [B] each
                x = images.to(device, non_blocking=True)        # [B, 3, H, W], or cached latents [B, N, d]
                if source is data:
                    x = to_float(x)
                    x = torch.where(drawn["flip"][:, None, None, None], x.flip(-1), x)
                labels = labels.to(device, non_blocking=True)
                y = torch.where(drawn["drop"], model.num_classes, labels)                    # [4, B]

                optimizer.zero_grad()
                rows = []
                for m in micro_batches:                     # the loss is a mean, and they are equally large
                    waits = world > 1 and m is not micro_batches[-1]        # gradients meet at the last one
                    part = tokenizer.encode(x[m]) if tokenizer and source is data else x[m]
                    with objective.no_sync() if waits else contextlib.nullcontext():
                        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                            loss, parts = objective(part, y[:, m], sigma[m], sigma_sub[m], e[m],
                                                    directions)
                        (loss / accumulate).backward()
                    rows.append({"loss": loss.detach(), **parts})
                grad_norm = nn.utils.clip_grad_norm_(model.parameters(), preset.clip or math.inf)
                optimizer.step()
                update_ema(ema, model, preset.ema, step)
                means = {name: sum(row[name] for row in rows) / accumulate for name in rows[0]}
                window.append({**means, "grad_norm": grad_norm})
                bar.update()

                done, ends = step + 1, step + 1 == total
                logs = ends or done % preset.log_every == 0
                saves = ends or done % preset.checkpoint_every == 0
                shows = ends or bool(preset.picture_every) and done % preset.picture_every == 0
                measures = measure is not None and (ends or done % measure_every == 0)
                if not (logs or saves or shows or measures):
                    continue
                means = drain(window, done, last, device)       # raises at a value that is not finite
                model.eval()                                    # for what is drawn and measured below
                if rank == 0:
                    with open(log, "a") as file:
                        line = {"step": done, **means, "lr": rate}
                        file.write(json.dumps(line) + "\n")
                    speed = (done - start) * preset.batch_size / (time.time() - began)
                    shown = [f"{name} {value:.4f}" for name, value in means.items() if value]
                    bar.set_postfix_str(" ".join(shown) + f", {speed:.0f} images/s", refresh=False)
                if measures:
                    rows = measure(ema if preset.use_ema else model)            # on all processes
                    if rank == 0:
                        with open(evaluations, "a") as file:
                            file.write(json.dumps({"step": done, **rows}, ensure_ascii=False) + "\n")
                        row = next((row for row in rows if row.startswith(("FID", "FD "))),
                                   "Fréchet distance")
                        score = rows[row][steps_label(evaluation.steps[-1])]
                        if score < best["score"]:
                            best = {**best, "score": score, "step": done}
                            save(done, out / "best.pt")
                        say(f"{evaluations}: {row} {score:.4f} at {steps_label(evaluation.steps[-1])} after "
                            f"{done} iterations; best {best['score']:.4f} after {best['step']}")
                stops = logs and any_process(interrupted.is_set(), device)
                if (saves or stops) and rank == 0:
                    save(done)
                if shows and rank == 0:
                    name = out / f"samples-{done:06d}.png"
                    progress_picture(ema if preset.use_ema else model, held_out or data, device).save(name)
                    plot_losses(log, out / "losses.png")
                    say(f"{name}, {out / 'losses.png'}: samples and losses after {done} iterations")
                model.train()
                if stops and not ends:
                    raise KeyboardInterrupt(f"interrupted after {done} of {total} iterations; "
                                            f"everything is in {last}, --resume continues from there")
        say(f"{last}: {total} iterations, {time.time() - began:.0f} s since this start")
    return last


def drain(window, done, last, device):
    """Empty the window of the last iterations; their means over iterations and processes, by name.

    Raises FloatingPointError on all processes together if a value is not finite.
    """
    names = list(window[0])
    values = torch.stack([torch.stack(list(row.values())) for row in window]).double()            # [k, names]
    first = done - len(window) + 1
    window.clear()
    if distributed.is_initialized():
        distributed.all_reduce(values)
        values /= distributed.get_world_size()
    values = values.cpu()
    wrong = (~values.isfinite()).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise FloatingPointError(f"{names[column]} became {values[row, column].item()} in iteration "
                                 f"{first + row}; the last good checkpoint is {last}; try a lower --lr")
    return dict(zip(names, values.mean(0).tolist()))


def check_preset(preset, world, accumulate):
    """Raise a ValueError for the first value that cannot be trained with."""
    p = preset
    check_ranges(p)
    if len(p.betas) != 2 or not all(0 <= beta < 1 for beta in p.betas):
        raise ValueError(f"--betas must be two numbers from 0 to below 1, got {p.betas}")
    if len(p.weights) != 5 or not all(0 <= w < math.inf for w in p.weights) or not any(p.weights):
        names = LATENT_WEIGHT_NAMES if is_latent(p) else WEIGHT_NAMES
        raise ValueError(f"--weights must be five numbers of at least 0, not all 0 "
                         f"({' '.join(names)}), got {p.weights}")
    if p.perceptual not in PERCEPTUAL:
        raise ValueError(f"--perceptual must be one of {', '.join(PERCEPTUAL)}, got {p.perceptual!r}")
    if p.perceptual == "none" and (p.weights[1] or p.weights[3]) and not is_latent(p):
        raise ValueError(f"--perceptual none needs weights of 0 for the perceptual terms, such as "
                         f"--weights 1,0,1,0,0.1; got {p.weights}")
    if is_latent(p) and p.tokenizer in PRESETS and is_latent(PRESETS[p.tokenizer]):
        raise ValueError(f"--tokenizer must be none, rae, or the preset or a checkpoint of a Sphere Encoder, "
                         f"got {p.tokenizer}")
    if p.tokenizer in PRESETS:
        small = PRESETS[p.tokenizer]
        if (p.dataset, p.image_size) != (small.dataset, small.image_size):
            raise ValueError(f"--tokenizer {p.tokenizer} is for {small.dataset} at {small.image_size} "
                             f"pixels, not {p.dataset} at {p.image_size}; train a tokenizer and name its "
                             f"checkpoint")
    if is_latent(p):
        with torch.device("meta"):
            SiT(1, 1, 0, p.denoiser_size)                   # its own check, before a tokenizer is trained
    if p.perceptual != "none" and p.image_size < 16:
        raise ValueError(f"--perceptual {p.perceptual} needs --image-size of at least 16, got {p.image_size}")
    if bool(p.epochs) == bool(p.iterations):
        raise ValueError(f"one of --epochs and --iterations must be 0, the other the length of the training; "
                         f"got {p.epochs:g} and {p.iterations}")
    if p.precision not in ("auto", "bf16", "float32"):
        raise ValueError(f"--precision must be auto, bf16 or float32, got {p.precision!r}")
    if accumulate < 1 or p.batch_size % (world * accumulate):
        raise ValueError(f"--batch-size {p.batch_size} must be a multiple of processes times --accumulate, "
                         f"{world} x {accumulate}")
    random_draws(p, 0, 0)                               # angles and stratified: uniform_sigmas' own checks


def check_batch_norm(preset, world, accumulate, activation_checkpointing):
    """Raise a ValueError where a batch norm would see another batch than that of one plain iteration."""
    on_cpu = world > 1 and not torch.cuda.is_available()
    clash = ("--accumulate" if accumulate > 1 else "--activation-checkpointing" if activation_checkpointing
             else "several processes on a CPU" if on_cpu else None)
    if preset.batch_norm and clash:
        raise ValueError(f"--batch-norm normalises over the batch of one pass and cannot be had together "
                         f"with {clash}; drop one of them")


def check_ranges(options):
    """Raise a ValueError for the first number of a Preset or an Evaluation that is out of its range."""
    for f in fields(options):
        value, low, high = getattr(options, f.name), f.metadata["low"], f.metadata["high"]
        if low is not None and not (low <= value <= high and value < math.inf):
            expected = f"at least {low}" if high == math.inf else f"in {low} .. {high}"
            raise ValueError(f"{flag(f.name)} must be {expected}, got {value}")
        choices = f.metadata["choices"]
        if choices and value is not None and value not in choices:
            raise ValueError(f"{flag(f.name)} must be one of {', '.join(choices)}, got {value!r}")


def check_folder(preset, out, seed, resume):
    """The checkpoint to resume from, or None for a new run. Raises ValueError rather than mix two runs."""
    last = out / "last.pt"
    if not resume:
        if any(any(out.glob(name)) for name in ("*.pt", "*.jsonl", "losses.png", "samples-*.png")):
            raise ValueError(f"{out} already holds a run; --resume continues it, another --out keeps it")
        return None
    if not last.exists():
        if preset.tokenizer in PRESETS and (out / "tokenizer" / "last.pt").exists():
            return None                                     # the run was left while it trained its tokenizer
        raise FileNotFoundError(f"{last}: nothing to resume; drop --resume to start there, or correct --out")
    checkpoint = read_checkpoint(last)
    stored = asdict(stored_preset(checkpoint, last)) | {"seed": checkpoint["seed"]}
    for name, value in (asdict(preset) | {"seed": seed}).items():
        if value != stored[name] and name != "data":        # the files may have moved
            raise ValueError(f"{last} was trained with {flag(name)} {stored[name]}, not {value}; --resume "
                             f"takes all settings from the run: drop --preset and that option, or use "
                             f"another --out")
    return checkpoint


def stored_preset(checkpoint, path):
    try:
        return Preset(**checkpoint["preset"])
    except TypeError as error:
        raise ValueError(f"{path}: its settings are those of another version of train.py ({error})") from None


def cut_log(log, step):
    """Drop the lines after a step, which a killed run wrote after its last checkpoint."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    try:
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{log}: not the log of a run; move it away to go on without its lines") from None
    beside = log.with_name(log.name + ".tmp")
    beside.write_text("".join(kept))
    os.replace(beside, log)


# ---- Processes ---------------------------------------------------------------------------------------------


def process_rank():
    """(rank, number of processes), as torchrun says; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def process_group(device):
    """Join the other processes of torchrun, if any and not yet done; yields this process's device."""
    world = process_rank()[1]
    if world > 1 and device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"         # one process per GPU
    device = pick_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")          # TF32 for what autocast leaves in float32
    if world == 1 or distributed.is_initialized():          # a tokenizer is trained within its denoiser's run
        yield device
        return
    # Others wait while the first process downloads or scans data, or saves; NCCL's 10 minutes can be too few.
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    try:
        yield device
    except (ValueError, OSError) as error:
        error.of_one_process = not isinstance(error, SharedError)
        raise
    finally:
        distributed.destroy_process_group()


class SharedError(ValueError):
    """A mistake that all processes raise together, so that one of them reports it."""


def first_process_first(action):
    """What an action returns. The first process of each machine goes ahead: it downloads what is missing, the
    others find it. An error of one is raised by all."""
    if not distributed.is_initialized():
        return action()
    result = None
    for first in (True, False):
        error, errors = None, [None] * distributed.get_world_size()
        if first == (int(os.environ["LOCAL_RANK"]) == 0):
            try:
                result = action()
            except (ValueError, OSError) as raised:
                error = str(raised)
        distributed.all_gather_object(errors, error)
        if any(errors):
            raise SharedError(next(filter(None, errors)))
    return result


def any_process(flag, device):
    """True on all processes if it is on one."""
    if not distributed.is_initialized():
        return flag
    flags = torch.tensor(int(flag), device=device)
    distributed.all_reduce(flags)
    return flags.item() > 0


@contextlib.contextmanager
def interruptible():
    """Turn Ctrl-C and SIGTERM into an event that the loop asks for; a second Ctrl-C interrupts at once, but
    not under torchrun, which passes on the Ctrl-C that its processes have already had from the terminal."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def on_signal(number, frame):
        event.set()
        if "RANK" not in os.environ:
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(text):
    """A line on standard output, from the first process only, above the progress bar."""
    if process_rank()[0] == 0:
        tqdm.write(text, file=sys.stdout)


# ---- Pictures ----------------------------------------------------------------------------------------------


def progress_picture(model, data, device, columns=5, rows=10):
    """Samples at 1, 2 and 4 steps, then reconstructions of real images and these images; a row per class."""
    targets = torch.tensor(data.targets)
    classes = targets.unique()[:rows].tolist()
    columns = min([columns] + [int((targets == c).sum()) for c in classes])
    chosen = [place for c in classes for place in (targets == c).nonzero()[:columns, 0].tolist()]
    x = to_float(torch.stack([data[place][0] for place in chosen])).to(device)
    y = torch.tensor(classes if model.num_classes else [0] * len(classes)).repeat_interleave(columns)
    panels = {steps_label(T): sampler(model)(model, y, T) for T in (1, 2, 4)}
    panels |= {"reconstruction": reconstruct(model, x), "original": x}
    names = [model.class_names[c] for c in classes] if model.num_classes else None
    return picture({title: images.unflatten(0, (-1, columns)) for title, images in panels.items()}, names)


def plot_losses(log, path):
    from matplotlib.figure import Figure
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in (name for name in lines[-1] if name not in ("step", "grad_norm", "lr")):
        if any(line[name] > 0 for line in lines):
            axes.plot([line["step"] for line in lines], [line[name] for line in lines], label=name)
    axes.set(yscale="log", xlabel="iteration", ylabel="loss (parts unweighted)")
    axes.legend()
    figure.savefig(path, dpi=100)


# ---- Evaluation --------------------------------------------------------------------------------------------


ALL_METRICS = ("pixels", "rfid", "uniformity", "memorisation", *METRICS)


@dataclass(frozen=True)
class Evaluation:
    """How samples are measured. Every field is a command-line option of its name.

    metrics  "pixels": the rows of fid.pixel_quality and the error of reconstructing held-out images, against
             10,000 training images at most; "fid", "is", "pr", "sfid": those of fid.compare, against 50,000
             at most, or FID and sFID against stored statistics; "rfid": FID between these training images
             and their reconstructions; "uniformity": sliced Wasserstein distance of the training set's points
             on the sphere to the uniform distribution, of each class and of all, beside that of as many
             uniform points, SE Sec. 4; "memorisation": fid.memorisation, SE App. B. The last two draw too
    calibration  of a model with batch norm: before sampling, take its statistics from the "reference"
             (training) images or from 500 "generated" ones; or "none": let every batch have its own. Not
             given, those of the training stand. SE App. C.4
    """

    count: int = option(1000, "number of samples; sample i has class i mod K", 2)
    steps: tuple = option((1, 2, 4), "T, one or several", parse=ints)
    cfg: float = option(1.0, "guidance scale, 1 = off", 0)
    gamma: float = option(None, "decay of the noise; none: as the checkpoint's model has it")
    fresh: bool = option(None, "fresh noise at every step; none: as the checkpoint's model has it")
    position: str = option(None, "where a Sphere Encoder is guided; none: combo", choices=POSITIONS)
    bound: float = option(None, "truncate the normal noise of the start to +-BOUND, App. C.6; none: no bound")
    calibration: str = option(None, "of a batch norm, App. C.4; not given: the training's statistics",
                              choices=("none", "reference", "generated"))
    metrics: tuple = option(("pixels",), f"of {','.join(ALL_METRICS)}", parse=words)
    features: str = option("inception", FEATURES_HELP)
    inception_weights: str = option(None, "file; none: torch.hub's cache, or download")
    convention: str = option("torch-fidelity", "how images are prepared for Inception", choices=CONVENTIONS)
    reference: str = option(None, "npz of statistics to compare with, in place of the training set")
    truncate: bool = option(False, "cut samples to 8 bits as the official code does, do not round them")


def evaluate(path, seed=0, data=None, device=None, rae=None, out=None, **options):
    """Quality of class-balanced samples of a checkpoint, beside the same numbers for real held-out images.

    data     folder of the data set, if it is not where it was at training
    rae      arguments of models.RAE that replace those stored, such as the places of its files
    out      folder for uniformity.png and memorisation.png; None: the checkpoint's
    options  fields of Evaluation
    returns  {row: {column: number}}, which main prints as a table; {} on all processes but the first

    Samples have 8 bits, as in an image file, but no file is written.
    """
    evaluation = Evaluation(**options)
    checkpoint = read_checkpoint(path)
    preset = stored_preset(checkpoint, path)
    check_evaluation(evaluation, preset)
    preset = replace(preset, data=data or preset.data)
    with process_group(device) as device:
        model = first_process_first(lambda: build(checkpoint, path, rae=rae)).to(device)
        train_set, held_out, class_names = first_process_first(lambda: load_data(preset))
        if class_names * preset.conditional != model.class_names:
            raise ValueError(f"{path} was trained on the classes {model.class_names}; "
                             f"{preset.data} has {class_names}")
        return Evaluator(evaluation, train_set, held_out, device)(model, seed, out or Path(path).parent)


def check_evaluation(evaluation, preset):
    """Raise a ValueError for the first value that a preset's model cannot be measured with."""
    check_ranges(evaluation)
    if evaluation.calibration and not preset.batch_norm:
        raise ValueError(f"--calibration {evaluation.calibration} is for models trained with --batch-norm")
    if evaluation.bound is not None and not evaluation.bound > 0:
        raise ValueError(f"--bound must be above 0, got {evaluation.bound}")
    if min(evaluation.steps, default=0) < 1:
        raise ValueError(f"--steps must be whole numbers of at least 1, got {evaluation.steps}")
    if evaluation.cfg != 1 and not preset.conditional:
        raise ValueError(f"--cfg {evaluation.cfg:g} needs a conditional model; this one has no classes to "
                         f"guide towards")
    options_for(generate_latent if is_latent(preset) else generate, asdict(evaluation))
    if "pr" in evaluation.metrics and evaluation.count < 4:
        raise ValueError(f"--count must be at least 4 for precision and recall, got {evaluation.count}")
    idle = [name for name in ("reference", "inception_weights") if getattr(evaluation, name)]
    idle += ["features"] * (evaluation.features != "inception")
    if idle and not set(evaluation.metrics) & {"rfid", *METRICS}:
        raise ValueError(f"{flag(idle[0])} says nothing of raw pixels; name what it is for, such as "
                         f"--metrics fid")
    if unknown := set(evaluation.metrics) - {*ALL_METRICS}:
        raise ValueError(f"--metrics must be of {','.join(ALL_METRICS)}, got {min(unknown)}")


class Evaluator:
    """Measures models against a data set; what does not depend on the model is loaded and computed once."""

    def __init__(self, evaluation, train_set, held_out, device):
        self.evaluation, self.train_set, self.held_out = evaluation, train_set, held_out
        self.training_places = some(train_set, 50_000)
        self.device = device
        self.compared = [metric for metric in evaluation.metrics if metric in METRICS]
        self.stored = None
        if set(evaluation.metrics) & {"rfid", *METRICS}:
            self.network = first_process_first(lambda: feature_network(
                evaluation.features, evaluation.inception_weights, device, evaluation.convention))
            if evaluation.reference:
                self.stored = first_process_first(lambda: load_statistics(evaluation.reference))
            check_metrics(self.compared, self.network, self.stored)

    def __call__(self, model, seed=0, out=None):
        """{row: {column: number}}; {} on all processes but the first. With `out`, a folder for pictures, also
        these and the time per image."""
        y = torch.arange(self.evaluation.count) % max(model.num_classes, 1)
        scheme = options_for(sampler(model), asdict(self.evaluation))
        if self.evaluation.calibration:
            model = self.calibrated(model, seed, scheme)

        def sampled(T, places):
            return self.to_8_bits(sampler(model)(model, y[places], T, self.evaluation.cfg, seed=seed,
                                                 first=places[0], **scheme))

        rows, metrics = {}, self.evaluation.metrics
        if {"pixels", "memorisation"} & {*metrics}:
            sets, times = self.drawn(sampled, y, model.image_size)
        if "pixels" in metrics and process_rank()[0] == 0:
            rows |= self.pixels(model, {**sets}) | ({"ms per image": times} if out else {})
        if "memorisation" in metrics and process_rank()[0] == 0:
            rows |= self.memorisation(sets, out)
        if "uniformity" in metrics:
            rows |= self.uniformity(model, out)
        if self.compared:
            sets = {steps_label(T): self.extracted(
                len(y), lambda places: (sampled(T, part) for part in places)) for T in self.evaluation.steps}
            if self.held_out is not None:
                sets["real held-out"] = self.held_out_features
            rows |= compare(sets, self.stored or self.training_features, self.compared)
        if "rfid" in self.evaluation.metrics:
            count, images = self.real(self.train_set)
            mended = self.extracted(count, lambda places: (
                self.to_8_bits(reconstruct(model, to_float(x).to(self.device))) for x in images(places)))
            for row, value in compare({"training set": mended}, self.training_features, ("fid",)).items():
                rows["r" + row] = value
        return rows if process_rank()[0] == 0 else {}

    def to_8_bits(self, x):
        return to_uint8((x + 1) / 2, self.evaluation.truncate)

    def calibrated(self, model, seed, scheme):
        """A copy of a model whose batch norm has the statistics that the evaluation asks for."""
        model = copy.deepcopy(model)
        model.norm.reset_running_stats()
        model.norm.momentum = None                          # their mean over batches, not a decaying one
        model.norm.train()
        if self.evaluation.calibration == "none":
            return model
        if self.evaluation.calibration == "generated":
            T = max(2, *self.evaluation.steps)              # one step has no encoder
            y = torch.arange(500) % max(model.num_classes, 1)
            for first in range(0, 500, 100):
                generate(model, y[first:first + 100], T, self.evaluation.cfg, seed=seed + 1, first=first,
                         **scheme)                          # other noise than that of the samples
        else:
            chosen = Subset(self.train_set, self.training_places)
            for x, y in DataLoader(chosen, 100, generator=seeded(0)):
                to_sphere(model, to_float(x).to(self.device), y.to(self.device))
        return model.eval()

    def drawn(self, sampled, y, image_size):
        """{steps: (uint8 [n, 3, H, W], y)}, and the time per image in ms; all images on all processes."""
        sets, times = {}, {}
        sampled(self.evaluation.steps[0], [0])              # what the first call prepares is not timed
        for T in self.evaluation.steps:
            began = time.perf_counter()
            images = torch.zeros(len(y), 3, *image_size, dtype=torch.uint8, device=self.device)
            for places in batches_of(len(y)):
                images[places] = sampled(T, places)
            if process_rank()[1] > 1:
                distributed.all_reduce(images)
            sets[steps_label(T)] = images.cpu(), y
            times[steps_label(T)] = 1000 * (time.perf_counter() - began) / len(y)
        return sets, times

    def pixels(self, model, sets):
        """The measures on raw pixels."""
        if self.held_out is not None:
            sets["real held-out"] = self.held_out_pixels
        rows = pixel_quality(sets, *self.training_pixels, judged=model.num_classes > 0)
        if self.held_out is not None:
            parts = (to_float(part).to(self.device) for part in sets["real held-out"][0].split(100))
            error = torch.cat([(reconstruct(model, x) - x).square().mean((1, 2, 3)) for x in parts])
            rows["reconstruction MSE"] = {"real held-out": error.mean().item()}
        return rows

    def memorisation(self, sets, out):
        """Nearest training images of samples; the most suspicious ones as a picture. SE App. B, Fig. 19."""
        sets = {name: images for name, (images, _) in sets.items()}
        if self.held_out is not None:
            sets["real held-out"] = self.held_out_pixels[0]
        rows, found = memorisation(sets, self.mirrored_features)
        if out:
            last = steps_label(self.evaluation.steps[-1])
            ratio, places, mirrored = found[last]
            worst = ratio.argsort()[:8]
            near = torch.stack([self.train_set[self.training_places[place]][0] for place in
                                places[worst].flatten().tolist()]).unflatten(0, (len(worst), -1))
            near = torch.where(mirrored[worst][:, :, None, None, None], near.flip(-1), near)
            panels = {f"sample, {last}": sets[last][worst][:, None], "nearest training images": near}
            self.show(picture({title: to_float(images) for title, images in panels.items()},
                              [f"{ratio[i]:.2f}" for i in worst]), Path(out) / "memorisation.png",
                      "the samples nearest to one training image; left: its distance over the next one's")
        return rows

    def uniformity(self, model, out):
        """Distance of the training set's points on the sphere to the uniform distribution. SE Sec. 4, Fig. 7.

        The uniform column is the mean of 8 draws of as many uniform points, seen from the same number of
        directions: chance alone brings an ideal encoder there.
        """
        chosen = Subset(self.train_set, self.training_places)
        y = torch.tensor(self.train_set.targets)[self.training_places]
        L, directions = math.prod(model.latent_shape), random_directions(model, 0).to(self.device)
        along = torch.zeros(len(chosen), directions.shape[1], device=self.device)                  # [n, M]
        shadow = torch.zeros(len(chosen), 3, device=self.device)
        places = batches_of(len(chosen))
        for part, (x, labels) in zip(places, DataLoader(chosen, batch_sampler=places, generator=seeded(0))):
            v = to_sphere(model, to_float(x).to(self.device), labels.to(self.device))
            along[part], shadow[part] = v.flatten(1) @ directions, project_to_3d(v).to(self.device)
        if process_rank()[1] > 1:
            distributed.all_reduce(along)
            distributed.all_reduce(shadow)
        if process_rank()[0] > 0:
            return {}
        along, shadow = along.cpu(), shadow.cpu()
        groups = {name: y == k for k, name in enumerate(model.class_names[:10])}
        groups["all"] = torch.ones(len(y), dtype=torch.bool)
        rows = {}
        for name, among in groups.items():
            drawn = [uniform_along(int(among.sum()), along.shape[1], L, k) for k in range(8)]
            distances = [math.sqrt(sliced_wasserstein(x, L)) for x in (along[among], *drawn)]
            rows[f"uniformity, {name}"] = {"encoded": distances[0], "uniform": sum(distances[1:]) / 8}
        if out:
            shown = {name: shadow[groups[name]] for name in [*list(groups)[:-1][:3], "all"]}
            shown["uniform"] = torch.randn(len(y), 3, generator=seeded(0))
            shown["uniform"] /= shown["uniform"].norm(dim=1, keepdim=True)
            self.show(sphere_picture(shown), Path(out) / "uniformity.png",
                      "points of the training set on the sphere, projected to 3-D at random")
        return rows

    def show(self, drawn, path, what):
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, dpi=100) if hasattr(drawn, "savefig") else drawn.save(path)
        say(f"{path}: {what}")

    @cached_property
    def mirrored_features(self):
        """[2, m, D]: the training images, and mirrored, for fid.memorisation."""
        loader = DataLoader(Subset(self.train_set, self.training_places), 100, generator=seeded(0))
        return torch.cat([torch.stack([pixel_features(x), pixel_features(x.flip(-1))]) for x, _ in loader], 1)

    @cached_property
    def training_pixels(self):
        return stacked(self.train_set, 10_000)

    @cached_property
    def held_out_pixels(self):
        return stacked(self.held_out, 10_000)

    @cached_property
    def training_features(self):
        return self.extracted(*self.real(self.train_set))

    @cached_property
    def held_out_features(self):
        return self.extracted(*self.real(self.held_out))

    def real(self, data):
        """Number of images of a data set that are used, and what gives the batches of places among them."""
        chosen = Subset(data, some(data, 50_000))
        return len(chosen), lambda places: (
            x for x, _ in DataLoader(chosen, batch_sampler=places, generator=seeded(0)))

    def extracted(self, count, batches):
        """Features of `count` images, which pass once and are never stored; each process takes its part."""
        places = batches_of(count)
        result = Extracted(tqdm(batches(places), total=len(places), unit="batch",
                                disable=process_rank()[0] > 0 or None), self.network, self.compared)
        return result.gather(sum(places, []), count) if process_rank()[1] > 1 else result


def uniform_along(n, M, L, seed):
    """n uniform points on the sphere of radius sqrt(L), seen along M orthonormal directions, [n, M]."""
    generator = np.random.default_rng(seed)
    seen = generator.standard_normal((n, M))
    unseen = generator.chisquare(L - M, n) if L > M else 0      # squared length of the other L - M numbers
    return torch.from_numpy(math.sqrt(L) * seen / np.sqrt((seen**2).sum(1) + unseen)[:, None])


def batches_of(count, batch=100):
    """This process's batches of the places 0 .. count - 1. Fixed batches are taken whole, so that rounding
    does not depend on the number of processes."""
    rank, world = process_rank()
    return [list(range(i, min(i + batch, count))) for i in range(rank * batch, count, world * batch)]


def some(data, limit):
    """Places in a data set; beyond `limit`, a fixed random choice."""
    return torch.randperm(len(data), generator=seeded(0))[:limit].sort().values.tolist()


def stacked(data, limit):
    """Images uint8 [n, 3, H, W] and labels [n] of a data set, at most `limit`."""
    loader = DataLoader(Subset(data, some(data, limit)), batch_size=100, generator=seeded(0))
    images, labels = zip(*loader)
    return torch.cat(images), torch.cat(labels)


# ---- Command line ------------------------------------------------------------------------------------------


def main(argv=None):
    parser = Parser("train.py", __doc__)
    parser.argument_default = argparse.SUPPRESS             # so that only what is given is there afterwards
    run = parser.add_argument_group("run")
    run.add_argument("--preset", choices=PRESETS, help="settings to start from (default digits)")
    run.add_argument("--out", type=Path, help="folder of the run (default out/PRESET), or of the pictures of "
                                                "--evaluate (default the checkpoint's)")
    run.add_argument("--seed", type=int, help="of the training, or of the samples to evaluate (default 0)")
    run.add_argument("--resume", action="store_true", help="continue the run in --out, exactly")
    run.add_argument("--device", help="default cuda if there is one, else cpu")
    run.add_argument("--export", metavar="FOLDER", help="write the preset's real images there as files "
                                                        "(--count of each part, or all), and stop")
    run.add_argument("--list", action="store_true", help="print all presets with sizes and cost, and stop")
    speed = parser.add_argument_group("speed and memory; results change by rounding only")
    speed.add_argument("--workers", type=int, help="processes that read images (default: as the data need)")
    speed.add_argument("--accumulate", type=int, help="micro-batches per iteration and process (default 1)")
    speed.add_argument("--activation-checkpointing", action="store_true", help="less memory, a third slower")
    speed.add_argument("--compile", action="store_true", help="torch.compile: minutes to start, then faster")
    speed.add_argument("--perceptual-weights", metavar="FOLDER",
                       help="of the files vgg16-... and convnext_small-... (default torch.hub's cache)")
    speed.add_argument("--latent-cache", metavar="FOLDER",
                       help="of latents computed once; none = off (default OUT, if all images are in memory)")
    add_rae_options(parser)
    judge = parser.add_argument_group("evaluate instead of training, or during it")
    judge.add_argument("--evaluate", metavar="CHECKPOINT", help="print the quality of its samples as a table")
    judge.add_argument("--evaluate-every", type=float, metavar="EPOCHS",
                       help="evaluate while training, and keep the best checkpoint as best.pt (0 = off)")
    add_options(judge, Evaluation)
    add_options(parser.add_argument_group("settings of the preset, to be overridden (defaults of folder)"),
                Preset)
    given = vars(parser.parse_args(argv))
    try:
        with warnings_in_one_line(parser.prog):
            dispatch(given)
    except (ValueError, OSError, FloatingPointError) as error:
        # An error of an image-reading process carries its traceback; the message is the last line.
        line = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        speaks = process_rank()[0] == 0 or getattr(error, "of_one_process", False)
        parser.exit(2, f"{parser.prog}: {line}\n" if speaks else None)
    except KeyboardInterrupt as interrupt:
        say(str(interrupt) or "interrupted at once; the last checkpoint stands")
        return 130


def add_options(group, options):
    """An option of the command line for every field of Preset or Evaluation, but for those of both."""
    for f in fields(options):
        if options is Evaluation and f.name in PRESET_OPTIONS:
            continue
        text = f.metadata["help"]
        if f.default is not None:
            text += f" ({','.join(map(str, f.default)) if isinstance(f.default, tuple) else f.default})"
        if f.type is bool:
            group.add_argument(flag(f.name), action=argparse.BooleanOptionalAction, help=text)
        else:
            kind = f.metadata["parse"] or FIELD_TYPES[f.type]
            choices = f.metadata["choices"]
            group.add_argument(flag(f.name), type=kind, help=text, choices=choices,
                               metavar=None if choices else kind.__name__)


def dispatch(given):
    """Do what the options that were given say."""
    measured = {f.name: given.pop(f.name) for f in fields(Evaluation)
                if f.name in given and ("evaluate" in given or f.name not in PRESET_OPTIONS)}
    if rae := rae_arguments(given):
        given = {name: value for name, value in given.items() if name not in RAE_OPTIONS} | {"rae": rae}
    if "list" in given:
        list_presets()
    elif "export" in given:
        changes = {name: given[name] for name in given.keys() & PRESET_OPTIONS}
        count = measured.pop("count", None)
        if misplaced := {*measured, *given} - {"export", "preset", *PRESET_OPTIONS}:
            raise ValueError(f"--export takes a preset, its settings and --count; drop "
                             f"{flag(min(misplaced))}")
        if count is not None and count < 1:
            raise ValueError(f"--count must be at least 1, got {count}")
        preset = replace(PRESETS[given.get("preset", "digits")], **changes)
        check_ranges(preset)
        export(preset, given["export"], count)
    elif "evaluate" in given:
        path = given.pop("evaluate")
        if misplaced := given.keys() - {"seed", "data", "device", "rae", "out"}:
            raise ValueError(f"--evaluate takes its settings from the checkpoint; "
                             f"drop {flag(min(misplaced))}")
        if "out" in given and not {"uniformity", "memorisation"} & {*measured.get("metrics", ())}:
            raise ValueError("--out is for the pictures of --metrics uniformity,memorisation; drop it, or "
                             "name these")
        print_table(path, Evaluation(**measured), given.get("seed", 0), evaluate(path, **given, **measured))
    elif measured and not given.get("evaluate_every"):
        raise ValueError(f"{flag(min(measured))} belongs to --evaluate or --evaluate-every; the length of a "
                         f"training is --iterations")
    else:
        if "evaluate_every" in given:
            given["evaluation"] = Evaluation(**measured)
        train_as_told(**given)


def train_as_told(preset=None, out=None, seed=None, resume=False, **given):
    """Train with the options given; the rest is as the preset has it or, when resumed, as the run has it."""
    changes = {f.name: given.pop(f.name) for f in fields(Preset) if f.name in given}
    out = out or Path(f"out/{preset or 'digits'}")
    settings = PRESETS[preset or "digits"]
    if resume and (out / "last.pt").exists():
        checkpoint = read_checkpoint(out / "last.pt")
        settings = settings if preset else stored_preset(checkpoint, out / "last.pt")
        seed = checkpoint["seed"] if seed is None else seed
    elif resume and not preset and (out / "tokenizer" / "last.pt").exists():
        raise ValueError(f"{out} holds no more than its tokenizer yet; name the --preset and the settings "
                         f"with which it was begun")
    elif changes.keys() & {"epochs", "iterations"}:         # the length given replaces the preset's
        changes = {"epochs": 0, "iterations": 0} | changes
    train(replace(settings, **changes), out, seed or 0, resume, **given)


def list_presets():
    """All presets, from models on the meta device: sizes, memory, settings; then the cost of one image."""
    form = "{:24}{:>6}{:>4}{:>7}{:>8}{:>15}  {:>8}{:>8}  {:8}{:>17}  {}".format
    print(form("preset", "pixels", "P", "tokens", "L", "parameters", "weights", "AdamW", "angles", "length",
               "loss weights"))
    costs = {}
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            model, tokenizer = build_on_meta(preset)
            costs[name] = cost_of_parts(model, tokenizer)
        N, d = model.latent_shape
        parameters = sum(p.numel() for p in model.parameters())
        moments = 2 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        memory = [f"{4 * numbers / 2**30:.3f}" for numbers in (parameters, moments)]
        angles = f"{preset.alpha_max:g}" + ("" if is_latent(preset) else f"/{preset.alpha_hard:g}")
        P = math.isqrt(preset.image_size**2 // N)
        print(form(name, preset.image_size, P, N, N * d, f"{parameters:,}", *memory, angles,
                   f"{preset.epochs:g} epochs" if preset.epochs else f"{preset.iterations} iterations",
                   " ".join(f"{weight:g}" for weight in preset.weights)))
    print("weights, AdamW: GiB of float32; without the tokenizer, as the parameters")

    form = ("{:24}" + "{:>9}" * 3 + "  " + "{:>9}" * 4 + "  " + "{:>9}" * 4).format
    heads = [f"{T} {what}" for what in ("steps", "guided") for T in LIST_STEPS]
    print("\n" + form("GFLOPs of one image", "encode", "denoise", "decode", *heads))
    totals = {}
    for name, (encode, denoise, decode) in costs.items():
        if denoise:
            totals[name] = [guided * T * denoise + decode for guided in (1, 2) for T in LIST_STEPS]
        else:
            totals[name] = [guided * (T * decode + (T - 1) * encode) for guided in (1, 2) for T in LIST_STEPS]
        print(form(name, *(f"{cost:,.0f}" if cost >= 1000 else f"{cost:.4g}" if cost else "-"
                           for cost in (encode, denoise, decode, *totals[name]))))
    ratios = [se / sle for se, sle in zip(totals["imagenet-xl"], totals["imagenet-latent"])]
    print(form("imagenet-xl / -latent", "", "", "", *(f"{ratio:.2f}" for ratio in ratios)))
    print("2 for every multiply-add; guided: both passes of every step. A Sphere Latent Encoder decodes once "
          "and encodes only to train; folder is counted with 10 classes")


LIST_STEPS = (1, 2, 4, 6)


def build_on_meta(preset):
    """Model of a preset, and its tokenizer or, of an RAE, the tokenizer's decoder; without weights."""
    class_names = [str(k) for k in range(DATASETS[preset.dataset][0])]
    if not is_latent(preset):
        return build_model(preset, class_names), None
    if preset.tokenizer == "rae":
        tokenizer = RAEDecoder(768, 16, 1152, 28, 16, 4096)                                 # ViT-XL
        return build_model(preset, class_names, (256, 768)), tokenizer
    tokenizer = build_model(PRESETS[preset.tokenizer], class_names)
    return build_model(preset, class_names, tokenizer.latent_shape), tokenizer


def cost_of_parts(model, tokenizer):
    """GFLOPs of encoding, denoising (0 in a Sphere Encoder) and decoding one image, on the meta device."""
    v = torch.empty(1, *model.latent_shape)
    denoise = flops(lambda: model(v)) if tokenizer else 0
    if isinstance(tokenizer, RAEDecoder):
        # DINOv2-B: 12 blocks like these on 224 x 224 pixels, 256 patches, a class token and 4 registers.
        embed = nn.Conv2d(3, 768, 14, 14)
        blocks = nn.Sequential(*(RAEBlock(768, 12, 3072) for _ in range(12)))
        encode = flops(lambda: (embed(torch.empty(1, 3, 224, 224)), blocks(torch.empty(1, 261, 768))))
        return encode, denoise, flops(lambda: tokenizer(v))
    autoencoder = tokenizer or model
    encode = flops(lambda: autoencoder.encode(torch.empty(1, 3, *autoencoder.image_size)))
    return encode, denoise, flops(lambda: autoencoder.decode(v))


def flops(call):
    """GFLOPs of a call, 2 for every multiply-add."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


def print_table(path, evaluation, seed, rows):
    if not rows:                                            # not the first process
        return
    how = ""
    if set(evaluation.metrics) & {"rfid", *METRICS}:
        how = (f", convention {evaluation.convention}" if evaluation.features == "inception"
               else f", features {evaluation.features}")
    print(f"{path}: {evaluation.count} samples, seed {seed}, cfg {evaluation.cfg:g}{how}")
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    width = max(20, *(len(name) + 2 for name in rows))
    print(" " * width + "".join(f"{column:>15}" for column in columns))
    for name, row in rows.items():
        cells = [f"{row[column]:15.4f}" if column in row else " " * 15 for column in columns]
        print(f"{name:<{width}}" + "".join(cells))


def flag(name):
    return "--" + name.replace("_", "-")


FIELD_TYPES = {int: int, float: float, str: str, tuple: floats, str | tuple: size}


if __name__ == "__main__":
    sys.exit(main())
