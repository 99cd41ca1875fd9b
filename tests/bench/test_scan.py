"""The benchmark of the scan: both ways of scanning give the same numbers."""

from __future__ import annotations

import argparse
import re

import pytest
import torch
from torch import nn

from explorer.bench import command
from explorer.bench.scan import _Naive, compare_scans
from explorer.sensitivity import measure_loss


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.Flatten(),
        nn.Linear(96, 5),
    ).eval()


def test_both_scans_give_the_same_numbers_for_every_layer_and_level() -> None:
    inputs = torch.randn(40, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    found = compare_scans(network(), inputs, (0.5, 0.9))
    assert (found.n_layers, found.n_levels, found.n_images) == (3, 2, 40)
    assert found.largest_difference < 1e-5
    assert 0 < found.first_picture_s <= found.ours_s
    assert found.naive_s > 0
    assert re.search(r"3 layers, 2 levels, 40 images: naive .* x\)", str(found))


def test_the_comparison_is_not_blind() -> None:
    """What it compares differs from layer to layer and from level to level."""
    inputs = torch.randn(40, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    one = _Naive(network(), inputs)
    naive = {(name, level): one.measure(name, level) for name in ("0", "3", "5") for level in (0.5, 0.9)}
    assert len({round(value, 6) for value in naive.values()}) == 6
    assert min(naive.values()) > 1e-4
    points = measure_loss(network(), (inputs, None), levels=(0.9,), n_images=40, refresh_batchnorm=False)
    ours = {p.layer: p.value for p in points if p.kind == "kl" and p.sparsity == 0.9}
    assert ours["3"] == pytest.approx(naive["3", 0.9], rel=1e-4)
    assert ours["3"] != pytest.approx(naive["5", 0.9], rel=1e-2)


def test_the_command_scans_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    assert command.run(parser.parse_args(["scan", "--images", "32", "--sparsity", "0.9"])) == 0
    out = capsys.readouterr().out
    assert "10 layers, 1 levels, 32 images" in out
    assert float(re.search(r"largest difference (\S+)", out)[1]) < 1e-5
