"""How much each layer minds being pruned: in loss, and in time.

Measuring yields points (`measure_loss`, `measure_latency`); a `SensitivityTable` holds them. Nothing here knows the model that is
measured but by its layers' names, and nothing here changes it.
"""

from __future__ import annotations

from explorer.sensitivity.cluster import RayExecutor
from explorer.sensitivity.exchange import from_csv, from_frame, from_parquet
from explorer.sensitivity.joint import JointLoss, JointScan, measure_joint
from explorer.sensitivity.latency import LATENCY_PASSES, measure_latency
from explorer.sensitivity.loss import measure_loss
from explorer.sensitivity.points import DEFAULT_LEVELS, KINDS, WHOLE_NETWORK, CellCounter, SensitivityPoint
from explorer.sensitivity.published import PUBLISHED, published
from explorer.sensitivity.ranking import RankedLayer, Stability, ranking, stability
from explorer.sensitivity.refine import refinement
from explorer.sensitivity.summary import LayerSummary, Summary, summary
from explorer.sensitivity.table import SensitivityTable
from explorer.sensitivity.tasks import worker_pool

__all__ = [
    "DEFAULT_LEVELS",
    "KINDS",
    "LATENCY_PASSES",
    "PUBLISHED",
    "WHOLE_NETWORK",
    "CellCounter",
    "JointLoss",
    "JointScan",
    "LayerSummary",
    "RankedLayer",
    "RayExecutor",
    "SensitivityPoint",
    "SensitivityTable",
    "Stability",
    "Summary",
    "from_csv",
    "from_frame",
    "from_parquet",
    "measure_joint",
    "measure_latency",
    "measure_loss",
    "published",
    "ranking",
    "refinement",
    "stability",
    "summary",
    "worker_pool",
]
