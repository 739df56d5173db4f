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
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, StackDataset, TensorDataset
from torchvision import datasets
from tqdm import tqdm

from fid import (HIDDEN, ImageSet, compare, errors_in_one_line, extract_or_keep, extracted, feature_network,
                 find_images, images_or_statistics, is_first_process, is_grey, nearest_neighbours,
                 pick_device, to_uint8, whole_file)
from losses import DISTANCES, Objective
from models import (SphereEncoder, SphereTokenizer, SiT, build_model, compute_again, cost, parameter_groups,
                    take_weights)
from sample import (image_transform, load, load_tokenizer, picture, read_checkpoint, reconstruct,
                    sampler, sampling_options, save_image, to_float, to_pil, write_checkpoint)
from spherify import logit_normal_sigmas, official_sigmas, uniform_sigmas

CLASS_DROPOUT = 0.1                 # probability of the null class, for each pass of each image. SE Sec. 2.4
HARD_PROB = 0.1                     # share of hard cases. SE App. C.2
BETAS = (0.9, 0.95)                 # of AdamW, as in the official code
CLIP = 1.0                          # largest norm of the gradient, likewise
LOG_EVERY = 10                      # iterations
SAVE_EVERY = 1000                   # iterations at most to a checkpoint and pictures; ten times a run or more
IN_MEMORY = 2**30                   # bytes of images of a folder that are kept instead of read in every epoch
SPLITS = ("train", "val", "valid", "validation", "test")        # names of folders that are not classes

# ---- Presets -----------------------------------------------------------------------------------------------


