"""Brings weights to the page: which ones are shown, a file to send, files of the server to pick from."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import traitlets as t

from explorer.widgets import assets
from explorer.widgets.base import StateView
from explorer.widgets.texts import phrase
from explorer.widgets.weights_desk import MOST_BYTES

if TYPE_CHECKING:
    from explorer.widgets.state import ExplorerState

_DESK = ("current", "name", "received", "size", "is_waiting", "former", "files")


class OpenWeights(StateView):
    """Weights of the architecture on the page. The page looks into a file and says whether it fits before anything is sent."""

    _esm = assets.module("open_weights", "safetensors")
    _css = assets.style("open_weights", themed=False)
    watches = ("study", "job", "runs", "measured")
    gestures = {
        "cancel": lambda state, _: state.weights.cancel(),
        "open": lambda state, _: state.weights.open(),
        "list": lambda state, _: state.weights.list_files(),
        "pick": lambda state, said: state.weights.pick(str(said["name"])),
        "back": lambda state, _: state.weights.back(),
    }

    expected = t.Dict().tag(sync=True)
    """Shape of each tensor that a file must hold, by name."""
    most_bytes = t.Int(MOST_BYTES).tag(sync=True)
    """Largest file that is sent."""

    def __init__(self, state: ExplorerState) -> None:
        super().__init__(state)
        state.weights.observe(self._on_change, names=list(_DESK))

    def close(self) -> None:
        """Close the widget and stop watching."""
        if self._watching:
            self.state.weights.unobserve(self._on_change, names=list(_DESK))
        super().close()

    def refresh(self) -> None:
        """Make view and expected tensors anew from the state."""
        study = self.state.study
        shapes = {} if study is None or study.provenance else study.weight_shapes
        expected = {name: list(shape) for name, shape in shapes.items()}
        # The page compares what it has: a long list travels only when it is another one.
        if expected != self.expected:
            self.expected = expected
        super().refresh()

    def make_view(self) -> dict[str, Any]:
        """Return what is shown, what is on its way, and what the server has."""
        state, desk = self.state, self.state.weights
        return {
            "current": desk.current,
            "name": desk.name,
            "received": desk.received,
            "size": desk.size,
            "waiting": desk.is_waiting,
            "can_return": desk.can_return,
            "files": [
                [file.name, file.size, time.strftime("%Y-%m-%d %H:%M", time.localtime(file.modified))]
                for file in desk.files
            ],
            "has_folder": desk.folder is not None,
            "used": state.measured or bool(state.runs),
            "why_not": self._why_not(),
        }

    def _why_not(self) -> str:
        state = self.state
        if state.study is None:
            return phrase("weights.no_model")
        if state.study.provenance:
            return phrase("weights.published")
        return phrase("weights.busy") if state.job.busy else ""

    def _on_message(self, widget: object, content: Mapping[str, Any], buffers: Any) -> None:
        # Pieces are answered one by one, so that no more than one is on its way, and the page knows of what was refused.
        what = content.get("do")
        if what not in ("begin", "piece"):
            super()._on_message(widget, content, buffers)
            return
        try:
            received = self._take(content, buffers)
        except Exception as error:  # noqa: BLE001 - a message of a page is input like any other
            self.state.report(error)
            self.send({"do": "refused"})
            return
        self.send({"do": "received", "bytes": received})

    def _take(self, content: Mapping[str, Any], buffers: Sequence[Any]) -> int:
        desk = self.state.weights
        if content["do"] == "begin":
            desk.begin(str(content["name"]), int(content["size"]))
            return 0
        return desk.add(int(content["offset"]), bytes(buffers[0]))
