"""Joins measuring, planning and the adapter while a model is trained."""
