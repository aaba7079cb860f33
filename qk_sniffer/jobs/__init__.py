"""Runs one job, and tracks the jobs of a sweep."""
