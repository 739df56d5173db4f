"""Training and evaluation of both papers' models. SE Sec. 2-4, 6, App. B-D; SLE Sec. 4, 5.

    python train.py                                                   # handwritten digits, in a minute
    python train.py --preset digits-latent                            # the same with a Sphere Latent Encoder
    python train.py --preset folder --data photos --out out/photos    # any folder of images, or of classes
    torchrun --nproc_per_node=8 train.py --preset fashion-mnist       # one process per GPU
    python train.py --evaluate out/digits/last.pt
"""

import argparse
import atexit
import contextlib
import copy
import hashlib
import inspect
import json
import math
import os
import re
import signal
import sys
import textwrap
import time
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, StackDataset, TensorDataset
from torchvision import datasets
from tqdm import tqdm

from fid import (FEATURES, Extracted, FeatureStatistics, ImageSet, compare, errors_in_one_line,
                 feature_network, find_images, load_statistics, nearest_neighbours, pick_device,
                 pixel_features, to_uint8, whole_file)
from losses import DISTANCES, Objective, orthogonal_directions
from models import Block, SphereEncoder, SphereTokenizer, build_model, cost, kept_bytes
from sample import (image_transform, literal, load, load_tokenizer, name_value, picture, read_checkpoint,
                    reconstruct, sampler, save_image, to_float, to_pil, write_checkpoint)
from spherify import logit_normal_sigmas, official_sigmas, uniform_sigmas

CLASS_DROPOUT = 0.1                 # probability of the null class, for each pass of each image. SE Sec. 2.4
HARD_PROB = 0.1                     # share of hard cases. SE App. C.2
BETAS, CLIP = (0.9, 0.95), 1.0      # of AdamW, and the largest norm of the gradient, as in the official code
LOG_EVERY, SAVE_EVERY = 10, 1000    # iterations; checkpoints and pictures come ten times a run at least
IN_MEMORY = 2**30                   # bytes of images of a folder that are kept instead of read in every epoch
SPLITS = ("train", "val", "valid", "validation", "test")        # names of folders that are not classes

# ---- Presets -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preset:
    """Everything that a result depends on but the seed. Fields are command-line options, comments their help.
    Batch, optimizer, rates, EMA and the use of plain weights are the official code's (the paper's Table 16 is
    not in our text); what a preset below does not set is ours."""

    dataset: str = "folder"         # digits, fashion-mnist, cifar10, flowers102, animal-faces, imagenet
    data: str = "data"                      # folder with the data set's files; digits needs none
    image_size: int = 64                    # pixels, height and width
    flip: bool = True                       # mirror images at random
    conditional: bool = True                # condition encoder and decoder, or the denoiser, on the class

    patch_size: int = 4                     # P, pixels
    latent_dim: int = 32                    # d, channels of a latent token; L = N d
    encoder_size: str | tuple = "small"     # small .. giant, or width,depth,heads
    decoder_size: str | tuple = "small"     # likewise
    mixer_depth: int = 4                    # blocks of each MLP-Mixer
    pixel_head: str = "linear"              # or conv
    encoder_classes: bool = True            # condition the encoder too, not the decoder alone
    batch_norm: bool = False                # normalise the encoder's output before f, SE App. C.3

    tokenizer: str = ""                     # of a denoiser: rae, or a Sphere Encoder's preset or checkpoint
    denoiser_size: str | tuple = "B"        # S, B, L, XL, or width,depth,heads
    distance: str = "l2"                    # between latents: l1, smooth-l1 or l2
    noise: tuple = (0.0, 1.0)               # mean and deviation of the logit-normal noise

    mapping: str = "sigma"                  # what r is linear in: sigma or, SE C.2, angle; or official noise
    alpha_max: float = 80.0                 # degrees, largest angle of the usual noise
    alpha_hard: float = 85.0                # degrees, largest angle of the hard cases; 0 = none
    weights: tuple = (1.0, 1.0, 0.5, 0.5, 0.1)      # losses: WEIGHT_NAMES or LATENT_WEIGHT_NAMES of losses.py
    swd_weight: float = 0.0                 # of the sliced Wasserstein loss, SE App. C.3
    perceptual: str = "lpips"               # or lpips+convnext, the official code's

    init: str = ""                          # checkpoint whose weights to start from, where they fit
    batch_size: int = 256                   # images per iteration, over all processes and micro-batches
    epochs: float = 0.0                     # length of the training
    iterations: int = 0                     # or this
    lr: float = 1e-4                        # peak learning rate of the decoder; scale it with the batch
    min_lr: float = 1e-6                    # at the end of the cosine
    warmup: float = 0.01                    # share of the training with linear warm-up
    encoder_lr_scale: float = 0.1           # learning rate of the encoder, as a factor
    weight_decay: float = 0.0               # on matrices only
    ema: float = 0.9997                     # largest decay of the averaged weights, which begins lower
    use_ema: bool = False                   # sample with the averaged weights
    precision: str = "auto"                 # bf16 (autocast of the networks), float32, or auto: bf16 on a GPU
    sampling: dict = field(default_factory=dict)    # arguments of generate or generate_latent, NAME=VALUE ...


