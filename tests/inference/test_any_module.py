"""Modules that are written in unusual ways: the compiled network answers as torch does, or says why it does not."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import explorer
from explorer.errors import EngineError
from explorer.inference.capture import are_close


class Calls(nn.Module):
    """A module whose forward is a function of it and its arguments."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            if isinstance(part, Tensor):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.eval()

    def forward(self, *arguments: Any) -> Any:
        return self._forward(self, *arguments)


def rows(n: int = 4) -> Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(n))


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 8, 6, 6, generator=torch.Generator().manual_seed(n))


def assert_same(fast: explorer.SparseModule, module: nn.Module, *arguments: Any) -> None:
    """The engine answers as the module, with arguments of its own: forward may write to them."""
    with torch.no_grad():
        wanted = module(*copy.deepcopy(arguments))
    assert are_close(fast(*arguments), wanted, 1e-5)


# ---- sizes that forward reads


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.a(x) / x.shape[0],
        lambda m, x: m.a(x) if x.shape[0] > 2 else m.b(x),
        lambda m, x: m.a(x) * len(x) + x.numel(),
        lambda m, x: m.a(x).reshape(4, -1),
        lambda m, x: m.a(x).view(4, 2, -1).relu(),
    ],
)
def test_a_smaller_batch_is_refused_where_forward_uses_the_size_of_the_batch(
    forward: Callable[..., Any],
) -> None:
    module = Calls(forward, a=nn.Linear(8, 4), b=nn.Linear(8, 4))
    fast = explorer.compile(module, rows())
    assert_same(fast, module, rows())
    for few in (2, 1):
        with pytest.raises(EngineError, match="something else with a batch of another size"):
            fast(rows(few))
    assert_same(fast, module, rows())


def test_of_smaller_batches_only_those_are_refused_that_differ() -> None:
    module = Calls(lambda m, x: m.a(x).squeeze(), a=nn.Linear(8, 4))
    fast = explorer.compile(module, rows())
    for n in (4, 3, 2):
        assert_same(fast, module, rows(n))
    with pytest.raises(EngineError, match="another size"):
        fast(rows(1))


@pytest.mark.parametrize("special", [1, 2, 3])
def test_one_size_that_forward_treats_apart_is_refused_alone(special: int) -> None:
    def forward(m: nn.Module, x: Tensor) -> Any:
        return m.b(x) if x.shape[0] == special else m.a(x)

    module = Calls(forward, a=nn.Linear(8, 4), b=nn.Linear(8, 4))
    fast = explorer.compile(module, rows(4))
    for n in {1, 2, 3, 4} - {special}:
        assert_same(fast, module, rows(n))
    with pytest.raises(EngineError, match="another size"):
        fast(rows(special))


@pytest.mark.parametrize("size", [4, 9])
def test_what_three_samples_get_all_larger_batches_are_taken_to_get(size: int) -> None:
    module = Calls(
        lambda m, x: m.a(x) if x.shape[0] in {1, 2, size} else m.b(x), a=nn.Linear(8, 4), b=nn.Linear(8, 4)
    )
    fast = explorer.compile(module, rows(size))
    for n in (1, 2, size):
        assert_same(fast, module, rows(n))
    for n in range(3, size):
        with pytest.raises(EngineError, match="another size"):
            fast(rows(n))


def test_a_small_dependence_on_the_size_of_the_batch_is_noticed() -> None:
    module = Calls(lambda m, x: m.a(x) * (1 + 1 / 512 * x.shape[0]), a=nn.Linear(8, 4))
    with pytest.raises(EngineError, match="another size"):
        explorer.compile(module, rows(4))(rows(3))


def test_a_smaller_batch_is_refused_in_turns_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("explorer.inference.execution._CACHED_BYTES", 1)
    module = Calls(lambda m, x: functional.relu(m.a(x)) / x.shape[0], a=nn.Conv2d(8, 4, 3))
    fast = explorer.compile(module, images(6))
    assert_same(fast, module, images(6))
    with pytest.raises(EngineError, match="another size"):
        fast(images(1))
    with pytest.raises(EngineError, match="another size"):
        fast(images(3))


def test_what_few_images_give_is_known_after_new_weights_and_without_the_module() -> None:
    module = Calls(lambda m, x: m.a(x).sin(), a=nn.Linear(8, 4))
    fast = explorer.compile(module, torch.zeros(4, 8))
    other = copy.deepcopy(module)
    nn.init.normal_(other.a.weight)
    fast.update_weights(other)
    del module
    for n in (1, 2, 3, 4):
        assert_same(fast, other, rows(n))


def test_random_numbers_of_the_caller_are_not_used_up() -> None:
    module = Calls(lambda m, x: m.a(x).sin(), a=nn.Linear(8, 4))
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    fast = explorer.compile(module, rows())
    fast(rows(2))
    assert torch.equal(torch.rand(2), wanted)


