"""Planes whose rows follow one another without a gap: sparse convolutions zero what a tap would read of another row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import explorer
from explorer.inference import layout, native
from explorer.inference.layout import Planes
from explorer.inference.module import SparseModule
from explorer.inference.plan import Plan
from tests.inference.graphs import compared_convolution, conv_graph, relative_error
from tests.inference.test_kernels import ISAS, TOLERANCE, compute_in
from tests.inference.test_shared_memory import fill_with_nan, take_all_for_unclean

pytestmark = pytest.mark.skipif(
    native.current_isa().name == "torch", reason="no machine code on this machine"
)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows have no gaps wherever kernels can do without, worth it or not; not only where there are no programs."""
    leave_gaps_out(monkeypatch)


def leave_gaps_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layout, "worth_masks", lambda *_: True)
    patch.setattr("explorer.inference.plan.has_programs", lambda _: False)


def masked(size: tuple[int, int], outputs: int, **more: Any) -> bool:
    """Compile one sparse convolution and compare it; whether its operands were copied, as they are where there are no gaps."""
    options: dict[str, Any] = {"channels": 6, "density": 0.15, "mode": "auto"}
    return compared_convolution(size, outputs, **options | more).endswith("shift")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("size", "outputs"), [((16, 32), 12), ((9, 28), 40), ((5, 57), 3), ((3, 4), 7)])
@pytest.mark.usefixtures("everywhere")
def test_every_instruction_set_gives_the_numbers_of_the_numpy_twin(
    isa: str, size: tuple[int, int], outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_in(isa, "fp32", monkeypatch)
    assert masked(size, outputs, images=2, bounds=(0.0, math.inf))
    assert masked(size, outputs, kernel=(5, 5), padding=(2, 2), residual=True)
    strided = size[0] * 2, size[1] * 2
    assert masked(strided, outputs, kernel=(7, 7), stride=(2, 2), padding=(3, 3), bounds=(0, 6))


@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 60),
    outputs=st.sampled_from([2, 6, 20, 34]),
    channels=st.sampled_from([2, 6, 12]),
    images=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 5), st.integers(2, 7)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 3), st.integers(1, 4)),
    groups=st.sampled_from([1, 2]),
    density=st.sampled_from([0.0, 0.02, 0.1]),
    residual=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
@settings(max_examples=80, deadline=None)
def test_any_shape_equals_the_numpy_twin(
    rows: int,
    columns: int,
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int],
    outputs: int,
    **more: Any,
) -> None:
    reach = ((k - 1) * d - 2 * p for k, d, p in zip(kernel, dilation, padding, strict=True))
    if any(r >= n for r, n in zip(reach, (rows, columns), strict=True)):
        return
    with pytest.MonkeyPatch.context() as patch:
        leave_gaps_out(patch)
        masked((rows, columns), outputs, kernel=kernel, dilation=dilation, padding=padding, **more)


class Blocks(torch.nn.Module):
    """Bottlenecks at two sizes of images, the second entered with a stride."""

    def __init__(self) -> None:
        super().__init__()
        conv = torch.nn.Conv2d
        self.a, self.b, self.c = conv(16, 8, 1), conv(8, 8, 3, padding=1), conv(8, 16, 1)
        self.d, self.e, self.f = conv(16, 8, 1), conv(8, 8, 3, 2, padding=1), conv(8, 24, 1)
        self.shortcut = conv(16, 24, 1, 2)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
                if parameter.ndim > 1:
                    parameter[torch.rand(parameter.shape, generator=generator) < 0.85] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))) + x)
        y = self.f(torch.relu(self.e(torch.relu(self.d(x)))))
        return torch.relu(y + self.shortcut(x)).mean((2, 3))


def without_gaps(engine: SparseModule) -> set[int]:
    """The columns of the planes whose rows have no gaps, though a convolution pads them."""
    layouts = [home.layout for home in engine._network.plan.places.values()]
    return {
        y.columns for y in layouts if isinstance(y, Planes) and y.pitch == y.columns and y.guard > y.columns
    }


@pytest.mark.parametrize("size", [(28, 28), (11, 30), (56, 56)])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.usefixtures("everywhere")
def test_a_network_is_right_whatever_lay_in_its_memory(
    size: tuple[int, int], images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_all_for_unclean(monkeypatch)
    module, x = Blocks().eval(), torch.randn(images, 16, *size)
    engine = explorer.compile(module, x, threads=1 + images // 2)
    assert without_gaps(engine) >= {size[1], size[1] // 2}
    for n in (images, 1):
        fill_with_nan(engine)
        assert relative_error(engine(x[:n]), module(x[:n])) < TOLERANCE


@pytest.mark.usefixtures("everywhere")
def test_new_weights_need_not_be_sparse() -> None:
    module, x = Blocks().eval(), torch.randn(1, 16, 28, 28)
    engine = explorer.compile(module, x, threads=1)
    assert without_gaps(engine)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    engine.update_weights(module)
    assert relative_error(engine(x), module(x)) < TOLERANCE


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.usefixtures("everywhere")
def test_what_is_no_finite_number_stays_in_its_rows(poison: float) -> None:
    """At the ends of rows, where taps of the rows before and after would reach it."""
    weight = torch.randn(9, 5, 3, 3) * (torch.rand(9, 5, 3, 3) < 0.15)
    attributes = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    graph = conv_graph((1, 5, 12, 28), weight, None, **attributes)
    engine = SparseModule(graph, (torch.zeros(1, 5, 12, 28),), 1, "auto")
    assert engine.choices == {"conv": "sparse, shift"}
    for row, column in ((0, 0), (5, 27), (6, 0), (11, 27)):
        x = torch.randn(1, 5, 12, 28)
        x[0, :, row, column] = poison
        got, wanted = engine(x), torch.nn.functional.conv2d(x, weight, None, 1, 1)
        # torch multiplies by zeros too.
        far = torch.ones(12, 28, dtype=torch.bool)
        far[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = False
        torch.testing.assert_close(got[0][:, far], wanted[0][:, far], rtol=0, atol=1e-5)
        assert not torch.isfinite(got[0][:, ~far]).all()


def test_gaps_are_left_out_where_tiles_become_fewer_and_all_that_read_them_are_sparse() -> None:
    isa = native.Isa("avx2", 8, 16, "", "")

    def pitch(columns: int, *, density: float = 0.1, threads: int = 1, **more: Any) -> int:
        weight = torch.zeros(8, 10)
        weight.view(-1)[: round(80 * density)] = 1
        weight = weight.repeat(1, 9).view(8, 10, 3, 3)
        attributes = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
        graph = conv_graph((1, 10, columns, columns), weight, None, **attributes)
        planes = Plan(graph, more.pop("isa", isa), threads, **more).places["y"].layout
        assert isinstance(planes, Planes)
        return planes.pitch

    # 14 tiles of 7 vectors in place of 17 of 6.
    assert pitch(28) == pitch(28, threads=2) == 28
    # Whole vectors; and tiles that would be as many.
    assert pitch(14) == 16
    assert pitch(56) == 57
    assert pitch(28, density=0.2) == 28
    assert pitch(28, density=0.3) == pitch(28, mode="dense") == 29
    # Programs, which AVX-512 has, need not copy.
    assert pitch(28, isa=native.Isa("avx512", 16, 32, "", "")) > 28
