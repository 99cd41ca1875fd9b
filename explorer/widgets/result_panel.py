"""What a run has left: figures beside those of the dense network, a file to keep, and the log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import traitlets as t

from explorer.widgets import assets
from explorer.widgets.base import ROOT_LABEL, StateView
from explorer.widgets.metrics import is_noisy
from explorer.widgets.runs import images_of
from explorer.widgets.sharing import MAX_FILE
from explorer.widgets.texts import phrase

if TYPE_CHECKING:
    from explorer.widgets.runs import RunRecord


class ResultPanel(StateView):
    """Before and after, download, log; files to take along and to bring back."""

    _esm = assets.module("result_panel", "files")
    _css = assets.style("result_panel", themed=False)
    watches = ("run", "job", "log", "package", "dense", "study", "curves", "measured")
    gestures = {
        "pack": lambda state, _: state.pack(),
        "save": lambda state, said: state.save(str(said["what"])),
        "load_recipe": lambda state, said: state.load_recipe(str(said["text"])),
        "taken": lambda state, _: state.taken(),
    }

    log = t.List(t.Unicode()).tag(sync=True)
    file = t.Dict().tag(sync=True)
    """`number` and `filename` of the file in `content`."""
    content = t.Bytes().tag(sync=True)
    """A zip file for the page to take; emptied when it has."""

    max_file = t.Int(MAX_FILE).tag(sync=True)
    """Largest recipe in bytes that the page sends."""

    def refresh(self) -> None:
        """Make view, log and file anew from the state."""
        super().refresh()
        self.log = list(self.state.log)
        package = self.state.package
        if package is not None:
            self.file = {"number": package.number, "filename": package.filename}
            self.content = package.content

    def make_view(self) -> dict[str, Any]:
        """Return the table of the latest result."""
        state, run = self.state, self.state.run
        base = {
            "downloadable": False,
            "files": self._files(),
            "packing": state.job.kind == "pack",
            "title": "",
            "columns": [],
            "rows": [],
            "layers": [],
        }
        if run is None or run.result is None:
            return base
        result = run.result
        latency = run.latency
        dense = run.dense
        images = images_of(result.n_evaluated, result.measured_on)
        rows = [
            [
                phrase("result.figure.accuracy"),
                f"{100 * result.dense_accuracy:.2f} %",
                f"{100 * result.accuracy:.2f} %",
                phrase(
                    "result.points",
                    points=f"{100 * (result.accuracy - result.dense_accuracy):+.2f}".replace("-", "−"),
                ),
            ],
            [
                phrase("result.figure.sparsity"),
                "0 %",
                f"{100 * result.sparsity:.2f} %",
                phrase("result.asked", sparsity=f"{100 * run.asked:.2f}"),
            ],
        ]
        if latency is not None and dense is not None:
            value, spread = latency
            rows.append(
                [
                    phrase("result.figure.latency"),
                    f"{dense[1]:.3f} ms",
                    f"{value:.3f} ± {spread:.3f} ms",
                    phrase("result.faster", times=f"{dense[1] / value:.2f}")
                    if value <= dense[1]
                    else phrase("result.slower", times=f"{value / dense[1]:.2f}"),
                ]
            )
        if run.sizes is not None:
            before, after = run.sizes
            rows.append(
                [
                    phrase("result.figure.size"),
                    f"{before / 1e6:.2f} MB",
                    f"{after / 1e6:.2f} MB",
                    phrase("result.smaller", times=f"{before / after:.1f}"),
                ]
            )
        return base | {
            "downloadable": not state.job.busy,
            "note": self._note(run),
            "title": phrase("result.title_stopped", number=run.number, images=images)
            if run.status == "stopped"
            else phrase("result.title", number=run.number, images=images),
            "columns": [
                "",
                phrase("result.column.dense"),
                phrase("result.column.pruned"),
                phrase("result.column.change"),
            ],
            "rows": rows,
            "layers": [
                [
                    name or ROOT_LABEL,
                    f"{100 * run.distribution[name]:.2f} %",
                    f"{100 * zeros / elements:.2f} %",
                    phrase("result.zeros_of", zeros=f"{zeros:,}", total=f"{elements:,}"),
                ]
                for name, (zeros, elements) in result.achieved.items()
            ],
        }

    def _files(self) -> dict[str, str]:
        """Return why a file cannot be saved or loaded now, by what it is; empty where it can."""
        state = self.state
        if state.study is None:
            return dict.fromkeys(("recipe", "measurements", "report", "load"), phrase("files.no_model"))
        going_on = phrase("common.going_on", job=state.job.text) if state.job.busy else ""
        nothing = phrase("files.not_measured") if getattr(state.study, "table", None) is None else ""
        return {
            "recipe": "",
            "measurements": going_on or nothing,
            "report": going_on,
            "load": going_on,
        }

    def _note(self, run: RunRecord) -> str:
        """Say what dense means, and whether the machine was too busy for the times to mean much."""
        parts = []
        if run.dense is not None and run.dense[0]:
            parts.append(phrase("result.note.dense", dense=run.dense[0]))
        if run.latency is not None and is_noisy(*run.latency):
            parts.append(phrase("result.note.noisy"))
        return " ".join(parts)
