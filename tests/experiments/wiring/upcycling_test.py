"""The script: a model directory in, a model directory and a receipt out."""

import contextlib
import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from experiments.wiring import preparing
from experiments.wiring import receipt
from experiments.wiring import upcycling
from tests.reference import tiny
from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import contents
from u2moe_jax.checkpoint import directory
from u2moe_jax.checkpoint import single
from u2moe_jax.checkpoint import store as store_lib
from u2moe_jax.interop import wenet
from u2moe_jax.models import u2
from u2moe_jax.sharding import compiled_report
from u2moe_jax.sharding import mesh as mesh_lib
from u2moe_jax.training import optimizer as optimizer_lib
from u2moe_jax.training import upcycling as upcycling_lib

_ROOT = pathlib.Path(__file__).parents[3]
_CONFIG = tiny.model_config(
  decoders=0, num_blocks=1, conv_norm='batch_norm', batch_norm_padding=True
)


@pytest.fixture(scope='module')
def dense(tmp_path_factory):
  """A dense model directory with a token table."""
  folder = tmp_path_factory.mktemp('dense')
  (folder / 'tokens').mkdir()
  (folder / 'tokens' / 'units.txt').write_text('<blank> 0\n')
  _, params, buffers = tiny.init(_CONFIG)
  directory.write(
    folder / 'model',
    directory.Description(
      _CONFIG, config_lib.FeatureConfig(num_mel_bins=tiny.BINS), {'step': 12}
    ),
    params,
    buffers,
    tokens=folder / 'tokens',
  )
  return folder / 'model'


_REQUEST = upcycling.Request(num_experts=4, top_k=2)


def test_a_directory_grows_and_shrinks(dense, tmp_path, capsys):
  out = tmp_path / 'moe'
  assert upcycling.upcycle(dense, out, _REQUEST, num_utterances=2)
  lines = capsys.readouterr().out.splitlines()
  record = json.loads(lines[-1])
  assert record['passed']
  assert record['exact']
  assert record['encoder_difference'] < 1e-5
  assert record['texts_equal'] == record['utterances'] == 2
  assert record['experts_visited'] == record['experts'] == 8
  assert record['parameters_after'] > record['active_parameters_after']
  assert record['bytes_after'] > 4 * record['parameters_after']
  assert any('(bound 1e-05)' in line for line in lines)
  found = directory.find(out)
  assert found.description.model.encoder.moe.num_experts == 4
  assert (found.tokens / 'units.txt').read_text() == '<blank> 0\n'
  story = found.description.provenance
  assert story['source_provenance'] == {'step': 12}
  assert story['upcycling']['top_k'] == 2
  assert story['source'] == str(dense)
  expected = upcycling_lib.upcycle(
    dict(
      zip(
        ('params', 'buffers'),
        directory.restore(directory.find(dense)),
        strict=True,
      )
    ),
    _CONFIG,
    found.description.model,
  )
  params, buffers = directory.restore(found)
  jax.tree.map(
    np.testing.assert_array_equal,
    {'params': params, 'buffers': buffers},
    expected,
  )
  assert sorted(path.name for path in tmp_path.iterdir()) == ['moe']
  # And back: the same weights, a receipt without bounds.
  assert upcycling.upcycle(out, tmp_path / 'back', None, num_utterances=2)
  lines = capsys.readouterr().out.splitlines()
  assert not json.loads(lines[-1])['exact']
  assert not any('bound' in line for line in lines)
  back = directory.find(tmp_path / 'back')
  assert back.description.model == _CONFIG
  jax.tree.map(
    np.testing.assert_array_equal,
    directory.restore(back),
    directory.restore(directory.find(dense)),
  )


def test_on_a_mesh_every_device_has_its_experts(dense, tmp_path, monkeypatch):
  """And the receipt asks the model where it lies, of utterances that it pads."""
  seen, run = [], receipt._pass

  def watched(model, params, *rest):
    kernel = params['encoder']['blocks']['ffn_final']['w_in']
    if isinstance(kernel, jax.Array):  # a dense layer has a tree here
      (shape,) = {shard.data.shape for shard in kernel.addressable_shards}
      seen.append((shape, dict(jax.sharding.get_abstract_mesh().shape)))
    return run(model, params, *rest)

  monkeypatch.setattr(receipt, '_pass', watched)
  out = tmp_path / 'moe'
  assert upcycling.upcycle(
    dense, out, _REQUEST, num_utterances=3, mesh='data=1,fsdp=2,expert=4'
  )
  whole = {'data': 1, 'fsdp': 2, 'expert': 4, 'tensor': 1}
  assert seen == [((1, 1, 8, 24), whole)]
  record = directory.describe(out).provenance['upcycling']
  assert record['utterances'] == record['texts_equal'] == 3
  assert record['experts_visited'] == 8


