"""Sampling: Algorithm 1 of both papers, with guidance. SE Sec. 2.4, 6, App. C.1; SLE Sec. 4.4.

    python sample.py --checkpoint out/digits/last.pt --out out/samples --steps 4
    python sample.py --checkpoint out/digits/last.pt --out out/sevens --classes 7 --cfg 1.5 --singles
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

from fid import to_uint8
from models import (RAE, SiT, SphereEncoder, SphereTokenizer, convert_official, convert_official_config,
                    weights_digest)
from spherify import add_noise, angle_to_sigma, sample_noise, spherify, step_schedule

POSITIONS = ("encoder", "decoder", "combo")
KINDS = {"sphere-encoder": SphereEncoder, "sphere-latent-encoder": SiT}
CHECKPOINT_KEYS = {"kind", "config", "class_names", "use_ema", "model", "ema", "optimizer", "step", "seed",
                   "preset", "images"}


@torch.no_grad()
def generate(model, y, steps, cfg=1.0, *, alpha=None, gamma=0.0, shared=True, position="combo", seed=0,
             first=0, e=None, official=False):
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
    seed      image k of the call is sample first + k of this seed, a function of (seed, first + k) alone
    e         [B, N, d] noise in place of the seeded one; one of these per draw, stacked, if there are several
    official  as the official code, where it departs from the paper: shared noise is shared by steps 2..T only
              (two draws), and a decay of gamma 1 ends at 1 / T
    returns   [B, 3, H, W] in [-1, 1], on the model's device

    Raises ValueError for a class, step count, scale, angle, seed or noise out of range.
    """
    y = _checked_classes(model, y)
    s_encoder, s_decoder = _guidance_scales(cfg, position, conditional=model.num_classes > 0)
    sigma_max = angle_to_sigma(model.alpha_max if alpha is None else alpha)
    r = step_schedule(steps, gamma, official)
    e = _noise_of_steps(model, y, steps, shared, official, seed, first, e)                    # [T, B, N, d]

    def guided(network, inputs, s):
        output = network(inputs, y)
        if s == 1:
            return output
        null = network(inputs, None)
        return null + s * (output - null)

    v = spherify(e[0])
    x = guided(model.decode, v, s_decoder).clamp(-1, 1)     # the clamp after guidance is the official code's
    for t in range(2, steps + 1):
        z = guided(model.encode, x, s_encoder)
        v = add_noise(spherify(z), r[t - 2].item() * sigma_max, e[t - 1])
        x = guided(model.decode, v, s_decoder).clamp(-1, 1)
    return x


