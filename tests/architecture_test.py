"""The floors of the house: imports run downhill, and importing is cheap."""

import pathlib
import re
import subprocess
import sys

from importlinter import cli
import pytest

ROOT = pathlib.Path(__file__).parents[1]


def _lint(config: pathlib.Path) -> int:
  return cli.lint_imports(
    config_filename=str(config), no_cache=True, is_debug_mode=False
  )


def test_floors_hold(monkeypatch):
  monkeypatch.chdir(ROOT)
  assert _lint(ROOT / 'pyproject.toml') == 0


def test_a_climbing_import_is_caught(tmp_path, monkeypatch, capsys):
  for package in ('u2moe_jax', 'data_pipelines', 'experiments'):
    for source in (ROOT / package).rglob('*.py'):
      target = tmp_path / source.relative_to(ROOT)
      target.parent.mkdir(parents=True, exist_ok=True)
      target.write_text(source.read_text())
  climber = tmp_path / 'u2moe_jax/layers/climber.py'
  climber.write_text('from u2moe_jax import training\n')
  config = (ROOT / 'pyproject.toml').read_text()
  (tmp_path / 'pyproject.toml').write_text(config)
  lint = (
    'from importlinter import cli; import sys; sys.exit(cli.lint_imports())'
  )
  result = subprocess.run(
    [sys.executable, '-c', lint], cwd=tmp_path, capture_output=True, text=True
  )
  assert result.returncode != 0
  assert 'u2moe_jax.layers.climber' in result.stdout


def test_importing_wakes_no_device():
  modules = sorted(
    '.'.join(p.relative_to(ROOT).with_suffix('').parts).removesuffix(
      '.__init__'
    )
    for package in ('u2moe_jax', 'data_pipelines')
    for p in (ROOT / package).rglob('*.py')
  )
  code = (
    f'import importlib\nfor m in {modules!r}: importlib.import_module(m)\n'
    'import sys\nfrom jax._src import xla_bridge\n'
    'assert not xla_bridge._backends, xla_bridge._backends\n'
    "heavy = {'tensorflow', 'torch', 'matplotlib'} & set(sys.modules)\n"
    'assert not heavy, heavy\n'
  )
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_importing_the_package_imports_nothing_else():
  code = (
    'import sys; before = set(sys.modules); import u2moe_jax\n'
    "new = set(sys.modules) - before - {'u2moe_jax'}\nassert not new, new"
  )
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


@pytest.mark.parametrize('name', ['utils', 'common', 'misc'])
def test_no_package_without_a_subject(name):
  pattern = re.compile(rf'(^|/){name}(\.py)?$')
  found = [p for p in ROOT.glob('[ude]*/**/*') if pattern.search(p.as_posix())]
  assert not found
