"""Names of LPIPS in the state dict of the `lpips` package."""

from qimg2.models import lpips
from qimg2.published.tensors import Entry


def table(cfg: lpips.Config) -> dict[str, Entry]:
  """The published tensor of every path of `lpips.specs(cfg)`."""
  entries = {}
  for i, convs in enumerate(lpips.SLICES[cfg.net]):
    entries[f"slice_{i}/weights"] = Entry(f"lin{i}.model.1.weight", "plain", published_shape=(1, convs[-1].num_out, 1, 1))
    for j, conv in enumerate(convs):
      name = f"net.slice{i + 1}.{conv.number}"
      entries |= {f"slice_{i}/conv_{j}/kernel": Entry(f"{name}.weight", "conv"), f"slice_{i}/conv_{j}/bias": Entry(f"{name}.bias", "plain")}
  return entries