def option(default, help):
    """A field of Preset with its help on the command line."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Preset:
    """Everything that a result depends on but the seed; every field is a command-line option.
    Batch, optimizer, rates, EMA and the use of plain weights are the official code's (the paper's Table 16 is
    not in our text); what a preset below does not set is ours."""

    dataset: str = option("folder", "one of DATA_SETS")
    data: str = option("data", "folder with the data set's files; digits needs none")
    image_size: int = option(64, "pixels, height and width")
    flip: bool = option(True, "mirror images at random")
    conditional: bool = option(True, "condition encoder and decoder, or the denoiser, on the class")

    patch_size: int = option(4, "P, pixels")
    latent_dim: int = option(32, "d, channels of a latent token; L = N d")
    encoder_size: str | tuple = option("small", "small .. giant, or width,depth,heads")
    decoder_size: str | tuple = option("small", "likewise for the decoder")
    mixer_depth: int = option(4, "blocks of each MLP-Mixer")
    pixel_head: str = option("linear", "linear or conv")
    encoder_classes: bool = option(True, "condition the encoder too, not the decoder alone")
    batch_norm: bool = option(False, "normalise the encoder's output before f, SE App. C.3")

    tokenizer: str = option("", "of a denoiser: rae, or a Sphere Encoder's preset or checkpoint")
    denoiser_size: str | tuple = option("B", "S, B, L, XL, or width,depth,heads")
    distance: str = option("l2", "between latents: l1, smooth-l1 or l2")
    noise: tuple = option((0.0, 1.0), "mean and deviation of the logit-normal noise")

    mapping: str = option("sigma", "what r is linear in: sigma or, SE C.2, angle; or official noise")
    alpha_max: float = option(80.0, "degrees, largest angle of the usual noise")
    alpha_hard: float = option(85.0, "degrees, largest angle of the hard cases; 0 = none")
    weights: tuple = option((1.0, 1.0, 0.5, 0.5, 0.1),
                            "losses: WEIGHT_NAMES or LATENT_WEIGHT_NAMES of losses.py")
    swd_weight: float = option(0.0, "of the sliced Wasserstein loss, SE App. C.3")
    perceptual: str = option("lpips", "lpips or, the official code's, lpips+convnext")

    init: str = option("", "checkpoint whose weights to start from, where they fit")
    batch_size: int = option(256, "images per iteration, over all processes and micro-batches")
    epochs: float = option(0.0, "length of the training")
    iterations: int = option(0, "the same, in place of epochs")
    lr: float = option(1e-4, "peak learning rate of the decoder; scale it with the batch")
    min_lr: float = option(1e-6, "at the end of the cosine")
    warmup: float = option(0.01, "share of the training with linear warm-up")
    encoder_lr_scale: float = option(0.1, "learning rate of the encoder, as a factor")
    weight_decay: float = option(0.0, "on matrices only")
    ema: float = option(0.9997, "largest decay of the averaged weights, which begins lower")
    use_ema: bool = option(False, "sample with the averaged weights")
    precision: str = option("auto", "bf16 (autocast of the networks), float32, or auto: bf16 on a GPU")
    sampling: dict = field(default_factory=dict, metadata={
        "help": "arguments of generate or generate_latent, NAME=VALUE ..."})


# "paper": arXiv 2602.15030. "script": what the official code's scripts and defaults set.
# The defaults are CIFAR-10's: angles of 80 and 85 degrees (paper C.2), weights (script).
CIFAR10 = Preset(
    dataset="cifar10", image_size=32, patch_size=2, latent_dim=8,           # paper Sec. 3.1: L = 16 x 16 x 8
    encoder_size="large", decoder_size="large",                             # paper Sec. 3.1
    mixer_depth=2, pixel_head="conv",                                       # script; paper: 4 layers, no head
    epochs=5000, warmup=10 / 5000)                                          # paper Sec. 3.1; script
ANIMAL_FACES = Preset(
    dataset="animal-faces", data="data/afhq", conditional=False,            # paper Sec. 3.2
    image_size=256, patch_size=8, latent_dim=128,                           # paper Sec. 3.2: L = 32^2 x 128
    encoder_size="large", decoder_size="large", mixer_depth=4,              # paper Sec. 3.2, 2.4
    alpha_max=85.0, alpha_hard=89.0,                                        # paper Sec. 6, C.2
    weights=(25.0, 1.0, 1.0, 1.0, 0.1), epochs=1000, warmup=10 / 1000)      # script; paper Sec. 3.2; script
FLOWERS102 = replace(ANIMAL_FACES, dataset="flowers102", data="data", conditional=True)
IMAGENET = replace(
    ANIMAL_FACES, dataset="imagenet", data="data/imagenet", conditional=True,
    latent_dim=64, weights=(50.0, 1.0, 25.0, 1.0, 0.1),                     # paper: L = 32^2 x 64; script
    epochs=800, warmup=5 / 800)                                             # paper Sec. 3.2; script
# On the RAE's latents. Sizes and averaged weights: model card; flips: our text of the paper. Else assumed:
# rates, EMA and batch of the RAE authors' diffusion models, the Sphere Encoder's epochs.
RAE_LATENTS = Preset(
    tokenizer="rae", image_size=256, denoiser_size="B", alpha_max=85.0, weights=(1.0, 1.0, 1.0, 1.0, 0.0),
    batch_size=1024, lr=2e-4, min_lr=2e-5, ema=0.9995, use_ema=True, epochs=1000, warmup=10 / 1000)
BASE = {"encoder_size": "base", "decoder_size": "base"}
# Real 8x8 digits at 16x16; ours, for a minute on a laptop: with four tokens and a small encoder it sees more.
DIGITS = Preset(
    dataset="digits", image_size=16, flip=False, patch_size=8, latent_dim=72, encoder_size=(64, 1, 4),
    decoder_size=(96, 2, 4), mixer_depth=1, weights=(1.0, 0.0, 1.0, 0.0, 0.02), batch_size=64,
    iterations=1200, lr=5e-3, min_lr=1e-5, warmup=50 / 1200, encoder_lr_scale=1.0, ema=0.99, use_ema=True)
# A Sphere Encoder that serves as tokenizer: no classes; of the losses Eq. 7 alone, whose noise ends at 26.6
# degrees, half of tan 45.
DIGITS_TOKENIZER = replace(
    DIGITS, conditional=False, alpha_max=45.0, alpha_hard=0.0, weights=(1.0, 0.0, 0.0, 0.0, 0.0),
    latent_dim=32, iterations=1050, warmup=50 / 1050)
DIGITS_LATENT = replace(
    DIGITS, tokenizer="digits-tokenizer", denoiser_size=(96, 4, 4), distance="l1", alpha_max=82.5,
    noise=(-1.0, 1.5), weights=(1.0, 1.0, 1.0, 1.0, 0.0), iterations=950, lr=4.5e-3, warmup=50 / 950,
    weight_decay=0.1)
# 28x28 clothes in a frame of 32x32, not mirrored since all shoes point left; ours.
FASHION = {"dataset": "fashion-mnist", "image_size": 32, "ema": 0.999}

PRESETS = {
    "digits": DIGITS, "digits-tokenizer": DIGITS_TOKENIZER, "digits-latent": DIGITS_LATENT,
    "fashion-mnist": replace(DIGITS, **FASHION, latent_dim=48, decoder_size=(128, 2, 4), iterations=8500,
                             lr=4e-3, warmup=200 / 8500),
    "fashion-mnist-tokenizer": replace(DIGITS_TOKENIZER, **FASHION, decoder_size=(128, 2, 4), iterations=4000,
                                       lr=3e-3, warmup=100 / 4000),
    "fashion-mnist-latent": replace(DIGITS_LATENT, **FASHION, tokenizer="fashion-mnist-tokenizer",
                                    denoiser_size=(128, 4, 4), alpha_max=82.0, iterations=7500, lr=3e-3,
                                    warmup=200 / 7500, weight_decay=0.0),
    "cifar10": CIFAR10,
    "cifar10-uncond": replace(CIFAR10, conditional=False, epochs=10_000, warmup=10 / 10_000),   # paper App. D
    "animal-faces": ANIMAL_FACES, "flowers102": FLOWERS102, "imagenet-l": IMAGENET,
    "imagenet-xl": replace(IMAGENET, encoder_size="xlarge", decoder_size="xlarge"),          # paper Sec. 3.2
    # The model of the paper's ablations, Sec. 6: L = 16^2 x 256. Assumed to share all else with imagenet-l.
    "imagenet-ablation": replace(IMAGENET, patch_size=16, latent_dim=256, epochs=200, warmup=5 / 200, **BASE),
    "animal-faces-latent": replace(RAE_LATENTS, dataset="animal-faces", data="data/afhq"),
    "flowers102-latent": replace(RAE_LATENTS, dataset="flowers102"),
    "imagenet-latent": replace(RAE_LATENTS, dataset="imagenet", data="data/imagenet", denoiser_size="XL",
                               epochs=800, warmup=5 / 800),
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
          activation_checkpointing=False, latents=None, evaluate_every=0.0, **evaluation):
    """Train a preset into a folder; under torchrun, as one of its processes. Returns the checkpoint's path.

    preset      Preset, see PRESETS; if its tokenizer is a preset too, that is trained first, in out/tokenizer
    out         folder of last.pt to resume from, model.pt to sample from, log.jsonl and pictures
    seed        with the preset decides every number of the run, but for rounding on a GPU or by processes
    resume      continue from out/last.pt exactly where it was written; with a new length, on its schedule.
                The arguments below are not in it and have to be given again
    device      cuda if there is one, else cpu
    evaluate_every  epochs between evaluations, 0 = off; see keep_best. evaluation: arguments of quality

    These change memory and speed, and results only by rounding (but accumulate that of the swd_weight):
    workers     processes that read image files, if they are not kept in memory
    accumulate  micro-batches per iteration and process
    compile     torch.compile: minutes to start, then faster
    activation_checkpointing  compute activations again in the backward pass: less memory, a third slower
    latents     npy file of cached_latents; out/latents.npy if the images are in memory, else none

    Raises ValueError or OSError for bad input, FloatingPointError for a loss or gradient that is not finite,
    KeyboardInterrupt, after saving, if Ctrl-C or SIGTERM came."""
    out = Path(out)
    device = start_process(device)
    rank, world = process_rank()
    with interruptible() as interrupted:
        # What is trained, on what.
        stored = open_run(preset, out, seed, resume, world * accumulate)
        data, held_out, class_names = first_process_first(lambda: load_data(preset))
        settings = {"seed": seed, "images": len(data),
                    "class_names": class_names * preset.conditional}        # none, if it is not
        start, total, save_every, judge_every = plan(preset, len(data), stored, evaluate_every, evaluation)
        if stored:
            must_equal(stored, settings, out)
            cut_logs(out, stored["step"])
        else:
            check_files(data, held_out)
        if data.in_memory:
            workers = 0
        tokenizer = open_tokenizer(preset, out, seed, device, stored)
        source = data
        if tokenizer and (latents or data.in_memory):       # else images are encoded anew in every iteration
            source = first_process_first(lambda: cached_latents(
                latents or out / "latents.npy", data, tokenizer, preset.flip, device, workers))
            workers = 0                                     # they are mapped into memory
        model, ema, optimizer = build(preset, class_names, tokenizer, seed, device, stored)
        sampled = ema if preset.use_ema else model
        objective = wrapped(model.eval(), preset, device, compile, activation_checkpointing)

        # Batches: every process reads its share of every global batch.
        share = preset.batch_size // world
        mine = slice(rank * share, (rank + 1) * share)
        indices = batch_indices(len(data), preset.batch_size, seed, range(start, total), mine)
        loader = DataLoader(source, None, sampler=indices, num_workers=workers,     # iterated once
                            pin_memory=device.type == "cuda", generator=seeded(seed, "loader"))

        def save(step):
            write_checkpoint(out / "model.pt", sampled, preset)
            write_checkpoint(out / "last.pt", model, preset, ema=ema.state_dict(),
                             optimizer=optimizer.state_dict(), step=step, **settings)

        if rank == 0:
            print(f"{out}: {len(data):,} images of {model.num_classes} classes {model.class_names[:20]}, "
                  f"{len(held_out or ())} held out; iterations {start} to {total}")
            if not stored:
                save(0)                                     # from here on the folder is a run to resume
        model.train()
        window = []
        began = since = time.time()
        for step, (images, labels) in zip(range(start, total), loader):
            lr = learning_rate(preset, step, total)
            batch = inputs(preset, model, images, labels, seed, step, mine)
            window.append(train_step(objective, optimizer, preset, lr, batch, accumulate))
            update_ema(ema, model, preset.ema, step)

            done = step + 1
            ends = done == total
            if done % LOG_EVERY and not ends:
                continue
            now = time.time()
            row = {"step": done, "epoch": done * preset.batch_size / len(data), "seconds": now - began,
                   "images/s": len(window) * preset.batch_size / (now - since)}
            means, stops = mean_over_window(window, done, interrupted)
            saves = stops or ends or done % save_every == 0
            model.eval()
            if saves:
                means |= held_out_loss(objective, preset, model, held_out)
            if rank == 0:
                log(out, total, {**row, **means, "lr": lr})
            if evaluate_every and (ends or done % judge_every == 0):
                keep_best(out, done, sampled, preset, quality(sampled, data, held_out, **evaluation))
            if rank == 0 and saves:
                draw(out, done, sampled, held_out or data)
                save(done)                                  # last: --resume trusts that all else is written
            model.train()
            since = time.time()
            if stops:
                raise KeyboardInterrupt(f"interrupted after {done} of {total} iterations; everything is in "
                                        f"{out / 'last.pt'}, --resume continues from there")
        wait_for_all()                                      # the others may read it when it is written
    return out / "last.pt"


def train_step(objective, optimizer, preset, lr, batch, accumulate):
    """Gradients of this process's part of a batch, clipped, and a step of the optimizer.

    lr          learning rate; every group of parameters has a factor of its own
    batch       what `inputs` returns; it is cut into `accumulate` equal parts, whose mean is the loss
    returns     {part of the loss: mean}, "loss", and "grad_norm" before clipping; all on the device"""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.zero_grad()
    rows = []
    for x, *others in micro_batches(*batch, accumulate):
        with autocast(preset, x.device):
            loss, parts = objective(x, *others)
        (loss / accumulate).backward()
        rows.append({**parts, "loss": loss.detach()})
    means = {name: sum(row[name] for row in rows) / accumulate for name in rows[0]}
    means["grad_norm"] = nn.utils.clip_grad_norm_(objective.parameters(), CLIP)
    optimizer.step()
    return means


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
    save_every = max(1, total // 10 // LOG_EVERY) * LOG_EVERY
    judge_every = max(1, round(evaluate_every * images / preset.batch_size / LOG_EVERY)) * LOG_EVERY
    return start, total, min(SAVE_EVERY, save_every), judge_every


def micro_batches(x, y, sigma, sigma_sub, e, count):
    """A batch in equal parts; y is [4, B], all others are [B, ...]."""
    return zip(x.chunk(count), y.chunk(count, dim=1), sigma.chunk(count), sigma_sub.chunk(count),
               e.chunk(count))


def autocast(preset, device):
    """A context in which networks run in bf16, if the preset says so; "auto" is bf16 on a GPU."""
    bf16 = preset.precision == "bf16" or preset.precision == "auto" and device.type == "cuda"
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


# ---- Schedules and randomness: all that a number depends on ------------------------------------------------


def learning_rate(preset, step, total):
    """Linear warm-up, then a cosine to the minimum at the end (in the official code a warm-up earlier)."""
    warmup = round(preset.warmup * total)
    if step < warmup:
        return preset.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / (total - warmup)
    return preset.min_lr + (preset.lr - preset.min_lr) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """Move the averaged weights towards the model's."""
    decay = min(decay, (1 + step) / (10 + step))        # assumed; else short runs keep initial zeros
    get_ema_multi_avg_fn(decay)([*ema.parameters()], [*model.parameters()], None)
    for average, buffer in zip(ema.buffers(), model.buffers()):             # statistics of a batch norm
        average.copy_(buffer)


