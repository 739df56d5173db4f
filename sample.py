"""Sampling: Algorithm 1 of both papers, with guidance; editing. SE Sec. 2.4, 4-6, App. C.1, C.6; SLE 4.4.

    python sample.py --checkpoint out/digits/last.pt --out out/samples --steps 4
    python sample.py --checkpoint out/digits/last.pt --out out/sevens --classes 7 --cfg 1.5 --singles
    python sample.py interpolate --out out/lines --classes 3,8 --frames 9 --gif
    python sample.py crossover --out out/cross --images a.png b.png --mask diagonal

A first word says what to draw, generate if there is none; `python sample.py WORD --help` lists its options.
"""

import argparse
import json
import math
import os
import pickle
import sys
import zipfile
from inspect import signature
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from fid import read_image, to_uint8
from models import (RAE, SiT, SphereEncoder, SphereTokenizer, convert_official, convert_official_config,
                    weights_digest)
from spherify import (add_noise, angle_to_sigma, sample_noise, slerp, spherify, step_schedule,
                      truncate_noise)

POSITIONS = ("encoder", "decoder", "combo")
KINDS = {"sphere-encoder": SphereEncoder, "sphere-latent-encoder": SiT}
CHECKPOINT_KEYS = {"kind", "config", "class_names", "use_ema", "model", "ema", "optimizer", "step", "seed",
                   "preset", "images"}


@torch.no_grad()
def generate(model, y, steps, cfg=1.0, *, alpha=None, gamma=0.0, shared=True, position="combo", bound=None,
             seed=0, first=0, e=None, official=False):
    """Images from random points of the sphere, in T steps. SE Alg. 1.

    model     SphereEncoder
    y         [B] int64, classes 0..K; K is the null class, the only one of an unconditional model
    steps     T >= 1: one decode, then T - 1 times encode, add noise, decode
    cfg       guidance scale s >= 0; 1 is no guidance, and then no second pass
    alpha     degrees, angle of the largest noise; None is the model's own, that of its training
    gamma     decay of the noise over the steps, SE Eq. 13; 0 keeps it fixed (the paper's best)
    shared    one noise vector per image for all steps, the first included (the paper's best), or a fresh one
              at every step
    position  guide the latent ("encoder"), the pixels ("decoder") or both, each with sqrt(s) ("combo"). SE
              App. C.1
    bound     truncate the noise of the first step to [-bound, bound]; None leaves it Gaussian. SE App. C.6.
              Later steps keep the whole one, shared or not (assumed: it would be shorter than sigma says)
    seed      image k of the call is sample first + k of this seed, a function of (seed, first + k) alone
    e         [B, N, d] noise in place of the seeded one; one of these per draw, stacked, if there are several
    official  as the official code, where it departs from the paper: shared noise is shared by steps 2..T only
              (two draws), and a decay of gamma 1 ends at 1 / T
    returns   [B, 3, H, W] in [-1, 1], on the model's device

    y may also be mixed classes, floats [B, K + 1]: how much of each class vector; see interpolate.
    Raises ValueError for a class, step count, scale, angle, seed or noise out of range.
    """
    y = _checked_classes(model, y)
    s_encoder, s_decoder = _guidance_scales(cfg, position, conditional=model.num_classes > 0)
    sigma_max = angle_to_sigma(model.alpha_max if alpha is None else alpha)
    r = step_schedule(steps, gamma, official)
    e = _noise_of_steps(model, y, steps, shared, official, seed, first, e, bound)             # [T, B, N, d]
    v = spherify(e[0])
    x = _guided(model.decode, v, y, s_decoder).clamp(-1, 1)     # as the official code clamps after guidance
    for t in range(2, steps + 1):
        x = _pass(model, x, y, r[t - 2].item() * sigma_max, e[t - 1], s_encoder, s_decoder)
    return x


def _pass(model, x, y, sigma, e, s_encoder=1, s_decoder=1):
    """One step of SE Alg. 1 from an image: encode, project, add noise, decode."""
    v = add_noise(spherify(_guided(model.encode, x, y, s_encoder)), sigma, e)
    return _guided(model.decode, v, y, s_decoder).clamp(-1, 1)


def _guided(network, inputs, y, s):
    output = network(inputs, y)
    if s == 1:
        return output
    null = network(inputs, None)
    return null + s * (output - null)


