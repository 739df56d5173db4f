import ast
import inspect
import math
from unittest.mock import Mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from conftest import (ROOT, released_rae_decoder, seeded_array, with_class_token_table,
                      with_seeded_weights)
from models import (RAE, RAE_DECODER, RAE_DECODER_SIZE, RAE_STATISTICS, SIT_SIZES, SIZES, ConvHead,
                    LinearHead, Mixer, RAEDecoder, SiT, SphereEncoder, SphereTokenizer, apply_rope,
                    build_model, convert_official, convert_official_config, convert_rae_decoder, rope_table,
                    sincos_table)
from spherify import spherify
from train import DATA_SETS, PRESETS

PUBLISHED = {   # preset: parameters with the frozen position tables, tensors; SiT-B's are predicted
    "animal-faces": (642_148_324, 591), "flowers102": (948_844_516, 695), "imagenet-l": (950_354_532, 695),
    "imagenet-xl": (1_388_922_404, 791), "cifar10": (921_569_387, 649), "cifar10-uncond": (615_061_611, 545),
    "cifar10-base": (263_818_155, 361), "imagenet-base": (287_914_916, 407),
    "imagenet-latent": (675_160_896, 401), "animal-faces-latent": (130_086_144, 177),
    "flowers102-latent": (130_162_176, 177)}


def network(preset):
    """The network of a preset, without weights."""
    preset = PRESETS[preset]
    _, classes = DATA_SETS[preset.dataset]
    with torch.device("meta"):
        return build_model(preset, range(classes), (256, 768))


