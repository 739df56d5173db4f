import errno
import io
import json
import os
import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import fid
import sample
from conftest import ROOT, one_line
from fid import frechet_distance, read_image, to_uint8
from losses import sliced_wasserstein_loss
from spherify import truncate_noise
from train import PRESETS, load_data

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


def test_frechet_of_commuting_covariances():
    d1, d2, Q = RNG.uniform(0, 3, D), RNG.uniform(0, 3, D), rotation()
    expected = ((np.sqrt(d1) - np.sqrt(d2)) ** 2).sum()
    assert frechet_distance(ZERO, Q * d1 @ Q.T, ZERO, Q * d2 @ Q.T) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_a_linear_map():
    S, A = covariance(), covariance(seed=3)                                # y = A x with A symmetric positive
    expected = np.trace(S) + np.trace(A @ S @ A) - 2 * np.trace(A @ S)
    assert frechet_distance(ZERO, S, ZERO, A @ S @ A) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_equal_images_is_no_error_though_their_covariance_is_rounding():
    """As an untrained model draws them, in the numbers that --evaluate takes by default."""
    x = torch.full((1000, 256), 0.1) + 1e-8 * torch.randn(1000, 256)
    same = fid.FeatureStatistics(256).update(x)
    other = fid.FeatureStatistics(256).update(x + torch.randn(1000, 256))
    assert frechet_distance(same.mean, same.covariance, other.mean, other.covariance) > 200


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


def test_to_uint8_rounds_to_nearest_and_clamps():
    x = torch.tensor([-0.5, 0.0, 0.4999 / 255, 0.5001 / 255, 254.4 / 255, 254.6 / 255, 1.0, 1.5])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 254, 255, 255, 255]
    assert to_uint8(x, truncate=True).tolist() == [0, 0, 0, 0, 254, 254, 255, 255]
    levels = torch.arange(256) / 255
    assert to_uint8(levels).tolist() == list(range(256))


IMAGE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (5, 8, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK", "LA"])
def test_images_of_any_mode_are_read_as_rgb(tmp_path, mode):
    IMAGE.convert(mode).save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    x = read_image(next(tmp_path.iterdir()))
    assert x.mode == "RGB" and x.size == (8, 5)
    assert np.array_equal(x, IMAGE.convert(mode).convert("RGB"))


EXIF = b"Exif\0\0II*\0\x08\0\0\0"
BROKEN_TAG = struct.pack("<HHII", 0x100, 2, 4, 0x00636261)                  # a width that is a text


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("orientation, turned", [
    (1, lambda x: x), (2, np.fliplr), (3, lambda x: np.rot90(x, 2)), (4, np.flipud),
    (5, lambda x: x.swapaxes(0, 1)), (6, lambda x: np.rot90(x, -1)),
    (7, lambda x: np.rot90(x, 2).swapaxes(0, 1)), (8, np.rot90), (9, lambda x: x)])
def test_images_are_turned_upright_by_their_tag_alone(tmp_path, orientation, turned, broken):
    tags = [BROKEN_TAG] * broken + [struct.pack("<HHIHH", 0x112, 3, 1, orientation, 0)]
    IMAGE.save(tmp_path / "a.webp", lossless=True,
               exif=EXIF + struct.pack("<H", len(tags)) + b"".join(tags) + bytes(4))
    assert np.array_equal(read_image(tmp_path / "a.webp"), turned(np.asarray(IMAGE)))


def test_an_image_with_broken_exif_data_is_read_and_of_a_phones_two_frames_the_first(tmp_path):
    for k, exif in enumerate((EXIF + b"\xff\xff", b"Exif\0\0II*\0\xff\xff", b"Exif\0\0")):
        IMAGE.save(tmp_path / f"{k}.webp", lossless=True, exif=exif)
        assert np.array_equal(read_image(tmp_path / f"{k}.webp"), IMAGE)
    red, blue = (Image.new("RGB", (8, 5), colour) for colour in ((200, 0, 0), (0, 0, 200)))
    red.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[blue])
    assert np.abs(np.asarray(read_image(tmp_path / "a.jpg"), int) - red).max() < 5


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white_and_that_is_said(tmp_path, mode):
    image = IMAGE.convert(mode)
    if mode == "P":
        image.save(tmp_path / "a.png", transparency=bytes(256))
    else:
        image.putalpha(0)
        image.save(tmp_path / "a.png")
    with pytest.warns(UserWarning, match="transparent parts of images become white"):
        assert (np.asarray(read_image(tmp_path / "a.png")) == 255).all()


