"""Every finding of both papers that can be tried on small real digits, tried on three seeds.

    python notebooks/results.py --list                  # the studies, and how many of their runs are done
    python notebooks/results.py angle hard-cases        # train and measure what these need
    python notebooks/results.py                         # all of it: some two hours on two cores

Writes what is measured so far into results.md, beside this file, above its line of dashes. Runs lie in
out/results; a finished one is not made again, an interrupted one goes on. One process per core, one thread in
each, so that numbers do not depend on the number of cores.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from unittest import mock

import torch
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import spherify as sphere  # noqa: E402
import train as training  # noqa: E402
from fid import nearest_neighbours, pixel_features, to_uint8, whole_file  # noqa: E402
from losses import (WEIGHT_NAMES, orthogonal_directions, pixel_reconstruction_loss,  # noqa: E402
                    sliced_wasserstein_loss)
from models import SphereEncoder  # noqa: E402
from sample import POSITIONS, load, sampler, to_float  # noqa: E402
from train import PRESETS, gathered, load_data, quality, seeded  # noqa: E402

SEEDS, COUNT, OUT = (0, 1, 2), 2000, Path("out/results")
STEPS = (1, 2, 4, 6)
FRECHET = "Fréchet distance"

# ---- Runs --------------------------------------------------------------------------------------------------


class Autoencoder(SphereEncoder):
    """E and D without a sphere: an autoencoder (s = 0), or a VAE whose pixels have the deviation s in [0, 1].

    Random points are Gaussian: of N(0, I), or of the Gaussian fitted to the training set's latents."""

    s = 0.0

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        N, d = self.latent_shape
        twice = SphereEncoder(**{**self.config, "latent_dim": 2 * d})       # means and log-variances
        self.encoder = twice.encoder
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
        """Random points shall come from the Gaussian of these images' latents, drawn from their posteriors."""
        z, logvar = (part.flatten(1) for part in self.posterior(x, y))
        covariance = z.T.cov() + (logvar.exp().mean(0).diag() if self.s else 0)
        values, vectors = torch.linalg.eigh(covariance)
        self.mean, self.root = z.mean(0), values.clamp(min=0).sqrt()[:, None] * vectors.T


