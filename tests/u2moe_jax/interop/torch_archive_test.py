"""Archives of tensors: what is in them arrives; nothing else happens."""

import os
import pickle
import struct
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from u2moe_jax.interop import torch_archive

_RNG = np.random.default_rng(0)


def _write(path, pickled, storages=(), **members):
  """An archive as PyTorch lays it out, of any pickle."""
  members = {'byteorder': 'little', 'version': '3\n'} | members
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('name/data.pkl', pickled)
    for key, data in enumerate(storages):
      archive.writestr(f'name/data/{key}', data)
    for member, text in members.items():
      archive.writestr(f'name/{member}', text)
  return path


# Opcodes, put together by hand as PyTorch's pickles have them.
_ORDERED = b'ccollections\nOrderedDict\n)R'


def _int(number):
  return b'J' + struct.pack('<i', number)


def _text(text):
  return b'X' + struct.pack('<I', len(text)) + text.encode()


def _storage(key, kind, length):
  where = _text('storage') + f'ctorch\n{kind}\n'.encode() + _text(str(key))
  return b'(' + where + _text('cuda:0') + _int(length) + b'tQ'


def _tensor(storage, offset, size, stride):
  sizes = b''.join(b'(' + b''.join(map(_int, n)) + b't' for n in (size, stride))
  arguments = storage + _int(offset) + sizes + b'\x89' + _ORDERED
  return b'ctorch._utils\n_rebuild_tensor_v2\n(' + arguments + b'tR'


def _parameter(tensor):
  return b'ctorch._utils\n_rebuild_parameter\n(' + tensor + b'\x88}tR'


def _mapping(**values):
  """A state dict with the attribute that PyTorch hangs on it."""
  items = b''.join(_text(name) + value for name, value in values.items())
  metadata = b'}' + _text('_metadata') + _ORDERED + b's'
  return b'\x80\x02' + _ORDERED + b'(' + items + b'u' + metadata + b'b.'


_BASE = _RNG.normal(size=(6, 5)).astype(np.float32)


def test_views_share_their_storage(tmp_path):
  whole = _storage(0, 'FloatStorage', 30)
  path = _write(
    tmp_path / 'a.pt',
    _mapping(
      base=_tensor(whole, 0, (6, 5), (5, 1)),
      transposed=_parameter(_tensor(whole, 0, (5, 6), (1, 5))),
      row=_tensor(whole, 10, (5,), (1,)),
      steps=_tensor(whole, 1, (3, 3), (10, 1)),
      one=_tensor(whole, 7, (), ()),
      expanded=_tensor(whole, 3, (4,), (0,)),
      empty=_tensor(whole, 0, (0, 4), (4, 1)),
    ),
    [_BASE.tobytes()],
  )
  arrays = torch_archive.load(path)
  expected = {
    'base': _BASE,
    'transposed': _BASE.T,
    'row': _BASE[2],
    'steps': _BASE[::2, 1:4],
    'one': _BASE[1, 2],
    'expanded': np.full(4, _BASE[0, 3]),
    'empty': np.zeros((0, 4)),
  }
  assert list(arrays) == list(expected)
  for name, array in arrays.items():
    np.testing.assert_array_equal(array, expected[name])
    assert array.dtype == np.float32
  assert np.shares_memory(arrays['base'], arrays['steps'])
  with pytest.raises(ValueError, match='read-only'):
    arrays['base'][0] = 0


@pytest.mark.parametrize(
  ('kind', 'array'),
  [
    ('DoubleStorage', _BASE.astype('<f8')),
    ('HalfStorage', _BASE.astype('<f2')),
    ('BFloat16Storage', _BASE.astype(jnp.bfloat16)),
    ('LongStorage', np.arange(-3, 3)),
    ('IntStorage', np.arange(3, dtype='<i4')),
    ('ShortStorage', np.arange(3, dtype='<i2')),
    ('CharStorage', np.arange(-3, 3, dtype='i1')),
    ('ByteStorage', np.arange(3, dtype='u1')),
    ('BoolStorage', np.array([True, False])),
  ],
)
def test_every_type_of_number(tmp_path, kind, array):
  flat = array.reshape(-1)
  tensor = _tensor(_storage(0, kind, len(flat)), 0, (len(flat),), (1,))
  path = _write(tmp_path / 'a.pt', _mapping(x=tensor), [flat.tobytes()])
  (found,) = torch_archive.load(path).values()
  assert found.dtype == flat.dtype
  assert found.tobytes() == flat.tobytes()


