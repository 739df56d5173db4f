"""Training and evaluation of both papers' models. SE Sec. 2-4, 6, App. B-D; SLE Sec. 4, 5.

    python train.py                                                   # handwritten digits, in a minute
    python train.py --preset digits-latent                            # the same with a Sphere Latent Encoder
    python train.py --preset folder --data photos --out out/photos    # any folder of images, or of classes
    torchrun --nproc_per_node=8 train.py --preset fashion-mnist       # one process per GPU
    python train.py --evaluate out/digits/last.pt
"""

import argparse
import ast
import atexit
import contextlib
import copy
import json
import math
import os
import re
import signal
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import distributed, nn
from torch.nn import functional as F
from torch.utils.data import StackDataset, TensorDataset
from torchvision import datasets
from tqdm import tqdm

from fid import (ImageSet, Parser, compare, errors_in_one_line, extract_or_keep, extracted, feature_network,
                 find_images, images_or_statistics, is_first_process, is_grey, nearest_neighbours, number,
                 pick_device, positive, to_uint8, whole_file, whole_number)
from losses import DISTANCES, Objective
from models import (SphereEncoder, SphereTokenizer, build_model, cost, parameter_groups, take_weights,
                    update_ema)
from sample import (image_transform, known, load, load_tokenizer, picture, read_checkpoint, reconstruct,
                    sampler, sampling_options, save_image, to_float, to_pil, write_checkpoint)
from spherify import autocast, logit_normal_sigmas, official_sigmas, uniform_sigmas

CLASS_DROPOUT = 0.1                 # probability of the null class, for each pass of each image. SE Sec. 2.4
HARD_PROB = 0.1                     # share of hard cases. SE App. C.2
BETAS = (0.9, 0.95)                 # of AdamW, as in the official code
CLIP = 1.0                          # largest norm of the gradient, likewise
LOG_EVERY = 10                      # iterations
SAVE_EVERY = 1000                   # iterations at most to a checkpoint and pictures; ten times a run or more
IN_MEMORY = 2**30                   # bytes of images of a folder that are kept instead of read in every epoch
SPLITS = ("train", "val", "valid", "validation", "eval", "dev", "test")     # names of folders, not of classes

# ---- Presets -----------------------------------------------------------------------------------------------


def option(default, help, **rule):
    """A field of Preset with its help on the command line, and what it may be there; see add_option."""
    return field(default=default, metadata={"help": help, **rule})


@dataclass(frozen=True)
class Preset:
    """Everything that a result depends on but the seed; every field is a command-line option.
    Batch, optimizer, rates, EMA and the use of plain weights are the official code's (the paper's Table 16 is
    not in our text); what a preset below does not set is ours."""

    dataset: str = option("folder", "digits, fashion-mnist, emoji, cifar10, flowers102, animal-faces, "
                          "imagenet or folder; see DATA_SETS")
    data: str = option("data", "folder with the data set's files; digits needs none")
    image_size: int = option(64, "pixels, height and width")
    flip: bool = option(True, "mirror images at random")
    conditional: bool = option(True, "condition encoder and decoder, or the denoiser, on the class")

    patch_size: int = option(4, "P, pixels")
    latent_dim: int = option(32, "d, channels of a latent token; L = N d")
    encoder_size: str | tuple = option("small", "small .. giant, or width,depth,heads")
    decoder_size: str | tuple = option("small", "likewise for the decoder")
    mixer_depth: whole_number = option(4, "blocks of each MLP-Mixer")
    pixel_head: str = option("linear", "linear or conv", choices=("linear", "conv"))
    encoder_classes: bool = option(True, "condition the encoder too, not the decoder alone")
    batch_norm: bool = option(False, "normalise the encoder's output before f, SE App. C.3")

    tokenizer: str = option("", "of a denoiser: rae, or a Sphere Encoder's preset or checkpoint")
    denoiser_size: str | tuple = option("B", "S, B, L, XL, or width,depth,heads")
    distance: str = option("l2", "between latents: l1, smooth-l1 or l2", choices=DISTANCES)
    noise: tuple = option((0.0, 1.0), "mean and deviation of the logit-normal noise; --noise=-1,1.5")

    mapping: str = option("sigma", "what r is linear in: sigma or, SE C.2, angle; or official noise",
                          choices=("sigma", "angle", "official"))
    alpha_max: float = option(80.0, "degrees, largest angle of the usual noise")
    alpha_hard: float = option(85.0, "degrees, largest angle of the hard cases; 0 = none")
    weights: tuple = option((1.0, 1.0, 0.5, 0.5, 0.1),
                            "losses: WEIGHT_NAMES or LATENT_WEIGHT_NAMES of losses.py")
    swd_weight: float = option(0.0, "of the sliced Wasserstein loss, SE App. C.3")
    perceptual: str = option("lpips", "lpips or, the official code's, lpips+convnext",
                             choices=("lpips", "lpips+convnext"))

    init: str = option("", "checkpoint whose weights to start from, where they fit")
    batch_size: int = option(256, "images per iteration, over all processes and micro-batches")
    epochs: float = option(0.0, "length of the training")
    iterations: int = option(0, "the same, in place of epochs")
    lr: float = option(1e-4, "peak learning rate of the decoder; scale it with the batch")
    min_lr: float = option(1e-6, "at the end of the cosine; at most lr")
    warmup: float = option(0.01, "share of the training with linear warm-up")
    encoder_lr_scale: float = option(0.1, "learning rate of the encoder, as a factor")
    weight_decay: float = option(0.0, "on matrices only")
    ema: float = option(0.9997, "largest decay of the averaged weights, which begins lower")
    use_ema: bool = option(False, "sample with the averaged weights")
    precision: str = option("auto", "bf16 (autocast of the networks), float32, or auto: bf16 on a GPU",
                            choices=("auto", "bf16", "float32"))
    sampling: dict = field(default_factory=dict, metadata={
        "help": "arguments of generate or generate_latent, NAME=VALUE ..."})

    def __post_init__(self):
        """Turns NumPy's numbers, paths and lists into the plain values that a checkpoint can hold."""
        plain = json.dumps(vars(self), default=lambda x: x.tolist() if hasattr(x, "tolist") else str(x))
        for name, value in json.loads(plain).items():
            if isinstance(value, list):
                value = tuple(value)
            object.__setattr__(self, name, value)           # the usual way into a frozen dataclass


# "paper": arXiv 2602.15030. "script": what the official code's scripts and defaults set.
# The defaults are CIFAR-10's: angles of 80 and 85 degrees (paper C.2), weights (script).
CIFAR10 = Preset(
    dataset="cifar10", image_size=32, patch_size=2, latent_dim=8,           # paper Sec. 3.1: L = 16 x 16 x 8
    encoder_size="large", decoder_size="large",                             # paper Sec. 3.1
    mixer_depth=2, pixel_head="conv",                                       # script; paper: 4 layers, no head
    epochs=5000, warmup=0.002)                              # paper Sec. 3.1; script: 10 of 5,000 epochs
