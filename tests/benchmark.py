"""Speed and memory: training and sampling of both systems, Inception, the Fréchet distance.

    python tests/benchmark.py                           # small sizes, in minutes on a CPU; on a GPU all sizes
    python tests/benchmark.py --only imagenet-l frechet --compile --seconds 10

One table; an error takes the place of its row. Images, latents and pretrained weights are random: the work is
the same. share: of the rate of a large matrix product of that type, at 2 FLOPs per multiply-add. GiB: peak of
all tensors on the GPU; gradients, averaged weights and the optimizer's state are among them.
"""

import argparse
import gc
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from scipy.linalg import sqrtm
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import convnext_small, inception_v3, vgg16

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fid import INCEPTION_URL, InceptionV3, feature_network, frechet_distance  # noqa: E402
from losses import CONVNEXT_SMALL, VGG16, Objective  # noqa: E402
from models import RAE, RAE_DECODER_SIZE, RAEDecoder, SphereTokenizer, build_model  # noqa: E402
from train import CLIP, PRESETS, build, inputs, pick_device, sampler, update_ema, wrapped  # noqa: E402

DEVICE, GPU, FLOAT, BF16 = pick_device(), torch.cuda.is_available(), torch.float32, torch.bfloat16
# Batches to begin with on a CPU and on a GPU; one that does not fit into the GPU's memory is halved.
BATCHES = {"digits": (64, 64), "digits-latent": (64, 64), "cifar10-base": (4, 64), "imagenet-l": (1, 32),
           "imagenet-xl": (1, 32), "imagenet-latent": (1, 64)}
DOWNLOADS = {VGG16: vgg16, CONVNEXT_SMALL: convnext_small, INCEPTION_URL: InceptionV3}
ROW = "{:28}{:>6}{:>10}{:>12}{:>10}{:>8}{:>7}  {}"


def system(name):
    """Rows of a preset: iterations with what `train` builds, parts of an iteration, sampling."""
    batch, dtype = BATCHES[name][GPU], BF16 if GPU and "digits" not in name else FLOAT
    preset, classes, tokenizer = PRESETS[name], range(1000 if "imagenet" in name else 10), None
    if preset.tokenizer == "rae":                           # without its encoder: latents come from a cache
        tokenizer = RAE(None, RAEDecoder(**RAE_DECODER_SIZE), None, torch.ones(256, 768)).to(DEVICE)
    elif preset.tokenizer:
        tokenizer = SphereTokenizer(build_model(PRESETS[preset.tokenizer], classes)).to(DEVICE)
    model, ema, optimizer = build(preset, classes, tokenizer, 0, DEVICE, None)
    images = (torch.randn(batch, 2, *model.latent_shape) if tokenizer
              else torch.randint(256, (batch, 3, *model.image_size), dtype=torch.uint8))
    labels = torch.arange(batch) % 10
    parts = {"inputs": lambda n: inputs(replace(preset, batch_size=n), model, images[:n], labels[:n], 0, 0),
             "clipping": lambda n: nn.utils.clip_grad_norm_(model.parameters(), CLIP),
             "optimizer": lambda n: optimizer.step(), "EMA": lambda n: update_ema(ema, model, preset.ema, 0)}

    typed = replace(preset, precision="bf16" if dtype == BF16 else "float32")

    def step(n, objective=wrapped(Objective(model, typed).to(DEVICE), False)):
        optimizer.zero_grad()
        loss, _ = objective(*parts["inputs"](n))
        loss.backward()
        for part in ("clipping", "optimizer", "EMA"):
            parts[part](n)

    measured(f"{name} train", step, batch, dtype)
    if args.compile:
        compiled = wrapped(Objective(model, typed).to(DEVICE), True)
        measured(f"{name} train compiled", step, batch, dtype, lambda n: step(n, compiled))
    for part in parts if name in ("digits", "imagenet-l") else ():
        measured(f"{name} {part}", parts[part], batch)
    for T, cfg, kind in ([(T, cfg, FLOAT) for T in (1, 4) for cfg in (1, 1.5)] if "digits" in name
                         else [(4, 1, kind) for kind in rates]):
        autocast = torch.autocast(DEVICE.type, BF16, enabled=kind == BF16)
        sample = autocast(lambda n: sampler(model)(model, [0] * n, T, cfg))
        measured(f"{name} T={T} cfg={cfg}", sample, batch, kind)


