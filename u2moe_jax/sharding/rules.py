"""The one table that maps logical axes to mesh axes."""

from collections.abc import Iterable

from u2moe_jax.sharding import axes

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

# An axis of size 1 splits nothing, so one table serves every mesh. Three axes
# split the batch: a device that holds a part of the parameters, or some of the
# experts, has utterances of its own.
STANDARD: Rules = (
  (axes.BATCH, ('data', 'fsdp', 'expert')),
  (axes.LENGTH, None),
  # The same width twice: `fsdp` splits it in parameters, which are gathered
  # before they are used, and never in activations.
  (axes.ACTIVATION_EMBED, None),
  (axes.EMBED, 'fsdp'),
  (axes.HEADS, 'tensor'),
  (axes.KV, None),
  (axes.MLP, 'tensor'),
  (axes.VOCAB, 'tensor'),
  (axes.EXPERT, 'expert'),
  # A device chooses among all experts for its own tokens.
  (axes.ROUTER, None),
  (axes.LAYERS, None),
  (axes.CONV, None),
  (axes.CONV_CHANNEL, None),
  (axes.SUBSAMPLING, 'tensor'),
  (axes.FEATURE, None),
)


def mesh_axes(
  rules: Iterable[tuple[str, str | tuple[str, ...] | None]], name: str
) -> tuple[str, ...]:
  """Axes of the mesh that split a logical axis; empty for none."""
  names = dict(rules)[name] or ()
  return (names,) if isinstance(names, str) else tuple(names)
