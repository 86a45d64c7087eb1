"""How the operators are computed. Nothing in here is public."""
