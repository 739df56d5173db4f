import ast
import contextlib
import inspect
import json
import math
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import numpy as np
import pytest
import torch
import torchvision
from filelock import FileLock
from PIL import Image
from torch.utils._pytree import tree_leaves

import fid
import losses
import models
import sample
import train
from conftest import ROOT, TINY, TINY_FLAGS, TINY_LATENT, one_line
from losses import LPIPS, WEIGHT_NAMES, sphere_encoder_loss, sphere_latent_loss
from sample import load, read_checkpoint
from spherify import logit_normal_sigmas
from test_fid import seeded_inception
from test_models import PUBLISHED
from train import PRESETS, batch_indices, evaluate, learning_rate, load_data, main, random_draws

sys.path.insert(0, str(ROOT / "notebooks"))
import emoji  # noqa: E402

# conftest makes log lines and checkpoints come every 2 iterations
LONGER = replace(TINY, iterations=12)
LONGER_FLAGS = [*TINY_FLAGS, *"--iterations 12 --seed 1 --device cpu".split()]
TOKENIZER = replace(TINY, conditional=False, weights=(1.0, 0.0, 0.0, 0.0, 0.0), iterations=12)
LATENT_FLAGS = ("--preset digits-latent --denoiser-size 16,1,2 --batch-size 8 --iterations 12 --warmup 0.3 "
                "--device cpu").split()
FOLDER_FLAGS = "--preset folder --image-size 16 --weights 1,0,1,0,0.1 --mixer-depth 1".split() + TINY_FLAGS


def command(*words):
    main([str(word) for word in words])


def refused(capsys, *words):
    """The one line with which a command is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        command(*words)
    assert exit.value.code == 2
    return one_line(capsys, "train.py: ")


def lines(path):
    """What a log says but for times, which are no numbers of the run."""
    return [{name: value for name, value in json.loads(line).items() if name != "images/s"}
            for line in path.read_text().splitlines()]


def assert_same_run(a, b):
    """Weights, average, optimizer and log of two run folders are the same bit for bit."""
    assert lines(a / "log.jsonl") == lines(b / "log.jsonl")
    for name, size in (("last.pt", 40), ("model.pt", 20)):
        one, two = (read_checkpoint(folder / name) for folder in (a, b))
        leaves = tree_leaves(one), tree_leaves(two)
        assert one.keys() == two.keys() and len(leaves[0]) == len(leaves[1]) > size
        for left, right in zip(*leaves):
            assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


@contextlib.contextmanager
def killed(path, nth):
    """A run dies halfway through writing this checkpoint for the nth time, after the log's line."""
    def half(content, file, whole=torch.save, times=[]):
        times += [1] * file.name.startswith(f"{path}.")
        if len(times) == nth:
            file.write(b"half a checkpoint")
            raise RuntimeError("killed")
        whole(content, file)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(torch, "save", half)
        yield
    assert not [*path.parent.glob("*.tmp")]


