"""Stores rows durably: journal, compaction, manifest. Does not depend on models."""
