"""The encoder of BERT: twelve layers of attention and a two-layer network, nearly all of it linear layers.

Devlin, Chang, Lee and Toutanova 2018, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
arXiv:1810.04805; the layer norm comes after each sum, as in Vaswani et al. 2017.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["BertEncoder", "BertLayer", "bert_base_encoder"]


class BertLayer(nn.Module):
    """Self-attention and a two-layer network of GELU, each around a shortcut and before a layer norm."""

    def __init__(self, width: int, n_heads: int, hidden: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.attention_output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.intermediate = nn.Linear(width, hidden)
        self.output = nn.Linear(hidden, width)
        self.output_norm = nn.LayerNorm(width, eps=1e-12)

    def _heads(self, x: Tensor) -> Tensor:
        """Split ``(N, T, width)`` into ``(N, heads, T, width / heads)``."""
        return x.unflatten(2, (self.n_heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, T, width)`` to the same shape."""
        query, key, value = self._heads(self.query(x)), self._heads(self.key(x)), self._heads(self.value(x))
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x = self.attention_norm(x + self.attention_output(mixed.transpose(1, 2).flatten(2)))
        return self.output_norm(x + self.output(functional.gelu(self.intermediate(x))))


class BertEncoder(nn.Module):
    """Layers one after another, from embedded tokens to hidden states.

    Parameters
    ----------
    depth, width, n_heads, hidden : int
        Layers, features of a token, attention heads, and features inside the two-layer network; `width` is a multiple of `n_heads`.
    """

    def __init__(self, depth: int, width: int, n_heads: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(BertLayer(width, n_heads, hidden) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        """Map embedded tokens ``(N, T, width) float32`` to hidden states of the same shape."""
        return self.layers(x)


def bert_base_encoder() -> BertEncoder:
    """Return the encoder of BERT-base: 12 layers, 768 features, 12 heads, 3,072 hidden features; 85 million parameters."""
    return BertEncoder(12, 768, 12, 3072)