@torch.no_grad()
def generate_latent(denoiser, y, steps, cfg=1.0, *, alpha=None, gamma=None, shared=None, bound=None,
                    project_last=False, seed=0, first=0, e=None, official=False):
    """Images from random points of the sphere, in T steps within the latent space and one decode. SLE Alg. 1.

    denoiser  SiT with a tokenizer
    y, steps, cfg, alpha, bound, seed, first, e, official  as in generate; guidance acts at every step
    gamma     decay of the noise over the steps, SE Eq. 13; None is the denoiser's own, that of its preset
    shared    one noise vector per image for all steps, or a fresh one at every step; None likewise
    project_last  decode f(z_hat) of the last step instead of z_hat itself (the model card's "raw final step")
    returns   [B, 3, H, W] in [-1, 1], on the denoiser's device

    Raises ValueError for a class, step count, scale, angle, seed or noise out of range, or without tokenizer.
    """
    if denoiser.tokenizer is None:
        raise ValueError("generate_latent needs a denoiser with a tokenizer; attach one")
    y = _checked_classes(denoiser, y)
    _guidance_scales(cfg, "combo", conditional=denoiser.num_classes > 0)
    sigma_max = angle_to_sigma(denoiser.alpha_max if alpha is None else alpha)
    shared = denoiser.shared if shared is None else shared
    r = step_schedule(steps, denoiser.gamma if gamma is None else gamma, official)
    e = _noise_of_steps(denoiser, y, steps, shared, official, seed, first, e, bound)          # [T, B, N, d]

    z = e[0]                                                # line 2
    for t in range(1, steps + 1):
        v = spherify(z)                                     # line 5
        z_hat = _guided(denoiser, v, y, cfg)                # line 6
        if t < steps:
            sigma = r[t - 1].item() * sigma_max             # line 7
            z = spherify(z_hat) + sigma * e[t]              # lines 9 and 10
    return denoiser.tokenizer.decode(spherify(z_hat) if project_last else z_hat).clamp(-1, 1)


def sampler(model):
    """generate or generate_latent, whichever draws from the model."""
    return generate_latent if isinstance(model, SiT) else generate


@torch.no_grad()
def reconstruct(model, x, y=None):
    """D(f(E(x))): encode, project, decode, no noise. SE Eq. 1-2. Of a denoiser: D(E(x)) of its tokenizer.

    x        [B, 3, H, W] in [-1, 1], on the model's device
    y        [B] int64 or None for the null class, the paper's default for reconstruction
    returns  [B, 3, H, W] in [-1, 1]
    """
    if isinstance(model, SiT):
        return model.tokenizer.decode(model.tokenizer.encode(x))
    return model.decode(to_sphere(model, x, y), y)


@torch.no_grad()
def to_sphere(model, x, y=None):
    """v = f(E(x, y)), SE Eq. 1: where images lie on the sphere. Of a denoiser: f(z), its tokenizer's latent.

    x, y     as in reconstruct
    returns  [B, N, d], norm sqrt(L)
    """
    return spherify(model.tokenizer.encode(x) if isinstance(model, SiT) else model.encode(x, y))


# ---- Editing -----------------------------------------------------------------------------------------------


@torch.no_grad()
def interpolate(model, y, mixing, steps, cfg=1.0, *, spherical=False, seed=0, first=0, **options):
    """Images between random points of the sphere: of a line, or of a square between four corners. SE Fig. 6.

    model    SphereEncoder, or SiT with a tokenizer
    y        [C] classes of the C corners; corner k begins at the noise of sample first + k of the seed
    mixing   [F, C] how much of each corner is in a frame; rows sum to 1. See line and square
    spherical  go along the great circle through two corners (C = 2) instead of the chord, at constant speed;
             classes are mixed linearly in any case
    options  as in generate or generate_latent, but for shared and e
    returns  [F, 3, H, W] in [-1, 1]

    Noise and class vectors are mixed, so that a frame of one corner alone begins at that corner's point. The
    noise of later steps is that of corner 0 in every frame: frames differ by latent and class only.
    Raises ValueError for numbers of corners that do not fit, and as generate does.
    """
    y = _checked_classes(model, y)
    mixing = torch.as_tensor(mixing, dtype=torch.float32)                                          # [F, C]
    if mixing.ndim != 2 or mixing.shape[1] != len(y) or spherical and len(y) != 2:
        raise ValueError(f"mixing must be [frames, corners] with one class per corner"
                         f"{' and two corners on a great circle' if spherical else ''}, got "
                         f"{list(mixing.shape)} and {len(y)} classes")
    e = sample_noise(seed, first, len(y), model.latent_shape)[0]                                # [C, N, d]
    if spherical:
        v0, v1 = (spherify(corner).expand(len(mixing), -1, -1) for corner in e.split(1))
        start = slerp(v0, v1, mixing[:, 1])
    else:
        start = torch.einsum("fc,cnd->fnd", mixing, e)
    later = e[:1].expand(steps - 1, len(mixing), -1, -1)
    classes = torch.nn.functional.one_hot(y, model.num_classes + 1).float()                     # [C, K + 1]
    return sampler(model)(model, mixing.to(y.device) @ classes, steps, cfg, shared=False,
                          e=torch.cat([start[None], later]), **options)


def line(frames):
    """Mixing [frames, 2] of two corners at equal steps, both ends included."""
    weight = torch.linspace(0, 1, frames)[:, None]
    return torch.cat([1 - weight, weight], dim=1)


def square(side):
    """Bilinear mixing [side^2, 4] of the corners top left, top right, bottom left, bottom right, by rows."""
    along = line(side)
    return torch.einsum("ra,cb->rcab", along, along).reshape(side * side, 4)


