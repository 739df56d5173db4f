"""Sampling: Algorithm 1 of both papers, with guidance; editing. SE Sec. 2.4, 4-6, App. C.1, C.6; SLE 4.4.

    python sample.py --checkpoint out/digits/model.pt --out out/sevens --classes 7 --cfg 1.5 --singles
    python sample.py interpolate --out out/lines --classes 3 8 --frames 9 --gif
    python sample.py crossover --out out/cross --images a.png b.png --mask diagonal
"""

import argparse
import ast
import json
import math
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F
from torchvision import transforms
from torchvision.utils import make_grid
from tqdm import tqdm

from fid import errors_in_one_line, pick_device, read_image, to_uint8, whole_file
from models import RAE, SiT, SphereEncoder, SphereTokenizer, convert_official, convert_official_config
from spherify import add_noise, angle_to_sigma, sample_noise, spherify, step_schedule, truncate_noise

# Where guidance acts, as powers of its scale in latents and in pixels. SE App. C.1.
POSITIONS = {"encoder": (1, 0), "decoder": (0, 1), "combo": (0.5, 0.5)}
MASKS = ("left-right", "top-bottom", "diagonal", "anti-diagonal")           # of a crossover


@torch.no_grad()
def generate(model, y, steps, cfg=1.0, *, alpha=None, gamma=0.0, schedule=None, shared=True, position="combo",
             bound=None, seed=0, first=0, e=None, official=False):
    """Images from random points of the sphere, in T steps. SE Eq. 3, Alg. 1.

    model     SphereEncoder
    y         [B] int64, classes 0..K; K is the null class, the only one of an unconditional model. Or floats
              [B, K + 1], mixing weights over the class embeddings; see interpolate
    steps     T >= 1: one decode, then T - 1 times encode, add noise, decode
    cfg       guidance scale s >= 0; 1 is no guidance, and then no second pass
    alpha     degrees, angle of the noise at r = 1; None is the model's own alpha_max
    gamma     decay of the noise over the steps, SE Eq. 13; 0 keeps it fixed (the paper's best)
    schedule  of that decay: "eq13" or "released", see step_schedule; None is the first unless official
    shared    one noise vector per image for all steps (the paper's best), or a fresh one at every step
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
        raise ValueError(f"position must be one of {', '.join(POSITIONS)}, got {position!r}")
    return [cfg**power for power in POSITIONS[position]]


def _passes(model, x, y, sigmas, e, s_encoder, s_decoder):
    """Images x, then those of every further step of SE Alg. 1: encode, project, add noise, decode."""
    images = [x]
    for sigma, noise in zip(sigmas, e):
        v = add_noise(spherify(_guided(model.encode, images[-1], y, s_encoder)), sigma, noise)
        images.append(_guided(model.decode, v, y, s_decoder).clamp(-1, 1))
    return images


def _guided(network, inputs, y, s):
    if s == 1:
        return network(inputs, y)
    output, null = network(inputs, y), network(inputs, None)
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
    device, K = next(model.parameters()).device, model.num_classes
    y = torch.as_tensor(y, device=device)
    if not y.is_floating_point() and not bool(((y >= 0) & (y <= K)).all()):         # floats mix classes
        raise ValueError(f"y must be a list of classes 0..{K} ({K} is the null class), got {y.tolist()}")
    if not 0 <= cfg < math.inf or cfg != 1 and not K:
        raise ValueError(f"cfg must be at least 0, and 1 (off) for a model without classes, got {cfg}")
    sigma_max = angle_to_sigma(model.alpha_max if alpha is None else alpha)
    schedule = schedule or ("released" if official else "eq13")
    sigmas = [r * sigma_max for r in step_schedule(steps, gamma, schedule).tolist()]
    draws = min(steps, 2 if official else 1) if shared else steps
    if e is None:
        e = sample_noise(seed, first, len(y), model.latent_shape, draws)
    e = e.to(device).reshape(draws, len(y), *model.latent_shape)[torch.arange(steps).clamp(max=draws - 1)]
    if bound is not None:
        e[0] = truncate_noise(e[0], bound)
    return y, sigmas, e


def sampler(model):
    """generate or generate_latent, whichever draws from the model, with the defaults of its preset."""
    return partial(generate_latent if isinstance(model, SiT) else generate, **getattr(model, "sampling", {}))


@torch.no_grad()
def reconstruct(model, x, y=None):
    """D(f(E(x))): encode, project, decode, no noise. SE Eq. 1-2. Of a denoiser: D(E(x)) of its tokenizer.
    x [B, 3, H, W] in [-1, 1] is on the model's device, y [B] or None: the null class, the paper's default."""
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
             its steps, the corners' mixed and Gaussian again (weights of norm 1: the same point of the sphere)
    returns  [F, 3, H, W] in [-1, 1]"""
    device = next(model.parameters()).device
    mixing = torch.as_tensor(mixing, dtype=torch.float32, device=device)                           # [F, C]
    e = sample_noise(seed, first, len(y), model.latent_shape)[0].to(device)                     # [C, N, d]
    e = torch.einsum("fc,cnd->fnd", F.normalize(mixing, dim=1), e)                          # [F, N, d]
    classes = F.one_hot(torch.as_tensor(y, device=device), model.num_classes + 1).float()       # [C, K + 1]
    shares = mixing if shares is None else torch.as_tensor(shares, device=device)
    return sampler(model)(model, shares @ classes, steps, cfg, e=e.expand(steps, -1, -1, -1), shared=False,
                          **options)


