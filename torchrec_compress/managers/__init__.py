"""What changes the rows of a table other than by their gradient. Pure tensors: no table, no sharding, no method."""

from torchrec_compress.managers.hot_cold import HotCold, HotColdSizes
from torchrec_compress.managers.manager import Blocks, OwnedTable, RowManager, TableManager, move_rows

__all__ = ["Blocks", "HotCold", "HotColdSizes", "OwnedTable", "RowManager", "TableManager", "move_rows"]