def images(model, batch, seed=0):
    return torch.rand(batch, 3, *model.image_size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def latents(model, batch, seed=0):
    return spherify(torch.randn(batch, *model.latent_shape, generator=torch.Generator().manual_seed(seed)))


# ---- the released system ----


@pytest.mark.parametrize("name", [*PUBLISHED, "rae"])
def test_parameter_counts_are_exactly_those_of_the_released_code(name):
    with torch.device("meta"):
        tensors = (RAEDecoder(**RAE_DECODER_SIZE) if name == "rae" else network(name)).state_dict().values()
    published = (sum(tensor.numel() for tensor in tensors), len(tensors))
    assert published == {**PUBLISHED, "rae": (415_352_704, 456)}[name]


@pytest.mark.parametrize("size", [*SIZES, *SIT_SIZES])
def test_every_size_keeps_shapes_on_the_meta_device(size):
    with torch.device("meta"):
        z, y = torch.empty(2, 64, 8), torch.zeros(2, dtype=torch.int64)
        if size in SIT_SIZES:
            assert SiT(64, 8, 3, size)(z, y).shape == z.shape
        else:
            model = SphereEncoder(64, 8, 8, 3, size, size, 1)
            x = model.decode(z)
            assert x.shape == (2, 3, 64, 64) and model.encode(x, y).shape == z.shape


@pytest.fixture(scope="module")
def golden():
    return np.load(ROOT / "tests" / "sphere_cond_linear.npz")


def test_networks_agree_with_the_released_system(golden):
    model = golden_model(golden)
    x, e, y = (torch.from_numpy(golden[name]) for name in ("x", "e", "labels"))
    with torch.no_grad():
        z = model.encode(x, y)
        noise_image = model.decode(spherify(e), y)
        outputs = {"z": z, "v": spherify(z), "v0": spherify(e),
                   "reconstruction": model.decode(spherify(z), y),
                   "decoded_noise": noise_image, "reencoded": model.encode(noise_image, y)}
    for name, output in outputs.items():
        np.testing.assert_allclose(output, golden[name], rtol=0, atol=2e-5, err_msg=name)


def golden_model(golden):
    config = ast.literal_eval(str(golden["config"]))
    size = tuple(config["size"][key] for key in ("width", "layers", "heads"))
    model = SphereEncoder(config["image_size"], config["patch_size"], config["token_channels"],
                          config["num_classes"], size, size, config["mixer_depth"], config["pixel_head"],
                          config["angle"])
    shapes = dict(line.split(" ", 1) for line in golden["keys"])
    model.load_state_dict(convert_official({name: seeded_array(name, ast.literal_eval(shape)) for name, shape
                                            in shapes.items() if not name.endswith("pos_embed")}))
    return model


# ---- released weights ----


def released_layout(model):
    """Names and shapes of the released checkpoint of a model's sizes, written from its description."""
    config, shapes = model.config, {}
    P, d, K, B = (config[key] for key in ("patch_size", "latent_dim", "num_classes", "mixer_depth"))
    N, linear = model.latent_shape[0], config["pixel_head"] == "linear"
    for side in ("encoder", "decoder"):
        W, depth, _ = SIZES.get(config[f"{side}_size"], config[f"{side}_size"])
        h, bare, biased = int(W * 8 / 3), {}, {}            # layers without and with a bias
        for i in range(depth):
            b = f"blocks.{i}."
            bare |= {b + "norm1": (W,), b + "norm2": (W,)}
            biased |= {b + "attn.qkv": (3 * W, W), b + "attn.proj": (W, W), b + "mlp.w12": (2 * h, W),
                       b + "mlp.w3": (W, h)} | ({b + "adaLN_modulation.1": (6 * W, W)} if K else {})
        if K:
            bare |= {"y_embedder.embedding_table": (K + 1, W), "ffn.norm": (W,)}
            biased["ffn.adaLN_modulation.1"] = (2 * W, W)
        if side == "encoder":
            mixer, dim, out = "out", d, d
            bare["x_embedder.0"], biased["x_embedder.1"] = (W, 3, P, P), (W, W, 1, 1)
        else:
            mixer, dim, out = "x_embedder.1", W, 3 * P * P if linear else 32
            biased["x_embedder.0" if B else "x_embedder"] = (W, d)
            biased["out.2"] = (3, 3, 3, 3) if linear else (32, 32, 3, 3)
        for k in range(B):
            b = f"{mixer}.blocks.{k}."
            bare |= {b + "norm1": (dim,), b + "norm2": (dim,)}
            biased |= {b + "tok_mixer.mix.0": (N, N), b + "tok_mixer.mix.2": (N, N),
                       b + "chn_mixer.mix.0": (2 * dim, dim), b + "chn_mixer.mix.2": (dim, 2 * dim)}
            shapes |= {f"{side}.{b}alpha1": (1,), f"{side}.{b}alpha2": (1,)}
        bare |= {f"{mixer}.norm": (dim,)} if B else {}
        biased["ffn.linear"] = (out, W)
        shapes |= {f"{side}.{name}.weight": shape for name, shape in (bare | biased).items()}
        shapes |= {f"{side}.{name}.bias": shape[:1] for name, shape in biased.items()}
        shapes[f"{side}.pos_embed"] = (1, N, W)
    head = {"decoder.out.4.weight": (32, 3, P + 2, P + 2), "decoder.out.4.bias": (3,)}
    return shapes if linear else shapes | head


TINY_RELEASED = {"linear": (32, 8, 5, 3, (16, 2, 2), (24, 3, 2), 2),
    "conv": (16, 4, 5, 3, (16, 2, 2), (24, 1, 2), 1, "conv"),
    "unconditional": (16, 4, 5, 0, (16, 1, 2), (24, 2, 2), 1),
    "no-mixers": (16, 4, 5, 3, (16, 1, 2), (16, 1, 2), 0),}


@pytest.mark.parametrize("name", [*TINY_RELEASED, *(name for name in PUBLISHED if "latent" not in name)])
def test_the_released_layout_of_every_size_is_converted(name):
    with torch.device("meta"):
        model = SphereEncoder(*TINY_RELEASED[name]) if name in TINY_RELEASED else network(name)
        weights = {key: torch.empty(shape) for key, shape in released_layout(model).items()}
    converted, expected = convert_official(weights), model.state_dict()
    assert {k: t.shape for k, t in converted.items()} == {k: t.shape for k, t in expected.items()}


def released(name="linear"):
    """A small model and seeded weights for it in the released layout, tables included."""
    model = SphereEncoder(*TINY_RELEASED[name])
    weights = {key: seeded_array(key, shape) for key, shape in released_layout(model).items()}
    for side in ("encoder", "decoder"):
        weights[f"{side}.pos_embed"] = model.get_parameter(f"{side}.pos_embed").data.clone()
    return model, weights


@pytest.mark.parametrize("name, places", [
    ("conv", {"encoder.blocks.0.mlp.w12.weight": "encoder.blocks.0.mlp.w12.weight",
              "decoder.x_embedder.1.blocks.0.tok_mixer.2.weight":
              "decoder.x_embedder.1.blocks.0.tok_mixer.mix.2.weight",
              "decoder.x_embedder.1.blocks.0.alpha2": "decoder.x_embedder.1.blocks.0.alpha2",
              "decoder.out.conv.bias": "decoder.out.2.bias",
              "decoder.out.upsample.weight": "decoder.out.4.weight"}),
    ("no-mixers", {"decoder.x_embedder.0.weight": "decoder.x_embedder.weight"})])
def test_converted_weights_load_and_each_stands_in_its_place(name, places):
    model, weights = released(name)
    model.load_state_dict(convert_official(weights))
    for ours, theirs in places.items():
        assert model.get_parameter(ours).equal(weights[theirs])


def test_wrappers_stray_buffers_old_gates_and_short_floats_are_understood():
    model, weights = released()
    plain = convert_official(weights)
    weights.pop("decoder.pos_embed")                                        # the table is the model's own
    held = {"module._orig_mod.encoder.rope": torch.zeros(1, 16, 16)}
    for key, tensor in weights.items():
        key = "module._orig_mod." + key.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module.")
        held[key] = tensor.squeeze() if "alpha" in key else tensor.double() if "w3.weight" in key else tensor
    converted = convert_official({"model": held})
    assert converted.keys() == plain.keys() - {"decoder.pos_embed"}
    assert all(tensor.dtype == torch.float32 and tensor.equal(plain[k]) for k, tensor in converted.items())
    model.load_state_dict(converted)


def test_short_floats_are_cast_and_their_rounded_tables_made_exact():
    model, weights = released()
    converted = convert_official({key: tensor.bfloat16() for key, tensor in weights.items()})
    assert all(tensor.dtype == torch.float32 for tensor in converted.values())
    model.load_state_dict(converted)
    assert torch.equal(model.encoder.pos_embed[0], sincos_table((4, 4), 16))
    assert not torch.equal(converted["encoder.pos_embed"], model.encoder.pos_embed)


@pytest.mark.parametrize("key, tensor, named", [
    ("encoder.x_embedder.0.weight", None, "Missing key.*encoder.x_embedder.0.weight"),
    ("encoder.inctx_embed", torch.zeros(1, 4, 16), "Unexpected key.*encoder.inctx_embed"),
    ("decoder.blocks.1.attn.qkv.bias", torch.zeros(71), r"decoder.blocks.1.attn.qkv.bias: .*\[71\].*\[72\]"),
    ("decoder.out.4.bias", torch.zeros(3), "Unexpected key.*decoder.out.upsample.bias"),    # of another head
    ("encoder.pos_embed", sincos_table((2, 8), 16)[None], "encoder.pos_embed is not the sin-cos table"),])
def test_weights_that_are_not_the_released_ones_are_refused_by_name(key, tensor, named):
    model, weights = released()
    weights[key] = tensor
    if tensor is None:
        del weights[key]
    with pytest.raises(RuntimeError, match=named):
        model.load_state_dict(convert_official(weights))


CFG = dict(dataset_name="cifar-10", image_size=32, patch_size=8, token_channels=5, latent_resolution=4,
    num_classes=3, cond_generator=True, vit_enc_model_size="small", vit_dec_model_size="base",
    vit_enc_latent_mlp_mixer_depth=2, vit_dec_latent_mlp_mixer_depth=2, affine_latent_mlp_mixer=True,
    pixel_head_type="linear", noise_sigma_max_angle=85, mix_hard_cases_max_angle=89, in_context_size=0,
    halve_model_size=False, spherify_model=False, dtype="bf16")


def test_a_released_configuration_gives_the_models_arguments_or_is_refused():
    assert convert_official_config(CFG) == dict(
        image_size=32, patch_size=8, latent_dim=5, num_classes=3, encoder_size="small", decoder_size="base",
        mixer_depth=2, pixel_head="linear", alpha_max=85.0)
    assert convert_official_config({**CFG, "cond_generator": False})["num_classes"] == 0
    with pytest.raises(ValueError, match="spherify_model"):
        convert_official_config({**CFG, "spherify_model": True})
    with pytest.raises(KeyError, match="patch_size"):
        convert_official_config({key: value for key, value in CFG.items() if key != "patch_size"})


# ---- initialisation ----


def test_at_initialisation_outputs_are_zero_and_conditional_blocks_the_identity():
    for head in ("linear", "conv"):
        model, plain = (SphereEncoder(16, 4, 6, K, (16, 2, 2), (16, 2, 2), 2, head) for K in (3, 0))
        for output in (model.encode(images(model, 2)), model.decode(latents(model, 2))):
            assert not output.any()
    denoiser = SiT(16, 6, 4, (16, 2, 2))
    assert not denoiser(latents(denoiser, 2)).any()
    x, c = torch.randn(2, 16, 16), torch.randn(2, 1, 16)
    assert torch.equal(model.encoder.blocks[0](x, c, model.encoder.rope), x)
    assert torch.equal(denoiser.blocks[0](x, c), x)
    assert not torch.equal(plain.encoder.blocks[0](x, None, plain.encoder.rope), x)


def test_inits_are_the_released_ones():
    torch.manual_seed(0)
    model = SphereEncoder(32, 4, 16, 10, (128, 1, 4), (128, 1, 4), 1)
    encoder, decoder = model.encoder, model.decoder
    for layer in (decoder.x_embedder[0], decoder.x_embedder[1].blocks[0].tok_mixer[0]):
        assert layer.weight.std().item() == pytest.approx(1.0, rel=0.05)                       # N(0, 1)
    for weight in (encoder.blocks[0].attn.qkv.weight, encoder.x_embedder[0].weight.flatten(1),
                   encoder.out.blocks[0].tok_mixer[0].weight):
        bound = math.sqrt(6 / sum(weight.shape))                                        # Xavier uniform
        assert 0.98 * bound < weight.abs().max() <= bound
    assert encoder.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.1)
    heads = decoder.out, SphereEncoder(32, 4, 16, 10, (128, 1, 4), (128, 1, 4), 1, "conv").decoder.out
    for conv in (module for head in heads for module in head.children()):                # flattened matrices
        bound = 0.01 * math.sqrt(6 / sum(conv.weight.flatten(1).shape))
        assert 0.9 * bound < conv.weight.abs().max() <= bound and not conv.bias.any()
    zeros = [p for name, p in model.named_parameters() if name.endswith("bias") or "alpha" in name]
    assert len(zeros) > 20 and not any(p.any() for p in zeros)


