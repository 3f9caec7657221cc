r"""Grows a trained dense model into a Mixture-of-Experts, or back.

  python -m experiments.upcycle --checkpoint=DENSE --out=MODEL \
    --num_experts=8 --top_k=2 --where=encoder
  python -m experiments.upcycle --checkpoint=MOE --out=MODEL --to_dense=average

Both models then recognise a few utterances; what differs is printed, and the
last line is one JSON object. docs/upcycling.md tells how to train on.
"""

import typing
from typing import Literal

from absl import flags

from experiments.wiring import command
from u2moe_jax import config as config_lib

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint',
  None,
  'Model folder, work directory, or one of its steps.',
  required=True,
)
_OUT = flags.DEFINE_string('out', None, 'Model folder to write.', required=True)
_NUM_EXPERTS = flags.DEFINE_integer('num_experts', 8, 'Experts per layer.')
_TOP_K = flags.DEFINE_integer('top_k', 2, 'Experts per frame.')
_WHERE = flags.DEFINE_string(
  'where',
  'all',
  'Layers that get experts: all, encoder, decoder, final_ffn, every:2, a comma '
  'list such as encoder.6-11.final,decoder.0, or a pattern: encoder.*.final.',
)
_ROUTER_TYPE = flags.DEFINE_enum(
  'router_type',
  'topk_softmax',
  ['topk_softmax', 'softmax_topk'],
  'Weights of the kept experts; softmax_topk preserves less.',
)
_NOISE = flags.DEFINE_float(
  'noise', 0.0, 'Noise on the experts, as a share of their deviation.'
)
_DROP = flags.DEFINE_float(
  'drop', 0.0, "Share of each expert's hidden units that are drawn anew."
)
_SEED = flags.DEFINE_integer(
  'seed', 0, 'Of routers, noise and drawn units.', lower_bound=0
)
_OPTIMIZER = flags.DEFINE_enum(
  'optimizer',
  'fresh',
  ['fresh', 'spread'],
  "Spread gives each expert Adam's moments of the dense layer; it takes a step "
  'of a training, WORKDIR/checkpoints/STEP.',
)
_TO_DENSE = flags.DEFINE_enum(
  'to_dense', None, ['average'], 'The way back: one layer from all experts.'
)
_MANIFEST = flags.DEFINE_string(
  'manifest', None, 'Sound for the receipt; without it, random features.'
)
_NUM_UTTERANCES = flags.DEFINE_integer(
  'num_utterances', 4, 'Utterances of the receipt.', lower_bound=1
)
_MESH = flags.DEFINE_string(
  'mesh', None, 'Devices to spread the model over, such as data=1,expert=4.'
)

_OF_GROWING = (
  'num_experts',
  'top_k',
  'where',
  'router_type',
  'noise',
  'drop',
  'seed',
  'optimizer',
)


def main(_: list[str]) -> int:
  """Grows or shrinks; exit codes in docs/exit_codes.md."""
  from experiments.wiring import upcycling

  if _TO_DENSE.value:
    for name in _OF_GROWING:
      # `present`: given on the command line. A default contradicts nothing.
      if flags.FLAGS[name].present:
        raise ValueError(f'--{name} has no meaning with --to_dense')
    request = None
  else:
    request = upcycling.Request(
      num_experts=_NUM_EXPERTS.value,
      top_k=_TOP_K.value,
      where=_WHERE.value,
      router_type=typing.cast(config_lib.RouterType, _ROUTER_TYPE.value),
      noise=_NOISE.value,
      drop=_DROP.value,
      seed=_SEED.value,
    )
  passed = upcycling.upcycle(
    _CHECKPOINT.value,
    _OUT.value,
    request,
    manifest=_MANIFEST.value,
    num_utterances=_NUM_UTTERANCES.value,
    mesh=_MESH.value,
    optimizer=typing.cast(Literal['fresh', 'spread'], _OPTIMIZER.value),
  )
  # A receipt beyond its bounds: nothing was written.
  return command.OK if passed else command.FAILED


if __name__ == '__main__':
  command.run(main)
