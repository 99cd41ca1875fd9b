"""What can be taken along from a page and brought back: the distribution as a few characters in the address, and as a file.

The address holds what a reload or a colleague needs: which model, the target, and a sparsity, a lock and a group for each layer. It is text
from anywhere, so it is checked in every part; what does not belong to the model on the page is refused with a sentence, never bent to fit.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from explorer.errors import DistributionError, FormatError
from explorer.widgets.targets import KINDS
from explorer.widgets.texts import phrase

if TYPE_CHECKING:
    from explorer.distribution import SparsityDistribution
    from explorer.formats import Recipe

PREFIX = "distribution="
"""What the part of the address behind # begins with."""

MAX_FILE = 2**20
"""Largest recipe in bytes that the page sends; one of a thousand layers has a tenth of that."""

MAX_ADDRESS = 16_000
"""Most characters of an address: thousands of layers, and less than any browser takes."""

_VERSION = 1
# Version, model, layers, kind of target, target, number of layers, whether groups follow.
_HEAD = struct.Struct(">BIIBfHB")
_STEPS = 1000  # a sparsity is told in tenths of a per cent
_LOCKED = 0x8000


@dataclass(frozen=True, slots=True)
class Shared:
    """A distribution as an address holds it.

    Parameters
    ----------
    model : int
        Checksum of what the page loaded, see `model_key`; 0 for a study that was handed over.
    layers : int
        Checksum of the layers' names, see `layers_key`.
    target_kind : str
        A name of `KINDS`.
    target : float
        In the unit of the page.
    sparsities : tuple of float
        By layer, fractions in [0, 1), to a tenth of a per cent.
    locked : tuple of bool
    groups : tuple of int
        Number of the group that a layer moves with, 0 for none; empty when there are no groups.
    """

    model: int
    layers: int
    target_kind: str
    target: float
    sparsities: tuple[float, ...]
    locked: tuple[bool, ...]
    groups: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, model: int, names: Sequence[str], target_kind: str, target: float, distribution: Any
    ) -> Shared:
        """Return what an address is to hold of `distribution`, whose layers are `names`."""
        number = {name: i for i, group in enumerate(distribution.groups, 1) for name in group}
        return cls(
            model,
            layers_key(names),
            target_kind,
            struct.unpack(">f", struct.pack(">f", target))[0],
            tuple(min(_STEPS - 1, round(_STEPS * distribution[name])) / _STEPS for name in names),
            tuple(name in distribution.locked for name in names),
            tuple(number.get(name, 0) for name in names) if number else (),
        )

    def to_text(self) -> str:
        """Return the part of an address behind #."""
        head = _HEAD.pack(
            _VERSION,
            self.model,
            self.layers,
            list(KINDS).index(self.target_kind),
            self.target,
            len(self.sparsities),
            bool(self.groups),
        )
        cells = [
            round(_STEPS * sparsity) | (_LOCKED if locked else 0)
            for sparsity, locked in zip(self.sparsities, self.locked, strict=True)
        ]
        content = head + struct.pack(f">{len(cells)}H", *cells)
        if self.groups:
            content += struct.pack(f">{len(self.groups)}H", *self.groups)
        content += struct.pack(">H", zlib.crc32(content) & 0xFFFF)
        return PREFIX + base64.urlsafe_b64encode(content).decode().rstrip("=")

    @classmethod
    def from_text(cls, text: str) -> Shared:
        """Read what `to_text` gave.

        Raises
        ------
        FormatError
            If the text is anything else, is cut short or damaged, or of a later version.
        """
        if not text.startswith(PREFIX):
            raise FormatError(phrase("refusal.address.foreign", text=text[:40]))
        damaged = FormatError(phrase("refusal.address.damaged"))
        body = text.removeprefix(PREFIX)
        if len(text) > MAX_ADDRESS:
            raise damaged
        try:
            content = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raise damaged from None
        if content and content[0] != _VERSION:
            raise FormatError(phrase("refusal.address.version", version=content[0], ours=_VERSION))
        if len(content) < _HEAD.size + 2:
            raise damaged
        _, model, layers, kind, target, count, has_groups = _HEAD.unpack_from(content)
        lists = 2 if has_groups else 1
        if (
            len(content) != _HEAD.size + 2 * count * lists + 2
            or kind >= len(KINDS)
            or not math.isfinite(target)
        ):
            raise damaged
        (checksum,) = struct.unpack(">H", content[-2:])
        if checksum != zlib.crc32(content[:-2]) & 0xFFFF:
            raise damaged
        cells = struct.unpack_from(f">{count}H", content, _HEAD.size)
        groups = struct.unpack_from(f">{count}H", content, _HEAD.size + 2 * count) if has_groups else ()
        steps = [cell & ~_LOCKED for cell in cells]
        if any(step >= _STEPS for step in steps):
            raise damaged
        return cls(
            model,
            layers,
            list(KINDS)[kind],
            target,
            tuple(step / _STEPS for step in steps),
            tuple(bool(cell & _LOCKED) for cell in cells),
            groups,
        )

    def distribution(self, names: Sequence[str]) -> SparsityDistribution:
        """Return the distribution for a model with these layers.

        Raises
        ------
        DistributionError
            If the model has other layers.
        """
        from explorer.distribution import SparsityDistribution

        if len(names) != len(self.sparsities) or layers_key(names) != self.layers:
            raise DistributionError(
                phrase("refusal.address.other_layers", count=len(self.sparsities), here=len(names))
            )
        groups = [
            [name for name, number in zip(names, self.groups, strict=True) if number == wanted]
            for wanted in sorted({*self.groups} - {0})
        ]
        locked = [name for name, is_locked in zip(names, self.locked, strict=True) if is_locked]
        return SparsityDistribution(dict(zip(names, self.sparsities, strict=True)), locked, groups)


