import hashlib
import json
import math
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
import urllib.error
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import fid
import models
import sample
import train
from conftest import ROOT, TINY, TINY_FLAGS, TINY_LATENT, one_line
from losses import LPIPS, sliced_wasserstein, sphere_encoder_loss, sphere_latent_loss
from sample import load, pick_device, read_checkpoint
from spherify import logit_normal_sigmas, spherify
from test_fid import seeded_inception
from train import (PRESETS, batch_indices, evaluate, gaussian, learning_rate, load_data, main, random_draws,
                   update_ema)


def assert_same_run(a, b):
    """Weights, average, optimizer and log of two run folders are the same bit for bit."""
    assert (a / "log.jsonl").read_bytes() == (b / "log.jsonl").read_bytes()
    one, two = (read_checkpoint(folder / "last.pt") for folder in (a, b))
    assert one.keys() == two.keys()
    tensors = ("model", "ema", "optimizer", "tokenizer")
    for key in one.keys() - set(tensors):
        assert one[key] == two[key], key
    flat = [torch.utils._pytree.tree_leaves([checkpoint[key] for key in tensors])
            for checkpoint in (one, two)]
    assert len(flat[0]) == len(flat[1]) > 40
    for left, right in zip(*flat):
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A tiny run of 12 iterations that nothing disturbs."""
    return train.train(LONGER, tmp_path_factory.mktemp("unbroken") / "run", seed=1).parent


# checkpoints at 0, 4, 8, 12 and log lines at 3, 4, 6, 8, 9, 12
LONGER = replace(TINY, iterations=12, log_every=3)
LONGER_FLAGS = [*TINY_FLAGS, "--iterations", "12", "--log-every", "3", "--seed", "1", "--device", "cpu"]


# ---- randomness ----


def test_every_epoch_is_a_permutation_and_batches_need_no_history():
    whole = [index for batch in batch_indices(10, 4, 7, range(25)) for index in batch]
    epochs = [whole[i:i + 10] for i in range(0, 100, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10
    assert [i for batch in batch_indices(10, 4, 7, range(13, 25)) for i in batch] == whole[52:]
    assert len(next(batch_indices(3, 10, 7, range(1)))) == 10                # a batch may span several epochs


def test_the_permutation_of_an_epoch_is_drawn_once(monkeypatch):
    whole, calls = torch.randperm, []
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: calls.append(1) or whole(*args, **kwargs))
    list(batch_indices(10, 4, 7, range(25)))
    assert len(calls) == 10


def test_processes_share_the_global_batch():
    whole = list(batch_indices(10, 4, 7, range(9)))
    parts = [list(batch_indices(10, 4, 7, range(9), slice(2 * rank, 2 * rank + 2))) for rank in (0, 1)]
    assert [a + b for a, b in zip(*parts)] == whole


def test_a_steps_draws_are_a_function_of_seed_and_step():
    preset = PRESETS["digits"]
    a, b, c, d = (random_draws(preset, seed, step) for seed, step in ((5, 9), (5, 9), (5, 10), (6, 9)))
    for name in a:
        assert torch.equal(a[name], b[name])
    for name in ("sigma", "sigma_sub", "e_seed", "drop"):
        assert not torch.equal(a[name], c[name]) and not torch.equal(a[name], d[name])


def test_class_drops_are_a_tenth_and_independent_in_every_pass():
    drop = torch.cat([random_draws(PRESETS["digits"], 0, step)["drop"]
                      for step in range(400)], dim=1).double()               # [4, n]
    n = drop.shape[1]
    assert (drop.mean(1) - 0.1).abs().max() < 4 * math.sqrt(0.09 / n)
    correlation = torch.corrcoef(drop) - torch.eye(4)
    assert correlation.abs().max() < 4 / math.sqrt(n)


def test_flips_only_where_the_preset_has_them():
    assert not random_draws(PRESETS["digits"], 0, 0)["flip"].any()
    flips = torch.cat([random_draws(replace(PRESETS["digits"], flip=True), 0, s)["flip"]
                       for s in range(50)]).double()
    assert abs(flips.mean() - 0.5) < 4 * 0.5 / math.sqrt(len(flips))


def test_training_noise_of_a_sample_ignores_its_neighbours():
    seeds = torch.tensor([3, 2**40 + 1, 2**62 + 5])
    e = gaussian(seeds, (4, 5), "cpu")
    assert torch.equal(e[1:], gaussian(seeds[1:], (4, 5), "cpu")) and not torch.equal(e[0], e[1])


def test_the_loop_is_what_it_says_written_out(tmp_path, monkeypatch):
    """Three iterations by hand: data, flip, class drops, noise, loss, clipping, AdamW and average."""
    torch.manual_seed(0)
    perceptual = LPIPS().requires_grad_(False).eval()
    monkeypatch.setattr(train, "perceptual_distance", lambda *name_and_folder: perceptual)
    preset = replace(TINY, iterations=3, flip=True, class_dropout=0.5, clip=0.01, weight_decay=0.3,
                     encoder_lr_scale=0.5, perceptual="lpips-vgg", weights=(2.0, 0.5, 1.0, 0.25, 0.1),
                     ema=0.15, warmup=1 / 3)
    path = train.train(preset, tmp_path / "run", seed=8, device="cpu")

    data = load_data(preset)[0]
    with torch.random.fork_rng():
        torch.manual_seed(train.hashed(8, 2))
        model = train.build_model(preset, [str(k) for k in range(10)])
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = [[p for name, p in trainable.items() if name.startswith(side) and (p.ndim > 1) == matrix]
               for side in ("encoder", "decoder") for matrix in (True, False)]
    optimizer = torch.optim.AdamW([{"params": group, "weight_decay": 0.3 * (i % 2 == 0)}
                                   for i, group in enumerate(decayed)], lr=0.0, betas=(0.9, 0.95))
    order = torch.randperm(1500, generator=train.seeded(8, 0, 0))
    for step, lr in enumerate((preset.lr / 2, preset.lr, (preset.lr + preset.min_lr) / 2)):
        drawn = random_draws(preset, 8, step)
        chosen = order[8 * step:8 * step + 8].tolist()
        x = torch.stack([data[i][0] for i in chosen]).float() / 127.5 - 1
        x = torch.stack([image.flip(2) if flip else image for image, flip in zip(x, drawn["flip"])])
        labels = torch.tensor([data[i][1] for i in chosen])
        y = torch.stack([torch.where(drop, 10, labels) for drop in drawn["drop"]])
        e = gaussian(drawn["e_seed"], model.latent_shape, "cpu")
        loss, _ = sphere_encoder_loss(model, x, y, drawn["sigma"], drawn["sigma_sub"], e, preset.weights,
                                      perceptual)
        gradients = torch.autograd.grad(loss, list(trainable.values()))
        norm = torch.sqrt(sum(g.square().sum() for g in gradients))
        assert norm > 0.01                                                  # so that clipping acts
        for p, g in zip(trainable.values(), gradients):
            p.grad = g * 0.01 / (norm + 1e-6)
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = lr * (0.5 if i < 2 else 1.0)
        optimizer.step()
        decay = min(0.15, (1 + step) / (10 + step))
        for name, p in trainable.items():
            average[name] = decay * average[name] + (1 - decay) * p.detach()

    stored = read_checkpoint(path)
    for name, p in trainable.items():
        # Adam divides by the gradient's size: rounding of a tiny one counts, here up to 1 % of the rate.
        torch.testing.assert_close(stored["model"][name], p.detach(), rtol=1e-4, atol=4e-5)
        torch.testing.assert_close(stored["ema"][name], average[name], rtol=1e-4, atol=4e-5)


# ---- schedules ----


def test_learning_rate_warms_up_linearly_and_ends_at_its_minimum():
    preset = replace(TINY, lr=1.0, min_lr=0.1, warmup=4 / 104)
    rates = [learning_rate(preset, step, 104) for step in range(104)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8]) and rates[4] == 1.0
    assert rates[54] == pytest.approx(0.55)                                  # half of the cosine
    assert rates[-1] == pytest.approx(0.1, abs=1e-3) and learning_rate(preset, 104, 104) == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[4:], rates[5:]))


def test_learning_rate_scales_with_the_global_batch():
    for preset in (PRESETS["imagenet-l"], PRESETS["digits"]):
        double = replace(preset, batch_size=2 * preset.batch_size)
        for step in (0, 3, 700, 999):
            assert learning_rate(double, step, 1000) == pytest.approx(2 * learning_rate(preset, step, 1000))
    assert learning_rate(PRESETS["imagenet-l"], 10, 1000) == pytest.approx(1e-4, rel=1e-3)


def test_epochs_give_the_length_by_the_size_of_the_data():
    preset = PRESETS["cifar10"]
    assert train.total_iterations(preset, 50_000) == math.ceil(5000 * 50_000 / 256)
    assert train.total_iterations(replace(preset, batch_size=1000), 50_000) == 250_000
    assert train.total_iterations(PRESETS["digits"], 10**9) == 2200


def test_average_is_a_lerp_whose_decay_rises_to_its_limit():
    model, ema = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    for step, decay in ((0, 0.1), (8, 0.5), (10**6, 0.9)):
        before = ema.weight.clone()
        update_ema(ema, model, 0.9, step)
        torch.testing.assert_close(ema.weight.data, decay * before + (1 - decay) * model.weight.data)


def test_encoder_learns_at_its_scaled_rate(tmp_path):
    frozen = replace(TINY, encoder_lr_scale=0.0)
    at_3, at_6 = (load(train.train(replace(frozen, iterations=n), tmp_path / str(n), seed=2), ema=False)
                  for n in (3, 6))
    moved = {name for name, p in at_3.named_parameters() if not torch.equal(p, at_6.get_parameter(name))}
    assert moved and all(name.startswith("decoder.") for name in moved)


# ---- resume ----


def test_resumed_run_equals_unbroken_run(unbroken, tmp_path, monkeypatch):
    """Dies after its checkpoint of iteration 4, having logged up to iteration 6, and continues."""
    whole = train.drain

    def dies_at_6(window, done, *rest):
        if done == 8:
            raise RuntimeError("killed")
        return whole(window, done, *rest)

    monkeypatch.setattr(train, "drain", dies_at_6)
    with pytest.raises(RuntimeError, match="killed"):
        train.train(LONGER, tmp_path / "run", seed=1)
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 3
    assert read_checkpoint(tmp_path / "run" / "last.pt")["step"] == 4
    monkeypatch.setattr(train, "drain", whole)
    train.train(LONGER, tmp_path / "run", seed=1, resume=True)
    assert_same_run(tmp_path / "run", unbroken)


KILLED_WHILE_WRITING = """
import os, signal, sys, torch
sys.path.insert(0, {root!r})
import train
whole, count = torch.save, [0]
def half(checkpoint, file):
    count[0] += 1
    if count[0] == {nth}:
        file.write(b"half a checkpoint")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    whole(checkpoint, file)