# "paper": arXiv 2602.15030. "script": what the official code's scripts and defaults set.
CIFAR10 = Preset(
    dataset="cifar10", image_size=32, patch_size=2, latent_dim=8,           # paper Sec. 3.1: L = 16 x 16 x 8
    encoder_size="large", decoder_size="large",                             # paper Sec. 3.1
    mixer_depth=2, pixel_head="conv",                                       # script; paper: 4 layers, no head
    alpha_max=80.0, alpha_hard=85.0, weights=(1.0, 1.0, 0.5, 0.5, 0.1),     # paper C.2; script
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
DIGITS_LATENT = Preset(
    dataset="digits", image_size=16, flip=False, tokenizer="digits-tokenizer", denoiser_size=(96, 4, 4),
    distance="l1", alpha_max=82.5, noise=(-1.0, 1.5), weights=(1.0, 1.0, 1.0, 1.0, 0.0), batch_size=64,
    iterations=950, lr=4.5e-3, min_lr=1e-5, warmup=50 / 950, weight_decay=0.1, ema=0.99, use_ema=True)
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


def train(preset, out, seed=0, resume=False, device=None, workers=None, accumulate=1, compile=False,
          activation_checkpointing=False, latents=None, evaluate_every=0.0, evaluation=None):
    """Train a preset into a folder; under torchrun, as one of its processes. Returns the checkpoint's path.

    preset      Preset, see PRESETS; if its tokenizer is a preset too, that is trained first, in out/tokenizer
    out         folder of last.pt to resume from, model.pt to sample from, log.jsonl and pictures
    seed        with the preset decides every number of the run, but for rounding on a GPU or by processes
    resume      continue from out/last.pt exactly where it was written; with a new length, on its schedule
    device      cuda if there is one, else cpu
    evaluate_every  epochs between evaluations, 0 = off; see keep_best. evaluation: arguments of quality

    These change memory and speed, and results only by rounding:
    workers     processes that read images; as the data need
    accumulate  micro-batches per iteration and process
    compile     torch.compile: minutes to start, then faster
    activation_checkpointing  compute activations again in the backward pass: less memory, a third slower
    latents     npy file of a denoiser's LatentCache; out/latents.npy if the images are in memory, else none

    Raises ValueError or OSError for bad input, FloatingPointError for a loss or gradient that is not finite,
    KeyboardInterrupt, after saving, if Ctrl-C or SIGTERM came."""
    out, device, (rank, world) = Path(out), start_process(device), process_rank()
    with interruptible() as interrupted:
        stored = open_run(preset, out, seed, resume, world * accumulate)
        data, held_out, class_names = first_process_first(lambda: load_data(preset))
        for part in (data, held_out) if not stored and os.environ.get("LOCAL_RANK", "0") == "0" else ():
            for _ in part.datasets[0].batches() if isinstance(part, StackDataset) else ():
                pass                                        # all files can be read
        in_memory = isinstance(data, TensorDataset)
        if workers is None:
            workers = 0 if in_memory else min(8, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        tokenizer, source = open_tokenizer(preset, out, seed, device, stored), data
        if tokenizer and (latents or in_memory):
            source = first_process_first(lambda: LatentCache(
                latents or out / "latents.npy", data, tokenizer, preset.flip, device, workers))
        model, ema, optimizer = build(preset, class_names, tokenizer, seed, device, stored, data)
        objective = wrapped(model.eval(), preset, device, compile, activation_checkpointing)
        sampled = ema if preset.use_ema else model
        start = stored["step"] if stored else 0
        total = preset.iterations or math.ceil(preset.epochs * len(data) / preset.batch_size)
        if start > total:
            raise ValueError(f"{out / 'last.pt'} has {start} iterations already, more than {total}")
        save_every = min(SAVE_EVERY, max(1, total // 10 // LOG_EVERY) * LOG_EVERY)
        judge_every = max(1, round(evaluate_every * len(data) / preset.batch_size / LOG_EVERY)) * LOG_EVERY
        bf16 = preset.precision == "bf16" or preset.precision == "auto" and device.type == "cuda"
        share = preset.batch_size // world
        mine = slice(rank * share, (rank + 1) * share)      # this process's part of every global batch
        micro_batches = [slice(i, i + share // accumulate) for i in range(0, share, share // accumulate)]
        indices = batch_indices(len(data), preset.batch_size, seed, range(start, total), mine)
        loader = DataLoader(source, None, sampler=indices, num_workers=workers,     # iterated once
                            pin_memory=device.type == "cuda", generator=seeded(seed, "loader"))

        def save(step):
            write_checkpoint(out / "last.pt", model, preset, ema=ema.state_dict(),
                             optimizer=optimizer.state_dict(), step=step, seed=seed, images=len(data))
            write_checkpoint(out / "model.pt", sampled, preset)

        if rank == 0:
            print(f"{out}:", opening_line(objective, preset, model, data, held_out, bf16, share // accumulate,
                                          start, total), flush=True)
            if not stored:
                save(0)                                     # from here on the folder is a run to resume
        model.train()
        began = since = time.time()
        window, bar = [], tqdm(total=total, initial=start, unit="it", disable=rank > 0 or None)
        for step, (images, labels) in zip(range(start, total), loader):
            lr = learning_rate(preset, step, total)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            x, y, sigma, sigma_sub, e, directions = inputs(preset, model, images, labels, seed, step, mine)

            optimizer.zero_grad()
            rows = []
            for m in micro_batches:                         # the loss is a mean, and they are equally large
                waits = world > 1 and m is not micro_batches[-1]            # gradients meet at the last one
                part = tokenizer.encode(x[m]) if tokenizer and source is data else x[m]
                with objective.no_sync() if waits else contextlib.nullcontext():
                    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                        loss, parts = objective(part, y[:, m], sigma[m], sigma_sub[m], e[m], directions)
                    (loss / accumulate).backward()
                rows.append({"loss": loss.detach(), **parts})
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            update_ema(ema, model, preset.ema, step)
            window.append({name: sum(row[name] for row in rows) / accumulate for name in rows[0]}
                          | {"grad_norm": grad_norm})
            bar.update()

            done, ends = step + 1, step + 1 == total
            if done % LOG_EVERY and not ends:
                continue
            now, images = time.time(), len(window) * preset.batch_size
            means, stops = mean_over_window(window, done, interrupted)
            saves = done % save_every == 0 or ends or stops
            model.eval()
            if rank == 0:
                if saves and held_out:
                    with torch.no_grad():
                        parts = first_losses(objective, preset, model, held_out, 64, bf16)[1]
                    means["held_out_" + next(iter(parts))] = next(iter(parts.values())).item()
                log(out, bar, {"step": done, "epoch": done * preset.batch_size / len(data),
                               "seconds": now - began, "images/s": images / (now - since), **means, "lr": lr})
                if saves:
                    save(done)
                    draw(out / f"samples-{done:06d}.png", sampled, held_out or data)
            if evaluate_every and (done % judge_every == 0 or ends):
                rows = quality(sampled, data, held_out, **evaluation or {})             # on all processes
                if rank == 0:
                    keep_best(out, done, sampled, preset, rows)
            model.train()
            since = time.time()
            if stops and not ends:
                raise KeyboardInterrupt(f"interrupted after {done} of {total} iterations; everything is in "
                                        f"{out / 'last.pt'}, --resume continues from there")
        if world > 1:
            distributed.barrier()                           # the others may read it when it is written
    return out / "last.pt"


def open_run(preset, out, seed, resume, parts):
    """The checkpoint to resume from, or None for a new run. Raises ValueError rather than mix two runs, and
    for settings that do not fit each other, or a batch that cannot be cut into parts."""
    last, p = out / "last.pt", preset
    if parts < 1 or p.batch_size < 1 or p.batch_size % parts:
        raise ValueError(f"--batch-size {p.batch_size} must be a multiple of processes x accumulate, {parts}")
    if p.batch_norm and (parts > process_rank()[1] or parts > 1 and not torch.cuda.is_available()):
        raise ValueError("--batch-norm goes neither with --accumulate nor with several processes on a CPU")
    if len(p.weights) != 5 or p.distance not in DISTANCES or not p.epochs and not p.iterations:
        raise ValueError(f"need five --weights, a --distance in {[*DISTANCES]}, and --epochs or --iterations")
    random_draws(p, seed, 0)                                # refuses angles and noise that cannot be
    if not resume and any(any(out.glob(name)) for name in ("*.pt", "tokenizer/*.pt", "log.jsonl")):
        raise ValueError(f"{out} already holds a run; --resume continues it, another --out keeps it")
    if not resume or p.tokenizer and not last.exists() and (out / "tokenizer" / "last.pt").exists():
        return None                                         # perhaps left while it trained its tokenizer
    stored = read_checkpoint(last, "optimizer")
    before = {**stored["preset"], "seed": stored["seed"]}
    for name, value in {**asdict(p), "seed": seed}.items():
        if value != before.get(name) and name not in ("data", "epochs", "iterations"):     # moved, extended
            raise ValueError(f"{last} was trained with {name} {before.get(name)}, not {value}; --resume has "
                             f"the settings of the run: drop that option and --preset, or change --out")
    for path in (out / "log.jsonl", out / "evaluations.jsonl") if process_rank()[0] == 0 else ():
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []     # some of a killed run
        path.write_text("".join(line for line in lines
                                if line.endswith("\n") and json.loads(line)["step"] <= stored["step"]))
    return stored


def open_tokenizer(preset, out, seed, device, stored):
    """The frozen autoencoder of a denoiser, trained first if need be; None for a Sphere Encoder."""
    path = preset.tokenizer
    if not path:
        return None
    if stored or path == "rae":
        return first_process_first(lambda: load_tokenizer(stored["tokenizer"] if stored else path)).to(device)
    if path in PRESETS:
        small = replace(PRESETS[path], data=preset.data, precision=preset.precision)
        path = train(small, out / "tokenizer", seed, (out / "tokenizer" / "last.pt").exists(), device)
    model = load(path, device)
    if not isinstance(model, SphereEncoder) or model.image_size != (preset.image_size,) * 2:
        raise ValueError(f"--tokenizer {path} must be a Sphere Encoder for --image-size {preset.image_size}, "
                         f"got a {type(model).__name__} for {model.image_size[0]}")
    return SphereTokenizer(model)


def build(preset, class_names, tokenizer, seed, device, stored, data):
    """Model, averaged model and optimizer, as seeded, begun from another checkpoint or as stored: AdamW in
    groups, of encoder, decoder or denoiser the matrices (decayed) and the rest (not decayed)."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seeded(seed, "init").initial_seed())
        model = build_model(preset, class_names, tokenizer and tokenizer.latent_shape)
    if preset.init and not stored:
        begin_from(preset.init, model)
    model.to(device)
    networks = ([(model, 1.0)] if tokenizer
                else [(model.encoder, preset.encoder_lr_scale), (model.decoder, 1.0)])
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in network.parameters() if p.requires_grad and (p.ndim > 1) == matrices],
          "weight_decay": preset.weight_decay * matrices, "lr_scale": scale}
         for network, scale in networks for matrices in (True, False)], betas=BETAS, fused=True)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    for network in (model, ema):
        network.sampling = preset.sampling
        if tokenizer:
            network.attach(tokenizer)
    inspect.signature(sampler(model).func).bind_partial(**preset.sampling)     # refuses what it does not know
    if stored:
        if (stored["images"], stored["class_names"]) != (len(data), model.class_names):
            raise ValueError(f"the run was trained on {stored['images']} images of {stored['class_names']}; "
                             f"{preset.data} has {len(data)} of {class_names}")
        for name, part in (("model", model), ("ema", ema), ("optimizer", optimizer)):
            part.load_state_dict(stored[name])
    return model, ema, optimizer


def begin_from(path, model):
    """Give a model a checkpoint's weights of the same name and shape; class tables if all classes agree."""
    other, own = first_process_first(lambda: load(path)), model.state_dict()
    fits = {name: tensor for name, tensor in other.state_dict().items()
            if name in own and own[name].shape == tensor.shape
            and ("embedding_table" not in name or other.class_names == model.class_names)}
    if not fits:
        raise ValueError(f"--init {path} has no weights of such a model")
    model.load_state_dict(fits, strict=False)
    if process_rank()[0] == 0:
        print(f"{path}: {len(fits)} of {len(own)} tensors taken")


def inputs(preset, model, images, labels, seed, step, mine=slice(None)):
    """What the objective takes in a step, of this process's part of the global batch: images, or latents of a
    LatentCache, y [4, B], sigma and sigma_sub [B], e [B, N, d], and directions [L, M] for the swd_weight."""
    device, L = next(model.parameters()).device, math.prod(model.latent_shape)
    drawn = {name: x[..., mine].to(device) for name, x in random_draws(preset, seed, step).items()}
    e = torch.randn(preset.batch_size, *model.latent_shape, device=device,                   # [B, N, d]
                    generator=seeded(seed, "noise", step, device))[mine].clone()    # keeps no other part
    directions = None if not preset.swd_weight else orthogonal_directions(                   # [L, M]
        torch.randn(L, min(L, 256), generator=seeded(seed, "directions", step))).to(device)
    x, labels = (batch.to(device, non_blocking=True) for batch in (images, labels))
    y = torch.where(drawn["drop"], model.num_classes, labels)                                # [4, B]
    if x.dtype == torch.uint8:                                                               # [B, 3, H, W]
        x = to_float(torch.where(drawn["flip"][:, None, None, None], x.flip(-1), x))
    else:                                                           # [B, 1 or 2, N, d] -> [B, N, d]
        x = torch.where(drawn["flip"][:, None, None], x[:, -1], x[:, 0])
    return x, y, drawn["sigma"], drawn["sigma_sub"], e, directions


def first_losses(objective, preset, model, data, count, bf16):
    """(loss, parts) of some images of a data set, not mirrored, with the same noise at every call."""
    places, tokenizer = some(data, count), getattr(model, "tokenizer", None)
    p = replace(preset, batch_size=max(3, len(places)), flip=False)         # official draws are of 3 or more
    x, *others = inputs(p, model, *data[places], 0, 0, slice(len(places)))
    x = tokenizer.encode(x) if tokenizer else x
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        return getattr(objective, "module", objective).forward(x, *others)      # not compiled for this batch


def opening_line(objective, preset, model, data, held_out, bf16, micro_batch, start, total):
    """What is trained on what, how long, and about how much memory that takes: of parameters with gradients,
    averages and two moments, and of what a micro-batch's forward pass keeps for its backward pass."""
    p, names, parameters = preset, model.class_names, sum(x.numel() for x in model.parameters())
    one, two = (kept_bytes(objective, lambda: first_losses(objective, p, model, data, n, bf16))
                for n in (1, 2))                            # the first keeps the weights in bf16, too
    memory = 20 * parameters + one + (micro_batch - 1) * (two - one)
    classes = textwrap.shorten(", ".join(f"{k} = {name}" for k, name in enumerate(names)), 300)
    return (f"{len(data):,} images of {f'{len(names)} classes ({classes})' if names else 'no class'}, "
            f"{len(held_out or ()):,} held out; {parameters:,} parameters, some {memory / 1e9:.1f} GB on "
            f"{next(model.parameters()).device}, {'bf16' if bf16 else 'float32'}; batch {p.batch_size}, rate "
            f"{p.lr:g}, of the encoder {p.lr * p.encoder_lr_scale:g}; iterations {start:,} to {total:,}, "
            f"{total * p.batch_size / len(data):.3g} epochs")


def wrapped(model, preset, device, compile, activation_checkpointing):
    """The Objective of a model, in the wrappers of several processes and of torch.compile."""
    for block in model.modules():
        if activation_checkpointing and isinstance(block, Block):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    objective = first_process_first(lambda: Objective(model, preset)).to(device)
    if distributed.is_initialized():
        if device.type == "cuda":                           # a batch norm, if any, sees the global batch
            objective = nn.SyncBatchNorm.convert_sync_batchnorm(objective)
        warnings.filterwarnings("ignore", ".*broadcast_buffers")        # the last argument; none needs it
        objective = nn.parallel.DistributedDataParallel(objective, None, None, 0, False)
    if compile:
        torch._dynamo.config.optimize_ddp = not activation_checkpointing        # some versions of torch fail
        objective.compile(dynamic=False)                    # in place: parameters keep their names
    return objective


def learning_rate(preset, step, total):
    """Linear warm-up, then a cosine to the minimum at the end (in the official code a warm-up earlier)."""
    warmup = round(preset.warmup * total)
    if step < warmup:
        return preset.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    return preset.min_lr + (preset.lr - preset.min_lr) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """Move the averaged weights towards the model's."""
    decay = min(decay, (1 + step) / (10 + step))        # assumed; else short runs keep initial zeros
    get_ema_multi_avg_fn(decay)([*ema.parameters()], [*model.parameters()], None)
    for average, buffer in zip(ema.buffers(), model.buffers()):             # statistics of a batch norm
        average.copy_(buffer)


def mean_over_window(window, done, interrupted):
    """Empty the window of the last iterations: means over iterations and processes by name, and whether a
    process was interrupted. Raises FloatingPointError, on all processes, if a value is not finite."""
    names, first = [*window[0]], done - len(window) + 1
    values = torch.stack([torch.stack([*row.values()]) for row in window]).cpu().double()         # [k, names]
    values = F.pad(values, (0, 1), value=float(len(interrupted)))
    window.clear()
    if distributed.is_initialized():
        distributed.all_reduce(values)
        values /= distributed.get_world_size()
    for row, column in (~values.isfinite()).nonzero()[:1].tolist():
        raise FloatingPointError(f"{names[column]} became {values[row, column]} in iteration {first + row}; "
                                 f"the last checkpoint is good, try a lower --lr")
    *means, stops = values.mean(0).tolist()
    return dict(zip(names, means)), stops > 0


def log(out, bar, row):
    """Append a line to log.jsonl; show it at the bar or, without a terminal, as a line."""
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    shown = [f"{name} {value:.4g}" for name, value in row.items() if value]
    bar.set_postfix_str(" ".join(shown[4:]), refresh=False)
    if bar.disable:
        print(f"{row['step']}/{bar.total}", *shown[1:], flush=True)


def keep_best(out, step, model, preset, rows):
    """Write an evaluation to evaluations.jsonl, and the model to best.pt if the first row, its Fréchet
    distance (or FID), is lower than ever at the last number of steps."""
    with open(out / "evaluations.jsonl", "a") as file:
        file.write(json.dumps({"step": step, **rows}) + "\n")
    row = next(iter(rows))
    column = [name for name in rows[row] if name.startswith("T")][-1]
    scores = [json.loads(line)[row][column] for line in (out / "evaluations.jsonl").read_text().splitlines()]
    if scores[-1] == min(scores):
        write_checkpoint(out / "best.pt", model, preset)
    tqdm.write(f"{out / 'best.pt'}: {row} {min(scores):.4f}; after {step} iterations it is {scores[-1]:.4f}")


def draw(path, model, data, rows=10):
    """Samples at 1, 2 and 4 steps, reconstructions of real images, these images, by class; the losses. Says
    what to try if the pictures are those of a setting that is far off."""
    classes = data.targets.unique()[:rows].tolist()
    columns = max(5, 20 // len(classes))
    members = [(data.targets == c).nonzero()[:, 0].tolist() for c in classes]       # a small class repeats
    places = [places[i % len(places)] for places in members for i in range(columns)]
    x = to_float(data[places][0]).to(next(model.parameters()).device)
    y = torch.tensor(classes).repeat_interleave(columns) * (model.num_classes > 0)
    panels = {f"T = {T}": sampler(model)(model, y, T) for T in (1, 2, 4)}
    panels |= {"reconstruction": reconstruct(model, x), "original": x}
    panels = {title: images.unflatten(0, (-1, columns)) for title, images in panels.items()}
    save_image(picture(panels, [model.class_names[c] for c in classes if model.num_classes]), path)

    from matplotlib.figure import Figure
    lines = [json.loads(line) for line in (path.parent / "log.jsonl").read_text().splitlines()]
    axes = Figure(figsize=(7, 4)).subplots()
    names = [name for name in lines[-1] if re.match("loss|.*recon|con|lat|swd", name) and lines[-1][name]]
    for name in names:
        seen = [(line["step"], line[name]) for line in lines if line.get(name)]         # a log has no zero
        words = {"recon": "reconstruction", "con": "consistency", "lat": "latent", "swd": "Wasserstein"}
        axes.plot(*zip(*seen), ".-" if "held_out" in name else "-",
                  label=" ".join(words.get(word, word) for word in name.split("_")))
    axes.set(yscale="log", xlabel="iteration", ylabel="loss (parts unweighted)")
    axes.set_ylim(bottom=min(lines[-1][name] for name in names) / 10)       # some begin next to zero
    axes.minorticks_off()                                   # half of the time of a plot
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    axes.figure.savefig(path.parent / "losses.png", dpi=100, bbox_inches="tight")
    tqdm.write(f"{path}, {path.parent / 'losses.png'}")
    one, _, four, again, x = panels.values()                                    # [K, columns, 3, H, W] each
    error = (again - x).square().mean() / x.var((0, 1)).mean()
    spread, spread_x = (images.var(1).mean() for images in (one, x))                        # within a class
    kinds, kinds_x = ((images.mean(1) - images.mean((0, 1))).flatten() for images in (four, x))
    if not error < 0.8:                                     # limits between healthy and other runs: README
        tqdm.write("reconstructions show next to nothing: if that stays, --lr is far too low or too high")
    elif spread < 0.2 * spread_x:
        tqdm.write("samples of a class are nearly all alike: if that stays, lower --alpha-max, --alpha-hard")
    elif model.num_classes and classes[1:] and F.cosine_similarity(kinds, kinds_x, dim=0) < 0.35:
        tqdm.write("samples do not resemble their classes: if that stays, raise --alpha-max")


def seeded(seed, purpose, index=0, device="cpu"):
    """A generator for a seed, purpose and index, hashed into the 32 bits that torch uses of a CPU's seed."""
    key = (seed, ("order", "draws", "init", "directions", "choice", "loader", "noise").index(purpose), index)
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def random_draws(preset, seed, step):
    """All random scalars of a training step, for the whole global batch: a function of (seed, step) alone.

    returns  flip [B], drop [4, B] (null class in E(x), D(v_NOISY), D(v_noisy), E(D(v_NOISY)); of a denoiser,
             in its two or three passes), sigma [B], sigma_sub [B]"""
    p, B, generator = preset, preset.batch_size, seeded(seed, "draws", step)
    if p.tokenizer:
        sigma, sigma_sub = logit_normal_sigmas(B, p.alpha_max, *p.noise, p.mapping, generator)
    else:
        official = p.mapping == "official"
        sigmas = official_sigmas if official else partial(uniform_sigmas, mapping=p.mapping)
        sigma, sigma_sub = sigmas(B, p.alpha_max, p.alpha_hard or None, HARD_PROB, generator=generator)
        if official and not any(p.weights[2:4]):          # no pixel consistency: it decodes v_NOISY alone
            sigma_sub = sigma
    return {"flip": (torch.rand(B, generator=generator) < 0.5) & p.flip,
            "drop": (torch.rand(4, B, generator=generator) < CLASS_DROPOUT) | (not p.conditional),
            "sigma": sigma, "sigma_sub": sigma_sub}


def batch_indices(size, batch_size, seed, steps, mine=slice(None)):
    """Yield, for every step, the data-set indices of a part of the global batch.

    The data are one endless sequence of epochs, each a permutation drawn from (seed, epoch); the batch of
    step s begins at position s * batch_size. So a step's batch needs no history, and no image is dropped."""
    order = lru_cache(1)(lambda epoch: torch.randperm(size, generator=seeded(seed, "order", epoch)).tolist())
    for step in steps:
        positions = range(step * batch_size, (step + 1) * batch_size)[mine]
        yield [order(position // size)[position % size] for position in positions]


# ---- Data --------------------------------------------------------------------------------------------------


def load_data(preset):
    """Training set, held-out set (None if the data set has none) and class names of a preset.

    data[places], of a list of places, is (uint8 [n, 3, S, S], classes [n]), grey repeated to 3 channels; all
    classes are in `.targets`. As in the paper, Flowers-102 and Animal-Faces train on all their images.
    Raises OSError or ValueError that says what is wrong where."""
    name, root = preset.dataset, Path(preset.data)
    if name == "digits":                                    # 1,797 real ones of 8x8 pixels, in scikit-learn
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
        x, y = load_digits(return_X_y=True)                 # the last ones have other writers than the first
        x = torch.from_numpy(x).float().view(-1, 8, 8) / 16
        split = train_test_split(range(len(y)), test_size=297, stratify=y, random_state=0)
        parts, names = [(x[part], y[part]) for part in split], list("0123456789")
    elif name in ("folder", "animal-faces", "imagenet"):
        parts, names = folder_parts(root)
    else:
        try:
            if name == "flowers102":
                sets = [datasets.Flowers102(root, split, download=True) for split in ("train", "val", "test")]
                parts, names = [(x._image_files, x._labels) for x in sets], [str(k) for k in range(1, 103)]
            else:
                kind = {"fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[name]
                sets = [kind(root, train, download=True) for train in (True, False)]
                parts = [(torch.as_tensor(x.data) / 255, torch.as_tensor(x.targets)) for x in sets]
                names = sets[0].classes
                if any(len(x) != len(y) or y.max() >= len(names) for x, y in parts):
                    raise ValueError("images and labels do not fit")
        except Exception as error:                          # torchvision knows a dozen kinds
            why = (str(error) or repr(error)).splitlines()[0]
            raise OSError(f"{root}: {name} can be neither read nor downloaded ({why}); what --data must hold "
                          f"says the README, \"At the papers' scale\"") from None
    if name in ("animal-faces", "flowers102"):
        parts = [[sum(map(list, column), []) for column in zip(*parts)]]
    data, held_out = [(in_memory if torch.is_tensor(part[0]) else from_files)(*part, preset.image_size)
                      for part in parts] + [None] * (2 - len(parts))
    if held_out and len(held_out) < 5:
        warnings.warn(f"{root}: {len(held_out)} held-out images are too few to compare with, and left out")
        held_out = None
    return data, held_out, names


def folder_parts(root):
    """(paths, classes) of a folder's training and perhaps held-out images, and class names in text order.

    Folders are classes; but if all have names of SPLITS, train among them, they hold the classes. Without two
    class folders images have no class. Raises ValueError for classes that held-out images alone have."""
    paths, parts, names = find_images(root), [], []
    below = {path: path.relative_to(root).parts for path in paths}
    top = {first for first, *rest in below.values() if rest}
    splits = [name for split in SPLITS for name in sorted(top) if name.lower() == split]
    splits = splits if {*splits} == top and splits and splits[0].lower() == "train" else []
    for split in splits[:2] or [None]:
        inside = {path: names[bool(split):] for path, names in below.items() if split in (None, names[0])}
        classes = sorted({first for first, *rest in inside.values() if rest})
        classes = classes if classes[1:] or names else []
        names = names or classes
        number = {name: k for k, name in enumerate(names)}
        if not {*classes} <= {*names} or names and not classes:
            raise ValueError(f"{root}: {split} has the classes {classes}, the training images have {names}")
        parts.append([*zip(*((path, number[first] if classes else 0)
                             for path, (first, *rest) in inside.items() if rest or not classes))])
    unused = len(paths) - sum(len(part[0]) for part in parts)
    if splits or unused:
        roles = ["for training", "held out", *["unused"] * 3]
        uses = ", ".join(f"{split} {role}" for split, role in zip(splits, roles))
        warnings.warn(f"{root}: {uses or 'folders are classes'}; {unused} of {len(paths)} images left out")
    return parts, [os.fsencode(name).decode("utf-8", "replace") for name in names]


def from_files(paths, targets, size):
    """Image files -> data set of uint8 [3, size, size]; many are read when they are asked for, few now."""
    images = ImageSet(paths, image_transform(size))
    small, targets = 3 * size**2 * len(paths) <= IN_MEMORY, torch.tensor(targets)
    data = TensorDataset(torch.cat([*images.batches()]), targets) if small else StackDataset(images, targets)
    data.targets, data.paths = targets, paths
    return data


def in_memory(images, targets, size):
    """Images [B, H, W] or [B, H, W, 3] in [0, 1] -> data set of uint8 [3, size, size]; resized bilinearly."""
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    images = F.pad(images, (2, 2, 2, 2)) if images.shape[-1] == 28 else images              # a frame of 32x32
    images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=size < images.shape[-1])
    data = TensorDataset(to_uint8(images).expand(-1, 3, -1, -1), torch.as_tensor(targets))
    data.targets = data.tensors[1]
    return data


class LatentCache(Dataset):
    """Latents of all images, and of their mirror images if they are mirrored, in an npy file; made if there
    is none, or images have changed.

    latents[places] is (z [n, 1 or 2, N, d], classes [n]). Every process that reads it opens it by its path.
    Raises ValueError naming the file, if its first and last latents are not those of tokenizer and images."""

    def __init__(self, path, data, tokenizer, flip, device, workers=0):
        self.path, self.targets = Path(path), data.targets
        shape = (len(data), 1 + flip, *tokenizer.latent_shape)
        files = getattr(data, "paths", [])
        state = [(file.parts[-2:], s.st_size, s.st_mtime_ns, s.st_ctime_ns)
                 for file, s in zip(files, map(os.stat, files))]
        seal = hashlib.sha256(repr(state).encode()).digest()            # stands behind the latents

        def encoded(images):
            x = to_float(images.to(device))
            return torch.stack([tokenizer.encode(view) for view in (x, x.flip(-1))[:1 + flip]], dim=1).cpu()

        changed = False
        with contextlib.suppress(ValueError, EOFError, FileNotFoundError):          # damaged, or to be made
            changed = (np.load(self.path, mmap_mode="r").shape == shape
                       and np.memmap(self.path, mode="r")[-32:].tobytes() != seal)
        if changed:
            warnings.warn(f"{self.path} is of other images, or of these before they changed; it is made anew")
        if changed or not self.path.exists():
            with whole_file(self.path, overwrite=changed) as file:          # or another run came first
                np.lib.format.write_array_header_1_0(
                    file, {"descr": "<f4", "fortran_order": False, "shape": shape})
                loader = DataLoader(data, None, sampler=torch.arange(len(data)).split(64),
                                    num_workers=workers, generator=seeded(0, "loader"))
                for images, _ in tqdm(loader, "latents", disable=process_rank()[0] > 0 or None):
                    file.write(encoded(images).numpy().tobytes())
                file.write(seal)
        with contextlib.suppress(ValueError, EOFError):
            stored, ends = np.load(self.path, mmap_mode="r"), [0, len(data) - 1]
            if stored.shape == shape and np.allclose(stored[ends], encoded(data[ends][0]), atol=0.02):
                return
        raise ValueError(f"{self.path} is not of this tokenizer and these images, or damaged; delete it, or "
                         f"name another file: --latents")

    def __getstate__(self):                                 # for a worker: not the latents
        return {"path": self.path, "targets": self.targets}

    @cached_property
    def latents(self):
        return np.load(self.path, mmap_mode="r")

    def __getitem__(self, places):
        return torch.from_numpy(self.latents[places]), self.targets[places]


def export(preset, out, count=None):
    """Write images, at most `count` of each part, as OUT/train/CLASS/PLACE.png and, held out, OUT/val/..."""
    *parts, class_names = load_data(preset)
    for part, data in zip(("train", "val"), parts):
        for place in tqdm(some(data, count) if data else (), part, disable=None):
            [image], [label] = data[[place]]
            folder = out / part / (class_names or [""])[label].replace("/", "-")    # "T-shirt/top"
            save_image(to_pil(to_float(image)), folder / f"{place:06d}.png")


# ---- Processes ---------------------------------------------------------------------------------------------


def process_rank():
    """(rank, number of processes), as torchrun says; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start_process(device):
    """Join the other processes of torchrun, if any and not yet done; returns this process's device."""
    if device in (None, "cuda") and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"         # one process per GPU
    device = pick_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if process_rank()[1] > 1 and not distributed.is_initialized():      # NCCL's 10 minutes can be too few
        distributed.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
                                       timeout=timedelta(hours=2))
        atexit.register(distributed.destroy_process_group)
    return device


def first_process_first(action):
    """What an action returns; one process of each machine goes ahead and writes what the others then find."""
    for first in (True, False):
        if first == (os.environ.get("LOCAL_RANK", "0") == "0"):
            result = action()
        if distributed.is_initialized():
            distributed.barrier()
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
    preset = Preset(**read_checkpoint(path)["preset"] | ({"data": data} if data else {}))
    device = start_process(device)
    model = first_process_first(lambda: load(path, device, use_ema))
    train_set, held_out, names = first_process_first(lambda: load_data(preset))
    if preset.conditional and names != model.class_names:
        raise ValueError(f"{path} was trained on the classes {model.class_names}, the data have {names}")
    return quality(model, train_set, held_out, seed=seed, **options)


def quality(model, train_set, held_out, count=1000, steps=(1, 2, 4), cfg=1.0, seed=0, features="pixels",
            reference=None, **sampling):
    """Measures of class-balanced samples, beside the same numbers for real held-out images.

    count      number of samples, at least 5; sample i has class i mod K, and 8 bits as in an image file
    steps      T, one or several
    cfg        guidance scale, 1 = off
    features   torch-fidelity, pytorch-fid (real: at most 50,000 training images) or pixels (10,000)
    reference  npz of statistics to compare with instead
    sampling   other arguments of generate or generate_latent, in place of the preset's
    returns    {row: {column: number}}, on all processes: the rows of fid.compare; FID of reconstructed
               training images (rFID); of pixels, judged right, the share of images whose class an SVC trained
               on the real ones reads, and nearest, the median distance to the nearest real image over that of
               the held-out ones, well below 1 if images were memorised"""
    steps = (steps,) if isinstance(steps, int) else steps
    if count < 5 or min(steps) < 1 or features not in FEATURES:
        raise ValueError(f"--count must be at least 5, --steps at least 1, --features one of {FEATURES}, got "
                         f"{count}, {steps} and {features}")
    device, K, pixels = next(model.parameters()).device, max(model.num_classes, 1), features == "pixels"
    network, seconds = feature_network(features, device), {}
    places = some(train_set, 10_000 if pixels else 50_000)
    if pixels and ((x := train_set[places[:100]][0]) == x[:, :1]).all():                    # without colour
        network = lambda x: (pixel_features(x, grey=True),)

    def extracted(places, images):
        """fid.Extracted of images at some places, each batch of them by one process."""
        part = gathered(places, lambda part: torch.cat(network(images(part).to(device)), dim=1))
        pool, logits = (part, part[:, :0]) if pixels else (part[:, :-1008], part[:, -1008:])
        return Extracted(FeatureStatistics(pool.shape[1]).update(pool), pool, logits)

    def sample(T, part):
        began = time.perf_counter()
        x = sampler(model)(model, [i % K for i in part], T, cfg, seed=seed, first=part[0], **sampling)
        x = to_uint8((x + 1) / 2, {**model.sampling, **sampling}.get("official", False)).cpu()
        seconds.setdefault(T, []).append((time.perf_counter() - began) / len(part))
        return x

    def again(data, part):
        return reconstruct(model, to_float(data[part][0]).to(device)).cpu()

    sampler(model)(model, [0], steps[0], cfg, first=0, **sampling)      # what it prepares is not to be timed
    real = (load_statistics(reference, features) if reference
            else extracted(places, lambda part: train_set[part][0]))
    if torch.is_tensor(images := real):                     # images, not statistics
        real = extracted(range(len(images)), lambda part: images[part])
    columns = {f"T = {T}": extracted(range(count), partial(sample, T)) for T in steps}
    if held_out:
        columns["real held-out"] = extracted(range(len(held_out)), lambda part: held_out[part][0])
    cells = {column: compare(images, real, features) for column, images in columns.items()}
    rows = {row: {column: cells[column][row] for column in cells if row in cells[column]}
            for row in cells[f"T = {steps[0]}"]}
    if not pixels:
        again_8_bits = extracted(places, lambda part: to_uint8((again(train_set, part) + 1) / 2))
        rows["rFID"] = {"training set": compare(again_8_bits, real, features)["FID"]}
    elif not reference:
        from sklearn.svm import SVC
        if model.num_classes:
            judge = SVC(gamma="scale", C=10).fit(real.features, train_set.targets[places])
            labels = dict.fromkeys(columns, [i % K for i in range(count)])
            labels["real held-out"] = held_out and held_out.targets
            rows["judged right"] = {T: judge.score(x.features, labels[T]) for T, x in columns.items()}
        nearest = {T: nearest_neighbours(x.features, real.features)[0].quantile(0.5).item()
                   for T, x in columns.items() if held_out}
        rows["nearest"] = {T: distance / nearest["real held-out"] for T, distance in nearest.items()}
    if held_out:
        error = gathered(range(len(held_out)), lambda part: (
            again(held_out, part) - to_float(held_out[part][0])).square().mean((1, 2, 3)))
        rows["reconstruction MSE"] = {"real held-out": error.mean().item()}
    rows["ms per image"] = {f"T = {T}": 1000 * np.mean(seconds.get(T, [math.nan])) for T in steps}
    return rows


def gathered(places, rows_of, batch=100):
    """Rows [n, ...] of all places, on all processes. Fixed batches are computed whole, each by one process,
    so that rounding does not depend on their number."""
    rank, world = process_rank()
    parts = [places[i:i + batch] for i in range(rank * batch, len(places), world * batch)]
    gathered = [[(part[0], rows_of(part).cpu()) for part in parts]] * world
    if world > 1:
        distributed.all_gather_object(gathered, gathered[0])
    return torch.cat([rows for _, rows in sorted(sum(gathered, []), key=lambda part: part[0])])


def some(data, limit):
    """Places in a data set; beyond `limit`, a fixed random choice."""
    return torch.randperm(len(data), generator=seeded(0, "choice"))[:limit].sort().values.tolist()


# ---- Command line ------------------------------------------------------------------------------------------


def list_presets():
    """A line per preset: sizes, parameters, GFLOPs of one image; 2 for every multiply-add."""
    form = ("{:24}{:>6}{:>7}{:>8}{:>15}" + "{:>12}" * 7).format
    costs = {name: cost(preset, PRESETS.get(preset.tokenizer)) for name, preset in PRESETS.items()}
    print(form("preset", "pixels", "tokens", "L", "parameters", *costs["digits"][1]))
    for name, (model, flops) in costs.items():
        (N, d), parameters = model.latent_shape, sum(p.numel() for p in model.parameters())
        print(form(name, PRESETS[name].image_size, N, N * d, f"{parameters:,}",
                   *(f"{value:.5g}" for value in flops.values())))
    (_, se), (_, sle) = costs["imagenet-xl"], costs["imagenet-latent"]
    print(form("imagenet-xl / -latent", *[""] * 7, *(f"{se[T] / sle[T]:.2f}" for T in [*se][3:])))
    print("GFLOPs: 2 for every multiply-add; guidance doubles all but a Sphere Latent Encoder's one decode")


def documented(function):
    """{name: (type, default, help)} of the arguments that have a default and a line in the docstring."""
    lines = dict(re.findall(r"^    (\w+)  +(.*)$", function.__doc__, re.M))
    return {name: (type(p.default), p.default, lines[name])
            for name, p in inspect.signature(function).parameters.items()
            if name in lines and p.default != p.empty}


@errors_in_one_line("train.py")
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    name = next((after for word, after in zip(argv, argv[1:]) if word == "--preset"), "digits")
    parser = argparse.ArgumentParser("train.py", "train.py [options]; --help lists them", __doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    parser.add_argument("--preset", choices=PRESETS, metavar="NAME", help="settings to start from (digits)")
    parser.add_argument("--out", type=Path, help="folder of the run (out/NAME)")
    parser.add_argument("--evaluate", metavar="CHECKPOINT", help="print the quality of its samples, and stop")
    parser.add_argument("--list", action="store_true", help="print all presets with sizes and cost, and stop")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write --count images there, and stop")
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Preset), re.M))
    defaults = PRESETS.get(name, DIGITS)
    settings = {f.name: (f.type, getattr(defaults, f.name), comments[f.name]) for f in fields(Preset)}
    for title, options in (("training", documented(train)), ("evaluation", documented(quality)),
                           (f"settings; in brackets those of {name}", settings)):
        group = parser.add_argument_group(title)
        for option, (kind, default, text) in options.items():
            how = {bool: {"action": argparse.BooleanOptionalAction},
                   dict: {"type": name_value, "nargs": "+", "metavar": "NAME=VALUE"}}.get(
                       kind, {"type": kind if kind in (int, float, str) else literal, "metavar": "X"})
            group.add_argument("--" + option.replace("_", "-"), help=f"{text} ({default})", **how)

    given = vars(parser.parse_args(argv))                   # only what was given
    changes, judged = ({option: given.pop(option) for option in options if option in given}
                       for options in (settings, documented(quality)))
    if "sampling" in changes:
        changes["sampling"] = dict(changes["sampling"])
    name = given.pop("preset", None)
    preset, out = PRESETS[name or "digits"], given.pop("out", Path("out", name or "digits"))
    if given.pop("list", False):
        list_presets()
    elif folder := given.pop("export", None):
        export(replace(preset, **changes), folder, judged.get("count"))
    elif path := given.pop("evaluate", None):
        if wrong := {*changes, *given} - {"sampling", "data", "seed", "device", "use_ema"}:
            raise ValueError(f"--evaluate takes its settings from the checkpoint; drop {min(wrong)}")
        rows = evaluate(path, **given, **judged, **changes.pop("sampling", {}), **changes)
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        if process_rank()[0] == 0:
            print(f"{path}\n{'':20}" + "".join(f"{column:>15}" for column in columns))
            for row, cells in rows.items():
                print(f"{row:20}" + "".join(f"{cells[c]:15.4f}" if c in cells else " " * 15 for c in columns))
    elif judged and not given.get("evaluate_every"):
        raise ValueError(f"--{min(judged)} belongs to --evaluate and --evaluate-every; "
                         f"the length of a training is --iterations or --epochs")
    else:
        if given.get("resume") and (out / "last.pt").exists():
            stored = read_checkpoint(out / "last.pt", "optimizer")
            preset = preset if name else Preset(**stored["preset"])
            given.setdefault("seed", stored["seed"])
        if changes.keys() & {"epochs", "iterations"}:       # the length given replaces the preset's
            changes = {"epochs": 0.0, "iterations": 0} | changes
        train(replace(preset, **changes), out, **given, evaluation=judged)


if __name__ == "__main__":
    main()
