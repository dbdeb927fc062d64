"""Studies: runs that differ in some settings, what they reached, and how that is shown."""