def test_what_is_written_is_read_again(tmp_path):
  arrays = {
    'weight': _BASE,
    'transposed': _BASE.T,
    'scalar': np.array(7),
    'empty': np.zeros((0, 3), np.float32),
    'half': _BASE.astype(np.float16),
    'brain': _BASE.astype(jnp.bfloat16),
    'ünï': np.array([True]),
  }
  torch_archive.save(tmp_path / 'a.pt', arrays)
  again = torch_archive.load(tmp_path / 'a.pt')
  assert list(again) == list(arrays)
  for name, array in arrays.items():
    assert again[name].dtype == array.dtype
    assert again[name].shape == array.shape
    assert again[name].tobytes() == array.tobytes()
  with pytest.raises(torch_archive.ArchiveError, match="'x' has type complex"):
    torch_archive.save(tmp_path / 'b.pt', {'x': np.array([1j])})


def test_the_pickle_is_the_one_that_pytorch_writes(tmp_path):
  """Names and arguments, seen by a plain unpickler with recording fakes."""
  torch_archive.save(tmp_path / 'a.pt', {'w': _BASE.T})
  with zipfile.ZipFile(tmp_path / 'a.pt') as archive:
    stream = archive.open('archive/data.pkl')
    assert archive.read('archive/byteorder') == b'little'
    assert archive.read('archive/version') == b'3\n'
    assert archive.read('archive/data/0') == _BASE.T.tobytes()

  class Recorder(pickle.Unpickler):
    def find_class(self, module, name):
      if name == 'OrderedDict':
        return dict
      return lambda *arguments: (f'{module}.{name}', *arguments)

    def persistent_load(self, pid):
      return (*pid[:1], pid[1]()[0], *pid[2:])

  assert Recorder(stream).load() == {
    'w': (
      'torch._utils._rebuild_tensor_v2',
      ('storage', 'torch.FloatStorage', '0', 'cpu', 30),
      0,
      (5, 6),
      (6, 1),
      False,
      {},
    )
  }


class _Call:
  """Pickles as a call."""

  def __init__(self, function, *arguments):
    self._call = function, arguments

  def __reduce__(self):
    return self._call


def _nested(marker):
  """Harmless to look at: the call hides in the third level."""
  return {'a': [{'b': _Call(os.system, f'touch {marker}')}]}


@pytest.mark.parametrize(
  ('hostile', 'named'),
  [
    (lambda m: _Call(os.system, f'touch {m}'), r'(posix|nt)\.system'),
    (lambda m: _Call(eval, f'open({str(m)!r}, "w")'), r'builtin(s|__)\.eval'),
    (lambda m: _Call(exec, f'open({str(m)!r}, "w")'), r'builtin(s|__)\.exec'),
    (lambda m: _Call(getattr, os, 'system'), r'builtin(s|__)\.getattr'),
    (lambda m: _Call(open, str(m), 'w'), r'(_?io)\.open'),
    (_nested, r'(posix|nt)\.system'),
  ],
)
@pytest.mark.parametrize('protocol', [0, 2, 4])
def test_a_hostile_pickle_is_refused_unrun(tmp_path, hostile, named, protocol):
  marker = tmp_path / 'marker'
  try:
    pickled = pickle.dumps(hostile(marker), protocol)
  except TypeError:  # a module cannot be pickled: name it by hand
    pickled = b'c__builtin__\ngetattr\n(cos\nsystem\nS"x"\ntR.'
    named = 'getattr'
  # Negative control: a plain unpickler looks the name up.
  seen = []

  class Naive(pickle.Unpickler):
    def find_class(self, module, name):
      seen.append(name)
      return lambda *_: None

  path = _write(tmp_path / 'a.pt', pickled)
  with zipfile.ZipFile(path) as archive:
    Naive(archive.open('name/data.pkl')).load()
  assert seen
  with pytest.raises(torch_archive.ArchiveError, match=f'refused.*{named}'):
    torch_archive.load(path)
  assert not marker.exists()


@pytest.mark.parametrize(
  'pickled',
  [
    b'\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.',
    b'ctorch\nload\n.',
    b'ctorch.storage\n_load_from_bytes\n(S"x"\ntR.',
    b'ctorch._utils\n_rebuild_tensor_v2.__globals__\n.',
    b'iposix\nsystem\n.',
    b'(S"true"\niposix\nsystem\n.',
  ],
)
def test_no_way_around_the_list_of_names(tmp_path, pickled):
  with pytest.raises(torch_archive.ArchiveError):
    torch_archive.load(_write(tmp_path / 'a.pt', pickled))


