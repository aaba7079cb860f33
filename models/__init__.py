"""Holds one file for each model type whose family differs from the generic one (see `qk_sniffer.families`)."""