def line(frames):
    """Mixing [frames, 2] of two corners at equal steps, both ends included."""
    weight = torch.linspace(0, 1, frames)
    return torch.stack([1 - weight, weight], dim=1)


def circle(frames):
    """Mixing [frames, 2] once around the great circle through two corners: cosines and sines, whose squares are
    the shares of the classes. Noise mixed so is Gaussian, and two random points are nearly orthogonal."""
    angle = torch.arange(frames) * (2 * math.pi / frames)
    return torch.stack([angle.cos(), angle.sin()], dim=1)


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
        raise ValueError(f"edits need a Sphere Encoder and r in [0, 1], got a {type(model).__name__} and {r}")
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
        mask = dict(zip(MASKS, (column < 0.5, row < 0.5, row > column, row + column < 1)))[mask]
    mask, y = mask.to(a), [model.num_classes] * len(a) if y is None else y
    return edit(model, mask * a + (1 - mask) * b, y, steps, r=r, gamma=gamma, **options)


# ---- Checkpoints -------------------------------------------------------------------------------------------


def write_checkpoint(path, model, preset, **more):
    """Write what sampling needs, and more; the name always has a whole file."""
    tokenizer = getattr(model, "tokenizer", None)
    if isinstance(tokenizer, SphereTokenizer):
        tokenizer = {"config": tokenizer.model.config, "weights": tokenizer.model.state_dict()}
    with whole_file(path) as file:
        torch.save({"config": model.config, "class_names": model.class_names, "preset": asdict(preset),
                    "tokenizer": "rae" if isinstance(tokenizer, RAE) else tokenizer,
                    "model": model.state_dict(), **more}, file)