torch.save = half
train.main(sys.argv[1:])
"""


def test_run_killed_while_writing_a_checkpoint_resumes_from_the_one_before(unbroken, tmp_path):
    out = tmp_path / "run"
    for nth, options, stands in ((3, [], 4), (1, ["--resume"], 4)):  # both die writing the one of iteration 8
        script = KILLED_WHILE_WRITING.format(root=str(ROOT), nth=nth)
        result = subprocess.run([sys.executable, "-c", script, "--out", str(out), *LONGER_FLAGS, *options],
                                capture_output=True)
        assert result.returncode == -signal.SIGKILL
        assert (out / "last.pt.tmp").read_bytes() == b"half a checkpoint"
        assert read_checkpoint(out / "last.pt")["step"] == stands
    main(["--out", str(out), *LONGER_FLAGS, "--resume"])
    assert_same_run(out, unbroken)


def test_ctrl_c_saves_says_where_and_resumes_exactly(tmp_path):
    flags = [*LONGER_FLAGS, "--iterations", "300", "--checkpoint-every", "100"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    main(["--out", str(whole), *flags])
    process = subprocess.Popen([sys.executable, ROOT / "train.py", "--out", broken, *flags],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while not (broken / "log.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and str(broken / "last.pt") in output and "--resume" in output
    assert 0 < read_checkpoint(broken / "last.pt")["step"] < 300
    main(["--out", str(broken), "--resume"])
    assert_same_run(broken, whole)


def test_resume_of_a_finished_run_does_nothing(unbroken, tmp_path, capsys):
    shutil.copytree(unbroken, tmp_path / "run")
    main(["--out", str(tmp_path / "run"), "--resume"])
    assert "already trained" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", unbroken)


@pytest.mark.parametrize("options, named", [
    (["--lr", "0.5"], "--lr 0.004, not 0.5"), (["--seed", "9"], "--seed 1, not 9"),
    (["--iterations", "99"], "--iterations 12"), (["--preset", "fashion-mnist"], "drop --preset"),
])
def test_resume_refuses_a_setting_that_differs(unbroken, tmp_path, capsys, options, named):
    shutil.copytree(unbroken, tmp_path / "run")
    with pytest.raises(SystemExit) as exit:
        main(["--out", str(tmp_path / "run"), "--resume", *options])
    assert exit.value.code == 2 and named in one_line(capsys, "train.py: ")
    assert_same_run(tmp_path / "run", unbroken)


def test_a_checkpoint_of_other_settings_is_refused(unbroken, tmp_path, capsys):
    shutil.copytree(unbroken, tmp_path / "run")
    checkpoint = read_checkpoint(unbroken / "last.pt")
    checkpoint["preset"]["colour"] = "red"
    torch.save(checkpoint, tmp_path / "run" / "last.pt")
    for options in (["--out", str(tmp_path / "run"), "--resume"],
                    ["--evaluate", str(tmp_path / "run" / "last.pt")]):
        with pytest.raises(SystemExit):
            main(options)
        assert "another version" in one_line(capsys, "train.py: ")


def test_resume_and_evaluation_refuse_another_data_set(folder, tmp_path, capsys):
    main(["--data", str(folder), "--out", str(tmp_path / "run"), *FOLDER_FLAGS])
    main(["--data", str(folder), "--out", str(tmp_path / "run"), "--resume"])
    last = tmp_path / "run" / "last.pt"
    torch.save({**read_checkpoint(last), "step": 3}, tmp_path / "earlier.pt")
    shutil.copy(tmp_path / "earlier.pt", last)
    (folder / "red").rename(folder / "green")
    before = last.read_bytes()
    for options in (["--out", str(tmp_path / "run"), "--resume"], ["--evaluate", str(last), "--count", "4"]):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main(options)
        line = one_line(capsys, "train.py: ")
        assert "red" in line and "green" in line and last.read_bytes() == before


def test_a_log_that_is_none_is_refused(unbroken, tmp_path, capsys):
    shutil.copytree(unbroken, tmp_path / "run")
    torch.save({**read_checkpoint(unbroken / "last.pt"), "step": 8}, tmp_path / "run" / "last.pt")
    for content in ("diary\n", '{"iteration": 3}\n', "3\n"):
        (tmp_path / "run" / "log.jsonl").write_text(content)
        with pytest.raises(SystemExit):
            main(["--out", str(tmp_path / "run"), "--resume"])
        assert "log.jsonl: not the log of a run" in one_line(capsys, "train.py: ")
        assert (tmp_path / "run" / "log.jsonl").read_text() == content


# ---- processes ----


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def torchrun(processes, *flags):
    command = [*TORCHRUN, "--standalone", f"--nproc_per_node={processes}", ROOT / "train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *flags], capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture(scope="module")
def at_40_of_60(tmp_path_factory):
    """The digits preset but for its length, at iteration 40, and the log of its 20 iterations to come."""
    folder = tmp_path_factory.mktemp("trained")
    preset = replace(PRESETS["digits"], iterations=60, checkpoint_every=40, log_every=1, picture_every=0)
    whole = train.save_checkpoint

    def keep(path, checkpoint):
        whole(path, checkpoint)
        if checkpoint["step"] == 40:
            shutil.copytree(path.parent, folder / "at 40")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_checkpoint", keep)
        train.train(preset, folder / "whole", seed=11, device="cpu")
    log = log_lines(folder / "whole")[40:]
    assert len(log) == 20 and log[0]["con_l1"] > 1e-4                      # trained: noise makes a difference
    return folder / "at 40", log


def log_lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_losses(folder, log, tolerance):
    lines = log_lines(folder)[40:]
    assert len(lines) == len(log)
    for a, b in zip(lines, log):
        assert a == pytest.approx(b, rel=0, abs=tolerance)


def test_two_processes_give_the_losses_of_one(at_40_of_60, tmp_path):
    start, log = at_40_of_60
    shutil.copytree(start, tmp_path / "two")
    result = torchrun(2, "--out", tmp_path / "two", "--resume", "--device", "cpu", "--accumulate", "2")
    assert result.returncode == 0, result.stderr
    assert_same_losses(tmp_path / "two", log, 1e-5)


def test_two_nodes_of_one_process_give_the_losses_of_one(at_40_of_60, tmp_path):
    start, log = at_40_of_60
    shutil.copytree(start, tmp_path / "nodes")
    port = 20_000 + os.getpid() % 10_000                # below the ports that other connections are given
    nodes = [subprocess.Popen(
        [*TORCHRUN, "--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1", "--master_addr=127.0.0.1",
         f"--master_port={port}", ROOT / "train.py", "--out", tmp_path / "nodes", "--resume", "--device",
         "cpu"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        for node in (0, 1)]
    outputs = [node.communicate(timeout=100)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert_same_losses(tmp_path / "nodes", log, 1e-5)


def test_accumulated_micro_batches_are_one_large_batch(at_40_of_60, tmp_path):
    start, log = at_40_of_60
    shutil.copytree(start, tmp_path / "four")
    main(["--out", str(tmp_path / "four"), "--resume", "--accumulate", "4", "--device", "cpu"])
    assert_same_losses(tmp_path / "four", log, 1e-5)


def test_activation_checkpointing_changes_no_loss(at_40_of_60, tmp_path, monkeypatch):
    start, log = at_40_of_60
    shutil.copytree(start, tmp_path / "again")
    calls, whole = [], models.checkpoint
    monkeypatch.setattr(models, "checkpoint", lambda *a, **k: calls.append(1) or whole(*a, **k))
    main(["--out", str(tmp_path / "again"), "--resume", "--activation-checkpointing", "--device", "cpu"])
    assert_same_losses(tmp_path / "again", log, 1e-6)
    assert len(calls) == 20 * (1 + 3 + 1)               # every block of E, D and E again, in every iteration


def test_a_compiled_objective_gives_the_same_losses_and_checkpoint_names(trained, tmp_path, monkeypatch):
    """As one graph without breaks; by a backend that needs no compiler, since inductor takes minutes here."""
    calls = []

    def backend(graph, inputs):
        calls.append(1)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(train.Objective, "compile", lambda self, **options: torch.nn.Module.compile(
        self, backend=backend, fullgraph=True, **options))
    main(["--out", str(tmp_path / "run"), *TINY_FLAGS, "--seed", "3", "--compile", "--device", "cpu",
          "--activation-checkpointing"])
    assert len(calls) == 1
    for a, b in zip(log_lines(tmp_path / "run"), log_lines(trained.parent)):
        assert a == pytest.approx(b, rel=0, abs=1e-6)
    plain, compiled = (read_checkpoint(path) for path in (trained, tmp_path / "run" / "last.pt"))
    assert compiled["model"].keys() == plain["model"].keys() and compiled["ema"].keys() == plain["ema"].keys()


def test_bf16_autocasts_the_networks_and_nothing_else(tmp_path, monkeypatch):
    seen, whole = [], train.Objective.forward

    def look(self, x, *rest):
        seen.append(torch.is_autocast_enabled("cpu"))
        loss, parts = whole(self, x, *rest)
        assert loss.dtype == torch.float32 and all(part.dtype == torch.float32 for part in parts.values())
        return loss, parts

    monkeypatch.setattr(train.Objective, "forward", look)
    runs = {name: train.train(replace(TINY, precision=name), tmp_path / name, seed=3, device="cpu").parent
            for name in ("auto", "float32", "bf16")}
    assert seen == [False] * 12 + [True] * 6
    assert log_lines(runs["auto"]) == log_lines(runs["float32"])
    for a, b in zip(log_lines(runs["bf16"]), log_lines(runs["float32"])):
        assert a["loss"] != b["loss"] and a["loss"] == pytest.approx(b["loss"], rel=0.02)
    stored = read_checkpoint(runs["bf16"] / "last.pt")
    assert all(tensor.dtype == torch.float32 for part in ("model", "ema") for tensor in stored[part].values())


def test_two_processes_evaluate_as_one(trained, tmp_path):
    words = ("pixels", "uniformity", "memorisation")
    one = evaluate(trained, count=230, steps=(2,), metrics=words, out=tmp_path)
    result = torchrun(2, "--evaluate", trained, "--count", "230", "--steps", "2", "--device", "cpu", "--out",
                      tmp_path / "two", "--metrics", ",".join(words))
    assert result.returncode == 0, result.stderr
    rows = {line[:20].strip(): line[20:].split() for line in result.stdout.splitlines()}
    for name in ("Fréchet distance", "uniformity, 3", "uniformity, all", "nearest or mirrored"):
        assert rows[name] == [f"{number:.4f}" for number in one[name].values()]
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"memorisation.png", "uniformity.png"}


def test_one_process_reports_a_mistake_of_all(tmp_path):
    result = torchrun(2, "--out", tmp_path / "run", *TINY_FLAGS, "--batch-size", "7", "--device", "cpu")
    lines = [line for line in result.stderr.splitlines() if line.startswith("train.py: ")]
    assert result.returncode != 0 and len(lines) == 1
    assert "--batch-size 7" in lines[0] and "2 x 1" in lines[0]


def test_missing_data_are_reported_once_for_all_processes(tmp_path):
    result = torchrun(2, "--out", tmp_path / "run", "--preset", "imagenet-l", "--data", tmp_path / "nowhere",
                      "--device", "cpu")
    lines = [line for line in result.stderr.splitlines() if line.startswith("train.py: ")]
    assert result.returncode != 0 and len(lines) == 1 and "nowhere" in lines[0]
    assert "in load_data" not in result.stderr          # no traceback of ours; torchrun has one of its own


def test_a_process_alone_with_its_mistake_reports_it(folder, tmp_path):
    batch = next(batch_indices(12, 8, 0, range(1)))
    path = sorted(folder.glob("*/*.png"))[batch[-1]]                        # in the second process's share
    path.write_bytes(b"rubbish")
    result = torchrun(2, "--data", folder, "--out", tmp_path / "run", *FOLDER_FLAGS, "--device", "cpu",
                      "--workers", "0")
    assert result.returncode != 0
    assert f"train.py: {path}: not a readable image" in result.stderr


def test_a_device_of_a_kind_becomes_one_with_a_number(monkeypatch):
    """torch.cuda.set_device refuses a plain "cuda"."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: SimpleNamespace(
        item=lambda: 0.0, device=torch.device(device, 0)))
    assert pick_device(None) == pick_device("cuda") == torch.device("cuda:0")


