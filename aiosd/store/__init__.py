"""The store: notes and files of agents. A service with one thread and one database (see `main`)."""
