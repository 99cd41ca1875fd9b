"""Ctrl-C waits for what may not be interrupted, and for nothing else."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import explorer
from explorer.inference import native
from explorer.inference.interrupts import uninterrupted
from explorer.inference.kernels.driver import DriverKernel


@pytest.fixture(autouse=True)
def python_handler() -> Iterator[None]:
    """Also where a shell that started the tests in the background has interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def ends_with(error: type[BaseException], *steps: Callable[[], object]) -> list[int]:
    """The steps that an uninterrupted block got through before this error."""
    through: list[int] = []

    def block() -> None:
        with uninterrupted():
            for i, step in enumerate(steps):
                step()
                through.append(i)

    with pytest.raises(error):
        block()
    return through


def test_an_interrupt_waits_for_the_end() -> None:
    assert ends_with(KeyboardInterrupt, press, int) == [0, 1]
    with pytest.raises(KeyboardInterrupt):
        press()


def test_who_presses_twice_does_not_wait() -> None:
    assert ends_with(KeyboardInterrupt, press, press, int) == [0]


def test_one_within_another_waits_for_the_outer_end() -> None:
    def inner() -> None:
        with uninterrupted():
            press()

    assert ends_with(KeyboardInterrupt, inner, int) == [0, 1]


def test_an_error_does_not_hide_an_interrupt() -> None:
    def fail() -> None:
        raise ValueError

    assert ends_with(KeyboardInterrupt, press, fail, int) == [0]
    assert ends_with(ValueError, fail) == []


def test_a_handler_of_the_users_own_is_called_once_and_stays() -> None:
    called: list[int] = []

    def handler(number: int, _frame: object) -> None:
        called.append(number)

    signal.signal(signal.SIGINT, handler)
    with uninterrupted():
        press()
        assert called == []
    assert called == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is handler


def test_where_interrupts_are_ignored_they_stay_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with uninterrupted():
        press()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_other_threads_change_no_handler() -> None:
    def inside() -> Any:
        with uninterrupted():
            assert threading.current_thread() is not threading.main_thread()
            return signal.getsignal(signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(inside).result() is signal.default_int_handler


@pytest.mark.parametrize("patched", [(torch.export, "export"), (native, "_emit")])
def test_neither_torch_nor_llvm_is_interrupted_in_the_middle(
    patched: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, done = getattr(*patched), []

    def pressed(*args: Any, **kwargs: Any) -> Any:
        press()
        result = original(*args, **kwargs)
        done.append("to the end")
        return result

    monkeypatch.setenv("EXPLORER_CACHE", "off")
    monkeypatch.setattr(native, "_loaded", {})
    module, x = nn.Linear(3, 2), torch.randn(4, 3)
    calls: dict[Any, Callable[[], object]] = {
        torch.export: lambda: explorer.compile(module, x),
        native: lambda: native.machine_code(native.host_isa("generic"), DriverKernel("clock")),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*patched, pressed)
        with pytest.raises(KeyboardInterrupt):
            calls[patched[0]]()
    assert done == ["to the end"]
    assert torch.allclose(explorer.compile(module, x)(x), module(x), atol=1e-6)
