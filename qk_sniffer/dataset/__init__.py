"""Reads, describes and checks a finished dataset."""
