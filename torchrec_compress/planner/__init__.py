"""TorchRec's planner for compressed tables: estimators, a planner, and a report of who holds which bytes."""

from torchrec_compress.planner.advice import Advice, InsufficientStorageError
from torchrec_compress.planner.choosing import PlannedChoice, PlannedTable, Way
from torchrec_compress.planner.constraints import translate_constraints
from torchrec_compress.planner.enumerators import CompressedEnumerator
from torchrec_compress.planner.estimators import CompressedPerfEstimator, CompressedStorageEstimator, estimators
from torchrec_compress.planner.planners import EmbeddingShardingPlanner
from torchrec_compress.planner.proposers import TradeOffProposer
from torchrec_compress.planner.provider import CompressedPlannerProvider
from torchrec_compress.planner.records import PartPlan, RankPlan, TablePlan
from torchrec_compress.planner.report import PlanReport
from torchrec_compress.planner.reservation import DecodeReservation
from torchrec_compress.planner.stats import PlanStats

__all__ = [
    "Advice",
    "CompressedEnumerator",
    "CompressedPerfEstimator",
    "CompressedPlannerProvider",
    "CompressedStorageEstimator",
    "DecodeReservation",
    "EmbeddingShardingPlanner",
    "InsufficientStorageError",
    "PartPlan",
    "PlanReport",
    "PlanStats",
    "PlannedChoice",
    "PlannedTable",
    "RankPlan",
    "TablePlan",
    "TradeOffProposer",
    "Way",
    "estimators",
    "translate_constraints",
]
