"""Sampling: Algorithm 1 of both papers, with guidance; editing. SE Sec. 2.4, 4-6, App. C.1, C.6; SLE 4.4.

    python sample.py --checkpoint out/digits/model.pt --out out/sevens --classes 7 --cfg 1.5 --singles
    python sample.py interpolate --out out/lines --classes 3 8 --frames 9 --gif
    python sample.py crossover --out out/cross --images a.png b.png --mask diagonal
"""

import argparse
import inspect
import json
import math
import zipfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torchvision import transforms
from torchvision.utils import make_grid
from tqdm import tqdm

from fid import (Parser, errors_in_one_line, is_first_process, number, pick_device, positive, read_image,
                 to_uint8, whole_file, whole_number)
from models import RAE, SiT, SphereEncoder, SphereTokenizer, convert_official, convert_official_config
from spherify import (add_noise, angle_to_sigma, autocast, sample_noise, spherify, step_schedule,
                      truncate_noise)

# Where guidance acts, as powers of its scale in latents and in pixels. SE App. C.1.
POSITIONS = {
    "encoder": (1, 0),
    "decoder": (0, 1),
    "combo": (0.5, 0.5),
}
MASKS = ("left-right", "top-bottom", "diagonal", "anti-diagonal")           # of a crossover


@torch.no_grad()
def generate(model, y, steps, cfg=1.0, *, alpha=None, gamma=0.0, schedule=None, shared=True, position="combo",
             bound=None, seed=0, first=0, e=None, official=False):
    """Images from random points of the sphere, in T steps. SE Eq. 3, Alg. 1.

    model     SphereEncoder
    y         [B] int64, classes 0..K; K is the null class, the only one of an unconditional model; one class,
              or None, the null class, makes one image. Or floats [B, K + 1], mixing weights over the class
              embeddings; see interpolate
    steps     T >= 1: one decode, then T - 1 times encode, add noise, decode
    cfg       guidance scale s >= 0; 1 is no guidance, and then no second pass
    alpha     degrees, angle of the noise at r = 1; None is the model's own alpha_max
    gamma     decay of the noise over the steps, SE Eq. 13; 0 keeps it fixed (the paper's best)
    schedule  of that decay: "eq13" or "released", see step_schedule; None is "eq13", if official "released"
    shared    one noise vector per image for all steps (assumed to be the paper's best, which shares "e in
              Equation 4", of which step 1 has none; see official), or a fresh one at every step
    position  guide the latent ("encoder"), the pixels ("decoder") or both ("combo"). SE App. C.1
    bound     truncate the noise of the first step to [-bound, bound]. SE App. C.6. Later steps keep the whole
              one, shared or not (assumed: it would be shorter than sigma says)
    seed      image k of the call is sample first + k of this seed, a function of (seed, first + k) alone
    e         [B, N, d] noise in place of the seeded one; one of these per draw, stacked, if there are several
    official  as the official code: its schedule, and only steps 2..T share noise (two draws)
    returns   [B, 3, H, W] in [-1, 1], on the model's device
    Raises ValueError for a class, step count, scale, angle or seed out of range."""
    y, sigmas, e = _start(model, y, steps, cfg, alpha, gamma, schedule, shared, bound, seed, first, e,
                          official)
    scales = _scales(cfg, position)
    x = _guided(model.decode, spherify(e[0]), y, scales[1]).clamp(-1, 1)        # as in the official code
    return _passes(model, x, y, sigmas, e[1:], *scales)[-1]


def _scales(cfg, position):
    """Guidance scales of encoder and decoder. SE App. C.1."""
    if position not in POSITIONS:
        raise ValueError(f"position must be encoder, decoder or combo, got {position!r}")
    return [cfg**power for power in POSITIONS[position]]


def _passes(model, x, y, sigmas, e, s_encoder, s_decoder):
    """Images x, then those of every further step of SE Alg. 1: encode, project, add noise, decode."""
    images = [x]
    for sigma, noise in zip(sigmas, e):
        v = add_noise(spherify(_guided(model.encode, images[-1], y, s_encoder)), sigma, noise)
        images.append(_guided(model.decode, v, y, s_decoder).clamp(-1, 1))
    return images


