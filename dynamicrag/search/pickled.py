"""Published Contriever shards: pickles of (list of ids, float16 array), read by an unpickler that accepts nothing else."""

from __future__ import annotations

import pickle
import struct
import tokenize
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dynamicrag.stage import UserError

if TYPE_CHECKING:
    import numpy as np
NUMPY_TYPES = {"f2": "<f2", "f4": "<f4"}
# Exceptions of numpy for a file that is not .npy, contains objects, or is shorter than its header says.
NPY_ERRORS = (OSError, ValueError, TypeError, OverflowError, EOFError, MemoryError, RecursionError, SyntaxError, tokenize.TokenError)


class _Type:
    """Replaces numpy.dtype during unpickling: stores the type code and accepts only float16 and float32."""

    def __init__(self, code: str, *_: object):
        if code not in NUMPY_TYPES:
            raise pickle.UnpicklingError(f"an array of type {code!r}")
        self.code = NUMPY_TYPES[code]

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", "|", "="):
            raise pickle.UnpicklingError("a big-endian array")


class _Array:
    """Replaces numpy.ndarray during unpickling: stores shape and bytes."""

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.type, self.fortran, self.raw = state

    def array(self) -> np.ndarray:
        import numpy as np

        if not isinstance(self.raw, bytes) or not isinstance(self.type, _Type):
            raise pickle.UnpicklingError("an array without plain bytes")
        return np.frombuffer(self.raw, dtype=self.type.code).reshape(self.shape, order="F" if self.fortran else "C")


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _frombuffer(raw: object, of_type: object, shape: object, order: object, *axes: object) -> _Array:
    """Replaces the function by which pickle protocol 5 restores a contiguous array.

    `axes` is None or absent unless permuted.
    """
    if order not in ("C", "F") or any(axis is not None for axis in axes):
        raise pickle.UnpicklingError(f"an array in order {order!r}")
    array = _Array()
    array.__setstate__((1, shape, of_type, order == "F", raw))
    return array


def _latin1(text: str, encoding: str) -> bytes:
    """Replaces the function by which pickle protocols 0 to 2 restore bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text encoded as {encoding!r}")
    return text.encode("latin1")


ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _latin1,
}


class _ShardUnpickler(pickle._Unpickler):
    """Accepts strings, numbers, lists, tuples and float arrays. No name in the file is ever imported.

    It is written in Python (one second per million ids), because the C version allocates whatever size the file claims.
    """

    # Protocol 5 writes mutable data as a bytearray. It is read like bytes, which allocates only what the file contains.
    dispatch: ClassVar = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: vars(pickle._Unpickler)["load_binbytes8"]}

    def find_class(self, module: str, name: str) -> object:
        try:
            return ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"a reference to {module}.{name}") from None


def read_pickled(path: Path) -> tuple[list[str], np.ndarray]:
    """Return ids and vectors of a published shard.

    Raises UserError for any other file, without executing anything in it.
    """
    try:
        with path.open("rb") as file:
            ids, vectors = _ShardUnpickler(file).load()
        if not isinstance(ids, list) or not all(isinstance(passage_id, str | int) for passage_id in ids):
            raise pickle.UnpicklingError("no list of ids")
        if b"\0" in "".join(map(str, ids)).encode():
            raise pickle.UnpicklingError("an id that contains NUL")
        if not isinstance(vectors, _Array):
            raise pickle.UnpicklingError("no array of vectors")
        return [str(passage_id) for passage_id in ids], vectors.array()
    except (pickle.UnpicklingError, *NPY_ERRORS, AttributeError, LookupError, struct.error) as error:
        raise UserError(f"{path}: not a shard of embeddings, which is a pickle of a list of ids and a float16 array "
                        f"({error}); give the published file") from error
