"""Files of statistics, `mu` and `sigma` in an npz as other tools write them, read without torch."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np

STATS_MARK = b"meta.npy"  # by which a file of `Stats.save` is known; no other tool writes that array
UNKNOWN = 0  # samples of statistics that another tool wrote


def read_statistics(file: Path) -> tuple[np.ndarray, np.ndarray, int, dict[str, object]]:
    """Mean (D,), covariance (D, D), both float64, samples, and facts; of another tool's file, which has no `n`, the
    last two are unknown and empty.

    Raises ValueError for a file that is not one, or whose pickled parts would have to be run.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            mean, cov = (np.asarray(arrays[key], dtype=np.float64) for key in ("mu", "sigma"))
            n = int(arrays["n"]) if "n" in arrays else UNKNOWN
            facts = json.loads(str(arrays["meta"])) if "meta" in arrays else {}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{file}: no reference statistics ({error}), expected an npz with arrays `mu` (D,) and `sigma` "
            "(D, D), as `stepdistill eval ref`, pytorch-fid, clean-fid and EDM write them: make it again"
        ) from error
    return mean, cov, n, facts
