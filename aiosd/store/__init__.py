"""The store: what agents keep. A service with one thread and one database (see `main`)."""
