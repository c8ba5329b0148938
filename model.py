"""model.py: encoders, correlation decoder and CIM itself (paper 3.2, Figure 2, Eqs. 2-7).

Read it from the bottom up or from the top down:

    1. positions      the fixed 2-D sin-cos table, and how it is resized
    2. ViT            attention, block, encoder; parameters named as in timm
    3. ResNet         bottleneck, encoder; parameters named as in torchvision
    4. build_encoder  names -> encoders
    5. the decoder    cross-attention between context and exemplars            (Eqs. 4-6)
    6. CIM            online encoder, target encoder, decoder, loss, moving average (Eqs. 2, 3, 7)
    7. Classifier     an encoder with a head                                  (4.3, Tables 10, 11)

Letters: B contexts, K exemplars of each, N tokens, D the width of an encoder, W of the decoder,
m and n the sides of context and exemplar in pixels.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn


# --------------------------------------------------------------------------------- 1. positions

def sincos_positions(side, width):
    """The fixed 2-D sin-cos table of a side x side grid, row by row: [side * side, width].

    A quarter of the channels each: sin x, cos x, sin y, cos y at wavelengths 2 pi to 2 pi 10^4.
    DEVIATION: Table 9 says "1-D absolute"; the released weights hold this table.
    """
    frequency = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency  # [side, width / 4]
    half = torch.cat([angle.sin(), angle.cos()], 1)  # one axis
    x, y = half.expand(side, -1, -1), half[:, None].expand(-1, side, -1)
    return torch.cat([x, y], 2).flatten(0, 1).float()


def resize_positions(table, h, w):
    """A square grid's table [1, N, D] -> [1, h * w, D], bicubic; the same table if it fits."""
    side = round(table.shape[1] ** 0.5)
    if (h, w) == (side, side):
        return table
    grid = table.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return F.interpolate(grid.float(), size=(h, w), mode="bicubic").flatten(2).transpose(1, 2)


# --------------------------------------------------------------------------------------- 2. ViT

class Attention(nn.Module):
    """Multi-head self-attention [B, N, D] -> [B, N, D], heads of 64 channels."""

    def __init__(self, width):
        super().__init__()
        self.heads = width // 64
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)  # [B, heads, N, 64]
        return self.proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a GELU between, four times as wide inside."""

    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth: in training, an image skips the branch with probability p; what stays is
    scaled up. torchvision's takes p as a number, which makes the compiler compile every block
    anew until it gives up; as a tensor it is the same code for all."""

    def __init__(self, p):
        super().__init__()
        self.register_buffer("keep", torch.tensor(1.0 - p), persistent=False)

    def forward(self, x):
        if not self.training:
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) < self.keep
        return x * (kept / self.keep).to(x.dtype)


class Block(nn.Module):
    """A pre-norm transformer layer; drop_path: probability that an image skips a branch of it, or
    None for none of that."""

    def __init__(self, width, drop_path=None):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), MLP(width)
        self.drop_path = nn.Identity() if drop_path is None else DropPath(drop_path)

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Images [B, 3, h, w] -> one token for each patch, as a grid [B, D, h / patch, w / patch]."""

    def __init__(self, patch, width):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, images):
        return self.proj(images)


class ViT(nn.Module):
    """Images [B, 3, h, w] -> tokens [B, 1 + N, width] after the final norm, the cls token first.

    h and w are multiples of `patch`, else ValueError. The position table is stored for 224 pixels
    and resized to the grid at hand. State-dict keys are those of timm's vit_*_patch16_224.
    drop_path: of the last block, growing linearly from 0 in the first (stochastic depth).
    """

    prefix = 1  # tokens in front of the grid: cls

    def __init__(self, width, depth, patch=16, drop_path=0.0):
        super().__init__()
        self.width, self.stride = width, patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        positions = sincos_positions(224 // patch, width)
        positions = torch.cat([torch.zeros(1, width), positions])[None]
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.patch_embed = PatchEmbed(patch, width)
        rates = [drop_path * i / max(1, depth - 1) if drop_path else None for i in range(depth)]
        self.blocks = nn.ModuleList([Block(width, rate) for rate in rates])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        nn.init.normal_(self.cls_token, std=0.02)
        self.apply(init_linear)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(width, -1))
        nn.init.zeros_(self.patch_embed.proj.bias)

    def forward(self, images):
        if images.shape[-1] % self.stride or images.shape[-2] % self.stride:
            raise ValueError(f"images of {images.shape[-2]} x {images.shape[-1]} pixels are not "
                             f"whole patches of {self.stride}")
        x = self.patch_embed(images)
        positions = resize_positions(self.pos_embed[:, 1:], *x.shape[2:])
        x = x.flatten(2).transpose(1, 2) + positions
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls.to(x), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def init_linear(module):
    """Xavier-uniform weights and zero biases, as MAE's ViT."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------ 3. ResNet

