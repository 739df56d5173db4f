import hashlib
import json
import urllib.error
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torchvision
from PIL import Image

import fid
from conftest import ROOT
from fid import frechet_distance, read_image, to_uint8

D = 64
RNG = np.random.default_rng(0)


def covariance(rank=D, seed=0):
    a = np.random.default_rng(seed).standard_normal((D, rank))
    return a @ a.T / rank


def rotation(seed=1):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((D, D)))[0]


ZERO, I = np.zeros(D), np.eye(D)


def test_frechet_is_squared_mean_gap_for_equal_covariances():
    assert frechet_distance(ZERO, I, ZERO + 1, I) == pytest.approx(D, rel=1e-9)
    assert frechet_distance(ZERO, covariance(), ZERO + 2, covariance()) == pytest.approx(4 * D, rel=1e-9)


def test_frechet_of_scaled_identities():
    expected = D * (2**0.5 - 0.5**0.5) ** 2
    assert frechet_distance(ZERO, 2 * I, ZERO, 0.5 * I) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_commuting_covariances():
    d1, d2, Q = RNG.uniform(0, 3, D), RNG.uniform(0, 3, D), rotation()
    expected = ((np.sqrt(d1) - np.sqrt(d2)) ** 2).sum()
    assert frechet_distance(ZERO, Q * d1 @ Q.T, ZERO, Q * d2 @ Q.T) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_a_linear_map():
    S, A = covariance(), covariance(seed=3)                                # y = A x with A symmetric positive
    expected = np.trace(S) + np.trace(A @ S @ A) - 2 * np.trace(A @ S)
    assert frechet_distance(ZERO, S, ZERO, A @ S @ A) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_rank_deficient_covariances():
    P = np.diag([1.0] * (D // 2) + [0.0] * (D // 2))
    assert frechet_distance(ZERO, P, ZERO, I - P) == pytest.approx(D, rel=1e-9)
    assert (frechet_distance(ZERO, 0 * I, ZERO, I) == frechet_distance(ZERO, I, ZERO, 0 * I)
            == pytest.approx(D, rel=1e-9))
    assert frechet_distance(ZERO, 0 * I, ZERO, 0 * I) == 0
    S = covariance(rank=5)
    assert frechet_distance(ZERO, S, ZERO, S) == pytest.approx(0, abs=1e-9)
    roots = np.sqrt(np.linalg.eigvalsh(S).clip(0)[-5:])
    expected = ((roots - 1) ** 2).sum() + D - 5
    assert frechet_distance(ZERO, S, ZERO, I) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(ZERO, I, ZERO, S) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_one_correlated_pair():
    S = np.array([[1, 0.9], [0.9, 1]])
    expected = (1.9**0.5 - 1) ** 2 + (0.1**0.5 - 1) ** 2
    assert frechet_distance([0, 0], S, [0, 0], np.eye(2)) == pytest.approx(expected, rel=1e-9)


def test_frechet_is_symmetric_rotation_invariant_and_quadratic_in_scale():
    m1, m2 = RNG.standard_normal(D), RNG.standard_normal(D)
    S1, S2, Q = covariance(), covariance(seed=4), rotation()
    distance = frechet_distance(m1, S1, m2, S2)
    assert frechet_distance(m2, S2, m1, S1) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(Q @ m1, Q @ S1 @ Q.T, Q @ m2, Q @ S2 @ Q.T) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(3 * m1, 9 * S1, 3 * m2, 9 * S2) == pytest.approx(9 * distance, rel=1e-9)


def test_frechet_equals_the_matrix_square_root_formula():
    S1, S2 = covariance(), covariance(seed=5)
    root = scipy.linalg.sqrtm(S1 @ S2)
    expected = np.trace(S1 + S2 - 2 * root.real)
    assert frechet_distance(ZERO, S1, ZERO, S2) == pytest.approx(expected, rel=1e-7)


def test_frechet_uses_the_symmetric_part_of_a_covariance():
    S, skew = covariance(), np.random.default_rng(6).standard_normal((D, D))
    skew -= skew.T
    expected = frechet_distance(ZERO, S, ZERO, I)
    assert frechet_distance(ZERO, S + skew, ZERO, I) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("change, named", [
    ({1: np.eye(3)}, "[3, 3]"), ({2: np.zeros(5)}, "[5]"), ({3: I * np.nan}, "finite"),
])
def test_bad_statistics_are_named(change, named):
    arguments = [change.get(i, value) for i, value in enumerate((ZERO, I, ZERO, I))]
    with pytest.raises(ValueError) as error:
        frechet_distance(*arguments)
    assert named in str(error.value)


def test_to_uint8_rounds_to_nearest_and_clamps():
    x = torch.tensor([-0.5, 0.0, 0.4999 / 255, 0.5001 / 255, 254.4 / 255, 254.6 / 255, 1.0, 1.5])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 254, 255, 255, 255]
    assert to_uint8(x, truncate=True).tolist() == [0, 0, 0, 0, 254, 254, 255, 255]
    levels = torch.arange(256) / 255
    assert to_uint8(levels).tolist() == list(range(256))


def test_images_of_any_mode_are_read_as_rgb_and_upright(tmp_path):
    image = Image.fromarray(RNG.integers(0, 256, (5, 8, 3), dtype=np.uint8))
    for mode in ("RGB", "L", "RGBA", "P"):
        image.convert(mode).save(tmp_path / "a.png")
        assert read_image(tmp_path / "a.png").mode == "RGB" and read_image(tmp_path / "a.png").size == (8, 5)
    exif = Image.Exif()
    exif[0x0112] = 6                                                        # turned by a quarter
    image.save(tmp_path / "b.png", exif=exif)
    assert read_image(tmp_path / "b.png").size == (5, 8)


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not an image")
    for name in ("a.png", "missing.png"):
        with pytest.raises(ValueError, match=name):
            read_image(tmp_path / name)


# ---- Inception, against the tools whose numbers papers quote ----


def seeded_inception():
    """A state dict with the released names whose numbers are seeded by them."""
    weights = {}
    for name, tensor in fid.InceptionV3().state_dict().items():
        r = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tensor.shape).astype(np.float32)
        if name.endswith("num_batches_tracked"):
            r = np.zeros((), np.int64)
        elif name.endswith("running_var"):
            r = np.exp(0.3 * r)
        elif r.ndim == 1:
            r = 0.2 * r + name.endswith("bn.weight")
        else:
            r = r * np.sqrt(2 / np.prod(r.shape[1:]))
        weights[name] = torch.from_numpy(np.asarray(r, tensor.numpy().dtype))
    return weights


