"""Writes stored golden cases as folders, in the form they came in."""

import json
import pathlib

import numpy as np
import soundfile

from tests.reference import golden

_TESTDATA = pathlib.Path(__file__).parents[1] / 'testdata'
_STATISTICS = {'bn_after_mean': 'running_mean', 'bn_after_var': 'running_var'}


def write_model(folder, name: str):
  """A case with weights: encoder, and what else is stored of it."""
  case = golden.load(name)
  arrays = dict(case.arrays)
  for stacked, field in _STATISTICS.items():
    for block, values in enumerate(arrays.pop(stacked, ())):
      layer = f'encoder.encoders.{block}.conv_module.norm'
      # In testdata stacked over the blocks; the folder has an entry for each.
      arrays[f'bn_after.{layer}.{field}'] = values
  if len(arrays['feats']) == 1:  # stored with its second utterance only
    arrays = {k.replace('_utt1', '_utt0'): a for k, a in arrays.items()}
  parts = ('loss', 'grad_norm', 'grad_norm_total', 'bn_train_mode')
  results = {k: case.results[k] for k in parts if k in case.results}
  search = _TESTDATA / f'golden_{name}_search.json'
  if search.exists():
    results['search'] = json.loads(search.read_text())
  config = {
    'wenet_config': case.config,
    'sos': case.sos,
    'eos': case.eos,
    'n_params': case.num_params,
    'names': sorted(case.weights),
  }
  return write(folder, arrays, results, config, case.weights)


def write_units(folder):
  """The case without a model."""
  return write(folder, *golden.units())


def write_search(folder, *, beams):
  """Searches in given posteriors, with and without hotwords."""
  with np.load(_TESTDATA / 'search_golden.npz') as file:
    arrays = dict(file)
  plain = json.loads((_TESTDATA / 'search_golden.json').read_text())
  del plain['rescoring']
  context = (_TESTDATA / 'search_context_golden.json').read_text()
  results = plain | json.loads(context)
  unwanted = {1, 3, 10} - set(beams)
  for key in list(results):
    # A dot behind, or beam1 would also be beam10.
    if any(f'.beam{beam}.' in f'{key}.' for beam in unwanted):
      del results[key]
  return write(folder, arrays, results)


def write_fbank(folder):
  """A recording and its filterbank."""
  folder.mkdir(parents=True)
  with np.load(_TESTDATA / 'fbank_golden.npz') as file:
    samples, frames = file['samples'], file['frames']
  soundfile.write(folder / 'a-1.wav', samples, 16000, subtype='PCM_16')
  np.savez(folder / 'fbank.npz', **{'a-1': frames})
  info = {'a-1': {'samples': len(samples), 'frames': len(frames)}}
  (folder / 'info.json').write_text(json.dumps(info))
  return folder


def write(folder, arrays, results, config=None, weights=None):
  """A folder of the golden form."""
  folder.mkdir(parents=True)
  np.savez(folder / 'io.npz', **arrays)
  (folder / 'results.json').write_text(json.dumps(results))
  if config is not None:
    (folder / 'config.json').write_text(json.dumps(config))
  if weights is not None:
    np.savez(folder / 'weights.npz', **weights)
  return folder
