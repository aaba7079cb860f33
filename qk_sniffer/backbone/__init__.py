"""Loads the decoder and shows the vectors of its attention calls."""
