"""model.py: the encoders, the correlation decoder and CIM (paper 3.2, Figure 2, Eqs. 2 to 7).

In reading order. The method:

    1. positions      the fixed 2-D sin-cos table
    2. ViT            attention, block, encoder; parameters are named as in timm
    3. ResNet         bottleneck, encoder; parameters are named as in torchvision
    4. build_encoder  an encoder by its name
    5. decoder        cross-attention between context and exemplars               (Eqs. 4 to 6)
    6. CIM            online and target encoder, decoder, loss            (Figure 2, Eqs. 2, 3, 7)

What the encoder is used for, and what the paper compares CIM with:

    7. Classifier     an encoder with a linear head; stochastic depth   (4.3, Tables 10 and 11)
    8. Segmenter      a ViT with UperNet                                           (4.4, Table 7)
    9. ablations      convolution, deconvolutions, other losses            (Figure 4a, b, Table 3)
   10. trackers       SiamFC, SiamRPN and TransT as pretext tasks                 (Eq. 1, Table 4)

Letters in shapes: B contexts, K exemplars of each, N tokens of a context, Nz of an exemplar, D the
width of the encoder, W of the decoder, m and n the sides of context and exemplar in pixels.
"""

import copy
import math
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import sigmoid_focal_loss


# --------------------------------------------------------------------------------- 1. positions

def sincos_positions(side, width):
    """The fixed 2-D sin-cos table of a side x side grid, row by row: [side * side, width]. Sin x,
    cos x, sin y and cos y fill a quarter of the channels each, at wavelengths 2 pi to 2 pi 10^4.
    DEVIATION: Table 9 says "1-D absolute"; the released code builds this table."""
    frequency = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency  # [side, width / 4]
    half = torch.cat([angle.sin(), angle.cos()], 1)  # one axis
    x, y = half.expand(side, -1, -1), half[:, None].expand(-1, side, -1)
    return torch.cat([x, y], 2).flatten(0, 1).float()


def resize_positions(table, h, w):
    """A square grid's table [1, N, D] -> [1, h * w, D], bicubic; unchanged if it fits."""
    side = round(table.shape[1] ** 0.5)
    if (h, w) == (side, side):
        return table
    grid = table.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return F.interpolate(grid.float(), size=(h, w), mode="bicubic").flatten(2).transpose(1, 2)


# --------------------------------------------------------------------------------------- 2. ViT

def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v for [..., N, d], [..., M, d] and [..., M, d] -> [..., N, d]."""
    if v.device.type == "cpu" and v.dtype == torch.bfloat16 and k.shape[-2] <= 256:
        # With so few tokens, the gradient of PyTorch's own attention takes 7 times as long here.
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1, dtype=torch.float32)
        return weights.to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention [B, N, D] -> [B, N, D] with heads of 64 channels."""

    def __init__(self, width):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, -1, 64)).permute(2, 0, 3, 1, 4)
        x = attend(q, k, v)  # [B, heads, N, 64]
        return self.proj(x.transpose(1, 2).flatten(2))


def mlp(width):
    """Two linear layers with a GELU between them; the hidden layer is four times as wide."""
    return nn.Sequential(OrderedDict(fc1=nn.Linear(width, 4 * width), act=nn.GELU(),
                                     fc2=nn.Linear(4 * width, width)))


