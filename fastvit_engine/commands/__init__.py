"""One module a command; each has `add(commands)`, which declares it, and imports what it runs only when it runs."""
