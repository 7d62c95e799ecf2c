"""Synthetic scenes with true captions: a data set that needs no download."""
