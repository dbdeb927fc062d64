"""From encoded images to training pixels: decoding, crops, RandAugment, mixup, and the random numbers they draw."""
