"""What leaves: recipes that can be run again, weights, and the figures of a run."""

from __future__ import annotations

from explorer.formats.distribution_file import read_distribution
from explorer.formats.recipe import Recipe
from explorer.formats.report import ReportContent, report_html, write_report
from explorer.formats.result import FinalLatency, result_document, write_result
from explorer.formats.size import dense_bytes, packed_bytes
from explorer.formats.weights import load_weights, read_weights, save_weights, weights_digest

__all__ = [
    "FinalLatency",
    "Recipe",
    "ReportContent",
    "dense_bytes",
    "load_weights",
    "packed_bytes",
    "read_distribution",
    "read_weights",
    "report_html",
    "result_document",
    "save_weights",
    "weights_digest",
    "write_report",
    "write_result",
]