# ---- shapes, dtypes, classes ----


@pytest.mark.parametrize("head", ["linear", "conv"])
@pytest.mark.parametrize("classes, depth", [(4, 2), (0, 0)])
def test_shapes_and_ranges_at_odd_sizes(head, classes, depth):
    model = with_seeded_weights(SphereEncoder((12, 20), 4, 7, classes, (16, 1, 2), (24, 1, 3), depth, head))
    z = model.encode(images(model, 2))
    x = model.decode(latents(model, 2))
    assert z.shape == (2, 15, 7) and x.shape == (2, 3, 12, 20)
    assert x.abs().max() <= 1 and x.std() > 0.05


def test_networks_return_float32_under_autocast_and_float64_for_float64_weights(model, denoiser):
    networks = ((model, model.encode, images(model, 2)), (model, model.decode, latents(model, 2)),
                (denoiser, denoiser, latents(denoiser, 2)))
    for module, network, x in networks:
        with torch.autocast("cpu", torch.bfloat16):
            short = network(x)
        y = network(x)
        assert short.dtype == torch.float32 and not torch.equal(short, y)   # autocast did act inside
        torch.testing.assert_close(short, y, rtol=0.1, atol=0.1)
        double = module.double(), network(x.double())
        assert double[1].dtype == torch.float64
        torch.testing.assert_close(double[1].float(), y, rtol=1e-4, atol=1e-4)
        module.float()


