"""Pickles that hold plain containers and scalars only, as REFER publishes its expressions.

A pickle is a program: it may import anything and call it. Here whatever the pickle machine does not build itself (it
builds lists, dicts, tuples, sets, text, bytes, numbers, booleans, None) ends the reading before it is imported.
"""

import io
import pickle
import struct
from typing import Any, NoReturn

from pixellm.errors import DataError

# What reading a file that is no whole pickle ends in.
_DAMAGE = (
    pickle.UnpicklingError,
    struct.error,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    EOFError,
    AssertionError,
)


def load_plain_pickle(content: bytes, name: str) -> Any:
    """Unpickles plain containers and scalars; Python 2's text (the published files) is read as UTF-8.

    Args:
        content: the whole pickle.
        name: of the file, for messages.

    Raises:
        DataError: it asks for an import, or it is damaged. Nothing of it ran.
    """
    try:
        return _PlainUnpickler(io.BytesIO(content), name).load()
    except DataError:
        raise
    except _DAMAGE as error:
        raise DataError(f"{name} is no pickle of plain values ({error}); download it again") from None
    except (MemoryError, OverflowError, RecursionError):
        raise DataError(f"{name} asks for more memory than any such file needs; download it again") from None


# The one written in Python: the other sets aside as much memory as a damaged or hostile file names. 10,000 entries take
# 0.6 s instead of 0.2.
class _PlainUnpickler(pickle._Unpickler):
    def __init__(self, file: io.BytesIO, name: str) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self._name = name

    def find_class(self, module: str, name: str) -> NoReturn:
        raise DataError(
            f"{self._name} wants to import {module}.{name}, and a data file has no business with code: it was not "
            "read further; download it from its publisher again"
        )

    def persistent_load(self, pid: object) -> NoReturn:
        raise DataError(f"{self._name} refers to something outside itself ({pid!r}); download it again")
