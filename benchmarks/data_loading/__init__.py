"""`fastvit data bench`: what reading, decoding and augmenting costs on this machine, beside the usual ways to do it."""
