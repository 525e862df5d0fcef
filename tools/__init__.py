"""What builds, fetches, compares and documents; run by hand and by the Makefile."""
