"""A conformance suite for bundles: is it whole, is it right, how fast is it, how much memory does it take?

Reads bundles only. It imports nothing of the pruner, so it runs wherever the runtime and a bundle are.
"""