ANIMAL_FACES = Preset(
    dataset="animal-faces", data="data/afhq", conditional=False,            # paper Sec. 3.2
    image_size=256, patch_size=8, latent_dim=128,                           # paper Sec. 3.2: L = 32^2 x 128
    encoder_size="large", decoder_size="large", mixer_depth=4,              # paper Sec. 3.2, 2.4
    alpha_max=85.0, alpha_hard=89.0,                                        # paper Sec. 6, C.2
    weights=(25.0, 1.0, 1.0, 1.0, 0.1), epochs=1000)        # script; paper Sec. 3.2; warm-up as in the script
FLOWERS102 = replace(ANIMAL_FACES, dataset="flowers102", data="data", conditional=True)
# Of the ablations, Sec. 6, with L = 16 x 16 x 256: --preset imagenet-l --patch-size 16 --latent-dim 256
# --encoder-size base --decoder-size base --epochs 200 (assumed to share all else).
IMAGENET = replace(
    ANIMAL_FACES, dataset="imagenet", data="data/imagenet", conditional=True,
    latent_dim=64, weights=(50.0, 1.0, 25.0, 1.0, 0.1),                     # paper: L = 32^2 x 64; script
    epochs=800, warmup=0.00625)                             # paper Sec. 3.2; script: 5 of 800 epochs
# On the RAE's latents. Sizes and averaged weights: model card; flips: our text of the paper. Else assumed:
# rates, EMA and batch of the RAE authors' diffusion models, the Sphere Encoder's epochs.
RAE_LATENTS = Preset(
    tokenizer="rae", image_size=256, denoiser_size="B", alpha_max=85.0, weights=(1.0, 1.0, 1.0, 1.0, 0.0),
    batch_size=1024, lr=2e-4, min_lr=2e-5, ema=0.9995, use_ema=True, epochs=1000)
BASE = {"encoder_size": "base", "decoder_size": "base"}
# Real 8x8 digits at 16x16; ours, for a minute on a laptop: with four tokens and a small encoder it sees more.
DIGITS = Preset(
    dataset="digits", image_size=16, flip=False, patch_size=8, latent_dim=72, encoder_size=(64, 1, 4),
    decoder_size=(96, 2, 4), mixer_depth=1, weights=(1.0, 0.0, 1.0, 0.0, 0.02), batch_size=64,
    iterations=1200, lr=5e-3, min_lr=1e-5, warmup=0.042, encoder_lr_scale=1.0, ema=0.99, use_ema=True)
# A Sphere Encoder that serves as tokenizer: no classes; of the losses Eq. 7 alone, whose noise ends at 26.6
# degrees, half of tan 45.
DIGITS_TOKENIZER = replace(
    DIGITS, conditional=False, alpha_max=45.0, alpha_hard=0.0, weights=(1.0, 0.0, 0.0, 0.0, 0.0),
    latent_dim=32, iterations=1050, warmup=0.048)
DIGITS_LATENT = replace(
    DIGITS, tokenizer="digits-tokenizer", denoiser_size=(96, 4, 4), distance="l1", alpha_max=82.5,
    noise=(-1.0, 1.5), weights=(1.0, 1.0, 1.0, 1.0, 0.0), iterations=950, lr=4.5e-3, warmup=0.053,
    weight_decay=0.1)
# 28x28 clothes in a frame of 32x32, not mirrored since all shoes point left; ours.
FASHION = {"dataset": "fashion-mnist", "image_size": 32, "decoder_size": (128, 2, 4), "ema": 0.999}
# Emoji of three artists at 32x32, in colour and with LPIPS; ours. Not mirrored, since flags would be others.
EMOJI = {"dataset": "emoji", "data": "data/emoji", "image_size": 32, "patch_size": 4, "batch_size": 16,
         "encoder_size": (96, 2, 4), "decoder_size": (128, 4, 4), "lr": 3e-3, "warmup": 0.02, "ema": 0.999}

PRESETS = {
    "digits": DIGITS, "digits-tokenizer": DIGITS_TOKENIZER, "digits-latent": DIGITS_LATENT,
    "fashion-mnist": replace(DIGITS, **FASHION, latent_dim=48, iterations=8500,
                             lr=4e-3, warmup=0.0235),
    "fashion-mnist-tokenizer": replace(DIGITS_TOKENIZER, **FASHION, iterations=4000,
                                       lr=3e-3, warmup=0.025),
    "fashion-mnist-latent": replace(DIGITS_LATENT, **FASHION, tokenizer="fashion-mnist-tokenizer",
                                    denoiser_size=(128, 4, 4), alpha_max=82.0, iterations=7500, lr=3e-3,
                                    warmup=0.0267, weight_decay=0.0),
    "emoji": replace(DIGITS, **EMOJI, latent_dim=16, weights=(50.0, 1.0, 25.0, 1.0, 0.1), iterations=2000),
    "emoji-tokenizer": replace(DIGITS_TOKENIZER, **EMOJI, latent_dim=8, weights=(50.0, 1.0, 0.0, 0.0, 0.0),
                               iterations=1500),
    "emoji-latent": replace(DIGITS_LATENT, **EMOJI | {"batch_size": 32}, tokenizer="emoji-tokenizer",
                            denoiser_size=(128, 4, 4), iterations=3000),
    "cifar10": CIFAR10,
    "cifar10-uncond": replace(CIFAR10, conditional=False, epochs=10_000, warmup=0.001),  # paper App. D
    "animal-faces": ANIMAL_FACES, "flowers102": FLOWERS102, "imagenet-l": IMAGENET,
    "imagenet-xl": replace(IMAGENET, encoder_size="xlarge", decoder_size="xlarge"),          # paper Sec. 3.2
    "animal-faces-latent": replace(RAE_LATENTS, dataset="animal-faces", data="data/afhq"),
    "flowers102-latent": replace(RAE_LATENTS, dataset="flowers102"),
    "imagenet-latent": replace(RAE_LATENTS, dataset="imagenet", data="data/imagenet", denoiser_size="XL",
                               epochs=800, warmup=0.00625),
    # Any folder of images, on a GPU of 24 GB or on a CPU; ours, tried on 720 photos of six classes.
    "folder": Preset(patch_size=8, latent_dim=64, batch_size=128, epochs=1000, lr=4e-4, warmup=0.02),
    "folder-small": replace(DIGITS, dataset="folder", image_size=32, flip=True, latent_dim=32, mixer_depth=2,
                            encoder_size=(96, 1, 4), decoder_size=(128, 4, 4), batch_size=32, iterations=0,
                            epochs=250, lr=3e-3, warmup=0.02, ema=0.999),
}
# What the official scripts train as they stand: base models, on their noise and perceptual distance.
PRESETS |= {f"{name}-base": replace(preset, **BASE, perceptual="lpips+convnext", mapping="official")
            for name, preset in (("cifar10", CIFAR10), ("animal-faces", ANIMAL_FACES),
                                 ("flowers102", FLOWERS102), ("imagenet", IMAGENET))}

# ---- Training ----------------------------------------------------------------------------------------------


