"""Loads the decoder and shows the query and key of its attention calls."""