class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 convolutions and a shortcut; four times as wide outside."""

    def __init__(self, inside, width, stride=1):
        super().__init__()
        outside = 4 * width
        self.conv1 = nn.Conv2d(inside, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outside, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outside)
        self.downsample = None
        if stride > 1 or inside != outside:
            self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False),
                                            nn.BatchNorm2d(outside))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """Images [B, 3, h, w] -> tokens [B, N, 2048], row by row over the grid of stride 32.

    State-dict keys are those of torchvision's resnet50, without `fc`.
    """

    prefix = 0
    width, stride = 2048, 32

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inside = 64
        for k, (width, depth) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)]):
            layer = nn.Sequential()
            for i in range(depth):
                layer.append(Bottleneck(inside, width, stride=2 if k > 0 and i == 0 else 1))
                inside = 4 * width
            self.add_module(f"layer{k + 1}", layer)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images):
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.max_pool2d(x, 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.flatten(2).transpose(1, 2)


# ----------------------------------------------------------------------------- 4. build_encoder

ENCODERS = {  # name: (width, depth, patch) of a ViT
    "vit_d8": (64, 2, 8),  # the demo's
    "vit_t16": (192, 12, 16),
    "vit_s16": (384, 12, 16),
    "vit_b16": (768, 12, 16),
    "vit_l16": (1024, 24, 16),
    "resnet50": None,
}


def build_encoder(name, drop_path=0.0):
    """The encoder of that name, freshly initialised. Raises ValueError for an unknown name, and
    for a ResNet with stochastic depth."""
    if name not in ENCODERS:
        raise ValueError(f"no encoder {name!r}: choose one of {', '.join(ENCODERS)}")
    if name == "resnet50" and drop_path > 0:
        raise ValueError("resnet50 has no stochastic depth: drop_path is 0")
    return ResNet50() if name == "resnet50" else ViT(*ENCODERS[name], drop_path)


# ------------------------------------------------------------------------------- 5. the decoder

class CorrelationLayer(nn.Module):
    """Eqs. 4 and 5: each context token asks every exemplar's tokens whether they show its place.

    h_c [B, 1 or K, N, C] and h_z [B, K, Nz, D] -> h [B, K, N, W]. The first layer's contexts are
    the same for all K exemplars, so their queries are computed once.
    """

    def __init__(self, context_width, exemplar_width, width):
        super().__init__()
        self.heads = width // 32
        self.f_c = nn.Linear(context_width, width)
        self.f_k = nn.Linear(exemplar_width, width)
        self.f_v = nn.Linear(exemplar_width, width)
        self.norm, self.mlp = nn.LayerNorm(width, eps=1e-6), MLP(width)

    def forward(self, h_c, h_z, positions):
        def split(x):  # [B, K, N, W] -> [B * K, heads, N, 32]
            return x.flatten(0, 1).unflatten(2, (self.heads, -1)).transpose(1, 2)

        h_c = self.f_c(h_c)  # DEVIATION: the residual of Eq. 5 is f_c(h_c), so that widths agree
        q = (h_c + positions).expand(-1, h_z.shape[1], -1, -1)
        a = F.scaled_dot_product_attention(split(q), split(self.f_k(h_z)), split(self.f_v(h_z)))
        a = a.transpose(1, 2).flatten(2).view(q.shape)  # Eq. 4
        h = h_c + a
        return h + self.mlp(self.norm(h))  # Eq. 5


class CorrelationDecoder(nn.Module):
    """Eqs. 4-6: h_c [B, N, D] and h_z [B, K, Nz, D] -> logits [B, K, m, m] for maps of m pixels.

    N is the square grid of the context. Logits, not probabilities: the sigmoid is in the loss.
    """

    def __init__(self, encoder_width, grid, width=512, depth=1):
        super().__init__()
        self.grid = grid
        self.positions = nn.Parameter(sincos_positions(grid, width), requires_grad=False)  # PE
        self.layers = nn.ModuleList([CorrelationLayer(encoder_width if i == 0 else width,
                                                      encoder_width, width) for i in range(depth)])
        self.predictor = nn.Linear(width, 1)  # f_p
        self.apply(init_linear)
        nn.init.normal_(self.predictor.weight, std=1e-3)  # the first loss is ln 2

    def forward(self, h_c, h_z, size):
        h = h_c[:, None]
        for layer in self.layers:
            h = layer(h, h_z, self.positions)
        y = self.predictor(h).float().squeeze(-1).unflatten(2, (self.grid, self.grid))
        return F.interpolate(y, size=(size, size), mode="bilinear")  # Eq. 6


# --------------------------------------------------------------------------------------- 6. CIM

class CIM(nn.Module):
    """Correlational Image Modeling, Figure 2.

    encoder: a name for build_encoder; context_size: m in pixels, a multiple of the encoder's
    stride (ValueError otherwise); freeze_patch_embed: a ViT's patches are embedded by their random
    initial weights while pre-training, as in MoCo v3 and the released code.
    """

    def __init__(self, encoder="vit_b16", context_size=160, decoder_width=512, decoder_depth=1,
                 freeze_patch_embed=True):
        super().__init__()
        self.online = build_encoder(encoder)
        if context_size % self.online.stride:
            raise ValueError(f"context_size {context_size} is no multiple of {encoder}'s stride "
                             f"{self.online.stride}")
        if freeze_patch_embed and isinstance(self.online, ViT):
            self.online.patch_embed.requires_grad_(False)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.decoder = CorrelationDecoder(self.online.width, context_size // self.online.stride,
                                          decoder_width, decoder_depth)

    def forward(self, context, exemplars, maps):
        """Normalised context [B, 3, m, m], exemplars [B, K, 3, n, n], maps [B, K, m, m]
        -> (loss, logits [B, K, m, m])."""
        h_c, h_z = self.encode(context, exemplars)  # Eq. 2
        logits = self.decoder(h_c, h_z, maps.shape[-1])  # Eqs. 4-6
        return F.binary_cross_entropy_with_logits(logits, maps), logits  # Eq. 7

    def encode(self, context, exemplars):
        """Eq. 2: -> h_c [B, N, D] of the target, h_z [B, K, Nz, D] of the online encoder, which
        sees all exemplars as one batch. The cls token of the contexts has no place in a map."""
        h_z = self.online(exemplars.flatten(0, 1)).unflatten(0, exemplars.shape[:2])
        with torch.no_grad():
            h_c = self.target(context)[:, self.target.prefix:]
        return h_c, h_z

    @torch.no_grad()
    def update_target(self, tau):
        """Eq. 3, target = tau target + (1 - tau) online, for parameters and BatchNorm statistics;
        integers (BatchNorm's counters) are copied."""
        pairs = list(zip(self.target.state_dict().values(), self.online.state_dict().values()))
        floats = [(t, o) for t, o in pairs if t.is_floating_point()]
        torch._foreach_lerp_([t for t, _ in floats], [o for _, o in floats], 1 - tau)
        for t, o in pairs:
            if not t.is_floating_point():
                t.copy_(o)


# --------------------------------------------------------------------------------- 7. Classifier

class Classifier(nn.Module):
    """Images [B, 3, h, w] -> logits [B, classes]: encoder, global average pooling, norm, linear.

    A ViT is normalised after the pooling of its patch tokens instead of before (Table 10, as MAE);
    a ResNet-50 has its own BatchNorms. probe: the encoder is frozen and as it was pre-trained, and
    a BatchNorm without parameters follows the pooling.
    """

    def __init__(self, encoder, classes, drop_path=0.0, probe=False):
        super().__init__()
        self.probe = probe
        self.encoder, self.fc_norm = build_encoder(encoder, drop_path), nn.Identity()
        width = self.encoder.width
        if probe:
            self.encoder.requires_grad_(False)
            self.fc_norm = nn.BatchNorm1d(width, eps=1e-6, affine=False)
        elif isinstance(self.encoder, ViT):
            self.encoder.norm, self.fc_norm = nn.Identity(), nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def train(self, mode=True):
        super().train(mode)
        self.encoder.train(mode and not self.probe)  # a frozen BatchNorm keeps its statistics
        return self

    def features(self, images):
        """What the head sees: [B, width]."""
        return self.fc_norm(self.encoder(images)[:, self.encoder.prefix:].mean(1))

    def forward(self, images):
        return self.head(self.features(images))

    def names(self):
        """{name in this module: timm's or torchvision's}. For a ViT, timm's with
        global_pool='avg'."""
        head = "head." if isinstance(self.encoder, ViT) else "fc."
        return {k: k.removeprefix("encoder.").replace("head.", head) for k in self.state_dict()}
