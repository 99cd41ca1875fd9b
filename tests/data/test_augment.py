from __future__ import annotations

import torch

from explorer.data import flip_and_shift


def every_move(image: torch.Tensor) -> list[torch.Tensor]:
    """All flips and shifts by one pixel of one image (C, H, W), by slicing a padded copy."""
    moves = []
    for source in (image, image.flip(2)):
        padded = torch.nn.functional.pad(source[None], (1, 1, 1, 1), mode="replicate")[0]
        moves += [
            padded[:, i : i + image.shape[1], j : j + image.shape[2]] for i in range(3) for j in range(3)
        ]
    return moves


def test_each_image_is_one_of_its_eighteen_moves_and_all_of_them_occur():
    images = torch.randn(400, 2, 5, 6)
    moved = flip_and_shift(images, torch.Generator().manual_seed(0))
    seen = set()
    for before, after in zip(images, moved, strict=True):
        (which,) = [k for k, move in enumerate(every_move(before)) if torch.equal(move, after)]
        seen.add(which)
    assert seen == set(range(18))


def test_a_seed_fixes_the_moves_and_the_global_generator_is_left_alone():
    images = torch.randn(32, 1, 8, 8)
    state = torch.get_rng_state()
    first = flip_and_shift(images, torch.Generator().manual_seed(7))
    second = flip_and_shift(images, torch.Generator().manual_seed(7))
    other = flip_and_shift(images, torch.Generator().manual_seed(8))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_batch_that_was_passed_is_not_changed_and_its_memory_format_is_kept():
    images = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    before = images.clone()
    moved = flip_and_shift(images, torch.Generator().manual_seed(0))
    assert torch.equal(images, before)
    assert moved.is_contiguous(memory_format=torch.channels_last)
