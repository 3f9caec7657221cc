r"""Turns a WeNet checkpoint into a model directory.

  python -m experiments.import_wenet --weights=final.pt --config=train.yaml \
    --units=units.txt --out=MODEL

decode, stream, train (--config.train.init_from) and the others take MODEL.
Nothing of a hostile .pt is executed; PyTorch is not needed.
"""

from absl import flags

from experiments.wiring import command

_WEIGHTS = flags.DEFINE_string(
  'weights', None, 'State dict: final.pt (zip form) or .npz.', required=True
)
_CONFIG = flags.DEFINE_string(
  'config',
  None,
  'train.yaml; or config.json, which may nest it under wenet_config.',
  required=True,
)
_UNITS = flags.DEFINE_string(
  'units', None, 'units.txt; without it decoding prints ids.'
)
_BPE_MODEL = flags.DEFINE_string(
  'bpe_model', None, 'Sentencepiece model, for `tokenizer: bpe`.'
)
_CMVN = flags.DEFINE_string(
  'cmvn', None, 'global_cmvn (JSON or Kaldi text), if the weights hold none.'
)
_QUIRKS = flags.DEFINE_bool(
  'reference_quirks',
  False,
  'Reproduce what WeNet gets wrong: padding that reaches valid frames through '
  'a non-causal convolution, padding in batch-norm training statistics.',
)
_OUT = flags.DEFINE_string('out', None, 'Model folder to write.', required=True)


def main(_: list[str]) -> int:
  """Imports; exit codes in docs/exit_codes.md."""
  from u2moe_jax.interop import wenet_directory

  notes = wenet_directory.import_model(
    _WEIGHTS.value,
    _CONFIG.value,
    _OUT.value,
    units=_UNITS.value,
    bpe_model=_BPE_MODEL.value,
    cmvn=_CMVN.value,
    reference_quirks=_QUIRKS.value,
  )
  print('\n'.join(notes))
  return command.OK


if __name__ == '__main__':
  command.run(main)
