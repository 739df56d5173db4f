"""Networks: the Sphere Encoder's ViT encoder and decoder with their MLP-Mixers, SE Sec. 2.4; the Sphere
Latent Encoder's denoiser (SiT) and frozen tokenizer (RAE), SLE Sec. 4.1; released weights of all of them.

What the papers leave open (SwiGLU, RMSNorm, ReZero, inits, pixel heads) is as in the released systems, and so
are the parameters' names, but for those that the converters at the end translate.

    x  [B, 3, H, W]  image in [-1, 1]           y  [B] int64 class, K = num_classes is the null class
    z  [B, N, d]     Euclidean latent           v  [B, N, d]  latent on the sphere
    N = h w tokens, h = H / P, w = W / P        D  width of the transformer
"""

import math
import os
import re
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

from spherify import angle_to_sigma, at_least_float32, spherify

# (width, depth, heads) of encoder or decoder; the released system's table. Paper: Base, Large and XLarge.
SIZES = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16), "xlarge": (1152, 28, 16),
         "huge": (1280, 32, 16), "giant": (1664, 40, 16)}
# (width, depth, heads) of the denoiser.
SIT_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
RMSNorm = partial(nn.RMSNorm, eps=1e-6)
ROPE_THETA = 10000.0    # base of the RoPE frequencies, and of the sin-cos table
CONV_HEAD_CHANNELS = 32