def seeded(seed, purpose, index=0, device="cpu"):
    """A generator for a seed, purpose and index, hashed into the 32 bits that torch uses of a CPU's seed."""
    purposes = ("order", "draws", "init", "directions", "choice", "loader", "noise")
    key = (seed, purposes.index(purpose), index)
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


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


def random_draws(preset, seed, step):
    """All random scalars of a training step, for the whole global batch: a function of seed, step and batch
    size.

    returns  flip [B], drop [4, B] (null class in E(x), D(v_NOISY), D(v_noisy), E(D(v_NOISY)); of a denoiser,
             in its two or three passes), sigma [B], sigma_sub [B]"""
    B = preset.batch_size
    generator = seeded(seed, "draws", step)
    alpha = preset.alpha_max
    hard = preset.alpha_hard or None
    mapping = preset.mapping
    if preset.tokenizer:
        sigma, sigma_sub = logit_normal_sigmas(B, alpha, *preset.noise, mapping, generator)
    elif mapping == "official":
        sigma, sigma_sub = official_sigmas(B, alpha, hard, HARD_PROB, generator)
        if not any(preset.weights[2:4]):                    # no pixel consistency: it decodes v_NOISY alone
            sigma_sub = sigma
    else:
        sigma, sigma_sub = uniform_sigmas(B, alpha, hard, HARD_PROB, mapping, generator)
    flip = torch.rand(B, generator=generator) < 0.5
    drop = torch.rand(4, B, generator=generator) < CLASS_DROPOUT
    return flip & preset.flip, drop | (not preset.conditional), sigma, sigma_sub


