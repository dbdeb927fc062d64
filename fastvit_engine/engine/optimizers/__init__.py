"""The optimizers that a run may choose, on whole parameters and on ZeRO's flat parts of them."""
