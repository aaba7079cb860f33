"""Declares rotary parameters that depend on the length of a text, for models with a head_dim of 8."""

BOUNDARY = 24
"""The most tokens of a text with the first frequencies."""

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": BOUNDARY,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