def test_more_than_8_bits_per_channel_are_refused_by_name(tmp_path):
    grey = np.array([[0, 100, 255]])
    for name, pixels in (("png16.png", np.uint16(257 * grey)), ("tiff16.tif", np.uint16(257 * grey)),
                         ("int32.tif", np.int32(257 * grey)), ("float.tif", np.float32(grey / 255))):
        Image.fromarray(pixels).save(tmp_path / name)
    chunks = [struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
              for name, data in ((b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)),
                                 (b"IDAT", zlib.compress(bytes(7))), (b"IEND", b""))]
    (tmp_path / "rgb16.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))     # Pillow cannot write it
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=f"{path}: not a readable image .*more than 8 bits per channel"):
            read_image(path)


def test_a_bitmap_of_16_bits_for_all_three_colours_is_read(tmp_path):
    header = struct.pack("<IHHIIiiHHIIiiII", 70, 0, 0, 66, 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0)
    masks, pixels = struct.pack("<3I", 0xF800, 0x07E0, 0x001F), struct.pack("<2H", 0xF800, 0x001F)
    (tmp_path / "a.bmp").write_bytes(b"BM" + header + masks + pixels)
    assert np.asarray(read_image(tmp_path / "a.bmp")).tolist() == [[[255, 0, 0], [0, 0, 255]]]