def autoencoder_loss(model, x, y, sigma, sigma_sub, e, *unused):
    """Smooth L1, which is Gaussian, and the divergence from N(0, I) on its scale: the evidence bound."""
    z, logvar = model.posterior(x, y[0])
    z = z + (logvar / 2).exp() * e * (model.s > 0)
    l1, zero = pixel_reconstruction_loss(model.decode(z, y[2]), x)
    divergence = (z.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean() / 2
    parts = dict.fromkeys(WEIGHT_NAMES, zero) | {"recon_l1": l1.detach()}
    return l1 + model.s**2 * divergence / x[0].numel(), parts


def without_sphere(s):
    kind = type("Autoencoder", (Autoencoder,), {"s": s})
    return {"models.SphereEncoder": kind, "sample.SphereEncoder": kind,
            "losses.sphere_encoder_loss": autoencoder_loss,
            "train.reconstruct": lambda model, x, y=None: SphereEncoder.decode(model, model.encode(x, y), y)}


def from_large_noise(*arguments, **options):
    sigma, _ = sphere.uniform_sigmas(*arguments, **options)
    return sigma, sigma


def noise_of_sphere_encoder(batch, alpha_max, mean, std, mapping, generator):
    return sphere.uniform_sigmas(batch, alpha_max, generator=generator)


# name: (preset, what differs from it, what stands in place of a name of the code; a number is that of
# without_sphere). A tokenizer is the run of that name with the same seed.
ALONE, TOKENS_16 = (1.0, 0.0, 0.0, 0.0, 0.0), {"patch_size": 4, "latent_dim": 16}
RUNS = {name: ("digits", changes, {}) for name, changes in {
    "digits": {},
    "no pixel consistency": {"weights": (1.0, 0.0, 0.0, 0.0, 0.02)},
    "no latent consistency": {"weights": (1.0, 0.0, 1.0, 0.0, 0.0)},
    "reconstruction alone": {"weights": ALONE},
    **{f"{alpha} degrees": {"alpha_max": float(alpha), "alpha_hard": 0.0}
       for alpha in (0, 30, 45, 60, 70, 75, 80, 85)},
    "hard to 89": {"alpha_hard": 89.0},
    "no hard cases, in the angle": {"mapping": "angle", "alpha_hard": 0.0},
    "hard to 85, in the angle": {"mapping": "angle"},
    "hard to 89, in the angle": {"mapping": "angle", "alpha_hard": 89.0},
    "released noise": {"mapping": "official"},
    "1 token of 288": {"patch_size": 16, "latent_dim": 288},
    "16 tokens of 18": {"patch_size": 4, "latent_dim": 18},
    "16 tokens": TOKENS_16,
    **{f"L = {4 * d}": {"latent_dim": d} for d in (9, 18, 36, 144, 288)},
    "batch norm": {"batch_norm": True},
    "sliced Wasserstein": {"swd_weight": 0.01},
    "batch norm and sliced Wasserstein": {"batch_norm": True, "swd_weight": 0.01},
    "blind encoder": {"encoder_classes": False},
    "no mixers": {"mixer_depth": 0},
}.items()} | {
    "reconstruction from v_NOISY": ("digits", {"weights": ALONE}, {"train.uniform_sigmas": from_large_noise}),
    "no sin-cos table": ("digits", {}, {"models.sincos_table": lambda grid, width: torch.zeros(
        math.prod(grid), width)}),
    "no final RMSNorm": ("digits", {}, {"models.Mixer.forward": lambda self, x: nn.Sequential(*self.blocks)(x)}),
    "autoencoder": ("digits", {}, 0.0), "VAE, s = 0.03": ("digits", {}, 0.03),
    "VAE, s = 0.1": ("digits", {}, 0.1),
    "tokenizer": ("digits-tokenizer", {}, {}),
    "16-token tokenizer": ("digits-tokenizer", {"patch_size": 4, "latent_dim": 8}, {}),
    "digits-latent": ("digits-latent", {"tokenizer": "tokenizer"}, {}),
    "latent, 16 tokens": ("digits-latent", {"tokenizer": "16-token tokenizer"}, {}),
    "latent, uniform noise": ("digits-latent", {"tokenizer": "tokenizer"},
                              {"train.logit_normal_sigmas": noise_of_sphere_encoder}),
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
}.items()}


def folder(run, seed):
    return OUT / f"{re.sub('[^A-Za-z0-9.]+', '-', run)}-{seed}"


@contextlib.contextmanager
def settings(run, seed):
    """The preset of a run, within the code as the run wants it."""
    name, changes, replaced = RUNS[run]
    preset = replace(PRESETS[name], **changes)
    if changes.get("tokenizer"):
        preset = replace(preset, tokenizer=str(folder(changes["tokenizer"], seed) / "last.pt"))
    with contextlib.ExitStack() as stack:
        for target, new in (without_sphere(replaced) if isinstance(replaced, float) else replaced).items():
            stack.enter_context(mock.patch(target, new))
        yield preset


def command(run):
    """The command that trains a run's seed 0 and measures it, if options can say it."""
    name, changes, replaced = RUNS[run]
    if replaced:
        return None
    word = lambda value: ",".join(map(str, value)) if isinstance(value, tuple) else value
    options = "".join(f" --{key.replace('_', '-')} {word(value)}" if not isinstance(value, bool)
                      else f" --{'' if value else 'no-'}{key.replace('_', '-')}"
                      for key, value in changes.items() if key != "tokenizer")
    return (f"python train.py --preset {name}{options} --out out/a\n"
            f"python train.py --evaluate out/a/last.pt --count {COUNT} --steps {','.join(map(str, STEPS))}")

# ---- Measures ----------------------------------------------------------------------------------------------


def judged(model, data, held_out, prepare=None, **arguments):
    if prepare:
        prepare(model, data)
    return quality(model, data, held_out, **{"count": COUNT, "steps": STEPS, **arguments})


