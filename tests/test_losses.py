import hashlib
from dataclasses import replace
from functools import partial

import lpips
import pytest
import torch
from torchvision import transforms
from torchvision.models import convnext_small, vgg16

import losses
from losses import (LATENT_WEIGHT_NAMES, WEIGHT_NAMES, denoiser_consistency_ablation_loss,
                    latent_consistency_loss, latent_prediction_consistency_loss,
                    latent_reconstruction_loss, orthogonal_directions, pixel_consistency_loss,
                    pixel_reconstruction_loss, sliced_wasserstein_loss, sphere_encoder_loss,
                    sphere_latent_loss, sphere_quantiles)
from spherify import add_noise, spherify
from train import PRESETS

WEIGHTS = (25.0, 0.0, 3.0, 0.0, 0.5)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def squares(a, b):
    """A stand-in for the perceptual network: one number per image."""
    return (a - b).square().mean((1, 2, 3), keepdim=True)


@pytest.fixture
def batch(model):
    B = 3
    return dict(x=rand(B, 3, 12, 20), y=torch.tensor([0, 1, 3]), sigma=torch.tensor([1.0, 3.0, 5.0]),
                sigma_sub=torch.tensor([0.1, 0.7, 2.5]),
                e=torch.randn(B, 15, 7, generator=torch.Generator().manual_seed(2)))


def gradient_norms(loss, model):
    model.zero_grad()
    loss.backward()
    return {side: sum(p.grad.norm().item() for p in getattr(model, side).parameters() if p.grad is not None)
            for side in ("encoder", "decoder")}


# ---- Sphere Encoder ----


def test_smooth_l1_on_unit_range_images_is_half_the_squared_error():
    a, b = rand(2, 3, 4, 5), rand(2, 3, 4, 5, seed=1)
    expected = (((a + 1) / 2 - (b + 1) / 2) ** 2).mean() / 2
    torch.testing.assert_close(pixel_reconstruction_loss(a, b)[0], expected)


def test_latent_consistency_is_one_minus_the_cosine_of_whole_latents():
    v = torch.eye(6).view(6, 3, 2)
    torch.testing.assert_close(latent_consistency_loss(v, 5 * v), torch.tensor(0.0))
    torch.testing.assert_close(latent_consistency_loss(v, -v), torch.tensor(2.0))
    torch.testing.assert_close(latent_consistency_loss(v, v.roll(1, 0)), torch.tensor(1.0))
    # Tokens of unequal length: per token the cosines are 1 and -1, for the whole vector (9 - 1) / 10.
    v = torch.tensor([[[3.0, 0.0], [1.0, 0.0]]])
    turned = v * torch.tensor([[1.0], [-1.0]])
    torch.testing.assert_close(latent_consistency_loss(v, turned), torch.tensor(0.2))


def test_total_is_the_weighted_sum_of_the_equations(model, batch):
    loss, parts = sphere_encoder_loss(model, **batch, weights=(1, 2, 3, 4, 5), perceptual=squares)
    x, y, sigma, sigma_sub, e = batch.values()
    v = spherify(model.encode(x, y))
    x_NOISY, x_noisy = model.decode(add_noise(v, sigma, e), y), model.decode(add_noise(v, sigma_sub, e), y)
    expected = [*pixel_reconstruction_loss(x_noisy, x, squares),
                *pixel_consistency_loss(x_NOISY, x_noisy, squares),
                latent_consistency_loss(v, model.encode(x_NOISY, y))]
    assert tuple(parts) == WEIGHT_NAMES
    torch.testing.assert_close(list(parts.values()), [part.detach() for part in expected],
                               rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, sum(w * part for w, part in zip((1, 2, 3, 4, 5), expected)))
    assert loss.requires_grad and not any(part.requires_grad for part in parts.values())


def test_every_term_reaches_the_network_that_it_should(model, batch):
    for weights in ((1, 0, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 0, 1)):
        norms = gradient_norms(sphere_encoder_loss(model, **batch, weights=weights)[0], model)
        assert norms["encoder"] > 0 and norms["decoder"] > 0


