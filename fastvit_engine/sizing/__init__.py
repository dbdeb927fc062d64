"""What a run needs of memory, and the ZeRO stage and batch split that are chosen for it."""
