import ast
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from conftest import ROOT, seeded_array, with_seeded_weights
from models import SIZES, ConvHead, LinearHead, Mixer, SphereEncoder, apply_rope, rope_table, sincos_table
from spherify import spherify

IMAGE = (256, 8)
PUBLISHED = {   # name: (arguments, parameters with the frozen position tables, tensors)
    "animal-faces-l": ((*IMAGE, 128, 0, "large", "large", 4), 642_148_324, 591),
    "flowers-l": ((*IMAGE, 128, 102, "large", "large", 4), 948_844_516, 695),
    "imagenet-l": ((*IMAGE, 64, 1000, "large", "large", 4), 950_354_532, 695),
    "imagenet-xl": ((*IMAGE, 64, 1000, "xlarge", "xlarge", 4), 1_388_922_404, 791),
    "cifar10-l": ((32, 2, 8, 10, "large", "large", 2, "conv"), 921_569_387, 649),
    "cifar10-l-uncond": ((32, 2, 8, 0, "large", "large", 2, "conv"), 615_061_611, 545),
    "cifar10-base": ((32, 2, 8, 10, "base", "base", 2, "conv"), 263_818_155, 361),
    "imagenet-base": ((*IMAGE, 64, 1000, "base", "base", 4), 287_914_916, 407),
}