# ---- what a run leaves ----


def test_a_run_leaves_checkpoint_log_plot_and_pictures(tmp_path, capsys):
    main(["--out", str(tmp_path / "run"), *TINY_FLAGS, "--picture-every", "4"])
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["last.pt", "log.jsonl", "losses.png", "samples-000004.png", "samples-000006.png"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    weights = TINY.weights
    for line in lines:
        parts = [line[name] for name in train.WEIGHT_NAMES]
        assert line["loss"] == pytest.approx(sum(w * part for w, part in zip(weights, parts)), rel=1e-5)
    output = capsys.readouterr().out
    assert all(name in output for name in names if name != "log.jsonl")


def test_a_checkpoint_holds_only_plain_values_and_tensors(trained):
    allowed = (str, int, float, bool, type(None), torch.Tensor)
    assert all(isinstance(leaf, allowed)
               for leaf in torch.utils._pytree.tree_leaves(read_checkpoint(trained)))


def test_seeds_and_only_seeds_and_settings_decide_a_run(trained, tmp_path):
    again = train.train(TINY, tmp_path / "again", seed=3)
    assert_same_run(again.parent, trained.parent)
    other = train.train(TINY, tmp_path / "other", seed=4)
    assert (other.parent / "log.jsonl").read_bytes() != (trained.parent / "log.jsonl").read_bytes()


def test_training_leaves_the_global_random_state_alone(tmp_path):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    train.train(replace(TINY, iterations=1), tmp_path / "run")
    assert torch.equal(before, torch.get_rng_state())


def test_a_loss_that_is_not_finite_stops_with_iteration_part_and_last_checkpoint(
        tmp_path, capsys, monkeypatch):
    whole = train.sphere_encoder_loss
    calls = []

    def breaks(*args):
        calls.append(1)
        loss, parts = whole(*args)
        return loss, {**parts, "con_l1": parts["con_l1"] / (0 if len(calls) == 6 else 1)}

    monkeypatch.setattr(train, "sphere_encoder_loss", breaks)
    with pytest.raises(SystemExit) as exit:
        main(["--out", str(tmp_path / "run"), *LONGER_FLAGS, "--log-every", "4"])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit.value.code == 2 and "con_l1" in line and "iteration 6" in line
    assert str(tmp_path / "run" / "last.pt") in line
    assert read_checkpoint(tmp_path / "run" / "last.pt")["step"] == 4


# ---- data ----


def test_digits_are_split_1500_297_and_repeated_to_three_channels():
    data, held_out, names = load_data(PRESETS["digits"])
    assert (len(data), len(held_out), names) == (1500, 297, list("0123456789"))
    image, label = data[0]
    assert image.shape == (3, 16, 16) and image.dtype == torch.uint8 and label == 0 and image.max() > 200
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])


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


FOLDER_FLAGS = ["--preset", "folder", "--image-size", "16", "--perceptual", "none",
                "--weights", "1,0,1,0,0.1", *TINY_FLAGS]


def test_any_folder_of_class_folders_trains_and_evaluates(folder, tmp_path, capsys):
    main(["--data", str(folder), "--out", str(tmp_path / "run"), *FOLDER_FLAGS, "--workers", "1"])
    model = load(tmp_path / "run" / "last.pt")
    assert model.class_names == ["blue", "red"]
    main(["--evaluate", str(tmp_path / "run" / "last.pt"), "--count", "20", "--steps", "1"])
    assert "judged right" in capsys.readouterr().out


def test_a_class_of_one_image_is_enough(folder, tmp_path):
    for path in list((folder / "red").iterdir())[1:]:
        path.unlink()
    main(["--data", str(folder), "--out", str(tmp_path / "run"), *FOLDER_FLAGS])
    assert Image.open(tmp_path / "run" / "samples-000006.png").height > 100


def test_train_and_val_folders_are_told_apart(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "set" / "train")
    shutil.copytree(folder, tmp_path / "set" / "val")
    data, held_out, names = load_data(replace(TINY, dataset="folder", data=str(tmp_path / "set")))
    assert len(data) == len(held_out) == 12 and names == ["blue", "red"] and data[0][0].shape == (3, 16, 16)
    shutil.rmtree(tmp_path / "set" / "val" / "red")
    with pytest.raises(ValueError, match="val"):
        load_data(replace(TINY, dataset="folder", data=str(tmp_path / "set")))