def odd_folder(root):
    """Two classes of six images, with everything beside them that is met in practice."""
    for path in ("real/a/1.PNG", "real/a/2.jfif", "a/deep/3.gif", "b/1.png", "b/2.tiff", "b/3.bmp",
                 ".ipynb_checkpoints/1.png", "__MACOSX/b/._1.png", "b/._1.png", "b/.hidden.png",
                 "@eaDir/1.png"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        IMAGE.save(root / path, "JPEG" if path.endswith("jfif") else None)
    for path in ("notes.txt", "b/labels.csv", "b/.DS_Store"):
        (root / path).write_text("text")
    (root / "empty").mkdir()
    (root / "real/a/1.PNG").rename(root / "a/1.PNG")
    (root.parent / "elsewhere").mkdir()
    (root / "real/a/2.jfif").rename(root.parent / "elsewhere/2.jfif")
    (root / "real/a").rmdir()
    (root / "real").rmdir()
    (root / "a/linked").symlink_to(root.parent / "elsewhere")
    (root / "b/loop").symlink_to(root)
    (root.parent / "elsewhere/back").symlink_to(root / "a")                 # where it is linked from
    (root / "b/broken.png").symlink_to("nowhere")
    os.mkfifo(root / "b/pipe.png")
    return root


def test_one_reader_finds_the_images_of_a_folder_with_every_oddity(tmp_path):
    root = odd_folder(tmp_path / "photos")
    with pytest.warns(UserWarning, match="left out 4 files that are no images, such as"):
        paths = fid.find_images(root)
    assert [str(path.relative_to(root)) for path in paths] == [
        "a/1.PNG", "a/deep/3.gif", "a/linked/2.jfif", "b/1.png", "b/2.tiff", "b/3.bmp"]
    with pytest.warns(UserWarning):
        data, held_out, names = load_data(replace(PRESETS["folder"], data=str(root), image_size=8))
    assert held_out is None and (names, data.targets.tolist()) == (["a", "b"], [0, 0, 0, 1, 1, 1])


def test_every_image_that_cannot_be_used_is_named(folders, tmp_path, capsys):
    (tmp_path / "A").mkdir()
    for i in range(70):                                     # more than are read at a time
        IMAGE.save(tmp_path / "A" / f"{i:02}.png")
    for i in (2, 69):
        (tmp_path / "A" / f"{i:02}.png").write_bytes(b"rubbish")
    with pytest.raises(SystemExit):
        fid.main([str(tmp_path / "A"), folders[0], "--features", "pixels"])
    line = one_line(capsys, "fid.py: 2 of 70 images cannot be used")
    assert "02.png" in line and "69.png" in line and "03.png" not in line


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
    """Seeded weights in place of Inception's, where torch.hub keeps them."""
    file = tmp_path_factory.mktemp("home") / "hub" / "checkpoints" / fid.INCEPTION_URL.rsplit("/", 1)[1]
    file.parent.mkdir(parents=True)
    torch.save(seeded_inception(), file)
    return file


@pytest.fixture
def inception(weights_file, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(weights_file.parents[2]))


def test_the_state_dict_has_the_566_released_names():
    names = fid.InceptionV3().state_dict().keys()
    assert len(names) == 566 and {"Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch_pool.bn.running_var",
                                  "fc.bias"} <= names


@pytest.mark.parametrize("size", [32, 299])
def test_features_are_those_of_torch_fidelity_and_pytorch_fid(inception, peers, size):
    x = seeded_images(2, size, seed=size)
    close = lambda ours, theirs: ((ours - torch.from_numpy(theirs)).norm() / np.linalg.norm(theirs)).item()
    pool, logits = fid.feature_network("torch-fidelity")(x)
    assert close(pool, peers[f"torch_fidelity_{size}"]) < 1e-5
    assert close(logits, peers[f"torch_fidelity_logits_{size}"]) < 1e-5
    assert close(fid.feature_network("pytorch-fid")(x)[0], peers[f"pytorch_fid_{size}"]) < 1e-5
    assert close(pool, peers[f"pytorch_fid_{size}"]) > 1e-3                  # the conventions do differ


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


def test_two_folders_give_the_numbers_of_torch_fidelity_and_pytorch_fid(folders, inception, peers, capsys):
    results = {}
    for features in ("torch-fidelity", "pytorch-fid"):
        fid.main([*folders, "--features", features, "--json"])
        results[features] = json.loads(capsys.readouterr().out)
    ours = results["torch-fidelity"]
    # torch-fidelity's own rounding is 1e-5 here, where 12 images leave nearly all eigenvalues zero.
    assert ours["FID"] == pytest.approx(peers["fid_torch_fidelity"].item(), rel=1e-5)
    assert results["pytorch-fid"]["FID"] == pytest.approx(peers["fid_pytorch_fid"].item(), rel=1e-5)
    assert ours["Inception Score"] == pytest.approx(peers["is_mean"].item(), rel=1e-6)
    assert ours["its deviation"] == pytest.approx(peers["is_std"].item(), rel=1e-3)
    assert ours["precision"] == pytest.approx(peers["precision"].item(), abs=1e-6)
    assert ours["recall"] == pytest.approx(peers["recall"].item(), abs=1e-6)
    assert ours["counts"] == [12, 12] and ours["features"] == "torch-fidelity"


def test_stored_statistics_give_the_distance_of_their_folders_on_either_side(folders, tmp_path, capsys):
    files, flags = [str(tmp_path / "a.npz"), str(tmp_path / "b.npz")], ["--features", "pixels"]
    for folder, file in zip(folders, files):
        fid.main([folder, "--save", file, *flags])
    for pair in (folders, (folders[0], files[1]), (files[0], folders[1]), files):
        fid.main([*pair, "--json", *flags])
    direct, *stored = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    for result in stored:                                                   # their means are float32
        assert result["Fréchet distance"] == pytest.approx(direct["Fréchet distance"], rel=1e-5)
        assert result["counts"] == [12, 12] and "recall" not in result
    with np.load(files[1]) as file:                                         # as torch-fidelity wants them
        assert file["mu"].dtype == np.float32 and file["sigma"].dtype == np.float64


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
    assert int(whole.count) == 500
    np.testing.assert_allclose(whole.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.covariance, np.cov(x.T), rtol=0, atol=1e-8)


def test_too_few_images_for_a_covariance_are_told():
    with pytest.warns(UserWarning, match="5 images for 7 dimensions"):
        fid.FeatureStatistics(7).update(torch.rand(5, 7)).covariance
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        fid.FeatureStatistics(7).update(torch.rand(1, 7)).covariance


# ---- scores ----


def test_inception_score_is_one_for_equal_and_C_for_evenly_spread_certain_predictions():
    assert fid.inception_score(torch.ones(40, 8)) == pytest.approx((1, 0))
    certain = 1e4 * torch.eye(8).repeat_interleave(10, 0)
    assert fid.inception_score(certain, splits=1) == pytest.approx((8, 0))
    assert fid.inception_score(certain, splits=8)[0] > 3        # parts are dealt out, not one per class


class OnMPS(torch.Tensor):
    """A tensor as if on an Apple GPU, which has no float64; what .cpu() gives is one of the CPU."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cpu:
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].as_subclass(torch.Tensor)
        result = super().__torch_function__(function, types, args, kwargs or {})
        if isinstance(result, cls) and result.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64")
        return result


def test_nothing_becomes_float64_before_it_is_on_the_cpu():
    images = torch.randint(0, 256, (12, 3, 20, 20), dtype=torch.uint8)
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    for function, argument in (
            (fid.pixel_features, images), (lambda x: fid.FeatureStatistics(6).update(x).covariance, x),
            (lambda x: torch.tensor(fid.inception_score(x, 2)), x),
            (lambda x: torch.tensor(fid.precision_recall(x, x.flip(1))), x),
            (lambda x: torch.tensor(frechet_distance(x.mean(0), x.T.cov(), x[0], x.T.cov())), x),
            (lambda x: truncate_noise(x, 1.0), x), (lambda x: sliced_wasserstein_loss(x, torch.eye(6)), x)):
        torch.testing.assert_close(function(argument.as_subclass(OnMPS)).as_subclass(torch.Tensor),
                                   function(argument))
    with pytest.raises(TypeError, match="float64"):
        x.as_subclass(OnMPS).double()


def test_precision_and_recall_are_the_shares_inside_the_other_manifold():
    real = torch.arange(10.0)[:, None]                                      # balls of radius 1, 2 or 3
    generated = torch.cat([torch.full((6, 1), 4.2), torch.full((4, 1), 50.0)])
    precision, recall = fid.precision_recall(generated, real, k=1)
    assert precision == 0.6 and recall == 0.0
    assert fid.precision_recall(real, real + 0.1, k=3) == (1.0, 1.0)
    whole = fid.precision_recall(torch.rand(50, 3), torch.rand(60, 3))
    assert 0 < whole[0] <= 1


def test_precision_and_recall_of_many_images_are_their_definition_written_out():
    a, b = torch.rand(1100, 3, dtype=torch.float64), torch.rand(1200, 3, dtype=torch.float64) + 0.2
    shares = []
    for x, others in ((a, b), (b, a)):
        radii = torch.cdist(others, others).sort(dim=1).values[:, 3]        # the first is the image itself
        shares.append((torch.cdist(x, others) <= radii).any(1).double().mean().item())
    assert fid.precision_recall(a, b) == pytest.approx(shares) and shares[0] != shares[1]


def test_neighbours_come_in_order_with_their_places():
    real = torch.tensor([[0.0], [10.0], [3.0]])
    distance, place = fid.nearest_neighbours(torch.tensor([[2.0], [9.0]]), real, k=2)
    assert distance.tolist() == [[1.0, 2.0], [1.0, 6.0]] and place.tolist() == [[2, 0], [1, 2]]


# ---- raw pixels ----


def test_only_inception_features_are_called_fid(folders, capsys):
    fid.main([*folders, "--features", "pixels", "--json"])
    fid.main([*folders, "--features", "pixels"])
    first, *lines = capsys.readouterr().out.splitlines()
    result = json.loads(first)
    assert result["features"] == "pixels"
    assert list(result)[4:] == ["Fréchet distance", "precision", "recall"]
    assert [line.split()[-1] for line in lines[4:]] == [str(value) for value in list(result.values())[4:]]


def test_pixel_features_of_shifted_images_differ_by_their_mean_gap():
    network = fid.feature_network("pixels")
    x = seeded_images(900, 32, seed=3) // 2
    same, brighter = (fid.extract((x + gap).split(100), network) for gap in (0, 51))
    name = "Fréchet distance"
    assert fid.compare(same, same, "pixels")[name] == pytest.approx(0, abs=1e-6)
    assert fid.compare(brighter, same, "pixels")[name] == pytest.approx(768 * 0.4**2, rel=1e-5)


def test_pixel_features_of_grey_images_are_the_means_of_their_colours():
    x = seeded_images(5, 32, seed=3)
    (colours, _), (grey, _) = (fid.feature_network("pixels", grey=grey)(x) for grey in (False, True))
    torch.testing.assert_close(grey, colours.unflatten(1, (3, -1)).mean(1))


# ---- bad input ----


@pytest.mark.parametrize("what, named", [
    ("missing", "No such file"), ("another", "invalid hash"), ("damaged", "missing or damaged")])
def test_inception_weights_that_cannot_be_had_name_file_and_url(
        folders, weights_file, tmp_path, monkeypatch, capsys, what, named):
    url = weights_file.as_uri() if what == "another" else f"file:///nowhere/{weights_file.name}"
    monkeypatch.setattr(fid, "INCEPTION_URL", url)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints" / weights_file.name
    if what == "damaged":
        place.parent.mkdir(parents=True)
        place.write_bytes(weights_file.read_bytes()[:10_000])
    with pytest.raises(SystemExit) as exit:
        fid.main(list(folders))
    line = capsys.readouterr().err.splitlines()[-1]                     # above it, the download's progress
    assert exit.value.code == 2 and line.startswith("fid.py: ")
    assert all(text in line for text in (str(place.parent), url, named))
    assert place.exists() == (what == "damaged")


@pytest.mark.parametrize("argv, named", [
    ("A empty", "no images in it"), ("A nowhere", "No such file or directory: 'nowhere'"),
    ("A sizes", "9.png has another size than"), ("A corrupt", "9.JPG: not a readable image"),
    ("A animated", "9.gif: not a readable image (several frames"), ("A", "--save"),
    ("one --save new.npz", "at least 2 images"), ("A damaged.npz", "damaged.npz: not an npz file"),
    ("A other.npz", "other.npz: not an npz file"), ("A inception.npz", "statistics of torch-fidelity"),
    ("A B --save damaged.npz", "already exists"), ("A --save damaged.npz/new.npz", "damaged.npz"),
    ("A missing.npz --save new.npz", "No such file or directory: 'missing.npz'"),
    ("A floats.npz", "floats.npz: not an npz file"), ("A nan.npz", "nan.npz: not an npz file"),
    ("complex.npz B", "complex.npz: not an npz file"), ("indefinite.npz B", "negative eigenvalue"),
    ("A B --device abacus", "--device abacus cannot be used here"),
])
def test_mistakes_of_the_command_are_one_line_and_write_nothing(
        folders, tmp_path, monkeypatch, capsys, argv, named):
    monkeypatch.chdir(tmp_path)
    image = Image.open(next(Path(folders[0]).glob("*.png")))
    Path("empty").mkdir()
    for name in ("one", "sizes", "corrupt", "animated"):
        Path(name).mkdir()
        image.save(f"{name}/1.png")
    image.resize((20, 32)).save("sizes/9.png")
    Path("corrupt/9.JPG").write_bytes(b"rubbish")
    image.save("animated/9.gif", save_all=True, append_images=[image.rotate(90)])
    Path("damaged.npz").write_bytes(b"rubbish")
    np.savez("other.npz", mean=np.zeros(768))
    np.savez("floats.npz", arr_0=np.zeros((4, 8, 8, 3)))
    np.savez("nan.npz", mu=np.full(768, np.nan), sigma=np.eye(768))
    np.savez("complex.npz", mu=np.zeros(768), sigma=1j * np.eye(768))
    np.savez("indefinite.npz", mu=np.zeros(768), sigma=np.diag([-1.0] + [1.0] * 767))
    np.savez("inception.npz", mu=np.zeros(2048), sigma=np.eye(2048), features="torch-fidelity")
    content = lambda: {path: path.read_bytes() for path in Path().rglob("*.*")}
    before = content()
    with pytest.raises(SystemExit) as exit:
        fid.main([{"A": folders[0], "B": folders[1]}.get(word, word) for word in argv.split()]
                 + ["--features", "pixels"])
    assert exit.value.code == 2 and named in one_line(capsys, "fid.py: ") and content() == before


def test_npz_files_of_images_are_read_as_their_folder_and_foreign_keys_are_ignored(folders, tmp_path, capsys):
    x = np.stack([np.asarray(read_image(path)) for path in fid.find_images(folders[0])])
    np.savez(tmp_path / "x.npz", arr_0=x, arr_1=np.arange(12))
    fid.main([folders[1], "--save", str(tmp_path / "b.npz"), "--features", "pixels"])
    with np.load(tmp_path / "b.npz") as stored:
        np.savez(tmp_path / "b2.npz", mu=stored["mu"], sigma=stored["sigma"], features=np.zeros((9, 768)),
                 labels=np.array(["a", None], object), count=np.array("many"))
    results = []
    for pair in ((folders[0], folders[1]), (str(tmp_path / "x.npz"), folders[1]),
                 (str(tmp_path / "x.npz"), str(tmp_path / "b2.npz"))):
        fid.main([*pair, "--features", "pixels", "--json"])
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    folder, images, foreign = results
    assert {**folder, "images": ""} == {**images, "images": ""}
    assert foreign["Fréchet distance"] == pytest.approx(folder["Fréchet distance"], rel=1e-5)
    b, b3 = str(tmp_path / "b.npz"), str(tmp_path / "b3.npz")
    fid.main([b, folders[0], "--features", "pixels", "--save", b3])
    with np.load(b) as b, np.load(b3) as again:                             # A's statistics, not B's
        assert all(np.array_equal(b[name], again[name]) for name in ("mu", "sigma", "count", "features"))


def test_an_inception_score_of_few_images_is_left_out_and_of_a_part_is_at_most_its_images():
    logits, pool = torch.randn(40, 1008), torch.randn(40, 5)
    some = lambda n: fid.Extracted(fid.FeatureStatistics(5).update(pool[:n]), pool[:n], logits[:n])
    with pytest.warns(UserWarning, match="left out: an Inception Score of 10 parts needs more than 10"):
        assert "Inception Score" not in fid.compare(some(10), some(40), "torch-fidelity")
    assert fid.compare(some(40), some(40), "torch-fidelity")["Inception Score"] <= 4


# ---- files and processes ----


@pytest.mark.parametrize("write", [
    lambda file: file.write(bytes(10_000)), lambda file: torch.save({"x": torch.zeros(5000)}, file)])
def test_on_a_full_disk_the_old_file_stays_whole_and_nothing_is_left(tmp_path, write):
    class Full(io.BytesIO):
        def write(self, data):
            if self.tell() + len(data) > 100:           # torch.save then raises a RuntimeError of its own
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    (tmp_path / "a.pt").write_bytes(b"old")
    with pytest.raises(OSError, match="a.pt not written: No space left on device"):
        with fid.whole_file(tmp_path / "a.pt"):
            write(Full())
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    assert (tmp_path / "a.pt").read_bytes() == b"old"


def test_a_console_without_a_letter_ends_no_command(folders, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", console)
    fid.main([*folders, "--features", "pixels"])
    console.flush()
    assert b"Fr?chet distance" in console.buffer.getvalue()


@pytest.mark.parametrize("program", [fid, sample])
def test_programs_of_one_process_say_so_under_torchrun(monkeypatch, capsys, program):
    argv = {fid: ["nowhere", "--save", "new.npz"], sample: ["--checkpoint", "nowhere"]}[program]
    for processes, named in (("2", "torchrun"), ("1", "nowhere")):
        monkeypatch.setenv("WORLD_SIZE", processes)
        with pytest.raises(SystemExit):
            program.main(argv)
        assert named in one_line(capsys, f"{program.__name__}.py: ")


@pytest.mark.parametrize("error, message, code", [
    (FloatingPointError("not finite"), "not finite", 2), (KeyboardInterrupt(), "interrupted", 130),
    (ValueError("size mismatch:\n\tweight\n"), "size mismatch: weight", 2)])
def test_mistakes_become_one_line_and_an_exit_code_but_errors_of_ours_stay(capsys, error, message, code):
    with pytest.raises(SystemExit) as exit, fid.errors_in_one_line("train.py"):
        raise error
    assert exit.value.code == code and one_line(capsys, "train.py: ") == f"train.py: {message}"
    with pytest.raises(TypeError), fid.errors_in_one_line("train.py"):
        raise TypeError("not supported between")