class Block(nn.Module):
    """A pre-norm transformer layer [B, N, D] -> [B, N, D]."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), mlp(width)
        self.drop_path = nn.Identity()  # only fine-tuning replaces it, see section 7

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Images [B, 3, h, w] -> tokens [B, 1 + N, width] after the final norm, the cls token first.
    Raises ValueError if h or w is no multiple of `patch`. The position table is stored for 224
    pixels and resized to the grid of the images. State-dict keys are timm's vit_*_patch16_224."""

    prefix = 1  # the cls token

    def __init__(self, width, depth, patch):
        super().__init__()
        self.width, self.stride = width, patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        positions = F.pad(sincos_positions(224 // patch, width), (0, 0, self.prefix, 0))  # cls: 0
        self.pos_embed = nn.Parameter(positions[None], requires_grad=False)
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, width, patch, patch)))
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        nn.init.normal_(self.cls_token, std=0.02)
        self.apply(init_linear)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(width, -1))
        nn.init.zeros_(self.patch_embed.proj.bias)

    def embed(self, images):
        """Images -> the tokens in front of the first block, with their positions added."""
        h, w = images.shape[2:]
        if h % self.stride or w % self.stride:
            raise ValueError(f"images of {h} x {w} pixels are not whole patches of {self.stride}")
        x = self.patch_embed(images)  # [B, D, h / patch, w / patch]
        positions = resize_positions(self.pos_embed[:, self.prefix:], *x.shape[2:])
        x = x.flatten(2).transpose(1, 2) + positions  # [B, N, D]
        cls = (self.cls_token + self.pos_embed[:, :self.prefix]).expand(len(x), -1, -1)
        return torch.cat([cls.to(x), x], 1)

    def forward(self, images):
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def init_linear(module):
    """Give a linear layer Xavier-uniform weights and zero biases, as MAE does."""
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
    """Images [B, 3, h, w] -> tokens [B, N, 2048], row by row over the grid of stride 32. State-dict
    keys are those of torchvision's resnet50, without `fc`."""

    width, stride, prefix = 2048, 32, 0

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
        self.to(memory_format=torch.channels_last)  # the layout in which convolutions are faster

    def forward(self, images):
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.max_pool2d(x, 3, 2, 1)  # stride 4
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # [B, 2048, h / 32, w / 32]
        return x.flatten(2).transpose(1, 2)


# ----------------------------------------------------------------------------- 4. build_encoder

# What an encoder offers: `width` D; `stride`, the side of a token in pixels; `prefix`, the number
# of tokens in front of the grid; forward(images [B, 3, h, w]) -> tokens [B, prefix + N, D], the
# grid row by row. Segmentation also needs embed(images) and `blocks`.

ENCODERS = {  # name: (width, depth, patch) of a ViT
    "vit_d8": (64, 2, 8),  # for the demo
    "vit_e8": (128, 4, 8),  # for experiments on a CPU
    "vit_t16": (192, 12, 16),
    "vit_s16": (384, 12, 16),
    "vit_b16": (768, 12, 16),
    "vit_l16": (1024, 24, 16),
    "resnet50": None,
}


def build_encoder(name, drop_path=0.0):
    """The encoder of that name with fresh weights. drop_path: stochastic depth for fine-tuning a
    ViT, the probability of its last block, growing linearly from 0 in the first."""
    if name == "resnet50":
        return ResNet50()
    encoder = ViT(*ENCODERS[name])
    if drop_path > 0:
        for i, block in enumerate(encoder.blocks):
            block.drop_path = DropPath(drop_path * i / max(1, len(encoder.blocks) - 1))
    return encoder


# ----------------------------------------------------------------------------------- 5. decoder

class CorrelationLayer(nn.Module):
    """Eqs. 4 and 5: queries are context tokens, keys and values are exemplar tokens.
    h_c [B, 1 or K, N, C] and h_z [B, K, Nz, D] -> h [B, K, N, W]. In the first layer the context
    tokens are the same for all K exemplars, so they are projected once."""

    def __init__(self, context_width, exemplar_width, width, correlation="cross_attention"):
        super().__init__()
        self.f_c = nn.Linear(context_width, width)
        self.f_k = nn.Linear(exemplar_width, width)
        self.f_v = nn.Linear(exemplar_width, width)
        self.norm, self.mlp = nn.LayerNorm(width, eps=1e-6), mlp(width)
        if correlation == "convolution":  # Figure 4a: the keys are the kernel, there are no values
            self.f_v = None

    def forward(self, h_c, h_z, positions):
        q, k = self.f_c(h_c) + positions, self.f_k(h_z)  # positions: the PE of the paper
        a = convolution(q, k) if self.f_v is None else cross_attention(q, k, self.f_v(h_z))
        # DEVIATION: the paper's residual is h_c; the authors' code takes the query, which says
        # where each token is, and learns faster by it.
        h = q + a
        return h + self.mlp(self.norm(h))  # Eq. 5