def train(preset, out, seed=0, resume=False, device=None, workers=4, accumulate=1, compile=False,
          latents=None, evaluate_every=0.0, **evaluation):
    """Train a preset into a folder; under torchrun, as one of its processes. Returns the checkpoint's path.

    preset      Preset, see PRESETS; if its tokenizer is a preset too, that is trained first, in out/tokenizer
    out         folder of last.pt to resume from, model.pt to sample from, log.jsonl and pictures
    seed        with the preset decides every number of the run, but for rounding on a GPU or by processes
    resume      continue from out/last.pt exactly where it was written; with a new length, on its schedule.
                The arguments below are not in it and have to be given again
    device      cuda if there is one, else cpu
    evaluate_every  epochs between evaluations, 0 = off; see keep_best. evaluation: arguments of quality

    These change memory and speed, and results only by rounding (but accumulate that of the swd_weight):
    workers     threads that read images ahead
    accumulate  micro-batches per iteration and process
    compile     torch.compile: minutes to start, then faster
    latents     npy file of cached_latents; out/latents.npy if the images are in memory, else none

    Raises ValueError or OSError for bad input, FloatingPointError for a loss or gradient that is not finite,
    KeyboardInterrupt, after saving, if Ctrl-C or SIGTERM came or the terminal closed."""
    out = Path(out)
    device = start_process(device)
    with contextlib.ExitStack() as entered:
        interrupted = entered.enter_context(interruptible())

        # What is trained, on what. What can fail does so before the run's folder is written to.
        stored = open_run(preset, out, seed, resume, accumulate)
        with first_process_first():
            data, held_out, class_names = load_data(preset)
            settings = {"seed": int(seed), "images": len(data),
                        "class_names": class_names * preset.conditional}    # none, if it is not
            if stored:
                must_equal(stored, {**asdict(preset), **settings}, out)
            else:
                check_files(data, held_out)
            tokenizer = open_tokenizer(preset, class_names, seed, device, stored)
            model, ema, optimizer = build(preset, class_names, tokenizer, seed, device, stored)
            objective = Objective(model.eval(), preset).to(device)
        objective = wrapped(objective, compile)
        start, total, intervals = plan(preset, len(data), stored, evaluate_every, evaluation)
        sampled = ema if preset.use_ema else model
        in_precision = autocast(device, preset.precision)
        judge = partial(quality, sampled, data, held_out, precision=preset.precision, **evaluation)
        say(f"{out}: {len(data):,} images of {model.num_classes} classes {model.class_names[:20]}, "
            f"{len(held_out or ())} held out; iterations {start} to {total}")
        in_precision(sampler(sampled))(sampled, [0], 2)
        if evaluate_every:
            rows = judge()

        # From here on the folder is a run to resume: of a new one, last.pt is the first file.
        entered.enter_context(only_writer(out, stored))
        # Iterations since the last line of the log.
        window = stored["window"] if stored else []

        def save(step):
            write_checkpoint(out / "last.pt", model, preset, ema=ema.state_dict(), window=window,
                             optimizer=optimizer.state_dict(), step=step, **settings)

        if not stored:
            save(0)
        if not start:
            if evaluate_every:
                keep_best(out, 0, sampled, preset, rows, evaluation)
            train_tokenizer(preset, out / "tokenizer", seed, device, tokenizer)
        source = training_data(data, tokenizer, preset.flip, device, latents, out / "latents.npy")
        rank, world = process_rank()
        mine = slice(rank, None, world)                     # of every global batch
        indices = batch_indices(len(data), preset.batch_size, seed, range(start, total), mine)
        since = time.time()
        for step, (images, labels) in enumerate(read_ahead(source, indices, workers), start):
            lr = learning_rate(preset, step, total)
            batch = inputs(preset, model, images, labels, seed, step, mine)
            model.train()
            window.append(train_step(objective, optimizer, lr, batch, accumulate))
            model.eval()
            update_ema(ema, model, preset.ema, step)

            done = step + 1
            logs, saves, judges = (done == total or done % every == 0 for every in (LOG_EVERY, *intervals))
            stops = over_processes(torch.tensor(float(len(interrupted)))) > 0
            if not (logs or stops):
                continue
            window = checked(window, done)
            if logs:
                rate = len(window) * preset.batch_size / (time.time() - since)
                row = {"step": done, "images/s": rate, **means(window), "lr": lr}
                window = []
                log(out, total, row | (held_out_loss(objective, preset, model, held_out) if saves else {}))
            if evaluate_every and judges:
                rows = judge()
                keep_best(out, done, sampled, preset, rows, evaluation)
            if saves:
                in_precision(draw)(out, done, sampled, held_out or data)
            if saves or stops:
                write_checkpoint(out / "model.pt", sampled, preset)
                save(done)                                  # last: --resume trusts that all else is written
            if stops:
                raise KeyboardInterrupt(f"interrupted after {done} iterations of {out}; all is saved, and "
                                        "the same command with --resume continues")
            since = time.time()
        wait_for_all()                                      # the others may read it when it is written
    return out / "last.pt"


def train_step(objective, optimizer, lr, batch, accumulate):
    """Gradients of this process's part of a batch, clipped, and a step of the optimizer.

    lr          learning rate; every group of parameters has a factor of its own
    batch       what `inputs` returns; it is cut into `accumulate` equal parts, whose mean is the loss
    returns     {part of the loss: mean}, "loss", and "grad_norm" before clipping; all on the device"""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.zero_grad()
    rows = []
    for micro_batch in zip(*(part.chunk(accumulate) for part in batch)):
        loss, parts = objective(*micro_batch)
        (loss / accumulate).backward()
        rows.append({**parts, "loss": loss.detach()})
    row = means(rows)
    row["grad_norm"] = nn.utils.clip_grad_norm_(objective.parameters(), CLIP)
    optimizer.step()
    return row


