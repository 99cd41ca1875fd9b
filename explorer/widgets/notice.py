"""One strip that says what is going on, how long it takes, how to stop it, and what went wrong."""

from __future__ import annotations

from typing import Any

from explorer.widgets import assets
from explorer.widgets.base import StateView
from explorer.widgets.texts import phrase

PHASES = {
    "stabilise": phrase("notice.phase.stabilise"),
    "prune": phrase("notice.phase.prune"),
    "fine-tune": phrase("notice.phase.fine_tune"),
}


class Notice(StateView):
    """Status, progress, Stop, and the error region."""

    _esm = assets.module("notice")
    _css = assets.style("notice")
    watches = ("job", "error", "facts", "study", "measured", "run", "distribution", "provenance")
    gestures = {
        "stop": lambda state, _: state.stop(),
        "pause": lambda state, _: state.pause(),
        "resume": lambda state, _: state.resume(),
        "dismiss": lambda state, _: state.dismiss(),
    }

    def make_view(self) -> dict[str, Any]:
        """Return the words and the numbers of the strip."""
        state, job = self.state, self.state.job
        share = job.done / job.total if job.total else None
        return {
            "text": self._text(),
            "busy": job.busy,
            "share": share,
            "left": _left(job.seconds_left) if not job.paused else "",
            "stoppable": job.kind == "measure" or self._training(),
            "stopping": job.stopping,
            "pausable": self._training() and not job.stopping,
            "paused": job.paused,
            "error": state.error,
            "facts": state.facts,
        }

    def _training(self) -> bool:
        """Return whether a run trains: its last job, timing the result, is short and cannot be stopped."""
        return self.state.job.kind == "prune" and self.state.run is not None and self.state.run.active

    def _text(self) -> str:
        state, job = self.state, self.state.job
        if self._training() and state.run is not None:
            if job.stopping:
                return phrase("notice.evaluating", number=state.run.number)
            text = job.text
            if state.run.phase:
                text = phrase("notice.in_phase", job=text, phase=PHASES.get(state.run.phase, state.run.phase))
            return phrase("notice.paused", job=text) if job.paused else text
        if job.busy:
            return job.text
        if state.study is None:
            return phrase("notice.no_model")
        if state.run is not None and state.run.result is not None:
            if state.run.status == "stopped":
                return phrase("notice.run_stopped", number=state.run.number)
            return phrase("notice.run_finished", number=state.run.number)
        if not state.measured:
            return phrase("notice.next.measure")
        if state.provenance:
            return phrase("notice.next.replay")
        return phrase("notice.next.shape")


def _left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    whole = max(0, round(seconds))
    if whole < 60:
        return phrase("notice.seconds_left", seconds=whole)
    return phrase("notice.minutes_left", minutes=f"{whole // 60}:{whole % 60:02d}")