class SphereEncoder(nn.Module):
    """Encoder E and decoder D of the Sphere Encoder. SE Sec. 2.1, 2.4.

    image_size    pixels, an int or (H, W)
    patch_size    P, divides H and W
    latent_dim    d, channels of a token; L = (H / P) (W / P) d
    num_classes   K; 0 makes an unconditional model, which has no class tables and no AdaLN
    encoder_size, decoder_size   a name of SIZES or a (width, depth, heads) triple
    mixer_depth   blocks of each MLP-Mixer; 0 leaves the mixers and their norms out
    pixel_head    "linear" (token -> patch, then a 3x3 conv) or "conv" (3x3 conv, SiLU, transposed conv)
    alpha_max     degrees; the angle of the noise at r = 1, in training (but for hard cases) and sampling
    encoder_classes  False makes an encoder that is blind to the class, which the paper warns of (Sec. 4,
                  "Conditional Uniformity")
    batch_norm    normalise each of E's L outputs over the batch, before f; without a learned scale and shift.
                  App. C.3, in the form of the official code, which does not use it

    Neither encode nor decode projects onto the sphere: that is spherify's, between the two.
    Raises ValueError for an unknown size or pixel head, or an image size that the patches do not divide."""

    def __init__(self, image_size, patch_size, latent_dim, num_classes, encoder_size, decoder_size,
                 mixer_depth, pixel_head="linear", alpha_max=80.0, encoder_classes=True, batch_norm=False):
        super().__init__()
        self.config = {"image_size": image_size, "patch_size": patch_size, "latent_dim": latent_dim,
                       "num_classes": num_classes, "encoder_size": encoder_size, "decoder_size": decoder_size,
                       "mixer_depth": mixer_depth, "pixel_head": pixel_head, "alpha_max": alpha_max,
                       "encoder_classes": encoder_classes, "batch_norm": batch_norm}    # to rebuild it from
        H, W = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
        if H % patch_size or W % patch_size:
            raise ValueError(f"image_size {image_size} must be a multiple of patch_size {patch_size}")
        angle_to_sigma(alpha_max)                           # refuses one that cannot be
        self.image_size = (H, W)
        self.num_classes = num_classes
        self.alpha_max = alpha_max
        grid = (H // patch_size, W // patch_size)
        self.latent_shape = (math.prod(grid), latent_dim)                             # (N, d)
        self.encoder = Encoder(grid, patch_size, latent_dim, num_classes if encoder_classes else 0,
                               encoder_size, mixer_depth)
        self.norm = nn.BatchNorm1d(math.prod(self.latent_shape), affine=False) if batch_norm else None
        self.decoder = Decoder(grid, patch_size, latent_dim, num_classes, decoder_size, mixer_depth,
                               pixel_head)

    def encode(self, x, y=None):
        """z = E(x, y), not yet on the sphere.

        x        [B, 3, H, W]  image in [-1, 1]
        y        [B] int64     class 0..K, or None for the null class K; an unconditional model ignores it
        returns  [B, N, d]     float32 (float64 if the weights are)"""
        z = at_least_float32(self.encoder(x, labels_or_null(x, y, self.num_classes)))
        return z if self.norm is None else self.norm(z.flatten(1)).view_as(z)

    def decode(self, v, y=None):
        """x = D(v, y) for points v of the sphere. SE Eq. 2.

        v        [B, N, d]     norm sqrt(L)
        y        [B] int64     class 0..K, or None for the null class K; an unconditional model ignores it
        returns  [B, 3, H, W]  image in [-1, 1] (a tanh ends it), float32 (float64 if the weights are)"""
        return at_least_float32(self.decoder(v, labels_or_null(v, y, self.num_classes)))


def labels_or_null(batch, y, num_classes):
    """Classes [B] of a batch, or floats [B, K + 1] that mix class vectors; None is the null class for all."""
    if y is None:
        return torch.full((len(batch),), num_classes, device=batch.device)
    return torch.as_tensor(y, device=batch.device)


# ---- Encoder and decoder -----------------------------------------------------------------------------------


class Transformer(nn.Module):
    """What the transformers below share: a fixed position table and inits."""

    def __init__(self, grid, width, class_token=False):
        super().__init__()
        table = F.pad(sincos_table(grid, width), (0, 0, int(class_token), 0))   # a class token's row is zero
        # Fixed, but a parameter: released checkpoints hold it, and their parameter counts include it.
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)                     # [1, N, D]

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        # The computed table always stands: a file need not hold it, or holds it rounded to bf16.
        stored = state_dict.get(prefix + "pos_embed", self.pos_embed)
        table = self.pos_embed.detach()
        if stored.shape == table.shape:
            if not torch.allclose(stored.to(table), table, rtol=0, atol=4e-3):
                arguments[-1].append(f"{prefix}pos_embed is not the sin-cos table of this model's grid")
            state_dict[prefix + "pos_embed"] = table
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def initialize(self, last):
        """Inits of the released system, and SiT's: Xavier, and zero where a layer must begin as the identity.
        The last layer is zero too, and so is the network's output at the start."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, ClassTable):
                nn.init.normal_(module.embedding_table.weight, std=0.02)
        for linear in [last, *(module[1] for module in self.modules() if isinstance(module, AdaLN))]:
            nn.init.zeros_(linear.weight)


class ViT(Transformer):
    """The layers that encoder and decoder share: class table, blocks with RoPE, the modulated last layer."""

    def __init__(self, grid, num_classes, size, out_dim):
        width, depth, heads = _size(size, SIZES)
        super().__init__(grid, width)
        self.width = width
        conditional = num_classes > 0
        self.register_buffer("rope", rope_table(grid, width // heads), persistent=False)  # [2, N, D/heads/2]
        self.y_embedder = ClassTable(num_classes, width) if conditional else None
        self.blocks = nn.ModuleList([
            Block(width, Attention(width, heads), SwiGLU(width, int(width * 8 / 3)), conditional)
            for _ in range(depth)])
        self.ffn = ModulatedLinear(width, out_dim, conditional)

    def transform(self, x, y):
        """Embedded tokens [B, N, D] and classes [B] -> tokens [B, N, out_dim]."""
        c = self.y_embedder(y) if self.y_embedder else None                                 # [B, 1, D]
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x, c, self.rope)
        return self.ffn(x, c)


class Encoder(ViT):
    """Image [B, 3, H, W] -> latent z [B, N, d]: patches, blocks, then a Mixer in the latent's channels."""

    def __init__(self, grid, patch_size, latent_dim, num_classes, size, mixer_depth):
        super().__init__(grid, num_classes, size, latent_dim)
        self.x_embedder = nn.Sequential(nn.Conv2d(3, self.width, patch_size, stride=patch_size, bias=False),
                                        nn.Conv2d(self.width, self.width, 1))
        self.out = Mixer(math.prod(grid), latent_dim, mixer_depth) if mixer_depth else nn.Identity()
        self.initialize(self.ffn.linear)
        for conv in self.x_embedder:
            nn.init.xavier_uniform_(conv.weight.flatten(1))                 # fans of the flattened patch
        nn.init.zeros_(self.x_embedder[1].bias)

    def forward(self, x, y):
        x = self.x_embedder(x).flatten(2).transpose(1, 2)                                   # [B, N, D]
        return self.out(self.transform(x, y))                                               # [B, N, d]