def test_no_experts_are_gathered():
  """The compiled receipt, and what it would be without the mesh in force."""
  model = config_lib.replace(_CONFIG, 'encoder.ffn_dim', 512)
  target = _REQUEST.config(model)
  mesh = mesh_lib.make_mesh(upcycling.parse_mesh('data=2,expert=4'))
  variables = upcycling._abstract(target, mesh)
  arguments = (
    variables['params'],
    variables['buffers'],
    jax.ShapeDtypeStruct((8, 64, tiny.BINS), np.float32),
    jax.ShapeDtypeStruct((8,), np.int32),
    jax.ShapeDtypeStruct((8, 4), np.int32),
  )

  def gathered(context):
    with context:
      lowered = receipt._pass.lower(u2.U2MoeModel(target), *arguments)
      text = lowered.compile().as_text()
    traffic = compiled_report.read(text).collectives
    return traffic['all-gather'].bytes if 'all-gather' in traffic else 0

  one_layer = 2 * 4 * 16 * 512 * 4  # two arrays, of 4 experts, in bytes
  assert gathered(jax.set_mesh(mesh)) < one_layer / 4
  assert gathered(contextlib.nullcontext()) > one_layer


def _step(dense, workdir, trainable=''):
  """A step of a training of the dense model, and its random moments."""
  params, buffers = directory.restore(directory.find(dense))
  optimizer = optimizer_lib.make_optimizer(
    config_lib.OptimizerConfig(), num_steps=9, trainable=trainable
  )
  rng = np.random.default_rng(0)

  def draw(leaf):
    if not leaf.ndim:
      return leaf + 7
    return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)

  opt_state = jax.tree.map(draw, optimizer.init(params))
  with contextlib.closing(store_lib.Store(workdir)) as store:
    store.save(
      7, params=params, buffers=buffers, opt_state=opt_state, progress={}
    )
  config = config_lib.to_dict(config_lib.Config(model=_CONFIG))
  preparing.write_json(workdir / 'config.json', config)
  is_adam = lambda node: hasattr(node, 'mu')
  nodes = jax.tree.leaves(opt_state, is_leaf=is_adam)
  (adam,) = filter(is_adam, nodes)
  return workdir / 'checkpoints' / '7', adam


def test_each_expert_gets_the_moments_of_the_dense_layer(dense, tmp_path):
  folder, adam = _step(dense, tmp_path / 'dense')
  out = tmp_path / 'moe'
  assert upcycling.upcycle(
    folder, out, _REQUEST, num_utterances=1, optimizer='spread'
  )
  found = directory.find(out)
  params, _ = directory.restore(found)
  moments = directory.restore_moments(
    found,
    store_lib.as_abstract(params),
    everywhere=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
  )
  assert moments['count'] == 7
  for name in ('mu', 'nu'):
    before = getattr(adam, name)['encoder']['blocks']
    after = moments[name]['encoder']['blocks']
    kernel = before['ffn_final']['w_in']['kernel']
    for expert in range(4):
      np.testing.assert_array_equal(
        after['ffn_final']['w_in'][:, expert], kernel
      )
    assert not after['ffn_final']['router']['kernel'].any()
    jax.tree.map(
      np.testing.assert_array_equal, after['attention'], before['attention']
    )


def test_moments_come_from_a_training_of_everything(dense, tmp_path):
  out = tmp_path / 'moe'
  with pytest.raises(ValueError, match='no optimizer state to spread; give a'):
    upcycling.upcycle(dense, out, _REQUEST, optimizer='spread')
  folder, _ = _step(dense, tmp_path / 'frozen', trainable='-feed_forward')
  with pytest.raises(ValueError, match='no moments of .*ffn.*did not train'):
    upcycling.upcycle(folder, out, _REQUEST, optimizer='spread')
  assert not out.exists()


