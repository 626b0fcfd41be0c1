"""Run configurations: `get_config(arg)` of each file returns a `ConfigDict`; `configs/x.py:smoke` shrinks it to two steps on a CPU."""