def _guided(network, inputs, y, s):
    output = network(inputs, y)
    if s == 1:
        return output
    null = network(inputs, None)
    return null + s * (output - null)


@torch.no_grad()
def generate_latent(denoiser, y, steps, cfg=1.0, *, alpha=None, gamma=1.0, schedule="released", shared=True,
                    bound=None, project_last=False, seed=0, first=0, e=None, official=False):
    """Images from random points of the sphere, in T steps within the latent space and one decode. SLE Alg. 1.

    denoiser  SiT with a tokenizer
    others    as in generate; guidance acts at every step. gamma, schedule and shared are assumed, since our
              text lacks them: with "eq13" step T is without noise, where the denoiser has hardly been trained
    project_last  decode f(z_hat) of the last step instead of z_hat itself (the model card's "raw final step")
    returns   [B, 3, H, W] in [-1, 1], on the denoiser's device"""
    y, sigmas, e = _start(denoiser, y, steps, cfg, alpha, gamma, schedule, shared, bound, seed, first, e,
                          official)
    z = e[0]                                                # line 2
    for t in range(1, steps + 1):
        v = spherify(z)                                     # line 5
        z_hat = _guided(denoiser, v, y, cfg)                # line 6
        if t < steps:
            z = spherify(z_hat) + sigmas[t - 1] * e[t]      # lines 7, 9 and 10
    return denoiser.tokenizer.decode(spherify(z_hat) if project_last else z_hat).clamp(-1, 1)


def _start(model, y, steps, cfg, alpha, gamma, schedule, shared, bound, seed, first, e, official):
    """Classes on the model's device, sigma of steps 2..T, noise of all steps [T, B, N, d]."""
    device = next(model.parameters()).device
    K = model.num_classes
    y = torch.atleast_1d(torch.as_tensor(K if y is None else y, device=device))
    if not len(y) or not y.is_floating_point() and ((y < 0) | (y > K)).any():       # floats mix classes
        raise ValueError(f"y must be a list of classes 0..{K}, of which the last is null; got {y.tolist()}")
    if not 0 <= cfg < math.inf or cfg != 1 and not K:
        raise ValueError(f"cfg must be at least 0, and 1 (off) for a model without classes, got {cfg}")
    sigma_max = angle_to_sigma(model.alpha_max if alpha is None else alpha)
    schedule = schedule or ("released" if official else "eq13")
    sigmas = [r * sigma_max for r in step_schedule(steps, gamma, schedule).tolist()]
    draws = steps
    if shared:
        draws = min(steps, 2) if official else 1
    if e is None:
        e = sample_noise(seed, first, len(y), model.latent_shape, draws)
    e = e.to(device).reshape(draws, len(y), *model.latent_shape)
    e = torch.cat([e, e[-1:].expand(steps - draws, -1, -1, -1)])            # later steps share the last draw
    if bound is not None:
        e[0] = truncate_noise(e[0], bound)
    return y, sigmas, e


def sampler(model, **options):
    """generate or generate_latent, whichever draws from the model, with the defaults of its preset and these
    options. Raises ValueError for one that the function does not know."""
    function = generate_latent if isinstance(model, SiT) else generate
    return partial(function, **known({**getattr(model, "sampling", {}), **options}, function))


def known(options, function):
    """These options, if a function takes them all. Raises ValueError that names one that it does not take."""
    unknown = options.keys() - inspect.signature(function).parameters.keys()
    if unknown:
        raise ValueError(f"{function.__name__} takes no {min(unknown)}; drop it")
    return options


@torch.no_grad()
def reconstruct(model, x, y=None):
    """D(f(E(x))): encode, project, decode, no noise. SE Eq. 1-2. For a denoiser, D(E(x)) of its tokenizer.
    x [B, 3, H, W] in [-1, 1], y [B] or None: the null class, the paper's default."""
    x = x.to(next(model.parameters()).device)
    if isinstance(model, SiT):
        return model.tokenizer.decode(model.tokenizer.encode(x))
    return model.decode(spherify(model.encode(x, y)), y)


# ---- Editing -----------------------------------------------------------------------------------------------


