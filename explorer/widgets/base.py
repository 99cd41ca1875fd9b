"""What all widgets of the page have in common: they show the state, and turn gestures into calls on it.

Data flow in one direction: the state changes, the widget makes a plain `view` of it, the page draws the view. A gesture comes back as
a message that names a method. Everything that a late page must show is a trait and never a message, because Voila builds the page
from traits after the notebook has run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import anywidget
import traitlets as t

from explorer.widgets.texts import phrase

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from explorer.widgets.state import ExplorerState


ROOT_LABEL = phrase("common.whole_model")
"""What the page calls a layer that is the whole model, whose name is empty."""


class StateView(anywidget.AnyWidget):
    """A widget that shows an `ExplorerState`.

    Parameters
    ----------
    state : ExplorerState

    Notes
    -----
    A subclass names the traits it `watches`, makes its `view` of them, and lists its `gestures`.
    """

    view = t.Dict().tag(sync=True)
    """Plain values that the page draws."""

    page = t.Unicode().tag(sync=True)
    """The same for all widgets of one state, by which they find each other in a document, see static/link.js."""

    watches: ClassVar[tuple[str, ...]] = ()
    gestures: ClassVar[Mapping[str, Callable[[ExplorerState, Mapping[str, Any]], None]]] = {}

    _watching = False

    def __init__(self, state: ExplorerState) -> None:
        super().__init__(page=state.page)
        self.state = state
        self.refresh()
        state.observe(self._on_change, names=list(self.watches))
        self._watching = True
        self.on_msg(self._on_message)

    def refresh(self) -> None:
        """Make the view anew from the state."""
        self.view = self.make_view()

    def make_view(self) -> dict[str, Any]:
        """Return what the page draws, as plain values."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the widget and stop watching the state; a widget may be closed again when it is collected."""
        if self._watching:
            self._watching = False
            self.state.unobserve(self._on_change, names=list(self.watches))
        super().close()

    def _on_change(self, _change: object) -> None:
        self.refresh()

    def _handle_msg(self, msg: Mapping[str, Any]) -> None:
        """Take what the page sends, traits and gestures alike, in the thread that may write the state."""
        take = super()._handle_msg
        self.state.home.bring(lambda: take(msg))

    def _on_message(self, _widget: object, content: Mapping[str, Any], _buffers: object) -> None:
        gesture = self.gestures.get(content.get("do", ""))
        if gesture is None:
            return
        try:
            gesture(self.state, content)
        except Exception as error:  # noqa: BLE001 - a message of a page is input like any other
            self.state.report(error)