def test_what_a_pickle_sets_on_a_function_ends_with_its_file(tmp_path):
  rebuild = b'ctorch._utils\n_rebuild_parameter\n'
  # BUILD with (None, {'__defaults__': (7,)}) on the stand-in itself.
  state = b'(N}' + _text('__defaults__') + b'(' + _int(7) + b'tst'
  hostile = b'\x80\x02' + rebuild + state + b'b0' + rebuild + b')R.'
  with pytest.raises(torch_archive.ArchiveError):
    torch_archive.load(_write(tmp_path / 'a.pt', hostile))
  plain = b'\x80\x02' + rebuild + b')R.'
  with pytest.raises(torch_archive.ArchiveError, match='missing 1 required'):
    torch_archive.load(_write(tmp_path / 'b.pt', plain))


@pytest.mark.parametrize(
  ('tensor', 'message'),
  [
    (_tensor(_storage(0, 'FloatStorage', 30), 26, (5,), (1,)), 'reaches'),
    (_tensor(_storage(0, 'FloatStorage', 30), 0, (2,), (30,)), 'reaches'),
    (_tensor(_storage(0, 'FloatStorage', 30), 0, (2,), (-1,)), 'stride'),
    (_tensor(_storage(0, 'FloatStorage', 30), -1, (2,), (1,)), 'at -1'),
    (_tensor(_storage(0, 'FloatStorage', 31), 0, (2,), (1,)), '120 bytes'),
    (_tensor(_storage(1, 'FloatStorage', 30), 0, (2,), (1,)), 'name/data/1'),
    (_tensor(_storage(0, 'QInt8Storage', 30), 0, (2,), (1,)), 'QInt8Storage'),
    (_tensor(_text('x'), 0, (2,), (1,)), 'without a storage'),
    (b'(' + _text('module') + b'tQ', 'not a reference'),
    (_int(3), "'x' is not a tensor"),
    (_ORDERED, "'x' is not a tensor"),
  ],
)
def test_tensors_that_cannot_be(tmp_path, tensor, message):
  path = _write(tmp_path / 'a.pt', _mapping(x=tensor), [_BASE.tobytes()])
  with pytest.raises(torch_archive.ArchiveError, match=message):
    torch_archive.load(path)


def _legacy(path):
  path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b'...')


def _script(path):
  _write(path, _mapping(), **{'constants.pkl': 'x'})


def _compressed(path):
  _write(path, _mapping())
  tensor = _tensor(_storage(0, 'FloatStorage', 30), 0, (2,), (1,))
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('name/data.pkl', _mapping(x=tensor))
    archive.writestr('name/data/0', _BASE.tobytes())


def _arrays(path):
  with path.open('wb') as file:
    np.savez(file, x=_BASE)


def _damaged(path):
  torch_archive.save(path, {'x': _BASE})
  data = bytearray(path.read_bytes())
  data[data.index(_BASE.tobytes()) + 3] ^= 1
  path.write_bytes(data)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (_legacy, r'before 1\.6.*torch\.save\(torch\.load\('),
    (lambda p: p.write_bytes(b'hello'), r'not a PyTorch zip.*torch\.save'),
    (lambda p: p.write_bytes(b''), 'not a PyTorch zip'),
    (lambda p: p.write_bytes(b'PK\x03\x04' + b'x' * 99), 'damaged'),
    (_arrays, r'without data\.pkl'),
    (lambda p: _write(p, _mapping(), byteorder='big'), "byte order 'big'"),
    (lambda p: _write(p, b'\x80\x02]'), 'damaged'),
    (lambda p: _write(p, b'\x80\x02K\x01.'), 'holds one int'),
    (_script, 'TorchScript'),
    (_compressed, 'compressed'),
    (_damaged, 'damaged.*CRC'),
  ],
)
def test_other_files_say_what_to_do(tmp_path, make, message):
  path = tmp_path / 'a.pt'
  make(path)
  with pytest.raises(torch_archive.ArchiveError, match=message) as caught:
    torch_archive.load(path)
  assert str(path) in str(caught.value)
  assert '\n' not in str(caught.value)
