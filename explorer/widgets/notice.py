"""One strip that says what is going on, how long it takes, how to stop it, and what went wrong."""

from __future__ import annotations

from typing import Any

from explorer.widgets import assets
from explorer.widgets.base import StateView

PHASES = {
    "stabilise": "training before the first weight goes",
    "prune": "removing weights",
    "fine-tune": "fine-tuning",
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
                return f"Run {state.run.number} trains no more; what it has reached is being evaluated."
            phase = f": {PHASES.get(state.run.phase, state.run.phase)}" if state.run.phase else ""
            return f"{job.text}{phase}{', paused' if job.paused else ''}"
        if job.busy:
            return job.text
        if state.study is None:
            return "No model on the page."
        if state.run is not None and state.run.result is not None:
            how = "stopped early" if state.run.status == "stopped" else "finished"
            return (
                f"Run {state.run.number} {how}. Download the result, or shape the bars and start another run."
            )
        if not state.measured:
            return "Next: measure how each layer reacts to pruning."
        if state.provenance:
            return "Next: drag the bars or solve for a speed-up. What others measured of this network can be explored, but not trained."
        return "Next: drag the bars or solve for a speed-up, then start pruning."


def _left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    whole = max(0, round(seconds))
    return f"{whole} s left" if whole < 60 else f"{whole // 60}:{whole % 60:02d} min left"
