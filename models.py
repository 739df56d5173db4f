"""Networks: the Sphere Encoder's ViT encoder and decoder with their MLP-Mixers, SE Sec. 2.4; the Sphere
Latent Encoder's denoiser (SiT) and frozen tokenizer (RAE), SLE Sec. 4.1; released weights of all of them.

What the papers leave open (SwiGLU, RMSNorm, ReZero, inits, pixel heads) is as in the released systems, and so
are the parameters' names, but for those that the converters at the end translate.

    x  [B, 3, H, W]  image in [-1, 1]           y  [B] int64 class, K = num_classes is the null class
    z  [B, N, d]     Euclidean latent           v  [B, N, d]  latent on the sphere
    N = h w tokens, h = H / P, w = W / P        D  width of the transformer
"""

import hashlib
import math
import os
import pickle
import re
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from spherify import angle_to_sigma, at_least_float32, spherify

# (width, depth, heads) of encoder or decoder; the released system's table. Paper: Base, Large and XLarge.
SIZES = {
    "small": (512, 8, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "xlarge": (1152, 28, 16),
    "huge": (1280, 32, 16),
    "giant": (1664, 40, 16),
}
# (width, depth, heads) of the denoiser.
SIT_SIZES = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
NORM_EPS = 1e-6         # of every RMSNorm
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
    alpha_max     degrees; the angle of the largest training noise, with which sampling starts every step
    encoder_classes  False makes an encoder that is blind to the class, which the paper warns of (Sec. 4,
                  "Conditional Uniformity")
    batch_norm    normalise E's output over batch and tokens, per channel, before f; without a learned scale
                  and shift (assumed: they could undo it). App. C.3

    Neither encode nor decode projects onto the sphere: that is spherify's, between the two.
    Raises ValueError if the sizes do not fit each other.
    """

    def __init__(self, image_size, patch_size, latent_dim, num_classes, encoder_size, decoder_size,
                 mixer_depth, pixel_head="linear", alpha_max=80.0, encoder_classes=True, batch_norm=False):
        super().__init__()
        H, W = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
        if patch_size < 1 or H < patch_size or W < patch_size or H % patch_size or W % patch_size:
            raise ValueError(f"image_size {image_size} must be a multiple of patch_size {patch_size}")
        if latent_dim < 1 or num_classes < 0 or mixer_depth < 0:
            raise ValueError(f"expected latent_dim >= 1, num_classes >= 0 and mixer_depth >= 0, "
                             f"got {latent_dim}, {num_classes} and {mixer_depth}")
        angle_to_sigma(alpha_max)
        # The class's keyword arguments, from which a checkpoint rebuilds the model.
        self.config = dict(image_size=image_size, patch_size=patch_size, latent_dim=latent_dim,
                           num_classes=num_classes, encoder_size=encoder_size, decoder_size=decoder_size,
                           mixer_depth=mixer_depth, pixel_head=pixel_head, alpha_max=alpha_max,
                           encoder_classes=encoder_classes, batch_norm=batch_norm)
        self.image_size = (H, W)
        self.num_classes = num_classes
        self.alpha_max = alpha_max
        grid = (H // patch_size, W // patch_size)
        if min(grid if pixel_head == "conv" else (H, W)) < 2:
            raise ValueError(f"image_size {image_size} with patch_size {patch_size} is too small for the "
                             f"pixel head")
        self.latent_shape = (grid[0] * grid[1], latent_dim)                           # (N, d)
        self.encoder = Encoder(grid, patch_size, latent_dim, num_classes if encoder_classes else 0,
                               encoder_size, mixer_depth)
        self.norm = nn.BatchNorm1d(latent_dim, affine=False) if batch_norm else None
        self.decoder = Decoder(grid, patch_size, latent_dim, num_classes, decoder_size, mixer_depth,
                               pixel_head)

    def encode(self, x, y=None):
        """z = E(x, y), not yet on the sphere.

        x        [B, 3, H, W]  image in [-1, 1]
        y        [B] int64     class 0..K, or None for the null class K; an unconditional model ignores it
        returns  [B, N, d]     float32 (float64 if the weights are)
        Raises ValueError for another shape.
        """
        if x.shape[1:] != (3, *self.image_size):
            raise ValueError(f"encode: expected images [B, 3, {self.image_size[0]}, {self.image_size[1]}], "
                             f"got {list(x.shape)}")
        z = at_least_float32(self.encoder(x, labels_or_null(x, y, self.num_classes)))
        return z if self.norm is None else self.norm(z.transpose(1, 2)).transpose(1, 2)

    def decode(self, v, y=None):
        """x = D(v, y) for points v of the sphere. SE Eq. 2.

        v        [B, N, d]     norm sqrt(L)
        y        [B] int64     class 0..K, or None for the null class K; an unconditional model ignores it
        returns  [B, 3, H, W]  image in [-1, 1] (the head ends in tanh), float32 (float64 if the weights are)
        Raises ValueError for another shape.
        """
        if v.shape[1:] != self.latent_shape:
            raise ValueError(f"decode: expected latents [B, {self.latent_shape[0]}, {self.latent_shape[1]}], "
                             f"got {list(v.shape)}")
        return at_least_float32(self.decoder(v, labels_or_null(v, y, self.num_classes)))


def labels_or_null(batch, y, num_classes):
    """Classes [B] of a batch; None becomes the null class for all of it. Floats [B, K + 1] are mixed classes:
    how much of each class vector."""
    if y is None:
        return torch.full((len(batch),), num_classes, device=batch.device)
    if y.shape not in ((len(batch),), (len(batch), num_classes + 1)):
        raise ValueError(f"expected one class per sample, [{len(batch)}], got {list(y.shape)}")
    return y


# ---- Encoder and decoder -----------------------------------------------------------------------------------


class Transformer(nn.Module):
    """What the transformers below share: a fixed position table, blocks, inits."""

    recompute = False       # activation checkpointing: keep only the blocks' inputs for the backward pass

    def __init__(self, grid, width, class_token=False):
        super().__init__()
        table = F.pad(sincos_table(grid, width), (0, 0, int(class_token), 0))   # a class token's row is zero
        # Fixed, but a parameter: released checkpoints hold it, and their parameter counts include it.
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)                     # [1, N, D]

    def through_blocks(self, x, *conditions):
        """Embedded tokens [B, N, D] -> tokens [B, N, D]; conditions as the blocks take them."""
        x = x + self.pos_embed
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, *conditions, use_reentrant=False)
            else:
                x = block(x, *conditions)
        return x

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        # A table that the model computes need not stand in a file, and must not be another grid's.
        table = state_dict.setdefault(prefix + "pos_embed", self.pos_embed.detach())
        if table.shape == self.pos_embed.shape and not torch.allclose(table.to(self.pos_embed),
                                                                      self.pos_embed, rtol=0, atol=1e-5):
            errors.append(f"{prefix}pos_embed is not the sin-cos table of this model's grid")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

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
        for module in self.modules():
            if isinstance(module, AdaLN):
                nn.init.zeros_(module[1].weight)
        nn.init.zeros_(last.weight)


class ViT(Transformer):
    """What encoder and decoder share: class table, blocks with RoPE and the modulated last layer."""

    def __init__(self, grid, num_classes, size, out_dim):
        width, depth, heads = _size(size, SIZES)
        super().__init__(grid, width)
        self.width, self.conditional = width, num_classes > 0
        self.register_buffer("rope", rope_table(grid, width // heads), persistent=False)  # [2, N, D/heads/2]
        if self.conditional:
            self.y_embedder = ClassTable(num_classes, width)
        self.blocks = nn.ModuleList([Block(width, heads, self.conditional) for _ in range(depth)])
        self.ffn = ModulatedLinear(width, out_dim, self.conditional)

    def embed(self, y):
        """Classes [B] -> class vectors c [B, 1, D], None if unconditional."""
        return self.y_embedder(y) if self.conditional else None

    def transform(self, x, c):
        """Embedded tokens [B, N, D] and class vectors [B, 1, D] -> tokens [B, N, out_dim]."""
        return self.ffn(self.through_blocks(x, c, self.rope), c)


class Encoder(ViT):
    """Image [B, 3, H, W] -> latent z [B, N, d]: patches, blocks, then a Mixer in the latent's channels."""

    def __init__(self, grid, patch_size, latent_dim, num_classes, size, mixer_depth):
        super().__init__(grid, num_classes, size, latent_dim)
        self.x_embedder = nn.Sequential(
            nn.Conv2d(3, self.width, patch_size, stride=patch_size, bias=False),
            nn.Conv2d(self.width, self.width, 1),
        )
        self.out = Mixer(grid[0] * grid[1], latent_dim, mixer_depth) if mixer_depth else nn.Identity()
        self.initialize(self.ffn.linear)
        for conv in self.x_embedder:
            nn.init.xavier_uniform_(conv.weight.view(self.width, -1))     # fans of the flattened patch
        nn.init.zeros_(self.x_embedder[1].bias)

    def forward(self, x, y):
        tokens = self.x_embedder(x).flatten(2).transpose(1, 2)                              # [B, N, D]
        return self.out(self.transform(tokens, self.embed(y)))                              # [B, N, d]


class Decoder(ViT):
    """Latent v [B, N, d] -> image [B, 3, H, W]: a Mixer at full width, blocks, then a pixel head."""

    def __init__(self, grid, patch_size, latent_dim, num_classes, size, mixer_depth, pixel_head):
        if pixel_head not in ("linear", "conv"):
            raise ValueError(f"pixel_head must be 'linear' or 'conv', got {pixel_head!r}")
        linear = pixel_head == "linear"
        super().__init__(grid, num_classes, size, 3 * patch_size**2 if linear else CONV_HEAD_CHANNELS)
        self.x_embedder = nn.Sequential(nn.Linear(latent_dim, self.width))
        if mixer_depth:
            self.x_embedder.append(Mixer(grid[0] * grid[1], self.width, mixer_depth))
        self.out = LinearHead(grid, patch_size) if linear else ConvHead(grid, patch_size)
        self.initialize(self.ffn.linear)
        for module in self.x_embedder.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1.0)      # released init; ReZero hides the Mixers at first
        for module in self.out.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.xavier_uniform_(module.weight, gain=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, v, y):
        return self.out(self.transform(self.x_embedder(v), self.embed(y)))                  # [B, 3, H, W]


