import json
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from conftest import ROOT, one_line, with_seeded_weights
from models import SphereEncoder, convert_official
from sample import generate, generate_latent, load, main, picture, read_checkpoint, reconstruct
from spherify import add_noise, angle_to_sigma, sample_noise, spherify, truncate_noise
from test_models import CFG, golden_model, released

Y = torch.tensor([0, 1, 3])


def noise(model, draws=1, batch=3, seed=5):
    return sample_noise(seed, 0, batch, model.latent_shape, draws)


# ---- Algorithm 1 ----


def test_one_step_decodes_a_random_point(model):
    x = generate(model, Y, 1, seed=5)
    assert torch.equal(x, model.decode(spherify(noise(model)[0]), Y))


def test_three_steps_are_algorithm_1_written_out(model):
    e, sigma_max = noise(model)[0], angle_to_sigma(model.alpha_max)
    x = model.decode(spherify(e), Y)
    for r in (0.5, 0.0):                                                    # gamma = 1, T = 3
        x = model.decode(add_noise(spherify(model.encode(x, Y)), r * sigma_max, e), Y)
    torch.testing.assert_close(generate(model, Y, 3, gamma=1.0, seed=5), x)


def test_fresh_noise_takes_draw_t_for_step_t(model):
    e, sigma_max = noise(model, draws=3), angle_to_sigma(70.0)
    x = model.decode(spherify(e[0]), Y)
    for t in (1, 2):
        x = model.decode(add_noise(spherify(model.encode(x, Y)), sigma_max, e[t]), Y)
    torch.testing.assert_close(generate(model, Y, 3, alpha=70.0, shared=False, seed=5), x)
    assert (generate(model, Y, 3, alpha=70.0, seed=5) - x).abs().max() > 1e-3


def test_the_official_sampler_shares_noise_from_step_two_and_ends_its_decay_at_one_over_T(model):
    e, sigma_max = noise(model, draws=2), angle_to_sigma(model.alpha_max)
    x = model.decode(spherify(e[0]), Y)
    for r in (2 / 3, 1 / 3):                                                # gamma = 1, T = 3
        x = model.decode(add_noise(spherify(model.encode(x, Y)), r * sigma_max, e[1]), Y)
    torch.testing.assert_close(generate(model, Y, 3, gamma=1.0, seed=5, official=True), x)
    assert torch.equal(generate(model, Y, 1, seed=5, official=True), generate(model, Y, 1, seed=5))
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


@pytest.mark.parametrize("position", ["encoder", "decoder", "combo"])
def test_guidance_scale_one_is_no_guidance_and_no_second_pass(model, position, monkeypatch):
    plain = generate(model, Y, 3)
    calls = []
    whole = model.decode
    monkeypatch.setattr(model, "decode", lambda *inputs: calls.append(1) or whole(*inputs))
    assert torch.equal(generate(model, Y, 3, 1.0, position=position), plain)
    assert len(calls) == 3