def model_key(model: str, data: str) -> int:
    """Return the checksum of what a page loads, never 0, which stands for a study that was handed over."""
    return zlib.crc32(f"{model}\n{data}".encode()) or 1


def layers_key(names: Sequence[str]) -> int:
    """Return the checksum of the layers' names in their order."""
    return zlib.crc32("\n".join(names).encode())


def read_recipe(
    text: str, names: Sequence[str], highest: float, model: str
) -> tuple[SparsityDistribution, Recipe | None]:
    """Read a recipe or a distribution for a model with these layers.

    Parameters
    ----------
    text : str
        YAML or JSON.
    names : sequence of str
        The layers, in their order.
    highest : float
        Most sparsity that the page lets a layer have.
    model : str
        What the model on the page is called, for the message.

    Raises
    ------
    FormatError, DistributionError
        If the text is neither, or is for other layers; the message names the line, the layer or the layers, and says what to do.
    """
    from explorer.distribution import SparsityDistribution
    from explorer.formats import read_distribution

    if len(text) > MAX_FILE:
        raise FormatError(phrase("refusal.file.too_long", millions=f"{len(text) / 1000000.0:.1f}"))
    found, recipe = read_distribution(text)
    file = (
        phrase("refusal.file.for_model", model=repr(recipe.model))
        if recipe is not None and recipe.model != model
        else phrase("refusal.file.plain")
    )
    unknown = [name for name in found if name not in set(names)]
    missing = [name for name in names if name not in found]
    if unknown:
        raise DistributionError(
            phrase("refusal.file.no_fit", file=file, model=repr(model), layers=_listed(unknown))
        )
    if missing:
        raise DistributionError(phrase("refusal.file.lacks", file=file, layers=_listed(missing)))
    for name in names:
        if found[name] > highest + 1e-9:
            raise DistributionError(
                phrase(
                    "refusal.file.too_sparse",
                    layer=repr(name),
                    sparsity=f"{found[name]:g}",
                    highest=f"{highest:g}",
                )
            )
    ordered: Mapping[str, float] = {name: found[name] for name in names}
    return SparsityDistribution(ordered, found.locked, found.groups), recipe


def _listed(names: Sequence[str]) -> str:
    """Return a few names, and how many more there are."""
    shown = ", ".join(repr(name[:60]) for name in names[:4])
    return phrase("refusal.file.and_more", names=shown, count=len(names) - 4) if len(names) > 4 else shown
