"""The processes of a run: how they start, find each other, wait for each other, and end."""