def calibrated(how, model, data):
    """Statistics of the batch norm for sampling, SE C.4: of every batch of samples by itself, of training
    images, or of 500 samples."""
    x, y = data[range(len(data))] if how == "training images" else (None, torch.arange(500) % 10)
    x = to_float(x) if how == "training images" else sampler(model)(model, y, 4, first=10_000)
    model.norm.reset_running_stats()
    model.norm.momentum = None                              # a plain mean over the batches
    model.norm.train()
    for part, classes in zip(x.split(100), y.split(100)):
        model.encode(part, classes)
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
    """Share of samples whose nearest training image, or its mirror image, is nearer than a third of the way to
    the next one; the same of held-out images."""
    x = data[range(len(data))][0]
    real = pixel_features(torch.cat([x, x.flip(-1)]))
    samples = gathered(range(COUNT), lambda part: to_uint8(
        (sampler(model)(model, [i % 10 for i in part], T, first=part[0]) + 1) / 2))
    rows = {}
    for name, images in (("samples", samples), ("held-out", held_out[range(len(held_out))][0])):
        distance, place = nearest_neighbours(pixel_features(images), real, 3)
        other = torch.where(place[:, 1] % len(x) == place[:, 0] % len(x), 2, 1)[:, None]
        ratio = distance[:, 0] / distance.gather(1, other)[:, 0].clamp(min=1e-12)
        rows[name] = {"copies": (ratio < 1 / 3).double().mean().item(), "lowest ratio": ratio.min().item()}
    return rows


# What is measured of a run: arguments of quality, use_ema of load, and what comes before.
MEASURES = {
    "": {}, "fixed": {"gamma": 0.0}, "Eq. 13": {"gamma": 1.0, "schedule": "eq13"},
    "released": {"gamma": 1.0, "schedule": "released"}, "fresh": {"shared": False},
    "fresh, Eq. 13": {"shared": False, "gamma": 1.0, "schedule": "eq13"},
    **{f"guided {s}, {place}": {"cfg": s, "position": place} for s in (1.2, 1.6) for place in POSITIONS},
    **{f"bound {bound}": {"bound": bound} for bound in (1.0, 2.0, 3.0)},
    "plain weights": {"use_ema": False}, "projected": {"project_last": True},
    **{how: {"prepare": partial(calibrated, how)} for how in ("every batch", "training images", "500 samples")},
    "prior": {"steps": (1,)}, "fitted": {"steps": (1,), "prepare": fitted},
    "297 samples": {"count": 297}, "1,000 samples": {"count": 1000}, "4,000 samples": {"count": 4000},
    "time": {"count": 1000}, "uniformity": uniformity, "copies": copies,
}


def work(run, seed, wanted):
    """Train a run and measure what is wanted of it; both unless they are done."""
    torch.set_num_threads(1)
    training.draw = lambda *arguments: None                 # no pictures
    out = folder(run, seed)
    out.mkdir(parents=True, exist_ok=True)
    with settings(run, seed) as preset, open(out / "output.txt", "a") as file, contextlib.redirect_stdout(file):
        if not (out / "done").exists():
            training.train(preset, out, seed, (out / "last.pt").exists(), "cpu")
            (out / "done").touch()
        data, held_out, _ = load_data(preset)
        for name in wanted:
            arguments = MEASURES[name]
            options = {} if callable(arguments) else dict(arguments)
            model = load(out / "last.pt", ema=options.pop("use_ema", None))
            measure = arguments if callable(arguments) else partial(judged, **options)
            rows = measure(model, data, held_out) | {"training": {"seconds": seconds(run, seed)}}
            with whole_file(measured_file(run, seed, name)) as whole:
                whole.write(json.dumps(rows).encode())


def seconds(run, seed):
    """Training time of a run, and of its tokenizer."""
    tokenizer, step, total = RUNS[run][1].get("tokenizer"), 0, 0.0
    for line in map(json.loads, (folder(run, seed) / "log.jsonl").read_text().splitlines()):
        total += (line["step"] - step) * PRESETS["digits"].batch_size / line["images/s"]
        step = line["step"]
    return total + (seconds(tokenizer, seed) if tokenizer else 0)


def measured_file(run, seed, measure):
    return folder(run, seed) / f"measured-{re.sub('[^A-Za-z0-9.]+', '-', measure) or 'default'}.json"


# ---- Studies -----------------------------------------------------------------------------------------------

