"""Reads and writes PyTorch's zip archives of named tensors, without PyTorch.

An archive is a zip of uncompressed members under one folder:

  NAME/data.pkl     pickle of {name: tensor}; tensors refer to storages
  NAME/data/KEY     the bytes of one storage, shared by any number of tensors
  NAME/byteorder    little or big (absent in older archives: little)
  NAME/version      3

A pickle is a program. This reader's unpickler knows the few functions that
rebuild tensors and refuses every other name before it is looked up, so
nothing of a hostile file is ever imported or called.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
import os
import pathlib
import pickle
import struct
from typing import Any
from typing import IO
import zipfile

import jax.numpy as jnp
import numpy as np

Path = str | os.PathLike[str]

# The magic number, pickled, with which PyTorch's old form begins.
_LEGACY_PICKLE = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'
_CONVERT = (
  "convert it where PyTorch is installed: torch.save(torch.load('old.pt', "
  "map_location='cpu'), 'new.pt')"
)

_DTYPES: dict[str, np.dtype] = {
  'DoubleStorage': np.dtype('<f8'),
  'FloatStorage': np.dtype('<f4'),
  'HalfStorage': np.dtype('<f2'),
  'BFloat16Storage': np.dtype(jnp.bfloat16),
  'LongStorage': np.dtype('<i8'),
  'IntStorage': np.dtype('<i4'),
  'ShortStorage': np.dtype('<i2'),
  'CharStorage': np.dtype('i1'),
  'ByteStorage': np.dtype('u1'),
  'BoolStorage': np.dtype('?'),
}
_STORAGE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class ArchiveError(ValueError):
  """A file that is no archive of tensors, or asks for more than tensors."""


@dataclasses.dataclass(frozen=True)
class _StorageType:
  """Stands for torch.FloatStorage and its kin."""

  dtype: np.dtype


def load(path: Path) -> dict[str, np.ndarray]:
  """Reads a state dict.

  Args:
    path: what `torch.save(model.state_dict(), path)` wrote.

  Returns:
    Arrays by name, read-only; tensors that shared a storage still do.

  Raises:
    ArchiveError: for any other file; says what it is and how to convert it.
    OSError: if it cannot be read.
  """
  path = pathlib.Path(path)
  _require_zip(path)
  try:
    with zipfile.ZipFile(path) as archive:
      tree = _load(archive, path)
  except ArchiveError:
    raise
  except (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    # What a damaged or hostile pickle can make the unpickler stumble over.
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    TypeError,
    ValueError,
    struct.error,
  ) as error:
    raise ArchiveError(f'{path}: damaged archive: {error}') from error
  return _require_arrays(tree, path)


def _require_zip(path: pathlib.Path) -> None:
  with path.open('rb') as file:
    start = file.read(512)
  if start.startswith(b'PK\x03\x04'):
    return
  # (A tar has its magic at byte 257.)
  if start.startswith(_LEGACY_PICKLE) or start[257:262] == b'ustar':
    raise ArchiveError(
      f'{path}: written by PyTorch before 1.6, or with '
      f'_use_new_zipfile_serialization=False; {_CONVERT}'
    )
  raise ArchiveError(f'{path}: not a PyTorch zip archive; {_CONVERT}')


def _load(archive: zipfile.ZipFile, path: pathlib.Path) -> Any:
  names = archive.namelist()
  if any(name.endswith('/constants.pkl') for name in names):
    raise ArchiveError(
      f'{path}: a TorchScript program; give the state dict (final.pt)'
    )
  roots = [
    name.removesuffix('data.pkl')
    for name in names
    if name.count('/') == 1 and name.endswith('/data.pkl')
  ]
  if len(roots) != 1:
    raise ArchiveError(f'{path}: a zip without data.pkl; {_CONVERT}')
  root = roots[0]
  if f'{root}byteorder' in names:
    order = archive.read(f'{root}byteorder').decode('ascii', 'replace').strip()
    if order != 'little':
      raise ArchiveError(
        f'{path}: byte order {order!r}; only little is read: write it again '
        'on a little-endian machine'
      )
  with archive.open(f'{root}data.pkl') as stream:
    return _Unpickler(stream, archive, root, path).load()


class _Unpickler(pickle.Unpickler):
  """Rebuilds tensors as arrays; knows no other names."""

  def __init__(
    self,
    stream: IO[bytes],
    archive: zipfile.ZipFile,
    root: str,
    path: pathlib.Path,
  ) -> None:
    super().__init__(stream, encoding='utf-8')
    self._archive, self._root, self._path = archive, root, path
    self._stand_ins = _stand_ins()
    self._storages: dict[str, np.ndarray] = {}

  # The unpickler's only way to a name, so what is refused here never runs.
  def find_class(self, module: str, name: str) -> Any:
    """Returns the stand-in for an allowed name; refuses all others."""
    if (module, name) in self._stand_ins:
      return self._stand_ins[module, name]
    if module == 'torch' and name in _DTYPES:
      return _StorageType(_DTYPES[name])
    raise ArchiveError(
      f'{self._path}: refused: the file asks for {module}.{name}; a state '
      'dict needs tensors only'
    )

  def persistent_load(self, pid: Any) -> np.ndarray:
    """Returns a storage, ('storage', type, key, location, length)."""
    match pid:
      case ('storage', _StorageType() as kind, str(key), str(), int(length)):
        pass
      case _:
        raise ArchiveError(f'{self._path}: not a reference to a storage: {pid}')
    if key not in self._storages:
      self._storages[key] = self._read(key)
    data = self._storages[key]
    if len(data) != length * kind.dtype.itemsize:
      raise ArchiveError(
        f'{self._path}: storage {key} has {len(data)} bytes, not {length} '
        f'numbers of {kind.dtype}'
      )
    return data.view(kind.dtype)

  def _read(self, key: str) -> np.ndarray:
    name = f'{self._root}data/{key}'
    try:
      info = self._archive.getinfo(name)
    except KeyError:
      raise ArchiveError(f'{self._path}: no member {name}') from None
    if info.compress_type != zipfile.ZIP_STORED:
      # PyTorch never compresses; so no member is larger than the file.
      raise ArchiveError(f'{self._path}: member {name} is compressed')
    return np.frombuffer(self._archive.read(info), np.uint8)


def _rebuild_tensor(
  storage: Any, offset: Any, size: Any, stride: Any, *_: Any
) -> np.ndarray:
  """A view of a storage, as torch.Tensor.as_strided."""
  if not isinstance(storage, np.ndarray):
    raise ArchiveError('a tensor without a storage')
  # A pickle may hold anything: nothing of it is believed before it is checked.
  numbers = (offset, *size, *stride)
  if len(size) != len(stride) or not all(
    isinstance(n, int) and n >= 0 for n in numbers
  ):
    raise ArchiveError(f'a tensor of size {size}, stride {stride} at {offset}')
  last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
  # An empty tensor reads nothing. Views past the storage would read memory
  # that is not the file's.
  if 0 in size:
    return np.zeros(size, storage.dtype)
  if last >= len(storage):
    raise ArchiveError(
      f'a tensor reaches number {last} of a storage of {len(storage)}'
    )
  return np.lib.stride_tricks.as_strided(
    storage[offset:],
    shape=size,
    strides=[s * storage.itemsize for s in stride],
    writeable=False,
  )


def _stand_ins() -> dict[tuple[str, str], Any]:
  """What the allowed names mean.

  Made anew for each file: a pickle may set attributes on what it is given,
  and nothing of one file should outlive it.
  """

  class OrderedDict(dict):
    """Drops the attributes that PyTorch hangs on a state dict."""

    def __setstate__(self, state: Any) -> None:
      pass

  def rebuild_tensor(*arguments: Any) -> np.ndarray:
    return _rebuild_tensor(*arguments)

  def rebuild_parameter(data: Any, *_: Any) -> Any:
    return data

  return {
    ('collections', 'OrderedDict'): OrderedDict,
    ('torch._utils', '_rebuild_tensor_v2'): rebuild_tensor,
    ('torch._utils', '_rebuild_parameter'): rebuild_parameter,
  }


def _require_arrays(tree: Any, path: pathlib.Path) -> dict[str, np.ndarray]:
  if not isinstance(tree, Mapping):
    raise ArchiveError(
      f'{path}: holds one {type(tree).__name__}, not tensors by name'
    )
  for name, value in tree.items():
    if not (isinstance(name, str) and isinstance(value, np.ndarray)):
      raise ArchiveError(
        f'{path}: entry {name!r} is not a tensor; give a plain state dict, '
        'torch.save(model.state_dict(), ...)'
      )
  return dict(tree)


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes a state dict that `torch.load(path, weights_only=True)` reads.

  Args:
    path: the file.
    arrays: by name; floats, integers and booleans.

  Raises:
    ArchiveError: for a type that PyTorch's storages do not have.
  """
  # Not ascontiguousarray, which makes scalars one-dimensional.
  arrays = {name: np.asarray(a, order='C') for name, a in arrays.items()}
  for name, array in arrays.items():
    if array.dtype not in _STORAGE_NAMES:
      raise ArchiveError(f'entry {name!r} has type {array.dtype}')
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as archive:
    archive.writestr('archive/data.pkl', b''.join(_pickle(arrays)))
    archive.writestr('archive/byteorder', 'little')
    for key, array in enumerate(arrays.values()):
      info = zipfile.ZipInfo(f'archive/data/{key}')
      with archive.open(info, 'w', force_zip64=array.nbytes >= 2**31) as member:
        member.write(array.reshape(-1).view(np.uint8).data)
    archive.writestr('archive/version', '3\n')