def plan(preset, images, stored, evaluate_every, evaluation):
    """Where a training starts and ends, and after how many iterations it saves and is evaluated: multiples of
    LOG_EVERY. Raises ValueError if it has ended already, or for an evaluation that is never made."""
    start = stored["step"] if stored else 0
    total = preset.iterations or math.ceil(preset.epochs * images / preset.batch_size)
    if start > total:
        raise ValueError(f"{start} iterations are done already, more than {total}")
    if evaluation and not evaluate_every:
        raise ValueError(f"--{min(evaluation)} belongs to --evaluate and --evaluate-every; the length of a "
                         f"training is --iterations or --epochs")
    saves = min(SAVE_EVERY, total // 10)
    judges = round(evaluate_every * images / preset.batch_size)
    return start, total, [max(1, every // LOG_EVERY) * LOG_EVERY for every in (saves, judges)]


def means(rows):
    """Means by name of rows {name: number}."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


# ---- Schedules and randomness: all that a number depends on ------------------------------------------------


def learning_rate(preset, step, total):
    """Linear warm-up, then a cosine to the minimum at the end (in the official code a warm-up earlier)."""
    warmup = round(preset.warmup * total)
    if step < warmup:
        return preset.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / (total - warmup)
    return preset.min_lr + (preset.lr - preset.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def seeded(seed, purpose, index=0, device="cpu"):
    """A generator for a seed, purpose and index, hashed into the 32 bits that torch uses of a CPU's seed."""
    # "directions" and "loader" keep the places of the others.
    purposes = ("order", "draws", "init", "directions", "choice", "loader", "noise")
    hashed = np.random.SeedSequence((seed, purposes.index(purpose), index)).generate_state(1)
    return torch.Generator(device).manual_seed(hashed.item())


@lru_cache(1)
def permutation(size, seed, epoch):
    """The order in which an epoch takes the images."""
    return torch.randperm(size, generator=seeded(seed, "order", epoch)).tolist()


def batch_indices(size, batch_size, seed, steps, mine=slice(None)):
    """Yield, for every step, the data-set indices of a part of the global batch.

    The data are one endless sequence of epochs, each a permutation drawn from (seed, epoch); the batch of
    step s begins at position s * batch_size. So a step's batch needs no history, and no image is dropped."""
    for step in steps:
        positions = range(step * batch_size, (step + 1) * batch_size)[mine]
        yield [permutation(size, seed, position // size)[position % size] for position in positions]


def read_ahead(source, indices, workers):
    """Yield the items of a data set at lists of places, in order. Threads read the next ones meanwhile, if
    they are not in memory: there threads would only take time from the training."""
    if isinstance(source, TensorDataset):
        yield from map(source.__getitem__, indices)
        return
    threads = ThreadPoolExecutor(workers + 1)
    ahead = deque()
    for places in indices:
        ahead.append(threads.submit(source.__getitem__, places))
        if len(ahead) > workers:
            yield ahead.popleft().result()
    for item in ahead:
        yield item.result()


def random_draws(preset, seed, step):
    """All random scalars of a training step, for the whole global batch: a function of seed, step and batch
    size.

    returns  flip [B], drop [4, B] (null class in E(x), D(v_NOISY), D(v_noisy), E(D(v_NOISY)); of a denoiser,
             in its two or three passes), sigma [B], sigma_sub [B]"""
    B = preset.batch_size
    generator = seeded(seed, "draws", step)
    hard = preset.alpha_hard or None
    if preset.tokenizer:
        sigma, sigma_sub = logit_normal_sigmas(B, preset.alpha_max, *preset.noise, preset.mapping, generator)
    elif preset.mapping == "official":
        sigma, sigma_sub = official_sigmas(B, preset.alpha_max, hard, HARD_PROB, generator)
        if not any(preset.weights[2:4]):                    # no pixel consistency: it decodes v_NOISY alone
            sigma_sub = sigma
    else:
        sigma, sigma_sub = uniform_sigmas(B, preset.alpha_max, hard, HARD_PROB, preset.mapping, generator)
    flip = torch.rand(B, generator=generator) < 0.5
    drop = torch.rand(4, B, generator=generator) < CLASS_DROPOUT
    return flip & preset.flip, drop | (not preset.conditional), sigma, sigma_sub


def inputs(preset, model, images, labels, seed, step, mine=slice(None)):
    """What the objective takes in a step, for this process's part of the global batch.

    images   uint8 [B, 3, H, W], or [B, 1 or 2, N, d] of cached_latents
    labels   [B]
    mine     of the global batch, the places of these images
    returns  x (images [B, 3, H, W], or cached latents [B, N, d]), y [B, 4], sigma [B], sigma_sub [B],
             e [B, N, d]"""
    device = next(model.parameters()).device
    draws = [draw[..., mine] for draw in random_draws(preset, seed, step)]
    # The CPU waits for none of these copies, which would each wait for all that the GPU has still to do.
    x, labels, flip, drop, sigma, sigma_sub = (
        part.to(device, non_blocking=True) for part in (torch.as_tensor(images), labels, *draws))
    e = torch.randn(preset.batch_size, *model.latent_shape, device=device,                   # [B, N, d]
                    generator=seeded(seed, "noise", step, device))[mine].clone()    # keeps no other part
    y = torch.where(drop, model.num_classes, labels).T                                       # [B, 4]
    if x.is_floating_point():                                       # [B, 1 or 2, N, d] -> [B, N, d]
        x = torch.where(flip[:, None, None], x[:, -1], x[:, 0])
    else:                                                                                    # [B, 3, H, W]
        x = to_float(torch.where(flip[:, None, None, None], x.flip(-1), x))
    return x, y, sigma, sigma_sub, e


# ---- The run's folder --------------------------------------------------------------------------------------
# last.pt is what a run has reached, and is written last. What is newer is cut or made again by --resume.


def open_run(preset, out, seed, resume, accumulate):
    """The checkpoint to resume from, or None for a new run. Raises ValueError for settings that do not fit
    each other or the run, a batch that cannot be cut into parts, and a new run in the folder of another."""
    parts = process_rank()[1] * accumulate
    if preset.batch_size % parts:
        raise ValueError(f"--batch-size must be a multiple of processes x accumulate, {parts}")
    if preset.batch_norm and parts > 1:
        raise ValueError("--batch-norm goes neither with --accumulate nor with several processes")
    if np.size(preset.weights) != 5 or not any(preset.weights) or np.size(preset.noise) != 2:
        raise ValueError("need five --weights, one of them above 0, and two numbers of --noise")
    if preset.min_lr > preset.lr or preset.warmup > 1 or not (preset.epochs or preset.iterations):
        raise ValueError("need --min-lr of at most --lr, --warmup of at most 1, and --epochs or --iterations")
    random_draws(preset, seed, 0)                           # raises for impossible angles or noise
    if not resume:
        must_be_free(out)
        return
    return read_checkpoint(out / "last.pt", "window")


def must_be_free(out):
    """Raises ValueError for a folder that holds a run."""
    if any(out.glob("*.pt")):
        raise ValueError(f"{out} already holds a run; --resume continues it, another --out keeps it")


def must_equal(stored, settings, out):
    """Raises ValueError if a run was trained with other settings or data, rather than mix two runs."""
    before = {**stored, **stored["preset"]}
    for name, value in settings.items():
        earlier = before.get(name)
        if value != earlier and name not in ("data", "epochs", "iterations"):                # moved, extended
            raise ValueError(f"{out} was trained with {name} {earlier!s:.300}, not {value!s:.300}; --resume "
                             f"has its settings and data: drop that option and --preset, or change --out")


@contextlib.contextmanager
def only_writer(out, stored):
    """Hold a run's folder for the first process, as the only one that writes to it, and remove what is newer
    than the checkpoint to resume from. The lock is the operating system's: it ends with its process.
    Raises OSError if another process holds the folder, ValueError for a new run if there is one in it."""
    if not is_first_process():
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / ".held-while-a-process-trains-here", timeout=10):
        if stored:
            cut_logs(out, stored["step"])
        else:
            must_be_free(out)
        for path in out.glob("*.????????-????-????-????-????????????.tmp"):     # of writers that were killed
            path.unlink()
        yield


def cut_logs(out, step):
    """Cut the logs of a run back to the step of its checkpoint; what belongs to step 0 is made again."""
    for path in [*out.glob("log.jsonl"), *out.glob("evaluations.jsonl")]:
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if step and line.endswith("\n") and json.loads(line)["step"] <= step]
        if not kept:
            path.unlink()
        elif kept != lines:
            with whole_file(path) as file:
                file.write("".join(kept).encode())


def open_tokenizer(preset, class_names, seed, device, stored):
    """The frozen autoencoder of a denoiser, None for a Sphere Encoder. One that is named by its preset is not
    trained yet; see train_tokenizer."""
    path = preset.tokenizer
    if not path:
        return
    if stored or path == "rae":
        return load_tokenizer(stored["tokenizer"] if stored else path).to(device)
    if path in PRESETS:
        model = build_model(PRESETS[path], class_names, (1, 1), seeded(seed, "init"))
        Objective(model, PRESETS[path])                     # are its perceptual network's weights there?
    else:
        model = load(path)
    if not isinstance(model, SphereEncoder) or model.image_size != (preset.image_size,) * 2:
        raise ValueError(f"--tokenizer {path} is no Sphere Encoder for --image-size {preset.image_size}")
    return SphereTokenizer(model).to(device)


def train_tokenizer(preset, folder, seed, device, tokenizer):
    """Train the preset that a denoiser's tokenizer is named by, or finish or just read it."""
    if preset.tokenizer not in PRESETS:
        return
    small = replace(PRESETS[preset.tokenizer], data=preset.data, precision=preset.precision)
    path = train(small, folder, seed, (folder / "last.pt").exists(), device)
    tokenizer.model.load_state_dict(load(path, device).state_dict())


def build(preset, class_names, tokenizer, seed, device, stored):
    """Model, averaged model and optimizer: fresh from the seed, begun from another checkpoint, or resumed."""
    model = build_model(preset, class_names, tokenizer and tokenizer.latent_shape, seeded(seed, "init"))
    if preset.init and not stored:
        say(take_weights(model, load(preset.init).state_dict()), "tensors taken from --init")
    model.to(device)
    groups = parameter_groups(model, preset.encoder_lr_scale, preset.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=True)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    for network in (model, ema):
        network.sampling = preset.sampling
        if tokenizer:
            network.attach(tokenizer)
    if stored:
        model.load_state_dict(stored.pop("model"))
        ema.load_state_dict(stored.pop("ema"))
        optimizer.load_state_dict(stored.pop("optimizer"))
    return model, ema, optimizer


def wrapped(objective, compile):
    """An Objective in the wrappers of several processes and of torch.compile."""
    if distributed.is_initialized():
        # broadcast_buffers=False, by its place since its name is to change; gradients are averaged.
        warnings.filterwarnings("ignore", ".*broadcast_buffers")
        objective = nn.parallel.DistributedDataParallel(objective, None, None, 0, False,
                                                        gradient_as_bucket_view=True)
    if compile:
        objective.compile(dynamic=False)                    # in place: parameters keep their names
    return objective


# ---- Log and pictures --------------------------------------------------------------------------------------


def checked(window, done):
    """The rows of the last iterations as numbers, means over the processes. Raises FloatingPointError, on all
    processes, if one is not finite."""
    values = torch.tensor([[*map(float, row.values())] for row in window], dtype=torch.float64)
    rows = [dict(zip(window[0], row)) for row in over_processes(values).tolist()]
    for iteration, row in enumerate(rows, done - len(rows) + 1):
        for name, value in row.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} became {value} in iteration {iteration}; the last "
                                         f"checkpoint is good, try a lower --lr")
    return rows


@torch.no_grad()
def held_out_loss(objective, preset, model, held_out):
    """Parts of the loss on 64 held-out images, as {name: value} for the log: not mirrored, with the
    same noise and class drops at every call; {} without such images."""
    if not held_out:
        return {}
    places = some(held_out, 64)
    x, *others = inputs(replace(preset, batch_size=64, flip=False), model, *held_out[places], 0, 0,
                        slice(len(places)))
    _, parts = getattr(objective, "module", objective).forward(x, *others)      # not compiled for this batch
    return {f"held_out_{name}": value.item() for name, value in parts.items()}


def say(*words):
    """Print, by the first process; a training outlives the terminal or the pipe that reads it."""
    with contextlib.suppress(OSError):
        if is_first_process():
            print(*words)


def log(out, total, row):
    """Append a line to log.jsonl, and show it."""
    if is_first_process():
        append(out / "log.jsonl", row)
    step, *shown = [f"{name} {value:.4g}" for name, value in row.items() if value]
    say(f"{row['step']}/{total}", *shown)


def logged(path):
    """The lines of a log."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def append(path, row):
    """Add a line to a log."""
    with open(path, "a") as file:
        file.write(json.dumps(row, default=str) + "\n")


def keep_best(out, step, model, preset, rows, settings):
    """Write an evaluation with its settings to evaluations.jsonl, and the model to best.pt if the first row,
    its Fréchet distance (or FID), is the lowest of these settings at the last number of steps."""
    if not is_first_process():
        return
    append(out / "evaluations.jsonl", {"step": step, "settings": settings, **rows})
    name, columns = next(iter(rows.items()))
    *_, T = [column for column in columns if column.startswith("T")]
    lines = logged(out / "evaluations.jsonl")
    scores = [line[name][T] for line in lines if line["settings"] == lines[-1]["settings"]]
    if scores[-1] == min(scores):
        write_checkpoint(out / "best.pt", model, preset)
    say(name, scores[-1], "of best.pt", min(scores))


def draw(out, step, model, data):
    """Write a picture by class, of samples at 1, 2 and 4 steps, reconstructions of real images and these
    images; and the plot of the losses."""
    if not is_first_process():
        return
    classes = data.targets.unique()[:10]
    columns = max(5, 20 // len(classes))
    places = [(data.targets == c).nonzero().flatten().repeat(columns)[:columns] for c in classes]
    images, y = data[torch.cat(places).tolist()]            # a small class repeats
    x = to_float(images)
    y = y.clamp(max=model.num_classes)                      # without classes the null class, 0
    panels = {f"T = {T}": sampler(model)(model, y, T) for T in (1, 2, 4)}
    panels |= {"reconstruction": reconstruct(model, x), "original": x}
    panels = {title: images.unflatten(0, (-1, columns)) for title, images in panels.items()}
    path = out / f"samples-{step:06d}.png"
    save_image(picture(panels, [model.class_names[c] for c in classes if model.num_classes]), path)
    plot_losses(out / "losses.png", logged(out / "log.jsonl"))
    say(path)


def plot_losses(path, lines):
    """Plot the loss and its unweighted parts over the iterations of a log."""
    from matplotlib.figure import Figure
    axes = Figure().subplots()
    for name, value in lines[-1].items():
        if value and re.match("loss|.*recon|con|lat|swd", name):
            points = [(line["step"], line[name]) for line in lines if name in line]
            axes.plot(*zip(*points), label=name)
    axes.set(yscale="log", ylim=1e-5, xlabel="iteration", ylabel="loss (parts unweighted)")
    axes.legend()
    axes.figure.savefig(path)


# ---- Data --------------------------------------------------------------------------------------------------
# A reader takes the folder of --data and returns one or two parts, to train on and held out, and class names.
# A part is (images, classes): images [n, H, W] or [n, H, W, 3] in [0, 1], or the paths of image files.


def digits(root):
    """1,797 real digits of 8x8 pixels, in scikit-learn, split at random: the last ones have other writers."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    data = load_digits()
    x = torch.from_numpy(data.images).float() / 16
    split = train_test_split(range(len(x)), test_size=297, stratify=data.target, random_state=0)
    return [(x[places], data.target[places]) for places in split], list("0123456789")


def torchvision_set(kind, root):
    """Training and test images of Fashion-MNIST or CIFAR-10."""
    sets = [kind(root, train, download=True) for train in (True, False)]
    parts = [(torch.as_tensor(data.data) / 255, torch.as_tensor(data.targets)) for data in sets]
    for images, classes in parts:
        if len(images) != len(classes) or classes.max() > 9:
            raise ValueError("images and labels do not fit")
    return parts, sets[0].classes


def flowers102(root):
    """All images of Flowers-102, as in the paper."""
    sets = [datasets.Flowers102(root, split, download=True) for split in ("train", "val", "test")]
    return [joined((data._image_files, data._labels) for data in sets)], [*map(str, range(1, 103))]


def joined(parts):
    """All (paths, classes) as one."""
    return [sum(lists, []) for lists in zip(*parts)]


def class_of_images(paths, folder):
    """{path: name of the outermost folder below a folder, or ""} of the paths in it."""
    return {path: "".join(path.relative_to(folder).parent.parts[:1]) for path in paths
            if path.is_relative_to(folder)}


def image_folder(root):
    """Images of a folder, and class names in text order.

    Images in train/ are trained on and those in val/, or else the next of SPLITS, held out. If the folder has
    no such two folders, all its images are trained on. The folders of training images are classes; if there
    are fewer than two, all images are of class 0. A folder around all images does not count.
    Raises ValueError for held-out images of other classes."""
    paths = find_images(root)
    top = Path(os.path.commonpath([path.parent for path in paths]))
    folders = {name.lower().removesuffix("ing"): name for name in class_of_images(paths, top).values()}
    roots = [top / folders[name] for name in SPLITS if name in folders][:2]
    if "train" not in folders or len(roots) < 2:
        roots = [top]
    groups = [class_of_images(paths, folder) for folder in roots]
    names = sorted({*groups[0].values()} - {""})
    index = {name: k for k, name in enumerate(names)}
    if len(names) < 2:
        names = []
        index[""] = 0
    parts = []
    for folder, group in zip(roots, groups):
        classes = {path: index[name] for path, name in group.items() if name in index}
        others = {*group.values()} - {*index, ""}
        if others or not classes:
            raise ValueError(f"{folder} has no images, or classes that are not trained on: {others!s:.300}")
        parts.append(([*classes], [*classes.values()]))
    return parts, names


def animal_faces(root):
    """All images of Animal-Faces, as in the paper."""
    parts, names = image_folder(root)
    return [joined(parts)], names


# A new data set is a reader (see the head of this section), a line here and its name in Preset; the numbers
# are for --list.
DATA_SETS = {
    "digits": (digits, 10),
    "fashion-mnist": (partial(torchvision_set, datasets.FashionMNIST), 10),
    "emoji": (image_folder, 4),
    "cifar10": (partial(torchvision_set, datasets.CIFAR10), 10),
    "flowers102": (flowers102, 102),
    "animal-faces": (animal_faces, 3),
    "imagenet": (image_folder, 1000),
    "folder": (image_folder, 10),
}
# Data sets that are neither downloaded nor the user's own.
MADE_BY = {"emoji": "two commands make it: `mkdir -p data && npm pack --pack-destination data "
                    "@lobehub/fluent-emoji-3d@1.1.0 emoji-datasource-google@16.0.0 "
                    "emoji-datasource-twitter@16.0.0` and `python notebooks/emoji.py`"}


def load_data(preset):
    """Training set, held-out set (None if the data set has none) and class names of a preset.

    data[list of n indices] is (uint8 [n, 3, S, S], classes [n]), grey repeated to 3 channels; all classes are
    in `.targets`. It is a TensorDataset, if the images are in memory.
    Raises OSError or ValueError that says what is wrong where."""
    try:
        read, _ = DATA_SETS[preset.dataset]
        parts, class_names = read(Path(preset.data))
    except Exception as error:                              # of a dozen kinds, in torchvision
        raise OSError(f"{preset.data}: --dataset {preset.dataset} can be neither read nor downloaded "
                      f"({error}); {MADE_BY.get(preset.dataset, 'the README says what --data must hold')}"
                      ) from None
    data, *others = [data_set(images, classes, preset.image_size) for images, classes in parts]
    return data, others[0] if others else None, class_names


def data_set(images, targets, size):
    """A data set of uint8 [3, size, size], of images or of files; many files are read lazily, few at once."""
    targets = torch.as_tensor(targets)
    if torch.is_tensor(images):
        data = TensorDataset(resized(images, size), targets)
    else:
        files = ImageSet(images, image_transform(size))
        data = StackDataset(files, targets)
        if 3 * size**2 * len(files) <= IN_MEMORY:
            data = TensorDataset(torch.cat([*files.batches()]), targets)
    data.targets = targets
    return data


def resized(images, size):
    """Images [n, H, W] or [n, H, W, 3] in [0, 1] -> uint8 [n, 3, size, size]; 28x28 in a frame of 32x32."""
    images = images.reshape(*images.shape[:3], -1).permute(0, 3, 1, 2)
    if images.shape[-1] == 28:
        images = F.pad(images, [2] * 4)
    images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=size < images.shape[-1])
    return to_uint8(images).expand(-1, 3, -1, -1)


