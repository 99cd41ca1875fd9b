"""Other weights, as a user brings them: a file is looked into before it is sent, a good one is opened, and the former weights come back."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.widgets.fake_study import FakeStudy


def test_a_file_is_looked_into_before_it_is_sent_and_opened_by_keys(
    page_with_torch: Page, tmp_path: Path
) -> None:
    page = page_with_torch
    tensors = {name: torch.ones(shape) for name, shape in FakeStudy().weight_shapes.items()}
    safetensors.torch.save_file(tensors, tmp_path / "good.safetensors")
    whole = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-5000])
    (tmp_path / "header.safetensors").write_bytes(whole[:40])
    (tmp_path / "text.safetensors").write_text("these are no weights, whatever their name says")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    torch.save(tensors, tmp_path / "old.pth")
    del tensors["fc.weight"]
    tensors["stem.conv.weight"] = torch.ones(3)
    safetensors.torch.save_file({**tensors, "constructor": torch.ones(2)}, tmp_path / "other.safetensors")

    region = page.get_by_role("region", name="Weights", exact=True)
    summary, said = region.locator("summary"), region.get_by_role("status")
    expect(summary).to_have_text("Weights:those that the model came with")
    summary.focus()
    page.keyboard.press("Enter")
    chooser = region.get_by_label("File of weights")
    for name, expected in {
        "cut.safetensors": "cut short: at least 5.0 kB are missing",
        "header.safetensors": "is cut short",
        "text.safetensors": "is no safetensors file",
        "empty.safetensors": "is empty",
        "old.pth": "torch.save, which can hide programs",
        "other.safetensors": "It lacks fc.weight. It holds constructor, which the model does not have. stem.conv.weight is 3 in the file and 48 × 1 × 3 × 3",
    }.items():
        chooser.set_input_files(tmp_path / name)
        expect(said).to_contain_text(expected)
        expect(said).to_have_attribute("data-wrong", "yes")
        expect(region.get_by_role("button", name="Send and open")).to_be_hidden()

    chooser.set_input_files(tmp_path / "good.safetensors")
    expect(said).to_have_text("good.safetensors fits: 10 tensors, 689 k numbers (F32), 2.8 MB.")
    found = Axe().run(page, ".se-weights").response["violations"]
    assert [violation["id"] for violation in found if violation["impact"] in {"serious", "critical"}] == []
    region.get_by_role("button", name="Cancel").click()
    expect(said).to_have_text("")
    chooser.set_input_files(tmp_path / "good.safetensors")
    region.get_by_role("button", name="Send and open").focus()
    page.keyboard.press("Enter")
    expect(summary).to_have_text("Weights:good.safetensors")
    expect(page.locator(".se-facts")).to_contain_text("fashion-resnet · good.safetensors")
    expect(region.get_by_role("progressbar")).to_be_hidden()
    region.get_by_role("button", name="Back to the former weights").click()
    expect(summary).to_have_text("Weights:those that the model came with")
    expect(region.get_by_role("button", name="Back to the former weights")).to_be_hidden()