def images(model, batch, seed=0):
    return torch.rand(batch, 3, *model.image_size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def latents(model, batch, seed=0):
    return spherify(torch.randn(batch, *model.latent_shape, generator=torch.Generator().manual_seed(seed)))


# ---- the released system ----


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_exactly_the_released_ones(name):
    arguments, parameters, tensors = PUBLISHED[name]
    with torch.device("meta"):
        model = SphereEncoder(*arguments)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors


@pytest.mark.parametrize("size", SIZES)
def test_every_size_keeps_shapes_on_the_meta_device(size):
    with torch.device("meta"):
        model = SphereEncoder(64, 8, 5, 3, size, size, 1)
        z = model.encode(torch.empty(2, 3, 64, 64), torch.zeros(2, dtype=torch.int64))
        assert z.shape == (2, 64, 5) and model.decode(z).shape == (2, 3, 64, 64)


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
    """The file's network under our names, which differ from the released ones in three words."""
    config = ast.literal_eval(str(golden["config"]))
    size = (config["size"]["width"], config["size"]["layers"], config["size"]["heads"])
    model = SphereEncoder(config["image_size"], config["patch_size"], config["token_channels"],
                          config["num_classes"], size, size, config["mixer_depth"], config["pixel_head"],
                          config["angle"])
    weights = {}
    for line in golden["keys"]:
        name, shape = line.split(" ", 1)
        ours = name.replace(".mix.", ".").replace("decoder.out.2.", "decoder.out.conv.")
        weights[ours] = seeded_array(name, ast.literal_eval(shape))
    for name in ("encoder.pos_embed", "decoder.pos_embed"):
        weights[name] = model.get_parameter(name).data
    model.load_state_dict(weights)
    return model


# ---- initialisation ----


@pytest.mark.parametrize("head", ["linear", "conv"])
def test_latent_and_image_are_zero_at_initialisation(head):
    model = SphereEncoder(16, 4, 6, 3, (16, 2, 2), (16, 2, 2), 2, head)
    z, x = model.encode(images(model, 2)), model.decode(latents(model, 2))
    assert torch.equal(z, torch.zeros_like(z)) and torch.equal(x, torch.zeros_like(x))


def test_a_conditional_block_is_the_identity_at_initialisation_and_an_unconditional_one_is_not():
    model = SphereEncoder(16, 4, 6, 3, (16, 1, 2), (16, 1, 2), 1)
    plain = SphereEncoder(16, 4, 6, 0, (16, 1, 2), (16, 1, 2), 1)
    x, c = torch.randn(2, 16, 16), torch.randn(2, 1, 16)
    assert torch.equal(model.encoder.blocks[0](x, c, model.encoder.rope), x)
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
    assert decoder.out.conv.weight.abs().max() <= 0.01 * math.sqrt(6 / (27 + 27))
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias") or "alpha" in name}
    assert len(biases) > 20 and all((p == 0).all() for p in biases.values())


# ---- shapes, dtypes, classes ----


@pytest.mark.parametrize("head", ["linear", "conv"])
@pytest.mark.parametrize("classes, depth", [(4, 2), (0, 0)])
def test_shapes_and_ranges_at_odd_sizes(head, classes, depth):
    model = with_seeded_weights(SphereEncoder((12, 20), 4, 7, classes, (16, 1, 2), (24, 1, 3), depth, head))
    z = model.encode(images(model, 2))
    x = model.decode(latents(model, 2))
    assert z.shape == (2, 15, 7) and x.shape == (2, 3, 12, 20)
    assert x.abs().max() <= 1 and x.std() > 0.05


def test_encode_and_decode_return_float32_under_autocast_and_float64_for_float64_weights(model):
    x, v = images(model, 2), latents(model, 2)
    with torch.autocast("cpu", torch.bfloat16):
        z16, x16 = model.encode(x), model.decode(v)
    assert z16.dtype == x16.dtype == torch.float32
    z, image = model.encode(x), model.decode(v)
    assert not torch.equal(z16, z)                                          # autocast did act inside
    torch.testing.assert_close(x16, image, rtol=0, atol=0.1)
    model.double()
    z64 = model.encode(x.double())
    assert z64.dtype == torch.float64
    torch.testing.assert_close(z64.float(), z, rtol=1e-4, atol=1e-4)


def test_no_class_means_the_null_class(model):
    x, v, null = images(model, 3), latents(model, 3), torch.full((3,), 4)
    assert torch.equal(model.encode(x), model.encode(x, null))
    assert torch.equal(model.decode(v), model.decode(v, null))


def test_the_class_matters_in_encoder_and_decoder_each_with_its_own_table(model):
    x, v, y = images(model, 3), latents(model, 3), torch.tensor([0, 1, 2])
    z, image = model.encode(x, y), model.decode(v, y)
    assert (z - model.encode(x)).abs().amax((1, 2)).min() > 1e-3
    assert (image - model.decode(v)).abs().amax((1, 2, 3)).min() > 1e-3
    model.decoder.y_embedder.embedding_table.weight.data += 1
    assert torch.equal(z, model.encode(x, y)) and not torch.equal(image, model.decode(v, y))


def test_each_sample_is_computed_alone(model):
    x, y = images(model, 4), torch.tensor([0, 1, 2, 4])
    torch.testing.assert_close(model.encode(x, y)[2:3], model.encode(x[2:3], y[2:3]), rtol=1e-5, atol=1e-5)


def test_an_unconditional_model_has_no_tables_and_ignores_classes(unconditional):
    x, v, y = images(unconditional, 2), latents(unconditional, 2), torch.tensor([3, 7])
    assert not any("y_embedder" in name or "adaLN" in name for name in unconditional.state_dict())
    assert torch.equal(unconditional.encode(x), unconditional.encode(x, y))
    assert torch.equal(unconditional.decode(v), unconditional.decode(v, y))


# ---- position ----


def test_rope_scores_depend_on_relative_position_only():
    h, w, head_dim = 5, 7, 12
    rope = rope_table((h, w), head_dim)
    q, k = (torch.randn(head_dim, generator=torch.Generator().manual_seed(s)).expand(h * w, -1)
            for s in (0, 1))
    score = (apply_rope(q, rope) @ apply_rope(k, rope).T).view(h, w, h, w)
    torch.testing.assert_close(score[0, 0, 2, 3], score[2, 3, 4, 6], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(score[3, 1, 1, 4], score[4, 3, 2, 6], rtol=1e-4, atol=1e-4)
    assert (score[0, 0, 2, 3] - score[0, 0, 3, 2]).abs() > 1e-2            # rows and columns are not the same


def test_rope_turns_the_first_half_with_the_row_and_the_second_with_the_column():
    h, w, head_dim = 4, 6, 8
    x = torch.ones(h * w, head_dim)
    turned = apply_rope(x, rope_table((h, w), head_dim)).view(h, w, head_dim)
    assert torch.equal(turned[:, :1, :4].expand(-1, w, -1), turned[..., :4])
    assert torch.equal(turned[:1, :, 4:].expand(h, -1, -1), turned[..., 4:])
    torch.testing.assert_close(turned[1, 0, :2], torch.tensor([math.cos(1) - math.sin(1),
                                                               math.cos(1) + math.sin(1)]))
    torch.testing.assert_close(turned.norm(dim=-1), x.view(h, w, head_dim).norm(dim=-1))


def test_sincos_table_encodes_the_column_first():
    table = sincos_table((3, 5), 16).view(3, 5, 16)
    assert torch.equal(table[:1, :, :8].expand(3, -1, -1), table[..., :8])
    assert torch.equal(table[:, :1, 8:].expand(-1, 5, -1), table[..., 8:])
    expected = torch.sin(4 * 10000.0 ** (-torch.arange(4) / 4.0))
    torch.testing.assert_close(table[0, 4, :4], expected)
    torch.testing.assert_close(table[0, 4, 4:8], torch.cos(4 * 10000.0 ** (-torch.arange(4) / 4.0)))


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
    x = torch.stack([tokens[:, 5 * i:5 * i + 5] for i in range(3)], dim=1)                 # [B, h, w, 32]
    x = x.permute(0, 3, 1, 2)                                                              # [B, 32, h, w]
    x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), head.conv.weight, head.conv.bias)
    x = F.conv_transpose2d(x * torch.sigmoid(x), head.upsample.weight, head.upsample.bias,
                           stride=4, padding=1)
    torch.testing.assert_close(head(tokens), torch.tanh(x))


