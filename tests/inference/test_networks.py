"""Whole networks: the engine's outputs are torch's, pruned and dense, at several batches and odd sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import explorer
from explorer.errors import EngineError
from explorer.masks import magnitude_mask, pair_mask
from explorer.models import architectures
from tests.inference.graphs import relative_error

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "resnet18": (architectures.resnet18, (3, 67, 51), True),
    "resnet50": (architectures.resnet50, (3, 64, 45), True),
    "mobilenet_v2": (architectures.mobilenet_v2, (3, 65, 57), True),
    "vgg11": (lambda: architectures.vgg11(num_classes=10), (3, 64, 64), True),
}


def randomised(network: nn.Module) -> nn.Module:
    """Random BatchNorm statistics: with the initial ones a wrong fold would go unseen."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return network.eval()


def pruned(network: nn.Module, sparsity: float, *, pairs: bool = False) -> nn.Module:
    """A copy with the smallest weights of each layer at zero, perhaps in pairs of output channels where their number is even."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            mask = pair_mask if pairs and len(module.weight) % 2 == 0 else magnitude_mask
            module.weight.data *= mask(module.weight.data, sparsity)
    return network


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {name: randomised(build()) for name, (build, _, _) in NETWORKS.items()}


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_equals_torch_at_any_batch(
    networks: dict[str, nn.Module], name: str, sparsity: float
) -> None:
    network, (_, shape, all_native) = pruned(networks[name], sparsity), NETWORKS[name]
    images = 16 if name == "resnet18" else 3
    x = torch.randn(images, *shape, generator=torch.Generator().manual_seed(1))
    engine = explorer.compile(network, x)
    assert (engine.fallbacks == ()) == all_native
    with torch.no_grad():
        for n in {1, 2, images}:
            assert relative_error(engine(x[:n]), network(x[:n])) < 1e-4


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_the_demo_equals_torch_on_real_images(threads: int, sparsity: float) -> None:
    network = pruned(explorer.load_model("demo:fashion-resnet").module, sparsity)
    images, _ = explorer.load_data("demo:fashion").validation_tensors(64)
    engine = explorer.compile(network, images[:16], threads=threads)
    assert engine.fallbacks == ()
    with torch.no_grad():
        for start in range(0, 64, 16):
            x = images[start : start + 16]
            assert relative_error(engine(x), network(x)) < 1e-4
        assert relative_error(engine(images[:1]), network(images[:1])) < 1e-4


class Encoder(nn.Module):
    """A small transformer classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True, dropout=0.1)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_a_transformer_equals_torch_and_its_linear_layers_are_native(sparsity: float) -> None:
    torch.manual_seed(0)
    network = pruned(Encoder().eval(), sparsity)
    x = torch.randn(4, 19, 12)
    engine = explorer.compile(network, x)
    assert not any("linear" in fallback for fallback in engine.fallbacks)
    assert not any("layer_norm" in fallback for fallback in engine.fallbacks)
    with torch.no_grad():
        for n in (1, 3, 4):
            assert relative_error(engine(x[:n]), network(x[:n])) < 1e-4