class Decoder(ViT):
    """Latent v [B, N, d] -> image [B, 3, H, W]: a Mixer at full width, blocks, then a pixel head."""

    def __init__(self, grid, patch_size, latent_dim, num_classes, size, mixer_depth, pixel_head):
        if pixel_head not in ("linear", "conv"):
            raise ValueError(f"pixel_head must be linear or conv, got {pixel_head!r}")
        linear = pixel_head == "linear"
        super().__init__(grid, num_classes, size, 3 * patch_size**2 if linear else CONV_HEAD_CHANNELS)
        self.x_embedder = nn.Sequential(nn.Linear(latent_dim, self.width))
        if mixer_depth:
            self.x_embedder.append(Mixer(math.prod(grid), self.width, mixer_depth))
        self.out = LinearHead(grid, patch_size) if linear else ConvHead(grid, patch_size)
        self.initialize(self.ffn.linear)
        for module in self.x_embedder.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight)      # deviation 1, as released; ReZero hides the Mixers
        for module in self.out.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1), gain=0.01)        # of a matrix, as released
                nn.init.zeros_(module.bias)

    def forward(self, v, y):
        return self.out(self.transform(self.x_embedder(v), y))                              # [B, 3, H, W]


class LinearHead(nn.Module):
    """Tokens [B, N, 3 P^2], ordered (channel, row, column), -> image in [-1, 1]."""

    def __init__(self, grid, patch_size):
        super().__init__()
        self.grid = grid
        self.patch_size = patch_size
        self.conv = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")

    def forward(self, tokens):
        h, w = self.grid
        P = self.patch_size
        x = tokens.view(-1, h, w, 3, P, P).permute(0, 3, 1, 4, 2, 5)  # [B, 3, h, P, w, P]
        return torch.tanh(self.conv(x.reshape(-1, 3, h * P, w * P)))                        # [B, 3, H, W]


class ConvHead(nn.Module):
    """Tokens [B, N, 32] -> image in [-1, 1] through a transposed convolution (the released CIFAR-10 head)."""

    def __init__(self, grid, patch_size):
        super().__init__()
        self.grid = grid
        self.conv = nn.Conv2d(CONV_HEAD_CHANNELS, CONV_HEAD_CHANNELS, 3, padding=1, padding_mode="reflect")
        self.upsample = nn.ConvTranspose2d(CONV_HEAD_CHANNELS, 3, patch_size + 2, patch_size, padding=1)

    def forward(self, tokens):
        x = tokens.transpose(1, 2).reshape(len(tokens), CONV_HEAD_CHANNELS, *self.grid)     # [B, 32, h, w]
        return torch.tanh(self.upsample(F.silu(self.conv(x))))                              # [B, 3, H, W]


# ---- Transformer layers ------------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm block of attention and MLP, AdaLN-Zero if conditional: the identity at initialisation."""

    def __init__(self, width, attn, mlp, conditional, norm=RMSNorm):
        super().__init__()
        self.norm1 = norm(width)
        self.attn = attn
        self.norm2 = norm(width)
        self.mlp = mlp
        if conditional:
            self.adaLN_modulation = AdaLN(width, 6)

    def forward(self, x, c, *rope):
        if c is None:
            x = x + self.attn(self.norm1(x), *rope)
            return x + self.mlp(self.norm2(x))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)             # [B, 1, D] each
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, *rope)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class AdaLN(nn.Sequential):
    """Class vector c [B, 1, D] -> `count` modulation vectors [B, 1, D]; all zero at initialisation."""

    def __init__(self, width, count):
        super().__init__(nn.SiLU(), nn.Linear(width, count * width))
        self.count = count

    def forward(self, c):
        return super().forward(c).chunk(self.count, dim=-1)


