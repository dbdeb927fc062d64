"""One file an operation: its inputs, its plain formulation, its work, and who can run it."""
