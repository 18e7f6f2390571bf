"""Retrieval: encoders, distillation and what is done with their scores."""