class LinearHead(nn.Module):
    """Tokens [B, N, 3 P^2], ordered (channel, row, column), -> image in [-1, 1]."""

    def __init__(self, grid, patch_size):
        super().__init__()
        self.grid, self.patch_size = grid, patch_size
        self.conv = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")

    def forward(self, tokens):
        (h, w), P = self.grid, self.patch_size
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
    """Pre-norm transformer block, AdaLN-Zero if conditional: the identity at initialisation."""

    def __init__(self, width, heads, conditional):
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.RMSNorm(width, eps=NORM_EPS)
        self.mlp = SwiGLU(width, int(width * 8 / 3))
        if conditional:
            self.adaLN_modulation = AdaLN(width, 6)

    def forward(self, x, c, rope):
        if c is None:
            x = x + self.attn(self.norm1(x), rope)
            return x + self.mlp(self.norm2(x))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)             # [B, 1, D] each
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, rope)
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
            self.norm = nn.RMSNorm(width, eps=NORM_EPS)
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

    [B, N, dim] -> [B, N, dim]; ends in an RMSNorm, which keeps the latent's magnitude near its learned
    weight.
    """

    def __init__(self, tokens, dim, depth):
        super().__init__()
        self.blocks = nn.ModuleList([MixerBlock(tokens, dim) for _ in range(depth)])
        self.norm = nn.RMSNorm(dim, eps=NORM_EPS)

    def forward(self, x):
        x = at_least_float32(x)         # as the residual stream of the blocks, under autocast too
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class MixerBlock(nn.Module):
    """Token mixing, then channel mixing, each behind a ReZero gate that starts at 0."""

    def __init__(self, tokens, dim):
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=NORM_EPS)
        self.tok_mixer = nn.Sequential(nn.Linear(tokens, tokens), nn.SiLU(), nn.Linear(tokens, tokens))
        self.alpha1 = nn.Parameter(torch.zeros(1))
        self.norm2 = nn.RMSNorm(dim, eps=NORM_EPS)
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
    alpha_max     degrees; the angle of the largest training noise, with which sampling starts every step
    gamma, shared  how sampling adds noise unless told otherwise; see sample.generate_latent

    SiT with patches of one token and without its timestep: the class alone modulates the blocks. Where it has
    norms and biases is inferred from the released numbers of tensors and of parameters (401 and 675,160,896
    for XL/1 on ImageNet), which this network has; tanh-GELU, eps and inits are those of SiT. No rotary
    positions (assumed: they would leave no trace in these numbers, but there is a position table).
    Raises ValueError if the sizes do not fit each other.
    """

    tokenizer = None                                        # of the latents; see attach

    def __init__(self, tokens, token_dim, num_classes, size, alpha_max=85.0, gamma=1.0, shared=True):
        grid = tuple(tokens) if isinstance(tokens, (tuple, list)) else (math.isqrt(max(tokens, 0)),) * 2
        if min(grid) < 1 or isinstance(tokens, int) and grid[0] ** 2 != tokens:
            raise ValueError(f"tokens must be the size of a square grid, or (h, w); got {tokens}")
        if token_dim < 1 or num_classes < 0:
            raise ValueError(f"expected token_dim >= 1 and num_classes >= 0, got {token_dim} and "
                             f"{num_classes}")
        angle_to_sigma(alpha_max)
        width, depth, heads = _size(size, SIT_SIZES)
        super().__init__(grid, width)
        # The class's keyword arguments, from which a checkpoint rebuilds the model.
        self.config = dict(tokens=tokens, token_dim=token_dim, num_classes=num_classes, size=size,
                           alpha_max=alpha_max, gamma=gamma, shared=shared)
        self.num_classes, self.alpha_max, self.gamma, self.shared = num_classes, alpha_max, gamma, shared
        self.latent_shape = (grid[0] * grid[1], token_dim)                            # (N, d)
        self.x_embedder = nn.Linear(token_dim, width)
        self.y_embedder = ClassTable(num_classes, width)
        self.blocks = nn.ModuleList([SiTBlock(width, heads) for _ in range(depth)])
        self.final_layer = ModulatedLinear(width, token_dim, conditional=True)
        self.initialize(self.final_layer.linear)

    def attach(self, tokenizer):
        """Set `.tokenizer`, whose latents this denoiser works on; returns the denoiser. It is not registered
        as a submodule, so that weights, counts, averages and gradients are the denoiser's alone, but moves to
        another device with it.
        Raises ValueError if its latents have another shape.
        """
        if tuple(tokenizer.latent_shape) != self.latent_shape:
            raise ValueError(f"the tokenizer's latents are {list(tokenizer.latent_shape)}, the denoiser's "
                             f"{list(self.latent_shape)}")
        object.__setattr__(self, "tokenizer", tokenizer)
        self.image_size = tokenizer.image_size
        return self

    def _apply(self, move, recurse=True):
        if self.tokenizer is not None:
            self.tokenizer._apply(move, recurse)
        return super()._apply(move, recurse)

    def forward(self, v, y=None):
        """z_hat = F(v, y), in the scale of the clean latent, not on the sphere.

        v        [B, N, d]  points of the sphere, norm sqrt(L)
        y        [B] int64  class 0..K, or None for the null class K
        returns  [B, N, d]  float32 (float64 if the weights are)
        Raises ValueError for another shape.
        """
        if v.shape[1:] != self.latent_shape:
            raise ValueError(f"SiT: expected latents [B, {self.latent_shape[0]}, {self.latent_shape[1]}], "
                             f"got {list(v.shape)}")
        c = self.y_embedder(labels_or_null(v, y, self.num_classes))                         # [B, 1, D]
        return at_least_float32(self.final_layer(self.through_blocks(self.x_embedder(v), c), c))