def training_data(data, tokenizer, flip, device, latents, default):
    """Images; or cached latents of a denoiser's, if they are in memory or a file of latents is asked for."""
    if not tokenizer or not (latents or isinstance(data, TensorDataset)):
        return data
    cached = partial(cached_latents, latents or default, data, tokenizer, flip, device)
    with first_process_first():
        cached()
    return cached()                                         # opened when no machine writes it any more


def check_files(*data_sets):
    """Read every image file once, by one process of a machine: broken ones are named now, not in an hour."""
    for data in data_sets:
        if isinstance(data, StackDataset) and goes_first():
            for _ in data.datasets[0].batches():
                pass


def cached_latents(path, data, tokenizer, flip, device):
    """A data set of the latents of all images, and of their mirror images if they are mirrored, in an npy
    file; it is made if there is none.

    returns  (z [n, 1 or 2, N, d], classes [n]) of a list of places, read when they are asked for
    Raises ValueError naming the file, if its shape, or its first or last latents (within 0.02), are not those
    of tokenizer and images."""
    shape = (len(data), 1 + flip, *tokenizer.latent_shape)

    def encoded(images):
        x = to_float(images.to(device))
        views = (x, x.flip(-1))[:1 + flip]
        return torch.stack([tokenizer.encode(view) for view in views], dim=1).cpu().numpy()

    if not Path(path).exists():
        with whole_file(path) as file:
            # Written, not mapped: on a full disk a write is an error, a mapped page a crash.
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            batches = read_ahead(data, torch.arange(len(data)).split(64), 4)
            for images, _ in tqdm(batches, "latents", disable=None):
                file.write(encoded(images).tobytes())
    ends = [0, -1]
    expected = encoded(data[ends][0])
    with contextlib.suppress(Exception):                    # NumPy knows a dozen kinds
        latents = np.load(path, mmap_mode="r")
        alike = (latents.dtype, latents.shape) == ("<f4", shape)
        if alike and np.allclose(latents[ends], expected, atol=0.02):
            return StackDataset(latents, data.targets)
    raise ValueError(f"{path} is not of this tokenizer and these images, or damaged; delete it, or name "
                     f"another file: --latents")