def test_the_class_matters_in_encoder_and_decoder_each_with_its_own_table_and_none_is_the_null_class(model):
    x, v, y, null = images(model, 3), latents(model, 3), torch.tensor([0, 1, 2]), torch.full((3,), 4)
    z, image = model.encode(x, y), model.decode(v, y)
    assert torch.equal(model.encode(x), model.encode(x, null))
    assert torch.equal(model.decode(v), model.decode(v, null))
    assert (z - model.encode(x)).abs().amax((1, 2)).min() > 1e-3
    assert (image - model.decode(v)).abs().amax((1, 2, 3)).min() > 1e-3
    model.decoder.y_embedder.embedding_table.weight.data += 1
    assert torch.equal(z, model.encode(x, y)) and not torch.equal(image, model.decode(v, y))


def test_an_unconditional_model_has_no_tables_and_ignores_classes(unconditional):
    x, v, y = images(unconditional, 2), latents(unconditional, 2), torch.tensor([3, 7])
    assert not any("y_embedder" in name or "adaLN" in name for name in unconditional.state_dict())
    assert torch.equal(unconditional.encode(x), unconditional.encode(x, y))
    assert torch.equal(unconditional.decode(v), unconditional.decode(v, y))


# ---- position ----


def test_an_encoder_without_classes_is_blind_to_them_while_the_decoder_sees_them():
    model = SphereEncoder((12, 20), 4, 7, 4, (16, 2, 2), (24, 1, 2), 2, encoder_classes=False)
    x, v = images(with_seeded_weights(model), 2), latents(model, 2)
    one, two = torch.tensor([0, 1]), torch.tensor([2, 4])
    assert torch.equal(model.encode(x, one), model.encode(x, two))
    assert not torch.allclose(model.decode(v, one), model.decode(v, two))
    assert not any("y_embedder" in name for name in model.encoder.state_dict())