@torch.no_grad()
def edit(model, x, y, steps, cfg=1.0, *, r=1.0, gamma=0.0, alpha=None, shared=True, position="combo", seed=0,
         first=0):
    """Pass images T times through encoder and decoder, with noise. SE Sec. 5.

    model    SphereEncoder
    x        [B, 3, H, W] in [-1, 1]
    y        [B] classes to decode (and encode) to
    steps    T passes; one pass is an edit of x already
    r        relative strength of the noise, of the largest angle; it falls as r step_schedule(T + 1, gamma)
    others   as in generate
    returns  [T + 1, B, 3, H, W]: x, and the image after every pass
    Raises ValueError as generate does, and for r outside [0, 1] or another shape of x.
    """
    y = _checked_classes(model, y)
    if not isinstance(model, SphereEncoder):
        raise ValueError("editing passes images through encoder and decoder at every step: it needs the "
                         "checkpoint of a Sphere Encoder")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps}")
    if not 0 <= r <= 1:
        raise ValueError(f"r must lie in [0, 1], got {r}")
    if list(x.shape) != [len(y), 3, *model.image_size]:
        raise ValueError(f"expected images [{len(y)}, 3, {model.image_size[0]}, {model.image_size[1]}], got "
                         f"{list(x.shape)}")
    scales = _guidance_scales(cfg, position, conditional=model.num_classes > 0)
    sigmas = r * angle_to_sigma(model.alpha_max if alpha is None else alpha) * step_schedule(steps + 1, gamma)
    e = _noise_of_steps(model, y, steps, shared, False, seed, first, None)                    # [T, B, N, d]
    images = [x.to(y.device)]
    for sigma, noise in zip(sigmas.tolist(), e):
        images.append(_pass(model, images[-1], y, sigma, noise, *scales))
    return torch.stack(images)


def manipulate(model, x, classes, steps=4, **options):
    """An image from outside the data, drawn as each of several classes: r = 1, gamma = 0. SE Sec. 5, Fig. 8.

    x        [3, H, W] in [-1, 1];  classes  [C];  options  as in edit
    returns  [T + 1, C, 3, H, W]: the image, and what it became after every pass
    """
    classes = torch.as_tensor(classes)
    return edit(model, x.expand(len(classes), -1, -1, -1), classes, steps, **options)


def crossover(model, a, b, y=None, steps=10, mask="left-right", *, r=0.25, gamma=1.0, **options):
    """Two images stitched together, then passed through the model until they are one. SE Sec. 5, Fig. 9.

    a, b     [B, 3, H, W] in [-1, 1]
    y        [B] classes; None is the null class
    mask     a name of stitching_mask, or [H, W] in [0, 1]: 1 where a is taken
    options  as in edit, whose r and gamma are the paper's here
    returns  [T + 1, B, 3, H, W]: the stitched image, and what it became after every pass
    """
    if isinstance(mask, str):
        mask = stitching_mask(mask, *a.shape[-2:])
    if mask.shape != a.shape[-2:]:
        raise ValueError(f"the mask must be {list(a.shape[-2:])}, got {list(mask.shape)}")
    mask = mask.to(a)
    y = torch.full((len(a),), model.num_classes) if y is None else y
    return edit(model, mask * a + (1 - mask) * b, y, steps, r=r, gamma=gamma, **options)


MASKS = ("left-right", "top-bottom", "diagonal", "anti-diagonal")


def stitching_mask(name, H, W):
    """Mask [H, W], 1 in the first half: left, top, below the diagonal, or above the other one.

    Raises ValueError for a name that is not in MASKS.
    """
    if name not in MASKS:
        raise ValueError(f"a mask is one of {', '.join(MASKS)} or an image file, got {name!r}")
    row, column = (torch.arange(H)[:, None] + 0.5) / H, (torch.arange(W)[None] + 0.5) / W
    inside = {"left-right": column < 0.5 + 0 * row, "top-bottom": row < 0.5 + 0 * column,
              "diagonal": row > column, "anti-diagonal": row + column < 1}
    return inside[name].float()


def _checked_classes(model, y):
    device, K = next(model.parameters()).device, model.num_classes
    y = torch.as_tensor(y, device=device)
    if y.ndim == 2 and y.is_floating_point() and y.shape[1] == K + 1:
        return y                                            # mixed classes
    if y.ndim != 1 or len(y) < 1 or y.is_floating_point() or not bool(((y >= 0) & (y <= K)).all()):
        raise ValueError(f"y must be a list of classes 0..{K} ({K} is the null class), got {y.tolist()}")
    return y


def _noise_of_steps(model, y, steps, shared, official, seed, first, e, bound=None):
    """The noise of every step [T, B, N, d]: seeded or given, one draw per step or one for several."""
    draws = min(steps, 2 if official else 1) if shared else steps
    if e is None:
        e = sample_noise(seed, first, len(y), model.latent_shape, draws)
    e = (e[None] if e.ndim == 3 else e).to(y.device)                                       # [draws, B, N, d]
    expected = [draws, len(y), *model.latent_shape]
    if list(e.shape) != expected:
        raise ValueError(f"e must be {expected[draws == 1:]}, got {list(e.shape)}")
    e = e[torch.arange(steps).clamp(max=draws - 1)]
    if bound is not None:
        e[0] = truncate_noise(e[0], bound)
    return e


