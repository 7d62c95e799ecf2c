"""Reads and writes weights: our folders, released files, other image sizes and heads."""