# Heads of columns: row and column of what a measure returns, digits.
HEADS = {f"{short} {T}": (row, f"T = {T}", digits) for T in STEPS for short, row, digits in (
    ("Fréchet", "Fréchet distance", 2), ("right", "judged right", 3), ("recall", "recall", 2),
    ("nearest", "nearest", 2), ("ms", "ms per image", 2))} | {
    "real Fréchet": ("Fréchet distance", "real held-out", 2), "real right": ("judged right", "real held-out", 3),
    "MSE": ("reconstruction MSE", "real held-out", 4), "all": ("distance", "all", 3),
    "all, uniform": ("distance", "all, uniform", 3), "class": ("distance", "class", 3),
    "class, uniform": ("distance", "class, uniform", 3), "copies": ("samples", "copies", 4),
    "lowest ratio": ("samples", "lowest ratio", 2), "real copies": ("held-out", "copies", 4),
    "real lowest": ("held-out", "lowest ratio", 2), "training s": ("training", "seconds", 0)}
USUAL = ("right 1", "right 4", "Fréchet 1", "Fréchet 2", "Fréchet 4", "recall 4", "nearest 4")
SEVERAL = [f"{short} {T}" for short in ("Fréchet", "right", "recall") for T in STEPS[1:]]
FAR = ("Fréchet 1", "Fréchet 4")


@dataclass
class Study:
    """A claim, and what it takes to look at it."""

    paper: str              # where it stands
    claim: str
    number: str             # the paper's, or -
    says: str               # a sentence on what the paper says
    rows: dict              # {label: (run, measure)}
    comparisons: list       # (label, head, sign, label, head); all of them together decide on the claim
    heads: tuple = USUAL    # of columns
    tried: str = ""         # a sentence on what was tried where the claim fails


def less(a, others, *heads):
    """Comparisons: row a is lower than each of the others, in each of these columns."""
    return [(a, head, "<", other, head) for other in others for head in heads]


def alike(a, others, *heads):
    return [(a, head, "=", other, head) for other in others for head in heads]


def of(run="digits", *measures):
    """Rows of one run measured in several ways."""
    return {measure: (run, measure) for measure in measures}


def runs(*names):
    """Rows of several runs, measured in the usual way."""
    return {name: (name, "") for name in names}


DEFAULT, LATENT = {"default": ("digits", "")}, {"default": ("digits-latent", "")}
ANGLES = [f"{alpha} degrees" for alpha in (0, 30, 45, 60, 70, 75, 80, 85)]
LENGTHS = {L: f"L = {L}, ratio {768 / L:.2g}" for L in (36, 72, 144, 288, 576, 1152)}
GUIDED = [(s, place, f"guided {s}, {place}") for s in (1.2, 1.6) for place in POSITIONS]
BATCH_NORMS = ("every batch", "training images", "500 samples")
PLAIN = [(name, how, f"{name}, {how}") for name in ("autoencoder", "VAE, s = 0.03", "VAE, s = 0.1")
         for how in ("prior", "fitted")]
SYSTEMS = {"SE": "digits", "SLE": "digits-latent", "SE, 16 tokens": "16 tokens", "SLE, 16 tokens": "latent, 16 tokens"}
DECAYS = ("fixed", "Eq. 13", "released")