def _pickle(arrays: Mapping[str, np.ndarray]) -> Iterator[bytes]:
  """Yields the opcodes: pickle's own writer would have to import torch."""
  ordered_dict = _global('collections', 'OrderedDict')
  empty_dict = ordered_dict + pickle.EMPTY_TUPLE + pickle.REDUCE
  yield pickle.PROTO + b'\x02' + empty_dict + pickle.MARK
  for key, (name, array) in enumerate(arrays.items()):
    # PyTorch counts strides in numbers, NumPy in bytes.
    strides = tuple(stride // array.itemsize for stride in array.strides)
    yield _text(name) + _global('torch._utils', '_rebuild_tensor_v2')
    # Arguments of _rebuild_tensor_v2: storage (a persistent id, see
    # `persistent_load`), offset, size, stride, requires_grad, backward hooks.
    yield pickle.MARK + pickle.MARK + _text('storage')
    yield _global('torch', _STORAGE_NAMES[array.dtype])
    yield _text(str(key)) + _text('cpu') + _int(array.size)
    yield pickle.TUPLE + pickle.BINPERSID
    yield _int(0) + _ints(array.shape) + _ints(strides)
    yield pickle.NEWFALSE + empty_dict + pickle.TUPLE + pickle.REDUCE
  yield pickle.SETITEMS + pickle.STOP


def _global(module: str, name: str) -> bytes:
  return pickle.GLOBAL + f'{module}\n{name}\n'.encode('ascii')


def _text(text: str) -> bytes:
  data = text.encode('utf-8')
  return pickle.BINUNICODE + struct.pack('<I', len(data)) + data


def _int(number: int) -> bytes:
  if number < 2**31:
    return pickle.BININT + struct.pack('<i', number)
  return pickle.LONG1 + b'\x08' + struct.pack('<q', number)


def _ints(numbers: tuple[int, ...]) -> bytes:
  return pickle.MARK + b''.join(map(_int, numbers)) + pickle.TUPLE