def export(preset, export, count=None):
    """Write images, at most `count` of each part, as EXPORT/train/CLASS/PLACE.png and, held out,
    EXPORT/val/..., in a new folder."""
    train, held_out, class_names = load_data(preset)
    os.makedirs(export)                                     # raises for one that exists
    for part, data in (("train", train), ("val", held_out or ())):
        for place in some(data, count):
            [image], [label] = data[[place]]
            name = class_names[label].replace("/", "-") if class_names else ""      # "T-shirt/top"
            save_image(to_pil(to_float(image)), Path(export, part, name, f"{place:06d}.png"))


# ---- Processes ---------------------------------------------------------------------------------------------


def process_rank():
    """(rank, number of processes), as torchrun says; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def goes_first():
    """Whether this is the first process of its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def start_process(device):
    """Join the other processes of torchrun, if any and not yet done; returns this process's device."""
    if device in (None, "cuda") and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"         # one process per GPU
    device = pick_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if process_rank()[1] > 1 and not distributed.is_initialized():
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        distributed.init_process_group(backend, timeout=timedelta(hours=2))     # NCCL's 10 minutes can be few
        atexit.register(distributed.destroy_process_group)
    return device


def wait_for_all():
    """A barrier of all processes, if there are several."""
    if distributed.is_initialized():
        distributed.barrier()