STUDIES = {
    "steps": Study(
        "SE Sec. 3, Table 1", "more steps help", "18.68 / 8.28 / 2.72 / 1.65 at 1 / 2 / 4 / 6 steps (CIFAR-10)",
        "Its gFID falls up to six steps, beyond which it \"saturates\".", DEFAULT,
        [("default", f"Fréchet {b}", "<", "default", f"Fréchet {a}") for a, b in ((1, 2), (2, 4))],
        [f"{short} {T}" for short in ("Fréchet", "right", "recall") for T in STEPS]),
    "consistency": Study(
        "SE Sec. 6, Table 4", "each consistency loss improves generation",
        "13.58 with neither, 7.53 with both (ImageNet, second hand)",
        "With reconstruction alone images have a \"waffle\" artifact; pixel consistency removes it, and latent "
        "consistency makes them best. (In its code reconstruction alone is from v_NOISY, not from v_noisy as in "
        "Eq. 7.)",
        DEFAULT | runs("reconstruction alone", "reconstruction from v_NOISY", "no pixel consistency",
                       "no latent consistency"),
        less("default", ["reconstruction alone", "reconstruction from v_NOISY", "no pixel consistency",
                         "no latent consistency"], "Fréchet 4"), (*USUAL, "MSE")),
    "angle": Study(
        "SE Sec. 6, Fig. 10, 11", "generation fails at 45 degrees and works at 80",
        "curve only; best at 80 (CIFAR-10) and 85 (ImageNet)",
        "Up to 45 degrees noisy latents do not cover the sphere, and random points give no images; towards 80 or "
        "85 degrees gFID falls. (No hard cases but in the default.)", runs(*ANGLES) | DEFAULT,
        less("80 degrees", ["45 degrees"], *FAR) + less("45 degrees", ["80 degrees"], "right 4"), (*USUAL, "MSE")),
    "hard-cases": Study(
        "SE App. C.2, Table 10", "hard cases up to 85 degrees help, up to 89 they do not", "-",
        "A tenth of the samples between 80 and 85 degrees improves one and four steps; up to 89 degrees quality "
        "falls and gradients explode.",
        {"none": ("80 degrees", ""), "to 85 (default)": ("digits", ""), "to 89": ("hard to 89", ""),
         "none, in the angle": ("no hard cases, in the angle", "")}
        | runs("hard to 85, in the angle", "hard to 89, in the angle", "released noise"),
        less("to 85 (default)", ["none", "to 89"], *FAR)),
    "tokens": Study(
        "SE Sec. 6, Table 5", "more, thinner tokens are better at equal L", "-",
        "Of two arrangements of equal L the one with more tokens has the lower gFID, on all its data sets.",
        runs("1 token of 288") | {"4 tokens of 72 (default)": ("digits", "")} | runs("16 tokens of 18"),
        less("4 tokens of 72 (default)", ["1 token of 288"], "Fréchet 4")
        + less("16 tokens of 18", ["4 tokens of 72 (default)"], "Fréchet 4"), (*USUAL, "MSE")),
    "compression": Study(
        "SE App. C.5, Fig. 20", "an L of a third to two thirds of the image's numbers is best",
        "ratio 1.5 and 3.0 best (ImageNet)",
        "gFID has two optima, at ratios of about 1.5 and 3. (The ratio counts 16 x 16 x 3 numbers; these digits "
        "are grey and of 8x8 pixels, enlarged.)",
        {label: ("digits" if L == 288 else f"L = {L}", "") for L, label in LENGTHS.items()},
        less(LENGTHS[288], [LENGTHS[L] for L in (36, 72, 1152)], "Fréchet 4"), (*USUAL, "MSE")),
    "schemes": Study(
        "SE Sec. 6, Table 6", "fixed noise beats decay, shared noise beats fresh",
        "5.99 fixed and shared at 4 steps (ImageNet, second hand)",
        "Fixed noise is better than decaying noise at every number of steps, and shared noise than fresh.",
        DEFAULT | of("digits", "Eq. 13", "released", "fresh", "fresh, Eq. 13"),
        less("default", ["Eq. 13", "fresh"], "Fréchet 2", "Fréchet 4"), SEVERAL),
    "guidance": Study(
        "SE App. C.1, Table 9", "guiding pixels beats guiding latents, and both is best",
        "1.6 in both places best (ImageNet)",
        "Guidance in pixels is consistently better than in latents, and the root of it in both places is best "
        "at four steps.", DEFAULT | of("digits", *(label for *_, label in GUIDED)),
        [comparison for s in (1.2, 1.6) for better, worse in (("decoder", "encoder"), ("combo", "decoder"))
         for comparison in less(f"guided {s}, {better}", [f"guided {s}, {worse}"], "Fréchet 4")]),
    "prior": Study(
        "SE App. C.6, Table 14", "a truncated prior changes nothing", "-",
        "gFID and IS are similar for all bounds, since the noise is projected anyway.",
        DEFAULT | of("digits", "bound 3.0", "bound 2.0", "bound 1.0"),
        alike("default", ["bound 3.0", "bound 2.0", "bound 1.0"], *FAR)),
    "averages": Study(
        "SE App. D", "averaged weights make no difference", "-", "The cosine of the rate smooths enough.",
        DEFAULT | of("digits", "plain weights"), alike("default", ["plain weights"], *FAR)),
    "regularisers": Study(
        "SE App. C.3, Table 11", "batch norm helps marginally, the sliced Wasserstein loss on top of it does not",
        "-", "Batch norm improves one and four steps marginally; with the loss on top they are slightly worse. "
        "(The weight of the loss, 0.01, is ours.)",
        DEFAULT | runs("batch norm", "sliced Wasserstein", "batch norm and sliced Wasserstein"),
        less("batch norm", ["default", "batch norm and sliced Wasserstein"], *FAR)),
    "calibration": Study(
        "SE App. C.4, Table 12", "batch norm needs no calibration", "-",
        "Explicit calibration is not strictly necessary. (In one step no encoder takes part.)",
        runs("batch norm") | of("batch norm", *BATCH_NORMS), alike("batch norm", BATCH_NORMS, "Fréchet 4")),
    "uniformity": Study(
        "SE Sec. 4, Fig. 7", "latents become uniform; those of a class if the encoder is told it", "pictures only",
        "Latents look uniform on the sphere, all of them and those of one class, without a loss that asks for it.",
        {"no noise": ("0 degrees", "uniformity"), "30 degrees": ("30 degrees", "uniformity"),
         "encoder blind to the class": ("blind encoder", "uniformity"), "default": ("digits", "uniformity")},
        less("default", ["no noise", "30 degrees"], "all", "class")
        + less("default", ["encoder blind to the class"], "class"),
        ("all", "all, uniform", "class", "class, uniform")),
    "blind": Study(
        "SE Sec. 4", "an encoder that is not told the class generates worse", "-",
        "Each class must cover the whole sphere, or random points miss it.", DEFAULT | runs("blind encoder"),
        less("default", ["blind encoder"], *FAR)),
    "copies": Study(
        "SE App. B", "without long training no sample is a copy", "copies after 10,000 epochs of CIFAR-10",
        "After very long training the model sometimes generates near-duplicates.",
        of("digits", "copies") | {"Sphere Latent Encoder": ("digits-latent", "copies")},
        [(label, "copies", "=", label, "real copies") for label in ("copies", "Sphere Latent Encoder")],
        ("copies", "real copies", "lowest ratio", "real lowest")),
    "parts": Study(
        "SE Sec. 2.4", "the sin-cos table, the last RMSNorm and the mixers each help", "-",
        "Without the sinusoidal table generation is worse; the norm is \"critical\" for stable training.",
        DEFAULT | runs("no sin-cos table", "no final RMSNorm", "no mixers"),
        less("default", ["no sin-cos table", "no final RMSNorm", "no mixers"], *FAR), (*USUAL, "MSE")),
    "autoencoders": Study(
        "SE Sec. 1, Fig. 3", "random points fail in autoencoders and VAEs, not on the sphere", "pictures only",
        "Points of the prior, and of a Gaussian fitted to the latents, give no images in FLUX's and Stable "
        "Diffusion's autoencoders. (Here the same networks without a sphere; s, a pixel's deviation in [0, 1], "
        "weighs a VAE's reconstruction against its divergence. Few epochs and no tuning: a bound from above.)",
        DEFAULT | {label: (name, how) for name, how, label in PLAIN},
        less("default", [label for *_, label in PLAIN], "Fréchet 1"),
        ("right 1", "Fréchet 1", "recall 1", "nearest 1", "MSE")),
    "systems": Study(
        "SLE Sec. 5", "the Sphere Latent Encoder is better at equal steps", "2.25 against 4.05 at 4 steps (ImageNet)",
        "It \"significantly outperforms Sphere Encoder\" on three data sets. (Time includes the tokenizer's. "
        "Fixed noise is the Sphere Encoder's default, the released decay the other's.)",
        {f"{system}, {how}": (run, how) for how in DECAYS for system, run in SYSTEMS.items()},
        [comparison for how in DECAYS for tokens in ("", ", 16 tokens")
         for comparison in less(f"SLE{tokens}, {how}", [f"SE{tokens}, {how}"], "Fréchet 4")],
        ("training s", "right 1", "right 4", "Fréchet 1", "Fréchet 2", "Fréchet 4", "Fréchet 6", "recall 4")),
    "cost": Study(
        "SLE Sec. 1", "a step costs less than one through pixels", "6.5 times fewer FLOPs at 4 steps (ImageNet)",
        "No step leaves the latent space, and one decode makes the image. (`python train.py --list` counts 6.48 "
        "times fewer for the paper's sizes; here networks are small, and overheads a large part.)",
        {system: (run, "time") for system, run in SYSTEMS.items()},
        less("SLE", ["SE"], "ms 4") + less("SLE, 16 tokens", ["SE, 16 tokens"], "ms 4"),
        ("ms 1", "ms 2", "ms 4", "ms 6")),
    "noise": Study(
        "SLE Sec. 4.3", "its logit-normal noise is better than the Sphere Encoder's uniform noise", "-",
        "The larger and the smaller of two logit-normal draws work better.",
        LATENT | runs("latent, uniform noise", "latent, plain logit-normal", "latent, 75 degrees",
                      "latent, 85 degrees"), less("default", ["latent, uniform noise"], *FAR)),
    "latent-consistency": Study(
        "SLE Sec. 4.3", "latent consistency can be left out", "-",
        "It is removed, and with it a third pass of the denoiser.", LATENT | runs("with latent consistency"),
        alike("default", ["with latent consistency"], *FAR)),
    "latent-objective": Study(
        "SLE Sec. 4.2", "the consistency loss improves generation", "-", "Both losses make its objective.",
        LATENT | runs("latent, no consistency"), less("default", ["latent, no consistency"], *FAR)),
    "distances": Study(
        "SLE Sec. 4.2", "L1 is a better distance than the squared one", "symbol lost",
        "Our text has lost which distance it is. (The target cannot be varied: these latents lie on the sphere.)",
        LATENT | runs("latent, squared", "latent, smooth", "latent, distance alone", "latent, cosine alone"),
        less("default", ["latent, squared"], *FAR)),
    "decays": Study(
        "SLE Sec. 4.4", "the released decay is better than that of Eq. 13", "formula lost",
        "Noise is reduced over the steps \"following Sphere Encoder\"; by which formula is lost.",
        LATENT | of("digits-latent", "Eq. 13", "fixed"),
        less("default", ["Eq. 13"], "Fréchet 2", "Fréchet 4", "Fréchet 6"), SEVERAL),
    "last-step": Study(
        "SLE, model card", "the last prediction is decoded as it is", "-",
        "FID is measured with the \"raw final step\". (This tokenizer's decoder projects what it is given, so the "
        "two can differ by rounding alone: a check of the code.)", LATENT | of("digits-latent", "projected"),
        alike("default", ["projected"], *FAR)),
    "floor": Study(
        "-", "How near are real digits? What the number of images does to the numbers", "-",
        "The 297 held-out digits are all there are of the same distribution; compare them with 297 samples.",
        of("digits", "297 samples", "1,000 samples") | {"2,000 samples": ("digits", "")}
        | of("digits", "4,000 samples"), [],
        ("Fréchet 1", "Fréchet 4", "real Fréchet", "right 4", "real right", "nearest 4")),
}


