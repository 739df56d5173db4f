"""Puts the repository's root on the path, and holds what several test files need."""

import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import SphereEncoder  # noqa: E402
from train import PRESETS, train  # noqa: E402

TINY = replace(PRESETS["digits"], encoder_size=(16, 1, 2), decoder_size=(16, 1, 2), latent_dim=4,
               mixer_depth=1, batch_size=8, lr_batch=8, iterations=6, warmup=0.3333, log_every=2,
               checkpoint_every=4, picture_every=0)
TINY_FLAGS = ("--encoder-size 16,1,2 --decoder-size 16,1,2 --latent-dim 4 --mixer-depth 1 --batch-size 8 "
              "--lr-batch 8 --iterations 6 --warmup 0.3333 --log-every 2 --checkpoint-every 4 "
              "--picture-every 0").split()


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


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The checkpoint of a tiny digits run, made once."""
    return train(TINY, tmp_path_factory.mktemp("run") / "tiny", seed=3)


def one_line(capsys, program):
    """What a refused command printed: exactly one line on stderr, from the program, and no traceback."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(program), lines
    return lines[0]