class Awkward(nn.Module):
    """In-place operators, a view that is written to, a value with three readers, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.line = nn.Conv1d(6, 5, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor | tuple[torch.Tensor, ...]]:
        y = self.a(x)
        z = y.relu_()
        z += self.b(y)
        w = z * 2
        w[:, 0] = 1.0
        line = self.line(z.flatten(2)).relu()
        return {"first": (w, y + z), "line": line, "mean": z.mean((2, 3))}


def test_in_place_writes_views_and_structured_outputs_come_out_as_in_torch() -> None:
    torch.manual_seed(0)
    network, x = Awkward().eval(), torch.randn(2, 2, 6, 7)
    engine = explorer.compile(network, x)
    with torch.no_grad():
        wanted, got = network(x.clone()), engine(x.clone())
    assert list(got) == list(wanted)
    assert isinstance(got["first"], tuple)
    for a, b in zip(
        (*got["first"], got["line"], got["mean"]),
        (*wanted["first"], wanted["line"], wanted["mean"]),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-5


def writes_a_part_that_is_read_as_a_whole(v: torch.Tensor) -> torch.Tensor:
    part = v[:, :3]
    part += 1
    return v * 2


def writes_what_was_viewed_before(v: torch.Tensor) -> torch.Tensor:
    line = v.flatten(2)
    v.relu_()
    return line * 2


def writes_a_part_of_what_was_written(v: torch.Tensor) -> torch.Tensor:
    part = v.relu_()[:, :3]
    part.add_(1)
    return v * 2


def writes_a_part_that_overlaps_another(v: torch.Tensor) -> torch.Tensor:
    v[:, :3].mul_(2)
    return v[:, 1:] * 2


def writes_what_a_chunk_shares(v: torch.Tensor) -> torch.Tensor:
    left, right = v.chunk(2, 1)
    left.mul_(2)
    return torch.cat([right, v, left], 1)


def writes_a_part_that_nobody_else_reads(v: torch.Tensor) -> torch.Tensor:
    part = torch.cat([v, v * 2], 1)[:, 2:8]
    part += v[:, :6]
    return part.relu_() * 2


WRITES = {
    writes_a_part_that_is_read_as_a_whole: False,
    writes_what_was_viewed_before: False,
    writes_a_part_of_what_was_written: False,
    writes_a_part_that_overlaps_another: False,
    writes_what_a_chunk_shares: False,
    writes_a_part_that_nobody_else_reads: True,
}
"""And whether native kernels can do all of it, as nobody sees the write under another name."""


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_what_is_written_in_place_is_seen_by_all_who_share_the_memory(
    write: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.norm, self.after = (
                nn.Conv2d(2, 6, 3, padding=1),
                nn.BatchNorm2d(6),
                nn.LazyConv2d(4, 1),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = write(self.norm(self.before(x)))
            return self.after(y if y.dim() == 4 else y[..., None])

    torch.manual_seed(0)
    network, x = Writing().eval(), torch.randn(2, 2, 6, 7)
    with torch.no_grad():
        wanted = network(x)
        engine = explorer.compile(network, x)
        assert relative_error(engine(x), wanted) < 1e-5
    assert not [name for name in engine.fallbacks if "batch_norm" in name]
    if WRITES[write]:
        assert engine.fallbacks == ()


class OtherSettings(nn.Module):
    """Graphs within the graph: parts under other settings, one of them nested and one in bfloat16, and a condition."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.a(x).relu_()
        with torch.autocast("cpu", enabled=False), torch.enable_grad():
            x, y = self.b(x).relu_() if self.in_place else self.b(x).relu(), x + 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = self.c(y).float()
        w = torch.cond(x.sum() > 0, lambda v: v.sin(), lambda v: v.cos(), (y,))
        return x + w, z


@pytest.mark.parametrize("in_place", [False, True])
def test_graphs_within_the_graph_are_run_too(in_place: bool) -> None:
    torch.manual_seed(0)
    network, x = OtherSettings(in_place).eval(), torch.randn(2, 3, 6, 7)
    engine = explorer.compile(network, x)
    with torch.no_grad():
        for v in (x, -x):
            for got, wanted in zip(engine(v), network(v), strict=True):
                assert relative_error(got, wanted) < 1e-5
    # Only one of the three convolutions asks for bfloat16.
    assert len([name for name in engine.fallbacks if "conv" in name or "wrap" in name]) == 1
    assert [name for name in engine.fallbacks if "cond" in name] != []


