"""Findings of both papers, tried on small real digits with three seeds.

    python notebooks/results.py --list                  # the studies, and what they lack
    python notebooks/results.py angle hard-cases        # train and measure what these need
    python notebooks/results.py                         # all of it: some three hours on two cores

Writes the studies that are complete into results.md, beside this file, above its line of dashes; others stay
there as they were. Runs lie in out/results: a finished one is not made again, an interrupted one goes on. One
process per core, one thread in each, so that numbers do not depend on the number of cores.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import re
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import mean, stdev
from timeit import timeit
from unittest import mock

import torch
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import spherify as sphere  # noqa: E402
import train as training  # noqa: E402
from fid import (extract, feature_network, frechet_distance, load_statistics,  # noqa: E402
                 nearest_neighbours, pixel_features, save_statistics, to_uint8, whole_file)
from losses import (orthogonal_directions, perceptual_distance, pixel_reconstruction_loss,  # noqa: E402
                    sliced_wasserstein_loss)
from models import SphereEncoder, cost  # noqa: E402
from sample import POSITIONS, load, read_checkpoint, reconstruct, sampler, to_float  # noqa: E402
from train import PRESETS, gathered, load_data, logged, quality, seeded, some  # noqa: E402

SEEDS, COUNT, OUT = (0, 1, 2), 2000, Path("out/results")
FEW = 1000                              # of FID's samples: Inception takes 0.2 s of a core for each
STEPS = (1, 2, 4, 6)

# ---- Runs --------------------------------------------------------------------------------------------------


class Autoencoder(SphereEncoder):
    """E and D without a sphere: an autoencoder (s = 0), or a VAE whose pixels have the deviation s in [0, 1].

    Random points are those of N(0, I), but for their length, which is sqrt(L); after `fit` those of the
    Gaussian of the training set's latents."""

    s = 0.0

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        N, d = self.latent_shape
        self.encoder = SphereEncoder(**{**self.config, "latent_dim": 2 * d}).encoder    # means, log-variances
        self.encoder.out.norm = nn.Identity()               # it would bind the ones to the others
        self.register_buffer("mean", torch.zeros(N * d))
        self.register_buffer("root", torch.eye(N * d))

    def posterior(self, x, y):
        return super().encode(x, y).chunk(2, dim=-1)

    def encode(self, x, y=None):
        return self.posterior(x, y)[0]

    def decode(self, v, y=None):
        return super().decode((self.mean + v.flatten(1) @ self.root).view_as(v), y)

    @torch.no_grad()
    def fit(self, x, y):
        """Random points shall come from the Gaussian of these images' latents, with their posteriors."""
        z, logvar = (part.flatten(1) for part in self.posterior(x, y))
        covariance = z.T.cov() + (logvar.exp().mean(0).diag() if self.s else 0)
        values, vectors = torch.linalg.eigh(covariance)
        self.mean, self.root = z.mean(0), values.clamp(min=0).sqrt()[:, None] * vectors.T