class SiTBlock(nn.Module):
    """Pre-norm block with AdaLN-Zero: the identity at initialisation."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=NORM_EPS)
        self.attn = SeparateAttention(width, heads, bias=False, qk_norm=True)
        self.norm2 = nn.RMSNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, 4 * width, approximate="tanh")
        self.adaLN_modulation = AdaLN(width, 6)

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)             # [B, 1, D] each
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class SeparateAttention(nn.Module):
    """Self-attention whose queries, keys and values have a Linear each; with qk_norm, an RMSNorm per head."""

    def __init__(self, width, heads, bias, qk_norm):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width, bias=bias) for _ in range(4))
        self.q_norm, self.k_norm = (nn.RMSNorm(width // heads, eps=NORM_EPS) if qk_norm else nn.Identity()
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


class RAE(nn.Module):
    """The frozen representation autoencoder: DINOv2 with registers and a ViT decoder. SLE Sec. 4.1.

    repo             of DINOv2: "facebookresearch/dinov2:main" for torch.hub, or a folder that holds its files
    encoder          entry point of that repository
    encoder_weights  file of DINOv2's weights; None: as the entry point loads them (from torch.hub's cache)
    decoder_weights  file of the decoder's weights; None: torch.hub's cache, downloaded first
    statistics       file with "var" (and "mean", if not None) of the latents; None: as decoder_weights
    heads            of the decoder, which weights do not tell; None: those of its released sizes

    A tokenizer is anything with encode and decode. Here, latents z are the tokens after DINOv2's last
    LayerNorm, without that norm's affine part, divided by the square root of their variance. The released
    statistics have no mean: it was never collected, and is not subtracted.
    Raises FileNotFoundError naming file, URL and place of what is missing, ValueError naming what is wrong.
    """

    def __init__(self, repo="facebookresearch/dinov2:main", encoder="dinov2_vitb14_reg", encoder_weights=None,
                 decoder_weights=None, statistics=None, heads=None):
        super().__init__()
        files = dict(repo=repo, encoder_weights=encoder_weights, decoder_weights=decoder_weights,
                     statistics=statistics)
        # Not Path, which no checkpoint may hold.
        self.config = {name: value and str(value) for name, value in files.items()} | dict(encoder=encoder,
                                                                                           heads=heads)
        self.encoder = _dinov2(repo, encoder, encoder_weights)
        weights = convert_rae_decoder(_rae_file(decoder_weights, *RAE_DECODER),
                                      decoder_weights or RAE_DECODER[0])
        width, d = weights["embed.weight"].shape
        grid = math.isqrt(weights["pos_embed"].shape[1] - 1) if "pos_embed" in weights else 16
        if heads is None and width not in RAE_HEADS:
            raise ValueError(f"{decoder_weights}: a decoder of width {width}, expected one of "
                             f"{', '.join(map(str, RAE_HEADS))}; of others, give RAE their number of heads")
        depth, mlp_hidden = _depth_of(weights, "blocks"), len(weights["blocks.0.mlp.0.weight"])
        self.decoder = RAEDecoder(d, grid, width, depth, heads or RAE_HEADS[width], mlp_hidden,
                                  math.isqrt(len(weights["pred.bias"]) // 3))
        self.decoder.load_state_dict(weights)
        self.grid, self.latent_shape = grid, (grid**2, d)                                   # (N, d)
        self.image_size = (grid * self.decoder.patch_size,) * 2
        stored = _rae_file(statistics, *RAE_STATISTICS)
        if stored.get("var") is None:
            raise ValueError(f"{statistics or RAE_STATISTICS[0]}: no statistics, it holds no 'var'; replace "
                             f"it by {RAE_STATISTICS[0]}")
        for name in ("mean", "var"):
            value = stored.get(name)
            if value is None:
                value = torch.zeros(d, grid, grid)
            if tuple(value.shape) != (d, grid, grid):
                raise ValueError(f"{statistics or RAE_STATISTICS[0]}: {name} is {list(value.shape)}, but the "
                                 f"decoder's latents are [{d}, {grid}, {grid}]")
            self.register_buffer(name, value.float().flatten(1).T)                          # [N, d]
        self.register_buffer("pixel_mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("pixel_std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, x):
        """z = E(x), normalised, not on the sphere.

        x        [B, 3, H, W]  image in [-1, 1]; resized to 14 pixels per token if need be
        returns  [B, N, d]     float32
        Raises ValueError if the encoder's tokens are not the decoder's.
        """
        side = 14 * self.grid
        x = (x + 1) / 2
        if x.shape[-2:] != (side, side):
            x = F.interpolate(x, (side, side), mode="bicubic")
        x = (x - self.pixel_mean) / self.pixel_std
        features = self.encoder.forward_features(x)
        N, d = self.latent_shape
        z = features["x_prenorm"][:, -features["x_norm_patchtokens"].shape[1]:]     # no class, no registers
        if z.shape[1:] != (N, d):
            raise ValueError(f"RAE: the encoder gives tokens {list(z.shape[1:])}, but the decoder takes "
                             f"{[N, d]}; use the two that belong together")
        z = F.layer_norm(at_least_float32(z), (d,), eps=1e-6)
        return (z - self.mean) / (self.var + 1e-5).sqrt()

    @torch.no_grad()
    def decode(self, z):
        """x = D(z) for latents z [B, N, d], normalised as encode gives them: image [B, 3, H, W], nominally in
        [-1, 1], not clamped."""
        x = self.decoder(z * (self.var + 1e-5).sqrt() + self.mean)
        return 2 * (at_least_float32(x) * self.pixel_std + self.pixel_mean) - 1

    def train(self, mode=True):
        return super().train(False)                         # frozen


class RAEDecoder(Transformer):
    """ViT decoder of the RAE: tokens [B, grid^2, token_dim] -> ImageNet-normalised pixels [B, 3, H, W].

    As the released one: a class token that is dropped at the end, LayerNorm with eps 1e-12, exact GELU.
    """

    def __init__(self, token_dim, grid, width, depth, heads, mlp_hidden, patch_size=16):
        super().__init__((grid, grid), width, class_token=True)
        self.patch_size, self.grid = patch_size, grid
        self.embed = nn.Linear(token_dim, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList([RAEBlock(width, heads, mlp_hidden) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.pred = nn.Linear(width, 3 * patch_size**2)

    def forward(self, tokens):
        if tokens.shape[1:] != (self.grid**2, self.embed.in_features):
            raise ValueError(f"RAEDecoder: expected latents [B, {self.grid**2}, {self.embed.in_features}], "
                             f"got {list(tokens.shape)}")
        x = torch.cat([self.class_token.expand(len(tokens), -1, -1), self.embed(tokens)], dim=1)
        x = self.pred(self.norm(self.through_blocks(x)))[:, 1:]                             # [B, N, P P 3]
        x = x.unflatten(1, (self.grid, self.grid)).unflatten(3, (self.patch_size, self.patch_size, 3))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)                         # [B, 3, H, W]


class RAEBlock(nn.Module):
    def __init__(self, width, heads, mlp_hidden):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-12)
        self.attn = SeparateAttention(width, heads, bias=True, qk_norm=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-12)
        self.mlp = MLP(width, mlp_hidden)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SphereTokenizer(nn.Module):
    """A Sphere Encoder trained with little noise as tokenizer, where no RAE can be had; frozen.

    encode  x [B, 3, H, W] in [-1, 1] -> z = f(E(x)) [B, N, d]
    decode  z [B, N, d] -> D(f(z)) [B, 3, H, W] in [-1, 1]
    """

    def __init__(self, model):
        super().__init__()
        self.model, self.latent_shape, self.image_size = model, model.latent_shape, model.image_size
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, x):
        return spherify(self.model.encode(x))

    @torch.no_grad()
    def decode(self, z):
        return self.model.decode(spherify(z))

    def train(self, mode=True):
        return super().train(False)


def weights_digest(module):
    """SHA-256 of all parameters and buffers with their names: what identifies a tokenizer."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- Position ----------------------------------------------------------------------------------------------


