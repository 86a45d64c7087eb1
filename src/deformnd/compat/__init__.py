"""Faces of other packages, so that their users move by changing an import."""