def test_an_unconditional_model_trains_on_a_single_class(folder, tmp_path, capsys):
    shutil.rmtree(folder / "red")
    with pytest.raises(SystemExit):
        main(["--data", str(folder), "--out", str(tmp_path / "run"), *FOLDER_FLAGS])
    assert "--no-conditional" in one_line(capsys, "train.py: ")
    main(["--data", str(folder), "--out", str(tmp_path / "run"), *FOLDER_FLAGS, "--no-conditional"])
    assert load(tmp_path / "run" / "last.pt").num_classes == 0
    assert "judged right" not in evaluate(tmp_path / "run" / "last.pt", count=10, steps=(1,))


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_corrupt_image_is_named_in_one_line(folder, tmp_path, capsys, workers):
    (folder / "red" / "3.png").write_bytes(b"rubbish")
    with pytest.raises(SystemExit) as exit:
        main(["--data", str(folder), "--out", str(tmp_path / "run"), *FOLDER_FLAGS, "--workers", workers])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit.value.code == 2 and line.startswith("train.py: ") and str(folder / "red" / "3.png") in line


def test_fashion_mnist_is_read_from_its_unpacked_files(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 20), ("t10k", 10)):
        images = np.full((n, 28, 28), 255, np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 0x803, n, 28, 28) + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 0x801, n) + (np.arange(n) % 10).astype(np.uint8).tobytes())
    data, held_out, names = load_data(replace(PRESETS["fashion-mnist"], data=str(tmp_path)))
    image, label = data[3]
    assert (len(data), len(held_out), label, names[9]) == (20, 10, 3, "Ankle boot")
    assert image.shape == (3, 32, 32) and (image[:, 2:30, 2:30] == 255).all()
    assert image.double().mean() == 255 * (28 / 32) ** 2


def test_cifar10_is_read_from_its_unpacked_files(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
    for name, content in (("train", {"data": pixels, "labels": [0, 1, 2, 3, 4, 9]}),
                          ("test", {"data": pixels[:2], "labels": [5, 6]}),
                          ("meta", {"label_names": list("abcdefghij")})):
        (folder / name).write_bytes(pickle.dumps(content))
    md5 = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in ("train", "test", "meta")}
    monkeypatch.setattr(CIFAR10, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "meta", "key": "label_names", "md5": md5["meta"]})
    data, held_out, names = load_data(replace(PRESETS["cifar10"], data=str(tmp_path)))
    assert (len(data), len(held_out), names) == (6, 2, list("abcdefghij"))
    assert data.targets == [0, 1, 2, 3, 4, 9]
    for i in range(6):
        assert np.array_equal(data[i][0], pixels[i].reshape(3, 32, 32)) and data[i][1] == data.targets[i]


def test_flowers102_trains_on_all_its_images_with_labels_from_0(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import Flowers102
    folder = tmp_path / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    for i in range(1, 6):
        Image.new("RGB", (30, 20), (50 * i, 0, 0)).save(folder / "jpg" / f"image_{i:05d}.jpg", quality=95)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[77, 1, 102, 2, 3]])})
    savemat(folder / "setid.mat", {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[5, 5]]})
    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)
    data, held_out, names = load_data(replace(PRESETS["flowers102"], data=str(tmp_path), image_size=16))
    assert len(data) == 5 and data.targets == (76, 0, 101, 1, 2) and held_out is None and len(names) == 102
    assert data[3][0].shape == (3, 16, 16) and abs(int(data[3][0][0, 8, 8]) - 200) < 4 and data[3][1] == 1


def test_animal_faces_trains_on_both_its_splits_and_imagenet_on_one(folder, tmp_path, monkeypatch):
    for dataset in ("animal-faces", "imagenet"):
        monkeypatch.setitem(train.DATASETS, dataset, (2, "two"))
    for split in ("train", "val"):
        shutil.copytree(folder, tmp_path / "set" / split)
    faces, none, _ = load_data(replace(PRESETS["animal-faces"], data=str(tmp_path / "set"), image_size=16))
    train_set, held_out, _ = load_data(replace(PRESETS["imagenet-l"], data=str(tmp_path / "set")))
    assert (len(faces), none, len(train_set), len(held_out)) == (24, None, 12, 12)
    assert faces.targets == train_set.targets + held_out.targets


def test_another_number_of_classes_or_a_missing_split_is_refused(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "set" / "train")
    for dataset, classes in (("imagenet", 1000), ("animal-faces", 2)):
        monkeypatch.setitem(train.DATASETS, dataset, (classes, f"{classes} classes in train/ and val/"))
        with pytest.raises(ValueError, match=f"expected {classes} classes .* found 2 .* no val/"):
            load_data(replace(TINY, dataset=dataset, data=str(tmp_path / "set")))
        shutil.copytree(folder, tmp_path / "set" / "val", dirs_exist_ok=True)
        if classes == 1000:
            with pytest.raises(ValueError, match="expected 1000 classes .* found 2 .* a val/"):
                load_data(replace(TINY, dataset=dataset, data=str(tmp_path / "set")))
            shutil.rmtree(tmp_path / "set" / "val")


