import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import sample
from conftest import ROOT, one_line, with_seeded_weights
from fid import to_uint8
from models import convert_official
from sample import generate, generate_latent, load, main, picture, read_checkpoint, reconstruct, sampler
from spherify import (add_noise, angle_between, angle_to_sigma, autocast, sample_noise, spherify,
                      truncate_noise)
from test_models import CFG, golden_model, released

Y = torch.tensor([0, 1, 3])


def noise(model, draws=1, batch=3, seed=5):
    return sample_noise(seed, 0, batch, model.latent_shape, draws)


# ---- Algorithm 1 ----


def test_one_step_decodes_a_random_point(model):
    x = generate(model, Y, 1, seed=5)
    assert torch.equal(x, model.decode(spherify(noise(model)[0]), Y))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("schedule, strengths", [("eq13", (1 / 2, 0.0)), ("released", (2 / 3, 1 / 3))])
def test_three_steps_of_both_samplers_are_algorithm_1_written_out(
        model, denoiser, schedule, strengths, shared):
    """With gamma = 1; fresh noise takes draw t for step t."""
    e, sigma_max = noise(model, draws=1 if shared else 3).expand(3, -1, -1, -1), angle_to_sigma(70.0)
    x, z_hat = model.decode(spherify(e[0]), Y), denoiser(spherify(e[0]), Y)
    for r, draw in zip(strengths, e[1:]):
        x = model.decode(add_noise(spherify(model.encode(x, Y)), r * sigma_max, draw), Y)
        z_hat = denoiser(spherify(spherify(z_hat) + r * sigma_max * draw), Y)
    options = dict(alpha=70.0, gamma=1.0, schedule=schedule, shared=shared, seed=5)
    torch.testing.assert_close(generate(model, Y, 3, **options), x)
    torch.testing.assert_close(generate_latent(denoiser, Y, 3, **options), denoiser.tokenizer.decode(z_hat))


def test_what_is_not_given_is_the_papers_best_and_the_models_own_angle(model, denoiser):
    best = dict(alpha=model.alpha_max, gamma=0.0, shared=True, position="combo")
    assert torch.equal(generate(model, Y, 3, 1.5), generate(model, Y, 3, 1.5, **best))
    decaying = dict(gamma=1.0, schedule="eq13")
    assert torch.equal(generate(model, Y, 3, gamma=1.0), generate(model, Y, 3, **decaying))
    best = dict(alpha=denoiser.alpha_max, gamma=1.0, shared=True, schedule="released", project_last=False)
    assert torch.equal(generate_latent(denoiser, Y, 3), generate_latent(denoiser, Y, 3, **best))


def test_the_official_sampler_shares_noise_from_step_two_and_ends_its_decay_at_one_over_T(model):
    e, sigma_max = noise(model, draws=2), angle_to_sigma(model.alpha_max)
    x = model.decode(spherify(e[0]), Y)
    for r in (2 / 3, 1 / 3):                                                # gamma = 1, T = 3
        x = model.decode(add_noise(spherify(model.encode(x, Y)), r * sigma_max, e[1]), Y)
    official = dict(gamma=1.0, seed=5, official=True)
    torch.testing.assert_close(generate(model, Y, 3, **official), x)
    assert (generate(model, Y, 3, **official, schedule="eq13") - x).abs().max() > 1e-4
    assert torch.equal(generate(model, Y, 1, **official), generate(model, Y, 1, seed=5))
    fresh = dict(shared=False, gamma=0.0, seed=5)
    assert torch.equal(generate(model, Y, 3, official=True, **fresh), generate(model, Y, 3, **fresh))


