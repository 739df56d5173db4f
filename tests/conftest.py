"""Puts the repository's root on the path, and holds what several test files need."""

import ast
import os
import shutil
import signal
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)                # tests run in as many processes as there are cores: -n auto
os.environ["OMP_NUM_THREADS"] = "1"     # and so do the processes and notebooks that they start
signal.signal(signal.SIGINT, signal.default_int_handler)        # a shell's "command &" ignores Ctrl-C

import models  # noqa: E402
import train as train_module  # noqa: E402
from models import SiT, SphereEncoder, SphereTokenizer  # noqa: E402
from train import PRESETS, train  # noqa: E402

train_module.LOG_EVERY = 2              # tiny runs within this process have several lines and checkpoints
TINY = replace(PRESETS["digits"], patch_size=4, encoder_size=(16, 1, 2), decoder_size=(16, 1, 2),
               latent_dim=4, batch_size=8, iterations=6, warmup=0.3333)
TINY_FLAGS = ("--patch-size 4 --encoder-size 16,1,2 --decoder-size 16,1,2 --latent-dim 4 --batch-size 8 "
              "--iterations 6 --warmup 0.3333").split()


def seeded_array(name, shape):
    """The weights that the golden file gives to a parameter of this name."""
    r = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) == 1:
        r = 1 + 0.3 * r if "norm" in name and name.endswith("weight") else 0.3 * r
    else:
        r = r / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(r, np.float32))


def with_seeded_weights(model):
    """Non-zero weights for every tensor, seeded by its name: at initialisation the gates and last layers are
    zero, and nearly every claim about the network would hold vacuously."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(seeded_array(name, tuple(parameter.shape)))
    return model.eval()


@pytest.fixture
def model():
    """A small conditional model of no symmetric size: 12 x 20 pixels, 3 x 5 tokens, 7 channels, 4 classes."""
    return with_seeded_weights(SphereEncoder((12, 20), 4, 7, 4, (16, 2, 2), (24, 1, 2), 2))


@pytest.fixture
def unconditional():
    return with_seeded_weights(SphereEncoder((12, 20), 4, 7, 0, (16, 2, 2), (24, 1, 2), 2))


@pytest.fixture
def denoiser(unconditional):
    """A small denoiser on the latents of `unconditional`: 15 tokens of 7 channels, 4 classes."""
    tokenizer = SphereTokenizer(unconditional)
    return with_seeded_weights(SiT((3, 5), 7, 4, (24, 2, 2), alpha_max=70.0)).attach(tokenizer)


HUBCONF = """
import torch
from torch import nn
from torch.hub import load_state_dict_from_url
dependencies = ["torch"]

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 32, 14, 14)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 32))
        self.register_tokens = nn.Parameter(torch.zeros(1, 4, 32))
        self.block = nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32, eps=1e-6)

    def forward_features(self, x):
        assert x.shape[2] % 14 == 0 and x.shape[3] % 14 == 0
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([t.expand(len(x), -1, -1) for t in (self.cls_token, self.register_tokens)] + [x], 1)
        x = x + self.block(x)
        y = self.norm(x)
        return {"x_norm_clstoken": y[:, 0], "x_norm_regtokens": y[:, 1:5], "x_norm_patchtokens": y[:, 5:],
                "x_prenorm": x, "masks": None}

def dinov2_vitb14_reg(*, pretrained=True, weights="LVD142M", **kwargs):
    model = Tiny()
    if pretrained:
        url = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth"
        model.load_state_dict(load_state_dict_from_url(url, map_location="cpu"), strict=True)
    return model
"""


def released_rae_decoder():
    """The golden file of the RAE decoder, and its weights under the released names."""
    golden = np.load(ROOT / "tests" / "rae_decoder.npz")
    names = (line.split(" ", 1) for line in golden["keys"].tolist())
    return golden, {name: seeded_array(name, ast.literal_eval(shape)) for name, shape in names
                    if not name.endswith("pos_embed")}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch.hub's folder (TORCH_HOME) with a stand-in of DINOv2 that has the real entry point and keys,
    and the RAE's files of released names and shapes: 4 x 4 tokens of 32 channels, images of 64 x 64."""
    golden, weights = released_rae_decoder()
    weights["decoder_pos_embed"] = with_class_token_table(48)
    files = tmp_path / "home" / "hub" / "checkpoints"
    files.mkdir(parents=True)
    repository = files.parent / "facebookresearch_dinov2_main"
    repository.mkdir()
    (repository / "hubconf.py").write_text(HUBCONF)
    space = {}
    exec(HUBCONF, space)
    network = space["dinov2_vitb14_reg"](pretrained=False)
    torch.save({name: seeded_array(name, tuple(t.shape)) for name, t in network.state_dict().items()},
               files / "dinov2_vitb14_reg4_pretrain.pth")
    torch.save(weights, files / models.RAE_DECODER[1])
    torch.save({"mean": None, "var": torch.tensor(golden["latent_var"])}, files / models.RAE_STATISTICS[1])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(models, "RAE_DECODER_SIZE", dict(token_dim=32, grid=4, width=48, depth=2, heads=4,
                                                         mlp_hidden=96))
    return files


def with_class_token_table(width):
    """MAE's table of a 4 x 4 grid, written out: [1, 17, width], column first, the class token's row zero."""
    table = np.zeros((1, 17, width))
    for token in range(16):
        for half, position in enumerate((token % 4, token // 4)):
            for k in range(width // 4):
                angle = position * 10000.0 ** (-k / (width / 4))
                table[0, 1 + token, half * width // 2 + k] = np.sin(angle)
                table[0, 1 + token, half * width // 2 + width // 4 + k] = np.cos(angle)
    return torch.from_numpy(table.astype(np.float32))


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left(tmp_path_factory, request):
    """Two workers would leave 1.6 GB of checkpoints; after a failure they stay, to be looked at."""
    yield
    if not request.session.testsfailed:
        shutil.rmtree(tmp_path_factory.getbasetemp(), ignore_errors=True)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The checkpoint of a tiny digits run, made once."""
    return train(TINY, tmp_path_factory.mktemp("run") / "tiny", seed=3, device="cpu")


TINY_LATENT = replace(PRESETS["digits-latent"], denoiser_size=(16, 1, 2), batch_size=8, iterations=6,
                      warmup=0.3333)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    """The checkpoint of a tiny unconditional Sphere Encoder on digits: 16 tokens of 4 channels."""
    preset = replace(TINY, conditional=False, alpha_max=45, alpha_hard=0, weights=(1.0, 0.0, 0.0, 0.0, 0.0))
    return train(preset, tmp_path_factory.mktemp("tokenizer") / "run", seed=4, device="cpu")


@pytest.fixture(scope="session")
def trained_latent(tiny_tokenizer, tmp_path_factory):
    """The checkpoint of a tiny Sphere Latent Encoder on digits, made once."""
    preset = replace(TINY_LATENT, tokenizer=str(tiny_tokenizer))
    return train(preset, tmp_path_factory.mktemp("latent") / "tiny", seed=3, device="cpu")


def one_line(capsys, program):
    """What a refused command printed: exactly one line on stderr, from the program, and no traceback."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(program), lines
    return lines[0]