@torch.no_grad()
def interpolate(model, y, mixing, steps, cfg=1.0, *, shares=None, seed=0, first=0, **options):
    """Images between random points of the sphere: of a line, a circle, a square of four corners. SE Fig. 6.

    y        [C] classes of the C corners; corner k is sample first + k of the seed, with shared noise
    mixing   [F, C] weights of the corners' noise in a frame; see line, circle and square
    shares   [F, C] of the corners' class vectors, if they are others
    model, options  as in generate or generate_latent, but for shared and e: a frame has one noise for all of
             its steps, the corners' mixed and Gaussian again (weights of norm 1: the same point)
    returns  [F, 3, H, W] in [-1, 1]"""
    mixing = torch.as_tensor(mixing).float().cpu()                                                  # [F, C]
    e = sample_noise(seed, first, len(y), model.latent_shape)[0]                                # [C, N, d]
    e = torch.einsum("fc,cnd->fnd", F.normalize(mixing, dim=1), e)                          # [F, N, d]
    classes = F.one_hot(torch.as_tensor(y).cpu(), model.num_classes + 1).float()                # [C, K + 1]
    shares = mixing if shares is None else torch.as_tensor(shares).cpu()
    draw = sampler(model, e=e.expand(steps, -1, -1, -1), shared=False, **options)
    return draw(model, shares @ classes, steps, cfg)


def line(frames):
    """Mixing [frames, 2] of two corners at equal steps, both ends included."""
    weight = torch.linspace(0, 1, frames)
    return torch.stack([1 - weight, weight], 1)


def circle(frames):
    """Mixing [frames, 2] once around the great circle through two corners: cosines and sines, whose squares
    are the shares of the classes. Noise mixed so is Gaussian, and two random points are nearly orthogonal."""
    angle = torch.arange(frames) * (2 * math.pi / frames)
    return torch.stack([angle.cos(), angle.sin()], 1)


def square(side):
    """Bilinear mixing [side^2, 4] of the corners top left, top right, bottom left, bottom right, by rows."""
    return torch.kron(line(side), line(side))


WAYS = {"line": line, "circle": circle, "square": square}


@torch.no_grad()
def edit(model, x, y, steps, cfg=1.0, *, r=1.0, gamma=0.0, alpha=None, shared=True, position="combo", seed=0):
    """Pass images T times through encoder and decoder, with noise. SE Sec. 5.

    x, y     [B, 3, H, W] in [-1, 1], and [B] classes for encoder and decoder
    r        factor on the largest sigma; pass k has r step_schedule(T + 1, gamma)[k - 1] (assumed)
    others   as in generate, for a SphereEncoder alone
    returns  [T + 1, B, 3, H, W]: x, and the image after every pass
    Raises ValueError as generate does, for r outside [0, 1], and for another kind of model."""
    if not isinstance(model, SphereEncoder) or not 0 <= r <= 1:
        raise ValueError("edits need a Sphere Encoder, and r in [0, 1]")
    y, sigmas, e = _start(model, y, steps + 1, cfg, alpha, gamma, "eq13", shared, None, seed, 0, None, False)
    sigmas = [r * sigma for sigma in sigmas]
    return torch.stack(_passes(model, x.to(y.device), y, sigmas, e, *_scales(cfg, position)))


def manipulate(model, x, classes, steps=4, **options):
    """An image [3, H, W] from outside the data, drawn as each of several classes [C], with r = 1, gamma = 0.
    SE Sec. 5, Fig. 8. Options as in edit; returns [T + 1, C, 3, H, W]."""
    return edit(model, x.expand(len(classes), -1, -1, -1), classes, steps, **options)


def crossover(model, a, b, y=None, steps=10, mask="left-right", *, r=0.25, gamma=1.0, **options):
    """Two images [B, 3, H, W] stitched together, then passed through the model until they are one, with the
    paper's r and gamma. SE Sec. 5, Fig. 9. y is [B] classes, or None, the null class; mask one of MASKS (a is
    left, at the top, below the diagonal, above the other), or [H, W], 1 where a is taken. Other options as in
    edit; returns [T + 1, B, 3, H, W]."""
    if isinstance(mask, str):
        row, column = torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in a.shape[-2:]), indexing="ij")
        mask = (column < 0.5, row < 0.5, row > column, row + column < 1)[MASKS.index(mask)]
    if y is None:
        y = [model.num_classes] * len(a)
    mask = mask.to(a)
    return edit(model, mask * a + (1 - mask) * b, y, steps, r=r, gamma=gamma, **options)


