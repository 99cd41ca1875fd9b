"""Networks of Hugging Face's transformers, small and with random weights, called by name as their users do. They need `pip install transformers`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import explorer
from explorer.inference import native
from tests.inference.graphs import operators_in_torch, relative_error
from tests.inference.test_networks import pruned

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # theirs are not ours to mend
    pytest.mark.skipif(native.current_isa().name == "torch", reason="no machine code on this machine"),
]


def transformers() -> Any:
    return pytest.importorskip("transformers", reason="transformers is not installed")


WIDTHS = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
PIXELS = {"image_size": 64, "patch_size": 16, **WIDTHS}
STAGES = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1]}
VOCABULARY = {"vocab_size": 100, **WIDTHS}

NETWORKS: dict[str, tuple[dict[str, Any], set[str] | None]] = {
    # What may run through torch; None: anything.
    "ResNet": ({"embedding_size": 16, **STAGES}, set()),
    "RegNet": ({"embedding_size": 16, "groups_width": 8, **STAGES}, set()),
    "MobileNetV1": ({"image_size": 64}, set()),
    "MobileNetV2": ({"image_size": 64}, set()),
    "MobileViT": ({"image_size": 64}, set()),
    "ConvNext": (STAGES, {"layer_norm"}),
    "ViT": (PIXELS, set()),
    "DeiT": (PIXELS, set()),
    "Segformer": (
        {"hidden_sizes": [16, 32, 48, 64], "num_attention_heads": [1, 2, 4, 8], "depths": [1, 1, 1, 1]},
        None,
    ),
    "PoolFormer": ({"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}, {"group_norm", "sub"}),
    "Swin": (
        {"image_size": 64, "embed_dim": 24, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4},
        None,
    ),
    "Bert": (VOCABULARY, {"expand", "gather", "embedding", "add"}),
    "Electra": ({"embedding_size": 24, **VOCABULARY}, {"expand", "gather", "embedding", "add"}),
    "Roberta": (VOCABULARY, None),
    "Llama": ({"use_cache": False, **VOCABULARY}, None),
}


def built(name: str) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    library = transformers()
    settings, _ = NETWORKS[name]
    torch.manual_seed(0)
    network = getattr(library, f"{name}Model")(getattr(library, f"{name}Config")(**settings)).eval()
    # The initial weights are so small that nothing would be left of an image.
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
    words = "vocab_size" in settings
    given = (
        {"input_ids": torch.randint(0, 100, (3, 16))}
        if words
        else {"pixel_values": torch.randn(3, 3, 64, 64)}
    )
    return pruned(network, 0.8), given


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_transformers_equals_torch(name: str) -> None:
    network, given = built(name)
    engine = explorer.compile(network, (), example_kwargs=given, threads=2)
    allowed = NETWORKS[name][1]
    assert allowed is None or set(operators_in_torch(engine)) <= allowed, engine.fallbacks
    with torch.no_grad():
        for n in (3, 1):
            some = {key: value[:n] for key, value in given.items()}
            found, wanted = engine(**some), network(**some)
            assert type(found) is type(wanted)
            assert wanted.last_hidden_state.abs().max() > 0
            assert relative_error(found.last_hidden_state, wanted.last_hidden_state) < 1e-4


@pytest.mark.parametrize("padded", [0, 5])
def test_a_mask_of_padding_is_applied(padded: int) -> None:
    network, given = built("Bert")
    mask = torch.ones(3, 16, dtype=torch.long)
    mask[1:, 16 - padded :] = 0
    given = given | {"attention_mask": torch.ones_like(mask)}
    engine = explorer.compile(network, (), example_kwargs=given)
    assert "scaled_dot_product_attention" not in operators_in_torch(engine)
    with torch.no_grad():
        wanted = network(given["input_ids"], mask).last_hidden_state
        assert (
            relative_error(engine(given["input_ids"], attention_mask=mask).last_hidden_state, wanted) < 1e-4
        )
