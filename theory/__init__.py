"""Deep matrix factorization: dynamics, landscape, stages, figures."""
