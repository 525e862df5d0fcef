"""What builds, fetches and documents; run by hand and by the Makefile."""
