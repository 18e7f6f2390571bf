"""Networks on graphs, and what is measured on graphs."""