def _guidance_scales(cfg, position, conditional):
    if position not in POSITIONS:
        raise ValueError(f"position must be one of {', '.join(POSITIONS)}, got {position!r}")
    if not 0 <= cfg < math.inf:
        raise ValueError(f"cfg must be a number of at least 0 (1 is no guidance), got {cfg}")
    if cfg != 1 and not conditional:
        raise ValueError(f"cfg {cfg} needs a conditional model; this one has no classes to guide towards")
    return {"encoder": (cfg, 1), "decoder": (1, cfg), "combo": (math.sqrt(cfg), math.sqrt(cfg))}[position]


# ---- Checkpoints -------------------------------------------------------------------------------------------


def read_checkpoint(path):
    """The dictionary that train.py wrote; its tensors stay on disk until they are used.

    Raises FileNotFoundError or ValueError, naming the path, if it is missing, damaged or not such a file.
    """
    checkpoint = _read(path)
    whole = isinstance(checkpoint, dict) and CHECKPOINT_KEYS <= checkpoint.keys()
    if not whole or checkpoint["kind"] not in KINDS:
        raise ValueError(f"{path}: a file of tensors, but not a checkpoint written by train.py (one of the "
                         f"official code needs its cfg.json: --config)")
    return checkpoint


def save_checkpoint(path, checkpoint):
    """Write beside, flush to disk, read back, rename: at every moment a whole checkpoint bears the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    read_checkpoint(beside)                             # checks what stands on the disk
    os.replace(beside, path)


def load(path, device="cpu", ema=None, config=None, rae=None):
    """The model of a checkpoint, rebuilt from the file alone (and the RAE's own files, if it needs them).

    path     written by train.py
    ema      use the averaged weights or the plain ones; None is the choice stored in the checkpoint
    config   cfg.json, if the checkpoint is one of the official code; then None means the plain weights, with
             which the official code samples
    rae      arguments of models.RAE that replace those stored, such as the places of its files
    returns  SphereEncoder, or SiT with its tokenizer, in eval mode, with `class_names` (one per class; empty
             if unconditional)
    Raises FileNotFoundError or ValueError, naming the path.
    """
    model = build_official(path, config, ema) if config else build(read_checkpoint(path), path, ema, rae)
    return model.to(device)


def build(checkpoint, path, ema=None, rae=None):
    """The model of a checkpoint that was read from a path; see load."""
    model = _assembled(KINDS[checkpoint["kind"]], path, checkpoint["config"],
                       checkpoint["ema" if (checkpoint["use_ema"] if ema is None else ema) else "model"],
                       checkpoint["class_names"])
    if isinstance(model, SiT):
        model.attach(build_tokenizer(checkpoint.get("tokenizer"), path, rae))
    return model


def stored_tokenizer(tokenizer):
    """What a checkpoint holds of a tokenizer: all of a Sphere Encoder, the places and digest of an RAE."""
    if isinstance(tokenizer, RAE):
        return {"kind": "rae", "config": tokenizer.config, "sha256": weights_digest(tokenizer)}
    return {"kind": "sphere-encoder", "config": tokenizer.model.config,
            "weights": tokenizer.model.state_dict()}


def build_tokenizer(stored, path, rae=None):
    """The tokenizer that a checkpoint's entry describes; see load. ValueError if the RAE is another one."""
    if not isinstance(stored, dict) or stored.get("kind") not in ("rae", "sphere-encoder"):
        raise ValueError(f"{path}: it holds no tokenizer for its denoiser; use another copy")
    if stored["kind"] == "sphere-encoder":
        return SphereTokenizer(_assembled(SphereEncoder, path, stored["config"], stored["weights"], []))
    tokenizer = RAE(**stored["config"] | (rae or {}))
    if weights_digest(tokenizer) != stored["sha256"]:
        files = ", ".join(str(value) for value in stored["config"].values() if value)
        raise ValueError(f"{path} was trained on the latents of another RAE; name the files of that one "
                         f"({files})")
    return tokenizer


def build_official(path, config, ema=None):
    """The model of a checkpoint of the official code; see load."""
    try:
        cfg = json.loads(Path(config).read_text())
        arguments = convert_official_config(cfg)
    except FileNotFoundError:
        raise FileNotFoundError(f"{config}: no such file; --config names the cfg.json that stands beside the "
                                f"checkpoint's folder") from None
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{config}: not a cfg.json of the official code ({error})") from None
    checkpoint = _read(path)
    wanted = "ema_model" if ema else "model"
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(wanted), dict):
        raise ValueError(f"{path}: not a checkpoint of the official code, it holds no weights {wanted!r}")
    try:
        weights = convert_official(checkpoint[wanted])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    names = [str(k) for k in range(arguments["num_classes"])]
    return _assembled(SphereEncoder, path, arguments, weights, names)


def _assembled(network, path, arguments, weights, class_names):
    try:
        model = network(**arguments)
        model.load_state_dict(weights)
    except (TypeError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: its weights do not fit the model that its settings describe "
                         f"({reason})") from None
    model.class_names = class_names
    return model.eval()