def cross_attention(q, k, v):
    """Eq. 4: q [B, 1 or K, N, W], k and v [B, K, Nz, W] -> a [B, K, N, W], heads of 32 channels."""
    q = q.expand(-1, k.shape[1], -1, -1)
    heads = [x.flatten(0, 1).unflatten(2, (-1, 32)).transpose(1, 2) for x in (q, k, v)]
    return attend(*heads).transpose(1, 2).flatten(2).view(q.shape)


class CorrelationDecoder(nn.Module):
    """Eqs. 4 to 6: h_c [B, N, D] and h_z [B, K, Nz, D] -> logits [B, K, size, size]; the sigmoid is
    part of the loss. grid: the side of the context's grid, N = grid^2. depth and width: Figures 4c
    and 4d. correlation and predictor: words of section 6."""

    def __init__(self, encoder_width, grid, width, depth, correlation, predictor):
        super().__init__()
        self.positions = nn.Parameter(sincos_positions(grid, width), requires_grad=False)  # PE
        self.layers = nn.ModuleList([
            CorrelationLayer(width if i > 0 else encoder_width, encoder_width, width, correlation)
            for i in range(depth)])
        self.predictor = nn.Linear(width, 1)  # f_p
        self.apply(init_linear)
        nn.init.normal_(self.predictor.weight, std=1e-3)  # so the first loss is ln 2
        if predictor == "deconv":
            self.predictor = deconvolutions(width)

    def forward(self, h_c, h_z, size):
        h = h_c[:, None]  # [B, 1, N, D]
        for layer in self.layers:
            h = layer(h, h_z, self.positions)  # [B, K, N, W]
        if isinstance(self.predictor, nn.Linear):
            y = as_grid(self.predictor(h)).squeeze(2)  # [B, K, grid, grid]
        else:
            y = self.predictor(as_grid(h).flatten(0, 1)).squeeze(1).unflatten(0, h.shape[:2])
        return upsample(y, size)  # Eq. 6


def as_grid(tokens):
    """Tokens [..., N, C] of a square grid, row by row -> [..., C, side, side]. A cls token in front
    is dropped."""
    side = math.isqrt(tokens.shape[-2])
    return tokens[..., -side * side:, :].unflatten(-2, (side, side)).movedim(-1, -3)


def upsample(y, size):
    """Maps [B, K, h, h] -> float32 [B, K, size, size], bilinear, as two matrix products: on GPUs
    the gradient of F.interpolate is slow and adds up in no fixed order."""
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    eye = torch.eye(y.shape[-1], device=y.device, dtype=y.dtype)
    U = F.interpolate(eye[None], size=size, mode="linear")[0]  # [h, size]
    kind = y.device.type  # the meta device, where operations are counted, has no autocast
    with torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False):
        return U.T @ y @ U


# --------------------------------------------------------------------------------------- 6. CIM

BOOTSTRAPS = ("online_exemplar", "online_context", "shared")
CORRELATIONS = ("cross_attention", "convolution")
PREDICTORS = ("linear", "deconv")
LOSSES = {"ce": F.binary_cross_entropy_with_logits}  # Eq. 7; section 9 adds those of Table 3