# ---- mixers ----


def test_mixers_mix_all_tokens_and_only_behind_their_gates():
    mixer = Mixer(9, 6, 2)

    def influence():
        x = torch.randn(1, 9, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
        (gradient,) = torch.autograd.grad((mixer(x)[0, 4] * torch.arange(1.0, 7)).sum(), x)
        return gradient[0].norm(dim=1)

    assert (influence() > 0).tolist() == [i == 4 for i in range(9)]         # ReZero: at first only the norm
    with_seeded_weights(mixer)
    assert (influence() > 1e-4).all()


def test_mixers_stand_at_the_encoders_end_and_the_decoders_start(model):
    ends = {"encoder.out": (15, 7), "decoder.x_embedder.1": (15, 24)}
    for name, (tokens, dim) in ends.items():
        mixer = model.get_submodule(name)
        assert mixer.blocks[0].tok_mixer[0].weight.shape == (tokens, tokens)
        assert mixer.norm.weight.shape == (dim,)
    z = model.encode(images(model, 2))
    model.encoder.out.norm.weight.data *= 2
    torch.testing.assert_close(model.encode(images(model, 2)), 2 * z)


# ---- bad input ----


@pytest.mark.parametrize("change, named", [
    (dict(patch_size=5), "16"), (dict(patch_size=0), "0"), (dict(image_size=2), "2"),
    (dict(encoder_size="tiny"), "tiny"),
    (dict(decoder_size=(30, 1, 4)), "30"), (dict(pixel_head="cnn"), "cnn"), (dict(alpha_max=90.0), "90"),
    (dict(num_classes=-1), "-1"), (dict(latent_dim=0), "0"), (dict(mixer_depth=-2), "-2"),
    (dict(encoder_size=(16, 1, 0)), "(16, 1, 0)"), (dict(encoder_size=(16, 1)), "(16, 1)"),
    (dict(image_size=4, pixel_head="conv"), "pixel head"), (dict(image_size=1, patch_size=1), "pixel head"),
])
def test_sizes_that_do_not_fit_are_named(change, named):
    good = dict(image_size=16, patch_size=4, latent_dim=4, num_classes=2, encoder_size=(16, 1, 2),
                decoder_size=(16, 1, 2), mixer_depth=1)
    with pytest.raises(ValueError) as error:
        SphereEncoder(**{**good, **change})
    assert named in str(error.value)


def test_inputs_of_another_shape_are_named(model):
    for call in (lambda: model.encode(torch.zeros(2, 3, 20, 12)), lambda: model.decode(torch.zeros(2, 15, 8)),
                 lambda: model.encode(images(model, 2), torch.zeros(3, dtype=torch.int64))):
        with pytest.raises(ValueError, match="expected"):
            call()