@torch.no_grad()
def generate_latent(denoiser, y, steps, cfg=1.0, *, alpha=None, gamma=None, shared=None, project_last=False,
                    seed=0, first=0, e=None, official=False):
    """Images from random points of the sphere, in T steps within the latent space and one decode. SLE Alg. 1.

    denoiser  SiT with a tokenizer
    y, steps, cfg, alpha, seed, first, e, official  as in generate; guidance acts at every step
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
    e = _noise_of_steps(denoiser, y, steps, shared, official, seed, first, e)                 # [T, B, N, d]

    z = e[0]                                                # line 2
    for t in range(1, steps + 1):
        v = spherify(z)                                     # line 5
        z_hat = denoiser(v, y)                              # line 6
        if cfg != 1:
            null = denoiser(v, None)
            z_hat = null + cfg * (z_hat - null)
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
    return model.decode(spherify(model.encode(x, y)), y)


def _checked_classes(model, y):
    device, K = next(model.parameters()).device, model.num_classes
    y = torch.as_tensor(y, device=device)
    if y.ndim != 1 or len(y) < 1 or y.is_floating_point() or not bool(((y >= 0) & (y <= K)).all()):
        raise ValueError(f"y must be a list of classes 0..{K} ({K} is the null class), got {y.tolist()}")
    return y


def _noise_of_steps(model, y, steps, shared, official, seed, first, e):
    """The noise of every step [T, B, N, d]: seeded or given, one draw per step or one for several."""
    draws = min(steps, 2 if official else 1) if shared else steps
    if e is None:
        e = sample_noise(seed, first, len(y), model.latent_shape, draws)
    e = (e[None] if e.ndim == 3 else e).to(y.device)                                       # [draws, B, N, d]
    expected = [draws, len(y), *model.latent_shape]
    if list(e.shape) != expected:
        raise ValueError(f"e must be {expected[draws == 1:]}, got {list(e.shape)}")
    return e[torch.arange(steps).clamp(max=draws - 1)]


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


def steps_label(T):
    return f"{T} step{'s' * (T > 1)}"


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


def class_list(text):
    return [int(word) for word in text.split(",")]


def main(argv=None):
    parser = Parser("sample.py", __doc__)
    what = parser.add_argument_group("what to draw")
    what.add_argument("--checkpoint", default="out/digits/last.pt",
                      help="written by train.py (default %(default)s)")
    what.add_argument("--config", help="cfg.json of the official code, for a checkpoint of its own")
    what.add_argument("--count", type=int, default=80, help="number of images (default %(default)s)")
    what.add_argument("--classes", type=class_list,
                      help="classes in turn, e.g. 3,5; K is the null class (default all)")
    what.add_argument("--seed", type=int, default=0,
                      help="image i depends on (seed, i) alone (default %(default)s)")
    how = parser.add_argument_group("how")
    how.add_argument("--steps", type=int, default=4, help="T of Algorithm 1 (default %(default)s)")
    how.add_argument("--cfg", type=float, default=1.0, help="guidance scale, 1 = off (default %(default)s)")
    how.add_argument("--position", choices=POSITIONS,
                     help="where a Sphere Encoder is guided (default combo)")
    how.add_argument("--gamma", type=float, help="decay of the noise, Eq. 13; 0 = fixed (default 0; Sphere "
                                                 "Latent Encoder: as the preset says)")
    how.add_argument("--fresh", action=argparse.BooleanOptionalAction,
                     help="fresh noise at every step instead of the same one (default likewise)")
    how.add_argument("--project-last", action="store_true",
                     help="Sphere Latent Encoder: project the last prediction before it is decoded")
    how.add_argument("--official", action="store_true",
                     help="share noise from step 2 on, end the decay at 1/T: as the official code does")
    how.add_argument("--alpha", type=float, help="degrees, largest noise angle (default: the training's)")
    how.add_argument("--ema", action=argparse.BooleanOptionalAction,
                     help="averaged weights (default as the preset says)")
    add_rae_options(parser)
    out = parser.add_argument_group("output")
    out.add_argument("--out", default="out/samples", help="folder for the pictures (default %(default)s)")
    out.add_argument("--singles", action="store_true", help="also write every image as a PNG of its own size")
    out.add_argument("--batch-size", type=int, default=100, help="images at a time (default %(default)s)")
    out.add_argument("--device", help="default cuda if there is one, else cpu")
    args = parser.parse_args(argv)
    try:
        draw_samples(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; what {args.out} holds is incomplete\n")


def draw_samples(args):
    if args.count < 1 or args.batch_size < 1:
        raise ValueError(f"--count and --batch-size must be at least 1, "
                         f"got {args.count} and {args.batch_size}")
    out = Path(args.out)
    grid = out / "samples.png"
    if grid.exists() or (args.singles and any(out.glob("[0-9]*.png"))):
        raise ValueError(f"{out} already holds samples; choose another --out, or remove them")
    model = load(args.checkpoint, pick_device(args.device), args.ema, args.config, rae_arguments(vars(args)))
    K = model.num_classes
    options = {"alpha": args.alpha, "gamma": args.gamma, "position": args.position,
               "shared": None if args.fresh is None else not args.fresh,
               "project_last": args.project_last or None}
    options = {name: value for name, value in options.items() if value is not None}
    for name in options.keys() - signature(sampler(model)).parameters.keys():
        raise ValueError(f"--{name.replace('_', '-')} is no option of {type(model).__name__}, of which "
                         f"{args.checkpoint} is a checkpoint; drop it")
    if args.classes and not K:
        raise ValueError(f"--classes: {args.checkpoint} is an unconditional model")
    classes = args.classes or list(range(max(K, 1)))
    if not all(0 <= c <= K for c in classes):
        raise ValueError(f"--classes must be numbers from 0 to {K} ({K} is the null class), "
                         f"got {args.classes}")
    # Balanced, and y[i] depends on i alone.
    y = torch.tensor([classes[i % len(classes)] for i in range(args.count)])

    shown = []
    for start in tqdm(range(0, args.count, args.batch_size), desc="sampling", unit="batch", disable=None):
        x = sampler(model)(model, y[start:start + args.batch_size], args.steps, args.cfg, seed=args.seed,
                           first=start, official=args.official, **options).cpu()
        out.mkdir(parents=True, exist_ok=True)          # only now: a bad option leaves no folder behind
        if args.singles:
            for k, image in enumerate(x):
                to_pil(image).save(out / f"{start + k:06d}.png")
        shown.extend(x[:max(0, 256 - len(shown))])                            # a grid of more is not readable

    names = [*model.class_names, "null"] if K else [""]
    title = f"{steps_label(args.steps)}, cfg {args.cfg:g}, seed {args.seed}"
    by_class = 1 < len(classes) <= 16                                    # then a row per class, else captions
    columns = min(len(shown), len(classes) if by_class else math.ceil(math.sqrt(len(shown))))
    white = [torch.ones_like(shown[0])] * (-len(shown) % columns)               # fills the last row
    images = torch.stack(shown + white).unflatten(0, (-1, columns))             # [rows, columns, 3, H, W]
    if by_class:
        drawn = picture({title: images.transpose(0, 1)}, row_names=[names[c] for c in classes[:columns]])
    else:
        captions = [names[c] for c in y[:len(shown)].tolist()] + [""] * len(white)
        drawn = picture({title: images}, captions=captions if K else None)
    drawn.save(grid)
    print(f"{grid}: {len(shown)} of {args.count} samples")
    if args.singles:
        print(f"{out}/000000.png .. {args.count - 1:06d}.png: one file per sample")


if __name__ == "__main__":
    sys.exit(main())
