"""notebooks/results.py: its studies are whole, its runs what they are called, its rules what it says."""

import sys

import pytest
import torch

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
    monkeypatch.setattr(results, "COUNT", 20)
    monkeypatch.setattr(results, "STEPS", (1,))
    monkeypatch.setitem(results.PRESETS, "digits", TINY)
    monkeypatch.setattr(train, "draw", train.draw)              # a run takes it away, for its own process


@pytest.mark.parametrize("name", results.STUDIES)
def test_a_study_compares_rows_and_columns_that_it_has(name):
    study = results.STUDIES[name]
    assert all(run in results.RUNS and measure in results.MEASURES for run, measure in study.rows.values())
    assert all(head in results.HEADS for head in study.heads)
    for label, head, sign, other, other_head in study.comparisons:
        assert {label, other} <= study.rows.keys() and {head, other_head} <= results.HEADS.keys()
        assert sign in "<=" and (label, head) != (other, other_head)


def test_a_comparison_needs_all_seeds_and_a_claim_all_comparisons(monkeypatch):
    cells = {"low": [1, 2, 3], "high": [3.1, 4, 5], "between": [2, 3, 4], "near": [2.1, 2.1, 2.1]}
    monkeypatch.setattr(results, "values", lambda study, label, head: cells[label])

    def outcomes(*comparisons):
        study = results.Study("", "", "", "", {}, [(a, "", sign, b, "") for a, sign, b in comparisons])
        return [results.outcome(study, c) for c in study.comparisons], results.verdict(study)

    assert outcomes(("low", "<", "high")) == ([1], "holds")
    assert outcomes(("high", "<", "low")) == ([-1], "the other way round")
    assert outcomes(("low", "<", "between")) == ([0], "not decided")
    assert outcomes(("low", "=", "near"), ("low", "=", "high"), ("low", "=", "between")) == (
        [1, -1, 0], "1 of 3 as claimed, 1 the other way round, 1 undecided")


def test_a_report_keeps_what_is_not_measured_here(tmp_path, monkeypatch):
    page = (ROOT / "notebooks" / "results.md").read_text(encoding="utf-8")
    (tmp_path / "results.md").write_text(page, encoding="utf-8")
    monkeypatch.setattr(results, "HERE", tmp_path)
    monkeypatch.setattr(results, "OUT", tmp_path / "nothing")
    results.report()
    again = (tmp_path / "results.md").read_text(encoding="utf-8")
    start = "## What holds here"                            # what stands before it names the machine
    assert start in page and page[page.index(start):] == again[again.index(start):]


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


def test_points_of_a_classs_gaussian_have_its_mean_and_variance(tiny, pixels, monkeypatch):
    data, held_out, _ = train.load_data(TINY)
    seen = []
    monkeypatch.setattr(results, "distances", lambda images, data: seen.append(images) or {})
    results.gaussian(None, data, held_out)
    x, y = data[:]
    sizes = [1000 * int((y == c).sum()) // len(y) for c in range(10)]               # as frequent as they are
    for c, drawn in enumerate(seen[0].double().flatten(1).split(sizes)):
        real = x[y == c].double().flatten(1)
        assert (real.mean(0) - drawn.mean(0)).abs().mean() < 5                      # of 255
        assert 0.7 < drawn.var(0).sum() / real.var(0).sum() < 1.1      # less, since black is cut off


def test_training_images_have_distance_0_and_unseen_ones_the_least(tiny, pixels):
    data, held_out, _ = train.load_data(TINY)
    assert results.distances(data[:][0], data)["FID"] == pytest.approx(0, abs=1e-4)
    model = models.build_model(TINY, "0123456789").eval()
    rows = results.inception(model, data, held_out, count=297, gamma=0.0)
    again = results.inception(model, data, held_out, steps=(1, 4), count=297)
    unseen = results.real_ones(model, data, held_out)["FID"]["images"]
    assert 0 < unseen < rows["FID"]["T = 1"] and again["FID"].keys() == {"T = 1", "T = 4", "reconstructed"}
    assert rows.keys() == {"FID", "Fréchet distance"} and again["LPIPS"]["real held-out"] > 0.1