def inputs(preset, model, images, labels, seed, step, mine=slice(None)):
    """What the objective takes in a step, for this process's part of the global batch.

    images   uint8 [B, 3, H, W], or [B, 1 or 2, N, d] of cached_latents
    labels   [B]
    mine     of the global batch, the places of these images
    returns  x (images [B, 3, H, W], or latents [B, N, d] for a denoiser), y [4, B], sigma [B], sigma_sub [B],
             e [B, N, d]"""
    device = next(model.parameters()).device
    x, labels = (batch.to(device, non_blocking=True) for batch in (images, labels))
    flip, drop, sigma, sigma_sub = (draw[..., mine].to(device) for draw in random_draws(preset, seed, step))
    e = torch.randn(preset.batch_size, *model.latent_shape, device=device,                   # [B, N, d]
                    generator=seeded(seed, "noise", step, device))[mine].clone()    # keeps no other part
    y = torch.where(drop, model.num_classes, labels)                                         # [4, B]
    if x.dtype == torch.uint8:                                                               # [B, 3, H, W]
        x = to_float(torch.where(flip[:, None, None, None], x.flip(-1), x))
        if isinstance(model, SiT):
            x = model.tokenizer.encode(x)                                                    # [B, N, d]
    else:                                                           # [B, 1 or 2, N, d] -> [B, N, d]
        x = torch.where(flip[:, None, None], x[:, -1], x[:, 0])
    return x, y, sigma, sigma_sub, e


# ---- The run's folder --------------------------------------------------------------------------------------


def open_run(preset, out, seed, resume, parts):
    """The checkpoint to resume from, or None for a new run. Raises ValueError for settings that do not fit
    each other or the run, a batch that cannot be cut into parts, and a new run in the folder of another."""
    if parts < 1 or preset.batch_size < 1 or preset.batch_size % parts:
        raise ValueError(f"--batch-size must be a multiple of processes x accumulate, {parts}")
    if preset.batch_norm and parts > 1:
        raise ValueError("--batch-norm goes neither with --accumulate nor with several processes")
    if len(preset.weights) != 5 or not (preset.epochs or preset.iterations):
        raise ValueError("need five --weights, and --epochs or --iterations")
    if preset.distance not in DISTANCES or preset.precision not in ("auto", "bf16", "float32"):
        raise ValueError("--distance must be l1, smooth-l1 or l2, --precision auto, bf16 or float32")
    random_draws(preset, seed, 0)                           # raises for impossible angles or noise
    if not resume:
        if any(any(out.glob(name)) for name in ("*.pt", "tokenizer/*.pt", "log.jsonl")):
            raise ValueError(f"{out} already holds a run; --resume continues it, another --out keeps it")
        return None
    last = out / "last.pt"
    if preset.tokenizer and not last.exists() and (out / "tokenizer" / "last.pt").exists():
        return None                                         # perhaps left while it trained its tokenizer
    stored = read_checkpoint(last, "optimizer")
    must_equal(stored, {**asdict(preset), "seed": seed}, out)
    return stored


def must_equal(stored, settings, out):
    """Raises ValueError if a run was trained with other settings or data, rather than mix two runs."""
    before = {**stored, **stored["preset"]}
    for name, value in settings.items():
        if value != before.get(name) and name not in ("data", "epochs", "iterations"):     # moved, extended
            raise ValueError(f"{out} was trained with {name} {before.get(name)}, not {value}; --resume has "
                             f"its settings and data: drop that option and --preset, or change --out")


def cut_logs(out, step):
    """Cut the logs of a run back to the step of its checkpoint, remove what killed writers left. What else is
    newer, pictures and best.pt, is made again when its step is reached again. By the first process alone."""
    if not is_first_process():
        return
    for path in out.glob("*.tmp"):
        path.unlink()
    for path in (out / "log.jsonl", out / "evaluations.jsonl"):
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            if kept != lines:
                with whole_file(path) as file:
                    file.write("".join(kept).encode())


def open_tokenizer(preset, out, seed, device, stored):
    """The frozen autoencoder of a denoiser, trained first if need be; None for a Sphere Encoder."""
    path = preset.tokenizer
    if not path:
        return None
    if stored or path == "rae":
        content = stored["tokenizer"] if stored else path
        return first_process_first(lambda: load_tokenizer(content)).to(device)
    if path in PRESETS:
        folder = out / "tokenizer"
        small = replace(PRESETS[path], data=preset.data, precision=preset.precision)
        path = train(small, folder, seed, (folder / "last.pt").exists(), device)
    model = load(path, device)
    if not isinstance(model, SphereEncoder) or model.image_size != (preset.image_size,) * 2:
        raise ValueError(f"--tokenizer {path} is no Sphere Encoder for --image-size {preset.image_size}")
    return SphereTokenizer(model)