def sincos_table(grid, width):
    """Fixed 2-D sin-cos position table [N, width], tokens in row-major order.

    The first half of the channels encodes the column, the second half the row (the reverse of RoPE's order);
    each half is [sin | cos] of position * theta^(-k / (width / 4)), computed in float64.
    """
    rows, columns = _positions(grid)
    frequency = ROPE_THETA ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    halves = [position[:, None] * frequency for position in (columns, rows)]  # [N, width/4] each
    return torch.cat([f(half) for half in halves for f in (torch.sin, torch.cos)], dim=1).float()


def rope_table(grid, head_dim):
    """Cosines and sines [2, N, head_dim / 2] of axial RoPE: one angle for every adjacent pair of channels.

    The first half of the pairs turns with the row, the second with the column; pair i of a half turns by
    position * theta^(-2i / (head_dim / 2)).
    """
    rows, columns = _positions(grid)
    frequency = ROPE_THETA ** (-torch.arange(head_dim // 4, dtype=torch.float64) / (head_dim // 4))
    halves = [position[:, None] * frequency for position in (rows, columns)]            # [N, head_dim/4] each
    angle = torch.cat(halves, dim=1)                                                    # [N, head_dim/2]
    return torch.stack([angle.cos(), angle.sin()]).float()


def apply_rope(x, rope):
    """Rotate the channel pairs (0, 1), (2, 3), ... of x [..., N, head_dim]; computed in float32."""
    cos, sin = rope
    pairs = x.to(torch.promote_types(x.dtype, rope.dtype)).unflatten(-1, (-1, 2))
    a, b = pairs.unbind(-1)                                                             # [..., N, head_dim/2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


def _positions(grid):
    h, w = grid
    index = torch.arange(h * w)
    return (index // w).double(), (index % w).double()


def _size(size, named):
    if isinstance(size, str):
        if size not in named:
            raise ValueError(f"unknown size {size!r}; expected one of {', '.join(named)} or "
                             f"(width, depth, heads)")
        size = named[size]
    if len(size) != 3 or min(size) < 1 or size[0] % (4 * size[2]):
        raise ValueError(f"a size must be (width, depth, heads), all positive, width a multiple of 4 heads; "
                         f"got {size}")
    return size


# ---- Released weights --------------------------------------------------------------------------------------


def convert_official(state_dict):
    """Weights of the released Sphere Encoder -> a state dict for our SphereEncoder of the same sizes.

    state_dict  {name: tensor}, the "model" or "ema_model" of a released checkpoint
    returns     {name: tensor} with our names, in float32

    Dropped: the prefixes of wrappers (DDP, torch.compile, checkpointing) and RoPE buffers. A given pos_embed
    must equal the table that the model computes, to 1e-5 (or to the precision of its dtype); an absent one is
    no error. Tensors on the meta device are converted by name and shape alone.
    Raises ValueError naming the keys, the first ten, that are unknown, missing, of another shape or not of
    floats. The sizes are read off the weights: that they are those of your model, only loading can tell.
    """
    weights, problems = _cleaned(state_dict)
    for name, tensor in weights.items():
        if re.search(r"\.alpha[12]$", name) and tensor.ndim == 0:                        # as in older files
            weights[name] = tensor.reshape(1)
    try:
        model = _model_of(weights)
    except ValueError as error:
        raise ValueError(f"not the weights of a released Sphere Encoder: {error}") from None
    tables = [name for name in weights if "y_embedder" in name]
    if len({len(weights[name]) for name in tables}) > 1:                # no majority can tell which is right
        problems |= {name: f"has {len(weights[name])} rows, unlike the other one" for name in tables}
    return _converted(weights, problems, model, lambda name: _official_name(name, model),
                      "a released Sphere Encoder")


def convert_sit(state_dict):
    """Weights of a released denoiser -> a state dict for our SiT of the same sizes.

    state_dict  {name: tensor}, bare or under "ema", "model" or "state_dict"
    returns     {name: tensor} with our names, in float32

    The released names are not known to us. Assumed are those of SiT and timm: x_embedder.proj (a 1x1
    convolution or a Linear), pos_embed, y_embedder.embedding_table, blocks.N.{norm1,norm2},
    blocks.N.attn.{q,k,v,proj,q_norm,k_norm}, blocks.N.mlp.{fc1,fc2}, blocks.N.adaLN_modulation.1 and
    final_layer.{norm,linear,adaLN_modulation.1}. Nothing is guessed.
    Raises ValueError naming the keys, the first ten, that are unknown, missing, misshapen or not of floats.
    """
    weights, problems = _cleaned(_unwrapped(state_dict, ("ema", "model", "state_dict")))
    patches = weights.get("x_embedder.proj.weight")
    if patches is not None and patches.shape[2:] == (1, 1):
        weights["x_embedder.proj.weight"] = patches.flatten(1)          # a 1x1 convolution is a Linear
    width = _size_of(weights, (r"x_embedder\..*weight", 0), (r"pos_embed", 2),
                     (r"blocks\..*norm[12]\.weight", 0))
    with torch.device("meta"):
        model = SiT((_size_of(weights, (r"pos_embed", 1)), 1),
                    _size_of(weights, (r"x_embedder\..*weight", 1), (r"final_layer\.linear\.", 0)),
                    _size_of(weights, (r"y_embedder\.", 0)) - 1,
                    (width, max(1, _depth_of(weights, "blocks")),
                     max(1, width // _size_of(weights, (r"blocks\..*\.[qk]_norm\.weight", 0)))))

    def released(name):
        name = name.replace("mlp.0.", "mlp.fc1.").replace("mlp.2.", "mlp.fc2.")
        return name.replace("x_embedder.", "x_embedder.proj.")
    return _converted(weights, problems, model, released, "a released denoiser")


def convert_rae_decoder(state_dict, source="RAE decoder"):
    """Weights of a released RAE decoder -> a state dict for our RAEDecoder of the same sizes.

    state_dict  {name: tensor}, bare or under "model" or "state_dict"; names may begin with "decoder."
    source      file or URL, named in errors
    returns     {name: tensor} with our names, in float32; the class token, which some released files lack,
                is zeros if it is not given
    Raises ValueError naming the keys, the first ten, that are unknown, missing, misshapen or not of floats.
    """
    weights, problems = _cleaned(_unwrapped(state_dict, ("model", "state_dict")), "decoder")
    width = _size_of(weights, (r"decoder_embed\.", 0), (r"decoder_norm\.", 0))
    tokens = _size_of(weights, (r"decoder_pos_embed", 1)) - 1 if "decoder_pos_embed" in weights else 256
    mlp_hidden = _size_of(weights, (r"decoder_layers\.\d+\.intermediate\.dense\.", 0))
    with torch.device("meta"):
        try:
            model = RAEDecoder(
                _size_of(weights, (r"decoder_embed\.weight", 1)), max(1, math.isqrt(tokens)), width,
                max(1, _depth_of(weights, "decoder_layers")), 1, mlp_hidden,
                max(1, math.isqrt(_size_of(weights, (r"decoder_pred\.", 0)) // 3)))
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{source}: not the weights of an RAE decoder: {error}") from None
    weights.setdefault("trainable_cls_token", torch.zeros(1, 1, width))
    try:
        return _converted(weights, problems, model, _rae_name, "an RAE decoder")
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _rae_name(name):
    """Our name of a weight of RAEDecoder -> the released one."""
    for ours, theirs in (("blocks.", "decoder_layers."), ("class_token", "trainable_cls_token"),
                         (".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."),
                         (".attn.q.", ".attention.attention.query."),
                         (".attn.k.", ".attention.attention.key."),
                         (".attn.v.", ".attention.attention.value."),
                         (".attn.proj.", ".attention.output.dense."),
                         (".mlp.0.", ".intermediate.dense."), (".mlp.2.", ".output.dense.")):
        name = name.replace(ours, theirs)
    return re.sub(r"^(embed|pos_embed|norm|pred)\b", r"decoder_\1", name)


def _unwrapped(state_dict, keys):
    """The dictionary of weights itself, of one that holds it under one of several keys."""
    for key in keys:
        if isinstance(state_dict, dict) and isinstance(state_dict.get(key), dict):
            return state_dict[key]
    return state_dict


def _cleaned(state_dict, *prefixes):
    """Weights without the prefixes of wrappers; and {name: what is wrong with it}."""
    if not isinstance(state_dict, dict):
        raise ValueError(f"expected a dictionary of weights, got {type(state_dict).__name__}")
    wrappers = "|".join(("_orig_mod", "module", "_checkpoint_wrapped_module", *prefixes))
    weights, problems = {}, {}
    for name, tensor in state_dict.items():
        short = re.sub(rf"(?<![^.])({wrappers})\.", "", str(name))
        if short in ("encoder.rope", "decoder.rope"):                               # the Sphere Encoder's
            continue
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            problems[short] = f"holds no floats but {getattr(tensor, 'dtype', type(tensor).__name__)}"
        elif short in weights:
            problems[short] = "is given twice"
        else:
            weights[short] = tensor
    return weights, problems


def _converted(weights, problems, model, released_name, what):
    """Weights under released names -> those of the model, which is on the meta device, in float32.

    Position tables may be absent (then they are computed), and must otherwise be what the model computes.
    Raises ValueError with the problems given and found.
    """
    expected = {released_name(name): (name, tensor.shape) for name, tensor in model.state_dict().items()}
    for name in expected.keys() - weights.keys() - problems.keys():
        if not name.endswith("pos_embed"):
            problems[name] = "is missing"
    for name, tensor in weights.items():
        if name not in expected:
            problems[name] = "is unknown"
        elif tensor.shape != expected[name][1]:
            problems[name] = f"is {list(tensor.shape)} instead of {list(expected[name][1])}"
        elif name.endswith("pos_embed"):
            weights[name] = _exact_table(tensor)
            if weights[name] is None:
                problems[name] = "is not the sin-cos table"
    if problems:
        missing_last = sorted(problems.items(), key=lambda item: (item[1] == "is missing", item))
        named = [f"{name} {problem}" for name, problem in missing_last]
        more = f" and {len(named) - 10} more" if len(named) > 10 else ""
        raise ValueError(f"not the weights of {what}: {', '.join(named[:10])}{more}")
    return {expected[name][0]: tensor.float() for name, tensor in weights.items()}


def convert_official_config(cfg):
    """The dictionary in a released cfg.json -> keyword arguments of SphereEncoder.

    Raises ValueError for a missing key, and for options of the official code that its paper does not use.
    """
    unused = {"affine_latent_mlp_mixer": True, "in_context_size": 0, "halve_model_size": False,
              "spherify_model": False}
    for key, value in unused.items():
        if cfg.get(key, value) != value:
            raise ValueError(f"{key} must be {value}, got {cfg[key]}")
    try:
        depth = cfg["vit_enc_latent_mlp_mixer_depth"]
        if depth != cfg["vit_dec_latent_mlp_mixer_depth"]:
            raise ValueError(f"mixers of encoder and decoder must be equally deep, got {depth} and "
                             f"{cfg['vit_dec_latent_mlp_mixer_depth']}")
        for key in ("image_size", "patch_size", "token_channels", "num_classes"):
            if not isinstance(cfg[key], int):
                raise ValueError(f"{key} must be a whole number, got {cfg[key]!r}")
        return dict(image_size=cfg["image_size"], patch_size=cfg["patch_size"],
                    latent_dim=cfg["token_channels"],
                    num_classes=cfg["num_classes"] if cfg["cond_generator"] else 0,
                    encoder_size=cfg["vit_enc_model_size"], decoder_size=cfg["vit_dec_model_size"],
                    mixer_depth=depth, pixel_head=cfg["pixel_head_type"],
                    alpha_max=float(cfg["noise_sigma_max_angle"]))
    except KeyError as error:
        raise ValueError(f"its key {error} is missing") from None


def pretrained(url, folder=None):
    """State dict of a published network, from a folder of files or from torch.hub's cache.

    url      its file name ends in -HASH.pth, the first digits of the file's SHA-256, which are checked
    Raises FileNotFoundError that says which file to place where, ValueError if the file is another.
    """
    name = url.rsplit("/", 1)[1]
    path = Path(folder or Path(torch.hub.get_dir()) / "checkpoints") / name
    if not folder and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path)
        except OSError as error:
            raise FileNotFoundError(f"{path} is missing and could not be downloaded "
                                    f"({getattr(error, 'reason', error)}); place {url} there") from None
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; place {url} there")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    if not digest.hexdigest().startswith(name.rsplit("-", 1)[1].removesuffix(".pth")):
        raise ValueError(f"{path} is damaged (SHA-256 {digest.hexdigest()[:8]}...); replace it by {url}")
    return torch.load(path, map_location="cpu", weights_only=True)


def _official_name(name, model):
    """Our name of a weight -> the released one; they differ inside the Mixers' MLPs and the pixel heads."""
    name = re.sub(r"(tok|chn)_mixer\.", r"\1_mixer.mix.", name)
    name = name.replace("out.conv.", "out.2.").replace("out.upsample.", "out.4.")
    if model.config["mixer_depth"] == 0:
        name = name.replace("decoder.x_embedder.0.", "decoder.x_embedder.")
    return name


def _model_of(weights):
    """The SphereEncoder, on the meta device, that weights under released names fit."""
    def size(*witnesses):
        return _size_of(weights, *witnesses)

    def depth(prefix):
        return _depth_of(weights, prefix + r"\.blocks")

    conv_head = size((r"decoder\.out\.2\.", 0), (r"decoder\.out\.2\.", 1)) == CONV_HEAD_CHANNELS
    seen_by_head = ([(r"decoder\.out\.4\.weight", dim, lambda kernel: kernel - 2) for dim in (2, 3)]
                    if conv_head else [(r"decoder\.ffn\.linear\.", 0, lambda out: math.isqrt(out // 3))])
    patch_size = size(*((r"encoder\.x_embedder\.0\.", dim) for dim in (2, 3)), *seen_by_head)
    tokens = size((r".*\.pos_embed", 1), (r".*\.tok_mixer\.", 0))
    rows = max(h for h in range(1, math.isqrt(tokens) + 1) if tokens % h == 0)
    conditional = any("adaLN_modulation" in name for name in weights)
    encoder_size, decoder_size = ((size((rf"{network}\.blocks\.", -1)), max(1, depth(network)), 1)
                                  for network in ("encoder", "decoder"))
    with torch.device("meta"):
        return SphereEncoder(
            (rows * patch_size, tokens // rows * patch_size), patch_size,
            latent_dim=size((r"encoder\.ffn\.linear\.", 0), (r"decoder\.x_embedder\.(0\.)?weight", 1),
                            (r"encoder\.out\..*norm", 0)),
            num_classes=size((r".*\.y_embedder\.", 0)) - 1 if conditional else 0,
            encoder_size=encoder_size, decoder_size=decoder_size,
            mixer_depth=max(depth(r"encoder\.out"), depth(r"decoder\.x_embedder\.1")),
            pixel_head="conv" if conv_head else "linear")


def _size_of(weights, *witnesses):
    """A size that several weights show, each witness a pattern of names and a dimension (and, if need be, a
    translation): what most of them say, so that a single wrong one is found as wrong."""
    votes = Counter(translate[0](tensor.shape[dim]) if translate else tensor.shape[dim]
                    for pattern, dim, *translate in witnesses for name, tensor in weights.items()
                    if re.match(pattern, name) and -tensor.ndim <= dim < tensor.ndim)
    # At least 1, and any size will do to list what is missing.
    return max(1, votes.most_common(1)[0][0]) if votes else 4


def _depth_of(weights, prefix):
    return len({match[1] for name in weights if (match := re.match(prefix + r"\.(\d+)\.", name))})


def _exact_table(table):
    """The sin-cos table of the grid that a given one [1, N, D] agrees with, or None; on meta, as given. A
    first row of zeros is a class token's."""
    if table.is_meta:
        return table
    class_token = int(not table[0, 0].any())
    N, width = table.shape[1] - class_token, table.shape[2]
    with torch.device("cpu"):
        for grid in ((h, N // h) for h in range(1, N + 1) if N % h == 0):
            exact = F.pad(sincos_table(grid, width), (0, 0, class_token, 0))[None]
            if (exact.to(table.dtype).float() - table.cpu().float()).abs().max() <= 1e-5:
                return exact
    return None


# ---- Files of the RAE --------------------------------------------------------------------------------------

# (URL, name in torch.hub's cache); SLE's model card names no others.
RAE_FILES = "https://huggingface.co/nyu-visionx/RAE-collections/resolve/main/"
RAE_DECODER = (RAE_FILES + "decoders/dinov2/wReg_base/ViTXL_n08/model.pt",
               "rae_dinov2_wReg_base_ViTXL_n08.pt")
RAE_STATISTICS = (RAE_FILES + "stats/dinov2/wReg_base/imagenet1k/stat.pt",
                  "rae_dinov2_wReg_base_imagenet1k_stat.pt")
RAE_HEADS = {768: 12, 1024: 16, 1152: 16}           # by the width of the released decoders ViT-B, -L and -XL
DINOV2_WEIGHTS = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth"


def _rae_file(path, url, cached):
    """The dictionary in a file of the RAE's; without a path in torch.hub's cache, into which it is loaded."""
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        if path is None:
            content = torch.hub.load_state_dict_from_url(url, file_name=cached, map_location="cpu",
                                                         weights_only=True)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        if path is not None:
            raise FileNotFoundError(f"{path}: cannot be read ({error.strerror}); it should be a copy of {url}"
                                    ) from None
        raise FileNotFoundError(f"{cache / cached} is missing and could not be downloaded "
                                f"({getattr(error, 'reason', error)}); place {url} there") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise ValueError(f"{path or cache / cached}: damaged or no file of weights ({reason}); replace it "
                         f"by {url}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path or cache / cached} holds no dictionary; replace it by {url}")
    return content


def _dinov2(repo, entry, weights):
    """DINOv2 through torch.hub: from GitHub, its cache or a folder; with its own weights or those given."""
    local = Path(repo).is_dir()
    if not local and not str(repo).startswith("facebookresearch/dinov2"):       # nobody else's code is run
        raise FileNotFoundError(f"{repo}: no such folder; place https://github.com/facebookresearch/dinov2 "
                                f"there")
    place = f"{torch.hub.get_dir()}/facebookresearch_dinov2_main, or name its folder"
    os.environ.setdefault("XFORMERS_DISABLED", "1")         # if installed, its attention fails on a CPU
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="xFormers")
            network = torch.hub.load(str(repo), entry, source="local" if local else "github", trust_repo=True,
                                     verbose=False, pretrained=weights is None)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{repo}: not a copy of https://github.com/facebookresearch/dinov2 "
                                f"({error})") from None
    except OSError as error:                                # URLError, also of the weights' host
        raise FileNotFoundError(
            f"DINOv2 is missing and could not be downloaded ({getattr(error, 'reason', error)}); place "
            f"https://github.com/facebookresearch/dinov2 in {place}, and {DINOV2_WEIGHTS} in "
            f"{torch.hub.get_dir()}/checkpoints, or name the file") from None
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{repo}: DINOv2 could not be loaded ({reason}); place "
                         f"https://github.com/facebookresearch/dinov2 in {place}") from None
    if weights is not None:
        try:
            network.load_state_dict(_rae_file(weights, DINOV2_WEIGHTS, "dinov2_vitb14_reg4_pretrain.pth"))
        except RuntimeError as error:
            raise ValueError(f"{weights}: not the weights of {entry} ({' '.join(str(error).split())[:200]}); "
                             f"replace it by {DINOV2_WEIGHTS}") from None
    return network
