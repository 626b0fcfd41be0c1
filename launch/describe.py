"""Lists every weight of a config's networks without allocating one.

  python -m launch.describe --config=configs/pretrain.py [--num_devices=128] [--json]
"""

import json

from absl import flags
from ml_collections import config_flags

from launch import cli
from qimg2.runtime.config import parse
from qimg2.runtime.weight_table import describe, table


def define_flags() -> None:
  """The flags of this launcher."""
  config_flags.DEFINE_config_file("config", None, "File of the config.")
  flags.mark_flag_as_required("config")
  flags.DEFINE_integer("num_devices", 0, "Devices to spread the weights over; 0 takes the config's mesh.", lower_bound=0)
  flags.DEFINE_bool("json", False, "Print JSON.")


def main(_) -> None:
  """Describes as the flags say."""
  description = describe(parse(flags.FLAGS.config), flags.FLAGS.num_devices)
  print(json.dumps(description) if flags.FLAGS.json else table(description))


if __name__ == "__main__":
  cli.run(main, define_flags)
