"""Speed against PyTorch; never asserts a time. `python -m benchmarks [NAME ...]` runs them."""