# ---- The report --------------------------------------------------------------------------------------------


def values(study, label, head):
    """The seeds' numbers of a cell, or None if its measure has no such row."""
    (run, measure), (row, column, _) = study.rows[label], HEADS[head]
    found = [json.loads(measured_file(run, seed, measure).read_text()).get(row, {}).get(column) for seed in SEEDS]
    return None if None in found else found


def shown(study, label, head):
    numbers, digits = values(study, label, head), HEADS[head][2]
    return "" if numbers is None else f"{mean(numbers):.{digits}f} ± {stdev(numbers):.{digits}f}"


def outcome(study, comparison):
    """1 if a comparison holds, -1 if it does not, 0 if neither can be said; INTRODUCTION has the rules."""
    label, head, sign, other, other_head = comparison
    a, b = values(study, label, head), values(study, other, other_head)
    apart = (max(a) < min(b)) - (max(b) < min(a))
    if sign == "<":
        return apart
    return 1 if not apart or abs(mean(a) - mean(b)) < 0.1 * abs(mean(a)) else -1


def verdict(study):
    outcomes = [outcome(study, comparison) for comparison in study.comparisons]
    yes, no, n = outcomes.count(1), outcomes.count(-1), len(outcomes)
    if yes == n:
        return "holds"
    if not yes:
        return "does not hold" if no else "not seen"
    return f"in part: {yes} of {n} comparisons hold, {no or 'none'} the other way round"


