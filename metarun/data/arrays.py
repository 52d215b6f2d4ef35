"""Arrays in files of numpy, as this machine and torch can use them."""

from typing import Any

import numpy as np


def plain_array(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return an array with numbers of at most 64 bits in this machine's byte order, and with texts in place of bytes.

    Raises:
        ValueError: bytes are not text in UTF-8.
    """
    if array.dtype.kind == "S":
        return np.char.decode(array, "utf-8")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        return array.astype(np.float64)
    return array.astype(array.dtype.newbyteorder("="), copy=False)
