"""Measures and checks capture on one GPU within a budget of minutes and bytes (`gpu.sh`, README.md)."""
