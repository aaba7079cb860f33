"""Loads the decoder, and shows what happens inside it."""
