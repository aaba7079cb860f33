"""Turns texts into batches of tokens."""