def contents(folder):
    """What is in the files of a run's folder, but for times and what pictures say about themselves."""
    read = {".jsonl": lines, ".png": lambda path: Image.open(path).tobytes(),
            ".npy": lambda path: np.load(path).tobytes(), "": lambda path: path.read_bytes()}
    read[".pt"] = lambda path: [leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else leaf
                                for leaf in tree_leaves(read_checkpoint(path))]
    return {str(path.relative_to(folder)): read[path.suffix](path)
            for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A tiny run of 12 iterations that nothing disturbs."""
    return train.train(LONGER, tmp_path_factory.mktemp("unbroken") / "run", seed=1, device="cpu").parent


@pytest.fixture
def folder(tmp_path):
    """Two classes of coloured images of unequal sizes."""
    rng = np.random.default_rng(0)
    for name, level in (("blue", 30), ("red", 200)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 50, (20 + i, 30, 3), dtype=np.uint8)
            pixels[..., 0] += level
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


# ---- randomness ----


def test_every_epoch_is_a_permutation_and_batches_need_no_history():
    whole = list(batch_indices(10, 4, 7, range(25)))
    epochs = np.reshape(whole, (10, 10)).tolist()
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10
    assert list(batch_indices(10, 4, 7, range(13, 25))) == whole[13:]
    assert len(next(batch_indices(3, 10, 7, range(1)))) == 10               # a batch may span several epochs
    parts = [list(batch_indices(10, 4, 7, range(25), part)) for part in (slice(0, 2), slice(2, 4))]
    assert [a + b for a, b in zip(*parts)] == whole                         # processes share the global batch


def test_a_steps_draws_are_a_function_of_seed_and_step():
    preset = replace(PRESETS["digits"], flip=True)
    draws = [random_draws(preset, seed, step) for seed, step in ((5, 9), (5, 9), (5, 10), (6, 9))]
    for one, same, later, other in zip(*draws):             # flip, drop, sigma, sigma_sub
        assert torch.equal(one, same) and not torch.equal(one, later) and not torch.equal(one, other)


def test_class_drops_are_a_tenth_and_flips_a_half_independent_in_every_pass():
    drawn = [random_draws(replace(PRESETS["digits"], flip=True), 0, step)[:2] for step in range(400)]
    coins = torch.cat([torch.cat([drop, flip[None]]) for flip, drop in drawn], dim=1).double()    # [5, n]
    expected, n = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.5]), coins.shape[1]
    assert ((coins.mean(1) - expected).abs() < 4 * (expected * (1 - expected) / n).sqrt()).all()
    assert (torch.corrcoef(coins) - torch.eye(5)).abs().max() < 4 / math.sqrt(n)
    assert not random_draws(PRESETS["digits"], 0, 0)[0].any()               # which does not mirror its images


def test_no_two_purposes_steps_or_seeds_share_a_generator():
    purposes = ("order", "draws", "init", "choice", "loader", "noise")
    seeds = [train.seeded(seed, purpose, index).initial_seed()
             for seed in range(4) for purpose in purposes for index in range(8)]
    assert len(set(seeds)) == len(seeds)


def test_officially_reconstruction_without_pixel_consistency_is_from_the_large_noise():
    for mapping in ("official", "sigma"):
        for con in ((0.5, 0.5), (0.0, 0.5), (0.0, 0.0)):
            preset = replace(PRESETS["digits"], mapping=mapping, weights=(1.0, 1.0, *con, 0.1))
            _, _, sigma, sigma_sub = random_draws(preset, 0, 0)
            assert torch.equal(sigma, sigma_sub) == (mapping == "official" and not any(con))


BY_HAND = dict(iterations=3, flip=True, weight_decay=0.3, ema=0.15, warmup=1 / 3,
               weights=(2.0, 0.5, 1.0, 0.25, 0.1))


def assert_loop_written_out(preset, out, monkeypatch, scales, loss_of, latent_shape=None):
    """Three iterations by hand: data, flip, class drops, noise, loss, clipping, AdamW and average.

    scales  {prefix of parameters: factor of their learning rate}
    """
    monkeypatch.setattr(train, "CLASS_DROPOUT", 0.5)
    monkeypatch.setattr(train, "CLIP", 0.01)
    stored = read_checkpoint(train.train(preset, out, seed=8, device="cpu"))
    data = load_data(preset)[0]
    model = models.build_model(preset, [str(k) for k in range(10)], latent_shape, train.seeded(8, "init"))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    average = {name: p.detach().clone() for name, p in trainable.items()}
    optimizer = torch.optim.AdamW(
        [{"params": [p for name, p in trainable.items() if name.startswith(side) and (p.ndim > 1) == matrix],
          "weight_decay": 0.3 * matrix, "scale": scale}
         for side, scale in scales.items() for matrix in (True, False)], lr=0.0, betas=(0.9, 0.95))
    order = torch.randperm(1500, generator=train.seeded(8, "order", 0))
    for step, lr in enumerate((preset.lr / 2, preset.lr, (preset.lr + preset.min_lr) / 2)):
        flips, drops, *sigmas = random_draws(preset, 8, step)
        chosen = order[8 * step:8 * step + 8].tolist()
        x = data[chosen][0].float() / 127.5 - 1
        x = torch.stack([image.flip(2) if flip else image for image, flip in zip(x, flips)])
        labels = data[chosen][1]
        y = torch.stack([torch.where(drop, 10, labels) for drop in drops])
        e = torch.randn(8, *model.latent_shape, generator=train.seeded(8, "noise", step))
        loss = loss_of(model, x, y, *sigmas, e, step)
        gradients = torch.autograd.grad(loss, list(trainable.values()))
        norm = torch.sqrt(sum(g.square().sum() for g in gradients))
        assert norm > 0.01                                                  # so that clipping acts
        for p, g in zip(trainable.values(), gradients):
            p.grad = g * 0.01 / (norm + 1e-6)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        optimizer.step()
        decay = min(0.15, (1 + step) / (10 + step))
        for name, p in trainable.items():
            average[name] = decay * average[name] + (1 - decay) * p.detach()
    for name, p in trainable.items():
        # Adam divides by the gradient's size: rounding of a tiny one counts, here up to 1 % of the rate.
        torch.testing.assert_close(stored["model"][name], p.detach(), rtol=1e-4, atol=4e-5)
        torch.testing.assert_close(stored["ema"][name], average[name], rtol=1e-4, atol=4e-5)


def test_the_loop_is_what_it_says_written_out(tmp_path, monkeypatch):
    """The encoder learns at half the rate."""
    torch.manual_seed(0)
    perceptual = LPIPS().requires_grad_(False).eval()
    monkeypatch.setattr(losses, "perceptual_distance", {"lpips": perceptual}.get)
    preset = replace(TINY, **BY_HAND, encoder_lr_scale=0.5)

    def loss_of(*args):
        return sphere_encoder_loss(*args[:-1], preset.weights, perceptual)[0]

    assert_loop_written_out(preset, tmp_path / "run", monkeypatch, {"encoder": 0.5, "decoder": 1.0}, loss_of)


# ---- schedules ----


def test_learning_rate_warms_up_linearly_and_ends_at_its_minimum():
    preset = replace(TINY, lr=1.0, min_lr=0.1, warmup=4 / 104)
    rates = [learning_rate(preset, step, 104) for step in range(104)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8]) and rates[4] == 1.0
    assert rates[54] == pytest.approx(0.55)                                  # half of the cosine
    assert rates[-1] == pytest.approx(0.1, abs=1e-3) and learning_rate(preset, 104, 104) == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[4:], rates[5:]))


def test_the_length_given_replaces_that_of_the_preset_and_epochs_are_of_its_data(tmp_path):
    digits = "--dataset digits --image-size 16 --patch-size 4 --weights 1,0,1,0,0.1".split()
    command("--out", tmp_path / "a", "--preset", "cifar10", *digits, *TINY_FLAGS)   # instead of 5000 epochs
    command("--out", tmp_path / "b", *TINY_FLAGS[:10], "--epochs", "0.02")              # instead of 2200
    steps = [read_checkpoint(tmp_path / name / "last.pt")["step"] for name in "ab"]
    assert steps == [6, math.ceil(0.02 * 1500 / 8)] and "--iterations" not in TINY_FLAGS[:10]


# ---- resume ----


@pytest.mark.parametrize("settings", [
    dict(lr=0.3, use_ema=False),                            # of which a model before the last one is the best
    dict(batch_norm=True, swd_weight=0.1, encoder_classes=False, use_ema=False)])       # SE App. C.3
def test_a_run_that_is_evaluated_killed_and_resumed_equals_one_that_nothing_disturbs(
        tmp_path, monkeypatch, settings):
    """Checkpoints at every second iteration, evaluations at every third: both logs are ahead of last.pt."""
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    preset, broken = replace(TINY, iterations=20, **settings), tmp_path / "broken"
    whole = train.train(preset, tmp_path / "whole", seed=1, device="cpu").parent
    evaluated = dict(seed=1, device="cpu", evaluate_every=3 * 8 / 1500, count=20, steps=(1, 2))
    with killed(broken / "last.pt", 6):                                     # after 0, 2, 4, 6, 8 and 10
        train.train(preset, broken, **evaluated)
    assert read_checkpoint(broken / "last.pt")["step"] == 8
    assert [len(lines(broken / name)) for name in ("log.jsonl", "evaluations.jsonl")] == [10, 4]
    with killed(broken / "model.pt", 1):
        train.train(preset, broken, resume=True, **evaluated)
    assert read_checkpoint(broken / "last.pt")["step"] == 8 and load(broken / "model.pt")
    train.train(preset, broken, resume=True, **evaluated)
    assert_same_run(broken, whole)
    evaluations = lines(broken / "evaluations.jsonl")
    scores = {line["step"]: line["Fréchet distance"]["T = 2"] for line in evaluations}
    assert list(scores) == [0, 3, 6, 9, 12, 15, 18, 20]
    assert distance(broken / "best.pt", 2) == min(scores.values())
    if not preset.batch_norm:
        assert min(scores.values()) < scores[20]
        return
    stored = read_checkpoint(whole / "last.pt")
    assert stored["model"]["norm.running_mean"].abs().max() > 0
    assert torch.equal(stored["ema"]["norm.running_var"], stored["model"]["norm.running_var"])
    assert all(line["swd"] > 0 for line in lines(whole / "log.jsonl"))


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_run_that_ends_at_any_of_its_writes_is_resumed_to_the_same_folder(tmp_path, monkeypatch, moment):
    """A tokenizer, then its denoiser, evaluated. A file gets its name by os.replace; the nth is the end."""
    def ends(source, target, whole=os.replace):
        writes.append(target)
        if moment == "before" and len(writes) == n:
            raise SystemExit
        whole(source, target)
        if len(writes) == n:
            raise SystemExit

    monkeypatch.setitem(PRESETS, "digits-tokenizer", replace(TOKENIZER, iterations=2))
    preset = replace(TINY_LATENT, iterations=4)
    options = dict(seed=1, device="cpu", evaluate_every=2 * 8 / 1500, count=20, steps=1)
    whole = contents(train.train(preset, tmp_path / "whole", **options).parent)
    for n in range(1, 99):
        writes, broken = [], tmp_path / str(n)
        with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
            patch.setattr(os, "replace", ends)
            train.train(preset, broken, **options)
        if len(writes) < n:
            break
        last = train.train(preset, broken, resume=(broken / "last.pt").exists(), **options)
        assert contents(last.parent) == whole, f"{n}: {writes[-1]}"
    assert n > 15 and len(whole) == 16


def test_scores_are_compared_with_those_of_the_same_settings(tmp_path):
    """Other numbers of steps, then a reference that is farther: its first score begins anew."""
    run, rng = tmp_path / "run", np.random.default_rng(0)
    np.savez(tmp_path / "white.npz", arr_0=rng.integers(250, 256, (20, 16, 16, 3), dtype=np.uint8))
    options = dict(seed=1, device="cpu", evaluate_every=0.01, count=20)
    train.train(TINY, run, **options, steps=1)
    for iterations, more in ((8, dict(steps=2)), (10, dict(steps=1, reference=tmp_path / "white.npz"))):
        train.train(replace(TINY, iterations=iterations), run, resume=True, **options, **more)
    *before, last = [line["Fréchet distance"] for line in lines(run / "evaluations.jsonl")]
    assert [*map(list, before)] == [["T = 1", "real held-out"]] * 4 + [["T = 2", "real held-out"]]
    assert last["T = 1"] > 2 * before[0]["T = 1"]
    best, model = (load(run / name).state_dict() for name in ("best.pt", "model.pt"))
    assert all(torch.equal(best[name], tensor) for name, tensor in model.items())


def test_an_untrained_model_is_evaluated_as_it_is_by_default(tmp_path):
    train.train(replace(TINY, iterations=1), tmp_path / "run", device="cpu", evaluate_every=1.0)
    assert [line["step"] for line in lines(tmp_path / "run" / "evaluations.jsonl")] == [0, 1]


def test_a_tokenizer_may_be_a_preset_with_classes(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "digits", replace(TINY, iterations=2))
    path = train.train(replace(TINY_LATENT, tokenizer="digits"), tmp_path / "run", device="cpu")
    own = load(tmp_path / "run" / "tokenizer" / "last.pt").state_dict()
    held = load(path).tokenizer.model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in held.items())


def test_a_tokenizer_whose_perceptual_network_is_missing_leaves_no_run(tmp_path, monkeypatch):
    def missing(url):
        raise OSError("no VGG here")

    monkeypatch.setattr("losses.pretrained", missing)
    monkeypatch.setitem(PRESETS, "digits", replace(TINY, weights=(1.0, 1.0, 0.0, 0.0, 0.0)))
    with pytest.raises(OSError, match="no VGG here"):
        train.train(replace(TINY_LATENT, tokenizer="digits"), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_one_process_writes_to_a_folder_until_it_is_killed(unbroken, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "FileLock", lambda path, timeout: FileLock(path, 0))
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    holds = "import filelock, sys\nwith filelock.FileLock(sys.argv[1]): print(flush=True), input()"
    process = subprocess.Popen([sys.executable, "-c", holds, next(run.glob(".held*"))],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    before = contents(run)
    assert str(run) in refused(capsys, "--out", run, "--resume", "--iterations", "14")
    assert contents(run) == before
    process.kill()
    process.wait()
    command("--out", run, "--resume", "--iterations", "14")
    assert read_checkpoint(run / "last.pt")["step"] == 14


def test_a_run_trains_in_a_thread_too(tmp_path):
    with ThreadPoolExecutor() as pool:
        assert pool.submit(train.train, TINY, tmp_path / "run", device="cpu").result().exists()


def test_a_ctrl_c_that_the_loop_does_not_see_goes_to_whoever_is_next():
    with train.interruptible() as outer:
        with train.interruptible():
            signal.raise_signal(signal.SIGINT)              # in the last picture of a tokenizer, say
        assert outer == [signal.SIGINT]
        outer.clear()
    with pytest.raises(KeyboardInterrupt), train.interruptible():
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("signals, stands", [
    ([signal.SIGINT], 5), ([signal.SIGTERM], 5), ([signal.SIGHUP], 5), ([signal.SIGINT, signal.SIGINT], 4)])
def test_ctrl_c_saves_says_where_and_resumes_exactly(
        unbroken, tmp_path, capsys, monkeypatch, signals, stands):
    """In iteration 5, between two lines of the log; a second Ctrl-C does not wait for the iteration's end."""
    def draws(preset, seed, step, whole=random_draws):
        for number in signals if step == 4 else ():
            signal.raise_signal(number)
        return whole(preset, seed, step)

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(train, "random_draws", draws)
        command("--out", tmp_path / "run", *LONGER_FLAGS)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    line = one_line(capsys, "train.py: ")
    assert exit.value.code == 130 and "interrupted" in line
    assert len(signals) > 1 or f"of {tmp_path / 'run'};" in line and "--resume" in line
    assert read_checkpoint(tmp_path / "run" / "last.pt")["step"] == stands
    command("--out", tmp_path / "run", "--resume")
    assert_same_run(tmp_path / "run", unbroken)


def test_a_finished_run_goes_on_with_a_new_length_on_its_schedule(unbroken, tmp_path, capsys):
    shutil.copytree(unbroken, tmp_path / "run")
    command("--out", tmp_path / "run", "--resume", "--iterations", "16")
    assert "iterations 12 to 16" in capsys.readouterr().out
    log, before = lines(tmp_path / "run" / "log.jsonl"), lines(unbroken / "log.jsonl")
    assert log[:len(before)] == before and [line["step"] for line in log[len(before):]] == [14, 16]
    assert log[-2]["lr"] == learning_rate(replace(LONGER, iterations=16), 13, 16) > before[-1]["lr"]
    shorter = ["--out", tmp_path / "run", "--resume", "--epochs", "0.01"]
    assert "16 iterations are done already" in refused(capsys, *shorter)


def test_a_run_begins_from_a_checkpoint_of_these_or_of_other_classes(trained, folder, tmp_path, capsys):
    start = load(trained).state_dict()
    still = ["--lr", "1e-12", "--min-lr", "0", "--iterations", "2", "--no-use-ema", "--init", trained]
    command(*TINY_FLAGS, *still, "--out", tmp_path / "same")
    same = load(tmp_path / "same" / "last.pt").state_dict()
    assert all(torch.allclose(same[name], tensor, atol=1e-6) for name, tensor in start.items())
    command("--data", folder, *FOLDER_FLAGS, "--patch-size", "4", *still, "--out", tmp_path / "other")
    other = load(tmp_path / "other" / "last.pt").state_dict()
    changed = {name for name in other if other[name].shape == start[name].shape
               and not torch.allclose(other[name], start[name], atol=1e-6)}
    assert not changed and other["encoder.y_embedder.embedding_table.weight"].shape[0] == 3
    assert f"{len(other) - 2} " in capsys.readouterr().out                  # all but the two class tables
    assert "no weights of such a model" in refused(
        capsys, *LATENT_FLAGS, "--tokenizer", trained, "--init", trained, "--out", tmp_path / "none")


def test_a_finished_run_stays_as_it_is(unbroken, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    for name in (f"last.pt.{uuid4()}.tmp", "mine.tmp"):                     # of a killed writer, and a user's
        (run / name).write_bytes(b"half")
    command("--out", run, "--resume")
    assert_same_run(run, unbroken)
    assert [path.name for path in run.glob("*.tmp")] == ["mine.tmp"]
    for words, named in (("--seed 1", "already holds a run"), ("--resume --lr 0.5", "lr 0.005, not 0.5"),
                         ("--resume --seed 9", "seed 1, not 9"),
                         ("--resume --preset digits-tokenizer", "conditional True, not False")):
        assert named in refused(capsys, "--out", run, *words.split())
        assert_same_run(run, unbroken)


def test_resume_and_evaluation_refuse_another_data_set(folder, tmp_path, capsys):
    last = tmp_path / "run" / "last.pt"
    command("--data", folder, "--out", last.parent, *FOLDER_FLAGS)
    shutil.move(folder, tmp_path / "elsewhere")
    command("--data", tmp_path / "elsewhere", "--out", last.parent, "--resume")         # the same one, moved
    (tmp_path / "elsewhere" / "red").rename(tmp_path / "elsewhere" / "green")
    before = last.read_bytes()
    for words in (["--out", last.parent, "--resume"], ["--evaluate", last, "--count", "5"]):
        line = refused(capsys, *words, "--data", tmp_path / "elsewhere")
        assert "red" in line and last.read_bytes() == before


# ---- processes ----


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
PROGRAM = f"""
import contextlib, json, sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]}
import train
from test_train import TOKENIZER
train.LOG_EVERY, train.PRESETS["digits-tokenizer"] = 1, TOKENIZER
*first, last = json.loads(sys.argv[1])
for words in first:
    with contextlib.suppress(SystemExit):
        train.main(words)
train.main(last)
"""


def start_processes(folder, *commands, options=("--standalone", "--nproc_per_node=2")):
    """train.py under torchrun, for one command after the other."""
    program = folder / "program.py"
    program.write_text(PROGRAM)
    words = json.dumps([[str(word) for word in words] for words in commands])
    return subprocess.Popen([*TORCHRUN, *options, program, words], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def at_42_of_60(tmp_path_factory):
    """The digits preset but for its length, at iteration 42, and the log of its 18 iterations to come."""
    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "LOG_EVERY", 1)
        with killed(folder / "last.pt", 9):                                 # after 0, 6, 12, .., 48
            train.train(replace(PRESETS["digits"], iterations=60), folder, seed=11, device="cpu")
        shutil.copytree(folder, folder / "whole")
        command("--out", folder / "whole", "--resume", "--device", "cpu")
    log = lines(folder / "whole" / "log.jsonl")[42:]
    assert len(log) == 18 and log[0]["con_l1"] > 1e-4                      # trained: noise makes a difference
    return folder, log


@pytest.fixture
def continued(at_42_of_60, tmp_path, monkeypatch):
    """A copy of that run, and a function that compares what became of it with a tolerance."""
    start, log = at_42_of_60
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    shutil.copytree(start, tmp_path / "run", ignore=shutil.ignore_patterns("whole"))

    def compare(tolerance):
        assert read_checkpoint(tmp_path / "run" / "last.pt")["step"] == 60
        for a, b in zip(lines(tmp_path / "run" / "log.jsonl")[42:], log, strict=True):
            assert a == pytest.approx(b, rel=0, abs=tolerance)
    return tmp_path / "run", compare


def test_two_processes_give_the_numbers_of_one(trained, tmp_path, monkeypatch, capsys):
    """Losses of a tokenizer and its denoiser, their evaluations, and one of several batches."""
    monkeypatch.setitem(PRESETS, "digits-tokenizer", TOKENIZER)
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    evaluation = ["--evaluate", trained, *"--count 230 --steps 2 --device cpu".split()]
    words = [*LATENT_FLAGS, *"--evaluate-every 0.04 --count 20 --steps 1 --out".split()]
    process = start_processes(tmp_path, [*words, tmp_path / "two"], evaluation)
    command(*words, tmp_path / "one")
    capsys.readouterr()
    command(*evaluation)
    one = table(capsys.readouterr().out)
    two, errors = process.communicate()
    assert process.returncode == 0 and len(one) == 6 and one == table(two), errors
    assert [line["step"] for line in lines(tmp_path / "two" / "evaluations.jsonl")] == [0, 8, 12]
    for folder in ("", "tokenizer"):
        logs = [lines(tmp_path / n / folder / "log.jsonl") for n in ("one", "two")]
        for a, b in zip(*logs, strict=True):
            assert a == pytest.approx({**b, "grad_norm": a["grad_norm"]}, rel=1e-3, abs=1e-4)


def test_two_nodes_of_one_process_give_the_losses_of_one(continued, tmp_path):
    run, compare = continued
    port = 20_000 + os.getpid() % 10_000                # below the ports that other connections are given
    options = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}"]
    nodes = [start_processes(tmp_path, ["--out", run, *"--resume --device cpu --accumulate 2".split()],
                             options=[*options, f"--node_rank={node}"]) for node in (0, 1)]
    outputs = [node.communicate()[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    compare(1e-5)


@pytest.mark.parametrize("option", ["--accumulate 4", "--compile"])
def test_micro_batches_and_compilation_change_no_loss(continued, monkeypatch, option):
    """Compiled as one graph, by a backend that needs no compiler: inductor takes minutes."""
    def compile(self, **options):
        used.append("--compile")
        torch.nn.Module.compile(self, backend="aot_eager", fullgraph=True, **options)

    used, (run, compare) = [], continued
    monkeypatch.setattr(losses.Objective, "compile", compile)
    names = [read_checkpoint(run / "last.pt")[part].keys() for part in ("model", "ema")]
    command("--out", run, *"--resume --device cpu".split(), *option.split())
    compare(1e-5)
    assert used == ["--compile"] * (option == "--compile")
    assert names == [read_checkpoint(run / "last.pt")[part].keys() for part in ("model", "ema")]


def test_bf16_autocasts_the_networks_and_nothing_else(tmp_path, monkeypatch):
    seen, whole = [], losses.sphere_encoder_loss

    def look(model, x, *rest):
        seen.append(torch.is_autocast_enabled("cpu"))
        loss, parts = whole(model, x, *rest)
        assert loss.dtype == torch.float32 and all(part.dtype == torch.float32 for part in parts.values())
        return loss, parts

    monkeypatch.setattr(losses, "sphere_encoder_loss", look)
    pictures = []
    monkeypatch.setattr(train, "draw", lambda *_: pictures.append(torch.is_autocast_enabled("cpu")))
    auto, bf16 = (train.train(replace(TINY, precision=name), tmp_path / name, seed=3, device="cpu").parent
                  for name in ("auto", "bf16"))
    half = len(seen) // 2
    assert seen == [False] * half + [True] * half and half > TINY.iterations    # and for the held-out loss
    assert pictures == [False] * (len(pictures) // 2) + [True] * (len(pictures) // 2) and pictures
    for a, b in zip(lines(bf16 / "log.jsonl"), lines(auto / "log.jsonl"), strict=True):
        assert a["loss"] != b["loss"] and a["loss"] == pytest.approx(b["loss"], rel=0.02)
    stored = read_checkpoint(bf16 / "last.pt")
    assert all(tensor.dtype == torch.float32 for part in ("model", "ema") for tensor in stored[part].values())


def test_a_mistake_of_all_processes_or_of_one_is_one_line(folder, tmp_path):
    batch = next(batch_indices(12, 8, 0, range(1)))
    path = sorted(folder.glob("*/*.png"))[batch[-1]]                        # in the second process's share
    path.write_bytes(b"rubbish")
    words = ["--out", tmp_path / "run", "--data", folder, *FOLDER_FLAGS, "--device", "cpu", "--workers", "0"]
    process = start_processes(tmp_path, [*words, "--batch-size", "7"], words)
    errors = process.communicate()[1]
    found = [line for line in errors.splitlines() if line.startswith("train.py: ")]
    assert process.returncode != 0 and len(found) == 2, errors
    assert "--batch-size must be" in found[0] and f"{path}: not a readable image" in found[1]


# ---- what a run leaves ----


def test_a_run_leaves_log_plot_pictures_and_checkpoints_of_plain_values(tmp_path, capsys):
    run = tmp_path / "run"
    command("--out", run, *TINY_FLAGS)
    names = sorted(path.name for path in run.iterdir() if path.name[0] != ".")
    pictures = ["losses.png", "samples-000002.png", "samples-000004.png", "samples-000006.png"]
    assert names == ["last.pt", "log.jsonl", *pictures[:1], "model.pt", *pictures[1:]]
    output = capsys.readouterr().out
    assert all(str(run / name) in output for name in pictures[1:])
    assert [line["step"] for line in lines(run / "log.jsonl")] == [2, 4, 6]
    first, *rest = output.splitlines()
    assert first.startswith(f"{run}: 1,500 images of 10 classes") and first.endswith("iterations 0 to 6")
    assert [line.split()[0] for line in rest if "images/s" in line] == ["2/6", "4/6", "6/6"]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(line["images/s"] > 0 and line["held_out_recon_l1"] > 0 for line in log)
    for line in lines(run / "log.jsonl"):
        parts = [line[name] for name in WEIGHT_NAMES]
        assert line["loss"] == pytest.approx(sum(w * part for w, part in zip(TINY.weights, parts)), rel=1e-5)
    last, model = (read_checkpoint(run / name) for name in ("last.pt", "model.pt"))
    assert all(torch.equal(tensor, last["ema"][name]) for name, tensor in model["model"].items())
    plain = (str, int, float, bool, type(None), torch.Tensor)
    assert all(isinstance(leaf, plain) for leaf in tree_leaves([last, model]))


def test_settings_of_numpy_and_paths_are_stored_as_plain_values(trained, tmp_path):
    preset = replace(TINY, lr=np.float64(TINY.lr), iterations=np.int64(6), data=Path("data"),
                     weights=[*TINY.weights], sampling={"alpha": np.float32(60)})
    assert (preset, preset.sampling) == (replace(TINY, sampling={"alpha": 60.0}), {"alpha": 60.0})
    run = train.train(preset, tmp_path / "run", seed=np.int64(3), device="cpu")
    assert lines(run.parent / "log.jsonl") == lines(trained.parent / "log.jsonl")
    train.train(preset, run.parent, seed=3, resume=True, device="cpu")


def test_seeds_and_only_seeds_and_settings_decide_a_run(trained, tmp_path):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert_same_run(train.train(TINY, tmp_path / "again", seed=3, device="cpu").parent, trained.parent)
    assert torch.equal(before, torch.get_rng_state())               # the global random state is left alone
    other = train.train(TINY, tmp_path / "other", seed=4, device="cpu")
    assert lines(other.parent / "log.jsonl") != lines(trained.parent / "log.jsonl")


def test_a_loss_that_is_not_finite_stops_with_iteration_and_part(tmp_path, capsys, monkeypatch):
    calls = []

    def breaks(*args, whole=losses.sphere_encoder_loss):
        calls.append(torch.is_grad_enabled() and len(args[1]) == 8)         # in a training step
        loss, parts = whole(*args)
        return loss, {**parts, "con_l1": parts["con_l1"] / (0 if sum(calls) == 5 else 1)}

    monkeypatch.setattr(losses, "sphere_encoder_loss", breaks)
    line = refused(capsys, "--out", tmp_path / "run", *LONGER_FLAGS)
    assert "con_l1" in line and "iteration 5" in line
    assert read_checkpoint(tmp_path / "run" / "last.pt")["step"] == 4


# ---- data ----


def test_digits_are_1500_and_a_balanced_random_part_that_reads_like_them_in_three_channels():
    from sklearn.svm import SVC
    data, held_out, names = load_data(PRESETS["digits"])
    assert (len(data), len(held_out), names) == (1500, 297, list("0123456789"))
    assert set(held_out.targets.bincount().tolist()) == {29, 30}
    image, _ = data[0]
    assert image.shape == (3, 16, 16) and image.dtype == torch.uint8 and image.max() > 200
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
    x, z = (fid.pixel_features(part[range(len(part))][0], grey=True) for part in (data, held_out))
    assert SVC(gamma="scale", C=10).fit(x, data.targets).score(z, held_out.targets) > 0.98


def test_many_images_are_read_when_they_are_asked_for_and_train_the_same_model(folder, tmp_path, monkeypatch):
    for name, limit in (("few", 2**30), ("many", 0)):
        monkeypatch.setattr(train, "IN_MEMORY", limit)
        command("--data", folder, "--out", tmp_path / name, *FOLDER_FLAGS, "--workers", "1")
    assert_same_run(tmp_path / "few", tmp_path / "many")


def images_at(root, paths, preset="folder"):
    """What is read of a folder with these images."""
    for path in paths.split():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(f"{root / path}.png")
    return load_data(replace(PRESETS[preset], data=str(root), image_size=8))


@pytest.mark.parametrize("paths, trained, held_out, names", [
    ("train/cat/1 train/dog/1 valid/dog/1 test/cat/1", [0, 1], [1], ["cat", "dog"]),
    ("Train/cat/1 Train/dog/1 Test/dog/1", [0, 1], [1], ["cat", "dog"]),
    ("train/1 val/1 other/1", [0], [0], []),
    ("train/1 bus/1 car/1", [2, 0, 1], None, ["bus", "car", "train"]),           # railways, no split
    ("train/1 _bus/1", [1, 0], None, ["_bus", "train"]),
    ("train/a/1 train/b/1 .git/1", [0, 1], None, ["a", "b"]),
    ("val/1 test/1", [1, 0], None, ["test", "val"]),
    ("training/a/1 training/b/1 testing/b/1 testing/b/2", [0, 1], [1, 1], ["a", "b"]),
    ("train/a/1 train/b/1 eval/b/1", [0, 1], [1], ["a", "b"]),
    ("all/a/1 all/b/1", [0, 1], None, ["a", "b"]), ("x/y/train/1 x/y/val/1", [0], [0], []),
    ("0/1 1/1 10/1 2/1", [0, 1, 2, 3], None, ["0", "1", "10", "2"]), ("a/1 cover", [0, 0], None, []),
    ("a/1 b/deep/er/1 cover", [0, 1], None, ["a", "b"])])
def test_folders_are_classes_or_splits(tmp_path, paths, trained, held_out, names):
    data, rest, found = images_at(tmp_path, paths)
    assert (sorted(data.targets), found) == (sorted(trained), names)
    assert rest is None if held_out is None else rest.targets.tolist() == held_out


@pytest.mark.parametrize("paths", ["train/1 val/a/1 val/b/1", "train/a/1 train/b/1 val/a/1 val/c/1"])
def test_held_out_classes_that_are_not_trained_on_are_refused(tmp_path, paths):
    with pytest.raises(OSError, match=rf"{tmp_path / 'val'}\b.*\bclasses\b"):
        images_at(tmp_path, paths)


def test_animal_faces_train_on_all_images(tmp_path):
    data, *others = images_at(tmp_path, "train/cat/1 train/dog/1 val/cat/2 val/dog/2", "animal-faces")
    assert data.targets.tolist() == [0, 1, 0, 1] and others == [None, ["cat", "dog"]]


@pytest.mark.parametrize("layout, names", [("classes", ["blue", "red"]), ("one class", []), ("flat", [])])
def test_any_folder_trains_and_is_judged_with_the_classes_it_has(folder, tmp_path, capsys, layout, names):
    for path in sorted((folder / "red").iterdir())[len(names) // 2:]:       # one image of a class is enough
        path.unlink()
    for path in sorted((folder / "blue").iterdir()) if layout == "flat" else ():
        path.rename(folder / path.name)
    command("--data", folder, "--out", tmp_path / "run", *FOLDER_FLAGS)
    assert f"{6 + len(names) // 2} images of {len(names)} classes" in capsys.readouterr().out
    assert load(tmp_path / "run" / "last.pt").class_names == names
    assert Image.open(tmp_path / "run" / "samples-000006.png").height > 50
    assert ("judged right" in evaluate(tmp_path / "run" / "model.pt", count=20, steps=1)) == bool(names)


@pytest.mark.parametrize("in_memory", [0, 2**30])
def test_a_corrupt_image_is_named_in_one_line(folder, tmp_path, capsys, monkeypatch, in_memory):
    monkeypatch.setattr(train, "IN_MEMORY", in_memory)
    (folder / "red" / "3.png").write_bytes(b"rubbish")
    line = refused(capsys, "--data", folder, "--out", tmp_path / "run", *FOLDER_FLAGS)
    assert (f"1 of 12 images cannot be used; remove or replace them: {folder / 'red' / '3.png'}: not a "
            "readable image") in line
    assert not (tmp_path / "run").exists()                                  # so that a new start is possible


@pytest.fixture
def clothes(tmp_path):
    """Unpacked files of Fashion-MNIST: 20 and 10 white images, of classes in turn."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 20), ("t10k", 10)):
        images, labels = b"\xff" * (784 * n), bytes(i % 10 for i in range(n))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, n, 28, 28) + images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, n) + labels)
    return raw


def test_fashion_mnist_is_read_from_its_unpacked_files(clothes, tmp_path):
    data, held_out, names = load_data(replace(PRESETS["fashion-mnist"], data=str(tmp_path)))
    image, label = data[3]
    assert (len(data), len(held_out), label, names[9]) == (20, 10, 3, "Ankle boot")
    assert image.shape == (3, 32, 32) and (image[:, 2:30, 2:30] == 255).all()
    assert image.double().mean() == 255 * (28 / 32) ** 2


def test_a_held_out_emoji_is_not_trained_on_by_another_artist_nor_under_another_name(tmp_path):
    """Three packages of twelve faces, of which an artist has not drawn the first, and one drew two alike."""
    codes = [f"1f6{i:02d}" for i in range(12)]
    listed = [{"subcategory": "face-smiling", "sort_order": i, "unified": code.upper()}
              for i, code in enumerate(codes)]
    for red, (artist, (package, name)) in enumerate(emoji.ARTISTS.items()):
        images = {code: Image.new("RGBA", (128, 128)) for code in codes}            # transparent
        for green, image in enumerate(images.values()):
            image.paste((80 * red, 20 * green, 0, 255), (0, 0, 64, 64))
        if artist == "noto":
            del images[codes[0]]
            images[codes[9]] = images[codes[5]]
        (tmp_path / "emoji.json").write_text(json.dumps(listed))
        with tarfile.open(tmp_path / package, "w:gz") as archive:
            archive.add(tmp_path / "emoji.json", "package/emoji.json")
            for code, image in images.items():
                image.save(tmp_path / Path(name.format(code)).name)
                archive.add(tmp_path / Path(name.format(code)).name, name.format(code))
    emoji.main(tmp_path)
    files = {part: {path.stem.partition("-")[::2] for path in (tmp_path / "emoji" / part).rglob("*.png")}
             for part in ("train", "val")}
    drawn = {(code, artist) for code in codes for artist in emoji.ARTISTS}
    held_out = {(code, artist) for code, artist in drawn if code in (codes[4], codes[9])}
    assert files == {"train": drawn - held_out - {(codes[0], "noto")}, "val": held_out - {(codes[9], "noto")}}
    data, _, _ = load_data(replace(PRESETS["emoji"], data=str(tmp_path / "emoji")))
    assert (data[:][0][:, :, 20:, 20:] == 255).all() and (data[:][0][:, 2, :8, :8] < 20).all()     # on white


@pytest.mark.parametrize("spoil", [
    lambda x: b"", lambda x: x[:7] + b"\x09" + x[8:17], lambda x: x[:-1] + b"\xc8"])      # fewer; class 200
def test_broken_labels_of_fashion_mnist_are_one_line(clothes, tmp_path, capsys, spoil):
    labels = clothes / "train-labels-idx1-ubyte"
    labels.write_bytes(spoil(labels.read_bytes()))
    words = ["--preset", "fashion-mnist", "--data", tmp_path, "--out", tmp_path / "run"]
    assert f"{tmp_path}: --dataset fashion-mnist can be neither read" in refused(capsys, *words)


def test_cifar10_is_read_from_its_unpacked_files(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 3072), dtype=np.uint8)
    files = {f"data_batch_{i + 1}": {"data": pixels[i:i + 1], "labels": [9 - i]} for i in range(5)}
    files |= {"test_batch": {"data": pixels[5:], "labels": [5, 6, 7, 8, 9]},
              "batches.meta": {"label_names": list("abcdefghij")}}
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *file: True)
    data, held_out, names = load_data(replace(PRESETS["cifar10"], data=str(tmp_path)))
    assert (len(data), len(held_out), names) == (5, 5, list("abcdefghij"))
    assert data.targets.tolist() == [9, 8, 7, 6, 5] and held_out.targets.tolist() == [5, 6, 7, 8, 9]
    assert np.array_equal(data[[3, 1]][0], pixels[[3, 1]].reshape(2, 3, 32, 32))
    assert data[[3, 1]][1].tolist() == [6, 8]


def test_flowers102_trains_on_all_its_images_with_labels_from_0(tmp_path, monkeypatch):
    from scipy.io import savemat
    folder = tmp_path / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    for i in range(1, 7):
        Image.new("RGB", (30, 20), (40 * i, 0, 0)).save(folder / "jpg" / f"image_{i:05d}.jpg", quality=95)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[77, 1, 102, 2, 3, 4]])})
    savemat(folder / "setid.mat", {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[5, 6]]})
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_check_integrity", lambda self: True)
    data, held_out, names = load_data(replace(PRESETS["flowers102"], data=str(tmp_path), image_size=16))
    assert data.targets.tolist() == [76, 0, 101, 1, 2, 3] and held_out is None and len(names) == 102
    [image], [label] = data[[3]]
    assert len(data) == 6 and image.shape == (3, 16, 16) and abs(int(image[0, 8, 8]) - 160) < 4 and label == 1


def test_exported_images_are_those_of_the_data_set_and_can_be_trained_on(tmp_path):
    command("--export", tmp_path / "files", "--count", "100")
    originals, files = (load_data(preset) for preset in (
        TINY, replace(TINY, dataset="folder", data=str(tmp_path / "files"))))
    assert files[2] == originals[2]
    for part, data, original in zip(("train", "val"), files, originals):
        paths = fid.find_images(tmp_path / "files" / part)
        assert len(data) == len(paths) == 100
        for i in (0, 7, 99):
            (image, label), (expected, same) = data[i], original[int(paths[i].stem)]
            assert torch.equal(image, expected) and label == same == int(paths[i].parent.name)


# ---- presets and help ----


def test_the_list_has_every_preset_with_its_exact_size_and_cost(capsys):
    command("--list")
    lines = [line.replace(",", "").split() for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: line[1:] for line in lines[1:1 + len(PRESETS)]}
    assert rows.keys() == PRESETS.keys()
    assert all(int(rows[name][3]) == parameters for name, (parameters, _) in PUBLISHED.items())
    sizes = {"imagenet-xl": (256, 1024, 65536), "imagenet-latent": (256, 256, 196608),
             "cifar10": (32, 256, 2048)}
    assert all(rows[name][:3] == [*map(str, size)] for name, size in sizes.items())
    # encode, denoise, decode, then 1, 2, 4, 6 steps, in GFLOPs
    xl, latent = ([float(cost) for cost in rows[name][4:]] for name in ("imagenet-xl", "imagenet-latent"))
    encode, denoise, decode, *totals = xl
    assert totals[2] == pytest.approx(7610, abs=1) and denoise == 0
    assert totals == pytest.approx([(T - 1) * encode + T * decode for T in (1, 2, 4, 6)], rel=1e-3)
    encode, denoise, decode, *others = latent
    assert encode == 0 and others == pytest.approx([decode + T * denoise for T in (1, 2, 4, 6)], rel=1e-3)
    name, _, _, *quotients = lines[1 + len(PRESETS)]
    assert name == "imagenet-xl" and float(quotients[2]) == pytest.approx(totals[2] / others[2], rel=1e-3)
    assert float(quotients[2]) == pytest.approx(6.48, abs=0.005)            # the paper's figure is 6.5
    for preset in PRESETS.values():
        _, _, sigma, sigma_sub = random_draws(preset, 0, 0)                 # of angles that are allowed
        assert 0 < sigma_sub.max() < sigma.max() < math.inf


def help_of(capsys, *words):
    """{option: its help}, of what --help prints."""
    with pytest.raises(SystemExit) as exit:
        command(*words, "--help")
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    return dict(part.partition(" ")[::2] for part in re.split(r" (?=--[a-z-]+[ ,])", text))


def test_help_names_every_data_set():
    told = train.Preset.__dataclass_fields__["dataset"].metadata["help"]
    assert all(name in told for name in train.DATA_SETS)


def test_help_shows_the_settings_of_the_preset_however_it_is_given(capsys):
    one, two = help_of(capsys, "--preset=cifar10"), help_of(capsys, "--preset", "cifar10")
    assert one == two and one["--image-size"].endswith("(32)") and one["--epochs"].endswith("(5000)")
    assert help_of(capsys)["--image-size"].endswith("(16)")                 # of digits


def test_help_shows_the_defaults_of_training_and_evaluation(capsys):
    told, defaults = help_of(capsys), {}
    for function in (train.train, train.quality):
        defaults |= {name: p.default for name, p in inspect.signature(function).parameters.items()}
    for option in ("seed", "accumulate", "evaluate-every", "count", "steps", "cfg", "features"):
        *_, shown = re.findall(r"\(([^()]*)\)", told[f"--{option}"])
        default = defaults[option.replace("-", "_")]
        assert (shown if isinstance(default, str) else ast.literal_eval(shown)) == default, option


@pytest.mark.parametrize("program", ["train.py", "sample.py"])
def test_help_needs_no_docstrings(program):
    told = subprocess.run([sys.executable, "-OO", ROOT / program, "--help"], capture_output=True, text=True)
    assert told.returncode == 0 and "--sampling" in told.stdout, told.stderr


# ---- evaluation ----


def table(output):
    """The rows of the evaluation at the end of what was printed, {row: numbers}."""
    lines = output.splitlines()
    first = max(i for i, line in enumerate(lines) if line.startswith(20 * " ")) + 1
    return {line[:24].strip(): [float(word) for word in line[24:].split()] for line in lines[first:]}


def distance(path, T=1, **options):
    """The Fréchet distance of 20 samples."""
    return evaluate(path, steps=(T,), **{"count": 20} | options)["Fréchet distance"][f"T = {T}"]


def test_evaluation_prints_every_number_beside_real_images(trained, capsys):
    command("--evaluate", trained, "--count", "100", "--steps", "1,2")
    output = capsys.readouterr().out
    assert output.splitlines()[0].split() == "T = 1 T = 2 real held-out".split()
    rows = table(output)
    assert list(rows) == ["Fréchet distance", "precision", "recall", "judged right", "nearest",
                          "reconstruction MSE"]
    assert rows["judged right"][2] == pytest.approx(0.993, abs=0.001)       # the judge itself, on real digits
    assert rows["Fréchet distance"][2] == pytest.approx(0.871, abs=0.02) and rows["nearest"][2] == 1.0


def test_evaluation_computes_in_the_precision_of_the_training_or_as_asked(tmp_path):
    preset = replace(TINY, precision="bf16")
    path = train.train(preset, tmp_path / "run", 3, device="cpu", evaluate_every=1.0, count=20, steps=(2,))
    whole, short, default = (evaluate(path, count=20, steps=(2,), **how) for how in (
        {"precision": "float32"}, {"precision": "bf16"}, {}))
    *_, kept = lines(tmp_path / "run" / "evaluations.jsonl")
    for name, columns in default.items():
        assert columns == short[name] == kept[name]
    assert all(default[name] != whole[name] for name in ("Fréchet distance", "reconstruction MSE"))


def test_real_training_images_score_as_memorised(trained, monkeypatch):
    """The measures can fail: 'samples' that copy the training set are all near it, and judged right."""
    data = load_data(TINY)[0]
    chosen = [[i for i, t in enumerate(data.targets) if t == k] for k in range(10)]

    def copies(model, y, T, first):
        places = [chosen[k][(first + i) // 10] for i, k in enumerate(y)]
        return data[places][0] / 127.5 - 1

    monkeypatch.setattr(train, "sampler", lambda model, **options: partial(copies))
    rows = evaluate(trained, count=1000, steps=(1,))
    assert rows["nearest"]["T = 1"] < 0.01 and rows["judged right"]["T = 1"] > 0.99
    assert rows["Fréchet distance"]["T = 1"] < 0.5 and rows["precision"]["T = 1"] == 1.0


@pytest.fixture
def photos_run(folder, tmp_path):
    """A model, and its training images as files."""
    command("--data", folder, "--out", tmp_path / "photos run", *FOLDER_FLAGS)
    (tmp_path / "real").mkdir()
    for i, (image, _) in enumerate(load_data(replace(TINY, dataset="folder", data=str(folder)))[0]):
        sample.to_pil(sample.to_float(image)).save(tmp_path / "real" / f"{i}.png")
    return tmp_path / "photos run" / "model.pt", tmp_path / "real"


def test_inception_measures_are_those_of_the_written_images(photos_run, tmp_path, monkeypatch, capsys):
    """Against fid.py on the same samples and training images as files."""
    model, real = photos_run
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(seeded_inception(), tmp_path / "hub" / "checkpoints" / fid.INCEPTION_URL.rsplit("/", 1)[1])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    capsys.readouterr()
    command("--evaluate", model, *"--count 11 --steps 2 --features torch-fidelity --device cpu".split())
    rows = table(capsys.readouterr().out)
    assert list(rows) == ["FID", "Inception Score", "its deviation", "precision", "recall", "rFID"]
    sample.main(["--checkpoint", str(model), "--out", str(tmp_path / "drawn"),
                 *"--count 11 --steps 2 --singles".split()])
    capsys.readouterr()
    fid.main([str(tmp_path / "drawn" / "images"), str(real), "--json"])
    files = json.loads(capsys.readouterr().out)
    for name in list(rows)[:5]:
        assert rows[name][0] == pytest.approx(files[name], rel=1e-5, abs=1e-4), name


def test_stored_statistics_or_images_take_the_place_of_the_training_images(photos_run, tmp_path):
    (model, real), r = photos_run, tmp_path / "r.npz"
    fid.main([str(real), "--save", str(r), "--features", "pixels"])
    np.savez(tmp_path / "moved.npz", features="pixels", sigma=np.load(r)["sigma"], mu=np.load(r)["mu"] + 1)
    np.savez(tmp_path / "images.npz", arr_0=[np.asarray(Image.open(path)) for path in fid.find_images(real)])
    direct, stored, moved, images = (distance(model, reference=npz and tmp_path / npz)
                                     for npz in (None, "r.npz", "moved.npz", "images.npz"))
    assert stored == pytest.approx(direct, rel=1e-4) != moved               # its mean is float32
    assert images == pytest.approx(direct, rel=1e-6)


@pytest.mark.parametrize("preset", [TINY, TOKENIZER, TINY_LATENT, replace(TINY, mapping="official")])
@pytest.mark.parametrize("conditional", [True, False])
def test_every_family_trains_and_is_judged_with_classes_and_without(
        preset, conditional, tiny_tokenizer, tmp_path):
    tokenizer = {"tokenizer": str(tiny_tokenizer)} if preset.tokenizer else {}
    path = train.train(replace(preset, conditional=conditional, **tokenizer), tmp_path / "run", device="cpu")
    assert load(path).num_classes == 10 * conditional
    assert ("judged right" in evaluate(path, count=20, steps=1)) == conditional


@pytest.mark.parametrize("kind", ["trained", "trained_latent"])
def test_guidance_sampling_and_the_choice_of_weights_reach_the_samples_that_are_judged(kind, request, capsys):
    path, own = request.getfixturevalue(kind), dict(gamma=0.0 if kind == "trained" else 1.0, shared=True)
    schemes = ({}, dict(gamma=0.5), dict(shared=False), dict(alpha=30.0), dict(cfg=0.0), dict(cfg=3.0))
    rows = [distance(path, 3, **scheme) for scheme in schemes]
    assert len(set(rows)) == len(schemes) and distance(path, 3, **own) == rows[0]
    assert len({distance(path, **scheme) for scheme in ({}, dict(bound=0.5), dict(official=True))}) == 3
    assert distance(path, use_ema=True) == distance(path) != distance(path, use_ema=False)
    command(*f"--evaluate {path} --count 20 --steps 3 --sampling gamma=0.5".split())
    assert table(capsys.readouterr().out)["Fréchet distance"][0] == pytest.approx(rows[1], rel=1e-3)


@pytest.mark.parametrize("words, named", [
    ("--preset folder --data nowhere", "nowhere"), ("--preset folder --data photos", "vgg16-397923af.pth"),
    ("--preset fashion-mnist --data nowhere", "nowhere: --dataset fashion-mnist can be neither"),
    ("--preset emoji --data nowhere", "npm pack --pack-destination data"),
    ("--preset digits-latent --tokenizer damaged.pt", "damaged.pt"), ("--resume", "last.pt"),
    ("--preset digits-latent --tokenizer {latent}", "--tokenizer"),
    ("--preset digits-latent --tokenizer {trained} --image-size 32", "--image-size 32"),
    ("--preset digits-latent --tokenizer rae", "DINOv2"), ("--weights 1,1", "--weights"),
    ("--accumulate 3", "--batch-size"), ("--precision fp16", "--precision"), ("--dataset mnist", "--dataset"),
    *((words, words.split()[0]) for words in (
        "--lr -1", "--warmup 2", "--min-lr 1", "--ema nan", "--epochs inf", "--image-size 0",
        "--weights 0,0,0,0,0", "--iterations -5", "--accumulate 0", "--evaluate-every -1", "--cfg 1e308",
        "--count 0", "--seed -1")),
    *((words, f"{words.split()[0]} means nothing here") for words in (
        "--data photos", "--latents z.npy", "--noise 1,1", "--distance l1", "--epochs 1 --iterations 2")),
    *((f"--preset digits-latent {words}", f"{words.split()[0]} means nothing here") for words in (
        "--encoder-size 16,1,2", "--batch-norm", "--swd-weight 1", "--alpha-hard 85")),
    ("--encoder-size 8,1,0", "size"), ("--encoder-size 8,1", "size"), ("--list --seed 3", "takes no seed"),
    ("--evaluate {trained} --preset digits", "no preset"), ("--evaluate {trained} --export x", "no export"),
    ("--export photos", "photos"), ("--export e --lr 1", "--lr means nothing here"),
    ("--export e --out x", "--out means nothing here"), ("--evaluate-every 1 --reference no.npz", "no.npz"),
    ("--evaluate-every 1 --count 3", "more than 3 images"),
    ("--preset digits-latent --evaluate-every 1 --steps 0", "steps"),
    ("--batch-norm --accumulate 2", "--batch-norm"),
    ("--alpha-max 90", "90"), ("--encoder-size tiny", "tiny"), ("--steps 5000 --iterations 1", "steps"),
    ("--sampling colour=red", "colour=red is none of"), ("--sampling alpha=red", "alpha=red is none of"),
    ("--sampling project_last=True", "generate takes no project_last; drop it"),
    ("--sampling alpha=95", "95"), ("--sampling schedule=fast", "fast"), ("--sampling bound=-1", "-1"),
    *((f"--evaluate {{trained}} {words}", named) for words, named in (
        ("--sampling project_last=True", "generate takes no project_last; drop it"),
        ("--count 1", "at least 2 images"), ("--steps 0", "got 0"), ("--lr 1", "takes no lr; drop it"),
        ("--reference no.npz", "no.npz"), ("--features pytorch-fid", "pth"), ("--features f", "--features"))),
    ("--evaluate no.pt", "No such file or directory: 'no.pt'")])
def test_mistakes_are_one_line_and_leave_nothing(
        trained, trained_latent, folder, tmp_path, capsys, monkeypatch, words, named):
    def refuse(*args, **options):
        raise urllib.error.URLError("no network")
    for module, name in ((torchvision.datasets.FashionMNIST, "download"), (torch.hub, "download_url_to_file"),
                         (torch.hub, "urlopen")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    Path("damaged.pt").write_bytes(b"rubbish")
    words = words.format(trained=trained, latent=trained_latent).split()
    trains = not {"--evaluate", "--export", "--list"} & {*words}
    assert named in refused(capsys, *words, *(["--out", "run"] if trains else []))
    assert not Path("run").exists()


# ---- Sphere Latent Encoder ----


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return models.SphereTokenizer(load(tiny_tokenizer))


def test_the_latent_loop_is_what_it_says_written_out(tiny_tokenizer, tokenizer, tmp_path, monkeypatch):
    """On latents of the tokenizer, with logit-normal noise."""
    preset = replace(TINY_LATENT, **BY_HAND, tokenizer=str(tiny_tokenizer), distance="l1", mapping="angle")

    def loss_of(model, x, y, sigma, sigma_sub, e, step):
        sigmas = logit_normal_sigmas(8, preset.alpha_max, -1.0, 1.5, "angle", train.seeded(8, "draws", step))
        assert torch.equal(sigma, sigmas[0]) and torch.equal(sigma_sub, sigmas[1])
        return sphere_latent_loss(model, tokenizer.encode(x), y, *sigmas, e, preset.weights, "l1")[0]

    assert_loop_written_out(preset, tmp_path / "run", monkeypatch, {"": 1.0}, loss_of, (16, 4))


def test_a_run_of_two_phases_resumes_from_either(tmp_path, monkeypatch):
    """Left while it trains its tokenizer, then its denoiser; the end is that of an unbroken run."""
    monkeypatch.setitem(PRESETS, "digits-tokenizer", TOKENIZER)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command(*LATENT_FLAGS, "--out", whole)
    with killed(broken / "tokenizer" / "last.pt", 5):
        command(*LATENT_FLAGS, "--out", broken)
    assert read_checkpoint(broken / "last.pt")["step"] == 0
    with killed(broken / "last.pt", 5):                                     # after 2, 4, 6 and 8
        command("--out", broken, "--resume", "--device", "cpu")
    assert read_checkpoint(broken / "last.pt")["step"] == 8
    command("--out", broken, "--resume", "--device", "cpu")
    assert_same_run(broken, whole)
    assert_same_run(broken / "tokenizer", whole / "tokenizer")
    shutil.rmtree(broken / "tokenizer")                 # the denoiser's checkpoint holds what it needs of it
    command("--evaluate", broken / "model.pt", "--count", "20")


def test_cached_latents_are_the_tokenizers_and_train_the_same_model(
        folder, tiny_tokenizer, tokenizer, tmp_path, monkeypatch):
    """Many image files, which are encoded anew in every iteration if no cache is asked for."""
    monkeypatch.setattr(train, "IN_MEMORY", 0)
    path, data = tmp_path / "cache" / "z.npy", dict(dataset="folder", data=str(folder), flip=True)
    preset = replace(TINY_LATENT, **data, tokenizer=str(tiny_tokenizer))
    fresh, cached, again = (
        train.train(preset, tmp_path / name, seed=5, device="cpu", workers=1, latents=latents).parent
        for name, latents in (("fresh", None), ("cached", path), ("again", path)))
    assert not list(fresh.glob("*.npy"))
    for a, b in zip(lines(fresh / "log.jsonl"), lines(cached / "log.jsonl"), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    assert lines(again / "log.jsonl") == lines(cached / "log.jsonl")         # one cache serves several runs
    data, places = load_data(preset)[0], [11, 0, 5]
    (z, labels), (x, classes) = (
        part[places] for part in (train.cached_latents(path, data, tokenizer, True, "cpu"), data))
    for k, view in enumerate((sample.to_float(x), sample.to_float(x.flip(3)))):
        torch.testing.assert_close(torch.as_tensor(z[:, k]), tokenizer.encode(view), rtol=1e-4, atol=1e-5)
    assert torch.equal(labels, classes)


@pytest.mark.parametrize("what", ["tokenizer", "data", "flip", "truncated", "rubbish"])
def test_a_stale_or_damaged_cache_is_refused_by_name_and_left(tokenizer, tmp_path, what):
    data, path = load_data(TINY)[0], tmp_path / "latents.npy"
    train.cached_latents(path, data, tokenizer, False, "cpu")
    if what == "tokenizer":
        next(tokenizer.parameters()).data += 1
    elif what == "data":
        data.tensors = (255 - data.tensors[0], data.tensors[1])
    elif what == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif what == "rubbish":
        path.write_bytes(b"\0" * 5000)
    before = path.read_bytes()
    with pytest.raises(ValueError) as error:
        train.cached_latents(path, data, tokenizer, what == "flip", "cpu")
    assert str(path) in str(error.value) and path.read_bytes() == before


def test_two_writers_of_a_cache_at_once_both_end_with_a_whole_file(tokenizer, tmp_path):
    """The second, of another process, begins and ends while the first encodes."""
    data, path, others = load_data(TINY)[0], tmp_path / "latents.npy", []

    def encode(x):
        if not others:
            others.append(None)
            others[0] = train.cached_latents(path, data, tokenizer, False, "cpu")[range(1500)][0].copy()
        return tokenizer.encode(x)

    slow = SimpleNamespace(latent_shape=tokenizer.latent_shape, encode=encode)
    latents = train.cached_latents(path, data, slow, False, "cpu")[range(1500)][0]
    assert latents.shape == (1500, 1, 16, 4) and np.array_equal(latents, others[0])
    assert (np.abs(latents).max((1, 2, 3)) > 0).all() and [*tmp_path.iterdir()] == [path]


def test_a_denoiser_trains_on_rae_latents_and_its_checkpoint_finds_the_rae_again(folder, hub, tmp_path):
    out, cache = tmp_path / "run", tmp_path / "cache.npy"
    command("--data", folder, "--out", out, "--latents", cache,
            *("--preset imagenet-latent --dataset folder --image-size 64 --denoiser-size 16,1,2 --batch-size "
              "4 --iterations 4 --device cpu").split())
    assert read_checkpoint(out / "last.pt")["tokenizer"] == "rae"
    assert np.load(cache).shape == (12, 2, 16, 32)
    command("--evaluate", out / "model.pt", "--count", "5", "--steps", "1")
    command("--out", out, "--resume")
    (hub / models.RAE_DECODER[1]).write_bytes(b"rubbish")
    with pytest.raises(OSError, match=models.RAE_DECODER[1]):
        load(out / "model.pt")