@contextlib.contextmanager
def first_process_first():
    """One process of each machine goes ahead and writes what the others then find."""
    if not goes_first():
        wait_for_all()
    yield
    if goes_first():
        wait_for_all()


@contextlib.contextmanager
def interruptible():
    """Turn Ctrl-C, SIGTERM and a closed terminal into entries of a list that the loop looks at. A second one
    interrupts at once, but not under torchrun, which passes on the Ctrl-C that its processes already had.
    What the loop did not see goes to whom it would have gone without this."""
    came = []

    def on_signal(kind, frame):
        came.append(kind)
        if len(came) > 1 and "RANK" not in os.environ:
            raise KeyboardInterrupt

    with contextlib.ExitStack() as restored:
        for kind in {1, 2, 15} & signal.valid_signals():                    # SIGHUP, SIGINT, SIGTERM
            if signal.getsignal(kind) != signal.SIG_IGN:                    # as nohup makes SIGHUP
                with contextlib.suppress(ValueError):                       # outside the main thread
                    restored.callback(signal.signal, kind, signal.signal(kind, on_signal))
        yield came
    for kind in came:
        signal.raise_signal(kind)


def over_processes(values):
    """Means of a tensor over the processes, on all of them."""
    if distributed.is_initialized():
        distributed.all_reduce(values)
        values /= distributed.get_world_size()
    return values


# ---- Evaluation --------------------------------------------------------------------------------------------


def evaluate(path, data=None, device=None, use_ema=None, **options):
    """quality() of a checkpoint, in the precision of its training if no other is given; data is the data
    set's folder, if it has moved, use_ema that of load."""
    device = start_process(device)
    with first_process_first():
        model = load(path, device, use_ema)
        preset = replace(Preset(**model.preset), data=data or model.preset["data"])
        train_set, held_out, names = load_data(preset)
    if preset.conditional and names != model.class_names:
        raise ValueError(f"{path} was trained on other classes, {model.class_names!s:.300}")
    return quality(model, train_set, held_out, **{"precision": preset.precision, **options})


def quality(model, train_set, held_out, count=1000, steps=(1, 2, 4), cfg=1.0, seed=0, features="pixels",
            reference=None, precision="float32", **sampling):
    """Measures of class-balanced samples, beside the same numbers for real held-out images.

    count      number of samples; sample i has class i mod K, and 8 bits as in an image file
    steps      T, one or several
    cfg        guidance scale, 1 = off
    features   torch-fidelity, pytorch-fid (real: at most 50,000 training images) or pixels (10,000)
    reference  npz of statistics or of images to compare with instead; judged right and nearest are left out
    precision  of the model: float32, bf16 or, bf16 on a GPU, auto; features are always float32
    sampling   other arguments of generate or generate_latent, in place of the preset's
    returns    {row: {column: number}}, on all processes: the rows of fid.compare; FID of as many
               reconstructed training images (rFID); of pixels, judged right, the share of images whose class
               an SVC trained on the real ones reads, and nearest, the median distance to the nearest real
               image over that of the held-out ones, well below 1 if images were memorised"""
    pixels = features == "pixels"
    places = some(train_set, 10_000 if pixels else 50_000)
    device = next(model.parameters()).device
    network = feature_network(features, device, not reference and is_grey(train_set[places[:100]][0]))

    def measured(places, images_at):
        """fid.Extracted of the images at some places, of which every batch is one process's."""
        return extracted(gathered(
            places, lambda part: [x.cpu() for x in network(images_at(part).to(device))]))

    in_precision = autocast(device, precision)
    draw = sampler(model, cfg=cfg, seed=seed, **sampling)
    again = in_precision(partial(reconstruct, model))

    def drawn(T, part):
        """Samples at some places, in T steps, uint8."""
        x = in_precision(draw)(model, y[part], T, first=part[0])
        return to_uint8((x + 1) / 2, draw.keywords.get("official"))

    if reference:
        real = extract_or_keep(images_or_statistics(reference, features), lambda: network, device)
    else:
        real = measured(places, lambda part: train_set[part][0])
    y = torch.arange(count) % max(model.num_classes, 1)
    columns = {f"T = {T}": measured(range(count), partial(drawn, T)) for T in np.ravel(steps).tolist()}
    classes = dict.fromkeys(columns, y)
    if held_out:
        columns["real held-out"] = measured(range(len(held_out)), lambda part: held_out[part][0])
        classes["real held-out"] = held_out.targets
    rows = {}
    for title, images in columns.items():
        for row, value in compare(images, real, features).items():
            rows.setdefault(row, {})[title] = value
    if not pixels:
        images = measured(some(train_set, count), lambda part: to_uint8(
            (again(to_float(train_set[part][0])) + 1) / 2))
        rows["rFID"] = {"training set": compare(images, real, features)["FID"]}
    if pixels and not reference:
        if model.num_classes:
            rows["judged right"] = judged_right(columns, classes, real, train_set.targets[places])
        if held_out:
            rows["nearest"] = nearest(columns, real)
    if held_out:
        rows["reconstruction MSE"] = {"real held-out": reconstruction_error(again, held_out)}
    return rows


def judged_right(columns, classes, real, real_classes):
    """Share of images that a support vector classifier, trained on the real ones, puts into their class."""
    from sklearn.svm import SVC
    judge = SVC(C=10).fit(real.features, real_classes)
    return {title: judge.score(images.features, classes[title]) for title, images in columns.items()}


def nearest(columns, real):
    """Median distance to the nearest real image, over that of the held-out ones."""
    median = {column: nearest_neighbours(images.features, real.features)[0].quantile(0.5).item()
              for column, images in columns.items()}
    return {column: distance / median["real held-out"] for column, distance in median.items()}


def reconstruction_error(again, data):
    """Mean squared error of what a function makes of images, all in [-1, 1]."""
    def error(part):
        x = to_float(data[part][0])
        return (again(x).cpu() - x).square().mean((1, 2, 3))

    return torch.cat(gathered(range(len(data)), error)).mean().item()


