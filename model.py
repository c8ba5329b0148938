"""model.py: encoders, correlation decoder and CIM itself (paper 3.2, Figure 2, Eqs. 2-7).

Read 1 to 6 in order, or begin with 6 and look up what it uses:

    1. positions      the fixed 2-D sin-cos table, and how it is resized
    2. ViT            attention, block, encoder; parameters named as in timm
    3. ResNet         bottleneck, encoder; parameters named as in torchvision
    4. build_encoder  names -> encoders
    5. the decoder    cross-attention between context and exemplars            (Eqs. 4-6)
    6. CIM            online encoder, target encoder, decoder, loss, moving average (Eqs. 2, 3, 7)
    7. Classifier     an encoder with a head                                  (4.3, Tables 10, 11)
    8. segmentation   a ViT with UperNet                                            (4.4, Table 7)

What the paper compares with; to follow CIM, nothing of it is needed:

    9. ablations      convolution as correlation, deep predictor, losses   (Figure 4a, b, Table 3)
   10. trackers       SiamFC, SiamRPN and TransT as pretext tasks                 (Eq. 1, Table 4)

Letters: B contexts, K exemplars of each, N tokens, D the width of an encoder, W of the decoder,
m and n the sides of context and exemplar in pixels.
"""

import copy
import math

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

def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v for [..., N, d], [..., M, d] and [..., M, d].

    Written out for bf16 on CPUs: with few tokens (here 17 and 101) PyTorch's own attention takes 7
    times as long there for the gradient, a sixth of a training step. With many it is the faster
    one, and does not keep N x M weights.
    """
    if v.device.type == "cpu" and v.dtype == torch.bfloat16 and k.shape[-2] <= 256:
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1, dtype=torch.float32)
        return weights.to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention [B, N, D] -> [B, N, D], heads of 64 channels."""

    def __init__(self, width):
        super().__init__()
        self.heads = width // 64
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = attend(q, k, v)  # [B, heads, N, 64]
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

    def outputs(self, images):
        """The tokens [B, 1 + N, width] behind each block in turn, without the final norm."""
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
            yield x

    def forward(self, images):
        for x in self.outputs(images):
            pass  # the last one counts
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
        h_c = self.f_c(h_c)  # DEVIATION: the residual of Eq. 5 is f_c(h_c), so that widths agree
        h = h_c + self.correlate(h_c + positions, h_z)
        return h + self.mlp(self.norm(h))  # Eq. 5

    def correlate(self, q, h_z):
        """Eq. 4: queries q [B, 1 or K, N, W] -> a [B, K, N, W]."""
        def split(x):  # [B, K, N, W] -> [B * K, heads, N, 32]
            return x.flatten(0, 1).unflatten(2, (self.heads, -1)).transpose(1, 2)

        q = q.expand(-1, h_z.shape[1], -1, -1)
        a = attend(split(q), split(self.f_k(h_z)), split(self.f_v(h_z)))
        return a.transpose(1, 2).flatten(2).view(q.shape)


class CorrelationDecoder(nn.Module):
    """Eqs. 4-6: h_c [B, N, D] and h_z [B, K, Nz, D] -> logits [B, K, m, m] for maps of m pixels.

    N is the square grid of the context. Logits, not probabilities: the sigmoid is in the loss.
    correlation: cross_attention, or convolution (Figure 4a); predictor: linear, or deconv
    (Figure 4b); depth and width: Figures 4c and 4d.
    """

    def __init__(self, encoder_width, grid, width=512, depth=1, correlation="cross_attention",
                 predictor="linear"):
        super().__init__()
        layer = CorrelationLayer if correlation == "cross_attention" else ConvolutionLayer
        self.positions = nn.Parameter(sincos_positions(grid, width), requires_grad=False)  # PE
        self.layers = nn.ModuleList([layer(encoder_width if i == 0 else width,
                                           encoder_width, width) for i in range(depth)])
        self.predictor = nn.Linear(width, 1)  # f_p
        self.apply(init_linear)
        nn.init.normal_(self.predictor.weight, std=1e-3)  # the first loss is ln 2
        if predictor == "deconv":
            self.predictor = Deconvolutions(width)

    def forward(self, h_c, h_z, size):
        h = h_c[:, None]
        for layer in self.layers:
            h = layer(h, h_z, self.positions)
        return upsample(as_grid(self.predictor(h)).squeeze(2), size)  # Eq. 6


