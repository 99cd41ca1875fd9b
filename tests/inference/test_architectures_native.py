"""The families of networks that people prune, in miniature: the engine's outputs are torch's, and what falls back to torch is what may.

Each one has the operators of the published network in their order (torchvision's or Hugging Face's forward pass), with few and narrow layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import explorer
from tests.inference.graphs import operators_in_torch, relative_error
from tests.inference.test_kernels import ISAS, run_by
from tests.inference.test_networks import pruned


def conv_norm(
    inputs: int,
    outputs: int,
    size: int,
    stride: int = 1,
    groups: int = 1,
    act: Callable[[], nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([act()] if act else []))


class SqueezeExcite(nn.Module):
    """torchvision.ops.SqueezeExcitation."""

    def __init__(
        self, channels: int, squeezed: int, act: Callable[[], nn.Module], gate: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.activation, self.scale_activation = act(), gate()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.fc2(self.activation(self.fc1(self.avgpool(x))))
        return self.scale_activation(scale) * x


class InvertedResidual(nn.Module):
    """The block of MobileNetV2, V3 and EfficientNet: widen, depthwise, (squeeze and excite,) narrow."""

    def __init__(
        self,
        inputs: int,
        wide: int,
        outputs: int,
        size: int,
        stride: int,
        act: Callable[[], nn.Module],
        excite: nn.Module | None,
    ) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and inputs == outputs
        self.block = nn.Sequential(
            *([conv_norm(inputs, wide, 1, act=act)] if wide != inputs else []),
            conv_norm(wide, wide, size, stride, wide, act),
            *([excite] if excite else []),
            conv_norm(wide, outputs, 1, act=None),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.use_res_connect else self.block(x)


class Mobile(nn.Module):
    """MobileNetV2."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [(8, 8, 8, 1), (8, 24, 12, 2), (12, 48, 12, 1), (12, 48, 20, 2)]
        self.features = nn.Sequential(
            conv_norm(3, 8, 3, 2, act=nn.ReLU6),
            *(InvertedResidual(i, w, o, 3, s, nn.ReLU6, None) for i, w, o, s in blocks),
            conv_norm(20, 40, 1, act=nn.ReLU6),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(40, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class Mobile3(nn.Module):
    """MobileNetV3: Hardswish, squeeze and excite with Hardsigmoid, kernels of 3 and 5."""

    def __init__(self) -> None:
        super().__init__()

        def block(
            i: int, w: int, o: int, size: int, stride: int, act: Callable[[], nn.Module], excited: bool
        ) -> nn.Module:
            excite = SqueezeExcite(w, 8, nn.ReLU, nn.Hardsigmoid) if excited else None
            return InvertedResidual(i, w, o, size, stride, act, excite)

        self.features = nn.Sequential(
            conv_norm(3, 8, 3, 2, act=nn.Hardswish),
            block(8, 8, 8, 3, 2, nn.ReLU, True),
            block(8, 20, 12, 3, 1, nn.ReLU, False),
            block(12, 36, 12, 5, 1, nn.Hardswish, True),
            block(12, 36, 20, 5, 2, nn.Hardswish, True),
            conv_norm(20, 48, 1, act=nn.Hardswish),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Linear(48, 64), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class Efficient(nn.Module):
    """EfficientNet: SiLU, squeeze and excite with a sigmoid in every block."""

    def __init__(self) -> None:
        super().__init__()

        def block(i: int, w: int, o: int, size: int, stride: int) -> nn.Module:
            return InvertedResidual(
                i, w, o, size, stride, nn.SiLU, SqueezeExcite(w, max(1, i // 4), nn.SiLU, nn.Sigmoid)
            )

        self.features = nn.Sequential(
            conv_norm(3, 8, 3, 2, act=nn.SiLU),
            block(8, 8, 8, 3, 1),
            block(8, 48, 12, 3, 2),
            block(12, 72, 12, 5, 1),
            block(12, 72, 20, 5, 2),
            conv_norm(20, 80, 1, act=nn.SiLU),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(80, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class DenseLayer(nn.Module):
    """BatchNorm, ReLU, convolution, twice, on everything that came before."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(4 * growth), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        bottleneck = self.conv1(self.relu1(self.norm1(torch.cat(inputs, 1))))
        return self.conv2(self.relu2(self.norm2(bottleneck)))


class Dense(nn.Module):
    """DenseNet."""

    def __init__(self, growth: int = 6, layers: tuple[int, ...] = (3, 4)) -> None:
        super().__init__()
        channels = 12
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 7, 2, 3, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for n in layers:
            self.blocks.append(nn.ModuleList(DenseLayer(channels + i * growth, growth) for i in range(n)))
            channels += n * growth
            self.transitions.append(
                nn.Sequential(
                    nn.BatchNorm2d(channels),
                    nn.ReLU(inplace=True),
                    nn.Conv2d(channels, channels // 2, 1, bias=False),
                    nn.AvgPool2d(2),
                )
            )
            channels //= 2
        self.norm5, self.classifier = nn.BatchNorm2d(channels), nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            features = [x]
            for layer in block:
                features.append(layer(features))
            x = transition(torch.cat(features, 1))
        x = F.relu(self.norm5(x), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class Inception(nn.Module):
    """Branches of GoogLeNet and Inception v3: 1 x 1, 5 x 5, 1 x 7 and 7 x 1, pooled; and the reduction between two of them."""

    def __init__(self) -> None:
        super().__init__()

        def basic(inputs: int, outputs: int, size: int | tuple[int, int], **options: Any) -> nn.Module:
            conv = nn.Conv2d(inputs, outputs, size, bias=False, **options)
            return nn.Sequential(conv, nn.BatchNorm2d(outputs, eps=0.001), nn.ReLU(inplace=True))

        self.stem = nn.Sequential(basic(3, 8, 3, stride=2), nn.MaxPool2d(3, 2, ceil_mode=True))
        self.one = basic(8, 6, 1)
        self.five = nn.Sequential(basic(8, 4, 1), basic(4, 7, 5, padding=2))
        self.seven = nn.Sequential(
            basic(8, 4, 1), basic(4, 5, (1, 7), padding=(0, 3)), basic(5, 6, (7, 1), padding=(3, 0))
        )
        self.pooled = basic(8, 5, 1)
        self.reduce = basic(24, 9, 3, stride=2)
        self.fork = basic(33, 6, 1)
        self.left, self.right = basic(6, 5, (1, 3), padding=(0, 1)), basic(6, 5, (3, 1), padding=(1, 0))
        self.fc = nn.Linear(43, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        branches = [
            self.one(x),
            self.five(x),
            self.seven(x),
            self.pooled(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)),
        ]
        x = torch.cat(branches, 1)
        x = torch.cat([self.reduce(x), F.max_pool2d(x, kernel_size=3, stride=2)], 1)
        forked = self.fork(x)
        x = torch.cat([torch.cat([self.left(forked), self.right(forked)], 1), x], 1)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class Vgg(nn.Module):
    """VGG: the classifier reads a flattened image, after an adaptive pooling that changes nothing."""

    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int) -> list[nn.Module]:
            norm = [nn.BatchNorm2d(outputs)] if batch_norm else []
            return [nn.Conv2d(inputs, outputs, 3, padding=1), *norm, nn.ReLU(True), nn.MaxPool2d(2, 2)]

        self.features = nn.Sequential(*stage(3, 8), *stage(8, 12), *stage(12, 16))
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(16 * 49, 48),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(48, 32),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(32, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    """7 x 7 depthwise, layer norm and linear layers over channels, GELU, layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.up, self.act, self.down = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.layer_scale = nn.Parameter(torch.rand(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.down(self.act(self.up(y))).permute(0, 3, 1, 2)
        return x + self.layer_scale * y


class ConvNext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 12, 4, 4), LayerNorm2d(12, eps=1e-6), ConvNextBlock(12), ConvNextBlock(12),
            LayerNorm2d(12, eps=1e-6), nn.Conv2d(12, 20, 2, 2), ConvNextBlock(20),
        )  # fmt: skip
        self.head = nn.Sequential(LayerNorm2d(20, eps=1e-6), nn.Flatten(1), nn.Linear(20, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.features(x), 1))


class RegNetBlock(nn.Module):
    """The block of RegNetY: grouped convolution, squeeze and excite, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, group_width: int) -> None:
        super().__init__()
        self.proj = (
            conv_norm(inputs, outputs, 1, stride, act=None) if stride != 1 or inputs != outputs else None
        )
        self.f = nn.Sequential(
            conv_norm(inputs, outputs, 1),
            conv_norm(outputs, outputs, 3, stride, outputs // group_width),
            SqueezeExcite(outputs, max(1, inputs // 4), nn.ReLU, nn.Sigmoid),
            conv_norm(outputs, outputs, 1, act=None),
        )
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.proj is None else self.proj(x)
        return self.activation(shortcut + self.f(x))


class RegNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 8, 3, 2)
        self.trunk = nn.Sequential(
            RegNetBlock(8, 16, 2, 4),
            RegNetBlock(16, 16, 1, 4),
            RegNetBlock(16, 24, 2, 8),
            RegNetBlock(24, 24, 1, 8),
        )
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.trunk(self.stem(x))).flatten(start_dim=1))


class RepVggBlock(nn.Module):
    """The block of RepVGG and MobileOne before its branches are merged: three batch norms, of a 3 x 3 convolution, of a 1 x 1 and of nothing, are added."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        self.three = conv_norm(inputs, outputs, 3, stride, groups, act=None)
        self.one = conv_norm(inputs, outputs, 1, stride, groups, act=None)
        self.identity = nn.BatchNorm2d(inputs) if stride == 1 and inputs == outputs else None
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.three(x) + self.one(x)
        return self.act(y if self.identity is None else y + self.identity(x))


class RepVgg(nn.Module):
    """And their depthwise form, which MobileOne has."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [
            (3, 12, 2, 1),
            (12, 12, 1, 1),
            (12, 12, 1, 12),
            (12, 20, 2, 1),
            (20, 20, 1, 1),
            (20, 20, 2, 20),
        ]
        self.blocks = nn.Sequential(*(RepVggBlock(*block) for block in blocks))
        self.fc = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(self.blocks(x), 1).flatten(1))


class GhostModule(nn.Module):
    """Half of the channels are cheap filters of the other half; what is too much is cut off."""

    def __init__(self, inputs: int, outputs: int, act: bool) -> None:
        super().__init__()
        half, self.outputs = -(-outputs // 2), outputs
        relu = partial(nn.ReLU, inplace=True) if act else None
        self.primary = conv_norm(inputs, half, 1, act=relu)
        self.cheap = conv_norm(half, half, 3, groups=half, act=relu)

    def forward(self, x: Tensor) -> Tensor:
        first = self.primary(x)
        return torch.cat([first, self.cheap(first)], 1)[:, : self.outputs]


class GhostBlock(nn.Module):
    """The shortcut is added in place."""

    def __init__(self, inputs: int, wide: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.ghost1, self.ghost2 = GhostModule(inputs, wide, True), GhostModule(wide, outputs, False)
        self.down = conv_norm(wide, wide, 3, stride, wide, act=None) if stride > 1 else nn.Identity()
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                conv_norm(inputs, inputs, 3, stride, inputs, act=None),
                conv_norm(inputs, outputs, 1, act=None),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.ghost2(self.down(self.ghost1(x)))
        y += self.shortcut(x)
        return y


class Ghost(nn.Module):
    """GhostNet."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_norm(3, 8, 3, 2), GhostBlock(8, 8, 8, 1), GhostBlock(8, 18, 13, 2), GhostBlock(13, 30, 13, 1)
        )
        self.classifier = nn.Linear(13, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class VitBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(4 * width, width),
            nn.Dropout(0.1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        y, _ = self.self_attention(y, y, y, need_weights=False)
        x = x + y
        return x + self.mlp(self.ln_2(x))


class Vit(nn.Module):
    """Vision transformer: patches by a convolution, a class token, positions."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, width, 8, 8)
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embedding = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.layers, self.ln = (
            nn.Sequential(VitBlock(width, 4), VitBlock(width, 4)),
            nn.LayerNorm(width, eps=1e-6),
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = self.conv_proj(x).reshape(n, -1, 16).permute(0, 2, 1)
        x = torch.cat([self.class_token.expand(n, -1, -1), x], dim=1) + self.pos_embedding
        return self.head(self.ln(self.layers(x))[:, 0])


class BertLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.dense = (nn.Linear(width, width) for _ in range(4))
        self.intermediate, self.output = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2, self.dropout = nn.LayerNorm(width), nn.LayerNorm(width), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(n, tokens, self.heads, width // self.heads).transpose(1, 2)

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)).softmax(-1)
        attended = (self.dropout(weights) @ v).permute(0, 2, 1, 3).contiguous().view(n, tokens, width)
        x = self.norm1(self.dropout(self.dense(attended)) + x)
        return self.norm2(self.dropout(self.output(F.gelu(self.intermediate(x)))) + x)


class Bert(nn.Module):
    """BERT's encoder with its embeddings and pooler."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.word, self.position, self.kind = (
            nn.Embedding(50, width),
            nn.Embedding(32, width),
            nn.Embedding(2, width),
        )
        self.norm, self.layers = nn.LayerNorm(width), nn.Sequential(BertLayer(width, 3), BertLayer(width, 3))
        self.pooler, self.classifier = nn.Linear(width, width), nn.Linear(width, 2)
        self.register_buffer("position_ids", torch.arange(32)[None])

    def forward(self, words: Tensor) -> Tensor:
        tokens = words.shape[1]
        x = (
            self.word(words)
            + self.kind(torch.zeros_like(words))
            + self.position(self.position_ids[:, :tokens])
        )
        x = self.layers(self.norm(x))
        return self.classifier(torch.tanh(self.pooler(x[:, 0])))


IMAGE = (3, 64, 64)

ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "mobilenet_v2": (Mobile, IMAGE, set()),
    "mobilenet_v3": (Mobile3, IMAGE, set()),
    "efficientnet": (Efficient, IMAGE, set()),
    "densenet": (Dense, IMAGE, set()),
    "inception": (Inception, (3, 61, 53), set()),
    "vgg": (Vgg, (3, 56, 56), set()),
    "vgg_bn": (lambda: Vgg(batch_norm=True), IMAGE, set()),
    "regnet": (RegNet, IMAGE, set()),
    "repvgg": (RepVgg, IMAGE, set()),
    "ghostnet": (Ghost, IMAGE, set()),
    "convnext": (ConvNext, IMAGE, {"layer_norm", "permute", "flatten"}),
    "vit": (
        Vit,
        (3, 32, 32),
        set(),
    ),
    "bert": (
        Bert,
        (11,),
        {"embedding", "zeros_like", "add"},
    ),  # embeddings are added up
}


def example(shape: tuple[int, ...], images: int) -> Tensor:
    generator = torch.Generator().manual_seed(images)
    if len(shape) == 1:
        return torch.randint(0, 50, (images, *shape), generator=generator)
    return torch.randn(images, *shape, generator=generator)


def build(name: str, sparsity: float) -> nn.Module:
    """With random statistics: with the initial ones a batch norm would do next to nothing."""
    torch.manual_seed(0)
    network = ARCHITECTURES[name][0]().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return pruned(network, sparsity)


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_equals_torch_and_falls_back_only_where_it_may(
    name: str, images: int, sparsity: float
) -> None:
    network, (_, shape, allowed) = build(name, sparsity), ARCHITECTURES[name]
    x = example(shape, images)
    engine = explorer.compile(network, x)
    assert set(operators_in_torch(engine)) <= allowed, engine.fallbacks
    with torch.no_grad():
        for n in (images, 1):
            assert relative_error(engine(x[:n]), network(x[:n])) < 1e-4
        # Values that other runs have left behind must not come back.
        assert relative_error(engine(x), network(x)) < 1e-4


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_of_a_transformer_only_what_stands_before_and_behind_its_layers_runs_through_torch(name: str) -> None:
    before = {
        "vit": [],
        "bert": ["embedding", "zeros_like", "embedding", "add", "add"],
    }
    engine = explorer.compile(build(name, 0.9), example(ARCHITECTURES[name][1], 3))
    assert operators_in_torch(engine) == before[name]


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "avx512"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_equals_torch_on_narrower_vectors(
    name: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_by(isa, monkeypatch)
    network, x = build(name, 0.9), example(ARCHITECTURES[name][1], 2)
    engine = explorer.compile(network, x, threads=2)
    with torch.no_grad():
        assert relative_error(engine(x), network(x)) < 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_takes_new_weights(name: str) -> None:
    network, other = build(name, 0.0), build(name, 0.0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9).add_(0.01)
    x = example(ARCHITECTURES[name][1], 2)
    engine = explorer.compile(network, x)
    with torch.no_grad():
        for module, choose in ((other, True), (network, False)):
            engine.update_weights(module, choose=choose)
            for n in (2, 1):
                assert relative_error(engine(x[:n]), module(x[:n])) < 1e-4


@pytest.mark.parametrize("name", ["mobilenet_v3", "densenet", "inception", "vgg"])
def test_convolutional_networks_run_smaller_batches_with_fewer_jobs(name: str) -> None:
    engine = explorer.compile(build(name, 0.9), example(ARCHITECTURES[name][1], 3))
    assert engine._network.plan.is_dynamic
