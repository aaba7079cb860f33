"""Draws the pictures of a dataset, and gives all pictures their style."""
