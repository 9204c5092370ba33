"""Losses, in modules of the names that they have in FireANTs."""
