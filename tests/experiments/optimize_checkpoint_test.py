"""The inference form is for decoding: whatever else takes a model refuses it."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments.configs import finetune
from experiments.wiring import command
from experiments.wiring import starting
from experiments.wiring import upcycling
from tests.reference import tiny_recognizer
from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import directory
from u2moe_jax.checkpoint import optimized
from u2moe_jax.interop import wenet_directory

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """A folder with `trained` and its inference form, `fast`."""
  folder = tmp_path_factory.mktemp('models')
  config = tiny_recognizer.model_config()
  variables = jax.tree.map(
    lambda x: jnp.ones(x.shape, x.dtype), directory.abstract_variables(config)
  )
  features = config_lib.FeatureConfig(num_mel_bins=config.feature_dim)
  directory.write(
    folder / 'trained', directory.Description(config, features), **variables
  )
  optimized.optimize(folder / 'trained', folder / 'fast')
  return folder


def _start(path):
  config = config_lib.Config(
    train=config_lib.TrainConfig(init_from=str(path)),
    model=tiny_recognizer.model_config(),
  )
  starting.find_source(config, tokenizer=None)


_REFUSING = {
  'init_from': _start,
  'finetune': lambda path: finetune.get_config(str(path)),
  'upcycle': lambda path: upcycling.upcycle(path, path.parent / 'new', None),
  'export_wenet': lambda path: wenet_directory.export_model(
    path, path.parent / 'new'
  ),
  'optimize_checkpoint': lambda path: optimized.optimize(
    path, path.parent / 'new'
  ),
}


@pytest.mark.parametrize('name', _REFUSING)
def test_others_refuse_it(models, name):
  with pytest.raises(directory.CheckpointError) as caught:
    _REFUSING[name](models / 'fast')
  message = str(caught.value)
  assert message.startswith(str(models / 'fast'))
  assert 'inference form' in message
  assert 'take the one it was made from' in message
  assert '\n' not in message
  assert not (models / 'new').exists()


def _run(*args):
  """Runs the script as a user does."""
  return subprocess.run(
    [sys.executable, '-m', 'experiments.optimize_checkpoint', *map(str, args)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )


def test_script_writes_a_model(models, tmp_path):
  out = tmp_path / 'int8'
  done = _run(
    f'--checkpoint={models / "trained"}', f'--out={out}', '--weights=int8'
  )
  assert done.returncode == command.OK, done.stderr
  assert done.stdout.startswith(f'wrote {out} (int8, ')
  assert directory.find(out, for_decoding=True).params.is_dir()


def test_other_folders_are_left_alone(models, tmp_path):
  (tmp_path / 'mine.txt').write_text('x')
  with pytest.raises(directory.CheckpointError, match='left alone'):
    optimized.optimize(models / 'trained', tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ['mine.txt']