class CIM(nn.Module):
    """Correlational Image Modeling, Figure 2.

    encoder: a name for build_encoder. context_size: m, a multiple of the encoder's stride.
    freeze_patch_embed: a ViT keeps its random patch embedding, as in MoCo v3 and the released code.
    bootstrap (Table 2): in "online_exemplar", the paper's choice, the online encoder sees the
    exemplars and the target the contexts; "online_context" is the other way round; in "shared" both
    have the same weights, and only BatchNorm's statistics are apart: the online encoder has those
    of contexts, which are whole images as later tasks have them. correlation and predictor: Figures
    4a and 4b. loss: Table 3. Words are those of the lists above."""

    def __init__(self, encoder="vit_b16", context_size=160, decoder_width=512, decoder_depth=1,
                 freeze_patch_embed=True, bootstrap="online_exemplar",
                 correlation="cross_attention", predictor="linear", loss="ce"):
        super().__init__()
        assert bootstrap in BOOTSTRAPS, bootstrap
        assert correlation in CORRELATIONS and predictor in PREDICTORS, (correlation, predictor)
        self.bootstrap, self.loss = bootstrap, LOSSES[loss]
        self.online = build_encoder(encoder)
        if freeze_patch_embed and isinstance(self.online, ViT):
            self.online.patch_embed.requires_grad_(False)
        shared = self.online.parameters() if bootstrap == "shared" else ()  # these are not copied
        self.target = copy.deepcopy(self.online, {id(w): w for w in shared})
        if bootstrap != "shared":
            self.target.requires_grad_(False)  # stop-gradient
        self.decoder = CorrelationDecoder(self.online.width, context_size // self.online.stride,
                                          decoder_width, decoder_depth, correlation, predictor)

    def forward(self, context, exemplars, maps):
        """Normalised context [B, 3, m, m] and exemplars [B, K, 3, n, n], maps [B, K, m, m]
        -> (loss, the mean over pixels, exemplars and contexts; logits [B, K, m, m])."""
        h_c, h_z = self.encode(context, exemplars)  # Eq. 2
        logits = self.decoder(h_c, h_z, maps.shape[-1])  # Eqs. 4 to 6
        return self.loss(logits, maps), logits  # Eq. 7

    def encode(self, context, exemplars):
        """Eq. 2: -> h_c [B, N, D] and h_z [B, K, Nz, D]. The context's cls token is dropped since
        it is no position; the exemplars keep theirs as one more key and value."""
        exemplar_encoder, context_encoder = self.online, self.target
        if self.bootstrap != "online_exemplar":
            exemplar_encoder, context_encoder = self.target, self.online
        h_z = exemplar_encoder(exemplars.flatten(0, 1)).unflatten(0, exemplars.shape[:2])
        return context_encoder(context)[:, context_encoder.prefix:], h_z

    @torch.no_grad()
    def update_target(self, tau):
        """Eq. 3: target = tau target + (1 - tau) online, for parameters and BatchNorm statistics.
        Integers (BatchNorm's counters) are copied. A shared encoder has nothing to average."""
        if self.bootstrap == "shared":
            return
        target, online = self.target.state_dict(), self.online.state_dict()
        floats = [key for key in target if target[key].is_floating_point()]
        torch._foreach_lerp_([target[k] for k in floats], [online[k] for k in floats], 1 - tau)
        for key in target.keys() - floats:
            target[key].copy_(online[key])


# -------------------------------------------------------------------------------- 7. Classifier

class Classifier(nn.Module):
    """Images [B, 3, h, w] -> logits [B, classes]: encoder, global average pooling, norm, linear. A
    ViT is normalised after the pooling of its patch tokens instead of before it (Table 10, as in
    MAE); a ResNet-50 has its BatchNorms. probe: linear probing, with a frozen encoder and a
    BatchNorm without parameters behind the pooling."""

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
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # so the first loss is ln(classes)
        nn.init.zeros_(self.head.bias)

    def train(self, mode=True):
        super().train(mode)
        self.encoder.train(mode and not self.probe)  # a frozen BatchNorm keeps its statistics
        return self

    def features(self, images):
        """The input of the linear head: [B, width]."""
        return self.fc_norm(self.encoder(images)[:, self.encoder.prefix:].mean(1))

    def forward(self, images):
        return self.head(self.features(images))

    def names(self):
        """{name in this module: name in torchvision, or in timm with global_pool="avg"}."""
        head = "head." if isinstance(self.encoder, ViT) else "fc."
        return {k: k.removeprefix("encoder.").replace("head.", head) for k in self.state_dict()}


