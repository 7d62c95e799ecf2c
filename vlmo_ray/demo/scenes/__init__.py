"""Synthetic scenes with true captions, questions and statements: a data set that needs no download."""
