"""Graphs: message passing, subgraph learning, reviewer recommendation, change points."""
