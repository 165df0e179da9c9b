"""Measures what a store's domains and its router are worth: held-out loss and benchmarks, mode by mode."""
