"""`fastvit bench data`: what reading, decoding and cropping cost on this machine, beside the usual ways to do it."""