def test_the_four_passes_take_their_own_classes(model, batch):
    y = batch.pop("y")
    same, base = (sphere_encoder_loss(model, y=y4, **batch, weights=WEIGHTS)[1] for y4 in (y, y.expand(4, 3)))
    assert same == base
    changed = []
    for row in range(4):
        y4 = y.repeat(4, 1)
        y4[row] = 4                                                      # the null class in one pass only
        parts = sphere_encoder_loss(model, y=y4, **batch, weights=WEIGHTS)[1]
        changed.append({name for name in parts if not torch.isclose(parts[name], base[name], rtol=1e-4)})
    assert changed == [{"recon_l1", "con_l1", "lat_con"}, {"con_l1", "lat_con"}, {"recon_l1", "con_l1"},
                       {"lat_con"}]


def test_terms_of_weight_zero_cost_no_pass_and_change_no_other_term(model, batch, monkeypatch):
    batch["y"], calls, recon = torch.tensor([[0, 1, 3], [4, 1, 3], [0, 4, 3], [0, 1, 4]]), [], []
    for name in ("encode", "decode"):
        whole = getattr(model, name)
        monkeypatch.setattr(
            model, name, lambda x, y, name=name, whole=whole: calls.append((name, len(x))) or whole(x, y))
    for weights, expected in (((1, 0, 0, 0, 0), [("encode", 3), ("decode", 3)]),
                              ((1, 0, 1, 0, 0), [("encode", 3), ("decode", 6)]),
                              ((1, 0, 1, 0, 1), [("encode", 3), ("decode", 6), ("encode", 3)])):
        calls.clear()
        recon.append(sphere_encoder_loss(model, **batch, weights=weights)[1]["recon_l1"].item())
        assert calls == expected and recon[-1] == pytest.approx(recon[0], rel=1e-5)


def test_targets_get_no_gradient():
    """sg(.) of SE Eq. 8 and SLE Eq. 3, and the clean latent of SE Eq. 9, as in the released code."""
    for loss, target in ((partial(pixel_consistency_loss, perceptual=squares), 1),
                         (lambda a, b: [latent_consistency_loss(a, b)], 0),
                         (latent_prediction_consistency_loss, 1)):
        pair = rand(2, 3, 4, 5).requires_grad_(), rand(2, 3, 4, 5, seed=1).requires_grad_()
        for part in loss(*pair):
            gradients = torch.autograd.grad(part, pair, allow_unused=True, retain_graph=True)
            assert gradients[target] is None and gradients[1 - target].abs().max() > 0


def test_losses_of_bf16_inputs_are_computed_in_float32():
    a, b = rand(2, 3, 4, 5).bfloat16(), rand(2, 3, 4, 5, seed=1).bfloat16()
    v, z = a.flatten(2), b.flatten(2)
    with torch.autocast("cpu", torch.bfloat16):
        inside = [*pixel_reconstruction_loss(a, b), latent_consistency_loss(v, z)]
    outside = [*pixel_reconstruction_loss(a.float(), b.float()),
               latent_consistency_loss(v.float(), z.float())]
    assert [part.item() for part in inside] == [part.item() for part in outside]
    assert inside[0].dtype == inside[2].dtype == torch.float32


def test_a_fresh_denoisers_prediction_of_zero_has_a_small_gradient_and_later_ones_have_the_cosines():
    z, zero = rand(2, 5, 7), torch.zeros(2, 5, 7, requires_grad=True)
    distance, cosine = latent_reconstruction_loss(zero, z)
    gradient, = torch.autograd.grad(cosine, zero)
    assert 0.1 < gradient.norm() < 2 and cosine == 1
    ablation = denoiser_consistency_ablation_loss(lambda v, y: zero, z, z, None)
    gradient, = torch.autograd.grad(ablation, zero)
    assert 0.1 < gradient.norm() < 2 and ablation == 1
    z_hat = 0.5 * z.roll(1, 2)                              # norms a little over 1
    exact = 1 - torch.nn.functional.cosine_similarity(z_hat.flatten(1), z.flatten(1))
    torch.testing.assert_close(latent_reconstruction_loss(z_hat, z)[1], exact.mean())


