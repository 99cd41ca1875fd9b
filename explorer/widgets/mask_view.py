"""Which weights of a layer are alive: in a run over time, and before one as magnitude pruning at the bar's sparsity would leave them.

The picture of a moment is sent when it is asked for, one at a time: all moments of a run would be more than all the rest of the page.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import traitlets as t

from explorer.widgets import assets
from explorer.widgets.base import ROOT_LABEL, StateView
from explorer.widgets.mask_picture import MaskPicture, picture_of
from explorer.widgets.texts import phrase

if TYPE_CHECKING:
    import threading

    from explorer.widgets.runs import MaskMoment, RunRecord
    from explorer.widgets.state import ExplorerState

LATEST = -1


class MaskView(StateView):
    """The mask of the selected layer as a picture, with a slider over the moments of the latest run."""

    _esm = assets.module("mask_view")
    _css = assets.style("mask_view", themed=False)
    watches = ("study", "provenance", "layers", "selected", "distribution", "run")
    gestures = {"select": lambda state, said: state.select(str(said["layer"]))}

    picture = t.Bytes().tag(sync=True)
    """What `MaskPicture.packed` returns; empty when there is nothing to see."""

    source = t.Enum(("bars", "run"), default_value="bars").tag(sync=True)
    """What is shown: what the bars ask for, or the latest run. A run that begins is shown."""

    moment = t.Int(LATEST).tag(sync=True)
    """Steps of the run after which to look, or -1 for the latest masks, whichever they are; the nearest moment that was kept is shown."""

    def __init__(self, state: ExplorerState) -> None:
        self._is_closed = False
        self._shown_run = 0
        self._preview: tuple[Any, MaskPicture] | None = None
        self._previewing: Any = None
        self._failure = ""
        self._runner = state.quick_runner(f"mask of {id(self)}")
        super().__init__(state)
        self.observe(lambda _change: self.refresh(), names=["source", "moment"])

    def close(self) -> None:
        """Close the widget; a picture that is still being worked out comes to nothing."""
        self._is_closed = True
        super().close()

    def refresh(self) -> None:
        """Make view and picture anew from the state."""
        if self._is_closed:
            return
        run = self.state.run
        number = run.number if run is not None else 0
        if number != self._shown_run:
            self._shown_run = number
            with self.hold_trait_notifications():
                self.source, self.moment = ("run" if number else "bars"), LATEST
        self._preview_bars()
        with self.hold_sync():
            super().refresh()
            found = self._picture()
            self.picture = found.packed() if found is not None else b""

    def make_view(self) -> dict[str, Any]:
        """Return everything but the cells."""
        state = self.state
        run, moments = state.run, self._moments()
        found = self._picture()
        names = [layer.name for layer in state.layers]
        at = self._at(moments)
        return {
            "layers": names,
            "labels": [name or ROOT_LABEL for name in names],
            "selected": state.selected,
            "source": self.source,
            "run": run.number if run is not None else None,
            "times": [_epochs(run, moment) for moment in moments] if run is not None else [],
            "steps": [moment.step for moment in moments],
            "at": at,
            "text": self._text(found),
            "caption": self._caption(run, moments, at),
            "cell": _cell(found) if found is not None else None,
        }

    def _moments(self) -> tuple[MaskMoment, ...]:
        return self.state.run.moments if self.state.run is not None else ()

    def _at(self, moments: tuple[MaskMoment, ...]) -> int:
        """Return the index of the moment on show. By step, because moments are thinned while the run goes on."""
        if self.moment < 0:
            return len(moments) - 1
        return min(range(len(moments)), key=lambda i: abs(moments[i].step - self.moment), default=-1)

    def _picture(self) -> MaskPicture | None:
        if self.source == "run":
            moments = self._moments()
            return moments[self._at(moments)].pictures.get(self.state.selected) if moments else None
        if self._preview is None or self._preview[0][0] is not self.state.study or self.state.provenance:
            return None
        return self._preview[1]

    def _text(self, found: MaskPicture | None) -> str:
        state = self.state
        if state.study is None:
            return phrase("mask.no_model")
        if state.provenance:
            return phrase("mask.replay")
        name = state.selected or ROOT_LABEL
        if self.source == "bars":
            if self._failure:
                return phrase("mask.failed", layer=name, why=self._failure)
            if self._preview is None or found is None:
                return phrase("mask.working", layer=name)
            # A picture that is a moment late names its own layer.
            return found.describe(self._preview[0][1] or ROOT_LABEL)
        if not self._moments():
            return phrase("mask.not_yet")
        return found.describe(name) if found is not None else phrase("mask.not_pruned", layer=name)

    def _caption(self, run: RunRecord | None, moments: tuple[MaskMoment, ...], at: int) -> str:
        state = self.state
        if self.source == "bars" and state.provenance:
            return ""
        if self.source == "bars":
            share = state.distribution.get(state.selected, 0.0) if state.distribution else 0.0
            return phrase("mask.bars_caption", sparsity=f"{100 * share:.1f}")
        if run is None or not moments:
            return ""
        return phrase(
            "mask.run_caption",
            number=run.number,
            epoch=f"{_epochs(run, moments[at]):g}",
            epochs=f"{run.epochs:g}",
        )

    # The mask that the bars ask for is worked out beside whatever goes on; the latest wish wins.

    def _wanted(self) -> tuple[Any, str, float] | None:
        state = self.state
        # A network of which only measurements are here has weights, but they are not the ones that were measured.
        known = state.study is not None and not state.provenance and state.distribution is not None
        if not known or state.selected not in state.distribution:
            return None
        return state.study, state.selected, state.distribution[state.selected]

    def _preview_bars(self) -> None:
        wanted = self._wanted()
        if self.source != "bars" or wanted is None or self._runner.running or wanted == self._previewing:
            return
        self._previewing = wanted
        self._runner.start(
            functools.partial(_preview, *wanted),
            functools.partial(self._previewed, wanted),
            functools.partial(self._failed, wanted),
        )

    def _previewed(self, wanted: Any, found: MaskPicture) -> None:
        self._failure = ""
        if wanted[0] is self.state.study:
            self._preview = (wanted, found)
        self.refresh()

    def _failed(self, wanted: Any, error: BaseException) -> None:
        if wanted[0] is self.state.study:
            self._failure, self._preview = str(error), None
        self.refresh()


def _preview(study: Any, name: str, sparsity: float, _stop: threading.Event) -> MaskPicture:
    return picture_of(study.alive(name, sparsity), groups=study.n_groups(name))


def _epochs(run: RunRecord, moment: MaskMoment) -> float:
    return round(run.epochs * moment.step / max(1, run.total_steps), 2)


def _cell(picture: MaskPicture) -> dict[str, Any]:
    """Return what a cell stands for, so that the page can name the one that is pointed at."""
    return {
        "rows": picture.row_span,
        "columns": picture.column_span,
        "kernel": picture.kernel,
        "outputs": picture.n_outputs,
        "weights": picture.n_weights // picture.n_outputs,
        "grouped": picture.grouped,
    }