def test_images_are_resized_by_the_shorter_side_and_cropped_at_the_centre(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255                                                  # the central square is white
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image, label = train.ImageFiles([(str(tmp_path / "wide.png"), 4)], 10)[0]
    assert image.shape == (3, 10, 10) and label == 4 and image[:, :, 1:-1].min() > 250


# ---- presets ----


SIZES_IN_PAPER = {  # preset: parameters of the released model of that size
    "cifar10": 921_569_387, "cifar10-uncond": 615_061_611, "animal-faces": 642_148_324,
    "flowers102": 948_844_516, "imagenet-l": 950_354_532, "imagenet-xl": 1_388_922_404,
    "cifar10-base": 263_818_155, "imagenet-base": 287_914_916,
    "imagenet-latent": 675_160_896, "animal-faces-latent": 130_086_144, "flowers102-latent": 130_162_176,
}


def test_the_list_has_every_preset_with_its_exact_size_and_cost(capsys):
    main(["--list"])
    tables = capsys.readouterr().out.split("\n\n")
    ratios = next(line for line in tables[1].splitlines() if line.startswith("imagenet-xl / -latent")).split()
    sizes, costs = ({line.split()[0]: line.replace(",", "").split() for line in reversed(table.splitlines())}
                    for table in tables)
    assert sizes.keys() >= PRESETS.keys() and costs.keys() >= PRESETS.keys()
    assert {name: int(sizes[name][5]) for name in SIZES_IN_PAPER} == SIZES_IN_PAPER
    assert sizes["imagenet-xl"][1:5] == ["256", "8", "1024", "65536"]
    assert sizes["imagenet-ablation"][1:5] == ["256", "16", "256", "65536"]
    assert sizes["imagenet-latent"][1:5] == ["256", "16", "256", "196608"]
    assert sizes["animal-faces"][4] == sizes["flowers102"][4] == "131072" and sizes["cifar10"][4] == "2048"
    # encode, denoise, decode, then 1, 2, 4, 6 steps without and with guidance, in GFLOPs
    xl, latent = (["0" if cost == "-" else cost for cost in costs[name][1:]]
                  for name in ("imagenet-xl", "imagenet-latent"))
    encode, _, decode, one, two, four, six, *guided = (float(cost) for cost in xl)
    assert four == pytest.approx(7610, abs=1) and two == pytest.approx(encode + 2 * decode, rel=1e-3)
    assert guided == pytest.approx([2 * one, 2 * two, 2 * four, 2 * six], rel=1e-3)
    _, denoise, decode, *plain, g1, g2, g4, g6 = (float(cost) for cost in latent)
    assert plain == pytest.approx([decode + T * denoise for T in (1, 2, 4, 6)], rel=1e-3)
    assert (g1, g6) == pytest.approx((decode + 2 * denoise, decode + 12 * denoise), rel=1e-3)
    assert four / plain[2] == pytest.approx(6.5, abs=0.3)                               # the paper's figure
    assert f"{four / plain[2]:.2f}" in ratios


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_its_network_keeps_shapes(name):
    preset = PRESETS[name]
    train.check_preset(preset, 1, 1)
    with torch.device("meta"):
        model, tokenizer = train.build_on_meta(preset)
        if tokenizer:
            assert model(torch.empty(1, *model.latent_shape)).shape == (1, *model.latent_shape)
            return
        z = model.encode(torch.empty(1, 3, preset.image_size, preset.image_size))
        assert z.shape == (1, (preset.image_size // preset.patch_size) ** 2, preset.latent_dim)
        assert model.decode(z).shape == (1, 3, preset.image_size, preset.image_size)


def test_the_length_given_replaces_the_length_of_the_preset(monkeypatch):
    seen = []
    monkeypatch.setattr(train, "train", lambda preset, *rest, **speed: seen.append(preset))
    main(["--preset", "cifar10", "--iterations", "9"])
    main(["--preset", "digits", "--epochs", "2.5"])
    assert [(p.epochs, p.iterations) for p in seen] == [(0, 9), (2.5, 0)]


# ---- evaluation ----


def test_evaluation_prints_every_number_beside_real_images(trained, capsys):
    main(["--evaluate", str(trained), "--count", "100", "--steps", "1,2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["1", "step", "2", "steps", "real", "held-out"]
    rows = {line[:20].strip(): [float(word) for word in line[20:].split()] for line in lines[2:]}
    assert list(rows) == ["judged right", "Fréchet distance", "nearest", "reconstruction MSE",
                          "ms per image"]
    assert 0 < rows["ms per image"][0] and len(rows["ms per image"]) == 2
    assert rows["judged right"][2] == pytest.approx(0.953, abs=0.001)       # the judge itself, on real digits
    assert rows["Fréchet distance"][2] == pytest.approx(3.01, abs=0.03) and rows["nearest"][2] == 1.0


@pytest.fixture
def photos_run(folder, tmp_path):
    main(["--data", str(folder), "--out", str(tmp_path / "photos run"), *FOLDER_FLAGS])
    return tmp_path / "photos run" / "last.pt"


def test_inception_measures_are_those_of_the_written_images_for_any_number_of_processes(
        photos_run, folder, tmp_path, monkeypatch, capsys):
    """Against fid.py on the same samples and training images as files."""
    weights = tmp_path / "inception.pth"
    torch.save(seeded_inception(), weights)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(fid, "INCEPTION_SHA256", digest)
    monkeypatch.setattr(train.batches_of, "__defaults__", (10,))         # so that few images are many batches
    flags = ["--evaluate", str(photos_run), "--count", "23", "--steps", "2", "--inception-weights",
             str(weights), "--metrics", "fid,is,pr,sfid,rfid", "--device", "cpu"]
    capsys.readouterr()
    assert main(flags) is None
    table = capsys.readouterr().out
    rows = {line[:20].strip(): line[20:].split() for line in table.splitlines()[2:]}
    assert "convention torch-fidelity" in table
    assert list(rows) == ["FID", "Inception Score", "its deviation", "precision", "recall",
                          "sFID (unchecked)", "rFID"]

    sample.main(["--checkpoint", str(photos_run), "--out", str(tmp_path / "drawn"), "--count", "23",
                 "--steps", "2", "--singles"])
    (tmp_path / "drawn" / "samples.png").unlink()
    (tmp_path / "real").mkdir()
    for i in range(12):
        image = load_data(replace(TINY, dataset="folder", data=str(folder)))[0][i][0]
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "real" / f"{i}.png")
    capsys.readouterr()
    fid.main([str(tmp_path / "drawn"), str(tmp_path / "real"), "--json", "--inception-weights", str(weights)])
    files = json.loads(capsys.readouterr().out)
    for name in list(rows)[:-1]:
        assert float(rows[name][0]) == pytest.approx(files[name], rel=1e-5, abs=1e-4), name

    script = tmp_path / "evaluate.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport fid, train\n"
                      f"fid.INCEPTION_SHA256 = {digest!r}\n"
                      f"train.batches_of.__defaults__ = (10,)\ntrain.main()\n")
    result = subprocess.run([*TORCHRUN, "--standalone", "--nproc_per_node=2", script, *flags], timeout=120,
                            capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    for line in result.stdout.splitlines()[2:]:
        assert [float(word) for word in line[20:].split()] == pytest.approx(
            [float(word) for word in rows[line[:20].strip()]], rel=2e-6, abs=1e-4)


def test_guidance_reaches_the_samples_that_are_judged(trained):
    plain, none, strong = (evaluate(trained, count=50, steps=(1,), cfg=cfg) for cfg in (1.0, 0.0, 3.0))
    distances = [rows["Fréchet distance"]["1 step"] for rows in (plain, none, strong)]
    assert len(set(distances)) == 3


@pytest.mark.parametrize("kind", ["trained", "trained_latent"])
def test_the_sampling_scheme_reaches_the_samples_that_are_judged(kind, request):
    path, own = request.getfixturevalue(kind), dict(gamma=0.0 if kind == "trained" else 1.0, fresh=False)
    rows = [evaluate(path, count=20, steps=(3,), **scheme)["Fréchet distance"]["3 steps"]
            for scheme in ({}, own, dict(gamma=0.5), dict(fresh=True))]
    assert rows[0] == rows[1] and len(set(rows)) == 3
    whole, truncated = (evaluate(path, count=100, steps=(1,), bound=bound)["Fréchet distance"]["1 step"]
                        for bound in (None, 0.5))               # the start alone, which later steps may forget
    assert whole != truncated
    guided = dict(count=20, steps=(1,), cfg=2.0)
    if kind == "trained":
        rows = [evaluate(path, **guided, position=position)["Fréchet distance"]["1 step"]
                for position in ("combo", "encoder", "decoder")]
        assert len(set(rows)) == 3
    else:
        with pytest.raises(ValueError, match="--position is no option"):
            evaluate(path, **guided, position="decoder")


def test_truncated_samples_are_darker(trained):
    rounded, truncated = (evaluate(trained, count=100, steps=(1,), truncate=t) for t in (False, True))
    assert rounded["nearest"]["1 step"] != truncated["nearest"]["1 step"]
    assert rounded["reconstruction MSE"] == truncated["reconstruction MSE"]


def test_evaluation_options_reach_the_evaluation(trained, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "evaluate", lambda path, **chosen: seen.append(chosen) or {})
    main(["--evaluate", str(trained)])
    main(["--evaluate", str(trained), *"--cfg 0 --seed 0 --count 7 --steps 2,3 --data d --truncate".split()])
    main(["--evaluate", str(trained), *"--metrics fid,rfid --features pixels --reference r.npz".split()])
    main(["--evaluate", str(trained), "--gamma", "0.5", "--fresh"])
    main(["--evaluate", str(trained), *"--bound 2 --position decoder --metrics uniformity --out p".split()])
    assert seen == [{}, dict(cfg=0.0, seed=0, count=7, steps=(2, 3), data="d", truncate=True),
                    dict(metrics=("fid", "rfid"), features="pixels", reference="r.npz"),
                    dict(gamma=0.5, fresh=True),
                    dict(bound=2.0, position="decoder", metrics=("uniformity",), out=Path("p"))]


def test_training_keeps_the_best_checkpoint_and_is_not_changed_by_its_evaluations(tmp_path, monkeypatch):
    """Evaluations after iterations 3, 6, 9, 12; a second run dies after its checkpoint of iteration 8."""
    preset = replace(LONGER, checkpoint_every=8)
    evaluation = train.Evaluation(count=20, steps=(1, 2), metrics=("pixels", "fid"), features="pixels")
    every = dict(evaluate_every=3 * 8 / 1500, evaluation=evaluation)
    whole = train.train(preset, tmp_path / "whole", seed=1, **every).parent
    plain = train.train(preset, tmp_path / "plain", seed=1).parent
    names = ("model", "ema", "optimizer")
    flat = [torch.utils._pytree.tree_leaves([read_checkpoint(run / "last.pt")[name] for name in names])
            for run in (whole, plain)]
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(*flat))
    lines = [json.loads(line) for line in (whole / "evaluations.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["FD (pixels)"]["2 steps"] for line in lines}
    assert list(scores) == [3, 6, 9, 12] and len(set(scores.values())) == 4
    best = read_checkpoint(whole / "best.pt")
    assert best["step"] == min(scores, key=scores.get)
    again = evaluate(whole / "best.pt", count=20, steps=(1, 2), metrics=("fid",), features="pixels")
    assert again["FD (pixels)"]["2 steps"] == scores[best["step"]] == best["best"]["score"]

    def dies(path, checkpoint, save=train.save_checkpoint):
        if path.name == "last.pt" and checkpoint["step"] == 12:
            raise RuntimeError("killed")
        save(path, checkpoint)
    monkeypatch.setattr(train, "save_checkpoint", dies)
    with pytest.raises(RuntimeError, match="killed"):
        train.train(preset, tmp_path / "broken", seed=1, **every)
    monkeypatch.undo()
    train.train(preset, tmp_path / "broken", seed=1, resume=True, **every)
    assert_same_run(tmp_path / "broken", whole)
    assert read_checkpoint(tmp_path / "broken" / "best.pt")["step"] == best["step"]
    logs = [(run / "evaluations.jsonl").read_text() for run in (tmp_path / "broken", whole)]
    assert logs[0] == logs[1]
    stored = {**read_checkpoint(whole / "last.pt"), "step": 8}
    torch.save(stored, tmp_path / "broken" / "last.pt")
    train.train(preset, tmp_path / "broken", seed=1, resume=True)       # without evaluations: keeps its best
    assert read_checkpoint(tmp_path / "broken" / "last.pt")["best"] == stored["best"]


def test_stored_statistics_of_the_training_images_replace_them(photos_run, folder, tmp_path, capsys):
    (tmp_path / "real").mkdir()
    for i in range(12):
        image = load_data(replace(TINY, dataset="folder", data=str(folder)))[0][i][0]
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "real" / f"{i}.png")
    fid.main([str(tmp_path / "real"), "--save", str(tmp_path / "r.npz"), "--features", "pixels"])
    options = dict(count=10, steps=(1,), metrics=("fid",), features="pixels")
    direct, stored = (evaluate(photos_run, **options, reference=npz)["FD (pixels)"]["1 step"]
                      for npz in (None, str(tmp_path / "r.npz")))
    assert stored == pytest.approx(direct, rel=1e-4)                        # its mean is float32
    moved = []
    for gap in (1, -1):                                 # the squared gap of means is a parabola in the shift
        np.savez(tmp_path / f"{gap}.npz", features="pixels", sigma=np.load(tmp_path / "r.npz")["sigma"],
                 mu=np.load(tmp_path / "r.npz")["mu"] + gap)
        moved.append(evaluate(photos_run, **options, reference=str(tmp_path / f"{gap}.npz")))
    sides = sum(rows["FD (pixels)"]["1 step"] for rows in moved)
    assert sides == pytest.approx(2 * direct + 2 * 768, rel=1e-3)


def test_uniform_points_are_drawn_along_fewer_directions_than_they_have():
    seen = train.uniform_along(40_000, 4, 10, 0)
    assert seen.shape == (40_000, 4)
    assert seen.square().mean().item() == pytest.approx(1, rel=0.02)
    assert seen.pow(4).mean().item() == pytest.approx(3 * 10 / 12, rel=0.03)    # 3 L / (L + 2) on the sphere


def test_uniformity_tells_a_uniform_encoder_from_a_collapsed_one(trained, monkeypatch):
    data, generator, seen = load_data(TINY)[0], torch.Generator().manual_seed(0), []

    def uniform(model, x, y):
        seen.extend(y.tolist())
        return spherify(torch.randn(len(x), *model.latent_shape, generator=generator))

    monkeypatch.setattr(train, "to_sphere", uniform)
    rows = evaluate(trained, metrics=("uniformity",))
    assert seen == data.targets                                         # every image with its own class
    assert list(rows) == [f"uniformity, {name}" for name in [*"0123456789", "all"]]
    for row in rows.values():
        assert row["encoded"] == pytest.approx(row["uniform"], rel=0.15)
    assert rows["uniformity, all"]["uniform"] < 0.5 * rows["uniformity, 3"]["uniform"]      # more points
    point = spherify(torch.randn(1, 16, 4, generator=generator))
    monkeypatch.setattr(train, "to_sphere", lambda model, x, y: point.expand(len(x), -1, -1))
    for row in evaluate(trained, metrics=("uniformity",)).values():
        assert row["encoded"] == pytest.approx(2**0.5, rel=0.01)        # |v|^2 / L + 1 along a whole basis


def test_a_sphere_is_drawn_whole_and_round_where_its_points_cover_a_part():
    points = torch.nn.functional.normalize(torch.randn(200, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    for axes in train.sphere_picture({"cap": points[points[:, 0] > 0.6], "all": points}).axes:
        assert axes.get_xlim() == axes.get_ylim() == axes.get_zlim() == (-1, 1)


def test_real_training_images_score_as_memorised(trained, monkeypatch):
    """The measures can fail: 'samples' that copy the training set are all near it, and judged right."""
    data = load_data(TINY)[0]
    chosen = [[i for i, t in enumerate(data.targets) if t == k] for k in range(10)]

    def copies(model, y, *rest, first, **options):
        places = [chosen[k][(first + i) // 10] for i, k in enumerate(y.tolist())]
        return torch.stack([data[place][0] for place in places]) / 127.5 - 1

    monkeypatch.setattr(train, "sampler", lambda model: copies)
    rows = evaluate(trained, count=1000, steps=(1,), metrics=("pixels", "memorisation"))
    assert rows["nearest"]["1 step"] < 0.01 and rows["judged right"]["1 step"] > 0.99
    assert rows["Fréchet distance"]["1 step"] < 0.5
    assert rows["nearest or mirrored"]["1 step"] < 0.01 and rows["near-duplicates"]["1 step"] == 1.0
    assert rows["near-duplicates"]["real held-out"] < 0.05


# ---- bad input ----


@pytest.mark.parametrize("options, named", [
    (["--preset", "cifar11"], "cifar11"), (["--lr", "-1"], "-1"), (["--lr", "fast"], "fast"),
    (["--lr", "nan"], "nan"), (["--batch-size", "0"], "0"), (["--iterations", "0"], "0"),
    (["--weights", "1,1"], "(1.0, 1.0)"), (["--weights", "1,1,1,1,1"], "perceptual"),
    (["--weights", "0,0,0,0,0"], "not all 0"), (["--class-dropout", "1.5"], "1.5"),
    (["--hard-prob", "2"], "2"), (["--alpha-max", "90"], "90"), (["--alpha-hard", "60"], "60"),
    (["--ema", "-0.1"], "-0.1"), (["--perceptual", "vgg"], "vgg"), (["--encoder-size", "tiny"], "tiny"),
    (["--encoder-size", "30,2,4"], "30"), (["--patch-size", "5"], "5"), (["--pixel-head", "cnn"], "cnn"),
    (["--dataset", "mnist"], "mnist"), (["--seed", "-1"], "-1"), (["--device", "abacus"], "abacus"),
    (["--preset", "folder", "--data", "nowhere"], "nowhere"), (["--no-such-flag"], "--no-such-flag"),
    (["--resume"], "last.pt"), (["--stratified", "--batch-size", "2"], "2"),
    (["--checkpoint-every", "0"], "0"), (["--clip", "inf"], "inf"), (["--betas", "0.9"], "(0.9,)"),
    (["--betas", "0.9,1"], "1.0"), (["--evaluate", "nowhere.pt"], "drop it"), (["--workers", "-1"], "-1"),
    (["--batch-norm", "--accumulate", "2"], "--accumulate"), (["--swd-weight", "-1"], "-1"),
    (["--batch-norm", "--activation-checkpointing"], "--activation-checkpointing"),
    (["--evaluate-every", "1", "--calibration", "none"], "--batch-norm"), (["--bound", "1"], "--bound"),
    (["--export", "files"], "drop --out"),
    (["--steps", "5000"], "--iterations"), (["--count", "3"], "--count"), (["--cfg", "2"], "--cfg"),
    (["--encoder-size", "16,1"], "(16, 1)"), (["--image-size", "1", "--patch-size", "1"], "pixel head"),
    (["--perceptual", "none", "--preset", "folder"], "--weights 1,0"), (["--precision", "fp8"], "fp8"),
    (["--accumulate", "3"], "1 x 3"), (["--accumulate", "0"], "--accumulate"),
    (["--preset", "cifar10", "--epochs", "0"], "--epochs"), (["--warmup", "50"], "50"),
    (["--epochs", "3", "--iterations", "4"], "3 and 4"),
    (["--preset", "cifar10", "--data", "no"], "cifar-10-batches-py"),
    (["--preset", "flowers102", "--data", "no"], "imagelabels.mat"),
    (["--preset", "animal-faces", "--data", "no"], "cat/, dog/ and wild/"),
    (["--preset", "imagenet-l", "--data", "no"], "1,000 folders"),
    (["--preset", "fashion-mnist", "--data", "no"], "dataset-fashion-mnist"),
    (["--preset", "digits-latent", "--image-size", "32"], "at 16 pixels, not digits at 32"),
    (["--preset", "digits-latent", "--dataset", "fashion-mnist"], "is for digits"),
    (["--evaluate-every", "1", "--steps", "0"], "--steps"),
    (["--evaluate-every", "1", "--cfg", "2", "--no-conditional"], "conditional model"),
    (["--evaluate-every", "1", "--reference", "r.npz"], "--metrics fid"),
    (["--tokenizer", "digits-latent"], "digits-latent"), (["--tokenizer", "nowhere.pt"], "nowhere.pt"),
    (["--preset", "digits-latent", "--noise-std", "-1"], "-1"), (["--distance", "l3"], "l3"),
    (["--preset", "digits-latent", "--noise-mapping", "cosine"], "cosine"), (["--gamma", "-1"], "-1"),
    (["--preset", "digits-latent", "--denoiser-size", "huge"], "huge"),
    (["--preset", "digits-latent", "--weights", "0,0,0,0,0"], "recon_cosine"),
    (["--preset", "digits-latent", "--tokenizer", "rae", "--dinov2-repo", "nowhere"], "nowhere"),
    (["--evaluate-every", "-1"], "-1"), (["--evaluate-every", "1", "--metrics", "rfid"], "pixels or fid"),
    (["--evaluate-every", "1", "--count", "1"], "--count"), (["--truncate"], "--truncate"),
])
def test_bad_settings_are_one_line_and_leave_nothing(tmp_path, capsys, monkeypatch, options, named):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")
    for name in ("FashionMNIST", "CIFAR10", "Flowers102"):
        monkeypatch.setattr(getattr(torchvision.datasets, name), "download", refuse)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as exit:
        main(["--out", str(out), *options])
    assert exit.value.code == 2 and named in one_line(capsys, "train.py: ")
    assert not out.exists()


@pytest.mark.parametrize("options, named", [
    (["--count", "0"], "--count"), (["--count", "1"], "--count"), (["--steps", "0"], "steps"),
    (["--cfg", "-1"], "cfg"),
    (["--workers", "2"], "--workers"), (["--resume"], "--resume"), (["--lr", "1"], "--lr"),
    (["--preset", "digits"], "--preset"), (["--seed", "-1"], "-1"),
    (["--evaluate", "nowhere.pt"], "nowhere.pt"), (["--metrics", "fid,ssim"], "ssim"),
    (["--metrics", "fid", "--inception-weights", "nowhere.pth"], "nowhere.pth"),
    (["--convention", "clean"], "clean"), (["--metrics", "is", "--features", "pixels"], "fid,pr"),
    (["--metrics", "fid", "--features", "resnet51"], "resnet51"),
    (["--metrics", "fid", "--features", "pixels", "--reference", "nowhere.npz"], "nowhere.npz"),
    (["--evaluate-every", "1"], "--evaluate-every"), (["--calibration", "reference"], "--batch-norm"),
    (["--bound", "0"], "0"), (["--position", "middle"], "middle"), (["--out", "x"], "uniformity"),
    (["--metrics", "uniformity", "--features", "pixels"], "--features"),
])
def test_bad_evaluation_options_are_one_line(trained, capsys, options, named):
    with pytest.raises(SystemExit) as exit:
        main(["--evaluate", str(trained), *options])
    assert exit.value.code == 2 and named in one_line(capsys, "train.py: ")


def test_a_folder_with_a_file_of_the_same_name_is_refused(tmp_path, capsys):
    for name in ("last.pt", "log.jsonl", "losses.png", "samples-000100.png"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("mine")
        with pytest.raises(SystemExit):
            main(["--out", str(tmp_path / name), *TINY_FLAGS])
        assert "already holds a run" in one_line(capsys, "train.py: ")
        assert [path.read_text() for path in (tmp_path / name).iterdir()] == ["mine"]


def test_a_folder_with_a_run_is_refused_and_stays_as_it_is(unbroken, tmp_path, capsys):
    shutil.copytree(unbroken, tmp_path / "run")
    with pytest.raises(SystemExit) as exit:
        main(["--out", str(tmp_path / "run"), *LONGER_FLAGS])
    assert exit.value.code == 2 and "already holds a run" in one_line(capsys, "train.py: ")
    assert_same_run(tmp_path / "run", unbroken)


def test_exported_images_are_those_of_the_data_set_and_can_be_trained_on(tmp_path, capsys):
    out = tmp_path / "files"
    main(["--export", str(out), "--count", "40"])
    originals = load_data(TINY)
    files = load_data(replace(TINY, dataset="folder", data=str(out)))
    assert len(files[0]) == len(files[1]) == 40 and files[2] == originals[2]
    for data, original in zip(files[:2], originals[:2]):
        for i in (0, 7, 39):
            image, label = data[i]
            place = int(Path(data.paths[i]).stem)
            assert torch.equal(image, original[place][0]) and int(files[2][label]) == original[place][1]
    before = sorted(out.rglob("*"))
    with pytest.raises(SystemExit):
        main(["--export", str(out)])
    assert "files is not empty" in one_line(capsys, "train.py: ") and sorted(out.rglob("*")) == before


# ---- App. C.3, C.4 ----


REGULARISED = replace(LONGER, batch_norm=True, swd_weight=0.1, encoder_classes=False, use_ema=False)


@pytest.fixture(scope="module")
def regularised(tmp_path_factory):
    return train.train(REGULARISED, tmp_path_factory.mktemp("regularised") / "run", seed=1)


def test_a_regularised_run_resumes_exactly_and_its_evaluations_change_nothing(regularised, tmp_path,
                                                                              monkeypatch):
    evaluation = train.Evaluation(count=20, steps=(2,))
    every = dict(evaluate_every=3 * 8 / 1500, evaluation=evaluation)

    def dies(path, checkpoint, save=train.save_checkpoint):
        if path.name == "last.pt" and checkpoint["step"] == 8:
            raise RuntimeError("killed")
        save(path, checkpoint)
    monkeypatch.setattr(train, "save_checkpoint", dies)
    with pytest.raises(RuntimeError, match="killed"):
        train.train(REGULARISED, tmp_path / "run", seed=1, **every)
    monkeypatch.undo()
    last = train.train(REGULARISED, tmp_path / "run", seed=1, resume=True, **every)
    one, two = (read_checkpoint(path) for path in (last, regularised))
    for part in ("model", "ema"):
        assert all(torch.equal(tensor, two[part][name]) for name, tensor in one[part].items())
        assert one[part]["norm.running_mean"].abs().max() > 0
        assert torch.equal(one[part]["norm.running_var"], two["model"]["norm.running_var"])
    assert all(line["swd"] > 0 for line in log_lines(last.parent))


def test_calibrations_replace_the_statistics_of_a_batch_norm_and_leave_the_model_alone(regularised):
    data, held_out, _ = load_data(TINY)
    model = load(regularised)
    stored = model.norm.running_mean.clone()
    distances = []
    for how in (None, "none", "reference", "generated"):
        measure = train.Evaluator(train.Evaluation(count=20, steps=(2,), calibration=how), data, held_out,
                                  torch.device("cpu"))
        distances.append(measure(model)["Fréchet distance"]["2 steps"])
        assert torch.equal(model.norm.running_mean, stored) and not model.norm.training
        if how in ("reference", "generated"):
            assert not measure.calibrated(model, 0, {}).norm.training
        if how == "reference":
            norm, model.norm = model.norm, None
            raw = model.encode(sample.to_float(torch.stack([x for x, _ in data])))
            model.norm = norm
            torch.testing.assert_close(measure.calibrated(model, 0, {}).norm.running_mean, raw.mean((0, 1)),
                                       rtol=1e-3, atol=1e-4)
        if how == "none":                                   # every batch by itself
            loose = measure.calibrated(model, 0, {})
            torch.testing.assert_close(loose.encode(torch.rand(9, 3, 16, 16)).mean((0, 1)), torch.zeros(4),
                                       rtol=0, atol=1e-5)
    assert len(set(distances)) == 4


def test_a_batch_norm_of_several_processes_needs_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="several processes on a CPU"):
        train.check_batch_norm(REGULARISED, 2, 1, False)
    train.check_batch_norm(TINY, 2, 2, True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    train.check_batch_norm(REGULARISED, 2, 1, False)


# ---- Sphere Latent Encoder ----


def test_the_latent_loop_is_what_it_says_written_out(tiny_tokenizer, tmp_path):
    """Three iterations by hand on latents of the tokenizer: flips, class drops, logit-normal noise, AdamW."""
    preset = replace(TINY_LATENT, tokenizer=str(tiny_tokenizer), iterations=3, flip=True, class_dropout=0.5,
                     clip=0.01, weight_decay=0.3, weights=(2.0, 0.5, 1.0, 0.25, 0.1), distance="l1",
                     token_cosine=True, noise_mapping="angle", warmup=1 / 3)
    path = train.train(preset, tmp_path / "run", seed=8, device="cpu", latent_cache="none")

    data, tokenizer = load_data(preset)[0], models.SphereTokenizer(load(tiny_tokenizer))
    with torch.random.fork_rng():
        torch.manual_seed(train.hashed(8, 2))
        model = train.build_model(preset, [str(k) for k in range(10)], (16, 4))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in trainable.values() if (p.ndim > 1) == matrix], "weight_decay": 0.3 * matrix}
         for matrix in (True, False)], lr=0.0, betas=(0.9, 0.95))
    order = torch.randperm(1500, generator=train.seeded(8, 0, 0))
    for step, lr in enumerate((preset.lr / 2, preset.lr, (preset.lr + preset.min_lr) / 2)):
        drawn = random_draws(preset, 8, step)
        sigma, sigma_sub = logit_normal_sigmas(8, 81.0, -1.0, 1.5, "angle", train.seeded(8, 1, step))
        assert torch.equal(drawn["sigma"], sigma) and torch.equal(drawn["sigma_sub"], sigma_sub)
        chosen = order[8 * step:8 * step + 8].tolist()
        x = torch.stack([data[i][0] for i in chosen]).float() / 127.5 - 1
        x = torch.stack([image.flip(2) if flip else image for image, flip in zip(x, drawn["flip"])])
        labels = torch.tensor([data[i][1] for i in chosen])
        y = torch.stack([torch.where(drop, 10, labels) for drop in drawn["drop"]])
        e = gaussian(drawn["e_seed"], model.latent_shape, "cpu")
        loss, _ = sphere_latent_loss(model, tokenizer.encode(x), y, sigma, sigma_sub, e, preset.weights, "l1",
                                     True)
        gradients = torch.autograd.grad(loss, list(trainable.values()))
        norm = torch.sqrt(sum(g.square().sum() for g in gradients))
        for p, g in zip(trainable.values(), gradients):
            p.grad = g * 0.01 / (norm + 1e-6)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    stored = read_checkpoint(path)
    for name, p in trainable.items():
        torch.testing.assert_close(stored["model"][name], p.detach(), rtol=1e-4, atol=4e-5)


LATENT_FLAGS = ("--preset digits-latent --denoiser-size 16,1,2 --batch-size 8 --lr-batch 8 --iterations 12 "
                "--warmup 0.3333 --log-every 3 --checkpoint-every 4 --picture-every 0 --device cpu").split()


def test_a_run_of_two_phases_resumes_from_either(tmp_path, monkeypatch, capsys):
    """Left while it trains its tokenizer, then its denoiser; the end is that of an unbroken run."""
    tokenizer = replace(TINY, conditional=False, weights=(1.0, 0.0, 0.0, 0.0, 0.0), iterations=12)
    monkeypatch.setitem(PRESETS, "digits-tokenizer", tokenizer)
    main([*LATENT_FLAGS, "--out", str(tmp_path / "whole")])

    whole, left = train.drain, [("tokenizer", 8), ("broken", 10)]

    def dies(window, done, last, device):
        if left and last.parent.name == left[0][0] and done >= left[0][1]:
            left.pop(0)
            raise ValueError("left")
        return whole(window, done, last, device)

    monkeypatch.setattr(train, "drain", dies)
    flags = ["--out", str(tmp_path / "broken")]
    for again in ([], ["--resume"]):
        with pytest.raises(SystemExit):
            main([*LATENT_FLAGS, *flags, *again])
    assert not left and read_checkpoint(tmp_path / "broken" / "last.pt")["step"] == 8
    main([*flags, "--resume", "--device", "cpu"])
    assert_same_run(tmp_path / "broken", tmp_path / "whole")
    assert_same_run(tmp_path / "broken" / "tokenizer", tmp_path / "whole" / "tokenizer")
    shutil.rmtree(tmp_path / "broken" / "tokenizer")    # the denoiser's checkpoint holds what it needs of it
    main(["--evaluate", str(tmp_path / "broken" / "last.pt"), "--count", "20"])

    (tmp_path / "whole" / "last.pt").unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "whole"), "--resume"])
    assert "name the --preset" in one_line(capsys, "train.py: ")


def test_two_processes_train_tokenizer_and_denoiser_as_one(tmp_path):
    script = tmp_path / "two_phases.py"
    script.write_text(f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
                      "import train\nfrom conftest import TINY\nfrom dataclasses import replace\n"
                      "train.PRESETS['digits-tokenizer'] = replace(TINY, conditional=False, "
                      "weights=(1.0, 0.0, 0.0, 0.0, 0.0))\nsys.exit(train.main())\n")
    for processes in (1, 2):
        result = subprocess.run(
            [*TORCHRUN, "--standalone", f"--nproc_per_node={processes}", script, *LATENT_FLAGS, "--log-every",
             "1", "--out", tmp_path / str(processes)], capture_output=True, text=True, timeout=120,
            env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr
    for folder in ("", "tokenizer"):
        one, two = (log_lines(tmp_path / n / folder) for n in "12")
        assert len(one) == len(two) > 2
        for a, b in zip(one, two):
            assert {k: v for k, v in a.items() if k != "grad_norm"} == pytest.approx(
                {k: v for k, v in b.items() if k != "grad_norm"}, rel=1e-3, abs=1e-4)


def test_cached_latents_are_the_tokenizers_and_train_the_same_model(tiny_tokenizer, tmp_path):
    preset = replace(TINY_LATENT, tokenizer=str(tiny_tokenizer), flip=True, log_every=1)
    for cache in ("none", None):
        train.train(preset, tmp_path / str(cache), seed=5, device="cpu", latent_cache=cache)
    assert not (tmp_path / "none" / "latents.bin").exists()
    for a, b in zip(log_lines(tmp_path / "none"), log_lines(tmp_path / "None")):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    data, tokenizer = load_data(preset)[0], models.SphereTokenizer(load(tiny_tokenizer))
    cache = train.LatentCache(tmp_path / "None", data, tokenizer, True, "cpu")
    assert len(cache) == 3000 and isinstance(cache.latents.base, np.memmap)
    for i in (0, 77, 1499):
        x = data[i][0][None].float() / 127.5 - 1
        torch.testing.assert_close(cache[i][0][None], tokenizer.encode(x), rtol=1e-4, atol=1e-5)
        mirrored = tokenizer.encode(x.flip(3))
        torch.testing.assert_close(cache[1500 + i][0][None], mirrored, rtol=1e-4, atol=1e-5)
        assert cache[i][1] == cache[1500 + i][1] == data.targets[i]
    train.train(preset, tmp_path / "again", seed=5, device="cpu", latent_cache=tmp_path / "None")
    assert log_lines(tmp_path / "again") == log_lines(tmp_path / "None")    # one cache serves several runs


@pytest.mark.parametrize("what, named", [
    ("tokenizer", "another tokenizer"), ("data", "another data set"), ("flip", "another shape"),
    ("truncated", "cut short"), ("rubbish", "another tokenizer"),
])
def test_a_stale_or_damaged_cache_is_refused_by_name_and_left(tiny_tokenizer, tmp_path, capsys, what, named):
    data, tokenizer = load_data(TINY)[0], models.SphereTokenizer(load(tiny_tokenizer))
    train.LatentCache(tmp_path, data, tokenizer, False, "cpu")
    path = tmp_path / "latents.bin"
    if what == "tokenizer":
        next(tokenizer.parameters()).data += 1
    elif what == "data":
        data.tensors[0][5, 0, 3, 3] += 1
    elif what == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif what == "rubbish":
        path.write_bytes(b"\0" * 5000)
    before = path.read_bytes()
    with pytest.raises(ValueError) as error:
        train.LatentCache(tmp_path, data, tokenizer, what == "flip", "cpu")
    assert str(path) in str(error.value) and named in str(error.value) and path.read_bytes() == before


def test_the_cache_of_image_files_knows_their_names_and_sizes(folder, tiny_tokenizer):
    preset = replace(TINY, dataset="folder", data=str(folder))
    digests = [train.data_digest(load_data(preset)[0])]
    digests.append(train.data_digest(load_data(replace(preset, image_size=20))[0]))
    first = sorted(folder.rglob("*.png"))[0]
    first.rename(first.with_name("first.png"))
    digests.append(train.data_digest(load_data(preset)[0]))
    assert len(set(digests)) == 3


def test_a_denoiser_trains_on_rae_latents_and_its_checkpoint_finds_the_rae_again(
        folder, rae_files, tmp_path, capsys):
    files = ["--dinov2-repo", rae_files["repo"], "--dinov2-weights", rae_files["encoder_weights"],
             "--rae-decoder", rae_files["decoder_weights"], "--rae-statistics", rae_files["statistics"]]
    flags = ["--data", str(folder), "--latent-cache", str(tmp_path / "cache"),
             *("--preset imagenet-latent --dataset folder --image-size 64 --denoiser-size 16,1,2 "
               "--batch-size 4 --iterations 4 --checkpoint-every 2 --device cpu").split()]
    golden_heads = models.RAE_HEADS | {48: 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "RAE_HEADS", golden_heads)
        main([*flags, *files, "--out", str(tmp_path / "run")])
        assert (tmp_path / "cache" / "latents.bin").exists()
        last = tmp_path / "run" / "last.pt"
        stored = read_checkpoint(last)["tokenizer"]
        assert stored["kind"] == "rae" and stored["config"]["decoder_weights"] == rae_files["decoder_weights"]
        main(["--evaluate", str(last), "--count", "4", "--steps", "1"])
        main([*files, "--out", str(tmp_path / "run"), "--resume"])
        capsys.readouterr()
        weights = torch.load(rae_files["decoder_weights"])                  # another RAE at the same place
        weights["decoder_pred.bias"] += 1
        torch.save(weights, rae_files["decoder_weights"])
        with pytest.raises(SystemExit):
            main(["--evaluate", str(last), "--count", "4"])
        assert "another RAE" in one_line(capsys, "train.py: ")


def test_samples_of_a_denoiser_are_evaluated_on_its_tokenizers_images(trained_latent, tiny_tokenizer):
    rows = evaluate(trained_latent, count=20, steps=(1, 2), metrics=("pixels", "uniformity",
                                                                     "memorisation"))
    mse = rows["reconstruction MSE"]["real held-out"]
    held_out = train.stacked(load_data(TINY)[1], 10_000)[0].float() / 127.5 - 1
    tokenizer = models.SphereTokenizer(load(tiny_tokenizer))
    expected = (tokenizer.decode(tokenizer.encode(held_out)) - held_out).square().mean().item()
    assert mse == pytest.approx(expected, rel=1e-4)
    assert rows["Fréchet distance"]["1 step"] != rows["Fréchet distance"]["2 steps"]
    assert rows["nearest or mirrored"]["2 steps"] > 0.5
    z = tokenizer.encode(sample.to_float(load_data(TINY)[0].tensors[0]))
    along = spherify(z).flatten(1) @ train.random_directions(load(trained_latent), 0)
    assert rows["uniformity, all"]["encoded"] == pytest.approx(sliced_wasserstein(along, 64).item() ** 0.5,
                                                               rel=1e-4)


def test_tokenizers_that_do_not_fit_are_one_line(trained_latent, tiny_tokenizer, tmp_path, capsys):
    for flags, named in ((["--tokenizer", str(trained_latent)], "holds a Sphere Latent Encoder"),
                         (["--tokenizer", str(tiny_tokenizer), "--image-size", "32"], "--image-size 32")):
        with pytest.raises(SystemExit):
            main(["--preset", "digits-latent", *flags, "--out", str(tmp_path / "run")])
        assert named in one_line(capsys, "train.py: ") and not (tmp_path / "run").exists()