# ---- Checkpoints -------------------------------------------------------------------------------------------


def write_checkpoint(path, model, preset, **more):
    """Write what sampling needs, and more, by the first process; the name always has a whole file."""
    if not is_first_process():
        return
    tokenizer = getattr(model, "tokenizer", None)
    if isinstance(tokenizer, SphereTokenizer):
        tokenizer = {"config": tokenizer.model.config, "weights": tokenizer.model.state_dict()}
    with whole_file(path) as file:
        torch.save({"config": model.config, "class_names": model.class_names, "preset": asdict(preset),
                    "tokenizer": "rae" if isinstance(tokenizer, RAE) else tokenizer,
                    "model": model.state_dict(), **more}, file)


def read_checkpoint(path, key="config"):
    """The dictionary in a checkpoint. Raises OSError if it cannot be opened, and ValueError, naming the path,
    if it is damaged, has numbers that are not finite, or lacks the key."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():                           # of its checksums, which torch.load does not read
                raise ValueError("it has changed since it was written")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not all(leaf.isfinite().all() for leaf in tree_leaves(checkpoint) if torch.is_tensor(leaf)):
            raise ValueError("some of its numbers are not finite")
    except OSError:
        raise
    except Exception as error:                              # torch.load knows a dozen kinds
        raise ValueError(f"{path}: no checkpoint of torch.save, or damaged; only tensors and plain values "
                         f"are read, since objects can run code ({str(error).partition('.')[0]})") from None
    if not isinstance(checkpoint, dict) or key not in checkpoint:
        raise ValueError(f"{path}: it has no {key}; a checkpoint of train.py has one, the official code's "
                         f"needs its cfg.json: --config")
    return checkpoint


def load(path, device="cpu", ema=None, config=None):
    """The model of a checkpoint, rebuilt from the file alone (and the RAE's own files, if it needs them).

    path     last.pt, model.pt or best.pt of train.py; or of the official code, if config is its cfg.json
    ema      averaged weights or plain ones; None is the choice of the preset (of the official code: plain)
    returns  SphereEncoder, or SiT with its tokenizer, in eval mode, with `class_names` (one per class; empty
             if unconditional) and `sampling`, the defaults of its preset
    Raises OSError or ValueError that names the file, and the weights that do not fit."""
    stored = read_checkpoint(path, "ema_model" if config else "tokenizer")
    try:
        if config:
            settings = convert_official_config(json.loads(Path(config).read_bytes()))
            stored = {"config": settings, "class_names": [str(k) for k in range(settings["num_classes"])],
                      "preset": {"sampling": {}, "use_ema": False}, "tokenizer": None,
                      "model": convert_official(stored["model"]),
                      "ema": convert_official(stored["ema_model"])}
        own = stored["preset"]["use_ema"]
        if ema is None:
            ema = own
        if "ema" not in stored and ema != own:
            raise ValueError("it has no choice of weights, last.pt does; leave --[no-][use-]ema out")
        network = SiT if stored["tokenizer"] else SphereEncoder
        model = network(**stored["config"])
        model.load_state_dict(stored.get("ema", stored["model"]) if ema else stored["model"])
        model.class_names = stored["class_names"]
        model.preset = stored["preset"]
        model.sampling = model.preset["sampling"]
        if stored["tokenizer"]:
            model.attach(load_tokenizer(stored["tokenizer"]).to(device))
    except OSError:
        raise
    except Exception as error:                              # whatever a file may hold instead
        raise ValueError(f"{path}: no model can be built from it and {config or 'its own settings'} "
                         f"({type(error).__name__}: {error})") from None
    return model.to(device).eval()


def load_tokenizer(stored):
    """The tokenizer in a checkpoint: "rae", or config and weights of a Sphere Encoder."""
    if stored == "rae":
        return RAE.from_hub()
    model = SphereEncoder(**stored["config"])
    model.load_state_dict(stored["weights"])
    return SphereTokenizer(model)


# ---- Pictures ----------------------------------------------------------------------------------------------


def picture(panels, row_names=()):
    """Panels side by side, {title: [rows, columns, 3, H, W] in [-1, 1]}, with a word per row; a PIL image."""
    font = ImageFont.load_default(14)
    *_, images = panels.values()
    zoom = max(1, round(48 / max(images.shape[3:])))        # small images are enlarged
    grids = {title: to_pil(make_grid(images.flatten(0, 1), images.shape[1], 1, pad_value=1), zoom)
             for title, images in panels.items()}
    left = 12 + int(max(map(font.getlength, row_names), default=0))
    widths = [16 + max(grid.width, int(font.getlength(title))) for title, grid in grids.items()]
    height = max(grid.height for grid in grids.values())
    canvas = Image.new("RGB", (left + sum(widths), 34 + height), "white")
    draw = ImageDraw.Draw(canvas)
    for row, name in enumerate(row_names):
        draw.text((left - 6, 26 + (row + 0.5) * height / len(row_names)), name, "black", font, "rm")
    for (title, grid), width in zip(grids.items(), widths):
        draw.text((left, 5), title, "black", font)
        canvas.paste(grid, (left, 26))
        left += width
    return canvas


def image_transform(size):
    """Transform of a PIL image to uint8 [3, H, W]: shorter side resized (bicubic), centre cropped."""
    return transforms.Compose([transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
                               transforms.CenterCrop(size), transforms.PILToTensor()])


def open_images(paths, size):
    """Image files of any kind and size -> [B, 3, H, W] in [-1, 1]; see image_transform and fid.read_image."""
    if not paths:
        raise ValueError("no image files given: --images")
    transform = transforms.Compose([image_transform(max(size)), transforms.CenterCrop(size)])
    return to_float(torch.stack([transform(read_image(path)) for path in paths]))


def to_float(images):
    """Images uint8 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_pil(x, zoom=1):
    """One image [3, H, W] in [-1, 1] -> PIL image, zoom times as large."""
    x = x.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    return Image.fromarray(to_uint8((x + 1) / 2).permute(1, 2, 0).cpu().numpy())


def save_image(image, path, **options):
    """Write a PIL image, whole or not at all, in the format that the path's suffix says."""
    with whole_file(path, sync=False) as file:
        image.save(file, path.suffix[1:], **options)


# ---- Command line ------------------------------------------------------------------------------------------


def truth(text):
    """True or False, as a word."""
    return {"true": True, "false": False}[text.lower()]


# What --sampling takes: arguments of generate, generate_latent and edit, and how they are read.
SAMPLING = {
    "alpha": float,
    "gamma": float,
    "schedule": str,
    "shared": truth,
    "position": str,
    "bound": float,
    "project_last": truth,
    "official": truth,
    "r": float,
}


def sampling_options(words):
    """NAME=VALUE ... of --sampling, {name: value}."""
    options = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            options[name] = None if value.lower() == "none" else SAMPLING[name](value)
        except (KeyError, ValueError):
            raise ValueError(f"--sampling {word} is none of {', '.join(SAMPLING)} with a value of its "
                             f"kind") from None
    return options


# Of the words, whose functions have the defaults.
OPTIONS = {
    "--steps": (positive, "T of Algorithm 1, or passes of an edit (4)"),
    "--cfg": (number, "guidance scale, 1 = off (1)"),
    "--seed": (whole_number, "image i is a function of (seed, i) alone (0)"),
    "--count": (positive, "generate: number of images (80)"),
    "--batch-size": (positive, "generate: images at a time (100)"),
    "--frames": (positive, "interpolate: images per line, circle or side (8)"),
}


@errors_in_one_line("sample.py")
def main(argv=None):
    parser = Parser("sample.py", __doc__, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("word", nargs="?", choices=WORDS, default="generate",
        help="generate, if none: images from random points, SE and SLE Alg. 1; reconstruct: one trip through "
        "encoder and decoder; interpolate: between random points, SE Fig. 6; crossover: of two images, SE "
        "Fig. 9; manipulate: one image to each of several classes, SE Fig. 8")
    add("--checkpoint", default="out/digits/model.pt", help="of train.py (%(default)s)")
    add("--out", default="out/samples", help="folder for WORD.png (%(default)s)")
    for flag, (kind, help) in OPTIONS.items():
        add(flag, type=kind, help=help)
    add("--config", default=None, help="cfg.json of the official code, for its checkpoint")
    add("--ema", default=None, action=argparse.BooleanOptionalAction,
        help="averaged weights (as the preset says)")
    add("--singles", nargs="?", choices=("png", "npz"), const="png", default=None,
        help="also write every image, into OUT/images/, or all into OUT/images.npz, as fid.py and other "
        "tools read it")
    add("--sampling", nargs="+", default=[], metavar="NAME=VALUE",
        help=f"other arguments of generate, generate_latent, edit: {' '.join(SAMPLING)}")
    add("--classes", nargs="+", default=[], help="in turn: names, null, or numbers that are no "
        "names (all; reconstruct, crossover: one, or null)")
    add("--way", choices=WAYS, help="interpolate: two random points, once around the great circle through "
        "two, or four corners of a square (line)")
    add("--gif", action="store_true", default=argparse.SUPPRESS,
        help="interpolate: also as an animation, of a line there and back")
    add("--images", nargs="+", help="reconstruct, crossover, manipulate")
    add("--mask", choices=MASKS, help="crossover: where the first image is taken (left-right)")
    add("--precision", choices=("auto", "bf16", "float32"),
        help="of the networks; auto is bf16 on a GPU (as trained)")
    add("--device", default=None, help="(cuda if there is one, else cpu)")
    args = parser.parse_args(argv)
    common = parser.parse_args([])                          # what is there without being given
    how = {name: value for name, value in vars(args).items() if name not in common}
    how |= sampling_options(args.sampling)
    args.out = Path(args.out).expanduser()
    args.written = args.out / ("images.npz" if args.singles == "npz" else "images")
    if args.singles and args.written.exists():
        raise ValueError(f"{args.written} is there already; choose another --out, or remove it")
    args.arrays = []
    device = pick_device(args.device)
    model = load(args.checkpoint, device, args.ema, args.config)
    args.names = [*model.class_names, "null"]
    args.classes = [class_number(args.names, word) for word in args.classes]
    args.in_turn = args.classes or range(max(model.num_classes, 1))
    with autocast(device, how.pop("precision", model.preset.get("precision", "auto"))):
        panels, rows = WORDS[args.word](args, model, **how)
    path = args.out / f"{args.word}.png"                    # only now a folder: a mistake leaves none
    save_image(picture(panels, rows), path)
    if args.arrays:
        with whole_file(args.written) as file:
            np.savez(file, torch.cat(args.arrays))
    print(path, args.written if args.singles else "")


def class_number(names, word):
    """The number of a class that is called by its name or, if no class has that name, by its number."""
    if word in names:
        return names.index(word)
    if word in map(str, range(len(names))):
        return int(word)
    raise ValueError(f"--classes knows {', '.join(names):.300} or their numbers from 0, not {word}")


def title(steps, how):
    return f"T = {steps}" + "".join(f", {name} = {value}" for name, value in how.items())


def draw_samples(args, model, steps=4, count=80, batch_size=100, **how):
    """Images from random points. SE and SLE Alg. 1."""
    draw = sampler(model, **how)
    classes = args.in_turn
    shown = []
    y = [classes[i % len(classes)] for i in range(count)]                           # a function of i alone
    for first in tqdm(range(0, count, batch_size), disable=None):
        x = draw(model, y[first:first + batch_size], steps, first=first)
        write_singles(args, x, first)
        shown.extend(x[:256 - len(shown)].cpu())                    # a grid of more is not readable
    by_class = 1 < len(classes) <= 16                                               # then a row per class
    columns = min(len(classes), len(shown)) if by_class else math.ceil(math.sqrt(len(shown)))
    shown += [torch.ones_like(shown[0])] * (-len(shown) % columns)                  # white fills the grid
    images = torch.stack(shown).unflatten(0, (-1, columns))
    rows = []
    if by_class:
        images = images.transpose(0, 1)                                             # [rows, columns, 3, H, W]
        rows = [args.names[k] for k in classes[:columns]]
    return {title(steps, how): images}, rows


def one_class(args):
    """[class] or, if none is given, None."""
    if len(args.classes) > 1:
        raise ValueError(f"{args.word} takes one of --classes")
    return args.classes or None


def draw_reconstructions(args, model, images=(), **how):
    """Images, and what one trip through encoder and decoder makes of them."""
    known(how, reconstruct)
    x = open_images(images, model.image_size)
    y = one_class(args)
    again = reconstruct(model, x, y and y * len(x))
    write_singles(args, again)
    return {" ": torch.stack([x, again.cpu()])}, ["original", "reconstruction"]


def draw_interpolations(args, model, steps=4, frames=8, way="line", gif=False, **how):
    """Images between random points, their classes mixed too. SE Fig. 6."""
    if "shared" in how:
        raise ValueError("interpolate takes no shared; drop it")
    classes = args.classes or args.in_turn[:20]
    mixing = WAYS[way](frames)
    shares = mixing.square() if way == "circle" else mixing
    corners = mixing.shape[1]
    count = 4 if corners == 4 else max(10, len(classes) // 2 * 2)
    y = [classes[k % len(classes)] for k in range(count)]
    x = torch.cat([interpolate(model, y[k:k + corners], mixing, steps, shares=shares, first=k, **how)
                   for k in range(0, count, corners)])                                  # [rows * F, 3, H, W]
    write_singles(args, x)
    x = x.unflatten(0, (-1, frames))                                                # [rows, frames, 3, H, W]
    if gif:
        zoom = max(1, round(96 / max(model.image_size)))
        grids = []
        for images in x.transpose(0, 1):
            large = F.interpolate(images, scale_factor=zoom, mode="bicubic")
            grids.append(to_pil(make_grid(large, 5, pad_value=1)))
        if way != "circle":
            grids += grids[-2:0:-1]                                                     # and back
        save_image(grids[0], args.out / "interpolate.gif", save_all=True, duration=80, loop=0,
                   append_images=grids[1:])
    rows = []
    if corners == 2 and model.num_classes:
        rows = [f"{args.names[a]} to {args.names[b]}" for a, b in zip(y[::2], y[1::2])]
    return {title(steps, how): x}, rows


def draw_edits(args, model, steps=4, images=(), mask=None, **how):
    """Crossover of two images, SE Fig. 9; manipulation of one to each of several classes, SE Fig. 8."""
    crosses = args.word == "crossover"
    if len(images) != 1 + crosses or not crosses and (mask or not model.num_classes):
        raise ValueError("crossover needs two --images, manipulate one, no --mask, and a model with classes")
    how = known(how, edit)
    images = open_images(images, model.image_size)
    if crosses:
        x = crossover(model, *images.split(1), one_class(args), steps, mask or MASKS[0], **how)
        panels = {"A and B": images[None], "stitched": x[:1].transpose(0, 1)}
        names = []
    else:
        x = manipulate(model, images[0], args.in_turn, steps, **how)
        panels = {"image": x[:1].transpose(0, 1)}
        names = [args.names[k] for k in args.in_turn]
    passes = x[1:].transpose(0, 1)                                                          # [B, T, 3, H, W]
    write_singles(args, passes.flatten(0, 1))
    return {**panels, f"after 1 to {steps} passes": passes}, names


def write_singles(args, images, first=0):
    if args.singles == "npz":
        args.arrays.append(to_uint8((images + 1) / 2).permute(0, 2, 3, 1).cpu())
    elif args.singles:
        for i, image in enumerate(images, first):
            save_image(to_pil(image), args.written / f"{i:06d}.png")


WORDS = {"generate": draw_samples, "reconstruct": draw_reconstructions, "interpolate": draw_interpolations,
         "crossover": draw_edits, "manipulate": draw_edits}

if __name__ == "__main__":
    main()
