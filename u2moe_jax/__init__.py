"""U2++ Mixture-of-Experts speech recognition in JAX and Flax.

Importing the package itself is cheap: it imports nothing and wakes no device.
Entry points:

* `u2moe_jax.decoding.recognizer.Recognizer`: from sound to words;
* `u2moe_jax.models.u2.U2MoeModel`: the model, a Flax Linen module;
* `u2moe_jax.training.step.make_train_step`: the jitted, sharded train step.
"""

__version__ = '0.1.0'
