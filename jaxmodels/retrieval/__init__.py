"""Dense retrieval: encoders of queries and documents, their losses, exact search and metrics."""