@pytest.mark.parametrize("position", ["encoder", "decoder", "combo"])
def test_guidance_mixes_raw_latents_and_pixels_each_with_its_scale(model, position):
    s = 2.25
    s_encoder, s_decoder = {"encoder": (s, 1), "decoder": (1, s), "combo": (1.5, 1.5)}[position]
    lerp = lambda null, cond, s: null + s * (cond - null)
    decode = lambda v: lerp(model.decode(v), model.decode(v, Y), s_decoder).clamp(-1, 1)
    e = noise(model)[0]
    x = decode(spherify(e))
    z = lerp(model.encode(x), model.encode(x, Y), s_encoder)
    x = decode(add_noise(spherify(z), angle_to_sigma(model.alpha_max), e))
    torch.testing.assert_close(generate(model, Y, 2, s, position=position, seed=5), x, rtol=1e-4, atol=1e-5)
    null = torch.full((3,), model.num_classes)
    torch.testing.assert_close(generate(model, null, 2, s), generate(model, null, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", ["encoder", "decoder", "combo"])
def test_guidance_scale_one_is_no_guidance_and_no_second_pass(model, position, monkeypatch):
    plain = generate(model, Y, 3)
    calls = []
    whole = model.decode
    monkeypatch.setattr(model, "decode", lambda *inputs: calls.append(1) or whole(*inputs))
    assert torch.equal(generate(model, Y, 3, 1.0, position=position), plain)
    assert len(calls) == 3


def test_pixels_are_clamped_after_guidance_also_between_steps(model):
    x = generate(model, Y, 1, 256.0, seed=5)
    v = spherify(noise(model)[0])
    unclamped = model.decode(v) + 16 * (model.decode(v, Y) - model.decode(v))
    assert unclamped.abs().max() > 1.5 and x.abs().max() == 1
    torch.testing.assert_close(x, unclamped.clamp(-1, 1), rtol=1e-4, atol=1e-4)
    seen = []
    whole, model.encode = model.encode, lambda x, y: seen.append(x.abs().max()) or whole(x, y)
    generate(model, Y, 3, 256.0, position="decoder")
    assert len(seen) == 2 and max(seen) <= 1


def test_guided_two_step_sampling_agrees_with_the_released_system():
    golden = np.load(ROOT / "tests" / "sphere_cond_linear.npz")
    model = golden_model(golden).eval()
    e, y = torch.from_numpy(golden["e"]), torch.from_numpy(golden["labels_cfg"])
    for steps, name in ((1, "cfg_step1"), (2, "cfg_step2_shared_noise_e")):
        x = generate(model, y, steps, 1.4, e=e)
        np.testing.assert_allclose(x, golden[name], rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("shared", [True, False])
def test_a_bound_truncates_the_start_alone(model, shared):
    e = noise(model, 2)
    later = e[:1] if shared else e[1:]
    assert torch.equal(generate(model, Y, 2, seed=5, shared=shared, bound=0.5),
                       generate(model, Y, 2, shared=False, e=torch.cat([truncate_noise(e[:1], 0.5), later])))


@pytest.mark.parametrize("kind, options", [("model", {}), ("model", {"shared": False}), ("denoiser", {})])
def test_images_do_not_depend_on_the_batch(kind, options, request):
    net, y = request.getfixturevalue(kind), torch.arange(16) % 4
    whole = sampler(net)(net, y, 3, 1.5, seed=2, **options)
    parts = [sampler(net)(net, y[i:i + 3], 3, 1.5, seed=2, first=i, **options) for i in range(0, 16, 3)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5)


def test_no_class_is_the_null_class_and_one_class_one_image(model):
    for y, same in ((None, [model.num_classes]), (3, [3])):
        assert torch.equal(generate(model, y, 2), generate(model, same, 2))
    with pytest.raises(ValueError, match="y must be"):
        generate(model, [], 2)


def test_a_thousand_classes_are_not_all_interpolated_unless_asked_for(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "load", lambda *args: model)
    model.class_names, model.preset = [str(k) for k in range(1000)], {}
    monkeypatch.setattr(model, "num_classes", 1000)
    monkeypatch.setattr(sample, "interpolate", lambda model, y, *rest, **how: torch.zeros(2, 3, 12, 20))
    run("any.pt", tmp_path, "interpolate --frames 2")
    assert Image.open(tmp_path / "interpolate.png").height < 1000


def test_reconstruction_adds_no_noise_and_defaults_to_the_null_class(model, denoiser):
    x, tokenizer = generate(model, Y, 1), denoiser.tokenizer
    torch.testing.assert_close(reconstruct(model, x), model.decode(spherify(model.encode(x))))
    torch.testing.assert_close(reconstruct(model, x, Y), model.decode(spherify(model.encode(x, Y)), Y))
    assert torch.equal(reconstruct(denoiser, x), tokenizer.decode(tokenizer.encode(x)))


def test_networks_that_sample_in_bf16_get_points_of_the_sphere_and_return_float32(model, denoiser):
    for owner, network, draw in ((model, model.decoder, generate), (denoiser, denoiser, generate_latent)):
        points, kinds = [], []
        whole = draw(owner, Y, 3, cfg=1.5)
        hooks = [network.register_forward_pre_hook(lambda _, args: points.append(args[0]))]
        hooks += [part.register_forward_hook(lambda _, args, y: kinds.append(y.dtype))
                  for part in network.modules() if isinstance(part, torch.nn.Linear)]
        with autocast(torch.device("cpu"), "bf16"):
            short = draw(owner, Y, 3, cfg=1.5)
        for hook in hooks:
            hook.remove()
        for v in points:
            torch.testing.assert_close(v.flatten(1).norm(dim=1), torch.full((3,), v[0].numel() ** 0.5))
        assert {*kinds} == {torch.bfloat16} and short.dtype == torch.float32
        assert 0 < (short - whole).abs().max() < 0.2


def test_samples_are_drawn_in_the_precision_of_the_training_or_as_asked(trained, tmp_path):
    checkpoint = read_checkpoint(trained)
    of_bf16 = tmp_path / "bf16.pt"
    torch.save({**checkpoint, "preset": {**checkpoint["preset"], "precision": "bf16"}}, of_bf16)
    drawn = {}
    for path in (trained, of_bf16):
        for words in ("", "--precision bf16", "--precision float32"):
            out = tmp_path / f"{path.stem} {words}"
            run(path, out, f"--count 20 --singles npz {words}")
            drawn[path, words] = np.load(out / "images.npz")["arr_0"]
    assert (drawn[trained, ""] == drawn[trained, "--precision float32"]).all()
    assert (drawn[of_bf16, ""] == drawn[trained, "--precision bf16"]).all()
    assert (drawn[of_bf16, "--precision float32"] == drawn[trained, ""]).all()
    assert (drawn[of_bf16, ""] != drawn[trained, ""]).any()


# ---- checkpoints ----


def run(checkpoint, out, options=""):
    device = [] if "--device" in options else ["--device", "cpu"]
    main([*options.split(), "--checkpoint", str(checkpoint), "--out", str(out), *device])


def refusal(capsys, checkpoint, out, options=""):
    """The one line with which a command is refused, that writes nothing."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        run(checkpoint, out, options)
    assert exit.value.code == 2 and not out.exists()
    return one_line(capsys, "sample.py: ")


def test_a_checkpoint_alone_rebuilds_the_model(trained):
    stored = read_checkpoint(trained)
    for ema in (True, False):
        model = load(trained, ema=ema)
        assert not model.training and model.config == stored["config"] and model.class_names[7] == "7"
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, stored["ema" if ema else "model"][name])
    assert stored["preset"]["use_ema"]
    assert torch.equal(load(trained).decoder.ffn.linear.weight, stored["ema"]["decoder.ffn.linear.weight"])


class Explosive:
    def __reduce__(self):
        return (open, ("exploded", "w"))


@pytest.mark.parametrize("damage, named", [
    *((damage, "bad.pt") for damage in "missing text empty truncated flipped pickle code foreign".split()),
    ("nan", "not finite"),
    ("setting", "colour"), ("weights", "decoder.ffn.linear.bias"), ("no config", "bad.pt"),
    ("no preset", "bad.pt"), ("no average", "ema"),])
def test_what_is_no_checkpoint_is_refused_in_one_line(trained, tmp_path, capsys, monkeypatch, damage, named):
    monkeypatch.chdir(tmp_path)
    path, good = tmp_path / "bad.pt", trained.with_name("model.pt")
    checkpoint = read_checkpoint(good)
    weights = {name: x for name, x in checkpoint["model"].items() if name != "decoder.ffn.linear.bias"}
    change = {"code": {"class_names": Explosive()}, "weights": {"model": weights},
              "setting": {"config": {**checkpoint["config"], "colour": 1}}, "no config": {"config": None},
              "no preset": {"preset": None},
              "no average": {"preset": {**checkpoint["preset"], "use_ema": False}},
              "nan": {"model": {name: x / 0 for name, x in checkpoint["model"].items()}}}
    flipped = bytearray(good.read_bytes())
    flipped[len(flipped) // 2] ^= 64                                        # one bit of a weight
    raw = {"text": b"hello", "empty": b"", "truncated": good.read_bytes()[:20_000], "flipped": flipped,
           "pickle": pickle.dumps(Explosive())}
    if damage in raw:
        path.write_bytes(raw[damage])
    elif damage != "missing":
        torch.save(weights if damage == "foreign" else {**checkpoint, **change[damage]}, path)
    assert named in refusal(capsys, path, tmp_path / "out", "--ema" if damage == "no average" else "")
    assert not (tmp_path / "exploded").exists()


def test_no_convolution_and_no_product_computes_in_tf32_on_any_device(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)           # torch's default
    sample.pick_device("cpu")
    assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"


@pytest.fixture
def official(tmp_path):
    """A checkpoint of the official code with its cfg.json, in its layout, and the model it holds."""
    model, weights = released()
    other = {name: tensor + 1 for name, tensor in weights.items() if not name.endswith("pos_embed")}
    torch.save({"model": {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}, "epoch": 7,
                "ema_model": {**other, "encoder.rope": torch.zeros(1), "decoder.rope": torch.zeros(1)}},
               tmp_path / "ep0007.pth")
    sizes = dict(zip(("vit_enc_model_size", "vit_dec_model_size"),
                     (model.config["encoder_size"], model.config["decoder_size"])))
    (tmp_path / "cfg.json").write_text(json.dumps({**CFG, **sizes}))
    model.load_state_dict(convert_official(weights))
    return tmp_path / "ep0007.pth", tmp_path / "cfg.json", model.eval()


def test_a_checkpoint_of_the_official_code_is_sampled_with_its_configuration(official, tmp_path):
    path, cfg, model = official
    plain, averaged = (load(path, ema=ema, config=cfg) for ema in (None, True))
    assert torch.equal(generate(plain, Y, 2), generate(model, Y, 2, alpha=85.0))
    assert not torch.equal(generate(plain, Y, 2), generate(averaged, Y, 2))
    run(path, tmp_path, f"--config {cfg} --count 3 --singles")
    assert_singles_are(generate(model, [0, 1, 2], 4, alpha=85.0), tmp_path)


@pytest.mark.parametrize("settings, options, named", [
    ({}, "", "--config"), ({}, "--config nowhere.json", "nowhere.json"),
    ({"token_channels": 6}, "--config cfg.json", "size mismatch")])
def test_official_checkpoints_that_do_not_fit_are_refused_in_one_line(
        official, tmp_path, monkeypatch, capsys, settings, options, named):
    monkeypatch.chdir(tmp_path)
    path, cfg, _ = official
    cfg.write_text(json.dumps({**json.loads(cfg.read_text()), **settings}))
    assert named in refusal(capsys, path, tmp_path / "out", options)


# ---- command line ----


def with_seeds(checkpoint, path):
    """A copy of a checkpoint with seeded weights: those of 6 iterations would hardly show a class."""
    ema = with_seeded_weights(load(checkpoint)).state_dict()
    plain = {name: x if name.endswith("pos_embed") else 0.9 * x for name, x in ema.items()}
    torch.save({**read_checkpoint(checkpoint), "model": plain, "ema": ema}, path)
    return path


@pytest.fixture(scope="module")
def seeded(trained, tmp_path_factory):
    return with_seeds(trained, tmp_path_factory.mktemp("seeded") / "last.pt")


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A working folder with a wide photo, and a tall grey one with alpha."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (20, 50, 3), dtype=np.uint8)).save("a.png")
    Image.fromarray(rng.integers(0, 256, (50, 20, 2), dtype=np.uint8), "LA").save("b.png")


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def assert_singles_are(images, out):
    """The folder's single images are these in [-1, 1], each rounded to 8 bits."""
    assert sorted(p.name for p in (out / "images").iterdir()) == [f"{i:06d}.png" for i in range(len(images))]
    for i, image in enumerate(images):
        written = pixels(out / "images" / f"{i:06d}.png")
        assert abs(written - ((image + 1) * 127.5).permute(1, 2, 0).numpy()).max() <= 0.51


def test_single_images_depend_on_seed_and_index_alone(seeded, tmp_path):
    run(seeded, tmp_path / "a", "--steps 2 --seed 4 --singles --count 7 --batch-size 3")
    run(seeded, tmp_path / "b", "--steps 2 --seed 4 --singles --count 12")
    x = generate(load(seeded), [*range(10), 0, 1], 2, seed=4)
    assert_singles_are(x[:7], tmp_path / "a")
    assert_singles_are(x, tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["generate.png", "images"]


@pytest.mark.parametrize("options, meaning", [
    ("--steps 3", dict(steps=3)), ("--cfg 2", dict(cfg=2.0)), ("--seed 9", dict(seed=9)),
    ("--no-ema", {}), ("--classes 3 10", dict(y=[3, 10, 3, 10])),
    ("--sampling shared=False", dict(shared=False)), ("--sampling official=True", dict(official=True)),
    ("--cfg 2 --sampling position=decoder", dict(cfg=2.0, position="decoder")),
    ("--sampling gamma=1 alpha=60", dict(gamma=1.0, alpha=60.0)), ("--sampling bound=0.5", dict(bound=0.5)),])
def test_every_option_of_the_command_reaches_algorithm_1(seeded, tmp_path, options, meaning):
    run(seeded, tmp_path, "--count 4 --steps 2 --singles " + options)
    model = load(seeded, ema="--no-ema" not in options)
    x = generate(model, **{**dict(y=[0, 1, 2, 3], steps=2), **meaning})
    assert_singles_are(x, tmp_path)
    assert (x - generate(load(seeded), [0, 1, 2, 3], 2)).abs().max() > 0.03


def places(drawn, image):
    """Where a picture shows an image of 16 x 16 pixels, three times as large, within white lines of three
    pixels: (row, pixels from the left)."""
    image = np.pad(image.repeat(3, axis=0).repeat(3, axis=1), ((3, 3), (3, 3), (0, 0)), constant_values=255)
    return [(row, x) for row in range((len(drawn) - 37) // 51) for x in range(drawn.shape[1] - 53)
            if np.array_equal(drawn[26 + 51 * row:80 + 51 * row, x:x + 54], image)]


@pytest.mark.parametrize("classes, names, count, row_of", [("3 10", ["3", "null"], 5, lambda i: i % 2),
    ("0 1 2 3 4 5 6 7 8 9 10 0 1 2 3 4 5", [], 33, lambda i: i // 6)])
def test_pictures_have_a_row_per_class_with_its_name_or_make_a_square(
        seeded, tmp_path, classes, names, count, row_of):
    run(seeded, tmp_path, f"--count {count} --steps 1 --singles --classes {classes}")
    drawn, rows = pixels(tmp_path / "generate.png"), {}
    for i in range(count):
        for row, x in places(drawn, pixels(tmp_path / "images" / f"{i:06d}.png")):
            rows.setdefault(row, []).append((i, x))
    assert sum(map(len, rows.values())) == count
    for row, images in rows.items():
        assert all(row_of(i) == row for i, _ in images) and (np.diff([x for _, x in images]) == 51).all()
    words = np.asarray(picture({"": torch.zeros(len(rows), 1, 3, 16, 16)}, names))
    left = rows[0][0][1]
    assert np.array_equal(drawn[26:, :left], words[26:, :left])


@pytest.mark.parametrize("kind, options, named", [*(("trained", *mistake) for mistake in (
        ("--steps 0", "steps"), ("--cfg nan", "nan"), ("--device abacus", "abacus"),
        ("--classes 0 1 11 --batch-size 2 --singles", "11"), ("--sampling position=left", "left"),
        ("--sampling colour=red", "colour=red is none of"), ("--sampling gamma=red", "gamma=red is none of"),
        ("--sampling project_last=True", "project_last; drop it"), ("reconstruct", "--images"),
        ("reconstruct --images a.png x.png", "x.png"), ("crossover --images a.png", "two"),
        ("crossover --images a.png b.png --sampling r=1.75", "r in [0, 1]"),
        ("crossover --images a.png b.png --sampling bound=1", "bound"),
        ("manipulate --images a.png b.png", "one"), ("--mask diagonal", "no mask"),
        ("crossover --images a.png b.png --classes 3 4", "one of --classes"), ("--cfg 1e308", "--cfg"),
        ("reconstruct --images a.png --steps 3", "no steps"), ("interpolate --count 5", "no count"))),
    ("tiny_tokenizer", "--classes 1", "null"), ("tiny_tokenizer", "--cfg 2", "model without classes"),
    ("tiny_tokenizer", "manipulate --images a.png", "classes"),
    ("trained_latent", "--sampling position=encoder", "position; drop it"),
    ("trained_latent", "crossover --images a.png b.png", "Sphere Encoder")])
def test_mistakes_of_the_command_are_one_line_and_leave_nothing(
        photos, tmp_path, capsys, request, kind, options, named):
    assert named in refusal(capsys, request.getfixturevalue(kind), tmp_path / "out", options)


@pytest.mark.parametrize("words, drawn", [
    ("a null b", [0, 3, 2, 0]), ("10 1 2", [1, 1, 2, 1]), ("0", [0, 0, 0, 0])])
def test_classes_are_asked_for_by_name_or_by_number_where_there_is_no_such_name(
        model, tmp_path, monkeypatch, capsys, words, drawn):
    """Class 1 is called 10."""
    model.class_names, model.num_classes, model.preset = ["a", "10", "b"], 3, {}
    monkeypatch.setattr(sample, "load", lambda *args: model)
    run("any.pt", tmp_path, f"--count 4 --steps 1 --singles --classes {words}")
    assert_singles_are(generate(model, drawn, 1), tmp_path)
    assert "a, 10, b, null or their numbers" in refusal(capsys, "any.pt", tmp_path / "none", "--classes 4")


def test_images_in_an_npz_file_are_those_of_single_files(trained, tmp_path):
    for out, kind in (("a", ""), ("b", "npz")):
        run(trained, tmp_path / out, f"--count 5 --steps 1 --batch-size 2 --singles {kind}")
    with np.load(tmp_path / "b" / "images.npz") as file:
        assert file["arr_0"].shape == (5, 16, 16, 3) and file["arr_0"].dtype == np.uint8
        for i, image in enumerate(file["arr_0"]):
            assert np.array_equal(image, Image.open(tmp_path / "a" / "images" / f"{i:06d}.png"))


@pytest.mark.parametrize("kind, place", [("png", "images"), ("npz", "images.npz")])
def test_a_picture_may_be_drawn_again_but_single_images_are_never_overwritten(
        trained, tmp_path, capsys, kind, place):
    run(trained, tmp_path, "--count 2 --steps 1")
    once = (tmp_path / "generate.png").read_bytes()
    run(trained, tmp_path, f"--count 2 --steps 2 --singles {kind}")
    again = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    assert again[tmp_path / "generate.png"] != once and len(again) == {"png": 3, "npz": 2}[kind]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(trained, tmp_path, f"--count 2 --steps 3 --singles {kind}")
    assert str(tmp_path / place) in one_line(capsys, "sample.py: ")
    assert again == {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}


# ---- Algorithm 1 of the Sphere Latent Encoder ----


def test_latent_guidance_acts_on_latents_at_every_step(denoiser):
    e, sigma_max = noise(denoiser)[0], angle_to_sigma(70.0)
    guided = lambda v: denoiser(v) + 2.25 * (denoiser(v, Y) - denoiser(v))
    x = denoiser.tokenizer.decode(guided(add_noise(spherify(guided(spherify(e))), sigma_max, e)))
    drawn = generate_latent(denoiser, Y, 2, 2.25, gamma=0.0, seed=5)
    torch.testing.assert_close(drawn, x, rtol=1e-4, atol=1e-5)


def test_latent_sampling_decodes_once_and_denoises_once_per_step_without_guidance(denoiser, monkeypatch):
    decodes, passes = [], []
    whole = denoiser.tokenizer.decode
    monkeypatch.setattr(denoiser.tokenizer, "decode", lambda z: decodes.append(1) or whole(z))
    denoiser.register_forward_hook(lambda *_: passes.append(1))
    generate_latent(denoiser, Y, 5)
    assert (len(decodes), len(passes)) == (1, 5)
    generate_latent(denoiser, Y, 5, 1.5)
    assert (len(decodes), len(passes)) == (2, 15)


class PlainTokenizer:
    """A decoder that shows the latent itself: one that sees its scale."""

    latent_shape, image_size = (15, 7), (15, 7)

    def decode(self, z):
        return 0.01 * z[:, None].expand(-1, 3, -1, -1)


def test_the_last_prediction_is_decoded_raw_or_projected(denoiser):
    denoiser.attach(PlainTokenizer())
    raw, projected = (100 * generate_latent(denoiser, Y, 2, project_last=p)[:, 0] for p in (False, True))
    torch.testing.assert_close(projected, spherify(raw), rtol=1e-4, atol=1e-4)
    assert (projected - raw).abs().max() > 0.1


def test_a_preset_brings_its_own_sampling(denoiser):
    own = sampler(denoiser)(denoiser, Y, 4)
    assert torch.equal(own, generate_latent(denoiser, Y, 4, gamma=1.0, shared=True, alpha=70.0))
    denoiser.sampling = {"gamma": 0.0, "shared": False}
    own, given = (sampler(denoiser)(denoiser, Y, 4, **options) for options in ({}, {"gamma": 0.5}))
    assert torch.equal(own, generate_latent(denoiser, Y, 4, gamma=0.0, shared=False))
    assert torch.equal(given, generate_latent(denoiser, Y, 4, gamma=0.5, shared=False))


def test_a_latent_checkpoint_is_rebuilt_from_the_file_alone_and_drawn(
        trained_latent, tiny_tokenizer, tmp_path):
    path = with_seeds(trained_latent, tmp_path / "last.pt")
    loaded, tokenizer = load(path), load(tiny_tokenizer)
    assert loaded.class_names == [str(k) for k in range(10)]
    for name, weight in tokenizer.state_dict().items():
        assert torch.equal(weight, loaded.tokenizer.model.state_dict()[name])
    run(path, tmp_path, "--count 3 --singles --steps 2 --sampling shared=False gamma=0")
    x = generate_latent(loaded, torch.arange(3), 2, shared=False, gamma=0.0)
    assert_singles_are(x, tmp_path)
    assert (x - generate_latent(loaded, torch.arange(3), 2, gamma=0.0)).abs().max() > 0.01


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "notebooks" / "models").glob("*.pt")))
def test_the_models_of_the_notebooks_give_known_samples(name):
    """One of each class at two steps, in 8 bits; models.npz holds what the machine that trained them drew."""
    model = load(ROOT / "notebooks" / "models" / f"{name}.pt")
    x = to_uint8((sampler(model)(model, [*range(model.num_classes)], 2) + 1) / 2)[:, 0].int()
    known = np.load(ROOT / "tests" / "models.npz")[name].astype(int)
    assert len(x) == len(model.class_names) == len(known) and np.abs(x.numpy() - known).max() <= 3


# ---- editing ----


def corners(model, count=2, seed=5):
    return sample_noise(seed, 0, count, model.latent_shape)[0]


@pytest.mark.parametrize("kind", ["model", "denoiser"])
def test_ends_of_an_interpolation_are_samples_and_its_middle_has_gaussian_noise_in_all_steps(kind, request):
    net = request.getfixturevalue(kind)
    draw, y, e = sampler(net), torch.tensor([0, 3]), corners(net)
    x = sample.interpolate(net, y, sample.line(5), 3, seed=5)
    torch.testing.assert_close(x[::4], draw(net, y, 3, seed=5), rtol=1e-4, atol=1e-5)
    mixed = torch.tensor([[0.5, 0, 0, 0.5, 0]])
    middle = draw(net, mixed, 3, e=(e[:1] + e[1:]) / 2**0.5)            # of variance 1
    torch.testing.assert_close(x[2:3], middle, rtol=1e-4, atol=1e-5)
    assert (x[1:] - x[:-1]).abs().amax((1, 2, 3)).min() > 1e-3


def test_the_middle_of_a_line_mixes_noise_and_class_vectors_linearly(model):
    e = corners(model)
    x = sample.interpolate(model, torch.tensor([0, 3]), sample.line(3), 1, seed=5)[1]
    tables = [network.y_embedder.embedding_table.weight for network in (model.encoder, model.decoder)]
    for table in tables:
        table.data[4] = (table[0] + table[3]) / 2                           # the mixture, as the null class
    torch.testing.assert_close(x[None], model.decode(spherify((e[:1] + e[1:]) / 2)), rtol=1e-4, atol=1e-5)


def test_a_circle_is_closed_and_passes_both_corners_and_their_opposites(model):
    y, e, mixing = torch.tensor([0, 3]), corners(model), sample.circle(8)
    x = sample.interpolate(model, y, mixing, 1, shares=mixing.square(), seed=5)
    at = model.decode(spherify(torch.cat([e, -e])), torch.tensor([0, 3, 0, 3]))
    torch.testing.assert_close(x[::2], at, rtol=1e-4, atol=1e-5)
    turns = angle_between(*(spherify(torch.einsum("fc,cnd->fnd", mixing.roll(k, 0), e)) for k in (0, 1)))
    assert (turns - 45).abs().max() < 5                     # equal steps, the last one back to the first


def test_a_square_is_bilinear_between_its_four_corners():
    mixing = sample.square(3).view(3, 3, 4)
    assert torch.equal(mixing[[0, 0, 2, 2], [0, 2, 0, 2]], torch.eye(4))
    assert mixing[1, 1].tolist() == [0.25] * 4 and mixing[0, 1].tolist() == [0.5, 0.5, 0, 0]
    torch.testing.assert_close(mixing.sum(-1), torch.ones(3, 3))


def photo(model, batch=2, seed=0):
    return torch.rand(batch, 3, *model.image_size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_an_edit_is_its_passes_written_out(model):
    x, y, e, sigma_max = photo(model), torch.tensor([1, 2]), corners(model), angle_to_sigma(model.alpha_max)
    images = sample.edit(model, x, y, 3, r=0.5, gamma=1.0, seed=5)
    assert images.shape == (4, 2, 3, 12, 20) and torch.equal(images[0], x)
    for t, share in enumerate((2 / 3, 1 / 3, 0.0)):                         # step_schedule(4, 1)
        v = add_noise(spherify(model.encode(images[t], y)), 0.5 * share * sigma_max, e)
        torch.testing.assert_close(images[t + 1], model.decode(v, y), rtol=1e-4, atol=1e-5)


def test_manipulation_draws_one_image_as_every_class_at_full_noise(model):
    x = photo(model, 1)[0]
    images = sample.manipulate(model, x, [0, 3], 2, seed=5)
    expected = sample.edit(model, torch.stack([x, x]), torch.tensor([0, 3]), 2, r=1.0, gamma=0.0, seed=5)
    assert torch.equal(images, expected) and images.shape[:2] == (3, 2)
    assert (images[1, 0] - images[1, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("name, here", [
    ("left-right", lambda row, column: column < 0.5), ("top-bottom", lambda row, column: row < 0.5),
    ("diagonal", lambda row, column: row > column), ("anti-diagonal", lambda row, column: row + column < 1),])
def test_a_crossover_begins_with_its_stitched_image_and_ends_elsewhere(model, name, here):
    a, b = photo(model), photo(model, seed=1)
    images = sample.crossover(model, a, b, torch.tensor([1, 2]), 2, mask=name, seed=5)
    for i, j in ((0, 0), (0, 19), (11, 0), (11, 19), (5, 3), (2, 15)):
        source = a if here((i + 0.5) / 12, (j + 0.5) / 20) else b
        assert torch.equal(images[0, :, :, i, j], source[:, :, i, j])
    expected = sample.edit(model, images[0], torch.tensor([1, 2]), 2, r=0.25, gamma=1.0, seed=5)
    torch.testing.assert_close(images, expected)
    null = sample.crossover(model, a, b, None, 2, mask=name)
    assert torch.equal(null, sample.crossover(model, a, b, torch.tensor([4, 4]), 2, mask=name))


def test_image_files_are_resized_by_the_shorter_side_and_cropped_at_the_centre(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    x = sample.open_images([tmp_path / "wide.png"] * 2, (8, 10))
    assert x.shape == (2, 3, 8, 10) and x[..., 1:-1].min() > 0.95 and x.max() <= 1


def lines(model, y, mixing, **options):
    """Five interpolations one after the other, between classes in turn."""
    return torch.cat([sample.interpolate(model, y[k:k + 2], mixing, 4, first=k, **options)
                      for k in range(0, 10, 2)])


@pytest.mark.parametrize("options, expected", [
    ("reconstruct --images a.png b.png", lambda m, x: reconstruct(m, x)),
    ("reconstruct --images a.png b.png --classes 3", lambda m, x: reconstruct(m, x, torch.tensor([3, 3]))),
    ("interpolate --frames 3", lambda m, x: lines(m, [*range(10)], sample.line(3))),
    ("interpolate --frames 3 --way circle --classes 3 8 1 --seed 2",
     lambda m, x: lines(m, 4 * [3, 8, 1], sample.circle(3), shares=sample.circle(3).square(), seed=2)),
    ("interpolate --frames 3 --way square --steps 2 --cfg 2 --sampling gamma=1",
     lambda m, x: sample.interpolate(m, [0, 1, 2, 3], sample.square(3), 2, 2.0, gamma=1)),
    ("crossover --images a.png b.png --steps 3",
     lambda m, x: sample.crossover(m, *x.split(1), steps=3)[1:, 0]),
    ("manipulate --images a.png --classes 1 2 3 --steps 2",
     lambda m, x: sample.manipulate(m, x[0], [1, 2, 3], 2)[1:].transpose(0, 1).flatten(0, 1)),])
def test_every_word_writes_what_its_function_gives_and_shows_it(seeded, photos, tmp_path, options, expected):
    run(seeded, tmp_path, options + " --singles")
    model = load(seeded)
    assert_singles_are(expected(model, sample.open_images(["a.png", "b.png"], model.image_size)), tmp_path)
    drawn = pixels(f"{options.split()[0]}.png")
    assert all(places(drawn, pixels(path)) for path in (tmp_path / "images").iterdir())


def test_an_interpolation_is_animated_and_a_denoiser_interpolates_too(trained_latent, tmp_path):
    for way, frames in (("line", 4), ("circle", 3)):        # there and back; once around
        run(trained_latent, tmp_path / way, f"interpolate --frames 3 --gif --way {way} --classes 1 2 3")
        with Image.open(tmp_path / way / "interpolate.gif") as animation:   # equal neighbours are one frame
            assert sum(frame.info["duration"] for frame in ImageSequence.Iterator(animation)) == frames * 80
            assert animation.size == (5 * 98 + 2, 98 + 2)               # five walks side by side, enlarged


@pytest.mark.parametrize("options", [
    "--sampling r=0.9", "--sampling gamma=0", "--sampling shared=False", "--sampling alpha=50", "--classes 3",
    "--mask diagonal", "--steps 3", "--seed 2", "--cfg 2", "--sampling position=encoder"])
def test_every_option_of_a_crossover_reaches_its_picture(seeded, photos, options):
    for out, more in (("plain", ""), ("other", options)):
        run(seeded, out, f"crossover --images a.png b.png --classes 1 --cfg 1.5 --steps 4 {more}")
    plain, other = (pixels(f"{out}/crossover.png") for out in ("plain", "other"))
    assert plain.shape != other.shape or (plain != other)[26:].any()            # beneath the titles
