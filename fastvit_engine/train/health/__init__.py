"""What training does when a step goes wrong: notice, name the cause, rewind, skip."""