# ---- perceptual distance ----


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Stand-ins for the two networks' files, whose names hold their hash, and a folder for torch.hub."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(folder))
        for constant, stored in (("VGG16", lambda: vgg16().features.state_dict(prefix="features.")),
                                 ("CONVNEXT_SMALL", lambda: convnext_small().state_dict())):
            torch.manual_seed(0)
            torch.save(stored(), folder / "file")
            digest = hashlib.sha256((folder / "file").read_bytes()).hexdigest()[:8]
            file = (folder / "file").rename(folder / f"{constant.lower()}-{digest}.pth")
            patch.setattr(losses, constant, file.as_uri())
        yield


@pytest.mark.parametrize("name", ["lpips", "lpips+convnext"])
def test_perceptual_distance_is_frozen_gives_gradient_to_images_and_compares_in_float32(weights, name):
    network = losses.perceptual_distance(name)
    a, b = rand(2, 3, 16, 16).requires_grad_(), rand(2, 3, 16, 16, seed=1)
    assert not any(p.requires_grad for p in network.parameters()) and not network.training
    assert pixel_reconstruction_loss(b, b, network)[1] == 0
    distance = pixel_reconstruction_loss(a, b, network)[1]
    distance.backward()
    assert distance > 0 and a.grad.norm() > 0
    dtypes, trunk = set(), (network if name == "lpips" else network.lpips).net
    trunk.register_forward_hook(lambda _, x, features: dtypes.update(f.dtype for f in features))
    with torch.autocast("cpu", torch.bfloat16):
        assert network(a, b).dtype == torch.float32 and dtypes == {torch.bfloat16}


def test_lpips_is_that_of_its_package_on_the_given_trunk(weights):
    torch.manual_seed(0)
    trunk, x = vgg16().features.eval(), rand(1, 3, 32, 32)
    network = losses.perceptual_distance("lpips")
    for layers, feature in zip((4, 9, 16, 23, 30), network.net(x), strict=True):
        torch.testing.assert_close(feature, trunk[:layers](x))
    a, b = rand(2, 3, 20, 24), rand(2, 3, 20, 24, seed=1)
    torch.testing.assert_close(network(a, b), lpips.LPIPS.forward(network, a, b).flatten())


def test_the_official_distance_is_lpips_and_a_tenth_of_the_convnext_logits(weights):
    a, b = rand(2, 3, 20, 24), rand(2, 3, 20, 24, seed=1)
    torch.manual_seed(0)
    convnext = convnext_small().eval()
    normalize = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    prepare = lambda x: normalize(transforms.functional.resize((x + 1) / 2, [224, 224], antialias=True))
    with torch.no_grad():
        logits = (convnext(prepare(a)) - convnext(prepare(b))).square().mean(1)
        alone = losses.perceptual_distance("lpips")(a, b)
        distance = losses.perceptual_distance("lpips+convnext")(a, b)
    torch.testing.assert_close(distance, (alone + 0.1 * logits) / 1.1, rtol=1e-4, atol=1e-6)
    assert (distance - alone / 1.1).abs().min() > 1e-6


