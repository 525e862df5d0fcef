"""Programs that build, fetch, compare and document; run by hand and by the Makefile."""
