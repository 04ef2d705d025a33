"""Lowering of pruned models to mobile runtimes, the bundle they ship in, and the tools that verify it."""