class DropPath(nn.Module):
    """Stochastic depth: in training an image skips the branch with probability p, else the branch
    is scaled by 1 / (1 - p). If p were a number, torch.compile would compile each block anew."""

    def __init__(self, p):
        super().__init__()
        self.register_buffer("keep", torch.tensor(1.0 - p), persistent=False)

    def forward(self, x):
        if not self.training:
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) < self.keep
        return x * (kept / self.keep).to(x.dtype)


# --------------------------------------------------------------------------------- 8. Segmenter

class Segmenter(nn.Module):
    """Images [B, 3, h, w] -> logits [B, classes, h, w] in float32; in training a pair, the second
    from an auxiliary head. UperNet [70] on a ViT as in BEiT: the outputs of the blocks at 4, 6, 8
    and 12 twelfths of the depth, without the final norm, at strides of 1/4, 1/2, 1 and 2 patches.
    width: channels of the head."""

    names = Classifier.names  # of the encoder as in timm; the heads keep their names

    def __init__(self, encoder, classes, drop_path=0.0, width=768):
        super().__init__()
        self.encoder = build_encoder(encoder, drop_path)
        self.encoder.norm = nn.Identity()  # it is not used and would get no gradient
        D, depth = self.encoder.width, len(self.encoder.blocks)
        self.taken = [math.ceil(depth * k / 12) - 1 for k in (4, 6, 8, 12)]  # blocks, from 0
        self.pyramid = nn.ModuleList([
            nn.Sequential(nn.ConvTranspose2d(D, D, 2, 2), nn.BatchNorm2d(D), nn.GELU(),
                          nn.ConvTranspose2d(D, D, 2, 2)),
            nn.ConvTranspose2d(D, D, 2, 2), nn.Identity(), nn.MaxPool2d(2, ceil_mode=True)])
        self.head = UperNet(D, classes, width)
        self.auxiliary = fcn(D, 256, classes)

    def features(self, images):
        """The four maps [B, D, h / s, w / s] at strides s; the size of the last is rounded up."""
        h, w = (n // self.encoder.stride for n in images.shape[2:])
        x, outputs = self.encoder.embed(images), []
        for block in self.encoder.blocks:
            x = block(x)
            outputs.append(x)
        patches = [outputs[i][:, self.encoder.prefix:].transpose(1, 2) for i in self.taken]
        return [scale(x.unflatten(2, (h, w))) for scale, x in zip(self.pyramid, patches)]

    def forward(self, images):
        size, maps = images.shape[2:], self.features(images)
        heads = (self.head(maps), self.auxiliary(maps[2])) if self.training else (self.head(maps),)
        logits = [F.interpolate(y.float(), size=size, mode="bilinear") for y in heads]
        return tuple(logits) if self.training else logits[0]


class UperNet(nn.Module):
    """Four maps [B, D, h, w], each half as large as the one before -> logits [B, classes, h, w] at
    the first one's size [70]. The coarsest is pooled to 1, 2, 3 and 6 windows a side, for the scene
    as a whole. Each finer one is added to the upsampled coarser one; then all four are fused."""

    def __init__(self, D, classes, width):
        super().__init__()
        self.pools = nn.ModuleList([conv_bn_relu(D, width, 1) for _ in range(4)])
        self.bottleneck = conv_bn_relu(D + 4 * width, width, 3)
        self.laterals = nn.ModuleList([conv_bn_relu(D, width, 1) for _ in range(3)])
        self.smooth = nn.ModuleList([conv_bn_relu(width, width, 3) for _ in range(3)])
        self.fuse = fcn(4 * width, width, classes)

    def forward(self, maps):
        resize = partial(F.interpolate, mode="bilinear")
        *finer, x = maps
        pooled = [conv(F.adaptive_avg_pool2d(x, side))
                  for conv, side in zip(self.pools, (1, 2, 3, 6))]
        x = self.bottleneck(torch.cat([x, *(resize(y, x.shape[2:]) for y in pooled)], 1))
        levels = [x]
        for k in (2, 1, 0):  # from coarse to fine
            x = self.laterals[k](finer[k]) + resize(x, finer[k].shape[2:])
            levels.append(self.smooth[k](x))
        return self.fuse(torch.cat([resize(level, x.shape[2:]) for level in levels], 1))


def conv_bn_relu(inside, outside, size):
    """Convolution that keeps h and w, BatchNorm, ReLU."""
    return nn.Sequential(nn.Conv2d(inside, outside, size, padding=size // 2, bias=False),
                         nn.BatchNorm2d(outside), nn.ReLU(inplace=True))


def fcn(inside, width, classes):
    """The last layers of a segmentation head: a 3x3 convolution, dropout, a 1x1 convolution."""
    head = nn.Sequential(conv_bn_relu(inside, width, 3), nn.Dropout2d(0.1),
                         nn.Conv2d(width, classes, 1))
    nn.init.normal_(head[2].weight, std=0.01)  # so the first loss is about ln(classes)
    nn.init.zeros_(head[2].bias)
    return head


# -------------------------------------------------------- 9. ablations: Figure 4a, 4b and Table 3

def convolution(q, k):
    """Figure 4a: convolution instead of Eq. 4. Each channel of q [B, J, N, W], with J = 1 or K, is
    convolved with that channel of k [B, K, Nz, W] -> a [B, K, N, W]. The kernel is the exemplar's
    grid of keys; its products are averaged."""
    (B, J, N, W), K = q.shape, k.shape[1]
    kernels = as_grid(k).unflatten(1, (J, K // J)).transpose(2, 3).flatten(0, 1)
    kernels = kernels[:, :, :, None]  # [B * J, W, K / J, 1, side, side]
    a = cross_correlate(as_grid(q).flatten(0, 1), kernels) / kernels[0, 0, 0].numel()
    return a.view(B, J, W, K // J, N).permute(0, 1, 3, 4, 2).reshape(B, K, N, W)


def cross_correlate(x, kernels):
    """The correlation of Eq. 1 as a convolution in G groups of channels: x [B, C, h, w] and, for
    each x, its own kernels [B, G, O, C / G, side, side] -> [B, G, O, h, w]. A kernel of even side
    has no middle pixel: the result is the mean over the four ways to place it on a position.
    DEVIATION: trackers keep the kernel inside the image; here x is padded with zeros."""
    G, side = kernels.shape[1], kernels.shape[-1]
    windows = F.unfold(x, side, padding=side // 2).unflatten(1, (G, -1))
    y = (kernels.flatten(3) @ windows).unflatten(3, (x.shape[-2] + 1 - side % 2, -1))
    return y if side % 2 else F.avg_pool2d(y.flatten(0, 2), 2, 1).unflatten(0, y.shape[:3])


def deconvolutions(width):
    """Figure 4b: [B, W, h, w] -> [B, 1, 8 h, 8 w], three deconvolutions that double the side."""
    widths = (width, width // 2, width // 4, 1)
    layers = [nn.ConvTranspose2d(i, o, 4, 2, 1) for i, o in zip(widths, widths[1:])]
    nn.init.normal_(layers[2].weight, std=1e-3)  # so the first loss is ln 2
    nn.init.zeros_(layers[2].bias)
    return nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])


def balanced_loss(logits, maps):
    """Class-balanced cross-entropy of HED [77]: pixels inside a box are weighted by the fraction of
    pixels outside it, and the other way round."""
    outside = 1 - maps.mean((-2, -1), keepdim=True)
    weight = torch.where(maps > 0, outside, 1 - outside)
    return F.binary_cross_entropy_with_logits(logits, maps, weight)


LOSSES |= {
    "balanced": balanced_loss,
    "mse": lambda logits, maps: F.mse_loss(logits.sigmoid(), maps),
    "focal": partial(sigmoid_focal_loss, reduction="mean"),  # gamma 2, alpha 0.25 [37]
}


# -------------------------------------------------------------------------- 10. trackers, Table 4

class Tracking(nn.Module):
    """A tracker's pretext task on the same pairs (Table 4), used like CIM: one encoder sees both
    sides, and the decoder is a head, siamfc, siamrpn or transt. A head has respond(h_c, h_z) ->
    [B, K, 1 or 5, g, g]: at each position of the context's grid the logit of the map and, if there
    is a box_loss, four numbers for its upright box. DEVIATION: trackers give a larger weight to the
    few positions inside a box of a video frame; here all pixels have the same weight."""

    bootstrap = "shared"
    encode, update_target = CIM.encode, CIM.update_target  # as in CIM with shared weights

    def __init__(self, head, encoder="vit_b16", context_size=160, freeze_patch_embed=True):
        super().__init__()
        cim = CIM(encoder, context_size, freeze_patch_embed=freeze_patch_embed, bootstrap="shared")
        self.online, self.target = cim.online, cim.target  # only its encoder is used
        self.decoder = TRACKERS[head](self.online.width, context_size // self.online.stride)
        self.map_weight = 8.334 if head == "transt" else 1.0  # of the loss on the map

    def forward(self, context, exemplars, maps):
        """Arguments and results are those of CIM.forward."""
        response = self.decoder.respond(*self.encode(context, exemplars))
        logits = upsample(response[:, :, 0], maps.shape[-1])
        loss = self.map_weight * F.binary_cross_entropy_with_logits(logits, maps)
        if response.shape[2] > 1:
            losses = self.decoder.box_loss(response[:, :, 1:].float(), upright_boxes(maps))
            # DEVIATION: trackers take the mean over the positions inside all boxes of a batch. It
            # would depend on how the batch is split, so this is the mean of each map's mean.
            inside = F.interpolate(maps, size=losses.shape[-2:], mode="nearest-exact")
            counts = inside.sum((2, 3)).clamp(min=1)
            loss = loss + ((losses * inside).sum((2, 3)) / counts).mean()
        return loss, logits


def upright_boxes(maps):
    """Maps [..., m, m] -> their tight upright boxes (cx, cy, w, h) [..., 4], in fractions of the
    side. The box of an empty map is the whole map."""
    hit = torch.stack([maps.amax(-2), maps.amax(-1)], -2)  # [..., 2, m]: columns, rows
    low, high = hit.argmax(-1), maps.shape[-1] - hit.flip(-1).argmax(-1)  # argmax: the first 1
    return torch.cat([(low + high) / 2, high - low], -1) / maps.shape[-1]


class SiamFC(nn.Module):
    """Eq. 1 as in [4]: the exemplar's feature map is the kernel of a convolution; b is the bias."""

    def __init__(self, encoder_width, grid):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def respond(self, h_c, h_z):
        kernels = as_grid(h_z)
        y = cross_correlate(as_grid(h_c), kernels[:, None]) / kernels[0, 0].numel()
        return (9.2 * y + self.bias).transpose(1, 2)  # [4] multiply the sum of 9,216 terms by 1e-3

    def forward(self, h_c, h_z, size):
        return upsample(self.respond(h_c, h_z)[:, :, 0], size)


class SiamRPN(nn.Module):
    """[34]: one branch for the map and one for the box, relative to an anchor at each position. In
    a branch one convolution makes kernels of the exemplar, another one the features to correlate
    with. DEVIATION: one square anchor, an exemplar of 64 pixels in a context of 160, instead of
    five shapes, since a map has one class at each position."""

    forward = SiamFC.forward  # the logits of the map

    def __init__(self, encoder_width, grid):
        super().__init__()
        self.width = width = min(256, encoder_width)
        self.map, self.box = (nn.ModuleDict({
            "kernel": nn.Conv2d(encoder_width, outputs * width, 3, padding=1),
            "search": nn.Conv2d(encoder_width, width, 3, padding=1),
            "adjust": nn.Conv2d(outputs, outputs, 1)}) for outputs in (1, 4))
        for branch in (self.map, self.box):
            nn.init.dirac_(branch.adjust.weight)
            nn.init.zeros_(branch.adjust.bias)

    def respond(self, h_c, h_z):
        c, z, responses = as_grid(h_c), as_grid(h_z), []
        (B, K), side = z.shape[:2], z.shape[-1]
        for branch in (self.map, self.box):
            kernels = branch.kernel(z.flatten(0, 1)).reshape(B, 1, -1, self.width, side, side)
            y = cross_correlate(branch.search(c), kernels) / math.sqrt(self.width * side * side)
            responses.append(branch.adjust(y.view(B * K, -1, *y.shape[3:])).unflatten(0, (B, K)))
        return torch.cat(responses, 2)

    def box_loss(self, response, boxes):
        """Smooth L1 of offset and log-size relative to the anchor, times 1.2 as in PySOT: response
        [B, K, 4, g, g] and boxes [B, K, 4] -> [B, K, g, g]."""
        g, anchor = response.shape[-1], 0.4  # of the context's side
        centre, sides = boxes[..., None, None].split(2, 2)  # [B, K, 2, 1, 1]
        at = (torch.arange(g, device=boxes.device) + 0.5) / g
        offset = (centre - torch.stack([at.expand(g, g), at[:, None].expand(g, g)])) / anchor
        true = torch.cat([offset, (sides / anchor).log().expand_as(offset)], 2)
        return 1.2 * F.smooth_l1_loss(response, true, reduction="none").sum(2)


class TransT(nn.Module):
    """[15]: four layers of self-attention on each side and cross-attention in both directions, then
    one more cross-attention from the context to the exemplar. Each position of the context predicts
    the map and the box. DEVIATION: no dropout, norms first (norms last did not learn at the demo's
    rate), positions are added once, an MLP follows each pair of attentions."""

    forward = SiamFC.forward  # the logits of the map

    def __init__(self, encoder_width, grid, depth=4):
        super().__init__()
        width = min(256, encoder_width)
        layer = partial(nn.TransformerDecoderLayer, width, width // 32, 4 * width, dropout=0,
                        activation=F.gelu, batch_first=True, norm_first=True)
        self.positions = nn.Parameter(sincos_positions(grid, width), requires_grad=False)
        self.project = nn.Linear(encoder_width, width)
        self.layers = nn.ModuleList([nn.ModuleList([layer(), layer()]) for _ in range(depth)])
        self.last, self.norm = layer(), nn.LayerNorm(width)
        self.map, self.box = (nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, outputs)) for outputs in (1, 4))

    def respond(self, h_c, h_z):
        (B, K), side = h_z.shape[:2], math.isqrt(h_z.shape[2])
        z = self.project(h_z[:, :, -side * side:]).flatten(0, 1)  # [B * K, side^2, W], no cls token
        z = z + resize_positions(self.positions[None], side, side)
        c = (self.project(h_c) + self.positions).repeat_interleave(K, 0)  # [B * K, N, W]
        for layer_z, layer_c in self.layers:
            z, c = layer_z(z, c), layer_c(c, z)
        c = self.norm(self.last(c, z))
        return as_grid(torch.cat([self.map(c), self.box(c).sigmoid()], 2)).unflatten(0, (B, K))

    def box_loss(self, response, boxes):
        """5 times L1 of centre and size, plus 2 times 1 - GIoU. GIoU is IoU minus the fraction of
        the smallest box around both that neither covers. Shapes are those of SiamRPN.box_loss."""
        def area(sides):  # the gradient of `prod`, and torchvision's GIoU, make the host wait
            return sides[..., 0] * sides[..., 1]

        a, b = response.movedim(2, -1), boxes[:, :, None, None]  # [B, K, g, g or 1, 4]
        l1 = (a - b).abs().sum(-1)
        low = [x[..., :2] - x[..., 2:] / 2 for x in (a, b)]
        high = [x[..., :2] + x[..., 2:] / 2 for x in (a, b)]
        both = area((torch.minimum(*high) - torch.maximum(*low)).clamp(min=0))
        union = area(a[..., 2:]) + area(b[..., 2:]) - both
        around = area(torch.maximum(*high) - torch.minimum(*low))
        return 5 * l1 + 2 * (1 - (both / union - 1 + union / around))


TRACKERS = {"siamfc": SiamFC, "siamrpn": SiamRPN, "transt": TransT}
