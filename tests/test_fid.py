import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

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