def seen(study):
    """What is below what, with the numbers: a clause for each row and column that is compared."""
    words = {("<", 1): "below", ("<", -1): "above", ("<", 0): "within the spread of",
             ("=", 1): "as", ("=", -1): "unlike"}
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
    commands = [command(run) for run, _ in study.rows.values()]
    return [f"## {name}", f"*{study.paper}: {study.claim}?*", "\n".join(f"| {' | '.join(row)} |" for row in table),
            f"Seen ({verdict(study)}): {seen(study)}." if study.comparisons else "", f"The paper: {study.says}",
            study.tried and f"Tried: {study.tried}",
            f"```sh\n{next(filter(None, reversed(commands)), f'python notebooks/results.py {name}')}\n```"]


def report():
    """results.md anew, from the studies that are complete; what stands below its line of dashes stays."""
    path, done = HERE / "results.md", {name: study for name, study in STUDIES.items() if not missing([name])}
    cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].split("\n")[0]
    table = [["paper", "claim", "the paper's number", "here", ""], ["---"] * 5]
    for name, study in done.items():
        if study.comparisons:
            label, head, _, other, other_head = study.comparisons[-1]
            table.append([study.paper, f"[{study.claim}](#{name})", study.number,
                          f"{label}, {head}: {shown(study, label, head)}; "
                          f"{other}, {other_head}: {shown(study, other, other_head)}", verdict(study)])
    parts = [INTRODUCTION.format(count=COUNT, cpu=cpu, torch=torch.__version__), "## What holds here",
             "\n".join(f"| {' | '.join(row)} |" for row in table), NOT_TRIED]
    for name, study in done.items():
        parts += filter(None, section(name, study))
    below = path.read_text(encoding="utf-8").partition("\n----\n")[2]
    path.write_text("\n\n".join(parts) + "\n\n----\n" + below, encoding="utf-8")


