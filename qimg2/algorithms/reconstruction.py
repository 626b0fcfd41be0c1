"""VAE training by reconstruction.

  loss = l1_weight · mean |x - y| + l2_weight · mean (x - y)² + kl_weight · KL(q(z|x) || N(0, 1)) / dimensions,   y = decode(z)

with z the posterior's mode, or a draw from it when kl_weight > 0.

The VAE-2.0 report (arXiv 2605.13565, section 4) trains with L1, a perceptual and an alignment term, no KL and no adversary. Left out here: the
perceptual and the alignment term. After the last step the mean and deviation of each latent channel are measured on the evaluation data and
stored with the weights: the generator works on latents normalised by them.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from qimg2.algorithms import Algorithm, Average, Role, Update
from qimg2.sharding import to_host

MIN_STD = 1e-3


def reconstruction(l1_weight: float = 1.0, l2_weight: float = 0.0, kl_weight: float = 0.0, ema_decay: float = 0.0) -> Algorithm:
  """The algorithm that trains role "vae".

  Args:
    l1_weight, l2_weight: weights of the absolute and of the squared error per value; a small network learns faster from the latter.
    kl_weight: weight of the KL term per latent value; 0 trains a plain autoencoder.
    ema_decay: decay per step of the averaged weights "ema"; 0 keeps none.
  """
  def loss(trained, params, nets, batch, key):
    output, original, posterior = nets.autoencode(trained["vae"], _pixels(batch), key if kl_weight else None)
    per_example = lambda x: jnp.mean(x, axis=(1, 2, 3))
    l1, l2 = per_example(jnp.abs(output - original)), per_example(jnp.square(output - original))
    total = l1_weight * l1 + l2_weight * l2
    if kl_weight:
      total += kl_weight * posterior.kl() / posterior.mean[0].size
    return total, {"l1": l1, "l2": l2}

  def validation(params, nets, batch, key):
    del key
    output, original, _ = nets.autoencode(params["vae"], _pixels(batch))
    l1 = jnp.mean(jnp.abs(output - original), axis=(1, 2, 3))
    mse = jnp.mean(jnp.square(jnp.clip(output, -1, 1) - original), axis=(1, 2, 3))
    psnr = 10 * jnp.log10(4 / jnp.maximum(mse, 1e-10))  # the range [-1, 1] has a peak of 2
    return {"loss": l1, "psnr_db": psnr}, jnp.zeros(l1.shape, jnp.int32)

  averages = {"ema": Average("vae", ema_decay)} if ema_decay else {}
  return Algorithm({"vae": Role("vae")}, (Update(("vae",), loss),), averages, validation=validation, finalize=measure_statistics,
                   deploy=lambda weights: {"vae": weights["ema" if "ema" in weights else "vae"]})


def _pixels(batch: dict):
  if "target" not in batch:
    raise ValueError("A batch of a latent cache has no pixels to train a VAE on: name the data set that the cache was made from in the mixture.")
  return batch["target"]


def measure_statistics(params: dict, nets, batches: Iterable[dict]) -> dict:
  """`params` with the measured mean and standard deviation of each latent channel in params["vae"]["statistics"]."""
  @jax.jit
  def sums(weights, batch):
    z = nets.autoencode(weights, _pixels(batch))[2].mode
    row = batch["weight"][:, None, None, None] * jnp.ones_like(z[..., :1])
    return jnp.sum(row), jnp.sum(row * z, axis=(0, 1, 2)), jnp.sum(row * jnp.square(z), axis=(0, 1, 2))

  totals = [jax.tree.map(lambda x: np.asarray(x, np.float64), to_host(sums(params["vae"], batch))) for batch in batches]
  number, first, second = (sum(parts) for parts in zip(*totals))
  mean = first / number
  std = np.sqrt(np.maximum(second / number - mean**2, MIN_STD**2))
  old = params["vae"]["statistics"]
  measured = {name: jax.device_put(np.asarray(x, np.float32), old[name].sharding) for name, x in (("mean", mean), ("std", std))}
  return {**params, "vae": {**params["vae"], "statistics": measured}}
