"""Sends a real server what nobody should send it, and judges every answer by the server's own document."""
