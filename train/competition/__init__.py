"""The tracks of an AI security competition: train, attack or defend, submit, be scored.

Y. Dong et al., "Artificial Intelligence Security Competition (AISC)", arXiv 2212.03412. The
report's score formulas and budgets were not available; those used are in `configs/rules`.
"""