def read_checkpoint(path, key="config"):
    """The dictionary in a checkpoint; its tensors stay on disk until they are used. Raises ValueError, naming
    the path, if it is missing, damaged or lacks the key."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {key: checkpoint[key], **checkpoint}
    except Exception as error:                              # torch.load knows a dozen kinds
        why = {FileNotFoundError: "no such file", KeyError: f"it has no {key}"}.get(
            type(error), "another kind of file, or damaged")
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):
            why = f"it holds a {foreign[1]}; as objects can run code, only tensors and plain values are read"
        raise ValueError(f"{path}: no checkpoint of train.py, nor of the official code with its cfg.json, "
                         f"--config ({why})") from None


def load(path, device="cpu", ema=None, config=None):
    """The model of a checkpoint, rebuilt from the file alone (and the RAE's own files, if it needs them).

    path     last.pt or model.pt of train.py; or of the official code, if config is its cfg.json
    ema      averaged weights or plain ones; None is the choice of the preset (of the official code: plain)
    returns  SphereEncoder, or SiT with its tokenizer, in eval mode, with `class_names` (one per class; empty
             if unconditional) and `sampling`, the defaults of its preset
    Raises OSError or ValueError that names the file, and the weights that do not fit."""
    try:
        if config:
            key = "ema_model" if ema else "model"
            settings = convert_official_config(json.loads(Path(config).read_text(encoding="utf-8")))
            weights = convert_official(read_checkpoint(path, key)[key])
            names, sampling, tokenizer = [str(k) for k in range(settings["num_classes"])], {}, None
        else:
            checkpoint = read_checkpoint(path, "tokenizer")
            settings, names, tokenizer = (checkpoint[key] for key in ("config", "class_names", "tokenizer"))
            sampling, use_ema = checkpoint["preset"]["sampling"], checkpoint["preset"]["use_ema"]
            both = "ema" in checkpoint                      # last.pt; the others hold what the preset chose
            if not both and ema not in (None, use_ema):
                raise ValueError(f"{path} has no choice of weights, last.pt does; leave --[no-][use-]ema out")
            weights = checkpoint["ema" if both and (use_ema if ema is None else ema) else "model"]
        model = (SiT if tokenizer else SphereEncoder)(**settings)
        model.load_state_dict(weights)
        model.class_names, model.sampling = names, sampling
        if tokenizer:
            model.attach(load_tokenizer(tokenizer).to(device))
        return model.to(device).eval()
    except (KeyError, TypeError, AttributeError, RuntimeError, json.JSONDecodeError) as error:
        raise ValueError(f"{' with '.join(filter(None, (str(path), config)))}: no model can be built from it "
                         f"({type(error).__name__}: {error})") from None


def load_tokenizer(stored):
    """The tokenizer in a checkpoint: "rae", or config and weights of a Sphere Encoder."""
    if stored == "rae":
        return RAE.from_hub()
    model = SphereEncoder(**stored["config"])
    model.load_state_dict(stored["weights"])
    return SphereTokenizer(model)


# ---- Pictures ----------------------------------------------------------------------------------------------


def picture(panels, row_names=()):
    """Panels side by side, {title: [rows, columns, 3, H, W] in [-1, 1]}, with a word per row; a PIL image.
    A row of more than some 1,000 pixels goes on below itself."""
    font, side = ImageFont.load_default(size=14), max(next(iter(panels.values())).shape[-2:])
    zoom, grids = max(1, round(48 / side)), {}                                  # small images are enlarged
    lines = max(math.ceil(images.shape[1] * side * zoom / 1000) for images in panels.values())
    for title, images in panels.items():
        width = math.ceil(images.shape[1] / lines)
        images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, width * lines - images.shape[1]), value=1)
        grids[title] = to_pil(make_grid(images.flatten(0, 1), width, 1, pad_value=1), zoom)
    left = 12 + int(max((font.getlength(name) for name in row_names), default=0))
    widths = [16 + max(grid.width, int(font.getlength(title))) for title, grid in grids.items()]
    height = max(grid.height for grid in grids.values())
    canvas = Image.new("RGB", (left + sum(widths), 34 + height), "white")
    draw = ImageDraw.Draw(canvas)
    for row, name in enumerate(row_names):
        draw.text((left - 6, 26 + (row + 0.5) * height / len(row_names)), name, "black", font, anchor="rm")
    for (title, grid), width in zip(grids.items(), widths):
        draw.text((left, 5), title, "black", font)
        canvas.paste(grid, (left, 26))
        left += width
    return canvas


def sphere_picture(points, classes=None):
    """Points on the unit sphere {title: [n, 3]}, one sphere each, as a matplotlib figure; SE Fig. 7. Of the
    classes {title: [n]} every one has a colour."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(2.6 * len(points), 2.9))
    figure.subplots_adjust(0, 0, 1, 0.86, wspace=0)
    for place, (title, cloud) in enumerate(points.items(), 1):
        axes = figure.add_subplot(1, len(points), place, projection="3d")
        colors = {"c": classes[title][:2000] % 10, "cmap": "tab10", "vmin": 0, "vmax": 9} if classes else {}
        axes.scatter(*cloud[:2000].T, s=3, **colors)                            # paler where further away
        axes.set(title=f"{title}\n{len(cloud[:2000])} points", xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1))
        axes.set_box_aspect((1, 1, 1), zoom=1.6)
        axes.set_axis_off()
    return figure


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


