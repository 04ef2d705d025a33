"""Benchmarks that anyone can rerun: each measures both sides in turns within one run and reports ratios."""
