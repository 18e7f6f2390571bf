"""What challenge participants do, as functions: U-Nets, losses, inference, metrics, rankings.

After "Biomedical image analysis competitions: The state of current participation practice",
M. Eisenmann et al., arXiv 2212.08568. The procedures follow nnU-Net, surface-distance and
challengeR, as every module says.
"""