def _read(path):
    """What torch.save wrote into a file; see read_checkpoint."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; train one with train.py, or correct the path")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()                 # torch.load does not look at the checksums
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not a readable checkpoint ({reason[:120]})") from None
    if damaged:
        raise ValueError(f"{path}: damaged, {damaged} in it fails its checksum; use another copy")
    return content


# ---- Pictures ----------------------------------------------------------------------------------------------


def picture(panels, row_names=None, captions=None):
    """Panels of images side by side, as one labelled PIL image.

    panels     {title: [rows, columns, 3, H, W]} in [-1, 1]
    row_names  one word per row, written at the left
    captions   one word per image of the (single) panel, row by row, written over it
    """
    font = ImageFont.load_default(size=14)
    H, W = next(iter(panels.values())).shape[-2:]
    zoom = max(1, round(48 / max(H, W)))                                       # small images are shown larger
    left = 12 + int(max((font.getlength(name) for name in row_names or []), default=0))
    title_height, caption_height, gap = 26, 18 if captions else 0, 16
    cell_height, cell_width = H * zoom + 2 + caption_height, W * zoom + 2
    rows = max(len(images) for images in panels.values())
    widths = [max(images.shape[1] * cell_width, int(font.getlength(title)))
              for title, images in panels.items()]
    size = (left + sum(widths) + gap * len(panels), title_height + rows * cell_height + 8)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for row, name in enumerate(row_names or []):
        middle = title_height + row * cell_height + cell_height // 2
        draw.text((left - 6, middle), name, "black", font, anchor="rm")
    x0 = left
    for (title, images), width in zip(panels.items(), widths):
        draw.text((x0, 5), title, "black", font)
        for row, column in ((row, column) for row in range(len(images)) for column in range(images.shape[1])):
            x, y = x0 + column * cell_width, title_height + row * cell_height
            if captions:
                draw.text((x, y), captions[row * images.shape[1] + column], "black", font)
            enlarged = to_pil(images[row, column]).resize((W * zoom, H * zoom), Image.NEAREST)
            canvas.paste(enlarged, (x, y + caption_height))
        x0 += width + gap
    return canvas


def sphere_picture(points):
    """Points on the unit sphere in 3-D, as a matplotlib figure; SE Fig. 7.

    points  {title: [n, 3]}, one sphere each; of more than 2,000 points the first are drawn
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(2.6 * len(points), 2.9))
    figure.subplots_adjust(0, 0, 1, 0.86, wspace=0)
    angle = torch.linspace(0, 2 * math.pi, 60)
    for place, (title, cloud) in enumerate(points.items(), 1):
        axes = figure.add_subplot(1, len(points), place, projection="3d")
        for z in (-0.6, 0.0, 0.6):                                              # circles of latitude
            radius = math.sqrt(1 - z**2)
            axes.plot(radius * angle.cos(), radius * angle.sin(), z, color="0.8", linewidth=0.6)
        x, y, z = cloud[:2000].T
        axes.scatter(x, y, z, s=3, color="tab:blue")                            # paler where further away
        axes.set_title(f"{title}\n{len(cloud[:2000])} points", fontsize=10)
        axes.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1))
        axes.set_box_aspect((1, 1, 1), zoom=1.6)
        axes.set_axis_off()
    return figure


