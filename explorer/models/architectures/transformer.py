"""A small transformer encoder that classifies sequences of vectors, such as the rows of an image.

Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, with the layer norm before each sub-layer (Xiong et al. 2020,
"On Layer Normalization in the Transformer Architecture", arXiv:2002.04745). Each projection is a linear layer of its own, so that
each can be pruned by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["EncoderBlock", "EncoderClassifier"]


class EncoderBlock(nn.Module):
    """Self-attention and a two-layer network of GELU, each behind a layer norm and around a shortcut."""

    def __init__(self, width: int, n_heads: int, expansion: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm1 = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, expansion * width)
        self.reduce = nn.Linear(expansion * width, width)

    def _heads(self, x: Tensor) -> Tensor:
        """Split ``(N, T, width)`` into ``(N, heads, T, width / heads)``."""
        return x.unflatten(2, (self.n_heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, T, width)`` to the same shape."""
        y = self.norm1(x)
        query, key, value = self._heads(self.query(y)), self._heads(self.key(y)), self._heads(self.value(y))
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.reduce(functional.gelu(self.expand(self.norm2(x))))


class EncoderClassifier(nn.Module):
    """Linear embedding, learned positions, encoder blocks, layer norm, mean over the sequence, linear.

    Parameters
    ----------
    in_features : int
        Length of each vector of the sequence.
    num_classes : int
    width, depth, n_heads : int
        Features of a token, blocks, attention heads; `width` is a multiple of `n_heads`.
    expansion : int
        Hidden features of the two-layer network over `width`.
    max_length : int
        Longest sequence.
    """

    def __init__(
        self,
        in_features: int = 28,
        num_classes: int = 10,
        *,
        width: int = 64,
        depth: int = 2,
        n_heads: int = 4,
        expansion: int = 4,
        max_length: int = 64,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(in_features, width)
        self.position = nn.Parameter(0.02 * torch.randn(max_length, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, n_heads, expansion) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map sequences ``(N, T, in_features) float32``, T up to `max_length`, to logits ``(N, num_classes)``."""
        x = self.embed(x) + self.position[: x.shape[1]]
        return self.fc(self.norm(self.blocks(x)).mean(1))
