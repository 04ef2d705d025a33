"""Core ML: a vision package and a stateful multifunction language package, verified by running what was saved.

Each precision gets a bundle of its own, `fp16` (for devices) and `fp32` (to tell a wrong program from rounding).
"""
