"""A DLPack capsule of memory that is not numpy's, through ctypes.

Source: dlpack.h, `DLManagedTensor`, the structure that every consumer reads (the versioned one is newer than many).
"""

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_int32, c_int64, c_uint8, c_uint16, c_uint64, c_void_p
from typing import Any

import numpy as np

_CUDA = 2  # kDLCUDA
_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}  # numpy's kind -> kDLInt, kDLUInt, kDLFloat, kDLBool
_FRESH_NAME = b"dltensor"  # a consumer renames a capsule whose memory it took over


class _Tensor(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("ndim", c_int32),
        ("code", c_uint8),
        ("bits", c_uint8),
        ("lanes", c_uint16),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    )


class _ManagedTensor(Structure):
    _fields_ = (("tensor", _Tensor), ("manager_ctx", c_void_p), ("deleter", c_void_p))


# Address of a structure -> it, its shape, and what owns the memory, until the consumer calls the deleter.
_lent: dict[int, tuple[object, ...]] = {}

_new = ctypes.PYFUNCTYPE(ctypes.py_object, c_void_p, c_char_p, c_void_p)(("PyCapsule_New", ctypes.pythonapi))
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, c_void_p, c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_get_pointer = ctypes.PYFUNCTYPE(c_void_p, c_void_p, c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))


# The defaults outlive this module's names, which the interpreter clears before it destroys what is left at exit.


def _forget(managed: int, lent: dict[int, tuple[object, ...]] = _lent) -> None:
    lent.pop(managed, None)


def _forget_unused(
    capsule: int,
    lent: dict[int, tuple[object, ...]] = _lent,
    is_valid: Any = _is_valid,
    get_pointer: Any = _get_pointer,
    name: bytes = _FRESH_NAME,
) -> None:
    if is_valid(capsule, name):  # nobody took the memory over
        lent.pop(get_pointer(capsule, name), None)


_delete = ctypes.CFUNCTYPE(None, c_void_p)(_forget)  # takes the interpreter's lock: a consumer may call it without
_destroy = ctypes.PYFUNCTYPE(None, c_void_p)(_forget_unused)  # a capsule is destroyed with the lock held
for _callback in (_delete, _destroy):
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_callback))  # never freed: consumers keep the bare addresses
_DELETER = ctypes.cast(_delete, c_void_p)
_DESTRUCTOR = ctypes.cast(_destroy, c_void_p)


def cuda_capsule(
    address: int, shape: tuple[int, ...], dtype: np.dtype[Any], *, owner: object, device_type: int = _CUDA
) -> object:
    """A capsule that shares C-contiguous memory of device 0.

    Args:
        address: Of the first element; 0 where there are none.
        shape: Sizes.
        dtype: Of the elements.
        owner: Kept alive until the capsule's consumer is done with the memory.
        device_type: DLPack's number for the kind of device.

    Raises:
        BufferError: DLPack has no such dtype.
    """
    if dtype.kind not in _CODES:
        raise BufferError(f"DLPack has no dtype {dtype}")
    sizes = (c_int64 * max(len(shape), 1))(*shape)
    managed = _ManagedTensor(
        tensor=_Tensor(
            data=address,
            device_type=device_type,
            device_id=0,
            ndim=len(shape),
            code=_CODES[dtype.kind],
            bits=8 * dtype.itemsize,
            lanes=1,
            shape=sizes,
            strides=None,  # C-contiguous
            byte_offset=0,
        ),
        manager_ctx=None,
        deleter=_DELETER,
    )
    place = ctypes.addressof(managed)
    _lent[place] = (managed, sizes, owner)
    return _new(place, _FRESH_NAME, _DESTRUCTOR)
