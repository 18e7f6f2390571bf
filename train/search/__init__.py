"""Evolutionary searches over supernets: pure `init` and `step`, seeded, resumable."""
