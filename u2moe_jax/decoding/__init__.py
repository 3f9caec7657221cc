"""Search, rescoring and recognisers."""
