"""Platt scaling: a scale and a bias of the logits, so that models are compared by more than how sure they are.

Platt, "Probabilistic Outputs for Support Vector Machines", 1999; Guo et al., "On Calibration of Modern Neural
Networks", ICML 2017.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from torchrec_compress.train.evaluate.metrics import logloss

_FLAT = 1e-9  # of the slope of the mean logloss, where it counts as none


class Calibration(NamedTuple):
    """What logits are multiplied by, and what is added to them then."""

    scale: float
    bias: float

    def __call__(self, logits: NDArray) -> NDArray:
        """Return calibrated logits, (N,) float64."""
        return self.scale * np.asarray(logits, dtype=np.float64) + self.bias


def calibrate(labels: NDArray, logits: NDArray) -> Calibration | None:
    """Return the scale and the bias of least logloss, or None where it has no least: logits that part all clicks.

    Args:
        labels: (N,) 0 or 1, both of them.
        logits: (N,) finite.

    Example:
        >>> logits = np.array([-1.0, -1.0, -1.0, 1.0, 1.0, 1.0])
        >>> found = calibrate(np.array([0, 0, 1, 1, 1, 0]), 10 * logits)
        >>> round(found.scale, 4), abs(round(found.bias, 4))
        (0.0693, 0.0)
    """
    labels, logits = np.asarray(labels, dtype=np.float64), np.asarray(logits, dtype=np.float64)
    clicked, others = logits[labels > 0.5], logits[labels <= 0.5]
    if others.max() < clicked.min() or clicked.max() < others.min():
        return None
    middle, spread = logits.mean(), logits.std() or 1.0
    inputs = np.stack([(logits - middle) / spread, np.ones_like(logits)])

    def value(factors: NDArray) -> float:
        return logloss(labels, factors @ inputs)

    def slope(factors: NDArray) -> NDArray:
        return inputs @ (expit(factors @ inputs) - labels) / len(labels)

    def bend(factors: NDArray) -> NDArray:
        chances = expit(factors @ inputs)
        return (inputs * (chances * (1 - chances))) @ inputs.T / len(labels)

    found = minimize(value, np.array([spread, middle]), method="trust-exact", jac=slope, hess=bend, tol=_FLAT).x
    return Calibration(float(found[0] / spread), float(found[1] - found[0] * middle / spread))
