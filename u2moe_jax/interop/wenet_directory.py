"""Whole WeNet checkpoints to model directories, and back.

An import keeps two files that decoding and training do not read in
MODEL/wenet: `train.yaml`, whose other keys (data, optimizer) have no place in
a model directory, and `unused.npz`, the entries no computation reads. An
export returns them. Directories that were made from this one (averaged,
fine-tuned, upcycled) have no such folder, and need none.
"""

from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any
import zipfile

import numpy as np
import yaml as pyyaml

from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import directory
from u2moe_jax.frontend import cmvn as cmvn_lib
from u2moe_jax.interop import torch_archive
from u2moe_jax.interop import wenet_config
from u2moe_jax.interop import wenet_keys
from u2moe_jax.interop import wenet_weights
from u2moe_jax.models import u2
from u2moe_jax.text import tokenizer as tokenizer_lib
from u2moe_jax.text import units as units_lib

Path = str | os.PathLike[str]
WenetError = wenet_config.WenetError

_EXTRAS = 'wenet'
_YAML, _UNUSED = 'train.yaml', 'unused.npz'
_WEIGHTS, _ARCHIVE = 'weights.npz', 'final.pt'
_UNITS, _BPE, _CMVN = 'units.txt', 'bpe.model', 'global_cmvn'


@dataclasses.dataclass(frozen=True)
class Source:
  """A config as it was found.

  Attributes:
    yaml: the reference's keys.
    sos: start-of-sentence id given beside the yaml; -1 for none.
    eos: end-of-sentence id, likewise.
  """

  yaml: dict[str, Any]
  sos: int = -1
  eos: int = -1


def read_config(path: Path) -> Source:
  """Reads a train.yaml, or a config.json that may nest it.

  Args:
    path: YAML, or JSON by its suffix. JSON may hold the yaml under
      `wenet_config`, with `sos`, `eos` and `blank` beside it.

  Raises:
    WenetError: if it cannot be read as such; names the file.
    OSError: if it cannot be read at all.
  """
  path = pathlib.Path(path)
  text = path.read_bytes()
  try:
    if path.suffix == '.json':
      tree = json.loads(text)
    else:
      tree = pyyaml.safe_load(text)
  except (ValueError, pyyaml.YAMLError) as error:
    detail = ' '.join(str(error).split())
    raise WenetError(f'{path}: cannot be read: {detail}') from error
  if not isinstance(tree, Mapping):
    raise WenetError(f'{path}: holds no keys')
  if not isinstance(tree.get('wenet_config'), Mapping):
    return Source(dict(tree))
  yaml = dict(tree['wenet_config'])
  if 'blank' in tree:
    yaml = _with_blank(yaml, tree['blank'], f'{path}: blank')
  return Source(yaml, sos=tree.get('sos', -1), eos=tree.get('eos', -1))


def _with_blank(yaml: dict[str, Any], blank: int, where: str) -> dict[str, Any]:
  """The yaml with its blank id; refuses two that differ."""
  conf = dict(yaml.get('ctc_conf') or {})
  # Decoding with the wrong blank gives nonsense, so two sources must agree.
  if conf.setdefault('ctc_blank_id', blank) != blank:
    raise WenetError(
      f'{where} is {blank}, ctc_conf.ctc_blank_id is {conf["ctc_blank_id"]}'
    )
  return yaml | {'ctc_conf': conf}


def read_weights(path: Path) -> dict[str, np.ndarray]:
  """Reads a state dict: PyTorch's zip form, or .npz.

  Raises:
    WenetError: for a damaged .npz.
    torch_archive.ArchiveError: for any other file.
    OSError: if it cannot be read.
  """
  if pathlib.Path(path).suffix != '.npz':
    return torch_archive.load(path)
  try:
    # A pickle could run anything.
    with np.load(path, allow_pickle=False) as file:
      return dict(file)
  except (ValueError, zipfile.BadZipFile, EOFError) as error:
    raise WenetError(f'{path}: damaged .npz: {error}') from error


