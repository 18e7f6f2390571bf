"""PyTorch checkpoints in, out, and compared, with no PyTorch installed.

`checkpoint` reads and writes files, `restricted_pickle` and `torch_archive` know PyTorch's own
formats, `conversion` is the one rule between names and layouts, `catalog` finds models by name,
`activations` compares layer by layer, `record` runs in a PyTorch user's environment.
"""