class Attention(nn.Module):
    """Self-attention with axial rotary position embedding."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, rope):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))                # [B, N, 3, heads, head_dim]
        qkv = qkv.permute(2, 0, 3, 1, 4)                                    # [3, B, heads, N, head_dim]
        q, k = apply_rope(qkv[:2], rope)
        x = F.scaled_dot_product_attention(q, k, qkv[2])
        return self.proj(x.transpose(1, 2).flatten(2))                                      # [B, N, D]


class SwiGLU(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class ModulatedLinear(nn.Module):
    """Last layer: AdaLN and Linear, zero at initialisation; a bare Linear if unconditional."""

    def __init__(self, width, out_dim, conditional):
        super().__init__()
        self.linear = nn.Linear(width, out_dim)
        if conditional:
            self.norm = RMSNorm(width)
            self.adaLN_modulation = AdaLN(width, 2)

    def forward(self, x, c):
        if c is not None:
            shift, scale = self.adaLN_modulation(c)
            x = self.norm(x) * (1 + scale) + shift
        return self.linear(x)


class ClassTable(nn.Module):
    """One learned vector per class, and in the last row one for the null class."""

    def __init__(self, num_classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y):
        vectors = y @ self.embedding_table.weight if y.is_floating_point() else self.embedding_table(y)
        return vectors[:, None]                                                             # [B, 1, D]


class Mixer(nn.Module):
    """MLP-Mixer: lets every token see every other without a Linear on the flattened latent. SE Sec. 2.4.

    [B, N, dim] -> [B, N, dim]; ends in an RMSNorm, which bounds the output up to its learned weight."""

    def __init__(self, tokens, dim, depth):
        super().__init__()
        self.blocks = nn.Sequential(*[MixerBlock(tokens, dim) for _ in range(depth)])
        self.norm = RMSNorm(dim)

    def forward(self, x):
        return self.norm(self.blocks(at_least_float32(x)))      # the residual stream, under autocast too


class MixerBlock(nn.Module):
    """Token mixing, then channel mixing, each behind a ReZero gate that starts at 0."""

    def __init__(self, tokens, dim):
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.tok_mixer = nn.Sequential(nn.Linear(tokens, tokens), nn.SiLU(), nn.Linear(tokens, tokens))
        self.alpha1 = nn.Parameter(torch.zeros(1))
        self.norm2 = RMSNorm(dim)
        self.chn_mixer = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))
        self.alpha2 = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        x = x + self.alpha1 * self.tok_mixer(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.alpha2 * self.chn_mixer(self.norm2(x))


# ---- Sphere Latent Encoder: the denoiser -------------------------------------------------------------------


class SiT(Transformer):
    """Denoiser on the sphere, F: noisy point v -> prediction z_hat of the clean latent. SLE Sec. 4.1.

    tokens        N, of a square grid, or (h, w)
    token_dim     d, channels of a latent token
    num_classes   K; the class table's last row is the null class, an unconditional model's only one
    size          a name of SIT_SIZES or a (width, depth, heads) triple
    alpha_max     degrees; the angle of the noise at r = 1, in training and in sampling

    SiT with patches of one token and without its timestep: the class alone modulates the blocks. Where it has
    norms and biases is inferred from the released numbers of tensors and of parameters (401 and 675,160,896
    for XL/1 on ImageNet), which this network has; tanh-GELU, eps and inits are those of SiT, but that Xavier
    sees q, k and v one by one (assumed: SiT has them in one matrix, where it is sqrt(2) smaller). No rotary
    positions (assumed: they would leave no trace in these numbers, but there is a position table).
    Raises ValueError for an unknown size or a number of tokens that is no square."""

    tokenizer = None                                        # of the latents; see attach

    def __init__(self, tokens, token_dim, num_classes, size, alpha_max=85.0):
        grid = tuple(tokens) if isinstance(tokens, (tuple, list)) else (math.isqrt(tokens),) * 2
        if isinstance(tokens, int) and grid[0] ** 2 != tokens:
            raise ValueError(f"tokens must be the number of a square grid, or (h, w); got {tokens}")
        angle_to_sigma(alpha_max)                           # refuses one that cannot be
        width, depth, heads = _size(size, SIT_SIZES)
        super().__init__(grid, width)
        self.config = {"tokens": tokens, "token_dim": token_dim, "num_classes": num_classes, "size": size,
                       "alpha_max": alpha_max}              # to rebuild it from
        self.num_classes = num_classes
        self.alpha_max = alpha_max
        self.latent_shape = (math.prod(grid), token_dim)                              # (N, d)
        self.x_embedder = nn.Linear(token_dim, width)
        self.y_embedder = ClassTable(num_classes, width)
        self.blocks = nn.ModuleList([
            Block(width, SeparateAttention(width, heads, bias=False, qk_norm=True),
                  MLP(width, 4 * width, approximate="tanh"), conditional=True) for _ in range(depth)])
        self.final_layer = ModulatedLinear(width, token_dim, conditional=True)
        self.initialize(self.final_layer.linear)

    def attach(self, tokenizer):
        """Set `.tokenizer`, whose latents these are; returns the denoiser. It is no submodule: weights,
        counts, averages and gradients are the denoiser's alone, and it moves to a device by itself."""
        object.__setattr__(self, "tokenizer", tokenizer)
        self.image_size = tokenizer.image_size
        return self

    def forward(self, v, y=None):
        """z_hat = F(v, y), in the scale of the clean latent, not on the sphere.

        v        [B, N, d]  points of the sphere, norm sqrt(L)
        y        [B] int64  class 0..K, or None for the null class K
        returns  [B, N, d]  float32 (float64 if the weights are)"""
        c = self.y_embedder(labels_or_null(v, y, self.num_classes))                         # [B, 1, D]
        x = self.x_embedder(v) + self.pos_embed                                             # [B, N, D]
        for block in self.blocks:
            x = block(x, c)
        return at_least_float32(self.final_layer(x, c))


