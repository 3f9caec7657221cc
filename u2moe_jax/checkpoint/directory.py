"""The model directory: what import, upcycling, averaging and training leave.

MODEL/
  model.json   format version, ModelConfig, FeatureConfig, provenance
  tokens/      token table; without it decoding prints ids
  params/      Orbax item: parameters and buffers, blocks and experts stacked
  moments/     Orbax item, seldom there: Adam's, for a training from this model

In the inference form (`models/inference.py`) params/ is what `mapped.py` writes,
and the format version is one that older programs refuse.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
import shutil
import sys
from typing import Any

from flax import linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp

import u2moe_jax
from u2moe_jax import config as config_lib
from u2moe_jax.array_types import PyTree
from u2moe_jax.checkpoint import contents
from u2moe_jax.checkpoint import mapped
from u2moe_jax.checkpoint import processes
from u2moe_jax.models import inference
from u2moe_jax.models import u2

FORMAT_VERSION = 2
# What the first program could read is still written for it.
_VERSIONS: dict[config_lib.Form, int] = {'training': 1, 'inference': 2}
_MOMENTS = 'moments'
Path = str | os.PathLike[str]
CheckpointError = contents.CheckpointError


@dataclasses.dataclass(frozen=True)
class Description:
  """What model.json says.

  Attributes:
    model: the model.
    features: the filterbank it was trained on.
    provenance: command, versions, device, seeds, step, ...
    form: of the parameters.
  """

  model: config_lib.ModelConfig
  features: config_lib.FeatureConfig
  provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  form: config_lib.Form = 'training'


@dataclasses.dataclass(frozen=True)
class Found:
  """A checkpoint that was found.

  Attributes:
    params: folder with parameters and buffers; an Orbax item, unless the
      model is in the inference form.
    tokens: folder of the token table, or None.
    description: the model.
    choice: one line that says what was chosen.
    moments: folder of the Orbax item with Adam's moments, or None.
  """

  params: pathlib.Path
  tokens: pathlib.Path | None
  description: Description
  choice: str
  moments: pathlib.Path | None = None


def provenance(**extra: Any) -> dict[str, Any]:
  """Command, versions and device, for model.json."""
  return {
    'command': ' '.join(sys.argv),
    'versions': {
      'u2moe_jax': u2moe_jax.__version__,
      'jax': jax.__version__,
      'python': sys.version.split()[0],
    },
    'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    **extra,
  }


def write(
  path: Path,
  description: Description,
  params: PyTree,
  buffers: PyTree,
  *,
  tokens: Path | None = None,
  extras: Mapping[str, Path] | None = None,
  moments: PyTree | None = None,
) -> None:
  """Writes a model directory; an existing one is replaced at the end.

  With several hosts each must call it, for each has a part of the arrays.

  Args:
    path: the folder.
    description: the model.
    params: parameters.
    buffers: buffers.
    tokens: folder of the token table to copy.
    extras: folders to copy beside it, by name; nothing here reads them.
    moments: Adam's; see `training.moments`.

  Raises:
    CheckpointError: see `require_replaceable`.
  """

  def save(folder: pathlib.Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(
        folder / 'params', {'params': params, 'buffers': buffers}
      )
      if moments is not None:
        checkpointer.save(folder / _MOMENTS, moments)

  _write(path, description, save, tokens=tokens, extras=extras or {})


def write_inference(
  path: Path,
  description: Description,
  arrays: Iterable[tuple[str, np.ndarray]],
  *,
  tokens: Path | None = None,
) -> None:
  """Writes a model directory in the inference form, array by array.

  Args:
    path: the folder; an existing one is replaced at the end.
    description: the model.
    arrays: paths and arrays, as `inference.convert` yields them.
    tokens: folder of the token table to copy.

  Raises:
    CheckpointError: see `require_replaceable`.
  """
  description = dataclasses.replace(description, form='inference')
  save = lambda folder: mapped.write(folder / 'params', arrays)
  _write(path, description, save, tokens=tokens, extras={})


def _write(
  path: Path,
  description: Description,
  save: Callable[[pathlib.Path], None],
  *,
  tokens: Path | None,
  extras: Mapping[str, Path],
) -> None:
  path = pathlib.Path(path).absolute()
  require_replaceable(path)
  unfinished = path.with_name(path.name + '.unfinished')
  if processes.is_first():
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
  # Nobody writes before the folder is there, or goes on before it has its name.
  processes.wait(f'begin {path}')
  save(unfinished)
  if processes.is_first():
    _write_rest(unfinished, description, tokens, extras)
    replace(path, unfinished)
  processes.wait(f'end {path}')


def require_replaceable(path: Path) -> None:
  """Raises CheckpointError for a path that holds anything but a model."""
  path = pathlib.Path(path)
  is_other = path.is_dir() and any(path.iterdir())
  if path.is_file() or (is_other and not (path / 'model.json').is_file()):
    raise CheckpointError(
      f'{path}: exists and is no model directory; it is left alone, choose '
      'another place'
    )


def _write_rest(
  unfinished: pathlib.Path,
  description: Description,
  tokens: Path | None,
  extras: Mapping[str, Path],
) -> None:
  """Writes all but the arrays."""
  if tokens is not None:
    shutil.copytree(tokens, unfinished / 'tokens')
  for name, folder in extras.items():
    shutil.copytree(folder, unfinished / name)
  text = json.dumps(_to_json(description), indent=2)
  (unfinished / 'model.json').write_text(text + '\n', encoding='utf-8')


def replace(path: pathlib.Path, unfinished: pathlib.Path) -> None:
  """Gives a folder that is complete its name; what had it goes."""
  # Renamed, not deleted first: whenever this is cut short, one is whole.
  old = path.with_name(path.name + '.old')
  shutil.rmtree(old, ignore_errors=True)
  if path.exists():
    path.rename(old)
  unfinished.rename(path)
  shutil.rmtree(old, ignore_errors=True)


def _to_json(description: Description) -> dict[str, Any]:
  return {
    'format_version': _VERSIONS[description.form],
    'form': description.form,
    'model': config_lib.to_dict(description.model),
    'features': config_lib.to_dict(description.features),
    'provenance': dict(description.provenance),
  }


def describe(path: Path) -> Description:
  """Reads model.json.

  Raises:
    CheckpointError: if there is none, or a newer program wrote it.
  """
  file = pathlib.Path(path) / 'model.json'
  tree = _read_json(file)
  if not isinstance(tree, dict):
    raise CheckpointError(f'{file}: describes no model; was it edited?')
  version = tree.get('format_version')
  if not isinstance(version, int) or version > FORMAT_VERSION:
    raise CheckpointError(
      f'{file}: format version {version!r}; this program reads up to '
      f'{FORMAT_VERSION}: install a newer u2moe_jax'
    )
  missing = {'model', 'features'} - tree.keys()
  if missing:
    raise CheckpointError(f'{file}: no {min(missing)!r} in it; was it edited?')
  return Description(
    model=config_lib.from_dict(config_lib.ModelConfig, tree['model']),
    features=config_lib.from_dict(config_lib.FeatureConfig, tree['features']),
    provenance=tree.get('provenance', {}),
    form=tree.get('form', 'training'),
  )


def _read_json(file: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(file.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise CheckpointError(f'{file}: no such file') from None
  except ValueError as error:
    raise CheckpointError(f'{file}: not JSON ({error})') from None


def find(path: Path, *, for_decoding: bool = False) -> Found:
  """Finds a checkpoint.

  Args:
    path: a MODEL folder; a WORKDIR (its `model/`, else the step of lowest dev
      WER, else the newest); or one step folder of a WORKDIR.
    for_decoding: whether the inference form will do, too.

  Raises:
    CheckpointError: if there is no checkpoint, or one in the inference form
      where that will not do; says what was looked for.
  """
  found = _find(pathlib.Path(path).absolute())
  if found.description.form != 'training' and not for_decoding:
    raise CheckpointError(
      f'{found.params.parent}: this model is in the inference form, which can '
      'be decoded with and nothing else; take the one it was made from'
    )
  return found


def _find(path: pathlib.Path) -> Found:
  if not path.is_dir():
    raise CheckpointError(f'{path}: no such folder')
  if (path / 'model.json').is_file():
    return _found_model(path, f'model {path}')
  if (path / 'model' / 'model.json').is_file():
    return _found_model(path / 'model', f'model {path / "model"}')
  if (path / 'checkpoints').is_dir():
    steps = step_folders(path)
    if steps:
      # Of equals the newest.
      best = min(reversed(steps), key=_order)
      return _found_step(path, best)
  if path.parent.name == 'checkpoints' and (path / 'params').is_dir():
    return _found_step(path.parent.parent, path)
  raise CheckpointError(
    f'{path}: no checkpoint here; expected model.json, model/model.json or '
    'checkpoints/STEP/params'
  )


def step_folders(workdir: Path) -> list[pathlib.Path]:
  """Complete step folders of a work directory, oldest first, if any."""
  checkpoints = pathlib.Path(workdir) / 'checkpoints'
  if not checkpoints.is_dir():
    return []
  folders = [
    folder
    for folder in checkpoints.iterdir()
    if folder.name.isdecimal() and (folder / 'params').is_dir()
  ]
  return sorted(folders, key=lambda folder: int(folder.name))


def _order(folder: pathlib.Path) -> float:
  wer = dev_wer(folder)
  return float('inf') if wer is None else wer


def dev_wer(folder: Path) -> float | None:
  """The dev WER of a step folder, per cent; None if it was not measured."""
  file = pathlib.Path(folder) / 'metrics' / 'metrics'
  try:
    return float(json.loads(file.read_text(encoding='utf-8'))['wer'])
  except (OSError, ValueError, KeyError, TypeError):
    return None


def _found_model(path: pathlib.Path, choice: str) -> Found:
  tokens, moments = path / 'tokens', path / _MOMENTS
  description = describe(path)
  if description.form == 'inference':
    # What is in 8 bits is another model, and nobody should miss that.
    weights = description.provenance.get('weights', 'unknown weights')
    choice += f', inference form ({weights})'
  return Found(
    params=path / 'params',
    tokens=tokens if tokens.is_dir() else None,
    description=description,
    choice=choice,
    moments=moments if moments.is_dir() else None,
  )


def _found_step(workdir: pathlib.Path, folder: pathlib.Path) -> Found:
  tree = _read_json(workdir / 'config.json')
  tokens = workdir / 'tokens'
  config = config_lib.from_dict(config_lib.Config, tree)
  wer = dev_wer(folder)
  measured = '' if wer is None else f' (dev WER {wer:.2f} %)'
  return Found(
    params=folder / 'params',
    tokens=tokens if tokens.is_dir() else None,
    description=Description(config.model, config.data.features),
    choice=f'step {folder.name} of {workdir}{measured}',
  )


def abstract_variables(
  config: config_lib.ModelConfig, sharding: jax.sharding.Sharding | None = None
) -> dict[str, PyTree]:
  """Shapes of parameters and buffers, placed by one sharding."""
  model = u2.U2MoeModel(config)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  tree = {
    # (The modules box parameters with axis names; a file has plain arrays.)
    'params': nn.meta.unbox(
      # Traced only: no parameter is drawn.
      jax.eval_shape(lambda key: u2.init_params(model, key), jax.random.key(0))
    ),
    'buffers': jax.eval_shape(lambda: u2.init_buffers(config)),
  }
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


def restore(
  found: Found, target: dict[str, PyTree] | None = None
) -> tuple[PyTree, PyTree]:
  """Restores (parameters, buffers) onto the target's shardings.

  Args:
    found: see `find`.
    target: abstract `{'params', 'buffers'}` with shardings; None puts all on
      the first device, as does the inference form always.

  Raises:
    CheckpointError: if the arrays do not fit the model.
  """
  if found.description.form == 'inference':
    return _restore_inference(found)
  if target is None:
    target = abstract_variables(found.description.model)
  tree = _restore(found.params, target)
  return tree['params'], tree['buffers']


def restore_moments(
  found: Found, params: PyTree, *, everywhere: jax.sharding.Sharding
) -> PyTree:
  """Restores the moments that a model directory has, placed as parameters.

  Args:
    found: one with moments.
    params: the model's, abstract with shardings.
    everywhere: where the number of updates goes.

  Returns:
    See `training.moments`.

  Raises:
    CheckpointError: if they do not fit the model.
  """
  assert found.moments is not None
  count = jax.ShapeDtypeStruct((), np.int32, sharding=everywhere)
  # Adam's two moments have the shapes of the parameters.
  target = {'mu': params, 'nu': params, 'count': count}
  return _restore(found.moments, target)


def _restore(item: pathlib.Path, target: PyTree) -> PyTree:
  contents.require_fit(item, target)
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      return checkpointer.restore(item, target)
  except Exception as error:  # Orbax raises many kinds for damaged files
    raise CheckpointError(
      f'{item}: cannot be read: {contents.first_line(error)}'
    ) from error


def _restore_inference(found: Found) -> tuple[PyTree, PyTree]:
  """Maps the arrays; on CPU they stay where the file is mapped."""
  arrays = mapped.read(found.params)
  placed = jax.device_put(arrays, jax.devices()[0])
  tree = inference.nest(placed.items())
  return tree['params'], tree['buffers']
