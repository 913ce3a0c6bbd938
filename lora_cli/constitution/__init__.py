"""Constitutional AI (arXiv 2212.08073): principles, what is asked by them, and who answers."""
