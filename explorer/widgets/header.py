"""The top of the page: what it is about, which of the five steps one is at, and signs of life from the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import traitlets as t

from explorer.widgets import assets
from explorer.widgets.base import StateView


class Header(StateView):
    """Title, steps, model choice and theme; and the distribution in the page's address."""

    _esm = assets.module("header", "lifeline", "address")
    _css = assets.style("header")
    watches = (
        "choice",
        "study",
        "measured",
        "run",
        "job",
        "curves",
        "distribution",
        "target",
        "target_kind",
        "can_undo",
        "can_redo",
        "heard",
    )
    gestures = {
        "load": lambda state, said: state.load(int(said["index"])),
        "restore": lambda state, said: state.restore(str(said["text"])),
        "beat": lambda state, said: state.beat(leaving=bool(said.get("leaving"))),
    }

    address = t.Unicode().tag(sync=True)
    """What the page keeps behind # in its address, see `explorer.widgets.sharing`."""
    heard = t.Unicode().tag(sync=True)
    """The latest such text of the page that was dealt with; until then the page leaves its address alone."""

    def refresh(self) -> None:
        """Make view and address anew from the state."""
        super().refresh()
        self.address = self.state.address()
        self.heard = self.state.heard

    def _on_message(self, widget: object, content: Mapping[str, Any], buffers: object) -> None:
        super()._on_message(widget, content, buffers)
        # The page counts what is not answered. A message and no trait: it is of no use to a page that comes later.
        if content.get("do") == "beat" and not content.get("leaving"):
            self.send({"do": "beat"})

    def make_view(self) -> dict[str, Any]:
        """Return the choices and the state of the five steps."""
        state = self.state
        return {
            "choices": [choice.label for choice in state.choices],
            "choice": state.choice,
            "busy": state.job.busy,
            "steps": self._steps(),
        }

    def _steps(self) -> list[str]:
        state = self.state
        run = state.run
        done = [
            state.study is not None,
            state.measured,
            state.measured and run is not None,
            run is not None and run.result is not None,
            False,
        ]
        now = next(i for i, ready in enumerate(done) if not ready)
        return ["done" if ready else "now" if i == now else "later" for i, ready in enumerate(done)]