def import_model(
  weights: Path,
  config: Path,
  out: Path,
  *,
  units: Path | None = None,
  bpe_model: Path | None = None,
  cmvn: Path | None = None,
  reference_quirks: bool = False,
) -> list[str]:
  """Writes a model directory; everything is checked before.

  Args:
    weights: final.pt or weights.npz.
    config: train.yaml or config.json.
    out: the folder.
    units: units.txt; without it decoding prints ids.
    bpe_model: sentencepiece model of those units.
    cmvn: global_cmvn, for weights that hold none.
    reference_quirks: see `wenet_config.model_config`.

  Returns:
    What the user should know, a line each.

  Raises:
    ValueError: for anything that does not fit; names file and entry.
    OSError: if a file cannot be read or written.
  """
  _require_replaceable(out, 'model.json')
  # All of it is read and checked before anything is written.
  source, state = read_config(config), read_weights(weights)
  tokenizer = _read_tokenizer(units, bpe_model, source.yaml)
  yaml = source.yaml
  if tokenizer is not None:
    yaml = _with_units(yaml, tokenizer, units)
  try:
    model = wenet_config.model_config(
      yaml,
      sos=source.sos,
      eos=source.eos,
      reference_quirks=reference_quirks,
      names=state,
    )
    features = wenet_config.feature_config(yaml, model)
  except WenetError as error:
    raise WenetError(f'{config}: {error}') from error
  try:
    params, buffers = wenet_weights.model_variables(state, model)
  except WenetError as error:
    raise WenetError(f'{weights}: {error}') from error
  buffers['cmvn'], cmvn_note = _cmvn(state, buffers['cmvn'], yaml, cmvn)
  unused = wenet_weights.unused_entries(state, model)
  description = directory.Description(
    model,
    features,
    directory.provenance(
      imported_from={'weights': str(weights), 'config': str(config)},
      reference_quirks=reference_quirks,
    ),
  )
  # `directory.write` copies folders, and only what is complete gets its name.
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    extras = _write_extras(folder / _EXTRAS, yaml, unused)
    if tokenizer is not None:
      tokenizer.save(folder / 'tokens')
    directory.write(
      out,
      description,
      params,
      buffers,
      tokens=folder / 'tokens' if tokenizer is not None else None,
      extras={_EXTRAS: extras},
    )
  return [
    _summary(model, out),
    cmvn_note,
    *_notes(model, tokenizer, yaml, reference_quirks=reference_quirks),
  ]


def _require_replaceable(out: Path, mark: str) -> None:
  """Refuses to replace a folder that holds something else."""
  out = pathlib.Path(out)
  if out.is_file() or (
    out.is_dir() and any(out.iterdir()) and not (out / mark).is_file()
  ):
    raise WenetError(
      f'{out}: exists and is not what would be written there (no {mark}); '
      'choose another --out'
    )


def _read_tokenizer(
  units: Path | None, bpe_model: Path | None, yaml: Mapping[str, Any]
) -> tokenizer_lib.Tokenizer | None:
  if units is None:
    if bpe_model is not None:
      raise WenetError('--bpe_model needs --units: they go together')
    return None
  kind = yaml.get('tokenizer', 'char')
  if kind not in ('char', 'bpe'):
    raise WenetError(
      f'tokenizer {kind!r} is not supported; leave --units out, and decoding '
      'prints ids'
    )
  tokens = tokenizer_lib.read_units(units)
  if bpe_model is None:
    return tokenizer_lib.CharTokenizer(tokens)
  model = pathlib.Path(bpe_model).read_bytes()
  try:
    # The reference turns text into capitals before it cuts it into pieces.
    return tokenizer_lib.BpeTokenizer(tokens, model=model, uppercase=True)
  except ValueError as error:
    raise WenetError(f'{bpe_model}: {error}') from error