def build(preset, class_names, tokenizer, seed, device, stored):
    """Model, averaged model and optimizer: fresh from the seed, begun from another checkpoint, or resumed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seeded(seed, "init").initial_seed())
        model = build_model(preset, class_names, tokenizer and tokenizer.latent_shape)
    if preset.init and not stored:
        other = first_process_first(lambda: load(preset.init))
        taken = take_weights(model, other.state_dict())
        print(taken, "tensors taken from", preset.init)
    model.to(device)
    groups = parameter_groups(model, preset.encoder_lr_scale, preset.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=True)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    for network in (model, ema):
        network.sampling = preset.sampling
        if tokenizer:
            network.attach(tokenizer)
    if stored:
        model.load_state_dict(stored["model"])
        ema.load_state_dict(stored["ema"])
        optimizer.load_state_dict(stored["optimizer"])
    else:
        sampler(ema)(ema, [0], 2)                           # raises now for sampling that cannot be
    return model, ema, optimizer


def wrapped(model, preset, device, compile, activation_checkpointing):
    """The Objective of a model, in the wrappers of several processes and of torch.compile."""
    if activation_checkpointing:
        compute_again(model)
    objective = first_process_first(lambda: Objective(model, preset)).to(device)
    if distributed.is_initialized():
        # broadcast_buffers=False, by its place since its name is to change; gradients are averaged.
        warnings.filterwarnings("ignore", ".*broadcast_buffers")
        objective = nn.parallel.DistributedDataParallel(objective, None, None, 0, False)
    if compile:
        torch._dynamo.config.optimize_ddp = not activation_checkpointing        # some versions of torch fail
        objective.compile(dynamic=False)                    # in place: parameters keep their names
    return objective


# ---- Log and pictures --------------------------------------------------------------------------------------


def mean_over_window(window, done, interrupted):
    """Empty the window of the last iterations: means over iterations and processes by name, and whether a
    process was interrupted. Raises FloatingPointError, on all processes, if a value is not finite."""
    names = [*window[0]]
    first = done - len(window) + 1
    values = torch.stack([torch.stack([*row.values()]) for row in window]).cpu().double()         # [k, names]
    values = F.pad(values, (0, 1), value=float(len(interrupted)))                           # one column more
    window.clear()
    if distributed.is_initialized():
        distributed.all_reduce(values)
        values /= distributed.get_world_size()
    for number, row in enumerate(values.tolist(), first):
        for name, value in zip(names, row):
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} became {value} in iteration {number}; the last checkpoint "
                                         f"is good, try a lower --lr")
    *means, stops = values.mean(0).tolist()
    return dict(zip(names, means)), stops > 0


@torch.no_grad()
def held_out_loss(objective, preset, model, held_out):
    """The first part of the loss on 64 held-out images, as {name: value} for the log: not mirrored, with the
    same noise and class drops at every call; {} without such images."""
    if not held_out:
        return {}
    places = some(held_out, 64)
    p = replace(preset, batch_size=max(3, len(places)), flip=False)         # official draws are of 3 or more
    x, *others = inputs(p, model, *held_out[places], 0, 0, slice(len(places)))
    with autocast(preset, x.device):
        _, parts = getattr(objective, "module", objective).forward(x, *others)  # not compiled for this batch
    name, value = next(iter(parts.items()))
    return {f"held_out_{name}": value.item()}


def log(out, total, row):
    """Append a line to log.jsonl, and show it."""
    append(out / "log.jsonl", row)
    step, *shown = [f"{name} {value:.4g}" for name, value in row.items() if value]
    print(f"{row['step']}/{total}", *shown)


def logged(path):
    """The lines of a log."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def append(path, row):
    """Add a line to a log."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def keep_best(out, step, model, preset, rows):
    """Write an evaluation to evaluations.jsonl, and the model to best.pt if the first row, its Fréchet
    distance (or FID), is lower than ever at the last number of steps; by the first process alone."""
    if not is_first_process():
        return
    append(out / "evaluations.jsonl", {"step": step, **rows})
    name, columns = next(iter(rows.items()))
    *_, T = [column for column in columns if column.startswith("T")]
    scores = [line[name][T] for line in logged(out / "evaluations.jsonl")
              if T in line.get(name, {})]                   # measured alike
    if scores[-1] == min(scores):
        write_checkpoint(out / "best.pt", model, preset)
    print(f"{name} {scores[-1]:.4f}, of best.pt {min(scores):.4f}")


def draw(out, step, model, data):
    """Write a picture by class, of samples at 1, 2 and 4 steps, reconstructions of real images and these
    images; and the plot of the losses."""
    classes = data.targets.unique()[:10].tolist()
    columns = max(5, 20 // len(classes))
    places = [(data.targets == c).nonzero()[:, 0].repeat(columns)[:columns] for c in classes]
    images, y = data[torch.cat(places).tolist()]            # a small class repeats
    x = to_float(images)
    y = y * (model.num_classes > 0)
    panels = {f"T = {T}": sampler(model)(model, y, T) for T in (1, 2, 4)}
    panels |= {"reconstruction": reconstruct(model, x), "original": x}
    panels = {title: images.unflatten(0, (-1, columns)) for title, images in panels.items()}
    path = out / f"samples-{step:06d}.png"
    save_image(picture(panels, [model.class_names[c] for c in classes if model.num_classes]), path)
    plot_losses(out / "losses.png", logged(out / "log.jsonl"))
    print(path, out / "losses.png")


def plot_losses(path, lines):
    """Plot the loss and its unweighted parts over the iterations of a log."""
    from matplotlib.figure import Figure
    axes = Figure(figsize=(7, 4)).subplots()
    for name, value in lines[-1].items():
        if value and re.match("loss|.*recon|con|lat|swd", name):
            seen = [line for line in lines if name in line]
            axes.plot([line["step"] for line in seen], [line[name] for line in seen], label=name)
    axes.set(yscale="log", ylim=(1e-5, None), xlabel="iteration", ylabel="loss (parts unweighted)")
    axes.minorticks_off()                                   # half of the time of a plot
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    axes.figure.savefig(path, bbox_inches="tight")


# ---- Data --------------------------------------------------------------------------------------------------
# A reader takes the folder of --data and returns one or two parts, to train on and held out, and class names.
# A part is (images, classes): images [n, H, W] or [n, H, W, 3] in [0, 1], or the paths of image files.


def digits(root):
    """1,797 real digits of 8x8 pixels, in scikit-learn, split at random: the last ones have other writers."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    x, y = load_digits(return_X_y=True)
    x = torch.from_numpy(x).float().view(-1, 8, 8) / 16
    split = train_test_split(range(len(y)), test_size=297, stratify=y, random_state=0)
    return [(x[places], y[places]) for places in split], list("0123456789")


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
    return [joined((data._image_files, data._labels) for data in sets)], list(map(str, range(1, 103)))