def project_to_3d(v, seed=0):
    """Points of the sphere [n, N, d] -> unit vectors [n, 3] by a random Gaussian matrix, as SE Sec. 4."""
    gaussian = torch.randn(v[0].numel(), 3, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(v.flatten(1).cpu() @ gaussian, dim=1)


def steps_label(T):
    return f"{T} step{'s' * (T > 1)}"


def image_transform(size):
    """Transform of a PIL image to uint8 [3, H, W]: shorter side resized (bicubic), centre cropped."""
    from torchvision import transforms
    return transforms.Compose([
        transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(size),
        transforms.PILToTensor(),
    ])


def open_images(paths, size):
    """Image files of any kind and size -> [B, 3, H, W] in [-1, 1]; see image_transform and fid.read_image."""
    side = max(size)
    transform = image_transform(side)
    images = torch.stack([transform(read_image(path)) for path in paths])
    H, W = size
    top, left = (side - H) // 2, (side - W) // 2
    return to_float(images[..., top:top + H, left:left + W])


def to_float(images):
    """Images uint8 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_pil(x):
    """One image [3, H, W] in [-1, 1] -> PIL image."""
    return Image.fromarray(to_uint8((x + 1) / 2).permute(1, 2, 0).cpu().numpy())


# ---- Command line ------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line, and no option may be abbreviated."""

    def __init__(self, prog, doc):
        super().__init__(prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def pick_device(name):
    """Device of a name; of None, the GPU if there is one. Raises ValueError if it cannot be used."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        probe = torch.zeros(1, device=name)
        probe.item()
        return probe.device                             # "cuda" became "cuda:0"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used here ({str(error).splitlines()[0][:80]})") from None


RAE_OPTIONS = {"dinov2_repo": "repo", "dinov2_weights": "encoder_weights", "rae_decoder": "decoder_weights",
               "rae_statistics": "statistics"}


def add_rae_options(parser):
    """Options for the places of the RAE's files, named in RAE_OPTIONS as arguments of models.RAE."""
    files = parser.add_argument_group("files of the RAE, where torch.hub cannot or should not find them")
    files.add_argument("--dinov2-repo", metavar="FOLDER", help="copy of github.com/facebookresearch/dinov2")
    files.add_argument("--dinov2-weights", metavar="FILE", help="dinov2_vitb14_reg4_pretrain.pth")
    files.add_argument("--rae-decoder", metavar="FILE", help="its decoder, model.pt")
    files.add_argument("--rae-statistics", metavar="FILE", help="of its latents, stat.pt")


def rae_arguments(given):
    """Arguments of models.RAE from a dictionary of options."""
    return {argument: given[name] for name, argument in RAE_OPTIONS.items() if given.get(name) is not None}


def ints(text):
    return tuple(int(word) for word in text.split(","))


def floats(text):
    return tuple(float(word) for word in text.split(","))


OPTIONS = {
    "--count": dict(type=int, default=80, help="number of images"),
    "--classes": dict(type=ints, help="classes in turn, e.g. 3,5; K is the null class (default all)"),
    "--class": dict(type=int, dest="klass", metavar="CLASS", help="(default: the null class)"),
    "--images": dict(nargs="+", metavar="FILE", required=True, help="image files of any kind and size"),
    "--mask": dict(default=MASKS[0], help=f"{', '.join(MASKS)}, or an image file, white where the first "
                                          f"image is taken"),
    "--rows": dict(type=int, default=5, help="number of lines, one below the other"),
    "--frames": dict(type=int, default=8, help="images per line, or per side of the square"),
    "--square": dict(action="store_true", help="bilinearly between four points"),
    "--spherical": dict(action="store_true", help="along great circles instead of chords"),
    "--gif": dict(action="store_true", help="also as an animation"),
    "--steps": dict(type=int, default=4, help="T of Algorithm 1, or passes of an edit"),
    "--cfg": dict(type=float, default=1.0, help="guidance scale, 1 = off"),
    "--position": dict(choices=POSITIONS, help="where a Sphere Encoder is guided (default combo)"),
    "--scales": dict(type=floats, default=(0.5, 1, 1.5, 2, 4), help="guidance scales, a column each"),
    "--bound": dict(type=float, help="truncate the normal noise of the start to +-BOUND, App. C.6 "
                                     "(default: no bound)"),
    "--r": dict(type=float, help="strength of the noise, 0 to 1 (default crossover 0.25, manipulate 1)"),
    "--gamma": dict(type=float, help="decay of the noise, Eq. 13; 0 = fixed (default crossover 1, else 0; "
                                     "Sphere Latent Encoder: as the preset says)"),
    "--fresh": dict(action=argparse.BooleanOptionalAction,
                    help="fresh noise at every step instead of the same one (default likewise)"),
    "--alpha": dict(type=float, help="degrees, largest noise angle (default: the training's)"),
    "--project-last": dict(action="store_true",
                           help="Sphere Latent Encoder: project the last prediction before it is decoded"),
    "--official": dict(action="store_true", help="share noise from step 2 on, end the decay at 1/T: as the "
                                                 "official code does"),
    "--singles": dict(action="store_true", help="also write every image as a PNG of its own size"),
    "--batch-size": dict(type=int, default=100, help="images at a time"),
}
HOW = "--steps --cfg --position --gamma --alpha"


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    word = argv.pop(0) if argv and argv[0] in WORDS else "generate"
    draw, options, about = WORDS[word]
    parser = Parser("sample.py", f"{__doc__}\n{word}: {about}\n")
    parser.add_argument("--checkpoint", default="out/digits/last.pt",
                        help="written by train.py (%(default)s)")
    parser.add_argument("--config", help="cfg.json of the official code, for a checkpoint of its own")
    parser.add_argument("--out", default="out/samples", help="folder for the pictures (%(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="image i depends on (seed, i) alone (%(default)s)")
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction,
                        help="averaged weights (default as the preset says)")
    parser.add_argument("--device", help="default cuda if there is one, else cpu")
    for name in options.split():
        settings = dict(OPTIONS[name])
        if default := settings.get("default"):
            settings["help"] += f" ({','.join(map(str, default)) if isinstance(default, tuple) else default})"
        parser.add_argument(name, **settings)
    if word == "crossover":
        parser.set_defaults(steps=10)
    add_rae_options(parser)
    args = parser.parse_args(argv)
    try:
        for name in ("count", "batch_size", "rows", "frames", "steps"):
            if getattr(args, name, 1) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
        out = Path(args.out)
        if any(any(out.glob(name)) for name in ("samples.png", "samples.gif", "[0-9]*.png")):
            raise ValueError(f"{out} already holds samples; choose another --out, or remove them")
        model = load(args.checkpoint, pick_device(args.device), args.ema, args.config,
                     rae_arguments(vars(args)))
        draw(args, model, out)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; what {args.out} holds is incomplete\n")


HOW_NAMES = ("alpha", "gamma", "fresh", "position", "bound", "r", "project_last", "official")


def options_for(function, given):
    """Those of HOW_NAMES that were given, as arguments of a sampler; refuses one that it does not take."""
    options = {name: given[name] for name in HOW_NAMES if given.get(name) is not None}
    options = {name: value for name, value in options.items() if value is not False or name == "fresh"}
    if "fresh" in options:
        options["shared"] = not options.pop("fresh")
    for name in options.keys() - signature(function).parameters.keys():
        raise ValueError(f"--{name.replace('_', '-')} is no option for this kind of model; drop it")
    return options


def options_of(function, args):
    return {"seed": args.seed, **options_for(function, vars(args))}


def classes_of(args, model):
    """The classes given, or all."""
    K = model.num_classes
    if args.classes and not K:
        raise ValueError(f"--classes: {args.checkpoint} is an unconditional model")
    classes = args.classes or list(range(max(K, 1)))
    if not all(0 <= c <= K for c in classes):
        raise ValueError(f"--classes must be numbers from 0 to {K} ({K} is the null class), got {classes}")
    return classes


def few(args, model):
    """Classes of at most 10 samples, for a picture with a row each."""
    classes = classes_of(args, model)
    return torch.tensor([classes[i % len(classes)] for i in range(min(args.count, 10))])


def names_of(model):
    return [*model.class_names, "null"] if model.num_classes else [""]


def write_singles(images, out, start=0):
    out.mkdir(parents=True, exist_ok=True)
    for k, image in enumerate(images, start):
        to_pil(image).save(out / f"{k:06d}.png")


def write(image, path, what):
    path.parent.mkdir(parents=True, exist_ok=True)      # only now: a bad option leaves no folder behind
    image.save(path)
    print(f"{path}: {what}")


def draw_samples(args, model, out):
    classes, names, options = classes_of(args, model), names_of(model), options_of(sampler(model), args)
    # Balanced, and y[i] depends on i alone.
    y = torch.tensor([classes[i % len(classes)] for i in range(args.count)])
    shown = []
    for start in tqdm(range(0, args.count, args.batch_size), desc="sampling", unit="batch", disable=None):
        x = sampler(model)(model, y[start:start + args.batch_size], args.steps, args.cfg, first=start,
                           **options).cpu()
        if args.singles:
            write_singles(x, out, start)
        shown.extend(x[:max(0, 256 - len(shown))])                            # a grid of more is not readable

    title = f"{steps_label(args.steps)}, cfg {args.cfg:g}, seed {args.seed}"
    by_class = 1 < len(classes) <= 16                                    # then a row per class, else captions
    columns = min(len(shown), len(classes) if by_class else math.ceil(math.sqrt(len(shown))))
    white = [torch.ones_like(shown[0])] * (-len(shown) % columns)               # fills the last row
    images = torch.stack(shown + white).unflatten(0, (-1, columns))             # [rows, columns, 3, H, W]
    if by_class:
        drawn = picture({title: images.transpose(0, 1)}, row_names=[names[c] for c in classes[:columns]])
    else:
        captions = [names[c] for c in y[:len(shown)].tolist()] + [""] * len(white)
        drawn = picture({title: images}, captions=captions if model.num_classes else None)
    write(drawn, out / "samples.png", f"{len(shown)} of {args.count} samples")
    if args.singles:
        print(f"{out}/000000.png .. {args.count - 1:06d}.png: one file per sample")


def draw_steps(args, model, out):
    y, options = few(args, model), options_of(sampler(model), args)
    scales = {"no guidance": 1.0} | ({f"cfg {args.cfg:g}": args.cfg} if args.cfg != 1 else {})
    panels = {f"{name}, 1 to {args.steps} steps": torch.stack(
        [sampler(model)(model, y, T, scale, **options) for T in range(1, args.steps + 1)], dim=1)
        for name, scale in scales.items()}
    write(picture(panels, [names_of(model)[c] for c in y.tolist()]), out / "samples.png",
          f"a column per number of steps, 1 to {args.steps}")


def draw_guidance(args, model, out):
    y = few(args, model)
    positions = {"": {}} if isinstance(model, SiT) else {name: {"position": name} for name in POSITIONS}
    panels = {f"{name} {', '.join(f'{scale:g}' for scale in args.scales)}".strip(): torch.stack(
        [sampler(model)(model, y, args.steps, scale, **position, **options_of(sampler(model), args))
         for scale in args.scales], dim=1) for name, position in positions.items()}
    write(picture(panels, [names_of(model)[c] for c in y.tolist()]), out / "samples.png",
          "a column per guidance scale")


def draw_schemes(args, model, out):
    y, options = few(args, model), options_of(sampler(model), args)
    panels = {f"{decay}, {noise}": torch.stack(
        [sampler(model)(model, y, T, args.cfg, gamma=gamma, shared=shared, **options)
         for T in range(1, args.steps + 1)], dim=1)
        for decay, gamma in (("fixed", 0.0), ("decaying", 1.0))
        for noise, shared in (("shared", True), ("fresh", False))}
    drawn = picture(panels, [names_of(model)[c] for c in y.tolist()])
    write(drawn, out / "samples.png", f"a column per number of steps, 1 to {args.steps}")


def draw_interpolations(args, model, out):
    classes, options = classes_of(args, model), options_of(sampler(model), args)
    corners = 4 if args.square else 2
    mixing = square(args.frames) if args.square else line(args.frames)
    lines = []
    for row in range(1 if args.square else args.rows):
        y = torch.tensor([classes[(corners * row + k) % len(classes)] for k in range(corners)])
        lines.append(interpolate(model, y, mixing, args.steps, args.cfg, spherical=args.spherical,
                                 first=corners * row, **options).cpu())
    images = lines[0].unflatten(0, (args.frames, args.frames)) if args.square else torch.stack(lines)
    write(picture({f"{steps_label(args.steps)}, seed {args.seed}": images}), out / "samples.png",
          "between the corners" if args.square else "from left to right, a line per row")
    if args.singles:
        write_singles(torch.cat(lines), out)
    if args.gif:
        size = [side * max(1, round(96 / max(model.image_size))) for side in model.image_size[::-1]]
        frames = [to_pil(image).resize(size, Image.NEAREST) for image in torch.cat(lines)]
        frames[0].save(out / "samples.gif", save_all=True, append_images=frames[1:], duration=120, loop=0)
        print(f"{out / 'samples.gif'}: {len(frames)} frames")


def class_given(args, model, count):
    if args.klass is None:
        return None
    if not 0 <= args.klass <= model.num_classes or not model.num_classes:
        raise ValueError(f"--class must be a number from 0 to {model.num_classes} of a conditional model, "
                         f"got {args.klass}")
    return torch.full((count,), args.klass, device=next(model.parameters()).device)


def draw_reconstructions(args, model, out):
    x = open_images(args.images, model.image_size).to(next(model.parameters()).device)
    again = reconstruct(model, x, class_given(args, model, len(x)))
    write(picture({"": torch.stack([x, again])}, ["original", "reconstruction"]), out / "samples.png",
          f"{len(x)} images and their reconstructions")
    if args.singles:
        write_singles(again, out)


def draw_crossover(args, model, out):
    if len(args.images) != 2:
        raise ValueError(f"--images: a crossover needs two images, got {len(args.images)}")
    a, b = open_images(args.images, model.image_size).split(1)
    mask = args.mask
    if mask not in MASKS and Path(mask).exists():
        mask = (open_images([mask], model.image_size)[0].mean(0) + 1) / 2
    steps = crossover(model, a, b, class_given(args, model, 1), args.steps, mask, cfg=args.cfg,
                      **options_of(edit, args)).cpu()
    panels = {"A and B": torch.stack([a, b], dim=1), "stitched": steps[:1].transpose(0, 1),
              f"after 1 to {args.steps} passes": steps[1:].transpose(0, 1)}
    write(picture(panels), out / "samples.png", "the two images, and a column per pass")
    if args.singles:
        write_singles(steps[:, 0], out)


def draw_manipulations(args, model, out):
    classes = classes_of(args, model)
    x = open_images(args.images[:1], model.image_size)[0]
    if len(args.images) != 1 or not model.num_classes:
        raise ValueError(f"manipulate needs one image and a conditional model, got {len(args.images)} and "
                         f"{model.num_classes} classes")
    steps = manipulate(model, x, classes, args.steps, cfg=args.cfg, **options_of(edit, args)).cpu()
    panels = {"image": steps[0][:, None], f"after 1 to {args.steps} passes": steps[1:].transpose(0, 1)}
    write(picture(panels, [names_of(model)[c] for c in classes]), out / "samples.png",
          "a row per class, a column per pass")
    if args.singles:
        write_singles(steps[1:].transpose(0, 1).flatten(0, 1), out)


WORDS = {
    "generate": (draw_samples,
                 f"--count --classes {HOW} --fresh --bound --project-last --official --singles --batch-size",
                 "images from random points, SE and SLE Alg. 1"),
    "reconstruct": (draw_reconstructions, "--images --class --singles",
                    "images above what one trip through encoder and decoder makes of them, without noise"),
    "interpolate": (draw_interpolations,
                    f"--classes --rows --frames --square --spherical {HOW} --project-last --gif --singles",
                    "images between random points, their classes mixed too, SE Fig. 6"),
    "crossover": (draw_crossover, f"--images --class --mask --r {HOW} --fresh --singles",
                  "two images stitched together, and what they become pass by pass, SE Fig. 9"),
    "manipulate": (draw_manipulations, f"--images --classes --r {HOW} --fresh --singles",
                   "an image decoded to each of several classes, pass by pass, SE Fig. 8"),
    "steps": (draw_steps, f"--count --classes {HOW} --fresh --bound --project-last",
              "the same points in 1 to T steps, without guidance and with that of --cfg, SE Fig. 5"),
    "guidance": (draw_guidance, "--count --classes --steps --scales --gamma --alpha --fresh --bound",
                 "the same points at several guidance scales; of latents, pixels or both, SE Table 9"),
    "schemes": (draw_schemes, "--count --classes --steps --cfg --position --alpha --bound --project-last",
                "the same points under fixed and decaying, shared and fresh noise, SE Table 6"),
}


if __name__ == "__main__":
    sys.exit(main())
