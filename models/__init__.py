"""One flat file for each model family that differs from the generic one (see `qk_sniffer.families`)."""