def literal(text):
    """A Python literal such as 1e-4, False or 64,1,4; anything else is a word."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def name_value(text):
    name, value = text.split("=", 1)
    return name, literal(value)


@errors_in_one_line("sample.py")
def main(argv=None):
    parser = argparse.ArgumentParser("sample.py", "sample.py [WORD] [options]; --help lists them", __doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("word", nargs="?", choices=WORDS, default="generate", metavar="WORD",
        help="%(default)s if none; " + "; ".join(f"{word}: {draw.__doc__}" for word, draw in WORDS.items()))
    add("--checkpoint", default="out/digits/model.pt", help="of train.py (%(default)s)")
    add("--config", help="cfg.json of the official code, for a checkpoint of its own")
    add("--ema", action=argparse.BooleanOptionalAction, help="averaged weights (as the preset says)")
    add("--out", type=Path, default="out/samples", help="folder for WORD.png (%(default)s)")
    add("--singles", nargs="?", choices=("png", "npz"), const="png", help="also write every image, into "
        "OUT/images/, or all into OUT/images.npz, as fid.py and other tools read it")
    add("--seed", type=int, default=0, help="image i is a function of (seed, i) alone (%(default)s)")
    add("--steps", type=int, default=4, help="T of Algorithm 1, or passes of an edit (%(default)s)")
    add("--cfg", type=float, default=1.0, help="guidance scale, 1 = off (%(default)s)")
    add("--sampling", type=name_value, nargs="+", default=[], metavar="NAME=VALUE", help="other arguments of "
        "generate, generate_latent, edit: gamma schedule shared alpha position bound project_last official r")
    add("--classes", nargs="+", metavar="K", help="in turn: names, null, or numbers that are no names (all; "
        "reconstruct, crossover: null)")
    add("--count", type=int, default=80, help="generate: number of images (%(default)s)")
    add("--batch-size", type=int, default=100, help="generate: images at a time (%(default)s)")
    add("--way", choices=WAYS, default="line", help="interpolate: two random points, once around the great "
        "circle through two, or four corners of a square (%(default)s)")
    add("--frames", type=int, default=8, help="interpolate: images per line, circle or side (%(default)s)")
    add("--gif", action="store_true", help="interpolate: also as an animation, of a line there and back")
    add("--images", nargs="+", default=[], metavar="FILE", help="reconstruct, crossover, manipulate")
    add("--mask", default=MASKS[0], help=f"crossover: {', '.join(MASKS)}, or an image, white where the first "
        "image is taken (%(default)s)")
    add("--device", help="(cuda if there is one, else cpu)")
    args = parser.parse_args(argv)
    if min(args.steps, args.count, args.batch_size, args.frames) < 1:
        raise ValueError("--steps, --count, --batch-size and --frames must be at least 1")
    singles, args.arrays = args.out / ("images.npz" if args.singles == "npz" else "images"), []
    if args.singles and (singles.is_file() or any(singles.glob("*"))):
        raise ValueError(f"{singles} holds images; choose another --out, or remove them")
    model = load(args.checkpoint, pick_device(args.device), args.ema, args.config)
    names = [*model.class_names, "null"]
    numbers = {str(k): k for k in range(len(names))} | {name: k for k, name in enumerate(names)}
    if unknown := set(args.classes or ()) - {*numbers}:
        raise ValueError(f"--classes knows {', '.join(f'{k} = {name}' for k, name in enumerate(names))}, "
                         f"not {min(unknown)}")
    args.classes = args.classes and [numbers[name] for name in args.classes]
    how = dict(cfg=args.cfg, seed=args.seed, **dict(args.sampling))
    panels, rows = WORDS[args.word](args, model, how)       # only then a folder: a mistake leaves none
    settings = ", ".join(f"{name} = {value}" for name, value in {"T": args.steps, **how}.items())
    drawn = picture({title or settings: images for title, images in panels.items()}, rows)
    save_image(drawn, args.out / f"{args.word}.png")
    if args.arrays:
        with whole_file(singles, overwrite=False) as file:
            np.savez(file, arr_0=torch.cat(args.arrays).numpy())
    chosen = ", ".join(f"{k} = {names[k]}" for k in dict.fromkeys(args.classes or ()))
    print(f"{args.out / args.word}.png" + f" and {singles}" * bool(args.singles), chosen)


def draw_samples(args, model, how):
    """images from random points, SE and SLE Alg. 1"""
    classes, shown = args.classes or range(max(model.num_classes, 1)), []
    y = [classes[i % len(classes)] for i in range(args.count)]                      # a function of i alone
    for first in tqdm(range(0, args.count, args.batch_size), unit="batch", disable=None):
        x = sampler(model)(model, y[first:first + args.batch_size], args.steps, first=first, **how)
        write_singles(args, x, first)
        shown.extend(x[:256 - len(shown)].cpu())                    # a grid of more is not readable
    few = 1 < len(classes) <= 16                                                    # then a row per class
    columns = min(len(classes), len(shown)) if few else math.ceil(math.sqrt(len(shown)))
    shown += [torch.ones_like(shown[0])] * (-len(shown) % columns)                  # white fills the grid
    images = torch.stack(shown).unflatten(0, (-1, columns))
    images = images.transpose(0, 1) if few else images                              # [rows, columns, 3, H, W]
    names = [[*model.class_names, "null"][k] for k in classes[:columns]] if few and model.num_classes else []
    return {"": images}, names


def draw_reconstructions(args, model, how):
    """images, and what one trip through encoder and decoder makes of them"""
    x = open_images(args.images, model.image_size).to(next(model.parameters()).device)
    again = reconstruct(model, x, args.classes and torch.tensor(args.classes[:1] * len(x), device=x.device))
    write_singles(args, again)
    return {" ": torch.stack([x, again])}, ["original", "reconstruction"]


def draw_interpolations(args, model, how):
    """images between random points, their classes mixed too, SE Fig. 6"""
    classes = args.classes or range(max(model.num_classes, 1))
    mixing = WAYS[args.way](args.frames)
    corners, shares = mixing.shape[1], mixing.square() if args.way == "circle" else mixing
    y = [classes[k % len(classes)] for k in range(4 if corners == 4 else max(10, len(classes) // 2 * 2))]
    x = torch.cat([interpolate(model, y[k:k + corners], mixing, args.steps, shares=shares, first=k, **how)
                   for k in range(0, len(y), corners)])                                 # [rows * F, 3, H, W]
    write_singles(args, x)
    x = x.unflatten(0, (-1, args.frames))                                           # [rows, frames, 3, H, W]
    if args.gif:
        columns = next(c for c in range(math.ceil(math.sqrt(len(x))), len(x) + 1) if len(x) % c == 0)
        large = F.interpolate(x.flatten(0, 1), scale_factor=max(1, round(64 / max(model.image_size))),
                              mode="bicubic").unflatten(0, (-1, args.frames))
        frames = [to_pil(make_grid(images, columns, pad_value=1)) for images in large.transpose(0, 1)]
        back = [] if args.way == "circle" else frames[-2:0:-1]
        save_image(frames[0], args.out / "interpolate.gif", save_all=True, duration=80, loop=0,
                   append_images=frames[1:] + back)
    ends = [[*model.class_names, ""][k] for k in y]
    return {"": x}, [f"{a} to {b}" for a, b in zip(ends[::2], ends[1::2])] if corners == 2 and ends[0] else []


def draw_edits(args, model, how):
    """crossover of two images, SE Fig. 9; manipulation of one to each of several classes, SE Fig. 8"""
    crosses, size = args.word == "crossover", model.image_size
    if len(args.images) != 1 + crosses or not crosses and not model.num_classes:
        raise ValueError("crossover needs two --images, manipulate one, and a model with classes")
    classes, images = args.classes or range(model.num_classes), open_images(args.images, size)
    mask = args.mask if args.mask in MASKS else (open_images([args.mask], size)[0].mean(0) + 1) / 2
    if crosses:
        x = crossover(model, *images.split(1), args.classes and classes[:1], args.steps, mask, **how)
    else:
        x = manipulate(model, images[0], classes, args.steps, **how)
    x = x.transpose(0, 1)                                                               # [B, T + 1, 3, H, W]
    write_singles(args, x[:, 1:].flatten(0, 1))
    panels = {"A and B": images[None]} if crosses else {}
    panels |= {"stitched" if crosses else "image": x[:, :1], f"after 1 to {args.steps} passes": x[:, 1:]}
    return panels, [] if crosses else [[*model.class_names, "null"][k] for k in classes]


def write_singles(args, images, first=0):
    if args.singles == "npz":
        args.arrays.append(to_uint8((images + 1) / 2).permute(0, 2, 3, 1).cpu())
    elif args.singles:
        for i, image in enumerate(images, first):
            save_image(to_pil(image), args.out / "images" / f"{i:06d}.png")


WORDS = {"generate": draw_samples, "reconstruct": draw_reconstructions, "interpolate": draw_interpolations,
         "crossover": draw_edits, "manipulate": draw_edits}

if __name__ == "__main__":
    main()
