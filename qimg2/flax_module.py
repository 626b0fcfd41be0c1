"""The generator as a Flax module, for code that expects one: the same weights, the same function, declared once in `qimg2.models.mmdit`.

  model = MMDiT(cfg)
  variables = model.init(key, target, t, text, images, layout)     variables["params"] is a tree as `mmdit.specs(cfg)` declares it
  velocity = model.apply(variables, target, t, text, images, layout)

`flax.nnx` takes it, unboxed, through `nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(target, ...)`. Left out: the prefix cache of sampling, for
which `mmdit.prefix_cache` and `mmdit.apply_cached` take `variables["params"]`.
"""

import flax.linen as nn
import jax

from qimg2 import params as P
from qimg2.models import mmdit
from qimg2.sharding import Shard, identity


class MMDiT(nn.Module):
  """`mmdit.apply` with its weights in the collection "params".

  Attributes:
    cfg: sizes.
    shard: constrains activations to the mesh.
    boxed: whether `init` returns each weight in an `nn.LogicallyPartitioned` that names its logical axes, as `nn.get_partition_spec` and
      `nn.logical_to_mesh_sharding` expect; `apply` takes both.
  """
  cfg: mmdit.Config
  shard: Shard = identity
  boxed: bool = False

  @nn.compact
  def __call__(self, target: jax.Array, t: jax.Array, text: jax.Array, images: jax.Array | None, layout: mmdit.Layout) -> jax.Array:
    """The velocity [B, N, C] of the target latents, float32; arguments as in `mmdit.apply`."""
    key = self.make_rng("params") if self.is_initializing() else None
    params = {name: self.param(name, self._initializer(name, specs, key)) for name, specs in mmdit.specs(self.cfg).items()}
    return mmdit.apply(self.cfg, params, target, t, text, images, layout, self.shard)

  @nn.nowrap
  def _initializer(self, name: str, specs: dict | P.Param, key: jax.Array | None):
    """Draws the weights under a name. Each key is folded from the weight's path, as in `params.init`: a new weight changes no other draw."""
    def draw(own_key):
      drawn = P.init({name: specs}, own_key if key is None else key)[name]
      if not self.boxed:
        return drawn
      return jax.tree.map(lambda p, x: nn.LogicallyPartitioned(x, p.axes), specs, drawn, is_leaf=P.is_param)
    return draw
