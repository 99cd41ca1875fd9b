from __future__ import annotations

import pytest
import torch

from explorer.models import prunable_layers
from explorer.models.architectures import (
    BertEncoder,
    EncoderClassifier,
    FashionResNet,
    bert_base_encoder,
    mobilenet_v1,
    mobilenet_v2,
    resnet18,
    resnet50,
    vgg11,
)


def without_random_weights(build, *args) -> torch.nn.Module:
    """Build a network of zeros: drawing a hundred million weights would be most of a test's time."""
    with torch.device("meta"):
        module = build(*args)
    module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.zero_()
    return module.eval()


def n_params(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("build", "published"),
    [
        (resnet18, 11_689_512),
        (resnet50, 25_557_032),
        (mobilenet_v1, 4_231_976),
        (mobilenet_v2, 3_504_872),
        (vgg11, 132_863_336),
    ],
)
def test_parameter_counts_are_the_published_ones(build, published):
    with torch.device("meta"):  # shapes without the memory
        module = build()
    assert n_params(module) == published


@pytest.mark.parametrize(
    # multiply-adds at 224 x 224 as the papers and model cards round them, in units of 1e9
    ("build", "published"),
    [(resnet18, 1.81), (resnet50, 4.09), (mobilenet_v1, 0.57), (mobilenet_v2, 0.30)],
)
def test_work_at_224_pixels_is_the_published_one(build, published):
    module = without_random_weights(build)
    macs = sum(layer.macs for layer in prunable_layers(module, torch.zeros(1, 3, 224, 224)))
    assert macs / 1e9 == pytest.approx(published, abs=0.01)


@pytest.mark.parametrize("build", [resnet18, resnet50, mobilenet_v1, mobilenet_v2])
@pytest.mark.parametrize("size", [32, 45])
def test_image_networks_take_other_sizes_channels_and_classes(build, size):
    module = without_random_weights(build, 7, 1)
    with torch.no_grad():
        assert module(torch.randn(2, 1, size, size)).shape == (2, 7)


def test_vgg_takes_other_sizes_than_224_and_has_eleven_layers():
    module = without_random_weights(vgg11, 3, 1)
    layers = prunable_layers(module, torch.randn(1, 1, 32, 32))
    assert len(layers) == 11
    assert [layer.weight_shape[0] for layer in layers] == [
        64,
        128,
        256,
        256,
        512,
        512,
        512,
        512,
        4096,
        4096,
        3,
    ]


def test_encoder_does_not_mix_the_sequences_of_a_batch():
    module = EncoderClassifier(8, num_classes=5, width=16, depth=2, n_heads=2).eval()
    x = torch.randn(3, 12, 8)
    with torch.no_grad():
        together = module(x)
        alone = torch.cat([module(row[None]) for row in x])
    assert together.shape == (3, 5)
    torch.testing.assert_close(together, alone)


def test_encoder_block_equals_the_attention_of_torch():
    torch.manual_seed(0)
    block = EncoderClassifier(8, width=16, depth=1, n_heads=2).blocks[0].eval()
    oracle = torch.nn.TransformerEncoderLayer(
        16, 2, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).eval()
    projections = (block.query, block.key, block.value)
    with torch.no_grad():
        oracle.self_attn.in_proj_weight.copy_(torch.cat([layer.weight for layer in projections]))
        oracle.self_attn.in_proj_bias.copy_(torch.cat([layer.bias for layer in projections]))
        for ours, theirs in [
            (block.project, oracle.self_attn.out_proj),
            (block.expand, oracle.linear1),
            (block.reduce, oracle.linear2),
            (block.norm1, oracle.norm1),
            (block.norm2, oracle.norm2),
        ]:
            theirs.load_state_dict(ours.state_dict())
        x = torch.randn(2, 6, 16)
        torch.testing.assert_close(block(x), oracle(x))


def test_the_demo_network_halves_its_image_thrice():
    module = FashionResNet(widths=(8, 16, 32)).eval()
    shapes = {}

    def note(name):
        def hook(_module, _inputs, output):
            shapes[name] = tuple(output.shape[1:])

        return hook

    for name in ("stem", "block1", "block2", "block3"):
        module.get_submodule(name).register_forward_hook(note(name))
    module(torch.randn(1, 1, 28, 28))
    assert shapes == {"stem": (8, 14, 14), "block1": (8, 14, 14), "block2": (16, 7, 7), "block3": (32, 4, 4)}


def test_the_bert_encoder_is_torchs_own_layer():
    torch.manual_seed(0)
    layer = BertEncoder(1, 24, 3, 40).eval().layers[0]
    reference = torch.nn.TransformerEncoderLayer(
        24, 3, 40, dropout=0.0, activation="gelu", layer_norm_eps=1e-12, batch_first=True
    ).eval()
    parts = (layer.query, layer.key, layer.value)
    with torch.no_grad():
        reference.self_attn.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        reference.self_attn.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        for ours, theirs in (
            (layer.attention_output, reference.self_attn.out_proj),
            (layer.intermediate, reference.linear1),
            (layer.output, reference.linear2),
        ):
            theirs.load_state_dict(ours.state_dict())
        x = torch.randn(2, 5, 24)
        torch.testing.assert_close(layer(x), reference(x), rtol=1e-4, atol=1e-5)


def test_the_bert_base_encoder_has_the_published_size_and_only_linear_layers_to_prune():
    with torch.device("meta"):
        assert n_params(bert_base_encoder()) == 85_054_464
    small = BertEncoder(2, 24, 3, 40).eval()
    layers = prunable_layers(small, torch.randn(1, 5, 24))
    assert len(layers) == 12
    assert sum(layer.macs for layer in layers) == 2 * 5 * (4 * 24 * 24 + 2 * 24 * 40)
