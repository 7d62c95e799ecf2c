"""Vectors of all images or texts of a data set, and what is most similar to a query."""