def test_weights_come_through_torch_hubs_cache_and_have_the_hash_they_say(weights, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = losses.VGG16.rsplit("/", 1)[1]
    losses.perceptual_distance("lpips")                                     # downloads
    cached = tmp_path / "hub" / "checkpoints" / name
    (tmp_path / name).write_bytes(cached.read_bytes() + b"0")
    monkeypatch.setattr(losses, "VGG16", (tmp_path / name).as_uri())
    losses.perceptual_distance("lpips")                                     # from the cache
    cached.unlink()
    with pytest.raises(OSError, match=f"{cached} .*{losses.VGG16}"):
        losses.perceptual_distance("lpips")
    assert not cached.exists()


# ---- Sphere Latent Encoder ----


def test_latent_reconstruction_is_a_distance_and_one_minus_the_cosine_of_whole_latents():
    a, b = rand(3, 4, 5), rand(3, 4, 5, seed=1)
    cosines = (a * b).sum((1, 2)) / (a.flatten(1).norm(dim=1) * b.flatten(1).norm(dim=1))
    gap = (a - b).abs()
    distances = {"l1": gap.mean(), "l2": gap.square().mean(),
                 "smooth-l1": torch.where(gap < 1, gap.square() / 2, gap - 0.5).mean()}
    for name, expected in distances.items():
        torch.testing.assert_close(latent_reconstruction_loss(a, b, name), (expected, 1 - cosines.mean()))


def test_a_distance_that_does_not_exist_is_refused_by_name():
    for call in (losses.perceptual_distance, partial(latent_reconstruction_loss, rand(2, 3), rand(2, 3))):
        with pytest.raises(ValueError, match="got 'cosine'"):
            call("cosine")


@pytest.fixture
def latent_batch(denoiser):
    z = rand(3, *denoiser.latent_shape) * 1.7
    y = torch.tensor([[0, 1, 4], [4, 1, 3], [0, 4, 3], [4, 4, 4]])
    e = rand(3, *denoiser.latent_shape, seed=2)
    return z, y, torch.tensor([0.5, 2.0, 9.0]), torch.tensor([0.1, 1.0, 2.0]), e


def test_latent_total_is_the_weighted_sum_of_the_equations(denoiser, latent_batch):
    z, y, sigma, sigma_sub, e = latent_batch
    v = spherify(z)
    z_NOISY, z_noisy = denoiser(add_noise(v, sigma, e), y[0]), denoiser(add_noise(v, sigma_sub, e), y[1])
    expected = [*latent_reconstruction_loss(z_noisy, z, "l1"),
                *latent_prediction_consistency_loss(z_NOISY, z_noisy, "l1"),
                denoiser_consistency_ablation_loss(denoiser, z, z_NOISY, y[2])]
    weights = (2.0, 3.0, 5.0, 7.0, 11.0)
    loss, parts = sphere_latent_loss(denoiser, z, y, sigma, sigma_sub, e, weights, "l1")
    assert tuple(parts) == LATENT_WEIGHT_NAMES
    torch.testing.assert_close((loss, *parts.values()), (sum(w * part for w, part in zip(weights, expected)),
                                                         *expected), rtol=1e-4, atol=1e-6)
    assert loss.requires_grad and not any(part.requires_grad for part in parts.values())


def test_images_of_a_denoiser_are_encoded_in_the_precision_of_its_training(denoiser, latent_batch):
    x, (_, y, *others) = rand(3, 3, 12, 20), latent_batch
    preset = replace(PRESETS["digits-latent"], precision="bf16")
    with torch.autocast("cpu", torch.bfloat16):
        short = denoiser.tokenizer.encode(x)
    objective = losses.Objective(denoiser, preset)
    whole = denoiser.tokenizer.encode(x)
    of_images, of_short, of_whole = (objective(z, y.T, *others)[0] for z in (x, short, whole))
    assert torch.equal(of_images, of_short) and not torch.equal(of_images, of_whole)


def test_the_ablation_denoises_its_own_prediction_and_costs_a_pass_only_if_weighted(denoiser, latent_batch):
    z, y, sigma, sigma_sub, e = latent_batch
    prediction = denoiser(add_noise(spherify(z), sigma, e), y[0])
    again = denoiser(spherify(prediction), y[2])
    cosine = torch.nn.functional.cosine_similarity(z.flatten(1), again.flatten(1)).mean()
    torch.testing.assert_close(denoiser_consistency_ablation_loss(denoiser, z, prediction, y[2]), 1 - cosine)
    calls = []
    denoiser.register_forward_hook(lambda *_: calls.append(1))
    for weight, passes in ((0.0, 1), (0.5, 2)):
        calls.clear()
        sphere_latent_loss(denoiser, z, y, sigma, sigma_sub, e, (1, 1, 1, 1, weight))
        assert len(calls) == passes                     # both noise levels are one pass


def test_latent_loss_stays_float32_under_autocast(denoiser, latent_batch):
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = sphere_latent_loss(denoiser, *latent_batch)
        distance, cosine = latent_reconstruction_loss(latent_batch[0].bfloat16(), latent_batch[0])
    assert {part.dtype for part in (loss, distance, cosine, *parts.values())} == {torch.float32}
    assert cosine.abs() < 1e-5                          # of bf16 products it would be off by 1e-3


# ---- App. C.3 ----


def uniform_points(n, *shape, seed=0):
    return spherify(torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed)))


