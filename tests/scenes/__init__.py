"""Synthetic scenes for other tasks than the demo's: questions, statements about two images, labels."""
