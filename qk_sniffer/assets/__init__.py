"""Files shipped with the package: the checkpoint of `model=pydoc_tiny`."""
