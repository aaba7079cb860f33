"""The durable store: journal, compaction, manifest. Knows nothing of models."""