def inception(name):
    """Rows of our Inception on 64x64 pixels, and of torchvision's on the 299x299 that it needs."""
    x = torch.randint(256, (50, 3, 64, 64), dtype=torch.uint8, device=DEVICE)
    ours, resized = feature_network(device=DEVICE), torch.rand(50, 3, 299, 299, device=DEVICE)
    theirs = inception_v3(aux_logits=False, init_weights=False).eval().requires_grad_(False).to(DEVICE)
    measured(name, lambda n: ours(x[:n]), 50)
    measured(f"{name} of torchvision", lambda n: theirs(resized[:n]), 50)


def frechet(name):
    """Rows of random covariances, by their rank, compared with the formula by scipy's matrix square root."""
    for rank, count in ((2048, 4096), (1000, 1001)):
        x, y = torch.randn(2, count, 2048, dtype=torch.float64)
        mu1, sigma1, mu2, sigma2, began = x[0], x.T.cov(), y[0], y.T.cov(), time.perf_counter()
        ours, between = frechet_distance(mu1, sigma1, mu2, sigma2), time.perf_counter()
        root, end = sqrtm((sigma1 @ sigma2).numpy()), time.perf_counter()
        theirs = (mu1 - mu2).square().sum() + (sigma1 + sigma2).trace() - 2 * root.trace().real
        note = f"sqrtm {1000 * (end - between):.0f} ms, relative difference {abs(ours / theirs - 1):.0e}"
        print(ROW.format(f"{name} {rank}", "", "float64", round(1000 * (between - began)), "", "", "", note))


def measured(title, call, batch, dtype=FLOAT, compiled=None):
    """Row of a call on a batch; if it is timed compiled, FLOPs are still counted in the plain call."""
    kernels = [SDPBackend.MATH, *[SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION] * GPU]
    while batch:
        try:
            with sdpa_kernel(kernels), FlopCounterMode(display=False) as counter:   # knows no other on a CPU
                call(batch)
            if GPU:
                torch.cuda.reset_peak_memory_stats()
            t = timed(args.seconds, compiled or call, batch)
            peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if GPU else ""
            share = f"{counter.get_total_flops() / t / rates[dtype]:.1%}"
            cells = batch, str(dtype)[6:], f"{1000 * t:.2f}", f"{batch / t:.1f}", share, peak
            print(ROW.format(title, *cells, ""))
            return
        except Exception as error:
            print(f"{title:28}{batch:6}  {error!r:.150}")
            batch = batch // 2 if isinstance(error, torch.OutOfMemoryError) else 0


def timed(seconds, call, *arguments):
    """Median time of a call in seconds; the timer warms up, and waits for a GPU."""
    timer = Timer("call(*arguments)", globals=locals(), num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
groups = dict.fromkeys(BATCHES, system) | {"inception": inception, "frechet": frechet}
parser.add_argument("--only", nargs="+", metavar="NAME", choices=groups, help=", ".join(groups),
                    default=[name for name in groups if GPU or "imagenet" not in name])
parser.add_argument("--compile", action="store_true", help="train with torch.compile too")
parser.add_argument("--seconds", type=float, default=5.0, help="per row (%(default)s)")
args = parser.parse_args()
sys.stdout.reconfigure(line_buffering=True)                 # a row at a time into a file, too
torch.hub.load_state_dict_from_url = lambda url, **options: DOWNLOADS[url]().state_dict()
n = 8192 if GPU else 2048
rates = {dtype: 2 * n**3 / timed(1.0, torch.mm, *torch.randn(2, n, n, dtype=dtype, device=DEVICE))
         for dtype in (FLOAT, BF16)[:1 + GPU]}              # FLOPs per second of a matrix product
cpu = platform.processor() or Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].split("\n")[0]
print(torch.cuda.get_device_name() if GPU else cpu, f"{torch.get_num_threads()} threads", torch.__version__,
      *(f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in rates.items()), sep=", ")
print(ROW.format("", "batch", "type", "ms", "images/s", "share", "GiB", ""))
for name in args.only:
    try:
        groups[name](name)
    except Exception as error:
        print(f"{name:34}  {error!r:.150}")
    gc.collect()                                            # what compiled modules held
