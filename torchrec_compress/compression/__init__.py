"""Which method each table gets: as the user says, by a byte budget, or the next smaller one."""

from torchrec_compress.compression.budget import for_budget, measure_frontier
from torchrec_compress.compression.frontier import Choice, Frontier
from torchrec_compress.compression.parse import parse
from torchrec_compress.compression.resolve import Compression, resolve
from torchrec_compress.compression.sizing import sized

__all__ = ["Choice", "Compression", "Frontier", "for_budget", "measure_frontier", "parse", "resolve", "sized"]
