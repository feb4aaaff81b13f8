"""Which tensor goes where in a model, and how."""
