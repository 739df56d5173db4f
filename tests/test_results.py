"""notebooks/results.py: its studies are whole, its runs what they are called, its rules what it says."""

import json
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats

import fid
import models
import train
from conftest import ROOT, TINY
from losses import pixel_reconstruction_loss
from sample import load

sys.path.insert(0, str(ROOT / "notebooks"))
import results  # noqa: E402


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Runs of a few iterations of tiny networks into a folder of their own."""
    monkeypatch.setattr(results, "OUT", tmp_path)
    results.network.cache_clear()
    monkeypatch.setattr(results, "COUNT", 20)
    monkeypatch.setattr(results, "STEPS", (1,))
    monkeypatch.setitem(results.PRESETS, "digits", TINY)
    monkeypatch.setattr(train, "draw", train.draw)              # a run takes it away, for its own process


@pytest.mark.parametrize("name", results.STUDIES)
def test_a_study_compares_rows_and_columns_that_it_has(name):
    study = results.STUDIES[name]
    assert all(run in results.RUNS and measure in results.MEASURES for run, measure in study.rows.values())
    assert all(head in results.HEADS for head in study.heads)
    for row in study.rows.values():
        assert (results.command(*row, name) or "python train.py").startswith("python train.py")
    for label, head, sign, others, other_head in (*study.more, *(claim.decides for claim in study.claims)):
        assert {label, *np.ravel(others)} <= study.rows.keys() and {head, other_head} <= results.HEADS.keys()
        assert sign in ("<", "<=", "=") and (label, head) != (others, other_head)
    for claim in study.claims:                              # a row that decides has five seeds
        assert len(results.asked(name, claim.decides[0])) == (3 if name in results.EMOJI else 5)


def test_the_reader_is_what_its_command_trains():
    """A little: with the same seed the first epoch gives the same weights, on any machine up to rounding."""
    before, after = results.read_digits(epochs=0), results.read_digits(epochs=1)
    again = results.read_digits(epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(after.parameters(), again.parameters(), strict=True))
    assert not torch.equal(before[1].weight, after[1].weight)


CELLS = {"base": [1.0, 2.0, 4.0], "a tenth less": [0.9, 1.8, 3.6], "scattered": [2.0, 1.0, 4.1],
         "a fifth more": [1.2, 2.4, 4.8], "a third more": [1.3, 2.7, 5.3]}


@pytest.mark.parametrize("label, sign, others, verdict", [
    ("a tenth less", "<", "base", "holds"),                # though their ranges overlap: pairs of seeds count
    ("base", "<", "a tenth less", "contradicted"), ("scattered", "<", "base", "open"),
    ("base", "<", ["a fifth more", "a third more"], "holds"),
    ("base", "<", ["a fifth more", "scattered"], "open"),                   # of several, all count
    ("base", "<", ["a fifth more", "a tenth less"], "contradicted"),
    ("a tenth less", "<=", "base", "holds"), ("a fifth more", "<=", "base", "contradicted"),
    ("a third more", "=", "a fifth more", "open"), ("a fifth more", "=", "base", "contradicted"),
    ("base", "=", "a third more", "contradicted"), ("scattered", "=", "base", "open")])
def test_a_claim_is_decided_by_the_interval_of_ratios_of_pairs(monkeypatch, label, sign, others, verdict):
    monkeypatch.setattr(results, "values", lambda study, label, head: dict(enumerate(CELLS[label])))
    assert results.verdict(None, (label, "", sign, others, "")) == verdict


def test_an_interval_of_ratios_is_students(monkeypatch):
    cells = {"a": {0: 1.0, 1: 3.0, 2: 2.0, 3: 9.0}, "b": {0: 2.0, 1: 2.0, 2: 5.0, 4: 1.0}}
    monkeypatch.setattr(results, "values", lambda study, label, head: cells[label])
    logs = np.log([1 / 2, 3 / 2, 2 / 5])                    # of the seeds that both have
    low, high = stats.t.interval(0.95, 2, logs.mean(), stats.sem(logs))
    [(*found, other)] = results.ratios(None, ("a", "", "<", ["b"], ""))
    assert found == pytest.approx(np.exp([logs.mean(), low, high])) and other == "b"


def test_a_report_keeps_what_is_not_measured_here(tmp_path, monkeypatch):
    page = (ROOT / "notebooks" / "results.md").read_text(encoding="utf-8")
    (tmp_path / "results.md").write_text(page, encoding="utf-8")
    monkeypatch.setattr(results, "HERE", tmp_path)
    monkeypatch.setattr(results, "OUT", tmp_path / "nothing")
    results.measured.cache_clear(), results.stored.cache_clear()
    results.report()
    again = (tmp_path / "results.md").read_text(encoding="utf-8")
    sections = {part.partition("\n")[0]: part.strip() for part in page.split("\n## ")}
    kept = {part.partition("\n")[0]: part.strip() for part in again.split("\n## ")}
    assert all(kept[name] == sections[name] for name in results.STUDIES if name in sections)
    assert page.partition("\n----\n")[2] == again.partition("\n----\n")[2]


def test_a_report_is_a_function_of_the_numbers_that_are_kept(tmp_path, monkeypatch):
    """Of out/results they go into results.jsonl, from which the same page and picture are made."""
    (tmp_path / "figures").mkdir()
    monkeypatch.setattr(results, "HERE", tmp_path)
    monkeypatch.setattr(results, "STUDIES", {"steps": results.STUDIES["steps"]})
    for seed in results.SEEDS:
        for measure, T in (("", (1, 2, 4, 6)), ("ten steps", (10,))):
            rows = {"features": {f"T = {t}": 8 / t + seed for t in T},
                    "Fréchet distance": {f"T = {t}": 1.0 + t + seed for t in T}, "machine": "M", "date": "D"}
            path = tmp_path / "out" / f"digits-{seed}" / results.measured_file("digits", seed, measure).name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rows))
    pages = []
    for out in ("out", "gone"):
        monkeypatch.setattr(results, "OUT", tmp_path / out)
        results.measured.cache_clear(), results.stored.cache_clear()
        (tmp_path / "results.md").write_text("# Results\n\n----\nbelow", encoding="utf-8")
        results.report()
        pages.append((tmp_path / "results.md").read_text(encoding="utf-8"))
    results.measured.cache_clear(), results.stored.cache_clear()
    assert pages[0] == pages[1] and (tmp_path / "figures" / "claims.png").stat().st_size > 1000
    ratio = stats.gmean([(2 + seed) / (8 + seed) for seed in results.SEEDS])
    assert f"default: features 4 is {ratio:.2f} [" in pages[0] and "Measured on: M, D." in pages[0]
    [line] = [line for line in pages[0].splitlines() if "four steps generate better than one](#steps)" in line]
    assert "**holds**" in line and line.endswith("contradicted |")          # by features, and by pixels


def test_the_vae_minimises_its_evidence_bound_and_samples_the_gaussian_that_was_fitted(tiny):
    with results.settings("VAE, s = 0.3", 0) as preset:
        torch.manual_seed(0)
        model = models.build_model(preset, "0123456789")
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        x, y, e = torch.rand(8, 3, 16, 16) * 2 - 1, torch.arange(8), torch.randn(8, *model.latent_shape)
        mean, logvar = model.posterior(x, y)
        posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
        divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0))
        error = pixel_reconstruction_loss(model.decode(mean + (logvar / 2).exp() * e, y), x)[0]
        loss, _ = results.autoencoder_loss(model, x, y.expand(4, -1), None, None, e)
        torch.testing.assert_close(768 * loss / 0.3**2, 768 * error / 0.3**2 + divergence.sum((1, 2)).mean())
        model.fit(x, y)
        points = model.mean + torch.randn(100_000, len(model.mean)) @ model.root
        z, variance = mean.flatten(1), logvar.exp().flatten(1).mean(0)
        torch.testing.assert_close(points.mean(0), z.mean(0), atol=0.02, rtol=0)
        torch.testing.assert_close(points.T.cov(), z.T.cov() + variance.diag(), atol=0.05, rtol=0.05)


def test_a_run_has_its_change_and_is_not_made_again(tiny):
    for run in ("no sin-cos table", "no final RMSNorm", "reconstruction from v_NOISY", "no mixers"):
        results.work(run, 0, [""])
        with results.settings(run, 0) as preset:
            model = load(results.folder(run, 0) / "last.pt")
            _, _, sigma, sigma_sub = train.random_draws(preset, 0, 0)
            norm = model.decoder.x_embedder[1].norm if preset.mixer_depth else None
            assert (model.decoder.pos_embed == 0).all() == (run == "no sin-cos table")
            assert torch.equal(sigma, sigma_sub) == (run == "reconstruction from v_NOISY")
            assert (norm is None) == (run == "no mixers")
            if run == "no final RMSNorm":
                assert (norm.weight == 1).all()             # it took no part
        before = (results.folder(run, 0) / "last.pt").stat().st_mtime_ns
        results.work(run, 0, ["plain weights"])
        assert (results.folder(run, 0) / "last.pt").stat().st_mtime_ns == before


@pytest.fixture
def pixels(monkeypatch):
    """Pixels in place of Inception's and LPIPS's features, whose weights are downloads."""
    monkeypatch.setattr(results, "network", lambda features: fid.feature_network("pixels"))
    monkeypatch.setattr(results, "perceptual_distance",
                        lambda name: lambda a, b: (a - b).abs().mean((1, 2, 3)))


def test_points_of_a_classs_gaussian_have_its_mean_and_variance(tiny, monkeypatch):
    data, held_out, _ = train.load_data(TINY)
    seen = []
    monkeypatch.setattr(results, "distances", lambda images, data: seen.append(images) or {})
    results.gaussian(None, data, held_out, count=1000)
    x, y = data[:]
    sizes = [1000 * int((y == c).sum()) // len(y) for c in range(10)]               # as frequent as they are
    for c, drawn in enumerate(seen[0].double().flatten(1).split(sizes)):
        real = x[y == c].double().flatten(1)
        assert (real.mean(0) - drawn.mean(0)).abs().mean() < 5                      # of 255
        assert 0.7 < drawn.var(0).sum() / real.var(0).sum() < 1.1      # less, since black is cut off


def test_the_reader_tells_unseen_digits_from_a_gaussian_and_from_hybrids(tmp_path, monkeypatch):
    """Which pixels do not: by them the Gaussian is about as near. Lines that jump have no more hybrids than
    their ends."""
    monkeypatch.setattr(results, "OUT", tmp_path)
    results.network.cache_clear()
    data, held_out, _ = train.load_data(TINY)
    assert results.accuracy(None, data, held_out)["reader"]["right"] > 0.97
    assert results.distances(data[:][0], data)["features"] == pytest.approx(0, abs=1e-3)
    unseen, gaussian = (measure(None, data, held_out) for measure in (
        results.real_ones, partial(results.gaussian, count=297, by_class=False)))
    assert unseen["features"]["images"] < gaussian["features"]["images"] / 3
    assert unseen["Fréchet distance"]["images"] > gaussian["Fréchet distance"]["images"] / 3
    x, y = held_out[:]
    first = [x[y == k][0] / 127.5 - 1 for k in range(10)]

    def jump(model, pair, mixing, *rest, **more):
        return torch.stack([first[pair[int(weight > 0.5)]] for weight in mixing[:, 1]])

    monkeypatch.setattr(results, "interpolate", jump)
    rows = results.transitions(None, data, held_out)["unsure"]
    assert rows["between"] == pytest.approx(rows["ends"], abs=0.02) and rows["blend"] > rows["ends"] + 0.1


def test_training_images_have_distance_0_and_unseen_ones_the_least(tiny, pixels):
    preset = replace(TINY, image_size=32)                   # as large as emoji
    data, held_out, _ = train.load_data(preset)
    assert results.distances(data[:][0], data)["FID"] == pytest.approx(0, abs=1e-4)
    model = models.build_model(preset, "0123456789").eval()
    rows = results.inception(model, data, held_out, count=297, gamma=0.0)
    again = results.inception(model, data, held_out, steps=(1, 4), count=297)
    unseen = results.real_ones(model, data, held_out)["FID"]["images"]
    assert 0 < unseen < rows["FID"]["T = 1"] and again["FID"].keys() == {"T = 1", "T = 4", "reconstructed"}
    assert rows.keys() == {"FID", "Fréchet distance"} and again["LPIPS"]["real held-out"] > 0.1


def test_a_reconstruction_is_told_null_a_random_or_its_own_class(tiny, monkeypatch):
    data, held_out, _ = train.load_data(TINY)
    seen = []
    monkeypatch.setattr(results, "reconstruct", lambda model, x, y=None: seen.append(y) or 0 * x)
    results.told(None, data, held_out)
    null, random, own = seen
    assert null is None and (own == held_out.targets).all() and 0.05 < (random == own).double().mean() < 0.2
