"""The three networks. Each is a frozen dataclass `Config`, `specs(cfg)` (a tree of `params.Param`) and pure functions of weights and arrays."""
