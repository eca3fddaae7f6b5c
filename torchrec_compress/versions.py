"""Check that torch, torchrec and fbgemm come from one release train before anything of theirs is imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

# fbgemm 1.X is built against torch 2.(X + 5) and loads with no other; torchrec 1.X is released with it.
_TORCH_MINOR_AHEAD = 5
_OLDEST_MINOR = 6


def installed_versions() -> dict[str, str]:
    """Return the installed versions of torch, torchrec and fbgemm; "" where one is missing.

    Example:
        >>> sorted(installed_versions())
        ['fbgemm', 'torch', 'torchrec']
    """
    return {
        "torch": _version("torch"),
        "torchrec": _version("torchrec"),
        "fbgemm": _version("fbgemm-gpu") or _version("fbgemm-gpu-cpu"),
    }


def check_versions(found: dict[str, str] | None = None) -> None:
    """Raise ImportError that names the matching triplet when torch, torchrec and fbgemm do not fit together.

    Args:
        found: versions by package, default `installed_versions()`.

    Raises:
        ImportError: a package is missing, older than supported, or from another release train than torch.

    Example:
        >>> check_versions({"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm": "1.8.0"})
    """
    found = installed_versions() if found is None else found
    torch_minor = _minor(found["torch"])
    if torch_minor is None:
        raise ImportError(_message(found, "torch is not installed"))
    wanted = torch_minor - _TORCH_MINOR_AHEAD
    if wanted < _OLDEST_MINOR:
        raise ImportError(_message(found, f"torch must be at least 2.{_OLDEST_MINOR + _TORCH_MINOR_AHEAD}"))
    if _minor(found["fbgemm"]) != wanted:
        raise ImportError(_message(found, f"torch 2.{torch_minor} needs fbgemm 1.{wanted}", wanted))
    torchrec_minor = _minor(found["torchrec"])
    if torchrec_minor is None or torchrec_minor < _OLDEST_MINOR:
        raise ImportError(_message(found, f"torchrec must be at least 1.{_OLDEST_MINOR}", wanted))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _minor(text: str) -> int | None:
    parts = text.split(".")
    return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else None


def _message(found: dict[str, str], problem: str, fbgemm_minor: int = 8) -> str:
    have = ", ".join(f"{name} {number or 'missing'}" for name, number in found.items())
    train = f"torch 2.{fbgemm_minor + _TORCH_MINOR_AHEAD}, torchrec 1.{fbgemm_minor} and fbgemm-gpu 1.{fbgemm_minor}"
    return (
        f"torchrec_compress: torch, torchrec and fbgemm must fit together: {problem}; got {have}; "
        f"install {train} (fbgemm-gpu-cpu on a machine without a GPU; torchrec with --no-deps there)"
    )