INTRODUCTION = """# Results

Written by `python notebooks/results.py`, but for what stands below the line of dashes. Which claims of the papers
hold on 1,500 real handwritten digits of 8x8 pixels, enlarged to 16x16, with a network of half a million parameters
and a minute of training? All numbers are means and standard deviations over the training seeds 0, 1 and 2 (the
presets' settings were chosen on others), of {count:,} class-balanced samples. "default" is the preset `digits`, or
`digits-latent`; samples are drawn as the preset says, without guidance, unless a row says otherwise.

- **Fréchet** T: distance between Gaussians fitted to the raw pixels of samples in T steps and of the training
  digits; it is no FID. **right**: share whose class a support vector classifier reads. **recall**: share of the
  training digits among the samples. **nearest**: median distance to the nearest training digit over that of
  held-out digits. **MSE**: of reconstructed held-out digits, in [-1, 1]. **ms**: per image, on one thread.
- *Below* and *above*: all three seeds of one are lower than all three of the other; by chance alone two equal
  settings are so arranged one time in ten. *Within the spread*: they are not. *As*: they overlap, or their means
  differ by less than a tenth. A claim **holds** if all its comparisons do, and is **not seen** if none is beyond
  the spread. The claims' table shows the last comparison of each; its section has all.

Machine: {cpu}, no GPU, one thread per run, torch {torch}."""
NOT_TRIED = """Not tried: the papers' sizes, data sets and FIDs (`train.py` has their presets), perceptual losses (their weights
could not be downloaded), latents of DINOv2."""

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=", ".join(STUDIES))
    parser.add_argument("--list", action="store_true", help="name the studies and what they lack, and stop")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (%(default)s)")
    args = parser.parse_args()
    os.chdir(HERE.parent)
    if unknown := {*args.studies} - {*STUDIES}:
        parser.error(f"no study is called {min(unknown)}; there are {', '.join(STUDIES)}")
    names = args.studies or [*STUDIES]
    for name in names if args.list else ():
        study, lacks = STUDIES[name], missing([name])
        trainings = sum(not (folder(*key) / "done").exists() for key in lacks)
        print(f"{name:20}{trainings:3} of {3 * len({run for run, _ in study.rows.values()}):2} trainings and "
              f"{sum(map(len, lacks.values())):2} of {3 * len(study.rows):2} measures missing; {study.claim}")
    if args.list:
        return
    os.environ["OMP_NUM_THREADS"] = "1"                     # of the processes to come
    todo = missing(names)
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for tokenizers in (True, False):
            futures = [pool.submit(work, *key, todo[key]) for key in todo if tokenizers == (not todo[key])]
            for future in tqdm(as_completed(futures), total=len(futures), unit="run"):
                future.result()
    report()


if __name__ == "__main__":
    main()