def test_guidance_towards_the_null_class_changes_nothing(model):
    null = torch.full((3,), model.num_classes)
    torch.testing.assert_close(generate(model, null, 2, 4.0), generate(model, null, 2), rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("change", [
    dict(steps=3), dict(cfg=2.0), dict(alpha=60.0), dict(gamma=1.0), dict(shared=False), dict(seed=1),
    dict(first=1), dict(cfg=2.0, position="decoder"), dict(y=torch.tensor([0, 1, 2])), dict(official=True),
    dict(bound=0.5),
])
def test_every_option_changes_the_result(model, change):
    base = dict(y=Y, steps=4)
    assert (generate(model, **base) - generate(model, **{**base, **change})).abs().max() > 1e-4


def test_gamma_one_adds_no_noise_at_the_last_step(model):
    e = noise(model, draws=2)
    other = torch.stack([e[0], 9 * e[1]])
    one, two = (generate(model, Y, 2, gamma=1.0, shared=False, e=n) for n in (e, other))
    assert torch.equal(one, two)


@pytest.mark.parametrize("shared", [True, False])
def test_a_bound_truncates_the_start_alone(model, shared):
    e = noise(model, 2)
    later = e[:1] if shared else e[1:]
    assert torch.equal(generate(model, Y, 2, seed=5, shared=shared, bound=0.5),
                       generate(model, Y, 2, shared=False, e=torch.cat([truncate_noise(e[:1], 0.5), later])))


def test_given_noise_replaces_the_seeded_one(model):
    assert torch.equal(generate(model, Y, 3, e=noise(model)[0]), generate(model, Y, 3, seed=5))
    assert torch.equal(generate(model, Y, 3, shared=False, e=noise(model, 3)),
                       generate(model, Y, 3, shared=False, seed=5))


@pytest.mark.parametrize("shared", [True, False])
def test_images_do_not_depend_on_the_batch(model, shared):
    y = torch.arange(16) % 4
    whole = generate(model, y, 3, 1.5, seed=2, shared=shared)
    parts = torch.cat([generate(model, y[i:i + 3], 3, 1.5, seed=2, first=i, shared=shared)
                       for i in range(0, 16, 3)])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


def test_an_unconditional_model_samples_with_the_null_class(unconditional):
    x = generate(unconditional, torch.zeros(2, dtype=torch.int64), 2)
    assert x.shape == (2, 3, 12, 20) and not x.requires_grad


def test_reconstruction_adds_no_noise_and_defaults_to_the_null_class(model):
    x = generate(model, Y, 1)
    torch.testing.assert_close(reconstruct(model, x), model.decode(spherify(model.encode(x))))
    torch.testing.assert_close(reconstruct(model, x, Y), model.decode(spherify(model.encode(x, Y)), Y))


@pytest.mark.parametrize("change, named", [
    (dict(y=torch.tensor([0, 5])), "5"), (dict(y=torch.tensor([-1])), "-1"),
    (dict(y=torch.tensor([[1]])), "[[1]]"), (dict(y=torch.tensor([0.5])), "0.5"), (dict(steps=0), "0"),
    (dict(cfg=-1.0), "-1.0"), (dict(cfg=math.nan), "nan"), (dict(alpha=90.0), "90.0"),
    (dict(gamma=-1.0), "-1.0"), (dict(position="middle"), "middle"), (dict(seed=-1), "-1"),
    (dict(bound=-2.0), "-2.0"),
    (dict(e=torch.zeros(2, 15, 7)), "[1, 2, 15, 7]"),
    (dict(e=torch.zeros(3, 15, 7), shared=False), "[1, 3, 15, 7]"),
])
def test_bad_sampling_options_are_named(model, change, named):
    with pytest.raises(ValueError) as error:
        generate(model, **{**dict(y=Y, steps=2), **change})
    assert named in str(error.value)


def test_guidance_without_classes_is_refused(unconditional):
    with pytest.raises(ValueError, match="unconditional|conditional model"):
        generate(unconditional, torch.zeros(2, dtype=torch.int64), 2, 1.5)


# ---- checkpoints ----


def test_a_checkpoint_alone_rebuilds_the_model(trained):
    stored = read_checkpoint(trained)
    for ema in (True, False):
        model = load(trained, ema=ema)
        assert not model.training and model.config == stored["config"] and model.class_names[7] == "7"
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, stored["ema" if ema else "model"][name])
    assert stored["use_ema"]
    assert torch.equal(load(trained).decoder.ffn.linear.weight, stored["ema"]["decoder.ffn.linear.weight"])


class Explosive:
    def __reduce__(self):
        return (open, ("exploded", "w"))


@pytest.mark.parametrize("damage", ["text", "empty", "truncated", "flipped", "pickle", "code", "other",
                                    "keys", "config", "weights"])
def test_what_is_no_checkpoint_is_refused_in_one_line(damage, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, good, checkpoint = tmp_path / "bad.pt", trained.read_bytes(), dict(read_checkpoint(trained))
    middle = len(good) // 2
    raw = {"text": b"hello", "empty": b"", "truncated": good[:20_000], "pickle": pickle.dumps(Explosive()),
           "flipped": good[:middle] + bytes([good[middle] ^ 64]) + good[middle + 1:]}
    if damage in raw:
        path.write_bytes(raw[damage])
    elif damage == "keys":
        torch.save({key: value for key, value in checkpoint.items() if key != "optimizer"}, path)
    else:
        change = {"code": {"preset": Explosive()},
                  "config": {"config": {**checkpoint["config"], "colour": 1}},
                  "weights": {"ema": dict(list(checkpoint["ema"].items())[:-1])}, "other": {"kind": "other"}}
        torch.save({**checkpoint, **change[damage]}, path)
    with pytest.raises(SystemExit) as exit:
        main(["--checkpoint", str(path), "--out", str(tmp_path / "out")])
    assert exit.value.code == 2 and str(path) in one_line(capsys, "sample.py: ")
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "out").exists()


# ---- checkpoints of the official code ----


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
    return tmp_path, model.eval()


