"""The models of the field over any embedding collection."""
