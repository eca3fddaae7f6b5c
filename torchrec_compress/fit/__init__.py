"""Learning codes: pure tensor maths, no TorchRec. Rows are float32 [N, D], weights float32 [N], every fit takes a seed."""

from torchrec_compress.fit.codes import FittedCodes, refit_codebooks, weighted_error
from torchrec_compress.fit.kmeans import KMeans, kmeans, nearest
from torchrec_compress.fit.popularity import popularity_weights
from torchrec_compress.fit.product import fit_product
from torchrec_compress.fit.residual import fit_residual

__all__ = [
    "FittedCodes",
    "KMeans",
    "fit_product",
    "fit_residual",
    "kmeans",
    "nearest",
    "popularity_weights",
    "refit_codebooks",
    "weighted_error",
]
