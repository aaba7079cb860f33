"""Turns a command line into checked jobs."""
