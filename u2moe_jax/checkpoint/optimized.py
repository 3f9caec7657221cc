"""From a model directory to one in the inference form."""

import dataclasses
import pathlib

from u2moe_jax.checkpoint import contents
from u2moe_jax.checkpoint import directory
from u2moe_jax.checkpoint import single
from u2moe_jax.models import inference


def optimize(
  checkpoint: directory.Path,
  out: directory.Path,
  *,
  weights: inference.Weights = 'float32',
) -> directory.Found:
  """Writes the inference form of a model.

  Arrays are read, converted and written one by one: what is in memory is the
  largest of them (all experts of one layer kind) and what becomes of it.

  Args:
    checkpoint: a model directory, a work directory or one of its steps.
    out: the model directory to write.
    weights: what parameters are stored as.

  Returns:
    What was written.

  Raises:
    directory.CheckpointError: if there is no checkpoint, if it cannot be read,
      or if `out` holds something else or the checkpoint itself.
  """
  directory.require_replaceable(out)
  found = directory.find(checkpoint)
  if pathlib.Path(out).resolve() == found.params.parent.resolve():
    raise directory.CheckpointError(
      f'{out}: is the checkpoint itself, which could be trained no longer; '
      'choose another place'
    )
  model = found.description.model
  # Before anything is written: conversion reads array by array.
  contents.require_fit(found.params, directory.abstract_variables(model))
  reader = single.Reader(found.params)
  description = dataclasses.replace(
    found.description,
    model=inference.model_config(model, weights),
    provenance=directory.provenance(
      weights=weights,
      made_from=found.choice,
      of_source=dict(found.description.provenance),
    ),
  )
  directory.write_inference(
    out,
    description,
    inference.convert(model, reader, weights=weights),
    tokens=found.tokens,
  )
  return directory.find(out, for_decoding=True)