class Standardised(nn.Conv2d):
    """Each filter less its mean, over its deviation (normaliser-free ResNets, BiT)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        filters = self.weight.reshape(1, self.out_channels, -1)
        filters = nn.functional.batch_norm(filters, None, None, training=True, eps=1e-6)
        return nn.functional.conv2d(x, filters.reshape_as(self.weight), self.bias, padding=1)


class Deriving(nn.Module):
    """Weights that are computed from parameters, a value for each sample that is not, and a number that is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Standardised(3, 4, 3), Standardised(4, 6, 3)
        self.token = nn.Parameter(torch.randn(1, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.b(self.a(x).relu()).mean((2, 3))
        noise = nn.functional.dropout(self.token, 0.5, training=False) * 0.5
        return y + self.token.expand(len(x), -1) + noise


@pytest.mark.parametrize("images", [1, 4, 6])
def test_what_follows_from_weights_alone_is_computed_once_and_again_for_new_ones(images: int) -> None:
    torch.manual_seed(0)
    network, x = Deriving().eval(), torch.randn(images, 3, 40, 40)
    engine = explorer.compile(network, x)
    assert not [name for name in engine.fallbacks if "conv" in name or "batch_norm" in name]
    for _ in range(2):
        with torch.no_grad():
            for n in (images, 1):
                assert relative_error(engine(x[:n]), network(x[:n])) < 1e-5
            for parameter in network.parameters():
                parameter += torch.randn(parameter.shape)
        engine.update_weights(network)


class Mixing(nn.Module):
    """One sample's output depends on the others', outside the engine's own kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y - y.mean(0, keepdim=True)


def test_a_smaller_batch_is_refused_where_samples_mix_and_padding_would_change_the_answer() -> None:
    torch.manual_seed(0)
    network, x = Mixing().eval(), torch.randn(4, 6)
    engine = explorer.compile(network, x)
    with torch.no_grad():
        assert relative_error(engine(x), network(x)) < 1e-5
    with pytest.raises(EngineError, match="depends on the others"):
        engine(x[:2])


class Everything(nn.Module):
    """Operators without a native kernel between native ones: embeddings and what follows them, transposed and 3-D convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.same = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding="same")
        self.gate, self.up = nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(16, 4, 2, stride=2)
        self.deep = nn.Conv3d(1, 2, 3, padding=1)
        self.words, self.out = nn.Embedding(20, 6), nn.Linear(6, 20, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.a(x)
        y = y * torch.sigmoid(self.gate(nn.functional.adaptive_avg_pool2d(y, 1)))
        z = self.up(torch.cat([y, nn.functional.hardswish(self.same(x))], 1))
        return self.deep(z[:, None]), z.argmax(1), self.out(nn.functional.gelu(self.words(words))), x


def test_what_has_no_native_kernel_runs_through_torch_and_is_named() -> None:
    torch.manual_seed(0)
    network = Everything().eval()
    x, words = torch.randn(3, 3, 7, 6), torch.randint(0, 20, (3, 5))
    engine = explorer.compile(network, (x, words))
    for operator in ("conv_transpose2d", "conv3d", "embedding", "gelu"):
        assert any(operator in fallback for fallback in engine.fallbacks), operator
    with torch.no_grad():
        for n in (3, 1):
            for got, wanted in zip(engine(x[:n], words[:n]), network(x[:n], words[:n]), strict=True):
                assert got.dtype == wanted.dtype
                assert relative_error(got, wanted) < 1e-5


@pytest.mark.parametrize(
    ("network", "shape"),
    [(nn.Identity(), (2, 3)), (nn.Linear(5, 3), (5,)), (nn.Conv2d(1, 1, 1), (1, 1, 1, 1))],
)
def test_networks_with_next_to_nothing_in_them_work(network: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    with torch.no_grad():
        assert relative_error(explorer.compile(network.eval(), x)(x), network(x)) < 1e-5


class Carried(nn.Module):
    """Additions and activations that ride on an operation whose operands come from torch, or which is one pixel large."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        p, q = torch.tanh(x), torch.sin(x)
        small = x.mean((2, 3), keepdim=True)
        one = torch.relu(self.a(small) + small)
        three = torch.relu(self.b(one) + one)
        flat = torch.relu(p.flatten(1) + q.flatten(1))
        deep = torch.relu(p[:, None] + q[:, None])
        line = torch.relu(p.flatten(2) + q.flatten(2))
        return (
            torch.relu(p + q),
            one,
            three,
            flat,
            deep,
            line,
            torch.relu(nn.functional.max_pool2d(one - 9, 1)),
        )


def test_no_residual_or_activation_is_lost_where_an_operation_falls_back_to_torch() -> None:
    torch.manual_seed(0)
    network, x = Carried().eval(), torch.randn(2, 3, 4, 5)
    engine = explorer.compile(network, x)
    with torch.no_grad():
        for got, wanted in zip(engine(x), network(x), strict=True):
            assert got.shape == wanted.shape
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


class _Residual(nn.Module):
    """`kept`: whether what is added is read once more later. `narrow`: whether the convolution reads a part of what is added."""

    def __init__(self, *, kept: bool, narrow: bool) -> None:
        super().__init__()
        self.kept, self.narrow = kept, narrow
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(4 if narrow else 8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        y = torch.relu(x + self.second(x[:, :4] if self.narrow else x))
        z = self.third(y)
        return z + x if self.kept else z


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("size", [(28, 28), (14, 14), (30, 29), (5, 7)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sum_overwrites_an_operand_only_when_nobody_reads_it_afterwards(
    kept: bool, narrow: bool, size: tuple[int, int], threads: int
) -> None:
    torch.manual_seed(0)
    network = _Residual(kept=kept, narrow=narrow).eval()
    x = torch.randn(2, 3, *size)
    engine = explorer.compile(network, x, threads=threads)
    with torch.no_grad():
        wanted = network(x)
    for _ in range(2):
        assert relative_error(engine(x), wanted) < 1e-5


@pytest.mark.parametrize("kept", [False, True])
def test_stack_traces_of_nodes_are_as_before_for_whoever_else_uses_torch(
    kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refused(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    config = pytest.importorskip("torch.fx.config")
    if not hasattr(config, "do_not_emit_stack_traces"):
        pytest.skip("this version of torch always notes them")
    monkeypatch.setattr(config, "do_not_emit_stack_traces", kept)
    explorer.compile(nn.Linear(3, 2), torch.zeros(1, 3))
    assert config.do_not_emit_stack_traces is kept
    with pytest.raises(EngineError, match="could not capture"):
        explorer.compile(Refused(), torch.ones(1, 3))
    assert config.do_not_emit_stack_traces is kept
