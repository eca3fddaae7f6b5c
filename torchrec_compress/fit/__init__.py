"""Learning codes: pure tensor maths, no TorchRec.

Rows are float32 [N, D], weights [N] >= 0; every fit is a pure function of its arguments and a seed.
"""

from torchrec_compress.fit.codes import FittedCodes, weighted_error
from torchrec_compress.fit.graph import GraphSketch
from torchrec_compress.fit.kmeans import KMeans, kmeans, nearest
from torchrec_compress.fit.mec import MECFit, fit_mec
from torchrec_compress.fit.minhash import MinHashSketch
from torchrec_compress.fit.popularity import popularity_weights
from torchrec_compress.fit.product import fit_product
from torchrec_compress.fit.quantile import quantile_codes
from torchrec_compress.fit.refit import refit_codebooks
from torchrec_compress.fit.residual import fit_residual

__all__ = [
    "FittedCodes",
    "GraphSketch",
    "KMeans",
    "MECFit",
    "MinHashSketch",
    "fit_mec",
    "fit_product",
    "fit_residual",
    "kmeans",
    "nearest",
    "popularity_weights",
    "quantile_codes",
    "refit_codebooks",
    "weighted_error",
]
