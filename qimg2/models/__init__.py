"""The three networks, and LPIPS, which compares pictures. Each is a frozen dataclass `Config`, `specs(cfg)` (a tree of `params.Param`) and pure
functions of weights and arrays."""