def seeded_images(count, size, seed):
    """Blocks of random colour with noise, uint8."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 200, (count, 3, -(-size // 16), -(-size // 16)))
    pixels = blocks.repeat(16, axis=2).repeat(16, axis=3)[..., :size, :size]
    return torch.from_numpy((pixels + rng.integers(0, 56, pixels.shape)).astype(np.uint8))


@pytest.fixture(scope="module")
def peers():
    """Numbers of torch-fidelity 0.4.0 and pytorch-fid 0.3.0 on this network and these images."""
    return np.load(ROOT / "tests" / "fid_peers.npz")


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights-inception-2015-12-05-00000000.pth"
    torch.save(seeded_inception(), path)
    return path


@pytest.fixture
def inception_file(weights_file, monkeypatch):
    monkeypatch.setattr(fid, "INCEPTION_SHA256", hashlib.sha256(weights_file.read_bytes()).hexdigest()[:8])
    return weights_file


@pytest.fixture
def network(inception_file):
    return fid.load_inception(inception_file)


def test_the_state_dict_has_the_566_released_names():
    names = fid.InceptionV3().state_dict().keys()
    assert len(names) == 566 and {"Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch_pool.bn.running_var",
                                  "fc.bias"} <= names


@pytest.mark.parametrize("size", [32, 299])
def test_features_are_those_of_torch_fidelity_and_pytorch_fid(network, inception_file, peers, size):
    x = seeded_images(2, size, seed=size)
    close = lambda ours, theirs: ((ours - torch.from_numpy(theirs)).norm() / np.linalg.norm(theirs)).item()
    pool, logits, spatial = network(x)
    assert close(pool, peers[f"torch_fidelity_{size}"]) < 1e-5
    assert close(logits, peers[f"torch_fidelity_logits_{size}"]) < 1e-5
    other = fid.load_inception(inception_file, convention="pytorch-fid")
    assert close(other(x)[0], peers[f"pytorch_fid_{size}"]) < 1e-5
    assert close(pool, peers[f"pytorch_fid_{size}"]) > 1e-3                  # the conventions do differ
    assert spatial.shape == (2, 2023)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The two folders of twelve images that the peers measured, one of them nested and in capitals."""
    root = tmp_path_factory.mktemp("folders")
    for name, seed in (("A", 1), ("B", 2)):
        for i, x in enumerate(seeded_images(12, 32, seed)):
            path = root / name / ("deep/er" if i > 8 else "") / f"{i:02d}.{'PNG' if i % 2 else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x.permute(1, 2, 0).numpy()).save(path)
    return str(root / "A"), str(root / "B")


