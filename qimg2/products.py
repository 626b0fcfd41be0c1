"""Products of activations and weights, the gradient of which by the weights is float32 whatever the activations are.

Left to itself, the gradient by a weight of a product in bfloat16 is bfloat16: each device rounds its part, the parts are added over the devices
in bfloat16, and only the sum becomes float32. Over 64 devices that is a relative error of about 1 % in each sum; twice the bytes avoid it. So the
product of the backward pass, which a TPU or GPU accumulates in float32 in any case, gives float32 here; the sum over devices follows from that.

The gradient by the kernel of a convolution over many positions is, on a CPU, a sum of products, one for each tap, over strips of the picture that
stay in the cache: with g the cotangent, o the stride and x padded as the convolution pads it,

  gradient[i, j] = sum over b, h, w of x[b, o h + i, o w + j] g[b, h, w]^T              (1)

XLA's own way there first transposes picture and cotangent through memory, pixels innermost.

Each product is a primitive with rules of its own, because `jax.custom_vjp` would forbid `jax.jvp`. Under `jax.vmap` it is the plain product, with the
plain gradient. Weights that already have the type of the activations, or activations in float32, take the plain product too, but for a convolution
over many positions.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

LARGE = 2**16  # positions of all pictures of a batch from which (1) is the faster way (benchmarks/convolutions.py)
STRIP = 4  # rows


def linear(x: jax.Array, weight: jax.Array, num_dims: int = 1) -> jax.Array:
  """`x` times `weight`, contracting the last `num_dims` dimensions of `x` with the first of `weight`; result in the type of `x`."""
  return (_linear if _differ(x, weight) else _dot)(x, weight, num_dims=num_dims)


def convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """`x` [B, H, W, C] with `kernel` [3, 3, C, D] over it, in the type of `x`: [B, H, W, D] for stride 1, the border padded with zeros on all sides;
  [B, H/2, W/2, D] for stride 2, padded below and on the right."""
  large = math.prod(x.shape[:3]) >= LARGE * stride**2
  return (_convolve if large or _differ(x, kernel) else _window)(x, kernel, stride=stride, precision=jax.config.jax_default_matmul_precision)


def _differ(x: jax.Array, weight: jax.Array) -> bool:
  return weight.dtype == jnp.float32 and x.dtype != jnp.float32


def _dot(x: jax.Array, weight: jax.Array, *, num_dims: int) -> jax.Array:
  return jax.lax.dot_general(x, weight.astype(x.dtype), ((tuple(range(x.ndim - num_dims, x.ndim)), tuple(range(num_dims))), ((), ())))


def _dot_gradient(cotangent: jax.Array, x: jax.Array, *, num_dims: int) -> jax.Array:
  rows = tuple(range(x.ndim - num_dims))
  return jax.lax.dot_general(x, cotangent, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)


def _window(x: jax.Array, kernel: jax.Array, *, stride: int, precision: str | None) -> jax.Array:
  return jax.lax.conv_general_dilated(x, kernel.astype(x.dtype), (stride, stride), (_padding(stride),) * 2,
                                      dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision)


def _window_gradient(cotangent: jax.Array, x: jax.Array, **sizes) -> jax.Array:
  by_window, by_taps = (functools.partial(gradient, **sizes) for gradient in (_gradient_by_window, _gradient_by_taps))
  if math.prod(cotangent.shape[:3]) < LARGE:
    return by_window(cotangent, x)
  return jax.lax.platform_dependent(cotangent, x, cpu=by_taps, default=by_window)


def _gradient_by_window(cotangent: jax.Array, x: jax.Array, *, stride: int, precision: str | None) -> jax.Array:
  """A convolution of the picture with the cotangent, in which channels are the batch, and the batch is what is summed over."""
  return jax.lax.conv_general_dilated(x, cotangent, (1, 1), (_padding(stride),) * 2, rhs_dilation=(stride, stride),
                                      dimension_numbers=("CHWN", "IHWO", "HWNC"), precision=precision, preferred_element_type=jnp.float32)


def _gradient_by_taps(cotangent: jax.Array, x: jax.Array, *, stride: int, precision: str | None) -> jax.Array:
  """Equation (1), strip by strip."""
  x = jnp.pad(x, ((0, 0), _padding(stride), _padding(stride), (0, 0)))
  _, height, width, _ = cotangent.shape
  rows = math.gcd(height, STRIP)
  last_row, last_column = stride * (rows - 1), stride * (width - 1)

  def add_strip(number, total):
    strip = jax.lax.dynamic_slice_in_dim(x, number * stride * rows, last_row + 3, axis=1)
    g = jax.lax.dynamic_slice_in_dim(cotangent, number * rows, rows, axis=1)
    taps = [[strip[:, i:i + last_row + 1:stride, j:j + last_column + 1:stride] for j in range(3)] for i in range(3)]
    return total + jnp.stack([jnp.stack([_product_of_rows(tap, g, precision) for tap in row]) for row in taps])
  return jax.lax.fori_loop(0, height // rows, add_strip, jnp.zeros((3, 3, x.shape[-1], cotangent.shape[-1]), jnp.float32))


def _product_of_rows(x: jax.Array, g: jax.Array, precision: str | None) -> jax.Array:
  x, g = (y.reshape(-1, y.shape[-1]).astype(jnp.float32) for y in (x, g))
  return jax.lax.dot_general(x, g, (((0,), (0,)), ((), ())), precision=precision)


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
