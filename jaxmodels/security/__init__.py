"""Attacks as pure functions, uncertainty of classifiers, and the tracks of a security contest."""
