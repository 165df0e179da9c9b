"""Imports a store that was published in the format of the paper's own code. Knows that format, no running server."""
