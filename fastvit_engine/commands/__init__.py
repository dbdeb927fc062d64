"""One module a command; each has `add(commands, purpose)`, which declares it, and loads what it needs when it runs."""