def _with_units(
  yaml: dict[str, Any], tokenizer: tokenizer_lib.Tokenizer, units: Path | None
) -> dict[str, Any]:
  """What the reference takes from units.txt: the vocabulary and the blank."""
  size = yaml.get('output_dim', yaml.get('vocab_size'))
  if size not in (None, tokenizer.vocab_size):
    raise WenetError(
      f'{units}: {tokenizer.vocab_size} tokens, but output_dim is {size}'
    )
  yaml = yaml | {'output_dim': tokenizer.vocab_size}
  if units_lib.BLANK in tokenizer.tokens:
    yaml = _with_blank(yaml, tokenizer.special.blank, f'{units}: <blank>')
  return yaml


def _cmvn(
  state: Mapping[str, np.ndarray],
  ours: dict[str, np.ndarray],
  yaml: Mapping[str, Any],
  path: Path | None,
) -> tuple[dict[str, np.ndarray], str]:
  """CMVN of the weights, else of the file, else none; and what was chosen."""
  if any(name.endswith('global_cmvn.mean') for name in state):
    return ours, 'CMVN: from the weights'
  if path is None:
    if yaml.get('cmvn') == 'global_cmvn' or yaml.get('cmvn_file'):
      raise WenetError(
        'the checkpoint has no entry encoder.global_cmvn.mean, and the yaml '
        'asks for CMVN; give --cmvn=global_cmvn'
      )
    return ours, 'CMVN: none, as in the yaml'
  stats = cmvn_lib.load(path)
  if len(stats.sum) != len(ours['mean']):
    raise WenetError(
      f'{path}: {len(stats.sum)} bins, the model has {len(ours["mean"])}'
    )
  found = {'mean': stats.mean, 'istd': stats.istd}
  return {k: v.astype(np.float32) for k, v in found.items()}, f'CMVN: {path}'


def _write_extras(
  folder: pathlib.Path,
  yaml: Mapping[str, Any],
  unused: Mapping[str, Any],
) -> pathlib.Path:
  folder.mkdir()
  _write_yaml(folder / _YAML, yaml)
  if unused:
    np.savez(folder / _UNUSED, **unused)
  return folder


def _write_yaml(file: pathlib.Path, tree: Mapping[str, Any]) -> None:
  text = pyyaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)
  file.write_text(text, encoding='utf-8')


def _summary(model: config_lib.ModelConfig, out: Path) -> str:
  total, active = u2.count_params(model)
  return (
    f'wrote {out}: {total / 1e6:.2f} M parameters, {active / 1e6:.2f} M '
    f'active per frame, {model.vocab_size} tokens, blank {model.blank_id}, '
    f'sos {model.sos}, eos {model.eos}'
  )


def _notes(
  model: config_lib.ModelConfig,
  tokenizer: tokenizer_lib.Tokenizer | None,
  yaml: Mapping[str, Any],
  *,
  reference_quirks: bool,
) -> list[str]:
  notes = []
  if tokenizer is None:
    notes.append('no --units: decoding prints ids')
  else:
    special = tokenizer.special
    if (special.sos, special.eos) != (model.sos, model.eos):
      notes.append(
        f'units.txt has sos {special.sos} and eos {special.eos}; the model '
        'uses the ids above, as the reference computes them'
      )
    if yaml.get('tokenizer') == 'bpe' and tokenizer.kind != 'bpe':
      notes.append('tokenizer is bpe: give --bpe_model before fine-tuning')
  if not model.decoder.num_blocks:
    notes.append(
      'no decoder: CTC only (--mode=ctc_greedy_search or '
      'ctc_prefix_beam_search)'
    )
  if not model.encoder.causal_conv:
    form = 'reaches' if reference_quirks else 'does not reach'
    notes.append(
      f'non-causal convolution: cannot stream; padding in a batch {form} '
      'valid frames (--reference_quirks)'
    )
  return notes


