"""Tables of published tensor names, one module per model: `table(cfg)` maps every path of `specs(cfg)` to an `Entry` (`qimg2.published.tensors`)."""