def as_grid(tokens):
    """Tokens [..., N, C], row by row, with a cls token in front or not -> [..., C, n, n].
    Raises ValueError where they are no square."""
    n = math.isqrt(tokens.shape[-2])
    if tokens.shape[-2] - n * n > 1:
        raise ValueError(f"{tokens.shape[-2]} tokens are no square grid")
    return tokens[..., -n * n:, :].unflatten(-2, (n, n)).movedim(-1, -3)


def upsample(y, size):
    """Responses [B, K, n, n] of any precision -> float32 logits [B, K, size, size], bilinear; a
    pair for `size` is (h, w)."""
    return F.interpolate(y.float(), size=size, mode="bilinear")


# --------------------------------------------------------------------------------------- 6. CIM

class CIM(nn.Module):
    """Correlational Image Modeling, Figure 2.

    encoder: a name for build_encoder; context_size: m in pixels, a multiple of the encoder's
    stride (ValueError otherwise); freeze_patch_embed: a ViT's patches are embedded by their random
    initial weights while pre-training, as in MoCo v3 and the released code.
    bootstrap (Table 2): online_exemplar, the paper's; online_context, the other way round: the
    online encoder sees the contexts; shared, one encoder for both and no average. loss: Table 3.
    ValueError for a word that is none of BOOTSTRAPS, CORRELATIONS, PREDICTORS, LOSSES.
    """

    def __init__(self, encoder="vit_b16", context_size=160, decoder_width=512, decoder_depth=1,
                 freeze_patch_embed=True, bootstrap="online_exemplar",
                 correlation="cross_attention", predictor="linear", loss="ce"):
        super().__init__()
        for word, known in ((bootstrap, BOOTSTRAPS), (correlation, CORRELATIONS),
                            (predictor, PREDICTORS), (loss, LOSSES)):
            if word not in known:
                raise ValueError(f"{word!r} is none of {', '.join(known)}")
        self.bootstrap = bootstrap
        self.loss = LOSSES[loss]  # of section 9; by default Eq. 7's cross-entropy
        self.online = build_encoder(encoder)
        if context_size % self.online.stride:
            raise ValueError(f"context_size {context_size} is no multiple of {encoder}'s stride "
                             f"{self.online.stride}")
        if freeze_patch_embed and isinstance(self.online, ViT):
            self.online.patch_embed.requires_grad_(False)
        self.target = (self.online if bootstrap == "shared" else
                       copy.deepcopy(self.online).requires_grad_(False))
        self.decoder = CorrelationDecoder(self.online.width, context_size // self.online.stride,
                                          decoder_width, decoder_depth, correlation, predictor)

    def forward(self, context, exemplars, maps):
        """Normalised context [B, 3, m, m], exemplars [B, K, 3, n, n], maps [B, K, m, m]
        -> (loss, logits [B, K, m, m])."""
        h_c, h_z = self.encode(context, exemplars)  # Eq. 2
        logits = self.decoder(h_c, h_z, maps.shape[-1])  # Eqs. 4-6
        return self.loss(logits, maps), logits  # Eq. 7

    def encode(self, context, exemplars):
        """Eq. 2: -> h_c [B, N, D] of the target, h_z [B, K, Nz, D] of the online encoder, or as
        bootstrap says. All exemplars are one batch. The cls token of the contexts has no place in
        a map. No parameter of the target wants a gradient, so that none is computed there."""
        f_z, f_c = self.online, self.target
        if self.bootstrap == "online_context":
            f_z, f_c = f_c, f_z
        h_z = f_z(exemplars.flatten(0, 1)).unflatten(0, exemplars.shape[:2])
        return f_c(context)[:, f_c.prefix:], h_z

    @torch.no_grad()
    def update_target(self, tau):
        """Eq. 3, target = tau target + (1 - tau) online, for parameters and BatchNorm statistics;
        integers (BatchNorm's counters) are copied."""
        if self.target is self.online:  # shared
            return
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


# ------------------------------------------------------------------------------- 8. segmentation

