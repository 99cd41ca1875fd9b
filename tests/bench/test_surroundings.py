"""The machine is described as the system describes it, and a probe that changes is noticed."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest
import torch

import explorer
from explorer.bench.surroundings import Probe, machine, probe_ms, summary, version


def test_a_probe_knows_its_slowest_and_its_fastest_turn() -> None:
    probe = Probe((2.0, 1.5), (3.0, 2.5))
    assert (probe.fastest_ms, probe.slowest_ms) == (1.5, 3.0)
    ten = Probe((1.0,) * 5, (1.0,) * 4 + (2.0,))
    assert ten.slowest_ms == 2.0
    disturbed_once, often = (
        Probe((1.0,) * 50, (1.0,) * 49 + (2.0,)),
        Probe((1.0,) * 50, (1.0,) * 39 + (2.0,) * 11),
    )
    assert (disturbed_once.slowest_ms, often.slowest_ms) == (1.0, 2.0)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_probe_gives_turns_and_leaves_torch_s_threads_alone(threads: int) -> None:
    before = torch.get_num_threads()
    turns = probe_ms(threads)
    assert len(turns) > 2
    assert all(0.0 < turn < 1000.0 for turn in turns)
    assert torch.get_num_threads() == before


@pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64",
    reason="reads /proc/cpuinfo of x86-64 Linux",
)
def test_the_instruction_sets_are_those_that_the_kernel_lists() -> None:
    flags = set(re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    known_as = {"avx512vnni": "avx512_vnni", "avx512bf16": "avx512_bf16", "avx512fp16": "avx512_fp16"}
    found = machine()["instruction_sets"]
    assert {"avx512bf16", "avx512fp16", "amx-bf16"} <= found.keys()
    for name, there in found.items():
        if not name.endswith("amx-fp16"):  # which older kernels do not list
            assert there is (known_as.get(name, name.replace("-", "_")) in flags), name


def test_the_machine_has_a_name_and_the_versions_are_those_installed() -> None:
    assert machine()["cpu"]
    assert torch.__version__ in summary()
    assert version("torch") == torch.__version__
    assert version("sparsity-explorer").startswith(explorer.__version__)


def test_the_machine_says_how_idle_threads_of_torch_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert machine()["omp_wait_policy"] == "PASSIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert machine()["omp_wait_policy"] == "not set"
