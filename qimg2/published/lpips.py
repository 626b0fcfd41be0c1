"""Weights of LPIPS, from a file that is made of the `lpips` package with one command (for VGG16: net='vgg'):

  python -c "import lpips, safetensors.torch as s; s.save_file({k: v for k, v in lpips.LPIPS(net='alex').state_dict().items() if
  k.startswith(('net.', 'lin')) and not k.startswith('lins.')}, 'lpips_alex.safetensors')"

Which network it is, its shapes tell.
"""

import pathlib

from qimg2.models import lpips
from qimg2.published.files import open_file
from qimg2.published.names.lpips import table
from qimg2.published.tensors import load_tensors


def load_lpips(path: str | pathlib.Path) -> tuple[lpips.Config, dict]:
  """(config, weights on the first device) of a .safetensors file with the state dict of `lpips.LPIPS`.

  Raises:
    ValueError: no such file, a damaged one, or one of another network.
  """
  files = open_file(path)
  files = files.without([name for name in files.shapes if name.startswith(("lins.", "scaling_layer."))])  # the same again, and constants
  cfg = lpips.Config("vgg" if "net.slice1.2.weight" in files.shapes else "alex")
  return cfg, load_tensors(files, lpips.specs(cfg), table(cfg), label="lpips")