def test_two_folders_give_the_numbers_of_torch_fidelity_and_pytorch_fid(
        folders, inception_file, peers, capsys):
    results = {}
    for convention in fid.CONVENTIONS:
        fid.main([*folders, "--inception-weights", str(inception_file), "--convention", convention, "--json",
                  "--batch-size", "5"])
        results[convention] = json.loads(capsys.readouterr().out)
    ours = results["torch-fidelity"]
    # torch-fidelity's own rounding is 1e-5 here, where 12 images leave nearly all eigenvalues zero.
    assert ours["FID"] == pytest.approx(peers["fid_torch_fidelity"].item(), rel=1e-5)
    assert results["pytorch-fid"]["FID"] == pytest.approx(peers["fid_pytorch_fid"].item(), rel=1e-5)
    assert ours["Inception Score"] == pytest.approx(peers["is_mean"].item(), rel=1e-6)
    assert ours["its deviation"] == pytest.approx(peers["is_std"].item(), rel=1e-3)
    assert ours["precision"] == pytest.approx(peers["precision"].item(), abs=1e-6)
    assert ours["recall"] == pytest.approx(peers["recall"].item(), abs=1e-6)
    assert ours["counts"] == [12, 12] and ours["convention"] == "torch-fidelity"


def test_stored_statistics_give_the_fid_of_their_folder(folders, inception_file, tmp_path, capsys):
    flags = ["--inception-weights", str(inception_file)]
    fid.main([folders[1], "--save", str(tmp_path / "b.npz"), *flags])
    fid.main([folders[0], str(tmp_path / "b.npz"), *flags, "--json", "--metrics", "fid,sfid"])
    fid.main([*folders, *flags, "--json", "--metrics", "fid,sfid"])
    stored, direct = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    for name in ("FID", "sFID (unchecked)"):
        assert stored[name] == pytest.approx(direct[name], rel=1e-5)         # their means are float32
    assert stored["counts"] == [12, 12]
    with np.load(tmp_path / "b.npz") as file:                               # as torch-fidelity wants them
        assert file["mu"].dtype == file["mu_s"].dtype == np.float32 and file["sigma"].dtype == np.float64


def test_tf1_resizing_looks_at_i_times_in_over_out():
    x = torch.rand(1, 1, 7, 400, dtype=torch.float64)
    resized = fid._resize_tf1(x)
    for i, j in ((0, 0), (100, 298), (298, 3), (150, 151)):
        row, column = i * 7 / 299, j * 400 / 299
        r, c = int(row), int(column)
        lower, right = min(r + 1, 6), min(c + 1, 399)
        top = x[0, 0, r, c] * (1 - column + c) + x[0, 0, r, right] * (column - c)
        bottom = x[0, 0, lower, c] * (1 - column + c) + x[0, 0, lower, right] * (column - c)
        expected = top * (1 - row + r) + bottom * (row - r)
        assert resized[0, 0, i, j].item() == pytest.approx(expected.item(), abs=2e-5)    # places in float32
    whole = torch.rand(1, 3, 299, 299)
    assert torch.equal(fid._resize_tf1(whole), whole)


# ---- statistics ----


