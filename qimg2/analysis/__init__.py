"""What a step costs, without running it: operations from the configs, traffic from the compiled program, bounds from a chip's rates."""
