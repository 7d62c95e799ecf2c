"""Weights in and out: our folders, the released files, other sizes."""
