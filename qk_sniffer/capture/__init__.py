"""Chooses rows, gathers them, and proves them."""