class Segmenter(nn.Module):
    """Images [B, 3, h, w] -> logits [B, classes, h, w], float32; in training a pair, the second of
    an auxiliary head that is thrown away afterwards.

    UperNet [70] on a ViT as in BEiT: the blocks at 4, 6, 8 and 12 twelfths of the depth, without
    the final norm, are brought to strides of 1/4, 1/2, 1 and 2 patches. width: channels of the
    head. Raises ValueError for a ResNet.
    """

    def __init__(self, encoder, classes, drop_path=0.0, width=768):
        super().__init__()
        self.encoder = build_encoder(encoder, drop_path)
        if not isinstance(self.encoder, ViT):
            raise ValueError(f"segmentation takes a ViT, not {encoder}")
        self.encoder.norm = nn.Identity()  # would get no gradient
        D, depth = self.encoder.width, len(self.encoder.blocks)
        self.taken = [math.ceil(depth * k / 12) - 1 for k in (4, 6, 8, 12)]
        self.pyramid = nn.ModuleList([
            nn.Sequential(nn.ConvTranspose2d(D, D, 2, 2), nn.BatchNorm2d(D), nn.GELU(),
                          nn.ConvTranspose2d(D, D, 2, 2)),
            nn.ConvTranspose2d(D, D, 2, 2), nn.Identity(), nn.MaxPool2d(2, ceil_mode=True)])
        self.head = UperNet(D, classes, width)
        self.auxiliary = nn.Sequential(conv_bn_relu(D, 256, 3),
                                       *classifier_layers(256, classes))  # an FCN

    def features(self, images):
        """The four maps [B, D, h / s, w / s] at strides s of 1/4, 1/2, 1 and 2 patches; the last
        one is rounded up."""
        h, w = (n // self.encoder.stride for n in images.shape[2:])
        tokens = list(self.encoder.outputs(images))
        grids = [tokens[i][:, 1:].transpose(1, 2).unflatten(2, (h, w)) for i in self.taken]
        return [scale(grid) for scale, grid in zip(self.pyramid, grids)]

    def forward(self, images):
        size, maps = images.shape[2:], self.features(images)
        logits = upsample(self.head(maps), size)
        return (logits, upsample(self.auxiliary(maps[2]), size)) if self.training else logits

    def names(self):
        """{name in this module: timm's}, the encoder's; of the heads the same."""
        return {k: k.removeprefix("encoder.") for k in self.state_dict()}


class UperNet(nn.Module):
    """Four maps [B, D, h, w], each half as large as the one before -> logits [B, classes, h, w] at
    the first one's size.

    The coarsest is pooled to 1, 2, 3 and 6 places a side, for the scene as a whole; the others add
    what the coarser ones say, from the top down; all four are fused at the finest.
    """

    PLACES = (1, 2, 3, 6)

    def __init__(self, D, classes, width):
        super().__init__()
        self.pools = nn.ModuleList([conv_bn_relu(D, width, 1) for _ in self.PLACES])
        self.bottleneck = conv_bn_relu(D + 4 * width, width, 3)
        self.laterals = nn.ModuleList([conv_bn_relu(D, width, 1) for _ in range(3)])
        self.smooth = nn.ModuleList([conv_bn_relu(width, width, 3) for _ in range(3)])
        self.fuse = nn.Sequential(conv_bn_relu(4 * width, width, 3),
                                  *classifier_layers(width, classes))

    def forward(self, maps):
        *finer, x = maps
        pooled = [resize_to(conv(pool(x, n)), x) for n, conv in zip(self.PLACES, self.pools)]
        x = self.bottleneck(torch.cat([x, *pooled], 1))
        levels = [x]
        for k in (2, 1, 0):  # from coarse to fine
            x = self.laterals[k](finer[k]) + resize_to(x, finer[k])
            levels.append(self.smooth[k](x))
        return self.fuse(torch.cat([resize_to(level, x) for level in levels], 1))


def pool(x, n):
    """x [B, C, h, w] -> its means over n x n places. (On Apple GPUs n must divide h and w.)"""
    if x.device.type == "mps":
        return F.adaptive_avg_pool2d(x.cpu(), n).to(x.device)
    return F.adaptive_avg_pool2d(x, n)


def conv_bn_relu(inside, outside, size):
    """Convolution that keeps h and w, BatchNorm, ReLU."""
    return nn.Sequential(nn.Conv2d(inside, outside, size, padding=size // 2, bias=False),
                         nn.BatchNorm2d(outside), nn.ReLU(inplace=True))


def classifier_layers(width, classes):
    """The last two layers of a head."""
    last = nn.Conv2d(width, classes, 1)
    nn.init.normal_(last.weight, std=0.01)  # the first loss is about ln(classes)
    nn.init.zeros_(last.bias)
    return nn.Dropout2d(0.1), last


def resize_to(x, like):
    """x [B, C, n, n] at the h and w of `like`, bilinear."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear")


# -------------------------------------------------------- 9. ablations: Figure 4a, 4b and Table 3

class ConvolutionLayer(CorrelationLayer):
    """Figure 4a: correlation as convolution in place of attention. Each channel of the context is
    convolved with that channel of the exemplar's feature map; Eq. 5 stays."""

    def __init__(self, context_width, exemplar_width, width):
        super().__init__(context_width, exemplar_width, width)
        del self.f_v  # the keys are the kernel

    def correlate(self, q, h_z):
        """Queries q [B, 1 or K, N, W] -> [B, K, N, W], the mean over the kernel's places."""
        (B, J, N, W), K = q.shape, h_z.shape[1]
        kernels = as_grid(self.f_k(h_z)).unflatten(1, (J, K // J)).transpose(2, 3).flatten(0, 1)
        kernels = kernels[:, :, :, None]  # [B * J, W, K / J, 1, n, n]
        a = cross_correlate(as_grid(q).flatten(0, 1), kernels) / kernels[0, 0, 0].numel()
        return a.view(B, J, W, K // J, N).permute(0, 1, 3, 4, 2).reshape(B, K, N, W)


def cross_correlate(x, kernels):
    """Eq. 1's correlation as a convolution in G groups of channels: x [B, C, h, w] with kernels
    [B, G, O, C / G, n, n] of its own -> [B, G, O, h, w], sums over C / G channels and n x n places.

    DEVIATION: trackers let no kernel cross the border, which makes the map smaller; here x is 0
    outside. A kernel of even side has no middle: the mean of its four placements around a place.
    """
    G, n = kernels.shape[1], kernels.shape[-1]
    patches = F.unfold(x, n, padding=n // 2).unflatten(1, (G, -1))  # [B, G, C / G * n * n, places]
    y = (kernels.flatten(3) @ patches).unflatten(3, (x.shape[-2] + 1 - n % 2, -1))
    return y if n % 2 else F.avg_pool2d(y.flatten(0, 2), 2, 1).unflatten(0, y.shape[:3])


class Deconvolutions(nn.Sequential):
    """Figure 4b: tokens h [B, K, N, W] -> [B, K, 64 N, 1] by three deconvolutions, each of which
    doubles the side of the grid."""

    def __init__(self, width):
        widths = (width, width // 2, width // 4, 1)
        layers = [nn.ConvTranspose2d(i, o, 4, 2, 1) for i, o in zip(widths, widths[1:])]
        super().__init__(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
        nn.init.normal_(layers[2].weight, std=1e-3)  # as the linear one
        nn.init.zeros_(layers[2].bias)

    def forward(self, h):
        y = super().forward(as_grid(h.flatten(0, 1)))  # [B * K, 1, 8 n, 8 n]
        return y.flatten(1).view(*h.shape[:2], -1, 1)


def balanced_loss(logits, maps):
    """Class-balanced cross-entropy of HED [77]: pixels inside a box weigh the share of its map that
    is outside, and the other way round."""
    outside = 1 - maps.mean((-2, -1), keepdim=True)
    weight = torch.where(maps > 0, outside, 1 - outside)
    return F.binary_cross_entropy_with_logits(logits, maps, weight)


def mse_loss(logits, maps):
    """Mean squared error of the probabilities."""
    return F.mse_loss(logits.sigmoid(), maps)


def focal_loss(logits, maps, gamma=2.0, alpha=0.25):
    """Focal loss [37]: -alpha (1 - p)^gamma log p, with p the probability given to the truth and
    alpha inside a box, 1 - alpha outside."""
    log_p = -F.binary_cross_entropy_with_logits(logits, maps, reduction="none")
    weight = torch.where(maps > 0, alpha, 1 - alpha)
    return -(weight * (1 - log_p.exp()) ** gamma * log_p).mean()


BOOTSTRAPS = ("online_exemplar", "online_context", "shared")
CORRELATIONS, PREDICTORS = ("cross_attention", "convolution"), ("linear", "deconv")
LOSSES = {"ce": F.binary_cross_entropy_with_logits, "balanced": balanced_loss, "mse": mse_loss,
          "focal": focal_loss}


# --------------------------------------------------------------------------- 10. trackers, Table 4

class Tracking(CIM):
    """A tracker's pretext task on the same pairs (Table 4): one encoder for both sides, a tracker's
    head in place of the decoder, and its losses on the map and on the box.

    head: siamfc, siamrpn or transt. Its target for the box is the tight upright box of the map.
    DEVIATION: trackers weigh places inside a box more, since they are few in a video frame; of a
    map they are a quarter, and all places weigh the same.
    """

    def __init__(self, head, encoder="vit_b16", context_size=160, freeze_patch_embed=True):
        super().__init__(encoder, context_size, freeze_patch_embed=freeze_patch_embed,
                         bootstrap="shared")  # its decoder gives way to the head:
        self.decoder = TRACKERS[head](self.online.width, context_size // self.online.stride)

    def forward(self, context, exemplars, maps):
        """As CIM.forward."""
        response = self.decoder.respond(*self.encode(context, exemplars))
        logits = upsample(response[:, :, 0], maps.shape[-1])
        loss = self.decoder.map_weight * F.binary_cross_entropy_with_logits(logits, maps)
        if response.shape[2] > 1:
            losses = self.decoder.box_loss(response[:, :, 1:].float(), upright_boxes(maps))
            loss = loss + mean_inside(losses, maps)
        return loss, logits


def upright_boxes(maps):
    """The tight upright boxes of maps [..., m, m] -> (cx, cy, w, h) [..., 4], as fractions of the
    side. The whole map where it is empty."""
    hit = torch.stack([maps.amax(-2), maps.amax(-1)], -2)  # [..., 2, m]: columns, rows
    low, high = hit.argmax(-1), maps.shape[-1] - hit.flip(-1).argmax(-1)  # argmax: the first one
    return torch.cat([(low + high) / 2, high - low], -1) / maps.shape[-1]


def generalised_iou(a, b):
    """GIoU of boxes (cx, cy, w, h) [..., 4] -> [...]: IoU less the share of the smallest box
    around both that neither covers. (torchvision's makes the host wait for the device.)"""
    low = [x[..., :2] - x[..., 2:] / 2 for x in (a, b)]
    high = [x[..., :2] + x[..., 2:] / 2 for x in (a, b)]
    both = (torch.minimum(*high) - torch.maximum(*low)).clamp(min=0).prod(-1)
    union = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - both
    around = (torch.maximum(*high) - torch.minimum(*low)).prod(-1)
    return both / union - 1 + union / around


def mean_inside(losses, maps):
    """losses [B, K, g, g] at the places of a grid -> the mean over the places whose middle lies in
    the map, then over maps. DEVIATION: trackers take the mean over the places of a whole batch,
    which would depend on how a batch is split up."""
    inside = F.interpolate(maps, size=losses.shape[-2:], mode="nearest-exact")
    return ((losses * inside).sum((2, 3)) / inside.sum((2, 3)).clamp(min=1)).mean()


class Head(nn.Module):
    """What heads share: respond(h_c [B, N, D], h_z [B, K, Nz, D]) -> [B, K, 1 or 5, g, g], the
    logit of each place of the context's grid and, where there is a box_loss, four numbers for the
    box. Each is built from (encoder_width, grid), needed or not."""

    WIDTH = 256  # channels, or the encoder's where it has fewer
    map_weight = 1.0  # of the loss on the map; that on the box is weighted in box_loss

    def forward(self, h_c, h_z, size):
        """As CorrelationDecoder."""
        return upsample(self.respond(h_c, h_z)[:, :, 0], size)


class SiamFC(Head):
    """Eq. 1 as in [4]: the exemplar's features are the kernel of a convolution, plus a bias; the
    logistic loss on the map."""

    GAIN = 9.2  # of the mean product: [4] multiply the sum of 6 x 6 x 256 by 1e-3

    def __init__(self, encoder_width, grid):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def respond(self, h_c, h_z):
        kernels = as_grid(h_z)
        y = cross_correlate(as_grid(h_c), kernels[:, None]) / kernels[0, 0].numel()
        return (self.GAIN * y + self.bias).transpose(1, 2)


class UpChannel(nn.Module):
    """A branch of SiamRPN: a convolution makes `outputs` kernels of an exemplar, another one the
    features that they are correlated with. c [B, D, g, g], z [B, K, D, n, n] -> [B, K, outputs,
    g, g]."""

    def __init__(self, encoder_width, outputs):
        super().__init__()
        self.width = width = min(Head.WIDTH, encoder_width)
        self.kernel = nn.Conv2d(encoder_width, outputs * width, 3, padding=1)
        self.search = nn.Conv2d(encoder_width, width, 3, padding=1)
        self.adjust = nn.Conv2d(outputs, outputs, 1)
        nn.init.dirac_(self.adjust.weight)
        nn.init.zeros_(self.adjust.bias)

    def forward(self, c, z):
        (B, K), n = z.shape[:2], z.shape[-1]
        kernels = self.kernel(z.flatten(0, 1)).reshape(B, 1, -1, self.width, n, n)
        y = cross_correlate(self.search(c), kernels) / math.sqrt(self.width * n * n)
        return self.adjust(y.view(B * K, -1, *y.shape[3:])).unflatten(0, (B, K))


class SiamRPN(Head):
    """[34]: a branch for the map and one for the box, which is told relative to an anchor at each
    place. DEVIATION: one square anchor, an exemplar of 64 pixels in a context of 160, instead of
    five shapes, since a map has one class a place."""

    ANCHOR = 0.4  # of the context's side

    def __init__(self, encoder_width, grid):
        super().__init__()
        self.map, self.box = UpChannel(encoder_width, 1), UpChannel(encoder_width, 4)

    def respond(self, h_c, h_z):
        c, z = as_grid(h_c), as_grid(h_z)
        return torch.cat([self.map(c, z), self.box(c, z)], 2)

    def box_loss(self, response, boxes):
        """Smooth L1 on offset and log-size relative to the anchor, times 1.2 (PySOT)."""
        g = response.shape[-1]
        boxes = boxes[..., None, None]  # [B, K, 4, 1, 1]
        at = (torch.arange(g, device=boxes.device) + 0.5) / g
        places = torch.stack([at.expand(g, g), at[:, None].expand(g, g)])
        offsets = torch.cat([(boxes[:, :, :2] - places) / self.ANCHOR,
                             (boxes[:, :, 2:] / self.ANCHOR).log().expand(-1, -1, -1, g, g)], 2)
        return 1.2 * F.smooth_l1_loss(response, offsets, reduction="none").sum(2)


class Attend(nn.Module):
    """x + MultiHead(x + p_x, y + p_y, y) of normalised x and y, and an MLP behind it or not.
    DEVIATION: [15] normalise after each sum; four such layers did not learn at the demo's rate."""

    def __init__(self, width, mlp):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, width // 32, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.mlp, self.norm2 = (MLP(width), nn.LayerNorm(width)) if mlp else (None, None)

    def forward(self, x, p_x, y, p_y):
        q, k = self.norm(x), self.norm(y)
        x = x + self.attention(q + p_x, k + p_y, k, need_weights=False)[0]
        return x if self.mlp is None else x + self.mlp(self.norm2(x))


class TransT(Head):
    """[15]: four times self-attention on each side and cross-attention both ways, then the context
    asks the exemplar once more; every place says whether it is inside and where the box is.
    DEVIATION: no dropout."""

    map_weight = 8.334

    def __init__(self, encoder_width, grid, depth=4):
        super().__init__()
        width = min(Head.WIDTH, encoder_width)
        self.positions = nn.Parameter(sincos_positions(grid, width), requires_grad=False)
        self.project = nn.Linear(encoder_width, width)
        self.layers = nn.ModuleList([nn.ModuleList([Attend(width, mlp) for mlp in (
            False, False, True, True)]) for _ in range(depth)])
        self.last, self.norm = Attend(width, mlp=True), nn.LayerNorm(width)
        self.map, self.box = (nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, outputs)) for outputs in (1, 4))

    def respond(self, h_c, h_z):
        (B, K), n = h_z.shape[:2], math.isqrt(h_z.shape[2])
        z = self.project(h_z[:, :, -n * n:]).flatten(0, 1)  # [B * K, n * n, W]
        c = self.project(h_c).repeat_interleave(K, 0)  # [B * K, N, W]
        p_c, p_z = self.positions, resize_positions(self.positions[None], n, n)
        for self_z, self_c, cross_z, cross_c in self.layers:
            z, c = self_z(z, p_z, z, p_z), self_c(c, p_c, c, p_c)
            z, c = cross_z(z, p_z, c, p_c), cross_c(c, p_c, z, p_z)
        c = self.norm(self.last(c, p_c, z, p_z))
        return as_grid(torch.cat([self.map(c), self.box(c).sigmoid()], 2)).unflatten(0, (B, K))

    def box_loss(self, response, boxes):
        """5 times L1 on centre and size, 2 times GIoU."""
        said, boxes = response.movedim(2, -1), boxes[:, :, None, None]  # [B, K, g, g or 1, 4]
        return 5 * (said - boxes).abs().sum(-1) + 2 * (1 - generalised_iou(said, boxes))


TRACKERS = {"siamfc": SiamFC, "siamrpn": SiamRPN, "transt": TransT}