def test_batch_norm_gives_every_element_of_a_latent_mean_zero_and_variance_one_over_the_batch():
    model = with_seeded_weights(SphereEncoder((12, 20), 4, 7, 4, (16, 2, 2), (24, 1, 2), 2, batch_norm=True))
    x = torch.rand(6, 3, 12, 20)
    raw = model.encode(x)                                                   # statistics 0 and 1 at first
    z = model.train().encode(x)
    deviation = (raw.var(0, correction=0) + model.norm.eps).sqrt()
    torch.testing.assert_close(z, (raw - raw.mean(0)) / deviation, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.norm.running_mean, 0.1 * raw.mean(0).flatten(), rtol=1e-4, atol=1e-5)
    assert {name for name in model.state_dict() if name.startswith("norm.")} == {
        "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


def test_rope_scores_depend_on_relative_position_only():
    h, w, head_dim = 5, 7, 12
    rope = rope_table((h, w), head_dim)
    q, k = (torch.randn(head_dim, generator=torch.Generator().manual_seed(s)).expand(h * w, -1)
            for s in (0, 1))
    score = (apply_rope(q, rope) @ apply_rope(k, rope).T).view(h, w, h, w)
    torch.testing.assert_close(score[0, 0, 2, 3], score[2, 3, 4, 6], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(score[3, 1, 1, 4], score[4, 3, 2, 6], rtol=1e-4, atol=1e-4)
    assert (score[0, 0, 2, 3] - score[0, 0, 3, 2]).abs() > 1e-2            # rows and columns are not the same


def test_position_tables_are_those_of_the_models_own_grid(model):
    for network, head_dim in ((model.encoder, 8), (model.decoder, 12)):
        assert torch.equal(network.rope, rope_table((3, 5), head_dim))
        assert torch.equal(network.pos_embed[0], sincos_table((3, 5), network.width))


# ---- pixel heads ----


def test_linear_head_puts_every_patch_in_its_place():
    head = LinearHead((3, 5), 4)
    torch.nn.init.dirac_(head.conv.weight)
    torch.nn.init.zeros_(head.conv.bias)
    image = torch.rand(2, 3, 12, 20) - 0.5
    patches = image.unflatten(2, (3, 4)).unflatten(4, (5, 4))                # [B, 3, h, P, w, P]
    tokens = torch.stack([patches[:, :, i, :, j] for i in range(3) for j in range(5)], dim=1).flatten(2)
    torch.testing.assert_close(head(tokens), torch.tanh(image))


def test_conv_head_is_reflect_conv_silu_transposed_conv_tanh():
    head = with_seeded_weights(ConvHead((3, 5), 4))
    tokens = torch.randn(2, 15, 32)
    x = torch.stack([tokens[:, 5 * i:5 * i + 5] for i in range(3)], 1).permute(0, 3, 1, 2)  # [B, 32, h, w]
    x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), head.conv.weight, head.conv.bias)
    x = F.conv_transpose2d(x * torch.sigmoid(x), head.upsample.weight, head.upsample.bias,
                           stride=4, padding=1)
    torch.testing.assert_close(head(tokens), torch.tanh(x))