def test_a_checkpoint_of_the_official_code_is_sampled_with_its_configuration(official, tmp_path):
    folder, model = official
    plain = load(folder / "ep0007.pth", config=folder / "cfg.json")
    assert torch.equal(generate(plain, Y, 2), generate(model, Y, 2, alpha=85.0))
    assert not torch.equal(generate(plain, Y, 2),
                           generate(load(folder / "ep0007.pth", ema=True, config=folder / "cfg.json"), Y, 2))
    main(["--checkpoint", str(folder / "ep0007.pth"), "--config", str(folder / "cfg.json"), "--count", "3",
          "--out", str(tmp_path / "out"), "--singles"])
    assert len(list((tmp_path / "out").iterdir())) == 4


class Code:
    def __reduce__(self):
        return print, ("this must not be printed",)


@pytest.mark.parametrize("damage, named", [
    ("truncated", "not a readable checkpoint"), ("flipped bit", "checksum"),
    ("code", "not a readable checkpoint"), ("no model", "no weights 'model'"),
    ("missing key", "decoder.ffn.linear.bias is missing"),
    ("other sizes", "do not fit"), ("no cfg", "cfg.json: no such file"), ("cfg no json", "not a cfg.json"),
    ("cfg a list", "not a cfg.json"), ("cfg key", "'patch_size' is missing"), ("cfg value", "got 'large'"),
    ("without config", "--config"),
])
def test_damaged_official_checkpoints_are_refused_in_one_line(official, capsys, damage, named):
    folder, _ = official
    path, cfg = folder / "ep0007.pth", folder / "cfg.json"
    content = torch.load(path)
    raw = bytearray(path.read_bytes())
    settings = json.loads(cfg.read_text())
    if damage == "truncated":
        path.write_bytes(raw[:len(raw) // 2])
    elif damage == "flipped bit":
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    elif damage == "code":
        torch.save({**content, "args": Code()}, path)
    elif damage == "no model":
        torch.save({"epoch": 7}, path)
    elif damage == "missing key":
        content["model"].pop("_orig_mod.decoder.ffn.linear.bias")
        torch.save(content, path)
    elif damage == "other sizes":
        cfg.write_text(json.dumps({**settings, "token_channels": 6}))
    elif damage == "no cfg":
        cfg.unlink()
    elif damage == "cfg no json":
        cfg.write_text("lr: 1")
    elif damage == "cfg a list":
        cfg.write_text("[1]")
    elif damage == "cfg key":
        settings.pop("patch_size")
        cfg.write_text(json.dumps(settings))
    elif damage == "cfg value":
        cfg.write_text(json.dumps({**settings, "image_size": "large"}))
    options = [] if damage == "without config" else ["--config", str(cfg)]
    with pytest.raises(SystemExit) as exit:
        main(["--checkpoint", str(path), "--out", str(folder / "out"), *options])
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert exit.value.code == 2 and printed.out == ""
    assert len(lines) == 1 and lines[0].startswith("sample.py: ") and named in lines[0]
    assert not (folder / "out").exists()


# ---- command line ----


def run(trained, out, *options):
    return main(["--checkpoint", str(trained), "--out", str(out), "--device", "cpu", *options])


def test_the_command_writes_a_grid_and_singles_that_depend_on_their_index_alone(trained, tmp_path):
    run(trained, tmp_path / "a", "--count", "7", "--steps", "2", "--singles", "--batch-size", "3",
        "--seed", "4")
    run(trained, tmp_path / "b", "--count", "12", "--steps", "2", "--singles", "--seed", "4")
    assert (sorted(p.name for p in (tmp_path / "a").iterdir())
            == [f"{i:06d}.png" for i in range(7)] + ["samples.png"])
    for i in range(7):
        a, b = (np.asarray(Image.open(tmp_path / f / f"{i:06d}.png")).astype(int) for f in "ab")
        assert a.shape == (16, 16, 3) and abs(a - b).max() <= 1
    x = generate(load(trained), torch.tensor([5]), 2, seed=4, first=5)      # sample 5 of all has class 5
    written = np.asarray(Image.open(tmp_path / "a" / "000005.png"))
    assert abs(written - ((x[0] + 1) * 127.5).permute(1, 2, 0).numpy()).max() < 1


@pytest.mark.parametrize("options, meaning", [
    (["--steps", "3"], dict(steps=3)), (["--cfg", "2"], dict(cfg=2.0)), (["--fresh"], dict(shared=False)),
    (["--official"], dict(official=True)),
    (["--cfg", "2", "--position", "decoder"], dict(cfg=2.0, position="decoder")),
    (["--gamma", "1"], dict(gamma=1.0)), (["--alpha", "60"], dict(alpha=60.0)),
    (["--seed", "9"], dict(seed=9)), (["--no-ema"], dict(ema=False)),
    (["--classes", "3,10"], dict(y=[3, 10, 3, 10])), (["--bound", "0.5"], dict(bound=0.5)),
])
def test_every_option_of_the_command_reaches_algorithm_1(trained, tmp_path, options, meaning):
    run(trained, tmp_path, "--count", "4", "--steps", "2", "--singles", *options)
    settings = {**dict(y=[0, 1, 2, 3], steps=2), **meaning}
    model = load(trained, ema=settings.pop("ema", None))
    expected = generate(model, settings.pop("y"), **settings)
    for i in range(4):
        drawn = np.asarray(Image.open(tmp_path / f"{i:06d}.png"))
        assert abs(drawn - ((expected[i] + 1) * 127.5).permute(1, 2, 0).numpy()).max() <= 0.51


def test_grids_have_a_row_per_class_or_a_caption_per_image(trained, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        sample, "picture",
        lambda panels, **names: seen.append((*panels.values(), names)) or Image.new("L", (1, 1)))
    run(trained, tmp_path / "rows", "--count", "5", "--steps", "1", "--classes", "3,5")
    run(trained, tmp_path / "captions", "--count", "5", "--steps", "1", "--classes", "7")
    x = generate(load(trained), [3, 5, 3, 5, 3], 1)
    images, names = seen[0]
    assert names == {"row_names": ["3", "5"]} and images.shape[:2] == (2, 3)
    torch.testing.assert_close(images[0], x[[0, 2, 4]])
    torch.testing.assert_close(images[1], torch.cat([x[[1, 3]], torch.ones_like(x[:1])]))       # a white cell
    images, names = seen[1]
    assert names == {"captions": ["7"] * 5 + [""]} and images.shape[:2] == (2, 3)


def test_a_picture_shows_every_image_where_it_belongs():
    images = torch.linspace(-0.9, 0.8, 6).view(2, 3, 1, 1, 1).expand(-1, -1, 3, 48, 48)
    drawn = np.asarray(picture({"one": images, "two": -images}, ["a", "b"]))[:, :, 0].astype(int)
    for row in range(2):
        line = drawn[26 + 50 * row + 25]
        runs = [value for value, length in run_lengths(line) if length == 48]
        expected = [round(((value + 1) * 127.5).item())
                    for value in [*images[row, :, 0, 0, 0], *-images[row, :, 0, 0, 0]]]
        assert runs == pytest.approx(expected, abs=1)


def run_lengths(line):
    ends = [*np.flatnonzero(np.diff(line)), len(line) - 1]
    return [(line[end], end - start) for start, end in zip([-1, *ends], ends)]


@pytest.mark.parametrize("options, named", [
    (["--steps", "0"], "steps must"), (["--steps", "many"], "many"), (["--cfg", "-2"], "-2"),
    (["--count", "0"], "--count"), (["--classes", "0,1,11", "--batch-size", "2", "--singles"], "11"),
    (["--classes", "a"], "'a'"), (["--alpha", "90"], "90"), (["--gamma", "-1"], "gamma"),
    (["--position", "left"], "left"), (["--seed", "-1"], "seed"), (["--step", "3"], "--step"),
    (["--batch-size", "0"], "--batch-size"), (["--checkpoint", "nowhere.pt"], "nowhere.pt"),
    (["--device", "abacus"], "abacus"), (["--device", "meta"], "meta"),
])
def test_bad_options_are_one_line_and_leave_nothing(trained, tmp_path, capsys, options, named):
    with pytest.raises(SystemExit) as exit:
        run(trained, tmp_path / "out", *options)
    assert exit.value.code == 2 and named in one_line(capsys, "sample.py: ")
    assert not (tmp_path / "out").exists()


def test_classes_of_an_unconditional_checkpoint_are_refused(trained, tmp_path, capsys):
    model = with_seeded_weights(SphereEncoder(16, 4, 4, 0, (16, 1, 2), (16, 1, 2), 1))
    torch.save({**read_checkpoint(trained), "config": model.config, "class_names": [], "use_ema": False,
                "model": model.state_dict()}, tmp_path / "last.pt")
    run(tmp_path / "last.pt", tmp_path / "out", "--count", "5")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(tmp_path / "last.pt", tmp_path / "out2", "--classes", "1")
    assert "unconditional" in one_line(capsys, "sample.py: ")


def test_samples_are_never_overwritten(trained, tmp_path, capsys):
    run(trained, tmp_path, "--count", "2", "--steps", "1")
    before = (tmp_path / "samples.png").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        run(trained, tmp_path, "--count", "2", "--steps", "2")
    assert exit.value.code == 2 and "already holds" in one_line(capsys, "sample.py: ")
    assert (tmp_path / "samples.png").read_bytes() == before


# ---- Algorithm 1 of the Sphere Latent Encoder ----


@pytest.mark.parametrize("shared", [True, False])
def test_latent_sampling_is_its_algorithm_1_written_out(denoiser, shared):
    e = noise(denoiser, draws=1 if shared else 3)
    e = e.expand(3, -1, -1, -1) if shared else e
    sigma_max = angle_to_sigma(70.0)
    z_hat = denoiser(spherify(e[0]), Y)
    for r, draw in ((0.5, 1), (0.0, 2)):                                    # gamma = 1, T = 3
        z_hat = denoiser(spherify(spherify(z_hat) + r * sigma_max * e[draw]), Y)
    x = denoiser.tokenizer.decode(z_hat)
    torch.testing.assert_close(generate_latent(denoiser, Y, 3, gamma=1.0, shared=shared, seed=5), x)


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


@pytest.mark.parametrize("change", [
    dict(steps=3), dict(cfg=2.0), dict(alpha=60.0), dict(gamma=0.0), dict(shared=False), dict(seed=1),
    dict(first=1), dict(y=torch.tensor([0, 1, 2])), dict(official=True),
])
def test_every_latent_option_changes_the_result(denoiser, change):
    base = dict(y=Y, steps=4)
    plain, changed = (generate_latent(denoiser, **options) for options in (base, {**base, **change}))
    assert (plain - changed).abs().max() > 1e-4


def test_a_denoiser_brings_its_own_schedule(denoiser):
    own = generate_latent(denoiser, Y, 4)
    assert torch.equal(own, generate_latent(denoiser, Y, 4, gamma=1.0, shared=True, alpha=70.0))
    denoiser.gamma, denoiser.shared = 0.0, False
    own = generate_latent(denoiser, Y, 4)
    assert torch.equal(own, generate_latent(denoiser, Y, 4, gamma=0.0, shared=False))


def test_latent_images_do_not_depend_on_the_batch(denoiser):
    y = torch.arange(16) % 4
    whole = generate_latent(denoiser, y, 3, 1.5, seed=2)
    parts = torch.cat([generate_latent(denoiser, y[i:i + 3], 3, 1.5, seed=2, first=i)
                       for i in range(0, 16, 3)])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


def test_reconstruction_of_a_denoiser_is_its_tokenizers(denoiser):
    x = torch.rand(2, 3, 12, 20) * 2 - 1
    assert torch.equal(reconstruct(denoiser, x), denoiser.tokenizer.decode(denoiser.tokenizer.encode(x)))


def test_a_denoiser_without_tokenizer_is_refused(denoiser):
    object.__setattr__(denoiser, "tokenizer", None)
    with pytest.raises(ValueError, match="needs a denoiser with a tokenizer"):
        generate_latent(denoiser, Y, 1)


def test_a_latent_checkpoint_is_rebuilt_from_the_file_alone_and_drawn(
        trained_latent, tiny_tokenizer, tmp_path):
    loaded, tokenizer = load(trained_latent), load(tiny_tokenizer)
    assert loaded.class_names == [str(k) for k in range(10)] and loaded.gamma == 1.0
    for name, weight in tokenizer.state_dict().items():
        assert torch.equal(weight, loaded.tokenizer.model.state_dict()[name])
    main(["--checkpoint", str(trained_latent), "--out", str(tmp_path / "a"), "--count", "3", "--singles",
          "--steps", "2", "--fresh", "--gamma", "0"])
    x = generate_latent(loaded, torch.arange(3), 2, shared=False, gamma=0.0)
    drawn = np.asarray(Image.open(tmp_path / "a" / "000001.png"), np.float32).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(drawn, x[1], atol=1 / 255)


@pytest.mark.parametrize("kind, flags, named", [
    ("latent", ["--position", "encoder"], "--position"), ("plain", ["--project-last"], "--project-last"),
    ("latent", ["--gamma", "-1"], "gamma"), ("latent", ["--cfg", "-1"], "cfg"),
])
def test_options_of_the_other_model_are_refused_in_one_line(
        trained, trained_latent, tmp_path, capsys, kind, flags, named):
    checkpoint = trained_latent if kind == "latent" else trained
    with pytest.raises(SystemExit) as exit:
        main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "a"), *flags])
    assert exit.value.code == 2 and named in one_line(capsys, "sample.py: ") and not (tmp_path / "a").exists()


