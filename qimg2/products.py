"""Products of activations and weights, the gradient of which by the weights is float32 whatever the activations are.

Left to itself, the gradient by a weight of a product in bfloat16 is bfloat16: each device rounds its part, the parts are added over the devices
in bfloat16, and only the sum becomes float32. Over 64 devices that is a relative error of about 1 % in each sum; twice the bytes avoid it. So the
product of the backward pass, which a TPU or GPU accumulates in float32 in any case, gives float32 here; the sum over devices follows from that.

Each product is a primitive with rules of its own, because `jax.custom_vjp` would forbid `jax.jvp`. Under `jax.vmap` it is the plain product, with the
plain gradient. Weights that already have the type of the activations, or activations in float32, take the plain product too.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def linear(x: jax.Array, weight: jax.Array, num_dims: int = 1) -> jax.Array:
  """`x` times `weight`, contracting the last `num_dims` dimensions of `x` with the first of `weight`; result in the type of `x`."""
  return (_linear if _differ(x, weight) else _dot)(x, weight, num_dims=num_dims)


def convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """`x` [B, H, W, C] with `kernel` [3, 3, C, D] over it, in the type of `x`: [B, H, W, D] for stride 1, the border padded with zeros on all sides;
  [B, H/2, W/2, D] for stride 2, padded below and on the right."""
  return (_convolve if _differ(x, kernel) else _window)(x, kernel, stride=stride)


def _differ(x: jax.Array, weight: jax.Array) -> bool:
  return weight.dtype == jnp.float32 and x.dtype != jnp.float32


def _dot(x: jax.Array, weight: jax.Array, *, num_dims: int) -> jax.Array:
  return jax.lax.dot_general(x, weight.astype(x.dtype), ((tuple(range(x.ndim - num_dims, x.ndim)), tuple(range(num_dims))), ((), ())))


def _dot_gradient(cotangent: jax.Array, x: jax.Array, *, num_dims: int) -> jax.Array:
  rows = tuple(range(x.ndim - num_dims))
  return jax.lax.dot_general(x, cotangent, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)


def _window(x: jax.Array, kernel: jax.Array, *, stride: int) -> jax.Array:
  return jax.lax.conv_general_dilated(x, kernel.astype(x.dtype), (stride, stride), (_padding(stride),) * 2,
                                      dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _window_gradient(cotangent: jax.Array, x: jax.Array, *, stride: int) -> jax.Array:
  """A convolution of the picture with the cotangent, in which channels are the batch, and the batch is what is summed over."""
  return jax.lax.conv_general_dilated(x, cotangent, (1, 1), (_padding(stride),) * 2, rhs_dilation=(stride, stride),
                                      dimension_numbers=("CHWN", "IHWO", "HWNC"), preferred_element_type=jnp.float32)


def _padding(stride: int) -> tuple[int, int]:
  return (1, 1) if stride == 1 else (0, 1)


def _bilinear(name: str, product: Callable[..., jax.Array], weight_gradient: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """`product(x, weight, **sizes)` as a primitive whose gradient by the weight is `weight_gradient(cotangent, x, **sizes)`."""
  primitive = Primitive(name)
  shape_of = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)

  def shape(x, weight, **sizes):
    out = jax.eval_shape(lambda *args: product(*args, **sizes), shape_of(x), shape_of(weight))
    return jax.core.ShapedArray(out.shape, out.dtype)

  def by_x(cotangent, x, weight, **sizes):
    gradient, = jax.linear_transpose(lambda x: product(x, weight, **sizes), shape_of(x.aval))(cotangent)
    return gradient

  def batched(args, dims, **sizes):
    return jax.vmap(lambda *args: product(*args, **sizes), dims)(*args), 0

  primitive.def_impl(product)
  primitive.def_abstract_eval(shape)
  mlir.register_lowering(primitive, mlir.lower_fun(product, multiple_results=False))
  ad.defbilinear(primitive, by_x, lambda cotangent, x, weight, **sizes: weight_gradient(cotangent, x, **sizes))
  batching.primitive_batchers[primitive] = batched
  return primitive.bind


_linear = _bilinear("linear", _dot, _dot_gradient)
_convolve = _bilinear("convolve", _window, _window_gradient)
