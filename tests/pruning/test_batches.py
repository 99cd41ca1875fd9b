from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from explorer.pruning.batches import BatchStream


@given(st.integers(1, 50), st.integers(1, 60), st.integers(1, 5), st.integers(0, 2**31))
def test_every_sample_is_seen_equally_often_and_all_batches_are_full(
    n: int, batch_size: int, passes: int, seed: int
) -> None:
    inputs = torch.arange(n, dtype=torch.float32).unsqueeze(1)
    stream = BatchStream(inputs, torch.arange(n), batch_size, None, seed)
    seen: list[int] = []
    while len(seen) < passes * n:
        x, y = stream.next()
        assert len(x) == min(batch_size, n)
        assert torch.equal(x[:, 0].long(), y)
        seen += y.tolist()
    for i in range(passes):
        assert sorted(seen[i * n : (i + 1) * n]) == list(range(n))


def test_an_augmentation_changes_the_inputs_and_not_their_order() -> None:
    def noisy(x: Tensor, generator: Generator) -> Tensor:
        return x + torch.rand(x.shape, generator=generator)

    inputs, labels = torch.zeros(20, 3), torch.arange(20)
    plain, changed, again = (BatchStream(inputs, labels, 8, augment, 5) for augment in (None, noisy, noisy))
    for _ in range(6):
        (_, y), (x, y_changed), (x_again, _) = plain.next(), changed.next(), again.next()
        assert torch.equal(y, y_changed)
        assert torch.equal(x, x_again)
        assert bool((x > 0).any())
