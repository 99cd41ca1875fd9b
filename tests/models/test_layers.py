from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from explorer.errors import ModelError
from explorer.models import prunable_layers
from explorer.models.architectures import EncoderClassifier, FashionResNet, mobilenet_v2, resnet18, resnet50
from explorer.models.layers import scan


def counted_by_torch(module: nn.Module, x: Tensor) -> int:
    """Multiply-adds of convolutions and matrix products, by torch's own counter (which counts each one twice)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(x)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("build", "size"),
    [
        (FashionResNet, (1, 28, 28)),
        (resnet18, (3, 64, 64)),
        (resnet50, (3, 32, 33)),
        (mobilenet_v2, (3, 64, 64)),
    ],
)
def test_multiply_adds_of_convolutional_networks_are_what_torch_counts(build, size):
    module, x = build(), torch.randn(2, *size)
    assert sum(layer.macs for layer in prunable_layers(module, x)) * 2 == counted_by_torch(module, x)


def test_multiply_adds_of_linear_layers_count_every_token():
    module, x = EncoderClassifier(28, width=32, depth=2, n_heads=4), torch.randn(3, 20, 28)
    layers = {layer.name: layer for layer in prunable_layers(module, x)}
    assert layers["embed"].macs == 20 * 28 * 32
    assert layers["blocks.1.expand"].macs == 20 * 32 * 128
    assert layers["fc"].macs == 32 * 10
    # scores and mixing inside the attention have no weights: 2 blocks * 2 products * 20 * 20 tokens * 32 features
    attention = 2 * 2 * 20 * 20 * 32
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert (sum(layer.macs for layer in layers.values()) + attention) * 3 == counted_by_torch(module, x)


def multiply_adds_one_by_one(conv: nn.Module, x: Tensor) -> int:
    """Convolve ones with ones: each output then is its number of products (with a padding of ones, which are multiplied too)."""
    padded = functional.pad(torch.ones_like(x), [conv.padding[0]] * 2 * (x.ndim - 2), value=1.0)
    function = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}[x.ndim]
    terms = function(padded, torch.ones_like(conv.weight), None, conv.stride, 0, conv.dilation, conv.groups)
    return int(terms[0].sum())


@settings(max_examples=60, deadline=None)
@given(
    n_dims=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 3]),
    in_per_group=st.integers(1, 3),
    out_per_group=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 2),
    size=st.integers(5, 8),
    batch=st.integers(1, 3),
)
def test_multiply_adds_of_any_convolution_equal_a_count_of_its_products(
    n_dims, groups, in_per_group, out_per_group, kernel, stride, dilation, padding, size, batch
):
    build = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[n_dims]
    conv = build(
        groups * in_per_group,
        groups * out_per_group,
        kernel,
        stride=stride,
        dilation=dilation,
        padding=padding,
        groups=groups,
    )
    x = torch.randn(batch, groups * in_per_group, *[size] * n_dims)
    (layer,) = prunable_layers(conv, x)
    assert layer.name == ""
    assert layer.kind == f"conv{n_dims}d"
    assert layer.weight_shape == tuple(conv.weight.shape)
    assert layer.n_params == conv.weight.numel() == math.prod(layer.weight_shape)
    assert layer.macs == multiply_adds_one_by_one(conv, x)


class Backwards(nn.Module):
    """Defines its layers in another order than it runs them, and one that it never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)
        self.first = nn.Linear(3, 4)
        self.spare = nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


def test_layers_come_in_the_order_in_which_they_run():
    with pytest.warns(UserWarning, match="spare"):
        layers = prunable_layers(Backwards(), torch.randn(1, 3))
    assert [layer.name for layer in layers] == ["first", "last"]


def test_layers_that_never_run_are_reported():
    layers, not_executed = scan(Backwards(), torch.randn(1, 3))
    assert not_executed == ("spare",)
    assert "spare" not in {layer.name for layer in layers}


