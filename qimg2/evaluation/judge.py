"""A vision-language model as a judge: how probable each of a few answers is, by one forward pass and no generated text.

The judge reads a chat with pictures that ends where its reply begins. From the logits z of the next token at the answers' tokens alone,

  p(c) = sum over tokens v of choice c of exp(z_v)  /  sum over tokens v of all choices of exp(z_v)                           (1)
  R = sum over c of value(c) p(c)                                                                                            (2)

(1) adds up the ways to write a choice ("Yes", "yes", " Yes"), and forgets what else the model might have said. (2) is the expected score: smooth,
and without replies that cannot be read. Both are functions of weights, pixels and token ids to be called inside `jax.jit`: a frozen role of a method
can give rewards with them. No gradient is stopped here.

Left out: the probability that the reply is none of the choices, which needs the product with the whole vocabulary; replies that reason before they
answer.

Sources: expected value over score tokens, G-Eval (arXiv 2303.16634), Q-Align (arXiv 2312.17090); yes and no, VQAScore (arXiv 2404.01291). Letters: B
batch, M prompt tokens, n answer tokens, C choices.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qimg2.models import qwen3_vl
from qimg2.sharding import Shard, identity

NO_CHOICE = -1  # of a token that is no answer to a row's question


def answer_logits(cfg: qwen3_vl.Config, params: dict, tokens: jax.Array, token_count: jax.Array, images: Sequence[jax.Array], answers: jax.Array,
                  shard: Shard = identity) -> jax.Array:
  """Logits [B, n] float32 that a row's reply begins with each of `answers`.

  Args:
    cfg: sizes of the judge.
    params: its weights, as `qwen3_vl.specs(cfg)`, with the head.
    tokens: int32 [B, M] ids of chats up to where the reply begins, padded on the right with any id.
    token_count: int32 [B], true lengths.
    images: one uint8 [B, h, w, 3] per picture of a chat, in its order; sides are multiples of `cfg.vision.token_px`.
    answers: int32 [n] ids, the same for all rows.
    shard: constrains activations to the layout of their logical axes.

  Raises:
    ValueError: as `qwen3_vl.apply`.
  """
  state = qwen3_vl.apply(cfg, params, tokens, token_count, images, shard)
  return qwen3_vl.answer_logits(cfg, params, state, token_count, answers)


def choice_probabilities(logits: jax.Array, choices: jax.Array, num_choices: int) -> jax.Array:
  """Probabilities [B, C] float32 of each row's choices, equation (1). Each row sums to 1; a row without choices, or with logits that are not finite,
  is NaN.

  Args:
    logits: [B, n], as `answer_logits`.
    choices: int32 [B, n], which choice 0 ... C-1 a token stands for in the row, `NO_CHOICE` for none.
    num_choices: C.
  """
  kept = jnp.where(choices == NO_CHOICE, -jnp.inf, logits.astype(jnp.float32))
  p = jax.nn.softmax(kept, axis=-1)
  return jnp.sum(p[..., None] * jax.nn.one_hot(choices, num_choices), axis=-2)  # a row of zeros for NO_CHOICE


def expected_score(probabilities: jax.Array, values: jax.Array) -> jax.Array:
  """[B] float32, the mean of `values` [C] under `probabilities` [B, C], equation (2)."""
  return jnp.sum(probabilities * values[None], axis=-1)


def score(cfg: qwen3_vl.Config, params: dict, tokens: jax.Array, token_count: jax.Array, images: Sequence[jax.Array], answers: jax.Array,
          values: jax.Array, shard: Shard = identity) -> jax.Array:
  """[B] float32 in min(values) .. max(values): the expected score of pictures where each of `answers` [n] is one token and worth `values` [n].

  The reward of a method with the judge as a frozen role; other arguments as in `answer_logits`.
  """
  logits = answer_logits(cfg, params, tokens, token_count, images, answers, shard)
  return expected_score(jax.nn.softmax(logits, axis=-1), values)