def joined(parts):
    """All (paths, classes) as one."""
    paths, classes = zip(*parts)
    return sum(paths, []), sum(classes, [])


def downloaded(name, read, *arguments):
    """What a reader of torchvision's returns; its dozen kinds of errors become one."""
    try:
        return read(*arguments)
    except Exception as error:
        raise OSError(f"{arguments[-1]}: {name} can be neither read nor downloaded ({error!r}); "
                      f"see the README, \"At the papers' scale\", for what --data must hold") from None


def class_of_images(folder):
    """{path: name of the outermost folder, or ""} of all images below a folder."""
    return {path: "".join(path.relative_to(folder).parent.parts[:1]) for path in find_images(folder)}


def image_folder(root):
    """Images of a folder, and class names in text order.

    Images in train/ are trained on; those in val/, or else valid/, validation/ or test/, are held out. If the
    folder has no such two folders, all its images are trained on. The folders of training images are classes;
    if there are fewer than two, all images are of class 0.
    Raises ValueError for held-out images of other classes."""
    folders = {path.name.lower(): path for path in root.iterdir()
               if path.is_dir() and not path.name.startswith(HIDDEN)}
    roots = [folders[name] for name in SPLITS if name in folders][:2]
    if "train" not in folders or len(roots) < min(2, len(folders)):
        roots = [root]
    groups = [class_of_images(folder) for folder in roots]
    names = sorted({*groups[0].values()} - {""})
    number = {name: k for k, name in enumerate(names)}
    if len(names) < 2:
        names = []
        number[""] = 0
    parts = []
    for folder, group in zip(roots, groups):
        paths = [path for path, name in group.items() if name in number]
        found = {*group.values()}
        if found - {*number, ""} or not paths:
            raise ValueError(f"{folder} has the classes {sorted(found)}, the training images have {names}")
        parts.append((paths, [number[group[path]] for path in paths]))
        if roots[1:] or len(paths) < len(group):
            warnings.warn(f"{folder}: {len(paths)} of {len(group)} images are used")
    return parts, names


def animal_faces(root):
    """All images of Animal-Faces, as in the paper."""
    parts, names = image_folder(root)
    return [joined(parts)], names


# A new data set is a reader (see the head of this section) and a line here; the numbers are for --list.
DATA_SETS = {
    "digits": (digits, 10),
    "fashion-mnist": (partial(downloaded, "fashion-mnist", torchvision_set, datasets.FashionMNIST), 10),
    "cifar10": (partial(downloaded, "cifar10", torchvision_set, datasets.CIFAR10), 10),
    "flowers102": (partial(downloaded, "flowers102", flowers102), 102),
    "animal-faces": (animal_faces, 3),
    "imagenet": (image_folder, 1000),
    "folder": (image_folder, 10),
}


def load_data(preset):
    """Training set, held-out set (None if the data set has none) and class names of a preset.

    data[list of n indices] is (uint8 [n, 3, S, S], classes [n]), grey repeated to 3 channels; all classes are
    in `.targets`, and `.in_memory` says whether the images are.
    Raises OSError or ValueError that says what is wrong where."""
    if preset.dataset not in DATA_SETS:
        raise ValueError(f"--dataset must be one of {', '.join(DATA_SETS)}")
    read, _ = DATA_SETS[preset.dataset]
    parts, class_names = read(Path(preset.data))
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
    data.in_memory = isinstance(data, TensorDataset)
    return data


def resized(images, size):
    """Images [n, H, W] or [n, H, W, 3] in [0, 1] -> uint8 [n, 3, size, size]; 28x28 in a frame of 32x32."""
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    if images.shape[-1] == 28:
        images = F.pad(images, (2, 2, 2, 2))
    images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=size < images.shape[-1])
    return to_uint8(images).expand(-1, 3, -1, -1)


def check_files(*data_sets):
    """Read every image file once, by one process of a machine: broken ones are named now, not in an hour."""
    for data in data_sets:
        if isinstance(data, StackDataset) and goes_first():
            for _ in data.datasets[0].batches():
                pass


def cached_latents(path, data, tokenizer, flip, device, workers):
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
        with whole_file(path, overwrite=False) as file:     # or another run came first
            # Written, not mapped: on a full disk a write is an error, a mapped page a crash.
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            loader = DataLoader(data, None, sampler=torch.arange(len(data)).split(64), num_workers=workers,
                                generator=seeded(0, "loader"))
            for images, _ in tqdm(loader, "latents", disable=None):
                file.write(encoded(images).tobytes())
    ends = [0, len(data) - 1]
    expected = encoded(data[ends][0])
    with contextlib.suppress(ValueError, EOFError):
        latents = np.load(path, mmap_mode="r")
        if latents.shape == shape and np.allclose(latents[ends], expected, atol=0.02):
            return StackDataset(latents, data.targets)
    raise ValueError(f"{path} is not of this tokenizer and these images, or damaged; delete it, or name "
                     f"another file: --latents")


def export(preset, out, count=None):
    """Write images, at most `count` of each part, as OUT/train/CLASS/PLACE.png and, held out, OUT/val/..."""
    train, held_out, class_names = load_data(preset)
    for part, data in (("train", train), ("val", held_out or ())):
        for place in tqdm(some(data, count), part, disable=None):
            [image], [label] = data[[place]]
            name = class_names[label].replace("/", "-") if class_names else ""      # "T-shirt/top"
            save_image(to_pil(to_float(image)), out / part / name / f"{place:06d}.png")


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