# ---- editing ----


def corners(model, count=2, seed=5):
    return sample_noise(seed, 0, count, model.latent_shape)[0]


@pytest.mark.parametrize("kind", ["model", "denoiser"])
@pytest.mark.parametrize("spherical", [False, True])
def test_ends_of_an_interpolation_are_its_corners_and_frames_share_later_noise(kind, spherical, request):
    """With the noise of later steps given: that of corner 0 in every frame."""
    net = request.getfixturevalue(kind)
    draw, y, e = sample.sampler(net), torch.tensor([0, 3]), corners(net)
    x = sample.interpolate(net, y, sample.line(5), 3, spherical=spherical, seed=5)
    for frame, k in ((0, 0), (4, 1)):
        noise = torch.stack([e[k:k + 1], e[:1], e[:1]])
        end = draw(net, y[k:k + 1], 3, shared=False, e=noise)
        torch.testing.assert_close(x[frame:frame + 1], end, rtol=1e-4, atol=1e-5)
    assert (x[1:] - x[:-1]).abs().amax((1, 2, 3)).min() > 1e-3


def test_the_middle_of_a_line_mixes_noise_and_class_vectors_linearly(model):
    e = corners(model)
    x = sample.interpolate(model, torch.tensor([0, 3]), sample.line(3), 1, seed=5)[1]
    tables = [network.y_embedder.embedding_table.weight for network in (model.encoder, model.decoder)]
    for table in tables:
        table.data[4] = (table[0] + table[3]) / 2                           # the mixture, as the null class
    torch.testing.assert_close(x[None], model.decode(spherify((e[:1] + e[1:]) / 2)), rtol=1e-4, atol=1e-5)


