"""The one judge of "it is already gone".

Every release treats an absent object as success, so this is asked in many places, and a wrong yes would hide a leak.
Hence: an `OSError` is judged by its own number alone; any other wrapper by the cause it was explicitly raised from;
a group only when every one of its errors is absent. An implicit `__context__` proves nothing: it is merely what was
being handled when the real error came.
"""

from __future__ import annotations

import errno
from typing import Final

# EADDRNOTAVAIL answers the removal of an address that is not there, ENODEV and ENXIO that of a device.
ABSENT: Final = frozenset({errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.ENXIO, errno.EADDRNOTAVAIL})
_CAUSES_MAX: Final = 32  # longer chains are a bug of their own and prove nothing


def is_absent(error: BaseException | None) -> bool:
    """True when `error` says only that the object to be released does not exist."""
    for _ in range(_CAUSES_MAX):
        if isinstance(error, OSError):
            return error.errno in ABSENT
        if isinstance(error, BaseExceptionGroup):
            return all(is_absent(each) for each in error.exceptions)
        if error is None:
            return False
        error = error.__cause__
    return False