def test_a_coordinate_of_the_sphere_in_three_dimensions_is_uniform_and_in_many_gaussian():
    expected = 3**0.5 * ((2 * torch.arange(8.0) + 1) / 8 - 1)               # Archimedes
    torch.testing.assert_close(sphere_quantiles(8, 3).float(), expected)
    gaussian = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(8.0) + 0.5) / 8)
    torch.testing.assert_close(sphere_quantiles(8, 100_000).float(), gaussian, rtol=0, atol=1e-4)


def test_directions_are_orthonormal_and_keep_the_side_of_the_gaussians_they_are_made_of():
    gaussian = torch.randn(12, 7, generator=torch.Generator().manual_seed(1))
    directions = orthogonal_directions(gaussian)
    torch.testing.assert_close(directions.T @ directions, torch.eye(7), rtol=0, atol=1e-5)
    assert ((directions * gaussian).sum(0) > 0).all()                       # Haar: R has a positive diagonal
    torch.testing.assert_close(directions[:, 0], gaussian[:, 0] / gaussian[:, 0].norm())


def test_distance_to_uniform_is_that_of_sorted_projections_and_zero_at_the_quantiles():
    z = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(1))
    directions = orthogonal_directions(torch.randn(6, 4, generator=torch.Generator().manual_seed(2)))
    gaps = [sorted((z.flatten(1) @ direction).tolist()) for direction in directions.T]
    expected = sum((t - q) ** 2 for gap in gaps for t, q in zip(gap, sphere_quantiles(5, 6).tolist())) / 20
    assert sliced_wasserstein_loss(z, directions).item() == pytest.approx(expected, rel=1e-5)
    at_quantiles = torch.zeros(9, 6)
    at_quantiles[:, 2] = sphere_quantiles(9, 6)[torch.randperm(9)]
    assert sliced_wasserstein_loss(at_quantiles, torch.eye(6)[:, 2:3]) == 0


def test_distance_to_uniform_falls_as_one_over_n_for_uniform_points_only():
    directions = orthogonal_directions(torch.randn(24, 24, generator=torch.Generator().manual_seed(2)))
    few, many = (sliced_wasserstein_loss(uniform_points(n, 4, 6), directions) for n in (200, 3200))
    assert 12 < few / many < 20
    cap = add_noise(uniform_points(1, 4, 6).expand(3200, -1, -1), 1.0, uniform_points(3200, 4, 6, seed=1))
    assert sliced_wasserstein_loss(cap, directions) > 100 * many            # a cloud of 45 degrees
    assert sliced_wasserstein_loss(1.5 * uniform_points(3200, 4, 6), directions) > 100 * many     # the radius


def test_the_sliced_wasserstein_loss_is_of_the_latent_before_its_projection(model, batch):
    """In the directions of the batch's noise, made orthogonal."""
    directions = orthogonal_directions(batch["e"].flatten(1).T)
    plain, parts = sphere_encoder_loss(model, **batch, weights=WEIGHTS)
    assert "swd" not in parts
    loss, parts = sphere_encoder_loss(model, **batch, weights=WEIGHTS, swd_weight=0.7)
    expected = sliced_wasserstein_loss(model.encode(batch["x"], batch["y"]), directions)
    torch.testing.assert_close(parts["swd"], expected.detach())
    torch.testing.assert_close(loss, plain + 0.7 * expected)
    norms = gradient_norms(expected, model)
    assert norms["encoder"] > 0 and norms["decoder"] == 0
