"""This package as a kernel of the Hugging Face Hub: `python -m fastvit_kernels.hub --help`."""