def first_process_first(action):
    """What an action returns; one process of each machine goes ahead and writes what the others then find."""
    for first in (True, False):
        if first == goes_first():
            result = action()
        wait_for_all()
    return result


@contextlib.contextmanager
def interruptible():
    """Turn Ctrl-C and SIGTERM into entries of a list that the loop looks at. A second one interrupts at once,
    but not under torchrun, which passes on the Ctrl-C that its processes have already had."""
    came = []

    def on_signal(number, frame):
        came.append(number)
        if len(came) > 1 and "RANK" not in os.environ:
            raise KeyboardInterrupt

    with contextlib.ExitStack() as restored:
        for number in (signal.SIGINT, signal.SIGTERM):
            restored.callback(signal.signal, number, signal.signal(number, on_signal))
        yield came


# ---- Evaluation --------------------------------------------------------------------------------------------


def evaluate(path, seed=0, data=None, device=None, use_ema=None, **options):
    """quality() of a checkpoint; data is the data set's folder, if it has moved, use_ema that of load."""
    device = start_process(device)
    model = first_process_first(lambda: load(path, device, use_ema))
    preset = replace(Preset(**model.preset), data=data or model.preset["data"])
    train_set, held_out, names = first_process_first(lambda: load_data(preset))
    if preset.conditional and names != model.class_names:
        raise ValueError(f"{path} was trained on the classes {model.class_names}, the data have {names}")
    return quality(model, train_set, held_out, seed=seed, **options)


class Samples(Dataset):
    """Samples of a model as a data set, drawn when they are asked for; sample i has class i mod K."""

    def __init__(self, model, count, **sampling):
        self.draw = partial(sampler(model, **sampling), model)
        self.targets = torch.arange(count) % max(model.num_classes, 1)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, places):
        y = self.targets[places]
        x = self.draw(y, first=places[0])
        return to_uint8((x + 1) / 2, self.draw.keywords.get("official", False)), y


def quality(model, train_set, held_out, count=1000, steps=(1, 2, 4), cfg=1.0, seed=0, features="pixels",
            reference=None, **sampling):
    """Measures of class-balanced samples, beside the same numbers for real held-out images.

    count      number of samples; sample i has class i mod K, and 8 bits as in an image file
    steps      T, one or several
    cfg        guidance scale, 1 = off
    features   torch-fidelity, pytorch-fid (real: at most 50,000 training images) or pixels (10,000)
    reference  npz of statistics or of images to compare with instead; judged right and nearest are left out
    sampling   other arguments of generate or generate_latent, in place of the preset's
    returns    {row: {column: number}}, on all processes: the rows of fid.compare; FID of reconstructed
               training images (rFID); of pixels, judged right, the share of images whose class an SVC trained
               on the real ones reads, and nearest, the median distance to the nearest real image over that of
               the held-out ones, well below 1 if images were memorised"""
    steps = (steps,) if isinstance(steps, int) else steps
    pixels = features == "pixels"
    places = some(train_set, 10_000 if pixels else 50_000)
    device = next(model.parameters()).device
    network = feature_network(features, device, grey=is_grey(train_set[places[:100]][0]))

    def measured(places, images_at):
        """fid.Extracted of the images at some places, of which every batch is one process's."""
        return extracted(gathered(
            places, lambda part: [x.cpu() for x in network(images_at(part).to(device))]))

    sampling = {"cfg": cfg, "seed": seed, **sampling}
    sets = {f"T = {T}": Samples(model, count, steps=T, **sampling) for T in steps}
    if held_out:
        sets["real held-out"] = held_out
    if reference:
        real = extract_or_keep(images_or_statistics(reference, features), lambda: network, device)
    else:
        real = measured(places, lambda part: train_set[part][0])
    columns = {title: measured(range(len(data)), lambda part: data[part][0]) for title, data in sets.items()}
    rows = {}
    for title, images in columns.items():
        for row, number in compare(images, real, features).items():
            rows.setdefault(row, {})[title] = number
    if not pixels:
        again = measured(places, lambda part: to_uint8((reconstructed(model, train_set, part) + 1) / 2))
        rows["rFID"] = {"training set": compare(again, real, features)["FID"]}
    if pixels and not reference and model.num_classes:
        rows["judged right"] = judged_right(sets, columns, real, train_set.targets[places])
    if pixels and not reference and held_out:
        rows["nearest"] = nearest(columns, real)
    if held_out:
        rows["reconstruction MSE"] = {"real held-out": reconstruction_error(model, held_out)}
    return rows


def judged_right(sets, columns, real, real_classes):
    """Share of images that a support vector classifier, trained on the real ones, puts into their class."""
    from sklearn.svm import SVC
    judge = SVC(C=10).fit(real.features, real_classes)
    return {title: judge.score(images.features, sets[title].targets) for title, images in columns.items()}


def nearest(columns, real):
    """Median distance to the nearest real image, over that of the held-out ones."""
    median = {column: nearest_neighbours(images.features, real.features)[0].quantile(0.5).item()
              for column, images in columns.items()}
    return {column: distance / median["real held-out"] for column, distance in median.items()}


def reconstruction_error(model, data):
    """Mean squared error of reconstructions, of images in [-1, 1]."""
    errors = gathered(range(len(data)), lambda part: (
        reconstructed(model, data, part) - to_float(data[part][0])).square().mean((1, 2, 3)))
    return torch.cat(errors).mean().item()


def reconstructed(model, data, places):
    """Reconstructions of a data set's images at some places, in [-1, 1], on the CPU."""
    return reconstruct(model, to_float(data[places][0])).cpu()