class SeparateAttention(nn.Module):
    """Self-attention whose queries, keys and values have a Linear each; with qk_norm, an RMSNorm per head."""

    def __init__(self, width, heads, bias, qk_norm=False):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width, bias=bias) for _ in range(4))
        self.q_norm, self.k_norm = (RMSNorm(width // heads) if qk_norm else nn.Identity()
                                    for _ in range(2))

    def forward(self, x):
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)    # [B, heads, N, head_dim]
                   for linear in (self.q, self.k, self.v))
        q, k = (norm(at_least_float32(x)).to(v.dtype) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))                                      # [B, N, D]


class MLP(nn.Sequential):
    def __init__(self, width, hidden, approximate="none"):
        super().__init__(nn.Linear(width, hidden), nn.GELU(approximate), nn.Linear(hidden, width))


# ---- Sphere Latent Encoder: the tokenizer ------------------------------------------------------------------


# DINOv2's entry point loads its own weights; of the RAE's decoders this is its authors' own (assumed).
DINOV2 = ("facebookresearch/dinov2:main", "dinov2_vitb14_reg")
RAE_FILES = "https://huggingface.co/nyu-visionx/RAE-collections/resolve/main/"
RAE_DECODER = (RAE_FILES + "decoders/dinov2/wReg_base/ViTXL_n08/model.pt",
               "rae_dinov2_wReg_base_ViTXL_n08.pt")                     # address, name in torch.hub's cache
RAE_STATISTICS = (RAE_FILES + "stats/dinov2/wReg_base/imagenet1k/stat.pt",
                  "rae_dinov2_wReg_base_imagenet1k_stat.pt")
RAE_DECODER_SIZE = {"token_dim": 768, "grid": 16, "width": 1152, "depth": 28, "heads": 16, "mlp_hidden": 4096}


class RAE(nn.Module):
    """The frozen representation autoencoder: DINOv2 with registers and a ViT decoder. SLE Sec. 4.1.

    encoder    module whose forward_features(pixels) gives "x_prenorm", as DINOv2's
    decoder    RAEDecoder
    mean, var  [N, d] statistics of the latents; the released mean is None: it was never collected

    A tokenizer is anything with encode and decode. Here, latents z are the tokens after DINOv2's last
    LayerNorm, without that norm's affine part, less their mean, over the root of their variance."""

    def __init__(self, encoder, decoder, mean, var):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.latent_shape = decoder.latent_shape                                            # (N, d)
        self.image_size = (decoder.grid * decoder.patch_size,) * 2
        self.register_buffer("mean", torch.zeros_like(var) if mean is None else mean)
        self.register_buffer("var", var)
        self.register_buffer("pixel_mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("pixel_std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])
        self.requires_grad_(False).eval()

    @classmethod
    def from_hub(cls):
        """The released one, through torch.hub: from its folder (see TORCH_HOME), or downloaded into it.
        Raises OSError that says which file to place where."""
        os.environ.setdefault("XFORMERS_DISABLED", "1")         # if installed, its attention fails on a CPU
        try:
            encoder = torch.hub.load(*DINOV2, trust_repo=True, skip_validation=True)
        except Exception as error:                              # as in pretrained
            hub = torch.hub.get_dir()
            raise OSError(f"DINOv2 is missing or damaged ({error!r}); place github.com/facebookresearch/"
                          f"dinov2 in {hub}/facebookresearch_dinov2_main, and its file "
                          f"dinov2_vitb14_reg4_pretrain.pth in {hub}/checkpoints") from None
        decoder = RAEDecoder(**RAE_DECODER_SIZE)
        decoder.load_state_dict(convert_rae_decoder(pretrained(*RAE_DECODER)))
        stored = pretrained(*RAE_STATISTICS)                                                # [d, h, w] each
        var = stored["var"].float().flatten(1).T
        mean = stored.get("mean")
        return cls(encoder, decoder, mean if mean is None else mean.float().flatten(1).T, var)

    @torch.no_grad()
    def encode(self, x):
        """z = E(x), normalised, not on the sphere.

        x        [B, 3, H, W]  image in [-1, 1]; resized to 14 pixels per token if need be
        returns  [B, N, d]     float32"""
        x = F.interpolate((x + 1) / 2, 14 * self.decoder.grid, mode="bicubic")
        features = self.encoder.forward_features((x - self.pixel_mean) / self.pixel_std)
        z = at_least_float32(features["x_prenorm"][:, -len(self.var):])         # no class token, no registers
        return (F.layer_norm(z, z.shape[-1:], eps=1e-6) - self.mean) / (self.var + 1e-5).sqrt()

    @torch.no_grad()
    def decode(self, z):
        """x = D(z) for latents z [B, N, d], normalised as encode gives them: image [B, 3, H, W], nominally in
        [-1, 1], not clamped."""
        x = self.decoder(z * (self.var + 1e-5).sqrt() + self.mean)
        return 2 * (at_least_float32(x) * self.pixel_std + self.pixel_mean) - 1


