"""WeNet checkpoints in and out: every bit returns, and what comes in works."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import yaml as pyyaml

from experiments.configs import finetune
from experiments.wiring import command
from experiments.wiring import upcycling
from tests.reference import golden
from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import directory
from u2moe_jax.decoding import batching
from u2moe_jax.decoding import recognizer as recognizer_lib
from u2moe_jax.frontend import cmvn
from u2moe_jax.interop import torch_archive
from u2moe_jax.interop import wenet
from u2moe_jax.interop import wenet_directory

_ROOT = pathlib.Path(__file__).parents[2]
_WHOLE = golden.load('u2pp_dense_noncausal_bn')
_CTC = golden.load('enc_conv2d6')
_UNITS = ['<blank>', '<unk>', '<sos/eos>', '▁', *map(chr, range(65, 101))]


@dataclasses.dataclass
class _Files:
  """A checkpoint as WeNet leaves it."""

  folder: pathlib.Path
  state: dict[str, np.ndarray]
  yaml: dict

  def write(self, **changes):
    """Writes everything; returns the arguments of an import."""
    weights, config = self.folder / 'final.pt', self.folder / 'train.yaml'
    torch_archive.save(weights, self.state)
    config.write_text(pyyaml.safe_dump(self.yaml))
    units = self.folder / 'units.txt'
    lines = [f'{token} {i}\n' for i, token in enumerate(_UNITS)]
    units.write_text(''.join(lines), encoding='utf-8')
    arguments = {'weights': weights, 'config': config, 'units': units}
    return arguments | changes

  def run(self, out='model', **changes):
    """Imports; returns the notes."""
    arguments = self.write(**changes)
    return wenet_directory.import_model(out=self.folder / out, **arguments)


def _files(case, tmp_path):
  return _Files(tmp_path, dict(case.weights), json.loads(_dump(case.config)))


def _dump(config):
  return json.dumps(config, default=dict)


@pytest.fixture
def whole(tmp_path):
  return _files(_WHOLE, tmp_path)


@pytest.fixture
def ctc(tmp_path):
  return _files(_CTC, tmp_path)


def _assert_same_bits(actual, expected):
  assert set(actual) == set(expected)
  for name, array in expected.items():
    assert actual[name].dtype == array.dtype, name
    assert actual[name].shape == array.shape, name
    assert actual[name].tobytes() == array.tobytes(), name


def test_import_then_export_returns_every_bit(whole, tmp_path):
  position = 'encoder.embed.pos_enc.pe'
  counter = 'encoder.encoders.0.conv_module.norm.num_batches_tracked'
  whole.state[position] = np.linspace(0, 1, 96, dtype='f4').reshape(1, 2, 48)
  whole.state[counter] = np.array(7)
  whole.yaml['optim_conf'] = {'lr': 0.002}
  notes = whole.run()
  assert 'blank 0, sos 2, eos 2' in notes[0]
  wenet_directory.export_model(tmp_path / 'model', tmp_path / 'out')
  for name in ('weights.npz', 'final.pt'):
    found = wenet_directory.read_weights(tmp_path / 'out' / name)
    _assert_same_bits(found, whole.state)
  again = pyyaml.safe_load((tmp_path / 'out' / 'train.yaml').read_text())
  assert wenet.model_config(again) == wenet.model_config(whole.yaml)
  assert again['optim_conf'] == {'lr': 0.002}
  # What was there before is still there, and means the same.
  assert again['encoder_conf'].items() >= whole.yaml['encoder_conf'].items()
  units = (tmp_path / 'units.txt').read_bytes()
  assert (tmp_path / 'out' / 'units.txt').read_bytes() == units
  stats = cmvn.load(tmp_path / 'out' / 'global_cmvn')
  for part in ('mean', 'istd'):
    np.testing.assert_array_equal(
      getattr(stats, part).astype(np.float32),
      whole.state[f'encoder.global_cmvn.{part}'],
    )
  # Negative control: one flipped bit is seen.
  name = 'ctc.ctc_lo.bias'
  flipped = dict(whole.state)
  flipped[name] = np.nextafter(flipped[name], np.float32(9))
  with pytest.raises(AssertionError, match=name):
    _assert_same_bits(found, flipped)


def test_an_imported_model_decodes(ctc, tmp_path):
  notes = ctc.run()
  assert any('CTC only' in note for note in notes)
  config = config_lib.DecodeConfig(mode='ctc_greedy_search')
  recognizer = recognizer_lib.Recognizer.from_checkpoint(
    tmp_path / 'model', config=config
  )
  # The reference's encoder output says what comes out.
  arrays = _CTC.arrays
  weight, bias = (ctc.state[f'ctc.ctc_lo.{p}'] for p in ('weight', 'bias'))
  best_path = (arrays['encoder_out_full'] @ weight.T + bias).argmax(axis=-1)
  batch = batching.PaddedBatch((0, 1), arrays['feats'], arrays['feats_lengths'])
  for row, transcript in enumerate(recognizer.search(batch)):
    length = arrays['encoder_mask'][row, 0].sum()
    best = best_path[row, :length]
    runs = best[np.flatnonzero(np.diff(best, prepend=-1))]
    assert transcript.tokens == tuple(i for i in runs if i != 0)
    spoken = [_UNITS[i] for i in transcript.tokens if i > 2]
    text = transcript.text.replace('⁇', '').replace(' ', '')
    assert text == ''.join(spoken).replace('▁', '')
  rng = np.random.default_rng(0)
  sound = 0.1 * rng.normal(size=8000).astype(np.float32)
  assert recognizer.transcribe(sound, sample_rate=16000).tokens


def test_without_units_decoding_prints_ids(ctc, tmp_path):
  notes = ctc.run(units=None)
  assert any('ids' in note for note in notes)
  found = directory.find(tmp_path / 'model')
  assert found.tokens is None


def test_an_import_fills_a_training_state(whole, tmp_path):
  """What train.init_from does: restores into the shapes of an experiment."""
  whole.run()
  model = str(tmp_path / 'model')
  tree = finetune.get_config(model).to_dict()
  config = config_lib.from_dict(config_lib.Config, tree)
  assert config.train.init_from == model
  assert pathlib.Path(config.data.tokens, 'units.txt').is_file()
  assert not config.model.encoder.conv_padding_leak
  target = directory.abstract_variables(config.model)
  params, buffers = directory.restore(directory.find(model), target)
  state = wenet.state_dict(params, buffers, config.model)
  trained = {k: v for k, v in whole.state.items() if v.dtype == np.float32}
  _assert_same_bits(state, trained)


@pytest.mark.parametrize(('where', 'top_k'), [('all', 2), ('decoder', 4)])
def test_an_import_grows(whole, tmp_path, where, top_k):
  """With both decoders, and a receipt within its bounds."""
  whole.run()
  request = upcycling.Request(num_experts=4, top_k=top_k, where=where)
  model, out = tmp_path / 'model', tmp_path / 'moe'
  assert upcycling.upcycle(model, out, request, num_utterances=2)
  found = directory.describe(out)
  receipt = found.provenance['upcycling']
  assert receipt['exact']
  assert receipt['texts_equal'] == 2
  # Random weights say something; equal empty texts would be no receipt.
  assert receipt['text_tokens'] > 0
  parts = {name.split('.')[0] for name in found.model.expert_blocks}
  decoders = {'forward_decoder', 'backward_decoder'}
  assert parts == decoders | ({'encoder'} if where == 'all' else set())


def test_what_the_reference_gets_wrong_is_a_flag(whole, tmp_path):
  whole.run(reference_quirks=True)
  encoder = directory.describe(tmp_path / 'model').model.encoder
  assert encoder.conv_padding_leak
  assert encoder.batch_norm_padding


def test_a_config_json_may_nest_the_yaml(whole, tmp_path):
  del whole.yaml['tokenizer_conf']
  config = tmp_path / 'config.json'
  tree = {'wenet_config': whole.yaml, 'sos': 5, 'eos': 6, 'blank': 0}
  config.write_text(json.dumps(tree))
  arguments = whole.write(config=config)
  wenet_directory.import_model(out=tmp_path / 'model', **arguments)
  model = directory.describe(tmp_path / 'model').model
  assert (model.sos, model.eos, model.blank_id) == (5, 6, 0)
  config.write_text(json.dumps(tree | {'blank': 3}))
  with pytest.raises(wenet.WenetError, match='blank is 3'):
    wenet_directory.import_model(out=tmp_path / 'other', **arguments)


def test_units_give_the_size_and_the_blank(ctc, tmp_path):
  del ctc.yaml['output_dim'], ctc.yaml['ctc_conf']
  ctc.run()
  model = directory.describe(tmp_path / 'model').model
  assert (model.vocab_size, model.blank_id) == (40, 0)


def test_cmvn_comes_from_the_weights_or_a_file(ctc, tmp_path):
  name = 'encoder.global_cmvn.'
  mean, istd = ctc.state.pop(f'{name}mean'), ctc.state.pop(f'{name}istd')
  with pytest.raises(wenet.WenetError, match='give --cmvn'):
    ctc.run()
  file = tmp_path / 'global_cmvn'
  squares = istd.astype(float) ** -2 + mean.astype(float) ** 2
  cmvn.save(file, cmvn.CmvnStats(100.0 * mean, 100.0 * squares, 100))
  ctc.run(cmvn=file)
  _, buffers = directory.restore(directory.find(tmp_path / 'model'))
  np.testing.assert_allclose(buffers['cmvn']['mean'], mean, rtol=1e-6)
  np.testing.assert_allclose(buffers['cmvn']['istd'], istd, rtol=1e-6)
  # Without any in the yaml, none is right, and none comes out again.
  ctc.yaml['cmvn'] = None
  ctc.run()
  wenet_directory.export_model(tmp_path / 'model', tmp_path / 'out')
  _assert_same_bits(
    wenet_directory.read_weights(tmp_path / 'out' / 'final.pt'), ctc.state
  )
  assert not (tmp_path / 'out' / 'global_cmvn').exists()


def test_a_right_decoder_without_layers_is_kept_aside(whole, tmp_path):
  whole.yaml['decoder_conf']['r_num_blocks'] = 0
  whole.yaml['model_conf']['reverse_weight'] = 0.0
  whole.state = {
    k: v for k, v in whole.state.items() if 'right_decoder.decoders' not in k
  }
  whole.run()
  model = directory.describe(tmp_path / 'model').model
  assert (model.decoder.num_blocks, model.decoder.num_reverse_blocks) == (1, 0)
  wenet_directory.export_model(tmp_path / 'model', tmp_path / 'out')
  found = wenet_directory.read_weights(tmp_path / 'out' / 'weights.npz')
  _assert_same_bits(found, whole.state)
  again = pyyaml.safe_load((tmp_path / 'out' / 'train.yaml').read_text())
  assert again['decoder'] == 'bitransformer'
  # A fine-tuned or averaged descendant knows nothing of it.
  params, buffers = directory.restore(directory.find(tmp_path / 'model'))
  directory.write(
    tmp_path / 'b', directory.describe(tmp_path / 'model'), params, buffers
  )
  wenet_directory.export_model(tmp_path / 'b', tmp_path / 'out')
  found = wenet_directory.read_weights(tmp_path / 'out' / 'weights.npz')
  assert 'decoder.embed.0.weight' in found
  assert not any('right_decoder' in name for name in found)


def test_pieces_need_their_model(ctc, tmp_path):
  ctc.yaml['tokenizer'] = 'bpe'
  notes = ctc.run()
  assert any('--bpe_model' in note for note in notes)
  broken = tmp_path / 'bpe.model'
  broken.write_bytes(b'no model')
  with pytest.raises(wenet.WenetError, match=r'bpe\.model'):
    ctc.run(bpe_model=broken)
  with pytest.raises(wenet.WenetError, match='--bpe_model needs --units'):
    ctc.run(bpe_model=broken, units=None)
  ctc.yaml['tokenizer'] = 'whisper'
  with pytest.raises(wenet.WenetError, match='whisper'):
    ctc.run()


def _drop_a_weight(files):
  del files.state['encoder.after_norm.bias']


def _add_a_weight(files):
  files.state['encoder.adapter.weight'] = np.zeros(3, np.float32)


def _unknown_key(files):
  files.yaml['encoder_conf']['adapter'] = True


def _other_vocabulary(files):
  files.yaml['output_dim'] = 41


@pytest.mark.parametrize(
  ('spoil', 'words'),
  [
    (_drop_a_weight, ['final.pt', "no entry 'encoder.after_norm.bias'"]),
    (_add_a_weight, ['final.pt', 'encoder.adapter.weight']),
    (_unknown_key, ['train.yaml', 'encoder_conf.adapter']),
    (_other_vocabulary, ['units.txt', '40', '41']),
  ],
)
def test_what_does_not_fit_leaves_nothing(ctc, tmp_path, spoil, words):
  spoil(ctc)
  with pytest.raises(wenet.WenetError) as caught:
    ctc.run()
  assert all(word in str(caught.value) for word in words), caught.value
  assert not (tmp_path / 'model').exists()
  assert not list(tmp_path.glob('*.unfinished'))


@pytest.mark.parametrize('text', ['a: [', '- 1', '!!python/object:os.x {}'])
def test_a_config_that_cannot_be_read_is_named(ctc, tmp_path, text):
  arguments = ctc.write()
  arguments['config'].write_text(text)
  with pytest.raises(wenet.WenetError, match=r'train\.yaml'):
    wenet_directory.import_model(out=tmp_path / 'model', **arguments)


def test_other_folders_are_not_replaced(ctc, tmp_path):
  (tmp_path / 'model').mkdir()
  (tmp_path / 'model' / 'thesis.tex').write_text('precious')
  with pytest.raises(wenet.WenetError, match='choose another --out'):
    ctc.run()
  ctc.run('second')
  ctc.run('second')  # its own kind may be
  with pytest.raises(wenet.WenetError, match='choose another --out'):
    wenet_directory.export_model(tmp_path / 'second', tmp_path / 'model')
  assert (tmp_path / 'model' / 'thesis.tex').read_text() == 'precious'


def _run(script, **arguments):
  flags = [f'--{key}={value}' for key, value in arguments.items()]
  result = subprocess.run(
    [sys.executable, '-m', f'experiments.{script}', *flags],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  return result.returncode, result.stdout, result.stderr.splitlines()


def test_the_scripts(ctc, tmp_path):
  arguments = ctc.write()
  code, out, errors = _run('import_wenet', out=tmp_path / 'model', **arguments)
  assert code == command.OK, errors
  assert 'CMVN: from the weights' in out
  code, out, errors = _run(
    'export_wenet', checkpoint=tmp_path / 'model', out=tmp_path / 'out'
  )
  assert code == command.OK, errors
  assert f'{len(ctc.state)} entries' in out
