"""Speed against PyTorch; never asserts a time. `python -m benchmarks [NAME ...]` runs them."""

from jaxmodels.platform_choice import choose_platform

# Before a benchmark imports jax or PyTorch: both then have the allocator that the commands have.
choose_platform()