def export_model(checkpoint: Path, out: Path) -> list[str]:
  """Writes a checkpoint in the reference's forms.

  Args:
    checkpoint: a model directory, a work directory, or one of its steps.
    out: a folder for weights.npz and final.pt (the same entries),
      train.yaml, global_cmvn, and units.txt and bpe.model if there are any.

  Returns:
    What the user should know, a line each.

  Raises:
    ValueError: if there is no checkpoint, or the reference has no such model.
    OSError: if a file cannot be read or written.
  """
  _require_replaceable(out, _WEIGHTS)
  found = directory.find(checkpoint)
  model, features = found.description.model, found.description.features
  base, unused = _read_extras(found.params.parent / _EXTRAS)
  # The name of a right-to-left decoder without layers tells that of the other.
  left = any(name.startswith('decoder.right_decoder.') for name in unused)
  yaml = wenet_config.to_yaml(
    model,
    features,
    base=base,
    decoder='bitransformer' if left else None,
  )
  params, buffers = directory.restore(found)
  state = wenet_weights.state_dict(
    params, buffers, model, left_decoder=left or None
  )
  has_cmvn = 'encoder.global_cmvn.mean' in state
  out = pathlib.Path(out).absolute()
  unfinished = out.with_name(out.name + '.unfinished')
  shutil.rmtree(unfinished, ignore_errors=True)
  unfinished.mkdir(parents=True)
  _name_files(yaml, found.tokens, has_cmvn=has_cmvn)
  _write_yaml(unfinished / _YAML, yaml)
  np.savez(unfinished / _WEIGHTS, **state | unused)
  torch_archive.save(unfinished / _ARCHIVE, state | unused)
  if has_cmvn:
    cmvn_lib.save(unfinished / _CMVN, _cmvn_stats(buffers['cmvn']))
  for name in (_UNITS, _BPE):
    if found.tokens is not None and (found.tokens / name).is_file():
      shutil.copyfile(found.tokens / name, unfinished / name)
  directory.replace(out, unfinished)
  count = len(state | unused)
  return [f'wrote {out}: {count} entries of {found.choice}', *_caveats(found)]


def _read_extras(folder: pathlib.Path):
  """The yaml and the unused entries that an import kept; empty without."""
  if not folder.is_dir():
    return {}, {}
  unused = folder / _UNUSED
  arrays = read_weights(unused) if unused.is_file() else {}
  return read_config(folder / _YAML).yaml, arrays


def _name_files(
  yaml: dict[str, Any], tokens: pathlib.Path | None, *, has_cmvn: bool
) -> None:
  """Points the yaml at the files beside it, where it names none."""
  if has_cmvn:
    yaml.setdefault('cmvn', 'global_cmvn')
    yaml.setdefault('cmvn_conf', {'cmvn_file': _CMVN, 'is_json_cmvn': True})
  else:
    yaml['cmvn'] = None
  if tokens is None:
    return
  is_bpe = (tokens / _BPE).is_file()
  yaml.setdefault('tokenizer', 'bpe' if is_bpe else 'char')
  # What the yaml came with wins: it stands on the right.
  yaml['tokenizer_conf'] = {
    'symbol_table_path': _UNITS,
    'split_with_space': False,
    'bpe_path': _BPE if is_bpe else None,
    'non_lang_syms_path': None,
  } | yaml['tokenizer_conf']


def _cmvn_stats(cmvn: Mapping[str, Any]) -> cmvn_lib.CmvnStats:
  """Statistics over one frame, as it were, with this mean and deviation."""
  mean, istd = (np.asarray(cmvn[k], np.float64) for k in ('mean', 'istd'))
  # The mean of the squares is variance plus squared mean.
  return cmvn_lib.CmvnStats(mean, istd**-2 + mean**2, 1)


def _caveats(found: directory.Found) -> list[str]:
  """Where the reference would compute something else with these weights."""
  encoder, features = (
    found.description.model.encoder,
    found.description.features,
  )
  notes = []
  if not (encoder.causal_conv or encoder.conv_padding_leak):
    notes.append(
      'non-causal convolution: in WeNet, padding in a batch reaches valid '
      'frames'
    )
  floor = wenet_keys.MEL_FLOOR
  if (features.low_freq, features.mel_floor) != (wenet_keys.LOW_FREQ, floor):
    notes.append(
      f'WeNet has low_freq 20 and mel_floor 1.2e-7; this model was trained '
      f'with {features.low_freq:g} and {features.mel_floor:g}'
    )
  return notes