class RAEDecoder(Transformer):
    """ViT decoder of the RAE: tokens [B, grid^2, token_dim] -> ImageNet-normalised pixels [B, 3, H, W].

    As the released one: a class token that is dropped at the end, LayerNorm with eps 1e-12, exact GELU."""

    def __init__(self, token_dim, grid, width, depth, heads, mlp_hidden, patch_size=16):
        super().__init__((grid, grid), width, class_token=True)
        self.patch_size = patch_size
        self.grid = grid
        self.latent_shape = (grid**2, token_dim)
        self.embed = nn.Linear(token_dim, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        norm = partial(nn.LayerNorm, eps=1e-12)
        self.blocks = nn.ModuleList([
            Block(width, SeparateAttention(width, heads, bias=True), MLP(width, mlp_hidden), False, norm)
            for _ in range(depth)])
        self.norm = norm(width)
        self.pred = nn.Linear(width, 3 * patch_size**2)

    def forward(self, tokens):
        x = torch.cat([self.class_token.expand(len(tokens), -1, -1), self.embed(tokens)], dim=1)
        x = x + self.pos_embed                                                              # [B, 1 + N, D]
        for block in self.blocks:
            x = block(x, None)
        x = self.pred(self.norm(x))[:, 1:]                                                  # [B, N, P P 3]
        x = x.unflatten(1, (self.grid, self.grid)).unflatten(3, (self.patch_size, self.patch_size, 3))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)                         # [B, 3, H, W]


class SphereTokenizer(nn.Module):
    """A Sphere Encoder trained with little noise as tokenizer, where no RAE can be had; frozen.

    encode  x [B, 3, H, W] in [-1, 1] -> z = f(E(x)) [B, N, d]
    decode  z [B, N, d] -> D(f(z)) [B, 3, H, W] in [-1, 1]"""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.latent_shape = model.latent_shape
        self.image_size = model.image_size
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, x):
        return spherify(self.model.encode(x))

    @torch.no_grad()
    def decode(self, z):
        return self.model.decode(spherify(z))


# ---- Position ----------------------------------------------------------------------------------------------