def test_mixers_mix_all_tokens_and_only_behind_their_gates():
    mixer = Mixer(9, 6, 2)

    def influence():
        x = torch.randn(1, 9, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
        (gradient,) = torch.autograd.grad((mixer(x)[0, 4] * torch.arange(1.0, 7)).sum(), x)
        return gradient[0].norm(dim=1)

    assert (influence() > 0).tolist() == [i == 4 for i in range(9)]         # ReZero: at first only the norm
    with_seeded_weights(mixer)
    assert (influence() > 1e-4).all()


@pytest.mark.parametrize("change, named", [
    (dict(patch_size=5), "16"), (dict(encoder_size="tiny"), "tiny"), (dict(decoder_size=(30, 1, 4)), "30"),
    (dict(pixel_head="cnn"), "cnn"), (dict(alpha_max=90.0), "90"), (dict(tokens=15), "15"),
    (dict(size="base"), "S, B, L, XL"),])
def test_sizes_that_do_not_fit_are_named(change, named):
    encoder = dict(image_size=16, patch_size=4, latent_dim=4, num_classes=2, encoder_size=(16, 1, 2),
                   decoder_size=(16, 1, 2), mixer_depth=1)
    denoiser = dict(tokens=16, token_dim=7, num_classes=4, size=(24, 2, 2))
    network, good = (SiT, denoiser) if change.keys() & denoiser.keys() else (SphereEncoder, encoder)
    network(**good)
    with pytest.raises(ValueError, match=named):
        network(**{**good, **change})


# ---- denoiser ----


def test_a_denoiser_knows_class_and_latent_but_no_timestep(denoiser):
    assert list(inspect.signature(denoiser.forward).parameters) == ["v", "y"]
    v, y = latents(denoiser, 3), torch.tensor([0, 1, 2])
    assert (denoiser(v, y) - denoiser(v, y.flip(0))).abs().max() > 0.01
    assert torch.equal(denoiser(v), denoiser(v, torch.full((3,), 4)))                   # none: the null class
    torch.testing.assert_close(denoiser(v, y)[1:2], denoiser(v[1:2], y[1:2]), rtol=1e-4, atol=1e-5)


def test_a_denoiser_block_is_what_it_says_written_out(denoiser):
    """Pre-norms, per-head norms of queries and keys, tanh-GELU, the order of the six modulation vectors."""
    block, x, c = denoiser.blocks[0], torch.randn(2, 15, 24), torch.randn(2, 1, 24)
    m = (F.silu(c) @ block.adaLN_modulation[1].weight.T + block.adaLN_modulation[1].bias).split(24, dim=-1)
    rms = lambda x, norm: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    a, h = block.attn, rms(x, block.norm1) * (1 + m[1]) + m[0]
    q, k, v = ((h @ linear.weight.T).view(2, 15, 2, 12).transpose(1, 2) for linear in (a.q, a.k, a.v))
    weights = (rms(q, a.q_norm) @ rms(k, a.k_norm).transpose(-1, -2) / math.sqrt(12)).softmax(-1)
    x1 = x + m[2] * ((weights @ v).transpose(1, 2).reshape(2, 15, 24) @ a.proj.weight.T)
    h = rms(x1, block.norm2) * (1 + m[4]) + m[3]
    expected = x1 + m[5] * block.mlp[2](F.gelu(block.mlp[0](h), approximate="tanh"))
    torch.testing.assert_close(block(x, c), expected, rtol=1e-4, atol=1e-5)
    assert not any(linear.bias is not None for linear in (a.q, a.k, a.v, a.proj))


def test_a_tokenizer_is_no_part_of_its_denoiser(denoiser):
    names = [name for name, _ in denoiser.named_parameters()]
    assert not any("tokenizer" in name for name in [*names, *denoiser.state_dict()])
    assert denoiser.image_size == denoiser.tokenizer.image_size == (12, 20)


def test_a_sphere_tokenizer_speaks_in_points_of_the_sphere(unconditional):
    tokenizer, x = SphereTokenizer(unconditional), images(unconditional, 2)
    z = tokenizer.encode(x)
    torch.testing.assert_close(z, spherify(unconditional.encode(x)))
    torch.testing.assert_close(tokenizer.decode(3 * z), unconditional.decode(z), rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in tokenizer.parameters()) and not tokenizer.training


# ---- RAE ----


def test_rae_decoder_agrees_with_the_released_system(hub):
    golden, _ = released_rae_decoder()
    z = torch.from_numpy(golden["latent"]).flatten(2).transpose(1, 2)
    x = RAE.from_hub().decode(z)
    np.testing.assert_allclose((x + 1) / 2, golden["image"], rtol=0, atol=2e-5)


def test_rae_encodes_what_the_entry_point_gives_without_class_registers_and_affine_norm(hub):
    rae, x = RAE.from_hub(), torch.rand(2, 3, 64, 64) * 2 - 1
    pixels = F.interpolate((x + 1) / 2, (56, 56), mode="bicubic")
    pixels = (pixels - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225])[:, None, None]
    tokens = rae.encoder.forward_features(pixels)["x_prenorm"][:, 5:]
    centred = tokens - tokens.mean(-1, keepdim=True)
    tokens = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    var = torch.load(hub / RAE_STATISTICS[1])["var"].flatten(1).T
    z = rae.encode(x)
    assert z.shape == (2, 16, 32) and rae.latent_shape == (16, 32) and rae.image_size == (64, 64)
    torch.testing.assert_close(z, tokens / (var + 1e-5).sqrt(), rtol=1e-4, atol=1e-4)
    assert not rae.training and not any(p.requires_grad for p in rae.parameters())
    assert not rae.encode(x.requires_grad_()).requires_grad