def gathered(places, result_of, batch=100):
    """Results for batches of places, a list in their order, on all processes. Every batch is computed whole,
    by one process, so that rounding does not depend on their number."""
    rank, world = process_rank()
    batches = torch.as_tensor(places).split(batch)
    mine = [result_of(part) for part in tqdm(batches[rank::world], "evaluation", disable=rank or None)]
    of_all = [mine] * world
    if world > 1:
        distributed.all_gather_object(of_all, mine)
    return [of_all[k % world][k // world] for k in range(len(batches))]


def some(data, limit):
    """Places in a data set; beyond `limit`, a fixed random choice."""
    return torch.randperm(len(data), generator=seeded(0, "choice"))[:limit].sort().values.tolist()


# ---- Command line ------------------------------------------------------------------------------------------

OPTIONS = {
    "preset": (str, "settings to start from (digits)"),
    "out": (str, "folder of the run (out/PRESET)"),
    "evaluate": (str, "checkpoint of whose samples to print the quality; trains nothing"),
    "list": (bool, "print all presets with sizes and cost; trains nothing"),
    "export": (str, "new folder to write --count images of the data set to; trains nothing"),
    "seed": (whole_number, "with the settings decides every number of the run (0)"),
    "resume": (bool, "continue from OUT/last.pt exactly where it was written"),
    "device": (str, "cuda, cuda:1, cpu, ... (cuda if there is one)"),
    "workers": (whole_number, "threads that read images ahead (4)"),
    "accumulate": (int, "micro-batches per iteration and process (1)"),
    "compile": (bool, "torch.compile: minutes to start, then faster"),
    "latents": (str, "npy file of a denoiser's latents, for all runs with its tokenizer (OUT/latents.npy if "
                     "the images are in memory, else none)"),
    "evaluate_every": (float, "epochs between evaluations, of which best.pt is kept; 0 = off (0)"),
    "count": (int, "evaluation: number of samples (1000)"),
    "steps": (tuple, "evaluation: T of Algorithm 1, one or several (1,2,4)"),
    "cfg": (float, "evaluation: guidance scale, 1 = off (1)"),
    "features": (str, "evaluation: torch-fidelity, pytorch-fid or pixels (pixels)"),
    "reference": (str, "evaluation: npz file to compare with (the training images)"),
}
NOT_OF_A_DENOISER = ("patch_size latent_dim encoder_size decoder_size mixer_depth pixel_head encoder_classes "
                     "batch_norm alpha_hard swd_weight perceptual encoder_lr_scale")
NOT_OF_A_SPHERE_ENCODER = "denoiser_size distance noise latents"


def command_line(argv):
    """What was given, {name: value}."""
    first = Parser("train.py", add_help=False)
    first.add_argument("--preset", choices=PRESETS, default="digits")
    name = first.parse_known_args(argv)[0].preset
    parser = Parser("train.py", __doc__, argument_default=argparse.SUPPRESS)
    for option_name, (kind, help) in OPTIONS.items():
        add_option(parser, option_name, kind, help)
    settings = parser.add_argument_group(f"settings; in brackets those of {name}")
    for f in fields(Preset):
        add_option(settings, f.name, f.type, f"{f.metadata['help']} ({getattr(PRESETS[name], f.name)})",
                   f.metadata.get("choices"))
    return vars(parser.parse_args(argv))


def add_option(group, name, kind, help, choices=None):
    """An option of a kind, perhaps with choices."""
    types = {int: positive, whole_number: whole_number, float: number, str: os.path.expanduser}
    how = {"type": types.get(kind, literal), "choices": choices}
    if kind is bool:
        how = {"action": argparse.BooleanOptionalAction}
    elif kind is dict:
        how = {"nargs": "+", "metavar": "NAME=VALUE"}
    group.add_argument("--" + name.replace("_", "-"), help=help, **how)


def literal(text):
    """A Python literal such as 4 or 64,1,4; anything else is a word."""
    try:
        return ast.literal_eval(text)
    except Exception:
        return text


def refuse_unused(given, preset):
    """Raises ValueError for an option that a training of this preset, or an export, would not look at."""
    unused = (NOT_OF_A_DENOISER if preset.tokenizer else NOT_OF_A_SPHERE_ENCODER).split()
    if preset.dataset == "digits":
        unused.append("data")
    if "iterations" in given:
        unused.append("epochs")
    if "export" in given:
        unused = given.keys() - {"export", "count", "dataset", "data", "image_size"}
    for name in given.keys() & unused:
        raise ValueError(f"--{name.replace('_', '-')} means nothing here; drop it")


@errors_in_one_line("train.py")
def main(argv=None):
    given = command_line(argv)                              # only what was given
    if "sampling" in given:
        given["sampling"] = sampling_options(given["sampling"])
    if given.pop("list", False):
        return list_presets(**known(given, list_presets))
    if "evaluate" in given:
        return print_quality(given.pop("evaluate"), **given.pop("sampling", {}), **given)
    name = given.pop("preset", None)
    preset = PRESETS[name or "digits"]
    out = Path(given.get("out", f"out/{name or 'digits'}"))
    if given.get("resume"):
        stored = read_checkpoint(out / "last.pt", "window")
        given.setdefault("seed", stored["seed"])
        if not name:
            preset = Preset(**stored["preset"])
        del stored                                          # gigabytes
    changes = {name: given.pop(name) for name in [*given] if hasattr(preset, name)}
    preset = replace(preset, **changes)
    refuse_unused({**given, **changes}, preset)
    if "epochs" in changes:
        preset = replace(preset, iterations=0)              # the length given replaces the preset's
    if "export" in given:
        return export(preset, **given)
    return train(preset, **{**given, "out": out})


def print_quality(path, **options):
    """The table of --evaluate."""
    rows = evaluate(path, **options)
    columns = dict.fromkeys(column for cells in rows.values() for column in cells)
    print_row("", columns)
    for row, cells in rows.items():
        print_row(row, [cells.get(column, "") for column in columns])


def list_presets():
    """A line per preset: sizes, parameters, GFLOPs of one image."""
    costs = {}
    print_row("preset", "pixels,tokens,L,parameters,encode,denoise,decode,T = 1,T = 2,T = 4,T = 6".split(","))
    for name, preset in PRESETS.items():
        _, classes = DATA_SETS[preset.dataset]
        model, costs[name] = cost(preset, classes, PRESETS.get(preset.tokenizer))
        N, d = model.latent_shape
        parameters = sum(p.numel() for p in model.parameters())
        print_row(name, [preset.image_size, N, N * d, f"{parameters:,}", *costs[name].values()])
    print_row("imagenet-xl / -latent", [f"{costs['imagenet-xl'][T] / costs['imagenet-latent'][T]:.2f}"
                                        for T in ("T = 1", "T = 2", "T = 4", "T = 6")])
    say("GFLOPs: 2 for every multiply-add; guidance doubles all but a Sphere Latent Encoder's one decode.\n"
        "The quotients are of T = 1, 2, 4 and 6. Folders are listed as if they had 10 classes.")


def print_row(name, cells):
    say(f"{name:24}", *(f"{cell:>13.5g}" if isinstance(cell, float) else f"{cell:>13}" for cell in cells))


if __name__ == "__main__":
    main()