def autoencoder_loss(model, x, y, sigma, sigma_sub, e, *unused):
    """Smooth L1, which is Gaussian, and the divergence from N(0, I) on its scale: the evidence bound."""
    center, logvar = model.posterior(x, y[0])
    z = center + (logvar / 2).exp() * e * (model.s > 0)
    l1, _ = pixel_reconstruction_loss(model.decode(z, y[2]), x)
    divergence = (center.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean() / 2
    return l1 + model.s**2 * divergence / x[0].numel(), {"recon_l1": l1.detach()}


def without_sphere(s):
    kind = type("Autoencoder", (Autoencoder,), {"s": s})
    return {"models.SphereEncoder": kind, "sample.SphereEncoder": kind,
            "losses.sphere_encoder_loss": autoencoder_loss,
            "train.reconstruct": lambda model, x, y=None: SphereEncoder.decode(model, model.encode(x, y), y)}


# name: (preset, what differs from it, what stands in place of a name of the code). A tokenizer is the run of
# that name with the same seed.
ALONE, PIXELS = (1.0, 0.0, 0.0, 0.0, 0.0), (50.0, 0.0, 25.0, 0.0, 0.1)
ANGLES = {f"{alpha} degrees": float(alpha) for alpha in (0, 30, 45, 60, 70, 75, 80, 85)}
DEVIATIONS = {f"VAE, s = {s}" if s else "autoencoder": s for s in (0.0, 0.1, 0.3, 1.0)}
WITHOUT = {"no pixel consistency": {"weights": (1.0, 0.0, 0.0, 0.0, 0.02)},
           "no latent consistency": {"weights": (1.0, 0.0, 1.0, 0.0, 0.0)}}
TWICE = {"twice as long": {"iterations": 2400}} | {
    f"twice as long, {name}": {**changes, "iterations": 2400} for name, changes in WITHOUT.items()}
RUNS = {name: ("digits", changes, {}) for name, changes in {
    "digits": {},
    **WITHOUT, **TWICE,
    "reconstruction alone": {"weights": ALONE},
    **{name: {"alpha_max": alpha, "alpha_hard": 0.0} for name, alpha in ANGLES.items()},
    "hard to 89": {"alpha_hard": 89.0},
    "no hard cases, in the angle": {"mapping": "angle", "alpha_hard": 0.0},
    "hard to 85, in the angle": {"mapping": "angle"},
    "hard to 89, in the angle": {"mapping": "angle", "alpha_hard": 89.0},
    "released noise": {"mapping": "official"},
    "1 token of 288": {"patch_size": 16, "latent_dim": 288},
    "16 tokens of 18": {"patch_size": 4, "latent_dim": 18},
    "16 tokens": {"patch_size": 4, "latent_dim": 16},
    **{f"L = {4 * d}": {"latent_dim": d} for d in (9, 18, 36, 144, 288)},
    "batch norm": {"batch_norm": True},
    "sliced Wasserstein": {"swd_weight": 0.01},
    "batch norm and sliced Wasserstein": {"batch_norm": True, "swd_weight": 0.01},
    "blind encoder": {"encoder_classes": False},
    "no mixers": {"mixer_depth": 0},
    "no classes": {"conditional": False},
}.items()} | {
    "reconstruction from v_NOISY": ("digits", {"weights": ALONE}, {
        "train.uniform_sigmas": lambda *a, **k: sphere.uniform_sigmas(*a, **k)[:1] * 2}),
    "no sin-cos table": ("digits", {}, {"models.sincos_table": lambda grid, width: torch.zeros(
        math.prod(grid), width)}),
    "no final RMSNorm": ("digits", {}, {
        "models.Mixer.forward": lambda self, x: nn.Sequential(*self.blocks)(x)}),
    **{name: ("digits", {}, without_sphere(s)) for name, s in DEVIATIONS.items()},
    "tokenizer": ("digits-tokenizer", {}, {}),
    "16-token tokenizer": ("digits-tokenizer", {"patch_size": 4, "latent_dim": 8}, {}),
    "digits-latent": ("digits-latent", {"tokenizer": "tokenizer"}, {}),
    "latent, 16 tokens": ("digits-latent", {"tokenizer": "16-token tokenizer"}, {}),
    **{name: ("digits-latent", {"tokenizer": "tokenizer"}, {
        "train.logit_normal_sigmas":
            lambda *a, hard=hard: sphere.uniform_sigmas(*a[:2], hard, generator=a[-1])})
       for name, hard in (("latent, uniform noise", None), ("latent, uniform noise, hard to 85", 85.0))},
} | {name: ("digits-latent", {"tokenizer": "tokenizer", **changes}, {}) for name, changes in {
    "with latent consistency": {"weights": (1.0, 1.0, 1.0, 1.0, 0.1)},
    "latent, no consistency": {"weights": (1.0, 1.0, 0.0, 0.0, 0.0)},
    "latent, plain logit-normal": {"noise": (0.0, 1.0)},
    "latent, 75 degrees": {"alpha_max": 75.0},
    "latent, 85 degrees": {"alpha_max": 85.0},
    "latent, squared": {"distance": "l2"},
    "latent, smooth": {"distance": "smooth-l1"},
    "latent, distance alone": {"weights": (1.0, 0.0, 1.0, 0.0, 0.0)},
    "latent, cosine alone": {"weights": (0.0, 1.0, 0.0, 1.0, 0.0)},
}.items()} | {
    "emoji": ("emoji", {}, {}),
    "emoji, pixels alone": ("emoji", {"weights": PIXELS}, {}),
    "emoji, as long": ("emoji", {"iterations": 600}, {}),
    "emoji tokenizer": ("emoji-tokenizer", {}, {}),
    "emoji, latent": ("emoji-latent", {"tokenizer": "emoji tokenizer"}, {}),
}


def file_name(words):
    return re.sub("[^A-Za-z0-9.]+", "-", words)


def folder(run, seed):
    return OUT / f"{file_name(run)}-{seed}"


@contextlib.contextmanager
def settings(run, seed):
    """The preset of a run, within the code as the run wants it."""
    name, changes, replaced = RUNS[run]
    preset = replace(PRESETS[name], **changes)
    if changes.get("tokenizer"):
        preset = replace(preset, tokenizer=str(folder(changes["tokenizer"], seed) / "last.pt"))
    with contextlib.ExitStack() as stack:
        for target, new in replaced.items():
            stack.enter_context(mock.patch(target, new))
        yield preset


def command(run, measure, study):
    """The commands of a row of seed 0, or None if options cannot say it."""
    (name, changes, replaced), arguments = RUNS[run], MEASURES[measure]
    if replaced or callable(arguments) or "prepare" in arguments:
        return None
    if "tokenizer" in changes:
        changes = {**changes, "tokenizer": folder(changes["tokenizer"], 0) / "last.pt"}
    asked = {"count": COUNT, "steps": STEPS} | arguments
    sampling = [f"{key}={asked.pop(key)}" for key in arguments
                if key not in ("count", "steps", "cfg", "use_ema")]

    def option(key, value):
        word = key.replace("_", "-")
        return (f"--{'no-' * (not value)}{word}" if isinstance(value, bool)
                else f"--{word} {','.join(map(str, value)) if isinstance(value, tuple) else value}")

    trains = [f"python train.py --preset {name} --out out/{study}", *map(option, changes, changes.values())]
    judges = [f"python train.py --evaluate out/{study}/last.pt", *map(option, asked, asked.values())]
    return " ".join(trains) + "\n" + " ".join(judges + ["--sampling"] * bool(sampling) + sampling)


# ---- Measures ----------------------------------------------------------------------------------------------


def judged(model, data, held_out, prepare=None, **arguments):
    if prepare:
        prepare(model, data)
    return quality(model, data, held_out, **{"count": COUNT, "steps": STEPS, **arguments})


@torch.no_grad()
def calibrated(how, model, data):
    """Statistics of the batch norm for sampling, SE C.4: of every batch by itself (assumed: "on the fly"), of
    the training images, or of drawing 500 samples; a plain mean over batches of 100."""
    model.norm.reset_running_stats()
    model.norm.momentum = None
    model.norm.train()
    if how == "training images":
        for places in torch.arange(len(data)).split(100):
            x, y = data[places]
            model.encode(to_float(x), y)
    elif how == "500 samples":
        for first in range(0, 500, 100):
            sampler(model)(model, torch.arange(100) % 10, 4, first=10_000 + first)
    model.norm.train(how == "every batch")


def fitted(model, data):
    x, y = data[range(len(data))]
    model.fit(to_float(x), y)


@torch.no_grad()
def uniformity(model, data, held_out):
    """Sliced Wasserstein distance of latents to the uniform distribution, of all and within a class, and that
    of as many uniform points. It falls with the number of points."""
    x, y = data[range(len(data))]
    v, generator = sphere.spherify(model.encode(to_float(x), y)), seeded(0, "choice")
    L = v[0].numel()
    directions = orthogonal_directions(torch.randn(L, min(L, 256), generator=generator))
    far = lambda points: sliced_wasserstein_loss(points, directions).sqrt().item()
    points = sphere.spherify(torch.randn(v.shape, generator=generator))
    within = lambda v: mean(far(v[y == c]) for c in y.unique())
    return {"distance": {"all": far(v), "class": within(v), "all, uniform": far(points),
                         "class, uniform": within(points)}}


def copies(model, data, held_out, T=4):
    """Share of samples whose nearest training image, or its mirror image, is nearer than a third of the way
    to the next one; the same of held-out images."""
    x = data[range(len(data))][0]
    real = pixel_features(torch.cat([x, x.flip(-1)]))
    y = torch.arange(COUNT) % max(model.num_classes, 1)
    rows = {}
    for name, images in (("samples", drawn(model, y, T)), ("held-out", held_out[:][0])):
        features = pixel_features(images)
        distance, place = nearest_neighbours(features, real, 3)
        other = torch.where(place[:, 1] % len(x) == place[:, 0] % len(x), 2, 1)[:, None]
        ratio = distance[:, 0] / distance.gather(1, other)[:, 0].clamp(min=1e-12)
        rows[name] = {"copies": (ratio < 1 / 3).double().mean().item(), "lowest ratio": ratio.min().item()}
    return rows


network = lru_cache(feature_network)


def statistics(images, features):
    """FeatureStatistics of images, uint8 [n, 3, H, W]."""
    return extract(images.split(50), network(features)).statistics


def distances(images, data):
    """FID and Fréchet distance in pixels to the training images, whose statistics are kept."""
    found = {}
    for name, features in (("FID", "torch-fidelity"), ("Fréchet distance", "pixels")):
        path = OUT / f"real-{len(data)}-{features}.npz"
        if not path.exists():
            kept = statistics(data[range(len(data))][0], features)
            with whole_file(path) as file:
                save_statistics(file, kept, features)
        real, ours = load_statistics(path, features).statistics, statistics(images, features)
        found[name] = frechet_distance(ours.mean, ours.covariance, real.mean, real.covariance)
    return found


def drawn(model, y, T, **sampling):
    """Samples of classes y, uint8."""
    draw = sampler(model, **sampling)
    return torch.cat(gathered(range(len(y)), lambda part: to_uint8(
        (draw(model, y[part], T, first=part[0]) + 1) / 2)))


def inception(model, data, held_out, steps=STEPS, count=FEW, **sampling):
    """Distances of samples, of classes as frequent as in the data; drawn as the preset says, also FID of
    reconstructed training images (rFID), and LPIPS and squared error of reconstructed held-out ones."""
    y = data.targets[torch.arange(count) * len(data) // count]
    rows = {"FID": {}, "Fréchet distance": {}}
    for T in steps:
        for name, value in distances(drawn(model, y, T, **sampling), data).items():
            rows[name][f"T = {T}"] = value
    if sampling:
        return rows

    def again(images):
        """Images of a data set, and their reconstructions, in [-1, 1]."""
        x = to_float(images[some(images, FEW)][0])
        return x, torch.cat([reconstruct(model, part) for part in x.split(100)])

    rows["FID"]["reconstructed"] = distances(to_uint8((again(data)[1] + 1) / 2), data)["FID"]
    x, x_again = again(held_out)
    lpips = perceptual_distance("lpips")
    apart = torch.cat([lpips(*pair) for pair in zip(x_again.split(100), x.split(100))])
    return rows | {"LPIPS": {"real held-out": apart.mean().item()},
                   "reconstruction MSE": {"real held-out": (x_again - x).square().mean().item()}}


def by_name(found):
    return {name: {"images": value} for name, value in found.items()}


def real_ones(model, data, held_out):
    return by_name(distances(held_out[some(held_out, FEW)][0], data))


def gaussian(model, data, held_out):
    """Of points of the Gaussian of every class's pixels: its mean, and a random combination of what the
    images differ from it by."""
    x, y = data[range(len(data))]
    generator, images = seeded(0, "choice"), []
    for c in y.unique():
        part = x[y == c].flatten(1).float()
        e = torch.randn(FEW * len(part) // len(x), len(part), generator=generator)
        images.append(part.mean(0) + e @ (part - part.mean(0)) / math.sqrt(len(part) - 1))
    return by_name(distances(to_uint8(torch.cat(images).view(-1, *x.shape[1:]) / 255), data))


def timed(model, data, held_out):
    """Milliseconds per image of five batches of 100, after one that is not timed."""
    draws = {T: partial(sampler(model), model, torch.arange(100) % 10, T) for T in STEPS}
    return {"ms per image": {f"T = {T}": 2 * timeit(draw, draw, number=5) for T, draw in draws.items()}}


BATCH_NORMS = ("every batch", "training images", "500 samples")
GUIDED = {(s, place): f"guided {s}, {place}" for s in (1.2, 1.6) for place in POSITIONS}
BOUNDS = {f"bound {bound}": bound for bound in (3.0, 2.0, 1.0)}
WEAKER = {f"{alpha:g} degrees": alpha for alpha in (40.0, 60.0, 70.0)}          # noise between the steps
# What is measured of a run: arguments of quality, use_ema of load, and what comes before.
MEASURES = {
    "": {}, "fixed": {"gamma": 0.0}, "Eq. 13": {"gamma": 1.0, "schedule": "eq13"},
    "released": {"gamma": 1.0, "schedule": "released"}, "fresh": {"shared": False},
    "fresh, Eq. 13": {"shared": False, "gamma": 1.0, "schedule": "eq13"},
    **{name: {"cfg": s, "position": place} for (s, place), name in GUIDED.items()},
    **{name: {"bound": bound} for name, bound in BOUNDS.items()},
    **{name: {"alpha": alpha} for name, alpha in WEAKER.items()},
    "plain weights": {"use_ema": False},
    **{how: {"prepare": partial(calibrated, how)} for how in BATCH_NORMS},
    "prior": {"steps": (1,)}, "fitted": {"steps": (1,), "prepare": fitted},
    "297 samples": {"count": 297}, "1,000 samples": {"count": 1000}, "4,000 samples": {"count": 4000},
    "time": timed, "uniformity": uniformity, "copies": copies, "FID": inception,
    "FID, 1 and 4 steps": partial(inception, steps=(1, 4)),
    "FID, fixed": partial(inception, steps=(4,), gamma=0.0),
    "FID, released": partial(inception, steps=(4,), gamma=1.0, schedule="released"),
    "FID, 146 samples": partial(inception, steps=(4,), count=146, schedule="released"),
    "held-out": real_ones, "Gaussian": gaussian,
}


def work(run, seed, wanted):
    """Train a run and measure what is wanted of it; both unless they are done."""
    torch.set_num_threads(1)
    training.draw = lambda *arguments: None                 # no pictures
    out = folder(run, seed)
    out.mkdir(parents=True, exist_ok=True)
    output = open(out / "output.txt", "a")
    with settings(run, seed) as preset, output, contextlib.redirect_stdout(output):
        if not (out / "done").exists():
            try:
                training.train(preset, out, seed, (out / "last.pt").exists(), "cpu")
            except FloatingPointError as error:             # the last checkpoint is measured
                print(error)
            (out / "done").touch()
        if read_checkpoint(out / "last.pt")["preset"] != asdict(preset):
            raise ValueError(f"{out} is a run of other settings; delete it")
        data, held_out, _ = load_data(preset)
        for name in wanted:
            arguments = MEASURES[name]
            measure, options = (arguments, {}) if callable(arguments) else (judged, dict(arguments))
            model = load(out / "last.pt", ema=options.pop("use_ema", None))
            rows = measure(model, data, held_out, **options)
            with whole_file(measured_file(run, seed, name)) as whole:
                whole.write(json.dumps(rows).encode())


def measured_file(run, seed, measure):
    return folder(run, seed) / f"measured-{file_name(measure) or 'default'}.json"


# ---- Studies -----------------------------------------------------------------------------------------------

# Heads of columns: row and column of what a measure returns, digits.
HEADS = {f"{short} {T}": (row, f"T = {T}", digits) for T in STEPS for short, row, digits in (
    ("Fréchet", "Fréchet distance", 2), ("right", "judged right", 3), ("recall", "recall", 2),
    ("precision", "precision", 2), ("nearest", "nearest", 2), ("ms", "ms per image", 2),
    ("FID", "FID", 1), ("MFLOPs", "MFLOPs", 1))} | {
    "parameters": ("MFLOPs", "parameters", 0), "gradient": ("log", "grad_norm", 2),
    "real Fréchet": ("Fréchet distance", "real held-out", 2),
    "real right": ("judged right", "real held-out", 3),
    "MSE": ("reconstruction MSE", "real held-out", 4), "all": ("distance", "all", 3),
    "all, uniform": ("distance", "all, uniform", 3), "class": ("distance", "class", 3),
    "class, uniform": ("distance", "class, uniform", 3), "copies": ("samples", "copies", 4),
    "lowest ratio": ("samples", "lowest ratio", 2), "FID": ("FID", "images", 1),
    "rFID": ("FID", "reconstructed", 1), "LPIPS": ("LPIPS", "real held-out", 3),
    "Fréchet": ("Fréchet distance", "images", 2), "real copies": ("held-out", "copies", 4),
    "real lowest": ("held-out", "lowest ratio", 2)}
USUAL = ("right 1", "right 4", "Fréchet 1", "Fréchet 2", "Fréchet 4", "recall 4", "nearest 4")
SEVERAL = [f"{short} {T}" for short in ("Fréchet", "right", "recall") for T in STEPS[1:]]
FAR, LATER = ("Fréchet 1", "Fréchet 4"), ("Fréchet 2", "Fréchet 4", "Fréchet 6")


@dataclass
class Study:
    """A claim, and what it takes to look at it."""

    paper: str              # where it stands
    claim: str
    number: str             # the paper's, or -
    says: str               # a sentence on what the paper says
    rows: dict              # {label: (run, measure)}
    comparisons: list = ()  # (label, head, sign, label, head); all of them together decide on the claim
    heads: tuple = USUAL    # of columns


def less(a, others, *heads, sign="<"):
    """Comparisons: row a is lower than each of the others ("=": alike), in each of these columns."""
    return [(a, head, sign, other, head) for other in others for head in heads]


def of(run, *measures):
    """Rows of one run measured in several ways."""
    return {measure: (run, measure) for measure in measures}


def runs(*names):
    """Rows of several runs, measured in the usual way."""
    return {name: (name, "") for name in names}


DEFAULT, LATENT = {"default": ("digits", "")}, {"default": ("digits-latent", "")}
LENGTHS = {L: f"L = {L}, ratio {768 / L:.2g}" for L in (36, 72, 144, 288, 576, 1152)}
PLAIN = {f"{name}, {how}": (name, how) for how in ("prior", "fitted") for name in DEVIATIONS}
SYSTEMS = {"SE": "digits", "SLE": "digits-latent", "SE, 16 tokens": "16 tokens",
           "SLE, 16 tokens": "latent, 16 tokens"}
# The presets' own decays are measured under the name "".
DECAYS = {f"{system}, {how}": (run, "" if how == ("released" if "SLE" in system else "fixed") else how)
          for how in ("fixed", "Eq. 13", "released") for system, run in SYSTEMS.items()}

STUDIES = {
    "steps": Study(
        "SE Table 1", "more steps help", "18.68 / 8.28 / 2.72 / 1.65 at 1 / 2 / 4 / 6 steps (CIFAR-10)",
        "gFID falls up to six steps.", DEFAULT,
        [("default", f"Fréchet {b}", "<", "default", f"Fréchet {a}") for a, b in ((1, 2), (2, 4), (4, 6))],
        [f"{short} {T}" for short in ("Fréchet", "right", "recall") for T in STEPS]),
    "classes": Study(
        "SE Table 1", "a conditional model generates better", "18.68 against 35.67 at 1 step (CIFAR-10)",
        "Its unconditional model has 1.9 times the gFID at one step and 1.6 times at four, after twice the "
        "epochs.", DEFAULT | runs("no classes"),
        less("default", ["no classes"], *FAR)),
    "consistency": Study(
        "SE Sec. 6, Table 4", "each consistency loss improves generation",
        "13.58 with neither, 7.53 with both (ImageNet, second hand)",
        "Pixel consistency \"significantly improves\" on reconstruction alone, whose images have a "
        "\"waffle\" artifact; with latent consistency they are best. (In its code reconstruction alone is "
        "from v_NOISY, not from v_noisy as in Eq. 7.)",
        DEFAULT | runs("reconstruction alone", "reconstruction from v_NOISY", "no pixel consistency",
                       "no latent consistency"),
        less("no latent consistency", ["reconstruction alone", "reconstruction from v_NOISY"], "Fréchet 4")
        + less("default", ["no latent consistency", "no pixel consistency"], "Fréchet 4"), (*USUAL, "MSE")),
    "length": Study(
        "SE Sec. 6, Table 4, 6", "consistency losses and fixed noise pay in twice the training (ours)", "-",
        "Its runs are longer by far. (Does what was not as claimed after 51 epochs hold after 102?)",
        runs(*TWICE) | {"twice as long, Eq. 13": ("twice as long", "Eq. 13")} | DEFAULT,
        less("twice as long", [*TWICE, "twice as long, Eq. 13"][1:], "Fréchet 4"), (*USUAL, "MSE")),
    "angle": Study(
        "SE Sec. 6, Fig. 10, 11", "angles up to 45 degrees fail, 80 is best for small images",
        "curve only; best at 80 (CIFAR-10) and 85 (ImageNet)",
        "Up to 45 degrees noisy latents do not cover the sphere and generation fails; 80 degrees work best "
        "for small images, 85 for large ones. (No hard cases, but in the default.)", runs(*ANGLES) | DEFAULT,
        less("45 degrees", ["80 degrees"], "right 4")
        + less("80 degrees", [f"{alpha} degrees" for alpha in (45, 60, 70, 75, 85)], *FAR),
        (*USUAL, "MSE")),
    "trade-off": Study(
        "SE Sec. 6; SLE Sec. 1", "less noise reconstructs better", "-",
        "Lower noise levels improve reconstruction, but weaken generation.",
        runs("45 degrees", "60 degrees", "80 degrees"),
        less("45 degrees", ["60 degrees"], "MSE") + less("60 degrees", ["80 degrees"], "MSE"),
        ("MSE", *USUAL)),
    "hard-cases": Study(
        "SE App. C.2, Table 10", "hard cases help up to 85 degrees, and more than up to 89", "-",
        "A tenth of the samples between 80 and 85 degrees improves one and four steps; up to 89 degrees "
        "quality falls and gradients explode. (The paper draws uniformly in the angle, its code in sigma; "
        "gradient: the largest norm in the log, a mean of ten iterations.)",
        {"none": ("80 degrees", ""), "to 85 (default)": ("digits", ""), "to 89": ("hard to 89", ""),
         "none, in the angle": ("no hard cases, in the angle", ""),
         "to 85, in the angle": ("hard to 85, in the angle", ""),
         "to 89, in the angle": ("hard to 89, in the angle", ""),
         "to 85, as released": ("released noise", "")},
        less("to 85 (default)", ["none", "to 89"], *FAR)
        + less("to 85, in the angle", ["none, in the angle", "to 89, in the angle"], *FAR),
        (*USUAL, "gradient")),
    "tokens": Study(
        "SE Sec. 6, Table 5", "a higher spatial resolution is better at equal L", "-",
        "At equal L the higher spatial resolution generates better, on all its data sets. (With 1 token "
        "reconstruction has some nine times the default's error.)",
        runs("1 token of 288") | {"4 tokens of 72 (default)": ("digits", "")} | runs("16 tokens of 18")
        | {"4 tokens, Eq. 13": ("digits", "Eq. 13"), "16 tokens, Eq. 13": ("16 tokens of 18", "Eq. 13")},
        less("4 tokens of 72 (default)", ["1 token of 288"], "Fréchet 4")
        + less("16 tokens of 18", ["4 tokens of 72 (default)"], "Fréchet 4")
        + less("16 tokens, Eq. 13", ["4 tokens, Eq. 13"], "Fréchet 4"), (*USUAL, "MSE", "parameters")),
    "compression": Study(
        "SE App. C.5, Fig. 20", "a ratio near 3 is better than larger or smaller ones",
        "1.5 and 3.0 best (ImageNet)",
        "gFID has two optima, at ratios of pixels to L of about 1.5 and 3. (The ratio counts 16 x 16 x 3 "
        "numbers; these digits are grey and of 8x8 pixels, enlarged: of independent numbers the default's "
        "ratio is 64 / 288 = 0.22.)",
        {label: ("digits" if L == 288 else f"L = {L}", "") for L, label in LENGTHS.items()},
        less(LENGTHS[288], [LENGTHS[L] for L in (36, 72, 144, 576, 1152)], "Fréchet 4"),
        (*USUAL, "MSE")),
    "schemes": Study(
        "SE Sec. 6, Table 6", "fixed noise beats decay, shared noise beats fresh",
        "5.99 fixed and shared at 4 steps (ImageNet, second hand)",
        "Fixed noise is better than decaying noise at every number of steps, and shared noise than fresh. "
        "(With Eq. 13 the second of two steps has no noise at all.)",
        DEFAULT | of("digits", "Eq. 13", "released", "fresh", "fresh, Eq. 13"),
        less("default", ["Eq. 13", "fresh"], *LATER) + less("fresh", ["fresh, Eq. 13"], *LATER)
        + less("Eq. 13", ["fresh, Eq. 13"], *LATER[1:]), SEVERAL),
    "sampling-angle": Study(
        "SE Alg. 1", "noise between the steps is best as strong as in training (ours)", "-",
        "Its noise has the angle of the training, 80 degrees for small images, but where it decays.",
        DEFAULT | of("digits", *WEAKER), less("default", WEAKER, *LATER), SEVERAL),
    "guidance": Study(
        "SE App. A, Table 8", "guidance improves", "1.65 to 1.41 at 6 steps (CIFAR-10, guidance 1.2)",
        "A little guidance yields a slight improvement.", DEFAULT | of("digits", GUIDED[1.2, "combo"]),
        less(GUIDED[1.2, "combo"], ["default"], "Fréchet 6"),
        [f"{short} {T}" for short in ("Fréchet", "right") for T in STEPS]),
    "guided-places": Study(
        "SE App. C.1, Table 9", "guiding pixels beats guiding latents, and 1.6 shared by both is best",
        "1.6 in both places best (ImageNet)",
        "Guidance in pixels is consistently better than in latents, and the root of 1.6 in both is best at "
        "four steps. (encoder: in latents; decoder: in pixels; combo: the root in each.)",
        DEFAULT | of("digits", *GUIDED.values()),
        [comparison for s in (1.2, 1.6)
         for comparison in less(GUIDED[s, "decoder"], [GUIDED[s, "encoder"]], "Fréchet 4")]
        + less(GUIDED[1.6, "combo"], [row for row in GUIDED.values() if row != GUIDED[1.6, "combo"]],
               "Fréchet 4")),
    "prior": Study(
        "SE App. C.6, Table 14", "a truncated prior changes nothing", "-",
        "gFID and IS are similar for all bounds, since the noise is projected anyway.",
        DEFAULT | of("digits", *BOUNDS), less("default", BOUNDS, *FAR, sign="=")),
    "averages": Study(
        "SE App. D", "averaged weights make no difference", "-",
        "Averaging \"may not noticeably change\" FID or quality, \"likely\" since the cosine of the rate "
        "smooths already.",
        DEFAULT | of("digits", "plain weights"), less("default", ["plain weights"], *FAR, sign="=")),
    "regularisers": Study(
        "SE App. C.3, Table 11",
        "batch norm helps marginally, the sliced Wasserstein loss on top of it slightly harms", "-",
        "Batch norm improves one and four steps marginally; with the loss on top they are slightly "
        "worse. (The weight of the loss, 0.01, is ours.)",
        DEFAULT | runs("batch norm", "sliced Wasserstein", "batch norm and sliced Wasserstein"),
        less("batch norm", ["default", "batch norm and sliced Wasserstein"], *FAR)),
    "calibration": Study(
        "SE App. C.4, Table 12", "uncalibrated batch norm is better than calibrated (ours)", "-",
        "Explicit calibration is not strictly necessary. (Uncalibrated is \"every batch\", the first row has "
        "the training's running statistics. In one step no encoder takes part.)",
        runs("batch norm") | of("batch norm", *BATCH_NORMS),
        less("every batch", BATCH_NORMS[1:], *LATER[:2])),
    "uniformity": Study(
        "SE Sec. 4, Fig. 7",
        "noise brings latents nearer to uniform, a class's slightly more if the encoder is told it (ours)",
        "pictures only",
        "A class's latents, projected to three dimensions, \"appear approximately uniform\", without a loss "
        "that asks for it. (Uniform points measured alike are the floor; no run comes near it.)",
        {"no noise": ("0 degrees", "uniformity"), "30 degrees": ("30 degrees", "uniformity"),
         "default": ("digits", "uniformity"), "encoder blind to the class": ("blind encoder", "uniformity"),
         "batch norm": ("batch norm", "uniformity"),
         "sliced Wasserstein": ("sliced Wasserstein", "uniformity")},
        less("default", ["no noise", "30 degrees"], "all", "class")
        + less("default", ["encoder blind to the class"], "class"),
        ("all", "all, uniform", "class", "class, uniform")),
    "blind": Study(
        "SE Sec. 4", "an encoder that is not told the class generates worse", "-",
        "If a class's latents lie in one region, conditional generation \"may fail\".",
        DEFAULT | runs("blind encoder"),
        less("default", ["blind encoder"], *FAR) + less("blind encoder", ["default"], "right 1", "right 4")),
    "copies": Study(
        "SE App. B", "samples are copies no more often than held-out digits (ours)",
        "near-duplicates after some 10,000 epochs (CIFAR-10)",
        "After very long training the model sometimes generates near-duplicates. (A copy: nearer to a "
        "training digit, or its mirror image, than a third of the distance to the next one; ratio: of these "
        "distances; none came near a third. The runs have 51 and 41 epochs.)",
        {"Sphere Encoder": ("digits", "copies"), "Sphere Latent Encoder": ("digits-latent", "copies")},
        [(label, "copies", "=", label, "real copies") 
         for label in ("Sphere Encoder", "Sphere Latent Encoder")],
        ("copies", "real copies", "lowest ratio", "real lowest")),
    "parts": Study(
        "SE Sec. 2.4", "the sin-cos table, the last RMSNorm and the mixers each help", "-",
        "Without the sinusoidal table generation is worse; the norm is \"critical\" for stable training; "
        "mixers aim at \"cross-token mixing\". (Without mixers their norms are missing, too, so these runs "
        "are compared with those without the norm. Gradient: the largest mean of ten iterations; nothing "
        "was unstable without the norm.)",
        DEFAULT | runs("no sin-cos table", "no final RMSNorm", "no mixers"),
        less("default", ["no sin-cos table", "no final RMSNorm"], *FAR)
        + less("no final RMSNorm", ["no mixers"], *FAR),
        (*USUAL, "MSE", "gradient")),
    "autoencoders": Study(
        "SE Sec. 1, 7, Fig. 3", "random points do worse in autoencoders and VAEs than on the sphere",
        "pictures only",
        "Points of the prior give no images in FLUX's and Stable Diffusion's autoencoders; but \"VAEs can "
        "already perform direct sampling on MNIST\". (The same networks without a sphere and without the "
        "encoder's last RMSNorm. s, a pixel's deviation in [0, 1], weighs reconstruction against divergence; "
        "it counts 768 numbers, of which 64 are independent. Fitted: points of the Gaussian of all latents. "
        "The distance sees only means and covariances, which such points have by construction, and the "
        "judge cannot tell a digit of another class from none: look at precision.)",
        DEFAULT | PLAIN, less("default", [row for row in PLAIN if row.endswith("prior")], "Fréchet 1"),
        ("right 1", "Fréchet 1", "precision 1", "recall 1", "nearest 1", "MSE")),
    "systems": Study(
        "SLE Abstract", "the Sphere Latent Encoder is better at equal steps", "2.25 against 4.05 at 4 steps "
        "(ImageNet, with guidance, model cards)",
        "It \"significantly outperforms Sphere Encoder\" on three data sets. (Here its tokenizer, whose MSE "
        "is shown, is a small Sphere Encoder trained on the same digits, not DINOv2. With it the presets "
        "train for about the same time, with 16 tokens the Sphere Latent Encoder some 40 % longer. Fixed "
        "noise is the Sphere Encoder's default, the released decay the other's; one step has no decay.)",
        DECAYS, [comparison for how in ("fixed", "Eq. 13", "released") for tokens in ("", ", 16 tokens")
                 for comparison in less(f"SLE{tokens}, {how}", [f"SE{tokens}, {how}"],
                                        *(FAR if how == "fixed" else ["Fréchet 4"]))],
        ("right 1", "right 4", "Fréchet 1", "Fréchet 2", "Fréchet 4", "Fréchet 6", "recall 4", "MSE")),
    "fid": Study(
        "SE Table 1; SLE Abstract", "by FID too more steps help, and the Sphere Latent Encoder is better",
        "18.68 / 8.28 / 2.72 at 1 / 2 / 4 steps (CIFAR-10); 2.25 against 4.05 at 4 (ImageNet)",
        "gFID falls with the steps; the Sphere Latent Encoder \"significantly outperforms\" the other at "
        "equal ones. (The presets `emoji` and `emoji-latent`. Held-out: 146 pictures of emoji that were not "
        "trained on in any drawing; compare them with as many samples, since few have a large FID. rFID: of "
        "reconstructed training images, SLE's by its tokenizer. A Gaussian: of each class's pixels.)",
        {"SE, fixed": ("emoji", "FID"), "SE, released": ("emoji", "FID, released"),
         "SLE, fixed": ("emoji, latent", "FID, fixed"), "SLE, released": ("emoji, latent", "FID"),
         "SLE, released, 146 samples": ("emoji, latent", "FID, 146 samples"),
         "held-out images": ("emoji", "held-out"), "a Gaussian per class": ("emoji", "Gaussian")},
        [("SE, fixed", f"FID {b}", "<", "SE, fixed", f"FID {a}") for a, b in ((1, 2), (2, 4), (1, 4))] +
        [(f"SLE, {how}", "FID 4", "<", f"SE, {how}", "FID 4") for how in ("fixed", "released")],
        [*(f"FID {T}" for T in STEPS), *(f"Fréchet {T}" for T in STEPS), "FID", "Fréchet", "rFID"]),
    "lpips": Study(
        "SE Sec. 2.3", "the perceptual distance helps", "-",
        "Pixels are compared by smooth L1 and by features of a static VGG. (Preset `emoji`, with and without "
        "its two perceptual terms, whose weights are 1: 2,000 iterations each; and with them 600, which take "
        "about as long as 2,000 without.)",
        {"with LPIPS": ("emoji", "FID"), "with LPIPS, equal time": ("emoji, as long", "FID, 1 and 4 steps"),
         "smooth L1 alone": ("emoji, pixels alone", "FID, 1 and 4 steps")},
        [(label, head, "<", "smooth L1 alone", head) for label in ("with LPIPS, equal time", "with LPIPS")
         for head in ("LPIPS", "FID 1", "FID 4")], ("FID 1", "FID 4", "rFID", "LPIPS", "MSE")),
    "cost": Study(
        "SLE Sec. 1", "What does an image cost?", "",
        "Some 6.5 times fewer FLOPs at the same steps: no step leaves the latent space, and one decode makes "
        "the image. (`python train.py --list` counts 6.48 times fewer at 4 steps for the paper's sizes. "
        "These presets are no such pair: four tokens of pixels cost less than the denoiser that was chosen.)",
        {system: (run, "time") for system, run in SYSTEMS.items()}, (),
        [f"{x} {T}" for x in ("MFLOPs", "ms") for T in STEPS] + ["parameters"]),
    "noise": Study(
        "SLE Sec. 4.3", "logit-normal noise, of our mean and deviation, is better than the Sphere Encoder's",
        "-",
        "\"More aggressive noise schedules that are better suited to few-step sampling.\" (Mean and "
        "deviation are lost. Ours, -1 and 1.5, were chosen on other seeds and are no more aggressive than "
        "uniform noise; (0, 1) is. The uniform noise keeps the preset's 82.5 degrees.)",
        LATENT | runs("latent, uniform noise", "latent, uniform noise, hard to 85",
                      "latent, plain logit-normal", "latent, 75 degrees", "latent, 85 degrees"),
        less("default", ["latent, uniform noise", "latent, uniform noise, hard to 85"], *FAR, "Fréchet 6"),
        (*USUAL, "Fréchet 6")),
    "latent-consistency": Study(
        "SLE Sec. 4.3", "latent consistency is better left out", "-",
        "Removing it improves performance and training efficiency. (Its form is in an appendix that our text "
        "lacks; form and weight, 0.1, are assumed. Efficiency was not measured.)",
        LATENT | runs("with latent consistency"),
        less("default", ["with latent consistency"], *FAR, "Fréchet 6"), (*USUAL, "Fréchet 6")),
    "latent-objective": Study(
        "SLE Sec. 4.2", "the consistency loss improves generation (ours)", "-",
        "\"With these two losses, our denoising model can generate new samples in just a few steps.\"",
        LATENT | runs("latent, no consistency"),
        less("default", ["latent, no consistency"], *FAR, "Fréchet 6"),
        (*USUAL, "Fréchet 6")),
    "distances": Study(
        "SLE Sec. 4.2", "Which distance, and is the cosine needed?", "",
        "A distance and a cosine are added; our text has lost the symbol of the distance. (The default is "
        "L1. z and f(z) as targets are the same: these latents are on the sphere.)",
        LATENT | runs("latent, squared", "latent, smooth", "latent, distance alone", "latent, cosine alone")),
    "decays": Study(
        "SLE Sec. 4.4", "Which decay of the noise?", "",
        "Noise is reduced over the steps \"following Sphere Encoder\"; by which formula is lost. The default "
        "is that of the Sphere Encoder's released code.",
        LATENT | of("digits-latent", "Eq. 13", "fixed"), (), SEVERAL),
    "floor": Study(
        "-", "How near are real digits, and what does the number of samples do?", "",
        "The 297 held-out digits are all there are of the same distribution; compare them with 297 samples. "
        "(The columns called real are of these 297 in every row.)",
        of("digits", "297 samples", "1,000 samples") | {"2,000 samples": ("digits", "")}
        | of("digits", "4,000 samples")
        | {"Sphere Latent Encoder, 297 samples": ("digits-latent", "297 samples")}, (),
        ("Fréchet 1", "Fréchet 4", "real Fréchet", "right 4", "real right", "recall 4", "nearest 4")),
}


# ---- The report --------------------------------------------------------------------------------------------


def values(study, label, head):
    """The seeds' numbers of a cell, or None if its measure has no such row."""
    (run, measure), (row, column, _) = study.rows[label], HEADS[head]
    if row == "MFLOPs":
        return [counted(run).get(column)] * len(SEEDS)
    if row == "log":
        return [max(line[column] for line in logged(folder(run, seed) / "log.jsonl")) for seed in SEEDS]
    found = [json.loads(measured_file(run, seed, measure).read_text()) for seed in SEEDS]
    found = [rows.get(row, {}).get(column) for rows in found]
    return None if None in found else found


@lru_cache
def counted(run):
    """Parameters, and MFLOPs of an image by T; 2 for every multiply-add."""
    preset, tokenizer = (replace(PRESETS[RUNS[name][0]], **RUNS[name][1]) if name else None
                         for name in (run, RUNS[run][1].get("tokenizer")))
    model, flops = cost(preset, 10, tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    return {T: 1000 * value for T, value in flops.items()} | {"parameters": parameters}


def shown(study, label, head):
    numbers, digits = values(study, label, head), HEADS[head][2]
    if numbers is None:
        return ""
    spread = "" if HEADS[head][0] == "MFLOPs" else f" ± {stdev(numbers):.{digits}f}"
    return f"{mean(numbers):,.{digits}f}{spread}"


def outcome(study, comparison):
    """1 if a comparison holds, -1 if it is the other way round, 0 if neither; INTRODUCTION has the rules."""
    label, head, sign, other, other_head = comparison
    a, b = values(study, label, head), values(study, other, other_head)
    apart = (max(a) < min(b)) - (max(b) < min(a))
    if sign == "<":
        return apart
    return 1 if abs(mean(a) - mean(b)) <= 0.1 * abs(mean(a)) else -1 if apart else 0


def verdict(study):
    outcomes = [outcome(study, comparison) for comparison in study.comparisons]
    yes, no, n = outcomes.count(1), outcomes.count(-1), len(outcomes)
    return ("holds" if yes == n else "the other way round" if no == n else "not decided" if not yes + no else
            f"{yes} of {n} as claimed, {no} the other way round, {n - yes - no} undecided")


def seen(study):
    """What is below what, with the numbers: a clause for each row and column that is compared."""
    words = {("<", 1): "below", ("<", -1): "above", ("<", 0): "within the spread of",
             ("=", 1): "as", ("=", -1): "unlike", ("=", 0): "not decided against"}
    clauses = {}
    for comparison in study.comparisons:
        label, head, sign, other, other_head = comparison
        place = f"{other}, {other_head}" if head != other_head else other
        clauses.setdefault(f"{label}, {head} ({shown(study, label, head)})", []).append(
            f"{words[sign, outcome(study, comparison)]} {place} ({shown(study, other, other_head)})")
    return "; ".join(f"{subject}: {', '.join(found)}" for subject, found in clauses.items())


def section(name, study):
    heads = [head for head in study.heads if any(values(study, label, head) for label in study.rows)]
    table = [["", *heads], ["---"] * (1 + len(heads))]
    table += [[label, *(shown(study, label, head) for head in heads)] for label in study.rows]
    commands = filter(None, (command(*row, name) for row in reversed(study.rows.values())))
    paper = f"{study.paper}: " * (study.paper != "-")
    return [f"## {name}", f"*{paper}{study.claim}{'?' * (study.claim[-1] != '?')}*",
            "\n".join(f"| {' | '.join(row)} |" for row in table),
            f"Seen ({verdict(study)}): {seen(study)}." if study.comparisons else "",
            study.says if study.paper == "-" else f"The paper: {study.says}",
            f"```sh\n{next(commands, f'python notebooks/results.py {name}')}\n```"]


def report():
    """results.md anew: studies that are complete here; all others, and below its dashes, as it was."""
    path, cpuinfo = HERE / "results.md", Path("/proc/cpuinfo")
    cpu = re.search("model name\t: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    old, _, below = path.read_text(encoding="utf-8").partition("\n----\n")
    was = {part.partition("\n")[0]: "## " + part.strip() for part in old.split("\n## ")[1:]}
    table = ["| paper | claim | the paper's number | here |  |", "| --- | --- | --- | --- | --- |"]
    sections, orders = [], []
    for name, study in STUDIES.items():
        if not missing([name]):
            sections += filter(None, section(name, study))
            for label, head, _, other, other_head in study.comparisons[-1:]:
                table.append(f"| {study.paper} | [{study.claim}](#{name}) | {study.number} | "
                             f"{label}, {head}: {shown(study, label, head)}; "
                             f"{other}, {other_head}: {shown(study, other, other_head)} | {verdict(study)} |")
        elif name in was:
            sections.append(was[name])
            table += [line for line in was["What holds here"].splitlines() if f"](#{name}) |" in line]
        else:
            continue
        orders += [study.rows[a][0] == study.rows[b][0]
                   for a, _, sign, b, _ in study.comparisons if sign == "<"]
    parts = [INTRODUCTION.format(count=COUNT, few=FEW, cpu=cpu[1] if cpu else platform.processor(),
                                 torch=torch.__version__, orders=len(orders), chance=len(orders) / 20,
                                 same=sum(orders)),
             "## What holds here", "By raw pixels alone, unless a row says FID or LPIPS.", "\n".join(table),
             NOT_TRIED]
    path.write_text("\n\n".join(parts + sections) + "\n\n----\n" + below, encoding="utf-8")


INTRODUCTION = """# Results

Written by `python notebooks/results.py`, but for what stands below the line of dashes. Which claims of the
papers hold on 1,500 real handwritten digits of 8x8 pixels, enlarged to 16x16, with small networks and
minutes of training, and on 604 emoji of 32x32 by FID? All numbers are means and standard deviations over
the training seeds 0, 1 and 2, of {count:,} class-balanced samples ({few:,} of emoji) of one sampling seed.
"default" is the preset `digits`, or `digits-latent`; samples are drawn as the preset says, without guidance,
unless a row says otherwise. The presets were tuned, on other seeds, and the alternatives were not, which
favours the default.

- **Fréchet** T: squared distance between Gaussians fitted to the raw pixels of samples in T steps and of
  the training images; it is no FID. **right**: share whose class a support vector classifier reads.
  **recall**: share of the training digits within the neighbourhoods of samples; it falls as samples get
  more, whose neighbourhoods shrink, and rises with scattered samples. **precision**: the reverse.
  **nearest**: median distance to the nearest training digit over that of held-out digits. **MSE**: of
  reconstructed held-out digits, in [-1, 1]. **ms**: per image, on one thread.
- *Below* and *above*: all three seeds of one are lower than all three of the other; *within the spread*:
  they are not. Two equal, independent settings are so arranged one time in ten, in the claimed direction
  one in twenty: some {chance:.1f} of the {orders} such comparisons, were all equal and independent. They
  are not: {same} compare runs with themselves, sampled otherwise, and most share the default's. *As*: the
  means differ by at most a tenth; *unlike*: by more, and all seeds of one are lower; *not decided against*:
  neither.
- A claim **holds** if all its comparisons do. The table of claims shows the last one of each, its section
  all. Most are by Fréchet distance, which can be low without a single digit (see
  [autoencoders](#autoencoders)): read right, recall and nearest beside it.
- Commands make the last row of a table that options can make, for seed 0, with tokenizers that `results.py`
  has trained; `python notebooks/results.py NAME` makes the whole table.
- **FID** T: of samples in T steps and all training images, by torch-fidelity's convention, with the original
  weights. Fewer samples have a larger FID: published ones use 50,000. No Inception Score: the weights at hand
  lack the layer of the classes. **rFID** and **LPIPS**: of reconstructed training and held-out images.

Machine: {cpu}, no GPU, one thread per run, torch {torch}."""
NOT_TRIED = """Not tried: the papers' sizes, data sets and FIDs (`train.py` has their presets), LPIPS with
ConvNeXt, latents of DINOv2, manipulation and interpolation (pictures: notebook 3)."""

# ---- Command line ------------------------------------------------------------------------------------------


def missing(names):
    """{(run, seed): [measures]} that the studies lack; first the tokenizers that these need."""
    lacks, tokenizers = {}, {}
    for run, measure in dict.fromkeys(pair for name in names for pair in STUDIES[name].rows.values()):
        for seed in SEEDS:
            if not measured_file(run, seed, measure).exists():
                lacks.setdefault((run, seed), []).append(measure)
                tokenizer = RUNS[run][1].get("tokenizer")
                if tokenizer and not (folder(tokenizer, seed) / "done").exists():
                    tokenizers[tokenizer, seed] = []
    return tokenizers | lacks


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=", ".join(STUDIES))
    parser.add_argument("--list", action="store_true", help="name the studies and what they lack, and stop")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (%(default)s)")
    args = parser.parse_args()
    os.chdir(HERE.parent)
    if unknown := {*args.studies} - {*STUDIES}:
        parser.error(f"no study is called {min(unknown)}; there are {', '.join(STUDIES)}")
    names = args.studies or [*STUDIES]
    if args.list:
        for name in names:
            study, lacks = STUDIES[name], missing([name])
            trainings = sum(not (folder(*key) / "done").exists() for key in lacks)
            print(f"{name:20}{trainings:3} trainings and {sum(map(len, lacks.values())):2} of "
                  f"{3 * len(study.rows):2} measures missing; {study.claim}")
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}         # of the processes to come
    todo = {key: [name for name in measures if name != "time"] for key, measures in missing(names).items()}
    try:
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            for tokenizers in (True, False):
                futures = [pool.submit(work, *key, measures) for key, measures in todo.items()
                           if tokenizers == ("tokenizer" in key[0])]
                for future in tqdm(as_completed(futures), total=len(futures), unit="run"):
                    future.result()
        for run, seed in missing(names):                    # when nothing else runs
            work(run, seed, ["time"])
    finally:
        report()


if __name__ == "__main__":
    main()