def test_a_square_is_bilinear_between_its_four_corners():
    mixing = sample.square(3).view(3, 3, 4)
    assert torch.equal(mixing[[0, 0, 2, 2], [0, 2, 0, 2]], torch.eye(4))
    assert mixing[1, 1].tolist() == [0.25] * 4 and mixing[0, 1].tolist() == [0.5, 0.5, 0, 0]
    torch.testing.assert_close(mixing.sum(-1), torch.ones(3, 3))


@pytest.mark.parametrize("mixing, spherical", [(sample.line(3), False), (torch.rand(2), False),
                                               (sample.square(2)[:, :3], True)])
def test_corners_that_do_not_fit_the_mixing_are_named(model, mixing, spherical):
    with pytest.raises(ValueError, match="one class per corner"):
        sample.interpolate(model, torch.tensor([0, 1, 2]), mixing, 1, spherical=spherical)


def photo(model, batch=2, seed=0):
    return torch.rand(batch, 3, *model.image_size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_an_edit_is_its_passes_written_out(model):
    x, y, e, sigma_max = photo(model), torch.tensor([1, 2]), corners(model), angle_to_sigma(model.alpha_max)
    images = sample.edit(model, x, y, 3, r=0.5, gamma=1.0, seed=5)
    assert images.shape == (4, 2, 3, 12, 20) and torch.equal(images[0], x)
    for t, share in enumerate((2 / 3, 1 / 3, 0.0)):                         # step_schedule(4, 1)
        v = add_noise(spherify(model.encode(images[t], y)), 0.5 * share * sigma_max, e)
        torch.testing.assert_close(images[t + 1], model.decode(v, y), rtol=1e-4, atol=1e-5)


def test_one_pass_without_noise_is_the_reconstruction_of_the_input_and_no_random_sample(model):
    x, y = photo(model), torch.tensor([1, 2])
    images = [sample.edit(model, x, y, 1, r=0.0, seed=seed)[1] for seed in (0, 1)]
    assert torch.equal(*images)
    torch.testing.assert_close(images[0], reconstruct(model, x, y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [
    dict(r=0.5), dict(gamma=1.0), dict(alpha=60.0), dict(shared=False), dict(seed=1), dict(cfg=2.0),
    dict(cfg=2.0, position="encoder"), dict(y=torch.tensor([2, 1])), dict(first=3),
])
def test_every_option_of_an_edit_changes_it(model, change):
    base = dict(x=photo(model), y=torch.tensor([1, 2]), steps=4)
    one, two = (sample.edit(model, **options)[-1] for options in (base, {**base, **change}))
    assert (one - two).abs().max() > 1e-4


def test_manipulation_draws_one_image_as_every_class_at_full_noise(model):
    x = photo(model, 1)[0]
    images = sample.manipulate(model, x, [0, 3], 2, seed=5)
    expected = sample.edit(model, torch.stack([x, x]), torch.tensor([0, 3]), 2, r=1.0, gamma=0.0, seed=5)
    assert torch.equal(images, expected) and images.shape[:2] == (3, 2)
    assert (images[1, 0] - images[1, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("name, here", [
    ("left-right", lambda row, column: column < 0.5), ("top-bottom", lambda row, column: row < 0.5),
    ("diagonal", lambda row, column: row > column), ("anti-diagonal", lambda row, column: row + column < 1),
])
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


@pytest.mark.parametrize("call, named", [
    (lambda m: sample.edit(m, photo(m), torch.tensor([1, 2]), 0), "steps"),
    (lambda m: sample.edit(m, photo(m), torch.tensor([1, 2]), 1, r=1.5), "1.5"),
    (lambda m: sample.edit(m, photo(m)[:, :, 1:], torch.tensor([1, 2]), 1), "[2, 3, 11, 20]"),
    (lambda m: sample.edit(m, photo(m), torch.tensor([1, 9]), 1), "[1, 9]"),
    (lambda m: sample.crossover(m, photo(m), photo(m), mask="round"), "'round'"),
    (lambda m: sample.crossover(m, photo(m), photo(m), mask=torch.ones(3, 3)), "[3, 3]"),
])
def test_edits_that_cannot_be_are_named(model, call, named):
    with pytest.raises(ValueError) as error:
        call(model)
    assert named in str(error.value)


def test_a_denoiser_edits_no_images(denoiser):
    with pytest.raises(ValueError, match="checkpoint of a Sphere Encoder"):
        sample.edit(denoiser, photo(denoiser), torch.tensor([1, 2]), 1)


@pytest.fixture
def photos(tmp_path):
    """A wide photo and a tall grey one with alpha, as files."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (20, 50, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(rng.integers(0, 256, (50, 20, 2), dtype=np.uint8), "LA").save(tmp_path / "b.png")
    Image.new("L", (16, 16), 255).save(tmp_path / "white.png")
    return [str(tmp_path / "a.png"), str(tmp_path / "b.png")]


def test_image_files_are_resized_by_the_shorter_side_and_cropped_at_the_centre(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    x = sample.open_images([tmp_path / "wide.png"] * 2, (8, 10))
    assert x.shape == (2, 3, 8, 10) and x[..., 1:-1].min() > 0.95 and x.max() <= 1


@pytest.mark.parametrize("word, flags, shape, singles", [
    ("reconstruct", ["--images", "a", "b", "--singles"], (2, 2), 2),
    ("interpolate", ["--rows", "2", "--frames", "3", "--singles"], (2, 3), 6),
    ("interpolate", ["--square", "--frames", "3", "--steps", "2"], (3, 3), 0),
    ("crossover", ["--images", "a", "b", "--steps", "3", "--singles"], (1, 6), 4),
    ("manipulate", ["--images", "a", "--classes", "1,2,3", "--steps", "2", "--singles"], (3, 3), 6),
    ("schemes", ["--count", "3", "--steps", "2"], (3, 8), 0),
    ("guidance", ["--count", "3", "--steps", "2", "--scales", "1,2"], (3, 6), 0),
    ("steps", ["--count", "3", "--steps", "2", "--cfg", "2"], (3, 4), 0),
])
def test_every_word_draws_its_picture(trained, photos, tmp_path, word, flags, shape, singles, monkeypatch):
    files = dict(zip("ab", photos))
    drawn, whole = [], sample.picture
    monkeypatch.setattr(sample, "picture", lambda panels, *rest, **more: drawn.append(panels) or
                        whole(panels, *rest, **more))
    main([word, "--checkpoint", str(trained), "--out", str(tmp_path / "out"),
          *(files.get(f, f) for f in flags)])
    rows = {len(images) for images in drawn[0].values()}
    assert (rows, sum(images.shape[1] for images in drawn[0].values())) == ({shape[0]}, shape[1])
    assert (tmp_path / "out" / "samples.png").exists()
    assert len([*(tmp_path / "out").glob("0*.png")]) == singles


def test_guidance_is_drawn_at_every_position_with_every_scale(model, denoiser, tmp_path, monkeypatch):
    drawn, whole = [], sample.picture
    monkeypatch.setattr(sample, "picture", lambda panels, *rest: drawn.append(panels) or whole(panels, *rest))
    for name, loaded in (("a", model), ("b", denoiser)):
        loaded.class_names = list("abcd")
        monkeypatch.setattr(sample, "load", lambda *args: loaded)
        main(["guidance", "--out", str(tmp_path / name), "--count", "3", "--steps", "2", "--scales", "1,3"])
    for (name, images), position in zip(drawn[0].items(), sample.POSITIONS, strict=True):
        assert name == f"{position} 1, 3"
        for k, scale in enumerate((1, 3)):
            torch.testing.assert_close(images[:, k], generate(model, torch.arange(3), 2, scale,
                                                              position=position))
    (images,) = drawn[1].values()
    torch.testing.assert_close(images[:, 1], generate_latent(denoiser, torch.arange(3), 2, 3))


def test_every_number_of_steps_is_drawn_without_and_with_guidance(model, tmp_path, monkeypatch):
    drawn, whole = [], sample.picture
    monkeypatch.setattr(sample, "picture", lambda panels, *rest: drawn.append(panels) or whole(panels, *rest))
    model.class_names = list("abcd")
    monkeypatch.setattr(sample, "load", lambda *args: model)
    main(["steps", "--out", str(tmp_path), "--count", "3", "--steps", "2", "--cfg", "2", "--position",
          "decoder"])
    for images, scale in zip(drawn[0].values(), (1.0, 2.0), strict=True):
        for k, T in enumerate((1, 2)):
            torch.testing.assert_close(images[:, k], generate(model, torch.arange(3), T, scale,
                                                              position="decoder"))


def test_an_interpolation_is_animated_and_a_denoiser_interpolates_too(trained_latent, tmp_path):
    main(["interpolate", "--checkpoint", str(trained_latent), "--out", str(tmp_path / "a"), "--rows", "2",
          "--frames", "3", "--gif", "--spherical", "--classes", "1,2,3"])
    with Image.open(tmp_path / "a" / "samples.gif") as animation:
        assert animation.n_frames == 6


@pytest.mark.parametrize("flags", [["--r", "0.9"], ["--gamma", "0"], ["--mask", "diagonal"], ["--fresh"],
                                   ["--class", "3"], ["--steps", "4"], ["--seed", "2"], ["--cfg", "2"],
                                   ["--alpha", "50"], ["--mask", "white.png"]])
def test_every_option_of_a_crossover_reaches_its_picture(trained, photos, tmp_path, flags):
    flags = [str(tmp_path / word) if word.endswith(".png") else word for word in flags]
    pictures = []
    for name, more in (("plain", []), ("other", flags)):
        main(["crossover", "--checkpoint", str(trained), "--out", str(tmp_path / name), "--class", "1",
              "--cfg", "1.5", "--images", *photos, *more])
        pictures.append((tmp_path / name / "samples.png").read_bytes())
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize("argv, named", [
    (["crossover", "--images", "a"], "two images, got 1"), (["guidance", "--scales", "1,-1"], "-1"),
    (["crossover", "--images", "a", "x.png"], "x.png"), (["generate", "--bound", "0"], "0"),
    (["crossover", "--images", "a", "b", "--mask", "round"], "'round'"),
    (["crossover", "--images", "a", "b", "--class", "11"], "11"), (["crossover"], "--images"),
    (["crossover", "--images", "a", "b", "--r", "2"], "2.0"), (["interpolate", "--frames", "0"], "--frames"),
    (["manipulate", "--images", "a", "b"], "one image"), (["steps", "--steps", "0"], "steps"),
    (["manipulate", "--images", "a", "--classes", "12"], "12"),
    (["reconstruct", "--images", "a", "--gif"], "--gif"),
    (["interpolate", "--square", "--spherical"], "great circle"),
    (["interpolate", "--official"], "--official"), (["generate", "--r", "1"], "--r"), (["dream"], "dream"),
    (["crossover", "--images", "a", "b", "--steps", "0"], "steps"),
])
def test_mistakes_of_a_word_are_one_line_and_leave_nothing(trained, photos, tmp_path, capsys, argv, named):
    files = dict(zip("ab", photos))
    argv = [argv[0], "--checkpoint", str(trained), "--out", str(tmp_path / "out"),
            *(files.get(word, word) for word in argv[1:])]
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2 and named in one_line(capsys, "sample.py: ")
    assert not (tmp_path / "out").exists()