def test_a_model_that_differs_is_not_written(
  dense, tmp_path, capsys, monkeypatch
):
  build = upcycling_lib.build

  def careless(*arguments):
    made = build(*arguments)
    layer = made['params']['encoder']['blocks']['ffn_final']
    layer['w_out'] = layer['w_out'].at[0, 1].multiply(1.01)
    return made

  monkeypatch.setattr(upcycling_lib, 'build', careless)
  out = tmp_path / 'moe'
  assert not upcycling.upcycle(dense, out, _REQUEST, num_utterances=2)
  assert not json.loads(capsys.readouterr().out.splitlines()[-1])['passed']
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(('passed', 'code'), [(True, 0), (False, 1)])
def test_the_exit_code_is_the_verdict(tmp_path, passed, code):
  program = (
    'from experiments import upcycle\n'
    'from experiments.wiring import command, upcycling\n'
    f'upcycling.upcycle = lambda *_, **__: {passed}\n'
    'command.run(upcycle.main)'
  )
  flags = [f'--checkpoint={tmp_path}', f'--out={tmp_path / "moe"}']
  run = [sys.executable, '-c', program, *flags]
  assert subprocess.run(run, cwd=_ROOT, check=False).returncode == code


def test_an_out_that_exists_is_left_alone(dense, tmp_path):
  (tmp_path / 'notes').write_text('mine')
  with pytest.raises(ValueError, match='exists already'):
    upcycling.upcycle(dense, tmp_path, _REQUEST)
  with pytest.raises(ValueError, match='exists already'):
    upcycling.upcycle(dense, dense, _REQUEST)
  with pytest.raises(ValueError, match='notes is a file, not a folder'):
    upcycling.upcycle(dense, tmp_path / 'notes' / 'moe', _REQUEST)
  assert (tmp_path / 'notes').read_text() == 'mine'


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'where': 'decoder'}, 'no decoder'),
    ({'top_k': 1}, 'no gradient'),
    ({'noise': 0.1, 'drop': 0.1}, 'exclude'),
  ],
)
def test_bad_requests_come_before_any_work(dense, tmp_path, changes, message):
  request = dataclasses.replace(_REQUEST, **changes)
  with pytest.raises(ValueError, match=message):
    upcycling.upcycle(dense, tmp_path / 'moe', request)
  with pytest.raises(ValueError, match='cannot be read.*axes: data'):
    upcycling.upcycle(dense, tmp_path / 'moe', _REQUEST, mesh='expert:4')
  assert not list(tmp_path.iterdir())


def test_a_model_too_large_for_the_machine_is_refused(dense, monkeypatch):
  monkeypatch.setattr(upcycling.os, 'sysconf', lambda name: 100)
  with pytest.raises(ValueError, match='GiB, and this machine has'):
    upcycling.upcycle(dense, dense.parent / 'moe', _REQUEST)


def test_one_array_at_a_time(dense):
  params, buffers = directory.restore(directory.find(dense))
  read = single.Reader(dense / 'params')
  path = 'params/encoder/blocks/ffn_final/w_in/kernel'
  expected = params['encoder']['blocks']['ffn_final']['w_in']['kernel']
  np.testing.assert_array_equal(read(path), expected)
  np.testing.assert_array_equal(
    read('buffers/conv_norm/mean'), buffers['conv_norm']['mean']
  )
  assert read.shapes[path] == expected.shape
  with pytest.raises(contents.CheckpointError, match="no array 'params/nope'"):
    read('params/nope')


def test_a_manifest_gives_its_first_usable_utterances(tmp_path):
  rng = np.random.default_rng(0)
  entries = [{'key': 'missing', 'wav': 'no.wav', 'txt': 'A'}]
  for name, seconds in (('short', 0.03), ('one', 0.5), ('two', 0.8), ('x', 1)):
    samples = 0.1 * rng.normal(size=int(16000 * seconds))
    soundfile.write(tmp_path / f'{name}.wav', samples, 16000)
    entries.append({'key': name, 'wav': f'{name}.wav', 'txt': 'A'})
  manifest = tmp_path / 'manifest.jsonl'
  manifest.write_text(''.join(json.dumps(each) + '\n' for each in entries))
  description = directory.Description(
    _CONFIG, config_lib.FeatureConfig(num_mel_bins=tiny.BINS)
  )
  probe = receipt.manifest_probe(str(manifest), description, num_utterances=2)
  assert probe.lengths.tolist() == [48, 78]
  assert probe.features.shape == (2, 78, tiny.BINS)
  assert not probe.features[0, 48:].any()
  manifest.write_text(json.dumps(entries[0]) + '\n')
  with pytest.raises(ValueError, match='no utterance has usable sound'):
    receipt.manifest_probe(str(manifest), description, num_utterances=2)


def test_wenet_has_no_such_models():
  config = tiny.model_config(tiny.moe(where='final'), decoders=0)
  features = config_lib.FeatureConfig(num_mel_bins=tiny.BINS)
  with pytest.raises(wenet.WenetError, match='encoder.moe.where=final'):
    wenet.to_yaml(config, features)