def sincos_table(grid, width):
    """Fixed 2-D sin-cos position table [N, width], tokens in row-major order.

    The first half of the channels encodes the column, the second half the row (the reverse of RoPE's order);
    each half is [sin | cos] of position * theta^(-k / (width / 4)), computed in float64."""
    rows, columns = _angles(grid, width // 4)
    return torch.cat([f(half) for half in (columns, rows) for f in (torch.sin, torch.cos)], dim=1).float()


def rope_table(grid, head_dim):
    """Cosines and sines [2, N, head_dim / 2] of axial RoPE: one angle for every adjacent pair of channels.

    The first half of the pairs turns with the row, the second with the column; pair i of a half turns by
    position * theta^(-2i / (head_dim / 2))."""
    angle = torch.cat(_angles(grid, head_dim // 4), dim=1)                              # [N, head_dim/2]
    return torch.stack([angle.cos(), angle.sin()]).float()


def apply_rope(x, rope):
    """Rotate the channel pairs (0, 1), (2, 3), ... of x [..., N, head_dim]; computed in float32."""
    cos, sin = rope
    pairs = x.to(torch.promote_types(x.dtype, rope.dtype)).unflatten(-1, (-1, 2))
    a, b = pairs.unbind(-1)                                                             # [..., N, head_dim/2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


def _angles(grid, count):
    """Row and column of every token, each times theta^(-k / count), k = 0 .. count - 1: two of [N, count]."""
    h, w = grid
    index = torch.arange(h * w)
    frequency = ROPE_THETA ** (-torch.arange(count, dtype=torch.float64) / count)
    return [position[:, None] * frequency for position in (index // w, index % w)]


def _size(size, named):
    """(width, depth, heads) of a size that is given so, or by its name."""
    size = named.get(str(size), size)
    if not re.fullmatch(r"\W[1-9]\d*, [1-9]\d*, [1-9]\d*\W", str(size)) or size[0] % (4 * size[2]):
        raise ValueError(f"a size must be one of {', '.join(named)}, or width,depth,heads where the width is "
                         f"a multiple of 4 heads; got {size!r}")
    return size


# ---- Building ----------------------------------------------------------------------------------------------


def build_model(preset, class_names, latent_shape=None, generator=torch.default_generator):
    """The network of a Preset of train.py; latent_shape (N, d) is that of a denoiser's tokenizer. The seed
    of a generator, by default that of torch.manual_seed, decides its weights; no random state is changed."""
    p = preset
    if not p.conditional:
        class_names = []
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(generator.initial_seed())
        if p.tokenizer:
            model = SiT(*latent_shape, len(class_names), p.denoiser_size, p.alpha_max)
        else:
            model = SphereEncoder(p.image_size, p.patch_size, p.latent_dim, len(class_names), p.encoder_size,
                                  p.decoder_size, p.mixer_depth, p.pixel_head, p.alpha_max, p.encoder_classes,
                                  p.batch_norm)
    model.class_names = [*map(str, class_names)]
    return model


def cost(preset, num_classes, coder_preset=None):
    """The network of a preset, without weights, and GFLOPs of one image: of its encoding (0 for an RAE, which
    encodes only to train), denoising (0 in a Sphere Encoder) and decoding, and of its sampling in T steps.
    2 for every multiply-add. coder_preset is that of a denoiser's tokenizer, unless it is an RAE."""
    def flops(call, *shape):
        with FlopCounterMode(display=False) as counter:
            call(torch.empty(1, *shape))
        return counter.get_total_flops() / 1e9

    rae = preset.tokenizer == "rae"
    classes = range(num_classes)
    with torch.device("meta"):
        coder = RAEDecoder(**RAE_DECODER_SIZE) if rae else build_model(coder_preset or preset, classes)
        model = build_model(preset, classes, coder.latent_shape) if preset.tokenizer else coder
        encode = 0 if rae else flops(coder.encode, 3, *coder.image_size)
        denoise = flops(model, *model.latent_shape) if preset.tokenizer else 0
        decode = flops(coder if rae else coder.decode, *coder.latent_shape)
    return model, {"encode": encode, "denoise": denoise, "decode": decode} | {
        f"T = {T}": T * denoise + decode if denoise else T * decode + (T - 1) * encode for T in (1, 2, 4, 6)}


def parameter_groups(model, encoder_scale, weight_decay):
    """Groups for an optimizer, of encoder and decoder or of a denoiser: the matrices, which decay, and the
    rest, which does not. "lr_scale" is encoder_scale for an encoder, else 1."""
    networks = [(model, 1.0)]
    if isinstance(model, SphereEncoder):
        networks = [(model.encoder, encoder_scale), (model.decoder, 1.0)]
    groups = []
    for network, scale in networks:
        for matrices in (True, False):
            members = [p for p in network.parameters() if p.requires_grad and (p.ndim > 1) == matrices]
            groups.append({"params": members, "weight_decay": weight_decay * matrices, "lr_scale": scale})
    return groups


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """Move the averaged weights towards the model's."""
    decay = min(decay, (1 + step) / (10 + step))        # assumed; else short runs keep initial zeros
    get_ema_multi_avg_fn(decay)([*ema.parameters()], [*model.parameters()], None)
    for average, buffer in zip(ema.buffers(), model.buffers()):             # statistics of a batch norm
        average.copy_(buffer)


def take_weights(model, weights):
    """Load the weights whose name and shape fit; returns how many. Raises ValueError if none does."""
    own = model.state_dict()
    fits = {name: tensor for name, tensor in weights.items()
            if name in own and own[name].shape == tensor.shape}
    if not fits:
        raise ValueError("no weights of such a model: --init")
    model.load_state_dict(fits, strict=False)
    return len(fits)


# ---- Released weights --------------------------------------------------------------------------------------
# Only names are translated here; load_state_dict then names every key that is missing, unknown or misshapen.


def convert_official(state_dict):
    """Weights of the released Sphere Encoder ("model" or "ema_model" of its checkpoint) under our names."""
    weights = {name: tensor.reshape(1) if tensor.ndim == 0 else tensor          # ReZero gates in older files
               for name, tensor in _unwrapped(state_dict).items() if not name.endswith(".rope")}
    return _renamed(weights, (r"(tok|chn)_mixer\.mix\.", r"\1_mixer."), (r"\bout\.2\.", "out.conv."),
                    (r"\bout\.4\.", "out.upsample."),
                    (r"decoder\.x_embedder\.(?=weight|bias)", "decoder.x_embedder.0."))      # without mixers


def convert_official_config(cfg):
    """The dictionary in a released cfg.json -> keyword arguments of SphereEncoder.

    Raises KeyError for a missing key, ValueError for a weightless option that the paper does not use."""
    if cfg.get("spherify_model"):
        raise ValueError("its spherify_model is set, which no released model has")
    return dict(image_size=cfg["image_size"], patch_size=cfg["patch_size"], latent_dim=cfg["token_channels"],
                num_classes=cfg["num_classes"] if cfg["cond_generator"] else 0,
                encoder_size=cfg["vit_enc_model_size"], decoder_size=cfg["vit_dec_model_size"],
                mixer_depth=cfg["vit_enc_latent_mlp_mixer_depth"], pixel_head=cfg["pixel_head_type"],
                alpha_max=float(cfg["noise_sigma_max_angle"]))


def convert_rae_decoder(state_dict):
    """Weights of a released RAE decoder under our names; the class token, which some files lack, is zero."""
    weights = _renamed(
        _unwrapped(state_dict), (r"^decoder\.", ""), (r"^decoder_layers\.", "blocks."),
        (r"^decoder_(embed|pos_embed|norm|pred)", r"\1"), (r"^trainable_cls_token", "class_token"),
        (r"layernorm_before", "norm1"), (r"layernorm_after", "norm2"),
        (r"attention\.attention\.(q|k|v)\w+", r"attn.\1"), (r"attention\.output\.dense", "attn.proj"),
        (r"intermediate\.dense", "mlp.0"), (r"output\.dense", "mlp.2"))
    if "embed.weight" in weights:
        weights.setdefault("class_token", torch.zeros(1, 1, len(weights["embed.weight"])))
    return weights


def _unwrapped(state_dict):
    """Weights in float32, without the key under which a file holds them and the prefixes of wrappers."""
    for key in ("model", "state_dict"):
        state_dict = state_dict.get(key, state_dict)
    wrapper = r"(?<![^.])(_orig_mod|module|_checkpoint_wrapped_module)\."
    return {re.sub(wrapper, "", name): tensor.float() for name, tensor in state_dict.items()}


def _renamed(weights, *rules):
    for pattern, new in rules:
        weights = {re.sub(pattern, new, name): tensor for name, tensor in weights.items()}
    return weights


def pretrained(url, file_name=None):
    """What a published file holds, through torch.hub: from its cache (see TORCH_HOME), or downloaded into it.

    url        ends in -HASH.pth, which a download is checked against; else give the file_name of the cache
    Raises OSError that says which file to place where."""
    try:
        return torch.hub.load_state_dict_from_url(url, file_name=file_name, check_hash=file_name is None,
                                                  map_location="cpu", weights_only=True)
    except Exception as error:                              # no network, or one of torch.load's many kinds
        name = file_name or url.rsplit("/", 1)[1]
        raise OSError(f"{torch.hub.get_dir()}/checkpoints/{name} is missing or damaged ({error!r}); place "
                      f"{url} there") from None
