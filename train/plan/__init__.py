"""`graftax plan`: what a run needs, before it runs; from the compiled program, or from a model of it."""
