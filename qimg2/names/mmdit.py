"""Published tensor names of the generator (`QwenImage21Transformer2DModel` in diffusers)."""

from qimg2.models import mmdit
from qimg2.pretrained import Entry, Table


def table(cfg: mmdit.Config) -> Table:
  """Path of `mmdit.specs(cfg)` -> published name."""
  del cfg  # every size has the same names
  return {
      "img_in": Entry("img_in.weight"),
      "txt_in/norm": Entry("txt_in.text_norm.weight", "plain"),
      "txt_in/in": Entry("txt_in.in_layer.weight"),
      "txt_in/out": Entry("txt_in.out_layer.weight"),
      "time/in": Entry("time_text_embed.timestep_embedder.linear_1.weight"),
      "time/out": Entry("time_text_embed.timestep_embedder.linear_2.weight"),
      "modulation": Entry("modulation.1.weight"),
      "blocks/attn/q": Entry("transformer_blocks.{}.attn.to_q.weight"),
      "blocks/attn/k": Entry("transformer_blocks.{}.attn.to_k.weight"),
      "blocks/attn/v": Entry("transformer_blocks.{}.attn.to_v.weight"),
      "blocks/attn/out": Entry("transformer_blocks.{}.attn.to_out.0.weight", num_inputs=2),
      "blocks/attn/norm_q": Entry("transformer_blocks.{}.attn.norm_q.weight", "plain"),
      "blocks/attn/norm_k": Entry("transformer_blocks.{}.attn.norm_k.weight", "plain"),
      "blocks/mlp/gate": Entry("transformer_blocks.{}.img_mlp.gate_layer.weight"),
      "blocks/mlp/proj": Entry("transformer_blocks.{}.img_mlp.proj.weight"),
      "blocks/mlp/out": Entry("transformer_blocks.{}.img_mlp.out.weight"),
      "norm_out": Entry("norm_out.linear.weight"),
      "proj_out": Entry("proj_out.weight"),
  }
