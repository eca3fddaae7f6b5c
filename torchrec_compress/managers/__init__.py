"""What changes rows or codes other than by their gradient. Pure tensors: no table, no sharding, no method."""

from torchrec_compress.managers.clustering import Clustering, drawn_codes, sum_of_halves
from torchrec_compress.managers.codes import CodeManager, OwnedCodes
from torchrec_compress.managers.hot_cold import HotCold, HotColdSizes
from torchrec_compress.managers.manager import Blocks, OwnedTable, RowManager, TableManager, move_rows

__all__ = [
    "Blocks",
    "Clustering",
    "CodeManager",
    "HotCold",
    "HotColdSizes",
    "OwnedCodes",
    "OwnedTable",
    "RowManager",
    "TableManager",
    "drawn_codes",
    "move_rows",
    "sum_of_halves",
]