def test_statistics_are_those_of_all_features_however_they_come():
    x = torch.from_numpy(RNG.standard_normal((500, 7)) + 100)
    whole = fid.FeatureStatistics(7).update(x)
    for parts in (x.split(1), x.split(64), x[torch.randperm(500)].split(123)):
        stream = fid.FeatureStatistics(7)
        for part in parts:
            stream.update(part)
        torch.testing.assert_close(stream.mean, whole.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(stream.covariance, whole.covariance, rtol=0, atol=1e-8)
    merged = fid.FeatureStatistics(7).update(x[:200]).merge(fid.FeatureStatistics(7).update(x[200:]))
    assert merged.count == 500
    np.testing.assert_allclose(merged.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(merged.covariance, np.cov(x.T), rtol=0, atol=1e-8)


def test_frechet_in_one_dimension_is_the_gap_of_means_and_deviations():
    x, y = RNG.normal(1, 2, (40, 1)), RNG.normal(-1, 3, (30, 1))
    one, two = (fid.FeatureStatistics(1).update(torch.from_numpy(a)) for a in (x, y))
    expected = (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2
    distance = frechet_distance(one.mean, one.covariance, two.mean, two.covariance)
    assert distance == pytest.approx(expected, rel=1e-9)


def test_the_bias_of_frechet_distances_falls_with_the_number_of_images():
    distances = []
    for n in (200, 1000, 5000):
        one, two = (fid.FeatureStatistics(D).update(torch.from_numpy(RNG.standard_normal((n, D))))
                    for _ in range(2))
        distances.append(frechet_distance(one.mean, one.covariance, two.mean, two.covariance))
    assert distances == pytest.approx([10.9, 2.15, 0.456], rel=0.1)


def test_too_few_images_for_a_covariance_are_told():
    with pytest.warns(UserWarning, match="5 images for 7 dimensions"):
        fid.FeatureStatistics(7).update(torch.rand(5, 7)).covariance
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        fid.FeatureStatistics(7).update(torch.rand(1, 7)).covariance


# ---- scores ----


def test_inception_score_is_one_for_equal_and_C_for_evenly_spread_certain_predictions():
    assert fid.inception_score(torch.ones(40, 8)) == pytest.approx((1, 0))
    certain = 1e4 * torch.eye(8).repeat(10, 1)
    assert fid.inception_score(certain, splits=10, shuffle=False) == pytest.approx((8, 0))
    by_class = 1e4 * torch.eye(8).repeat_interleave(10, 0)
    assert fid.inception_score(by_class, 8, shuffle=False) == pytest.approx((1, 0))
    assert fid.inception_score(by_class, 8)[0] > 3                          # dealt out


def test_precision_and_recall_are_the_shares_inside_the_other_manifold():
    real = torch.arange(10.0)[:, None]                                      # balls of radius 1, 2 or 3
    generated = torch.cat([torch.full((6, 1), 4.2), torch.full((4, 1), 50.0)])
    precision, recall = fid.precision_recall(generated, real, k=1, block=3)
    assert precision == 0.6 and recall == 0.0
    assert fid.precision_recall(real, real + 0.1, k=3) == (1.0, 1.0)
    whole = fid.precision_recall(torch.rand(50, 3), torch.rand(60, 3))
    assert 0 < whole[0] <= 1


def test_blocks_do_not_change_precision_and_recall():
    a, b = torch.rand(70, 3), torch.rand(50, 3) + 0.2
    assert fid.precision_recall(a, b, block=7) == fid.precision_recall(a, b, block=1000)
    with pytest.raises(ValueError, match="more than 3 images"):
        fid.precision_recall(a[:3], b)


def test_neighbours_come_in_order_with_their_places():
    real = torch.tensor([[0.0], [10.0], [3.0]])
    distance, place = fid.nearest_neighbours(torch.tensor([[2.0], [9.0]]), real, k=2, block=1)
    assert distance.tolist() == [[1.0, 2.0], [1.0, 6.0]] and place.tolist() == [[2, 0], [1, 2]]


def test_copies_and_mirrored_copies_are_near_duplicates_and_new_images_are_none():
    generator = torch.Generator().manual_seed(0)
    train, new, held_out = torch.randint(256, (3, 20, 3, 5, 6), dtype=torch.uint8, generator=generator)
    train[9, ..., 3:] = train[9, ..., :3].flip(-1)                          # its own mirror image
    real = torch.stack([fid.pixel_features(train), fid.pixel_features(train.flip(-1))])
    copies = torch.cat([train[4:8], train[:2].flip(-1), train[9:10]])
    sets = {"copies": copies, "new": new, "real held-out": held_out}
    sets["half"] = torch.cat([train[:10], new[:10]])
    rows, found = fid.memorisation(sets, real, k=3)
    assert rows["near-duplicates"] == {"copies": 1.0, "new": 0.0, "real held-out": 0.0, "half": 0.5}
    assert rows["nearest or mirrored"]["copies"] < 1e-6 and rows["nearest or mirrored"]["real held-out"] == 1
    ratio, places, mirrored = found["copies"]
    assert places[:, 0].tolist() == [4, 5, 6, 7, 0, 1, 9] and ratio.max() < 1e-6
    assert mirrored[:6, 0].tolist() == [False] * 4 + [True] * 2
    for row, flips, image in zip(places, mirrored, fid.pixel_features(sets["copies"])):
        assert len(set(row.tolist())) == 3                                  # an image once, not once a side
        best = torch.cdist(image[None], real.flatten(0, 1)).view(2, 20).amin(0).sort().values[:3]
        shown = torch.stack([real[int(flip), place] for flip, place in zip(flips, row)])
        torch.testing.assert_close((shown - image).norm(dim=1), best, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="2 training images or more, got 1"):
        fid.memorisation(sets, real[:, :1])


# ---- other features ----


@pytest.fixture
def classifier(tmp_path, monkeypatch):
    """A small classifier of torchvision with random weights, in a hub cache as the real ones would be."""
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(torchvision.models.shufflenet_v2_x0_5().state_dict(), cache / "new.pth")
    digest = hashlib.sha256((cache / "new.pth").read_bytes()).hexdigest()[:8]
    (cache / "new.pth").rename(cache / f"shuffle-{digest}.pth")
    known = torchvision.models.get_model_weights("shufflenet_v2_x0_5").DEFAULT
    monkeypatch.setattr(known.value, "url", f"https://example.org/shuffle-{digest}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return "shufflenet_v2_x0_5"


def test_features_of_a_classifier_are_what_its_last_layer_sees(classifier):
    network = fid.feature_network(classifier)
    features, logits, _ = network(seeded_images(3, 40, seed=1))
    assert features.shape == (3, 1024) and logits.shape == (3, 1000)
    torch.testing.assert_close(network.model.fc(features), logits)


def test_only_inception_features_are_called_fid(classifier, folders, capsys):
    for features in (classifier, "pixels"):
        fid.main([*folders, "--features", features, "--json"])
        results = json.loads(capsys.readouterr().out)
        assert results["features"] == features and results["convention"] is None
        assert list(results)[5:] == [f"FD ({features})", f"precision ({features})", f"recall ({features})"]


def test_pixel_features_of_shifted_images_differ_by_their_mean_gap():
    network = fid.feature_network("pixels")
    x = seeded_images(900, 32, seed=3) // 2
    sets = {gap: fid.Extracted((x + gap).split(100), network, ("fid",)) for gap in (0, 51)}
    rows = fid.compare({"same": sets[0], "brighter": sets[51]}, sets[0], ("fid",))
    assert rows == {"FD (pixels)": {"same": pytest.approx(0, abs=1e-6),
                                    "brighter": pytest.approx(768 * 0.4**2, rel=1e-5)}}


def test_features_are_kept_only_for_the_measures_that_need_them():
    x = [seeded_images(5, 16, seed=1)]
    for metrics, kept in ((("fid",), 0), (("fid", "pr"), 5)):
        extracted = fid.Extracted(x, fid.feature_network("pixels"), metrics)
        assert len(extracted.features) == kept and extracted.fid.count == 5


@pytest.mark.parametrize("argv, named", [
    (["--features", "resnet51"], "resnet51"), (["--features", "resnet18:V9"], "resnet18:V9"),
    (["--features", "pixels", "--metrics", "is"], "fid,pr"),
    (["--features", "pixels", "--inception-weights", "w.pth"], "--inception-weights"),
    (["--features", "fcn_resnet50"], "fcn_resnet50"),
])
def test_features_that_cannot_be_had_are_one_line(folders, capsys, argv, named):
    with pytest.raises(SystemExit) as exit:
        fid.main([*folders, *argv])
    lines = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and len(lines) == 1 and named in lines[0]


def test_a_classifier_without_its_weights_names_file_and_url(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        fid.feature_network("mobilenet_v2:IMAGENET1K_V1")
    assert str(tmp_path) in str(error.value) and "/mobilenet_v2-b0353104.pth" in str(error.value)


def test_statistics_of_other_features_are_refused(folders, tmp_path, capsys):
    fid.main([folders[1], "--save", str(tmp_path / "b.npz"), "--features", "pixels"])
    network = fid.feature_network("pixels")
    stored = fid.load_statistics(tmp_path / "b.npz")
    assert fid.check_metrics(None, network, stored) == ("fid",)
    assert "convention" in stored and fid.check_metrics(None, network, stored | {"convention": ""})
    with pytest.raises(ValueError, match="of the convention pytorch-fid"):
        fid.check_metrics(None, network, stored | {"convention": "pytorch-fid"})
    for wrong in ({"features": "inception"}, {"mu": np.zeros(5)}):
        with pytest.raises(ValueError, match="expected 768 of pixels"):
            fid.check_metrics(None, network, stored | wrong)


# ---- bad input ----


def test_missing_inception_weights_name_file_url_hash_and_place(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        fid.load_inception()
    for named in (str(tmp_path), fid.INCEPTION_FILES[0], fid.INCEPTION_URL, fid.INCEPTION_SHA256):
        assert named in str(error.value)


def test_another_file_than_the_inception_weights_is_refused(weights_file):
    with pytest.raises(ValueError, match="SHA-256 .* expected 6726825d"):
        fid.load_inception(weights_file)


@pytest.mark.parametrize("what, named", [
    ("empty", "no images in it"), ("missing", "no such folder"), ("itself", "compared with itself"),
    ("sizes", "32x32"), ("corrupt", "not a readable image"), ("animated", "2 frames"), ("alone", "--save"),
    ("metric", "got ssim"), ("npz", "not a readable npz"), ("other npz", "expected statistics mu"),
    ("pr of npz", "leave pr out"), ("existing", "already exists"), ("batch", "--batch-size"),
])
def test_mistakes_of_the_command_are_one_line(folders, inception_file, tmp_path, capsys, what, named):
    images, other = Image.open(next(Path(folders[0]).glob("*.png"))), tmp_path / "other"
    other.mkdir()
    for i in range(3):
        images.save(other / f"{i}.png")
    argv, npz = [folders[0], str(other)], tmp_path / "s.npz"
    if what == "empty":
        argv[1] = str(tmp_path / "nothing")
        (tmp_path / "nothing").mkdir()
    elif what == "missing":
        argv[1] = "nowhere"
    elif what == "itself":
        argv[1] = folders[0] + "/../A"
    elif what == "sizes":
        images.resize((20, 32)).save(other / "9.png")
    elif what == "corrupt":
        (other / "9.JPG").write_bytes(b"rubbish")
    elif what == "animated":
        images.save(other / "9.gif", save_all=True, append_images=[images.rotate(90)])
    elif what == "alone":
        argv.pop()
    elif what == "metric":
        argv += ["--metrics", "fid,ssim"]
    elif what in ("npz", "other npz", "pr of npz"):
        argv[1] = str(npz)
        if what == "npz":
            npz.write_bytes(b"rubbish")
        else:
            np.savez(npz, mu=np.zeros(2048), sigma=np.eye(2048 if what == "pr of npz" else 5))
            argv += ["--metrics", "fid,pr"]
    elif what == "existing":
        npz.write_bytes(b"mine")
        argv += ["--save", str(npz)]
    elif what == "batch":
        argv += ["--batch-size", "0"]
    with pytest.raises(SystemExit) as exit:
        fid.main([*argv, "--inception-weights", str(inception_file)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fid.py: ")
             and "dimensions" not in line]
    assert exit.value.code == 2 and len(lines) == 1 and named in lines[0]
    assert what != "existing" or npz.read_bytes() == b"mine"


def test_16_bit_grey_images_are_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(read_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 100, 255]