def test_that_samples_mix_is_noticed_of_integers_that_are_all_the_same() -> None:
    def centred(m: Any, i: Tensor) -> Tensor:
        y: Tensor = m.e(i).mean(1)
        return y - y.mean(0)

    tokens = torch.randint(0, 10, (4, 7))
    mixes = Calls(centred, e=nn.Embedding(10, 5))
    for same in (0, 9):
        fast = explorer.compile(mixes, torch.full((4, 7), same))
        assert_same(fast, mixes, tokens)
        with pytest.raises(EngineError, match="depends on the others"):
            fast(tokens[:2])
        apart = Calls(lambda m, i: m.e(i).mean(1), e=nn.Embedding(10, 5))
        fast = explorer.compile(apart, torch.full((4, 7), same))
        for n in (1, 2, 4):
            assert_same(fast, apart, tokens[:n])


@pytest.mark.parametrize("cached_bytes", [None, 1])
def test_a_parameter_that_is_returned_keeps_its_rows(
    cached_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cached_bytes is not None:
        monkeypatch.setattr("explorer.inference.execution._CACHED_BYTES", cached_bytes)
    module = Calls(lambda m, x: (m.c(x), m.t), c=nn.Conv2d(8, 4, 1), t=torch.randn(6, 3))
    fast = explorer.compile(module, images(6))
    for n in (6, 4, 1):
        assert_same(fast, module, images(n))


# ---- what is written in place


@pytest.mark.parametrize(
    "view",
    [
        lambda y: y.mT,
        lambda y: y.swapdims(0, 1),
        lambda y: y.moveaxis(0, 1),
        lambda y: y.ravel(),
        lambda y: y.hsplit(2)[1],
        lambda y: y.vsplit(2)[0],
        lambda y: y.broadcast_to(4, 8),
        lambda y: y.view(torch.int32).view(torch.float32),
        lambda y: functional.dropout(y, 0.2, training=False),
        lambda y: functional.alpha_dropout(y, 0.2, training=False),
        lambda y: functional.feature_alpha_dropout(y, 0.2, training=False),
        lambda y: y.mT.reshape(-1),
        lambda y: y.unfold(1, 2, 2),
        lambda y: y.as_strided((4, 4), (8, 1)),
    ],
)
def test_a_write_through_a_view_is_seen_by_all_who_share_the_memory(view: Callable[[Tensor], Tensor]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.a(x)
        return view(y).clamp_(min=0).sum() + y

    module = Calls(forward, a=nn.Linear(8, 8))
    assert_same(explorer.compile(module, rows()), module, rows())


def test_views_that_torch_loses_are_refused() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.a(x)
        return torch.unsafe_chunk(y, 2, 1)[0].clamp_(min=0).sum() + y

    with pytest.raises(EngineError, match=r"that torch\.export does not follow"):
        explorer.compile(Calls(forward, a=nn.Linear(8, 8)), rows())


@pytest.mark.parametrize(
    "dropout", [nn.Dropout(0.2), nn.Dropout2d(0.2), nn.AlphaDropout(0.2), nn.Dropout(0.2, inplace=True)]
)
def test_what_dropout_leaves_as_it_is_may_be_written_to(dropout: nn.Module) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.c(x)
        return functional.relu_(m.d(y)) + y

    module = Calls(forward, c=nn.Conv2d(8, 6, 1), d=dropout)
    assert_same(explorer.compile(module, images()), module, images())


def test_inputs_that_forward_writes_to_and_returns_come_out_and_are_left_alone() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x.mul_(2)
        return m.c(x), x

    for module in (Calls(forward, c=nn.Conv2d(8, 4, 1)), nn.Sequential(nn.ReLU(inplace=True)).eval()):
        fast, x = explorer.compile(module, images()), images()
        assert_same(fast, module, x)
        assert fast.compare(x).relative_l2 < 1e-5
        assert torch.equal(x, images())
        assert_same(fast, module, x[:1])


def test_a_buffer_that_the_next_call_reads_is_refused_and_one_that_nobody_reads_is_not() -> None:
    class Counts(nn.Module):
        def __init__(self, reads: bool) -> None:
            super().__init__()
            self.a, self.reads = nn.Linear(8, 4), reads
            self.register_buffer("n", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.n += 1
            y: Tensor = self.a(x)
            return y * self.n if self.reads else y

    class Assigns(Counts):
        def forward(self, x: Tensor) -> Tensor:
            self.n = self.n + 1
            y: Tensor = self.a(x) * self.n
            return y

    for reading in (Counts(reads=True), Assigns(reads=True)):
        with pytest.raises(EngineError, match="changes its buffer 'n'"):
            explorer.compile(reading, rows())
    module = Counts(reads=False).eval()
    assert_same(explorer.compile(module, rows()), module, rows())
    assert module.n == 1, "only the module's own call has counted"


# ---- arguments


class Optional(nn.Module):
    """With arguments of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Any, mask: Tensor | None = None, times: int = 3) -> Any:
        tensors = pytree.tree_leaves(x)
        y = self.a(tensors[0]) * times + sum(tensors[1:])
        return y if mask is None else y * mask


@pytest.mark.parametrize(
    ("example", "others", "refused"),
    [
        (([rows(), rows()],), [([rows(2), rows(2)],)], [(rows(), rows()), ([rows()],)]),
        (({"a": rows(), "b": (rows(),)},), [({"a": rows(1), "b": (rows(1),)},)], [({"a": rows()},)]),
        ((rows(), None), [(rows(3), None)], [(rows(), rows()), (rows(),)]),
        ((rows(), None, 5), [(rows(1), None, 5)], [(rows(), None, 4), (rows(), None, True)]),
        ((rows(), torch.tensor(2.0)), [(rows(2), torch.tensor(3.0))], []),
    ],
)
def test_arguments_are_taken_as_the_example_had_them(
    example: tuple[Any, ...], others: list[Any], refused: list[Any]
) -> None:
    module = Optional().eval()
    fast = explorer.compile(module, example)
    for arguments in (example, *others):
        assert_same(fast, module, *arguments)
    for arguments in refused:
        with pytest.raises(EngineError, match=r"structure|compiled with|inputs were passed"):
            fast(*arguments)
    assert fast.compare(*example).relative_l2 < 1e-5
    assert sum(row.ms for row in fast.profile(*example, repeats=2)) > 0


def test_a_single_number_is_an_input_too() -> None:
    module = Calls(lambda _, x: x * 2)
    assert_same(explorer.compile(module, torch.tensor(1.0)), module, torch.tensor(2.0))


# ---- new weights


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16, "meta"])
def test_new_weights_of_another_type_are_refused_and_the_old_ones_stay(kind: Any) -> None:
    module, x = nn.Sequential(nn.Conv2d(8, 8, 3), nn.PReLU()).eval(), images(1)
    fast = explorer.compile(module, x)
    with pytest.raises(EngineError, match="Pass a copy"):
        fast.update_weights(copy.deepcopy(module).to(kind))
    assert_same(fast, module, x)


def test_tensors_that_are_plain_attributes_are_taken_over_too() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.t = nn.Linear(8, 6), torch.randn(6)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(x) * self.t
            return y.sin() + torch.tensor(2.0)

    fast, other = explorer.compile(Scaled().eval(), rows()), Scaled().eval()
    fast.update_weights(other)
    assert_same(fast, other, rows())
    other.t = torch.randn(5)
    with pytest.raises(EngineError, match=r"t has shape \(5,\)"):
        fast.update_weights(other)


# ---- errors, and several threads


class ShapeDoesNotFit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Any:
        return self.a(x)  # the line of the error


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Any:
        raise ValueError(f"no {x.dim()}")


class LeavesTorch(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return torch.from_numpy(x.numpy() * 2)


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (ShapeDoesNotFit(), "cannot be run on this example input: mat1 and mat2"),
        (Raises(), "cannot be run on this example input: no 2"),
        (LeavesTorch(), "could not capture LeavesTorch"),
    ],
)
def test_an_error_names_the_users_line(module: nn.Module, says: str) -> None:
    with pytest.raises(EngineError) as caught:
        explorer.compile(module, rows())
    line = type(module).forward.__code__.co_firstlineno + 1
    assert says in str(caught.value)
    assert f'File "{__file__}", line {line}, in forward' in str(caught.value)


def test_threads_may_compile_one_module_or_several_at_once() -> None:
    shared = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    own = copy.deepcopy(shared)
    nn.init.ones_(own[0].weight)
    # Asked before: while torch captures a module nobody else can call it.
    with torch.no_grad():
        wanted = {module: module(rows()) for module in (shared, own)}
    wrong: list[BaseException] = []

    def work(module: nn.Module) -> None:
        try:
            fast = explorer.compile(module, rows())
            assert are_close(fast(rows()), wanted[module], 1e-5)
            fast.update_weights(module)
            assert are_close(fast(rows()), wanted[module], 1e-5)
            assert fast.compare(rows()).relative_l2 < 1e-5
        except BaseException as error:  # noqa: BLE001 - shown by the test
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(module,)) for module in (shared, own, shared)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert all(type(p) is nn.Parameter for p in shared.parameters())


class Slow(nn.Module):
    """Lets others go on while it is captured."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.is_captured = nn.Linear(3, 2), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            self.is_captured.set()
            time.sleep(0.3)
        return self.layer(x)


def test_a_module_that_another_thread_captures_can_be_compared_with() -> None:
    module, x = Slow().eval(), torch.randn(1, 3)
    engine = explorer.compile(module, x)
    module.is_captured.clear()
    with ThreadPoolExecutor(1) as pool:
        again = pool.submit(explorer.compile, module, x)
        assert module.is_captured.wait(60)
        assert engine.compare(x).relative_l2 < 1e-5
        assert torch.equal(again.result()(x), engine(x))