def gathered(places, result_of, batch=100):
    """Results for batches of places, a list in their order, on all processes. Every batch is computed whole,
    by one process, so that rounding does not depend on their number."""
    rank, world = process_rank()
    batches = [places[i:i + batch] for i in range(0, len(places), batch)]
    mine = [result_of(part) for part in batches[rank::world]]
    of_all = [mine] * world
    if world > 1:
        distributed.all_gather_object(of_all, mine)
    return [of_all[k % world][k // world] for k in range(len(batches))]


def some(data, limit):
    """Places in a data set; beyond `limit`, a fixed random choice."""
    return torch.randperm(len(data), generator=seeded(0, "choice"))[:limit].sort().values.tolist()


# ---- Command line ------------------------------------------------------------------------------------------

OPTIONS = {
    "--preset": (str, "settings to start from (digits)"),
    "--out": (Path, "folder of the run (out/PRESET)"),
    "--evaluate": (str, "checkpoint of whose samples to print the quality; trains nothing"),
    "--list": (bool, "print all presets with sizes and cost; trains nothing"),
    "--export": (Path, "folder to write --count images of the data set to; trains nothing"),
    "--seed": (int, "with the settings decides every number of the run (0)"),
    "--resume": (bool, "continue from OUT/last.pt exactly where it was written"),
    "--device": (str, "cuda, cuda:1, cpu, ... (cuda if there is one)"),
    "--workers": (int, "processes that read image files, if they are not kept in memory (4)"),
    "--accumulate": (int, "micro-batches per iteration and process (1)"),
    "--compile": (bool, "torch.compile: minutes to start, then faster"),
    "--activation-checkpointing": (bool, "less memory, a third slower"),
    "--latents": (str, "npy file of a denoiser's latents, for all runs with its tokenizer (OUT/latents.npy "
                       "if the images are in memory, else none)"),
    "--evaluate-every": (float, "epochs between evaluations, of which best.pt is kept; 0 = off (0)"),
    "--count": (int, "evaluation: number of samples (1000)"),
    "--steps": (tuple, "evaluation: T of Algorithm 1, one or several (1,2,4)"),
    "--cfg": (float, "evaluation: guidance scale, 1 = off (1)"),
    "--features": (str, "evaluation: torch-fidelity, pytorch-fid or pixels (pixels)"),
    "--reference": (str, "evaluation: npz file to compare with (the training images)"),
}

def command_line(argv):
    """What was given, {name: value}."""
    first = argparse.ArgumentParser("train.py", "train.py [options]; --help lists them", add_help=False)
    first.add_argument("--preset", choices=PRESETS, default="digits")
    name = first.parse_known_args(argv)[0].preset
    parser = argparse.ArgumentParser("train.py", "train.py [options]; --help lists them", __doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    for flag, (kind, help) in OPTIONS.items():
        add_option(parser, flag, kind, help)
    settings = parser.add_argument_group(f"settings; in brackets those of {name}")
    for f in fields(Preset):
        help = ", ".join(DATA_SETS) if f.name == "dataset" else f.metadata["help"]
        flag = "--" + f.name.replace("_", "-")
        add_option(settings, flag, f.type, f"{help} ({getattr(PRESETS[name], f.name)})")
    return vars(parser.parse_args(argv))


def literal(text):
    """A Python literal such as 1e-4, False or 64,1,4; anything else is a word."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def add_option(group, flag, kind, help):
    """An option whose values are of a kind; what is neither a number nor a word is a Python literal."""
    if kind is bool:
        how = {"action": argparse.BooleanOptionalAction}
    elif kind is dict:
        how = {"nargs": "+", "metavar": "NAME=VALUE"}
    else:
        how = {"type": kind if kind in (int, float, str, Path) else literal, "metavar": "X"}
    group.add_argument(flag, help=help, **how)


@errors_in_one_line("train.py")
def main(argv=None):
    given = command_line(argv)                              # only what was given
    named = "preset" in given
    name = given.pop("preset", "digits")
    changes = {f.name: given.pop(f.name) for f in fields(Preset) if f.name in given}
    if "sampling" in changes:
        changes["sampling"] = sampling_options(changes["sampling"])
    if "epochs" in changes:
        changes.setdefault("iterations", 0)                 # the length given replaces the preset's
    preset = replace(PRESETS[name], **changes)
    out = given.pop("out", Path("out", name))
    if given.pop("list", False):
        list_presets()
    elif "export" in given:
        export(preset, given["export"], given.get("count"))
    elif "evaluate" in given:
        sampling = changes.pop("sampling", {})
        print_quality(given.pop("evaluate"), **given, **changes, **sampling)
    else:
        if given.get("resume") and (out / "last.pt").exists():
            stored = read_checkpoint(out / "last.pt", "optimizer")
            given.setdefault("seed", stored["seed"])
            if not named:
                preset = replace(Preset(**stored["preset"]), **changes)
        train(preset, out, **given)


def print_quality(path, **options):
    """The table of --evaluate."""
    rows = evaluate(path, **options)
    if is_first_process():
        print(path)
        columns = dict.fromkeys(column for cells in rows.values() for column in cells)
        print_row("", columns)
        for row, cells in rows.items():
            print_row(row, [cells.get(column, "") for column in columns])


def list_presets():
    """A line per preset: sizes, parameters, GFLOPs of one image."""
    costs = {}
    for name, preset in PRESETS.items():
        _, classes = DATA_SETS[preset.dataset]
        model, costs[name] = cost(preset, classes, PRESETS.get(preset.tokenizer))
        if name == "digits":
            print_row("preset", ["pixels", "tokens", "L", "parameters", *costs[name]])
        N, d = model.latent_shape
        parameters = sum(p.numel() for p in model.parameters())
        print_row(name, [preset.image_size, N, N * d, f"{parameters:,}", *costs[name].values()])
    se = costs["imagenet-xl"]
    sle = costs["imagenet-latent"]
    print_row("imagenet-xl / -latent", [f"{se[T] / sle[T]:.2f}" for T in se if T.startswith("T")])
    print("GFLOPs: 2 for every multiply-add; guidance doubles all but a Sphere Latent Encoder's one decode.\n"
          "The quotients are of T = 1, 2, 4 and 6. Folders are listed as if they had 10 classes.")


def print_row(name, cells):
    words = (f"{cell:.5g}" if isinstance(cell, float) else cell for cell in cells)
    print(f"{name:24}", *(f"{word:>13}" for word in words))


if __name__ == "__main__":
    main()