class Tied(nn.Module):
    """One weight under two modules, and one module under two names that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 6)
        self.decode = nn.Linear(6, 6)
        self.decode.weight = self.encode.weight
        self.shared = nn.Linear(6, 6)
        self.alias = self.shared

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.alias(self.shared(self.encode(x))))


def test_tied_weights_are_counted_once_and_their_names_listed():
    module = Tied()
    layers = prunable_layers(module, torch.randn(2, 6))
    assert [(layer.name, layer.tied, layer.n_params, layer.macs) for layer in layers] == [
        ("encode", ("decode",), 36, 72),
        ("shared", ("alias",), 36, 72),
    ]
    assert sum(layer.macs for layer in layers) * 2 == counted_by_torch(module, torch.randn(2, 6))


def test_attention_of_torch_shows_its_output_projection_even_on_the_fast_path():
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=False), num_layers=2
    )
    layers = {layer.name: layer.macs for layer in prunable_layers(encoder, torch.randn(2, 5, 16))}
    assert layers == {
        f"layers.{index}.{name}": 5 * macs
        for index in range(2)
        for name, macs in [("self_attn.out_proj", 16 * 16), ("linear1", 16 * 32), ("linear2", 32 * 16)]
    }
    assert torch.backends.mha.get_fastpath_enabled()


def test_looking_leaves_no_trace_in_the_module():
    module = FashionResNet()
    module.train()
    module.block1.bn1.eval()  # a frozen batch norm in a network that trains
    flags = {name: child.training for name, child in module.named_modules()}
    state = {name: value.clone() for name, value in module.state_dict().items()}
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    prunable_layers(module, torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)))
    assert {name: child.training for name, child in module.named_modules()} == flags
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert not any(child._forward_hooks for child in module.modules())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_failed_look_leaves_no_trace_either():
    module = FashionResNet()
    module.train()
    with pytest.raises(ModelError, match=r"shape \(1, 3, 28, 28\).*example_input"):
        prunable_layers(module, torch.randn(1, 3, 28, 28))
    assert all(child.training for child in module.modules())
    assert not any(child._forward_hooks for child in module.modules())


def test_no_warning_when_everything_runs():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prunable_layers(FashionResNet(), torch.randn(1, 1, 28, 28))


def with_bad_weight(value: float) -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with torch.no_grad():
        module[1].weight[0, 2] = value
    return module


def with_buffer(name: str, value: float) -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    module[1].register_buffer("mask", torch.zeros(4))
    getattr(module[1], name)[2] = value
    return module.eval()


def test_a_mask_may_be_infinite():
    assert len(prunable_layers(with_buffer("mask", float("-inf")), torch.randn(1, 3))) == 2


@pytest.mark.parametrize(
    ("module", "x", "message"),
    [
        (with_buffer("mask", float("nan")), torch.randn(1, 3), "'1.mask' has 1 NaN or infinite"),
        (
            with_buffer("running_var", float("inf")),
            torch.randn(1, 3),
            "'1.running_var' has 1 NaN or infinite",
        ),
        (nn.Sequential(nn.ReLU(), nn.Flatten()), torch.randn(1, 3), "no layer that can be pruned"),
        (with_bad_weight(float("nan")), torch.randn(1, 3), "'1.weight' has 1 NaN or infinite"),
        (with_bad_weight(float("inf")), torch.randn(1, 3), "'1.weight' has 1 NaN or infinite"),
        (nn.Linear(3, 4), torch.tensor(1.0), "at least one row"),
        (nn.Linear(3, 4), torch.randn(0, 3), "at least one row"),
        (nn.Linear(3, 4), [1.0, 2.0, 3.0], "must be a tensor"),
        (nn.Linear(3, 4).double(), torch.randn(1, 3).double(), r"float32 is needed: pass model\.float\(\)"),
        (nn.LazyLinear(4), torch.randn(1, 3), "lazy"),
        (nn.Linear(3, 4, device="meta"), torch.randn(1, 3), "device 'meta'"),
        (weight_norm(nn.Linear(3, 4)), torch.randn(1, 3), "remove_parametrizations"),
        (lambda x: x, torch.randn(1, 3), r"a torch\.nn\.Module is needed"),
    ],
    ids=lambda value: "" if not isinstance(value, str) else value[:20],
)
def test_a_model_that_cannot_be_studied_is_refused_with_the_reason(module, x, message):
    with pytest.raises(ModelError, match=message):
        prunable_layers(module, x)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_module_is_refused_with_what_to_pass_instead():
    traced = torch.jit.trace(nn.Sequential(nn.Linear(3, 4)), torch.randn(1, 3))
    with pytest.raises(ModelError, match="TorchScript module hides its layers"):
        prunable_layers(traced, torch.randn(1, 3))