def test_a_mean_in_the_statistics_is_subtracted_and_added_again(hub):
    plain, statistics = RAE.from_hub(), torch.load(hub / RAE_STATISTICS[1])
    mean = torch.randn(32, 4, 4)
    torch.save({**statistics, "mean": mean}, hub / RAE_STATISTICS[1])
    shifted, x = RAE.from_hub(), torch.rand(2, 3, 64, 64) * 2 - 1
    gap = (mean / (statistics["var"] + 1e-5).sqrt()).flatten(1).T
    torch.testing.assert_close(shifted.encode(x), plain.encode(x) - gap, rtol=1e-4, atol=1e-4)
    one, two = (rae.decode(rae.encode(x)) for rae in (shifted, plain))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_released_rae_decoders_are_placed_bare_wrapped_without_table_or_class_token():
    golden, weights = released_rae_decoder()
    bare = convert_rae_decoder(weights)
    for other in ({"model": weights}, {f"module.decoder.{name}": t for name, t in weights.items()},
                  weights | {"decoder_pos_embed": with_class_token_table(48)}):
        converted = convert_rae_decoder(other)
        assert all(torch.equal(converted[name], tensor) for name, tensor in bare.items())
    token = weights.pop("trainable_cls_token")
    assert torch.equal(convert_rae_decoder(weights)["class_token"], torch.zeros_like(token))


@pytest.mark.parametrize("url, name", [RAE_DECODER, RAE_STATISTICS,
                                       ("facebookresearch/dinov2", "dinov2_vitb14_reg4_pretrain.pth")])
def test_rae_files_that_are_missing_or_damaged_are_named_with_their_url(hub, monkeypatch, url, name):
    monkeypatch.setattr(torch.hub, "urlopen", Mock(side_effect=URLError("no network")))
    RAE.from_hub()                                                          # all is there
    content = (hub / name).read_bytes()
    for spoil in (lambda: (hub / name).write_bytes(content[:100]), (hub / name).unlink):
        spoil()
        with pytest.raises(OSError) as error:
            RAE.from_hub()
        assert str(hub) in str(error.value) and name in str(error.value) and url in str(error.value)
