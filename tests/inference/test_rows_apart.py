"""Steps that threads share out by rows where these would be shared out by channels: the answers are those of layer by layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import explorer
from explorer.inference import rows_apart
from explorer.inference.module import SparseModule
from explorer.inference.orders import LAYERS, ROWS
from tests.inference.graphs import relative_error, take_order
from tests.inference.test_kernels import ISAS, compute_in
from tests.inference.test_networks import pruned
from tests.inference.test_shared_memory import fill_with_nan, take_all_for_unclean
from tests.inference.test_tiles import Separable


@pytest.fixture(autouse=True)
def by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    take_order(monkeypatch, ROWS)


def in_rows(engine: SparseModule) -> int:
    """How many steps are cut, each of which has the jobs of all its pieces."""
    steps = engine._network.steps
    assert steps is not None
    for apart in steps.apart:
        assert steps.table[apart.row, 1:3].tolist() == [apart.kernel, apart.arguments]
        assert steps.table[apart.row, 0] == apart.jobs == engine.threads * steps.pieces[apart.row]
    return len(steps.apart)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 2e-2)])
@pytest.mark.parametrize("size", [(64, 64), (32, 31), (61, 127), (9, 64)])
@pytest.mark.parametrize("threads", [2, 3])
def test_rows_of_their_own_give_what_layer_by_layer_does(
    isa: str,
    precision: str,
    tolerance: float,
    size: tuple[int, int],
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compute_in(isa, precision, monkeypatch)
    take_all_for_unclean(monkeypatch)
    monkeypatch.setattr(rows_apart, "_LEAST_VECTORS", 1)
    torch.manual_seed(0)
    network, x = pruned(Separable(40, 3, 1), 0.7), torch.randn(1, 3, *size)
    engine = explorer.compile(network, x, threads=threads, precision=precision)
    assert in_rows(engine) >= 1
    assert fill_with_nan(engine)
    for _ in range(3):
        assert relative_error(engine(x), network(x)) < tolerance
    other = pruned(Separable(40, 3, 1), 0.8)
    engine.update_weights(other, choose=False)
    assert engine._network.steps is not None
    assert engine._network.steps.order == ROWS
    assert relative_error(engine(x), other(x)) < tolerance


class Windows(nn.Module):
    """Filters of each channel and strided convolutions, of which the latter read phases of the image."""

    def __init__(self, stride: int, size: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 20, size, stride, size // 2)
        self.filter = nn.Conv2d(20, 20, size, padding=size // 2, groups=20)
        self.down = nn.Conv2d(20, 12, 3, stride, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.filter(torch.relu(self.stem(x)))))


@given(
    rows=st.integers(20, 90),
    columns=st.integers(20, 140),
    stride=st.sampled_from([1, 2, 3, 5]),
    size=st.sampled_from([3, 5]),
    threads=st.integers(2, 4),
)
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_windows_of_all_sizes_too(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, stride: int, size: int, threads: int
) -> None:
    monkeypatch.setattr(rows_apart, "_LEAST_VECTORS", 1)
    torch.manual_seed(rows)
    network, x = pruned(Windows(stride, size), 0.7), torch.randn(1, 3, rows, columns)
    engine = explorer.compile(network, x, threads=threads)
    in_rows(engine)
    for _ in range(2):
        assert relative_error(engine(x), network(x)) < 1e-5


@pytest.mark.parametrize("columns", [30, 42, 126])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_what_the_last_vector_of_a_row_covers_of_the_next_is_left_alone(
    columns: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_all_for_unclean(monkeypatch)
    monkeypatch.setattr(rows_apart, "_LEAST_VECTORS", 1)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1, groups=16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)
    ).eval()  # fmt: skip
    x = torch.randn(1, 3, 64, columns)
    engine = explorer.compile(network, x, threads=threads)
    # 15 columns and their gap are whole vectors. Of 21 and 63 not all of the last one is stored, where that costs nothing.
    can = columns == 30 or engine.isa == "avx512"
    assert in_rows(engine) == (threads > 1 and can)
    assert fill_with_nan(engine)
    for _ in range(3):
        assert relative_error(engine(x), network(x)) < 1e-5


def test_only_threads_that_share_an_image_take_rows_of_it() -> None:
    torch.manual_seed(0)
    network, x = pruned(Separable(16, 3, 1), 0.7), torch.randn(2, 3, 112, 112)
    orders = {}
    for images, threads in ((1, 1), (1, 2), (2, 2)):
        engine = explorer.compile(network, x[:images], threads=threads)
        assert engine._network.steps is not None
        orders[images, threads] = set(engine._network.steps.chains)
        assert relative_error(engine(x[:images]), network(x[:images])) < 1e-5
    assert ROWS not in orders[1, 1] | orders[2, 2]
    assert orders[1, 2] == {LAYERS, ROWS}
